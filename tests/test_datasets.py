"""datasets/: preparing CIFAR, Tiny-ImageNet and folders; pools; prepared and published files.

All on small files in their real formats, which the tests make themselves.
"""

import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image, PngImagePlugin
from processes import tree, write_published
from sets import (
    CIFAR10_NAMES,
    FILES,
    SPLITS,
    Hostile,
    bag,
    check_error,
    check_rejected,
    encode,
    load,
    noise,
    pixels,
    random_images,
    stored,
    write_cifar,
    write_folder,
    write_tree,
    write_zip,
)

import dataset
from datasets.images import read_image

CIFAR = ["--data", "set", "--raw", "raw"]
TINY = ["--dataset", "tiny_imagenet", "--data", "set", "--classifiers", "2", "--raw"]
FOLDER = ["--dataset", "folder", "--data", "set"]
MINE = [*FOLDER, "--source", "mine"]
META = Path("set/meta.json")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder; no test may reach the network."""

    def urlopen(*args, **options):
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)


# ------------------------------------------------------------------------------ CIFAR


def as_archives():
    for folder in list(Path("raw").iterdir()):
        name = {"cifar-10-batches-py": "cifar-10-python"}.get(folder.name, folder.name)
        with tarfile.open(f"raw/{name}.tar.gz", "w:gz") as tar:
            tar.add(folder, folder.name)
        shutil.rmtree(folder)
    Path("raw").chmod(0o555)
    return "raw"


@pytest.mark.parametrize("form", [lambda: "raw", lambda: "raw/cifar-10-batches-py", as_archives])
def test_a_prepared_dataset_is_split_9_to_1(form):
    official, pool = write_cifar(train=120)
    data = dataset.main(["--data", "set", "--raw", form()])
    splits, stored_pool = stored("set")
    for c in range(10):
        own = [splits[split][c] for split in FILES]
        assert [images.shape for images in own] == [(n, 32, 32, 3) for n in (108, 12, 10, 100)]
        assert bag(own[0], own[1]) == bag(official["train"][c])
        assert np.array_equal(own[2], official["test"][c])
        assert bag(own[3]) <= bag(own[0]) and bag(own[3]) != bag(own[0][:100])
        assert all(np.array_equal(getattr(data, s)[c], i) for s, i in zip(SPLITS, own))
    assert np.array_equal(stored_pool, pool)
    meta, files = json.loads(META.read_text()), [f"cifar10_{split}.npz" for split in FILES]
    assert {*os.listdir("set")} == {"meta.json", "preview.png", "cifar10_pool.npy", ".lock", *files}
    assert meta["names"] == {str(c): name for c, name in enumerate(CIFAR10_NAMES)}
    assert (meta["seed"], meta["per_class"], meta["test_in_train"]) == (0, None, 0)


def test_a_smaller_dataset_of_another_seed(capsys):
    official, pool = write_cifar()
    flags = ["--per_class", "10", "--pool_size", "9"]
    dataset.main([*CIFAR, *flags])
    splits, kept = stored("set")
    assert [len(splits[split][4]) for split in FILES] == [9, 1, 10, 9]
    chosen = bag(*splits["train"].values(), *splits["val"].values())
    assert chosen <= bag(*official["train"].values())
    assert chosen != bag(*(images[:10] for images in official["train"].values()))
    assert len(kept) == 9 and bag(kept) <= bag(pool) and bag(kept) != bag(pool[:9])
    assert "--pool_size" in capsys.readouterr().out
    dataset.main(CIFAR)  # what is not given is as it was made
    for flag, made in (("--pool_size", "with 9"), ("--per_class", "with 10"), ("--seed", "with 0")):
        check_error(lambda flag=flag: dataset.main([*CIFAR, flag, "12"]), f"{flag} 12", made)
    other = dataset.main(["--data", "other", *CIFAR[2:], *flags, "--seed", "1"])
    assert bag(*other.val.values()) != bag(*splits["val"].values())


def change_batch(name, **changes):
    path = Path("raw/cifar-10-batches-py", name)
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(content | changes))
    return content


def test_test_images_that_are_also_training_images_are_counted(capsys):
    official, _ = write_cifar()
    images = change_batch("test_batch")["data"]
    images[7] = official["train"][3][0].transpose(2, 0, 1).ravel()
    change_batch("test_batch", data=images)
    dataset.main(CIFAR)
    assert "1 of 100 test images are also training images" in capsys.readouterr().out
    assert json.loads(META.read_text())["test_in_train"] == 1


BAD_CIFAR = {
    "no CIFAR": (lambda: shutil.rmtree("raw/cifar-10-batches-py"), "cifar-10-python.tar.gz"),
    "no pool": (lambda: shutil.rmtree("raw/cifar-100-python"), "--unlabeled"),
    "hostile": (lambda: change_batch("data_batch_2", data=Hostile()), "data_batch_2"),
    "batch missing": (lambda: os.unlink("raw/cifar-10-batches-py/test_batch"), "test_batch"),
    "archive cut": (lambda: (as_archives(), os.truncate("raw/cifar-10-python.tar.gz", 9000)),
                    "unpacked"),
}  # fmt: skip


@pytest.mark.parametrize("damage, word", BAD_CIFAR.values(), ids=BAD_CIFAR)
def test_bad_official_files(damage, word):
    write_cifar()
    damage()
    check_rejected(lambda: dataset.main(CIFAR), "raw", word)


@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-python.tar.gz"),
                                        ("tiny_imagenet", "tiny-imagenet-200.zip")])  # fmt: skip
def test_without_network_the_error_says_where_to_put_the_file(name, file):
    check_error(lambda: load("--dataset", name), file, "data/raw", "no network")
    assert not Path("data", name, "meta.json").exists() and not [*Path().rglob("*.part")]


# ------------------------------------------------------------------------------ Tiny-ImageNet

TOP = "tiny-imagenet-200/"


def tiny_files(per_class=12):
    """{name: bytes} as in tiny-imagenet-200.zip, of four classes; some JPEGs are grayscale."""
    files = {"wnids.txt": b"n03\nn01\nn04\nn02\n"}
    files["words.txt"] = b"n01\tfish, a fish\nn02\tcat\nn03\tfish\nn04\tdog, hound\nn05\tno\n"
    lines = []
    for c, wnid in enumerate(("n01", "n02", "n03", "n04")):
        for i in range(per_class):
            image = noise([c, i], mode="L" if i % 4 == 0 else "RGB")
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = encode(image, "JPEG")
        for i in range(3):
            files[f"val/images/val_{10 * i + c}.JPEG"] = encode(noise([c, 100 + i]), "JPEG")
            lines.append(f"val_{10 * i + c}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    files["val/val_annotations.txt"] = "".join(lines[::-1]).encode()
    for i in range(5):
        files[f"test/images/test_{i}.JPEG"] = encode(noise([9, i]), "JPEG")
    return {TOP + name: content for name, content in files.items()}


@pytest.mark.parametrize("raw", ["tiny.zip", "raw", f"raw/{TOP}", "with_zip"])
def test_tiny_imagenet_is_read_from_the_archive_or_its_folder(raw):
    files = tiny_files()
    junk = ("train/n01/images/.DS_Store", "test/images/._test_0.JPEG", "test/images/Thumbs.db")
    junk = {TOP + name: b"x" for name in junk}
    write_zip(files | junk | {f"{TOP}train/n01/images/": b""})
    write_tree(files | junk, "raw")
    Path("raw", TOP, "train").rename("elsewhere")  # on a larger disk
    Path("raw", TOP, "train").symlink_to(Path("elsewhere").absolute())
    Path("with_zip").mkdir()
    shutil.copy("tiny.zip", "with_zip/tiny-imagenet-200.zip")
    data = dataset.main([*TINY, raw])
    for c, wnid in enumerate(("n01", "n02", "n03", "n04")):
        own = [pixels(content) for name, content in files.items() if f"/{wnid}/images/" in name]
        assert bag(data.train[c], data.val[c]) == bag(own)
        names = [f"{TOP}val/images/val_{10 * i + c}.JPEG" for i in range(3)]
        assert bag(data.test[c]) == bag([pixels(files[name]) for name in names])
    assert bag(data.pool) == bag([pixels(b) for name, b in files.items() if "200/test" in name])
    assert (data.pad, data.image_size) == (8, (64, 64))
    assert data.order == np.random.RandomState(1993).permutation(4).tolist()
    assert data.names == {0: "n01", 1: "cat", 2: "n03", 3: "dog"}  # two are called fish
    assert load(*TINY[:4]).classifiers == 2  # fewer classes than the official files have
    call = [*TINY[:4], "--classifiers", "2", "--classes_per_classifier", "3"]
    check_error(lambda: load(*call), "--classifiers 2", "4 classes")


BAD_TINY = {
    "no annotations": ({"val/val_annotations.txt": None}, "tiny"),
    "an image missing": ({"val/images/val_11.JPEG": None}, "val/images/val_11.JPEG"),
    "no class has tests": ({"val/val_annotations.txt": b"\n"}, "test image"),
    "a class without images": ({"wnids.txt": b"n01\nn09\n"}, "n09 has 0 training images"),
    "an image cut": ({"train/n02/images/n02_3.JPEG": encode(noise(1), "JPEG")[:300]}, "n02_3.JPEG"),
}


def test_an_archive_that_may_unpack_to_any_size_is_refused():
    write_zip(tiny_files(), method=zipfile.ZIP_LZMA)
    check_rejected(lambda: dataset.main([*TINY, "tiny.zip"]), "tiny.zip", "not deflated")


@pytest.mark.parametrize("changes, word", BAD_TINY.values(), ids=BAD_TINY)
def test_errors_name_the_bad_file_in_tiny_imagenet(changes, word):
    files = tiny_files() | {TOP + name: own for name, own in changes.items()}
    files = {name: content for name, content in files.items() if content is not None}
    write_zip(files)
    write_tree(files)
    for raw in ("tiny.zip", TOP):
        check_rejected(lambda raw=raw: dataset.main([*TINY, raw]), word)
    os.truncate("tiny.zip", 500)
    check_rejected(lambda: dataset.main([*TINY, "tiny.zip"]), "tiny.zip")


# ------------------------------------------------------------------------------ folders


def test_a_folder_of_images_becomes_a_dataset():
    write_folder(pool=6)
    data = dataset.main([*MINE, "--image_size", "40"])
    assert data.names == {0: "a", 1: "b", 2: "c d", 3: "e"}
    assert (data.classifiers, data.classes_per_classifier, data.pad) == (2, 2, 5)
    counts = [[len(getattr(data, split)[c]) for c in range(4)] for split in SPLITS]
    assert counts == [[14] * 4, [2] * 4, [2] * 4, [14] * 4]
    own = [Path("mine/test/a/0.png"), Path("mine/test/a/1.JPG")]  # of that size: not resized
    assert bag(data.test[0]) == bag([pixels(path.read_bytes()) for path in own])
    assert data.pool.shape == (6, 40, 40, 3)
    values = np.concatenate([np.asarray(images) for images in data.train.values()]) / 255
    assert data.mean.flatten().numpy() == pytest.approx(values.mean((0, 1, 2)), abs=1e-5)
    assert data.std.flatten().numpy() == pytest.approx(values.std((0, 1, 2)), abs=1e-5)
    assert load(*FOLDER).fingerprint() == data.fingerprint()


def test_links_and_subfolders_are_followed_and_the_rest_is_counted(capsys):
    """Also a link to a folder above, which would have no end, and names in two forms."""
    write_folder(("a", "b"))
    write_folder(("cafe\N{COMBINING ACUTE ACCENT}",), tests=0)
    write_folder(("caf\N{LATIN SMALL LETTER E WITH ACUTE}",), train=0)
    write_folder((), pool=3, folder="more")
    files = ("train/a/deep/er/x.png", "train/a/y.HEIC", "val/a/0.png", "train/b/no_suffix", ".x/y")
    write_tree({name: encode(noise(1)) for name in files}, "mine")
    Path("mine/train/a/gone.png").symlink_to("/nowhere")
    Path("mine/unlabeled").mkdir()
    Path("mine/unlabeled/photos").symlink_to(Path("more/unlabeled").absolute())
    Path("mine/train/b/above").symlink_to(Path("mine/train").absolute() / "b")
    data = dataset.main([*MINE, "--classifiers", "3"])
    assert list(data.names.values()) == ["a", "b", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]
    assert [len(data.train[c]) + len(data.val[c]) for c in range(3)] == [17, 16, 16]
    assert len(data.pool) == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    kinds = ["1 .HEIC (mine/train/a/y.HEIC)", "1 dangling links (mine/train/a/gone.png)"]
    kinds += ["1 in no folder of a class (mine/val/a/0.png)"]
    kinds += ["1 without suffix (mine/train/b/no_suffix)"]
    assert all(kind in line for kind in kinds)


def test_without_test_images_a_fifth_is_held_out_and_without_a_pool_nothing_is_taught(capsys):
    files = write_folder(train=10, tests=0)
    data = dataset.main(MINE)
    out = capsys.readouterr().out
    assert "a fifth" in out and "--no_teaching" in out
    assert [len(data.test[c]) for c in range(4)] == [2] * 4
    assert [len(data.train[c]) + len(data.val[c]) for c in range(4)] == [8] * 4
    own = (data.test, data.train, data.val)
    assert len(bag(*(images for split in own for images in split.values()))) == len(files)
    check_rejected(lambda: load(*FOLDER), "--no_teaching", "--unlabeled")
    assert len(load(*FOLDER, no_teaching=True).pool) == 0


def flat(split):
    shutil.rmtree(f"mine/{split}")
    write_tree({f"{split}/1.png": encode(noise(1))}, "mine")


def empty(name, left=0):
    for path in sorted(Path("mine", name).iterdir())[left:]:
        path.unlink()


def put_image(content):
    Path("mine/train/c d/5.PNG").write_bytes(content)


BAD_FOLDERS = [
    (lambda: empty("train/b", 9), "class b has 9"),
    (lambda: empty("train/a"), "class a has 0"),
    (lambda: shutil.rmtree("mine/test/e"), "class e has no test image"),
    (lambda: shutil.rmtree("mine/train/e"), "'e'"),
    (lambda: shutil.rmtree("mine/train"), "mine/train"),
    (lambda: flat("train"), "a folder of images for each class"),
    (lambda: flat("test"), "into such folders"),
    (lambda: put_image(b"text"), "mine/train/c d/5.PNG"),
    (lambda: put_image(encode(noise(1), "JPEG")[:400]), "mine/train/c d/5.PNG"),
    (lambda: put_image(encode(Image.new("F", (40, 40)), "TIFF")), "mine/train/c d/5.PNG"),
]


def test_errors_in_a_folder_of_images():
    for damage, word in BAD_FOLDERS:
        shutil.rmtree("mine", ignore_errors=True)
        write_folder()
        damage()
        check_rejected(lambda: dataset.main(MINE), word)


def test_another_source_or_a_changed_one_is_noticed(monkeypatch):
    write_folder(pool=1)
    dataset.main(MINE)
    for again in ("mine/", "./mine", str(Path("mine").absolute())):
        assert len(dataset.main([*FOLDER, "--source", again]).pool) == 1
    write_folder(folder="other/mine")
    with monkeypatch.context() as patch:
        patch.chdir("other")
        call = [*FOLDER[:3], "../set", "--source", "mine"]
        check_error(lambda: dataset.main(call), "--source mine", "was prepared with")
        dataset.main([*FOLDER[:3], "../set", "--source", "../mine"])
    write_tree({"train/a/new.png": encode(noise(5))}, "mine")
    check_rejected(lambda: dataset.main(MINE), "--source mine", "has changed", "set")
    assert len(dataset.main(FOLDER).names) == 4


# ------------------------------------------------------------------------------ image files

ORIENTATION = b"\x01\x12\0\3\0\0\0\1\0\6\0\0"
ODD_TAG = b"\x01\x01\0\2\0\0\0\1x\0\0\0"  # a height that is a text: Pillow cannot write it again


def lying_down(*tags):
    """A JPEG that is stored lying on its side, with these EXIF tags: upright, its top is white."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32] = 255
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0" + bytes([len(tags)]) + b"".join(tags) + bytes(4)
    return encode(Image.fromarray(image), "JPEG", exif=exif, quality=95)


