from __future__ import annotations

import json
import math
import os
import pickle
import resource
import struct
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlx.core import checkpoint, state
from rlx.core.errors import CheckpointError, PluginError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def bits(value):
    """A value with types, order of keys and the bits of floats, for comparison."""
    if isinstance(value, torch.Tensor):
        raw = (
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist() if value.numel() else []
        )
        return "tensor", str(value.dtype), tuple(value.shape), raw
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    if isinstance(value, dict):
        return "dict", [(bits(key), bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [bits(item) for item in value]
    return type(value).__name__, value


def round_trip(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    for name in (state.STRUCTURE, state.TENSORS):
        (folder / name).unlink(missing_ok=True)
    state.save_state(folder, value)
    return state.load_state(folder)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
)
KEYS = (
    st.text(max_size=4, alphabet="ab$.[]'") | st.integers(-3, 3) | st.tuples(st.integers(0, 2), st.booleans())
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(value=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_nested_state_comes_back_equal_in_value_type_and_order(tmp_path_factory, value):
    value = {**value, "t": torch.tensor([1.5, -0.0])}
    assert bits(round_trip(tmp_path_factory.getbasetemp() / "state", value)) == bits(value)


def test_tensors_keep_dtype_shape_and_every_bit(tmp_path):
    torch.manual_seed(0)
    big = torch.randn(4, 6)
    value = {str(dtype): (torch.randn(2, 3) * 50).to(dtype) for dtype in DTYPES}
    value |= {
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
    }
    value |= {
        "view": big[1:3],
        "transposed": big.t(),
        "same": big,
        "again": big,
        "parameter": torch.nn.Parameter(big),
    }
    value |= {"a.b": {"c": big}, "a": {"b.c": big + 1, "b": {"c": big + 2}}}
    loaded = round_trip(tmp_path, value)
    assert bits(loaded) == bits(value)
    loaded["same"].zero_()
    assert loaded["again"].abs().sum() > 0  # memory of its own


def test_an_optimizer_and_random_states_come_back_bit_for_bit(tmp_path):
    import random

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1 / 3, betas=(0.9, 0.999))
    for _ in range(3):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    value = {"optimizer": optimizer.state_dict(), "python": random.getstate(), "torch": torch.get_rng_state()}
    loaded = round_trip(tmp_path, value)
    assert bits(loaded) == bits(value)
    random.setstate(loaded["python"])
    optimizer.load_state_dict(loaded["optimizer"])


def test_an_ordered_dict_is_taken_as_a_dict(tmp_path):
    assert round_trip(tmp_path, OrderedDict(b=1, a=OrderedDict())) == {"b": 1, "a": {}}


class Text(str):
    pass


@pytest.mark.parametrize(
    "bad,path",
    [
        ({"a": {"b": [0, object()]}}, "a.b[1]"),
        ({"x": {1, 2}}, "x"),
        ({"x": b"bytes"}, "x"),
        ({"x": namedtuple("Point", "x")(1)}, "x"),
        ({"x": Text("x")}, "x"),
        ({"x": 1j}, "x"),
        ({"x": torch.float32}, "x"),
        ({"x": torch.eye(2).to_sparse()}, "x"),
        ({"x": torch.empty(2, device="meta")}, "x"),
        ({object(): 1}, "key"),
        ({"x": __import__("numpy").float64(1)}, "x"),
    ],
    ids=lambda value: f"fault[P14]-{value}" if isinstance(value, str) else "",
)
def test_what_a_checkpoint_cannot_keep_is_refused_by_its_key_path(tmp_path, bad, path):
    with pytest.raises(PluginError) as caught:
        round_trip(tmp_path, bad)
    assert path in str(caught.value) and caught.value.hint + caught.value.expected
    assert not (tmp_path / state.STRUCTURE).exists()


def test_a_state_nested_without_end_is_refused(tmp_path):
    value: dict = {}
    value["self"] = value
    with pytest.raises(PluginError, match="nested"):
        round_trip(tmp_path, value)


# --- malice ---


class Trap:
    """Unpickling it leaves a sentinel."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


def saved(tmp_path):
    folder = tmp_path / "state"
    round_trip(folder, {"a": torch.ones(3), "b": [1, 2.5]})
    return folder


@pytest.mark.parametrize("writer", [pickle.dumps, "torch"], ids=["fault[R34]-pickle", "fault[R34]-torch"])
@pytest.mark.parametrize("name", [state.TENSORS, state.STRUCTURE])
def test_a_pickle_in_disguise_is_refused_and_not_executed(tmp_path, writer, name):
    folder, sentinel = saved(tmp_path), tmp_path / "sentinel"
    if writer == "torch":
        torch.save(Trap(sentinel), folder / name)
    else:
        (folder / name).write_bytes(writer(Trap(sentinel)))
    with pytest.raises(CheckpointError) as caught:
        state.load_state(folder)
    assert caught.value.exit_code == 8 and not sentinel.exists()


HEADER = {"a": {"dtype": "F32", "shape": [1 << 58], "data_offsets": [0, 1 << 60]}}
HUGE = {
    "header-length": struct.pack("<Q", 1 << 60) + b"{}",
    "tensor": struct.pack("<Q", len(json.dumps(HEADER))) + json.dumps(HEADER).encode(),
    "header-of-100-MB": struct.pack("<Q", 100_000_001) + b"{",
}


@pytest.mark.parametrize(
    "content", [pytest.param(data, id=f"fault[R35]-{name}") for name, data in HUGE.items()]
)
def test_a_huge_claimed_size_is_refused_before_anything_is_allocated(tmp_path, content):
    folder = saved(tmp_path)
    (folder / state.TENSORS).write_bytes(content)
    pid = os.fork()
    if pid == 0:  # with 64 MiB left to allocate, an attempt to make room for the claim ends in MemoryError
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
            state.load_state(folder)
        except CheckpointError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 300 + "1" + "}" * 300,
        '{"a": {"$tensor": "nowhere"}}',
        '{"a": {"$tensor": 3}}',
        '{"a": {"$tuple": 3}}',
        '{"a": {"$dict": [[[1], 2]]}}',
        '{"a": {"$dict": [1]}}',
        '{"a": {"$float": "zz"}}',
        '{"a": {"$float": "00"}}',
        '{"a": {"$float": 3}}',
        '{"a": {"$other": 1}}',
        '{"a": 1' + "0" * 5000 + "}",
        "[1]",
        "",
        "\ud800",
    ],
    ids=lambda text: f"fault[R34]-{text[:20]!r}",
)
def test_garbled_or_hostile_structure_is_a_checkpoint_error(tmp_path, text):
    folder = saved(tmp_path)
    (folder / state.STRUCTURE).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError) as caught:
        state.load_state(folder)
    assert len(caught.value.lines()) <= 12


@pytest.mark.parametrize("name", [state.TENSORS, state.STRUCTURE])
def test_a_missing_file_is_a_checkpoint_error(tmp_path, name):
    folder = saved(tmp_path)
    (folder / name).unlink()
    with pytest.raises(CheckpointError):
        state.load_state(folder)


@pytest.mark.parametrize("fault", [pytest.param("S3", id="fault[S3]")])
def test_no_file_of_a_checkpoint_is_a_pickle_or_zip_and_loading_calls_neither(tmp_path, monkeypatch, fault):
    def fill(folder):
        state.save_state(folder, {"a": torch.ones(3), "rng": torch.get_rng_state(), "b": (1, None)})

    path = checkpoint.write(tmp_path, 1, fill, identity={}, keep=None)

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert checkpoint.newest(tmp_path)[0] == path
    assert torch.equal(state.load_state(path)["a"], torch.ones(3))
    for file in path.rglob("*"):
        if file.is_file():
            assert not file.read_bytes().startswith(
                (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")
            ), file
