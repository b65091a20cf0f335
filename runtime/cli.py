"""Command-line flags, in groups: each script takes those that mean something to it."""

import argparse
import math
import os
import shlex
from pathlib import Path

from runtime.errors import UserError, first_line

# What main_train.py trains in place of a ticket (its take_control), and the names in reports.
CONTROLS = {
    "none": "the ticket",
    "random_mask": "random mask",
    "shuffle_mask": "shuffled mask",
    "reinit": "new network",
    "shuffle_weights": "shuffled weights",
    "dense": "dense, no mask",
}
DEFAULT = "(default %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors and whose help keeps the docstring's lines."""

    def __init__(self, description, prog=None):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        if message.endswith("expected one argument"):
            flag = message.removeprefix("argument ").partition(":")[0]
            message += f", one that begins with a dash as {flag}=VALUE"
        raise UserError(f"{message} (--help lists the flags)")


# ------------------------------------------------------------------------------ types of values


def quoted(text):
    """What was typed, shortened for a message."""
    return repr(text if len(text) <= 50 else text[:50] + "...")


def path(text):
    """An argparse type: the name of a file or folder, whether it exists or not."""
    try:
        os.lstat(text)
        return text
    except (FileNotFoundError, NotADirectoryError):
        if text:
            return text
        reason = "found nothing"
    except OSError as error:
        reason = f"found {quoted(text)} ({first_line(error)})"
    raise argparse.ArgumentTypeError(f"{reason}, give the name of a file or folder")


def int_range(low, high=2**63 - 1):
    """An argparse type: integers from `low` to `high`."""

    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            most = "" if high == 2**63 - 1 else f" and at most {high}"
            raise argparse.ArgumentTypeError(
                f"found {quoted(text)}, give an integer of at least {low}{most}"
            )
        return value

    return convert


def float_range(description, accept):
    """An argparse type: finite numbers for which accept(value) holds; description: which."""

    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not accept(value):
            raise argparse.ArgumentTypeError(f"found {quoted(text)}, give {description}")
        return value

    return convert


# PyTorch rejects factors beyond float32
positive = float_range("a number above 0 and below 1e38", lambda v: 0 < v < 1e38)
not_negative = float_range("a number of at least 0 and below 1e38", lambda v: 0 <= v < 1e38)
share = float_range("a share from 0 to below 1", lambda v: 0 <= v < 1)
percentage = float_range("a percentage from 0 to 100", lambda v: 0 <= v <= 100)
finite = float_range("a number", lambda v: True)


def image_side(text):
    """An argparse type: a multiple of 8 from 16 to 128."""
    if not text.isdecimal() or int(text) not in range(16, 129, 8):
        raise argparse.ArgumentTypeError(f"found {quoted(text)}, give a multiple of 8, 16 to 128")
    return int(text)