def palette():
    """A palette PNG: the upper half is transparent, though red, the lower half black."""
    image = Image.new("P", (20, 20), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.paste(0, (0, 0, 20, 10))
    return encode(image, transparency=0)


def wide():
    """Red beside the center square; with more text than Pillow reads by default."""
    image, info = Image.new("RGB", (60, 20), "red"), PngImagePlugin.PngInfo()
    image.paste("white", (20, 0, 40, 10))
    image.paste("black", (20, 10, 40, 20))
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    return encode(image, pnginfo=info)


def test_images_are_upright_square_and_opaque():
    for content in (lying_down(ORIENTATION), lying_down(ORIENTATION, ODD_TAG), palette(), wide()):
        Path("x.png").write_bytes(content)
        found = read_image(Path("x.png"), 16).astype(int)
        assert found[:7].min() > 240 and found[9:].max() < 15


def test_16_bit_gray_and_averages():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    for array in (np.full((16, 16), 32768, np.uint16), stripes):
        Path("x.png").write_bytes(encode(Image.fromarray(array)))
        assert abs(read_image(Path("x.png"), 16).astype(int) - 128).max() < 3


# ------------------------------------------------------------------------------ pools

POOL = [*CIFAR, "--unlabeled"]
IMAGES = random_images(7, 9)


def put(name, content):
    """Write a pool: a folder of images, or a file as its suffix says."""
    if name.endswith(".pkl"):
        Path(name).write_bytes(pickle.dumps(content))
    elif name.endswith(".npy"):
        np.save(name, content)
    else:
        write_tree({f"{name}/{i % 2}/{i}.PNG": encode(Image.fromarray(x)) for i, x in content})


@pytest.mark.parametrize("name", ["pool.npy", "pool.pkl", "pool"])
def test_a_pool_comes_in_several_forms(name):
    write_cifar()
    shutil.rmtree("raw/cifar-100-python")  # not needed then
    put(name, {"pool.npy": IMAGES, "pool.pkl": {"data": IMAGES}}.get(name, enumerate(IMAGES)))
    assert bag(dataset.main([*POOL, name]).pool) == bag(IMAGES)
    assert len(dataset.main([*POOL, f"./{name}"]).pool) == 7
    check_error(lambda: dataset.main([*POOL, "other.npy"]), "--unlabeled", "set")


def test_pools_are_joined_and_deduplicated(capsys):
    official, _ = write_cifar()
    own = [official[split][c] for split, c in (("train", 1), ("train", 2), ("test", 3))]
    put("pool.npy", IMAGES)
    put("more.npy", np.concatenate([IMAGES[:2], *own, IMAGES[6:]]))
    data = dataset.main([*POOL, "pool.npy", "more.npy"])
    assert np.array_equal(data.pool, IMAGES)
    assert json.loads(META.read_text())["dropped"] == {"equal": 50, "repeated": 3}
    out = capsys.readouterr().out
    assert "60 images, less 50 that are also in the dataset and 3 duplicates" in out


def test_bad_pools():
    official, _ = write_cifar()
    bad = {
        "empty": [],
        "floats.npy": IMAGES / 255,
        "size.npy": random_images(3, 3, 16),
        "channels_first.npy": IMAGES.transpose(0, 3, 1, 2),
        "hostile.pkl": Hostile(),
        "of_the_dataset.npy": official["train"][1],
    }
    Path("empty").mkdir()
    for name, content in bad.items():
        put(name, content)
    for name in (*bad, "missing.npy"):
        check_rejected(lambda name=name: dataset.main([*POOL, name]), name)


# ------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("place", ["deep/set", "empty", "link", "."])
def test_a_dataset_is_written_into_its_folder(place, monkeypatch):
    """Whatever it is: a mount point or a link could not be renamed over."""
    write_folder(pool=1)
    for name in ("empty", "larger_disk"):
        Path(name).mkdir()
    Path("link").symlink_to("larger_disk")
    source = str(Path("mine").absolute())
    if place == ".":
        monkeypatch.chdir("empty")
    data = dataset.main([*FOLDER[:3], place, "--source", source])
    assert Path(place, "folder_train.npz").exists() and len(data.pool) == 1
    assert dataset.main([*FOLDER[:3], place]).fingerprint() == data.fingerprint()


def test_what_cannot_be_written_is_said_before_anything_is_read():
    Path("file").write_text("a file")
    call = ["--data", "file", "--raw", "nowhere"]
    check_rejected(lambda: dataset.main(call), "--data file", "cannot be written")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [0, 3, 4, 5])
