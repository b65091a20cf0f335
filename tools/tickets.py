"""Pack checkpoints into small files, export them to ONNX, and classify pictures of your own.

    python -m tools.tickets pack TD_cifar10/task6_best_model.pt --out ticket.npz
    python -m tools.tickets export ticket.npz --out model.onnx
    python -m tools.tickets classify --pretrained ticket.npz photo.jpg drawing.png

export and classify take checkpoints and packed files. A published checkpoint does not say its
network and classes: pack it first, with the flags that do (docs/tickets.md).
"""

import json
import os
import warnings
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import dataset
import pruning_utils
from datasets.images import read_image
from models import BACKBONES, build_model
from runtime import args as flags
from runtime import packed
from runtime.checkpoint import describe, read_weights
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.process import run_script

TOLERANCE = 1e-3  # largest difference allowed, on the scale of the logits; about 1e-6 is usual


def make_parser():
    parser = flags.Parser(__doc__, "python -m tools.tickets")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, text):
        command = commands.add_parser(name, description=text, help=text)
        return command, command.add_argument

    packing, flag = add("pack", "Write a packed file.")
    flag("source", type=flags.path, metavar="CHECKPOINT", help="checkpoint to pack")
    flag("--out", type=flags.path, required=True, metavar="FILE", help="file to write, .npz")
    flag("--state", type=flags.int_range(1), metavar="t", help="last task that it has learned")
    flag("--arch", choices=BACKBONES, help="default resnet18")
    flag("--width", type=flags.int_range(1), metavar="N", help="default 64 or 16")
    flags.add_data_flags(packing, dataset.DATASETS)

    _, flag = add("export", "Write an .onnx file.")
    flag("source", type=flags.path, metavar="TICKET", help="checkpoint or packed file")
    flag("--out", type=flags.path, required=True, metavar="FILE", help="file to write, .onnx")
    flags.add_state_flag(flag, "choose among the classes of tasks 1..t", "those learned")

    _, flag = add("classify", "Print the likeliest classes of pictures.")
    flag("images", type=flags.path, nargs="+", metavar="IMAGE", help="picture to classify")
    message = "checkpoint or packed file"
    flag("--pretrained", dest="source", type=flags.path, required=True, help=message)
    flag("--top", type=flags.int_range(1, 10), default=3, help=f"classes to show {flags.DEFAULT}")
    flags.add_state_flag(flag, "choose among the classes of tasks 1..t", "those learned")
    return parser


class Predictor(nn.Module):
    """Images uint8 [n,H,W,3], RGB, to logits float32 [n,classes] of the balanced heads 1..state.

    args: as in a checkpoint; state: by default the last task that it has learned. class_names: in
    the order of the logits.
    """

    def __init__(self, model, args, state=None):
        super().__init__()
        self.model, self.state = model, state or args["state"] or args["classifiers"]
        self.class_names = args["class_names"][: self.state * args["classes_per_classifier"]]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(args[name]).view(3, 1, 1))

    def forward(self, images):
        x = images.permute(0, 3, 1, 2).to(torch.float32) / 255
        return self.model((x - self.mean) / self.std, self.state, main_fc=True)


def load(path, state=None):
    """The args and the Predictor of a checkpoint or packed file. Raises UserError."""
    args, tensors = read_weights(path)
    if args is None:
        raise UserError(
            f"{path}: does not say its network and classes; pack it first: python -m tools.tickets "
            f"pack {path} --dataset NAME --out ticket.npz"
        )
    if (state or 1) > args["classifiers"]:
        raise UserError(f"--state {state}: expected a task from 1 to {args['classifiers']}")
    model = build_model(Namespace(**args, precision="fp32"))
    pruning_utils.load_state(model, tensors, source=path)
    return args, Predictor(model, args, state).eval()


# ------------------------------------------------------------------------------ pack


