"""dataset.py: the digits, Data, tasks, class orders, loading some parts, what it shows."""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sets import (
    FILES,
    PARTS,
    bag,
    check_error,
    check_picture,
    check_table,
    load,
    parse,
    tree,
    write_folder,
    write_published,
)

import dataset
import main_CIL
import main_train
import test as test_script
from runtime import cli
from runtime.checkpoint import read_state_dict, save_checkpoint

REPOSITORY = Path(dataset.__file__).parent
DIGITS_PER_CLASS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------ digits


@pytest.fixture(scope="module")
def digits():
    return load("--dataset", "digits")


@pytest.fixture(scope="module")
def raw_digits():
    with np.load(REPOSITORY / "data" / "digits.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_the_digits_file_is_as_documented(raw_digits):
    images, labels = raw_digits["images"], raw_digits["labels"]
    assert set(raw_digits) == {"images", "labels"}
    assert images.shape == (1797, 8, 8)
    assert labels.shape == (1797,)
    assert images.dtype == labels.dtype == np.uint8
    assert images.min() == 0
    assert images.max() == 16
    assert np.bincount(labels).tolist() == DIGITS_PER_CLASS
    text = (REPOSITORY / "data" / "README.md").read_text()
    content = (REPOSITORY / "data" / "digits.npz").read_bytes()
    assert re.findall(r"\b[0-9a-f]{64}\b", text) == [hashlib.sha256(content).hexdigest()]
    assert f"{len(content):,} bytes" in text


def test_the_digits_parts_have_the_documented_counts(digits):
    for c, total in enumerate(DIGITS_PER_CLASS):
        rest = total - 30 - 50
        counts = [len(getattr(digits, part)[c]) for part in PARTS]
        assert counts == [rest - round(rest / 10), round(rest / 10), 30, 20]
    assert len(digits.pool) == 500
    arrays = [images for part in PARTS for images in getattr(digits, part).values()]
    for images in (*arrays, digits.pool):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (32, 32, 3)


def test_the_digits_parts_and_pool_are_all_images_once(digits, raw_digits):
    """No two of the 1,797 are equal, so equal multisets mean parts that share no image."""
    assert len(np.unique(raw_digits["images"], axis=0)) == 1797
    gray = (raw_digits["images"].astype(int) * 255 + 8) // 16  # 0..16 to 0..255, rounded
    large = np.stack([np.kron(image, np.ones((4, 4))) for image in gray]).astype(np.uint8)
    images, labels = np.stack([large] * 3, axis=-1), raw_digits["labels"]
    pool = bag(digits.pool)
    for c in range(10):
        own, parts = bag(images[labels == c]), [getattr(digits, part)[c] for part in PARTS[:3]]
        assert not own & pool & bag(*parts)
        assert sum((own & pool).values()) == 50
        assert bag(*parts) + (own & pool) == own


def test_the_digits_exemplars_are_a_part_of_train(digits):
    for c in range(10):
        assert bag(digits.exemplars[c]) <= bag(digits.train[c])
        assert max(bag(digits.exemplars[c]).values()) == 1


def test_the_digits_are_always_the_same(digits):
    """As published results on them need: this is the set of the first release."""
    torch.manual_seed(7)
    np.random.seed(7)
    repeated = load("--dataset", "digits", "--seed", "7")
    assert repeated.fingerprint() == digits.fingerprint() == (
        "d35083522f098acfd2bcb51ad47a04cc4f8b5881bda2c709a2aba1751a35d857"
    )  # fmt: skip


def test_the_digits_normalization_is_that_of_their_training_images(digits):
    pixels = np.concatenate([np.asarray(images) for images in digits.train.values()]) / 255
    for recorded, found in (
        (digits.mean, pixels.mean((0, 1, 2))),
        (digits.std, pixels.std((0, 1, 2))),
    ):
        assert recorded.shape == (3, 1, 1)
        assert np.round(found, 4).tolist() == [round(v, 4) for v in recorded.flatten().tolist()]


def test_the_digits_order_is_the_permutation_of_seed_1993(digits):
    """As iCaRL draws it: NumPy's shuffle of 0..9."""
    order = np.arange(10)
    np.random.RandomState(1993).shuffle(order)
    assert digits.order == order.tolist() == [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]
    assert (digits.classifiers, digits.classes_per_classifier) == (5, 2)


# ------------------------------------------------------------------------------ Data


@pytest.mark.parametrize("first, last", [(1, 1), (3, 3), (1, 2), (2, 3), (1, 3)])
def test_labels_are_positions_in_the_class_order(data, first, last):
    images, labels = data.of_tasks(data.train, first, last)
    wanted = [(3, 0), (1, 1), (5, 2), (0, 3), (2, 4), (4, 5)][2 * first - 2 : 2 * last]
    assert torch.equal(images, torch.cat([data.train[c] for c, _ in wanted]))
    assert labels.tolist() == [label for c, label in wanted for _ in range(11 + c)]
    assert labels.dtype == torch.int64


def test_tasks_may_have_many_classes(data):
    data.classes_per_classifier = 3
    images, labels = data.of_tasks(data.val, 2, 2)
    assert torch.equal(images, torch.cat([data.val[c] for c in (0, 2, 4)]))
    assert labels.tolist() == 4 * [3] + 6 * [4] + 8 * [5]


@pytest.mark.parametrize("first, last", [(1, 0), (2, 1), (3, 1)])
@pytest.mark.parametrize("loaded", [True, False])
def test_of_tasks_is_empty_when_last_is_before_first(data, first, last, loaded):
    images, labels = data.of_tasks(data.exemplars if loaded else {}, first, last)
    assert images.shape == (0, 16, 16, 3)
    assert labels.shape == (0,)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("last", [0, 2])
def test_labels_are_on_the_device_of_the_images(data, last):
    """The meta device stands in for an accelerator."""
    data.train = {c: images.to("meta") for c, images in data.train.items()}
    data.pool = data.pool.to("meta")
    images, labels = data.of_tasks(data.train, 1, last)
    assert images.device.type == labels.device.type == "meta"


def test_counts_are_of_all_classes(data):
    counts = {"train": 81, "val": 39, "test": 45, "exemplars": 24, "pool": 60}
    assert data.counts() == counts
    data.val, data.pool = {}, data.pool[:0]
    assert data.counts() == counts | {"val": 0, "pool": 0}


def test_the_fingerprint_tells_sets_apart(data):
    changes = {
        "one pixel": lambda: data.val[2].view(-1)[5:6].add_(1),
        "the pool": lambda: data.pool.view(-1)[5:6].add_(1),
        "the order": lambda: data.order.reverse(),
        "the tasks": lambda: setattr(data, "classes_per_classifier", 3),
        "fewer parts": lambda: data.exemplars.clear(),
    }
    seen = [data.fingerprint()]
    assert data.fingerprint() == seen[0]
    for change in changes.values():
        change()
        seen.append(data.fingerprint())
    assert len({*seen}) == len(changes) + 1


# ------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize(
    "name, tasks, classes",
    [("cifar10", 5, 2), ("cifar100", 10, 10), ("tiny_imagenet", 10, 20), ("digits", 5, 2)],
)
def test_tasks_by_default(name, tasks, classes):
    args = parse("--dataset", name)
    assert (args.classifiers, args.classes_per_classifier) == (tasks, classes)


