"""Training state on disk: nested dicts, lists and tuples of tensors and plain values, without pickle.

``state.json`` holds the structure and the plain values, ``state.safetensors`` the tensors. Reading executes
no code. What JSON cannot say exactly (tuples, keys that are no text, floats that are not finite) is written
with an explicit tag; other floats come back bit for bit: JSON writes Python's shortest exact representation.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.core.errors import CheckpointError, PluginError, SaveError
from rlx.core.text import safe_text

if TYPE_CHECKING:
    from torch import Tensor

STRUCTURE, TENSORS = "state.json", "state.safetensors"
MAX_DEPTH = 64  # of nested containers; deeper than any state, far below Python's recursion limit
_CODE = "E-PLUGIN-STATE"
_PLAIN = (bool, int, str, type(None))


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state that ``load_state`` gives back equal: values, types, dtypes, order of keys.

    Args:
        folder: existing folder that holds no state yet.
        state: dicts, lists and tuples of tensors, bool, int, float, str and None, exactly of these types (any
            mapping is taken as a dict, a parameter as a tensor).

    Raises:
        PluginError: a value of another type, named by its key path.
        SaveError: the files could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, "", tensors, 0), allow_nan=False, separators=(",", ":"))
    try:
        save_file(tensors, folder / TENSORS)
        with open(folder / STRUCTURE, "x", encoding="utf-8") as file:
            file.write(text)
    except (OSError, SafetensorError) as error:
        raise SaveError("training state could not be written", where=str(folder), got=str(error)) from error


def load_state(folder: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote; tensors on the CPU, each in memory of its own.

    Raises:
        CheckpointError: a file is missing, garbled, or does not fit the other one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        structure = json.loads((folder / STRUCTURE).read_text(encoding="utf-8"))
        # Cloned: a mapped file's tensors sit at odd addresses, and some CPU kernels round by alignment.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
        state = _decode(structure, tensors, 0)
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, str(error)) from error
    except (ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
        raise _unreadable(folder, f"{STRUCTURE}: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict):
        raise _unreadable(folder, f"{STRUCTURE} holds a {type(state).__name__}, not an object")
    return state


def _unreadable(folder: Path, reason: str) -> CheckpointError:
    got = safe_text(reason)
    return CheckpointError(
        "training state cannot be read", code="E-CHECKPOINT-STATE", where=str(folder), got=got
    )


def _encode(value: Any, path: str, tensors: dict[str, Tensor], depth: int) -> Any:
    from torch import Tensor

    if depth > MAX_DEPTH:
        raise PluginError(f"state is nested deeper than {MAX_DEPTH} levels", code=_CODE, where=path[:200])
    if type(value) in _PLAIN:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        return {"$tensor": _keep(value, path or "state", tensors)}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{path}[{i}]", tensors, depth + 1) for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        entries = [
            (key, _encode(item, f"{path}.{key}" if path else str(key), tensors, depth + 1))
            for key, item in value.items()
        ]
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(entries)
        return {"$dict": [[_encode(key, f"{path} key", tensors, depth + 1), item] for key, item in entries]}
    raise PluginError(
        f"state at {path or 'its root'!r} is of a type that a checkpoint cannot keep",
        code=_CODE,
        got=f"{type(value).__module__}.{type(value).__qualname__}",
        expected="tensors, bool, int, float, str, None, and lists, tuples and dicts of them",
        hint="return plain values from state_dict(): float(x), x.item(), torch.as_tensor(x)",
    )


def _keep(value: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    """Add a tensor under a name made from its path, and return the name."""
    import torch

    if value.layout != torch.strided or value.device.type == "meta":
        raise PluginError(
            f"the tensor at {path!r} cannot be kept",
            code=_CODE,
            got=f"layout {value.layout}, device {value.device}",
            expected="a dense tensor",
        )
    while path in tensors:  # {"a.b": …} beside {"a": {"b": …}}
        path += "'"
    # safetensors refuses tensors that share memory, so each is made contiguous in memory of its own.
    tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return path


def _decode(value: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > 2 * MAX_DEPTH + 2:  # a tagged container takes two levels
        raise ValueError("nested too deep")
    if isinstance(value, list):
        return [_decode(item, tensors, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, item),) = value.items()
        if tag == "$tensor":
            return tensors[item]
        if tag == "$float":
            return float(struct.unpack(">d", bytes.fromhex(item))[0])
        if tag == "$tuple":
            return tuple(_decode(item, tensors, depth + 1))
        if tag == "$dict":
            return {_decode(key, tensors, depth + 1): _decode(it, tensors, depth + 1) for key, it in item}
    if any(key.startswith("$") for key in value):
        raise ValueError(f"unknown tag {min(value)!r}")
    return {key: _decode(item, tensors, depth + 1) for key, item in value.items()}
