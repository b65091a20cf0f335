"""The pictures of report.py, of groups as report.group makes them: figures of Matplotlib.

Colours tell methods, line styles and hollow marks the flags in which two groups of one method
differ. What is uncertain is a standard deviation over seeds, and said so.
"""

import contextlib
import functools
import json
import math
import textwrap
import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

import utils

# colours that colour-blind people can tell apart (Okabe & Ito 2008)
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
COLOURS = [BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, "0.5"]
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


@contextlib.contextmanager
def drawing():
    """Our options, and no warnings: of letters that the font lacks, of no density to draw."""
    with matplotlib.rc_context(OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write(figure, path):
    """Write a figure as <path>.png and <path>.svg. Raises Refusal where that cannot be."""
    for kind, more in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
        save = functools.partial(figure.savefig, format=kind, **more)
        with drawing():
            utils.write_whole(path.with_name(f"{path.name}.{kind}"), save)


def draw(groups):
    """All pictures that there is something to draw for.

    Returns {name: figure}, and lines on what could not be drawn.
    """
    told = [one for one in groups if one["accuracy"]]
    with drawing():
        found = {each.__name__: each(told) for each in (report, matrix, layers, prunings, controls)}
    lines = []
    if any(one["script"] in TICKETS for one in told) and not found["layers"]:
        lines = ["no picture of layers: these runs did not record the density of each layer yet"]
    return {name: figure for name, figure in found.items() if figure}, lines


def spreads(series):
    """{task: {seed: value}} as tasks, means and standard deviations (None if all are 0)."""
    both = [utils.spread([*values.values()]) for values in series.values()]
    deviations = [deviation or 0 for _, deviation in both]
    return [*series], [mean for mean, _ in both], deviations if any(deviations) else None


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
    return f"{mean:.2f} ± {deviation:.2f} %" if deviation else f"{mean:.2f} %"


def title(groups):
    sets = sorted({f"{one['dataset']}, width {one['flags']['width']}" for one in groups})
    return utils.shown("; ".join(sets), 100)


def report(groups):
    """Accuracy after each task above, density of the tickets below; like the paper's Figure 4.

    Tickets that main_train trained are points without a line: each begins from other weights.
    """
    shown = plain(groups)
    if not shown:
        return None
    pruned = any(one["script"] in TICKETS[:2] for one in groups)
    figure = Figure(figsize=(8, 7 if pruned else 4.5), layout="constrained")
    ratios = (3, 2) if pruned else (1,)
    above, *rest = figure.subplots(
        len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False
    ).flat
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
        shift = min(0.05, 0.3 / len(shown)) * (place - (len(shown) - 1) / 2)  # none hides another
        xs, means, deviations = spreads(one["accuracy"])
        words = f"{one['label']}: {percent(one['density'][xs[-1]].values())}, {seeds(one)}"
        above.errorbar([x + shift for x in xs], means, deviations, label=words, **keys)
        if one["script"] in TICKETS[:2]:
            xs, means, deviations = spreads(one["density"])
            rest[0].errorbar([x + shift for x in xs], means, deviations, **keys)
    for name, curve in paper_curves(groups).items():
        words = f"{name} of the paper (read off its Figure 4): {curve['density']:.2f} %"
        keys = {"color": {"TD": BLUE, "TR-BU": GREEN}[name], "lw": 0.8, "alpha": 0.7, "zorder": 1}
        above.plot(range(1, len(curve["accuracy"]) + 1), curve["accuracy"], label=words, **keys)
    above.set_ylabel("test accuracy, all tasks so far (%)")
    above.set_title(f"Lifelong tickets on {title(groups)}")
    for below in rest:
        logarithmic(below.yaxis)
        below.set_ylim(top=115)
        below.set_ylabel("weights that remain (%)")
    for axes in (above, *rest):
        axes.grid()
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.set_xlabel("task")
    words = "run: density of its last ticket, n = seeds"
    words += "; bars: standard deviation over them" * any(len(one["seeds"]) > 1 for one in groups)
    wide = max(len(one["label"]) for one in groups) > 12
    options = {"loc": "outside lower center", "title_fontsize": 8}
    handles, labels = above.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: isinstance(handles[place], Line2D))
    ours_first = [[each[place] for place in order] for each in (handles, labels)]
    figure.legend(*ours_first, ncols=2 if wide else 3, title=words, **options)
    return figure


def logarithmic(axis):
    """Percents on a logarithmic axis, with ticks that are read easily."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def paper_curves(groups):
    """{TR-BU, TD: {density, accuracy}} of the paper's Figure 4 where that is of this data set."""
    shown = {"cifar10": (5, 2), "cifar100": (10, 10)}
    dataset, *others = {one["dataset"] for one in groups}
    for one in groups:
        shape = one["classifiers"], one["flags"].get("classes_per_classifier")
        if others or shape != shown.get(dataset):
            return {}
    curves = json.loads(FIGURE4.read_text())[dataset]
    return {name: curves[name] for name in ("TR-BU", "TD")}


