"""The figure of docs/evidence.md: the same methods at each size of training, and in the paper.

    python -m tools.sizes_figure small results/reduced medium results/medium --out docs/sizes

Each name is the title of a panel, each folder after it holds seed*/<run> with records, as
tools/reproduce.py collects them. Draws accuracy after each task: dense, top-down, bottom-up
(chosen on validation images) and its retrained tickets. The last panel is the paper's Figure 4.
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from runtime import cli
from runtime.errors import UserError
from runtime.process import run_script
from tools import plots, report

RUNS = ("CIL", "TD", "BU")  # folders of tools/reproduce.py; BU has the retrained tickets too


def groups_of(folder):
    """The groups of the runs of a size, without controls. Raises UserError when there are none."""
    runs = [
        run
        for name in RUNS
        for path in sorted(Path(folder).glob(f"seed*/{name}"))
        for run in report.read(path)
        if run["config"]["control"] == "none"
    ]
    if not runs:
        raise UserError(f"{folder}: contains no seed*/{', seed*/'.join(RUNS)}; give another")
    return report.group(runs)


def draw_size(axes, title, folder):
    """A panel of the runs in a folder."""
    for one in groups_of(folder):
        script, (color, marker) = one["script"], plots.STYLES[one["script"]]
        tasks, means, deviations = plots.summary(one["accuracy"])
        line = "none" if script == "main_train" else "-"
        density = plots.percent(one["density"][tasks[-1]].values())
        text = f"{report.METHODS[script]}: {density}, {plots.seed_count(one)}"
        style = {"color": color, "marker": marker, "ms": 5, "capsize": 2, "ls": line}
        axes.errorbar(tasks, means, deviations, label=text, **style)
    axes.set_title(title)


def draw_paper(axes):
    """The panel of the paper's Figure 4 on CIFAR-10."""
    curves = plots.figure4()["cifar10"]
    for name, script in (("TD", "main_TD"), ("TR-BU", "main_train")):
        color, marker = plots.STYLES[script]
        accuracy, text = curves[name]["accuracy"], f"{name}: {curves[name]['density']:.2f} %"
        tasks = range(1, len(accuracy) + 1)
        axes.plot(tasks, accuracy, color=color, marker=marker, ms=5, label=text)
    axes.set_title("the paper, read off its Figure 4")


def draw(sizes):
    """The figure. sizes: [(title, folder)]."""
    with plots.drawing():
        figure = Figure(figsize=(2 + 3 * len(sizes), 4.5), layout="constrained")
        panels = figure.subplots(1, len(sizes) + 1, sharey=True)
        for axes, (title, folder) in zip(panels, sizes):
            draw_size(axes, title, folder)
        draw_paper(panels[-1])
        for axes in panels:
            axes.grid()
            axes.set_xlabel("task")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12))
        panels[0].set_ylabel("test accuracy, all tasks so far (%)")
    return figure


def main(argv=None):
    parser = cli.Parser(__doc__, "python -m tools.sizes_figure")
    message = "title and folder of each panel"
    parser.add_argument("sizes", nargs="+", metavar="TITLE DIR", help=message)
    message = "name of the .png and .svg (default %(default)s)"
    parser.add_argument("--out", type=cli.path, default="sizes", metavar="NAME", help=message)
    args = parser.parse_args(argv)
    if len(args.sizes) % 2:
        raise UserError(f"TITLE DIR: found {args.sizes[-1]} alone, give a folder after each title")
    sizes = [*zip(args.sizes[::2], args.sizes[1::2])]
    plots.write(draw(sizes), Path(args.out))


if __name__ == "__main__":
    run_script(main)
