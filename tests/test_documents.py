"""What README, documents and the comments of configs name is there: files, configs, runs, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pc3d.cli.app import COMMANDS
from pc3d.cli.runs import run_name

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND_LINES = [
    *PAGES,
    *CONFIGS,
    *sorted((ROOT / "pc3d" / "cli").glob("*.py")),
    *sorted((ROOT / "tools").glob("*.py")),
]
FOLDERS = "configs|tools|docs|tests|pc3d|datasets|models"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", COMMAND_LINES, ids=name)
def test_named_files_runs_and_commands_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w/.-]+\.(?:yaml|py|md|json|png)\b", text):
        assert (ROOT / path).is_file(), path
    short = {config.stem: config for config in CONFIGS}
    for run in re.findall(r"\bruns/([\w-]+)/", text):
        assert run not in short, f"the run of {run}.yaml is {run_name(short[run])}"
    for command in re.findall(r"^\s*#?\s*pc3d ([a-z]+)\b", text, re.MULTILINE):
        assert command in COMMANDS, command
