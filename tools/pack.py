"""Pack a checkpoint into a small file, which test.py and main_train.py read like a checkpoint.

    python -m tools.pack TD_cifar10/task6_best_model.pt --out ticket.npz
    python -m tools.pack BU_cifar10/task4_best_model.pt --mask BU_cifar10/mask-5.pt --out ticket.npz
    python -m tools.pack ticket.npz --unpack --out checkpoint.pt
    python -m tools.pack ticket.npz --shrink --out shrunk.npz

A packed file holds a bit for each weight of a pruned convolution and the values of those that
remain, compressed; all else as it is (docs/tickets.md). Weights outside the mask become 0, which
changes no output; everything else comes back bit for bit. The file also tells the network, the data
set with its class order, names and normalization, the accuracy, and the command of the run, as far
as the run's folder records them.

--shrink removes the channels that no weight leads to, or from, and makes a narrower dense network
that computes the same (docs/export.md). It can only be evaluated: test.py, tools.classify and
tools.export take it, main_train.py does not. A table shows what it saves.
"""

import dataset  # isort: skip  (before torch: it settles the threads)

import contextlib
import json
import lzma
import os
import re
import shlex
import zlib
from argparse import Namespace
from pathlib import Path

from tqdm import tqdm

import pruning_utils
from datasets.prepare import read_embedded, read_meta
from models import build_model
from models.base import dense_state
from models.cost import layers_of, macs, parameters, weights
from models.shrink import shrink_network
from runtime import cli, packed
from runtime.checkpoint import load_checkpoint, save_checkpoint, state_dict_of
from runtime.errors import UserError, first_line
from runtime.files import file_checksum
from runtime.process import run_script
from runtime.run import record_paths

DESCRIBING = ("dataset", "data", "class_order", "state")  # flags


def make_parser():
    parser = cli.Parser(__doc__, "python -m tools.pack")
    flag = parser.add_argument
    flag("checkpoint", type=cli.path, metavar="CHECKPOINT", help="checkpoint, or packed file")
    flag("--out", type=cli.path, metavar="FILE", required=True, help="file to write")
    flag("--mask", type=cli.path, metavar="M", help="put it under this mask, as main_train.py does")
    flag(
        "--half",
        action="store_true",
        help="convolution weights as float16: half the size, and no longer the same values",
    )
    flag("--unpack", action="store_true", help="write a checkpoint, with the header as 'packed'")
    flag("--shrink", action="store_true", help="write a narrower dense network, see above")
    flag(
        "--compare",
        action="store_true",
        help="also show what zip and xz make of CHECKPOINT (a minute or two at width 64)",
    )
    flag = add_describing_flags(parser)
    cli.add_state_flag(flag, "the last task that it has learned", "that in the file's name")
    return parser


def add_describing_flags(parser):
    """The flags that name a checkpoint's set. Returns the add_argument of their group."""
    flag = parser.add_argument_group("where no run's folder tells").add_argument
    flag("--dataset", metavar="NAME", help=f"{', '.join(dataset.DATASETS)}")
    flag("--data", type=cli.path, metavar="DIR", help="the prepared set (default data/<dataset>)")
    flag("--class_order", type=cli.nonempty, metavar="ORDER", help="as in the other scripts")
    return flag


def refuse_overwriting(args):
    """Raise UserError if --out is CHECKPOINT itself."""
    with contextlib.suppress(OSError):  # one of them does not exist
        if os.path.samefile(args.out, args.checkpoint):
            raise UserError(f"--out {args.out}: is CHECKPOINT itself, name another file")


# ------------------------------------------------------------------------------ what is known


def read_network(path, flags=None):
    """The header (packed.FIELDS) and the model of a packed file or checkpoint.

    The model is on the CPU, in eval mode.
    flags: Namespace of DESCRIBING and mask; None: none was given. Raises UserError.
    """
    flags = flags or Namespace(**dict.fromkeys((*DESCRIBING, "mask")))
    if packed.is_packed(path):
        header, state = packed.read(path)
        if packed.is_shrunk(header):
            return header, packed.shrunk_net(header, state).eval()
    else:
        content = load_checkpoint(path)
        header, state = content.get("packed"), state_dict_of(content, path)
    try:
        network = packed.describe_network(state)
    except ValueError as error:
        raise UserError(f"{path}: {error}, give another file") from None
    model = build_model(Namespace(**network, precision="fp32")).eval()
    masks = pruning_utils.load_masks(flags.mask) if flags.mask else None
    if masks:
        pruning_utils.check_masks(model, masks, f"--mask {flags.mask}")
    pruning_utils.load_state(model, state, masks, source=path)
    found = network | {"density": pruning_utils.density(pruning_utils.masks_of(model))}
    found["kind"] = "ticket" if masks else network["kind"]
    return describe(path, header, found, flags), model


