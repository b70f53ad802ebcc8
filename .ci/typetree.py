"""Lays out `.typetree/rlx/` as links: tools that follow folders see the packages under their import names."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".typetree" / "rlx"
shutil.rmtree(TREE.parent, ignore_errors=True)
for room in ("core/rlx", "core", "plugins", "algorithms", "rewards", "callbacks"):
    for file in sorted((ROOT / room).rglob("*.py*")):
        inside = file.relative_to(ROOT / room)
        if "__pycache__" in inside.parts or (room == "core" and inside.parts[0] == "rlx"):
            continue
        link = TREE / inside if room == "core/rlx" else TREE / room / inside
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
