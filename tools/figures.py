"""The figures of tools/report.py, drawn from its frames.

Colors tell methods apart; line styles and hollow markers tell runs of one method apart. Bars and
whiskers are standard deviations over seeds.
"""

import io
import itertools
import json
import math
import os
import textwrap
import warnings
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # a notebook's own may be missing here, which stops the import

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from runtime.args import CONTROLS
from runtime.errors import one_line

# safe for color-blind readers (Okabe & Ito 2008)
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
STYLES = {  # of each script: the name of its method, color and marker
    "main_CIL": ("dense", BLACK, "^"),
    "main_TD": ("TD", BLUE, "o"),
    "main_BU": ("BU", VERMILION, "s"),
    "main_train": ("TR-BU", GREEN, "D"),
    "test": ("test", PURPLE, "v"),
}
LINES = "-", "--", "-.", ":"
BOUNDS = {"joint": ("upper", "--"), "finetune": ("lower", ":")}  # of main_CIL: kind and line
FIGURE4 = Path(__file__).parent.parent / "data" / "figure4.json"
LOSSES = {
    "loss": BLACK,
    "random": BLUE,
    "new": GREEN,
    "old": SKY,
    "distillation": ORANGE,
    "distillation_main": PURPLE,
}
OPTIONS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a $ in a name starts no formula
    "savefig.dpi": 120,
}
WIDTH = 7  # inches