def pack(given):
    """Write a packed file. Returns its header."""
    if packed.is_packed(given.source):
        raise UserError(f"{given.source}: is packed already; choose a checkpoint")
    args, tensors = read_weights(given.source)
    extra = [name for name in ("data", "class_order", "state") if vars(given)[name] is not None]
    if args and extra:
        raise UserError(f"--{extra[0]}: {given.source} says its classes; remove --{extra[0]}")
    flags.adopt(given, args, given.source)
    if args is None:  # a published file: the flags and the prepared dataset describe it
        dataset.resolve_tasks(given)
        flags.finalize_args(given)
        given.width = given.width or BACKBONES[given.arch].default_width
        data = dataset.load(given, torch.device("cpu"), pool=False, splits=("test",))
        args = describe(given, data, given.state)
    model = build_model(Namespace(**args, precision="fp32"))
    pruning_utils.load_state(model, tensors, source=given.source)
    packed.write(given.out, args, model.state_dict())
    header = packed.read_header(given.out)
    print(f"{args['arch']}, width {args['width']}: {header['density']:.2f} % of its weights")
    sizes = [os.path.getsize(path) for path in (given.source, given.out)]
    print(f"written: {given.out}, {sizes[1]:,} bytes ({given.source}: {sizes[0]:,})")
    return header


# ------------------------------------------------------------------------------ export


def export(given):
    """Write an .onnx file, if it computes what PyTorch does. Returns its metadata."""
    if Path(given.out).suffix != ".onnx":
        raise UserError(f"--out {given.out}: expected a name that ends in .onnx")
    if not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise UserError("export needs the package onnx: pip install -r requirements-extra.txt")
    args, predictor = load(given.source, given.state)
    for conv in pruning_utils.convolutions(predictor.model).values():
        if torch_prune.is_pruned(conv):
            torch_prune.remove(conv, "weight")  # the product of weight and mask becomes the weight
    names, shape = predictor.class_names, (*args["image_size"], 3)
    metadata = args | {"state": predictor.state, "class_names": names}
    metadata["class_order"] = args["class_order"][: len(names)]
    images = torch.randint(0, 256, (65, *shape), dtype=torch.uint8)
    content = to_onnx(predictor, images[:2], metadata)
    compare(content, predictor, images, given.out)
    atomic_write(given.out, lambda file: file.write(content))
    print(f"input images: uint8 {['n', *shape]}, RGB; output logits: float32 {['n', len(names)]}")
    print(f"written: {given.out}, {len(content):,} bytes")
    return metadata


def to_onnx(predictor, example, metadata):
    """The bytes of an .onnx file. example: images uint8 [2,H,W,3]; metadata: {name: value}."""
    import onnx

    options = {"input_names": ["images"], "output_names": ["logits"], "verbose": False}
    options["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=1)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        model = torch.onnx.export(predictor, (example,), dynamo=True, **options).model_proto
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    onnx.helper.set_model_props(model, texts)
    return model.SerializeToString()


def compare(content, predictor, images, out):
    """Print how far an .onnx file is from PyTorch. Raises UserError, naming out, if too far."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = predictor(images)
    difference = float((expected - torch.from_numpy(found)).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(f"--out {out}: differs from PyTorch by {difference:.1e}; not written")
    print(f"largest difference to PyTorch on {len(images)} random images: {difference:.1e}")


# ------------------------------------------------------------------------------ classify


def classify(given):
    """Print the likeliest classes of pictures. Returns the probabilities, float32 [n,classes]."""
    args, predictor = load(given.source, given.state)
    images = [read_image(Path(name), args["image_size"][0]) for name in given.images]
    with torch.inference_mode():
        batches = torch.from_numpy(np.stack(images)).split(256)
        shares = torch.cat([predictor(batch) for batch in batches]).softmax(1)
    for name, row in zip(given.images, shares):
        best = row.topk(min(given.top, len(row)))
        likeliest = zip(best.values.tolist(), best.indices.tolist())
        cells = [f"{predictor.class_names[i]} {100 * share:.1f} %" for share, i in likeliest]
        print(f"{name}: {', '.join(cells)}")
    return shares


def main(argv=None):
    given = make_parser().parse_args(argv)
    if "out" in given and os.path.realpath(given.out) == os.path.realpath(given.source):
        raise UserError(f"--out {given.out}: is the file to read; choose another name")
    return {"pack": pack, "export": export, "classify": classify}[given.command](given)


if __name__ == "__main__":
    run_script(main)