def test_an_unfinished_preparation_is_no_dataset(monkeypatch, step, error):
    """Nor does it hinder the next one, which leaves nothing of it. step: files renamed before."""
    write_cifar()
    whole = dataset.main(["--data", "whole", "--raw", "raw"])
    real, calls = os.replace, []

    def die(*paths):
        if len(calls) == step:
            raise error
        calls.append(real(*paths))

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        if isinstance(error, OSError):
            check_error(lambda: dataset.main(CIFAR), "set", "No space left")
        else:
            pytest.raises(KeyboardInterrupt, dataset.main, CIFAR)
    assert not META.exists()
    check_error(lambda: load("--data", "set"), "--data set", "python dataset.py")
    assert dataset.main(CIFAR).fingerprint() == whole.fingerprint()
    assert {n.removeprefix("set/") for n in tree("set")} == {n[6:] for n in tree("whole")}


def test_of_two_preparations_at_once_the_second_waits(monkeypatch):
    write_cifar()
    dataset.main(["--data", "first", "--raw", "raw", "--seed", "5"])

    def lock(path):  # the first ends while the second waits
        shutil.copytree("first", "set", dirs_exist_ok=True)
        return FileLock(path)

    monkeypatch.setattr("datasets.prepare.FileLock", lock)
    check_error(lambda: dataset.main([*CIFAR, "--seed", "4"]), "--seed 4", "prepared with 5")