@pytest.mark.parametrize(
    "total, tasks, classes",
    [(4, 2, 2), (10, 5, 2), (20, 10, 2), (100, 10, 10), (200, 10, 20), (9, 3, 3), (22, 2, 11)],
)
def test_tasks_of_a_folder_by_default(total, tasks, classes):
    for c in range(total):
        Path("mine/train", str(c)).mkdir(parents=True)
    args = parse("--dataset", "folder", "--source", "mine")
    assert (args.classifiers, args.classes_per_classifier) == (tasks, classes)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 13])
def test_classes_that_do_not_divide_evenly_need_a_flag(total):
    for c in range(total):
        Path("mine/train", str(c)).mkdir(parents=True)
    call = ("--dataset", "folder", "--source", "mine")
    check_error(lambda: parse(*call), f"{total} classes", "--classifiers")


def test_state_is_one_of_the_tasks():
    args = parse()
    args.state = 6
    check_error(lambda: cli.finalize_args(args, "run"), "--state 6")
    args.state = 5
    cli.finalize_args(args, "run")


def test_folders_are_named_after_the_data_set():
    args = parse("--dataset", "digits")
    cli.finalize_args(args, "TD_{}")
    assert args.save_dir == "TD_digits"
    assert Path(args.save_data_path) == Path("TD_digits/data")


