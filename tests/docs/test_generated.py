"""The pages say what the code does: generated blocks, links, names of options and metrics."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from rlx.core.options import options
from rlx.core.settings import Settings
from rlx.plugins.catalogue import COMPONENTS
from rlx.plugins.references import config_of, resolve

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_generated_blocks_agree_with_the_code(generate: ModuleType) -> None:
    stale = [str(page.relative_to(ROOT)) for page in generate.stale()]
    assert not stale, f"run python docs/generate.py: {stale}"


def test_a_stale_block_is_seen(generate: ModuleType) -> None:
    page = "<!-- generated: exit codes -->\nold\n<!-- end -->\n"
    assert generate.generated(page) != page
    assert generate.generated(generate.generated(page)) == generate.generated(page)
    with pytest.raises(KeyError, match="no generated block"):
        generate.block("nonsense")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_internal_links_resolve(generate: ModuleType) -> None:
    broken = []
    for page in generate.pages():
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://", "mailto:")):
                continue
            file, _, anchor = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            if not found.exists() or (anchor and anchor not in anchors(found)):
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_every_page_is_reachable_from_the_index() -> None:
    seen, ahead = set(), [DOCS / "index.md"]
    while ahead:
        page = ahead.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8")))
        found = [(page.parent / target).resolve() for target in targets if target.endswith(".md")]
        ahead += [one for one in found if one.parent == DOCS]
    assert set(DOCS.glob("*.md")) == seen


def test_every_core_option_is_in_the_config_page() -> None:
    page = text("config.md")
    assert not [name for name in options(Settings) if f"| `{name}` |" not in page]


@pytest.mark.parametrize("name", COMPONENTS["algorithm"])
def test_every_option_of_an_algorithm_is_on_its_page(name: str) -> None:
    page = text(f"{name}.md")
    assert not [o for o in options(config_of(resolve("algorithm", name))) if f"| `{o}` |" not in page]


def test_every_component_is_on_some_page(generate: ModuleType) -> None:
    everything = "".join(page.read_text(encoding="utf-8") for page in generate.pages())
    names = [name for components in COMPONENTS.values() for name in components]
    assert not [name for name in names if f"`{name}`" not in everything]


def test_every_algorithm_has_a_page_and_a_row_in_the_paper_index() -> None:
    papers = text("papers.md")
    for name, (target, _) in COMPONENTS["algorithm"].items():
        file = target.partition(":")[0].removeprefix("rlx.").replace(".", "/") + ".py"
        assert f"]({name}.md)" in papers and file in papers, name
        assert (DOCS / f"{name}.md").is_file(), name


def test_every_metric_that_a_run_logs_is_explained(tmp_path: Path) -> None:
    """The names of a real run stand in the tables of run-folder.md."""
    import rlx

    result = rlx.run(
        reward=["exact_match", "length"], reward_on_error="none", max_steps=1, batch_size=4,
        num_mini_batches=1, max_rows=8, max_eval_rows=4, plots=False, progress="none",
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    logged = {name for line in result.metrics for name in line}
    generic = {re.sub(r"/(exact_match|length)(?=/|$)", "/<name>", n) if "reward/" in n else n for n in logged}
    explained = set(re.findall(r"^\| `([^`]+)`", text("run-folder.md"), re.MULTILINE))
    assert not generic - explained
    assert len(generic) > 25


@pytest.mark.parametrize("name", COMPONENTS["algorithm"])
def test_every_metric_that_an_algorithm_names_is_explained(name: str) -> None:
    """Names with a slash, as written in its file: on its own page and in the table of all runs."""
    file = COMPONENTS["algorithm"][name][0].partition(":")[0].removeprefix("rlx.").replace(".", "/")
    source = (ROOT / f"{file}.py").read_text(encoding="utf-8")
    named = set(re.findall(r'"([a-z_]+/[a-z_]+)"', source))
    for page in (f"{name}.md", "run-folder.md"):
        assert not [metric for metric in named if f"`{metric}`" not in text(page)], page
    assert named
