"""The shape of the package: imports go down only, importing it is light, and docs/files.md has the real tree."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flash_entmax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flash_entmax"

# What each wing may import from the package beside itself: lower wings only. Files without a folder are doors.
WINGS = {
    "core": set(),
    "backends": {"core"},
    "operators": {"backends", "core"},
    "key_summaries": {"operators", "backends", "core"},
    "functional": {"key_summaries", "operators", "backends", "core"},
    "paged": {"operators", "backends", "core"},
    "activations": {"operators", "backends", "core"},
    "losses": {"activations", "operators", "backends", "core"},
    "linear_attention": {"backends", "core"},
    "recurrence": {"linear_attention", "backends", "core"},
    "normmax": {"losses", "activations", "operators", "core"},
    "budget": {"activations", "operators", "core"},
    "nn": {"distributed", "losses", "activations", "normmax", "budget", "functional", "backends", "core"},
    "anneal": {"core"},
    "variational": {"losses", "activations", "core"},
    "distributed": {"operators", "backends", "core"},
    "inspection": {"functional", "operators", "backends", "core"},
    "": {
        "losses", "activations", "normmax", "budget", "functional", "paged", "key_summaries", "linear_attention",
        "recurrence", "operators", "backends", "core", *flash_entmax.MODULES,
    },
    "testing": set(),
    "integrations": {"distributed", "anneal", "nn", "inspection", "functional", "core"},
    "adapt": {"anneal", "inspection", "core"},
    "show": {"inspection", "recurrence", "core"},
    "programs": {
        "", "show", "integrations", "adapt", "inspection", "variational", "anneal", "nn", "functional", "backends",
        "core",
    },
    "__main__": {"programs"},
}  # fmt: skip
# Of the backends, wings above the operators use the specification only, or ask which one can run.
OPEN_TO_ALL = {"backends", "backends.reference"}
FURTHER = {"programs.benchmarks": {"testing"}, "programs.check_speed": {"testing"}}  # inputs are shared with the tests
# What a file that meets another library imports of it, in functions that are called where it is installed.
MEETING = {"variational.estimator": {"numpy", "sklearn"}}
# Of the kernels: words that all share, and files that launch or lay out memory. Every other file is a stage.
KERNEL_WORDS = {
    "tile", "alpha", "visibility", "queries", "keys", "score", "sums", "lists", "gather", "reach", "program",
    "row_solve", "pages", "decode_lists", "decode_values",
}  # fmt: skip
LAUNCHING = {
    "__init__", "append", "attention", "call_launches", "config", "decoding", "launch", "notes", "parts", "plan",
    "prepared", "prepared_backward", "prepared_decode", "prepared_forward", "reach", "rows", "schedule", "scratch",
    "stages", "written_stage",
}  # fmt: skip
# A stage reads what a stage before it has written, and repeats its bound.
STAGES_TOGETHER = {
    "scan": {"bound"},
    "query_lists": {"bound", "certify"},
    "mark": {"query_lists"},
    "solve": {"certify", "query_lists"},
    "share": {"query_lists"},
    "decode_blocks": {"bound", "decode"},
    "decode_summaries": {"decode", "decode_blocks"},
    "gradient": {"query_lists", "share"},
}


def modules() -> dict[str, Path]:
    """Dotted name below the package, e.g. core.call, of every Python file; a package has the name __init__."""
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, path: Path) -> tuple[set[str], set[str]]:
    """(modules of the package, top-level names of everything else) that a file imports, at any depth of its code."""
    inside, outside = set(), set()
    parents = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (["flash_entmax", *parents][: len(parents) + 2 - node.level]) if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            below = [f"{stem}.{alias.name}" for alias in node.names]
            targets = [t if is_module(t) else stem for t in below]
        else:
            continue
        for target in targets:
            top, _, rest = target.partition(".")
            (inside.add(rest) if top == "flash_entmax" else outside.add(top))
    return inside, outside


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return dotted.startswith("flash_entmax.") and (path.with_suffix(".py").exists() or path.is_dir())


def wing(name: str) -> str:
    return "" if name == "__init__" else name.partition(".")[0]


MODULES = modules()


def test_every_module_has_a_place():
    """A new file must be given its wing here."""
    assert {wing(name) for name in MODULES} <= set(WINGS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    inside, _ = imports(name, MODULES[name])
    further = next((more for folder, more in FURTHER.items() if name.startswith(folder)), set())
    for target in inside:
        assert wing(target) in {wing(name)} | WINGS[wing(name)] | further, target
        if wing(target) == "backends" and wing(name) not in ("backends", "operators"):
            assert target in OPEN_TO_ALL, target


def test_programs_pictures_and_inspection_have_classes_of_their_own_names():
    """One class, one name: no other file of the package defines a class of that name."""
    homes: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name)
    shared = {name: files for name, files in homes.items() if len(files) > 1}
    ours = {"programs", "show", "inspection"}
    assert not {name: files for name, files in shared.items() if ours & set(map(wing, files))}


def test_no_import_comes_back():
    """No file of the package imports, by whatever way, a file that imports it."""
    above = {name.removesuffix(".__init__"): imports(name, path)[0] for name, path in MODULES.items()}
    while above:
        ground = {name for name, targets in above.items() if not (targets - {name}) & set(above)}
        assert ground, f"in a circle: {sorted(above)}"
        above = {name: targets for name, targets in above.items() if name not in ground}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("backends.triton.")])
def test_stages_import_only_shared_words(name):
    """Stages do not know each other, but for those that a table here names."""
    inside, outside = imports(name, MODULES[name])
    home, file = "backends.triton.", name.removeprefix("backends.triton.")
    own = {target.removeprefix(home) for target in inside if target.startswith(home)}
    assert {wing(target) for target in inside if not target.startswith(home)} <= {"core"}
    if file not in LAUNCHING:
        assert own <= KERNEL_WORDS | STAGES_TOGETHER.get(file, set())
    assert outside <= {"torch", "triton", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", MODULES)
def test_only_benchmarks_and_kernels_import_triton(name):
    _, outside = imports(name, MODULES[name])
    assert "triton" not in outside or name.startswith(("backends.triton.", "programs.benchmarks."))
    if wing(name) not in ("integrations", "show", "programs", "backends"):
        assert outside <= {"torch", *sys.stdlib_module_names} | MEETING.get(name, set())


def test_the_parser_sees_imports_of_every_form(tmp_path):
    source = (
        "import torch.nn\nfrom . import nn, nothing\nfrom .backends.triton import scan\nfrom flash_entmax import core\n"
    )
    path = tmp_path / "written.py"
    path.write_text(
        source + "def f():\n    from .backends.reference import attention\n    import flash_entmax.programs.cli\n"
    )
    inside, outside = imports("written", path)
    assert outside == {"torch"}
    assert inside >= {"nn", "backends.triton.scan", "core", "backends.reference", "programs.cli", ""}
    inside, _ = imports("core.x", _written(tmp_path, "from ..operators.rows import P\nfrom .call import t\n"))
    assert inside == {"operators.rows", "core.call"}


def _written(folder: Path, source: str) -> Path:
    path = folder / "written.py"
    path.write_text(source)
    return path


def test_import_is_light():
    code = "import flash_entmax, sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "flash_entmax" in loaded
    assert not loaded & {"triton", "matplotlib", "rich", "sklearn"}


def test_modules_are_attributes_of_the_package():
    """Imported when they are asked for."""
    code = """
