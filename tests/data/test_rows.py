"""Where rows come from, and what they are called."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.errors import DataError
from rlx.core.rows import Table, is_registered, read_rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_and_a_list_of_the_same_rows_have_one_fingerprint(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"n": 2, "prompt": "b"}]
    from_file = read_rows(write(tmp_path / "d.jsonl", rows))
    from_list = read_rows(rows)
    assert from_file.rows == from_list.rows == rows
    assert from_file.fingerprint == from_list.fingerprint
    assert (from_file.place(1), from_list.place(1)) == ("d.jsonl:2", "row 1")


@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=4), data=st.data())
def test_the_fingerprint_knows_every_value_and_the_order_of_rows_but_not_of_columns(rows, data):
    turned = [dict(reversed(row.items())) for row in rows]
    assert Table(rows, "a").fingerprint == Table(turned, "b").fingerprint
    index = data.draw(st.integers(0, len(rows) - 1))
    changed = [*rows[:index], {**rows[index], "new": 0.5}, *rows[index + 1 :]]
    assert Table(rows, "a").fingerprint != Table(changed, "a").fingerprint


def test_limit_stops_before_a_fault(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken\n')
    assert len(read_rows(path, limit=2)) == 2
    with pytest.raises(DataError, match=r"d\.jsonl:3"):
        read_rows(path)


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    write(tmp_path / "train-00001.jsonl", [{"n": 2}])
    write(tmp_path / "train-00000.jsonl", [{"n": 1}])
    write(tmp_path / "test.jsonl", [{"n": 3}])
    (tmp_path / "README.md").write_text("no data")
    assert [row["n"] for row in read_rows(tmp_path).rows] == [1, 2]
    assert read_rows(tmp_path, split="test").rows == [{"n": 3}]
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path, split="validation")
    assert caught.value.got == "test, train"


def test_a_folder_without_split_names_is_read_whole(tmp_path):
    write(tmp_path / "b.jsonl", [{"n": 2}])
    write(tmp_path / "a.jsonl", [{"n": 1}])
    table = read_rows(tmp_path, split="test")
    assert [row["n"] for row in table.rows] == [1, 2]
    assert table.place(1) == "b.jsonl:1"


@pytest.mark.parametrize("name", ["scripted"], ids=["fault[S21]"])
def test_a_loading_script_is_never_run(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    sentinel = tmp_path / "ran"
    (folder / f"{name}.py").write_text(f"open({str(sentinel)!r}, 'w')")
    with pytest.raises(DataError) as caught:
        read_rows(str(folder))
    assert caught.value.exit_code == 3
    assert "loading script" in caught.value.got
    assert not sentinel.exists()


def test_datasets_objects_and_saved_folders(tmp_path):
    import datasets

    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    train = datasets.Dataset.from_list(rows)
    both = datasets.DatasetDict({"train": train, "test": train.select([0])})
    both.save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    assert read_rows(train).rows == rows
    assert read_rows(both, split="test").rows == rows[:1]
    assert read_rows(tmp_path / "both").rows == rows
    assert read_rows(tmp_path / "one", limit=1).rows == rows[:1]
    assert read_rows(train.to_iterable_dataset(), limit=1).rows == rows[:1]
    with pytest.raises(DataError, match="has no split 'dev'"):
        read_rows(both, split="dev")


def test_a_registered_name_takes_options_and_split():
    table = read_rows({"name": "wordmath", "train_rows": 3, "data_seed": 5})
    assert len(table) == 3
    assert table.name == "wordmath/train"
    assert read_rows({"name": "wordmath", "split": "test"}, limit=2).name == "wordmath/test"
    assert is_registered("wordmath") and is_registered("rlx/wordmath")
    assert not is_registered("nobody/nothing")


def test_a_reference_to_code(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Mine:\n    def rows(self, split):\n        return [{'prompt': split}]\n")
    assert read_rows(f"{path}:Mine", split="test").rows == [{"prompt": "test"}]


def test_an_object_with_rows():
    class Mine:
        def rows(self, split):
            return [{"prompt": split}]

    assert read_rows(Mine()).rows == [{"prompt": "train"}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "has no rows"),
        ([{"a": 1}, "b"], "no mapping of columns"),
        (3, "a int is no data set"),
        ("./nowhere.jsonl", "no such file"),
        ("nowhere/deep/down", "no such file"),
        ("wordmth.jsonl", "no such file"),
        ("nobody/nothing", "cannot be loaded"),
        ({"name": "x.jsonl", "train_rows": 3}, "only a registered data set has options"),
    ],
    ids=["fault[D6]-none", "row", "number", "missing", "missing-folder", "missing-name", "hub", "options"],
)
def test_no_data_is_a_data_error(source, message):
    with pytest.raises(DataError, match=message) as caught:
        read_rows(source)
    assert caught.value.exit_code == 3
    assert len(caught.value.lines()) <= 12


def test_a_misspelt_file_is_suggested(tmp_path):
    write(tmp_path / "data.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"did you mean 'data.jsonl'"):
        read_rows(tmp_path / "dta.jsonl")


def test_reading_rows_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, rlx.core.rows; assert not {'torch', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
