"""Export a checkpoint or packed file to ONNX, or to a file of torch.export.

    python -m tools.export TD_cifar10/task6_best_model.pt --out model.onnx
    python -m tools.export ticket.npz --shrink --out model.onnx
    python -m tools.export ticket.npz --out model.pt2

ONNX makes a network portable, not faster: runtimes compute a masked convolution as a dense one.
--shrink removes what can be removed exactly (docs/export.md).

input   images: uint8 [n,H,W,3], RGB; any n; normalization is part of the network.
        With --float_input, float32 from 0 to 1
output  logits: float32 [n,classes], by the balanced heads of the tasks learned (or of --state)

The names of these classes are in the metadata, as JSON (class_names; in a .pt2 file, in the extra
file metadata.json). Before anything is written, the result is compared with the network in PyTorch,
on test images of its data set if that is prepared here, otherwise on random images. An .onnx file
needs the packages onnx and onnxscript, and onnxruntime for the comparison
(requirements-extra.txt).
"""

import dataset  # isort: skip  (before torch: it settles the threads)

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from tqdm import tqdm

import pruning_utils
import utils
from datasets.prepare import holds_set, read_set
from runtime import cli, packed
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.process import run_script
from tools.pack import (
    add_describing_flags,
    read_network,
    refuse_overwriting,
    require,
    resolve_state,
    savings,
    shrink,
)

COMPARED = 500  # images
TOLERANCE = 1e-3  # largest difference allowed, on the scale of the logits; about 1e-6 is usual


def make_parser():
    parser = cli.Parser(__doc__, "python -m tools.export")
    flag = parser.add_argument
    flag("checkpoint", type=cli.path, metavar="CHECKPOINT", help="checkpoint, or packed file")
    message = "file to write, .onnx or .pt2"
    flag("--out", type=cli.path, metavar="FILE", required=True, help=message)
    message = "export a narrower network that computes the same, as tools.pack --shrink makes it"
    flag("--shrink", action="store_true", help=message)
    flag("--float_input", action="store_true", help="images of float32 in place of uint8")
    flag("--no_check", action="store_true", help="do not compare the result with PyTorch")
    cli.add_state_flag(flag, "choose among the classes of tasks 1..t", "those that it has learned")
    add_describing_flags(parser)
    return parser


def parse(argv):
    args = make_parser().parse_args(argv)
    refuse_overwriting(args)
    if Path(args.out).suffix not in (".onnx", ".pt2"):
        raise UserError(f"--out {args.out}: give a name that ends in .onnx or .pt2")
    if args.out.endswith(".onnx"):
        more = ["onnxruntime"] * (not args.no_check)
        require_onnx(f"--out {args.out}", more, " (or give --no_check)")
    return args


def require_onnx(flag, more, otherwise=""):
    """Raise UserError, naming `flag`, unless what writes ONNX and the packages `more` are there.

    otherwise: what to do where only those of `more` are missing.
    """
    needed = ["onnx", "onnxscript", *more]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        advice = otherwise if missing == more else ""
        raise UserError(
            f"{flag}: needs the packages {' and '.join(missing)}{advice}, type: pip install -r "
            f"requirements-extra.txt"
        )


class Predictor(nn.Module):
    """Images [n,H,W,3] to the logits [n,classes] of the balanced heads 1..state.

    The images are uint8, or float32 in [0,1].
    """

    def __init__(self, model, header, state):
        super().__init__()
        self.model, self.state = model, state
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(header[name]).view(3, 1, 1))

    def forward(self, images):
        x = images.permute(0, 3, 1, 2)
        if not x.is_floating_point():
            x = x.to(torch.float32) / 255
        return self.model((x - self.mean) / self.std, self.state, main_fc=True)


def bake_masks(model):
    """Make the effective weights of a masked model its only ones."""
    for conv in pruning_utils.convolutions(model).values():
        if torch_prune.is_pruned(conv):
            torch_prune.remove(conv, "weight")


# ------------------------------------------------------------------------------ formats


def to_pt2(predictor, example, metadata):
    """The bytes of a .pt2 file. example: images [2,H,W,3]."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(predictor, (example,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
    return file.getvalue()


def to_onnx(predictor, example, metadata):
    """The bytes of an .onnx file. example: images [2,H,W,3]."""
    import onnx

    program = torch.onnx.export(
        predictor,
        (example,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
    )
    model = program.model_proto
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    onnx.helper.set_model_props(model, texts)
    return model.SerializeToString()


def load_exported(name, content):
    """A function of images [n,H,W,3] that runs an exported file; name: the file's."""
    if name.endswith(".pt2"):
        return torch.export.load(io.BytesIO(content)).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@contextlib.contextmanager
