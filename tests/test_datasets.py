"""datasets/: preparing CIFAR, Tiny-ImageNet and folders; pools; prepared and published files.

All on small files in their real formats, which the tests make themselves.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sets import (
    FILES,
    PARTS,
    bag,
    check_error,
    check_rejected,
    check_table,
    encode,
    jpeg,
    load,
    pixels,
    random_images,
    stored,
    tree,
    write_folder,
    write_published,
    write_tree,
    write_zip,
)

import dataset
from datasets.images import decode, read_image
from datasets.prepare import split

CIFAR10_ORDER = [9, 8, 7, 1, 5, 0, 3, 4, 6, 2]
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10_NAMES += ["dog", "frog", "horse", "ship", "truck"]
CIFAR10_IN_ORDER = ["truck", "ship", "horse", "automobile", "dog"]
CIFAR10_IN_ORDER += ["airplane", "cat", "deer", "frog", "bird"]
ARCHIVE = b"an archive"
RAW = os.environ.get("LIFELONG_TICKETS_RAW")
CIFAR = ["--data", "set", "--raw", "raw"]
WNIDS = ["n03", "n01", "n04", "n02"]
TINY = ["--dataset", "tiny_imagenet", "--data", "set", "--classifiers", "2"]
FOLDER = ["--dataset", "folder", "--data", "set"]
MINE = [*FOLDER, "--source", "mine"]
RAW_ZIP = [*TINY, "--raw", "tiny.zip"]
SCRIPTS = pytest.mark.parametrize(
    "script", [dataset.main, lambda argv: load(*argv)], ids=["dataset.py", "training"]
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def downloads(monkeypatch):
    """No test may reach the network: the list of the addresses that one asked for."""
    asked = []

    def urlopen(request, *args, **options):
        asked.append(getattr(request, "full_url", request))
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return asked


def fake(name, base_folder, filename, classes, counts, seed):
    """Stands in for a torchvision class, with counts (train, test) of random images per class.

    It finds its files if base_folder exists, or the archive if it may unpack it (which torchvision
    calls download too); there is no network.
    """
    rng, sets = np.random.default_rng(seed), {}
    for train, count in zip((True, False), counts):
        targets = rng.permutation(np.repeat(np.arange(len(classes)), count)).tolist()
        data = random_images(len(targets), [seed, train])
        sets[train] = SimpleNamespace(data=data, targets=targets, classes=list(classes))

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


def install(patch, counts):
    """Put fakes in place of torchvision's classes."""
    folder, file = "cifar-10-batches-py", "cifar-10-python.tar.gz"
    cifar10 = fake("CIFAR10", folder, file, CIFAR10_NAMES, counts, 1)
    folder, file = "cifar-100-python", "cifar-100-python.tar.gz"
    cifar100 = fake("CIFAR100", folder, file, ["apple", "aquarium"], (20, 3), 2)
    patch.setattr("torchvision.datasets.CIFAR10", cifar10)
    patch.setattr("torchvision.datasets.CIFAR100", cifar100)
    return SimpleNamespace(cifar10=cifar10, cifar100=cifar100)


