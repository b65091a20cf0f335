"""dataset.py: the digits, of_tasks, preparing CIFAR-10, the published pickles, and bad input."""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import prepare
import utils
from utils import Refusal

REPOSITORY = Path(dataset.__file__).parent
PARTS = ("train", "val", "test", "exemplars")
FILES = ("train", "val", "test", "save_100")
DIGITS_PER_CLASS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
CIFAR10_ORDER = [9, 8, 7, 1, 5, 0, 3, 4, 6, 2]
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10_NAMES += ["dog", "frog", "horse", "ship", "truck"]
CIFAR10_IN_ORDER = ["truck", "ship", "horse", "automobile", "dog"]
CIFAR10_IN_ORDER += ["airplane", "cat", "deer", "frog", "bird"]
ARCHIVE = b"an archive"
RAW = os.environ.get("LIFELONG_TICKETS_RAW")


# ------------------------------------------------------------------------------ helpers


def bag(*arrays):
    """The images of all arrays as a multiset."""
    return Counter(np.asarray(image).tobytes() for images in arrays for image in images)


def refused(call, *words):
    """Check that call() is refused in one line that holds all the words; return the line."""
    with pytest.raises(Refusal) as caught:
        call()
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    for word in words:
        assert word in line
    return line


def tree(folder="."):
    """All that lies under a folder: path -> time of change, and content."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(Path(folder).rglob("*"))
    }


def load(*argv):
    """The data set as a training script loads it."""
    args = utils.make_parser("words", "run_<dataset>").parse_args(argv)
    dataset.complete(args)
    utils.settle(args, "run_{}")
    return dataset.load(args, torch.device("cpu"))


def stored(folder):
    """The part files {part: {class: images}} and the pool, read as plain arrays."""
    parts = {}
    for part in FILES:
        with np.load(folder / f"cifar10_{part}.npz", allow_pickle=False) as arrays:
            parts[part] = {int(c): arrays[c] for c in arrays.files}
    return parts, np.load(folder / "cifar10_pool.npy", allow_pickle=False)


def random_images(n, seed, side=32):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def fake(name, base_folder, filename, classes, counts, seed):
    """Stands in for a torchvision class, with counts (train, test) of random images per class.

    It finds its files where base_folder is there, or the archive with leave to unpack it (which
    torchvision calls download too); there is no network.
    """
    rng, sets = np.random.default_rng(seed), {}
    for train, count in zip((True, False), counts):
        targets = rng.permutation(np.repeat(np.arange(len(classes)), count)).tolist()
        images = random_images(len(targets), [seed, train])
        sets[train] = SimpleNamespace(data=images, targets=targets, classes=list(classes))

    def kind(root, train=True, download=False):
        kind.calls.append((Path(root), download))
        packed = download and (Path(root) / filename).exists()
        if packed or (Path(root) / base_folder).is_dir():
            return sets[train]
        if download:
            raise URLError("no network")
        raise RuntimeError("Dataset not found or corrupted.")

    kind.__name__, kind.calls, kind.sets = name, [], sets
    kind.base_folder, kind.filename = base_folder, filename
    kind.tgz_md5 = hashlib.md5(ARCHIVE).hexdigest()
    return kind


@pytest.fixture(autouse=True)
def downloads(monkeypatch):
    """No test may reach the network: the list of the addresses that one asked for."""
    asked = []

    def urlopen(request, *args, **options):
        asked.append(getattr(request, "full_url", request))
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return asked


def install(patch, counts):
    """Put fakes in place of torchvision's classes."""
    folder, archive = "cifar-10-batches-py", "cifar-10-python.tar.gz"
    cifar10 = fake("CIFAR10", folder, archive, CIFAR10_NAMES, counts, 1)
    folder, archive = "cifar-100-python", "cifar-100-python.tar.gz"
    cifar100 = fake("CIFAR100", folder, archive, ["apple", "aquarium"], (20, 3), 2)
    patch.setattr(prepare, "CIFAR10", cifar10)
    patch.setattr(prepare, "CIFAR100", cifar100)
    return SimpleNamespace(cifar10=cifar10, cifar100=cifar100)


