"""Files of rows, read one by one, each row with its place: JSONL, JSON, CSV, Parquet, also gzipped.

Places count lines from 1, blank lines included, whatever the line ends are (a CSV row that spans lines: its
last); Parquet and JSON arrays have no lines and count rows from 0. Text is UTF-8, with or without a
byte-order mark; anything else is an error, never a replacement.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rlx.core.errors import DataError
from rlx.core.text import safe_text

Row = dict[str, Any]
MAX_ROW_BYTES = 8 * 2**20  # a longer line is a damaged file, or one that was not meant as rows
BOM = b"\xef\xbb\xbf"


def kind_of(path: Path) -> str:
    """The file's kind by its name, ``.gz`` aside: a key of SUFFIXES, or an empty string."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def read_file(path: Path) -> Iterator[tuple[Row, str]]:
    """Each row of a file and its place.

    Args:
        path: a file whose name ends in one of SUFFIXES, ``.gz`` behind it or not.

    Raises:
        DataError: with the place, for anything that cannot be read.
    """
    kind = kind_of(path)
    if not kind:
        raise DataError(
            f"{safe_text(path)} is of no known kind",
            code="E-DATA-KIND",
            expected=", ".join(SUFFIXES) + ", each also .gz",
        )
    try:
        with _open(path) as file:
            yield from SUFFIXES[kind](file, safe_text(path.name))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{safe_text(path)} cannot be read",
            code="E-DATA-READ",
            got=safe_text(error) or type(error).__name__,
        ) from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end) of each line that is not blank."""
    number = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(raw) > MAX_ROW_BYTES:
            raise _bad(f"{name}:{number}", "row too long", f"over {MAX_ROW_BYTES:,} bytes")
        text = _decode(raw, number, name).strip("\r\n")
        if text.strip():
            yield number, text


def _jsonl(file: IO[bytes], name: str) -> Iterator[tuple[Row, str]]:
    for number, line in _lines(file, name):
        place = f"{name}:{number}"
        yield _object(_parse(line, place), place), place


def _json(file: IO[bytes], name: str) -> Iterator[tuple[Row, str]]:
    """A list of objects, an object with such a list under ``data``, or JSONL under the wrong suffix."""
    raw = file.read()
    try:
        whole = json.loads(raw.removeprefix(BOM))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSONL in a file that is called .json
            yield from _jsonl(io.BytesIO(raw), name)
            return
        raise _bad(f"{name}:{error.lineno}:{error.colno}", "invalid JSON", error.msg) from error
    except (ValueError, RecursionError) as error:
        raise _bad(name, "invalid JSON", str(error)) from error
    rows = whole.get("data", [whole]) if isinstance(whole, dict) else whole
    if not isinstance(rows, list):
        raise _bad(name, "no list of rows", type(rows).__name__, 'a list of objects, or {"data": [objects]}')
    for index, row in enumerate(rows):
        place = f"{name}, row {index}"
        yield _object(row, place), place


def _csv(file: IO[bytes], name: str) -> Iterator[tuple[Row, str]]:
    number = 0  # lines handed to the reader; its own line_num lags behind where a row is malformed

    def lines() -> Iterator[str]:
        nonlocal number
        for number, text in _decoded(file, name):  # noqa: B007  # read below
            yield text

    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        reader = csv.DictReader(lines(), strict=True)
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise _bad(f"{name}:1", "a column name twice", ", ".join(columns), "each column name once")
        for row in reader:
            place = f"{name}:{number}"
            if None in row:
                got = f"{len(columns) + len(row[None])}"
                raise _bad(place, "more fields than columns", got, f"{len(columns)}")
            yield row, place
    except csv.Error as error:
        raise _bad(f"{name}:{number}", "invalid CSV", str(error)) from error
    finally:
        csv.field_size_limit(limit)


def _decoded(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of each line, blank ones too: a quoted CSV field may contain them."""
    for number, raw in enumerate(file, 1):
        yield number, _decode(raw, number, name).rstrip("\r\n") + "\n"


def _decode(raw: bytes, number: int, name: str) -> str:
    try:
        return (raw.removeprefix(BOM) if number == 1 else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise _bad(f"{name}:{number}", "invalid UTF-8", got) from error


def _parquet(file: IO[bytes], name: str) -> Iterator[tuple[Row, str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        source = io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file
        index = 0
        for batch in parquet.ParquetFile(source).iter_batches(1024):
            for row in batch.to_pylist():
                yield row, f"{name}, row {index}"
                index += 1
    except pyarrow.ArrowException as error:
        raise _bad(name, "invalid Parquet", str(error).splitlines()[0]) from error


SUFFIXES: dict[str, Callable[[IO[bytes], str], Iterator[tuple[Row, str]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _bad(place, "invalid JSON", f"column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise _bad(place, "invalid JSON", str(error)) from error


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise _bad(place, "not an object", type(row).__name__, "an object of columns and values")
    return row


def _bad(place: str, what: str, got: str, expected: str = "") -> DataError:
    return DataError(
        f"{place}: {what} ({safe_text(got)})", code="E-DATA-READ", where=place, expected=expected
    )
