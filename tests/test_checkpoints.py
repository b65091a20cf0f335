"""Files: published checkpoints in, ours out, hostile ones refused; summaries and seeds."""

import contextlib
import hashlib
import importlib
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

import dataset
import pruning_utils
import trainer
import utils
from models import ResNet

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
    """The keys of a published state dict (METHOD.md section 3)."""
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
    loaded = utils.load_checkpoint(path)
    assert loaded.keys() == content.keys() and loaded["epoch"] == 3
    assert loaded["best_prec1"] == 97.5
    assert not isinstance(loaded["optimizer"], torch.optim.Optimizer)  # an inert stub
    assert same(loaded["state_dict"], content["state_dict"])
    state = utils.read_state(path)
    assert same(state, content["state_dict"]) and set(state) == published_names(pruned)
    # as test.py does
    model = ResNet(2, 3, width=4)
    pruning_utils.load_state(model, state, source=f"--pretrained {path}")
    assert same(model.state_dict(), published.state_dict())
    # as main_train does: the weights whole, the masks apart
    pruning_utils.load_state(model, state, masks={}, source=f"--weight {path}")
    for name, conv in published.named_modules():
        if isinstance(conv, nn.Conv2d):
            whole = conv.weight_orig if pruned else conv.weight
            assert torch.equal(model.get_submodule(name).weight, whole)
    if pruned:
        pruning_utils.apply_mask(model, pruning_utils.load_masks(path))
        assert same(model.state_dict(), published.state_dict())


@zip_or_legacy
def test_raw_state_dicts_load(tmp_path, zipped):
    state, path = published_model().state_dict(), tmp_path / "raw.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert same(utils.read_state(path), state)


@zip_or_legacy
def test_checkpoints_of_old_torch_versions_and_from_a_gpu_load(tmp_path, monkeypatch, zipped):
    """Old optimizers hold a placeholder for lr; storages of a GPU name it as their place."""

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
    state = utils.read_state(path)
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
def test_ours_have_the_published_form_and_load_without_any_code(tmp_path, args, pruned):
    model = trainer.make_model(args, torch.device("cpu"))
    pruning_utils.apply_mask(model, masks_for(model) if pruned else {})
    optimizer = trainer.make_optimizer(model, args, 0.01)
    model(torch.randn(4, 3, 8, 8), 2).square().sum().backward()
    optimizer.step()
    path = tmp_path / "new" / "folder" / "ours.pt"
    utils.save(path, trainer.contents(model, optimizer, 7, 61.5))
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"epoch", "state_dict", "best_prec1", "optimizer"}
    assert content["epoch"] == 7 and content["best_prec1"] == 61.5
    assert set(content["state_dict"]) == published_names(pruned)
    assert same(content["state_dict"], model.state_dict())
    # the published way: a plain model, masked before it loads
    plain = published_model(pruned=pruned)
    plain.load_state_dict(content["state_dict"], strict=True)
    assert same(plain.state_dict(), model.state_dict())
    torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9).load_state_dict(content["optimizer"])
    assert same(utils.read_state(path), model.state_dict())
    assert not list(path.parent.glob("*.part")) and len(list(path.parent.iterdir())) == 1


# ------------------------------------------------------------------------------ hostile files


def call(module, name, argument):
    """The pickle of a call: unpickling it calls module.name(argument)."""
    body = pickle.dumps(argument, 3)[2:-1]  # without the protocol's mark and the stop
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + body + b"\x85R."


def hostile_pickle(kind, marker):
    """Pickles that make the file `marker` when something calls what they name."""
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
    """The form that torch had before 0.1.10."""
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
        "bare": payload,  # where a magic number should be
        "legacy": legacy + payload,
        "legacy_keys": legacy + pickle.dumps({}, 2) + payload,  # where storage keys should be
        "zip": hostile_zip(payload),
        "tar": hostile_tar(payload),
        "tar_and_zip": hostile_tar(payload) + hostile_zip(payload),
    }
    return forms[form]