@pytest.fixture
def official(monkeypatch, tmp_path):
    """Both fakes, 20 training and 10 test images per class, their files in raw/ of the cwd."""
    monkeypatch.chdir(tmp_path)
    for folder in ("cifar-10-batches-py", "cifar-100-python"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
    return install(monkeypatch, (20, 10))


def of_class(split, c):
    return split.data[np.array(split.targets) == c]


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
    """No two of the 1,797 are equal, so that equal multisets mean parts that share no image."""
    assert len(np.unique(raw_digits["images"], axis=0)) == 1797
    grey = (raw_digits["images"].astype(int) * 255 + 8) // 16  # 0..16 to 0..255, rounded
    large = np.stack([np.kron(image, np.ones((4, 4))) for image in grey]).astype(np.uint8)
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
    torch.manual_seed(7)
    np.random.seed(7)
    again = load("--dataset", "digits", "--seed", "7")
    assert torch.equal(again.pool, digits.pool)
    for part in PARTS:
        first, second = getattr(digits, part), getattr(again, part)
        assert all(torch.equal(first[c], second[c]) for c in range(10))


def test_the_digits_normalisation_is_that_of_their_training_images(digits):
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


# ------------------------------------------------------------------------------ of_tasks


@pytest.mark.parametrize("first, last", [(1, 1), (3, 3), (1, 2), (2, 3), (1, 3)])
def test_of_tasks_takes_images_and_labels_by_place(data, first, last):
    images, labels = data.of_tasks(data.train, first, last)
    wanted = [(3, 0), (1, 1), (5, 2), (0, 3), (2, 4), (4, 5)][2 * first - 2 : 2 * last]
    assert torch.equal(images, torch.cat([data.train[c] for c, _ in wanted]))
    assert labels.tolist() == [place for c, place in wanted for _ in range(11 + c)]
    assert labels.dtype == torch.int64


def test_of_tasks_of_many_classes_each(data):
    data.classes_per_classifier = 3
    images, labels = data.of_tasks(data.val, 2, 2)
    assert torch.equal(images, torch.cat([data.val[c] for c in (0, 2, 4)]))
    assert labels.tolist() == 4 * [3] + 6 * [4] + 8 * [5]


@pytest.mark.parametrize("first, last", [(1, 0), (2, 1), (3, 1)])
def test_of_tasks_is_empty_when_last_is_before_first(data, first, last):
    images, labels = data.of_tasks(data.exemplars, first, last)
    assert images.shape == (0, 16, 16, 3)
    assert labels.shape == (0,)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("last", [0, 2])
def test_of_tasks_gives_labels_on_the_device_of_the_images(data, last):
    """The meta device stands in for an accelerator."""
    data.train = {c: images.to("meta") for c, images in data.train.items()}
    images, labels = data.of_tasks(data.train, 1, last)
    assert images.device.type == labels.device.type == "meta"


# ------------------------------------------------------------------------------ preparing


def check_prepared(folder, official, counts):
    """The files against the official images; counts: train, val, test, exemplars per class."""
    parts, pool = stored(folder)
    train, test = official
    for c in range(10):
        own = {part: parts[part][c] for part in FILES}
        assert tuple(len(own[part]) for part in FILES) == counts
        assert {images.dtype for images in own.values()} == {np.dtype(np.uint8)}
        assert {images.shape[1:] for images in own.values()} == {(32, 32, 3)}
        assert bag(own["train"], own["val"]) <= bag(of_class(train, c))
        assert bag(own["save_100"]) <= bag(own["train"])
        assert bag(own["test"]) <= bag(of_class(test, c))
    return parts, pool


def test_a_prepared_set_is_split_9_to_1(official):
    dataset.main(["--data", "set", "--raw", "raw"])
    sets = [official.cifar10.sets[train] for train in (True, False)]
    parts, pool = check_prepared(Path("set"), sets, (18, 2, 10, 18))
    for c in range(10):
        assert bag(parts["train"][c], parts["val"][c]) == bag(of_class(sets[0], c))
        assert np.array_equal(parts["test"][c], of_class(sets[1], c))
    assert np.array_equal(pool, official.cifar100.sets[True].data)


def test_a_prepared_set_is_plain_files_that_all_may_read(official):
    dataset.main(["--data", "set", "--raw", "raw"])
    names = {"meta.json", "preview.png", "cifar10_pool.npy"}
    assert {path.name for path in Path("set").iterdir()} == names | {
        f"cifar10_{part}.npz" for part in FILES
    }
    meta = json.loads(Path("set/meta.json").read_text())
    assert meta["dataset"] == "cifar10"
    assert meta["names"] == {str(c): name for c, name in enumerate(CIFAR10_NAMES)}
    assert (meta["seed"], meta["per_class"]) == (0, None)
    assert "CIFAR-100" in meta["pool"]
    assert Path("set").stat().st_mode & 0o777 == 0o755
    assert sorted(os.listdir()) == ["raw", "set"]


def test_a_prepared_set_is_loaded_as_it_was_written(official):
    dataset.main(["--data", "set", "--raw", "raw"])
    parts, pool = stored(Path("set"))
    data = load("--data", "set")
    for part, file in zip(PARTS, FILES):
        found = getattr(data, part)
        assert sorted(found) == list(range(10))
        assert all(np.array_equal(found[c].numpy(), parts[file][c]) for c in range(10))
    assert np.array_equal(data.pool.numpy(), pool)
    assert data.order == CIFAR10_ORDER
    assert [data.names[c] for c in data.order] == CIFAR10_IN_ORDER
    assert (data.classifiers, data.classes_per_classifier, data.pad) == (5, 2, 4)
    for found, wanted in (
        (data.mean, (0.4914, 0.4822, 0.4465)),
        (data.std, (0.2023, 0.1994, 0.2010)),
    ):
        assert torch.equal(found, torch.tensor(wanted).view(3, 1, 1))


def test_fewer_tasks_take_the_first_classes_of_the_order(official):
    dataset.main(["--data", "set", "--raw", "raw"])
    data = load("--data", "set", "--classifiers", "2", "--classes_per_classifier", "3")
    assert data.order == CIFAR10_ORDER[:6]
    assert list(data.train) == CIFAR10_ORDER[:6]
    assert (data.classifiers, data.classes_per_classifier) == (2, 3)


def test_exemplars_are_100_where_train_has_more(monkeypatch, official):
    sets = install(monkeypatch, (120, 1)).cifar10.sets
    dataset.main(["--data", "set", "--raw", "raw"])
    parts, _ = check_prepared(Path("set"), (sets[True], sets[False]), (108, 12, 1, 100))
    # drawn at random, not the first of train
    assert bag(parts["save_100"][0]) != bag(parts["train"][0][:100])
    assert set(bag(parts["save_100"][0]).values()) == {1}


def test_the_split_is_drawn_at_random_and_anew_for_each_class(monkeypatch, official):
    sets = install(monkeypatch, (120, 1)).cifar10.sets
    dataset.main(["--data", "set", "--raw", "raw"])
    parts, _ = stored(Path("set"))
    drawn = set()
    for c in range(10):
        held_out = bag(parts["val"][c])
        own = of_class(sets[True], c)
        drawn.add(tuple(i for i, image in enumerate(own) if image.tobytes() in held_out))
    assert len(drawn) == 10
    assert not drawn & {tuple(range(12)), tuple(range(108, 120)), tuple(range(0, 120, 10))}


def test_split_itself_draws_by_seed_and_class():
    """The digits are split by it too, so that it cannot hang on what prepare has shuffled."""
    images = random_images(60, 1)
    held_out, exemplars = [], []
    for c, seed in ((0, 0), (1, 0), (0, 1)):
        parts = {part: {} for part in PARTS}
        prepare.split(images, c, parts, seed, exemplars=20)
        assert bag(parts["train"][c], parts["val"][c]) == bag(images)
        held_out.append(bag(parts["val"][c]))
        exemplars.append(bag(parts["exemplars"][c]))
    for drawn in (held_out, exemplars):
        assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert bag(images[:6]) not in held_out
    assert bag(images[-6:]) not in held_out


def test_per_class_makes_a_smaller_set(official):
    dataset.main(["--data", "set", "--raw", "raw", "--per_class", "10"])
    sets = [official.cifar10.sets[train] for train in (True, False)]
    parts, pool = check_prepared(Path("set"), sets, (9, 1, 10, 9))
    first = bag(*(of_class(sets[0], c)[:10] for c in range(10)))
    assert bag(*parts["train"].values(), *parts["val"].values()) != first  # taken at random
    assert len(pool) == 40
    assert json.loads(Path("set/meta.json").read_text())["per_class"] == 10


def test_per_class_holds_for_test_images_too(official):
    official.cifar10.sets[False] = official.cifar10.sets[True]
    dataset.main(["--data", "set", "--raw", "raw", "--per_class", "15"])
    sets = (official.cifar10.sets[True],) * 2
    check_prepared(Path("set"), sets, (15 - round(1.5), round(1.5), 15, 15 - round(1.5)))


def test_the_pool_comes_from_a_file_of_ones_own(official):
    pool = random_images(7, 9)
    np.save("pool.npy", pool)
    shutil.rmtree("raw/cifar-100-python")  # not needed then
    dataset.main(["--data", "set", "--raw", "raw", "--unlabeled", "pool.npy"])
    assert np.array_equal(stored(Path("set"))[1], pool)
    assert json.loads(Path("set/meta.json").read_text())["pool"] == "pool.npy"
    assert not official.cifar100.calls


def test_the_split_is_that_of_the_seed(official):
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        torch.manual_seed(len(folder))
        dataset.main(["--data", folder, "--raw", "raw", "--seed", seed])
    same, again, other = (stored(Path(folder))[0] for folder in "abc")
    for part in FILES:
        for c in range(10):
            assert np.array_equal(same[part][c], again[part][c])
    for part in ("train", "val", "save_100"):
        assert any(bag(same[part][c]) != bag(other[part][c]) for c in range(10))
    assert json.loads(Path("c/meta.json").read_text())["seed"] == 4


def test_a_second_call_does_not_prepare_it_anew(official):
    dataset.main(["--data", "set", "--raw", "raw"])
    before, asked = tree("set"), len(official.cifar10.calls)
    dataset.main(["--data", "set", "--raw", "raw"])
    after = tree("set")
    assert set(after) == set(before)
    assert all(after[path] == before[path] for path in before if path != "set/preview.png")
    assert len(official.cifar10.calls) == asked


def test_an_empty_folder_is_filled(official):
    Path("set").mkdir()
    dataset.main(["--data", "set", "--raw", "raw"])
    assert load("--data", "set").order == CIFAR10_ORDER


def test_without_raw_the_official_files_go_beside_the_set(official):
    Path("data").mkdir()
    Path("raw").rename("data/raw")
    assert load().source == "data/cifar10"
    calls = official.cifar10.calls + official.cifar100.calls
    assert set(calls) == {(Path("data/raw"), True)}


def test_with_raw_nothing_is_downloaded(official):
    dataset.main(["--data", "set", "--raw", "raw"])
    calls = official.cifar10.calls + official.cifar100.calls
    assert set(calls) == {(Path("raw"), False)}


def test_raw_may_hold_the_archives_as_they_were_published(official):
    shutil.rmtree("raw")
    Path("raw").mkdir()
    for name in ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz"):
        Path("raw", name).write_bytes(ARCHIVE)
    dataset.main(["--data", "set", "--raw", "raw"])
    sets = [official.cifar10.sets[train] for train in (True, False)]
    check_prepared(Path("set"), sets, (18, 2, 10, 18))


def test_raw_may_be_the_unpacked_folder_itself(official):
    np.save("pool.npy", random_images(7, 9))
    raw = "raw/cifar-10-batches-py"
    dataset.main(["--data", "set", "--raw", raw, "--unlabeled", "pool.npy"])
    assert len(stored(Path("set"))[1]) == 7


ENOSPC = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error, reason",
    [
        (ENOSPC, "No space left"),
        (OSError("3072 requested and 0 written"), "3072 requested"),  # NumPy's, on a full disk
        (KeyboardInterrupt(), None),
    ],
    ids=["ENOSPC", "NumPy's OSError", "KeyboardInterrupt"],
)
@pytest.mark.parametrize("step", ["numpy.savez", "numpy.save", "json.dumps", "os.rename"])
def test_a_preparation_that_dies_leaves_nothing_behind(official, monkeypatch, step, error, reason):
    def die(*args, **options):
        raise error

    before = set(tree())
    with monkeypatch.context() as patch:
        patch.setattr(step, die)
        if reason:
            refused(lambda: dataset.main(["--data", "set", "--raw", "raw"]), "set", reason)
        else:
            with pytest.raises(KeyboardInterrupt):
                dataset.main(["--data", "set", "--raw", "raw"])
    assert set(tree()) == before
    refused(lambda: load("--data", "set"), "set")


