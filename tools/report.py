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
from collections import defaultdict
from pathlib import Path
from statistics import mean

import jinja2
import numpy as np
import pandas as pd

from runtime import measures
from runtime.args import CONTROLS, Parser
from runtime.errors import UserError, explain, one_line
from runtime.files import save_text
from runtime.process import run_script
from tools import figures

SCRIPTS = {  # and what their runs are called
    "main_CIL": "dense",
    "main_TD": "TD",
    "main_BU": "BU",
    "main_train": "TR-BU",
    "test": "test",
}
METHODS = "dense", "joint", "finetune", "TD", "BU", "TR-BU", "test"  # the order of the rows
# Flags that cannot change the expected result, or that the tables show beside the run.
NO_SETTING = {
    *("save_dir", "save_data_path", "overwrite", "print_freq", "tensorboard", "deterministic"),
    *("device", "gpu", "seed", "control", "state", "joint", "finetune"),
}
SHARED = "dataset", "arch", "width"  # shown where they differ between methods, too
# Defaults among named choices; a label leaves them out.
DEFAULTS = {"criterion": "magnitude", "rewind": "zero", "select_on": "test", "precision": "fp32"}
ABOUT = {
    "runs": """Test accuracy in percent after each task, averaged over the tasks so far. BWT is the
backward transfer, task-aware the accuracy after the last task by the heads of each image's task,
recency the percentage of test images that are then classified as a class of the last task.
Density is the percentage of weights in the model that was tested, and MACs that of the
multiply-accumulates per image (computed, not measured); the ticket is the one found after the last
test, which BU may have re-grown. TD's accuracy after the last task is that of its result. Without
main_CIL, the dense row is that of BU's dense networks, which are the same. Mean ± standard
deviation (n - 1) over the seeds that have the value; columns that no run fills are left out.""",
    "controls": """Retrained tickets (main_train.py) and their controls on the same task. All is
measured after the task t of the row, so that an unbiased recency is 100 / t. "Minus the ticket" is
the difference from the ticket of the same seed, in percentage points.""",
}

# ------------------------------------------------------------------------------ reading


def read_folder(folder):
    """The records of a run's folder, its own first: see read_record(). Raises UserError."""
    records = []
    for path in sorted(Path(folder).glob("*results.json")):  # results.json, retrain_.., test_..
        with explain(path, "is not a results file", "; choose another run"):
            content = json.loads(path.read_text("utf-8"))
            if content["states"]:
                records.append(read_record(content, path, records))
    if not records:
        raise UserError(f"{folder}: no results.json with results; give the --save_dir of a run")
    return records


def read_record(content, path, before):
    """What a results.json says of its run, as a dict.

    before: the records read from the folder; the first says what this one leaves open: the seed of
    a test, how a ticket was found.
    """
    script, own = content["script"], content["config"]
    method = next((bound for bound in ("joint", "finetune") if own.get(bound)), SCRIPTS[script])
    first = before[0]["config"] if before else {"seed": 0}
    config = first | {"control": "none"} | own
    states = content["states"]
    record = {"path": path, "script": script, "config": config, "method": method, "states": states}
    return record | {"flags": setting(config), "rows": state_rows(record, states)}


def setting(config):
    """{flag: its value as typed} of the flags that may change the expected result."""
    flags = {}
    for name, value in config.items():
        if name in NO_SETTING or value is False or value == DEFAULTS.get(name):
            continue
        if name in ("data", "pretrained"):
            value = Path(value).name
        if name in ("weight", "mask"):  # the files of all tasks have one name
            value = re.sub(r"\d+", "*", Path(value).name)
        if isinstance(value, list):
            value = ",".join(map(str, value))
        flags[name] = "" if value is True else str(value)
    return flags