def quiet():
    """The exporters warn of their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------ comparison


def pick_images(args, header, state, count=COMPARED):
    """About `count` images, uint8 [n,H,W,3], and what they are, as text. Raises UserError.

    args: Namespace of checkpoint and data.
    """
    name, order, size = header["dataset"], header["class_order"], tuple(header["image_size"])
    spec = dataset.DATASETS.get(name)
    folder = spec and (spec.embedded or dataset.set_folder(Namespace(dataset=name, data=args.data)))
    if args.data and (not spec or spec.embedded):
        reason = f"{name} is part of this repository" if spec else "the name of its set is unknown"
        raise UserError(f"--data {args.data}: {reason}, leave the flag out")
    if spec and order and (spec.embedded or args.data or holds_set(name, folder)):
        arrays, _, _ = read_set(name, folder, pool=False, parts=("test",))
        order = order[: state * header["classes_per_classifier"]]
        found = dataset.check_arrays(folder, arrays, None, order)[:2]
        if found != size:
            raise UserError(
                f"--data {folder}: found images of {list(found)}, {args.checkpoint} takes "
                f"{list(size)}; name its own set"
            )
        images = torch.from_numpy(np.concatenate([arrays["test"][c] for c in order]))
        return images[:: max(1, len(images) // count)], f"test images of {folder}"
    shape = COMPARED, *size, 3
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=utils.stream(0, "images"))
    return images, f"random images (no prepared {name or 'data'} set here, name it with --data)"


def compare(predictor, run, images):
    """The largest difference of the logits, their largest magnitude, and images classed alike.

    run: what load_exported() returns. The batches are of several sizes.
    """
    expected, found = [], []
    batches = [images[:1], *images[1:].split(64)]
    with torch.inference_mode():
        for batch in tqdm(batches, "comparing", disable=None, leave=False):
            expected.append(predictor(batch))
            found.append(run(batch))
    expected, found = torch.cat(expected), torch.cat(found)
    same = int((expected.argmax(1) == found.argmax(1)).sum())
    return float((expected - found).abs().max()), float(expected.abs().max()), same


def check(args, predictor, content, images, what):
    """Print how far an exported file is from PyTorch. Raises UserError if that is too far.

    content: the bytes of the file; images, what: from pick_images().
    """
    images = images / 255 if args.float_input else images
    with quiet():
        run = load_exported(args.out, content)
    difference, scale, same = compare(predictor, run, images)
    print(
        f"compared with PyTorch on {len(images)} {what}: largest difference {difference:.1e} (the "
        f"logits go up to {scale:.3g}), the same class for {same} of {len(images)}"
    )
    if not difference <= TOLERANCE * max(1.0, scale):
        raise UserError(f"--out {args.out}: differs too much from PyTorch, not written")


# ------------------------------------------------------------------------------ the command


def describe_exported(header, state):
    """The metadata of an export that chooses among the classes of tasks 1..state, a dict."""
    known = {key: value for key, value in header.items() if key != "shapes" and value is not None}
    if state != header["state"]:
        known.pop("accuracy", None)  # was measured among other classes
    classes = state * header["classes_per_classifier"]
    chosen = {key: known[key][:classes] for key in ("class_order", "class_names") if key in known}
    return known | chosen | {"state": state}


def main(argv=None):
    args = parse(argv)
    data = None if packed.is_packed(args.checkpoint) else args.data  # it tells its set itself
    header, model = read_network(
        args.checkpoint, Namespace(**vars(args) | {"data": data, "mask": None, "state": None})
    )
    require(args.checkpoint, header, "mean", "std", "image_size")
    state = resolve_state(args, header)
    images, what = (None, None) if args.no_check else pick_images(args, header, state)
    bake_masks(model)
    predictor = Predictor(model, header, state)
    exported = predictor
    if args.shrink:
        if packed.is_shrunk(header):
            raise UserError(f"{args.checkpoint}: is shrunk already, leave out --shrink")
        header, shrunk = shrink(args.checkpoint, header, model)
        print(savings(model, shrunk))
        exported = Predictor(shrunk.eval(), header, state)
    classes = state * header["classes_per_classifier"]
    height, width = header["image_size"]
    dtype = "float32" if args.float_input else "uint8"
    example = torch.zeros(2, height, width, 3, dtype=getattr(torch, dtype))
    with quiet():
        write = to_onnx if args.out.endswith(".onnx") else to_pt2
        content = write(exported, example, describe_exported(header, state))
    if not args.no_check:
        check(args, predictor, content, images, what)
    atomic_write(args.out, lambda file: file.write(content))
    print(f"input images: {dtype} [n,{height},{width},3], RGB")
    print(f"output logits: float32 [n,{classes}]")
    print(f"written: {args.out}, {len(content):,} bytes")
    return header


if __name__ == "__main__":
    run_script(main)
