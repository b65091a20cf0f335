"""dataset.py: the digits, Data, batches, tasks, class orders, loading, what it shows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import tree, write_published
from sets import (
    SPLITS,
    bag,
    check_error,
    load,
    parse,
    write_cifar,
    write_folder,
)

import dataset

REPOSITORY = Path(dataset.__file__).parent
DIGITS_PER_CLASS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
SEED_1993 = [4, 2, 7, 6, 0, 3, 5, 8, 9, 1]
CIFAR10_ORDER = [9, 8, 7, 1, 5, 0, 3, 4, 6, 2]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def digits():
    return load("--dataset", "digits")


# ------------------------------------------------------------------------------ digits


def test_the_digits_are_all_images_once_and_always_split_alike(digits):
    for c, total in enumerate(DIGITS_PER_CLASS):
        rest = total - 30 - 50
        counts = [len(getattr(digits, split)[c]) for split in SPLITS]
        assert counts == [rest - round(rest / 10), round(rest / 10), 30, 20]
        assert bag(digits.exemplars[c]) <= bag(digits.train[c])
    own = [digits.train, digits.val, digits.test, {0: digits.pool}]
    images = bag(*(images for split in own for images in split.values()))
    assert len(digits.pool) == 500
    assert len(images) == sum(images.values()) == 1797  # no two of them are equal
    # published results on them need the set of the first release
    assert digits.fingerprint() == (
        "d35083522f098acfd2bcb51ad47a04cc4f8b5881bda2c709a2aba1751a35d857"
    )
    pixels = np.concatenate([np.asarray(images) for images in digits.train.values()]) / 255
    assert digits.mean.flatten().numpy() == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-4)
    assert digits.std.flatten().numpy() == pytest.approx(pixels.std((0, 1, 2)), abs=1e-4)


# ------------------------------------------------------------------------------ Data


@pytest.mark.parametrize("first, last", [(1, 1), (3, 3), (1, 2), (2, 3), (1, 3), (2, 1)])
def test_labels_are_positions_in_the_class_order(data, first, last):
    images, labels = data.select_tasks(data.train, first, last)
    wanted = [(3, 0), (1, 1), (5, 2), (0, 3), (2, 4), (4, 5)][2 * first - 2 : 2 * last]
    assert torch.equal(images, torch.cat([data.train[c] for c, _ in wanted] or [data.pool[:0]]))
    assert labels.tolist() == [label for c, label in wanted for _ in range(11 + c)]
    assert labels.dtype == torch.int64


def test_the_fingerprint_tells_datasets_apart(data):
    changes = [
        lambda: data.val[2].view(-1)[5:6].add_(1),
        lambda: data.pool.view(-1)[5:6].add_(1),
        lambda: data.order.reverse(),
        lambda: data.exemplars.clear(),
    ]
    seen = {data.fingerprint(), data.fingerprint()}
    for change in changes:
        change()
        seen.add(data.fingerprint())
    assert len(seen) == len(changes) + 1


# ------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize(
    "argv, total, found",
    [("", 0, (5, 2)), ("cifar100", 0, (10, 10)), ("tiny_imagenet", 0, (10, 20))]
    + [("digits --classifiers 3", 0, (3, 2)), ("cifar100 --classes_per_classifier 4", 0, (10, 4))]
    + [("folder", n, found) for n, found in ((4, (2, 2)), (100, (10, 10)), (9, (3, 3)))]
    + [("folder", 22, (2, 11)), ("folder", 7, (1, 7)), ("folder --classifiers 6", 6, (6, 1))]
    + [("folder --classes_per_classifier 2", 6, (3, 2)), ("folder --classifiers 4", 6, None)]
    + [("folder --classifiers 4", 3, None), ("tiny_imagenet --classifiers 7", 6, None)],
)
def test_tasks(argv, total, found):
    """total: classes of a prepared dataset, 0: none is there. found: None: an error."""
    call = ["--dataset", *argv.split()] if argv else []
    if total:
        Path("set").mkdir()
        meta = {"dataset": call[1], "names": {c: f"n{c}" for c in range(total)}}
        Path("set/meta.json").write_text(json.dumps(meta))
        call += ["--data", "set"]
    if found is None:
        check_error(lambda: parse(*call), "--classifiers", f"{total} classes")
    else:
        args = parse(*call)
        assert (args.classifiers, args.classes_per_classifier) == found


# ------------------------------------------------------------------------------ class order


@pytest.mark.parametrize(
    "name, given, order",
    [
        ("cifar10", None, CIFAR10_ORDER),
        ("cifar10", "sorted", [*range(10)]),
        ("cifar10", "random:1993", SEED_1993),
        ("cifar10", SEED_1993, SEED_1993),
        ("digits", "published", SEED_1993),
        ("cifar100", None, np.random.RandomState(1993).permutation(100).tolist()),
        *(("digits", bad, None) for bad in ("random", "random:-1", [1, 2], [*range(9), 1])),
    ],
)
def test_class_orders(name, given, order):
    args = parse("--dataset", name)
    args.class_order = given
    if order:
        assert dataset.class_order(args, {}, len(order)) == order
    else:
        check_error(lambda: dataset.class_order(args, {}, 10), "--class_order")


@pytest.mark.parametrize(
    "text, order",
    [
        ("\n7\n3\nzero\n 5 \n1\n2\n", [2, 3, 0, 5, 1, 7]),  # "7" is the name of class 2
        ("3.000000000000000000e+00\n9.0e+00\n", [3, 9]),  # published: np.savetxt's
        ("\ufeff4\n3\n", [4, 3]),  # as editors on Windows begin a text
        ("cafe\N{COMBINING ACUTE ACCENT}\n1\n", [8, 1]),
        ("1\n3\n1\n", "each once"),
        ("1\n2\nten\n", "'ten' is not"),
        ("1\n10\n", "'10' is not"),
        ("1\n", "at least 2"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_may_list_the_order(text, order):
    if text is not None:
        Path("order.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    args = parse("--dataset", "digits", "--class_order", "order.txt", "--classifiers", "1")
    names = {0: "zero", 2: "7", 7: "2", 8: "caf\N{LATIN SMALL LETTER E WITH ACUTE}"}
    if isinstance(order, str):
        check_error(lambda: dataset.class_order(args, names, 10), "--class_order order.txt", order)
    else:
        assert dataset.class_order(args, names, 10) == order


def test_a_checkpoint_of_other_classes_is_refused():
    """Its names in its order must be the dataset's: else labels would mean other things."""
    call = ["--dataset", "folder", "--source", "mine", "--data"]
    write_folder(("apple", "bear", "cat", "dog"))
    dataset.main([*call, "one"])
    for split in ("train", "test"):
        Path("mine", split, "apple").rename(f"mine/{split}/zebra")
    dataset.main([*call, "two"])
    known = {"class_order": [2, 0, 3, 1], "class_names": ["cat", "apple", "dog", "bear"]}

    def of(folder, order, **changes):
        args = parse(*call[:2], "--data", folder)
        args.no_teaching, args.class_order = True, order
        return dataset.load(args, torch.device("cpu"), known=known | changes).order

    assert of("one", [2, 0, 3, 1]) == [2, 0, 3, 1]
    assert of("two", [2, 0, 3, 1], class_names=["2", "0", "3", "1"]) == [2, 0, 3, 1]  # unknown then
    line = "class 2 is 'dog', where the checkpoint has 'cat'"
    check_error(lambda: of("two", [2, 0, 3, 1]), "--data two", line)
    check_error(lambda: of("one", "sorted"), "--class_order sorted")