def state_rows(record, states):
    """A dict for each state of a record: the columns of state_frame(), apart from "run"."""
    config, rows = record["config"], []
    tasks, macs = config["classifiers"], {100.0: 100.0}  # of density: of models met so far
    for row in states:
        state, density, accuracy = row["state"], float(row["density"]), row["accuracy"]
        after = min(state, tasks)
        aware = row.get("task_aware", [math.nan] * after)
        if not len(accuracy) == len(aware) == after:
            raise ValueError
        ticket = density if state > tasks else row.get("ticket_density")
        if "cost" in row:  # of the ticket found after the test, if there is one
            macs[density if ticket is None else ticket] = row["cost"]["macs_percent"]
        found = {
            "script": record["script"],
            **{name: config.get(name) for name in ("control", "dataset", "arch", "width")},
            "seed": int(config["seed"]),
            "folder": one_line(record["path"].parent),
            "state": state,
            "task": [*range(1, after + 1)],
            "accuracy": accuracy,
            "task_aware": aware,
            "recency": row.get("recency"),
            "density": density,
            "macs": macs.get(density),
            "ticket_density": ticket,
            "seconds": row.get("seconds"),  # the last column of results.csv
            "tasks": tasks,
            "classes": config.get("classes_per_classifier"),
            "after": after,
            "trained": CONTROLS[config["control"]],
            "mean": mean(accuracy),
            "aware": mean(aware),
        }
        rows.append(found)
    return rows


def read_csv(record, name, **options):
    """A frame of the CSV file of this name beside a record, None without it. Raises UserError."""
    path = record["path"].with_name(record["path"].name.replace("results.json", name))
    with explain(path, "is damaged", "; put an intact copy back, or remove it"):
        return pd.read_csv(path, encoding_errors="replace", **options) if path.exists() else None


# ------------------------------------------------------------------------------ frames


def label_runs(records):
    """Set "run" of each record: its method, and the flags in which runs of the method differ, or
    runs of any method for those that are SHARED.
    """
    for record in records:
        flags, differ = record["flags"], set()
        for other in records:
            compared = flags if other["method"] == record["method"] else SHARED
            differ |= {flag for flag in compared if other["flags"].get(flag) != flags.get(flag)}
        typed = [f"--{flag} {flags[flag]}".strip() for flag in flags if flag in differ]
        record["run"] = one_line(" ".join([record["method"], *typed]))


def dense_networks(records):
    """Those of main_BU as runs of their own, unless main_CIL, which trains the same, is given."""
    found, has_dense = [], any(record["method"] == "dense" for record in records)
    for record in records if not has_dense else ():
        states = [
            {"state": row["state"], "accuracy": row["dense_accuracy"], "density": 100.0}
            for row in record["states"]
            if "dense_accuracy" in row  # of main_BU alone
        ]
        run = record["run"].replace("BU", "dense", 1)
        found.append(record | {"run": run, "rows": state_rows(record, states)})
    return found


def state_frame(records):
    """A frame with a row for each state of each record: the columns of results.csv, and others.

    task, accuracy and task_aware are lists over tasks 1.. . density and macs (multiply-accumulates
    in percent of the dense network's) are those of the model that was tested, ticket_density that
    of the ticket found after it. after: the task after which the state was tested, which of
    main_TD's result (state T+1) is T. Raises UserError if two runs have one setting and seed.
    """
    rows = [{"run": record["run"]} | row for record in records for row in record["rows"]]
    numbers = ["recency", "macs", "ticket_density", "seconds", "mean", "aware"]
    states = pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))
    for again in states[states.duplicated(["run", "seed", "control", "state"])].itertuples():
        raise UserError(f"{again.folder}: {again.run}, seed {again.seed}, is given twice; omit one")
    states["run"] = pd.Categorical(states["run"], states["run"].unique())
    states["trained"] = pd.Categorical(states["trained"], [*CONTROLS.values()])
    return states


