"""Command-line flags, in groups: each script takes those that mean something to it."""

import argparse
import functools
import math
import os
import sys
from pathlib import Path

import torch

from runtime.errors import UserError, first_line

# What main_train.py trains in place of a ticket (its apply_control), and the names in reports.
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

    def __init__(self, description, prog=None, **options):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, argv=None):
        for text in sys.argv[1:] if argv is None else argv:
            if text.endswith("=--"):  # Python 3.11 makes an empty list of this, whatever the type
                self.error(f"argument {text[:-3]}: expected one argument")
        return super().parse_args(argv)

    def error(self, message):
        if "--per_class" in message and "unrecognized" in message:
            message += (
                "; prepare a smaller dataset with dataset.py --per_class and name it in --data"
            )
        raise UserError(f"{message} (see --help)")


# ------------------------------------------------------------------------------ types of values


path = os.path.expanduser  # an argparse type: the name of a file or folder


def number(kind, low=-math.inf, high=math.inf, expected=None):
    """An argparse type: finite numbers of this kind (int or float) from `low` to `high`."""

    def convert(text):
        try:
            value = kind(text)
            if math.isfinite(value) and low <= value <= high:
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    name = "an integer" if kind is int else "a number"
    expected = expected or f"{name} >= {low}" + f" and <= {high}" * (high < math.inf)
    return convert


int_range = functools.partial(number, int)
positive = number(float, math.ulp(0), expected="a number > 0")
not_negative = number(float, 0)
share = number(float, 0, 1 - 2**-53, "a number >= 0 and < 1")
percentage = number(float, 0, 100)
finite = number(float, expected="a number")


def int_list(text):
    """An argparse type: integers >= 0, separated by commas: '60,80'."""
    return [int_range(0)(item) for item in text.split(",") if text]


# ------------------------------------------------------------------------------ groups of flags

BATCH_SIZE = {
    "type": int_range(1),
    "default": 256,
    "metavar": "N",
    "help": f"batch size; in tasks 2, 3, ... split into four sub-batches {DEFAULT}",
}


def training_parser(description, save_dir, datasets, backbones):
    """A parser with the flags of every script that trains.

    save_dir: text for the default of --save_dir. datasets, backbones: the names to choose from.
    """
    parser = Parser(description)
    add_data_flags(parser, datasets)
    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=int_range(1), default=100, metavar="N", help=f"epochs per task {DEFAULT}")
    flag("--batch_size", **BATCH_SIZE)
    flag("--lr", type=positive, default=0.01, metavar="X", help=f"learning rate {DEFAULT}")
    message = f"epochs after which the learning rate is divided by 10 {DEFAULT}"
    flag("--decreasing_lr", type=int_list, default="60,80", metavar="E,E", help=message)
    flag("--momentum", type=share, default=0.9, metavar="X", help=f"SGD momentum {DEFAULT}")
    message = f"weight decay, applied to all parameters {DEFAULT}"
    flag("--weight_decay", type=not_negative, default=5e-4, metavar="X", help=message)
    message = "exemplars per class (default: all that the dataset has, 100 as published)"
    flag("--exemplars", type=int_range(1), metavar="N", help=message)
    message = f"pool images that each exemplar queries for lottery teaching {DEFAULT}"
    at_least_one = int_range(1, expected="an integer >= 1 (for no teaching: --no_teaching)")
    flag("--unlabel_num", type=at_least_one, default=50, metavar="N", help=message)
    message = "train with exemplars alone, without unlabeled images (an ablation of the paper)"
    flag("--no_teaching", action="store_true", help=message)
    message = (
        "in tasks 2, 3, ... BatchNorm normalizes new, old and unlabeled images of a batch "
        "together (default: separately, as published)"
    )
    flag("--merge_batchnorm", action="store_true", help=message)
    flag("--seed", type=int_range(0), default=0, metavar="N", help=f"random seed {DEFAULT}")
    add_network_flags(parser, backbones)
    flag = parser.add_argument_group("files").add_argument
    message = f"where the run's files go (default {save_dir})"
    flag("--save_dir", type=path, metavar="DIR", help=message)
    message = "queried images and soft labels (default <save_dir>/data)"
    flag("--save_data_path", type=path, metavar="DIR", help=message)
    message = "start over: remove what this script's run has written (default: resume it)"
    flag("--overwrite", action="store_true", help=message)
    message = "also write the curves of metrics.csv for TensorBoard (needs the package tensorboard)"
    flag("--tensorboard", action="store_true", help=message)
    message = f"batches between updates of the loss in the progress bar {DEFAULT}"
    flag("--print_freq", type=int_range(1), default=50, metavar="N", help=message)
    return parser


def add_data_flags(parser, datasets):
    """Which dataset (a name in `datasets`), and how its classes are divided into tasks."""
    flag = parser.add_argument_group("dataset and tasks").add_argument
    flag("--dataset", choices=datasets, help="default cifar10; folder: your own images")
    message = "prepared or published dataset (default data/<dataset>); see dataset.py"
    flag("--data", type=path, metavar="DIR", help=message)
    message = "number of tasks (default: the dataset's)"
    flag("--classifiers", type=int_range(1), metavar="T", help=message)
    message = "classes per task (default: the dataset's)"
    same = int_range(1, expected="an integer >= 1, the same for all tasks")
    flag("--classes_per_classifier", type=same, metavar="C", help=message)
    message = (
        "published (default; the permutation of seed 1993 where none was published), sorted, "
        "random:SEED, or a file with a class name or id per line"
    )
    flag("--class_order", type=path, metavar="ORDER", help=message)


