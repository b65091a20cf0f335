"""Draw the picture of the method: a ticket that shrinks from task to task and one that grows.

    python -m tools.method_figure

Budgets and densities are those of the paper's Figure 4 on CIFAR-10, classes in the published order.
One version of Matplotlib writes the same bytes each time.
"""

import random
from itertools import accumulate, pairwise, product
from math import nan

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from runtime.cli import Parser, path
from runtime.files import atomic_write
from runtime.process import run_script

CLASSES = ["truck, ship", "horse, automobile", "dog, airplane", "cat, deer", "frog, bird"]
SCHEDULE = [1, 1, 3, 4, 5]  # top-down: prunings of 20 % at each task
SHRINKING = [100 * 0.8**prunings for prunings in accumulate(SCHEDULE)]  # density in percent
GROWING = [2.81, 3.11, 3.40, 3.64, 3.64]  # bottom-up: 16 prunings, then the paper's re-growths

# lengths are pixels of a picture that is 800 wide; y points downward
WIDTH, HEIGHT = 800, 595
CARD, GAP, LEFT = 116, 45, 20  # a task's network, the arrow to the next one, the margin
CARDS = [LEFT + t * (CARD + GAP) for t in range(len(CLASSES))]
LAYERS = [5, 8, 8, 5]  # nodes of a drawn network
INK, GRAY, FAINT, LINE = "#1f2328", "#59636e", "#e2e6ea", "#c9d1d9"
BLUE, GREEN, ORANGE, PURPLE, LILAC = "#0969b8", "#00805a", "#d9480f", "#8250df", "#b794f6"
# letters drawn as paths look alike where the font is missing; the salt makes the file reproducible
OPTIONS = {"svg.fonttype": "path", "svg.hashsalt": "method", "path.simplify": False}


def text(ax, x, y, content, size=11, color=INK, weight="normal", align="center"):
    ax.text(x, y, content, size=size, color=color, weight=weight, ha=align, va="baseline")


def box(ax, x, y, width, height, face="white", edge="none", radius=6, line=1):
    style = f"round,pad=0,rounding_size={radius}"
    patch = FancyBboxPatch((x, y), width, height, style, fc=face, ec=edge, lw=line)
    ax.add_artist(patch).set_clip_path(None)


def panel(ax, y, height, color, face, name, about, note=""):
    box(ax, 8, y, WIDTH - 16, height, face, radius=10)
    text(ax, LEFT, y + 24, name, 15, color, "bold", "left")
    text(ax, LEFT + (103 if len(name) < 10 else 170), y + 24, about, 11, GRAY, align="left")
    text(ax, WIDTH - LEFT, y + 24, note, 11, GRAY, align="right")


def arrow(ax, x, y, length, color=GRAY):
    style = {"color": color, "lw": 1.5, "ms": 6, "markevery": [1], "clip_on": False}
    ax.plot([x, x + length - 3], [y, y], ">-", **style)


def squares(ax, points, side, face, edge):
    ax.plot(*zip(*points), "s", ms=side, mfc=face, mec=edge, clip_on=False)


def image_stack(ax, x, y):
    """Unlabeled images: the mark of lottery teaching."""
    squares(ax, [(x + shift, y - shift) for shift in (3, 0, -3)], 11, "#efe6ff", PURPLE)


def segments(ax, pairs, color, line):
    """Draw lines between pairs of points, joined where they can be, for a short SVG path."""
    points, left = [(nan, nan)], list(pairs)
    while left:
        end = points[-1]
        pair = next((pair for pair in left if end in pair), left[0])
        left.remove(pair)
        if end in pair:
            points.append(pair[0] if pair[1] == end else pair[1])
        else:
            points += [(nan, nan), *pair]
    ax.plot(*zip(*points), color=color, lw=line, solid_capstyle="round", clip_on=False)


def dots(ax, points, color, size):
    """Draw nodes as very short round lines: in SVG a tenth of the bytes of markers."""
    segments(ax, [((x, y), (x + 0.01, y)) for x, y in points], color, size)


def ranked_edges():
    """All edges of a network, whole paths from input to output first: (layer, node, next node)."""
    rng, edges = random.Random(11), {}
    while len(edges) < sum(n * m for n, m in pairwise(LAYERS)):
        nodes = [rng.randrange(n) for n in LAYERS]
        edges |= dict.fromkeys(zip(range(len(LAYERS)), nodes, nodes[1:]))
    return list(edges)


def network(ax, corner, width, height, groups, size=5):
    """Draw a network in a rectangle: groups of (edges, color, line width), other nodes faint."""
    spots, across, down = {}, width / (len(LAYERS) - 1), height / max(LAYERS)
    for layer, n in enumerate(LAYERS):
        top = corner[1] + down * (max(LAYERS) - n + 1) / 2
        spots |= {(layer, k): (corner[0] + across * layer, top + down * k) for k in range(n)}
    colors = dict.fromkeys(spots, FAINT)
    for edges, color, line in groups:
        ends = [((layer, a), (layer + 1, b)) for layer, a, b in edges]
        segments(ax, [(spots[a], spots[b]) for a, b in ends], color, line)
        colors |= {end: color for pair in ends for end in pair if colors[end] == FAINT}
    dots(ax, spots.values(), "white", size + 1)
    for color in dict.fromkeys(colors.values()):
        dots(ax, [spots[node] for node in spots if colors[node] == color], color, size)


