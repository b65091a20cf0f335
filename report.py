"""Set runs side by side: one table, and one picture like the paper's Figure 4.

    python report.py TD_cifar10 BU_cifar10 --out report

Reads the results.json of each run, and those of main_train and test in the same folder. Prints the
accuracy after each task and the densities; writes report.png: accuracy above, density below.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

import utils  # noqa: E402
from utils import Refusal  # noqa: E402

# short names and colours that colour-blind people can tell apart (Okabe & Ito 2008)
STYLES = {
    "main_TD": ("TD", "#0072B2", "o"),
    "main_BU": ("BU", "#D55E00", "s"),
    "main_CIL": ("dense", "#000000", "^"),
    "main_train": ("retrained", "#009E73", "D"),
    "test": ("test", "#CC79A7", "v"),
}


def read(folder):
    """The results of all runs in a folder, main_train's after the others. Raises Refusal."""
    paths = sorted(Path(folder).glob("*results.json"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise Refusal(f"{folder}: holds no results.json, give the --save_dir of a run")
    try:
        runs = [json.loads(path.read_text()) for path in paths]
        for run in runs:
            check(run)
            run["points"] = curve(run)
            run["name"] = STYLES[run["script"]][0]
            if run["script"] in ("main_train", "test"):
                run["name"] += f" {run['points'][0][0]}"
            run["folder"] = Path(folder).name
            run["set"] = f"{run['config']['dataset']}, width {run['config']['width']}"
            run["last"] = run["points"][-1]
            if run["script"] == "main_BU":
                run["dense"] = [sum(row["dense_accuracy"]) / row["state"] for row in run["states"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Refusal(
            f"{folder}: results.json is damaged or has no state, give another run"
        ) from None
    return runs


def check(run):
    """Raise ValueError unless a run's numbers are numbers that can be drawn."""

    def number(value, least, most):
        if type(value) not in (int, float) or not least <= value <= most:
            raise ValueError

    config = run["config"]
    for tasks in (config["classifiers"], *(row["state"] for row in run["states"])):
        number(tasks, 1, 1000)
        range(tasks)  # whole
    for row in run["states"]:
        shares = [row["mean"], row["density"], row.get("ticket_density", 0), *row["accuracy"]]
        for value in shares + (row["dense_accuracy"] if run["script"] == "main_BU" else []):
            number(value, 0, 100)
    if "$" in str(config["dataset"]):  # which starts a formula in a picture
        raise ValueError


def labels_of(runs):
    """Short names of the runs, with the folder where those are alike."""
    names = [run["name"] for run in runs]
    return [
        f"{name} ({run['folder']})" if names.count(name) > 1 else name
        for name, run in zip(names, runs)
    ]


def curve(run):
    """Points (task, mean accuracy, density tested, density of the ticket made) of a run.

    main_TD's point of task T is that of the result, the model of "task T+1", under the ticket
    that task T's prunings made.
    """
    states, tasks = run["states"], run["config"]["classifiers"]
    points = [
        tuple(
            float(v)
            for v in (row["mean"], row["density"], row.get("ticket_density", row["density"]))
        )
        for row in states
    ]
    points = [(row["state"], *values) for row, values in zip(states, points)]
    if run["script"] == "main_TD" and len(points) > tasks:
        points[tasks - 1 :] = [(tasks, *points[tasks][1:])]
    return points


def table(runs):
    """Lines of text: a row for each task, three columns for each run."""
    curves = [{point[0]: point[1:] for point in run["points"]} for run in runs]
    lines = ["      " + "".join(f"  | {label:<26}" for label in labels_of(runs))]
    lines.append("task  " + "  | accuracy   tested   ticket" * len(runs))
    for task in sorted(set().union(*curves)):
        cells = []
        for points in curves:
            values = points.get(task)
            cells.append("{:8.2f} {:8.2f} {:8.2f}".format(*values) if values else " " * 26)
        lines.append(f"{task:<6}" + "".join(f"  | {cell}" for cell in cells))
    return [line.rstrip() for line in lines]


def picture(runs, path):
    """Accuracy after each task as lines, density of the tickets as bars below; a PNG file."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    tasks = max(run["config"]["classifiers"] for run in runs)
    bars = [run for run in runs if run["script"] in ("main_TD", "main_BU")]
    for run, label in zip(runs, labels_of(runs)):
        _, colour, marker = STYLES[run["script"]]
        points = run["points"]
        final = f" ({run['last'][3]:.2f} %)"
        line = "" if len(points) == 1 else "-"
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        above.plot(xs, ys, line + marker, color=colour, label=label + final, ms=6)
        if run["script"] == "main_BU":
            above.plot(
                xs, run["dense"], ":", color="0.4", lw=1.2, label="dense of the BU run (100 %)"
            )
    width = 0.8 / max(1, len(bars))
    for place, run in enumerate(bars):
        colour = STYLES[run["script"]][1]
        xs = [p[0] + (place - (len(bars) - 1) / 2) * width for p in run["points"]]
        shown = below.bar(xs, [p[3] for p in run["points"]], width * 0.9, color=colour)
        below.bar_label(shown, fmt="%.1f", fontsize=7, padding=1)
    above.set_ylabel("test accuracy on all tasks so far (%)")
    above.grid(alpha=0.3)
    below.set_ylabel("weights that remain (%)")
    below.set_ylim(0, 112)
    below.set_xticks(range(1, tasks + 1))
    below.set_xlabel("task")
    below.spines[["top", "right"]].set_visible(False)
    above.spines[["top", "right"]].set_visible(False)
    above.set_title("Lifelong tickets on " + "; ".join(sorted({run["set"] for run in runs})))
    words = "run (density of its last ticket)"
    figure.legend(loc="outside lower center", ncols=4, title=words, fontsize=8, title_fontsize=8)
    utils.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)


def main(argv=None):
    parser = utils.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the --save_dir of a run")
    parser.add_argument("--out", default=".", metavar="DIR", help="where report.png goes")
    args = parser.parse_args(argv)
    runs = [run for folder in args.runs for run in read(folder)]
    print("Mean test accuracy (%) of all tasks so far after each task; density (%) of the model")
    print("tested and of the ticket made. TD's last row is its result, trained under that ticket.")
    print("\n".join(table(runs)))
    picture(runs, Path(args.out) / "report.png")
    print(f"picture: {Path(args.out) / 'report.png'}")


if __name__ == "__main__":
    utils.run(main)
