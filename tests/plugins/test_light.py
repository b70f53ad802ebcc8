"""Modules that import torch at the top are read without it, and work afterwards."""

from __future__ import annotations

import pytest

MODULE = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import functional as G
from transformers import models

def relu(values):
    return F.relu(torch.tensor(values)).tolist()

def soft(values):
    return G.softmax(torch.tensor(values), dim=0).tolist()

def width():
    return nn.Linear(3, 2).out_features
"""


@pytest.fixture
def module(tmp_path):
    (tmp_path / "user.py").write_text(MODULE)
    (tmp_path / "eager.py").write_text(
        "from torch import Tensor\nimport torch.nn as nn\nclass Net(nn.Module):\n    pass\n"
    )
    # torch/nn/utils/weight_norm.py exists, but this import means the function of that name.
    (tmp_path / "hidden.py").write_text("from torch.nn.utils import weight_norm\n")
    (tmp_path / "missing.py").write_text("import torch.no_such_part\n")
    return tmp_path


def test_a_module_with_torch_at_its_top_is_imported_without_it_and_works_afterwards(run_python, module):
    result = run_python(
        """
        import json, sys
        from rlx.plugins.light import deferred, Proxy
        with deferred():
            import user
        heavy = [n for n in sys.modules if n.split(".")[0] in ("torch", "transformers")]
        kinds = [type(value) is Proxy for value in (user.torch, user.F, user.nn, user.G)]
        relu, soft, width = user.relu([-1.0, 2.0]), user.soft([0.0, 0.0]), user.width()
        import torch
        same = [user.torch is torch, user.F is torch.nn.functional, user.nn is torch.nn]
        left = [n for n, m in sys.modules.items() if isinstance(m, Proxy)]
        print(json.dumps([heavy, kinds, relu, soft, width, same, left, "transformers" in sys.modules]))
        """,
        path=[module],
    )
    # relu(-1, 2) = (0, 2); softmax of equal logits = halves; the linear layer has two outputs. transformers
    # was only mentioned, never used, so it stays out.
    assert result == [[], [True] * 4, [0.0, 2.0], [0.5, 0.5], 2, [True] * 3, [], False]


def test_asking_for_an_attribute_at_once_imports_the_real_thing(run_python, module):
    result = run_python(
        """
        import json, sys
        from rlx.plugins.light import deferred, Proxy
        with deferred():
            import user
            import hidden
            import eager
        import torch
        left = [n for n, m in sys.modules.items() if isinstance(m, Proxy)]
        finders = [type(f).__module__ for f in sys.meta_path if type(f).__module__.startswith("rlx.")]
        try:
            with deferred():
                import missing
        except ModuleNotFoundError as error:
            name = error.name
        real = [eager.Tensor is torch.Tensor, issubclass(eager.Net, torch.nn.Module), user.torch is torch]
        print(json.dumps([*real, user.relu([-3.0]), callable(hidden.weight_norm), left, finders, name]))
        """,
        path=[module],
    )
    assert result == [True, True, True, [0.0], True, [], [], "torch.no_such_part"]


def test_reading_ppo_s_options_does_not_import_torch(run_python):
    result = run_python(
        """
        import json, sys
        import rlx
        from rlx.core.options import options
        from rlx.plugins.references import config_of
        ppo = rlx.resolve("algorithm", "ppo")
        names = list(options(config_of(ppo)))
        from rlx.plugins.light import HEAVY
        print(json.dumps(["kl_coef" in names, sorted({"numpy", *HEAVY} & set(sys.modules))]))
        """
    )
    assert result == [True, []]


def test_blocks_may_be_nested(run_python, module):
    (module / "outer.py").write_text(
        "import torch\nfrom rlx.plugins.light import deferred\nwith deferred():\n    import user\n"
        "import torch.nn.functional as F\n"
    )
    code = """
        import json, sys
        from rlx.plugins.light import HEAVY, Proxy, deferred
        with deferred():
            import outer
        heavy = sorted(set(HEAVY) & set(sys.modules))
        kinds = [type(v) is Proxy for v in (outer.torch, outer.F, outer.user.torch, outer.user.F)]
        print(json.dumps([heavy, kinds, len([f for f in sys.meta_path if "rlx" in type(f).__module__])]))
        """
    assert run_python(code, path=[module]) == [[], [True] * 4, 0]


def test_what_is_imported_already_is_not_deferred(run_python):
    code = """
        import json, sys, types
        sys.modules["torch"] = types.ModuleType("torch")  # stands for the real one, which takes seconds
        from rlx.plugins.light import deferred
        with deferred("torch"):
            import torch
        print(json.dumps(torch is sys.modules["torch"]))
        """
    assert run_python(code) is True


INNER = """
import torch

class Inner:
    @torch.no_grad()
    def learns(self):
        return torch.is_grad_enabled()
"""
OUTER = """
import torch
from rlx.plugins import loading

class Outer(loading.load(INNER)):
    def two(self):
        return float(torch.ones(2).sum())
"""


def test_a_file_that_loads_another_which_needs_torch_at_once(run_python, tmp_path):
    inner, outer = tmp_path / "inner.py", tmp_path / "outer.py"
    inner.write_text(INNER)
    outer.write_text(OUTER.replace("INNER", repr(f"{inner}:Inner")))
    code = f"""
        import json
        from rlx.plugins import loading
        module = loading.load_file({str(outer)!r})
        thing = module.Outer()
        print(json.dumps([thing.learns(), thing.two()]))
        """
    assert run_python(code) == [False, 2.0]