def refused(load, path):
    """The Refusal's text, which must be one line that begins with the file."""
    with pytest.raises(utils.Refusal) as refusal:
        load(path)
    text = str(refusal.value)
    assert text.startswith(f"{path}: ") and len(text.splitlines()) == 1
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
def test_hostile_checkpoints_are_refused_and_do_nothing(tmp_path, form, kind):
    path, marker = tmp_path / "hostile.pt", tmp_path / "marker"
    path.write_bytes(hostile_file(form, hostile_pickle(kind, marker)))
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists()  # it would have done harm
    marker.unlink()
    refused(utils.load_checkpoint, path)
    refused(utils.read_state, path)
    refused(pruning_utils.load_masks, path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_torchscript_archives_are_refused(tmp_path):
    path, marker = tmp_path / "script.pt", tmp_path / "marker"
    payload = hostile_pickle("os.system", marker)
    path.write_bytes(hostile_zip(payload, [("constants.pkl", payload)]))
    refused(utils.load_checkpoint, path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*deprecated")
def test_real_torchscript_archives_are_refused(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    refused(utils.load_checkpoint, path)


@zip_or_legacy
@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.99])
def test_truncated_checkpoints_are_refused(tmp_path, zipped, share):
    path = tmp_path / "cut.pt"
    torch.save(published_checkpoint(published_model()), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(utils.load_checkpoint, path)


def write_odd(path, kind):
    """Something at `path` that is no file of ours."""
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        contents = {"empty": b"", "text": b"loss 0.3\naccuracy 90\n", "newline": b"\n"}
        path.write_bytes(contents[kind])
    return path


odd_kinds = pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "newline"])
LOADERS = [utils.load_checkpoint, utils.load_arrays_pickle, utils.load_array]


@odd_kinds
@pytest.mark.parametrize("load", LOADERS)
def test_what_is_no_such_file_is_refused(tmp_path, kind, load):
    refused(load, write_odd(tmp_path / "odd", kind))


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 3, "text"])
def test_files_of_something_else_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "else.pt"
    torch.save(content, path)
    refused(utils.load_checkpoint, path)


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
def test_checkpoints_without_a_state_dict_are_refused(tmp_path, content):
    path = tmp_path / "else.pt"
    torch.save(content, path)
    refused(utils.read_state, path)


# ------------------------------------------------------------------------------ published data


def pictures(n, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, 4, 4, 3), dtype=np.uint8)


def published_sets():
    """A dict of classes, as of train, and the pool with its labels."""
    parts = {c: pictures(5 + c, c) for c in range(3)}
    return parts, {"data": pictures(9), "label": np.arange(9), "count": np.int64(9)}


def same_arrays(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_arrays(a[key], b[key]) for key in a)
    return type(a) is type(b) and np.asarray(a).dtype == np.asarray(b).dtype and np.all(a == b)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_published_data_loads(tmp_path, protocol):
    for number, content in enumerate(published_sets()):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        assert same_arrays(utils.load_arrays_pickle(path), content)


@pytest.mark.parametrize("protocol", [2, 5])
def test_published_data_of_older_numpy_loads(tmp_path, monkeypatch, protocol):
    """NumPy 1 called numpy._core numpy.core."""
    monkeypatch.setattr(pickle._Framer, "start_framing", lambda framer: None)  # no byte counts
    content, file = published_sets()[1], io.BytesIO()
    pickle._Pickler(file, protocol).dump(content)
    data, path = file.getvalue(), tmp_path / "old.pkl"
    for module in (b"multiarray", b"numeric"):  # in protocol 5 a name's length goes before it
        new, old = b"numpy._core." + module, b"numpy.core." + module
        data = data.replace(bytes([0x8C, len(new)]) + new, bytes([0x8C, len(old)]) + old)
        data = data.replace(new, old)
    assert b"numpy.core" in data and b"_core" not in data
    path.write_bytes(data)
    assert same_arrays(utils.load_arrays_pickle(path), content)