def tickets(ax, y, color, densities, budgets, scale=1):
    """Draw a network for each task, density and budget below it; scale: edges drawn for each."""
    edges = ranked_edges()
    counts = [round(scale * density / 100 * len(edges)) for density in densities]
    for t, (x, density, kept) in enumerate(zip(CARDS, densities, counts)):
        old = min(kept, counts[max(t - 1, 0)])
        mark, line = (ORANGE, 1.6) if kept > old else (None, 1)
        box(ax, x, y, CARD, 104, edge=mark or LINE, line=line)
        groups = (edges[kept:], FAINT, 0.5), (edges[:old], color, 1), (edges[old:kept], ORANGE, 2)
        network(ax, (x + 13, y + 4), CARD - 26, 96, groups)
        box(ax, x, y + 111, CARD, 5, "#d8dee4", radius=2)
        box(ax, x, y + 111, CARD * density / 100, 5, color, radius=1.5)
        percent = f"{density:.2f}".removesuffix(".00") + " %"
        text(ax, x + CARD / 2, y + 137, percent, 15, INK, "bold")
        text(ax, x + CARD / 2, y + 156, budgets[t], 11, mark or GRAY)
        if t:
            arrow(ax, x - GAP + 5, y + 52, GAP - 10)
            image_stack(ax, x - GAP / 2, y + 33)


def teaching(ax, y):
    """Draw teacher -> queried unlabeled images -> soft labels -> next task."""
    edges, rng = ranked_edges()[:60], random.Random(8)
    for x, label in ((40, "model of task t"), (664, "model of task t + 1")):
        network(ax, (x, y), 96, 56, [(edges, INK, 0.8)], size=4)
        text(ax, x + 48, y + 73, label)
    for x, label in ((148, "queries"), (388, "labels"), (588, "distills")):
        arrow(ax, x, y + 28, 64, PURPLE)
        text(ax, x + 30, y + 21, label, 10, GRAY)
    pool = [(232 + 14 * column, y + 7 + 14 * row) for column, row in product(range(11), range(4))]
    squares(ax, pool, 11, "#eceff2", "#cdd3d9")
    squares(ax, [each for each in pool if rng.random() < 0.25], 11, LILAC, PURPLE)
    text(ax, 302, y + 73, "unlabeled images near exemplars")
    for bottom in (y + 16, y + 36, y + 56):  # a queried image and its soft label
        squares(ax, [(485, bottom - 7)], 14, LILAC, PURPLE)
        heights = [2 + 12 * rng.random() ** 2 for _ in range(6)]
        ax.bar(range(507, 567, 10), [-tall for tall in heights], 7, bottom, color=PURPLE)
    text(ax, 521, y + 73, "soft labels")


def draw():
    """The whole picture as a Matplotlib figure."""
    figure = Figure((WIDTH / 72, HEIGHT / 72), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    for t, (x, classes) in enumerate(zip(CARDS, CLASSES)):
        text(ax, x + CARD / 2, 18, f"task {t + 1}", 13, weight="bold")
        text(ax, x + CARD / 2, 34, classes, 11, GRAY)
    about = "each pruning drops 20 % of what is left (schedule 1,1,3,4,5); the rest is rewound"
    panel(ax, 44, 206, BLUE, "#f1f7fd", "Top-down", about, "% of weights kept")
    tickets(ax, 82, BLUE, SHRINKING, [f"×{n} pruning{'s' * (n > 1)}" for n in SCHEDULE])
    for x in CARDS[1:]:
        text(ax, x - GAP / 2, 151, "rewind", 10, GRAY)
    about = "re-grows where it falls a point of accuracy below the dense network"
    panel(ax, 257, 206, GREEN, "#f0f9f5", "Bottom-up", about, "edges drawn ×5")
    growth = [f"re-grows +{b - a:.2f} %" if b > a else "mask kept" for a, b in pairwise(GROWING)]
    tickets(ax, 295, GREEN, GROWING, ["×16 prunings", *growth], 5)
    about = "each model keeps the old classes alive in the next one"
    panel(ax, 470, 123, PURPLE, "#f8f5ff", "Lottery teaching", about)
    image_stack(ax, 174, 489)
    teaching(ax, 509)
    ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    ax.axis("off")
    return figure


def main(argv=None):
    parser = Parser(__doc__, "python -m tools.method_figure")
    message = "the SVG file to write (default %(default)s)"
    parser.add_argument("--out", type=path, metavar="FILE", default="docs/method.svg", help=message)
    args = parser.parse_args(argv)
    with matplotlib.style.context(["default", OPTIONS]):
        figure, metadata = draw(), {"Date": None, "Creator": None}
        atomic_write(args.out, lambda file: figure.savefig(file, format="svg", metadata=metadata))
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
