"""Published checkpoints and data load, ours have their form, hostile files are rejected.

Also: how files are written, the metrics, the random seeds.
"""

import contextlib
import errno
import hashlib
import importlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

import pruning_utils
import trainer
import utils
from datasets.spec import check_images
from models import ResNet18
from runtime.arrays import load_array, load_arrays_pickle, save_array
from runtime.checkpoint import load_checkpoint, read_state_dict, save_checkpoint
from runtime.errors import UserError
from runtime.files import atomic_write, file_checksum, temp_path
from runtime.metrics import average_incremental_accuracy, forgetting

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------ published form


def published_model(width=4, classes=2, tasks=3, pruned=True):
    """The published network's parts under their names, masked by torch; without a forward()."""

    def part(**children):
        made = nn.Module()
        for name, child in children.items():
            made.add_module(name, child)
        return made

    def conv(inputs, outputs, side=3):
        return nn.Conv2d(inputs, outputs, side, bias=False)

    def block(inputs, outputs):
        made = part(
            bn1=nn.BatchNorm2d(inputs),
            conv1=conv(inputs, outputs),
            bn2=nn.BatchNorm2d(outputs),
            conv2=conv(outputs, outputs),
        )
        if inputs != outputs:
            made.add_module("shortcut", nn.Sequential(conv(inputs, outputs, 1)))
        return made

    def heads():
        return nn.ModuleList(nn.Linear(8 * width, classes) for _ in range(tasks))

    sizes = [width, width, 2 * width, 4 * width, 8 * width]
    layers = {
        f"layer{i}": nn.Sequential(block(sizes[i - 1], sizes[i]), block(sizes[i], sizes[i]))
        for i in (1, 2, 3, 4)
    }
    model = part(conv1=conv(3, width), **layers, linear_main=heads(), linear=heads())
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.num_batches_tracked.fill_(5)
    if pruned:
        convs = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d)]
        torch_prune.global_unstructured(convs, torch_prune.L1Unstructured, amount=0.6)
    return model


def published_names(pruned, tasks=3):
    """The keys of a published state dict (docs/METHOD.md section 3)."""
    convs = ["conv1", "layer2.0.shortcut.0", "layer3.0.shortcut.0", "layer4.0.shortcut.0"]
    names = []
    for block in ("1.0", "1.1", "2.0", "2.1", "3.0", "3.1", "4.0", "4.1"):
        convs += [f"layer{block}.conv1", f"layer{block}.conv2"]
        for norm in ("bn1", "bn2"):
            for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                names.append(f"layer{block}.{norm}.{key}")
    for conv in convs:
        names += [f"{conv}.weight_orig", f"{conv}.weight_mask"] if pruned else [f"{conv}.weight"]
    for t in range(tasks):
        for heads in ("linear_main", "linear"):
            names += [f"{heads}.{t}.weight", f"{heads}.{t}.bias"]
    return set(names)


def published_checkpoint(model, lr=0.01):
    """What the published scripts stored: the optimizer is the object itself, after some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
    assert optimizer.state[model.linear[0].weight]["momentum_buffer"].abs().sum() > 0
    return {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "best_prec1": torch.tensor(97.5),
        "optimizer": optimizer,
    }


def same(a, b):
    """Whether two dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


zip_or_legacy = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@zip_or_legacy
@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "dense"])
def test_published_checkpoints_load(tmp_path, zipped, pruned):
    torch.manual_seed(0)
    published = published_model(pruned=pruned)
    content, path = published_checkpoint(published), tmp_path / "published.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = load_checkpoint(path)
    assert loaded.keys() == content.keys() and loaded["epoch"] == 3
    assert loaded["best_prec1"] == 97.5
    assert not isinstance(loaded["optimizer"], torch.optim.Optimizer)  # a Stub
    assert same(loaded["state_dict"], content["state_dict"])
    state = read_state_dict(path)
    assert same(state, content["state_dict"]) and set(state) == published_names(pruned)
    # as test.py does
    model = ResNet18(2, 3, width=4)
    pruning_utils.load_state(model, state, source=f"--pretrained {path}")
    assert same(model.state_dict(), published.state_dict())
    # as main_train does: all weights, then the masks
    pruning_utils.load_state(model, state, masks={}, source=f"--weight {path}")
    for name, conv in published.named_modules():
        if isinstance(conv, nn.Conv2d):
            weight = conv.weight_orig if pruned else conv.weight
            assert torch.equal(model.get_submodule(name).weight, weight)
    if pruned:
        pruning_utils.apply_mask(model, pruning_utils.load_masks(path))
        assert same(model.state_dict(), published.state_dict())


