"""Files of rows: what is read, and where a fault is said to be."""

import csv
import gzip
import io
import json

import pytest

from rlx.core.errors import DataError
from rlx.core.row_files import MAX_ROW_BYTES, read_file

ROWS = [{"prompt": "Wie heißt du?\u2028x", "answer": "1"}, {"prompt": "b\n\nc", "answer": "2"}]


def as_csv(rows):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["prompt", "answer"])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows):
    import pyarrow as pa
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


WRITERS = {
    "a.jsonl": lambda rows: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode(),
    "a.ndjson": lambda rows: "\r\n\r\n".join(json.dumps(r) for r in rows).encode(),
    "list.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "data.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "lines.json": lambda rows: "\n".join(json.dumps(r) for r in rows).encode(),
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + "\n".join(json.dumps(r) for r in rows).encode(),
    "a.csv": as_csv,
    "A.PARQUET": as_parquet,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_rows(tmp_path, name, zipped):
    raw = WRITERS[name](ROWS)
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    assert [row for row, _ in read_file(path)] == ROWS


def read_bytes(tmp_path, name, raw):
    path = tmp_path / name
    path.write_bytes(raw)
    return list(read_file(path))


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"], ids=["fault[D8]-LF", "fault[D8]-CRLF"])
def test_a_malformed_line_is_named_by_its_number(tmp_path, ending):
    # 16 lines before it, three of them blank; line 17 is cut in the middle.
    lines = [b'{"prompt": "x"}'] * 16 + [b'{"prompt": "cut'] + [b'{"prompt": "x"}'] * 3
    lines[2] = lines[3] = b""
    lines[9] = b"  "
    with pytest.raises(DataError) as caught:
        read_bytes(tmp_path, "data.jsonl", ending.join(lines))
    assert caught.value.what.startswith("data.jsonl:17: invalid JSON (column 12: Unterminated string")
    assert caught.value.exit_code == 3


def test_good_lines_know_their_numbers(tmp_path):
    rows = read_bytes(tmp_path, "data.jsonl", b'{"a": 1}\r\n\r\n\n{"a": 2}')
    assert rows == [({"a": 1}, "data.jsonl:1"), ({"a": 2}, "data.jsonl:4")]


DAMAGED = {
    "fault[D9]-utf8": (
        "d.jsonl",
        b'{"a": 1}\n{"a": "\xff"}\n',
        "d.jsonl:2: invalid UTF-8 (byte 0xff at byte 8",
    ),
    "fault[D9]-utf8-csv": ("d.csv", b"a,b\n1,2\n\xe4,2\n", "d.csv:3: invalid UTF-8 (byte 0xe4 at byte 1"),
    "fault[D9]-utf8-json": ("d.json", b'["\xff"]', "d.json: invalid JSON ('utf-8' codec"),
    "fault[D9]-huge": (
        "d.jsonl",
        b'{"a": 1}\n{"a": "' + b"x" * 10**7 + b'"}',
        "d.jsonl:2: row too long (over 8,388,608",
    ),
    "fault[D8]-number": ("d.jsonl", b"1" * 5000, "d.jsonl:1: invalid JSON (Exceeds the limit"),
    "fault[D8]-nested": ("d.jsonl", b"[" * 200_000, "d.jsonl:1: invalid JSON (maximum recursion depth"),
    "fault[D8]-array": ("d.jsonl", b"[1, 2]", "d.jsonl:1: not an object (list)"),
    "fault[D8]-json": (
        "d.json",
        b'[\n {"a": 1},\n {"a" 2}]',
        "d.json:3:7: invalid JSON (Expecting ':' delimiter",
    ),
    "fault[D8]-item": ("d.json", b'[{"a": 1}, 2]', "d.json, row 1: not an object (int)"),
    "fault[D8]-scalar": ("d.json", b"3", "d.json: no list of rows (int)"),
    "fault[D8]-csv-long": ("d.csv", b"a,b\n1,2\n1,2,3\n", "d.csv:3: more fields than columns (3)"),
    "fault[D8]-csv-quote": ("d.csv", b'a,b\n"x"y,2\n', "d.csv:2: invalid CSV"),
    "fault[D8]-csv-twice": ("d.csv", b"a,a\n1,2\n", "d.csv:1: a column name twice (a, a)"),
    "fault[D8]-parquet": ("d.parquet", b"PAR1 nothing of the kind PAR1", "d.parquet: invalid Parquet"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_damage_is_named_with_its_place(tmp_path, fault):
    name, raw, message = DAMAGED[fault]
    with pytest.raises(DataError) as caught:
        read_bytes(tmp_path, name, raw)
    assert caught.value.what.startswith(message)


def test_the_longest_row_allowed_is_read(tmp_path):
    raw = b'{"a": "' + b"x" * (MAX_ROW_BYTES - 10) + b'"}\n'
    assert len(raw) == MAX_ROW_BYTES
    assert len(read_bytes(tmp_path, "d.jsonl", raw + b"{}")) == 2


@pytest.mark.parametrize("raw", [b"not gzip", gzip.compress(b'{"a": 1}\n' * 99)[:-12]], ids=["other", "cut"])
def test_a_damaged_gzip_is_a_data_error(tmp_path, raw):
    with pytest.raises(DataError, match="cannot be read"):
        read_bytes(tmp_path, "d.jsonl.gz", raw)


def test_csv_places_and_missing_fields(tmp_path):
    rows = read_bytes(tmp_path, "d.csv", b'a,b\r\n\r\n1,"x\r\ny"\r\n2\r\n')
    # Line 2 is blank; the first row spans lines 3 and 4; the second has no field for b.
    assert rows == [({"a": "1", "b": "x\ny"}, "d.csv:4"), ({"a": "2", "b": None}, "d.csv:5")]


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match="no known kind"):
        read_bytes(tmp_path, "d.pickle", b"")
