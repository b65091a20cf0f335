"""Hostile and damaged files at each input of the scripts, by the real command lines.

Each is rejected: exit status 2, one line that names the file, no traceback; nothing is run or
written, and little memory used. KINDS lists the kinds of file that are tried at each input.
"""

import contextlib
import copyreg
import functools
import io
import json
import os
import pickle
import pickletools
import re
import resource
import shutil
import subprocess
import warnings
import zipfile
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoints import PLAIN, call, hostile_file, hostile_pickle, npy, reduced
from torch import nn

import pruning_utils
from models import ResNet18
from runtime import packed
from tools import pack

PETA = 10**15  # more bytes than any machine has memory

# ------------------------------------------------------------------------------ inputs


class Input(NamedTuple):
    command: str
    path: str  # the file, beside intact ones; errors name it as 'a/b' or 'a: ... b'
    also: str = ""  # text that names the file as well as its path does


NETWORK = "--width 4 --batch_size 48 --device cpu"
DIGITS = f"--dataset digits --classifiers 2 --state 2 {NETWORK}"
TRAIN = (
    f"main_train.py --weight weight.pt --mask mask.pt --save_data_path soft --save_dir out "
    f"--epochs 1 {DIGITS}"
)
CIL = f"main_CIL.py --classifiers 1 --save_dir out --epochs 1 {NETWORK} --data"

INPUTS = {
    "pretrained": Input(f"test.py --pretrained weight.pt {DIGITS}", "weight.pt"),
    "weight": Input(TRAIN, "weight.pt"),
    "mask": Input(TRAIN, "mask.pt"),
    "img": Input(TRAIN, "soft/task1_img.npy"),
    "dis_label": Input(TRAIN, "soft/task1_dis_label.npy"),
    "dis_label_main": Input(TRAIN, "soft/task1_dis_label_main.npy"),
    "pool": Input(f"{CIL} prepared", "prepared/cifar10_pool.npy"),
    "unlabeled": Input("dataset.py --data out --raw raw --unlabeled pool.npy", "pool.npy"),
    "meta": Input(f"{CIL} prepared", "prepared/meta.json", "prepared: holds "),
    "published_pool": Input(f"{CIL} published", "published/cifar10_80m_150k.pkl"),
    "results": Input("-m tools.report run --out out", "run/results.json"),
    "ticket": Input("test.py --pretrained ticket.npz --pruned --device cpu", "ticket.npz"),
    "ticket_weight": Input(TRAIN.replace("weight.pt", "ticket.npz"), "ticket.npz"),
    "ticket_mask": Input(TRAIN.replace("mask.pt", "ticket.npz"), "ticket.npz"),
    "ticket_unpacked": Input("-m tools.pack ticket.npz --unpack --out out/new.pt", "ticket.npz"),
    "ticket_packed": Input("-m tools.pack ticket.npz --half --out out/new.npz", "ticket.npz"),
    "ticket_classifies": Input("-m tools.classify --pretrained ticket.npz a.png", "ticket.npz"),
    "shrunk": Input("test.py --pretrained shrunk.npz --device cpu", "shrunk.npz"),
    "checkpoint_packed": Input("-m tools.pack weight.pt --out out/new.npz", "weight.pt"),
    "picture": Input("-m tools.classify --pretrained ticket.npz a.png", "a.png"),
}
PARTS = {"train": "train", "val": "val", "test": "test", "save_100": "exemplars"}
for file, part in PARTS.items():
    for folder, suffix in (("prepared", "npz"), ("published", "pkl")):
        path = f"{folder}/cifar10_{file}.{suffix}"
        INPUTS[f"{folder}_{part}"] = Input(f"{CIL} {folder}", path, f"{folder}: {part}")

RUN = {
    "script": "main_CIL",
    "config": {"classifiers": 2, "dataset": "digits", "width": 4},
    "states": [
        {"state": 1, "accuracy": [90.0], "mean": 90.0, "density": 100.0},
        {"state": 2, "accuracy": [80.0, 70.0], "mean": 75.0, "density": 100.0},
    ],
}
TICKET = {
    "kind": "ticket",
    "half": False,
    "dataset": "digits",
    "class_order": [4, 2, 7, 6],
    "class_names": ["4", "2", "7", "6"],
    "mean": [0.3066, 0.3066, 0.3066],
    "std": [0.3767, 0.3767, 0.3767],
    "image_size": [32, 32],
    "state": 2,
    "accuracy": [90.0, 80.0],
    "command": "main_TD.py --dataset digits",
    "sha256": "0" * 64,
}
META = {"dataset": "cifar10", "names": {str(c): f"class {c}" for c in range(10)}}