@zip_or_legacy
def test_raw_state_dicts_load(tmp_path, zipped):
    state, path = published_model().state_dict(), tmp_path / "raw.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(path), state)


@zip_or_legacy
def test_checkpoints_of_old_versions_and_of_a_gpu_load(tmp_path, monkeypatch, zipped):
    """Old optimizers hold a placeholder for lr; storages of a GPU name it as their location."""

    class Required:
        pass

    Required.__module__, Required.__qualname__ = "torch.optim.optimizer", "_RequiredParameter"
    module = importlib.import_module(Required.__module__)
    monkeypatch.setattr(module, "_RequiredParameter", Required, raising=False)
    content, path = published_checkpoint(published_model()), tmp_path / "old.pt"
    content["optimizer"].defaults["lr"] = Required()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in path.read_bytes()
    state = read_state_dict(path)
    assert same(state, content["state_dict"])
    assert {value.device.type for value in state.values()} == {"cpu"}


# ------------------------------------------------------------------------------ our form


def masks_for(model):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.rand(conv.weight.shape, generator=generator) < 0.3).float()
        for name, conv in pruning_utils.convolutions(model).items()
    }


@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "dense"])
def test_our_checkpoints_have_the_published_form_and_load_without_code(tmp_path, args, pruned):
    model = trainer.make_model(args, torch.device("cpu"))
    pruning_utils.apply_mask(model, masks_for(model) if pruned else {})
    optimizer = trainer.make_optimizer(model, args, 0.01)
    model(torch.randn(4, 3, 8, 8), 2, main_fc=False).square().sum().backward()
    optimizer.step()
    path = tmp_path / "new" / "folder" / "ours.pt"
    save_checkpoint(path, trainer.checkpoint_dict(model, optimizer, 7, 61.5))
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"epoch", "state_dict", "best_prec1", "optimizer"}
    assert content["epoch"] == 7 and content["best_prec1"] == 61.5
    assert set(content["state_dict"]) == published_names(pruned)
    assert same(content["state_dict"], model.state_dict())
    # as published: a plain model, masked before it loads
    plain = published_model(pruned=pruned)
    plain.load_state_dict(content["state_dict"], strict=True)
    assert same(plain.state_dict(), model.state_dict())
    torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9).load_state_dict(content["optimizer"])
    assert same(read_state_dict(path), model.state_dict())
    assert not list(path.parent.glob("*.part")) and len(list(path.parent.iterdir())) == 1


# ------------------------------------------------------------------------------ hostile files


def call(module, name, argument):
    """A pickle that calls module.name(argument) when it is loaded."""
    body = pickle.dumps(argument, 3)[2:-1]  # without the opcodes PROTO and STOP
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + body + b"\x85R."


def hostile_pickle(kind, marker):
    """A pickle that creates the file `marker` if what it names is called."""
    shell, python = f"echo > {marker}", f"open({str(marker)!r}, 'w').close()"
    if kind == "nested":  # a pickle inside a tensor's storage
        return call("torch.storage", "_load_from_bytes", call("os", "system", shell))
    module, name = kind.rsplit(".", 1)
    return call(module, name, python if name in ("eval", "exec") else shell)


