"""Classify pictures of your own with a packed file or a checkpoint.

    python -m tools.classify --pretrained pretrained/BU_ticket.npz photo.jpg drawing.png

Prints the likeliest classes of each picture and their probabilities, by the balanced heads of the
tasks that the network has learned. A picture, in any format that Pillow reads, is cropped to its
center square and resized to the network's input (bicubic), as in a data set of your own images. The
network knows no other classes than those of its data set: it finds one in any picture. A
checkpoint needs the results.json of its run beside it.
"""

import runtime.threads  # isort: skip  # noqa: F401  (OpenMP reads its settings with torch)

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets.images import read_image
from runtime import cli
from runtime.errors import UserError, one_line
from runtime.process import run_script
from tools.export import Predictor
from tools.pack import read_network, require, resolve_state


def make_parser():
    parser = cli.Parser(__doc__, "python -m tools.classify")
    flag = parser.add_argument
    flag("images", type=cli.path, nargs="+", metavar="IMAGE", help="picture to classify")
    message = "packed file, or checkpoint in the folder of its run"
    flag("--pretrained", type=cli.path, required=True, metavar="FILE", help=message)
    message = f"classes to show of each picture {cli.DEFAULT}"
    flag("--top", type=cli.int_range(1, 10), default=3, metavar="N", help=message)
    cli.add_state_flag(flag, "choose among the classes of tasks 1..t", "those that it has learned")
    return parser


def probabilities(model, images, header, state):
    """Softmax over the balanced heads 1..state: uint8 [n,H,W,3] to float32 [n, state*c]."""
    predict = Predictor(model, header, state)
    with torch.inference_mode():
        logits = [predict(batch) for batch in torch.from_numpy(images).split(256)]
    return torch.cat(logits).softmax(1)


def table(names, shares, classes, top):
    """The `top` likeliest classes of each picture, as lines of text.

    names: of the n pictures; shares: float [n, k], probabilities of the k classes.
    """
    top = min(top, len(classes))
    width = max(5, *map(len, names))
    cell = max(11, *(len(name) + 9 for name in classes))
    heads = ["class", "2nd", "3rd", *(f"{number}th" for number in range(4, top + 1))][:top]
    lines = ["image".ljust(width) + "".join(f"  {head:<{cell}}" for head in heads)]
    for name, row in zip(names, shares):
        best = row.topk(top)
        cells = (f"{classes[i]} {100 * p:.1f} %" for p, i in zip(best.values, best.indices))
        lines.append(f"{name:<{width}}" + "".join(f"  {text:<{cell}}" for text in cells))
    return "\n".join(line.rstrip() for line in lines)


def main(argv=None):
    args = make_parser().parse_args(argv)
    header, model = read_network(args.pretrained)
    require(args.pretrained, header, "mean", "std", "image_size")
    height, side = header["image_size"]
    if height != side:
        raise UserError(f"--pretrained {args.pretrained}: takes images that are not square")
    state = resolve_state(args, header)
    count = state * header["classes_per_classifier"]
    ids = header["class_order"] or range(count)
    classes = header["class_names"] or [f"class {c}" for c in ids]
    classes = [one_line(name, 40) for name in classes[:count]]
    paths = [Path(name) for name in args.images]
    bar = tqdm(paths, "images", disable=None, leave=False)
    images = np.stack([read_image(path.parent, path.name, side) for path in bar])
    shares = probabilities(model, images, header, state)
    print(table([one_line(path) for path in paths], shares, classes, args.top))
    return shares


if __name__ == "__main__":
    run_script(main)
