"""Third-party plugins to be found: small distributions, written or installed by pip into their own folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlx.testing import isolated


@dataclass
class Site:
    """A folder on ``sys.path`` into which distributions are put."""

    path: Path

    def install(
        self, name, source, *, distribution=None, version="0.1", group="rlx.v1", module=None, value=None
    ):
        """A distribution with one module and one entry point, laid out as pip leaves it."""
        distribution = distribution or f"rlx-{name}"
        module = module or distribution.replace("-", "_")
        (self.path / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value or module}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder that this process looks for plugins in, and a registry of its own."""
    modules = set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("RLX_NO_PLUGINS", raising=False)
    with isolated():
        yield Site(folder)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def run_python(tmp_path):
    """Run code in a fresh interpreter; returns what it prints, read as JSON."""

    def run(code, *, path=(), expect=0, **env):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
                **env,
            },
        )
        assert done.returncode == expect, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def pip_site(tmp_path_factory):
    """A folder into which pip installed ``rlx-good``: a package with a reward, built by setuptools."""
    source, target = tmp_path_factory.mktemp("rlx-good"), tmp_path_factory.mktemp("site-packages")
    (source / "pyproject.toml").write_text(
        textwrap.dedent("""
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "rlx-good"
        version = "1.2.3"
        [project.entry-points."rlx.v1"]
        good = "rlx_good.plugin"
        [tool.setuptools]
        packages = ["rlx_good"]
    """)
    )
    (source / "rlx_good").mkdir()
    (source / "rlx_good" / "__init__.py").write_text("")
    (source / "rlx_good" / "plugin.py").write_text(
        textwrap.dedent("""
        import rlx

        @rlx.hookimpl
        def rlx_register(registry):
            registry.add("reward", "brevity", "rlx_good.rewards:Brevity", "shorter is better")
    """)
    )
    (source / "rlx_good" / "rewards.py").write_text(
        textwrap.dedent('''
        from dataclasses import dataclass

        import torch
        import rlx

        class Brevity(rlx.Reward):
            """Shorter is better."""

            @dataclass(frozen=True)
            class Config:
                scale: float = rlx.opt(
                    0.1, "what a character costs", gt=0, unit="1/character", source="a test"
                )

            def __call__(self, *, completions, **columns):
                return (-self.config.scale * torch.tensor([float(len(c)) for c in completions])).tolist()
    ''')
    )
    pip_install(target, source)
    return target


def pip_install(target: Path, *sources: Path) -> None:
    """Build packages and install them into a folder, as pip does it, from nothing but their sources."""
    words = "install --quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check --target"
    pip = [sys.executable, "-m", "pip", *words.split()]
    subprocess.run([*pip, str(target), *map(str, sources)], check=True, timeout=300)


@dataclass
class Installed:
    """Packages in a folder of their own, and their sources."""

    site: Path
    sources: Path

    def run(self, *words, cwd=None):
        """Run ``python -m`` with the packages; returns what it prints, and fails if it does."""
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=cwd or self.sources,
            env={**os.environ, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1", "RLX_NO_PLUGINS": ""},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """Install packages into a folder of their own; their sources are copied, for building leaves traces."""

    def install(*folders):
        sources, site = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site-packages")
        left_out = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
        copies = [shutil.copytree(folder, sources / folder.name, ignore=left_out) for folder in folders]
        pip_install(site, *copies)
        return Installed(site, sources)

    return install
