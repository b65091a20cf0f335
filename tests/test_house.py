"""The repository as a reader meets it: rooms, sizes, pages, commands, extensions."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import args as flags
from tools import report

ROOT = Path(__file__).parent.parent
METHOD = ["dataset", "teaching", "trainer", "pruning_utils"]
SCRIPTS = ["main_TD", "main_BU", "main_CIL", "main_train", "test"]
# what each room may import of ours: arrows run downward only
ROOMS = {
    "utils": set(),
    "models": {"models"},
    "runtime": {"runtime", "models"},  # models: the shapes of what a packed file holds
    "datasets": {"datasets", "utils", "runtime"},
    **dict.fromkeys(METHOD, {*METHOD, "models", "datasets", "utils", "runtime"}),
    **dict.fromkeys(SCRIPTS, {*METHOD, "models", "utils", "runtime"}),
}
PAGES = sorted([ROOT / "README.md", *ROOT.glob("[!.]*/*.md"), *ROOT.glob("results/*/*.md")])
FOREIGN = {"--array", "--gpus", "--cpus-per-task"}  # flags of pip and sbatch
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downward(room):
    path = ROOT / f"{room}.py"
    for source in [path] if path.exists() else (ROOT / room).glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            ours = {name.partition(".")[0] for name in names} & {*ROOMS, "tools", "benchmarks"}
            assert ours <= ROOMS[room], f"{source.name} imports {ours - ROOMS[room]}"
        # within a function alone: it doubles the start time
        assert not re.search(r"^(from|import) torchvision", source.read_text(), re.M), source


def test_files_and_functions_are_short():
    """A file has at most 450 lines; a function of the method and its models 50 and 7 parameters."""
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0].startswith(".") or parts[0] == "tests":
            continue
        text = path.read_text()
        assert text.count("\n") <= 450, f"{path.name} has {text.count(chr(10))} lines"
        if len(parts) > 1 and parts[0] != "models":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                names = {arg.arg for arg in node.args.args + node.args.kwonlyargs} - {"self", "cls"}
                lines = node.end_lineno - node.lineno + 1
                assert len(names) <= 7 and lines <= 50, f"{path.name}: {node.name}"


# ------------------------------------------------------------------------------ pages


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ +(.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@each_page
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for path, _, anchor in (link.partition("#") for link in links if "://" not in link):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


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


def commands():
    """(module, arguments) of every python command of ours that a page or docstring shows."""
    sources = [ROOT / f"{name}.py" for name in (*SCRIPTS, "dataset")] + [*ROOT.glob("tools/*.py")]
    texts = [page.read_text() for page in PAGES]
    texts += [ast.get_docstring(ast.parse(path.read_text())) or "" for path in sources]
    for text in texts:
        text = re.sub(r"\\\n\s*", " ", text)  # continued lines
        for name, value in re.findall(r"^\s*([A-Z]+)=(\S+)$", text, re.MULTILINE):
            text = re.sub(rf"\${name}\b", value, text)
        for line in re.findall(r"(?:^\s*|`)(python (?:-m )?[^`\n]*)", text, re.MULTILINE):
            words = shlex.split(re.split(r"\s#|  +(?=[A-Za-z])", line)[0])[1:]
            module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
            argv = words[2 if words[0] == "-m" else 1 :]
            named = not argv and module in ("main_train", "test", "tools.report", "tools.tickets")
            if (module in (*SCRIPTS, "dataset") or module.startswith("tools.")) and not named:
                yield pytest.param(module, argv, id=line[:70])


@pytest.mark.parametrize("module, argv", list(commands()))
def test_command_lines_parse(module, argv, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(parser, argv):
        super(flags.Parser, parser).parse_args(argv)
        raise Parsed

    monkeypatch.setattr(flags.Parser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(argv)


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


# ------------------------------------------------------------------------------ extensions


TINY = (
    "--width 2 --epochs 1 --batch_size 64 --classifiers 2 --classes_per_classifier 2 "
    "--unlabel_num 1 --device cpu --save_dir run"
)
EXTENSIONS = {
    "backbone": f"main_CIL.py --dataset digits --arch plain {TINY}",
    "criterion": f"main_TD.py --dataset digits --criterion snip --iter_epochs 1 {TINY} "
    "--prune_scheduler 1,1",
    "dataset": f"main_CIL.py --dataset squares {TINY}",
}


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_extensions_work_as_documented(kind, tmp_path):
    """Each diff of docs/extending.md, applied to a copy of the repository and trained with."""
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    diff = dict(zip(EXTENSIONS, diffs, strict=True))[kind]
    assert diff.count("\n") <= 30
    copy = tmp_path / "copy"
    for room in ("models", "datasets", "runtime"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "data").mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "data/digits.npz"]:
        shutil.copy(path, copy / path.relative_to(ROOT))
    subprocess.run(["git", "apply", "-p1", "-"], cwd=copy, input=diff, text=True, check=True)
    command = [sys.executable, *EXTENSIONS[kind].split()]
    if kind == "dataset":  # a script prepares by itself only what it can download
        prepare = [sys.executable, "dataset.py", "--dataset", "squares"]
        subprocess.run(prepare, cwd=copy, capture_output=True, text=True, check=True)
    ended = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "state 2: test accuracy" in ended.stdout
