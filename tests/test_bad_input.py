"""Bad input on the command lines: status 2, one line that helps, and nothing is written."""

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pruning_utils
from models import build_model
from runtime.checkpoint import save_checkpoint

LIMIT = 60  # seconds after which a run that should have ended with an error is killed
PARTS = {"train": 3, "val": 1, "test": 1, "save_100": 2}  # images of each class
HUGE = "1" + 400 * "0"
ADVICE = re.compile(r"\b(give|add|leave|delete|get|make|name|prepare|put|try|see)\b|--help")
# what dataset.py may print before an error; the others print nothing
NOTICE = re.compile(r"preparing \w+ in \S+ \.\.\.\n|\S+: already prepared\n")

# These go before a case's own flags: tiny runs, so that an accepted case does not take long.
TINY = "--dataset digits --classifiers 3 --width 4 --epochs 1 --batch_size 64 "
BASE = {
    "main_TD.py": TINY + "--unlabel_num 1 --prune_scheduler 1,1,1 --iter_epochs 1 ",
    "main_BU.py": TINY + "--unlabel_num 1 --max_iter_prun 1 --iter_epochs 1 ",
    "main_CIL.py": TINY + "--unlabel_num 1 ",
    "main_train.py": TINY,
    "test.py": "--dataset digits --classifiers 3 --width 4 ",
    "dataset.py": "",
    "-m tools.report": "",
}
SET = "--dataset cifar10 --data set"
DONE = SET + " --save_dir done"


# ------------------------------------------------------------------------------ valid input


def images(*shape, dtype=np.uint8):
    return np.random.default_rng(sum(shape)).integers(0, 256, shape).astype(dtype)


def part(count, side=32):
    return {str(c): images(count, side, side, 3) for c in range(10)}


@pytest.fixture(scope="session")
def valid(tmp_path_factory, scripts):
    """A folder of valid input (and a few files that are not); each case gets a copy.

    set/ is prepared, published/ holds pickles, labels/ the soft labels of task 1, run/ only the
    records of a run, done/ a finished run of main_CIL; the checkpoints are of --width 4 and
    3 tasks of 2 classes.
    """
    folder = tmp_path_factory.mktemp("valid")
    for name in ("set", "published", "labels", "run", "empty"):
        (folder / name).mkdir()
    (folder / "file").write_text("neither a folder nor a checkpoint\n")

    meta = {"dataset": "cifar10", "names": {str(c): f"class {c}" for c in range(10)}}
    (folder / "set" / "meta.json").write_text(json.dumps(meta | {"per_class": None, "seed": 0}))
    for name, count in PARTS.items():
        np.savez(folder / "set" / f"cifar10_{name}.npz", **part(count))
        by_number = {int(c): array for c, array in part(count).items()}
        (folder / "published" / f"cifar10_{name}.pkl").write_bytes(pickle.dumps(by_number))
    np.save(folder / "set" / "cifar10_pool.npy", images(4, 32, 32, 3))
    pool = {"data": images(4, 32, 32, 3), "label": np.zeros(4, np.uint8)}
    (folder / "published" / "cifar10_80m_150k.pkl").write_bytes(pickle.dumps(pool))

    np.save(folder / "labels" / "task1_img.npy", images(5, 3, 32, 32))
    for name in ("dis_label", "dis_label_main"):
        np.save(folder / "labels" / f"task1_{name}.npy", np.zeros((5, 2), np.float32))

    row = {"state": 1, "accuracy": [50.0], "mean": 50.0, "density": 100.0, "dense_accuracy": [50.0]}
    config = {"dataset": "digits", "width": 4, "classifiers": 1}
    run = {"script": "main_BU", "config": config, "states": [row]}
    (folder / "run" / "results.json").write_text(json.dumps(run))

    def model(**changes):
        args = {"arch": "resnet18", "width": 4, "precision": "fp32"}
        args |= {"classifiers": 3, "classes_per_classifier": 2}
        return build_model(SimpleNamespace(**args | changes))

    dense = model()
    save_checkpoint(folder / "dense.pt", {"epoch": 1, "state_dict": dense.state_dict()})
    save_checkpoint(folder / "wide.pt", model(width=8).state_dict())
    save_checkpoint(folder / "heads.pt", model(classifiers=4).state_dict())
    save_checkpoint(folder / "classes.pt", model(classes_per_classifier=3).state_dict())
    save_checkpoint(folder / "resnet32.pt", model(arch="resnet32").state_dict())
    scores = pruning_utils.magnitude(pruning_utils.weights(dense), None)
    masks = pruning_utils.prune(scores, pruning_utils.masks_of(dense), 0.5)
    pruning_utils.save_masks(folder / "mask.pt", masks)
    pruning_utils.apply_mask(dense, masks)
    save_checkpoint(folder / "pruned.pt", dense.state_dict())
    for name, changes in (("wide_mask", {"width": 8}), ("resnet32_mask", {"arch": "resnet32"})):
        other = pruning_utils.masks_of(model(**changes))
        pruning_utils.save_masks(folder / f"{name}.pt", other)
    ended = scripts.run(["main_CIL.py", *(BASE["main_CIL.py"] + DONE).split()], cwd=folder)
    assert ended.status == 0, ended.err
    return folder


