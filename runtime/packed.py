"""Packed files: a network as plain compressed arrays, a sparse one at a few percent of its size.

A packed file is an .npz, which np.load reads, with these arrays (docs/tickets.md):

header               uint8: JSON in UTF-8, an object of the FIELDS
<conv>.weight_mask   uint8 [ceil(n/8)], np.packbits of a mask of n zeros and ones
<conv>.weight_orig   float32 [k] (float16 if the header says half): the k weights that remain, in
                     the order of the weight's elements
<key>                each other tensor of the state dict, as it is. In a dense network that is all
                     of them; its convolution weights too are float16 if the header says half.
                     A shrunk network (models/shrink.py) is all such tensors; the header has their
                     shapes, which tell the channels of each layer

What is outside the mask is not kept: it becomes 0. All shapes follow from the header, and so does
the exact size of each array, which is checked before it is unpacked.
"""

import contextlib
import functools
import json
import math
import zipfile
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from models import BACKBONES
from models.base import MASK, ORIG, dense_state
from models.shrink import INTEGERS, ShrunkNet
from runtime.errors import UserError, first_line
from runtime.files import atomic_write, check_records

FORMAT, VERSION = "lifelong-tickets", 1
MAX_HEADER = 2**20  # bytes
MAX_STATE = 2**30  # bytes of an unpacked state dict; the paper's network under masks has 90 MB

# ------------------------------------------------------------------------------ the header


def integer(low, high):
    return lambda value: type(value) is int and low <= value <= high


