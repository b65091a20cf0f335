"""report.html of tools/report.py: its tables, its figures and the runs on one page.

The page needs no other file and no network, and its Content-Security-Policy forbids both. It is
complete without its one small script, which sorts the tables. All that comes from records passes
through text(). The same report gives the same bytes.
"""

import base64
import functools
import hashlib
import html
import importlib
import inspect
import re
import shlex
import statistics
from pathlib import Path
from xml.etree import ElementTree

from datasets import DATASETS
from models import BACKBONES
from runtime import metrics
from runtime.cli import CONTROLS
from runtime.errors import one_line
from tools import plots

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem;
  background: Canvas; color: CanvasText; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
nav a { margin-right: 1rem; }
.box { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td[data-value], button { white-space: nowrap; }
tbody th { position: sticky; left: 0; background: Canvas; min-width: min(13rem, 30vw); }
ul { columns: 22rem; padding: 0; list-style: none; font-size: .875rem; }
li { break-inside: avoid; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid; }
th button::after { content: " \\2195"; opacity: .5; }
[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
figure { margin: 1rem 0; padding: .5rem; background: white; color: black; }
svg { display: block; margin: auto; width: 100%; min-width: 36rem; max-width: 52rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
pre { white-space: pre-wrap; padding: .5rem; background: var(--soft); font-size: .85rem; }
summary { cursor: pointer; }
@media print {
  :root { font-size: 9pt; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  .box { overflow: visible; }
  table { font-size: 7pt; }
  th, td { padding: 1pt 3pt; }
  tbody th { position: static; min-width: 0; }
  ul { columns: 15rem; }
  th button::after { content: none; }
  svg { min-width: 0; }
  h2, h3, p { break-after: avoid; }
  figure, tr, pre { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
# An empty cell comes last in both directions.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (!x || !y) return !x - !y;
        const text = isNaN(x) || isNaN(y);
        const order = text ? x.localeCompare(y, "en", { numeric: true }) : x - y;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
"""
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# Matplotlib styles each element by an attribute and holds images as data.
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; "
    f"img-src data:; script-src 'sha256-{SCRIPT_HASH}'"
)
ABOUT_SUMMARY = """Test accuracy in percent over all tasks so far, after the last task of a run,
and density: the percentage of weights that remain in its last ticket."""
HREF = "{http://www.w3.org/1999/xlink}href"


def render(groups, tables, notes, figures, cell):
    """The page as text.

    groups, tables, notes: those of tools/report.py, and its function cell(). figures: {name: SVG
    as Matplotlib writes it}.
    """
    title = f"Lifelong tickets on {plots.title(groups)}"
    summary = {"summary": (ABOUT_SUMMARY, *summary_table(groups))}
    shown = {name: table for name, table in (summary | tables).items() if table[2]}
    sections = {
        **{name: table_section(name, *table, cell) for name, table in shown.items()},
        "figures": "".join(figure(name, drawing) for name, drawing in figures.items()),
        "measures": definitions(),
        "runs": "".join(run_section(one) for one in groups),
    }
    sections = {name: content for name, content in sections.items() if content}
    links = "".join(f'<a href="#{text(name)}">{heading(name)}</a>\n' for name in sections)
    notes = "".join(f"<p>Note: {text(note)}.</p>\n" for note in notes)
    body = "".join(
        f'<section>\n<h2 id="{text(name)}">{heading(name)}</h2>\n{content}</section>\n'
        for name, content in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<nav>
{links}</nav>
{notes}</header>
<main>
{body}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def text(value, limit=400):
    """Whatever a record holds, as text of the page."""
    return html.escape(one_line(value, limit))


def heading(name):
    return text(name.replace("_", " ").capitalize())


# ------------------------------------------------------------------------------ tables


def summary_table(groups):
    """(column names, rows) as of the tables of tools/report.py: where each group has come to."""
    rows = []
    for one in groups:
        if one["control"] == "none" and one["accuracy"]:
            last = max(one["accuracy"])
            kinds = (("accuracy", 1), ("density", 2))
            found = [(kind, [*one[kind][last].values()], digits) for kind, digits in kinds]
            rows.append(([one["label"], str(last)], len(one["seeds"]), found))
    return ["run", "after task"], rows


def table_section(name, about, names, rows, cell):
    """What a table shows, and the table; a number has its mean beside it, to sort by."""
    heads = [*names, "seeds", *(measure for measure, *_ in rows[0][2])]
    lines = []
    for (first, *texts), seeds, found in rows:
        cells = [f'<th scope="row">{text(first)}</th>']
        cells += [f"<td>{text(each)}</td>" for each in (*texts, seeds)]
        for _, values, decimals in found:
            mean = f' data-value="{statistics.fmean(values):.10g}"' if values else ""
            cells.append(f"<td{mean}>{text(cell(values, decimals, seeds))}</td>")
        lines.append("".join(cells))
    lines = "".join(f"<tr>{line}</tr>\n" for line in lines)
    heads = "".join(f'<th scope="col">{text(head)}</th>' for head in heads)
    table = f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}</tbody>\n"
    table = box(f'<table class="sortable">\n{table}</table>', name)
    return f"<p>{text(about, 2000)}</p>\n{table}"


def box(content, label):
    """Content that scrolls by itself where it is wider than the page, by keyboard too."""
    label = text(label)
    return f'<div class="box" role="region" tabindex="0" aria-label="{label}">{content}</div>\n'


def definitions():
    """The measures and what they mean, with indices as such."""
    content = "<p>With a_{t,i} the accuracy of task i after task t:</p>\n<dl>\n"
    for name, meaning in metrics.DEFINITIONS.items():
        content += f"<dt>{text(name)}</dt>\n<dd>{text(meaning, 2000)}</dd>\n"
    return re.sub(r"_\{(.*?)\}", r"<sub>\1</sub>", content + "</dl>\n")


# ------------------------------------------------------------------------------ figures


def figure(name, drawing):
    """A figure with its caption: the docstring of the function that draws it."""
    about = inspect.getdoc(getattr(plots, name, None)) if hasattr(plots, name) else None
    about = (about or name).partition("\n\n")[0]
    drawing = inline_svg(name, drawing, one_line(about))
    caption = f"<figcaption>{text(about)} ({text(name)}.svg)</figcaption>\n"
    return f"<figure>\n{box(drawing, name)}{caption}</figure>\n"


def inline_svg(name, drawing, label):
    """A drawing of Matplotlib as an element of a page, with ids that no other drawing has.

    Left out: metadata, the style sheet, which would hold for the whole page, ids to which nothing
    refers, digits that nobody can see, and indentation.
    """
    root = ElementTree.fromstring(drawing)
    used = dict.fromkeys(re.findall(r"#([^\s\"')]+)", drawing))
    ids = {each: f"{name}-{number}" for number, each in enumerate(used)}
    for element in root.iter():
        for child in [*element]:
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        element.text, element.tail = (element.text or "").strip(), (element.tail or "").strip()
        element.tag = element.tag.rpartition("}")[2]  # HTML knows the names without a prefix
        if HREF in element.attrib:
            element.set("href", element.attrib.pop(HREF))
        if element.get("id") not in ids:
            element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            if key in ("d", "transform"):  # but of a scale below 1 each digit counts
                value = re.sub(r"(?<!\b0)(\.\d\d)\d+", r"\1", value)
            elif key == "id":
                value = ids[value]
            elif key == "href" and value.startswith("#"):
                value = f"#{ids[value[1:]]}"
            element.set(key, re.sub(r"url\(#(.*?)\)", lambda m: f"url(#{ids[m[1]]})", value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


# ------------------------------------------------------------------------------ runs


def run_section(one):
    """The runs of a group: how to repeat them, and their settings."""
    runs = sorted(one["runs"], key=lambda run: (run["config"]["seed"], run["states"][0]["state"]))
    control = "" if one["control"] == "none" else f": {CONTROLS[one['control']]}"
    commands = "".join(f"# seed {run['config']['seed']}\n{command(run)}\n" for run in runs)
    places = ", with ".join(dict.fromkeys(place(run) for run in runs))
    changed, others = settings(runs)
    return f"""<h3>{text(one["label"] + control)}</h3>
<p>Ran on {text(places, 2000)}. To repeat:</p>
<pre>{html.escape(commands)}</pre>
{settings_list(changed)}<details>
<summary>All other settings</summary>
{settings_list(others)}</details>
"""


def place(run):
    """The device and the versions of a run."""
    versions = run.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    found = [f"{name} {plain(version)}" for name, version in versions.items()]
    return ", ".join([plain(run.get("device", "an unknown device")), *found])


@functools.cache
def flags_of(script):
    """{name: argparse action} of a script's flags."""
    parser = importlib.import_module(script).make_parser()
    return {action.dest: action for action in parser._actions}  # argparse has no public list


def defaults(run):
    """{flag: default} of a run's script, also of those that depend on other flags."""
    script, config = run["script"], run["config"]
    found = {name: action.default for name, action in flags_of(script).items()}
    spec = DATASETS.get(config["dataset"])
    network = BACKBONES.get(config.get("arch", found["arch"]))
    if spec:
        found |= {key: getattr(spec, key) for key in ("classifiers", "classes_per_classifier")}
        # of an embedded set, records name the file
        found["data"] = config.get("data") if spec.embedded else f"data/{config['dataset']}"
    if network:
        found["width"] = network.default_width
    if isinstance(config.get("save_dir"), str):
        found["save_data_path"] = str(Path(config["save_dir"]) / "data")
    if config.get("joint") or config.get("finetune"):  # they imply it
        found["no_teaching"] = True
    return found | {"state": config["classifiers"]}


def changed_flags(run):
    """{flag: value} of a run where the value is not the default, in the order of the help."""
    usual, config = defaults(run), run["config"]
    return {
        name: config[name]
        for name in flags_of(run["script"])
        if config.get(name) is not None and plain(config[name]) != plain(usual[name])
    }


def command(run):
    """The command that repeats a run, for a shell."""
    words = ["python", f"{run['script']}.py"]
    for name, value in changed_flags(run).items():
        action = flags_of(run["script"])[name]
        option = action.option_strings[-1]
        if action.nargs == 0:  # it is given or not
            words += [option] * bool(value)
        else:
            several = action.nargs == "+" and isinstance(value, list)
            first, *more = map(plain, (value if several else [value]) or [""])
            words += [f"{option}={first}"] if first.startswith("-") else [option, first]
            words += more
    return shlex.join(words)


def plain(value):
    """A value of a record as it is typed; nothing is typed that is neither text nor number."""
    if isinstance(value, list):
        return ",".join("..." if isinstance(each, list) else plain(each) for each in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # --deacc 2, whose default is an integer
    return one_line(value, 400) if isinstance(value, str | int | float | None) else "..."


def shown(value):
    """A value of a flag for a reader."""
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return plain(value)


def settings(runs):
    """Two dicts of {name: values in these runs}: the flags that are not the default, and the rest.

    Flags that a script no longer has changed nothing, and are left out.
    """
    parts = changed, others = {}, {}
    names = set().union(*map(changed_flags, runs))
    for run in runs:
        for name in flags_of(run["script"]):
            if name in run["config"]:
                value = run["config"][name]
                values = parts[name not in names].setdefault(f"--{name}", {})
                values[shown(value)] = None  # each once
        for name in ("class_order", "images"):
            if name in run:
                others.setdefault(name.replace("_", " "), {})[plain(run[name])] = None
    return changed, others


def settings_list(found):
    """The settings, each with its values in the runs of a group."""
    items = "".join(
        f"<li><code>{text(name)}</code> {text('; '.join(values), 4000)}</li>\n"
        for name, values in found.items()
    )
    return f"<ul>\n{items}</ul>\n"