# ------------------------------------------------------------------------------ damages


def remove(*names):
    return lambda: [Path(name).unlink() for name in names]


def cut(name):
    """Cut the file in half."""
    return lambda: os.truncate(name, Path(name).stat().st_size // 2)


def flip(name):
    """Change a byte in the middle of the file."""

    def damage():
        content = bytearray(Path(name).read_bytes())
        content[len(content) // 2] ^= 255
        Path(name).write_bytes(content)

    return damage


def text(name, content="no array, no pickle, no checkpoint\n"):
    return lambda: Path(name).write_text(content)


def folder(name):
    """Put a folder where a file should be."""

    def damage():
        if Path(name).exists():
            Path(name).unlink()
        Path(name).mkdir()

    return damage


def array(name, content):
    """Put another array in the file."""
    return lambda: np.save(name, content, allow_pickle=True)


def classes(name, **changes):
    """Put other arrays in a part of set/, for some classes; None leaves a class out."""

    def damage():
        content = part(PARTS[name]) | {c.removeprefix("_"): a for c, a in changes.items()}
        content = {c: a for c, a in content.items() if a is not None}
        np.savez(f"set/cifar10_{name}.npz", **content)

    return damage


def pickled(name, content):
    """Put another object in a published file."""
    return lambda: Path(f"published/cifar10_{name}.pkl").write_bytes(pickle.dumps(content))


def records(*keys, value):
    """Put another value at run/results.json[key][key]..."""

    def damage():
        path = Path("run/results.json")
        content = inner = json.loads(path.read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(content))

    return damage


def tensors(name, change):
    """Change every floating-point tensor of a checkpoint; it becomes a raw state dict."""

    def damage():
        state = torch.load(name, weights_only=True)
        state = state.get("state_dict", state)
        state = {k: change(v) if v.is_floating_point() else v for k, v in state.items()}
        torch.save(state, name)

    return damage


def one_pixel_set():
    """Each class has one image of one pixel: in a batch of one, BatchNorm has a single value."""
    for name in PARTS:
        np.savez(f"set/cifar10_{name}.npz", **part(1, side=1))
    np.save("set/cifar10_pool.npy", images(4, 1, 1, 3))


# ------------------------------------------------------------------------------ the table

PUBLISHED = "--dataset cifar10 --data published"
WEIGHT, MASK = "--weight dense.pt ", "--mask mask.pt "
TICKET = WEIGHT + MASK
LABELS = TICKET + "--state 2 --save_data_path labels"
NEW = "--data new --raw empty --unlabeled pool.npy"

# id, script, its flags, what the error line contains, and (optional) what is damaged before
CASES = [
    # flags: numbers
    ("epochs-0", "main_TD.py", "--epochs 0", "--epochs"),
    ("epochs-fraction", "main_BU.py", "--epochs 1.5", "--epochs"),
    ("epochs-word", "main_CIL.py", "--epochs many", "--epochs"),
    ("epochs-empty", "main_train.py", TICKET + "--state 1 --epochs ''", "--epochs"),
    ("epochs-huge", "main_CIL.py", f"--epochs {HUGE}", "--epochs"),
    ("epochs-no-value", "main_CIL.py", "--epochs", "--epochs"),
    ("iter-epochs-negative", "main_BU.py", "--iter_epochs -3", "--iter_epochs"),
    ("batch-0", "main_TD.py", "--batch_size 0", "--batch_size"),
    ("batch-huge", "main_CIL.py", f"--batch_size {HUGE}", "--batch_size"),
    ("batch-below-the-tasks-TD", "main_TD.py", "--batch_size 11", "--batch_size 11"),
    ("batch-below-the-tasks-BU", "main_BU.py", "--batch_size 7 --classifiers 2", "--batch_size 7"),
    ("batch-below-the-state", "main_train.py", LABELS + " --batch_size 7", "--batch_size 7"),
    ("lr-0", "main_TD.py", "--lr 0", "--lr"),
    ("lr-negative", "main_BU.py", "--lr -0.1", "--lr"),
    ("lr-nan", "main_CIL.py", "--lr nan", "--lr"),
    ("lr-inf", "main_CIL.py", "--lr inf", "--lr"),
    ("lr-beyond-float32", "main_CIL.py", "--lr 1e300", "--lr"),
    ("decreasing-lr-word", "main_CIL.py", "--decreasing_lr 60,late", "--decreasing_lr"),
    ("decreasing-lr-semicolon", "main_CIL.py", "--decreasing_lr 60;80", "--decreasing_lr"),
    ("momentum-1", "main_TD.py", "--momentum 1", "--momentum"),
    ("momentum-negative", "main_TD.py", "--momentum -0.9", "--momentum"),
    ("weight-decay-negative", "main_BU.py", "--weight_decay -1e-4", "--weight_decay"),
    ("weight-decay-inf", "main_CIL.py", "--weight_decay inf", "--weight_decay"),
    ("weight-decay-beyond-float32", "main_CIL.py", "--weight_decay 1e300", "--weight_decay"),
    ("width-0", "main_CIL.py", "--width 0", "--width"),
    ("width-billion", "main_CIL.py", "--width 1000000000", "--width"),
    ("width-million-test", "test.py", "--pretrained dense.pt --state 1 --width 1000000", "--width"),
    ("width-huge", "main_TD.py", f"--width {HUGE}", "--width"),
    ("seed-negative", "main_TD.py", "--seed -1", "--seed"),
    ("seed-word", "main_BU.py", "--seed random", "--seed"),
    ("seed-huge", "main_CIL.py", f"--seed {HUGE}", "--seed"),
    ("seed-ten-thousand-digits", "main_CIL.py", f"--seed {10000 * '9'}", "--seed"),
    ("gpu-negative", "main_CIL.py", "--gpu -1", "--gpu"),
    ("gpu-and-cpu", "main_CIL.py", "--gpu 1 --device cpu", "--gpu 1: are two devices; give one"),
    ("gpu-99", "main_CIL.py", "--gpu 99 --device auto", "--gpu 99: this machine has"),
    (
        "checkpoint-seconds-negative",
        "main_TD.py",
        "--checkpoint_seconds -1",
        "--checkpoint_seconds",
    ),
    ("overwrite-with-a-value", "main_TD.py", "--overwrite=yes", "--overwrite"),
    ("print-freq-0", "main_CIL.py", "--print_freq 0", "--print_freq"),
    ("unlabel-num-0", "main_TD.py", "--unlabel_num 0", "--unlabel_num"),
    ("unlabel-num-train", "main_train.py", TICKET + "--state 1 --unlabel_num 1", "--unlabel_num"),
    ("classifiers-0", "main_CIL.py", "--classifiers 0", "--classifiers"),
    ("classifiers-huge", "main_CIL.py", f"--classifiers {HUGE}", "--classifiers"),
    ("classes-0", "main_CIL.py", "--classes_per_classifier 0", "--classes_per_classifier"),
    ("too-many-classes", "main_CIL.py", "--classes_per_classifier 4", "--classes_per_classifier 4"),
    ("too-many-tasks", "main_TD.py", "--classifiers 6", "--classifiers 6"),
    ("percent-negative", "main_TD.py", "--percent -0.1", "--percent"),
    ("percent-1", "main_BU.py", "--percent 1", "--percent"),
    ("percent-20", "main_BU.py", "--percent 20", "--percent"),
    ("deacc-word", "main_BU.py", "--deacc little", "--deacc"),
    ("deacc-nan", "main_BU.py", "--deacc nan", "--deacc"),
    ("accept-decay-empty", "main_BU.py", "--accept_decay ''", "--accept_decay"),
    ("max-iter-prun-0", "main_BU.py", "--max_iter_prun 0", "--max_iter_prun"),
    ("base-sparsity-101", "main_BU.py", "--base_sparsity 101", "--base_sparsity"),
    ("base-sparsity-negative", "main_BU.py", "--base_sparsity -1", "--base_sparsity"),
    ("per-class-0", "dataset.py", "--data new --raw empty --per_class 0", "--per_class"),
    ("per-class-fraction", "dataset.py", "--data new --raw empty --per_class 20.5", "--per_class"),
    ("seed-of-the-split", "dataset.py", "--data new --raw empty --seed -1", "--seed"),
    # flags: names and lists
    ("schedule-too-short", "main_TD.py", "--prune_scheduler 1,1", "--prune_scheduler 1,1:"),
    ("schedule-too-long", "main_TD.py", "--prune_scheduler 1,1,1,1", "--prune_scheduler 1,1,1,1:"),
    ("schedule-empty", "main_TD.py", "--prune_scheduler ''", "--prune_scheduler"),
    ("schedule-negative", "main_TD.py", "--prune_scheduler 1,-1,1", "--prune_scheduler"),
    ("schedule-gap", "main_TD.py", "--prune_scheduler 1,,1,1", "--prune_scheduler"),
    ("schedule-billion", "main_TD.py", "--prune_scheduler 1,1000000000,1", "--prune_scheduler"),
    ("rewind-unknown", "main_TD.py", "--rewind back", "--rewind"),
    ("rewind-scope-unknown", "main_TD.py", "--rewind_scope heads", "--rewind_scope"),
    (
        "rewind-scope-of-nothing",
        "main_TD.py",
        "--rewind finetune --rewind_scope all",
        "--rewind_scope all: nothing is rewound",
    ),
    ("merged-task", "main_CIL.py", "--classifiers 1 --merge_batchnorm", "--merge_batchnorm: task"),
    ("select-on-train", "main_BU.py", "--select_on train", "--select_on"),
    ("criterion-unknown", "main_BU.py", "--criterion gradient", "--criterion"),
    ("criterion-CIL", "main_CIL.py", "--criterion random", "--criterion"),
    ("arch-unknown", "main_TD.py", "--arch vgg16", "--arch"),
    ("precision-fp16", "main_CIL.py", "--precision fp16", "--precision"),
    ("device-unknown", "main_CIL.py", "--device tpu", "--device tpu"),
    ("device-not-there", "main_CIL.py", "--device cuda:99", "--device cuda:99"),
    ("device-empty", "main_CIL.py", "--device ''", "--device"),
    ("device-cpu-1", "main_CIL.py", "--device cpu:1", "--device cpu:1"),
    ("dataset-unknown", "main_TD.py", "--dataset mnist", "--dataset mnist"),
    ("dataset-unknown-in-preparing", "dataset.py", "--dataset mnist", "--dataset mnist"),
    ("dataset-empty", "main_TD.py", "--dataset ''", "--dataset"),
    ("dataset-of-two-lines", "main_TD.py", "--dataset 'digits\nor not'", "--dataset"),
    ("flag-unknown", "main_TD.py", "--colour red", "--colour"),
    ("flag-of-another-script", "main_CIL.py", "--percent 0.2", "--percent"),
    ("flag-lr-test", "test.py", "--pretrained dense.pt --lr 0.1", "--lr"),
    ("flag-epochs-test", "test.py", "--pretrained dense.pt --epochs 1", "--epochs"),
    ("flag-overwrite-test", "test.py", "--pretrained dense.pt --overwrite", "--overwrite"),
    ("flag-of-two-lines", "main_CIL.py", "--colour 'red\nblue'", "--colour"),
    ("argument-left-over", "main_BU.py", "cifar10", "cifar10"),
    # flags that contradict each other or the data set
    ("digits-with-data", "main_CIL.py", "--data set", "--data set"),
    ("digits-with-empty-data", "main_CIL.py", "--data ''", "--data"),
    ("digits-with-raw", "dataset.py", "--dataset digits --raw empty", "--dataset digits"),
    ("digits-with-per-class", "dataset.py", "--dataset digits --per_class 20", "out --per_class"),
    ("digits-prepared-in-a-folder", "dataset.py", "--dataset digits --data new", "--data new"),
    ("joint-and-finetune", "main_CIL.py", "--joint --finetune", "--joint --finetune: "),
    ("joint-no-teaching", "main_CIL.py", "--joint --no_teaching", "leave --no_teaching out"),
    ("finetune-no-teaching", "main_CIL.py", "--finetune --no_teaching", "leave --no_teaching out"),
    ("joint-one-task", "main_CIL.py", "--joint --classifiers 1", "--joint --classifiers 1: "),
    ("finetune-one-task", "main_CIL.py", "--finetune --classifiers 1", "leave --finetune out"),
    ("joint-TD", "main_TD.py", "--joint", "--joint"),
    ("state-above-the-tasks-test", "test.py", "--pretrained dense.pt --state 4", "--state 4"),
    ("state-above-the-tasks-train", "main_train.py", TICKET + "--state 4", "--state 4"),
    ("state-0", "test.py", "--pretrained dense.pt --state 0", "--state"),
    ("state-huge", "test.py", f"--pretrained dense.pt --state {HUGE}", "--state"),
    ("control-unknown", "main_train.py", TICKET + "--state 1 --control random", "--control"),
    ("no-weight", "main_train.py", MASK + "--state 1", "--weight"),
    ("no-mask", "main_train.py", WEIGHT + "--state 1", "--mask"),
    ("no-pretrained", "test.py", "--state 1", "--pretrained"),
    ("set-of-another-per-class", "dataset.py", "--data set --per_class 20", "--data set"),
    # data: folders
    ("data-missing", "main_TD.py", "--dataset cifar10 --data nowhere", "--data nowhere"),
    ("data-empty-folder", "main_BU.py", "--dataset cifar10 --data empty", "--data empty"),
    ("data-file", "main_CIL.py", "--dataset cifar10 --data file", "--data file"),
    ("data-under-a-file", "main_CIL.py", "--dataset cifar10 --data file/set", "--data file/set"),
    ("data-another-folder", "main_CIL.py", "--dataset cifar10 --data run", "--data run"),
    ("data-name-too-long", "main_CIL.py", f"--dataset cifar10 --data {5000 * 'x'}", "--data"),
    ("data-new-name-too-long", "dataset.py", f"--data {5000 * 'x'} --raw empty", "--data"),
    ("data-new-is-a-file", "dataset.py", "--data file --raw empty", "--data file"),
    ("data-new-is-not-empty", "dataset.py", "--data run --raw empty", "--data run"),
    ("raw-missing", "dataset.py", "--data new --raw nowhere", "--raw nowhere"),
    ("raw-empty-folder", "dataset.py", "--data new --raw empty", "--raw empty"),
    ("raw-file", "dataset.py", "--data new --raw file", "--raw file"),
    (
        "raw-damaged-archive",
        "dataset.py",
        "--data new --raw empty",
        "cifar-10-python.tar.gz",
        text("empty/cifar-10-python.tar.gz"),
    ),
    # data: a prepared set
    ("set-no-train", "main_CIL.py", SET, "cifar10_train.npz", remove("set/cifar10_train.npz")),
    ("set-no-val", "main_TD.py", SET, "cifar10_val.npz", remove("set/cifar10_val.npz")),
    ("set-no-pool", "main_BU.py", SET, "cifar10_pool.npy", remove("set/cifar10_pool.npy")),
    ("set-no-meta", "main_CIL.py", SET, "--data set", remove("set/meta.json")),
    ("set-train-cut", "main_CIL.py", SET, "set", cut("set/cifar10_train.npz")),
    ("set-train-flipped", "main_CIL.py", SET, "set", flip("set/cifar10_train.npz")),
    ("set-test-text", "main_CIL.py", SET, "set", text("set/cifar10_test.npz")),
    ("set-test-folder", "main_CIL.py", SET, "set", folder("set/cifar10_test.npz")),
    ("set-pool-cut", "main_CIL.py", SET, "set/cifar10_pool.npy", cut("set/cifar10_pool.npy")),
    ("set-exemplars-text", "dataset.py", "--data set", "set", text("set/cifar10_save_100.npz")),
    ("set-meta-text", "main_CIL.py", SET, "set", text("set/meta.json")),
    ("set-meta-empty", "dataset.py", "--data set", "set", text("set/meta.json", "")),
    ("set-meta-list", "main_CIL.py", SET, "set", text("set/meta.json", "[]")),
    ("set-meta-folder", "main_CIL.py", SET, "set", folder("set/meta.json")),
    (
        "set-of-another-dataset",
        "main_CIL.py",
        SET,
        "--data set",
        text("set/meta.json", '{"dataset": "cifar100", "names": {}}'),
    ),
    ("set-class-missing", "main_CIL.py", SET, "class 9", classes("train", _9=None)),
    (
        "set-class-without-images",
        "main_CIL.py",
        SET,
        "class 9",
        classes("val", _9=images(0, 32, 32, 3)),
    ),
    (
        "set-class-of-floats",
        "main_TD.py",
        SET,
        "class 9",
        classes("test", _9=images(1, 32, 32, 3, dtype=np.float32)),
    ),
    (
        "set-class-of-three-dimensions",
        "main_BU.py",
        SET,
        "class 9",
        classes("train", _9=images(1, 32, 32)),
    ),
    (
        "set-class-of-another-size",
        "main_CIL.py",
        SET,
        "class 9",
        classes("save_100", _9=images(1, 16, 16, 3)),
    ),
    (
        "set-class-of-objects",
        "main_CIL.py",
        SET,
        "set",
        classes("train", _9=np.array([None])),
    ),
    (
        "set-class-is-a-name",
        "main_CIL.py",
        SET,
        "set",
        classes("train", cat=images(1, 32, 32, 3)),
    ),
    (
        "set-pool-of-floats",
        "main_CIL.py",
        SET,
        "set/cifar10_pool.npy",
        array("set/cifar10_pool.npy", images(4, 32, 32, 3, dtype=np.float64)),
    ),
    (
        "set-pool-without-images",
        "main_CIL.py",
        SET,
        "set/cifar10_pool.npy",
        array("set/cifar10_pool.npy", images(0, 32, 32, 3)),
    ),
    (
        "set-pool-of-another-size",
        "dataset.py",
        "--data set",
        "set",
        array("set/cifar10_pool.npy", images(4, 16, 16, 3)),
    ),
    (
        "set-batch-of-one-pixel",
        "main_CIL.py",
        SET + " --classes_per_classifier 1",
        "set",
        one_pixel_set,
    ),
    # data: the published pickles
    (
        "published-no-train",
        "main_CIL.py",
        PUBLISHED,
        "cifar10_train.pkl",
        remove("published/cifar10_train.pkl"),
    ),
    (
        "published-no-pool",
        "main_CIL.py",
        PUBLISHED,
        "published/cifar10_80m_150k.pkl",
        remove("published/cifar10_80m_150k.pkl"),
    ),
    (
        "published-cut",
        "main_TD.py",
        PUBLISHED,
        "published/cifar10_test.pkl",
        cut("published/cifar10_test.pkl"),
    ),
    (
        "published-text",
        "dataset.py",
        "--data published",
        "published/cifar10_val.pkl",
        text("published/cifar10_val.pkl"),
    ),
    (
        "published-of-other-objects",
        "main_CIL.py",
        PUBLISHED,
        "published/cifar10_train.pkl",
        pickled("train", SimpleNamespace(data=1)),
    ),
    ("published-list", "main_CIL.py", PUBLISHED, "published: train", pickled("train", [1, 2])),
    (
        "published-class-missing",
        "main_CIL.py",
        PUBLISHED,
        "published: val",
        pickled("val", {c: images(1, 32, 32, 3) for c in range(9)}),
    ),
    (
        "published-channels-first",
        "main_CIL.py",
        PUBLISHED,
        "published: exemplars",
        pickled("save_100", {c: images(1, 3, 32, 32) for c in range(10)}),
    ),
    (
        "published-pool-without-data",
        "main_CIL.py",
        PUBLISHED,
        "published/cifar10_80m_150k.pkl",
        pickled("80m_150k", {"label": np.zeros(4)}),
    ),
    # data: the unlabeled images
    ("unlabeled-empty-name", "dataset.py", NEW.replace("pool.npy", "''"), "--unlabeled"),
    ("unlabeled-missing", "dataset.py", NEW, "pool.npy"),
    ("unlabeled-text", "dataset.py", NEW, "pool.npy", text("pool.npy")),
    ("unlabeled-folder", "dataset.py", NEW, "pool.npy", folder("pool.npy")),
    (
        "unlabeled-floats",
        "dataset.py",
        NEW,
        "pool.npy",
        array("pool.npy", images(4, 32, 32, 3, dtype=np.float32)),
    ),
    (
        "unlabeled-channels-first",
        "dataset.py",
        NEW,
        "pool.npy",
        array("pool.npy", images(4, 3, 32, 32)),
    ),
    ("unlabeled-grey", "dataset.py", NEW, "pool.npy", array("pool.npy", images(4, 32, 32))),
    ("unlabeled-objects", "dataset.py", NEW, "pool.npy", array("pool.npy", np.array([None]))),
    (
        "unlabeled-without-images",
        "dataset.py",
        NEW,
        "pool.npy",
        array("pool.npy", images(0, 32, 32, 3)),
    ),
    ("unlabeled-archive", "dataset.py", NEW.replace("pool.npy", "dense.pt"), "dense.pt"),
    # checkpoints
    ("weight-missing", "main_train.py", "--weight no.pt --state 1 " + MASK, "no.pt"),
    ("weight-is-a-mask", "main_train.py", "--weight mask.pt --state 1 " + MASK, "mask.pt"),
    ("weight-text", "main_train.py", "--weight file --state 1 " + MASK, "file"),
    ("weight-folder", "main_train.py", "--weight empty --state 1 " + MASK, "empty"),
    ("weight-cut", "main_train.py", TICKET + "--state 1", "dense.pt", cut("dense.pt")),
    ("weight-empty-file", "main_train.py", TICKET + "--state 1", "dense.pt", text("dense.pt", "")),
    ("weight-wide", "main_train.py", "--weight wide.pt --state 1 " + MASK, "--weight wide.pt"),
    ("weight-resnet32", "main_train.py", "--weight resnet32.pt --state 1 " + MASK, "--arch"),
    ("weight-heads", "main_train.py", "--weight heads.pt --state 1 " + MASK, "--weight heads.pt"),
    (
        "weight-nan",
        "main_train.py",
        TICKET + "--state 1",
        "dense.pt",
        tensors("dense.pt", lambda v: v * torch.nan),
    ),
    (
        "weight-without-data",
        "main_train.py",
        TICKET + "--state 1",
        "dense.pt",
        tensors("dense.pt", lambda v: v.to("meta")),
    ),
    (
        "weight-list",
        "main_train.py",
        TICKET + "--state 1",
        "dense.pt",
        lambda: torch.save([torch.ones(3)], "dense.pt"),
    ),
    ("mask-missing", "main_train.py", WEIGHT + "--mask no.pt --state 1", "no.pt"),
    ("mask-is-dense", "main_train.py", WEIGHT + "--mask dense.pt --state 1", "dense.pt"),
    ("mask-text", "main_train.py", WEIGHT + "--mask file --state 1", "file"),
    ("mask-wide", "main_train.py", WEIGHT + "--mask wide_mask.pt --state 1", "wide_mask.pt"),
    ("mask-of-resnet32", "main_train.py", WEIGHT + "--mask resnet32_mask.pt --state 1", "--arch"),
    ("mask-cut", "main_train.py", TICKET + "--state 1", "mask.pt", cut("mask.pt")),
    (
        "mask-of-halves",
        "main_train.py",
        TICKET + "--state 1",
        "--mask mask.pt",
        tensors("mask.pt", lambda v: v / 2),
    ),
    (
        "mask-of-nan",
        "main_train.py",
        TICKET + "--state 1",
        "mask.pt",
        tensors("mask.pt", lambda v: v * torch.nan),
    ),
    ("pretrained-missing", "test.py", "--pretrained no.pt --state 1", "no.pt"),
    ("pretrained-empty", "test.py", "--pretrained '' --state 1", "--pretrained"),
    ("pretrained-text", "test.py", "--pretrained file --state 1", "file"),
    ("pretrained-folder", "test.py", "--pretrained empty --state 1", "empty"),
    ("pretrained-cut", "test.py", "--pretrained dense.pt --state 1", "dense.pt", cut("dense.pt")),
    ("pretrained-wide", "test.py", "--pretrained wide.pt --state 1", "--width 4"),
    ("pretrained-narrow", "test.py", "--pretrained dense.pt --state 1 --width 8", "--width 8"),
    ("pretrained-resnet32", "test.py", "--pretrained resnet32.pt --state 1", "--arch"),
    ("pretrained-resnet18", "test.py", "--pretrained dense.pt --state 1 --arch resnet32", "--arch"),
    ("pretrained-heads", "test.py", "--pretrained heads.pt --state 1", "--classifiers"),
    (
        "pretrained-classes",
        "test.py",
        "--pretrained classes.pt --state 1",
        "--classes_per_classifier",
    ),
    ("pretrained-mask", "test.py", "--pretrained mask.pt --pruned --state 1", "mask.pt"),
    ("dense-as-pruned", "test.py", "--pretrained dense.pt --pruned --state 1", "leave out"),
    ("pruned-as-dense", "test.py", "--pretrained pruned.pt --state 1", "add --pruned"),
    (
        "pruned-with-halves",
        "test.py",
        "--pretrained pruned.pt --pruned --state 1",
        "pruned.pt",
        tensors("pruned.pt", lambda v: v / 2),
    ),
    # where files go
    ("save-dir-file-TD", "main_TD.py", "--save_dir file", "file"),
    ("save-dir-file-BU", "main_BU.py", "--save_dir file", "file"),
    ("save-dir-under-a-file", "main_CIL.py", "--save_dir file/run", "file/run"),
    (
        "save-dir-under-a-file-train",
        "main_train.py",
        TICKET + "--state 1 --save_dir file/r",
        "file",
    ),
    ("save-dir-file-test", "test.py", "--pretrained dense.pt --state 1 --save_dir file", "file"),
    ("save-dir-empty", "main_CIL.py", "--save_dir ''", "--save_dir"),
    ("save-data-path-empty", "main_CIL.py", "--save_data_path ''", "--save_data_path"),
    ("save-dir-name-too-long", "main_CIL.py", f"--save_dir {5000 * 'x'}", "--save_dir"),
    ("save-dir-without-a-journal", "main_CIL.py", "--save_dir run", "run.json"),
    ("save-dir-of-another-script", "main_TD.py", DONE, "--save_dir done"),
    ("save-dir-of-another-lr", "main_CIL.py", DONE + " --lr 0.02", "--lr 0.01 (now 0.02)"),
    (
        "save-dir-of-other-images",
        "main_CIL.py",
        DONE,
        "--data of content",
        array("set/cifar10_pool.npy", images(5, 32, 32, 3)),
    ),
    (
        "save-dir-with-teaching",
        "main_CIL.py",
        DONE + " --no_teaching",
        "with --no_teaching False (now True); resume",
    ),
    ("save-dir-with-exemplars", "main_CIL.py", DONE + " --joint", "with --joint False (now True);"),
    ("save-dir-journal-flipped", "main_CIL.py", DONE, "done/run.json", flip("done/run.json")),
    ("save-dir-journal-list", "main_CIL.py", DONE, "done/run.json", text("done/run.json", "[1]")),
    ("save-data-path-file", "main_CIL.py", "--save_data_path file", "file"),
    ("save-data-path-under-a-file", "main_TD.py", "--save_data_path file/data", "file/data"),
    # the soft labels of the task before
    (
        "labels-none",
        "main_train.py",
        TICKET + "--state 2 --save_data_path empty",
        "--save_data_path empty: holds no task1_img.npy",
    ),
    (
        "labels-none-in-the-default-folder",
        "main_train.py",
        TICKET + "--state 2",
        "--save_data_path BU_digits/data: holds no task1_img.npy",
    ),
    ("labels-missing", "main_train.py", LABELS, "label", remove("labels/task1_dis_label.npy")),
    ("labels-text", "main_train.py", LABELS, "label", text("labels/task1_dis_label.npy")),
    ("labels-cut", "main_train.py", LABELS, "task1_img.npy", cut("labels/task1_img.npy")),
    (
        "labels-of-doubles",
        "main_train.py",
        LABELS,
        "labels/task1_dis_label.npy",
        array("labels/task1_dis_label.npy", np.zeros((5, 2))),
    ),
    (
        "labels-of-other-rows",
        "main_train.py",
        LABELS,
        "labels/task1_dis_label_main.npy",
        array("labels/task1_dis_label_main.npy", np.zeros((4, 2), np.float32)),
    ),
    (
        "labels-of-other-classes",
        "main_train.py",
        LABELS,
        "labels/task1_dis_label.npy",
        array("labels/task1_dis_label.npy", np.zeros((5, 4), np.float32)),
    ),
    (
        "labels-nan",
        "main_train.py",
        LABELS,
        "labels/task1_dis_label.npy",
        array("labels/task1_dis_label.npy", np.full((5, 2), np.nan, np.float32)),
    ),
    (
        "labels-images-of-another-size",
        "main_train.py",
        LABELS,
        "labels/task1_img.npy",
        array("labels/task1_img.npy", images(5, 3, 16, 16)),
    ),
    (
        "labels-images-channels-last",
        "main_train.py",
        LABELS,
        "labels/task1_img.npy",
        array("labels/task1_img.npy", images(5, 32, 32, 3)),
    ),
    (
        "labels-images-of-int64",
        "main_train.py",
        LABELS,
        "labels/task1_img.npy",
        array("labels/task1_img.npy", images(5, 3, 32, 32, dtype=np.int64)),
    ),
    # the report
    ("report-of-nothing", "-m tools.report", "", "RUN_DIR"),
    ("report-missing", "-m tools.report", "nowhere", "nowhere"),
    ("report-empty-folder", "-m tools.report", "run empty", "empty"),
    ("report-file", "-m tools.report", "file", "file"),
    ("report-text", "-m tools.report", "run", "run", text("run/results.json")),
    ("report-cut", "-m tools.report", "run", "run", cut("run/results.json")),
    ("report-list", "-m tools.report", "run", "run", text("run/results.json", "[]")),
    ("report-folder", "-m tools.report", "run", "run", folder("run/results.json")),
    ("report-no-state", "-m tools.report", "run", "run", records("states", value=[])),
    ("report-of-another-script", "-m tools.report", "run", "run", records("script", value="main")),
    ("report-mean-null", "-m tools.report", "run", "run", records("states", 0, "mean", value=None)),
    (
        "report-dense-accuracy-text",
        "-m tools.report",
        "run",
        "run",
        records("states", 0, "dense_accuracy", value="high"),
    ),
]


# ------------------------------------------------------------------------------ the tests


def tree():
    """Everything in the folder but names of owners: path -> bytes, or None for a folder."""
    paths = sorted(path for path in Path().rglob("*") if not path.name.endswith("owner"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def run(scripts, script, flags):
    """How a script ends; it is killed after LIMIT seconds."""
    argv = [*script.split(), *shlex.split(BASE[script]), *shlex.split(flags)]
    pid = scripts.start(argv, cwd=Path.cwd())
    timer = threading.Timer(LIMIT, os.kill, (pid, signal.SIGKILL))
    timer.start()
    ended = scripts.wait()
    timer.cancel()
    return ended


@pytest.fixture
def copy(valid, tmp_path, monkeypatch):
    """Work in a copy of the valid input."""
    shutil.copytree(valid, tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")


@pytest.mark.parametrize(
    ("script", "flags", "named", "damage"),
    [pytest.param(*[*case[1:], None][:4], id=case[0]) for case in CASES],
)
def test_bad_input_is_an_error(copy, scripts, script, flags, named, damage):
    if damage:
        damage()
    before = tree()
    ended = run(scripts, script, flags)
    assert "Traceback" not in ended.err
    assert ended.status == 2, ended
    assert ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended.err
    name = "report.py: " if script == "-m tools.report" else f"{script}: "
    assert ended.err.startswith(name), ended.err
    message = ended.err.removeprefix(name)
    assert named in message
    assert ADVICE.search(message), f"it does not say what to do: {message}"
    assert not ended.out or (script == "dataset.py" and NOTICE.fullmatch(ended.out))
    assert tree() == before


NOT_TEST = ("train", "val", "save_100")


@pytest.mark.parametrize(
    ("script", "flags", "damage"),
    [
        ("main_TD.py", "", None),
        ("main_TD.py", "--percent 0", None),
        ("main_BU.py", SET, None),
        ("main_CIL.py", PUBLISHED, None),
        ("main_CIL.py", DONE, None),
        ("main_train.py", LABELS, None),
        ("main_train.py", "--weight pruned.pt --mask pruned.pt --state 1", None),
        ("test.py", "--pretrained dense.pt --state 3", None),
        ("test.py", "--pretrained pruned.pt --pruned --state 3", None),
        ("dataset.py", "--data set", None),
        ("-m tools.report", "run", None),
        # without the files that a script does not need
        ("main_train.py", f"{SET} {LABELS}", remove("set/cifar10_pool.npy")),
        ("main_train.py", f"{PUBLISHED} {LABELS}", remove("published/cifar10_80m_150k.pkl")),
        (
            "test.py",
            f"{SET} --pretrained dense.pt",
            remove("set/cifar10_pool.npy", *(f"set/cifar10_{n}.npz" for n in NOT_TEST)),
        ),
        (
            "test.py",
            f"{PUBLISHED} --pretrained dense.pt",
            remove(*(f"published/cifar10_{n}.pkl" for n in (*NOT_TEST, "80m_150k"))),
        ),
    ],
)
def test_valid_input_is_accepted(copy, scripts, script, flags, damage):
    """Otherwise a case above could fail for another reason than its own."""
    if damage:
        damage()
    ended = run(scripts, script, flags)
    assert (ended.status, ended.err) == (0, "")