@pytest.fixture
def official(monkeypatch, tmp_path):
    """Both fakes, 20 training and 10 test images per class, their files in raw/ of the cwd."""
    for folder in ("cifar-10-batches-py", "cifar-100-python"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
    return install(monkeypatch, (20, 10))


def of_class(split, c):
    return split.data[np.array(split.targets) == c]


# ------------------------------------------------------------------------------ CIFAR


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
    dataset.main(CIFAR)
    sets = [official.cifar10.sets[train] for train in (True, False)]
    parts, pool = check_prepared(Path("set"), sets, (18, 2, 10, 18))
    for c in range(10):
        assert bag(parts["train"][c], parts["val"][c]) == bag(of_class(sets[0], c))
        assert np.array_equal(parts["test"][c], of_class(sets[1], c))
    assert np.array_equal(pool, official.cifar100.sets[True].data)


def test_a_prepared_set_is_plain_files_that_all_may_read(official):
    dataset.main(CIFAR)
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
    dataset.main(CIFAR)
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
    dataset.main(CIFAR)
    data = load("--data", "set", "--classifiers", "2", "--classes_per_classifier", "3")
    assert data.order == CIFAR10_ORDER[:6]
    assert list(data.train) == CIFAR10_ORDER[:6]
    assert (data.classifiers, data.classes_per_classifier) == (2, 3)


def test_exemplars_are_100_where_train_has_more(monkeypatch, official):
    sets = install(monkeypatch, (120, 1)).cifar10.sets
    dataset.main(CIFAR)
    parts, _ = check_prepared(Path("set"), (sets[True], sets[False]), (108, 12, 1, 100))
    # drawn at random, not the first of train
    assert bag(parts["save_100"][0]) != bag(parts["train"][0][:100])
    assert set(bag(parts["save_100"][0]).values()) == {1}


def test_the_split_is_drawn_at_random_for_each_class(monkeypatch, official):
    sets = install(monkeypatch, (120, 1)).cifar10.sets
    dataset.main(CIFAR)
    parts, _ = stored(Path("set"))
    drawn = set()
    for c in range(10):
        held_out = bag(parts["val"][c])
        own = of_class(sets[True], c)
        drawn.add(tuple(i for i, image in enumerate(own) if image.tobytes() in held_out))
    assert len(drawn) == 10
    assert not drawn & {tuple(range(12)), tuple(range(108, 120)), tuple(range(0, 120, 10))}


def test_split_draws_by_seed_and_class():
    """The digits are split by it too, so it must not depend on an earlier shuffle."""
    images = random_images(60, 1)
    held_out, exemplars = [], []
    for c, seed in ((0, 0), (1, 0), (0, 1)):
        parts = {part: {} for part in PARTS}
        split(images, c, parts, seed, exemplars=20)
        assert bag(parts["train"][c], parts["val"][c]) == bag(images)
        held_out.append(bag(parts["val"][c]))
        exemplars.append(bag(parts["exemplars"][c]))
    for drawn in (held_out, exemplars):
        assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert bag(images[:6]) not in held_out
    assert bag(images[-6:]) not in held_out


def test_per_class_makes_a_smaller_set(official):
    dataset.main([*CIFAR, "--per_class", "10"])
    sets = [official.cifar10.sets[train] for train in (True, False)]
    parts, pool = check_prepared(Path("set"), sets, (9, 1, 10, 9))
    first = bag(*(of_class(sets[0], c)[:10] for c in range(10)))
    assert bag(*parts["train"].values(), *parts["val"].values()) != first  # taken at random
    assert len(pool) == 40
    assert json.loads(Path("set/meta.json").read_text())["per_class"] == 10


def test_per_class_limits_test_images_too(official):
    official.cifar10.sets[False] = official.cifar10.sets[True]
    dataset.main([*CIFAR, "--per_class", "15"])
    sets = (official.cifar10.sets[True],) * 2
    check_prepared(Path("set"), sets, (15 - round(1.5), round(1.5), 15, 15 - round(1.5)))


def test_the_pool_may_come_from_a_file(official):
    pool = random_images(7, 9)
    np.save("pool.npy", pool)
    shutil.rmtree("raw/cifar-100-python")  # not needed then
    dataset.main([*CIFAR, "--unlabeled", "pool.npy"])
    assert np.array_equal(stored(Path("set"))[1], pool)
    assert json.loads(Path("set/meta.json").read_text())["pool"] == "pool.npy"
    assert not official.cifar100.calls


def test_the_split_depends_on_the_seed_alone(official):
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


def test_a_second_call_does_not_prepare_it_again(official):
    dataset.main(CIFAR)
    before, asked = tree("set"), len(official.cifar10.calls)
    dataset.main(CIFAR)
    after = tree("set")
    assert set(after) == set(before)
    assert all(after[path] == before[path] for path in before if path != "set/preview.png")
    assert len(official.cifar10.calls) == asked


def test_an_empty_folder_is_filled(official):
    Path("set").mkdir()
    dataset.main(CIFAR)
    assert load("--data", "set").order == CIFAR10_ORDER


def test_without_raw_the_official_files_go_beside_the_set(official):
    Path("data").mkdir()
    Path("raw").rename("data/raw")
    assert load().source == "data/cifar10"
    calls = official.cifar10.calls + official.cifar100.calls
    assert set(calls) == {(Path("data/raw"), True)}


def test_with_raw_nothing_is_downloaded(official):
    dataset.main(CIFAR)
    calls = official.cifar10.calls + official.cifar100.calls
    assert set(calls) == {(Path("raw"), False)}


def test_raw_may_hold_the_archives_as_they_were_published(official):
    shutil.rmtree("raw")
    Path("raw").mkdir()
    for name in ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz"):
        Path("raw", name).write_bytes(ARCHIVE)
    dataset.main(CIFAR)
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
def test_a_failed_preparation_leaves_nothing_behind(official, monkeypatch, step, error, reason):
    def die(*args, **options):
        raise error

    before = set(tree())
    with monkeypatch.context() as patch:
        patch.setattr(step, die)
        if reason:
            check_error(lambda: dataset.main(CIFAR), "set", reason)
        else:
            with pytest.raises(KeyboardInterrupt):
                dataset.main(CIFAR)
    assert set(tree()) == before
    check_error(lambda: load("--data", "set"), "set")


def test_a_killed_preparation_leaves_no_set(official, monkeypatch):
    """Without a chance to clean up, what it leaves must not look like a set."""

    def die(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **options: None)
        patch.setattr("os.rename", die)
        with pytest.raises(KeyboardInterrupt):
            dataset.main(CIFAR)
    assert not Path("set").exists()
    assert len(os.listdir()) == 2  # raw, and what was half-made
    check_error(lambda: load("--data", "set"), "--data set")
    dataset.main(CIFAR)
    sets = [official.cifar10.sets[train] for train in (True, False)]
    check_prepared(Path("set"), sets, (18, 2, 10, 18))


def test_two_preparations_at_once_give_one_set(official, monkeypatch):
    """The other one is first, just before this one would rename its folder."""
    dataset.main(["--data", "first", "--raw", "raw"])
    rename = os.rename

    def late(source, target):
        shutil.copytree("first", target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", late)
        data = dataset.main(CIFAR)
    assert sum(len(images) for images in data.train.values()) == 180
    assert sorted(os.listdir()) == ["first", "raw", "set"]


def test_a_folder_with_other_content_is_left_alone(official):
    Path("set").mkdir()
    Path("set/thesis.tex").write_text("all of it")
    Path("file").write_text("a file")
    check_rejected(lambda: dataset.main(CIFAR), "--data set", "not empty")
    check_error(lambda: dataset.main(["--data", "file", "--raw", "raw"]), "--data file")
    assert not official.cifar10.calls


@pytest.mark.parametrize("call", [load, lambda: dataset.main([])], ids=["load", "main"])
def test_without_network_the_error_names_the_file_and_folder(official, call):
    line = check_error(call, "cifar-10-python.tar.gz", "cifar-10-batches-py", "data/raw", "--raw")
    assert "no network" in line
    assert not Path("data/cifar10").exists()
    assert not [path for path in Path(".").rglob("*") if path.name.startswith(".")]


def test_without_network_for_the_pool(official):
    Path("data/raw/cifar-10-batches-py").mkdir(parents=True)
    check_error(load, "cifar-100-python.tar.gz", "data/raw")
    assert os.listdir("data") == ["raw"]


def test_a_damaged_archive_is_not_downloaded_again(downloads):
    """With torchvision's own class: --raw is there so that nothing is downloaded."""
    Path("raw").mkdir()
    Path("raw/cifar-10-python.tar.gz").write_bytes(b"cut short")
    before = tree()
    check_error(lambda: dataset.main(CIFAR), "--raw raw", "cifar-10-python.tar.gz")
    assert not downloads
    assert tree() == before


def test_a_damaged_batch_file(downloads):
    """With torchvision's own class, which knows the files' checksums."""
    Path("raw/cifar-10-batches-py").mkdir(parents=True)
    for name in ("data_batch_1", "batches.meta"):
        Path("raw/cifar-10-batches-py", name).write_bytes(pickle.dumps({}))
    before = tree()
    check_error(lambda: dataset.main(CIFAR), "--raw raw", "cifar-10-batches-py")
    assert not downloads
    assert tree() == before


@pytest.mark.skipif(not RAW, reason="LIFELONG_TICKETS_RAW names no folder of the official files")
@pytest.mark.parametrize(
    "per_class, counts", [(None, (4500, 500, 1000, 100)), (300, (270, 30, 300, 100))]
)
def test_the_official_files(tmp_path, capsys, per_class, counts):
    import torchvision

    raw, folder = Path(RAW).resolve(), tmp_path / "set"
    pool = raw / "cifar100_pool.npy"
    argv = ["--raw", str(raw), "--data", str(folder)]
    argv += ["--unlabeled", str(pool)] if pool.exists() else []
    data = dataset.main(argv + (["--per_class", str(per_class)] if per_class else []))
    train, test = (torchvision.datasets.CIFAR10(raw, train=train) for train in (True, False))
    parts, stored_pool = check_prepared(folder, (train, test), counts)
    assert [sum(map(len, parts[part].values())) for part in FILES] == [10 * n for n in counts]
    if not per_class:
        for c in range(10):
            assert bag(parts["train"][c], parts["val"][c]) == bag(of_class(train, c))
            assert bag(parts["test"][c]) == bag(of_class(test, c))
    dropped = json.loads((folder / "meta.json").read_text())["dropped"]
    assert dropped["repeated"] == 14 and dropped["equal"] in ([0, 1] if per_class else [1])
    assert stored_pool.shape == (50000 - sum(dropped.values()), 32, 32, 3)
    assert data.order == CIFAR10_ORDER
    assert [data.names[c] for c in data.order] == CIFAR10_IN_ORDER
    check_table(capsys.readouterr().out, data, len(stored_pool))
    shutil.rmtree(folder)  # it is large


def test_cifar100_has_the_training_images_of_cifar10_for_its_pool(official):
    call = ["--dataset", "cifar100", "--data", "set", "--raw", "raw"]
    call += ["--classifiers", "1", "--classes_per_classifier", "2"]
    data = dataset.main(call)
    assert bag(data.pool) == bag(official.cifar10.sets[True].data)
    assert bag(*data.test.values()) == bag(official.cifar100.sets[False].data)
    assert data.mean.flatten().tolist() == pytest.approx([0.5071, 0.4866, 0.4409])
    assert json.loads(Path("set/meta.json").read_text())["pool"] == "CIFAR-10 training images"


def test_meta_json_may_lack_the_split_seed(official):
    dataset.main(CIFAR)
    path = Path("set/meta.json")
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({k: meta[k] for k in ("dataset", "names", "pool", "per_class")}))
    assert len(load("--data", "set").pool) == 40
    assert len(dataset.main(["--data", "set"]).pool) == 40


# ------------------------------------------------------------------------------ Tiny-ImageNet


def tiny_files(per_class=12, tests=3, pool=5):
    """{name: bytes} as in tiny-imagenet-200.zip, of four classes; some JPEGs are grayscale."""
    files = {"wnids.txt": "\n".join(WNIDS).encode() + b"\n"}
    files["words.txt"] = b"n01\tfish, a fish\nn02\tcat\nn03\tfish\nn04\tdog, hound\nn05\tno\n"
    lines = []
    for c, wnid in enumerate(sorted(WNIDS)):
        for i in range(per_class):
            mode = "L" if i % 4 == 0 else "RGB"
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg([c, i], mode)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"x_0.JPEG\t0\t0\t63\t63\n"
        for i in range(tests):
            name = f"val_{10 * i + c}.JPEG"
            files[f"val/images/{name}"] = jpeg([c, 100 + i], "L" if i == 1 else "RGB")
            lines.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
    files["val/val_annotations.txt"] = "".join(lines[::-1]).encode()
    for i in range(pool):
        files[f"test/images/test_{i}.JPEG"] = jpeg([9, i])
    return {f"tiny-imagenet-200/{name}": content for name, content in files.items()}


def test_folder_entries_of_an_archive_are_ignored():
    files = tiny_files()
    folders = {f"{parent}/": b"" for name in files for parent in list(Path(name).parents)[:-1]}
    assert "tiny-imagenet-200/train/n01/images/" in folders
    write_zip({f"inner/{name}": content for name, content in (folders | files).items()})
    check_tiny(dataset.main(RAW_ZIP), files)


def check_tiny(data, files):
    """All images are where they belong, as Pillow decodes them."""
    root = "tiny-imagenet-200/"
    lines = files[f"{root}val/val_annotations.txt"].decode().splitlines()
    of = dict(line.split("\t")[:2] for line in lines)
    for c, wnid in enumerate(sorted(WNIDS)):
        own = [f for n, f in files.items() if f"train/{wnid}/images" in n]
        assert bag(data.train[c], data.val[c]) == bag([pixels(f) for f in own])
        own = [files[f"{root}val/images/{name}"] for name, found in of.items() if found == wnid]
        assert bag(data.test[c]) == bag([pixels(f) for f in own])
        assert bag(data.exemplars[c]) <= bag(data.train[c])
        assert (len(data.train[c]), len(data.val[c])) == (11, 1)
    assert bag(data.pool) == bag([pixels(f) for n, f in files.items() if f"{root}test" in n])


@pytest.mark.parametrize("raw", ["tiny.zip", "raw", "raw/tiny-imagenet-200", "with_zip"])
def test_tiny_imagenet_is_read_from_the_archive_or_its_folder(raw):
    files = tiny_files()
    write_zip(files)
    write_tree(files, "raw")
    Path("with_zip").mkdir()
    shutil.copy("tiny.zip", "with_zip/tiny-imagenet-200.zip")
    before = set(tree())
    data = dataset.main([*TINY, "--raw", raw])
    check_tiny(data, files)
    assert (data.classifiers, data.classes_per_classifier, data.pad) == (2, 2, 8)
    assert data.order == np.random.RandomState(1993).permutation(4).tolist()
    # two classes are called fish: those have their ids
    assert data.names == {0: "n01", 1: "cat", 2: "n03", 3: "dog"}
    assert data.mean.flatten().tolist() == pytest.approx([0.4802, 0.4481, 0.3975])
    assert {p.split("/")[0] for p in set(tree()) - before} == {"set"}
    again = load(*TINY)
    check_tiny(again, files)


def test_grayscale_jpegs_are_gray_in_all_channels():
    write_zip(tiny_files())
    data = dataset.main(RAW_ZIP)
    for images in (*data.train.values(), *data.test.values()):
        gray = (images == images[..., :1]).all(-1).all(-1).all(-1)
        assert 0 < int(gray.sum()) < len(images)


def test_several_processes_decode_the_same(monkeypatch):
    write_zip(tiny_files())
    one = dataset.main(RAW_ZIP)
    monkeypatch.setattr("datasets.images.MIN_PARALLEL", 0)
    several = dataset.main([*TINY[:3], "other", *TINY[4:], "--raw", "tiny.zip"])
    assert one.fingerprint() == several.fingerprint()


def without(name):
    return lambda files: files.pop(f"tiny-imagenet-200/{name}")


def instead(name, content):
    return lambda files: files.update({f"tiny-imagenet-200/{name}": content})


BAD_TINY = {
    "no annotations": (without("val/val_annotations.txt"), "val_annotations.txt"),
    "annotations no text": (instead("val/val_annotations.txt", b"\xff\xfe"), "val_annotations"),
    "a test image missing": (without("val/images/val_11.JPEG"), "val/images/val_11.JPEG"),
    "no class has tests": (instead("val/val_annotations.txt", b"\n"), "test image"),
    "a class without images": (instead("wnids.txt", b"n01\nn09\n"), "train/n09/images"),
    "broken": (instead("train/n02/images/n02_3.JPEG", jpeg(1)[:300]), "n02_3.JPEG"),
    "no image": (instead("train/n02/images/n02_3.JPEG", b"text"), "n02_3.JPEG"),
    "nothing": (instead("test/images/test_2.JPEG", b""), "test_2.JPEG"),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage, word", BAD_TINY.values(), ids=BAD_TINY)
def test_errors_name_the_bad_file_in_tiny_imagenet(monkeypatch, damage, word, packed, several):
    if several:
        monkeypatch.setattr("datasets.images.MIN_PARALLEL", 0)
    files = tiny_files()
    damage(files)
    write_zip(files) if packed else write_tree(files)
    raw = "tiny.zip" if packed else "tiny-imagenet-200"
    check_rejected(lambda: dataset.main([*TINY, "--raw", raw]), word, raw)


@pytest.mark.parametrize("content", [b"", b"text", write_zip])
def test_a_raw_file_that_is_not_an_archive(content):
    if callable(content):
        write_zip(tiny_files())
        content = Path("tiny.zip").read_bytes()[:-500]
    Path("tiny.zip").write_bytes(content)
    check_rejected(lambda: dataset.main(RAW_ZIP), "tiny.zip")


def test_an_archive_writes_nowhere():
    """Names that climb out of the folder are looked at as names alone."""
    files = tiny_files()
    files["../../escaped.JPEG"] = jpeg(0)
    write_zip(files)
    dataset.main(RAW_ZIP)
    assert sorted(os.listdir()) == ["set", "tiny.zip"]


def test_a_file_in_an_archive_has_a_size_limit(monkeypatch):
    files = tiny_files()
    name = "tiny-imagenet-200/train/n02/images/n02_3.JPEG"
    files[name] += bytes(2**20)
    write_zip(files)
    monkeypatch.setattr("datasets.archive.MAX_FILE", 2**20)
    check_error(lambda: dataset.main(RAW_ZIP), "n02_3.JPEG", "MiB")


def test_without_network_the_error_says_where_to_put_the_archive(downloads):
    check_error(lambda: load("--dataset", "tiny_imagenet"), "tiny-imagenet-200.zip", "data/raw")
    assert not [path for path in Path(".").rglob("*") if path.is_file()]


def test_more_classes_than_the_set_has(capsys):
    write_zip(tiny_files())
    dataset.main(RAW_ZIP)
    capsys.readouterr()
    assert load(*TINY[:4]).classifiers == 2  # its own tasks: two of two
    assert "4 classes, 2 tasks of 2" in capsys.readouterr().out
    call = [*TINY[:4], "--classifiers", "2", "--classes_per_classifier", "3"]
    check_error(lambda: load(*call), "--classifiers 2", "4 classes")
    assert load(*TINY[:4], "--classifiers", "1", "--classes_per_classifier", "3").order


def test_a_class_needs_ten_training_images():
    """With less than five none would be left for val, and the set could not be read."""
    write_zip(tiny_files(per_class=4))
    check_rejected(lambda: dataset.main(RAW_ZIP), "tiny.zip", "class n01", "10")


def record_process(source, name, side):
    """In place of read_image: leaves a file named after the process that it runs in."""
    (Path(source) / str(os.getpid())).touch()
    time.sleep(0.01)
    return np.full((side, side, 3), int(name), np.uint8)


def test_more_than_one_process_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.images.MIN_PARALLEL", 0)
    monkeypatch.setattr("datasets.images.read_image", record_process)
    found = decode(tmp_path, {"pool": np.arange(128).astype(str)}, 2)["pool"]
    assert found[:, 0, 0, 0].tolist() == [*range(128)]
    processes = {int(path.name) for path in tmp_path.iterdir()}
    assert len(processes) > 1 and os.getpid() not in processes


def test_a_killed_decoder_is_an_error(monkeypatch):
    write_zip(tiny_files())
    monkeypatch.setattr("datasets.images.MIN_PARALLEL", 0)
    monkeypatch.setattr("datasets.images.read_image", die)
    check_rejected(lambda: dataset.main(RAW_ZIP), "tiny.zip", "memory")


def die(*args, **options):
    os._exit(9)


# ------------------------------------------------------------------------------ folders


def palette_with_transparency():
    """A palette PNG, 20x20: the left half is red, the right half transparent."""
    image = Image.new("P", (20, 20), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (10, 0, 20, 20))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=1)
    return file.getvalue()


def gray16():
    """A 16-bit grayscale PNG, half of full brightness."""
    return encode(Image.fromarray(np.full((16, 16), 32768, np.uint16)), "PNG")


def sideways():
    """A JPEG that is stored lying on its side: upright, its upper half is white."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)


def test_a_folder_of_images_becomes_a_set(capsys):
    write_folder(pool=6)
    write_tree(
        {"train/a/notes.txt": b"no image", "train/a/.hidden.png": b"", ".git/x": b""}, "mine"
    )
    data = dataset.main(MINE)
    assert data.names == {0: "a", 1: "b", 2: "c d", 3: "e"}
    assert (data.classifiers, data.classes_per_classifier, data.pad) == (2, 2, 4)
    counts = [[len(getattr(data, part)[c]) for c in range(4)] for part in PARTS]
    assert counts == [[14] * 4, [2] * 4, [2] * 4, [14] * 4]
    assert data.pool.shape == (6, 32, 32, 3)
    assert "4 classes, 2 tasks of 2" in capsys.readouterr().out
    again = load(*FOLDER)
    assert again.fingerprint() == data.fingerprint()
    stored = np.concatenate([np.asarray(images) for images in data.train.values()]) / 255
    assert again.mean.flatten().numpy() == pytest.approx(stored.mean((0, 1, 2)), abs=1e-5)
    assert again.std.flatten().numpy() == pytest.approx(stored.std((0, 1, 2)), abs=1e-5)
    meta = json.loads(Path("set/meta.json").read_text())
    assert (meta["source"], meta["image_size"], meta["dropped"]) == (
        "mine", 32, {"equal": 0, "repeated": 0},
    )  # fmt: skip


@pytest.mark.parametrize("size, pad", [(16, 2), (24, 3), (128, 16)])
def test_images_are_resized_to_the_image_size(size, pad):
    write_folder(pool=1)
    data = dataset.main([*MINE, "--image_size", str(size)])
    assert data.train[0].shape[1:] == data.pool.shape[1:] == (size, size, 3)
    assert data.pad == pad


def test_images_of_the_right_size_are_not_resized():
    files = write_folder()
    data = dataset.main([*MINE, "--image_size", "40"])
    own = [pixels(f) for name, f in files.items() if name.startswith("test/a/")]
    assert bag(data.test[0]) == bag(own)


def decode_one(content, name="x.png", side=16):
    Path(name).write_bytes(content)
    return read_image(".", name, side).astype(int)


def test_transparent_pixels_become_white():
    found = decode_one(palette_with_transparency(), side=20)
    assert (found[:, :10] == [255, 0, 0]).all()
    assert (found[:, 10:] == 255).all()
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert (decode_one(encode(clear, "PNG")) == 255).all()
    assert (decode_one(encode(Image.new("LA", (20, 20), (0, 0)), "PNG")) == 255).all()
    assert (
        decode_one(encode(Image.new("RGB", (20, 20)), "PNG", transparency=(0, 0, 0))) == 255
    ).all()


def test_16_bit_gray_becomes_8_bit():
    assert (decode_one(gray16()) == 128).all()


def test_images_are_turned_upright():
    found = decode_one(sideways(), "x.jpg")
    assert (found[:7] > 240).all()
    assert (found[9:] < 15).all()


def test_the_center_square_is_cut_out():
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    assert (decode_one(encode(image, "PNG")) == [0, 0, 255]).all()
    assert (
        decode_one(encode(image.transpose(Image.Transpose.ROTATE_90), "PNG")) == [0, 0, 255]
    ).all()


def test_large_images_are_averaged_not_sampled():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    found = decode_one(encode(Image.fromarray(stripes), "PNG"))
    assert abs(found - 127.5).max() < 3


@pytest.mark.parametrize(
    "content", [b"", b"text", jpeg(1)[:400], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_the_error_names_a_broken_image(content):
    write_folder()
    Path("mine/train/c d/5.PNG").write_bytes(content)
    check_rejected(lambda: dataset.main(MINE), "mine/train/c d/5.PNG")


def test_images_have_a_pixel_limit(monkeypatch):
    write_folder()
    for most in (1000, 300):  # Pillow warns first, beyond twice as many it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        check_error(lambda: dataset.main(MINE), "mine/", "pixels")
    assert not Path("set").exists()


def test_without_test_images_a_fifth_is_held_out(capsys):
    files = write_folder(train=20, tests=0)
    data = dataset.main(MINE)
    assert "a fifth" in capsys.readouterr().out
    assert [len(data.test[c]) for c in range(4)] == [4] * 4
    assert [len(data.train[c]) + len(data.val[c]) for c in range(4)] == [16] * 4
    assert sum(len(bag(data.test[c], data.train[c], data.val[c])) for c in range(4)) == len(files)
    other = dataset.main([*FOLDER[:3], "other", "--source", "mine", "--seed", "1"])
    assert bag(other.test[0]) != bag(data.test[0])


def removed(name):
    return lambda: shutil.rmtree(f"mine/{name}")


def emptied(name):
    def damage():
        removed(name)()
        write_tree({f"{name}/readme.txt": b"nothing here"}, "mine")

    return damage


BAD_FOLDERS = {
    "empty class": (emptied("train/a"), "", "mine/train/a"),
    "empty test class": (emptied("test/e"), "", "mine/test/e"),
    "class without tests": (removed("test/e"), "", "mine/test/e"),
    "class of tests alone": (removed("train/e"), "--classifiers 1", "'e'"),
    "no train": (removed("train"), "", "mine/train"),
    "few images": (lambda: [os.unlink(f"mine/train/b/{i}.gif") for i in (4, 9, 14)]
                   + [os.unlink(f"mine/train/b/{i}.png") for i in (0, 5, 10, 15)], "", "class b"),
    "nothing": (lambda: shutil.rmtree("mine"), "", "--source mine"),
    "tasks that do not divide": (None, "--classifiers 3", "--classifiers 3"),
    "classes that do not divide": (None, "--classes_per_classifier 3", "--classes_per_classifier"),
    "fewer than all": (None, "--classifiers 1 --classes_per_classifier 2", "4 classes"),
    "more than all": (None, "--classifiers 4 --classes_per_classifier 4", "4 classes"),
    "another size": (None, "--image_size 20", "--image_size"),
    "a large size": (None, "--image_size 136", "--image_size"),
    "no size": (None, "--image_size x", "--image_size"),
}  # fmt: skip


@pytest.mark.parametrize("damage, flags, word", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
@SCRIPTS
def test_errors_in_a_folder_of_images(script, damage, flags, word):
    write_folder()
    if damage:
        damage()
    check_rejected(lambda: script([*MINE, *flags.split()]), word)


def test_given_one_number_the_other_follows():
    write_folder(pool=1)
    data = dataset.main([*MINE, "--classifiers", "4"])
    assert (data.classifiers, data.classes_per_classifier) == (4, 1)
    data = load(*FOLDER, "--classes_per_classifier", "4")
    assert (data.classifiers, data.classes_per_classifier) == (1, 4)


def test_training_prepares_a_folder():
    write_folder(pool=1)
    data = load("--dataset", "folder", "--source", "mine")
    assert data.source == "data/folder"
    check_error(lambda: load("--dataset", "folder", "--source", "other"), "mine", "other")
    assert len(load("--dataset", "folder").pool) == 1


@SCRIPTS
@pytest.mark.parametrize("name", ["mine/", "./mine", "mine//"])
def test_a_source_path_may_be_written_in_several_ways(script, name):
    write_folder(pool=1)
    for source in (name, "mine", name):
        assert len(script([*FOLDER, "--source", source]).pool) == 1


@SCRIPTS
@pytest.mark.parametrize("argv", [FOLDER[:2], FOLDER])
def test_folder_needs_source(script, argv):
    check_rejected(lambda: script(argv), "--source")


@pytest.mark.parametrize(
    "flags",
    [
        "--raw {}",
        "--unlabeled {}",
        "--dataset folder --source {}",
        "--dataset tiny_imagenet --raw {}",
    ],
)
@SCRIPTS
def test_a_path_that_is_too_long(script, flags):
    check_rejected(lambda: script(flags.format(5000 * "x").split()), "xxx")


@pytest.mark.parametrize("flag", ["--source mine", "--image_size 32"])
def test_source_and_image_size_are_only_for_folders(flag):
    check_error(lambda: load("--dataset", "cifar100", *flag.split()), flag)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": None},
        {"mean": [0, 1]},
        {"std": [0, 0.1, 0.1]},
        {"mean": ["x", 0, 0]},
        {"std": [float("nan")] * 3},
        {"names": {"0": "a", "5": "b"}},
        {"names": {}},
        {"names": {str(c): c for c in range(4)}},
    ],
)
def test_a_damaged_meta_json_of_a_folder(change):
    write_folder(pool=1)
    dataset.main(MINE)
    path = Path("set/meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    check_error(lambda: load(*FOLDER), "set")


def test_a_folder_without_a_pool_is_for_no_teaching(capsys):
    write_folder(pool=0)
    assert len(dataset.main(MINE).pool) == 0
    assert "--no_teaching" in capsys.readouterr().out
    assert {*os.listdir("set")} == {
        "meta.json", "preview.png", *(f"folder_{part}.npz" for part in FILES)
    }  # fmt: skip
    check_rejected(lambda: load(*FOLDER), "--no_teaching", "--unlabeled")
    assert len(load(*FOLDER, "--no_teaching").pool) == 0
    assert dataset.main(FOLDER).source == "set"


# ------------------------------------------------------------------------------ pools

POOL = [*CIFAR, "--unlabeled"]
IMAGES = random_images(7, 9)


def as_npy():
    np.save("pool.npy", IMAGES)
    return "pool.npy"


def as_npz():
    np.savez("pool.NPZ.npz", IMAGES)
    return "pool.NPZ.npz"


def as_compressed_npz():
    np.savez_compressed("pool.npz", images=IMAGES)
    return "pool.npz"


def as_pickle():
    content = {"data": IMAGES, "label": np.zeros(7)}
    Path("cifar10_80m_150k.pkl").write_bytes(pickle.dumps(content))
    return "cifar10_80m_150k.pkl"


def as_folder():
    for i, image in enumerate(IMAGES):
        write_tree({f"pool/{i % 2}/{i}.PNG": encode(Image.fromarray(image), "PNG")})
    return "pool"


@pytest.mark.parametrize("form", [as_npy, as_npz, as_compressed_npz, as_pickle, as_folder])
def test_a_pool_comes_in_several_forms(official, form):
    name = form()
    data = dataset.main([*POOL, name])
    assert bag(data.pool) == bag(IMAGES)
    assert json.loads(Path("set/meta.json").read_text())["pool"] == name
    assert not official.cifar100.calls


def test_several_pools_are_joined_and_resized(official, capsys):
    as_npy()
    np.save("large.npy", random_images(3, 1, side=64))
    wide = np.repeat(np.arange(2, dtype=np.uint8), 40 * 80 * 3).reshape(2, 40, 80, 3)
    np.save("wide.npy", wide)
    data = dataset.main([*POOL, "pool.npy", "large.npy", "wide.npy"])
    assert bag(data.pool[:7]) == bag(IMAGES)
    assert data.pool.shape == (12, 32, 32, 3)
    assert [int(image.float().mean()) for image in data.pool[10:]] == [0, 1]
    assert "64x64, resized to 32x32" in capsys.readouterr().out
    assert len(dataset.main([*POOL, "pool.npy", "large.npy", "wide.npy"]).pool) == 12
    check_error(lambda: dataset.main([*POOL, "pool.npy"]), "--data set", "large.npy")


def test_a_pool_path_may_be_written_in_several_ways(official):
    Path("photos").mkdir()
    Image.fromarray(IMAGES[0]).save("photos/0.png")
    for name in ("a", "b"):
        np.save(f"{name}.npy", IMAGES)
    dataset.main([*POOL, "a.npy", "photos/"])
    for places in (["./a.npy", "photos"], [str(Path("a.npy").resolve()), "./photos/"]):
        assert len(dataset.main([*POOL, *places]).pool) == len(IMAGES)
    for places in (["b.npy", "photos"], ["photos", "a.npy"], ["a.npy"]):
        check_error(lambda places=places: dataset.main([*POOL, *places]), "--data set", "a.npy")


def test_the_error_for_a_text_pool_does_not_advise_unpickling(official):
    Path("pool.npy").write_text("no array")
    line = check_error(lambda: dataset.main([*POOL, "pool.npy"]), "--unlabeled pool.npy", "another")
    assert "pickle" not in line


def test_the_pool_is_deduplicated(official, capsys):
    cifar10 = official.cifar10.sets
    pool = [IMAGES, cifar10[True].data[:50], IMAGES[:2], cifar10[False].data[:30], IMAGES[6:]]
    np.save("pool.npy", np.concatenate(pool))
    data = dataset.main([*POOL, "pool.npy"])
    assert np.array_equal(data.pool.numpy(), IMAGES)
    assert json.loads(Path("set/meta.json").read_text())["dropped"] == {"equal": 80, "repeated": 3}
    assert "90 images, less 80 that are also in the set and 3 duplicates" in capsys.readouterr().out


def test_a_pool_of_the_set_itself(official):
    np.save("pool.npy", official.cifar10.sets[True].data)
    check_rejected(lambda: dataset.main([*POOL, "pool.npy"]), "--unlabeled pool.npy")


def of_bytes(content):
    return lambda: Path("pool.npz").write_bytes(content)


def large_header():
    """An array whose header promises 2**40 images."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 32, 32, 3)}"
    header = header.ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    write_zip({"images.npy": content + bytes(99)}, "pool.npz")


def cut_npz():
    np.savez("pool.npz", IMAGES)
    Path("pool.npz").write_bytes(Path("pool.npz").read_bytes()[:-400])


def flip_npz():
    np.savez("pool.npz", IMAGES)
    content = bytearray(Path("pool.npz").read_bytes())
    content[9000] ^= 1
    Path("pool.npz").write_bytes(content)


BAD_NPZ = {
    "text": of_bytes(b"text"),
    "nothing": of_bytes(b""),
    "missing": lambda: None,
    "cut": cut_npz,
    "a bit is another": flip_npz,
    "two arrays": lambda: np.savez("pool.npz", IMAGES, IMAGES),
    "no array": lambda: np.savez("pool.npz"),
    "floats": lambda: np.savez("pool.npz", IMAGES / 255),
    "objects": lambda: np.savez("pool.npz", np.array([None])),
    "channels first": lambda: np.savez("pool.npz", IMAGES.transpose(0, 3, 1, 2)),
    "large header": large_header,
    "no NumPy inside": lambda: write_zip({"a.txt": b"text"}, "pool.npz"),
}


@pytest.mark.parametrize("make", BAD_NPZ.values(), ids=BAD_NPZ)
def test_a_bad_npz_pool(official, make):
    make()
    check_rejected(lambda: dataset.main([*POOL, "pool.npz"]), "--unlabeled pool.npz")


def test_an_npz_pool_has_a_size_limit(official, monkeypatch):
    as_compressed_npz()
    monkeypatch.setattr("datasets.pool.MAX_UNPACKED", 20000)
    check_error(lambda: dataset.main([*POOL, "pool.npz"]), "pool.npz", "GiB")


@pytest.mark.parametrize("flags", ["--unlabeled pool.npy", "--per_class 10", "--seed 1"])
def test_flags_for_preparing_do_not_change_published_files(flags):
    """The error must not suggest to delete them: they are no longer published."""
    as_npy()
    write_published()
    call = ["--data", "published", *flags.split()]
    assert "delete" not in check_rejected(lambda: dataset.main(call), flags.split()[0])


def test_a_hostile_pickle_pool(official):
    Path("pool.pkl").write_bytes(calling("os", "system", "touch done"))
    check_rejected(lambda: dataset.main([*POOL, "pool.pkl"]), "pool.pkl")


def test_the_error_names_a_broken_image_of_the_pool(official):
    as_folder()
    Path("pool/1/9.jpg").write_bytes(b"text")
    check_error(lambda: dataset.main([*POOL, "pool"]), "pool/1/9.jpg")
    assert not Path("set").exists()


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


@pytest.mark.parametrize(
    "pickled, protocol",
    [(pickle.dumps, 2), (pickle.dumps, 4), (numpy1_pickle, 2), (numpy1_pickle, 4)]
    + [(python2_pickle, 2)],
)
def test_published_pickles_of_all_ages(pickled, protocol):
    content = write_published(pickled, protocol)
    before = tree()
    data = load("--data", "published")
    for part, file in zip(PARTS, FILES):
        found = getattr(data, part)
        assert all(np.array_equal(found[c].numpy(), content[file][c]) for c in range(10))
    assert np.array_equal(data.pool.numpy(), content["pool"])
    assert data.order == CIFAR10_ORDER
    assert tree() == before


def test_dataset_py_shows_published_pickles_and_prepares_nothing(official, capsys):
    content = write_published()
    before = tree()
    data = dataset.main(["--data", "published"])
    check_table(capsys.readouterr().out, data, 9)
    assert len(data.train[9]) == len(content["train"][9])
    after = tree()
    assert set(after) - set(before) == {"published/preview.png"}
    assert all(after[path] == before[path] for path in before if path != "published")


@pytest.mark.parametrize("file", [*FILES, "80m_150k"])
def test_a_missing_published_file(file):
    write_published()
    Path(f"published/cifar10_{file}.pkl").unlink()
    check_rejected(
        lambda: load("--data", "published"), "published", file if file != "train" else "pickle"
    )


def calling(module, function, argument):
    """A pickle that calls module.function(argument)."""
    text = struct.pack("<i", len(argument)) + argument.encode()
    spelled = b"".join(b"\x8c%c%s" % (len(w), w.encode()) for w in (module, function))
    return b"\x80\x04" + spelled + b"\x93" + b"X" + text + b"\x85R."


@pytest.mark.parametrize("file", [*FILES, "80m_150k"])
@pytest.mark.parametrize("module", ["os", "posix", "os\nsystem"])
def test_a_published_file_that_calls_a_command(file, module):
    write_published()
    hostile = calling(module, "system", "touch done")
    Path(f"published/cifar10_{file}.pkl").write_bytes(hostile)
    check_rejected(lambda: load("--data", "published"), f"cifar10_{file}.pkl")


def test_pickle_itself_would_run_the_command():
    """Otherwise the test above could never fail."""
    pickle.loads(calling("os", "system", "touch done"))
    assert Path("done").exists()


PART = {c: random_images(3, c) for c in range(10)}
BAD_PARTS = {
    "a class missing": {c: PART[c] for c in range(9)},
    "float images": PART | {3: PART[3].astype(np.float32)},
    "int64 images": PART | {3: PART[3].astype(np.int64)},
    "channels first": PART | {3: PART[3].transpose(0, 3, 1, 2)},
    "gray images": PART | {3: PART[3][..., 0]},
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
def test_a_published_part_with_wrong_arrays(part, content):
    write_published()
    Path(f"published/cifar10_{part}.pkl").write_bytes(pickle.dumps(content))
    check_rejected(lambda: load("--data", "published"), "exemplars" if part == "save_100" else part)


@pytest.mark.parametrize("content", [[PART[0]], {}, {0: [1]}, {0: None, 1: PART[1]}, PART[0]])
def test_a_published_part_with_wrong_arrays_and_no_pool(content):
    """No pool tells the shape of the images."""
    write_published()
    Path("published/cifar10_train.pkl").write_bytes(pickle.dumps(content))
    check_rejected(lambda: load("--data", "published", "--no_teaching"), "published: train")


UNLABELED = random_images(9, 5)
BAD_POOLS = {
    "no data": {"label": np.zeros(9)},
    "an array": UNLABELED,
    "float images": {"data": UNLABELED / 255},
    "flat": {"data": UNLABELED.reshape(9, -1)},
    "other size": {"data": random_images(9, 5, side=16)},
    "ragged": {"data": [[1, 2], [3]]},
    "empty": {"data": UNLABELED[:0]},
}


@pytest.mark.parametrize("content", BAD_POOLS.values(), ids=BAD_POOLS)
def test_a_published_pool_with_wrong_arrays(content):
    write_published()
    Path("published/cifar10_80m_150k.pkl").write_bytes(pickle.dumps(content))
    check_rejected(lambda: load("--data", "published"), "published")


def test_a_published_set_with_channels_first_throughout():
    """Pool and parts agree with each other, but not with [n,H,W,3]."""
    content = write_published()
    for part in FILES:
        turned = {c: images.transpose(0, 3, 1, 2) for c, images in content[part].items()}
        Path(f"published/cifar10_{part}.pkl").write_bytes(pickle.dumps(turned))
    turned = {"data": content["pool"].transpose(0, 3, 1, 2)}
    Path("published/cifar10_80m_150k.pkl").write_bytes(pickle.dumps(turned))
    check_error(lambda: load("--data", "published"), "published", "[n,H,W,3]")


@pytest.mark.parametrize("file", ["train", "80m_150k"])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-99], lambda b: b"text\n" + b])
def test_a_damaged_published_file(file, damage):
    write_published()
    path = Path(f"published/cifar10_{file}.pkl")
    path.write_bytes(damage(path.read_bytes()))
    check_error(lambda: load("--data", "published"), path.name)