# ------------------------------------------------------------------------------ some parts


def as_prepared():
    """The published files as a prepared set."""
    content = write_published()
    Path("set").mkdir()
    for part in FILES:
        by_name = {str(c): images for c, images in content[part].items()}
        np.savez(f"set/cifar10_{part}.npz", **by_name)
    np.save("set/cifar10_pool.npy", content["pool"])
    meta = {"dataset": "cifar10", "names": {str(c): f"class {c}" for c in range(10)}}
    Path("set/meta.json").write_text(json.dumps(meta))
    return "set", content


FORMS = [as_prepared, lambda: ("published", write_published())]


@pytest.mark.parametrize("form", FORMS, ids=["prepared", "published"])
def test_the_test_part_loads_alone(form):
    """As test.py does it: no other file has to be there."""
    folder, content = form()
    everything = load("--data", folder)
    for file in Path(folder).iterdir():
        if not re.match("meta|cifar10_test", file.name):
            file.unlink()
    data = load("--data", folder, parts=("test",), pool=False)
    assert all(np.array_equal(data.test[c].numpy(), content["test"][c]) for c in range(10))
    assert (data.train, data.val, data.exemplars, data.pool.shape) == ({}, {}, {}, (0, 32, 32, 3))
    assert data.order == everything.order and torch.equal(data.mean, everything.mean)
    counts = everything.counts() | dict.fromkeys(("train", "val", "exemplars", "pool"), 0)
    assert data.counts() == counts
    assert data.fingerprint() != everything.fingerprint()
    for found, wanted in zip(data.of_tasks(data.test, 1, 5), everything.of_tasks(data.test, 1, 5)):
        assert torch.equal(found, wanted)
    check_error(lambda: load("--data", folder), folder)
    Path(folder, "cifar10_test.npz" if folder == "set" else "cifar10_test.pkl").unlink()
    check_error(lambda: load("--data", folder, parts=("test",), pool=False), folder)


@pytest.mark.parametrize("form", FORMS, ids=["prepared", "published"])
@pytest.mark.parametrize("flags, options", [([], {"pool": False}), (["--no_teaching"], {})])
def test_the_pool_is_not_read_unless_it_is_needed(form, flags, options):
    folder, content = form()
    whole = load("--data", folder)
    pool = Path(folder, "cifar10_pool.npy" if folder == "set" else "cifar10_80m_150k.pkl")
    for damage in (lambda: pool.write_bytes(b"damaged"), pool.unlink):
        damage()
        data = load("--data", folder, *flags, **options)
        assert data.pool.shape == (0, 32, 32, 3)
        assert data.counts() == whole.counts() | {"pool": 0}
        assert torch.equal(data.train[3], whole.train[3])
        check_error(lambda: load("--data", folder), pool.name)


def test_parts_of_the_digits_load_alone(digits):
    data = load("--dataset", "digits", parts=("val",), pool=False)
    assert data.counts() == dict.fromkeys((*PARTS, "pool"), 0) | {"val": digits.counts()["val"]}
    assert torch.equal(data.val[4], digits.val[4])


# ------------------------------------------------------------------------------ class order


