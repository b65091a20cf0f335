"""The repository as a reader meets it: rooms, sizes of functions, links, commands, extensions."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import cli

ROOT = Path(__file__).parent.parent
METHOD = ["dataset", "teaching", "trainer", "pruning_utils"]
SCRIPTS = ["main_TD", "main_BU", "main_CIL", "main_train", "test"]
# what each room may import of ours: arrows run downward only
ROOMS = {
    "runtime": {"runtime", "models"},  # models: the shapes of what a packed file holds
    "utils": set(),
    "models": {"models"},
    "datasets": {"datasets", "utils", "runtime"},
    **dict.fromkeys(METHOD, {*METHOD, "models", "datasets", "utils", "runtime"}),
    **dict.fromkeys(SCRIPTS, {*METHOD, "models", "utils", "runtime"}),
}
PAGES = sorted([ROOT / "README.md", *ROOT.glob("*/*.md"), *ROOT.glob("results/*/*.md")])


def sources(room):
    path = ROOT / f"{room}.py"
    return [path] if path.exists() else sorted((ROOT / room).glob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downward(room):
    ours = {*ROOMS, "tools", "tests", "benchmarks"}
    for path in sources(room):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported = {name.partition(".")[0] for name in names} & ours
            assert imported <= ROOMS[room], f"{path.name} imports {imported - ROOMS[room]}"


def test_functions_are_short():
    """At most 50 lines and 6 parameters in the top-level modules and models/."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                where, each = f"{path.name}: {node.name}", node.args
                names = [arg.arg for arg in each.posonlyargs + each.args + each.kwonlyargs]
                names = [name for name in names if name not in ("self", "cls")]
                assert len(names) <= 6, f"{where} takes {len(names)} parameters"
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 50, f"{where} has {lines} lines"


# ------------------------------------------------------------------------------ pages


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ +(.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


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
            if module in (*SCRIPTS, "dataset") or module.startswith("tools."):
                yield pytest.param(module, words[2 if words[0] == "-m" else 1 :], id=line[:70])


@pytest.mark.parametrize("module, argv", list(commands()))
def test_command_lines_parse(module, argv, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(parser, argv):
        super(cli.Parser, parser).parse_args(argv)
        raise Parsed

    if not argv and module in ("main_train", "test", "tools.report"):
        pytest.skip("named without its flags")
    monkeypatch.setattr(cli.Parser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(argv)


# ------------------------------------------------------------------------------ extensions


TINY = (
    "--width 4 --epochs 1 --batch_size 64 --classifiers 2 --classes_per_classifier 2 "
    "--unlabel_num 1 --device cpu --save_dir run"
)
EXTENSIONS = [
    f"main_CIL.py --dataset digits --arch plain {TINY}",
    f"main_TD.py --dataset digits --criterion layer --prune_scheduler 1,1 --iter_epochs 1 {TINY}",
    f"main_CIL.py --dataset squares {TINY}",
]


@pytest.mark.parametrize("number", range(3), ids=["backbone", "criterion", "data set"])
def test_extensions_work_as_documented(number, tmp_path):
    """Each diff of docs/extending.md, applied to a copy of the repository and trained with."""
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    assert len(diffs) == len(EXTENSIONS)
    assert len(diffs[number].splitlines()) <= 30
    copy = tmp_path / "copy"
    for room in ("models", "datasets", "runtime"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "data").mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "data/digits.npz"]:
        shutil.copy(path, copy / path.relative_to(ROOT))
    apply = ["git", "apply", "-p1", "-"]
    subprocess.run(apply, cwd=copy, input=diffs[number], text=True, check=True)
    command = [sys.executable, *EXTENSIONS[number].split()]
    ended = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "state 2: test accuracy" in ended.stdout