def add_network_flags(parser, backbones):
    """The network (a name in `backbones`) and the device it runs on."""
    group = parser.add_argument_group("network and device")
    flag = group.add_argument
    message = "resnet18, the paper's (default), or resnet32, the CIFAR network of iCaRL and others"
    flag("--arch", choices=backbones, help=message)
    message = "channels of the first layer (default 64 for resnet18, 16 for resnet32)"
    flag("--width", type=int_range(1), metavar="N", help=message)
    message = (
        "precision of the backbone: fp32 (default), or bf16 (autocast), about three times as "
        "fast on a CPU with AMX; weights, statistics, heads and pruning scores are always fp32"
    )
    flag("--precision", choices=("fp32", "bf16"), default="fp32", help=message)
    message = "cpu, cuda, cuda:N or mps (default: cuda:<--gpu>, else mps, else cpu)"
    device = group.add_mutually_exclusive_group().add_argument
    device("--device", metavar="DEVICE", help=message)
    device("--gpu", type=int_range(0), metavar="N", help="CUDA device (default 0)")
    message = (
        "the same bits every time on CUDA too, at some cost of speed (a CPU always gives them)"
    )
    flag("--deterministic", action="store_true", help=message)


def add_pruning_flags(parser, title, criteria):
    """What main_TD and main_BU share; criteria: names of scores.

    Returns the add_argument of the group, for more flags.
    """
    flag = parser.add_argument_group(title).add_argument
    message = f"share of the remaining weights that one pruning removes {DEFAULT}"
    flag("--percent", type=share, default=0.2, metavar="SHARE", help=message)
    message = "score whose smallest weights are pruned: magnitude (default), or random, a control"
    flag("--criterion", choices=criteria, default="magnitude", help=message)
    message = f"epochs of retraining after a pruning, at lr/100 {DEFAULT}"
    flag("--iter_epochs", type=int_range(0), default=30, metavar="N", help=message)
    return flag


def add_state_flag(flag, description, default="the last"):
    """--state t, one of the tasks; flag: the add_argument of a parser or group."""
    flag("--state", type=int_range(1), metavar="t", help=f"{description} (default: {default})")


# ------------------------------------------------------------------------------ filling in


# what a file of ours knows and a flag must not contradict
KNOWN = "dataset", "arch", "width", "classifiers", "classes_per_classifier", "class_order"


def adopt(args, known, source):
    """Fill in what a file of ours knows of its network, dataset and tasks.

    known: the `args` in the file `source` (runtime.checkpoint.ARGS); None: it is not ours. Says
    which. Raises UserError where a flag contradicts the file.
    """
    origin = "as the file has them" if known else "as given or by default, as the file does not say"
    print(f"{source}: {', '.join(f'--{key}' for key in KNOWN)} {origin}")
    if known is None:
        return
    for key in KNOWN[:-1]:
        given = getattr(args, key)
        if given is not None and given != known[key]:
            raise UserError(f"--{key} {given}: {source} has --{key} {known[key]}; remove --{key}")
        setattr(args, key, known[key])
    args.class_order = args.class_order or known["class_order"]


def finalize_args(args, save_dir=None):
    """Check --state, --batch_size and the folders, and fill in the defaults that depend on others.

    args: with the number of tasks filled in. save_dir: the default of --save_dir, with {} for the
    name of the dataset; None for a script that trains nothing. Raises UserError.
    """
    args.arch = args.arch or "resnet18"
    last = getattr(args, "state", None) or args.classifiers
    if "state" in args:
        args.state = last
    if last > args.classifiers:
        raise UserError(f"--state {last}: expected a task from 1 to {args.classifiers}")
    if save_dir is None:
        return
    if last > 1 and args.batch_size // 4 < last:
        raise UserError(
            f"--batch_size {args.batch_size}: a quarter of it is divided among {last} tasks; "
            f"expected at least {4 * last}"
        )
    if args.merge_batchnorm and last == 1:
        raise UserError("--merge_batchnorm: task 1 has no sub-batches; remove --merge_batchnorm")
    args.save_dir = args.save_dir or save_dir.format(args.dataset)
    args.save_data_path = args.save_data_path or str(Path(args.save_dir) / "data")


def pick_device(args):
    """The torch.device of --device and --gpu. Raises UserError if there is no such device.

    With --deterministic PyTorch then uses no operation that may give other bits another time.
    """
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        # we read no memory that was not written: filling it costs a launch for each new tensor
        torch.utils.deterministic.fill_uninitialized_memory = False
    if args.device:
        name = args.device
    elif torch.cuda.is_available() or args.gpu:  # --gpu 0, the published default, is as none
        name = f"cuda:{args.gpu or 0}"
    else:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected cpu, cuda, cuda:N or mps")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        given = f"--device {name}" if args.device else f"--gpu {args.gpu or 0}"
        raise UserError(f"{given}: {first_line(error)}; try --device cpu") from None
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
