"""Rows from anywhere: files, folders, the hub, registered data sets, Python lists; no torch.

Files are JSONL, JSON, CSV or Parquet, each also gzipped. A row that cannot be read is an error that names
file and line; nothing is skipped and nothing repaired. All rows are held in memory; ``limit`` stops reading
early.

A folder is one data set: when its files are named by split (``train.jsonl``, ``test-00000.parquet``), those
of the split wanted are read, else all of them in the order of their names. Loading scripts are never run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from rlx.core.errors import DataError
from rlx.core.hub import unreachable
from rlx.core.options import close
from rlx.core.row_files import SUFFIXES, Row, kind_of, read_file
from rlx.core.text import safe_text

SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Table:
    """A data set in memory.

    Attributes:
        rows: one dict a row.
        name: what to call it in messages.
        places: where each row came from; empty when its number says it all.
    """

    rows: list[Row]
    name: str
    places: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", safe_text(self.name))  # a file may be called anything

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """Where row ``index`` (counted from 0) came from: ``data.jsonl:17``, or ``row 16``."""
        return safe_text(self.places[index]) if self.places else f"row {index}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, in hexadecimal: the same rows give the same in any file format."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, default=_plain).encode() + b"\n")
        return digest.hexdigest()


def _plain(value: Any) -> str:
    """A value that JSON does not know, as text that is the same in every process."""
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else f"{type(value).__qualname__}"


def read_rows(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    eats: str = "prompts",
) -> Table:
    """The rows of a data set.

    Args:
        source: a list of mappings with ``fraction``, each a data set of which that share of rows is used;
            a registered name or reference (``wordmath``, ``my_pkg:MyData``); a file or folder; a hub id;
            a mapping ``{name: …, split: …, config: …}`` of one of these, with further options of a registered
            data set; a list of dicts; an object with ``rows(split)``; a ``datasets`` object.
        split: split of a registered, hub or saved data set, or of a folder with files named by split.
        config: configuration of a hub data set.
        limit: read only so many rows, from the first.
        eats: what the rows are for; a registered data set with an option ``eats`` is told.

    Raises:
        DataError: missing, unreadable, malformed, or no rows.
    """
    if _is_mixture(source):
        return _mixed(source, split, limit, eats)
    options: dict[str, Any] = {}
    if isinstance(source, Mapping) and isinstance(source.get("name"), str):
        options = {key: value for key, value in source.items() if key not in ("name", "split", "config")}
        split, config = source.get("split", split), source.get("config", config)
        source = source["name"]
    if isinstance(source, str | Path):
        table = _named(str(source), options, split, config, limit, eats)
    else:
        table = _table(_from_object(source, split), f"the {type(source).__name__} given", limit)
    if not table.rows:
        raise DataError(
            f"{table.name} has no rows", code="E-DATA-EMPTY", got="0 rows", expected="at least one row"
        )
    return table


def _is_mixture(source: Any) -> bool:
    """Whether this is a list of data sets, not of rows: each names one, and how much of it is used."""
    if not isinstance(source, list):
        return False
    shares = [isinstance(one, Mapping) and {"name", "fraction"} <= one.keys() for one in source]
    place = shares.index(False) if any(shares) and not all(shares) else None
    if place is not None and (isinstance(source[place], str) or "name" in source[place]):
        raise DataError(
            "some data sets of a mixture have a name and a fraction, others do not",
            code="E-DATA-OPTIONS",
            where=f"the one at place {place}",
            got=safe_text(source[place], 80),
            hint="fraction: 1 uses all rows",
        )
    return bool(shares) and all(shares)


def _mixed(parts: list[Mapping[str, Any]], split: str, limit: int | None, eats: str) -> Table:
    """The rows of several data sets, of each the share that is asked for, evenly spaced.

    They lie evenly among each other, so that the first rows are a mixture too, of the same shares.
    """
    found: list[tuple[float, Row, str]] = []  # how far into its own data set, row, place
    for part in parts:
        share = part["fraction"]
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise DataError(
                f"fraction of {safe_text(part['name'], 80)} is no share of its rows",
                code="E-DATA-OPTIONS",
                got=safe_text(share, 40),
                expected="a number over 0, at most 1",
            )
        rest = {key: value for key, value in part.items() if key != "fraction"}
        table = read_rows(rest, split=split, eats=eats)
        count = max(1, round(len(table) * share))
        for number in range(count):
            taken = int(number / share)
            place = f"{table.name}, {table.place(taken)}"
            found.append(((number + 0.5) / count, table.rows[taken], place))
    found = sorted(found, key=lambda one: one[0])[:limit]
    name = " + ".join(safe_text(part["name"], 60) for part in parts)
    return Table([row for _, row, _ in found], name, [place for *_, place in found])


def _named(
    source: str, options: Mapping[str, Any], split: str, config: str | None, limit: int | None, eats: str
) -> Table:
    if is_registered(source):
        from rlx.plugins import references

        known = references.config_of(references.resolve("dataset", source))
        told = {"eats": eats} if any(f.name == "eats" for f in fields(known)) else {}
        dataset = references.make("dataset", source, {**told, **options})
        return _table(dataset.rows(split), f"{source}/{split}", limit)
    if options:
        raise DataError(
            f"only a registered data set has options; {safe_text(source)} is none",
            code="E-DATA-OPTIONS",
            got=", ".join(map(str, options)),
            expected="name, split, config",
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, split, limit)
    if path.is_file():
        return _from_files([path], path.name, limit)
    if kind_of(path) or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise _missing(path)
    return _from_hub(source, split, config, limit)


def is_registered(source: Any) -> bool:
    """Whether this is a registered name or a reference to code, not a file, folder or hub id."""
    if isinstance(source, Mapping):
        source = source.get("name")
    if not isinstance(source, str):
        return hasattr(source, "rows")  # the Dataset protocol
    from rlx.plugins import registry

    names = {name for entry in registry.registry().list("dataset") for name in (entry.name, entry.qualified)}
    return source in names or (":" in source and not Path(source).exists())


def _missing(path: Path) -> DataError:
    there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    return DataError(
        f"no such file: {safe_text(path)}{close(path.name, there)}",
        code="E-DATA-MISSING",
        expected="a file, a folder, a hub id, or one of the names that `rlx plugins list` shows",
    )


def _table(rows: Iterable[Any], name: str, limit: int | None) -> Table:
    out = []
    for index, row in enumerate(islice(rows, limit)):
        if not isinstance(row, Mapping):
            raise DataError(
                f"a row of {name} is no mapping of columns to values",
                code="E-DATA-ROW",
                where=f"row {index}",
                got=type(row).__name__,
                expected="a dict",
            )
        out.append(dict(row))
    return Table(out, name)


def _from_object(source: Any, split: str) -> Iterable[Any]:
    if hasattr(source, "rows"):
        rows: Iterable[Any] = source.rows(split)
        return rows
    if isinstance(source, Mapping):  # a datasets.DatasetDict, or a plain dict of lists of rows
        if split not in source:
            raise _no_split(type(source).__name__, split, source)
        return _from_object(source[split], split)
    if isinstance(source, Iterable):
        return source
    raise DataError(
        f"a {type(source).__name__} is no data set",
        code="E-DATA",
        expected="a name, a file, a folder, a hub id, a list of dicts or a datasets.Dataset",
    )


def _no_split(name: str, split: str, splits: Iterable[str]) -> DataError:
    found = sorted(map(str, splits))
    return DataError(
        f"{safe_text(name)} has no split {split!r}{close(split, found)}",
        code="E-DATA-SPLIT",
        got=", ".join(found) or "none",
        hint=f"--dataset-split {found[0]}" if found else "",
    )


def _from_files(paths: list[Path], name: str, limit: int | None) -> Table:
    rows, places = [], []
    for row, place in islice(_each(paths), limit):
        rows.append(row)
        places.append(place)
    return Table(rows, name, places)


def _each(paths: list[Path]) -> Iterator[tuple[Row, str]]:
    for path in paths:
        yield from read_file(path)


def _from_folder(folder: Path, split: str, limit: int | None) -> Table:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        import datasets

        saved = _quietly(lambda: datasets.load_from_disk(str(folder)), str(folder))
        return _table(_from_object(saved, split), folder.name, limit)
    paths = sorted(
        path for path in folder.iterdir() if kind_of(path) and not path.name.startswith((".", "_"))
    )
    if not paths:
        script = any(folder.glob("*.py"))
        raise DataError(
            f"{safe_text(folder)} holds no data files",
            code="E-DATA-EMPTY",
            got="a loading script, which is never run" if script else "no file of a known kind",
            expected=", ".join(SUFFIXES) + ", each also .gz",
        )
    by_split = {name: [p for p in paths if _split_of(p) == name] for name in SPLITS}
    if any(by_split.values()):
        paths = by_split.get(split, [])
        if not paths:
            raise _no_split(str(folder), split, [name for name, files in by_split.items() if files])
    return _from_files(paths, folder.name, limit)


def _split_of(path: Path) -> str:
    return path.name.replace("-", ".").replace("_", ".").split(".")[0].lower()


def _from_hub(name: str, split: str, config: str | None, limit: int | None) -> Table:
    import datasets

    def load() -> Any:
        if not _was_loaded(name) and (reason := unreachable(name, repo_type="dataset")):
            raise OSError(reason)
        return datasets.load_dataset(name, config, split=split)

    return _table(_quietly(load, name), f"{name}/{split}", limit)


def _was_loaded(name: str) -> bool:
    """Whether the library keeps a data set of this name, with other separators in it there."""
    from datasets import config

    kept, plain = Path(config.HF_DATASETS_CACHE), name.replace("/", "").replace("_", "").lower()
    return kept.is_dir() and any(path.name.replace("_", "").lower() == plain for path in kept.iterdir())


def _quietly(load: Any, name: str) -> Any:
    """What ``load`` gives; the many types that the library raises become one DataError."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"data set {safe_text(name)} cannot be loaded",
            code="E-DATA-MISSING",
            got=safe_text(first),
            expected="a file or folder, a name that `rlx plugins list` shows, or a hub id within reach",
            hint="check the name; offline, give the path of a local copy",
        ) from error
