"""Checkpoints: ours and the published ones, read without running any code that they may hold.

A checkpoint of ours holds `args`, what one must know to use it: the network, the dataset, the class
order, the last task that it has learned. So do mask files and raw state dicts, beside the tensors.
"""

import pickle
import warnings
import zipfile

import torch

from runtime import packed
from runtime.errors import UserError, first_line
from runtime.files import atomic_write

# What `args` in a checkpoint holds.
ARGS = {
    "arch": str,
    "width": int,
    "classifiers": int,
    "classes_per_classifier": int,
    "dataset": str,
    "class_order": list,  # ids
    "class_names": list,  # in this order
    "image_size": list,  # height, width
    "mean": list,  # of the channels, in [0,1]
    "std": list,
    "state": (int, type(None)),  # the last task that it has learned; None: not trained
}
PREFIXES = "module.", "_orig_mod."  # of DataParallel and torch.compile


def describe(args, data, state=None):
    """The `args` of a checkpoint of this run, after task `state`."""
    return {
        "arch": args.arch,
        "width": args.width,
        "classifiers": data.classifiers,
        "classes_per_classifier": data.classes_per_classifier,
        "dataset": args.dataset,
        "class_order": data.order,
        "class_names": [str(data.names.get(c, c)) for c in data.order],
        "image_size": list(data.image_size),
        "mean": data.mean.flatten().tolist(),
        "std": data.std.flatten().tolist(),
        "state": state,
    }


def save_checkpoint(path, content):
    """torch.save, atomically. Returns the file's SHA-256."""
    return atomic_write(path, lambda file: torch.save(content, file))


class Stub(dict):
    """Stands in for an object of a pickle: accepts arguments, items and a state; does nothing."""

    __hash__ = object.__hash__

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# What published checkpoints hold beside tensors and plain values: the optimizer as an object, and
# in those of others an accuracy as a NumPy scalar.
PUBLISHED_NAMES = [
    (Stub, "torch.optim.sgd.SGD"),
    (Stub, "torch.optim.optimizer._RequiredParameter"),
    (lambda *_: {}, "collections.defaultdict"),  # torch.load puts items into plain dicts only
    (dict, "builtins.dict"),
    (Stub, "numpy.dtype"),
    (Stub, "numpy.core.multiarray.scalar"),
    (Stub, "numpy._core.multiarray.scalar"),
]


def load_checkpoint(path):
    """Read a checkpoint: ours, a published one, or a raw state dict; tensors on the CPU.

    Returns the dict in the file. Only tensors, plain values and PUBLISHED_NAMES are unpickled.
    Raises UserError if there is no such file or it is not a checkpoint.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(PUBLISHED_NAMES):
            warnings.simplefilter("ignore")  # an error is one line
            content = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # PyTorch does not verify the checksums
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, pickle.UnpicklingError) and error.__context__:
            error = error.__context__  # without the advice to load the file unsafely
        reason = first_line(error).partition(". ")[0]
        raise UserError(f"{path}: is not a readable checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a checkpoint")
    return content


def read_weights(path):
    """What a file knows of its run, and its tensors: (args, state dict).

    path: a checkpoint of ours or a published one, a raw state dict, a mask file, or a packed file.
    args: see ARGS; None in a file that is not ours. Raises UserError.
    """
    if packed.is_packed(path):
        args, state = packed.read(path)
        return check_args(args, path), state
    content = load_checkpoint(path)
    args = content.pop("args", None)
    nested = (content.get(key) for key in ("state_dict", "model", "net"))
    state = next((each for each in nested if isinstance(each, dict)), content)
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict; choose a checkpoint")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    # of parameters and subclasses the plain tensors
    state = {key: value.detach().clone() for key, value in state.items()}
    return (None if args is None else check_args(args, path)), state


def check_args(args, path):
    """args as they are. Raises UserError unless they are as ARGS says."""
    known = args if isinstance(args, dict) else {}
    for key, kind in ARGS.items():
        if not isinstance(known.get(key, ...), kind):
            raise UserError(f"{path}: its args have no valid {key!r}; choose an intact file")
    return known