def require(path, header, *keys):
    """Raise UserError unless a header tells these fields; path: its file."""
    for key in keys:
        if header[key] is None:
            raise UserError(
                f"{path}: {key} is unknown; give the checkpoint in the folder of its run, or name "
                f"its set with --dataset of tools.pack"
            )


def resolve_state(args, header):
    """--state, by default the last task that the network has learned. Raises UserError."""
    state = args.state or header["state"] or header["classifiers"]
    if state > header["classifiers"]:
        raise UserError(f"--state {state}: give a task from 1 to {header['classifiers']}")
    return state


def describe(path, header, found, flags):
    """The header of a checkpoint.

    header: what the file holds, if --unpack has written it, else None; found: the fields that the
    state dict tells. Raises UserError.
    """
    try:
        if header is None:
            header = {"half": False} | found | describe_run(path, Namespace(**found), flags)
        else:
            header = header | found | describe_unknown(path, header, found, flags)
        if flags.mask:
            header["accuracy"] = None  # was of another network
        packed.complete(header)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: what it or its run's records tell of it is not usable ({first_line(error)}), "
            f"give another copy"
        ) from None
    return header


def describe_unknown(path, header, found, flags):
    """The fields that a packed file lacks and the flags tell; header, found: as in describe()."""
    for key in DESCRIBING:
        field = "state" if key == "state" else "dataset"
        if (given := vars(flags)[key]) is not None and header[field] is not None:
            raise UserError(f"--{key} {given}: {path} tells it itself, leave the flag out")
    check_state(flags, found)
    told = {"state": flags.state} if flags.state else {}
    names = ("dataset", "data", "class_order")
    if any(vars(flags)[name] for name in names):
        args = Namespace(**found, **{name: vars(flags)[name] for name in names})
        told |= describe_set(path, args, {})
    return told


def check_state(flags, found):
    """Raise UserError if --state is no task of the network; found: as in describe()."""
    if (flags.state or 1) > found["classifiers"]:
        raise UserError(f"--state {flags.state}: give a task from 1 to {found['classifiers']}")


def describe_run(path, args, flags):
    """The fields of a header that the run of a checkpoint records, and else the flags tell.

    args: Namespace of what the state dict tells.
    """
    record, journal = read_records(path)
    config = record.get("config", {})
    if flags.dataset and config.get("dataset", flags.dataset) != flags.dataset:
        raise UserError(
            f"--dataset {flags.dataset}: the run of {path} is of {config['dataset']}, leave the "
            f"flag out"
        )
    args.dataset = flags.dataset or config.get("dataset")
    args.data, args.class_order = flags.data or config.get("data"), flags.class_order
    check_state(flags, vars(args))
    of_task = re.search(r"task([1-9]\d*)_", Path(path).name)
    checksum = file_checksum(path)
    command = [record["script"] + ".py", *journal["command"]] if journal.get("finished") else None
    return describe_set(path, args, record) | {
        "state": flags.state or (of_task and min(int(of_task[1]), args.classifiers)),
        "accuracy": None if flags.state else accuracy_of(path, checksum, record, journal),
        "command": command and shlex.join(command),
        "sha256": checksum,
    }


def read_records(path):
    """The results.json and the run.json of a checkpoint's run; {} where they cannot be read."""

    def read(file):
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError, RecursionError):
            return {}

    for results in record_paths(path):
        if record := read(results):
            return record, read(results.with_name(results.name.replace("results", "run")))
    return {}, {}


def accuracy_of(path, checksum, record, journal):
    """The test accuracy of a checkpoint, a list; None unless the run records it of this file."""
    name = Path(path).name
    files = [step["files"].get(name) for step in journal.get("steps", {}).values()]
    tested = r"(?:retrain_)?task(\d+)_(?:\w+_)??(best_model|best_prun_model)\.pt"
    found = re.fullmatch(tested, name)
    if checksum not in files or not found:
        return None
    dense = record["script"] == "main_BU" and found[2] == "best_model"
    rows = {row["state"]: row for row in record["states"]}
    return rows.get(int(found[1]), {}).get("dense_accuracy" if dense else "accuracy")


