"""Published checkpoints and data load, ours have their form, files are written atomically."""

import errno
import hashlib
import io
import os
import pickle
import resource

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import pruning_utils
from models import ResNet18
from runtime.checkpoint import load_checkpoint, read_weights, save_checkpoint
from runtime.errors import UserError
from runtime.files import atomic_write, file_checksum, load_pickle, save_array, save_text
from runtime.process import Interrupted

# ------------------------------------------------------------------------------ published form


def network(pruned):
    """A network whose parameters have the published names (test_model.py)."""
    torch.manual_seed(0)
    model = ResNet18(2, 3, width=4)
    if pruned:
        convs = [(conv, "weight") for conv in pruning_utils.convolutions(model).values()]
        torch_prune.global_unstructured(convs, torch_prune.L1Unstructured, amount=0.6)
    return model


def published_checkpoint(model):
    """What the published scripts stored: the optimizer is the object itself, after a step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    content = {"epoch": 3, "state_dict": model.state_dict(), "best_prec1": torch.tensor(97.5)}
    return content | {"optimizer": optimizer}


def same(a, b):
    """Whether two dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


zip_or_legacy = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@zip_or_legacy
@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "dense"])
def test_published_checkpoints_load(tmp_path, zipped, pruned):
    published = network(pruned)
    content, path = published_checkpoint(published), tmp_path / "published.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = load_checkpoint(path)
    assert loaded.keys() == content.keys() and loaded["best_prec1"] == 97.5
    assert not isinstance(loaded["optimizer"], torch.optim.Optimizer)  # a Stub
    args, state = read_weights(path)
    assert args is None and same(state, content["state_dict"])
    model = ResNet18(2, 3, width=4)
    pruning_utils.load_state(model, state)
    assert same(model.state_dict(), published.state_dict())
    pruning_utils.load_state(model, state, masks={})  # as main_train does: all weights
    for name, weight in pruning_utils.weights(published).items():
        assert torch.equal(model.get_submodule(name).weight, weight)


@zip_or_legacy
def test_checkpoints_of_a_gpu_load(tmp_path, monkeypatch, zipped):
    """Their storages name it as their location."""
    content, path = published_checkpoint(network(pruned=True)), tmp_path / "cuda.pt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in path.read_bytes()
    state = read_weights(path)[1]
    assert same(state, content["state_dict"])
    assert {value.device.type for value in state.values()} == {"cpu"}


FORMS = {
    "raw": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "net": lambda state: {"net": state, "acc": 93.1},
    "model": lambda state: {"model": state},
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
    "a NumPy scalar": lambda state: {"net": state, "acc": np.float64(93.1), "n": np.int64(3)},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_in_which_people_keep_weights_load(tmp_path, form):
    state = ResNet18(2, 3, width=4).state_dict()
    torch.save(FORMS[form](state), tmp_path / "weights.pt")
    args, found = read_weights(tmp_path / "weights.pt")
    assert args is None and same(found, state)
    assert all(type(value) is torch.Tensor for value in found.values())


def test_weights_of_half_precision_and_masks_of_parameters_load(tmp_path):
    model = ResNet18(2, 3, width=4)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    pruning_utils.load_state(model, read_weights(tmp_path / "half.pt")[1])
    weight = model.conv1.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, half["conv1.weight"].float())
    masks = pruning_utils.mask_state(pruning_utils.masks_of(model))
    torch.save({key: nn.Parameter(mask) for key, mask in masks.items()}, tmp_path / "mask.pt")
    found = pruning_utils.extract_mask(read_weights(tmp_path / "mask.pt")[1])
    pruning_utils.check_masks(model, found, "mask.pt")
    pruning_utils.apply_mask(model, found)


# ------------------------------------------------------------------------------ published data


def same_arrays(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_arrays(a[key], b[key]) for key in a)
    return type(a) is type(b) and np.asarray(a).dtype == np.asarray(b).dtype and np.all(a == b)


def published_set():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    content = {"data": images, "label": np.arange(9), 3: images[::2].transpose(0, 3, 1, 2)}
    return content | {"count": np.int64(9), "names": ["a", "é"], "scale": np.arange(3, dtype=">f4")}


@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])  # of NumPy 2, and before
@pytest.mark.parametrize("protocol", [2, 3])
def test_published_data_loads(tmp_path, protocol, core):
    content = pickle.dumps(published_set(), protocol).replace(b"numpy._core", core)
    (tmp_path / "set.pkl").write_bytes(content)
    assert same_arrays(load_pickle(tmp_path / "set.pkl"), published_set())
    (tmp_path / "set.pkl").write_bytes(pickle.dumps(published_set(), 5))
    assert same_arrays(load_pickle(tmp_path / "set.pkl"), published_set())


def test_published_data_of_python_2_loads(tmp_path):
    """As CIFAR's batches: a str of Python 2, also the bytes of an array, is read as latin-1."""
    raw = bytes(range(120, 240))
    content = b"\x80\x02}U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    content += b"K\x00\x85U\x01b\x87R(K\x01K\x02K\x3c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    content += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x78" + raw + b"tbs."
    path = tmp_path / "python2.pkl"
    path.write_bytes(content)
    expected = np.frombuffer(raw, np.uint8).reshape(2, 60)
    assert same_arrays(load_pickle(path), {"data": expected})


# ------------------------------------------------------------------------------ writing


def test_a_file_is_flushed_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path, done = tmp_path / "new" / "file", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *both: done.append("renamed") or replace(*both))
    for content in (b"first", b"second"):
        checksum = atomic_write(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content and [*path.parent.iterdir()] == [path]
        assert checksum == file_checksum(path) == hashlib.sha256(content).hexdigest()
    assert done == [5, "renamed", 6, "renamed"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "file"

    def write(file):
        file.write(b"a")
        save_text(path, "bb")  # another, in between

    atomic_write(path, write)
    assert path.read_bytes() == b"a" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), Interrupted(15), RuntimeError()])
def test_an_error_in_torch_save_is_not_hidden_by_that_of_its_archive(tmp_path, error):
    """After the second write fails, the archive is closed, which raises a RuntimeError in turn."""

    class File(io.BytesIO):
        def write(self, content):
            if self.tell():
                raise error
            return super().write(content)

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        atomic_write(tmp_path / "file", lambda _: torch.save({"a": torch.ones(9)}, File()))
    assert not [*tmp_path.iterdir()]


SAVERS = {
    "checkpoint": lambda path: save_checkpoint(path, {"a": torch.zeros(100_000)}),
    "array": lambda path: save_array(path, np.zeros(100_000)),
    "text": lambda path: save_text(path, 100_000 * "x"),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    """A folder, a pipe and a device; nor is a path through a file written."""
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in ("file/new", "file/more/new", "folder", "pipe", "/dev/null"):
        with pytest.raises(UserError, match=f"{path}: "):
            SAVERS[kind](tmp_path / path)
    assert (tmp_path / "file").read_bytes() == b"old" and (tmp_path / "pipe").is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "pipe"}


@pytest.mark.parametrize("limit", [10, 20_000, 99_999])
@pytest.mark.parametrize("kind", SAVERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, kind, limit):
    """A limit on the size of files stands in for the full disk."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"file: cannot be written \(File too large\)"):
            SAVERS[kind](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