def hostile_zip(payload, extra=()):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", payload), ("version", b"3\n"), *extra):
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def hostile_tar(payload):
    """The format of PyTorch before 0.1.10."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            data = payload if name == "pickle" else pickle.dumps(0, 2) + pickle.dumps([], 2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def hostile_file(form, payload):
    legacy = b"".join(pickle.dumps(v, 2) for v in (MAGIC_NUMBER, PROTOCOL_VERSION, {}))
    forms = {
        "bare": payload,  # in place of the magic number
        "legacy": legacy + payload,
        "legacy_keys": legacy + pickle.dumps({}, 2) + payload,  # in place of the storage keys
        "zip": hostile_zip(payload),
        "tar": hostile_tar(payload),
        "tar_and_zip": hostile_tar(payload) + hostile_zip(payload),
    }
    return forms[form]


def rejects(load, path):
    """Check that load(path) raises a UserError of one line that begins with the path; its text."""
    with pytest.raises(UserError) as error:
        load(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and len(text.splitlines()) == 1
    assert "trust" not in text and "safe_globals" not in text  # PyTorch's advice to load it anyway
    return text


KINDS = [
    "os.system",
    "posix.system",
    "builtins.eval",
    "__builtin__.eval",
    "builtins.exec",
    "nested",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["bare", "legacy", "legacy_keys", "zip", "tar", "tar_and_zip"])
def test_hostile_checkpoints_are_rejected_and_do_nothing(tmp_path, form, kind):
    path, marker = tmp_path / "hostile.pt", tmp_path / "marker"
    path.write_bytes(hostile_file(form, hostile_pickle(kind, marker)))
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists()  # it is harmful
    marker.unlink()
    rejects(load_checkpoint, path)
    rejects(read_state_dict, path)
    rejects(pruning_utils.load_masks, path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_torchscript_archives_are_rejected(tmp_path):
    path, marker = tmp_path / "script.pt", tmp_path / "marker"
    payload = hostile_pickle("os.system", marker)
    path.write_bytes(hostile_zip(payload, [("constants.pkl", payload)]))
    rejects(load_checkpoint, path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*deprecated")
def test_real_torchscript_archives_are_rejected(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    rejects(load_checkpoint, path)


@zip_or_legacy
@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.99])
def test_truncated_checkpoints_are_rejected(tmp_path, zipped, share):
    path = tmp_path / "cut.pt"
    torch.save(published_checkpoint(published_model()), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    rejects(load_checkpoint, path)


def test_two_checkpoints_in_one_file_are_rejected(tmp_path):
    """PyTorch reads the first; zipfile, which verifies the checksums, reads the second."""
    first, second = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.ones(3)}, first)
    torch.save({"a": torch.zeros(3)}, second)
    path = tmp_path / "two.pt"
    path.write_bytes(first.getvalue() + second.getvalue())
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(3))
    rejects(load_checkpoint, path)


def write_other(path, kind):
    """Put something else than one of our files at `path`."""
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        contents = {"empty": b"", "text": b"loss 0.3\naccuracy 90\n", "newline": b"\n"}
        path.write_bytes(contents[kind])
    return path


other_kinds = pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "newline"])
LOADERS = [load_checkpoint, load_arrays_pickle, load_array]


@other_kinds
@pytest.mark.parametrize("load", LOADERS)
def test_missing_and_other_files_are_rejected(tmp_path, kind, load):
    rejects(load, write_other(tmp_path / "other", kind))


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 3, "text"])
def test_files_of_other_objects_are_rejected(tmp_path, content):
    path = tmp_path / "else.pt"
    torch.save(content, path)
    rejects(load_checkpoint, path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"state_dict": {}},
        {"state_dict": [torch.zeros(2)]},
        {"state_dict": {"conv1.weight": 3}},
        {"conv1.weight": torch.zeros(2), "epoch": 3},
        {0: torch.zeros(2)},
        {"state_dict": {0: torch.zeros(2)}},
    ],
)
def test_checkpoints_without_a_state_dict_are_rejected(tmp_path, content):
    path = tmp_path / "else.pt"
    torch.save(content, path)
    rejects(read_state_dict, path)


# ------------------------------------------------------------------------------ published data


def random_images(n, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, 4, 4, 3), dtype=np.uint8)


def published_sets():
    """A dict of classes, as in train, and the pool with its labels."""
    parts = {c: random_images(5 + c, c) for c in range(3)}
    return parts, {"data": random_images(9), "label": np.arange(9), "count": np.int64(9)}


def same_arrays(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_arrays(a[key], b[key]) for key in a)
    return type(a) is type(b) and np.asarray(a).dtype == np.asarray(b).dtype and np.all(a == b)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_published_data_loads(tmp_path, protocol):
    for number, content in enumerate(published_sets()):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        assert same_arrays(load_arrays_pickle(path), content)


@pytest.mark.parametrize("protocol", [2, 5])
def test_published_data_of_older_numpy_loads(tmp_path, monkeypatch, protocol):
    """NumPy 1 called numpy._core numpy.core."""
    monkeypatch.setattr(pickle._Framer, "start_framing", lambda framer: None)  # no lengths
    content, file = published_sets()[1], io.BytesIO()
    pickle._Pickler(file, protocol).dump(content)
    data, path = file.getvalue(), tmp_path / "old.pkl"
    for module in (b"multiarray", b"numeric"):  # in protocol 5 the length stands before a name
        new, old = b"numpy._core." + module, b"numpy.core." + module
        data = data.replace(bytes([0x8C, len(new)]) + new, bytes([0x8C, len(old)]) + old)
        data = data.replace(new, old)
    assert b"numpy.core" in data and b"_core" not in data
    path.write_bytes(data)
    assert same_arrays(load_arrays_pickle(path), content)


def test_published_data_of_python_2_loads(tmp_path, monkeypatch):
    """A str of Python 2, also the bytes of an array, is a BINSTRING, to be read as latin-1."""

    def save_str(pickler, text):
        data = text if isinstance(text, bytes) else text.encode("latin-1")
        pickler.write(b"T" + len(data).to_bytes(4, "little") + data)

    kinds = pickle._Pickler.dispatch | {str: save_str, bytes: save_str}
    monkeypatch.setattr(pickle._Pickler, "dispatch", kinds)
    content, file = {"data": random_images(9), "label": np.arange(9)}, io.BytesIO()
    pickle._Pickler(file, 2).dump(content)
    path = tmp_path / "python2.pkl"
    path.write_bytes(file.getvalue().replace(b"numpy._core", b"numpy.core"))
    assert same_arrays(load_arrays_pickle(path), content)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_data_is_rejected_and_does_nothing(tmp_path, kind):
    path, marker = tmp_path / "hostile.pkl", tmp_path / "marker"
    payload = hostile_pickle(kind, marker)
    with contextlib.suppress(Exception):
        pickle.loads(payload)
    assert marker.exists()  # it is harmful
    marker.unlink()
    path.write_bytes(payload)
    rejects(load_arrays_pickle, path)
    assert not marker.exists()


def test_hostile_objects_inside_an_array_are_rejected(tmp_path):
    path, marker = tmp_path / "hostile.pkl", tmp_path / "marker"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    path.write_bytes(pickle.dumps({0: np.array([Hostile()], dtype=object)}))
    rejects(load_arrays_pickle, path)
    assert not marker.exists()


def test_names_with_line_breaks_give_one_line(tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(b"\x80\x04\x8c\x03o\ns\x8c\x06system\x93.")
    rejects(load_arrays_pickle, path)
    path.write_bytes(b"\x80\x02co\rs\nsystem\n.")
    rejects(load_checkpoint, path)


def test_truncated_data_is_rejected(tmp_path):
    path, content = tmp_path / "cut.pkl", pickle.dumps(published_sets()[0], 4)
    for share in (0.01, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        rejects(load_arrays_pickle, path)


def reduced(*recipe):
    """An object that pickles as a call: (function, arguments[, state])."""
    return type("Reduced", (), {"__reduce__": lambda self: recipe})()


@pytest.mark.parametrize("forged", [False, True])
def test_bytes_of_the_file_never_become_pointers(tmp_path, forged):
    """NumPy would take these bytes (all zero here) for the address of an object.

    forged: in a record of one object, whose state claims that it holds none.
    """
    dtype, path = np.dtype("O"), tmp_path / "hostile.pkl"
    if forged:
        state = (3, "|", None, ("a",), {"a": (dtype, 0)}, 8, 1, 0)
        dtype = reduced(np.dtype, ("V8", False, True), state)
    path.write_bytes(pickle.dumps(reduced(np.ndarray, ((1,), dtype, bytes(8)))))
    rejects(load_arrays_pickle, path)


def test_object_arrays_are_not_images(tmp_path):
    path, objects = tmp_path / "objects.pkl", np.empty(3, dtype=object)
    objects[:] = [random_images(1), "text", 3]
    two = random_images(2)
    for content in (objects, two.astype(object), two.tolist(), two[0]):
        path.write_bytes(pickle.dumps({"data": content}))
        with pytest.raises(UserError) as error:  # when loaded, or when used as images
            check_images(f"{path}: 'data'", load_arrays_pickle(path)["data"])
        assert str(error.value).startswith(f"{path}: ")
    path.write_bytes(pickle.dumps({"data": two}))
    check_images(path, load_arrays_pickle(path)["data"])


# ------------------------------------------------------------------------------ .npy files


def npy(header, data=bytes(16)):
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def archived(array):
    file = io.BytesIO()
    np.savez(file, array=array)
    return file.getvalue()


@pytest.mark.parametrize("array", [random_images(3), np.arange(4), np.float32([[0.5]])])
def test_arrays_are_saved_and_loaded_exactly(tmp_path, array):
    path = tmp_path / "folder" / "a.npy"
    save_array(path, array)
    for found in (load_array(path), np.load(path, allow_pickle=False)):
        assert found.dtype == array.dtype and np.array_equal(found, array)


def test_object_arrays_are_not_saved(tmp_path):
    with pytest.raises(ValueError):
        save_array(tmp_path / "a.npy", np.array([{}], dtype=object))
    assert not list(tmp_path.iterdir())


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
OTHER_FILES = {
    "objects": saved(np.array([{}], dtype=object), allow_pickle=True),
    "pickle": pickle.dumps(np.arange(3)),
    "archive": archived(np.arange(300)),
    "cut_archive": archived(np.arange(300))[:200],
    "cut": saved(np.arange(300))[:1000],
    "cut_header": saved(np.arange(300))[:40],
    "object_header": npy(PLAIN.replace("<f4", "|O") % "1,"),
    "too_large": npy(PLAIN % "1000000000000000,"),
    "too_long": npy(PLAIN % "4," + " " * 11000),
    "no_header": npy("("),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_files_other_than_plain_arrays_are_rejected(tmp_path, kind):
    path = tmp_path / "odd.npy"
    path.write_bytes(OTHER_FILES[kind])
    rejects(load_array, path)


def test_hostile_arrays_do_nothing(tmp_path):
    path, marker = tmp_path / "hostile.npy", tmp_path / "marker"
    path.write_bytes(hostile_pickle("os.system", marker))
    rejects(load_array, path)
    path.write_bytes(npy(PLAIN.replace("<f4", "|O") % "1,", path.read_bytes()))
    rejects(load_array, path)
    assert not marker.exists()


# ------------------------------------------------------------------------------ writing


def test_a_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"2"):
        atomic_write(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new, but")
        raise error("a reason")

    with pytest.raises(error, match="a reason"):
        atomic_write(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_pickled_keeps_its_error(tmp_path):
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(tmp_path / "file", {"a": lambda: None})
    assert not list(tmp_path.iterdir())


def test_content_goes_straight_to_the_temporary_file(tmp_path):
    path = tmp_path / "file"

    def write(file):
        for size in (10_000, 20_000):
            file.write(bytes(10_000))
            file.flush()
            assert temp_path(path).stat().st_size == size and not path.exists()

    atomic_write(path, write)
    assert path.read_bytes() == bytes(20_000)


PEAK = """
import resource, sys, torch
from runtime.checkpoint import save_checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_checkpoint(sys.argv[1], {"a": torch.ones(10)})
tensor = torch.ones(2**25)  # 128 MiB
before = peak()
save_checkpoint(sys.argv[1], {"state_dict": {"a": tensor}})
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss has other units")
def test_a_checkpoint_is_not_held_twice_in_memory(tmp_path):
    command = [sys.executable, "-c", PEAK, str(tmp_path / "file")]
    grown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "file").stat().st_size > 2**27
    assert int(grown) < 2**14  # KiB: 16 MiB for a checkpoint of 128