def epoch_frame(records):
    """A frame with the epochs of all tasks: columns of metrics.csv, task, and curve, the label.

    Of main_BU these are the stages of its tickets, task{t}_prun, and those of its dense network,
    which have a label of their own.
    """
    types = {"stage": str, "epoch": int} | dict.fromkeys([*figures.LOSSES, "accuracy"], float)
    frames = []
    for record in records:
        if record["script"] != "main_train":
            rows = read_csv(record, "metrics.csv", usecols=[*types], dtype=types)
            if rows is not None:
                rows[["task", "ticket"]] = rows["stage"].str.extract(r"^task(\d+)(_prun)?$")
                dense = rows["ticket"].isna() & (record["script"] == "main_BU")
                name = record["run"].replace("BU", "BU dense", 1)
                rows["curve"] = np.where(dense, name, record["run"])
                frames.append(rows.dropna(subset="task").astype({"task": int}))
    return pd.concat(frames) if frames else pd.DataFrame()


def confusion_frames(records):
    """{run: what the images of each class are predicted as, in percent of the class}; means over
    the seeds.
    """
    types, found = defaultdict(lambda: float, {"class": str}), {}
    options = {"index_col": "class", "dtype": types, "keep_default_na": False}
    for record in records:
        if record["script"] != "main_train":
            counts = read_csv(record, "confusion.csv", **options)
            if counts is not None:
                shares = 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
                found.setdefault(record["run"], []).append(shares)
    for run, seeds in found.items():
        found[run] = pd.concat(seeds).groupby("class", sort=False).mean()
    return found


# ------------------------------------------------------------------------------ tables


def run_measures(states):
    """A row for each run and seed: what the table of runs averages."""
    states = states[states["control"] == "none"].sort_values("after")
    keys = ["run", "seed"]
    accuracies = states.pivot(index=keys, columns="after", values="mean").add_prefix("task ")
    measured = states.groupby(keys, observed=True).apply(last_measures, include_groups=False)
    return accuracies.join(measured)


def last_measures(own):
    """The measures of a run after its last task, NaN where it lacks a task that they need."""
    last, matrix = own.iloc[-1], own["accuracy"].tolist()
    found = dict.fromkeys(("last", "AIA", "forgetting", "BWT", "task-aware", "recency"))
    if len(own) == last["tasks"]:
        found["last"] = last["mean"]
        found["AIA"] = own["mean"].mean()
        found["forgetting"] = measures.forgetting(matrix)
        found["BWT"] = measures.backward_transfer(matrix)
    if last["after"] == last["tasks"]:
        found |= {"task-aware": last["aware"], "recency": last["recency"]}
    found |= {"density": last["density"], "MACs": last["macs"]}
    return pd.Series(found | {"ticket density": last["ticket_density"]}, dtype=float)


def control_measures(states):
    """A row for each ticket of main_train and each of its controls, task and seed."""
    trained = states[states["script"] == "main_train"]
    is_ticket = trained["control"] == "none"
    keys = [trained[name] for name in ("run", "after", "seed")]
    accuracies = trained[["mean", "aware"]]
    tickets = accuracies.where(is_ticket, axis=0).groupby(keys, observed=True).transform("first")
    minus = (accuracies - tickets).mask(is_ticket, axis=0)
    columns = {
        "ticket of": trained["run"],
        "task": trained["after"],
        "trained": trained["trained"],
        "seed": trained["seed"],
        "accuracy": trained["mean"],
        "minus the ticket": minus["mean"],
        "task-aware": trained["aware"],
        "task-aware minus the ticket": minus["aware"],
        "recency": trained["recency"],
        "density": trained["density"],
        "MACs": trained["macs"],
    }
    return pd.DataFrame(columns).set_index(["ticket of", "task", "trained", "seed"])


def average_seeds(measured):
    """Mean and standard deviation (n - 1) of each column over the last level of the index, seeds;
    their number goes into the index.
    """
    measured = measured.dropna(axis=1, how="all")
    groups = measured.groupby(level=measured.index.names[:-1], observed=True)
    return groups.agg(["mean", "std"]).set_index(groups.size().rename("seeds"), append=True)


def as_csv(table):
    """A table of average_seeds() as text: a column for each mean and each standard deviation."""
    flat = table.set_axis([" ".join(names) for names in table.columns], axis=1).reset_index()
    return flat.to_csv(index=False, float_format="%.4f", lineterminator="\n")