def number(low, high):
    """Checks a number; NaN is in no range."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def text(value):
    return isinstance(value, str) and len(value) < 10_000


def list_of(check, *lengths):
    """Checks a list; lengths: those allowed, by default all."""

    def check_list(value):
        right = isinstance(value, list) and (not lengths or len(value) in lengths)
        return right and all(map(check, value))

    return check_list


def shapes(value):
    """Checks {key: shape}."""
    return isinstance(value, dict) and all(
        text(key) and list_of(integer(0, 2**20), *range(5))(shape) for key, shape in value.items()
    )


def unless_unknown(check):
    return lambda value: value is None or check(value)


# What a header holds: {name: check}. null: unknown.
FIELDS = {
    "kind": lambda value: value in ("ticket", "dense", "shrunk"),
    "arch": lambda value: isinstance(value, str) and value in BACKBONES,
    "width": integer(1, 4096),
    "classes_per_classifier": integer(1, 10_000),
    "classifiers": integer(1, 1000),
    "half": lambda value: isinstance(value, bool),
    "density": number(0, 100),  # percent; of a shrunk network: of the ticket that it was
    "dataset": unless_unknown(text),
    "class_order": unless_unknown(list_of(integer(0, 10**6))),  # ids
    "class_names": unless_unknown(list_of(text)),  # in this order
    "mean": unless_unknown(list_of(number(0, 1), 3)),  # of the channels, in [0,1]
    "std": unless_unknown(list_of(number(1e-6, 1), 3)),
    "image_size": unless_unknown(list_of(integer(9, 1024), 2)),  # height, width
    "state": unless_unknown(integer(1, 1000)),  # the last task that it has learned
    "accuracy": unless_unknown(list_of(number(0, 100))),  # test, percent, tasks 1..state
    "command": unless_unknown(text),  # that trained it
    "sha256": unless_unknown(lambda value: text(value) and len(value) == 64),  # of the checkpoint
}
OF_SHRUNK = {"shapes": shapes}  # of its tensors; the header of a shrunk network has this too


def fields_of(header):
    """FIELDS, and OF_SHRUNK where they belong."""
    return FIELDS | OF_SHRUNK if is_shrunk(header) else FIELDS


def complete(header):
    """The header as the file holds it: FIELDS, format and version. Raises ValueError."""
    header = {"format": FORMAT, "version": VERSION} | header
    check_header(header)
    return header


def check_header(header):
    """Raise ValueError unless each field holds what it must."""
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    if header.get("format") != FORMAT:
        raise ValueError("its header names another format")
    if header.get("version") != VERSION:
        raise ValueError(f"it is of version {header.get('version')!r}, this code reads {VERSION}")
    fields = fields_of(header)
    for key in sorted(({"format", "version"} | fields.keys()) ^ header.keys()):
        raise ValueError(f"its header {'lacks' if key in fields else 'has an unknown'} {key!r}")
    for key, check in fields.items():
        if not check(header[key]):
            raise ValueError(f"{key} in its header cannot be {header[key]!r}")
    classes, state = header["classifiers"] * header["classes_per_classifier"], header["state"]
    order, names = header["class_order"], header["class_names"]
    if order is not None and not len(order) == classes == len({*order}):
        raise ValueError(f"class_order in its header does not list {classes} classes")
    if names is not None and len(names) != classes:
        raise ValueError(f"class_names in its header does not list {classes} classes")
    if is_shrunk(header) and header["half"]:
        raise ValueError("half in its header is not possible for a shrunk network")
    if state is not None and state > header["classifiers"]:
        raise ValueError(f"state in its header is {state} of {header['classifiers']}")
    if header["accuracy"] is not None and len(header["accuracy"]) != state:
        raise ValueError("accuracy in its header is not that of its state")
    check_size(header)


def refuse_constant(name):
    raise ValueError(f"it holds {name}")


# ------------------------------------------------------------------------------ flags

NETWORK_FLAGS = ("dataset", "classifiers", "classes_per_classifier", "arch", "width")


def parse_args(parser, argv, flag, datasets, more=()):
    """parser.parse_args(argv), with a packed file's data set and network as the defaults.

    flag: the name of the flag that names the file; datasets: the names of those there are; more:
    fields that are defaults too, and that a flag may change. Raises UserError if any other flag
    that was given contradicts the file.
    """
    args = parser.parse_args(argv)
    path = vars(args)[flag]
    header = read_header(path)
    if header is None:
        return args
    known = {key: header[key] for key in NETWORK_FLAGS if header[key] is not None}
    if known.get("dataset") not in (None, *datasets):
        raise UserError(f"--{flag} {path}: is of the data set {known['dataset']}, unknown here")
    parser.set_defaults(**known, **{key: header[key] for key in more})
    args = parser.parse_args(argv)
    for key, value in known.items():
        if (given := vars(args)[key]) != value:
            raise UserError(f"--{key} {given}: {path} is of {key} {value}, leave the flag out")
    return args


# ------------------------------------------------------------------------------ the network


@functools.lru_cache(maxsize=8)
def dense_tensors(arch, width, classes_per_classifier, classifiers):
    """{key: meta tensor} of the dense state dict, and the set of convolutions' weights in it."""
    with torch.device("meta"):
        model = BACKBONES[arch](classes_per_classifier, classifiers, width, False)
    modules = model.named_modules()
    convolutions = {f"{name}.weight" for name, each in modules if isinstance(each, nn.Conv2d)}
    return model.state_dict(), convolutions


def is_ticket(header):
    """Whether the network has masks."""
    return header["kind"] == "ticket"


def is_shrunk(header):
    """Whether the network is a ShrunkNet, which can only be evaluated."""
    return header.get("kind") == "shrunk"


def tensors_of(header):
    """As dense_tensors(), for the network that a header describes; of a ShrunkNet all tensors."""
    if is_shrunk(header):
        dtypes = {
            key: torch.int64 if key.rpartition(".")[2] in INTEGERS else torch.float32
            for key in header["shapes"]
        }
        return {
            key: torch.empty(shape, dtype=dtypes[key], device="meta")
            for key, shape in header["shapes"].items()
        }, set()
    heads = header["classes_per_classifier"], header["classifiers"]
    return dense_tensors(header["arch"], header["width"], *heads)


def unpacked_bytes(header):
    """Bytes of the state dict of which a header tells."""
    tensors, convolutions = tensors_of(header)
    masked = convolutions if is_ticket(header) else ()
    return sum(
        (each.numel() * each.element_size()) * (2 if key in masked else 1)
        for key, each in tensors.items()
    )


def check_size(header):
    """Raise ValueError for a network that is too large; a few bytes can tell of any size."""
    if (found := unpacked_bytes(header)) > MAX_STATE:
        raise ValueError(f"it unpacks to {found:,} bytes, more than the {MAX_STATE:,} allowed")