def test_a_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    path, done = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *both: done.append("renamed") or replace(*both))
    checksum = atomic_write(path, lambda file: file.write(b"content"))
    assert done[:2] == [7, "renamed"] and len(done) == 3  # the last fsync is the folder's
    assert checksum == file_checksum(path) == hashlib.sha256(b"content").hexdigest()


def test_the_checksum_is_that_of_the_file_in_whatever_order_it_was_written(tmp_path):
    def write(file):
        file.write(b"0123456789")
        file.seek(2)
        file.write(b"ab")

    checksum = atomic_write(tmp_path / "file", write)
    assert checksum == hashlib.sha256(b"01ab456789").hexdigest()


def test_an_error_that_torch_raises_after_a_full_disk_is_a_user_error(tmp_path):
    """torch.save can end with a RuntimeError of its archive writer instead of the OSError."""

    def write(file):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    text = rejects(lambda path: atomic_write(path, write), tmp_path / "file")
    assert f"cannot be written ({os.strerror(errno.ENOSPC)})" in text
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    temp_path(tmp_path / "file").write_bytes(b"half")
    atomic_write(tmp_path / "file", lambda file: file.write(b"whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


SAVERS = {
    "checkpoint": lambda path: save_checkpoint(path, {"a": torch.zeros(100_000)}),
    "array": lambda path: save_array(path, np.zeros(100_000)),
    "bytes": lambda path: atomic_write(path, lambda file: file.write(bytes(100_000))),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_paths_that_cannot_be_written_are_rejected(tmp_path, kind):
    """A path through a file and the path of a folder, where root cannot write either."""
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for name in ("file/new", "file/more/new", "folder"):
        rejects(SAVERS[kind], tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize("limit", [10, 4_000, 20_000, 99_999])
@pytest.mark.parametrize("kind", SAVERS)
def test_a_full_disk_is_a_user_error_and_leaves_the_old_file(tmp_path, kind, limit):
    """A limit on the size of files stands in for the full disk."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        text = rejects(SAVERS[kind], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (" in text and "enforce" not in text
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------ metrics, seeds


def test_metrics_of_three_tasks_by_hand():
    matrix = [[90.0], [80.0, 60.0], [50.0, 66.0, 40.0]]
    # means 90, 70, 52
    assert average_incremental_accuracy(matrix) == pytest.approx(212 / 3)
    # task 1 falls from 90 to 50, task 2 rises from 60 to 66: 40 and -6
    assert forgetting(matrix) == pytest.approx(17)
    # the best earlier accuracy counts, neither the first nor the previous: 95-50, 60-30
    assert forgetting([[90], [95, 60], [70, 50, 10], [50, 30, 20, 10]]) == pytest.approx(
        (45 + 30 - 10) / 3
    )


def test_metrics_of_one_task():
    assert average_incremental_accuracy([[90.0]]) == 90.0
    assert forgetting([[90.0]]) is None


PURPOSES = [
    (0, "task1", 1, "random"),
    (1, "task1", 1, "random"),
    (0, "task2", 1, "random"),
    (0, "task1", 2, "random"),
    (0, "task1", 1, "new"),
    (0, "task1", 11, "random"),
    (0, "task11", "random"),
    (0, "task1", 1),
    (0,),
    (1,),
    (10, "task1", 1, "random"),
]


def test_each_purpose_has_its_own_seed():
    seeds = [utils.derive_seed(*purpose) for purpose in PURPOSES]
    assert len(set(seeds)) == len(PURPOSES) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [utils.derive_seed(*purpose) for purpose in PURPOSES]
    draws = [tuple(draw(*purpose)) for purpose in PURPOSES]
    assert len(set(draws)) == len(PURPOSES)


def draw(*purpose):
    return torch.randperm(1000, generator=utils.stream(*purpose))[:5].tolist()


def test_a_stream_depends_on_its_purpose_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(0, "task1")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.rand(3)
    draw(0, "task2")
    assert draw(0, "task1") == first
    assert utils.stream(0, "task1").device.type == "cpu"


def test_seeds_are_the_same_on_every_machine_and_in_every_run():
    """The first 8 bytes of the SHA-256 of the repr, little-endian, without the lowest bit."""
    assert utils.derive_seed(0, "initialisation") == 1026867873611578284
