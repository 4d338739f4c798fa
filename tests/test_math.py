"""docs/math.md is about the code: its names are the names there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "core", "backends"


def names_in(source: str) -> set[str]:
    """Every name that the source gives to something or reads, attributes and arguments included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


def names_of_the_code() -> set[str]:
    files = (path for folder in FOLDERS for path in (ROOT / "flash_entmax" / folder).rglob("*.py"))
    return set().union(*(names_in(path.read_text()) for path in files))


def names_in_math() -> set[str]:
    """Words in backticks that can be names of code. A symbol of one or two letters, index or not, is mathematics."""
    text = (ROOT / "docs" / "math.md").read_text()
    quoted = re.findall(r"`([^`\n]+)`", text)
    defined = re.findall(r"^    (\w+)(?: = |:  |      )", text, flags=re.MULTILINE)
    words = {word for word in (*quoted, *defined) if word.isidentifier()}
    return {word for word in words if len(re.sub("_[ajt]$", "", word)) > 2}


def test_every_name_of_the_mathematics_is_in_the_code():
    named = names_in_math()
    assert len(named) > 40
    missing = named - names_of_the_code()
    assert not missing, f"in docs/math.md, but neither in core/ nor in backends/: {sorted(missing)}"


def test_the_parser_sees_names_of_every_kind():
    source = "def f(arg):\n    local = thing.attribute\nclass C: ...\n"
    assert names_in(source) >= {"f", "arg", "local", "thing", "attribute", "C"}
