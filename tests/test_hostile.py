"""Damaged and hostile files at the inputs of the scripts, by the real command lines.

Each is refused: exit status 2, one line that names the file, no traceback; nothing is run or
written. See test_checkpoints.py for what is accepted.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch

import pruning_utils
from models import ResNet18

TEST = f"test.py {processes.TINY} --data published --pretrained weight.pt"
TRAIN = (
    f"main_train.py {processes.TINY} --data published --epochs 1 --weight weight.pt --mask mask.pt "
    "--save_data_path soft --save_dir out"
)
CIL = f"main_CIL.py {processes.TINY} --data published --epochs 1 --no_teaching --save_dir run"
INPUTS = {  # the file that is damaged, and a command that reads it
    "weight.pt": TEST,
    "mask.pt": TRAIN,
    "ours.pt": TEST.replace("weight.pt", "ours.pt"),
    "soft/task1_img.npy": TRAIN,
    "soft/task1_dis_label.npy": TRAIN,
    "published/cifar10_train.pkl": CIL,
    "published/cifar10_80m_150k.pkl": CIL.replace("--no_teaching ", ""),
    "run/run.json": CIL,
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory, scripts):
    """A folder with an intact file for each input."""
    folder = tmp_path_factory.mktemp("intact")
    processes.write_published(folder / "published")
    model = ResNet18(2, 2, width=4)
    torch.save(model.state_dict(), folder / "weight.pt")
    masks = pruning_utils.mask_state(pruning_utils.masks_of(model))
    torch.save(masks, folder / "mask.pt")
    (folder / "soft").mkdir()
    np.save(folder / "soft/task1_img.npy", np.zeros((5, 3, 12, 12), np.float32))
    for name in ("dis_label", "dis_label_main"):
        np.save(folder / f"soft/task1_{name}.npy", np.zeros((5, 2), np.float32))
    ended = scripts.run(CIL, folder)
    assert ended.status == 0, ended
    shutil.copy(folder / "run/task2_best_model.pt", folder / "ours.pt")
    return folder


# ------------------------------------------------------------------------------ damages

# Each returns the bytes of a file; case: its intact bytes, and the path of a marker.


def flip(case):
    middle = len(case.intact) // 2
    return case.intact[:middle] + bytes([case.intact[middle] ^ 64]) + case.intact[middle + 1 :]


def cut(case):
    return case.intact[: len(case.intact) // 2]


def empty(case):
    return b""


def gone(case):
    return None


def text(case):
    return b"loss 0.3\naccuracy 90\n"


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def state(change):
    """The intact state dict with `change` made to its first tensor."""

    def damage(case):
        content = torch.load(io.BytesIO(case.intact), weights_only=True)
        key = next(iter(content))
        return saved(content | {key: change(content[key])})

    return damage


def known(**changes):
    """The intact checkpoint with other `args`; None: without one."""

    def damage(case):
        content = torch.load(io.BytesIO(case.intact), weights_only=True)
        args = content["args"] | changes
        return saved(content | {"args": {k: v for k, v in args.items() if v is not None}})

    return damage


def header(descr, shape):
    """A .npy file that claims other content than it has."""

    def damage(case):
        content = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
        return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content + bytes(64)

    return damage


def zipped(records):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def archive(case):
    return zipped({"array.npy": case.intact})


class Call:
    """Pickles as a call of a function."""

    def __init__(self, *recipe):
        self.recipe = recipe

    def __reduce__(self):
        return self.recipe


def hostile(case):
    """A pickle that makes the file `marker` when it is loaded freely."""
    return pickle.dumps(Call(os.system, (f"echo > {case.marker}",)), 2)


def hostile_eval(case):
    return pickle.dumps(Call(eval, (f"open({str(case.marker)!r}, 'w').close()",)), 2)


def hostile_archive(case):
    return zipped({"archive/data.pkl": hostile(case), "archive/version": b"3\n"})


def hostile_legacy(case):
    start = torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}
    return b"".join(pickle.dumps(each, 2) for each in start) + hostile(case)


def hostile_objects(case):
    objects, file = np.array([Call(os.system, (f"echo > {case.marker}",))], object), io.BytesIO()
    np.save(file, objects, allow_pickle=True)
    return file.getvalue() if b"NUMPY" in case.intact else pickle.dumps(objects)


def pickled(change):
    """The intact pickle of a dataset with other content."""
    return lambda case: pickle.dumps(change(pickle.loads(case.intact)))


def of_bytes(content):
    """An array over bytes that a pickle names as the addresses of objects."""
    return {0: Call(np.ndarray, ((1,), np.dtype("O"), bytes(8)))}


def journal(**changes):
    return lambda case: json.dumps(json.loads(case.intact) | changes).encode()


def without_stages(case):
    content = json.loads(case.intact)
    del content["stages"]
    return json.dumps(content).encode()


CASES = [
    *(("weight.pt", damage) for damage in (gone, flip, cut, empty, text)),
    *(("weight.pt", damage) for damage in (hostile, hostile_archive, hostile_legacy)),
    ("weight.pt", lambda case: saved([torch.zeros(2)])),
    ("weight.pt", state(lambda value: value * torch.nan)),
    ("weight.pt", state(lambda value: value.index_fill(0, torch.tensor(1), torch.inf))),
    ("weight.pt", state(lambda value: value[:1])),
    ("weight.pt", lambda case: saved(ResNet18(2, 2, width=8).state_dict())),
    ("weight.pt", lambda case: saved(ResNet18(2, 3, width=4).state_dict())),
    ("weight.pt", lambda case: (case.folder / "mask.pt").read_bytes()),
    *(("mask.pt", damage) for damage in (gone, cut, hostile_archive)),
    ("mask.pt", state(lambda value: 2 * value)),
    ("mask.pt", state(lambda value: value[:, :1])),
    ("mask.pt", lambda case: (case.folder / "weight.pt").read_bytes()),
    ("ours.pt", known(width="four")),
    ("ours.pt", known(class_names=None)),
    ("ours.pt", lambda case: saved({"args": 3, "state_dict": {"a": torch.zeros(1)}})),
    *(("soft/task1_img.npy", damage) for damage in (cut, text, archive, hostile, hostile_objects)),
    ("soft/task1_img.npy", header("'<f4'", "(1000000000000000, 3, 12, 12)")),
    ("soft/task1_img.npy", header("'|O'", "(1,)")),
    ("soft/task1_img.npy", header("(", "(")),
    ("soft/task1_dis_label.npy", gone),
    *(("published/cifar10_train.pkl", each) for each in (cut, text, hostile, hostile_eval)),
    ("published/cifar10_train.pkl", hostile_objects),
    ("published/cifar10_train.pkl", pickled(of_bytes)),
    ("published/cifar10_80m_150k.pkl", gone),
    ("published/cifar10_80m_150k.pkl", pickled(lambda pool: {"label": pool["label"]})),
    ("published/cifar10_80m_150k.pkl", pickled(lambda pool: {"data": pool["data"] / 255})),
    *(("run/run.json", damage) for damage in (cut, empty, text)),
    ("run/run.json", without_stages),
]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_damaged_or_hostile_file_is_refused_and_does_nothing(
    scripts, intact, tmp_path, name, damage
):
    folder = shutil.copytree(intact, tmp_path / "work")
    path, marker = folder / name, tmp_path / "marker"
    case = SimpleNamespace(intact=path.read_bytes(), marker=marker, folder=folder)
    content = damage(case)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    before = processes.tree(tmp_path)
    ended = scripts.run(INPUTS[name], folder)
    line = ended.check_error()
    assert name in line or path.name.split(".")[0].split("_")[-1] in line, line
    assert "weights_only" not in line and "safe_globals" not in line  # PyTorch's unsafe advice
    assert processes.tree(tmp_path) == before and not marker.exists()


@pytest.mark.parametrize("name", INPUTS)
def test_the_intact_files_are_accepted(scripts, intact, tmp_path, name):
    """Otherwise the cases above would show nothing."""
    folder = shutil.copytree(intact, tmp_path / "work")
    command = INPUTS[name].replace("--save_dir run", "--save_dir new" if "pkl" in name else "")
    ended = scripts.run(command if name != "run/run.json" else CIL, folder)
    assert (ended.status, ended.err) == (0, ""), ended
