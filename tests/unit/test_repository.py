"""Habits of this repository that a machine can check: small modules, docstrings, links that lead somewhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("megatron_fsvideo", "tools", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
] + sorted(ROOT.glob("pretrain_*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRY_SCRIPT_LINES, FILE_LINES, CLASS_LINES, FUNCTION_LINES = 30, 500, 250, 60


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_modules_are_small_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    assert text.count("\n") < FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            limit = FUNCTION_LINES if isinstance(node, ast.FunctionDef) else CLASS_LINES
            assert node.end_lineno - node.lineno < limit, node.name


@pytest.mark.parametrize("path", sorted(ROOT.glob("pretrain_*.py")), ids=identify)
def test_entry_scripts_parse_build_train(path):
    assert path.read_text(encoding="utf-8").count("\n") < ENTRY_SCRIPT_LINES


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_public_functions_and_classes_have_docstrings(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_style():
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:]
