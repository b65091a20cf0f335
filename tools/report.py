"""Compare runs in tables and plots; runs that differ only in their seed are averaged.

    python -m tools.report TD_cifar10 BU_cifar10 --out report
    python -m tools.report runs/seed*/* --out report

Reads the results.json of each run, and those of main_train.py and test.py in the same folder. Runs
of one setting are a group, reported as mean and standard deviation over its seeds. Writes to --out:
report.html, one page with everything; report.md with all tables, each table also as .csv, and the
plots as .png and .svg: report (accuracy after each task, as in the paper's Figure 4), matrix
(accuracy of each task), confusion (of classes), curves (learning curves), layers (density and
multiply-accumulates of each layer), prunings (bottom-up: how tickets were found) and controls.
"""

import csv
import io
import json
import math
import os
import re
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from statistics import mean

from datasets import DATASETS
from models import BACKBONES
from models.cost import layer_macs
from runtime import metrics
from runtime.cli import CONTROLS, Parser
from runtime.epochs import epochs_path, read_epochs
from runtime.errors import UserError, one_line
from runtime.files import save_text
from runtime.process import run_script
from runtime.run import BOUNDS, RESUME_IGNORED
from tools import page, plots

METHODS = {
    "main_CIL": "dense",
    "main_TD": "TD",
    "main_BU": "BU",
    "main_train": "TR-BU",
    "test": "test",
}
# Flags that do not separate groups: they cannot change the expected result, or they are kept beside
# the setting in a group.
GROUP_IGNORED = RESUME_IGNORED | {"seed", "deterministic", "control", "state"}
# Flags that older records lack, with the values that they stand for.
ADDED_FLAGS = {"arch": "resnet18", "criterion": "magnitude"}
ADDED_FLAGS |= dict.fromkeys(("joint", "finetune", "merge_batchnorm"), False)
# Flags that a script took at that time although they changed nothing.
REMOVED_FLAGS = {
    "main_train": {"unlabel_num"},
    "test": {
        *("unlabel_num", "no_teaching", "epochs", "lr", "decreasing_lr"),
        *("momentum", "weight_decay"),
    },
}

# ------------------------------------------------------------------------------ reading


