"""The one door through which weights and tokenizers come in from a folder or the hub.

What lies there is data from others: weights are read from safetensors only, code beside them runs only with
``trust_remote_code``, and what is wrong with a folder is told before training, by file and by name.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlx.core.errors import ConfigError, DivergedError
from rlx.core.hub import unreachable
from rlx.core.settings import EMBEDDED
from rlx.core.text import safe_text

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_LISTED = 5  # names that an error lists before it only counts


@dataclass(frozen=True)
class Source:
    """Where something pretrained comes from.

    Attributes:
        name: a local folder or a hub id.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether Python code beside the weights may run.
        role: what it will be, for messages: ``model``, ``reference_model``, ``value_model``, ``tokenizer``.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    role: str = "model"

    @classmethod
    def of(
        cls, name: str, *, role: str, revision: str | None = None, trust_remote_code: bool = False
    ) -> Source:
        """The source that an option names; the embedded model's name becomes its folder."""
        if name == EMBEDDED and not Path(name).exists():
            from rlx.plugins.datasets import tiny_path

            return cls(str(tiny_path()), None, False, role)
        return cls(name, revision, trust_remote_code, role)

    @property
    def folder(self) -> Path | None:
        """The local folder, None for a hub id."""
        return Path(self.name) if Path(self.name).is_dir() else None

    @property
    def arguments(self) -> dict[str, Any]:
        """What every ``from_pretrained`` needs; never an implied consent to run code."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    def check_exists(self) -> None:
        """Tell at once of a name that is no folder, and no hub id or out of reach.

        Raises:
            ConfigError: for such a name.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        if self.folder is not None:
            return
        looks_local = self.name.startswith((".", "/", "~"))
        try:
            validate_repo_id(self.name)
        except HFValidationError:
            looks_local = True
        if looks_local:
            raise ConfigError(
                f"{self.role} {self.name!r} does not exist",
                code="E-MODEL-MISSING",
                expected="a local folder, a hub id (name or owner/name), or 'tiny'",
            )
        if reason := unreachable(self.name, revision=self.revision):
            raise _unreachable(self, reason)


def load_config(source: Source) -> Any:
    """The transformers configuration of a model, before any weight is read.

    Raises:
        ConfigError: no such folder or hub id, not a model, code without consent, offline and not cached.
    """
    from transformers import AutoConfig

    check_folder(source)
    with translated(source):
        return AutoConfig.from_pretrained(source.name, **source.arguments)


def load_weights(
    source: Source, auto_class: Any, config: Any, *, dtype: torch.dtype, new: str = "", **arguments: Any
) -> Any:
    """A model with every weight it needs, all of them finite.

    Args:
        source: where from.
        auto_class: ``AutoModelForCausalLM`` or a sibling.
        config: what ``load_config`` gave.
        dtype: type of the floating-point weights.
        new: a weight that may be missing, and is drawn at random then.
        arguments: more for ``from_pretrained``.

    Raises:
        ConfigError: unreadable, truncated or missing weights.
        DivergedError: a weight is NaN or infinite.
    """
    with translated(source), quiet():
        model, loading = auto_class.from_pretrained(
            source.name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **source.arguments,
            **arguments,
        )
    missing = set(loading["missing_keys"]) - {new}
    if missing:
        raise ConfigError(
            f"the weights of {source.role} {source.name!r} are incomplete",
            code="E-MODEL-INCOMPLETE",
            got=f"{len(missing)} missing: {_names(missing)}",
            expected=f"every weight of {type(model).__name__}; nothing is filled with random numbers",
            hint="check that the folder holds a whole model of this architecture",
        )
    check_finite(dict(model.named_parameters()), f"{source.role} {source.name}")
    return model


def restore_weights(model: Any, folder: Path) -> None:
    """Fill a model in place with the weights that its own ``save_pretrained`` wrote, bit for bit.

    Raises:
        ConfigError: a weight is missing or has another shape; nothing was changed then.
    """
    source = Source(str(folder), role="checkpoint")
    # float32 holds every half-precision number exactly, so this detour is lossless for mixed types too. It
    # goes through from_pretrained because architectures may save under other names than they compute with.
    saved = load_weights(source, type(model), load_config(source), dtype=torch.float32)
    fill(model.state_dict(), saved.state_dict(), where=str(folder))


