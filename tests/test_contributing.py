"""What is there for contributors agrees with the repository: files that are named exist, and forms can be read."""

import re
from pathlib import Path

import pytest

import flash_entmax

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
LISTS = dict(re.findall(r"^## How to add (?:an?) (\w+)\n(.*?)(?=^## |\Z)", CONTRIBUTING, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("added", ["mask", "stage", "backend", "recipe"])
def test_every_file_of_a_worked_list_exists(added):
    """Each step begins with a file or folder; others may stand in its text, beside it or by their path."""
    steps = re.findall(r"^\d+\. (.*(?:\n   .*)*)", LISTS[added], re.MULTILINE)
    assert len(steps) >= 5
    for step in steps:
        first, *_ = paths = [ROOT / name for name in re.findall(r"`([\w./]+)`", step) if "." in name or "/" in name]
        assert first.exists(), first
        assert all(path.exists() or (first.parent / path.name).exists() for path in paths), paths


def test_commands_are_those_of_the_makefile():
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    named = set(re.findall(r"\bmake\s+(\w+)", CONTRIBUTING))
    assert named == targets - {"clean"}


def test_links_lead_somewhere():
    for document in (*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert "://" in link or (document.parent / link).exists(), f"{document.name}: {link}"


def test_tests_that_documents_name_exist():
    for name in ("CONTRIBUTING.md", "SECURITY.md"):
        named = re.findall(r"`(tests/\w+\.py)`", (ROOT / name).read_text())
        assert named
        assert all((ROOT / path).exists() for path in named)


def test_forms_and_workflows_can_be_read():
    yaml = pytest.importorskip("yaml")
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields)
        assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
    (ruff,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["id"] for hook in ruff["hooks"]} == {"ruff-check", "ruff-format"}


def test_one_version_everywhere():
    version = flash_entmax.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version
    assert re.fullmatch(r" \((unreleased|\d{4}-\d\d-\d\d)\)", newest[2])


def test_oldest_versions_are_tested():
    """The workflow runs the tests with the oldest Python and torch that pyproject.toml promises."""
    project, workflow = ((ROOT / name).read_text() for name in ("pyproject.toml", ".github/workflows/ci.yml"))
    python = re.search(r'^requires-python = ">=([\d.]+)"$', project, re.MULTILINE)[1]
    torch = re.search(r'"torch>=([\d.]+)"', project)[1]
    assert f'python: "{python}", torch: "torch=={torch}.0"' in workflow
