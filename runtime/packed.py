"""Packed files: a network as a compressed .npz, a ticket at a few percent of its size.

header               uint8: JSON in UTF-8, an object of format, version, args (as a checkpoint has
                     them), density (percent)
<conv>.weight_mask   uint8 [ceil(n/8)]: np.packbits of a mask of n zeros and ones
<conv>.weight_orig   float32 [k]: the k weights that remain, in the order of the weight's elements
<key>                each other tensor of the state dict, as it is; of a dense network that is all

Weights outside the mask are not kept and come back as 0. All shapes follow from the args.
"""

import json
from argparse import Namespace

import numpy as np
import torch

from models import build_model
from models.base import MASK, ORIG
from runtime.errors import explain
from runtime.files import atomic_write, check_zip

FORMAT, VERSION = "lifelong-tickets", 2


def write(path, args, state):
    """Write a packed file atomically. Returns its SHA-256 in hex.

    args: as in a checkpoint; state: its state dict, dense or as torch.nn.utils.prune names it.
    Raises UserError if it cannot be written.
    """
    arrays = {key: value.cpu().numpy() for key, value in state.items()}
    masks = {key: array != 0 for key, array in arrays.items() if key.endswith(MASK)}
    for key, mask in masks.items():
        weight = key.removesuffix(MASK) + ORIG
        arrays |= {key: np.packbits(mask), weight: arrays[weight][mask]}
    left, total = (sum(map(count, masks.values())) for count in (np.count_nonzero, np.size))
    header = {"format": FORMAT, "version": VERSION, "args": args}
    header |= {"density": 100.0 * left / total if masks else 100.0}
    content = json.dumps(header, sort_keys=True).encode()
    arrays = {"header": np.frombuffer(content, np.uint8)} | arrays  # first, see is_packed()
    return atomic_write(path, lambda file: np.savez_compressed(file, **arrays))


def is_packed(path):
    """Whether a file is a packed one by its first bytes: an archive that starts with a header."""
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError:
        return False
    return start[:4] == b"PK\3\4" and start[30:] == b"header.npy"


def read_header(path):
    """The header of a packed file, a dict. Raises UserError for a damaged or foreign file."""
    with explain(path, "is not an intact packed file"), np.load(path, allow_pickle=False) as arrays:
        header = json.loads(arrays["header"].tobytes())
        if (found := (header["format"], header["version"])) != (FORMAT, VERSION):
            raise ValueError(f"its format is {found}, expected {(FORMAT, VERSION)}")
        return header


def read(path):
    """The args and the state dict of a packed file: (dict, {name: tensor}).

    Convolutions of a ticket have <name>.weight_orig and <name>.weight_mask, both float32.
    Raises UserError for a damaged or foreign file.
    """
    args = read_header(path)["args"]
    with explain(path, "is not an intact packed file"):
        with torch.device("meta"):
            tensors = build_model(Namespace(**args, precision="fp32")).state_dict()
        # a mask has a bit for each weight, the start of an array 128 bytes
        check_zip(path, sum(t.nbytes + t.numel() // 8 + 1000 for t in tensors.values()))
        with np.load(path, allow_pickle=False) as arrays:
            return args, unpack(arrays, tensors)


def unpack(arrays, tensors):
    """The state dict in the arrays of a packed file; tensors: the dense one on the meta device."""

    def take(key, dtype, shape):
        array = arrays[key]
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{key} is {found}, expected {np.dtype(dtype)} {list(shape)}")
        return array

    state = {}
    for key, tensor in tensors.items():
        shape, name = tuple(tensor.shape), key.removesuffix(".weight")
        if name + MASK in arrays:
            bits = take(name + MASK, np.uint8, (-(-tensor.numel() // 8),))
            mask = np.unpackbits(bits, count=tensor.numel()).astype(bool).reshape(shape)
            weight = np.zeros(shape, np.float32)
            weight[mask] = take(name + ORIG, np.float32, (int(mask.sum()),))
            state |= {name + ORIG: weight, name + MASK: mask.astype(np.float32)}
        else:
            state[key] = take(key, str(tensor.dtype).removeprefix("torch."), shape)
    if unknown := set(arrays) - set(state) - {"header"}:
        raise ValueError(f"{min(unknown)} is no tensor of its network")
    return {key: torch.from_numpy(array) for key, array in state.items()}