def read(folder):
    """The results of all runs in a folder, those of main_train last. Raises UserError."""
    paths = sorted(Path(folder).glob("*results.json"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise UserError(f"{folder}: contains no results.json; give the --save_dir of a run")
    try:
        runs = [read_run(path) for path in paths]
        runs = [run for run in runs if run["states"] != []] or runs  # skip runs without a result
        for run in runs:
            check_run(run)
            run |= {"first": runs[0], "folder": os.path.realpath(folder)}
            run["flags"] = setting_flags(run, runs[0])
            setting = [run["script"], run["flags"], run.get("class_order"), run.get("images")]
            run["setting"] = json.dumps(setting, sort_keys=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{folder}: results.json is damaged or has no results yet; give another run"
        ) from None
    return runs


def read_run(path):
    """The content of a results.json, and under "epochs" the rows of the metrics.csv beside it."""
    run = json.loads(path.read_text())
    return run | {"epochs": read_epochs(epochs_path(path))}


def check_run(run):
    """Raise an error unless a run holds all that is reported of it, in ranges that can be drawn."""

    def need(condition):
        if not condition:
            raise ValueError

    def need_number(value, low=0, high=100):
        need(type(value) in (int, float) and low <= value <= high)

    def need_int(value, low, high):
        need(type(value) is int and low <= value <= high)

    script, config, states = run["script"], run["config"], run["states"]
    tasks = config["classifiers"]
    need(script in METHODS and config.setdefault("control", "none") in CONTROLS)
    need_int(tasks, 1, 1000)
    need_int(config["width"], 1, 4096)
    need_int(config.get("classes_per_classifier", 1), 1, 10**6)
    need(len(run.get("image_size", (9, 9))) == 2)
    for side in run.get("image_size", ()):
        need_int(side, 9, 10**4)
    need_int(config.setdefault("seed", 0), 0, 2**63)
    need(isinstance(config["dataset"], str) and isinstance(config.get("arch", ""), str))
    need(states)
    names = run.setdefault("class_names", [str(c) for c in run.get("class_order", ())])
    need(len(names) <= 10_000 and all(isinstance(name, str) for name in names))
    first = states[0]["state"] if script in ("main_train", "test") else 1
    for state, row in enumerate(states, first):
        need_int(row["state"], state, min(state, tasks + (script == "main_TD")))
        accuracies = [row["accuracy"]]
        for key in ("mean", "density", *["ticket_density"] * ("ticket_density" in row)):
            need_number(row[key])
        if "task_aware" in row:
            accuracies.append(row["task_aware"])
        if "confusion" in row:
            classes = len(row["accuracy"]) * config.get("classes_per_classifier", 1)
            need(classes <= len(names))
            check_confusion(row["confusion"], classes)
        layers = [*row.get("layer_density", {}).values()]
        need(len(layers) <= 1000)
        if script == "main_BU":
            accuracies.append(row["dense_accuracy"])
            for pruning in row.get("rounds", []):
                need_number(pruning["density"])
                need_number(pruning["decay"], -100)
                need_number(row["ticket_density"])
        for accuracy in accuracies:
            need(len(accuracy) == min(state, tasks))
        for value in sum(accuracies, layers):
            need_number(value)
    if any(row.get("rounds") for row in states):  # drawn together with the stop rule
        need_number(config["deacc"], -math.inf, math.inf)
        need_number(config["base_sparsity"])
        need(isinstance(config["select_on"], str))


def check_confusion(matrix, classes):
    """Raise an error unless it holds counts, not all 0, of `classes` classes by as many."""
    counts = [n for row in matrix for n in row]
    square = [len(row) for row in matrix] == [classes] * classes
    whole = all(type(n) is int and 0 <= n < 1e9 for n in counts)
    if not (square and whole and sum(counts)):
        raise ValueError


def macs_of(run, row):
    """What layer_macs() says of a row's ticket, or of its model if no ticket is made; None if its
    record tells too little. Computed here for all, as older records hold no cost.
    """
    config, densities = ADDED_FLAGS | run["config"], row.get("layer_density", {})
    if not densities and row.get("ticket_density", row["density"]) != 100:
        return None
    size = run.get("image_size")
    if not size and (spec := DATASETS.get(config["dataset"])) and not spec.from_source:
        size = (spec.side, spec.side)
    if not size or config["arch"] not in BACKBONES or "classes_per_classifier" not in config:
        return None
    try:
        names = "arch", "classes_per_classifier", "classifiers", "width"
        shape = Namespace(**{name: config[name] for name in names})
        return layer_macs(shape, tuple(size), densities)
    except ValueError:  # of a network with other layers than the one of this name here
        return None


def setting_flags(run, first):
    """The flags that make up a run's setting. first: the first of the runs in its folder.

    A flag of ADDED_FLAGS is left out at its default. A ticket's setting includes the flags of the
    main_BU that found it, whose results are in the same folder.
    """
    script, config = run["script"], run["config"]
    ignored = GROUP_IGNORED | REMOVED_FLAGS.get(script, set())
    flags = {key: value for key, value in config.items() if key not in ignored}
    flags = {key: value for key, value in flags.items() if ADDED_FLAGS.get(key, ...) != value}
    if script == "main_train":
        t = run["states"][0]["state"]
        for key in ("weight", "mask"):
            flags[key] = name_from_task(Path(config.get(key, "")).name, t)
        if first["script"] == "main_BU":
            flags = first["flags"] | flags
    if script == "test":
        flags["state"] = run["states"][0]["state"]
        flags["pretrained"] = Path(config.get("pretrained", "")).name
    return flags


def name_from_task(name, t):
    """A file name seen from task t: for t = 3, task2_best_model.pt is task{t-1}_best_model.pt."""
    relative = {t: "{t}", t - 1: "{t-1}"}
    return re.sub(r"(?<=task|ask-)\d+", lambda m: relative.get(int(m[0]), m[0]), name)


def rows_by_task(run):
    """{task: row} of a run, where the row holds the accuracy after that task.

    The row of main_TD's last task T is that of its result, the model of "task T+1" under the ticket
    that task T's prunings made. Without a result yet, there is no such row. Each row also gets the
    layer_macs of macs_of().
    """
    rows, tasks = {row["state"]: row for row in run["states"]}, run["config"]["classifiers"]
    if run["script"] == "main_TD":
        ticket = rows.pop(tasks, {})
        if tasks + 1 in rows:
            rows[tasks] = ticket | rows.pop(tasks + 1)
    return {task: row | {"layer_macs": macs_of(run, row)} for task, row in rows.items()}


# ------------------------------------------------------------------------------ grouping


def group(runs):
    """Runs grouped by setting, whatever their seed: a list of dicts with these keys.

    script, control, flags, dataset, classifiers; bound: the flag of BOUNDS, None for other runs;
    label: a short name; seeds: {seed: {task: row}};
    accuracy: {task: {seed: mean accuracy of the tasks so far}}; task-aware, recency: the same of
    these measures, where they are recorded; density: the same for the ticket made in a task, or
    for the model where none is made; macs: its multiply-accumulates in percent of the dense
    network's, where they are known; ticket: equal for a ticket and its controls; runs: its runs, as
    read.

    When a seed occurs twice, the second run opens another group, and both labels name their
    folders.
    """
    groups, folders = {}, defaultdict(list)
    for run in runs:
        first, seed = run["first"], run["config"]["seed"]
        same = (first["setting"], first["config"]["seed"])
        if first["script"] != "main_BU":  # the runs in a folder of main_BU stay together
            same += (run["setting"], run["config"]["control"], run["states"][0]["state"])
        if run["folder"] not in folders[same]:
            folders[same].append(run["folder"])
        ticket = (run["setting"], folders[same].index(run["folder"]))
        new = {key: run[key] for key in ("script", "flags", "folder")}
        new |= {key: run["config"][key] for key in ("control", "classifiers", "dataset")}
        new["bound"] = next((flag for flag in BOUNDS if run["flags"].get(flag)), None)
        new |= {"ticket": ticket, "seeds": {}, "runs": [], "class_names": run["class_names"]}
        one = groups.setdefault((*ticket, new["control"]), new)
        one["runs"].append(run)
        one["seeds"].setdefault(seed, {}).update(rows_by_task(run))
    groups = sorted(groups.values(), key=lambda one: [*METHODS].index(one["script"]))
    add_labels(groups)
    for one in groups:
        one["accuracy"] = series(one, lambda row: sum(row["accuracy"]) / len(row["accuracy"]))
        one["task-aware"] = series(one, task_aware)
        one["recency"] = series(one, recency)
        if one["script"] == "main_BU":
            one["dense"] = series(one, lambda row: sum(row["dense_accuracy"]) / row["state"])
        one["density"] = series(one, lambda row: row.get("ticket_density", row["density"]))
        one["macs"] = series(one, total_macs)
    return groups


def series(one, value):
    """{task: {seed: value(row)}} of a group, in the order of tasks and seeds, without None."""
    tasks = sorted(set().union(*one["seeds"].values()))
    seeds = sorted(one["seeds"].items())
    found = {t: {seed: value(rows[t]) for seed, rows in seeds if t in rows} for t in tasks}
    return {t: {seed: v for seed, v in own.items() if v is not None} for t, own in found.items()}


def task_aware(row):
    """The mean task-aware accuracy of a row; None where the record has none."""
    return mean(row["task_aware"]) if "task_aware" in row else None


def recency(row):
    """metrics.recency() of a row; None where the record has no confusion matrix."""
    matrix = row.get("confusion")
    return matrix and metrics.recency(matrix, len(row["accuracy"]))


def total_macs(row):
    """Multiply-accumulates in percent of the dense network's; None where they are not known."""
    return row["layer_macs"] and sum(left for left, _ in row["layer_macs"].values())


def add_labels(groups):
    """Set each group's label, with its folder where two settings would have the same label."""
    alike = defaultdict(list)
    for one in groups:
        alike[one["script"], one["bound"]].append(one)
    for others in alike.values():
        for one in others:
            one["label"] = label(one, others)
    tickets = defaultdict(set)
    for one in groups:
        tickets[one["label"]].add(one["ticket"])
    for one in groups:
        if len(tickets[one["label"]]) > 1:
            folder = "/".join(Path(one["folder"]).parts[-2:])
            one["label"] += f" ({one_line(folder, 40)})"


def label(one, others):
    """A group's name: its method, and the flags in which the groups of its method differ."""
    flags, name = one["flags"], one["bound"] or METHODS[one["script"]]
    if one["script"] == "test":
        name = f"test of {flags['pretrained']}"
    task_rewound = {"weight": "task{t-1}_best_model.pt", "mask": "mask-{t}.pt"}
    if one["script"] == "main_train" and not task_rewound.items() <= flags.items():
        name = "retrained"
    parts = [name]
    for key, value in flags.items():
        if any(other["flags"].get(key) != value for other in others):
            if isinstance(value, list):
                value = ",".join(map(str, value))
            if value is not None and value is not False:
                parts.append(f"--{key}" + ("" if value is True else f" {value}"))
    return one_line(" ".join(parts), 70)


# ------------------------------------------------------------------------------ tables

COST_COLUMNS = (("density", "density", 2), ("MACs", "macs", 1))  # name, key of group(), decimals


def measures(one, tasks_shown):
    """[(name, values of the seeds, decimals)] of a group, for a row of the table of runs.

    tasks_shown: number of task columns in the table.
    """
    columns, tasks = range(1, tasks_shown + 1), range(1, one["classifiers"] + 1)
    found = [(f"task {t}", [*one["accuracy"].get(t, {}).values()], 1) for t in columns]
    finished = [rows for rows in one["seeds"].values() if rows.keys() == {*tasks}]
    matrices = [[rows[t]["accuracy"] for t in tasks] for rows in finished]
    for name, function in (
        ("last", metrics.last_accuracy),
        ("AIA", metrics.average_incremental_accuracy),
        ("forgetting", metrics.forgetting),
        ("BWT", metrics.backward_transfer),
    ):
        values = [function(matrix) for matrix in matrices]
        found.append((name, [value for value in values if value is not None], 1))
    for name in ("task-aware", "recency"):
        found.append((name, [*one[name].get(one["classifiers"], {}).values()], 1))
    for name, key, decimals in COST_COLUMNS:
        last = [*one[key].values()][-1:]
        found.append((name, [*last[0].values()] if last else [], decimals))
    return found


def run_table(groups):
    """(column names, rows as (texts, number of seeds, measures)) of the runs without controls."""
    tasks = max(one["classifiers"] for one in groups)
    shown = [one for one in groups if one["control"] == "none"]
    rows = [([one["label"]], len(one["seeds"]), measures(one, tasks)) for one in shown]
    return ["run"], without_empty_columns(rows)


def without_empty_columns(rows):
    """Rows of a table without the measures that no run has, such as those that old records lack."""
    found = [any(values for _, values, _ in column) for column in zip(*(row[2] for row in rows))]
    return [(*row[:2], [each for each, keep in zip(row[2], found) if keep]) for row in rows]


def control_table(groups):
    """The same of main_train's tickets and controls, a row for each task and control."""
    rows, trained = [], [one for one in groups if one["script"] == "main_train"]
    for ticket in dict.fromkeys(one["ticket"] for one in trained):
        variants = {one["control"]: one for one in trained if one["ticket"] == ticket}
        tasks = sorted(set().union(*(one["accuracy"] for one in variants.values())))
        for task in tasks:
            rows += [
                control_row(variants, control, task)
                for control in CONTROLS
                if control in variants and task in variants[control]["accuracy"]
            ]
    return ["ticket of", "task", "trained"], without_empty_columns(rows)


def control_row(variants, control, task):
    """The row of a control of a ticket. variants: {control: group}, the ticket's own as "none"."""
    one, found = variants[control], []
    for name, of_difference in (
        ("accuracy", "minus the ticket"),
        ("task-aware", "task-aware minus the ticket"),
    ):
        values, ticket = one[name][task], {}
        if control != "none" and "none" in variants:
            ticket = variants["none"][name].get(task, {})
        difference = [value - ticket[seed] for seed, value in values.items() if seed in ticket]
        found += [(name, [*values.values()], 1), (of_difference, difference, 1)]
    for name, key, decimals in (("recency", "recency", 1), *COST_COLUMNS):
        found.append((name, [*one[key][task].values()], decimals))
    return [one["label"], str(task), CONTROLS[control]], len(one["accuracy"][task]), found


def as_markdown(names, rows):
    """A table as Markdown with aligned columns and cells such as '73.2 ± 0.4'."""
    lines = [[*names, "seeds", *(name for name, *_ in rows[0][2])]]
    for texts, seeds, found in rows:
        lines.append([*texts, str(seeds), *(cell(*measure[1:], seeds) for measure in found)])
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
        pairs = [metrics.mean_and_sd(values) if values else (None, None) for _, values, _ in found]
        flat = ["" if value is None else f"{value:.4f}" for pair in pairs for value in pair]
        lines.append([*texts, seeds, *flat])
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def cell(values, decimals, seeds):
    """'73.2 ± 0.4', with the number of values where it is less than the number of seeds."""
    if not values:
        return ""
    mean, deviation = metrics.mean_and_sd(values)
    mean = round(mean, decimals) + 0.0  # no -0.0
    text = f"{mean:.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")
    return text + (f" (n = {len(values)})" if len(values) < seeds else "")


# ------------------------------------------------------------------------------ the report

ABOUT_RUNS = """Test accuracy in percent after each task, averaged over the tasks so far. BWT is the
backward transfer, task-aware the accuracy after the last task by the heads of each image's task,
recency the percentage of test images that are then classified as a class of the last task.
Density is the percentage of weights that remain in the last ticket, and MACs that of the
multiply-accumulates per image (computed, not measured). Mean ± standard deviation (n - 1) over
seeds. TD's accuracy after the last task is that of its result; BU's accuracy after a task is that
of its ticket before the task's re-growth. Columns that no run fills are left out."""
ABOUT_CONTROLS = """Retrained tickets (main_train.py) and their controls on the same task. All is
measured after the task t of the row, so that an unbiased recency is 100 / t. "Minus the ticket" is
the difference from the ticket of the same seed, in percentage points."""


def unfinished(groups):
    """Lines on runs that have not reached their last task."""
    lines = []
    for one in groups:
        for seed, rows in one["seeds"].items():
            if one["script"] not in ("main_train", "test") and one["classifiers"] not in rows:
                progress = f"{len(rows)} of {one['classifiers']} tasks so far"
                lines.append(f"{one['label']}, seed {seed}: {progress}")
    return lines


def main(argv=None):
    parser = Parser(__doc__, "python -m tools.report")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the --save_dir of a run")
    message = "where to write tables and plots (default %(default)s)"
    parser.add_argument("--out", default="report", metavar="DIR", help=message)
    args = parser.parse_args(argv)
    folders = {os.path.realpath(folder): folder for folder in args.runs}  # each one once
    groups = group([run for folder in folders.values() for run in read(folder)])
    tables = {"report": (ABOUT_RUNS, *run_table(groups))}
    tables["controls"] = (ABOUT_CONTROLS, *control_table(groups))
    tables = {name: table for name, table in tables.items() if table[2]}  # those with rows
    figures, missing = plots.draw(groups)
    write_report(Path(args.out), groups, tables, [*unfinished(groups), *missing], figures)


def write_report(out, groups, tables, notes, figures):
    """Print the tables and notes; write them, the figures and the page to the folder `out`."""
    text = "".join(f"{about}\n\n{as_markdown(*table)}\n" for about, *table in tables.values())
    print(text + "".join(f"{note}\n" for note in notes), end="")
    definitions = "".join(f"- {name}: {meaning}\n" for name, meaning in metrics.DEFINITIONS.items())
    text += f"With a_{{t,i}} the accuracy of task i after task t:\n\n{definitions}\n"
    text += "".join(f"{note}\n\n" for note in notes)
    text += "".join(f"![{name}]({name}.png)\n" for name in figures)
    files = {f"{name}.csv": as_csv(*table) for name, (_, *table) in tables.items()}
    for name, content in (files | {"report.md": text}).items():
        save_text(out / name, content)
    for name, figure in figures.items():
        plots.write(figure, out / name)
    drawings = {name: (out / f"{name}.svg").read_text("utf-8") for name in figures}
    save_text(out / "report.html", page.render(groups, tables, notes, drawings, cell))
    written = [*files, "report.md", *(f"{name}.{kind}" for name in figures for kind in plots.KINDS)]
    print(f"written to {out}: {', '.join(written)}")
    print(f"all on one page: {out / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