def test_a_killed_preparation_is_not_taken_for_a_whole_set(official, monkeypatch):
    """Killed outright it cannot clean up; what it leaves must not be in the set's place."""

    def die(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **options: None)
        patch.setattr("os.rename", die)
        with pytest.raises(KeyboardInterrupt):
            dataset.main(["--data", "set", "--raw", "raw"])
    assert not Path("set").exists()
    assert len(os.listdir()) == 2  # raw, and what was half-made
    refused(lambda: load("--data", "set"), "--data set")
    dataset.main(["--data", "set", "--raw", "raw"])
    sets = [official.cifar10.sets[train] for train in (True, False)]
    check_prepared(Path("set"), sets, (18, 2, 10, 18))


def test_two_preparations_at_once_give_one_whole_set(official, monkeypatch):
    """The other one comes first, just before this one would put its set into place."""
    dataset.main(["--data", "first", "--raw", "raw"])
    rename = os.rename

    def late(source, target):
        shutil.copytree("first", target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", late)
        data = dataset.main(["--data", "set", "--raw", "raw"])
    assert sum(len(images) for images in data.train.values()) == 180
    assert sorted(os.listdir()) == ["first", "raw", "set"]


def test_a_folder_with_other_content_is_left_alone(official):
    Path("set").mkdir()
    Path("set/thesis.tex").write_text("all of it")
    Path("file").write_text("a file")
    before = tree()
    refused(lambda: dataset.main(["--data", "set", "--raw", "raw"]), "--data set", "not empty")
    refused(lambda: dataset.main(["--data", "file", "--raw", "raw"]), "--data file")
    assert tree() == before
    assert not official.cifar10.calls


@pytest.mark.parametrize("call", [load, lambda: dataset.main([])], ids=["load", "main"])
def test_without_network_the_user_is_told_which_file_to_put_where(official, call):
    line = refused(call, "cifar-10-python.tar.gz", "cifar-10-batches-py", "data/raw", "--raw")
    assert "no network" in line
    assert not Path("data/cifar10").exists()
    assert not [path for path in Path(".").rglob("*") if path.name.startswith(".")]


def test_without_network_for_the_pool_the_user_is_told_too(official):
    Path("data/raw/cifar-10-batches-py").mkdir(parents=True)
    refused(load, "cifar-100-python.tar.gz", "data/raw")
    assert os.listdir("data") == ["raw"]


def test_a_damaged_archive_is_refused_and_nothing_is_downloaded(tmp_path, monkeypatch, downloads):
    """With torchvision's own class: --raw is there so that nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    Path("raw").mkdir()
    Path("raw/cifar-10-python.tar.gz").write_bytes(b"cut short")
    before = tree()
    call = ["--data", "set", "--raw", "raw"]
    refused(lambda: dataset.main(call), "--raw raw", "cifar-10-python.tar.gz")
    assert not downloads
    assert tree() == before


def test_a_damaged_batch_file_is_refused(tmp_path, monkeypatch, downloads):
    """With torchvision's own class, which knows the files' checksums."""
    monkeypatch.chdir(tmp_path)
    Path("raw/cifar-10-batches-py").mkdir(parents=True)
    for name in ("data_batch_1", "batches.meta"):
        Path("raw/cifar-10-batches-py", name).write_bytes(pickle.dumps({}))
    before = tree()
    call = ["--data", "set", "--raw", "raw"]
    refused(lambda: dataset.main(call), "--raw raw", "cifar-10-batches-py")
    assert not downloads
    assert tree() == before


@pytest.mark.skipif(not RAW, reason="LIFELONG_TICKETS_RAW names no folder of the official files")
@pytest.mark.parametrize(
    "per_class, counts", [(None, (4500, 500, 1000, 100)), (300, (270, 30, 300, 100))]
)
def test_the_official_files_are_prepared_whole(tmp_path, capsys, per_class, counts):
    raw, folder = Path(RAW).resolve(), tmp_path / "set"
    pool = raw / "cifar100_pool.npy"
    argv = ["--raw", str(raw), "--data", str(folder)]
    argv += ["--unlabeled", str(pool)] if pool.exists() else []
    data = dataset.main(argv + (["--per_class", str(per_class)] if per_class else []))
    train, test = (prepare.CIFAR10(raw, train=train) for train in (True, False))
    parts, stored_pool = check_prepared(folder, (train, test), counts)
    assert [sum(map(len, parts[part].values())) for part in FILES] == [10 * n for n in counts]
    if not per_class:
        for c in range(10):
            assert bag(parts["train"][c], parts["val"][c]) == bag(of_class(train, c))
            assert bag(parts["test"][c]) == bag(of_class(test, c))
    assert stored_pool.shape == (50000, 32, 32, 3)
    assert data.order == CIFAR10_ORDER
    assert [data.names[c] for c in data.order] == CIFAR10_IN_ORDER
    check_table(capsys.readouterr().out, data, 50000)
    shutil.rmtree(folder)  # it is large


# ------------------------------------------------------------------------------ published files


def numpy1_pickle(content, protocol):
    """Pickle `content` as NumPy 1 did, when its functions lived in numpy.core."""
    file = io.BytesIO()
    pickler = pickle._Pickler(file, protocol)
    pickler.framer.start_framing = lambda: None  # a frame's length would no longer be right
    pickler.dump(content)
    pickled = file.getvalue()
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    pickled = pickled.replace(b"c" + new + b"\n", b"c" + old + b"\n")
    return pickled.replace(b"\x8c%c" % len(new) + new, b"\x8c%c" % len(old) + old)


def python2_pickle(content, protocol=2):
    """Pickle a dict of uint8 [n<256,H,W,3] as Python 2 did: pixels as a string that is no text."""
    pickled = b"\x80\x02}"
    for key, array in content.items():
        key = b"U%c%s" % (len(key), key.encode()) if isinstance(key, str) else b"K%c" % key
        shape = b"(" + b"".join(b"K%c" % n for n in array.shape) + b"t"
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        dtype += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        pixels = b"T" + struct.pack("<i", array.size) + array.tobytes()
        pickled += key + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        pickled += b"U\x01b\x87R(K\x01" + shape + dtype + b"\x89" + pixels + b"tbs"
    return pickled + b"."


def published(pickled=pickle.dumps, protocol=4):
    """The five published files in published/; returns what they hold."""
    Path("published").mkdir()
    content = {
        part: {c: random_images(4 + i + c % 3, [i, c]) for c in range(10)}
        for i, part in enumerate(FILES)
    }
    for part in FILES:
        path = Path(f"published/cifar10_{part}.pkl")
        path.write_bytes(pickled(content[part], protocol))
    content["pool"] = random_images(9, 5)
    pool = {"data": content["pool"], "label": np.zeros(9, dtype=np.uint8)}
    Path("published/cifar10_80m_150k.pkl").write_bytes(pickled(pool, protocol))
    return content


@pytest.mark.parametrize(
    "pickled, protocol",
    [(pickle.dumps, 2), (pickle.dumps, 4), (numpy1_pickle, 2), (numpy1_pickle, 4)]
    + [(python2_pickle, 2)],
)
def test_the_published_pickles_are_read_as_they_are(tmp_path, monkeypatch, pickled, protocol):
    monkeypatch.chdir(tmp_path)
    content = published(pickled, protocol)
    before = tree()
    data = load("--data", "published")
    for part, file in zip(PARTS, FILES):
        found = getattr(data, part)
        assert all(np.array_equal(found[c].numpy(), content[file][c]) for c in range(10))
    assert np.array_equal(data.pool.numpy(), content["pool"])
    assert data.order == CIFAR10_ORDER
    assert tree() == before


def test_the_script_shows_published_pickles_and_prepares_nothing(official, capsys):
    content = published()
    before = tree()
    data = dataset.main(["--data", "published"])
    check_table(capsys.readouterr().out, data, 9)
    assert len(data.train[9]) == len(content["train"][9])
    after = tree()
    assert set(after) - set(before) == {"published/preview.png"}
    assert all(after[path] == before[path] for path in before if path != "published")


@pytest.mark.parametrize("file", [*FILES, "80m_150k"])
def test_a_missing_published_file_is_refused(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    published()
    Path(f"published/cifar10_{file}.pkl").unlink()
    before = tree()
    refused(lambda: load("--data", "published"), "published", file if file != "train" else "pickle")
    assert tree() == before


def calling(module, function, argument):
    """A pickle that calls module.function(argument)."""
    text = struct.pack("<i", len(argument)) + argument.encode()
    spelled = b"".join(b"\x8c%c%s" % (len(w), w.encode()) for w in (module, function))
    return b"\x80\x04" + spelled + b"\x93" + b"X" + text + b"\x85R."


@pytest.mark.parametrize("file", [*FILES, "80m_150k"])
@pytest.mark.parametrize("module", ["os", "posix", "os\nsystem"])
def test_a_published_file_that_names_a_command_is_refused(tmp_path, monkeypatch, file, module):
    monkeypatch.chdir(tmp_path)
    published()
    hostile = calling(module, "system", "touch done")
    Path(f"published/cifar10_{file}.pkl").write_bytes(hostile)
    before = tree()
    refused(lambda: load("--data", "published"), f"cifar10_{file}.pkl")
    assert tree() == before


def test_the_command_of_the_hostile_pickle_would_run(tmp_path, monkeypatch):
    """Otherwise the test above could not fail."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(calling("os", "system", "touch done"))
    assert Path("done").exists()


PART = {c: random_images(3, c) for c in range(10)}
BAD_PARTS = {
    "a class missing": {c: PART[c] for c in range(9)},
    "float images": PART | {3: PART[3].astype(np.float32)},
    "int64 images": PART | {3: PART[3].astype(np.int64)},
    "channels first": PART | {3: PART[3].transpose(0, 3, 1, 2)},
    "grey images": PART | {3: PART[3][..., 0]},
    "other size": PART | {3: random_images(3, 3, side=16)},
    "flat": PART | {3: PART[3].reshape(3, -1)},
    "a class empty": PART | {3: PART[3][:0]},
    "a class that is a list": PART | {3: [[1, 2], [3]]},
    "a class that is None": PART | {3: None},
    "a list": [PART[c] for c in range(10)],
    "an array": PART[0],
}


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("content", BAD_PARTS.values(), ids=BAD_PARTS)
def test_a_published_part_that_does_not_fit_is_refused(tmp_path, monkeypatch, part, content):
    monkeypatch.chdir(tmp_path)
    published()
    Path(f"published/cifar10_{part}.pkl").write_bytes(pickle.dumps(content))
    before = tree()
    refused(lambda: load("--data", "published"), "exemplars" if part == "save_100" else part)
    assert tree() == before


POOL = random_images(9, 5)
BAD_POOLS = {
    "no data": {"label": np.zeros(9)},
    "an array": POOL,
    "float images": {"data": POOL / 255},
    "flat": {"data": POOL.reshape(9, -1)},
    "other size": {"data": random_images(9, 5, side=16)},
    "ragged": {"data": [[1, 2], [3]]},
    "empty": {"data": POOL[:0]},
}


@pytest.mark.parametrize("content", BAD_POOLS.values(), ids=BAD_POOLS)
def test_a_published_pool_that_does_not_fit_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    published()
    Path("published/cifar10_80m_150k.pkl").write_bytes(pickle.dumps(content))
    before = tree()
    refused(lambda: load("--data", "published"), "published")
    assert tree() == before


def test_a_published_set_that_is_channels_first_throughout_is_refused(tmp_path, monkeypatch):
    """Pool and parts agree with each other, but not with [n,H,W,3]."""
    monkeypatch.chdir(tmp_path)
    content = published()
    for part in FILES:
        turned = {c: images.transpose(0, 3, 1, 2) for c, images in content[part].items()}
        Path(f"published/cifar10_{part}.pkl").write_bytes(pickle.dumps(turned))
    turned = {"data": content["pool"].transpose(0, 3, 1, 2)}
    Path("published/cifar10_80m_150k.pkl").write_bytes(pickle.dumps(turned))
    refused(lambda: load("--data", "published"), "published", "[n,H,W,3]")


@pytest.mark.parametrize("file", ["train", "80m_150k"])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-99], lambda b: b"text\n" + b])
def test_a_damaged_published_file_is_refused(tmp_path, monkeypatch, file, damage):
    monkeypatch.chdir(tmp_path)
    published()
    path = Path(f"published/cifar10_{file}.pkl")
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: load("--data", "published"), path.name)