def describe_set(path, args, record):
    """dataset, class_order, class_names, mean, std and image_size; None where unknown."""
    keys = ("dataset", "class_order", "class_names", "mean", "std", "image_size")
    if not args.dataset:
        for name in ("data", "class_order"):
            if getattr(args, name):
                raise UserError(f"--{name} {getattr(args, name)}: give --dataset too")
        return dict.fromkeys(keys)
    if args.dataset not in dataset.DATASETS:
        raise UserError(
            f"--dataset {args.dataset}: unknown; give one of {', '.join(dataset.DATASETS)}"
        )
    spec, classes = dataset.DATASETS[args.dataset], args.classifiers * args.classes_per_classifier
    meta = read_embedded(args.dataset)[2] if spec.embedded else read_meta(dataset.set_folder(args))
    names = {int(c): name for c, name in meta.get("names", {}).items()}
    total = len(names) or spec.classes or classes
    if classes > total:
        raise UserError(f"--dataset {args.dataset}: has {total} classes, {path} has {classes}")
    order = dataset.class_order(args, names, total, path)[:classes]
    side = None if spec.from_source else spec.side
    return {
        "dataset": args.dataset,
        "class_order": order,
        "class_names": [names[c] for c in order] if names else record.get("class_names"),
        "mean": [*spec.mean] if spec.mean else meta.get("mean"),
        "std": [*spec.std] if spec.std else meta.get("std"),
        "image_size": record.get("image_size", side and [side, side]),
    }


# ------------------------------------------------------------------------------ shrinking


def shrink(path, header, model):
    """The header and the ShrunkNet of a narrower network that computes the same as `model`.

    path: the file, for messages. Raises UserError.
    """
    require(path, header, "image_size")
    try:
        shrunk = shrink_network(model, tuple(header["image_size"]))
    except ValueError as error:
        raise UserError(f"{path}: {error}, leave out --shrink") from None
    shapes = {key: list(value.shape) for key, value in shrunk.state_dict().items()}
    return header | {"kind": "shrunk", "half": False, "shapes": shapes}, shrunk


def savings(model, shrunk):
    """What a ShrunkNet saves, as lines of text."""
    columns = []
    for each in (model, shrunk):
        layers = layers_of(each, shrunk.size)
        counts = len(layers) - 1, weights(layers), parameters(each), macs(layers)
        columns.append(counts)
    names = "convolutions", "convolution weights", "parameters", "multiply-accumulates"
    lines = [f"{'':<20}  {'before':>15}  {'shrunk':>15}"]
    for name, before, after in zip(names, *columns):
        share = f"{100 * after / before:6.1f} %"
        lines.append(f"{name:<20}  {before:>15,}  {after:>15,}  {share}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------ sizes


def compressed_size(path, name, compressor):
    """Bytes of a file after compression."""
    size = os.path.getsize(path)
    bar = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
    with open(path, "rb") as file, tqdm(total=size, desc=name, **bar) as progress:
        written = 0
        while block := file.read(2**20):
            written += len(compressor.compress(block))
            progress.update(len(block))
    return written + len(compressor.flush())


def sizes(args, model):
    """The sizes of all forms of a network, as lines of text."""
    state, given = model.state_dict(), args.checkpoint
    forms = {"weights": dense_state(state), "weights and masks": state}
    rows = {name: sum(each.nbytes for each in form.values()) for name, form in forms.items()}
    rows[f"given: {given}"] = os.path.getsize(given)
    if args.compare:
        rows["  compressed by zip"] = compressed_size(given, "zip", zlib.compressobj(9))
        rows["  compressed by xz"] = compressed_size(given, "xz", lzma.LZMACompressor())
    rows[f"written: {args.out}"] = os.path.getsize(args.out)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {size:>14,} bytes" for name, size in rows.items())


# ------------------------------------------------------------------------------ the command


def main(argv=None):
    args = make_parser().parse_args(argv)
    refuse_overwriting(args)
    if args.unpack and os.path.exists(args.checkpoint) and not packed.is_packed(args.checkpoint):
        raise UserError(f"{args.checkpoint}: not a packed file, leave out --unpack")
    if args.unpack and (args.half or args.mask or args.shrink):
        raise UserError("--unpack: leave out --half, --mask and --shrink")
    if args.shrink and args.half:
        raise UserError("--shrink: leave out --half, a shrunk network is float32")
    header, model = read_network(args.checkpoint, args)
    if packed.is_shrunk(header):
        raise UserError(f"{args.checkpoint}: is a shrunk network, give the file it was made from")
    if args.shrink:
        header, shrunk = shrink(args.checkpoint, header, model)
        packed.write(args.out, header, shrunk.state_dict())
    elif args.unpack:
        save_checkpoint(args.out, {"state_dict": model.state_dict(), "packed": header})
    else:
        header["half"] |= args.half
        packed.write(args.out, header, model.state_dict())
    unknown = [key for key in header if header[key] is None]
    half = ", convolution weights as float16" * header["half"]
    network = f"{header['kind']}, {header['arch']}, width {header['width']}"
    print(f"{network}: {header['density']:.2f} %{half}")
    print(f"unknown: {', '.join(unknown) or 'nothing'}")
    if args.shrink:
        print(savings(model, shrunk))
    print(sizes(args, model))
    return header


if __name__ == "__main__":
    run_script(main)