def test_published_data_of_python_2_loads(tmp_path, monkeypatch):
    """There a str, an array's bytes too, is a BINSTRING, to be read as latin-1."""

    def save_str(pickler, text):
        data = text if isinstance(text, bytes) else text.encode("latin-1")
        pickler.write(b"T" + len(data).to_bytes(4, "little") + data)

    kinds = pickle._Pickler.dispatch | {str: save_str, bytes: save_str}
    monkeypatch.setattr(pickle._Pickler, "dispatch", kinds)
    content, file = {"data": pictures(9), "label": np.arange(9)}, io.BytesIO()
    pickle._Pickler(file, 2).dump(content)
    path = tmp_path / "python2.pkl"
    path.write_bytes(file.getvalue().replace(b"numpy._core", b"numpy.core"))
    assert same_arrays(utils.load_arrays_pickle(path), content)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_data_is_refused_and_does_nothing(tmp_path, kind):
    path, marker = tmp_path / "hostile.pkl", tmp_path / "marker"
    payload = hostile_pickle(kind, marker)
    with contextlib.suppress(Exception):
        pickle.loads(payload)
    assert marker.exists()  # it would have done harm
    marker.unlink()
    path.write_bytes(payload)
    refused(utils.load_arrays_pickle, path)
    assert not marker.exists()


def test_hostile_objects_inside_an_array_are_refused(tmp_path):
    path, marker = tmp_path / "hostile.pkl", tmp_path / "marker"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    path.write_bytes(pickle.dumps({0: np.array([Hostile()], dtype=object)}))
    refused(utils.load_arrays_pickle, path)
    assert not marker.exists()


