"""report.html as a browser, a reader and a shell meet it; no training here."""

import base64
import hashlib
import html
import importlib
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_report import bottom_up, dense, retrained

from tools import page, report

ROOT = Path(__file__).parent.parent
RECORDS = sorted(ROOT.glob("results/reduced/seed*/*"))
VOID = {"meta"}
BROWSERS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
BROWSER = next(filter(None, BROWSERS), None)


class Outline(HTMLParser):
    """The elements of a page: (tag, attributes); fails where tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.cells, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("th", "td"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"th", "td"} & {*self.open[-1:]}:
            self.cells[-1] += data

    def values(self, name):
        """The values of an attribute, wherever it is."""
        return [each[name] for _, each in self.elements if name in each]


def page_of(out, *folders):
    report.main([*map(str, folders), "--out", str(out)])
    return (out / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """The folder of the report on all records of the reduced protocol, some of which are old."""
    out = tmp_path_factory.mktemp("reduced")
    page_of(out, *RECORDS)
    return out


# ------------------------------------------------------------------------------ the page


def test_the_page_is_whole_and_holds_the_report(reduced):
    text = (reduced / "report.html").read_text("utf-8")
    outline = Outline(text)
    printed = (reduced / "report.md").read_text("utf-8")
    cells = [line.strip("| ").split("|") for line in printed.splitlines() if line[0:1] == "|"]
    cells = {cell.strip() for line in cells for cell in line} - {""}
    missing = cells - {*outline.cells}
    assert all(re.fullmatch("-+", cell) for cell in missing), missing
    figures = [tag for tag, _ in outline.elements if tag == "svg"]
    assert len(figures) == len([*reduced.glob("*.svg")]) > 0
    runs = [run for folder in RECORDS for run in report.read(folder)]
    assert text.count("\npython ") == len(runs)
    for one in report.group(runs):
        assert f"<h3>{html.escape(one['label'])}" in text


def test_nothing_leaves_the_page(reduced):
    text = (reduced / "report.html").read_text("utf-8")
    outline, ids = Outline(text), set()
    for each in outline.values("id"):
        assert each not in ids, f"{each} is there twice"
        ids.add(each)
    for link in outline.values("href"):
        assert link[1:] in ids if link.startswith("#") else link.startswith("data:image/png;"), link
    assert all(each in ids for each in re.findall(r"url\(#?([^)]*)\)", text))
    assert not outline.values("src") and not re.search(r"https?:|//\w|@import", text)
    (policy,) = (each["content"] for _, each in outline.elements if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; ")
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def shapes(root):
    """What a drawing draws with <use>, and where and how large: (numbers, digits that count)."""

    def numbers(text):
        return [float(each) for each in re.findall(r"-?\d+(?:\.\d+)?", text)]

    named = {each.get("id"): each.get("d", "") for each in root.iter() if each.get("id")}
    for each in root.iter():
        transform = each.get("transform", "")
        if each.tag.endswith("use"):
            link = each.get("href") or each.get(page.HREF)
            yield numbers(named[link[1:]]) + numbers(transform), 1e-2
        elif "scale" in transform:
            yield numbers(transform.rpartition("scale")[2]), 1e-9


def test_drawings_look_on_the_page_as_in_their_files(reduced):
    """Every letter and marker is the same one, at the same place, up to digits nobody sees."""
    for path in reduced.glob("*.svg"):
        drawing = path.read_text("utf-8")
        inline = ElementTree.fromstring(page.inline_svg(path.stem, drawing, "label"))
        pairs = [*zip(shapes(inline), shapes(ElementTree.fromstring(drawing)), strict=True)]
        assert len(pairs) > 100
        for (found, _), (wanted, tolerance) in pairs:
            assert len(found) == len(wanted)
            assert all(abs(x - y) < tolerance for x, y in zip(found, wanted))


HOSTILE = (
    "\"'><script>alert(1)</script><img src=x onerror=alert(1)></style>--></svg>\n\0\ud800&lt;$(x)"
)


def test_what_records_hold_is_text_on_the_page(tmp_path):
    """Names of data sets, folders, layers, devices and versions, and values that are no text."""
    folder = bottom_up(tmp_path / "<b>run", dataset=HOSTILE, save_dir=HOSTILE, rewind={HOSTILE: 1})
    retrained(folder, 0, [70.0, 60.0])
    other = dense(tmp_path / "2", 0, [[90.0]], save_data_path=[[HOSTILE]], arch=HOSTILE, lr=HOSTILE)
    for path in (folder / "results.json", other / "results.json"):
        run = json.loads(path.read_text())
        run |= {"device": HOSTILE, "versions": {HOSTILE: HOSTILE, "torch": [[]]}}
        run |= {"class_order": [HOSTILE], "images": {HOSTILE: 1}}
        for row in run["states"]:
            row["layer_density"] = {HOSTILE: 50.0}
        path.write_text(json.dumps(run))
    outline = Outline(page_of(tmp_path / "out", folder, other))
    tags = [tag for tag, _ in outline.elements]
    assert tags.count("script") == tags.count("style") == 1 and not {"img", "b"} & {*tags}
    assert not any(key.startswith("on") for _, each in outline.elements for key in each)
    assert "<script>alert(1)</script>" in outline.text


# ------------------------------------------------------------------------------ commands


def recorded():
    runs = [run for folder in RECORDS if "seed1" in str(folder) for run in report.read(folder)]
    return [pytest.param(run, id=f"{run['script']}-{i}") for i, run in enumerate(runs)]


@pytest.mark.parametrize("run", recorded())
def test_a_command_repeats_the_run_of_before(run):
    _, file, *flags = shlex.split(page.command(run))
    parsed = vars(importlib.import_module(file.removesuffix(".py")).parse(flags))
    shared = run["config"].keys() & parsed.keys()
    assert len(shared) > 10 and {key: parsed[key] for key in shared} == {
        key: run["config"][key] for key in shared
    }


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("main_CIL", []),
        ("main_CIL", ["--joint"]),
        ("main_TD", ["--save_dir", "my 'runs'; x/$HOME", "--prune_scheduler", "2,2,2,2,2"]),
        ("main_BU", ["--deacc=-1.5", "--no_teaching", "--unlabeled", "a b.npy", "c.npy"]),
        ("main_train", ["--weight", "w.pt", "--mask", "m.pt", "--state", "3", "--width", "8"]),
        ("main_CIL", ["--decreasing_lr", "", "--data=-odd", "--arch", "resnet32"]),
        ("test", ["--pretrained=-p.pt", "--pruned"]),
    ],
)
def test_a_command_is_the_shortest_that_gives_the_settings(script, flags):
    module = importlib.import_module(script)
    args = module.parse(flags)
    args.width = args.width or page.BACKBONES[args.arch].default_width  # as build_model() does
    run = {"script": script, "config": json.loads(json.dumps(vars(args)))}
    _, file, *found = shlex.split(page.command(run))
    again = module.parse(found)
    again.width = again.width or args.width
    assert file == f"{script}.py" and vars(again) == vars(args)
    given = {word.partition("=")[0] for word in flags if word.startswith("--")}
    assert {word.partition("=")[0] for word in found if word.startswith("--")} - given <= {
        "--save_dir"
    }


# ------------------------------------------------------------------------------ in a browser

CLICKS = """
const found = {};
for (const [i, table] of document.querySelectorAll("table.sortable").entries()) {
  const order = column => [...table.tBodies[0].rows].map(row => row.cells[column].innerText);
  found[i] = [...table.tHead.rows[0].cells].map((head, column) => ["", "", ""].map((_, click) => {
    if (click) head.querySelector("button").click();
    return [head.getAttribute("aria-sort"), order(column)];
  }));
}
document.body.dataset.found = JSON.stringify(found);
document.documentElement.style.width = "360px";  // a window is not that narrow
document.body.dataset.overflow = document.body.scrollWidth - 360;
"""


@pytest.mark.skipif(not BROWSER, reason="no Chromium found")
def test_a_browser_sorts_the_tables_and_complains_of_nothing(reduced, tmp_path):
    """With a second script, which the policy of a copy allows; as narrow as on a phone."""
    text = (reduced / "report.html").read_text("utf-8")
    allowed = base64.b64encode(hashlib.sha256(CLICKS.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{allowed}' ")
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", f"<script>{CLICKS}</script></body>"), "utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,800"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--disable-background-networking", "--dump-dom", path.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    (body,) = (each for tag, each in Outline(ended.stdout).elements if tag == "body")
    assert int(body["data-overflow"]) <= 0  # wide tables and figures scroll by themselves
    for table in json.loads(body["data-found"]).values():
        for (_, before), (up, rising), (down, falling) in table:
            assert (up, down) == ("ascending", "descending")
            empty = [cell for cell in before if not cell]
            assert sorted(rising) == sorted(falling) == sorted(before)
            assert not empty or rising[-len(empty) :] == falling[-len(empty) :] == empty
            numbers = [re.match(r"-?[\d.]+", cell) for cell in rising if cell]
            if all(numbers):
                numbers = [float(number[0]) for number in numbers]
                assert numbers == sorted(numbers), rising