def as_cells(table):
    """A table of average_seeds() as a frame of texts such as '73.2 ± 0.4'."""
    cells = pd.DataFrame(index=table.index)
    for name in table.columns.unique(0):
        digits = 2 if "density" in name else 1
        cells[name] = [cell(*values, digits) for values in table[name].itertuples(index=False)]
    return cells.reset_index().astype(str)


def cell(average, deviation, digits):
    """'73.2 ± 0.4', '73.2' of a single seed, '' without any."""
    if math.isnan(average):
        return ""
    text = f"{round(average, digits) + 0.0:.{digits}f}"  # no -0.0
    return text if math.isnan(deviation) else f"{text} ± {deviation:.{digits}f}"


def unfinished(states):
    """{run: how far its seeds are, in words}, of the runs with seeds that lack states."""
    found, keys = defaultdict(list), ["run", "seed", "script", "tasks"]
    for (run, seed, script, tasks), own in states.groupby(keys, observed=True)["state"]:
        whole = tasks + (script == "main_TD")
        if script not in ("main_train", "test") and own.max() < whole:
            found[run].append(f"seed {seed} after state {own.max()} of {whole}")
    return {run: ", ".join(seeds) for run, seeds in found.items()}


def as_markdown(cells):
    """A frame of texts as a Markdown table with aligned columns."""
    lines = [[*cells.columns], *cells.to_numpy().tolist()]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    lines = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ------------------------------------------------------------------------------ the report


def write_report(out, records):
    """Write all files to the folder `out`. Returns the tables as Markdown."""
    states, tables, text = state_frame([*dense_networks(records), *records]), {}, ""
    # of main_TD's last task and its result, the result
    shown = states.drop_duplicates(["run", "seed", "control", "after"], keep="last")
    epochs, confusions = epoch_frame(records), confusion_frames(records)
    for name, measured in (("runs", run_measures(shown)), ("controls", control_measures(shown))):
        if len(measured):
            table = average_seeds(measured)
            save_text(out / f"{name}.csv", as_csv(table))
            cells = as_cells(table)
            if name == "runs" and (lacking := unfinished(states)):
                cells.insert(2, "not finished", cells["run"].map(lacking).fillna(""))
            tables[name] = ABOUT[name], cells
            text += f"{ABOUT[name]}\n\n{as_markdown(cells)}\n"
    results = states.loc[:, :"seconds"].explode(["task", "accuracy", "task_aware"])
    save_text(out / "results.csv", results.to_csv(index=False, lineterminator="\n"))
    drawn = figures.draw(out, shown, epochs, confusions)
    pictures = {name: (out / f"{name}.png").read_bytes() for name in drawn}
    page = {
        "title": figures.title(states),
        "tables": tables,
        "pictures": {name: base64.b64encode(png).decode() for name, png in pictures.items()},
        "captions": figures.CAPTIONS,
        "definitions": measures.DEFINITIONS,
    }
    template = (Path(__file__).parent / "report.html.j2").read_text("utf-8")
    template = jinja2.Template(template, autoescape=True, trim_blocks=True)
    save_text(out / "report.html", template.render(page))
    meanings = "".join(f"- {name}: {text}\n" for name, text in measures.DEFINITIONS.items())
    links = "".join(f"![{figures.CAPTIONS[name]}]({name}.png)\n" for name in drawn)
    heading = "With a_{t,i} the accuracy of task i after task t:"
    save_text(out / "report.md", f"{text}{heading}\n\n{meanings}\n{links}")
    return text


def main(argv=None):
    parser = Parser(__doc__, "python -m tools.report")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the --save_dir of a run")
    parser.add_argument("--out", default="report", metavar="DIR", help="default report")
    args = parser.parse_args(argv)
    folders = {os.path.realpath(folder): folder for folder in args.runs}  # each one once
    records = [record for folder in folders.values() for record in read_folder(folder)]
    records.sort(key=lambda record: METHODS.index(record["method"]))
    label_runs(records)
    text = write_report(Path(args.out), records)
    print(f"{text}all on one page: {Path(args.out) / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
