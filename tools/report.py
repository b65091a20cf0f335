"""Compare runs in tables and figures; runs that differ only in their seed are averaged.

    python -m tools.report TD_cifar10 BU_cifar10 --out report
    python -m tools.report runs/seed*/* --out report

Reads results.json, metrics.csv and confusion.csv of each run, and those of main_train.py and
test.py in the same folder. Writes to --out:

    report.html    all tables and figures on one page that needs no other file
    report.md      the tables; runs.csv and controls.csv hold their numbers
    results.csv    a row for each run, state and task: what to load into pandas
    accuracy.png, controls.png, curves.png, confusion.png
"""

import base64
import json
import math
import os
import re
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from runtime import measures
from runtime.args import CONTROLS, Parser
from runtime.errors import UserError, one_line
from runtime.files import atomic_write, save_text
from runtime.process import run_script
from tools import figures
from tools.figures import BOUNDS, STYLES

# Flags that cannot change the expected result, or that the tables show beside the run.
NO_SETTING = {
    *("save_dir", "save_data_path", "overwrite", "print_freq", "tensorboard", "deterministic"),
    *("device", "gpu", "data", "class_order", "seed", "control", "state"),
}
ABOUT_RUNS = """Test accuracy in percent after each task, averaged over the tasks so far. BWT is the
backward transfer, task-aware the accuracy after the last task by the heads of each image's task,
recency the percentage of test images that are then classified as a class of the last task.
Density is the percentage of weights in the model that was tested, and MACs that of the
multiply-accumulates per image (computed, not measured); "ticket" is the one found after the last
test, which BU may have re-grown. TD's accuracy after the last task is that of its result.
Mean ± standard deviation (n - 1) over seeds. Columns that no run fills are left out."""
ABOUT_CONTROLS = """Retrained tickets (main_train.py) and their controls on the same task. All is
measured after the task t of the row, so that an unbiased recency is 100 / t. "Minus the ticket" is
the difference from the ticket of the same seed, in percentage points."""

# ------------------------------------------------------------------------------ reading


def read_folder(folder):
    """The records in a run's folder as dicts, its own first. Raises UserError.

    Added to what results.json holds are "path", "folder", and "flags", the setting.
    """
    paths = sorted(Path(folder).glob("*results.json"), key=lambda path: (len(path.name), path.name))
    records = [record for record in map(read_record, paths) if record["states"]]
    if not records:
        raise UserError(f"{folder}: no results.json with results, give the --save_dir of a run")
    for record in records:
        record |= {"folder": folder, "flags": setting_flags(record, records[0])}
    return records


def read_record(path):
    """The content of a results.json. Raises UserError."""
    try:
        record = json.loads(path.read_text("utf-8")) | {"path": path}
        check_record(record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged or not a results file, give another run") from None
    return record


def check_record(record):
    """Raise an error unless a record has the types and ranges that tables and figures need."""
    config, tasks = record["config"], record["config"]["classifiers"]
    states = [row["state"] for row in record["states"]]
    found = [
        record["script"] in STYLES,
        config.setdefault("control", "none") in CONTROLS,
        isinstance(config["dataset"], str),
        isinstance(config.setdefault("seed", 0), int),
        all(isinstance(t, int) for t in (tasks, *states)) and 0 < tasks <= 1000,
        states == sorted({*states} & {*range(1, tasks + 2)}),
    ]
    for row in record["states"]:
        lists = [row[key] for key in ("accuracy", "task_aware", "dense_accuracy") if key in row]
        found += [len(values) == min(row["state"], tasks) for values in lists]
        numbers = [row["density"], *sum(lists, row["accuracy"])]
        numbers += [row.get(key) or 0 for key in ("ticket_density", "recency")]
        found += [0 <= number <= 100 for number in [*numbers, macs_percent(row) or 0]]
    if not all(found):
        raise ValueError


def macs_percent(row):
    return row.get("cost", {}).get("macs_percent")


def setting_flags(record, first):
    """The flags of a setting; a ticket's include those of the main_BU that found it.

    first: the record of the run whose folder this is.
    """
    config, t = record["config"], task_of(record)
    flags = {name: value for name, value in config.items() if name not in NO_SETTING}
    if record["script"] == "main_train":
        for name in ("weight", "mask"):  # of task 3, task2_best_model.pt is task{t-1}_best_model.pt
            parts = re.split(r"(\d+)", Path(config[name]).name)
            places = {str(t): "{t}", str(t - 1): "{t-1}"}
            flags[name] = "".join(places.get(part, part) for part in parts)
        flags = (first["flags"] if first["script"] == "main_BU" else {}) | flags
    if record["script"] == "test":
        flags |= {"pretrained": Path(config["pretrained"]).name, "state": t}
    return flags


def task_of(record):
    """The task of a record of main_train or test; 1 of other records."""
    return record["states"][0]["state"]


def read_csv(record, name, parse):
    """parse(path) of the CSV file of this name beside a record, or None. Raises UserError."""
    path = record["path"].with_name(record["path"].name.replace("results.json", name))
    try:
        return parse(path) if path.exists() else None
    except (OSError, ValueError, TypeError):  # pandas' own errors are ValueErrors
        raise UserError(f"{path}: damaged, put an intact copy back or remove it") from None


def parse_epochs(path):
    """The columns of a metrics.csv that are drawn."""
    types = {"stage": str, "epoch": int} | dict.fromkeys([*figures.LOSSES, "accuracy"], float)
    return pd.read_csv(path, usecols=[*types], dtype=types)


def parse_confusion(path):
    """A confusion.csv in percent of each class."""
    counts = pd.read_csv(path, index_col=0, keep_default_na=False, encoding_errors="replace")
    counts = counts.astype(float)
    if len(counts) != len(counts.columns) or not len(counts):
        raise ValueError
    return 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)


