"""The plots of tools/report.py, drawn from groups as report.group() makes them.

Colors tell methods apart; line styles and hollow markers tell groups of one method apart. Bars and
whiskers are standard deviations over seeds.
"""

import contextlib
import functools
import itertools
import json
import math
import re
import textwrap
import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from runtime.cli import CONTROLS
from runtime.epochs import PARTS
from runtime.errors import one_line
from runtime.files import atomic_write
from runtime.metrics import mean_and_sd

# safe for color-blind readers (Okabe & Ito 2008)
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
COLORS = [BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, "0.5"]
STYLES = {
    "main_CIL": (BLACK, "^"),
    "main_TD": (BLUE, "o"),
    "main_BU": (VERMILION, "s"),
    "main_train": (GREEN, "D"),
    "test": (PURPLE, "v"),
}
PRUNING = ("main_TD", "main_BU")  # the scripts that find tickets
LINES = ["-", "--", "-.", ":"]
FIGURE4 = Path(__file__).parent.parent / "data" / "figure4.json"
KINDS = ("png", "svg")
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
    "svg.hashsalt": "report",  # identical files for identical plots
}


@contextlib.contextmanager
def drawing():
    """Our options, without warnings (of glyphs that the font lacks, of empty plots)."""
    with matplotlib.rc_context(OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write(figure, path):
    """Write a figure as <path>.png and <path>.svg. Raises UserError when that fails."""
    for kind, options in zip(KINDS, ({"dpi": 150}, {"metadata": {"Date": None}})):
        save = functools.partial(figure.savefig, format=kind, **options)
        with drawing():
            atomic_write(path.with_name(f"{path.name}.{kind}"), save)


def draw(groups):
    """All plots for which there are data.

    Returns {name: figure}, and lines on what could not be drawn.
    """
    groups = [one for one in groups if one["accuracy"]]
    with drawing():
        figures = {plot.__name__: plot(groups) for plot in PLOTS}
    notes = []
    if any(one["script"] in (*PRUNING, "main_train") for one in groups) and not figures["layers"]:
        notes = ["no plot of layers: these runs did not record the density of each layer"]
    return {name: figure for name, figure in figures.items() if figure}, notes


def summary(series):
    """{task: {seed: value}} as tasks, means, and standard deviations (None if all are 0)."""
    pairs = [mean_and_sd([*values.values()]) for values in series.values()]
    deviations = [deviation or 0 for _, deviation in pairs]
    return [*series], [mean for mean, _ in pairs], deviations if any(deviations) else None


def styled(groups):
    """[(group, color, keywords of its line)] of the groups that are neither controls nor bounds."""
    shown, counts = [], {}
    for one in groups:
        if one["control"] == "none" and not one["bound"]:
            color, marker = STYLES[one["script"]]
            number = counts[one["script"]] = counts.get(one["script"], -1) + 1
            style = {"color": color, "marker": marker, "linestyle": LINES[number % 4]}
            style |= {"markerfacecolor": "white" if number % 2 else color, "markersize": 5}
            shown.append((one, color, style))
    return shown


def seed_count(one):
    return f"n = {len(one['seeds'])}"


def percent(values):
    mean, deviation = mean_and_sd([*values])
    return f"{mean:.2f} ± {deviation:.2f} %" if deviation else f"{mean:.2f} %"


def title(groups):
    """The data sets and networks of the groups."""
    settings = set()
    for one in groups:
        arch = [one["flags"]["arch"]] if "arch" in one["flags"] else []  # unless it is the paper's
        settings.add(", ".join([one["dataset"], *arch, f"width {one['flags']['width']}"]))
    return one_line("; ".join(sorted(settings)), 100)


def panel_label(one):
    return f"{textwrap.fill(one['label'], 26)}, {seed_count(one)}"


def panel_grid(number, across, height, **options):
    """A figure with `number` panels, at most `across` in a row of `height` inches, and them."""
    across = min(across, number)
    down = math.ceil(number / across)
    figure = Figure(figsize=(8, 0.8 + height * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, **options).flatten()
    for axes in panels[number:]:
        axes.set_axis_off()
    return figure, panels[:number]


def log_percent(axis):
    """A logarithmic axis of percentages, with ticks at 1, 2, 5, 10, 20, ..."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


# ------------------------------------------------------------------------------ accuracy


def report(groups):
    """Accuracy after each task above, density of the tickets below; like the paper's Figure 4.

    Tickets that main_train retrained are points without a line: each starts from other weights.
    Bounds are lines without points.
    """
    shown, bounds = styled(groups), [one for one in groups if one["bound"]]
    if not shown and not bounds:
        return None
    pruned = any(one["script"] in PRUNING for one in groups)
    figure = Figure(figsize=(8, 7 if pruned else 4.5), layout="constrained")
    ratios = (3, 2) if pruned else (1,)
    above, *below = figure.subplots(
        len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False
    ).flat
    draw_bounds(above, bounds)
    if all(one["script"] != "main_CIL" for one, *_ in shown):
        draw_dense_of_BU(above, shown)
    for number, (one, _, style) in enumerate(shown):
        style = style | {"capsize": 2, "elinewidth": 1, "lw": 1.5}
        if one["script"] in ("main_train", "test"):
            style["linestyle"] = "none"
        # side by side, so that no group hides another
        shift = min(0.05, 0.3 / len(shown)) * (number - (len(shown) - 1) / 2)
        tasks, means, deviations = summary(one["accuracy"])
        density = percent(one["density"][tasks[-1]].values())
        text = f"{one['label']}: {density}, {seed_count(one)}"
        above.errorbar([t + shift for t in tasks], means, deviations, label=text, **style)
        if one["script"] in PRUNING:
            tasks, means, deviations = summary(one["density"])
            below[0].errorbar([t + shift for t in tasks], means, deviations, **style)
    draw_paper_curves(above, groups)
    above.set_ylabel("test accuracy, all tasks so far (%)")
    above.set_title(f"Lifelong tickets on {title(groups)}")
    for axes in below:
        log_percent(axes.yaxis)
        axes.set_ylim(top=115)
        axes.set_ylabel("remaining weights (%)")
    for axes in (above, *below):
        axes.grid()
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.set_xlabel("task")
    report_legend(figure, above, groups)
    return figure


def draw_bounds(axes, bounds):
    """Thin lines of the means of main_CIL --joint and --finetune, between which the others lie."""
    kinds = {"joint": ("upper", "--"), "finetune": ("lower", ":")}
    for one in bounds:
        tasks, means, _ = summary(one["accuracy"])
        kind, line = kinds[one["bound"]]
        text = f"{one['label']}: {kind} bound, {seed_count(one)}"
        axes.plot(tasks, means, color="0.5", lw=1, ls=line, label=text, zorder=1)


def draw_dense_of_BU(axes, shown):
    """The dense networks of main_BU, where no run of main_CIL shows a dense network."""
    for one, _, style in shown:
        if one["script"] == "main_BU":
            tasks, means, _ = summary(one["dense"])
            text = f"dense network of {one['label']}"
            axes.plot(tasks, means, color="0.4", lw=1, ls=style["linestyle"], label=text)


def draw_paper_curves(axes, groups):
    """The curves of the paper's Figure 4."""
    for name, curve in paper_curves(groups).items():
        text = f"{name} of the paper (read off its Figure 4): {curve['density']:.2f} %"
        style = {"color": {"TD": BLUE, "TR-BU": GREEN}[name], "lw": 0.8, "alpha": 0.7, "zorder": 1}
        axes.plot(range(1, len(curve["accuracy"]) + 1), curve["accuracy"], label=text, **style)


def paper_curves(groups):
    """{TR-BU, TD: {density, accuracy}} of the paper's Figure 4 if all groups have its data set."""
    shapes = {"cifar10": (5, 2), "cifar100": (10, 10)}
    dataset, *others = {one["dataset"] for one in groups}
    for one in groups:
        shape = one["classifiers"], one["flags"].get("classes_per_classifier")
        if others or shape != shapes.get(dataset):
            return {}
    curves = figure4()[dataset]
    return {name: curves[name] for name in ("TR-BU", "TD")}


def figure4():
    """The content of data/figure4.json: the curves of the paper's Figure 4."""
    return json.loads(FIGURE4.read_text())


def report_legend(figure, axes, groups):
    """A legend under the figure: lines first, then the groups with error bars."""
    text = "run: density of its last ticket, n = seeds"
    if any(len(one["seeds"]) > 1 for one in groups):
        text += "; bars: standard deviation over them"
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: isinstance(handles[i], Line2D))
    ordered = [[each[i] for i in order] for each in (handles, labels)]
    columns = 2 if any(one["bound"] or len(one["label"]) > 12 for one in groups) else 3
    options = {"loc": "outside lower center", "title_fontsize": 8}
    figure.legend(*ordered, ncols=columns, title=text, **options)


def matrix(groups):
    """Accuracy of each task after each task: a panel for each group with several tasks."""
    shown = [one for one in groups if one["script"] not in ("main_train", "test")]
    shown = [one for one in shown if len(one["accuracy"]) > 1]
    if not shown:
        return None
    tasks = max(one["classifiers"] for one in shown)
    across = 3 if tasks <= 6 else 2
    figure, panels = panel_grid(len(shown), across, 2.5 if min(across, len(shown)) == 3 else 3.5)
    for axes, one in zip(panels, shown):
        image = draw_matrix(axes, one, tasks)
        axes.set_title(panel_label(one))
    options = {"shrink": 0.7, "aspect": 40, "fraction": 0.03}
    figure.colorbar(image, ax=figure.axes, label="test accuracy (%)", **options)
    figure.suptitle(f"Accuracy of each task on {title(groups)}, mean over n seeds", fontsize=9)
    return figure


def draw_matrix(axes, one, tasks):
    """The matrix of one group, with the numbers in its cells where they are large enough."""
    cells = [[math.nan] * tasks for _ in range(tasks)]
    for task in one["accuracy"]:
        rows = [rows[task]["accuracy"] for rows in one["seeds"].values() if task in rows]
        for i, values in enumerate(zip(*rows)):
            mean = cells[task - 1][i] = mean_and_sd(values)[0]
            if tasks <= 10:
                write_in_cell(axes, i + 1, task, mean, 8 if tasks <= 6 else 7)
    edge = (0.5, tasks + 0.5)
    image = axes.imshow(cells, "cividis", vmin=0, vmax=100, extent=(*edge, *edge[::-1]))
    axes.set(xlabel="accuracy of task", ylabel="after task")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.spines[:].set_visible(False)
    return image


def write_in_cell(axes, x, y, percent, size):
    """A number that can be read on its cell of a matrix."""
    style = {"ha": "center", "va": "center", "fontsize": size}
    axes.text(x, y, f"{percent:.0f}", color="white" if percent < 55 else "black", **style)


def confusion(groups):
    """What the images of each class (a row) are taken for after the last task, in percent.

    Means over seeds; a panel for each group that trains task after task, and for each test.
    """
    shown = [(one, found) for one in groups if (found := confusion_of(one)) is not None]
    shown = [(one, found) for one, found in shown if one["script"] != "main_train"]
    if not shown:
        return None
    figure, panels = panel_grid(len(shown), 2, 3.9)
    for axes, (one, found) in zip(panels, shown):
        image = draw_confusion(axes, found, one["class_names"])
        axes.set_title(panel_label(one))
    options = {"shrink": 0.7, "aspect": 40, "fraction": 0.03}
    figure.colorbar(image, ax=figure.axes, label="images of the class (%)", **options)
    figure.suptitle(f"Confusion of classes after the last task on {title(groups)}", fontsize=9)
    return figure


def confusion_of(one):
    """Shares in percent after the group's last task, mean over seeds; None where not recorded."""
    last = max(one["accuracy"])
    rows = [rows[last] for rows in one["seeds"].values() if "confusion" in rows.get(last, {})]
    if not rows:
        return None
    shares = [
        [[100 * n / max(1, sum(line)) for n in line] for line in row["confusion"]] for row in rows
    ]
    return [[sum(cell) / len(rows) for cell in zip(*lines)] for lines in zip(*shares)]


def draw_confusion(axes, found, names):
    """The matrix of one group; numbers and names where there is room for them."""
    image = axes.imshow(found, "cividis", vmin=0, vmax=100)
    number = len(found)
    axes.set(xlabel="taken for", ylabel="class")
    if number <= 20:
        names = [one_line(name, 14) for name in names[:number]]
        axes.set_xticks(range(number), names, rotation=90, fontsize=7)
        axes.set_yticks(range(number), names, fontsize=7)
    if number <= 10:
        for y, line in enumerate(found):
            for x, share in enumerate(line):
                write_in_cell(axes, x, y, share, 7)
    axes.spines[:].set_visible(False)
    return image


# ------------------------------------------------------------------------------ training


LOSS_COLORS = dict(zip(("loss", *PARTS), (BLACK, BLUE, GREEN, SKY, ORANGE, PURPLE)))


def curves(groups):
    """Learning curves: the loss and its parts (not weighted), and the validation accuracy.

    The epochs of all tasks one after the other; the accuracy is that on the classes so far. Lines
    are means over seeds, the band spans the seeds.
    """
    shown = [(one, found) for one in groups if (found := epochs_of_tasks(one))]
    if not shown:
        return None
    figure = Figure(figsize=(8, 1.2 + 1.9 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False)
    for (left, right), (one, found) in zip(panels, shown):
        draw_curves(left, found, LOSS_COLORS)
        draw_curves(right, found, {"accuracy": STYLES[one["script"]][0]})
        left.set_title(panel_label(one).replace("\n", " "), loc="left")
        left.set_ylabel("loss")
        right.set(ylabel="validation accuracy (%)", ylim=(0, 100))
    for axes in panels[-1]:
        axes.set_xlabel("epoch (dotted: a new task)")
    lines = [Line2D([], [], color=color, lw=1.2) for color in LOSS_COLORS.values()]
    labels = [name.replace("_main", ", balanced heads") for name in LOSS_COLORS]
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"Learning curves on {title(groups)}", fontsize=9)
    return figure


def epochs_of_tasks(one):
    """{place: {column: [values of the seeds]}} of a group's tasks, and where tasks begin.

    Only whole tasks of main_CIL, main_TD and main_BU's dense network: not the retraining after
    prunings. None where nothing is recorded.
    """
    if one["script"] not in ("main_CIL", *PRUNING):
        return None
    found = {}  # of each task and epoch, since a seed may lack some
    for row in (row for run in one["runs"] for row in run["epochs"]):
        if task := re.fullmatch(r"task(\d+)", row["step"]):
            columns = found.setdefault((int(task[1]), row["epoch"]), {})
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    places = dict(enumerate((found[key] for key in sorted(found)), 1))
    starts = [place for place, key in enumerate(sorted(found), 1) if key[1] == 1]
    return (places, starts) if places else None


def draw_curves(axes, found, columns):
    """Lines of some columns; columns: {name: color}."""
    places, starts = found
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="0.6", lw=0.7, ls=":", zorder=0.5)
    for name, color in columns.items():
        # a column may be missing in some tasks: NaN leaves a gap
        values = [place.get(name, [math.nan]) for place in places.values()]
        means = [sum(each) / len(each) for each in values]
        style = {"color": color, "lw": 1.6 if name in ("loss", "accuracy") else 0.9}
        axes.plot([*places], means, marker="." if len(places) < 30 else "", ms=3, **style)
        low, high = ([bound(each) for each in values] for bound in (min, max))
        if low != high:
            axes.fill_between([*places], low, high, color=color, alpha=0.15, lw=0)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