def describe_network(state):
    """kind, arch, width, classes_per_classifier and classifiers of a state dict, as a dict.

    Raises ValueError if it is of no network in BACKBONES, or too large: in a checkpoint one value
    can stand for all those of a tensor.
    """
    dense = dense_state(state)
    heads = [value for key, value in dense.items() if key.startswith("linear.")]
    sizes = [len(value) for value in heads if value.dim() == 2]
    kind = "dense" if len(dense) == len(state) else "ticket"
    for arch, network in BACKBONES.items():
        with torch.device("meta"):
            first = next(iter(network(1, 1, 1).state_dict()))
        if first not in dense or not sizes or not dense[first].dim():
            continue
        found = arch, len(dense[first]), sizes[0], len(sizes)
        if not all(0 < size < 10_000 for size in found[1:]):
            continue
        tensors, _ = dense_tensors(*found)
        shapes = ({k: v.shape for k, v in each.items()} for each in (tensors, dense))
        if next(shapes) == next(shapes):
            network = dict(zip(("arch", "width", "classes_per_classifier", "classifiers"), found))
            network["kind"] = kind
            check_size(network)
            return network
    raise ValueError(f"its tensors are of none of the networks {', '.join(BACKBONES)}")


# ------------------------------------------------------------------------------ writing


def write(path, header, state):
    """Write a packed file, atomically. Returns its SHA-256.

    Equal content gives equal bytes, with the same version of zlib.

    header: {name: value} of FIELDS; state: a state dict of finite values, whose masks, if it has
    them, hold zeros and ones (pruning_utils.check_state). Raises ValueError if they do not fit,
    UserError if the file cannot be written.
    """
    content = json.dumps(complete(header), sort_keys=True).encode()
    arrays = {"header": np.frombuffer(content, np.uint8)} | pack(header, state)

    def write_archive(file):
        with zipfile.ZipFile(file, "w") as archive:
            for key, array in arrays.items():
                record = zipfile.ZipInfo(f"{key}.npy")  # of 1980, whenever it is written
                record.compress_type, record.create_system = zipfile.ZIP_DEFLATED, 3
                content = npy_start(array.dtype, array.shape) + array.tobytes()
                archive.writestr(record, content, compresslevel=9)

    return atomic_write(path, write_archive)


def pack(header, state):
    """The arrays of a state dict, {key: array}; see the head of this file."""
    tensors, convolutions = tensors_of(header)
    arrays = {}
    for key, tensor in tensors.items():
        name, masked = key.removesuffix(".weight"), key in convolutions and is_ticket(header)
        value = state[name + ORIG if masked else key]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(f"{key} does not fit the network of the header")
        array = value.cpu().numpy()
        if masked:
            mask = state[name + MASK].cpu().numpy() != 0
            arrays[name + MASK] = np.packbits(mask)
            array = array[mask]
        if key in convolutions and header["half"]:
            array = to_half(array, key)
        arrays[name + ORIG if masked else key] = array.astype(array.dtype.newbyteorder("<"))
    return arrays


def to_half(array, key):
    """The values as float16. Raises UserError if one is too large for that."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"--half: {key} holds values too large for float16, leave the flag out")
    return half


def npy_start(dtype, shape):
    """The first 128 bytes of a .npy array, which tell what it holds."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"


# ------------------------------------------------------------------------------ reading


def is_packed(path):
    """Whether a file is a packed one by its first bytes: an archive that starts with a header."""
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError:
        return False
    return start[:4] == b"PK\3\4" and start[30:] == b"header.npy"


def read_header(path):
    """The header of a packed file, a dict of FIELDS; None for any other. Raises UserError."""
    if not is_packed(path):
        return None
    with open_packed(path) as archive:
        return take_header(archive)


def read(path):
    """The header of a packed file, and its state dict in the form of a checkpoint's.

    Raises UserError unless the file is exactly as write() makes them.
    """
    with open_packed(path) as archive:
        header = take_header(archive)
        state = unpack(archive, header)
        if is_shrunk(header):
            shrunk_net(header, state)  # a check
        return header, state


def read_shrunk(path, bf16=False):
    """The header and the ShrunkNet of a packed file; (None, None) for any other file."""
    header = read_header(path)
    if header is None or not is_shrunk(header):
        return None, None
    return header, shrunk_net(*read(path), bf16)