# ------------------------------------------------------------------------------ grouping


def label_runs(records):
    """Set "run" of each record, its label: the same for the seeds of a setting, and for a ticket
    and its controls. Where a seed occurs twice, each folder is a run of its own.
    """
    groups = {}
    for record in records:
        setting = [record.get(key) for key in ("script", "flags", "class_order", "images")]
        groups.setdefault(json.dumps(setting, sort_keys=True), []).append(record)
    for key, group in [*groups.items()]:
        runs = {(one["config"]["control"], one["config"]["seed"], task_of(one)) for one in group}
        if len(runs) < len(group):
            for record in groups.pop(key):
                groups.setdefault(f"{key} {record['folder']}", []).append(record)
    firsts = [group[0] for group in groups.values()]
    labels = [label(one, [other for other in firsts if kind(other) == kind(one)]) for one in firsts]
    for text, group in zip(labels, groups.values()):
        if labels.count(text) > 1:
            place = "/".join(Path(os.path.realpath(group[0]["folder"])).parts[-2:])
            text += f" ({one_line(place)[:40]})"
        for record in group:
            record["run"] = text


def kind(record):
    return record["script"], next((flag for flag in BOUNDS if record["flags"].get(flag)), None)


def label(record, others):
    """The method of a record, and the flags in which others of its kind differ."""
    script, bound = kind(record)
    flags, name = record["flags"], bound or STYLES[script][0]
    task_rewound = {"weight": "task{t-1}_best_model.pt", "mask": "mask-{t}.pt"}
    if script == "main_train" and not task_rewound.items() <= flags.items():
        name = "retrained"
    for flag, value in flags.items():
        differs = any(other["flags"].get(flag) != value for other in others)
        if differs and value is not None and value is not False:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            name += f" --{flag}" + ("" if value is True else f" {text}")
    return one_line(name)[:70]


# ------------------------------------------------------------------------------ frames


def state_frame(records):
    """A frame with a row for each state of each record: the columns of results.csv, and others.

    task, accuracy and task_aware are lists over tasks 1.. . density and macs (multiply-accumulates
    in percent of the dense network's) are those of the model that was tested, ticket_density and
    ticket_macs those of the ticket found after it. after: the task after which tables and figures
    show the row; 0 for the last task of main_TD, where its result (state T+1) is shown.
    """
    rows = []
    for record in records:
        config, states = record["config"], record["states"]
        tasks, tested = config["classifiers"], 100.0
        for row in states:
            state, ticket, macs = row["state"], row.get("ticket_density"), macs_percent(row)
            if ticket in (None, row["density"]):  # then the cost is that of the tested model
                tested = macs
            if state > tasks:
                ticket = row["density"]
            found = {"run": record["run"], "script": record["script"]}
            found |= {
                key: config.get(key) for key in ("control", "dataset", "arch", "width", "seed")
            }
            found |= {
                "folder": one_line(record["folder"]),
                "state": state,
                "task": [*range(1, len(row["accuracy"]) + 1)],
                "accuracy": row["accuracy"],
                "task_aware": row.get("task_aware", [math.nan] * len(row["accuracy"])),
                "recency": row.get("recency"),
                "density": row["density"],
                "macs": tested,
                "ticket_density": ticket,
                "ticket_macs": None if ticket is None else macs,
                "seconds": row.get("seconds"),  # the last column of results.csv
                "bound": kind(record)[1],
                "tasks": tasks,
                "classes": config.get("classes_per_classifier"),
                "after": 0 if state == tasks < states[-1]["state"] else min(state, tasks),
            }
            for name, key in (("mean", "accuracy"), ("aware", "task_aware")):
                found[name] = measures.mean(row[key]) if key in row else None
            rows.append(found)
            tested = macs
    numbers = ["recency", "macs", "ticket_density", "ticket_macs", "seconds", "aware"]
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))


