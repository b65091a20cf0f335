"""What a run reports: results.json for programs, log_results.txt for people, metrics.csv.

Everything is written after every state or epoch, as a whole, atomically.
"""

import csv
import io
import json
import platform
from statistics import mean

import numpy as np
import torch

from runtime.files import save_text
from runtime.measures import average_incremental_accuracy, backward_transfer, forgetting

LOSS_TERMS = "random", "new", "old", "distillation", "distillation_main"  # not weighted
NUMBERS = "lr", "loss", *LOSS_TERMS, "accuracy", "seconds", "images_per_second"
SETTINGS = {  # the flags that a run prints first
    "dataset": ("dataset", "classifiers", "classes_per_classifier"),
    "network": ("arch", "width", "precision"),
    "training": ("epochs", "batch_size", "lr", "decreasing_lr", "merge_batchnorm", "seed"),
    "pruning": (
        *("percent", "criterion", "iter_epochs", "prune_scheduler", "rewind"),
        *("deacc", "accept_decay", "base_sparsity", "max_iter_prun", "select_on"),
    ),
}
COLUMNS = {"stage": str, "epoch": int} | dict.fromkeys(NUMBERS, float)  # of metrics.csv

# ------------------------------------------------------------------------------ states


def new_results(script, args, data, model):
    """The content of results.json before the first state."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return {
        "script": script,
        "config": vars(args) | {"data": data.source},
        "class_order": data.order,
        "class_names": [str(data.names.get(c, c)) for c in data.order],
        "image_size": data.image_size,
        "device": f"{device} ({name})",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "states": [],
    }


def run_summary(results, data, model):
    """The first lines of a run: device, dataset, network, and its settings."""
    counts = ", ".join(f"{count:,} {split}" for split, count in data.counts().items() if count)
    lines = {
        "device": f"{results['device']}, {torch.get_num_threads()} CPU threads, PyTorch "
        f"{torch.__version__}",
        "images": f"{counts} ({data.source})",
        "weights": f"{sum(p.numel() for p in model.parameters()):,} parameters",
    }
    for name, flags in SETTINGS.items():
        given = [f"{f} {results['config'][f]}" for f in flags if f in results["config"]]
        lines[name] = ", ".join(given) if flags[0] in results["config"] else ""
    lines = "".join(f"  {name:<9}{text}\n" for name, text in lines.items() if text)
    return f"{results['script']}.py\n{lines}"


def print_state(row):
    """Print a row of results.json."""
    listed = " ".join(f"{accuracy:.2f}" for accuracy in row["accuracy"])
    ticket = f"; next ticket {row['ticket_density']:.2f} %" if "ticket_density" in row else ""
    print(
        f"state {row['state']}: test accuracy {listed}, mean {row['mean']:.2f} % "
        f"(task-aware {mean(row['task_aware']):.2f} %) at {row['density']:.2f} % of the weights"
        f"{ticket}",
        flush=True,
    )


def summarize(results, matrix):
    """Add the summaries of an accuracy matrix (runtime/measures.py) to results, and print them."""
    average, lost = average_incremental_accuracy(matrix), forgetting(matrix)
    transfer = backward_transfer(matrix)
    results |= {"average_incremental_accuracy": average, "forgetting": lost}
    results["backward_transfer"] = transfer
    summary = f"average incremental accuracy {average:.2f} %"
    if lost is not None:
        summary += f", forgetting {lost:.2f}, backward transfer {transfer:.2f} points"
    print(summary)


def write_results(folder, prefix, results):
    """Write results.json and log_results.txt; prefix: goes before both names."""
    save_text(folder / f"{prefix}results.json", json.dumps(results, indent=1) + "\n")
    save_text(folder / f"{prefix}log_results.txt", log_table(results["states"]))


def log_table(rows):
    """The states as tab-separated lines under a line of names."""
    tasks = max((len(row["accuracy"]) for row in rows), default=0)
    columns = {"mean": ".2f", "density": ".2f", "ticket_density": ".2f", "seconds": ".0f"}
    lines = [["state", *(f"task{t + 1}" for t in range(tasks)), *columns]]
    for row in rows:
        cells = [f"{accuracy:.2f}" for accuracy in row["accuracy"]]
        cells += [""] * (tasks - len(cells))
        cells += [f"{row[name]:{form}}" if name in row else "" for name, form in columns.items()]
        lines.append([str(row["state"]), *cells])
    return "".join("\t".join(line) + "\n" for line in lines)


def confusion_table(confusion, names):
    """confusion.csv: the images of each class (a row) by the class that they are taken for."""
    names = names[: len(confusion)]
    return csv_text([["class", *names], *([name, *row] for name, row in zip(names, confusion))])


def csv_text(rows):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


# ------------------------------------------------------------------------------ epochs


def read_epochs(path):
    """The rows of a metrics.csv, dicts without the empty cells; [] if there is none or it is torn.

    What is lost are curves alone.
    """
    try:
        with open(path, newline="") as file:
            return [
                {name: COLUMNS[name](text) for name, text in line.items() if text}
                for line in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_epochs(path, rows):
    """Write rows as metrics.csv."""
    lines = [[row.get(name, "") for name in COLUMNS] for row in rows]
    save_text(path, csv_text([[*COLUMNS], *lines]))