# ------------------------------------------------------------------------------ tickets


def layers(groups):
    """Density of each layer under the last ticket, and below it what the layer costs to run: two
    panels for each group with tickets, one where the cost is not known.

    The tickets of main_train are those of a main_BU; they are drawn if no main_BU is given.
    """
    found_here = any(one["script"] == "main_BU" for one in groups)
    scripts = PRUNING if found_here else (*PRUNING, "main_train")
    shown = []
    for one, color, _ in styled(groups):
        if one["script"] in scripts:
            last = max(one["accuracy"])
            rows = [rows[last] for rows in one["seeds"].values() if last in rows]
            rows = [row for row in rows if row.get("layer_density")]
            names = rows and rows[0]["layer_density"].keys()
            if rows and all(row["layer_density"].keys() == names for row in rows):
                shown.append((one, color, last, rows))
    if not shown:
        return None
    panels = []
    for *group, rows in shown:
        panels.append((draw_densities, *group, rows))
        if known := [row for row in rows if row["layer_macs"]]:
            panels.append((draw_macs, *group, known))
    figure = Figure(figsize=(8, 1.1 + 1.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True).flatten()
    for each, (draw_panel, *group) in zip(axes, panels):
        draw_panel(each, *group)
    figure.align_ylabels()
    text = "; whiskers: standard deviation" * any(len(rows) > 1 for *_, rows in shown)
    figure.suptitle(f"Last tickets on {title(groups)}, layer by layer{text}", fontsize=9)
    return figure


def draw_densities(axes, one, color, last, rows):
    """The densities of a group's layers under the ticket of task `last`; rows: one of each seed."""
    draw_layers(axes, [row["layer_density"] for row in rows], color, 100)
    density = one["density"][last].values()
    axes.axhline(mean_and_sd([*density])[0], color="0.3", lw=1, ls="--", zorder=0.5)
    text = f"weights of the ticket of task {last}, {percent(density)} overall (dashed)"
    axes.set_title(f"{one['label']}: {text}, n = {len(rows)}", loc="left")
    axes.set(yticks=range(0, 101, 25), ylabel="weights (%)")


def draw_macs(axes, one, color, last, rows):
    """The multiply-accumulates of the layers; parameters as in draw_densities."""
    names = rows[0]["layer_density"]
    dense = [rows[0]["layer_macs"][name][1] for name in names]
    axes.bar(range(len(dense)), dense, color="0.88", width=0.75)
    remaining = [{name: row["layer_macs"][name][0] for name in names} for row in rows]
    draw_layers(axes, remaining, color, max(dense))
    overall = percent(one["macs"][last].values())
    text = f"its multiply-accumulates, {overall} of the dense network's (gray)"
    axes.set_title(f"{one['label']}: {text}, n = {len(rows)}", loc="left")
    axes.set_ylabel("MACs (% of all)")


def draw_layers(axes, rows, color, top):
    """Bars with whiskers and numbers. rows: {layer: percent} of each seed; top: of the axis."""
    names = [one_line(name, 24) for name in rows[0]]
    pairs = [mean_and_sd([row[name] for row in rows]) for name in rows[0]]
    means, deviations = [mean for mean, _ in pairs], [sd or 0 for _, sd in pairs]
    places = range(len(names))
    axes.bar(places, means, color=color, width=0.75)
    if len(rows) > 1:
        style = {"fmt": "none", "ecolor": "0.3", "elinewidth": 1, "capsize": 2}
        axes.errorbar(places, means, deviations, **style)
    for x, mean, deviation in zip(places, means, deviations):
        decimals = (mean < 9.5) + (0 < mean < 0.95)
        style = {"ha": "center", "va": "bottom", "fontsize": 7}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        y = mean + deviation + 0.02 * top
        axes.text(x, y, f"{mean:.{decimals}f}", bbox=box, **style)
    axes.set(ylim=(0, 1.19 * top), xlim=(-0.6, len(names) - 0.4))
    axes.grid(axis="y")
    axes.set_xticks(places, names, rotation=90, fontsize=8)


def prunings(groups):
    """How bottom-up tickets were found: the rounds of pruning, a panel for each group.

    Accuracy is drawn relative to that of the dense network (0), as in the stop rule: pruning stops
    below -deacc once the density is at most 100 - base_sparsity.
    """
    shown = [one for one in groups if one["script"] == "main_BU" and pruned_rows(one)]
    if not shown:
        return None
    figure, panels = panel_grid(len(shown), 2, 3.4, sharex=True, sharey=True)
    entries = {}
    for axes, one in zip(panels, shown):
        entries |= draw_rounds(axes, one)
        axes.set_title(panel_label(one))
        axes.grid()
        log_percent(axes.xaxis)
        axes.set_xlabel("remaining weights (%)")
        axes.set_ylabel(f"{one['flags']['select_on']} accuracy, dense = 0 (points)")
    panels[0].invert_xaxis()
    entries[1000, "the ticket"] = Line2D([], [], marker="*", ms=10, color="white", mec="black")
    lines = {text: line for (_, text), line in sorted(entries.items(), key=lambda item: item[0])}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Rounds of pruning on {title(groups)}, a line for each seed", fontsize=9)
    return figure


def draw_rounds(axes, one):
    """The rounds of a group's seeds and its stop rule. Returns legend entries.

    Those are {(order, text): line}.
    """
    entries = {}
    for task, row in pruned_rows(one):
        rounds = [pruning for pruning in row["rounds"] if pruning["density"] > 0]
        style = {
            "color": COLORS[(task - 1) % len(COLORS)],
            "ls": LINES[(task - 1) // len(COLORS) % 4],
        }
        densities = [pruning["density"] for pruning in rounds]
        losses = [-pruning["decay"] for pruning in rounds]
        (line,) = axes.plot(densities, losses, lw=1, marker=".", ms=4, **style)
        entries[task, f"task {task}" + (", re-growth" if task > 1 else "")] = line
        chosen = min(rounds, key=lambda pruning: abs(pruning["density"] - row["ticket_density"]))
        style |= {"marker": "*", "ms": 11, "mec": "black", "mew": 0.6, "ls": "none", "zorder": 3}
        axes.plot(chosen["density"], -chosen["decay"], **style)
    deacc, sparsity = (one["flags"][key] for key in ("deacc", "base_sparsity"))
    entries[1001, "the dense network"] = axes.axhline(0, color="black", lw=1)
    style = {"color": "0.35", "lw": 1.2}
    if abs(deacc) <= 100:
        line = axes.axhline(-deacc, ls="--", **style)
        entries[1002, "stops below this (--deacc) ..."] = line
    if sparsity < 100:
        line = axes.axvline(100 - sparsity, ls=":", **style)
        entries[1003, "... and right of this (--base_sparsity)"] = line
    return entries


def pruned_rows(one):
    """[(task, row)] of a group's rows with rounds of pruning, of all seeds."""
    rows = [item for rows in one["seeds"].values() for item in sorted(rows.items())]
    return [
        (task, row)
        for task, row in rows
        if any(pruning["density"] > 0 for pruning in row.get("rounds", []))
    ]


def controls(groups):
    """Tickets and their controls: a row of panels for each task, a column for each setting and
    measure: accuracy, and task-aware accuracy where it is recorded.

    Large markers are means, small ones single seeds.
    """
    trained = [one for one in groups if one["script"] == "main_train"]
    settings = [*dict.fromkeys(one["ticket"] for one in trained if one["control"] != "none")]
    shown = [one for one in trained if one["ticket"] in settings]
    if not shown:
        return None
    kinds = [kind for kind in CONTROLS if any(one["control"] == kind for one in shown)]
    tasks = sorted({task for one in shown if one["control"] != "none" for task in one["accuracy"]})
    labels = {"accuracy": "test accuracy, all tasks so far (%)", "task-aware": "task-aware (%)"}
    measures = [name for name in labels if any(any(one[name].values()) for one in shown)]
    columns = [*itertools.product(settings, measures)]
    size = (
        8 if len(columns) < 3 else 2.8 * len(columns),
        0.9 + (0.5 + 0.26 * len(kinds)) * len(tasks),
    )
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tasks), len(columns), squeeze=False, sharey=True)
    for column, (ticket, measure) in zip(panels.T, columns):
        for axes, task in zip(column, tasks):
            own = [one for one in shown if one["ticket"] == ticket and one[measure].get(task)]
            draw_controls(axes, own, measure, task, kinds)
            counts = sorted({len(one[measure][task]) for one in own}) or [0]
            count = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
            name = f"{own[0]['label']}, " if own and len(settings) > 1 else ""
            axes.set_title(f"{name}task {task}, n = {count}", loc="left")
        column[-1].set_xlabel(labels[measure])
    text = ""
    if any(len(one["seeds"]) > 1 for one in shown):
        text = "; large markers: mean, bars: standard deviation, dots: seeds"
    figure.suptitle(f"Tickets and controls on {title(groups)}{text}", fontsize=9)
    return figure


def draw_controls(axes, own, measure, task, kinds):
    """A measure of a ticket and its controls on a task, a line for each kind."""
    for one in own:
        values = [*one[measure][task].values()]
        y, (mean, deviation) = kinds.index(one["control"]), mean_and_sd(values)
        is_ticket = one["control"] == "none"
        color = GREEN if is_ticket else "0.25"
        if len(values) > 1:
            axes.plot(values, [y + 0.27] * len(values), ".", color=color, ms=6, alpha=0.6, mew=0)
        style = {"fmt": "D" if is_ticket else "o", "capsize": 3, "ms": 5, "lw": 1.2}
        axes.errorbar(mean, y, xerr=deviation, color=color, **style)
        if is_ticket:
            axes.axvline(mean, color=GREEN, lw=0.8, zorder=0.5)
    axes.set_yticks(range(len(kinds)), [CONTROLS[kind] for kind in kinds])
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(axis="x")


PLOTS = (report, matrix, confusion, curves, layers, prunings, controls)