def epoch_frame(records):
    """A frame with the epochs of all tasks: the columns of metrics.csv that are drawn, task, seed,
    script, and curve, the label. Of main_BU these are the stages of its tickets, task{t}_prun, and
    those of its dense network, which have a label of their own.
    """
    frames = []
    for record in records:
        if record["script"] in ("main_CIL", "main_TD", "main_BU"):
            rows = read_csv(record, "metrics.csv", parse_epochs)
            if rows is not None:
                rows["script"], rows["seed"] = record["script"], record["config"]["seed"]
                rows[["task", "ticket"]] = rows["stage"].str.extract(r"^task(\d+)(_prun)?$")
                dense = rows["ticket"].isna() & (record["script"] == "main_BU")
                rows["curve"] = np.where(dense, figures.dense_name(record["run"]), record["run"])
                frames.append(rows.dropna(subset="task").astype({"task": int}))
    return pd.concat(frames) if frames else None


def confusion_frames(records):
    """{run: what the images of each class are predicted as, in percent of the class}, the mean over
    the seeds that have got furthest.
    """
    found = {}
    for record in records:
        if record["script"] != "main_train":
            shares = read_csv(record, "confusion.csv", parse_confusion)
            if shares is not None:
                found.setdefault(record["run"], []).append(shares)
    for run, seeds in found.items():
        most = max(map(len, seeds))
        names = next(shares.index for shares in seeds if len(shares) == most)
        mean = np.mean([shares.to_numpy() for shares in seeds if len(shares) == most], axis=0)
        found[run] = pd.DataFrame(mean, names)
    return found


# ------------------------------------------------------------------------------ tables

MEASURES = {  # columns of the table of runs, and those of state_frame() that they are read from
    **dict.fromkeys(("last", "AIA", "forgetting", "BWT")),
    **{"task-aware": "aware", "recency": "recency", "density": "density", "MACs": "macs"},
    **{"ticket density": "ticket_density", "ticket MACs": "ticket_macs"},
}


def run_measures(states):
    """A row for each run and seed: what the table of runs averages."""
    rows, tasks = [], range(1, states["tasks"].max() + 1)
    states = states[states["control"] == "none"].sort_values("after", kind="stable")
    for (run, seed), own in states.groupby(["run", "seed"]):
        last, matrix = own.iloc[-1], own["accuracy"].tolist()
        row = {"run": run, "seed": seed} | {
            name: last[key] for name, key in MEASURES.items() if key
        }
        if last["after"] < last["tasks"]:
            row |= {"task-aware": None, "recency": None}  # those after the last task count
        if own["after"].tolist() == [*range(1, last["tasks"] + 1)]:
            row["last"] = measures.mean(matrix[-1])
            row["AIA"] = measures.average_incremental_accuracy(matrix)
            row["forgetting"] = measures.forgetting(matrix)
            row["BWT"] = measures.backward_transfer(matrix)
        rows.append(row | {f"task {t}": value for t, value in zip(own["after"], own["mean"])})
    return pd.DataFrame(rows, columns=["run", "seed", *(f"task {t}" for t in tasks), *MEASURES])


def control_measures(states):
    """A row for each ticket of main_train and each of its controls, task and seed."""
    key = ["run", "after", "seed"]
    trained = states[states["script"] == "main_train"]
    tickets = trained.loc[trained["control"] == "none", [*key, "mean", "aware"]]
    found = trained.merge(tickets, "left", on=key, suffixes=("", "_ticket"))
    is_control = found["control"] != "none"
    columns = {
        "ticket of": found["run"],
        "task": found["after"],
        "trained": found["control"].map(CONTROLS),
        "seed": found["seed"],
        "accuracy": found["mean"],
        "minus the ticket": (found["mean"] - found["mean_ticket"]).where(is_control),
        "task-aware": found["aware"],
        "task-aware minus the ticket": (found["aware"] - found["aware_ticket"]).where(is_control),
        "recency": found["recency"],
        "density": found["density"],
        "MACs": found["macs"],
    }
    return pd.DataFrame(columns)


def average_seeds(found, keys, orders):
    """Mean, standard deviation (n - 1) and count of each measure over the seeds, a frame indexed by
    `keys` and "seeds", with columns (measure, mean or sd or n).

    found: measures of single seeds; orders: {key: its values in the order of the rows}.
    """
    numbers = found.columns.difference([*keys, "seed"], sort=False)
    found = found.astype(dict.fromkeys(numbers, float)).dropna(axis=1, how="all")
    found = found.astype({key: pd.CategoricalDtype(order) for key, order in orders.items()})
    groups = found.drop(columns="seed").groupby(keys, observed=True)
    table = groups.agg(["mean", "std", "count"]).rename(columns={"std": "sd", "count": "n"})
    return table.set_index(groups.size().rename("seeds"), append=True)