# ------------------------------------------------------------------------------ published files


def test_published_files_are_read_as_they_are():
    content = write_published(Path("published"), side=32)
    before = tree(".")
    data = load("--data", "published")
    for split, file in zip(SPLITS, FILES):
        found = getattr(data, split)
        assert all(np.array_equal(found[c], content[file][c]) for c in range(10))
    assert np.array_equal(data.pool, content["80m_150k"]["data"])
    dataset.main(["--data", "published"])
    assert tree(".").keys() - before == {"published/preview.png"}
    for flags in ("--unlabeled pool.npy", "--per_class 10", "--seed 1"):
        call = ["--data", "published", *flags.split()]
        line = check_rejected(lambda call=call: dataset.main(call), flags.split()[0], "published")
        assert "remove published" not in line  # they can be had no more


SPLIT = {c: random_images(3, c) for c in range(10)}
BAD_SPLITS = [
    None,
    Hostile(),
    {c: SPLIT[c] for c in range(9)},
    SPLIT | {3: SPLIT[3].astype(np.float32)},
    SPLIT | {3: SPLIT[3].transpose(0, 3, 1, 2)},
    SPLIT | {3: random_images(3, 3, side=16)},
]


def test_bad_published_files():
    content = write_published(Path("published"), side=32)
    for name in ("train", "80m_150k"):
        path = Path(f"published/cifar10_{name}.pkl")
        for bad in BAD_SPLITS:
            path.unlink() if bad is None else path.write_bytes(pickle.dumps(bad))
            check_rejected(lambda: load("--data", "published"), "published")
        path.write_bytes(pickle.dumps(content[name]))
    assert len(load("--data", "published").pool) == 30 and not Path("done").exists()