def draw(states, epochs, confusions):
    """{name: PNG} of the figures for which there is something to draw.

    states, epochs, confusions: those of state_frame(), epoch_frame() and confusion_frames().
    """
    # whatever the user's matplotlibrc says, and without warnings of glyphs that the font lacks
    with matplotlib.style.context(["default", OPTIONS]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = {
            "accuracy": accuracy(states),
            "controls": controls(states),
            "curves": curves(epochs),
            "confusion": confusion(confusions),
        }
        for figure in filter(None, figures.values()):
            if figure.get_suptitle():
                figure.suptitle(f"{figure.get_suptitle()} on {title(states)}", fontsize=9)
        return {name: as_png(figure) for name, figure in figures.items() if figure}


def as_png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def title(states):
    """The datasets and networks of the runs."""
    found = states[["dataset", "arch", "width"]].drop_duplicates().itertuples(index=False)
    return one_line("; ".join(f"{d}, {arch} of width {width}" for d, arch, width in found))[:100]


def over_seeds(rows, column):
    """Tasks, and the means and standard deviations (None if all are 0) of a column there."""
    found = rows.groupby("after")[column].agg(["mean", "std"])
    bars = found["std"].fillna(0)
    return found.index, found["mean"], bars if bars.any() else None


def seeds_of(rows):
    return f"n = {rows['seed'].nunique()}"


def panel_grid(number, across, height, width=WIDTH, **options):
    """A figure with `number` panels, at most `across` in a row of `height` inches, and them."""
    across = min(across, number)
    down = math.ceil(number / across)
    figure = Figure(figsize=(width, 0.8 + height * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, **options).flatten()
    for axes in panels[number:]:
        axes.set_axis_off()
    return figure, panels[:number]


# ------------------------------------------------------------------------------ accuracy


def accuracy(states):
    """Accuracy after each task, and below it the density of the model that was tested; a small dot
    is a ticket found after it. As in the paper's Figure 4, whose curves are drawn thin.
    """
    states = states[states["control"] == "none"]
    if states.empty:
        return None
    pruned = states["ticket_density"].notna().any()
    size, ratios = (6.4, (3, 2)) if pruned else (4.2, (1,))
    figure = Figure(figsize=(WIDTH, size), layout="constrained")
    above, *below = figure.subplots(
        len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios
    ).flat
    for run, rows in states[states["bound"].notna()].groupby("run", sort=False):
        draw_bound(above, run, rows)
    groups = [*states[states["bound"].isna()].groupby("run", sort=False)]
    numbers = dict.fromkeys(STYLES, 0)
    for place, (run, rows) in enumerate(groups):
        script = rows["script"].iloc[0]
        shift = min(0.05, 0.3 / len(groups)) * (place - (len(groups) - 1) / 2)  # side by side
        style = run_style(script, numbers[script])
        numbers[script] += 1
        draw_run(above, below, run, rows, shift, style)
    for name, curve in paper_curves(states).items():
        text = f"{name} of the paper (read off its Figure 4): {curve['density']:.2f} %"
        style = {"color": {"TD": BLUE, "TR-BU": GREEN}[name], "lw": 0.8, "alpha": 0.7, "zorder": 1}
        above.plot(range(1, len(curve["accuracy"]) + 1), curve["accuracy"], label=text, **style)
    above.set_ylabel("test accuracy, all tasks so far (%)")
    above.set_title(f"Lifelong tickets on {title(states)}")
    for axes in below:
        axes.set(yscale="log", ylim=(None, 115), ylabel="remaining weights (%)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    for axes in (above, *below):
        axes.grid()
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.set_xlabel("task")
    about = "run: density after the last task, n = seeds; bars: standard deviation"
    about += "; dots: tickets found after a task" if pruned else ""
    figure.legend(loc="outside lower center", ncols=2, title=about, title_fontsize=8)
    return figure


def run_style(script, number):
    """Keywords of the line of a method's run; number: how many of the method come before it."""
    _, color, marker = STYLES[script]
    fill = "white" if number % 2 else color
    style = {"color": color, "marker": marker, "markerfacecolor": fill, "markersize": 5, "lw": 1.5}
    # each retrained ticket starts from other weights: no line
    style["linestyle"] = "none" if script in ("main_train", "test") else LINES[number % 4]
    return style


def draw_run(above, below, run, rows, shift, style):
    """A run with error bars: its accuracy, and the densities of a method that prunes."""
    tasks, means, bars = over_seeds(rows, "mean")
    last = rows.loc[rows["after"] == tasks[-1], "density"]
    density = f"{last.mean():.2f}" + (f" ± {last.std():.2f}" if last.std() > 0.005 else "")
    text = f"{run}: {density} %, {seeds_of(rows)}"
    bar_style = {"capsize": 2, "elinewidth": 1}
    above.errorbar(tasks + shift, means, bars, label=text, **style, **bar_style)
    if below and rows["ticket_density"].notna().any():
        tasks, means, bars = over_seeds(rows, "density")
        below[0].errorbar(tasks + shift, means, bars, **style, **bar_style)
        tasks, means, _ = over_seeds(rows, "ticket_density")
        below[0].plot(tasks + shift, means, ".", color=style["color"], ms=3)


def draw_bound(axes, run, rows):
    kind, line = BOUNDS[rows["bound"].iloc[0]]
    tasks, means, _ = over_seeds(rows, "mean")
    text = f"{run}: {kind} bound, {seeds_of(rows)}"
    axes.plot(tasks, means, color="0.5", lw=1, ls=line, label=text, zorder=1)


def paper_curves(states):
    """{TR-BU, TD: {density, accuracy}} of the paper's Figure 4 if all runs have its tasks."""
    shapes = {"cifar10": (5, 2), "cifar100": (10, 10)}
    (dataset, *shape), *others = {*zip(states["dataset"], states["tasks"], states["classes"])}
    if others or tuple(shape) != shapes.get(dataset):
        return {}
    curves = json.loads(FIGURE4.read_text("utf-8"))[dataset]
    return {name: curves[name] for name in ("TR-BU", "TD")}


# ------------------------------------------------------------------------------ controls


def controls(states):
    """Retrained tickets and their controls: a row for each task, a column for each run and measure.
    Large markers are means, small ones single seeds.
    """
    trained = states[states["script"] == "main_train"]
    runs = trained.loc[trained["control"] != "none", "run"].unique()
    shown = trained[trained["run"].isin(runs)]
    if shown.empty:
        return None
    kinds = [kind for kind in CONTROLS if (shown["control"] == kind).any()]
    tasks = sorted(shown["after"].unique())
    labels = {"mean": "test accuracy, all tasks so far (%)", "aware": "task-aware (%)"}
    columns = [*itertools.product(runs, [name for name in labels if shown[name].notna().any()])]
    height = 0.5 + 0.26 * len(kinds)
    width = max(WIDTH, 2.8 * len(columns))
    figure, panels = panel_grid(len(tasks) * len(columns), len(columns), height, width, sharey=True)
    for axes, (task, (run, measure)) in zip(panels, itertools.product(tasks, columns)):
        own = shown[(shown["run"] == run) & (shown["after"] == task)]
        for place, kind in enumerate(kinds):
            values = own.loc[own["control"] == kind, measure].dropna()
            draw_control(axes, place, values, GREEN if kind == "none" else "0.25")
        axes.set_title(f"{run}, task {task}, {seeds_of(own)}", loc="left", fontsize=8)
        axes.set_yticks(range(len(kinds)), [CONTROLS[kind] for kind in kinds])
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_xlabel(labels[measure] if task == tasks[-1] else "")
        axes.grid(axis="x")
    figure.suptitle("Tickets and controls")
    return figure


def draw_control(axes, place, values, color):
    """The values of the seeds on a line of their own; the ticket's (in green) with a vertical."""
    if values.empty:
        return
    bar = values.std() if len(values) > 1 else None
    marker = "D" if color == GREEN else "o"
    axes.errorbar(values.mean(), place, xerr=bar, fmt=marker, color=color, capsize=3, ms=5, lw=1.2)
    if len(values) > 1:
        axes.plot(values, [place + 0.27] * len(values), ".", color=color, ms=6, alpha=0.6, mew=0)
    if color == GREEN:
        axes.axvline(values.mean(), color=GREEN, lw=0.8, zorder=0.5)


# ------------------------------------------------------------------------------ curves


def dense_name(run):
    """The label of the dense network that a bottom-up run trains beside its tickets."""
    return run.replace("BU", "BU dense", 1)


def curves(epochs):
    """Learning curves: the loss and its parts (not weighted), and the validation accuracy on the
    classes so far, all tasks one after the other. Lines are means over seeds, bands their range.
    """
    groups = [] if epochs is None else [*epochs.groupby("curve", sort=False)]
    if not groups:
        return None
    figure, panels = panel_grid(2 * len(groups), 2, 1.9)
    for left, right, (name, rows) in zip(panels[::2], panels[1::2], groups):
        color = "0.45" if "BU dense" in name else STYLES[rows["script"].iloc[0]][1]
        draw_curves(left, rows, LOSSES)
        draw_curves(right, rows, {"accuracy": color})
        left.set_title(f"{name}, {seeds_of(rows)}", loc="left")
        left.set_ylabel("loss")
        right.set(ylabel="validation accuracy (%)", ylim=(0, 100))
    for axes in panels[-2:]:
        axes.set_xlabel("epoch (dotted: a new task)")
    lines = [Line2D([], [], color=color, lw=1.2) for color in LOSSES.values()]
    labels = [name.replace("_main", ", balanced heads") for name in LOSSES]
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    figure.suptitle("Learning curves")
    return figure


def draw_curves(axes, rows, columns):
    """Lines of some columns over the epochs of all tasks; columns: {name: color}."""
    found = rows.groupby(["task", "epoch"])[[*columns]].agg(["mean", "min", "max"])
    places = range(1, len(found) + 1)
    for place, (_, epoch) in zip(places, found.index):
        if epoch == 1 and place > 1:
            axes.axvline(place - 0.5, color="0.6", lw=0.7, ls=":", zorder=0.5)
    for name, color in columns.items():
        own, width = found[name], 1.6 if name in ("loss", "accuracy") else 0.9
        marker = "." if len(found) < 30 else ""
        axes.plot(places, own["mean"], color=color, lw=width, marker=marker, ms=3)
        axes.fill_between(places, own["min"], own["max"], color=color, alpha=0.15, lw=0)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


# ------------------------------------------------------------------------------ confusion


def confusion(confusions):
    """What the images of each class (a row) are predicted as after the last task, in percent of the
    class; means over seeds.
    """
    if not confusions:
        return None
    figure, panels = panel_grid(len(confusions), 2, 3.1)
    for axes, (run, shares) in zip(panels, confusions.items()):
        image = axes.imshow(shares, "cividis", vmin=0, vmax=100)
        axes.set(xlabel="predicted", ylabel="class")
        axes.set_title(textwrap.fill(run, 40))
        number, names = len(shares), [one_line(name)[:14] for name in shares.index]
        if number <= 20:
            axes.set_xticks(range(number), names, rotation=90, fontsize=7)
            axes.set_yticks(range(number), names, fontsize=7)
        for (y, x), share in zip(itertools.product(range(number), repeat=2), shares.values.flat):
            if number <= 10:
                color = "white" if share < 55 else "black"
                style = {"ha": "center", "va": "center", "fontsize": 6.5, "color": color}
                axes.text(x, y, f"{share:.0f}", **style)
        axes.spines[:].set_visible(False)
    options = {"shrink": 0.7, "aspect": 40, "fraction": 0.03}
    figure.colorbar(image, ax=figure.axes, label="images of the class (%)", **options)
    figure.suptitle("Confusion of classes after the last task")
    return figure