def images(n):
    return np.random.RandomState(n).randint(0, 256, (n, 12, 12, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder with an intact file for each input."""
    folder = tmp_path_factory.mktemp("intact")
    for name in ("soft", "prepared", "published", "raw", "run"):
        (folder / name).mkdir()
    torch.manual_seed(0)
    model = ResNet18(2, 2, width=4)
    torch.save(model.state_dict(), folder / "weight.pt")
    masks = pruning_utils.masks_of(model)
    pruning_utils.save_masks(folder / "mask.pt", masks)
    masks = {name: (mask * torch.rand(mask.shape) < 0.3).float() for name, mask in masks.items()}
    pruning_utils.apply_mask(model, masks)
    header = TICKET | packed.describe_network(model.state_dict())
    header["density"] = pruning_utils.density(masks)
    packed.write(folder / "ticket.npz", header, model.state_dict())
    header, shrunk = pack.shrink("", header, model)
    packed.write(folder / "shrunk.npz", header, shrunk.state_dict())
    Image.fromarray(images(1)[0]).save(folder / "a.png")
    np.save(folder / "soft/task1_img.npy", np.zeros((5, 3, 32, 32), np.float32))
    for name in ("dis_label", "dis_label_main"):
        np.save(folder / f"soft/task1_{name}.npy", np.zeros((5, 2), np.float32))
    parts = {9: images(7), 8: images(6)}
    for name in PARTS:
        np.savez(folder / f"prepared/cifar10_{name}.npz", **{str(c): parts[c] for c in parts})
        (folder / f"published/cifar10_{name}.pkl").write_bytes(pickle.dumps(parts))
    np.save(folder / "prepared/cifar10_pool.npy", images(9))
    np.save(folder / "pool.npy", images(9))
    pool = {"data": images(9), "label": np.arange(9)}
    (folder / "published/cifar10_80m_150k.pkl").write_bytes(pickle.dumps(pool))
    (folder / "prepared/meta.json").write_text(json.dumps(META))
    (folder / "run/results.json").write_text(json.dumps(RUN))
    return folder


# ------------------------------------------------------------------------------ payloads


def put(value):
    """The opcodes that push a plain value."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def dotted(module, name):
    """The same with STACK_GLOBAL, which also reaches attributes: ('os', 'path.join')."""
    return b"".join(b"\x8c%c%s" % (len(part), part.encode()) for part in (module, name)) + b"\x93"


def shell(marker):
    return f"echo > {marker}"


def python(marker):
    return f"open({str(marker)!r}, 'w').close()"


SYSTEM = named("os", "system")
OS = named("importlib", "import_module") + put("os") + b"\x85R"


class System:
    def __init__(self, marker):
        self.recipe = os.system, (shell(marker),)

    def __reduce__(self):
        return self.recipe


def by_getattr(marker):
    system = named("builtins", "getattr") + OS + put("system") + b"\x86R"
    return b"\x80\x02" + system + put(shell(marker)) + b"\x85R."


def by_attrgetter(marker):
    system = named("operator", "attrgetter") + put("system") + b"\x85R" + OS + b"\x85R"
    return b"\x80\x02" + system + put(shell(marker)) + b"\x85R."


def by_ctypes(marker):
    library = dotted("numpy.ctypeslib", "ctypes.CDLL") + b"N\x85R"
    system = named("builtins", "getattr") + library + put("system") + b"\x86R"
    command = shell(marker).encode()
    return b"\x80\x04" + system + b"B" + len(command).to_bytes(4, "little") + command + b"\x85R."


def by_state(marker):
    """The first state sets __setstate__, which the second state then calls."""
    made = named("collections", "OrderedDict") + b")R}" + put("__setstate__") + SYSTEM + b"sb"
    return b"\x80\x02" + made + put(shell(marker)) + b"b."


def by_numpy_load(marker):
    file = io.BytesIO()
    np.save(file, np.array([System(marker)], dtype=object), allow_pickle=True)
    return pickle.dumps(reduced(np.load, (io.BytesIO(file.getvalue()), None, True)))


def by_torch_load(marker):
    file = io.BytesIO(hostile_file("zip", hostile_pickle("os.system", marker)))
    return pickle.dumps(reduced(functools.partial(torch.load, file, weights_only=False), ()))


def by_torch_hub(marker):
    folder = marker.parent / "hub"
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(python(marker))
    return pickle.dumps(reduced(torch.hub._load_local, (str(folder), "model")))


OWN = ("os.system", "posix.system", "builtins.eval", "builtins.exec", "__builtin__.eval", "nested")
PAYLOADS = {kind: functools.partial(hostile_pickle, kind) for kind in OWN} | {
    "subprocess.call": lambda m: pickle.dumps(reduced(subprocess.call, (["touch", str(m)],))),
    "subprocess.Popen": lambda m: pickle.dumps(reduced(subprocess.Popen, (["touch", str(m)],))),
    "getattr": by_getattr,
    "attrgetter": by_attrgetter,
    "torch.load": by_torch_load,
    "torch.hub": by_torch_hub,
    "torch.collect_env": lambda m: call("torch.utils.collect_env", "run", shell(m)),
    "numpy.load": by_numpy_load,
    "numpy.objects": lambda m: pickle.dumps(np.array([System(m)], dtype=object)),
    "numpy.f2py": lambda m: call("numpy.f2py.crackfortran", "myeval", python(m)),
    "numpy.runstring": lambda m: (
        b"\x80\x02" + named("numpy.testing", "runstring") + put(python(m)) + b"}\x86R."
    ),
    "numpy.ctypeslib": by_ctypes,
    "protocol_0": lambda m: SYSTEM + f"(S{shell(m)!r}\ntR.".encode(),
    "protocol_5": lambda m: pickle.dumps(System(m), 5),
    "INST": lambda m: f"(S{shell(m)!r}\nios\nsystem\n.".encode(),
    "OBJ": lambda m: b"(" + SYSTEM + f"S{shell(m)!r}\no.".encode(),
    "BUILD": by_state,
    "EXT1": lambda m: b"\x80\x02\x82\xf0" + put(shell(m)) + b"\x85R.",
}

# a sample, for inputs at which nothing is unpickled
FEW = ("os.system", "builtins.eval", "nested", "numpy.load", "protocol_0")


@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_payload_is_harmful_when_unpickled(tmp_path, kind):
    """Otherwise the tests below would show nothing."""
    marker = tmp_path / "marker"
    copyreg.add_extension("os", "system", 0xF0)
    with contextlib.suppress(Exception):
        made = pickle.loads(PAYLOADS[kind](marker))
        if kind == "subprocess.Popen":
            made.wait()
    copyreg.remove_extension("os", "system", 0xF0)
    assert marker.exists()


# ------------------------------------------------------------------------------ kinds of file

# Each returns the bytes of a file (None: a folder) for a case: its marker, the intact file.
DAMAGED = {
    "empty": lambda case: b"",
    "text": lambda case: b"loss 0.3\naccuracy 90\n",
    "folder": lambda case: None,
    "cut_at_10": lambda case: case.intact[:10],
    "cut_in_half": lambda case: case.intact[: len(case.intact) // 2],
    "cut_last_byte": lambda case: case.intact[:-1],
}


def hostile(form, kinds=PAYLOADS):
    """Payloads in a file format; form: a function from a pickle to the bytes of a file."""
    return {
        f"{kind}_{form.__name__}": lambda case, make=PAYLOADS[kind]: form(make(case.marker))
        for kind in kinds
    }


def zipped(members, **options):
    """members: (name, bytes) pairs."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", **options) as archive:
        warnings.simplefilter("ignore")  # about a name that occurs twice
        for member in members:
            archive.writestr(*member)
    return file.getvalue()


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


@functools.cache
def bomb(data, name, start=b""):
    """The archive `data` with `start` and 1 GiB of zeros, deflated, as its member `name`.

    The others stay as they are, and in their order.
    """
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as intact,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        records = {record.filename: record for record in intact.infolist()}
        for record in (records | {name: None}).values():
            if record:
                archive.writestr(record, intact.read(record))
                continue
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(start)
                for _ in range(2**6):
                    member.write(bytes(2**24))
    return file.getvalue()


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


def memo_bomb(case):
    """Nine bytes that make the unpickler in C fill 4 GiB: a memo entry with a huge index."""
    return b"\x80\x02}r" + (2**28).to_bytes(4, "little") + b"."


def method_bomb(content):
    """An OrderedDict whose attributes hide its methods; they are numbers."""
    items = b"".join(put(key) + value for key, value in content)
    attributes = dict.fromkeys(("get", "items", "keys", "values"), 3)
    made = named("collections", "OrderedDict") + b")R(" + items + b"u" + put(attributes) + b"b"
    return b"\x80\x02" + made + b"."


# ------------------------------------------------------------------------------ checkpoints


def saved(content, zip=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zip)
    return file.getvalue()


class Subclass(torch.Tensor):
    pass


def in_zip(payload):
    return hostile_file("zip", payload)


def in_legacy(payload):
    return hostile_file("legacy", payload + pickle.dumps([], 2))


def first(change, **options):
    """The intact checkpoint with its first tensor, the weight or mask of conv1, changed."""

    def make(case):
        key = next(iter(case.state))
        return saved(case.state | {key: change(case.state[key])}, **options)

    return make


def edited(old, new, change=lambda tensor: tensor[:1].clone(), zip=True):
    """As `first`, then with bytes of the pickle replaced; by default the tensor has 27 values."""

    def make(case):
        data = first(change, zip=zip)(case)
        assert old in data
        if not zip:
            return data.replace(old, new)
        return zipped(
            (name, content.replace(old, new) if name.endswith("data.pkl") else content)
            for name, content in members(data)
        )

    return make


def legacy_parts(case):
    """A legacy checkpoint in parts: its first pickles, the keys of its storages, the storages."""
    data = saved(case.state, zip=False)
    file, ends = io.BytesIO(data), []
    for _ in range(5):
        list(pickletools.genops(file))
        ends.append(file.tell())
    return data[: ends[3]], pickle.loads(data[ends[3] : ends[4]]), data[ends[4] :]


def legacy_keys(choose):
    """A legacy checkpoint without the values of some storages, which then hold old memory."""

    def make(case):
        start, keys, storages = legacy_parts(case)
        return start + pickle.dumps(choose(keys), 2) + storages

    return make


def source_check(case):
    """A class that claims to dump patches of its source: torch.load writes one, named `marker`."""
    marked = {"dump_patches": True, "__name__": str(case.marker)}
    function = named("torch._utils", "_rebuild_tensor_v2")
    made = function + b"N" + put(marked) + b"\x86bq\x09"
    return in_legacy(
        b"\x80\x02" + made + b"(" + put("module") + b"h\x09" + put("file") + put("source") + b"tQ."
    )


def script(case):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


def persistent(opcodes):
    return lambda case: in_zip(b"\x80\x02" + opcodes + b".")


def with_key(key):
    """The intact checkpoint with one more tensor."""

    def make(case):
        ending = next(iter(case.state)).removeprefix("conv1")
        return saved(case.state | {f"{key}{ending}": torch.zeros(1)})

    return make


def of_width_4096(case):
    """A checkpoint of 184 GB, of which the file holds one value for each tensor."""
    with torch.device("meta"):
        state = ResNet18(2, 2, width=4096).state_dict()
    return saved({k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()})


def with_member(name):
    return lambda case: zipped([*members(case.intact), (name, bytes(100))])


SHAPE = b"(K\x01K\x03K\x03K\x03t"  # of 27 values; the network has 4x3x3x3 = 108 = 0x6c
CHECKPOINTS = {
    **DAMAGED,
    **hostile(in_zip),
    **hostile(in_legacy, FEW),
    **{
        f"os.system_as_{form}": lambda case, form=form: hostile_file(
            form, hostile_pickle("os.system", case.marker)
        )
        for form in ("bare", "legacy_keys", "tar", "tar_and_zip")
    },
    "source_check": source_check,
    "torchscript": script,
    "torchscript_and_pickle": lambda case: zipped(
        [*members(script(case)), *members(in_zip(hostile_pickle("os.system", case.marker)))]
    ),
    "persistent_text": lambda case: in_zip(b"Phello\n."),
    "persistent_number": persistent(put(3) + b"Q"),
    "persistent_dict": persistent(b"}Q"),
    "persistent_empty": persistent(b")Q"),
    "persistent_module": persistent(put(("module", None, "", "")) + b"Q"),
    "persistent_no_type": persistent(put(("storage", "text", "0", "cpu", 4)) + b"Q"),
    "persistent_short": persistent(put(("storage",)) + b"Q"),
    # tensors that do not fit the network
    "nan": first(lambda t: torch.full_like(t, torch.nan)),
    "infinite": first(lambda t: torch.full_like(t, -torch.inf)),
    "one_nan_legacy": first(lambda t: t.index_fill(0, torch.tensor(1), torch.nan), zip=False),
    **{
        str(dtype).removeprefix("torch."): first(lambda t, dtype=dtype: t.to(dtype))
        for dtype in (torch.int64, torch.float64, torch.float16, torch.complex64, torch.bool)
    },
    "turned": first(lambda t: t.transpose(0, 1)),
    "scalar": first(lambda t: t[0, 0, 0, 0]),
    "no_values": first(lambda t: t[:0]),
    "sparse": first(lambda t: t.to_sparse()),
    "quantized": first(lambda t: torch.quantize_per_tensor(t, 1.0, 0, torch.qint8)),
    "meta": first(lambda t: t.to("meta")),
    "subclass": first(lambda t: t.as_subclass(Subclass)),
    "nested_tensor": first(lambda t: torch.nested.nested_tensor(list(t))),
    "peta_of_one_value": first(lambda t: torch.zeros(1).expand(PETA)),
    "array": first(lambda t: t.numpy()),
    # tensors that claim more than the file holds
    "shape_claims_more": edited(SHAPE, SHAPE.replace(b"\x01", b"\x04")),
    "shape_claims_more_legacy": edited(SHAPE, SHAPE.replace(b"\x01", b"\x04"), zip=False),
    "storage_claims_more": edited(b"K\x1bt", b"K\x6ct"),
    "storage_claims_more_legacy": edited(b"K\x1bN", b"K\x6cN", zip=False),
    "offset_beyond": edited(b"QK\x00(K\x04", b"QK\x7f(K\x04", torch.clone),
    "offset_beyond_legacy": edited(b"QK\x00(K\x04", b"QK\x7f(K\x04", torch.clone, zip=False),
    "peta_storage": edited(b"K\x1bt", put(PETA) + b"t"),
    "peta_storage_legacy": edited(b"K\x1bN", put(PETA) + b"N", zip=False),
    "peta_bytearray": lambda case: in_zip(
        b"\x80\x02" + named("builtins", "bytearray") + put(PETA) + b"\x85R."
    ),
    "unfilled_legacy": legacy_keys(lambda keys: []),
    "last_unfilled_legacy": legacy_keys(lambda keys: keys[:-1]),
    "unfilled_legacy_before_an_archive": lambda case: (
        legacy_keys(lambda keys: [])(case) + case.intact
    ),
    # archives
    "flipped_bit": lambda case: flipped(
        case.intact, case.intact.index(next(iter(case.state.values())).numpy().tobytes()) + 2
    ),
    "deflated": lambda case: zipped(members(case.intact), compression=zipfile.ZIP_DEFLATED),
    "bomb": lambda case: bomb(case.intact, "archive/data/0"),
    "bomb_before_an_archive": lambda case: bomb(case.intact, "archive/data/0") + case.intact,
    "member_twice": lambda case: zipped([*members(case.intact), members(case.intact)[0]]),
    "member_outside": with_member("../../outside"),
    "member_absolute": with_member("/tmp/outside"),
    # pickles
    "memo_bomb": lambda case: in_zip(memo_bomb(case)),
    "memo_bomb_legacy": lambda case: in_legacy(memo_bomb(case)),
    "methods": lambda case: in_zip(method_bomb([("conv1.weight", b"N")])),
    "deep": lambda case: in_zip(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "of_itself": lambda case: in_zip(b"\x80\x02}q\x00" + put("state_dict") + b"h\x00s."),
    # names that would reach the terminal
    "key_of_lines": with_key("two\nlines"),
    "key_of_escapes": with_key("\x1b[2J\x1b[31m"),
    "key_of_a_million": with_key("k" * 10**6),
    "name_of_escapes": lambda case: in_legacy(b"\x80\x02" + named("o\x1b[2J", "system") + b"."),
}


# ------------------------------------------------------------------------------ arrays


def with_header(text, data=bytes(3072)):
    return lambda case: npy(text, data)


def dtype_of(descr, shape="1,"):
    return with_header(PLAIN.replace("'<f4'", descr) % shape)


def as_pickle(payload):
    return payload


def as_objects(payload):
    """A .npy file of one object."""
    return npy(PLAIN.replace("<f4", "|O") % "1,", payload)


def array(change):
    """The intact array, changed."""

    def make(case):
        file = io.BytesIO()
        np.save(file, change(np.load(io.BytesIO(case.intact))))
        return file.getvalue()

    return make


HEADERS = {
    "peta": with_header(PLAIN % f"{PETA},"),
    "peta_images": with_header(PLAIN.replace("<f4", "|u1") % f"{PETA}, 12, 12, 3"),
    "overflow": with_header(PLAIN % f"{2**32}, {2**32}"),
    "beyond_64_bits": with_header(PLAIN % f"{10**30},"),
    "negative": with_header(PLAIN.replace("<f4", "|u1") % "-1, 12, 12, 3", bytes(4320)),
    "negative_floats": with_header(PLAIN % "-1, 3, 32, 32", bytes(12288)),
    "fields": dtype_of("[('a', '<f4'), ('b', '|u1')]"),
    "fields_of_objects": dtype_of("[('a', '|O')]"),
    "subarray": dtype_of("('<f4', (1000000000,))"),
    "huge_items": dtype_of("'|V2147483647'"),
    "huge_text": dtype_of("'<U500000000'"),
    "text_values": dtype_of("'<U4'", "4,"),
    "dates": dtype_of("'<M8[s]'", "4,"),
    "code": with_header("__import__('os').system('echo > marker')"),
    "deep": with_header("(" * 9000),
    "header_of_4_GiB": lambda case: b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "version_9": lambda case: b"\x93NUMPY\x09\x00" + case.intact[8:],
}
ARRAYS = {
    **DAMAGED,
    **HEADERS,
    **hostile(as_pickle, FEW),
    **hostile(as_objects, FEW),
    "archive": lambda case: zipped([("array.npy", case.intact)]),
    "bomb": lambda case: bomb(zipped([]), "array.npy"),
    **{
        np.dtype(dtype).name: array(lambda a, dtype=dtype: a.astype(dtype))
        for dtype in (bool, np.int64, np.float64, np.complex64)
    },
    "no_rows": array(lambda a: a[:0]),
    "scalar": array(lambda a: a[(0,) * a.ndim]),
}
NOT_FINITE = {  # soft labels and published images are floats
    "one_nan": array(lambda a: np.where(np.arange(a.size).reshape(a.shape) == 7, np.nan, a)),
    "infinite": array(lambda a: a + np.float32(np.inf)),
}


def as_member(payload):
    """An archive whose members are pickles instead of arrays."""
    return zipped([("9", payload), ("8", payload)])


def as_object_members(payload):
    return zipped([("9.npy", as_objects(payload)), ("8.npy", as_objects(payload))])


def ninth(make):
    """The intact archive with the result of `make` as its member 9."""

    def make_archive(case):
        arrays = dict(members(case.intact))
        inner = SimpleNamespace(**vars(case) | {"intact": arrays["9.npy"]})
        return zipped((arrays | {"9.npy": make(inner)}).items())

    return make_archive


def one_more(name):
    def make(case):
        arrays = members(case.intact)
        return zipped([*arrays, (name, arrays[0][1])])

    return make


ARCHIVES = {
    **DAMAGED,
    **{kind: ninth(make) for kind, make in HEADERS.items()},
    **hostile(as_pickle, FEW),
    **hostile(as_member, FEW),
    **hostile(as_object_members, FEW),
    "single_array": lambda case: members(case.intact)[0][1],
    "bomb": lambda case: bomb(case.intact, "9.npy", npy(PLAIN % f"{2**28},", b"")),
    "flipped_bit": lambda case: flipped(case.intact, case.intact.index(images(7).tobytes())),
    "member_twice": one_more("9.npy"),
    "same_class_twice": one_more("09.npy"),
    "member_outside": one_more("../../9.npy"),
    "floats": ninth(array(lambda a: a.astype(np.float32))),
    "empty_archive": lambda case: zipped([]),
}

# ------------------------------------------------------------------------------ packed files


def deflated(arrays):
    return zipped(arrays, compression=zipfile.ZIP_DEFLATED)


def record(name, change):
    """The intact packed file, with change(bytes of the .npy array) as one of its records."""

    def make(case):
        arrays = dict(members(case.intact))
        return deflated((arrays | {name: change(arrays[name])}).items())

    return make


def as_header(text):
    """A header record of this text."""
    return packed.npy_start(np.dtype("u1"), (len(text),)) + text


def header(change):
    """The intact packed file; change(header) is its header, or the text of it."""

    def change_record(data):
        content = change(json.loads(data[128:]))
        return as_header(content if isinstance(content, bytes) else json.dumps(content).encode())

    return record("header.npy", change_record)


def field(**changed):
    return header(lambda content: content | changed)


def number(key, text):
    """The intact packed file with `text` as a number in its header."""
    return header(lambda content: json.dumps(content | {key: 7777}).encode().replace(b"7777", text))


def values(change):
    """The intact packed file with the weights of a convolution changed."""

    def change_record(data):
        array = change(np.frombuffer(data, "<f4", offset=128).copy())
        return packed.npy_start(array.dtype, array.shape) + array.tobytes()

    return record(WEIGHT, change_record)


def put_at(number, value):
    def change(array):
        array[number] = value
        return array

    return change


def bits(change):
    """The intact packed file with the mask of conv1 changed: 108 bits in 14 bytes."""

    def change_record(data):
        array = change(np.frombuffer(data, "u1", offset=128).copy())
        return packed.npy_start(array.dtype, array.shape) + array.tobytes()

    return record("conv1.weight_mask.npy", change_record)


def without(name):
    return lambda case: deflated(each for each in members(case.intact) if each[0] != name)


def with_record(name, content=b""):
    return lambda case: deflated([*members(case.intact), (name, content)])


def declared(name, size):
    """The intact packed file; its directory declares another size for a record."""

    def make(case):
        data = bytearray(case.intact)
        entry = data.rindex(name.encode()) - 46
        assert data[entry : entry + 4] == b"PK\1\2"
        data[entry + 24 : entry + 28] = size.to_bytes(4, "little")
        return bytes(data)

    return make


def hostile_records(kinds):
    return {
        f"{kind}_in_a_record": lambda case, make=PAYLOADS[kind]: record(
            WEIGHT, lambda data: as_objects(make(case.marker))
        )(case)
        for kind in kinds
    }


def bomb_bias(case):
    return bomb(case.intact, BIAS, dict(members(case.intact))[BIAS])


WEIGHT = "conv1.weight_orig.npy"
BIAS = "layer1.0.bn1.bias.npy"
PACKED = {
    **DAMAGED,
    **{
        f"cut_at_{share}_percent": lambda case, share=share: case.intact[
            : len(case.intact) * share // 100
        ]
        for share in (1, 3, 10, 25, 40, 60, 75, 90, 97, 99)
    },
    **{f"cut_at_{n}": lambda case, n=n: case.intact[:n] for n in (4, 30, 39, 40, 41, 200)},
    "cut_22_bytes": lambda case: case.intact[:-22],
    "starts_late": lambda case: case.intact[1:],
    "doubled": lambda case: case.intact * 2,
    "flipped_bit_early": lambda case: flipped(case.intact, 60),
    "flipped_bit_in_the_middle": lambda case: flipped(case.intact, len(case.intact) // 2),
    "flipped_bit_in_the_directory": lambda case: flipped(case.intact, len(case.intact) - 300),
    **hostile(as_pickle, FEW),
    **hostile_records(FEW),
    # records
    **{
        name: lambda case, kind=kind: zipped(members(case.intact), compression=kind)
        for name, kind in (("stored", 0), ("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA))
    },
    "no_header": without("header.npy"),
    "no_mask": without("conv1.weight_mask.npy"),
    "no_values": without(WEIGHT),
    "no_bias": without(BIAS),
    "record_twice": lambda case: deflated([*members(case.intact), members(case.intact)[5]]),
    "header_twice": lambda case: deflated([*members(case.intact), members(case.intact)[0]]),
    "one_record_more": with_record("extra.npy"),
    "a_dense_weight_beside": with_record("conv1.weight.npy"),
    "outside": with_record("../../outside.npy"),
    "name_of_escapes": with_record("\x1b[2J\n.npy"),
    "name_of_50000": with_record("n" * 50_000),
    "declared_shorter": declared(BIAS, 130),
    "declared_longer": declared(BIAS, 1000),
    "declared_4_GiB": declared(BIAS, 2**32 - 1),
    "bias_longer": record(BIAS, lambda data: data + bytes(4)),
    "bias_shorter": record(BIAS, lambda data: data[:-1]),
    "bias_float64": record(BIAS, lambda data: data.replace(b"<f4", b"<f8")),
    "bias_integers": record(BIAS, lambda data: data.replace(b"<f4", b"<i4")),
    "bias_big_endian": record(BIAS, lambda data: data.replace(b"<f4", b">f4")),
    "bias_of_objects": record(BIAS, lambda data: data.replace(b"<f4'", b"|O' ")),
    "bias_turned": record(BIAS, lambda data: data.replace(b"False", b"True ")),
    "bias_of_another_shape": record(BIAS, lambda data: data.replace(b"(4,)", b"(5,)")),
    "bias_of_text": record(BIAS, lambda data: b"x" * len(data)),
    "bias_nan": record(BIAS, lambda data: data[:-4] + np.float32(np.nan).tobytes()),
    "npy_version_9": record(BIAS, lambda data: data.replace(b"NUMPY\1", b"NUMPY\x09")),
    "bomb_header": lambda case: bomb(case.intact, "header.npy"),
    "bomb_bias": bomb_bias,
    "bomb_declared_small": lambda case: declared(BIAS, 144)(
        SimpleNamespace(intact=bomb_bias(case))
    ),
    # masks and values
    "bit_beyond_the_mask": bits(put_at(-1, 1)),
    "mask_with_a_bit_more": bits(lambda a: put_at(0, 255 if a[0] != 255 else 0)(a)),
    "mask_shorter": bits(lambda a: a[:-1]),
    "mask_longer": bits(lambda a: np.append(a, np.uint8(0))),
    "mask_of_bytes": bits(lambda a: np.unpackbits(a)[:108]),
    "mask_of_floats": bits(lambda a: a.astype("<f4")),
    "a_value_more": values(lambda a: np.append(a, np.float32(1))),
    "a_value_fewer": values(lambda a: a[:-1]),
    "values_none": values(lambda a: a[:0]),
    "values_nan": values(put_at(3, np.nan)),
    "values_infinite": values(put_at(0, -np.inf)),
    "values_half": values(lambda a: a.astype("<f2")),
    "values_double": values(lambda a: a.astype("<f8")),
    "values_in_two_rows": values(lambda a: np.stack([a, a])),
    # the header
    "header_empty": record("header.npy", lambda data: as_header(b"")),
    "header_of_2_MiB": header(lambda content: b" " * 2**21),
    "header_not_json": header(lambda content: b"width = 4"),
    "header_not_utf8": header(lambda content: b"\xff\xfe{}"),
    "header_deep": header(lambda content: b"[" * 10**5),
    "header_of_floats": record("header.npy", lambda data: data.replace(b"|u1", b"<f4")),
    "header_list": header(lambda content: [content]),
    "header_null": header(lambda content: None),
    "another_format": field(format="weights"),
    "version_2": field(version=2),
    "version_text": field(version="1"),
    "no_version": header(lambda content: {k: v for k, v in content.items() if k != "version"}),
    "no_width": header(lambda content: {k: v for k, v in content.items() if k != "width"}),
    "unknown_field": field(license="mine"),
    "field_of_escapes": field(**{"\x1b[2J\n": 1}),
    "dense_that_is_a_ticket": field(kind="dense"),
    "half_that_is_whole": field(half=True),
    "another_kind": field(kind="quantized"),
    "list_kind": field(kind=["ticket"]),
    "another_network": field(arch="resnet32"),
    "unknown_network": field(arch="vgg"),
    "list_network": field(arch=["resnet18"]),
    "width_8": field(width=8),
    "width_0": field(width=0),
    "width_true": field(width=True),
    "width_float": field(width=4.0),
    "width_text": field(width="4"),
    "width_null": field(width=None),
    "width_4096": field(width=4096),
    "width_peta": field(width=PETA),
    "width_too_long": number("width", b"9" * 5000),
    "classifiers_3": field(classifiers=3),
    "classifiers_peta": field(classifiers=PETA),
    "classes_3": field(classes_per_classifier=3),
    "classes_negative": field(classes_per_classifier=-2),
    "density_of_another": field(density=50.0),
    "density_nan": number("density", b"NaN"),
    "density_infinite": number("density", b"1e999"),
    "density_text": field(density="all"),
    "dataset_of_a_million": field(dataset="d" * 10**6),
    "order_repeats": field(class_order=[4, 2, 7, 7]),
    "order_too_short": field(class_order=[4, 2, 7]),
    "order_of_text": field(class_order=["4", "2", "7", "6"]),
    "order_negative": field(class_order=[4, 2, 7, -6]),
    "order_huge": field(class_order=[4, 2, 7, 10**400]),
    "order_text": field(class_order="4276"),
    "names_too_many": field(class_names=[*"42763"]),
    "names_of_numbers": field(class_names=[4, 2, 7, 6]),
    "mean_of_two": field(mean=[0.5, 0.5]),
    "mean_nan": number("mean", b"[NaN, 0, 0]"),
    "std_zero": field(std=[0.0, 0.5, 0.5]),
    "std_infinite": number("std", b"[1, 1, Infinity]"),
    "image_size_peta": field(image_size=[PETA, PETA]),
    "image_size_number": field(image_size=32),
    "state_3": field(state=3),
    "state_0": field(state=0),
    "accuracy_of_one": field(accuracy=[90.0]),
    "accuracy_101": field(accuracy=[90.0, 101]),
    "accuracy_nan": number("accuracy", b"[NaN, 1]"),
    "command_list": field(command=["main_TD.py"]),
    "checksum_short": field(sha256="00"),
}


def shape(**changed):
    """The intact shrunk file with other shapes in its header; the arrays stay."""

    def change(content):
        shapes = content["shapes"] | {key.replace("_", "."): each for key, each in changed.items()}
        return content | {"shapes": {k: each for k, each in shapes.items() if each is not None}}

    return header(change)


def channels(name, change):
    """The intact shrunk file with channel numbers changed."""

    def change_record(data):
        array = change(np.frombuffer(data, "<i8", offset=128).copy())
        return packed.npy_start(array.dtype, array.shape) + array.tobytes()

    return record(f"{name}.npy", change_record)


SHRUNK = {
    "cut": lambda case: case.intact[: len(case.intact) // 2],
    "ticket": field(kind="ticket"),
    "dense": field(kind="dense"),
    "half": field(half=True),
    "no_shapes": header(lambda content: {k: v for k, v in content.items() if k != "shapes"}),
    "empty_shapes": field(shapes={}),
    "list_of_shapes": field(shapes=[[1, 2]]),
    "another_size": field(image_size=[16, 16]),
    "another_width": field(width=8),
    "fewer_heads": field(classifiers=1, class_order=[4, 2], class_names=["4", "2"], state=None),
    "negative_shape": shape(constant=[-1]),
    "float_shape": shape(constant=[32.0]),
    "shape_of_a_terabyte": shape(constant=[2**20, 2**20]),
    "shape_of_two_gigabytes": shape(constant=[2**20, 2**9]),
    "one_tensor_less": shape(constant=None),
    "one_tensor_more": shape(more=[1]),
    "name_of_escapes": shape(**{"\x1b[2J\n": [1]}),
    "beyond_the_stream": channels("layer2.1.reads", put_at(-1, 10**9)),
    "below_zero": channels("layer2.1.reads", put_at(0, -1)),
    "twice": channels("layer2.1.writes", put_at(0, 1)),
    "carried_from_nowhere": channels("layer2.1.carry", put_at(0, 2**62)),
    "image_of_0": channels("image_size", put_at(0, 0)),
}

PICTURES = {
    **{kind: make for kind, make in DAMAGED.items() if kind != "cut_last_byte"},  # Pillow reads it
    **hostile(as_pickle, FEW),
    "array": lambda case: npy(PLAIN % "3072,", bytes(12288)),
    "flipped_bit": lambda case: flipped(case.intact, len(case.intact) // 2),
    "of_20000_pixels_a_side": lambda case: (
        case.intact[:16] + (20_000).to_bytes(4, "big") * 2 + case.intact[24:]
    ),
    "of_no_pixels": lambda case: case.intact[:16] + bytes(8) + case.intact[24:],
    "postscript": lambda case: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "svg": lambda case: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}

# ------------------------------------------------------------------------------ published data


def forged(kind, flags, content, itemsize=-1, **state):
    """An array or scalar with a false state of its dtype."""
    fields = state.get("fields")
    names = tuple(fields) if fields else None
    state = (3, "|", state.get("subarray"), names, fields, itemsize, 1, flags)
    dtype = reduced(np.dtype, (kind, False, True), state)
    if isinstance(content, np.ndarray):
        made = (np.ndarray, (0,), b"b")
        state = (1, content.shape, dtype, False, content.tobytes())
        return reduced(np._core.multiarray._reconstruct, made, state)
    return reduced(np._core.multiarray.scalar, (dtype, content))


def within(value):
    """The intact pickle with `value` as its class 9 or pool."""

    def make(case):
        content = pickle.loads(case.intact)
        return pickle.dumps(content | {"data" if "data" in content else 9: value}, 4)

    return make


def of_shape(*shape):
    made = (np.ndarray, (0,), b"b")
    state = (1, shape, np.dtype("u1"), False, bytes(432))
    return within(reduced(np._core.multiarray._reconstruct, made, state))


def raw(opcodes):
    return lambda case: b"\x80\x04" + opcodes + b"."


PICKLES = {
    **DAMAGED,
    **hostile(as_pickle),
    "objects_of_bytes": within(reduced(np.ndarray, ((1,), np.dtype("O"), bytes(8)))),
    "array_over_bytes": within(reduced(np.ndarray, ((9, 12, 12, 3), np.dtype("u1"), bytes(3888)))),
    "forged_pointer": within(forged("S8", 4, b"12345678", 2**30)),
    "forged_pointer_small": within(forged("S8", 4, b"12345678", 64)),
    "forged_list": within(forged("S8", 2, np.zeros(4, "S8"))),
    "forged_references": within(forged("u1", 1, images(6))),
    "forged_all_flags": within(forged("u1", 0x7F, images(6))),
    "forged_negative": within(forged("S8", 0, b"12345678", -100)),
    "forged_fields": within(forged("S8", 0, b"1234", 8, fields={"a": (np.dtype("S99"), 9)})),
    "forged_subarray": within(forged("S8", 0, b"1234", 8, subarray=(np.dtype("S8"), (10**6,)))),
    "peta": of_shape(PETA, 12, 12, 3),
    "overflow": of_shape(2**62, 4, 1, 3),
    "negative": of_shape(-1, 12, 12, 3),
    "peta_bytes": raw(b"\x8e" + PETA.to_bytes(8, "little")),
    "peta_text": raw(b"\x8d" + PETA.to_bytes(8, "little")),
    "peta_bytearray": raw(b"\x96" + PETA.to_bytes(8, "little")),
    "peta_frame": raw(b"\x95" + PETA.to_bytes(8, "little")),
    "memo_bomb": memo_bomb,
    "methods": lambda case: method_bomb([("data", b"N"), (9, b"N"), (8, b"N")]),
    "persistent_text": raw(b"Phello\n"),
    "persistent_tuple": raw(put(("storage", 3)) + b"Q"),
    "out_of_band": raw(b"\x97"),
    "deep": raw(b"]" * 10**5 + b"a" * (10**5 - 1)),
    "of_itself": raw(b"}\x94" + put(9) + b"h\x00s"),
    "keys_without_hash": raw(b"}]Ns"),
    "state_of_a_function": raw(named("numpy", "dtype") + b"N" + put({"__name__": "x"}) + b"\x86b"),
    "lists": within(images(6).tolist()),
    "floats": within(images(6).astype(np.float32)),
    "bools": within(images(6) > 100),
    "objects": within(np.array([None, 3], dtype=object)),
    "name_of_escapes": raw(named("o\x1b[2J", "system")),
    "name_of_a_million": raw(named("o" * 10**6, "system")),
}

# ------------------------------------------------------------------------------ JSON


def deep(case):
    return b"[" * 10**6


def result(*path_and_value):
    """The intact results with one value changed: (key, ..., key, value)."""

    def make(case):
        *path, last, value = path_and_value
        content = json.loads(case.intact)
        inner = functools.reduce(lambda inner, key: inner[key], path, content)
        inner[last] = value
        return json.dumps(content).encode()

    return make


def value(text):
    """The intact results with `text` as the first mean."""
    return lambda case: case.intact.replace(b'"mean": 90.0', b'"mean": ' + text, 1)


RESULTS = {
    **DAMAGED,
    **hostile(as_pickle, FEW),
    "deep": deep,
    "deep_inside": value(b"[" * 10**5 + b"]" * 10**5),
    "not_utf8": lambda case: case.intact.replace(b"digits", b"\xff\xfe"),
    "list": lambda case: b"[1, 2]",
    "null": lambda case: b"null",
    "nan": value(b"NaN"),
    "infinite": value(b"-Infinity"),
    "too_large_a_float": value(b"1e999"),
    "huge": value(b"9" * 400),
    "too_long_a_number": value(b"9" * 5000),
    "text_for_a_mean": value(b'"ninety"'),
    "list_for_a_mean": value(b"[90]"),
    "null_for_a_mean": value(b"null"),
    "true_for_a_mean": value(b"true"),
    "nan_density": result("states", 0, "density", float("nan")),
    "text_density": result("states", 1, "density", "full"),
    "text_state": result("states", 0, "state", "one"),
    "list_state": result("states", 0, "state", [1]),
    "float_state": result("states", 0, "state", 1.5),
    "huge_state": result("states", 1, "state", 10**400),
    "negative_state": result("states", 1, "state", -1),
    "text_row": result("states", 0, "a row"),
    "no_states": result("states", []),
    "states_of_a_dict": result("states", {"1": {}}),
    "unknown_script": result("script", "main_XY"),
    "list_script": result("script", ["main_TD"]),
    "peta_tasks": result("config", "classifiers", PETA),
    "negative_tasks": result("config", "classifiers", -1),
    "text_tasks": result("config", "classifiers", "two"),
    "float_tasks": result("config", "classifiers", 2.5),
    "null_config": result("config", None),
    "escapes": result("script", "\x1b[2J"),
    "bottom_up_without_dense": result("script", "main_BU"),
}


def meta(**changed):
    return lambda case: json.dumps(META | changed).encode()


METAS = {
    **DAMAGED,
    **hostile(as_pickle, FEW),
    "deep": deep,
    "not_utf8": lambda case: case.intact.replace(b"class 9", b"\xff\xfe"),
    "list": lambda case: b"[1, 2]",
    "null": lambda case: b"null",
    "no_dataset": lambda case: b'{"names": {}}',
    "no_names": lambda case: b'{"dataset": "cifar10"}',
    "another": meta(dataset="digits"),
    "list_dataset": meta(dataset=["cifar10"]),
    "dataset_of_escapes": meta(dataset="\x1b[2J\n"),
    "dataset_of_a_million": meta(dataset="d" * 10**6),
    "list_names": meta(names=["truck", "ship"]),
    "text_names": meta(names="truck"),
    "null_names": meta(names=None),
    "name_of_no_class": meta(names={"truck": "9"}),
    "too_long_a_class": meta(names={"9" * 5000: "truck"}),
    "dict_for_a_name": meta(names={"9": {"truck": 9}}),
    "nan_for_a_name": meta(names={"9": float("nan")}),
}

# ------------------------------------------------------------------------------ the tests

TABLES = {".pt": CHECKPOINTS, ".npy": ARRAYS, ".npz": ARCHIVES, ".pkl": PICKLES}
SOFT = ("img", "dis_label", "dis_label_main")
KINDS = {name: TABLES.get(Path(INPUTS[name].path).suffix) for name in INPUTS}
KINDS |= dict.fromkeys(SOFT, ARRAYS | NOT_FINITE) | {"meta": METAS, "results": RESULTS}
KINDS |= {name: PACKED for name in INPUTS if name.startswith("ticket")} | {"picture": PICTURES}
KINDS["shrunk"] = SHRUNK
KINDS["checkpoint_packed"] = {"of_width_4096": of_width_4096} | CHECKPOINTS
KINDS["ticket"] = PACKED | {"unknown_dataset": field(dataset="mnist")}  # classify needs no set
# Inputs that are read by the same code share the kinds among them: (first, step).
SHARES = {"weight": (0, 2), "dis_label": (0, 3), "dis_label_main": (1, 3), "unlabeled": (2, 3)}
SHARES |= {"ticket_weight": (0, 20), "ticket_mask": (5, 20), "ticket_packed": (10, 20)}
SHARES |= {"ticket_unpacked": (0, 12), "ticket_classifies": (15, 20), "checkpoint_packed": (0, 8)}
for start, part in enumerate(PARTS.values()):
    SHARES |= {f"prepared_{part}": (start % 3, 3), f"published_{part}": (start % 3, 3)}
CASES = []
for name, kinds in KINDS.items():
    start, step = SHARES.get(name, (0, 1))
    CASES += [(name, kind) for kind in list(kinds)[start::step]]


@pytest.fixture(scope="module")
def limited(scripts):
    """The scripts, where possible limited to 1 GiB of memory beyond what the imports use."""
    if not hasattr(resource, "prlimit"):
        yield scripts
        return
    scripts.run(["test.py", "--help"], ".")  # returns after the imports
    pages = int(Path(f"/proc/{scripts.process.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**30
    before = resource.prlimit(scripts.process.pid, resource.RLIMIT_AS, (limit, -1))
    yield scripts
    resource.prlimit(scripts.process.pid, resource.RLIMIT_AS, before)


def content(folder):
    """{path: bytes, or False for a folder} of all that is in a folder."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def run(scripts, name, folder):
    return scripts.run(INPUTS[name].command.split(), folder)


@pytest.mark.parametrize("name", INPUTS)
def test_the_intact_file_is_accepted(scripts, intact, tmp_path, name):
    """Otherwise the tests below would show nothing."""
    folder = shutil.copytree(intact, tmp_path / "work")
    ended = run(scripts, name, folder)
    if name == "unlabeled":  # the official files, which are read next, are missing
        assert ended.status == 2 and "--raw raw: holds no intact CIFAR10" in ended.err
    else:
        assert ended.status == 0 and not ended.err, ended


@pytest.mark.filterwarnings("ignore:.*(quantized|nested) tensor")
@pytest.mark.parametrize("name, kind", CASES, ids=["-".join(case) for case in CASES])
def test_a_hostile_file_is_rejected_and_does_nothing(limited, intact, tmp_path, name, kind):
    folder = shutil.copytree(intact, tmp_path / "work", copy_function=os.link)
    command, path, also = INPUTS[name]
    naming = re.compile(rf"\b{Path(path).parent}: .*\b{re.escape(Path(path).name)}\b")
    case = SimpleNamespace(marker=tmp_path / "marker", intact=(folder / path).read_bytes())
    if path.endswith(".pt"):
        case.state = torch.load(folder / path, weights_only=True)
    data = KINDS[name][kind](case)
    (folder / path).unlink()
    if data is None:
        (folder / path).mkdir()
    else:
        (folder / path).write_bytes(data)
    before = content(tmp_path)
    ended = run(limited, name, folder)
    assert content(tmp_path) == before, ended
    assert ended.status == 2, ended
    (line,) = ended.err.splitlines()
    first, module, *_ = command.split()
    script = module.rpartition(".")[2] + ".py" if first == "-m" else first
    assert line.startswith(script + ": ") and "Traceback" not in ended.out
    assert path in line or (also and also in line) or naming.search(line), line
    assert line.isprintable() and len(line) < 1000, line[:2000]
    if kind in ("bomb", "deflated"):
        assert re.search("compressed|archive", line), line
    if "bomb" in kind:
        assert not re.search("memory|allocate", line, re.IGNORECASE), line


def test_a_name_that_looks_like_a_formula_is_drawn_as_text(scripts, intact, tmp_path):
    folder = shutil.copytree(intact, tmp_path / "work")
    path = folder / INPUTS["results"].path
    make = result("config", "dataset", "$\\frac$")
    path.write_bytes(make(SimpleNamespace(intact=path.read_bytes())))
    ended = run(scripts, "results", folder)
    assert ended.status == 0 and not ended.err, ended
    assert r"$\frac$" in (folder / "out/report.svg").read_text()


def test_torch_would_write_the_patch_of_a_source_check(tmp_path, monkeypatch):
    """As for the payloads: loaded without protection, the file is harmful."""
    path, marker = tmp_path / "hostile.pt", tmp_path / "marker"
    path.write_bytes(source_check(SimpleNamespace(marker=marker)))
    function = FunctionType(torch._utils._rebuild_tensor_v2.__code__, vars(torch._utils))
    monkeypatch.setattr(torch._utils, "_rebuild_tensor_v2", function)  # the file renames it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert marker.with_suffix(".patch").exists()