def test_names_with_line_breaks_do_not_break_the_line(tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(b"\x80\x04\x8c\x03o\ns\x8c\x06system\x93.")
    refused(utils.load_arrays_pickle, path)
    path.write_bytes(b"\x80\x02co\rs\nsystem\n.")
    refused(utils.load_checkpoint, path)


def test_truncated_data_is_refused(tmp_path):
    path, whole = tmp_path / "cut.pkl", pickle.dumps(published_sets()[0], 4)
    for share in (0.01, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        refused(utils.load_arrays_pickle, path)


def reduced(*recipe):
    """An object that pickles as a call, and perhaps a state: (function, arguments[, state])."""
    return type("Reduced", (), {"__reduce__": lambda self: recipe})()


@pytest.mark.parametrize("forged", [False, True])
def test_bytes_of_the_file_never_become_pointers(tmp_path, forged):
    """NumPy would take these bytes (all null here) for the address of an object.

    forged: through a record of one object, whose state says that it holds none.
    """
    dtype, path = np.dtype("O"), tmp_path / "hostile.pkl"
    if forged:
        state = (3, "|", None, ("a",), {"a": (dtype, 0)}, 8, 1, 0)
        dtype = reduced(np.dtype, ("V8", False, True), state)
    path.write_bytes(pickle.dumps(reduced(np.ndarray, ((1,), dtype, bytes(8)))))
    refused(utils.load_arrays_pickle, path)


def test_object_arrays_are_no_images(tmp_path):
    path, objects = tmp_path / "objects.pkl", np.empty(3, dtype=object)
    objects[:] = [pictures(1), "text", 3]
    for content in (objects, pictures(2).astype(object), pictures(2).tolist(), pictures(2)[0]):
        path.write_bytes(pickle.dumps({"data": content}))
        with pytest.raises(utils.Refusal) as refusal:  # at once, or where they are to be images
            dataset.check_images(f"{path}: 'data'", utils.load_arrays_pickle(path)["data"])
        assert str(refusal.value).startswith(f"{path}: ")
    path.write_bytes(pickle.dumps({"data": pictures(2)}))
    dataset.check_images(path, utils.load_arrays_pickle(path)["data"])


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


@pytest.mark.parametrize("array", [pictures(3), np.arange(4), np.float32([[0.5]])])
def test_arrays_come_back_as_they_were(tmp_path, array):
    path = tmp_path / "folder" / "a.npy"
    utils.save_array(path, array)
    for found in (utils.load_array(path), np.load(path, allow_pickle=False)):
        assert found.dtype == array.dtype and np.array_equal(found, array)


def test_object_arrays_are_not_saved(tmp_path):
    with pytest.raises(ValueError):
        utils.save_array(tmp_path / "a.npy", np.array([{}], dtype=object))
    assert not list(tmp_path.iterdir())


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
NO_ARRAYS = {
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


@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_what_is_no_plain_array_is_refused(tmp_path, kind):
    path = tmp_path / "odd.npy"
    path.write_bytes(NO_ARRAYS[kind])
    refused(utils.load_array, path)


def test_hostile_arrays_do_nothing(tmp_path):
    path, marker = tmp_path / "hostile.npy", tmp_path / "marker"
    path.write_bytes(hostile_pickle("os.system", marker))
    refused(utils.load_array, path)
    path.write_bytes(npy(PLAIN.replace("<f4", "|O") % "1,", path.read_bytes()))
    refused(utils.load_array, path)
    assert not marker.exists()


# ------------------------------------------------------------------------------ writing


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"2"):
        utils.write_whole(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new, but")
        raise ValueError("a reason")

    with pytest.raises(ValueError, match="a reason"):
        utils.write_whole(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *both: done.append("renamed") or replace(*both))
    checksum = utils.write_whole(path, lambda file: file.write(b"content"))
    assert done[:2] == [7, "renamed"] and len(done) == 3  # the last is the folder's
    assert checksum == utils.file_checksum(path) == hashlib.sha256(b"content").hexdigest()


def test_what_a_killed_writer_left_is_written_over(tmp_path):
    utils.beside(tmp_path / "file").write_bytes(b"half")
    utils.write_whole(tmp_path / "file", lambda file: file.write(b"whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


SAVERS = {
    "checkpoint": lambda path: utils.save(path, {"a": torch.zeros(100_000)}),
    "array": lambda path: utils.save_array(path, np.zeros(100_000)),
    "bytes": lambda path: utils.write_whole(path, lambda file: file.write(bytes(100_000))),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_where_nothing_can_be_written_is_refused(tmp_path, kind):
    """A path through a file can be made by nobody, root included; nor can a folder be replaced."""
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for place in ("file/new", "file/more/new", "folder"):
        refused(SAVERS[kind], tmp_path / place)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize("kind", SAVERS)
def test_a_full_disk_is_refused_and_leaves_the_old_file(tmp_path, kind):
    """A limit on the size of files stands in for the full disk."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refused(SAVERS[kind], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------ summaries, seeds


def test_summaries_of_three_tasks_by_hand():
    matrix = [[90.0], [80.0, 60.0], [50.0, 66.0, 40.0]]
    # means 90, 70, 52
    assert utils.average_incremental_accuracy(matrix) == pytest.approx(212 / 3)
    # task 1 falls from 90 to 50, task 2 rises from 60 to 66: 40 and -6
    assert utils.forgetting(matrix) == pytest.approx(17)
    # the best earlier accuracy counts, not the first nor the one before: 95-50, 60-30
    assert utils.forgetting([[90], [95, 60], [70, 50, 10], [50, 30, 20, 10]]) == pytest.approx(
        (45 + 30 - 10) / 3
    )


def test_summaries_of_one_task():
    assert utils.average_incremental_accuracy([[90.0]]) == 90.0
    assert utils.forgetting([[90.0]]) is None


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


def test_each_purpose_has_a_seed_of_its_own():
    seeds = [utils.derive(*purpose) for purpose in PURPOSES]
    assert len(set(seeds)) == len(PURPOSES) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [utils.derive(*purpose) for purpose in PURPOSES]
    draws = [tuple(draw(*purpose)) for purpose in PURPOSES]
    assert len(set(draws)) == len(PURPOSES)


def draw(*purpose):
    return torch.randperm(1000, generator=utils.stream(*purpose))[:5].tolist()


def test_a_stream_hangs_on_its_purpose_alone():
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
    """The first 8 bytes of SHA-256 of the purpose's repr, little-endian, less one bit."""
    assert utils.derive(0, "initialisation") == 1026867873611578284
