"""The pictures of report.py, of groups as report.group makes them: figures of Matplotlib.

Colours tell methods, line styles and hollow marks the flags in which two groups of one method
differ. What is uncertain is a standard deviation over seeds, and said so.
"""

import functools
import json
import math
import textwrap
import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

import utils

# colours that colour-blind people can tell apart (Okabe & Ito 2008)
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
STYLES = {
    "main_CIL": (BLACK, "^"),
    "main_TD": (BLUE, "o"),
    "main_BU": (VERMILION, "s"),
    "main_train": (GREEN, "D"),
    "test": (PURPLE, "v"),
}
TICKETS = ("main_TD", "main_BU", "main_train")
LINES = ["-", "--", "-.", ":"]
FIGURE4 = Path(__file__).parent / "data" / "figure4.json"
OPTIONS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # names are no formulas
    "svg.hashsalt": "report",  # the same file each time
}


def write(figure, path):
    """Write a figure as <path>.png and <path>.svg. Raises Refusal where that cannot be."""
    for kind, more in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
        save = functools.partial(figure.savefig, format=kind, **more)
        with matplotlib.rc_context(OPTIONS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font does not have
            utils.write_whole(path.with_name(f"{path.name}.{kind}"), save)


def draw(groups):
    """All pictures that there is something to draw for.

    Returns {name: figure}, and lines on what could not be drawn.
    """
    told = [one for one in groups if one["accuracy"]]
    found = {}
    with matplotlib.rc_context(OPTIONS):
        for picture in (report, matrix, layers, prunings, controls):
            found[picture.__name__] = picture(told) if told else None
    lines = []
    if any(one["script"] in TICKETS for one in told) and not found["layers"]:
        lines = ["no picture of layers: these runs did not record the density of each layer yet"]
    return {name: figure for name, figure in found.items() if figure}, lines


def spreads(series):
    """{task: {seed: value}} as tasks, means and standard deviations (0 for one seed)."""
    both = [utils.spread([*values.values()]) for values in series.values()]
    return [*series], [mean for mean, _ in both], [deviation or 0 for _, deviation in both]


def plain(groups):
    """[(group, colour, keywords of its line)] of the groups that are no controls."""
    shown, seen = [], {}
    for one in groups:
        if one["control"] == "none":
            colour, marker = STYLES[one["script"]]
            number = seen[one["script"]] = seen.get(one["script"], -1) + 1
            keys = {"color": colour, "marker": marker, "linestyle": LINES[number % 4]}
            keys |= {"markerfacecolor": "white" if number % 2 else colour, "markersize": 5}
            shown.append((one, colour, keys))
    return shown


def seeds(one):
    return f"n = {len(one['seeds'])}"


def percent(values):
    mean, deviation = utils.spread([*values])
    return f"{mean:.2f} %" if deviation is None else f"{mean:.2f} ± {deviation:.2f} %"


def title(groups):
    sets = sorted({f"{one['dataset']}, width {one['flags']['width']}" for one in groups})
    return utils.shown("; ".join(sets), 100)


def report(groups):
    """Accuracy after each task above, density of the tickets below; like the paper's Figure 4.

    Tickets that main_train trained are points without a line: each begins from other weights.
    """
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    shown = plain(groups)
    for name, curve in paper_curves(groups).items():
        words = f"{name} of the paper: {curve['density']:.2f} %"
        keys = {"color": {"TD": BLUE, "TR-BU": GREEN}[name], "lw": 0.8, "alpha": 0.7, "zorder": 1}
        above.plot(range(1, len(curve["accuracy"]) + 1), curve["accuracy"], label=words, **keys)
    if all(one["script"] != "main_CIL" for one in groups):
        for one, _, keys in shown:
            if one["script"] == "main_BU":
                xs, means, _ = spreads(one["dense"])
                words = f"dense network of {one['label']}"
                above.plot(xs, means, color="0.4", lw=1, ls=keys["linestyle"], label=words)
    for place, (one, _, keys) in enumerate(shown):
        alone = one["script"] in ("main_train", "test")
        keys = keys | {"capsize": 2, "elinewidth": 1, "lw": 1.5}
        keys |= {"linestyle": "none"} if alone else {}
        shift = 0.05 * (place - (len(shown) - 1) / 2)  # lest one hides another
        xs, means, deviations = spreads(one["accuracy"])
        words = f"{one['label']}: {percent(one['density'][xs[-1]].values())}, {seeds(one)}"
        above.errorbar([x + shift for x in xs], means, deviations, label=words, **keys)
        if one["script"] in ("main_TD", "main_BU"):
            xs, means, deviations = spreads(one["density"])
            below.errorbar([x + shift for x in xs], means, deviations, **keys)
    above.set_ylabel("test accuracy, all tasks so far (%)")
    above.set_title(f"Lifelong tickets on {title(groups)}")
    logarithmic(below.yaxis)
    below.set_ylabel("weights that remain (%)")
    below.set_xlabel("task")
    below.set_xticks(range(1, max(one["classifiers"] for one in groups) + 1))
    for axes in (above, below):
        axes.grid()
    words = "run: density of its last ticket, n = seeds"
    words += "; bars: standard deviation over them" * any(len(one["seeds"]) > 1 for one in groups)
    wide = max(len(one["label"]) for one in groups) > 12
    options = {"loc": "outside lower center", "title_fontsize": 8}
    figure.legend(ncols=2 if wide else 3, title=words, **options)
    return figure


def logarithmic(axis):
    """Percents on a logarithmic axis, with ticks that are read easily."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def paper_curves(groups):
    """{TR-BU, TD: {density, accuracy}} of the paper's Figure 4 where that is of this data set."""
    sets = {(one["dataset"], one["classifiers"]) for one in groups}
    if len(sets) > 1 or sets - {("cifar10", 5), ("cifar100", 10)}:
        return {}
    curves = json.loads(FIGURE4.read_text())[sets.pop()[0]]
    return {name: curves[name] for name in ("TR-BU", "TD")}


def matrix(groups):
    """Accuracy of each task after each task, a panel for each group that has seen several."""
    shown = [one for one in groups if one["control"] == "none" and len(one["accuracy"]) > 1]
    if not shown:
        return None
    across = min(3, len(shown))
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(8, 0.6 + 2.6 * down if across == 3 else 0.6 + 3.4 * down))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    tasks = max(one["classifiers"] for one in shown)
    for axes, one in zip(panels, shown):
        cells = [[math.nan] * tasks for _ in range(tasks)]
        for task in one["accuracy"]:
            rows = [rows[task]["accuracy"] for rows in one["seeds"].values() if task in rows]
            for i, values in enumerate(zip(*rows)):
                cells[task - 1][i] = utils.spread(values)[0]
                if tasks <= 10:
                    dark = cells[task - 1][i] < 55
                    keys = {"ha": "center", "va": "center", "fontsize": 8 if tasks <= 6 else 5.5}
                    text = f"{cells[task - 1][i]:.0f}"
                    axes.text(i + 1, task, text, color="white" if dark else "black", **keys)
        edge = (0.5, tasks + 0.5)
        picture = axes.imshow(cells, "cividis", vmin=0, vmax=100, extent=(*edge, *edge[::-1]))
        axes.set_title(f"{wrapped(one['label'])}, {seeds(one)}")
        axes.set(xlabel="accuracy of task", ylabel="after task")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        axes.spines[:].set_visible(False)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.colorbar(picture, ax=figure.axes, label="test accuracy (%)", shrink=0.7, aspect=30)
    return figure


def wrapped(label):
    return textwrap.fill(label, 26)


def layers(groups):
    return None


def prunings(groups):
    return None


def controls(groups):
    return None