@pytest.mark.parametrize(
    "name, given, order",
    [
        ("cifar10", None, [9, 8, 7, 1, 5, 0, 3, 4, 6, 2]),
        ("cifar10", "published", [9, 8, 7, 1, 5, 0, 3, 4, 6, 2]),
        ("cifar10", "sorted", list(range(10))),
        ("cifar10", "random:1993", [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]),
        ("digits", None, [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]),
        ("digits", "published", [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]),
        ("digits", "random:7", np.random.RandomState(7).permutation(10).tolist()),
        ("cifar100", None, np.random.RandomState(1993).permutation(100).tolist()),
    ],
)
def test_class_orders(name, given, order):
    args = parse("--dataset", name, *(["--class_order", given] if given else []))
    assert dataset.class_order(args, {}, len(order)) == order


def test_a_file_may_list_the_order():
    Path("order.txt").write_text("\n7\n3\nzero\n 5 \n1\n2\n")
    flags = ["--dataset", "digits", "--class_order", "order.txt"]
    args = parse(*flags, "--classifiers", "3")
    assert dataset.class_order(args, {0: "zero", 2: "7", 7: "2"}, 10) == [2, 3, 0, 5, 1, 7]
    for mark in ("", "\ufeff"):  # editors on Windows put that before a text
        Path("order.txt").write_text(f"{mark}7\n3\n", "utf-8")
        assert load(*flags, "--classifiers", "1").order == [7, 3]


@pytest.mark.parametrize(
    "text, fragments",
    [
        ("1\n2\n1\n", ["line 3", "'1'"]),
        ("1\n2\nten\n", ["line 3", "'ten'"]),
        ("1\n10\n", ["line 2", "'10'"]),
        ("1\n2\n3", ["3 classes", "10"]),
        ("", ["0 classes"]),
        (b"\xff\xfe", []),
        (None, ["order.txt"]),
    ],
)
def test_errors_in_an_order_file(text, fragments):
    if text is not None:
        Path("order.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    call = ["--dataset", "digits", "--class_order", "order.txt"]
    check_error(lambda: load(*call), "--class_order order.txt", *fragments)


@pytest.mark.parametrize(
    "order", ["random", "random:", "random:x", "random:-1", "random:9999999999"]
)
def test_unknown_orders(order):
    call = ["--dataset", "digits", "--class_order", order]
    check_error(lambda: load(*call), f"--class_order {order}")


SMALL = "--dataset digits --classifiers 2 --width 4 --epochs 1 --batch_size 32"
TEST = "--dataset digits --classifiers 2 --width 4 --state 2 --pretrained"


def test_scripts_use_the_class_order_of_the_run_they_continue(few_digits):
    order = np.random.RandomState(5).permutation(10).tolist()[:4]
    train = f"{SMALL} --unlabel_num 1 --save_dir run".split()
    main_CIL.main([*train, "--class_order", "random:5"])
    results = json.loads(Path("run/results.json").read_text())
    assert results["class_order"] == order
    check = TEST.split()
    call = [*check, "run/task2_best_model.pt"]
    for flags in ([], ["--class_order", "random:5"]):
        found = test_script.main([*call, *flags])
        accuracy = results["states"][1]["accuracy"]
        assert (found["class_order"], found["states"][0]["accuracy"]) == (order, accuracy)
    check_error(
        lambda: test_script.main([*call, "--class_order", "sorted"]), "--class_order sorted"
    )
    # a retrained model in another folder has its own record beside it
    state = read_state_dict("run/task1_best_model.pt")
    ones = {f"{n}_mask": torch.ones_like(w) for n, w in state.items() if w.ndim == 4}
    save_checkpoint("ones.pt", ones)
    flags = "--weight run/task1_best_model.pt --mask ones.pt --state 2 --save_data_path run/data"
    found = main_train.main([*SMALL.split(), *flags.split(), "--save_dir", "other"])
    assert found["class_order"] == order
    found = test_script.main([*check, "other/retrain_task2_best_model.pt", "--pruned"])
    assert found["class_order"] == order
    # resuming: the same order given by a file, then another order
    Path("order.txt").write_text("".join(f"{c}\n" for c in order))
    main_CIL.main([*train, "--class_order", "order.txt"])
    check_error(lambda: main_CIL.main(train), "--class_order")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"config": {"dataset": "digits"}}', "[" * 99999]
    + ['{"config": {"dataset": "digits"}, "class_order": ' + order + "}"
       for order in ("[1, 2]", '"abcd"', "[1, 2, 3, 3]", "[1, 2, 3, 10]", "[1, 2, 3, [4]]")],
)  # fmt: skip
def test_a_record_without_a_matching_order_needs_the_flag(text):
    Path("results.json").write_text(text)
    args = parse("--dataset", "digits", "--classifiers", "2")
    check_error(lambda: dataset.class_order(args, {}, 10, "x.pt"), "results.json", "--class_order")
    args.class_order = "sorted"
    assert dataset.class_order(args, {}, 10, "x.pt") == list(range(10))


