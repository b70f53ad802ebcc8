"""http: scores from a reward server, for a reward that runs elsewhere or in another language.

``--reward http://host:8000/score`` is short for ``{name: http, url: …}``. Completions go out in requests of
``batch_size`` items, several at a time. A request that fails in passing is repeated; whatever fails in the
end is a failed item, never a score. What is said on the wire stands in ``rlx.rewards.http_dialects``, limits
on what a server may do in ``rlx.core.http_client``.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.core.servers import ServerError, check_url, fits_header, pause
from rlx.core.text import redact, safe_text
from rlx.plugins.contract import Failed, Reward, Rewarded
from rlx.rewards.http_dialects import DIALECTS, Items, Score, read, request

if TYPE_CHECKING:
    from rlx.core.http_client import Client

WHO = "the reward server"
HINTS: dict[int | str, str] = {
    401: "give a token: --http.token_env NAME or --http.token_file FILE",
    403: "give a token that it accepts: --http.token_env NAME or --http.token_file FILE",
    404: "check the path of the URL",
    413: "send fewer completions in one request: --http.batch_size 4",
    "size": "one with long lists needs more: --http.reply_bytes 65536 (for each completion)",
    "certificate": "name the certificates to trust: --http.ca_file FILE; checking is never switched off",
}
REPLY_BASE = 64 * 1024  # bytes of an answer beside those of its items
LARGEST_TOKEN_FILE = 16 * 1024
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class Http(Reward):
    """Scores that a server gives.

    A request is repeated after a broken connection, a time-out and the answers 408, 425, 429 and 5xx. The
    waits are drawn at random below a bound that doubles, or are what the server asks for. Other answers are
    final. A server that answers 429 gets half as many requests at a time. The metrics ``retries`` and
    ``failed`` count requests that were repeated and items without a score.
    """

    independent: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        """Options of http."""

        url: str = opt(doc="address of the server, http:// or https://, without a password or a key in it")
        dialect: str = opt(
            "auto",
            "what is said: rlx's own, or that of another trainer's reward server; auto says the first "
            "request in all of them and goes on in the one that is answered",
            choices=DIALECTS,
        )
        batch_size: int = opt(16, "completions of one request", gt=0)
        concurrency: int = opt(8, "requests at a time, at most", gt=0)
        timeout: float = opt(600.0, "for one call with all its requests and repetitions", gt=0, unit="s")
        connect_timeout: float = opt(10.0, "for one connection", gt=0, unit="s")
        read_timeout: float = opt(120.0, "longest silence of the server", gt=0, unit="s")
        retries: int = opt(5, "repetitions of a request that failed in passing", ge=0)
        max_wait: float = opt(
            30.0, "longest wait before a repetition, also if the server asks for more", gt=0, unit="s"
        )
        columns: list[str] | None = opt(None, "data-set columns that are sent; by default all", commas=True)
        label_column: str = opt("answer", "column that openrlhf servers get as labels, null without it")
        model: str = opt("model", "name of the model that llamafactory servers are told")
        token_env: str | None = opt(None, "environment variable that holds a token for the server")
        token_file: str | None = opt(None, "file that holds a token for the server")
        token_header: str = opt(
            "Authorization", "header for the token; in Authorization it stands after 'Bearer'"
        )
        ca_file: str | None = opt(None, "certificates (PEM) to trust in the place of the system's")
        reply_bytes: int = opt(
            4096, "largest answer for each completion, beside 64 KiB for all", gt=0, unit="bytes"
        )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        check_url(config.url, WHO, "token_env: NAME or token_file: FILE")
        _check_ca_file(config.ca_file)
        self.columns = tuple(config.columns or ())
        self.chunk_size = config.batch_size
        self._gates: dict[asyncio.AbstractEventLoop, tuple[Gate, int]] = {}
        self._token = _read_token(config)
        self._dialect = config.dialect

    async def __call__(  # type: ignore[override]  # prompt_texts are among the base's columns
        self,
        *,
        prompts: list[Any],
        prompt_texts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        run_step: int | None = None,
        **columns: list[Any],
    ) -> Rewarded:
        """One score a completion, ``Failed`` where none came.

        Args:
            prompts: N texts or message lists.
            prompt_texts: N prompts as the policy saw them.
            completions: N texts.
            completion_ids: N lists of token ids.
            run_step: the run's step, None outside a run.
            columns: the data's columns.
        """
        from rlx.core.http_client import connect

        wanted = columns if self.config.columns is None else {name: columns[name] for name in self.columns}
        items = Items(prompts, prompt_texts, completions, completion_ids, wanted, run_step)
        config, size = self.config, self.config.batch_size
        with self._gate() as gate:
            async with connect(
                config.url,
                token=self._token,
                ca_file=config.ca_file,
                connections=config.concurrency,
                connect_timeout=config.connect_timeout,
                read_timeout=config.read_timeout,
                who=WHO,
                hints=HINTS,
            ) as client:
                call = _Call(config, client, items, self._dialect, gate)
                starts = range(0, len(items), size)
                requests = [range(start, min(start + size, len(items))) for start in starts]
                answered = await asyncio.gather(*map(call.score, requests))
        if call.dialect != "auto":  # which a call may still be whose requests all failed
            self._dialect = call.dialect
        scores = [score for scores in answered for score in scores]
        failed = sum(isinstance(score, ServerError) for score in scores)
        told = f"for {failed}/{len(items)} items"
        return Rewarded(
            [self._failed(score, told) if isinstance(score, ServerError) else score for score in scores],
            metrics={"retries": float(call.retries), "failed": float(failed)},
        )

    @contextmanager
    def _gate(self) -> Iterator[Gate]:
        """The gate of the calls that are under way together: what the server is promised holds for all."""
        loop = asyncio.get_running_loop()
        gate, calls = self._gates.get(loop, (Gate(self.config.concurrency), 0))
        self._gates[loop] = gate, calls + 1
        try:
            yield gate
        finally:
            _, calls = self._gates.pop(loop)
            if calls > 1:
                self._gates[loop] = gate, calls - 1

    def _failed(self, error: ServerError, items: str) -> Failed:
        """Why an item has no score, in one line, and what to do."""
        said = f"; it said: {error.got}" if error.got else ""
        expected = f"; expected {error.expected}" if error.expected else ""
        url = safe_text(redact(self.config.url), 200)
        back = "when it is back: rlx resume RUN_DIR; " if error.passing else ""
        hint = error.hint or f"{back}try it: rlx reward try {url} --prompt Hi --completion Hello"
        return Failed(f"{error.what} {items} ({url}){expected}{said}", hint)


class _Call:
    """One call on its way: requests, repetitions, the deadline.

    Args:
        config: options.
        client: connections to the server.
        items: N completions.
        dialect: what is said; ``auto`` until the server has answered.
        gate: how many requests at a time, with those of other calls.
    """

    def __init__(self, config: Http.Config, client: Client, items: Items, dialect: str, gate: Gate) -> None:
        self.config, self.client, self.items, self.dialect = config, client, items, dialect
        self.retries, self.gate = 0, gate
        self.deadline = asyncio.get_running_loop().time() + self.config.timeout

    async def score(self, index: Sequence[int]) -> list[Score | ServerError]:
        """Scores of the items numbered by index, a ServerError for those that were not scored in the end."""
        scores: dict[int, Score | ServerError] = {}
        waiting, tries = list(index), 0
        while waiting:
            tries += 1
            failure = await self._try(waiting, scores)
            waiting = [i for i in waiting if isinstance(scores[i], Failed | ServerError)]
            if not waiting or (failure is not None and not failure.passing):
                break
            wait = pause(tries, None if failure is None else failure.wait, self.config.max_wait)
            if tries > self.config.retries or self._left() <= wait:
                self._give_up(waiting, scores, tries)
                break
            self.retries += 1
            await asyncio.sleep(wait)
        return [scores[i] for i in index]

    async def _try(self, index: list[int], scores: dict[int, Score | ServerError]) -> ServerError | None:
        """Ask for some items once; what came back, or the error, lands in scores."""
        try:
            async with asyncio.timeout_at(self.deadline), self.gate:
                began = time.monotonic()
                try:
                    found = await self._exchange(index)
                except ServerError as failure:
                    if failure.busy:
                        self.gate.halve(began)
                    raise
                self.gate.widen()
        except TimeoutError:
            failed = ServerError(f"{WHO} did not answer within {self.config.timeout:g} s")
        except ServerError as raised:
            failed = raised
        else:
            scores.update(zip(index, found, strict=True))
            return None
        scores.update(dict.fromkeys(index, failed))
        return failed

    async def _exchange(self, index: list[int]) -> list[Score]:
        """One request and its answer."""
        call = secrets.token_hex(4)
        ids = [f"{call}-{i}" for i in index]
        dialect, config = self.dialect, self.config
        body = request(
            dialect, self.items.take(index), ids, model=config.model, label_column=config.label_column
        )
        answer = await self.client.post(body, REPLY_BASE + config.reply_bytes * len(index))
        understood, scores = read(dialect, answer, ids)
        if self.dialect == "auto":
            self.dialect = understood
        return scores

    def _left(self) -> float:
        return self.deadline - asyncio.get_running_loop().time()

    def _give_up(self, index: list[int], scores: dict[int, Score | ServerError], tries: int) -> None:
        """Say of items that no try scored how often it was tried."""
        for i in index:
            last = scores[i]
            if isinstance(last, ServerError):
                shown = last.what.removeprefix(f"{WHO} ")
                told = ServerError(f"{WHO} failed {tries} times (last: {shown})", passing=True, got=last.got)
            else:
                reason = last.reason if isinstance(last, Failed) else ""
                told = ServerError(f"it {reason} ({tries} tries)", hint="mend what it says there")
            scores[i] = told


class Gate:
    """Lets at most so many requests through at a time, fewer after a server said that it is too much.

    Args:
        most: requests at a time when all goes well.
    """

    def __init__(self, most: int) -> None:
        self.limit, self._most, self._open, self._narrowed = float(most), most, 0, 0.0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._open < int(self.limit))
            self._open += 1

    async def __aexit__(self, *raised: object) -> None:
        async with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def halve(self, began: float) -> None:
        """Half as many at a time; once for all the requests that were under way together.

        Args:
            began: when the request began that was too much, ``time.monotonic()``.
        """
        if began >= self._narrowed:
            self.limit, self._narrowed = max(1.0, self.limit / 2), time.monotonic()

    def widen(self) -> None:
        """One more at a time after as many answers as go through at a time."""
        self.limit = min(float(self._most), self.limit + 1 / self.limit)


def _check_ca_file(name: str | None) -> None:
    """Refuse certificates that cannot be read, before anything else is done."""
    if name is None:
        return
    import ssl

    try:
        ssl.create_default_context(cafile=name)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            "the certificates to trust cannot be read",
            code="E-CONFIG-FILE",
            where=f"ca_file {safe_text(name, 120)}",
            got=safe_text(error, 120),
            expected="a file of certificates in PEM",
        ) from error


def _read_token(config: Http.Config) -> tuple[str, str] | None:
    """The header and the token for it; None for no token."""
    if config.token_env is None and config.token_file is None:
        return None
    where = (
        f"token_env {config.token_env}" if config.token_file is None else f"token_file {config.token_file}"
    )

    def wrong(what: str, expected: str) -> ConfigError:
        return ConfigError(what, code="E-CONFIG-TOKEN", where=safe_text(where, 200), expected=expected)

    if config.token_env is not None and config.token_file is not None:
        raise wrong("token_env and token_file are both given", "one of them")
    if config.token_env is not None and not _VARIABLE.fullmatch(config.token_env):
        where = "token_env"  # what it holds may be the token itself
        raise wrong("token_env is no name of a variable", "letters, digits and _, not the token itself")
    if not _HEADER.fullmatch(config.token_header):
        raise wrong("token_header is no name of a header", "letters, digits and dashes")
    if config.token_env is not None:
        token = os.environ.get(config.token_env, "")
    else:
        try:
            with Path(str(config.token_file)).expanduser().open(encoding="utf-8") as file:
                token = file.read(LARGEST_TOKEN_FILE)
        except (OSError, UnicodeDecodeError) as error:
            raise wrong(
                f"the token cannot be read: {type(error).__name__}", "a file with one line"
            ) from error
    token = token.strip()
    if not token:
        raise wrong("there is no token", "an environment variable or a file that holds it")
    if not fits_header(token):
        raise wrong("the token has characters that no header takes", "printable ASCII in one line")
    return config.token_header, token