def as_csv(table):
    """A table of average_seeds() as text: a column for each mean and each standard deviation."""
    flat = table.drop(columns="n", level=1)
    flat.columns = [" ".join(names) for names in flat.columns]
    return flat.reset_index().to_csv(index=False, float_format="%.4f", lineterminator="\n")


def as_cells(table):
    """A table of average_seeds() as a frame of texts such as '73.2 ± 0.4'."""
    cells, seeds = pd.DataFrame(index=table.index), table.index.get_level_values("seeds")
    for name in table.columns.unique(0):
        columns = (table[name, part] for part in ("mean", "sd", "n"))
        decimals = 2 if "density" in name else 1
        cells[name] = [cell(*values, decimals) for values in zip(*columns, seeds)]
    return cells.reset_index().astype(str)


def cell(mean, sd, n, seeds, decimals):
    """'73.2 ± 0.4', with the number of values where it is less than the number of seeds."""
    if not n:
        return ""
    text = f"{round(mean, decimals) + 0.0:.{decimals}f}"  # no -0.0
    text += "" if math.isnan(sd) else f" ± {sd:.{decimals}f}"
    return text + (f" (n = {n})" if n < seeds else "")


def as_markdown(cells):
    """A frame of texts as a Markdown table with aligned columns."""
    lines = [[*cells.columns], *cells.to_numpy().tolist()]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    lines = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def unfinished(states):
    """Lines on runs that have not reached their last task."""
    own = states[~states["script"].isin(["main_train", "test"])]
    reached = own.groupby(["run", "seed", "tasks"], sort=False)["after"].max()
    return [
        f"{run}, seed {seed}: {task} of {tasks} tasks so far"
        for (run, seed, tasks), task in reached.items()
        if task < tasks
    ]


# ------------------------------------------------------------------------------ the report


def render_page(tables, notes, drawn, title):
    """report.html as text. tables: {name: (about, frame of texts)}; drawn: {name: PNG}."""
    template = (Path(__file__).parent / "report.html.j2").read_text("utf-8")
    pictures = {
        name: (" ".join(getattr(figures, name).__doc__.split()), base64.b64encode(png).decode())
        for name, png in drawn.items()
    }
    page = jinja2.Template(template, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    about = {"title": title, "notes": notes, "definitions": measures.DEFINITIONS}
    return page.render(tables=tables, figures=pictures, **about)


def main(argv=None):
    parser = Parser(__doc__, "python -m tools.report")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the --save_dir of a run")
    message = "where to write tables and figures (default %(default)s)"
    parser.add_argument("--out", default="report", metavar="DIR", help=message)
    args = parser.parse_args(argv)
    folders = {os.path.realpath(folder): folder for folder in args.runs}  # each one once
    records = [record for folder in folders.values() for record in read_folder(folder)]
    records.sort(key=lambda record: [*STYLES].index(record["script"]))
    label_runs(records)
    states, out = state_frame(records), Path(args.out)
    shown, runs = states[states["after"] > 0], [*states["run"].unique()]
    found = {"runs": (ABOUT_RUNS, run_measures(shown), ["run"])}
    found["controls"] = (ABOUT_CONTROLS, control_measures(shown), ["ticket of", "task", "trained"])
    tables, text = {}, ""
    for name, (about, measured, keys) in found.items():
        if len(measured):
            orders = {keys[0]: runs} | ({"trained": [*CONTROLS.values()]} if keys[1:] else {})
            table = average_seeds(measured, keys, orders)
            save_text(out / f"{name}.csv", as_csv(table))
            tables[name] = about, as_cells(table)
            text += f"{about}\n\n{as_markdown(tables[name][1])}\n"
    notes = unfinished(states)
    results = states.loc[:, :"seconds"].explode(["task", "accuracy", "task_aware"])
    save_text(out / "results.csv", results.to_csv(index=False, lineterminator="\n"))
    drawn = figures.draw(shown, epoch_frame(records), confusion_frames(records))
    for name, png in drawn.items():
        atomic_write(out / f"{name}.png", lambda file, png=png: file.write(png))
    save_text(out / "report.html", render_page(tables, notes, drawn, figures.title(states)))
    definitions = [f"- {name}: {meaning}" for name, meaning in measures.DEFINITIONS.items()]
    definitions = "\n".join(["With a_{t,i} the accuracy of task i after task t:\n", *definitions])
    lines = "".join(f"{note}\n\n" for note in notes)
    links = "".join(f"![{name}]({name}.png)\n" for name in drawn)
    save_text(out / "report.md", f"{text}{definitions}\n\n{lines}{links}")
    print(f"{text}{lines}all on one page: {out / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