def test_the_order_of_another_set_is_ignored():
    content = {"config": {"dataset": "cifar10"}, "class_order": [1, 2, 3, 4]}
    Path("results.json").write_text(json.dumps(content))
    args = parse("--dataset", "digits", "--classifiers", "2", "--class_order", "sorted")
    assert dataset.class_order(args, {}, 10, "x.pt") == list(range(10))


# ------------------------------------------------------------------------------ the scripts

SOURCE = "--dataset folder --source mine --data set --width 4"
SHORT = "--epochs 1 --batch_size 32 --save_dir run"


@pytest.mark.parametrize(
    "script, flags",
    [
        ("main_CIL", ""),
        ("main_TD", "--prune_scheduler 1,1 --iter_epochs 1"),
        ("main_BU", "--iter_epochs 1 --max_iter_prun 2"),
    ],
)
def test_scripts_train_without_a_pool(script, flags):
    """With --no_teaching, on a folder of images: nothing is queried or stored."""
    write_folder(pool=0)
    source = SOURCE.split()
    call = [*source, *SHORT.split(), *flags.split()]
    main = importlib.import_module(script).main
    found = main([*call, "--no_teaching"])
    assert len(found["states"]) >= 2
    assert found["config"]["no_teaching"] is True
    assert not Path("run/data").exists()
    check_error(lambda: main(call), "set", "--no_teaching")
    pruned = ["--pruned"] * (script == "main_TD")
    found = test_script.main([*source, "--pretrained", "run/task2_checkpoint.pt", *pruned])
    assert len(found["states"][0]["accuracy"]) == 2


@pytest.mark.parametrize("module", ["dataset", "datasets.cifar", "datasets.tiny_imagenet"])
def test_torchvision_is_not_imported_at_start(module):
    """It doubles the start time; only reading CIFAR or downloading needs it."""
    code = f"import sys, {module}; print('torch' in sys.modules, 'torchvision' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert run.stdout.split() == [b"True", b"False"], run.stderr


# ------------------------------------------------------------------------------ the command


def test_the_picture_has_a_row_for_each_task(data):
    """Six classes of different brightness."""
    dataset.preview(data, Path("deep/preview.png"))
    check_picture("deep/preview.png", data)


def test_the_table_counts_uneven_classes(data):
    data.names = {c: f"class{c}" for c in range(6)}
    check_table(dataset.table(data), data, 60)


def test_a_picture_that_cannot_be_written():
    Path("data").write_text("not a folder")
    before = tree()
    check_error(lambda: dataset.main(["--dataset", "digits"]), "data/digits")
    assert tree() == before


def command(*argv):
    script = [sys.executable, str(REPOSITORY / "dataset.py"), *argv]
    return subprocess.run(script, capture_output=True, text=True, timeout=300)


def test_the_command_shows_the_digits(digits):
    run = command("--dataset", "digits")
    assert (run.returncode, run.stderr) == (0, "")
    check_table(run.stdout, digits, 500)
    check_picture("data/digits/preview.png", digits)


def test_an_error_of_the_command_is_one_line():
    run = command("--dataset", "mnist")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("dataset.py: --dataset mnist")
    assert not os.listdir()