def matrix(groups):
    """Accuracy of each task after each task, a panel for each group that goes through several."""
    shown = [one for one in groups if one["script"] not in ("main_train", "test")]
    shown = [one for one in shown if len(one["accuracy"]) > 1]
    if not shown:
        return None
    tasks = max(one["classifiers"] for one in shown)
    across = min(3 if tasks <= 6 else 2, len(shown))
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(8, 0.8 + (2.5 if across == 3 else 3.5) * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, one in zip(panels, shown):
        cells = [[math.nan] * tasks for _ in range(tasks)]
        for task in one["accuracy"]:
            rows = [rows[task]["accuracy"] for rows in one["seeds"].values() if task in rows]
            for i, values in enumerate(zip(*rows)):
                cells[task - 1][i] = utils.spread(values)[0]
                if tasks <= 10:
                    dark = cells[task - 1][i] < 55
                    keys = {"ha": "center", "va": "center", "fontsize": 8 if tasks <= 6 else 7}
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
    options = {"shrink": 0.7, "aspect": 40, "fraction": 0.03}
    figure.colorbar(picture, ax=figure.axes, label="test accuracy (%)", **options)
    figure.suptitle(f"Accuracy of each task on {title(groups)}, mean over n seeds", fontsize=9)
    return figure


def wrapped(label):
    return textwrap.fill(label, 26)


def layers(groups):
    """Density of each layer under the last ticket as bars, a panel for each group with tickets.

    The tickets of main_train are those of a main_BU; they are drawn where no main_BU is given.
    """
    scripts = {one["script"] for one in groups}
    shown = []
    for one, colour, _ in plain(groups):
        if one["script"] in TICKETS[: 2 if "main_BU" in scripts else 3]:
            last = max(one["accuracy"])
            rows = [rows[last] for rows in one["seeds"].values() if last in rows]
            rows = [row["layer_density"] for row in rows if row.get("layer_density")]
            if rows and all(row.keys() == rows[0].keys() for row in rows):
                shown.append((one, colour, last, rows))
    if not shown:
        return None
    figure = Figure(figsize=(8, 1.1 + 1.6 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (one, colour, last, rows) in zip(panels, shown):
        names = [utils.shown(name, 24) for name in rows[0]]
        both = [utils.spread([row[name] for row in rows]) for name in rows[0]]
        means, deviations = [mean for mean, _ in both], [sd or 0 for _, sd in both]
        places = range(len(names))
        axes.bar(places, means, color=colour, width=0.75)
        if len(rows) > 1:
            axes.errorbar(
                places, means, deviations, fmt="none", ecolor="0.3", elinewidth=1, capsize=2
            )
        tops = [f"{mean:.{(mean < 9.5) + (0 < mean < 0.95)}f}" for mean in means]
        for x, mean, deviation, text in zip(places, means, deviations, tops):
            keys = {"ha": "center", "va": "bottom", "fontsize": 7}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.text(x, mean + deviation + 2, text, bbox=box, **keys)
        density = one["density"][last].values()
        axes.axhline(utils.spread([*density])[0], color="0.3", lw=1, ls="--", zorder=0.5)
        words = f"ticket of task {last}, {percent(density)} in all (dashed), n = {len(rows)}"
        axes.set_title(f"{one['label']}: {words}", loc="left")
        axes.set(ylim=(0, 119), yticks=range(0, 101, 25), xlim=(-0.6, len(names) - 0.4))
        axes.grid(axis="y")
        axes.set_xticks(places, names, rotation=90, fontsize=8)
    words = "; whiskers: standard deviation" * any(len(rows) > 1 for *_, rows in shown)
    figure.supylabel("weights that remain in each layer (%)", fontsize=9)
    figure.suptitle(f"Density of each layer on {title(groups)}{words}", fontsize=9)
    return figure


def prunings(groups):
    """How bottom-up tickets were found: the rounds of pruning, a panel for each group.

    Accuracy is told as points above that of the dense network (0), from which the stop rule counts:
    prunings stop below -deacc at a density of at most 100 - base_sparsity.
    """
    shown = [one for one in groups if one["script"] == "main_BU" and rounds_of(one)]
    if not shown:
        return None
    across = min(2, len(shown))
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(8, 0.8 + 3.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    named = {}
    for axes, one in zip(panels, shown):
        for task, row in rounds_of(one):
            rounds = [each for each in row["rounds"] if each["density"] > 0]
            keys = {
                "color": COLOURS[(task - 1) % len(COLOURS)],
                "ls": LINES[(task - 1) // len(COLOURS) % 4],
            }
            xs, ys = [each["density"] for each in rounds], [-each["decay"] for each in rounds]
            (line,) = axes.plot(xs, ys, lw=1, marker=".", ms=4, **keys)
            named[task, f"task {task}" + (", re-growth" if task > 1 else "")] = line
            chosen = min(rounds, key=lambda each: abs(each["density"] - row["ticket_density"]))
            keys |= {"marker": "*", "ms": 11, "mec": "black", "mew": 0.6, "ls": "none", "zorder": 3}
            (star,) = axes.plot(chosen["density"], -chosen["decay"], **keys)
        deacc, sparsity = (one["flags"][key] for key in ("deacc", "base_sparsity"))
        named[1001, "the dense network"] = axes.axhline(0, color="black", lw=1)
        stop = {"color": "0.35", "lw": 1.2}
        if abs(deacc) <= 100:
            named[1002, "stops below this (--deacc) ..."] = axes.axhline(-deacc, ls="--", **stop)
        named[1003, "... and right of this (--base_sparsity)"] = axes.axvline(
            100 - sparsity, ls=":", **stop
        )
        axes.set_title(f"{wrapped(one['label'])}, {seeds(one)}")
        axes.grid()
        logarithmic(axes.xaxis)
        axes.set_xlabel("weights that remain (%)")
        axes.set_ylabel(f"{one['flags']['select_on']} accuracy, dense = 0 (points)")
    panels[0].invert_xaxis()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    named[1000, "the ticket"] = Line2D([], [], marker="*", ms=10, color="white", mec="black")
    lines = {words: line for (_, words), line in sorted(named.items(), key=lambda item: item[0])}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Rounds of pruning on {title(groups)}, a line for each seed", fontsize=9)
    return figure


def rounds_of(one):
    """[(task, row)] of a group's rows that hold rounds of pruning, of all seeds."""
    rows = [item for rows in one["seeds"].values() for item in sorted(rows.items())]
    return [
        (task, row)
        for task, row in rows
        if any(each["density"] > 0 for each in row.get("rounds", []))
    ]


def controls(groups):
    """Tickets beside their controls: a row of panels for each task, a column for each setting.

    Points are means, small ones single seeds.
    """
    trained = [one for one in groups if one["script"] == "main_train"]
    beaten = [one["ticket"] for one in trained if one["control"] != "none"]
    settings = [*dict.fromkeys(beaten)]
    shown = [one for one in trained if one["ticket"] in settings]
    if not shown:
        return None
    kinds = [kind for kind in utils.CONTROLS if any(one["control"] == kind for one in shown)]
    tasks = sorted({task for one in shown if one["control"] != "none" for task in one["accuracy"]})
    size = (
        8 if len(settings) < 3 else 2.8 * len(settings),
        0.9 + (0.5 + 0.26 * len(kinds)) * len(tasks),
    )
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tasks), len(settings), squeeze=False, sharey=True)
    for column, ticket in zip(panels.T, settings):
        for axes, task in zip(column, tasks):
            own = [one for one in shown if one["ticket"] == ticket and task in one["accuracy"]]
            for one in own:
                values = [*one["accuracy"][task].values()]
                y, (mean, deviation) = kinds.index(one["control"]), utils.spread(values)
                colour = GREEN if one["control"] == "none" else "0.25"
                if len(values) > 1:
                    below = [y + 0.27] * len(values)
                    axes.plot(values, below, ".", color=colour, ms=6, alpha=0.6, mew=0)
                keys = {
                    "fmt": "D" if one["control"] == "none" else "o",
                    "capsize": 3,
                    "ms": 5,
                    "lw": 1.2,
                }
                axes.errorbar(mean, y, xerr=deviation, color=colour, **keys)
                if one["control"] == "none":
                    axes.axvline(mean, color=GREEN, lw=0.8, zorder=0.5)
            counts = sorted({len(one["accuracy"][task]) for one in own}) or [0]
            count = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
            label = f"{own[0]['label']}, " * (len(settings) > 1) if own else ""
            axes.set_title(f"{label}task {task}, n = {count}", loc="left")
            axes.set_yticks(range(len(kinds)), [utils.CONTROLS[kind] for kind in kinds])
            axes.set_ylim(len(kinds) - 0.5, -0.5)
            axes.grid(axis="x")
        column[-1].set_xlabel("test accuracy, all tasks so far (%)")
    words = "; points: mean, bars: standard deviation, dots: seeds"
    several = any(len(one["seeds"]) > 1 for one in shown)
    figure.suptitle(f"Tickets and controls on {title(groups)}{words * several}", fontsize=9)
    return figure
