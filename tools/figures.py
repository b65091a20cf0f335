"""The figures of tools/report.py, drawn from its frames."""

import json
import math
import os
import textwrap
import warnings
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # a notebook's own may be missing here, which stops the import

import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from runtime.errors import one_line
from runtime.files import atomic_write
from runtime.records import LOSS_TERMS

LOSSES = ["loss", *LOSS_TERMS]
FIGURE4 = Path(__file__).parent.parent / "data" / "figure4.json"
CAPTIONS = {
    "accuracy": "Accuracy after each task; mean ± standard deviation",
    "controls": "Tickets (vertical line) and controls; mean ± standard deviation",
    "curves": "Losses and validation accuracy, task after task (dotted); means over seeds",
    "confusion": "Classes predicted after the last task, in percent of each class",
}
# safe for color-blind readers (Okabe & Ito 2008)
COLORS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"]
MARKERS = "osD^vPX*<>"
OPTIONS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name starts no formula
    "savefig.dpi": 120,
    "savefig.bbox": "tight",
}


def draw(out, states, epochs, confusions):
    """Write {name}.png of the figures for which there is something to draw; returns the names.

    states, epochs, confusions: those of state_frame(), epoch_frame() and confusion_frames().
    """
    # whatever the user's matplotlibrc says, and without warnings of glyphs that the font lacks
    with matplotlib.style.context(["default", OPTIONS]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = accuracy(states), controls(states), curves(epochs), confusion(confusions)
        figures = {name: figure for name, figure in zip(CAPTIONS, drawn, strict=True) if figure}
        for name, figure in figures.items():
            figure.suptitle(f"{CAPTIONS[name]}\n{title(states)}", fontsize=10)
            atomic_write(out / f"{name}.png", figure.savefig)
    return [*figures]


def title(states):
    """The datasets and networks of the runs."""
    found = states[["dataset", "arch", "width"]].drop_duplicates().itertuples(index=False)
    return one_line("; ".join(f"{d}, {arch} of width {width}" for d, arch, width in found))


def panel_grid(number, across, height):
    """A figure with `number` panels, up to `across` in a row of `height` inches, and the panels."""
    across = min(number, across)
    down = math.ceil(number / across)
    figure = Figure(figsize=(7, 1 + height * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[number:]:
        axes.set_axis_off()
    return figure, panels[:number]


def accuracy(states):
    """Accuracy after each task, and below it the density of the model that was tested, as in the
    paper's Figure 4, whose curves are drawn too.
    """
    states = states[states["control"] == "none"]
    if states.empty:
        return None
    columns = {"mean": "test accuracy, all tasks so far (%)"}
    if states["density"].nunique() > 1:
        columns["density"] = "remaining weights (%)"
    figure, panels = panel_grid(len(columns), 1, 3)
    runs = [*states.groupby("run", observed=True)]
    for place, (run, rows) in enumerate(runs):
        shift = 0.04 * (place - (len(runs) - 1) / 2)  # side by side
        style = {"color": f"C{place}", "marker": MARKERS[place % len(MARKERS)]}
        style["label"] = f"{run} (n = {rows['seed'].nunique()})"
        if rows["script"].isin(["main_train", "test"]).any():  # models of their own: no line
            style["linestyle"] = "none"
        for axes, column in zip(panels, columns):
            if column == "density" and rows[column].min() == 100:
                continue
            found = rows.groupby("after")[column].agg(["mean", "std"])
            axes.errorbar(found.index + shift, found["mean"], found["std"], **style)
    if {*zip(states["dataset"], states["tasks"], states["classes"])} == {("cifar10", 5, 2)}:
        paper = json.loads(FIGURE4.read_text("utf-8"))["cifar10"]
        for name, line in (("TR-BU", ":"), ("TD", "--")):
            label = f"{name} of the paper (read off its Figure 4), {paper[name]['density']:.2f} %"
            panels[0].plot(range(1, 6), paper[name]["accuracy"], line, color="0.6", label=label)
    for axes, label in zip(panels, columns.values()):
        axes.set_ylabel(label)
        axes.grid()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "density" in columns:
        panels[1].sharex(panels[0])
        panels[1].set_yscale("log")
        panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[1].yaxis.set_major_formatter(ScalarFormatter())
        panels[1].yaxis.set_minor_formatter(NullFormatter())
    panels[-1].set_xlabel("task")
    handles, labels = panels[0].get_legend_handles_labels()
    long = max(map(len, labels)) > 60
    if long:  # one below the other
        figure.set_figheight(figure.get_figheight() + 0.2 * len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if long else 2)
    return figure


def controls(states):
    """Retrained tickets and their controls, a panel for each run and task."""
    trained = states[states["script"] == "main_train"].groupby(["run", "after"], observed=True)
    groups = [(name, rows) for name, rows in trained if rows["control"].nunique() > 1]
    if not groups:
        return None
    figure, panels = panel_grid(len(groups), 1, 1.8)
    for axes, ((run, task), rows) in zip(panels, groups):
        found = rows.groupby("trained", observed=True)["mean"].agg(["mean", "std"])
        axes.errorbar(found["mean"], [*found.index], xerr=found["std"], fmt="o")
        axes.axvline(found["mean"].get("the ticket", math.nan), color="C0", lw=0.8)
        axes.invert_yaxis()
        axes.set_title(f"{run}, task {task}, n = {rows['seed'].nunique()}", loc="left")
        axes.set_xlabel("test accuracy, all tasks so far (%)")
        axes.grid(axis="x")
    return figure


def curves(epochs):
    """Learning curves: the loss and its parts (not weighted), and the validation accuracy on the
    classes so far, all tasks one after the other.
    """
    if epochs.empty:
        return None
    groups = [*epochs.groupby("curve", sort=False)]
    figure, panels = panel_grid(2 * len(groups), 2, 1.9)
    for left, right, (name, rows) in zip(panels[::2], panels[1::2], groups):
        means = rows.groupby(["task", "epoch"])[[*LOSSES, "accuracy"]].mean()
        places = np.arange(1, len(means) + 1)
        left.plot(places, means[LOSSES], label=LOSSES)
        left.set_title(name, loc="left")
        left.set_ylabel("loss")
        right.plot(places, means["accuracy"])
        right.set_ylabel("accuracy (%)")
        for axes in (left, right):
            for start in places[means.index.get_level_values("epoch") == 1]:
                axes.axvline(start - 0.5, color="0.6", lw=0.7, ls=":")
            axes.grid(axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[-2:]:
        axes.set_xlabel("epoch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def confusion(confusions):
    """What the images of each class (a row) are predicted as, in percent of the class."""
    if not confusions:
        return None
    figure, panels = panel_grid(len(confusions), 2, 3.2)
    for axes, (run, shares) in zip(panels, confusions.items()):
        image = axes.imshow(shares, "cividis", vmin=0, vmax=100)
        short_lines = textwrap.fill(run, 40, break_on_hyphens=False)
        axes.set(title=short_lines, xlabel="predicted", ylabel="class")
        if len(shares) <= 20:
            names = [one_line(name)[:14] for name in shares.index]
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
        if len(shares) <= 10:
            for (y, x), share in np.ndenumerate(shares):
                color = "white" if share < 55 else "black"
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=figure.axes, label="images of the class (%)", shrink=0.5, aspect=40)
    return figure