def nonempty(text):
    """An argparse type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("found nothing, give a value")
    return text


def flag_text(text):
    """An argparse type: flags of another command, as they are typed in a shell."""
    try:
        shlex.split(text)
    except ValueError as error:
        reason = f"found {quoted(text)} ({first_line(error)}), close the quotation"
        raise argparse.ArgumentTypeError(reason) from None
    return text


def int_list(text):
    """An argparse type: integers of at least 0, separated by commas: '60,80'."""
    try:
        return [int_range(0)(item) for item in text.split(",") if text]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or several separated by commas") from None


# ------------------------------------------------------------------------------ groups of flags


def training_parser(description, save_dir, datasets, backbones, queries=True):
    """A parser with the flags of every script that trains.

    save_dir: text for the default of --save_dir. datasets, backbones: the names to choose from.
    queries: as in add_teaching_flags.
    """
    parser = Parser(description)
    add_data_flags(parser, datasets)
    add_teaching_flags(parser, queries)
    add_file_flags(parser, save_dir)
    add_training_flags(parser)
    add_network_flags(parser, backbones)
    return parser


def add_data_flags(parser, datasets):
    """Which data set (a name in `datasets`) and where it comes from: for dataset.py and scripts.

    The --source, --image_size and --unlabeled of a prepared set must be those it was made with; it
    needs no --raw.
    """
    flag = parser.add_argument_group("data").add_argument
    flag(
        "--dataset",
        default="cifar10",
        metavar="NAME",
        help=f"{', '.join(datasets)} (default cifar10); folder: your own images",
    )
    flag(
        "--data",
        type=path,
        metavar="DIR",
        help="prepared or published data set (default data/<dataset>)",
    )
    flag(
        "--raw",
        type=path,
        metavar="PATH",
        help="folder of the official files (or tiny-imagenet-200.zip), so that nothing is "
        "downloaded; only to prepare the set, like --source, --image_size and --unlabeled",
    )
    flag(
        "--source",
        type=path,
        metavar="DIR",
        help="for --dataset folder: DIR/train/<class>/*, DIR/test/<class>/* and an optional pool "
        "DIR/unlabeled/*, in any format that Pillow reads",
    )
    flag(
        "--image_size",
        type=image_side,
        metavar="N",
        help="for --dataset folder: resize to NxN, a multiple of 8 from 16 to 128 (default 32)",
    )
    flag(
        "--unlabeled",
        nargs="+",
        type=path,
        metavar="PATH",
        help="the pool: .npy or .npz of uint8 [n,H,W,3], the published pickle, or a folder of "
        "images; several are joined (default: the set's own)",
    )
    flag(
        "--classifiers", type=int_range(1), metavar="T", help="number of tasks (default: the set's)"
    )
    flag(
        "--classes_per_classifier",
        type=int_range(1),
        metavar="C",
        help="classes per task (default: the set's)",
    )
    flag(
        "--class_order",
        type=nonempty,
        metavar="ORDER",
        help="published (default; the permutation of seed 1993 where none was published), sorted, "
        "random:SEED, or a file with a class name or id per line",
    )


def add_teaching_flags(parser, queries=True):
    """Lottery teaching. queries: whether the script queries the pool itself."""
    flag = parser.add_argument_group("lottery teaching").add_argument
    if queries:
        flag(
            "--unlabel_num",
            type=int_range(1),
            default=50,
            metavar="N",
            help=f"pool images that each exemplar queries {DEFAULT}",
        )
    flag(
        "--no_teaching",
        action="store_true",
        help="train with exemplars alone, without unlabeled images (an ablation of the paper)",
    )


def add_file_flags(parser, save_dir):
    """Where a run's files go; save_dir: the default of --save_dir, for the help."""
    flag = parser.add_argument_group("files").add_argument
    flag(
        "--save_dir",
        type=path,
        metavar="DIR",
        help=f"where the run's files go (default {save_dir})",
    )
    flag(
        "--save_data_path",
        type=path,
        metavar="DIR",
        help="queried images and soft labels (default <save_dir>/data)",
    )
    flag(
        "--checkpoint_seconds",
        type=not_negative,
        default=60,
        metavar="S",
        help="maximum seconds of training between two checkpoints, from which the same command "
        f"resumes {DEFAULT}",
    )
    flag(
        "--tensorboard",
        action="store_true",
        help="also write the curves of metrics.csv as TensorBoard events, beside it (needs the "
        "package tensorboard)",
    )
    flag(
        "--overwrite",
        action="store_true",
        help="start over: remove what this script's run has written to --save_dir (default: "
        "resume it)",
    )


def add_training_flags(parser):
    """How a task is trained."""
    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=int_range(1), default=100, metavar="N", help=f"per task {DEFAULT}")
    add_batch_size_flag(flag)
    flag("--lr", type=positive, default=0.01, metavar="X", help=f"learning rate {DEFAULT}")
    flag(
        "--decreasing_lr",
        type=int_list,
        default="60,80",
        metavar="E,E",
        help=f"epochs after which the learning rate is divided by 10 {DEFAULT}",
    )
    below_one = float_range("a number from 0 to below 1", lambda v: 0 <= v < 1)
    flag("--momentum", type=below_one, default=0.9, metavar="X", help=f"of SGD {DEFAULT}")
    message = f"of SGD, also on BatchNorm and heads {DEFAULT}"
    flag("--weight_decay", type=not_negative, default=5e-4, metavar="X", help=message)
    flag(
        "--merge_batchnorm",
        action="store_true",
        help="in tasks 2, 3, ... BatchNorm normalizes new, old and unlabeled images of a step "
        "together (default: separately, as published)",
    )
    flag(
        "--print_freq",
        type=int_range(1),
        default=50,
        metavar="N",
        help=f"batches between updates of the loss in the progress bar {DEFAULT}",
    )
    flag("--seed", type=int_range(0), default=0, metavar="N", help=f"random seed {DEFAULT}")


