"""The pages against the repository: the files and flags that they name exist, and they are short.

tests/test_house.py follows their links, parses their commands and applies their diffs.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tools import report

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("[!.]*/*.md"), *ROOT.glob("results/*/*.md")])
FOREIGN = {"--array", "--gpus", "--cpus-per-task"}  # of pip and sbatch
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.split() or pytest.skip("not a git checkout")


def own_text(page):
    """A page without the paragraphs on another commit of this repository."""
    parts = page.read_text().split("\n\n")
    return "\n\n".join(part for part in parts if not re.search(r"commit\s+[0-9a-f]{7}", part))


@each_page
def test_files_that_a_page_names_exist(page):
    rooms = {name.split("/")[0] for name in tracked() if "/" in name} - {"data"}
    for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", own_text(page)):
        if name.split("/")[0] in rooms or name.endswith(".py"):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


@each_page
def test_flags_that_a_page_names_exist(page):
    sources = [ROOT / name for name in tracked() if name.endswith(".py")]
    known = {flag for path in sources for flag in re.findall(r'"(--\w+)"', path.read_text())}
    named = {*re.findall(r"(?<![\w-])--[a-z][\w-]*", own_text(page))}
    assert named <= known | FOREIGN, f"{page.name} names {named - known - FOREIGN}"


def test_the_readme_names_every_file_at_the_top():
    text = (ROOT / "README.md").read_text()
    for name in {name.split("/")[0] for name in tracked()}:
        assert name.startswith(".") or name in text, f"README.md does not name {name}"


def test_pages_are_short():
    assert sum(page.read_text().count("\n") for page in PAGES) <= 1300


def test_the_code_that_draws_an_accuracy_matrix(tmp_path, monkeypatch):
    """That of docs/running.md, as tests/test_tickets.py runs that of docs/tickets.md."""
    monkeypatch.chdir(tmp_path)
    report.main([str(ROOT / "results/medium/seed0/TD")])
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/running.md").read_text(), re.S)
    names = {}
    exec(compile(block, "docs/running.md", "exec"), names)
    matrix = names["matrix"]
    assert matrix.shape == (6, 5) and matrix.loc[3].notna().tolist() == [True] * 3 + [False] * 2
    assert round(matrix.loc[6].mean(), 1) == 53.0  # docs/evidence.md, separate statistics
    assert (tmp_path / "report/matrix.png").exists()
