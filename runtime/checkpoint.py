"""Checkpoints: ours and the published ones, read without running any code that they may hold."""

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import torch

from runtime import packed
from runtime.errors import UserError, first_line
from runtime.files import atomic_write, check_archive, is_archive


def save_checkpoint(path, content):
    """torch.save, atomically. Tensors are written as CPU ones, which load anywhere.

    Returns the file's SHA-256.
    """
    return atomic_write(path, lambda file: torch.save(to_cpu(content), file))


def to_cpu(content):
    """Nested dicts and lists with their tensors on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if isinstance(content, dict):
        return {key: to_cpu(value) for key, value in content.items()}
    if isinstance(content, list):
        return [to_cpu(value) for value in content]
    return content


class Stub(dict):
    """Stands in for any object of a pickle: accepts arguments, items and a state; does nothing."""

    __hash__ = object.__hash__

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# What published checkpoints hold beside tensors and plain values: the optimizer as an object.
PUBLISHED_NAMES = [
    (Stub, "torch.optim.sgd.SGD"),
    (Stub, "torch.optim.optimizer._RequiredParameter"),
    (lambda *_: {}, "collections.defaultdict"),  # torch.load puts items into plain dicts only
    (dict, "builtins.dict"),
]


def load_checkpoint(path):
    """Read a checkpoint: ours, a published one, or a raw state dict; tensors on the CPU.

    Returns the dict in the file. Only tensors, plain values and PUBLISHED_NAMES are unpickled.
    Raises UserError if there is no such file or it is not a checkpoint.
    """
    try:
        check_archive(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(PUBLISHED_NAMES):
            warnings.simplefilter("ignore")  # an error is one line
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not is_archive(path):
            check_legacy_storages(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, give a checkpoint") from None
    except Exception as error:  # a hostile or damaged file can raise anything
        if Path(path).suffix == ".npz":
            raise UserError(f"{path}: not a packed file of tools.pack, give another file") from None
        if isinstance(error, UserError):
            raise
        if isinstance(error, pickle.UnpicklingError) and error.__context__:
            error = error.__context__  # without the advice to load the file unsafely
        reason = first_line(error).partition(". ")[0]
        raise UserError(
            f"{path}: not a readable checkpoint ({reason}), give another file"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, give a checkpoint or state dict")
    return dict(dict.items(content))  # the methods of an OrderedDict can be the file's


def check_legacy_storages(path):
    """Raise UserError for a file of before PyTorch 1.6 that lacks the values of some tensors.

    torch.load leaves in them what was in memory. It must have accepted the file's pickles before.
    """
    with open(path, "rb") as file:
        for _ in range(3):  # magic number, protocol, system
            StorageKeys(file).load()
        content = StorageKeys(file)
        content.load()
        stored = StorageKeys(file).load()
    if not content.keys <= set(stored):
        raise UserError(f"{path}: lacks the values of some tensors, give an intact copy")


class StorageKeys(pickle._Unpickler):
    """Collects the keys of the storages that a pickle names; any object in it becomes a Stub.

    In Python, as arrays.ArraysUnpickler is.
    """

    def __init__(self, file):
        super().__init__(file)
        self.keys = set()

    def find_class(self, module, name):
        return Stub

    def persistent_load(self, saved_id):
        self.keys.add(saved_id[2])
        return Stub()


def read_state_dict(path):
    """The state dict of a checkpoint ({'state_dict': ...}, or raw) or of a packed file."""
    if packed.is_packed(path):
        header, state = packed.read(path)
        if packed.is_shrunk(header):
            raise UserError(
                f"{path}: is a shrunk network, which can only be evaluated; give the file that "
                f"it was made from"
            )
        return state
    return state_dict_of(load_checkpoint(path), path)


def state_dict_of(content, path):
    """The state dict in the content of a checkpoint. Raises UserError, naming its path."""
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds no state dict, give a checkpoint")
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in dict.items(state)):
        raise UserError(
            f"{path}: holds no state dict (something in it is not a named tensor), "
            f"give a checkpoint"
        )
    for key, value in dict.items(state):
        unusual = value.is_meta or value.is_quantized or value.is_nested
        if unusual or value.layout is not torch.strided:
            raise UserError(f"{path}: {key} is not a plain tensor, give another file")
    return OrderedDict(dict.items(state))