def add_batch_size_flag(flag):
    """flag: the add_argument of a group."""
    message = f"images a batch; training divides it into four sub-batches after task 1 {DEFAULT}"
    flag("--batch_size", type=int_range(1), default=256, metavar="N", help=message)


def add_network_flags(parser, backbones):
    """The network (a name in `backbones`) and the device it runs on."""
    flag = parser.add_argument_group("network and device").add_argument
    flag(
        "--arch",
        choices=backbones,
        default="resnet18",
        help="resnet18, the paper's (default), or resnet32, the CIFAR network of iCaRL and others",
    )
    flag(
        "--width",
        type=int_range(1, 4096),
        metavar="N",
        help="channels of the first layer (default 64 for resnet18, 16 for resnet32)",
    )
    flag(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision of the backbone: fp32 (default), or bf16 (autocast), about three times as "
        "fast on a CPU with AMX; weights, statistics, heads and pruning scores are always fp32",
    )
    flag(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (cuda:<--gpu>, else mps, else cpu), cpu, cuda, cuda:N or mps (default auto)",
    )
    flag(
        "--gpu",
        type=int_range(0),
        metavar="N",
        help="CUDA device for --device auto or cuda (default 0; under torchrun each process takes "
        "its own)",
    )
    flag(
        "--deterministic",
        action="store_true",
        help="the same bits every time on a CUDA device too, at some cost of speed (a CPU gives "
        "them anyway)",
    )


def add_pruning_flags(parser, title, criteria):
    """What main_TD and main_BU share; criteria: names of scores.

    Returns the add_argument of the group, for more flags.
    """
    flag = parser.add_argument_group(title).add_argument
    flag(
        "--percent",
        type=share,
        default=0.2,
        metavar="SHARE",
        help=f"share of the remaining weights that one pruning removes {DEFAULT}",
    )
    flag(
        "--criterion",
        choices=criteria,
        default="magnitude",
        help="score whose smallest weights are pruned: magnitude (published, default), or random, "
        "a control",
    )
    flag(
        "--iter_epochs",
        type=int_range(0),
        default=30,
        metavar="N",
        help=f"epochs of retraining after a pruning, at lr/100 {DEFAULT}",
    )
    return flag


def add_state_flag(flag, description, default="the last"):
    """--state t, one of the tasks; flag: the add_argument of a parser or group."""
    flag("--state", type=int_range(1), metavar="t", help=f"{description} (default: {default})")


# ------------------------------------------------------------------------------ filling in


def finalize_args(args, save_dir=None):
    """Check --state, --batch_size and the folders, and fill in the defaults that depend on others.

    args: with the number of tasks filled in. save_dir: the default of --save_dir, with {} for the
    name of the data set; None for a script that trains nothing. Raises UserError.
    """
    last = getattr(args, "state", None) or args.classifiers
    if "state" in args:
        args.state = last
    if last > args.classifiers:
        raise UserError(f"--state {last}: give a task from 1 to {args.classifiers}")
    if save_dir is not None:
        check_batch_size(args, last)
        if args.merge_batchnorm and last == 1:
            raise UserError("--merge_batchnorm: task 1 has no sub-batches to merge; leave it out")
        args.save_dir = args.save_dir or save_dir.format(args.dataset)
        args.save_data_path = args.save_data_path or str(Path(args.save_dir) / "data")
    for key in ("save_dir", "save_data_path"):
        if not getattr(args, key, None):
            continue
        folder = Path(getattr(args, key))
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        if not existing.is_dir():
            raise UserError(f"--{key} {folder}: {existing} is a file, give another folder")


def check_batch_size(args, last):
    """Raise UserError if a batch is too small for the sub-batches of task `last`."""
    if last > 1 and args.batch_size // 4 < last:
        raise UserError(
            f"--batch_size {args.batch_size}: a quarter of it is divided among {last} tasks, "
            f"give at least {4 * last}"
        )
