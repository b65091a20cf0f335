"""Set runs side by side: tables and pictures, seeds of one setting taken together.

    python report.py TD_cifar10 BU_cifar10 --out report
    python report.py runs/seed*/* --out report

Reads the results.json of each run, and those of main_train and test in the same folder. Runs that
differ in their seeds and folders alone are a group, told by its mean and standard deviation. Writes
to --out report.md with all tables, each also as .csv, and pictures (pictures.py), each .png and
.svg: report (accuracy after each task, as in the paper's Figure 4), matrix (accuracy of each task),
layers (density of each layer), prunings (bottom-up: how tickets were found) and controls.
"""

import csv
import io
import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path

import pictures
import utils
from run import FREE
from utils import Refusal

NAMES = {
    "main_CIL": "dense",
    "main_TD": "TD",
    "main_BU": "BU",
    "main_train": "TR-BU",
    "test": "test",
}
# flags that do not make another setting: they cannot change what is to be expected of a run, or
# stand beside the setting in a group
APART = FREE | {"seed", "deterministic", "control", "state"}

# ------------------------------------------------------------------------------ reading


def read(folder):
    """The results of all runs in a folder, main_train's after the others. Raises Refusal."""
    paths = sorted(Path(folder).glob("*results.json"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise Refusal(f"{folder}: holds no results.json, give the --save_dir of a run")
    try:
        runs = [json.loads(path.read_text()) for path in paths]
        runs = [run for run in runs if run["states"] != []] or runs  # some have just begun
        for run in runs:
            check(run)
            run |= {"first": runs[0], "place": os.path.realpath(folder)}
            run["flags"] = flags_of(run, runs[0])
            setting = [run["script"], run["flags"], run.get("class_order"), run.get("images")]
            run["setting"] = json.dumps(setting, sort_keys=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Refusal(
            f"{folder}: results.json is damaged or has no state, give another run"
        ) from None
    return runs


def check(run):
    """Raise an error unless a run holds what is told of it, and its numbers can be drawn."""

    def need(sound):
        if not sound:
            raise ValueError

    def number(value, least=0, most=100):
        need(type(value) in (int, float) and least <= value <= most)

    def whole(value, least, most):
        need(type(value) is int and least <= value <= most)

    script, config, states = run["script"], run["config"], run["states"]
    tasks = config["classifiers"]
    need(script in NAMES and config.setdefault("control", "none") in utils.CONTROLS)
    whole(tasks, 1, 1000)
    whole(config["width"], 1, 4096)
    whole(config.setdefault("seed", 0), 0, 2**63)
    need(isinstance(config["dataset"], str) and "$" not in config["dataset"])  # no formula
    need(states)
    first = states[0]["state"] if script in ("main_train", "test") else 1
    for state, row in enumerate(states, first):
        whole(row["state"], state, min(state, tasks + (script == "main_TD")))
        several = [row["accuracy"]]
        for key in ("mean", "density", *["ticket_density"] * ("ticket_density" in row)):
            number(row[key])
        layers = [*row.get("layer_density", {}).values()]
        need(len(layers) <= 1000)
        if script == "main_BU":
            several.append(row["dense_accuracy"])
            for each in row.get("rounds", []):
                number(each["density"])
                number(each["decay"], -100)
                number(row["ticket_density"])
        for accuracy in several:
            need(len(accuracy) == min(state, tasks))
        for value in sum(several, layers):
            number(value)
    if any(row.get("rounds") for row in states):  # which are drawn with the rule that ends them
        number(config["deacc"], -math.inf, math.inf)
        number(config["base_sparsity"], 0, 100 - 1e-9)
        need(isinstance(config["select_on"], str))


def flags_of(run, first):
    """The flags that make a run what it is, beside its script; first: of the runs in its folder.

    A ticket's are also those of the main_BU that made it, which lies in its folder.
    """
    config = run["config"]
    flags = {key: value for key, value in config.items() if key not in APART}
    if run["script"] == "main_train":
        t = run["states"][0]["state"]
        flags |= {key: relative(Path(config.get(key, "")).name, t) for key in ("weight", "mask")}
        if first["script"] == "main_BU":
            flags = first["flags"] | flags
    if run["script"] == "test":
        flags["state"] = run["states"][0]["state"]
        flags["pretrained"] = Path(config.get("pretrained", "")).name
    return flags


def relative(name, t):
    """A file's name with its task as seen from task t: task2_best_model.pt is of task t-1 = 2."""
    words = {t: "{t}", t - 1: "{t-1}"}
    return re.sub(r"(?<=task|ask-)\d+", lambda m: words.get(int(m[0]), m[0]), name)


def rows_of(run):
    """{task: row} of a run, where the row holds the accuracy after that task.

    main_TD's row of task T is that of its result, the model of "task T+1", under the ticket that
    task T's prunings made; until there is a result, there is no such row.
    """
    rows, tasks = {row["state"]: row for row in run["states"]}, run["config"]["classifiers"]
    if run["script"] == "main_TD":
        ticket = rows.pop(tasks, {})
        if tasks + 1 in rows:
            rows[tasks] = ticket | rows.pop(tasks + 1)
    return rows


# ------------------------------------------------------------------------------ grouping


def group(runs):
    """Runs of one setting and different seeds taken together, as a list of dicts.

    script, control, flags, classifiers; label: a short name; seeds: {seed: {task: row}}; accuracy:
    {task: {seed: mean accuracy of the tasks so far}}; density: the same of the ticket made in a
    state, or where none is made of the model; ticket: alike for a ticket and its controls. The same
    seed twice makes another group, and the labels then tell the folders.
    """
    groups, places = {}, defaultdict(list)
    for run in runs:
        first, seed = run["first"], run["config"]["seed"]
        same = (first["setting"], first["config"]["seed"])
        if first["script"] != "main_BU":  # else all that lies in a folder stays together
            same += (run["setting"], run["config"]["control"], run["states"][0]["state"])
        if run["place"] not in places[same]:
            places[same].append(run["place"])
        key = (run["setting"], places[same].index(run["place"]))
        new = {name: run[name] for name in ("script", "flags", "place")}
        new |= {name: run["config"][name] for name in ("control", "classifiers", "dataset")}
        one = groups.setdefault((*key, new["control"]), new | {"ticket": key, "seeds": {}})
        one["seeds"].setdefault(seed, {}).update(rows_of(run))
    groups = sorted(groups.values(), key=lambda one: [*NAMES].index(one["script"]))
    for one in groups:
        one["label"] = label(one, [each for each in groups if each["script"] == one["script"]])
    for one in groups:
        alike = {each["ticket"] for each in groups if each["label"] == one["label"]}
        if len(alike) > 1:
            folder = "/".join(Path(one["place"]).parts[-2:])
            one["folder"] = f" ({utils.shown(folder, 40)})"
    for one in groups:
        one["label"] += one.get("folder", "")
        one["accuracy"] = series(one, lambda row: sum(row["accuracy"]) / len(row["accuracy"]))
        if one["script"] == "main_BU":
            one["dense"] = series(one, lambda row: sum(row["dense_accuracy"]) / row["state"])
        one["density"] = series(one, lambda row: row.get("ticket_density", row["density"]))
    return groups


def series(one, value):
    """{task: {seed: value(row)}} of a group, in the order of tasks and seeds."""
    tasks = sorted(set().union(*one["seeds"].values()))
    seeds = sorted(one["seeds"].items())
    return {t: {seed: value(rows[t]) for seed, rows in seeds if t in rows} for t in tasks}


def label(one, others):
    """A group's name: its method, and the flags in which other groups of its script differ."""
    flags, name = one["flags"], NAMES[one["script"]]
    if one["script"] == "test":
        name = f"test of {flags['pretrained']}"
    rewound = {"weight": "task{t-1}_best_model.pt", "mask": "mask-{t}.pt"}
    if one["script"] == "main_train" and not rewound.items() <= flags.items():
        name = "retrained"
    words = [name]
    for key in flags:
        if any(each["flags"].get(key) != flags[key] for each in others):
            value = flags[key]
            if isinstance(value, list):
                value = ",".join(map(str, value))
            if value is not None and value is not False:
                words.append(f"--{key}" + ("" if value is True else f" {value}"))
    return utils.shown(" ".join(words), 70)


# ------------------------------------------------------------------------------ tables


def measures(one, most):
    """[(name, values of the seeds, decimals)] of a group, for a row of the first table.

    most: number of tasks that the table has columns for.
    """
    columns, tasks = range(1, most + 1), range(1, one["classifiers"] + 1)
    found = [(f"task {t}", [*one["accuracy"].get(t, {}).values()], 1) for t in columns]
    whole = [rows for rows in one["seeds"].values() if rows.keys() == {*tasks}]
    matrices = [[rows[t]["accuracy"] for t in tasks] for rows in whole]
    for name, function in (
        ("last", utils.last_accuracy),
        ("AIA", utils.average_incremental_accuracy),
        ("forgetting", utils.forgetting),
    ):
        values = [function(matrix) for matrix in matrices]
        found.append((name, [value for value in values if value is not None], 1))
    last = [*one["density"].values()][-1:]
    return [*found, ("density", [*last[0].values()] if last else [], 2)]


def run_table(groups):
    """(names of the columns, rows as (texts, number of seeds, measures)) of the first table."""
    most = max(one["classifiers"] for one in groups)
    shown = [one for one in groups if one["control"] == "none"]
    return ["run"], [([one["label"]], len(one["seeds"]), measures(one, most)) for one in shown]


def control_table(groups):
    """The same of main_train's tickets and controls, a row for each task and control."""
    rows, trained = [], [one for one in groups if one["script"] == "main_train"]
    for ticket in dict.fromkeys(one["ticket"] for one in trained):
        own = {one["control"]: one for one in trained if one["ticket"] == ticket}
        base = own["none"]["accuracy"] if "none" in own else {}
        for task in sorted(set().union(*(one["accuracy"] for one in own.values()))):
            for control in utils.CONTROLS:
                accuracy = own[control]["accuracy"].get(task) if control in own else None
                if accuracy:
                    pair = {} if control == "none" else base.get(task, {})
                    less = [value - pair[seed] for seed, value in accuracy.items() if seed in pair]
                    found = [("accuracy", [*accuracy.values()], 1)]
                    found.append(("density", [*own[control]["density"][task].values()], 2))
                    found.append(("minus the ticket", less, 1))
                    texts = [own[control]["label"], str(task), utils.CONTROLS[control]]
                    rows.append((texts, len(accuracy), found))
    return ["ticket of", "task", "trained"], rows


def as_markdown(names, rows):
    """A table as Markdown that can be read as it is: '73.2 ± 0.4'."""
    lines = [[*names, "seeds", *(name for name, *_ in rows[0][2])]]
    for texts, seeds, found in rows:
        lines.append([*texts, str(seeds), *(cell(*each[1:], seeds) for each in found)])
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    lines = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(names, rows):
    """A table as CSV: a column for each mean and each standard deviation, in percent."""
    kinds = [f"{name} {kind}" for name, *_ in rows[0][2] for kind in ("mean", "sd")]
    lines = [[*names, "seeds", *kinds]]
    for texts, seeds, found in rows:
        spreads = [utils.spread(values) if values else (None, None) for _, values, _ in found]
        flat = ["" if value is None else f"{value:.4f}" for both in spreads for value in both]
        lines.append([*texts, seeds, *flat])
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def cell(values, decimals, seeds):
    """'73.2 ± 0.4', and of how many seeds where they are not all."""
    if not values:
        return ""
    mean, deviation = utils.spread(values)
    mean = round(mean, decimals) + 0.0  # no -0.0
    text = f"{mean:.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")
    return text + (f" (n = {len(values)})" if len(values) < seeds else "")


# ------------------------------------------------------------------------------ the report

ABOUT = """Test accuracy in percent, the mean over the tasks so far, after each task; density: the
weights that remain in percent, of the last ticket. Mean ± standard deviation (n - 1) over seeds.
BU's accuracy after a task is under the ticket that it came with, before that task's re-growth."""
ABOUT_CONTROLS = """Tickets trained anew (main_train.py) beside what was trained in their place, on
the same task; the difference is to the ticket of the same seed, in percentage points."""


def unfinished(groups):
    """Lines on runs that have not come to their last task."""
    lines = []
    for one in groups:
        for seed, rows in one["seeds"].items():
            if one["script"] not in ("main_train", "test") and one["classifiers"] not in rows:
                far = f"{len(rows)} of {one['classifiers']} tasks so far"
                lines.append(f"{one['label']}, seed {seed}: {far}")
    return lines


def main(argv=None):
    parser = utils.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the --save_dir of a run")
    words = "where tables and pictures go (default %(default)s)"
    parser.add_argument("--out", default="report", metavar="DIR", help=words)
    args = parser.parse_args(argv)
    folders = {os.path.realpath(folder): folder for folder in args.runs}  # each once
    groups = group([run for folder in folders.values() for run in read(folder)])
    out = Path(args.out)
    tables = [
        ("report", ABOUT, run_table(groups)),
        ("controls", ABOUT_CONTROLS, control_table(groups)),
    ]
    tables = [each for each in tables if each[2][1]]
    definitions = "".join(f"- {name}: {words}\n" for name, words in utils.DEFINITIONS.items())
    told = "".join(f"{about}\n\n{as_markdown(*table)}\n" for _, about, table in tables)
    figures, missing = pictures.draw(groups)
    notes = "".join(f"{line}\n\n" for line in (*unfinished(groups), *missing))
    print(told + notes.replace("\n\n", "\n"), end="")
    texts = {f"{name}.csv": as_csv(*table) for name, _, table in tables}
    told += f"With a_{{t,i}} the accuracy of task i after task t:\n\n{definitions}\n"
    texts["report.md"] = told + notes + "".join(f"![{name}]({name}.png)\n" for name in figures)
    for name, text in texts.items():
        utils.save_text(out / name, text)
    for name, figure in figures.items():
        pictures.write(figure, out / name)
    written = [*texts, *(f"{name}.{kind}" for name in figures for kind in ("png", "svg"))]
    print(f"written to {out}: {', '.join(written)}")


if __name__ == "__main__":
    utils.run(main)
