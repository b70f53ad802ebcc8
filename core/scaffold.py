"""The package that ``rlx plugins new KIND NAME`` writes: a component that works, its tests, its metadata.

The files are templates in ``core/templates``: those without a kind in their name go into every package.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from rlx.core.errors import ConfigError, SaveError
from rlx.core.options import close
from rlx.core.text import safe_text
from rlx.plugins.contract import KINDS
from rlx.plugins.registry import Registry

TEMPLATES = Path(__file__).with_name("templates")
NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
LONGEST = 60  # characters of a name: "rlx-", the name and a suffix stay a fit name for a file everywhere

# What a run, or a look at the component, is called for each kind, and what its example does.
TRY = {
    "algorithm": ("rlx run --algo $name --reward exact_match", "REINFORCE with the batch's mean as baseline"),
    "reward": ("rlx run --reward exact_match --reward $name", "fewer words are better"),
    "transform": ("rlx check --reward exact_match --transform $name", "a sentence behind every prompt"),
    "callback": ("rlx run --reward exact_match --callback $name", "ends a run that has learned enough"),
    "generator": ("rlx run --reward exact_match --generator $name", "samples one token after another"),
    "judge": ("rlx run --algo online_dpo --judge $name", "the shorter completion is better"),
    "dataset": ("rlx run --reward exact_match --dataset $name", "sums of two numbers"),
}


@dataclass(frozen=True)
class Names:
    """What the parts of a package are called.

    Attributes:
        kind: of the component.
        name: the component's name, and the plugin's.
        distribution: what pip installs, and the folder.
        module: what Python imports.
        cls: the component's class.
    """

    kind: str
    name: str
    distribution: str
    module: str
    cls: str

    def fill(self, text: str) -> str:
        """A template with the names in it."""
        line, summary = TRY[self.kind]
        words = {
            "kind": self.kind,
            "name": self.name,
            "distribution": self.distribution,
            "module": self.module,
            "Class": self.cls,
            "option": self.name.replace("-", "_"),
            "summary": summary,
        }
        return Template(text).substitute(words, line=Template(line).substitute(words))


def check_names(kind: str, name: str, registry: Registry) -> Names:
    """The names of a package's parts.

    Args:
        kind: of the component.
        name: lower-case letters, digits, and single ``-`` or ``_`` between them; at most 60 characters.
        registry: whose names are taken.

    Raises:
        ConfigError: for an unknown kind, and for a name that is no name, or is taken.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"there is no kind {safe_text(kind, 80)!r}{close(kind, KINDS)}",
            code="E-CONFIG-KIND",
            expected=", ".join(KINDS),
        )
    words = re.split("[-_]", name)
    cls = "".join(word.capitalize() for word in words)
    if not NAME.fullmatch(name) or len(name) > LONGEST or keyword.iskeyword(cls):
        raise ConfigError(
            f"{safe_text(name, 80)!r} is no fit name for a package",
            code="E-CONFIG-NAME",
            expected=f"a to z, 0 to 9, '-' or '_' between them, a letter first, at most {LONGEST} characters",
            hint=f"{cls} is a word of Python" if keyword.iskeyword(cls) else "",
        )
    if words[0] == "rlx":
        raise ConfigError(
            "the package's name begins with rlx- by itself",
            code="E-CONFIG-NAME",
            got=name,
            hint=f"rlx plugins new {kind} {'-'.join(words[1:]) or 'NAME'}",
        )
    taken = [entry.offered_by for entry in registry.list(kind) if entry.name == name]
    taken += [f"the plugin of {p.distribution}" for p in registry.plugins() if p.name == name]
    if taken:
        raise ConfigError(
            f"the name {name!r} is taken", code="E-CONFIG-NAME", got=taken[0], hint="choose another name"
        )
    return Names(kind, name, f"rlx-{'-'.join(words)}", f"rlx_{'_'.join(words)}", cls)


def files(names: Names) -> dict[str, str]:
    """Path inside the package → text."""
    where = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "plugin.py": f"{names.module}/plugin.py",
        f"{names.kind}.py": f"{names.module}/{names.kind}.py",
        f"test_{names.kind}.py": f"tests/test_{names.module}.py",
    }
    filled = {
        path: names.fill((TEMPLATES / f"{template}.txt").read_text(encoding="utf-8"))
        for template, path in where.items()
    }
    return {**filled, f"{names.module}/__init__.py": f'"""{names.distribution}: {TRY[names.kind][1]}."""\n'}


def write(names: Names, parent: Path) -> Path:
    """Write the package into a new folder.

    Args:
        names: of its parts.
        parent: the folder that the new one goes into; made if it is not there.

    Returns:
        The new folder.

    Raises:
        ConfigError: the new folder exists, whatever is in it.
        SaveError: it cannot be written.
    """
    folder = parent / names.distribution
    texts = files(names)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()  # refuses a link, too
        for path, text in texts.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except FileExistsError:
        there = folder if folder.exists() or folder.is_symlink() else parent
        raise ConfigError(
            f"{safe_text(there)!r} exists already",
            code="E-CONFIG-NAME",
            hint="remove it, choose another name, or write elsewhere with --path",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise SaveError(
            f"the package cannot be written: {reason}", code="E-SAVE-FOLDER", where=safe_text(folder)
        ) from error
    return folder