# ------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    """A prepared set, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("cifar-10-batches-py", "cifar-100-python"):
        (folder / "raw" / name).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, (10, 1))
        prepare.prepare("cifar10", folder / "set", folder / "raw")
    return folder / "set"


@pytest.fixture
def whole(whole_set, official):
    """The same beside raw/: set/, and the folders empty/, no_files/ and file"""
    shutil.copytree(whole_set, "set")
    Path("empty").mkdir()
    Path("no_files").mkdir()
    Path("file").write_text("no folder")


def cut(name):
    """A damage: the file ends halfway."""

    def damage():
        path = Path("set", name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def flip(name):
    """A damage: one byte in the middle is another."""

    def damage():
        content = bytearray(Path("set", name).read_bytes())
        content[len(content) // 2] ^= 255
        Path("set", name).write_bytes(content)

    return damage


def put(name, content):
    """A damage: other bytes in a file's place."""
    return lambda: Path("set", name).write_bytes(content)


def put_arrays(part, arrays):
    """A damage: other arrays in a part's place."""
    by_name = {str(c): array for c, array in arrays.items()}
    return lambda: np.savez(f"set/cifar10_{part}.npz", **by_name)


def put_pool(pool):
    return lambda: np.save("set/cifar10_pool.npy", pool)


def meta(**changes):
    """A damage: changes of meta.json, None to leave a key out."""

    def damage():
        content = json.loads(Path("set/meta.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        Path("set/meta.json").write_text(json.dumps(content))

    return damage


SMALL = {c: random_images(1, c) for c in range(10)}
DAMAGES = {
    "another data set": meta(dataset="cifar100"),
    "train cut": cut("cifar10_train.npz"),
    "train damaged": flip("cifar10_train.npz"),
    "val cut": cut("cifar10_val.npz"),
    "exemplars empty": put("cifar10_save_100.npz", b""),
    "test is text": put("cifar10_test.npz", b"text"),
    "train missing": lambda: Path("set/cifar10_train.npz").unlink(),
    "exemplars missing": lambda: Path("set/cifar10_save_100.npz").unlink(),
    "pool missing": lambda: Path("set/cifar10_pool.npy").unlink(),
    "pool cut": cut("cifar10_pool.npy"),
    "pool empty": put_pool(np.zeros((0, 32, 32, 3), np.uint8)),
    "pool of floats": put_pool(np.zeros((4, 32, 32, 3))),
    "pool of another size": put_pool(np.zeros((4, 16, 16, 3), np.uint8)),
    "pool of objects": put_pool(np.array([None])),
    "a class missing": put_arrays("val", {c: SMALL[c] for c in range(9)}),
    "a class empty": put_arrays("val", SMALL | {3: SMALL[3][:0]}),
    "a class of floats": put_arrays("val", SMALL | {3: SMALL[3] / 255}),
    "a class of another size": put_arrays("val", SMALL | {3: random_images(1, 3, side=16)}),
    "a class of objects": put_arrays("val", SMALL | {3: np.array([None])}),
    "a class that is a word": put_arrays("val", SMALL | {"cat": SMALL[3]}),
    "meta cut": cut("meta.json"),
    "meta empty": put("meta.json", b""),
    "meta not text": put("meta.json", b"\xff\xfe\x00"),
    "meta a list": put("meta.json", b"[]"),
    "meta without dataset": meta(dataset=None),
    "meta without names": meta(names=None),
    "meta with a list of names": meta(names=["cat"]),
    "meta with words for classes": meta(names={"cat": "cat"}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_set_is_refused_and_left_as_it_is(whole, damage):
    damage()
    before = tree()
    for call in (load, lambda *argv: dataset.main(argv)):
        refused(lambda call=call: call("--data", "set"), "set")
    assert tree() == before


def archive():
    file = io.BytesIO()
    np.savez(file, np.zeros((4, 32, 32, 3), np.uint8))
    return file.getvalue()


def array(*args, **options):
    file = io.BytesIO()
    np.save(file, np.zeros(*args, **options))
    return file.getvalue()


def objects():
    file = io.BytesIO()
    np.save(file, np.array([None]), allow_pickle=True)
    return file.getvalue()


BAD_POOL_FILES = {
    "float": array((4, 32, 32, 3)),
    "grey": array((4, 32, 32), np.uint8),
    "channels first": array((4, 3, 32, 32), np.uint8),
    "no image": array((0, 32, 32, 3), np.uint8),
    "objects": objects(),
    "archive": archive(),
    "cut archive": archive()[:900],
    "cut": array((4, 32, 32, 3), np.uint8)[:900],
    "nothing": b"",
    "text": b"no array\n",
    # NumPy's word on it has several lines
    "long header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 20000) + b" " * 20000,
}


@pytest.mark.parametrize("content", BAD_POOL_FILES.values(), ids=BAD_POOL_FILES)
def test_a_bad_file_of_unlabeled_images_is_refused(official, content):
    Path("pool.npy").write_bytes(content)
    before = tree()
    call = ["--data", "new", "--raw", "raw", "--unlabeled", "pool.npy"]
    refused(lambda: dataset.main(call), "pool.npy")
    assert tree() == before


BAD_FLAGS = [
    # what prepares: dataset.py
    ("main", "--dataset mnist", "--dataset mnist"),
    ("main", "--dataset digits --data set", "--data set"),
    ("main", "--data new --raw nowhere", "--raw nowhere"),
    ("main", "--data new --raw file", "--raw file"),
    ("main", "--data new --raw no_files", "--raw no_files"),
    ("main", "--data new --raw raw --unlabeled nowhere.npy", "nowhere.npy"),
    ("main", "--data new --raw raw --unlabeled empty", "empty"),
    ("main", "--data file/new --raw raw", "--data file/new"),
    ("main", "--data new --raw raw --per_class 3", "--per_class"),
    ("main", "--data new --raw raw --per_class x", "--per_class"),
    ("main", "--data new --raw raw --per_class 20.5", "--per_class"),
    ("main", "--data new --raw raw --seed -1", "--seed"),
    ("main", "--data new --raw raw --seed x", "--seed"),
    ("main", "--data new --raw raw --colour red", "--colour"),
    ("main", "--data new --raw", "--raw"),
    # what trains: complete, then load
    ("load", "--dataset mnist", "--dataset mnist"),
    ("load", "--dataset digits --data set", "--data set"),
    ("load", "--data nowhere", "--data nowhere"),
    ("load", "--data empty", "--data empty"),
    ("load", "--data file", "--data file"),
    ("load", "--data set --classifiers 6 --classes_per_classifier 2", "--classifiers 6"),
    ("load", "--data set --classifiers 11 --classes_per_classifier 1", "--classifiers 11"),
    ("load", "--data set --classes_per_classifier 3", "--classes_per_classifier 3"),
    ("load", "--data set --classifiers 0", "--classifiers"),
    ("load", "--data set --batch_size 19", "--batch_size 19"),
    ("load", "--data set --batch_size 7 --classifiers 2", "--batch_size 7"),
]


@pytest.mark.parametrize("script, argv, word", BAD_FLAGS)
def test_bad_flags_are_refused_and_nothing_is_written(whole, script, argv, word):
    before = tree()
    call = load if script == "load" else lambda *argv: dataset.main(argv)
    refused(lambda: call(*argv.split()), word)
    assert tree() == before


@pytest.mark.parametrize(
    "argv",
    ["", "--batch_size 20", "--batch_size 8 --classifiers 2", "--batch_size 1 --classifiers 1"],
)
def test_flags_at_their_limits_are_taken(whole, argv):
    assert load("--data", "set", *argv.split()).source == "set"


def test_state_is_one_of_the_tasks():
    args = utils.make_parser("words", "run").parse_args([])
    args.state = 6
    dataset.complete(args)
    refused(lambda: utils.settle(args, "run"), "--state 6")
    args.state = 5
    utils.settle(args, "run")


def test_defaults_hang_on_the_dataset():
    args = utils.make_parser("words", "run").parse_args(["--dataset", "digits"])
    dataset.complete(args)
    utils.settle(args, "TD_{}")
    assert (args.classifiers, args.classes_per_classifier) == (5, 2)
    assert args.save_dir == "TD_digits"
    assert Path(args.save_data_path) == Path("TD_digits/data")


def test_a_place_for_the_picture_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").write_text("no folder")
    before = tree()
    refused(lambda: dataset.main(["--dataset", "digits"]), "data/digits")
    assert tree() == before


# ------------------------------------------------------------------------------ what it shows


def check_table(printed, data, pool):
    """A row for each class in task order: task, class, its name, the counts of the four parts."""
    rows = [line.split() for line in printed.splitlines()]
    start = next(i for i, row in enumerate(rows) if set(PARTS) <= set(row))
    for place, (row, c) in enumerate(zip(rows[start + 1 :], data.order)):
        counts = [str(len(getattr(data, part)[c])) for part in PARTS]
        name = [data.names[c]] if c in data.names else []
        assert row == [str(place // data.classes_per_classifier + 1), str(c), *name, *counts]
    totals = [str(sum(map(len, getattr(data, part).values()))) for part in PARTS]
    assert rows[start + 1 + len(data.order)][-4:] == totals
    assert str(pool) in rows[start + 2 + len(data.order)]


def runs(flags):
    """First and last+1 place of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags, [0]])))
    return list(zip(edges[::2], edges[1::2]))


def check_picture(path, data):
    """A row of pictures for each task, its classes beside each other, as bright as they are."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(float)
    dark = (pixels < 250).any(-1)
    rows = runs(dark.mean(1) > 0.5)
    assert len(rows) == data.classifiers
    c = data.classes_per_classifier
    for task, (top, bottom) in enumerate(rows):
        assert (bottom - top) % data.pool.shape[1] == 0
        columns = [run for run in runs(dark[top:bottom].any(0)) if np.diff(run) > 20]  # no text
        assert len(columns) == c
        for (left, right), k in zip(columns, data.order[task * c :]):
            tiles = (right - left) * data.pool.shape[1] // (bottom - top) // data.pool.shape[2]
            shown = data.train[k][:tiles].float().mean()
            assert tiles == min(8, len(data.train[k]))
            assert pixels[top:bottom, left:right].mean() == pytest.approx(float(shown), abs=0.5)


def test_the_picture_has_a_row_for_each_task(tmp_path, data):
    """Six classes of different brightness."""
    dataset.preview(data, tmp_path / "deep" / "preview.png")
    check_picture(tmp_path / "deep" / "preview.png", data)


def test_table_and_picture_of_a_prepared_set(official, capsys):
    data = dataset.main(["--data", "set", "--raw", "raw"])
    check_table(capsys.readouterr().out, data, 40)
    check_picture("set/preview.png", data)


def test_the_table_counts_uneven_classes(data):
    data.names = {c: f"class{c}" for c in range(6)}
    check_table(dataset.table(data), data, 60)


# ------------------------------------------------------------------------------ as a command


def command(folder, *argv):
    script = [sys.executable, str(REPOSITORY / "dataset.py"), *argv]
    return subprocess.run(script, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_command_shows_the_digits(tmp_path, digits):
    done = command(tmp_path, "--dataset", "digits")
    assert (done.returncode, done.stderr) == (0, "")
    check_table(done.stdout, digits, 500)
    check_picture(tmp_path / "data" / "digits" / "preview.png", digits)


def test_the_command_refuses_in_one_line(tmp_path):
    done = command(tmp_path, "--dataset", "mnist")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dataset.py: --dataset mnist")
    assert not os.listdir(tmp_path)