def fill(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, where: str) -> None:
    """Copy saved tensors into the ones of the same name, in place.

    Raises:
        ConfigError: a name is missing or superfluous, or a shape differs; nothing was copied then.
    """
    for name in sorted(own.keys() | saved.keys()):
        have = tuple(saved[name].shape) if name in saved else None
        want = tuple(own[name].shape) if name in own else None
        if have != want:
            raise ConfigError(
                f"the weight {safe_text(name, 120)!r} does not fit",
                code="E-MODEL-INCOMPLETE",
                where=where,
                got="no such weight" if have is None else f"shape {have}",
                expected="no such weight" if want is None else f"shape {want}",
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        DivergedError: with the first such weight's name.
    """
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise DivergedError(
                f"the weight {safe_text(name, 120)!r} is not finite",
                code="E-MODEL-NONFINITE",
                where=where,
                got=f"{bad} of {tensor.numel()} numbers are NaN or infinite",
                hint="use weights from before they diverged",
            )


def check_folder(source: Source) -> None:
    """Everything that can be said about a local model folder without loading it.

    Raises:
        ConfigError: missing, an adapter, code without consent, no safetensors, truncated files.
    """
    source.check_exists()
    folder = source.folder
    if folder is None:
        return
    if not (folder / CONFIG_FILE).is_file():
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            base = read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
            raise ConfigError(
                f"{source.role} {source.name!r} is an adapter, not a model",
                code="E-MODEL-ADAPTER",
                hint=f"--model {base} --adapter {source.name}",
            )
        raise ConfigError(
            f"{source.role} {source.name!r} is not a model folder",
            code="E-MODEL-MISSING",
            got="no config.json",
            expected="a folder written by save_pretrained, or a hub id",
        )
    check_code(source, folder / CONFIG_FILE)
    check_safetensors(source, folder)


def check_code(source: Source, file: Path) -> None:
    """Refuse a folder that names Python code of its own, unless the user consented.

    Raises:
        ConfigError: ``auto_map`` in the file and ``trust_remote_code`` off. Nothing was imported.
    """
    if not source.trust_remote_code and file.is_file():
        mapped = read_json(file).get("auto_map")
        if mapped:
            raise _needs_code(source, where=f"auto_map in {file}", got=safe_text(json.dumps(mapped), 120))


def _needs_code(source: Source, *, where: str = "", got: str = "") -> ConfigError:
    return ConfigError(
        f"{source.role} {source.name!r} wants to run Python code that lies beside it",
        code="E-MODEL-CODE",
        where=where,
        got=got,
        expected="trust_remote_code, given on purpose; nothing was imported",
        hint="read the code, then --trust-remote-code; or remove auto_map to use transformers' own class",
    )


def check_safetensors(source: Source, folder: Path) -> None:
    """Every weight file is there, has a readable header, and is as long as its header says.

    Raises:
        ConfigError: with the file's name, and its size against the expected one.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            others = sorted(path.name for path in folder.glob("*.bin"))
            raise ConfigError(
                f"{source.role} {source.name!r} has no {file.name}",
                code="E-MODEL-WEIGHTS",
                got=f"pickled weights ({_names(others)}), which can run code when they are read"
                if others
                else "",
                expected="weights in safetensors",
                hint="convert them where they are trusted: model.save_pretrained(FOLDER)" if others else "",
            )
        check_safetensors_file(file)


def check_safetensors_file(file: Path) -> None:
    """The header of one safetensors file is readable and its size is the one that the header implies.

    Raises:
        ConfigError: otherwise.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if length > size - 8:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{file.name} is not a readable safetensors file",
                code="E-MODEL-WEIGHTS",
                where=str(file),
                got=f"{size} bytes; {safe_text(error, 80)}",
                hint="fetch the file again",
            ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ConfigError(
            f"{file.name} has the wrong size",
            code="E-MODEL-WEIGHTS",
            where=str(file),
            got=f"{size} bytes",
            expected=f"{expected} bytes",
            hint="fetch the file again",
        )


@contextlib.contextmanager
def translated(source: Source) -> Iterator[None]:
    """Errors of transformers and the hub, as ours.

    Raises:
        ConfigError: for whatever goes wrong inside with reading the source.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if "trust_remote_code" in str(error):
            raise _needs_code(source) from error
        if source.folder is None:
            raise _unreachable(source, error) from error
        raise ConfigError(
            f"{source.role} {source.name!r} cannot be loaded", code="E-MODEL-LOAD", got=safe_text(error)
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: if it is none.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{file.name} is not JSON", code="E-MODEL-LOAD", where=str(file), got=safe_text(error, 120)
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file.name} is not a JSON object", code="E-MODEL-LOAD", where=str(file))
    return value


def _unreachable(source: Source, error: Exception | str) -> ConfigError:
    from huggingface_hub import constants, is_offline_mode

    reason = "offline (HF_HUB_OFFLINE) and not cached" if is_offline_mode() else safe_text(error, 200)
    return ConfigError(
        f"{source.role} {source.name!r} is not here and cannot be fetched",
        code="E-MODEL-MISSING",
        where=f"cache {constants.HF_HUB_CACHE}",
        got=reason,
        hint=f"fetch it where there is a network: hf download {source.name}",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and reports to itself: what matters in them is raised as an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _names(names: Any) -> str:
    listed = sorted(str(name) for name in names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return safe_text(", ".join(listed[:_LISTED]) + more)