# ------------------------------------------------------------------------------ prepared files


def flip(name):
    """A byte in the middle changes."""
    content = bytearray(Path("set", name).read_bytes())
    content[len(content) // 2] ^= 255
    Path("set", name).write_bytes(content)


def put_val(arrays):
    np.savez("set/cifar10_val.npz", **{str(c): own for c, own in arrays.items()})


def put_meta(**changes):
    META.write_text(json.dumps(json.loads(META.read_text()) | changes))


def compress(name, method):
    """The same records, in a form that may unpack to any size."""
    with zipfile.ZipFile(Path("set", name)) as archive:
        records = {each: archive.read(each) for each in archive.namelist()}
    write_zip(records, Path("set", name), method)


DAMAGES = [
    (lambda: compress("cifar10_val.npz", zipfile.ZIP_BZIP2), "not deflated"),
    (lambda: compress("cifar10_train.npz", zipfile.ZIP_LZMA), "not deflated"),
    (lambda: put_meta(dataset="cifar100"), "--dataset cifar100"),
    (lambda: flip("cifar10_train.npz"), "cifar10_train.npz"),
    (lambda: os.unlink("set/cifar10_test.npz"), "cifar10_test.npz"),
    (lambda: os.truncate("set/cifar10_pool.npy", 9000), "cifar10_pool.npy"),
    (lambda: np.save("set/cifar10_pool.npy", random_images(4, 4, 16)), "[n,16,16,3]"),
    (lambda: put_val({c: SPLIT[c] for c in range(9)}), "class 9"),
    (lambda: put_val(SPLIT | {3: np.array([None])}), "cifar10_val.npz"),
    (lambda: os.truncate(META, 20), "meta.json"),
]


def test_a_damaged_prepared_dataset():
    write_cifar(train=10, tests=1)
    dataset.main(["--data", "whole", "--raw", "raw"])
    for damage, word in DAMAGES:
        shutil.rmtree("set", ignore_errors=True)
        shutil.copytree("whole", "set")
        damage()
        check_rejected(lambda: load("--data", "set"), "set", word)


BAD_FLAGS = {
    "--dataset mnist": "--dataset",
    "--dataset digits --data set": "--data",
    "--dataset digits --per_class 20": "--per_class",
    "--dataset folder --raw raw --source raw": "--raw",
    "--data new --source raw": "--source",
    "--data new --raw nowhere": "--raw nowhere",
    "--data new --raw raw --per_class 3": "--per_class",
    "--data new --raw raw --pool_size 0": "--pool_size",
}


def test_bad_flags():
    write_cifar()
    for argv, word in BAD_FLAGS.items():
        check_rejected(lambda argv=argv: dataset.main(argv.split()), word)


@pytest.mark.parametrize("argv", ["--data nowhere", "--data file", "--dataset folder"])
def test_a_script_says_how_to_prepare_what_is_not_there(argv):
    Path("file").write_text("no folder")
    check_rejected(lambda: load(*argv.split()), "python dataset.py --dataset")