def shrunk_net(header, state, bf16=False):
    """The ShrunkNet of such a file. Raises ValueError if it does not fit together."""
    model = ShrunkNet(state, bf16)
    of_header = header | {"kind": "dense"}  # the network that it was
    heads = {k: v.shape for k, v in tensors_of(of_header)[0].items() if k.startswith("linear_main")}
    found = {key: value.shape for key, value in state.items() if key.startswith("linear_main")}
    if list(model.size) != header["image_size"] or found != heads:
        raise ValueError("its network does not fit its header")
    return model


@contextlib.contextmanager
def open_packed(path):
    """The archive, after a look at its directory. Any error within becomes a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            # bzip2 and LZMA may unpack to any size in one step
            check_records(path, archive, zipfile.ZIP_DEFLATED)
            yield archive
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{path}: not an intact packed file ({first_line(error)}), give another copy"
        ) from None


def take_header(archive):
    size = archive.getinfo("header.npy").file_size - 128
    if not 0 < size <= MAX_HEADER:
        raise ValueError(f"its header has {size:,} bytes, at most {MAX_HEADER:,} are allowed")
    content = take(archive, "header", "|u1", (size,)).tobytes().decode()
    try:
        header = json.loads(content, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not valid JSON: {first_line(error)}") from None
    check_header(header)
    return {key: header[key] for key in fields_of(header)}


def take(archive, key, kind, shape):
    """The array of a record, which must hold exactly this dtype and shape."""
    start = npy_start(np.dtype(kind), shape)
    size = len(start) + np.dtype(kind).itemsize * math.prod(shape)
    record = archive.getinfo(f"{key}.npy")
    if record.file_size != size:
        raise ValueError(f"{key} has {record.file_size:,} bytes in place of {size:,}")
    with archive.open(record) as file:
        content = file.read(size)  # no more, whatever it would unpack to
    if len(content) != size or not content.startswith(start):
        raise ValueError(f"{key} is no array of {kind} {list(shape)}")
    return np.frombuffer(content, kind, offset=len(start)).reshape(shape).copy()


def unpack(archive, header):
    """The state dict in the archive."""
    tensors, convolutions = tensors_of(header)
    pruned = convolutions if is_ticket(header) else set()
    expected = ["header", *(key for key in tensors if key not in pruned)]
    expected += [key.removesuffix(".weight") + end for key in pruned for end in (MASK, ORIG)]
    for name in sorted({f"{key}.npy" for key in expected} ^ set(archive.namelist())):
        raise ValueError(f"{name!r} is {'missing' if name[:-4] in expected else 'one too many'}")
    state, left = OrderedDict(), 0
    for key, tensor in tensors.items():
        kind = "<i8" if tensor.dtype == torch.int64 else "<f4"
        if key in convolutions and header["half"]:
            kind = "<f2"
        if key in pruned:
            name, shape = key.removesuffix(".weight"), tuple(tensor.shape)
            mask = take_mask(archive, name + MASK, shape)
            weight = np.zeros(shape, np.float32)
            weight[mask] = take(archive, name + ORIG, kind, (int(mask.sum()),))
            arrays = {name + ORIG: weight, name + MASK: mask.astype(np.float32)}
        else:
            weight = take(archive, key, kind, tuple(tensor.shape))
            arrays = {key: weight.astype(np.float32) if kind == "<f2" else weight}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds values that are not finite")
            state[name] = torch.from_numpy(array)
        left += int(mask.sum()) if key in pruned else tensor.numel() * (key in convolutions)
    total = sum(tensors[key].numel() for key in convolutions)
    density = 100.0 * left / total if total else header["density"]
    if abs(density - header["density"]) > 1e-9:
        raise ValueError(f"its density is {density} %, its header says {header['density']}")
    return state


def take_mask(archive, key, shape):
    """A mask of this shape, bool."""
    count = math.prod(shape)
    bits = take(archive, key, "|u1", (-(-count // 8),))
    if int(bits[-1]) & (0xFF >> (count % 8 or 8)):
        raise ValueError(f"{key} has bits beyond its {count:,} weights")
    return np.unpackbits(bits, count=count).astype(bool).reshape(shape)