import sys, flash_entmax
assert "flash_entmax.nn" not in sys.modules
for name in flash_entmax.MODULES:
    assert getattr(flash_entmax, name) is sys.modules[f"flash_entmax.{name}"]
assert set(flash_entmax.MODULES) < set(dir(flash_entmax)) and "sys" not in dir(flash_entmax)
assert not hasattr(flash_entmax, "attention")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


WITHOUT_METADATA = """
import importlib.metadata as metadata, pathlib, sys

def hidden(name):
    if name in ("flash-entmax", "flash_entmax"):
        raise metadata.PackageNotFoundError(name)
    return known(name)

known, metadata.distribution = metadata.distribution, hidden
sys.path.insert(0, sys.argv[1])
import flash_entmax
from flash_entmax.programs.info import versions
assert pathlib.Path(flash_entmax.__file__).is_relative_to(sys.argv[1])
print(flash_entmax.__version__, dict(versions())["flash-entmax"])
"""


def test_a_checkout_that_is_not_installed_knows_its_version(tmp_path):
    """What is installed, if anything, is of the same version: one file says it."""
    shutil.copytree(PACKAGE, tmp_path / "flash_entmax", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_METADATA, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [flash_entmax.__version__] * 2
    assert re.fullmatch(r"\d+\.\d+\.\d+", flash_entmax.__version__)
    assert not re.search(r"^version", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)


def listed_tree() -> set[str]:
    """Paths below the repository in the first ```text block: indented names, then, after two spaces, a comment."""
    block = re.search(r"^```text\n(.*?)^```", (ROOT / "docs" / "files.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert block, "docs/files.md has no fenced ```text block with the tree of flash_entmax/"
    paths, folders = set(), []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            paths.add("".join(folder for _, folder in folders) + name)
            if name.endswith("/"):
                folders.append((indent, name))
    return {path for path in paths if path.startswith("flash_entmax/")}


def test_listed_tree_is_the_real_tree():
    files = {p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    folders = {parent for path in files for parent in path.parents if parent.is_relative_to(PACKAGE)}
    real = {f.relative_to(ROOT).as_posix() for f in files} | {f"{f.relative_to(ROOT).as_posix()}/" for f in folders}
    listed = listed_tree()
    unlisted = {path for path in real - listed if not path.endswith(("/__init__.py", "py.typed"))}
    assert listed <= real, f"listed, but not there: {sorted(listed - real)}"
    assert not unlisted, f"there, but not listed: {sorted(unlisted)}"


def test_what_is_supported_names_tests_that_exist():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs" / "supported.md").read_text())
    assert len(named) > 20
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing, f"named in docs/supported.md, but not there: {missing}"
