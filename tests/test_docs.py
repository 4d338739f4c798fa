"""The pages: links lead somewhere, and code is code of this library."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")})
RUN = {"README.md", "docs/index.md", "docs/entmax.md", "docs/generation.md"}  # each block stands for itself
FENCE = re.compile(r"^ *```(\w*).*?\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_of(page: Path) -> list[str]:
    return [inspect.cleandoc("\n" + code) for language, code in FENCE.findall(page.read_text()) if language == "python"]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=name_of)
def test_code_takes_what_the_library_has(page):
    """It parses, what it imports from here is there, and calls of that take their keywords."""
    for code in code_of(page):
        found = {}
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flash_entmax"):
                for alias in node.names:
                    found[alias.asname or alias.name] = attribute(importlib.import_module(node.module), alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found:
                taken = inspect.signature(found[node.func.id]).parameters
                if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken.values()):
                    assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(taken), ast.unparse(node)


def attribute(module, name: str):
    """Also a module in it."""
    return getattr(module, name) if hasattr(module, name) else importlib.import_module(f"{module.__name__}.{name}")


@pytest.mark.parametrize("page", sorted(RUN))
def test_code_runs(page, capsys):
    torch.manual_seed(0)
    for code in code_of(ROOT / page):
        exec(compile(code, page, "exec"), {})


DOORS = "", ".nn", ".distributed", ".variational", ".integrations.state_space", ".show.plot"
NOT_CALLED = {"Impl", "AlphaParameter", "WithAlpha", "require_matplotlib"}  # types, parts of modules, a check


@pytest.mark.parametrize("door", DOORS)
def test_the_reference_has_every_public_name(door):
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^\.\. auto\w+:: (\w+)$", pages, flags=re.MULTILINE))
    names = importlib.import_module(f"flash_entmax{door}").__all__
    assert {name for name in names if not name.isupper() and not name.startswith("__")} - NOT_CALLED <= listed