# ------------------------------------------------------------------------------ some splits


@pytest.mark.parametrize("folder", ["set", "published"])
def test_only_what_is_needed_is_read(folder):
    if folder == "set":
        write_cifar()
        dataset.main(["--data", "set", "--raw", "raw"])
    else:
        write_published(Path("published"), side=32)
    whole = load("--data", folder)
    pool = next(path for path in Path(folder).iterdir() if re.search("pool|80m", path.name))
    pool.write_bytes(b"damaged")
    check_error(lambda: load("--data", folder), pool.name)
    for options in ({"pool": False}, {"no_teaching": True}):
        data = load("--data", folder, **options)
        assert data.pool.shape == (0, 32, 32, 3)
        assert data.counts() == whole.counts() | {"pool": 0}
    for path in Path(folder).iterdir():
        if not re.match("meta|cifar10_test", path.name):
            path.unlink()
    data = load("--data", folder, splits=("test",), pool=False)
    assert all(torch.equal(data.test[c], whole.test[c]) for c in range(10))
    assert (data.train, data.val, data.exemplars) == ({}, {}, {})
    assert (data.order, data.pad) == (CIFAR10_ORDER, 4)
    assert data.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    check_error(lambda: load("--data", folder, pool=False), folder)


# ------------------------------------------------------------------------------ the command


def test_the_picture_has_a_row_for_each_task(data):
    """Six classes of different brightness, 16 pixels drawn as 64."""
    data.names = dict.fromkeys(range(6), "\N{CJK UNIFIED IDEOGRAPH-72D7}\udce9")
    drawn = np.asarray(dataset.draw(data)).astype(float)
    for i, c in enumerate(data.order):
        top, left = i // 2 * 84 + 16, i % 2 * (8 * 64 + 12)
        shown = drawn[top : top + 64, left : left + 8 * 64]
        assert shown.mean() == pytest.approx(float(data.train[c][:8].float().mean()), abs=0.5)


def test_the_command_shows_the_digits(digits):
    call = [sys.executable, str(REPOSITORY / "dataset.py"), "--dataset", "digits"]
    run = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stderr) == (0, "")
    rows = [line.split() for line in run.stdout.splitlines()]
    for i, (row, c) in enumerate(zip(rows[1:11], digits.order)):
        counts = [str(len(getattr(digits, split)[c])) for split in SPLITS]
        assert row == [str(i // 2 + 1), str(c), str(c), *counts]
    assert rows[12][1] == "500"
    with Image.open("data/digits/preview.png") as picture:
        assert picture.size == (2 * (8 * 64 + 12), 5 * 84)
    assert set(tree(".")) == {"data/digits/preview.png"}


def test_fewer_exemplars_are_the_first_of_those_drawn():
    args = parse("--dataset", "digits")
    every = dataset.load(args, torch.device("cpu")).exemplars
    args.exemplars = 7
    kept = dataset.load(args, torch.device("cpu")).exemplars
    assert {*kept} == {*every} and all(torch.equal(kept[c], every[c][:7]) for c in every)