# ------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory):
    """A prepared set, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("cifar-10-batches-py", "cifar-100-python"):
        (folder / "raw" / name).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, (10, 1))
        dataset.main(["--data", str(folder / "set"), "--raw", str(folder / "raw")])
    return folder / "set"


@pytest.fixture
def whole(whole_set, official):
    """A copy in set/, beside raw/, the folders empty/ and no_files/, and a file."""
    shutil.copytree(whole_set, "set")
    Path("empty").mkdir()
    Path("no_files").mkdir()
    Path("file").write_text("no folder")


def cut(name):
    """Damage: the file ends halfway."""

    def damage():
        path = Path("set", name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def flip(name):
    """Damage: a byte in the middle changes."""

    def damage():
        content = bytearray(Path("set", name).read_bytes())
        content[len(content) // 2] ^= 255
        Path("set", name).write_bytes(content)

    return damage


def put(name, content):
    """Damage: the file has other content."""
    return lambda: Path("set", name).write_bytes(content)


def put_arrays(part, arrays):
    """Damage: the part has other arrays."""
    by_name = {str(c): array for c, array in arrays.items()}
    return lambda: np.savez(f"set/cifar10_{part}.npz", **by_name)


def put_pool(pool):
    return lambda: np.save("set/cifar10_pool.npy", pool)


def meta(**changes):
    """Damage: changes of meta.json; None removes a key."""

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
@SCRIPTS
def test_a_damaged_prepared_set(whole, script, damage):
    damage()
    check_rejected(lambda: script(["--data", "set"]), "set")


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
    "gray": array((4, 32, 32), np.uint8),
    "channels first": array((4, 3, 32, 32), np.uint8),
    "no image": array((0, 32, 32, 3), np.uint8),
    "objects": objects(),
    "archive": archive(),
    "cut archive": archive()[:900],
    "cut": array((4, 32, 32, 3), np.uint8)[:900],
    "nothing": b"",
    "text": b"no array\n",
    # NumPy's message has several lines
    "long header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 20000) + b" " * 20000,
}


@pytest.mark.parametrize("content", BAD_POOL_FILES.values(), ids=BAD_POOL_FILES)
def test_a_bad_npy_pool(official, content):
    Path("pool.npy").write_bytes(content)
    call = ["--data", "new", "--raw", "raw", "--unlabeled", "pool.npy"]
    check_rejected(lambda: dataset.main(call), "pool.npy")


BAD_FLAGS = [
    # preparing: dataset.py
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
    ("main", "--data new --raw raw --color red", "--color"),
    ("main", "--data new --raw", "--raw"),
    # training: resolve_tasks, then load
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
def test_bad_flags(whole, script, argv, word):
    call = load if script == "load" else lambda *argv: dataset.main(argv)
    check_rejected(lambda: call(*argv.split()), word)


@pytest.mark.parametrize(
    "argv",
    ["", "--batch_size 20", "--batch_size 8 --classifiers 2", "--batch_size 1 --classifiers 1"],
)
def test_flags_at_their_limits(whole, argv):
    assert load("--data", "set", *argv.split()).source == "set"
