"""datasets/: preparing CIFAR, Tiny-ImageNet and folders; pools; prepared and published files.

All on small files in their real formats, which the tests make themselves.
"""

import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from sets import (
    CIFAR10_NAMES,
    FILES,
    SPLITS,
    bag,
    check_error,
    check_rejected,
    encode,
    load,
    noise,
    pixels,
    random_images,
    stored,
    tree,
    write_cifar,
    write_folder,
    write_published,
    write_tree,
    write_zip,
)

import dataset
from datasets import prepare
from datasets.images import read_image

CIFAR = ["--data", "set", "--raw", "raw"]
TINY = ["--dataset", "tiny_imagenet", "--data", "set", "--classifiers", "2", "--raw"]
FOLDER = ["--dataset", "folder", "--data", "set"]
MINE = [*FOLDER, "--source", "mine"]
META = "set/meta.json"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder; no test may reach the network."""

    def urlopen(*args, **options):
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)


def read_meta(folder="set"):
    return json.loads(Path(folder, "meta.json").read_text())


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
        assert [len(images) for images in own] == [108, 12, 10, 100]
        assert {(images.dtype, images.shape[1:]) for images in own} == {
            (np.dtype(np.uint8), (32, 32, 3))
        }
        assert bag(own[0], own[1]) == bag(official["train"][c])
        assert np.array_equal(own[2], official["test"][c])
        assert bag(own[3]) <= bag(own[0]) and bag(own[3]) != bag(own[0][:100])
        assert all(np.array_equal(getattr(data, s)[c], i) for s, i in zip(SPLITS, own))
    assert np.array_equal(stored_pool, pool)
    meta, files = read_meta(), [f"cifar10_{split}.npz" for split in FILES]
    assert {*os.listdir("set")} == {"meta.json", "preview.png", "cifar10_pool.npy", ".lock", *files}
    assert meta["names"] == {str(c): name for c, name in enumerate(CIFAR10_NAMES)}
    assert (meta["seed"], meta["per_class"], meta["test_in_train"]) == (0, None, 0)
    assert "CIFAR-100" in meta["pool"]


def test_the_split_is_drawn_for_each_class_and_seed():
    official, _ = write_cifar(train=30)
    drawn = set()
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        dataset.main(["--data", folder, "--raw", "raw", "--seed", str(seed)])
        splits, _ = stored(folder)
        for c in range(10):
            held_out = bag(splits["val"][c])
            own = [image.tobytes() in held_out for image in official["train"][c]]
            drawn.add((seed, tuple(np.flatnonzero(own))))
    assert len(drawn) == len({places for _, places in drawn}) == 20
    assert tree("a").keys() == {name.replace("b/", "a/", 1) for name in tree("b")}
    assert read_meta("c")["seed"] == 1


def test_a_smaller_dataset(capsys):
    official, pool = write_cifar()
    dataset.main([*CIFAR, "--per_class", "10", "--pool_size", "9"])
    splits, kept = stored("set")
    assert [len(splits[split][4]) for split in FILES] == [9, 1, 10, 9]
    chosen = bag(*splits["train"].values(), *splits["val"].values())
    assert chosen <= bag(*official["train"].values())
    assert chosen != bag(*(images[:10] for images in official["train"].values()))
    assert len(kept) == 9 and bag(kept) <= bag(pool) and bag(kept) != bag(pool[:9])
    assert "--pool_size" in capsys.readouterr().out
    dataset.main(CIFAR)  # what is not given is as it was made
    check_error(lambda: dataset.main([*CIFAR, "--pool_size", "8"]), "--pool_size 8", "with 9")
    check_error(lambda: dataset.main([*CIFAR, "--per_class", "12"]), "--per_class 12", "with 10")


def test_test_images_that_are_also_training_images_are_counted(capsys):
    official, _ = write_cifar()
    batch = Path("raw/cifar-10-batches-py/test_batch")
    content = pickle.loads(batch.read_bytes())
    content["data"][7] = official["train"][3][0].transpose(2, 0, 1).ravel()
    batch.write_bytes(pickle.dumps(content))
    dataset.main(CIFAR)
    assert "1 of 100 test images are also training images" in capsys.readouterr().out
    assert read_meta()["test_in_train"] == 1


def put_batch(**changes):
    path = Path("raw/cifar-10-batches-py/data_batch_2")
    content = pickle.loads(path.read_bytes()) | changes
    path.write_bytes(pickle.dumps(content))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("done",)


BAD_CIFAR = {
    "no CIFAR": (lambda: shutil.rmtree("raw/cifar-10-batches-py"), "cifar-10-python.tar.gz"),
    "no pool": (lambda: shutil.rmtree("raw/cifar-100-python"), "--unlabeled"),
    "hostile": (lambda: put_batch(data=Hostile()), "data_batch_2"),
    "floats": (lambda: put_batch(data=np.zeros((40, 3072))), "uint8"),
    "fewer labels": (lambda: put_batch(labels=39 * [1]), "199 labels"),
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
    assert not Path("data", name).exists() and not [*Path().rglob("*.part")]


# ------------------------------------------------------------------------------ Tiny-ImageNet


def tiny_files(per_class=12):
    """{name: bytes} as in tiny-imagenet-200.zip, of four classes; some JPEGs are grayscale."""
    files = {"wnids.txt": b"n03\nn01\nn04\nn02\n"}
    files["words.txt"] = b"n01\tfish, a fish\nn02\tcat\nn03\tfish\nn04\tdog, hound\nn05\tno\n"
    lines = []
    for c, wnid in enumerate(("n01", "n02", "n03", "n04")):
        for i in range(per_class):
            image = noise([c, i], mode="L" if i % 4 == 0 else "RGB")
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = encode(image, "JPEG")
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"x_0.JPEG\t0\t0\t63\t63\n"
        for i in range(3):
            files[f"val/images/val_{10 * i + c}.JPEG"] = encode(noise([c, 100 + i]), "JPEG")
            lines.append(f"val_{10 * i + c}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    files["val/val_annotations.txt"] = "".join(lines[::-1]).encode()
    for i in range(5):
        files[f"test/images/test_{i}.JPEG"] = encode(noise([9, i]), "JPEG")
    return {f"tiny-imagenet-200/{name}": content for name, content in files.items()}


@pytest.mark.parametrize("raw", ["tiny.zip", "raw", "raw/tiny-imagenet-200", "with_zip"])
def test_tiny_imagenet_is_read_from_the_archive_or_its_folder(raw):
    files = tiny_files()
    junk = {"train/n01/images/.DS_Store": b"x", "test/images/._test_0.JPEG": b"x"}
    junk |= {"test/images/Thumbs.db": b"x", "train/n01/images/": b""}
    write_zip(files | {f"tiny-imagenet-200/{name}": content for name, content in junk.items()})
    write_tree(files | {f"tiny-imagenet-200/{n}": b for n, b in junk.items() if b}, "raw")
    Path("raw/tiny-imagenet-200/train").rename("elsewhere")  # on a larger disk
    Path("raw/tiny-imagenet-200/train").symlink_to(Path("elsewhere").absolute())
    Path("with_zip").mkdir()
    shutil.copy("tiny.zip", "with_zip/tiny-imagenet-200.zip")
    data = dataset.main([*TINY, raw])
    for c, wnid in enumerate(("n01", "n02", "n03", "n04")):
        own = [pixels(content) for name, content in files.items() if f"/{wnid}/images/" in name]
        assert bag(data.train[c], data.val[c]) == bag(own)
        names = [f"tiny-imagenet-200/val/images/val_{10 * i + c}.JPEG" for i in range(3)]
        assert bag(data.test[c]) == bag([pixels(files[name]) for name in names])
    assert bag(data.pool) == bag([pixels(b) for name, b in files.items() if "200/test" in name])
    assert (data.pad, data.image_size) == (8, (64, 64))
    assert data.order == np.random.RandomState(1993).permutation(4).tolist()
    # two classes are called fish: those have their ids
    assert data.names == {0: "n01", 1: "cat", 2: "n03", 3: "dog"}
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("changes, word", BAD_TINY.values(), ids=BAD_TINY)
def test_errors_name_the_bad_file_in_tiny_imagenet(changes, word, packed):
    files = tiny_files() | {f"tiny-imagenet-200/{name}": own for name, own in changes.items()}
    files = {name: content for name, content in files.items() if content is not None}
    write_zip(files) if packed else write_tree(files)
    raw = "tiny.zip" if packed else "tiny-imagenet-200"
    check_rejected(lambda: dataset.main([*TINY, raw]), word)


def test_archives_that_are_none_or_unpack_to_too_much(monkeypatch):
    for content in (b"", b"text", "cut"):
        write_zip(tiny_files())
        Path("tiny.zip").write_bytes(
            Path("tiny.zip").read_bytes()[:-500] if content == "cut" else content
        )
        check_rejected(lambda: dataset.main([*TINY, "tiny.zip"]), "tiny.zip")
    write_zip(tiny_files())
    write_cifar()
    name = as_pool("deflated.npz")
    monkeypatch.setattr("datasets.files.MAX_UNPACKED", 20000)
    monkeypatch.setattr("datasets.pool.MAX_UNPACKED", 20000)
    check_rejected(lambda: dataset.main([*TINY, "tiny.zip"]), "tiny.zip", "20,000")
    check_rejected(lambda: dataset.main([*POOL, name]), name, "20,000")


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
    assert read_meta()["source"] == os.path.realpath("mine")


def test_links_and_subfolders_are_followed_and_the_rest_is_counted(capsys):
    """Also a link to a folder above, which would have no end, and names in two forms."""
    write_folder(("a", "b"))
    write_folder(("cafe\N{COMBINING ACUTE ACCENT}",), tests=0)
    write_folder(("caf\N{LATIN SMALL LETTER E WITH ACUTE}",), train=0)
    write_folder((), pool=3, folder="more")
    write_tree({"train/a/deep/er/x.png": encode(noise(1)), "train/a/y.HEIC": b"x"}, "mine")
    write_tree(
        {"val/a/0.png": encode(noise(2)), "train/b/no_suffix": b"x", ".x/y.png": b""}, "mine"
    )
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
    kinds += ["1 in val (mine/val/a/0.png)", "1 without suffix (mine/train/b/no_suffix)"]
    assert all(kind in line for kind in kinds)


def test_without_test_images_a_fifth_is_held_out(capsys):
    files = write_folder(train=10, tests=0)
    data = dataset.main(MINE)
    assert "a fifth" in capsys.readouterr().out
    assert [len(data.test[c]) for c in range(4)] == [2] * 4
    assert [len(data.train[c]) + len(data.val[c]) for c in range(4)] == [8] * 4
    own = (data.test, data.train, data.val)
    assert len(bag(*(images for split in own for images in split.values()))) == len(files)


def removed(name):
    return lambda: shutil.rmtree(f"mine/{name}")


def flat(split):
    shutil.rmtree(f"mine/{split}")
    write_tree({f"{split}/1.png": encode(noise(1))}, "mine")


def empty(name, left=0):
    for path in sorted(Path("mine", name).iterdir())[left:]:
        path.unlink()


def broken(content):
    return lambda: Path("mine/train/c d/5.PNG").write_bytes(content)


BAD_FOLDERS = {
    "class without images": (lambda: empty("train/a"), "", "mine/train/a"),
    "class without tests": (removed("test/e"), "", "mine/test/e"),
    "class of tests alone": (removed("train/e"), "--classifiers 1", "'e'"),
    "no train": (removed("train"), "", "mine/train"),
    "flat train": (lambda: flat("train"), "", "a folder of images for each class"),
    "flat test": (lambda: flat("test"), "", "into such folders"),
    "few images": (lambda: empty("train/b", 9), "", "class b has 9"),
    "tasks that do not divide": (None, "--classifiers 3", "--classifiers 3"),
    "no image": (broken(b"text"), "", "mine/train/c d/5.PNG"),
    "an image cut": (broken(encode(noise(1), "JPEG")[:400]), "", "mine/train/c d/5.PNG"),
    "floats": (broken(encode(noise(1, mode="L").convert("F"), "TIFF")), "", "mine/train/c d/5.PNG"),
}


@pytest.mark.parametrize("damage, flags, word", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_errors_in_a_folder_of_images(damage, flags, word):
    write_folder()
    if damage:
        damage()
    check_rejected(lambda: dataset.main([*MINE, *flags.split()]), word)


def test_another_source_or_a_changed_one_is_noticed(monkeypatch):
    write_folder(pool=1)
    dataset.main(MINE)
    for again in ("mine/", "./mine", str(Path("mine").absolute())):
        assert len(dataset.main([*FOLDER, "--source", again]).pool) == 1
    write_folder(folder="other/mine")
    with monkeypatch.context() as patch:
        patch.chdir("other")
        call = [*FOLDER[:3], "../set", "--source", "mine"]
        check_error(lambda: dataset.main(call), "--source mine", "../set")
        dataset.main([*FOLDER[:3], "../set", "--source", "../mine"])
    write_tree({"train/a/new.png": encode(noise(5))}, "mine")
    check_rejected(lambda: dataset.main(MINE), "--source mine", "images have changed", "set")
    assert len(dataset.main(FOLDER).names) == 4
    write_folder(("f",))
    check_rejected(lambda: dataset.main([*MINE, "--classifiers", "5"]), "classes have changed")


def test_a_folder_without_a_pool_is_for_no_teaching(capsys):
    write_folder()
    assert len(dataset.main(MINE).pool) == 0
    assert "--no_teaching" in capsys.readouterr().out
    assert not Path("set/folder_pool.npy").exists()
    check_rejected(lambda: load(*FOLDER), "--no_teaching", "--unlabeled")
    assert len(load(*FOLDER, no_teaching=True).pool) == 0


# ------------------------------------------------------------------------------ image files


ORIENTATION = b"\x01\x12\0\3\0\0\0\1\0\6\0\0"
ODD_TAG = b"\x01\x01\0\2\0\0\0\1x\0\0\0"  # a height that is a text: Pillow cannot write it again


def lying_down(tag=b""):
    """A JPEG that is stored lying on its side: upright, its upper half is white.

    tag: one more of its EXIF tags.
    """
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32] = 255
    tags = [ORIENTATION, tag] if tag else [ORIENTATION]
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0" + bytes([len(tags)]) + b"".join(tags) + bytes(4)
    return encode(Image.fromarray(image), "JPEG", exif=exif, quality=95)


def palette():
    """A palette PNG: the upper half is transparent, though red, the lower half black."""
    image = Image.new("P", (20, 20), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.paste(0, (0, 0, 20, 10))
    return encode(image, transparency=0)


def wide():
    image = Image.new("RGB", (60, 20), "red")
    image.paste("white", (20, 0, 40, 10))
    image.paste("black", (20, 10, 40, 20))
    return encode(image)


def with_text():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    return encode(Image.fromarray(pixels(wide())), pnginfo=info)


@pytest.mark.parametrize(
    "make", [lying_down, lambda: lying_down(ODD_TAG), palette, wide, with_text]
)
def test_the_upper_half_is_white(make):
    """Upright by EXIF, transparent as white, the center square, with long or odd metadata."""
    Path("x.png").write_bytes(make())
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


def as_pool(form):
    """Write IMAGES as a pool in this form; returns its name."""
    if form == "folder":
        write_tree(
            {f"pool/{i % 2}/{i}.PNG": encode(Image.fromarray(x)) for i, x in enumerate(IMAGES)}
        )
        return "pool"
    {
        "npy": lambda: np.save("pool.npy", IMAGES),
        "npz": lambda: np.savez("pool.npz", IMAGES),
        "deflated.npz": lambda: np.savez_compressed("pool.deflated.npz", images=IMAGES),
        "pkl": lambda: Path("pool.pkl").write_bytes(
            pickle.dumps({"data": IMAGES, "label": IMAGES})
        ),
    }[form]()
    return f"pool.{form}"


@pytest.mark.parametrize("form", ["npy", "npz", "deflated.npz", "pkl", "folder"])
def test_a_pool_comes_in_several_forms(form):
    write_cifar()
    shutil.rmtree("raw/cifar-100-python")  # not needed then
    name = as_pool(form)
    assert bag(dataset.main([*POOL, name]).pool) == bag(IMAGES)
    assert read_meta()["unlabeled"] == [os.path.realpath(name)]
    assert len(dataset.main([*POOL, f"./{name}"]).pool) == 7
    check_error(lambda: dataset.main([*POOL, "other.npy"]), "--unlabeled", "set")


def test_pools_are_joined_resized_and_deduplicated(capsys):
    official, _ = write_cifar()
    as_pool("npy")
    own = [official[split][c] for split, c in (("train", 1), ("train", 2), ("test", 3))]
    np.save("more.npy", np.concatenate([IMAGES[:2], *own, IMAGES[6:]]))
    wide = np.repeat(np.arange(2, dtype=np.uint8), 40 * 80 * 3).reshape(2, 40, 80, 3)
    np.save("wide.npy", wide)
    data = dataset.main([*POOL, "pool.npy", "more.npy", "wide.npy"])
    assert np.array_equal(data.pool[:7], IMAGES)
    assert [int(image.float().mean()) for image in data.pool[7:]] == [0, 1]
    assert read_meta()["dropped"] == {"equal": 50, "repeated": 3}
    out = capsys.readouterr().out
    assert "62 images, less 50 that are also in the dataset and 3 duplicates" in out
    assert "40x80, resized to 32x32" in out


BAD_POOL_FILES = {
    "missing": ("x.npy", lambda: None),
    "an empty folder": ("empty", lambda: Path("empty").mkdir()),
    "floats": ("x.npy", lambda: np.save("x.npy", IMAGES / 255)),
    "two arrays": ("x.npz", lambda: np.savez("x.npz", IMAGES, IMAGES)),
    "objects in npz": ("x.npz", lambda: np.savez("x.npz", np.array([None]))),
    "channels first": ("x.npz", lambda: np.savez("x.npz", IMAGES.transpose(0, 3, 1, 2))),
    "cut": ("x.npz", lambda: (np.savez("x.npz", IMAGES), os.truncate("x.npz", 9000))),
    "hostile": ("x.pkl", lambda: Path("x.pkl").write_bytes(pickle.dumps(Hostile()))),
}


@pytest.mark.parametrize("name, make", BAD_POOL_FILES.values(), ids=BAD_POOL_FILES)
def test_a_bad_pool(name, make):
    write_cifar()
    make()
    check_rejected(lambda: dataset.main([*POOL, name]), name)


def test_a_pool_of_the_dataset_itself():
    official, _ = write_cifar()
    np.save("pool.npy", official["train"][1])
    check_rejected(lambda: dataset.main([*POOL, "pool.npy"]), "--unlabeled pool.npy")


# ------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("place", ["deep/set", "empty", "link", "."])
def test_a_dataset_is_written_into_its_folder(place, monkeypatch):
    """Whatever it is: a mount point or a link could not be renamed over."""
    write_folder(folder="mine", pool=1)
    for name in ("empty", "larger_disk"):
        Path(name).mkdir()
    Path("link").symlink_to("larger_disk")
    source = str(Path("mine").absolute())
    if place == ".":
        monkeypatch.chdir("empty")
    data = dataset.main([*FOLDER[:3], place, "--source", source])
    assert Path(place, "folder_train.npz").exists() and len(data.pool) == 1
    again = dataset.main([*FOLDER[:3], place])
    assert again.fingerprint() == data.fingerprint()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["numpy.savez", "numpy.save", "os.replace"])
def test_an_unfinished_preparation_is_no_dataset(monkeypatch, step, error):
    """Nor does it hinder the next one, which leaves nothing of it."""
    write_cifar()
    dataset.main(["--data", "whole", "--raw", "raw"])
    real, calls = np.savez, []

    def die(*args, **options):
        if step == "numpy.savez" and len(calls) < 2:  # it dies at the third file
            calls.append(real(*args, **options))
            return
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(step, die)
        if isinstance(error, OSError):
            check_error(lambda: dataset.main(CIFAR), "--data set", "No space left")
            assert os.listdir("set") == [".lock"]
        else:
            with pytest.raises(KeyboardInterrupt):
                dataset.main(CIFAR)
            assert not Path(META).exists()
    check_error(lambda: load("--data", "set"), "--data set", "python dataset.py")
    dataset.main(CIFAR)
    assert {n.removeprefix("set/") for n in tree("set")} == {n[6:] for n in tree("whole")}
    assert load("--data", "set").fingerprint() == load("--data", "whole").fingerprint()


def test_of_two_preparations_at_once_the_first_counts(monkeypatch):
    write_cifar()
    dataset.main(["--data", "first", "--raw", "raw", "--seed", "5"])
    write = prepare.write_set

    def late(folder, *rest):
        shutil.copytree("first", folder)
        write(folder, *rest)

    monkeypatch.setattr(prepare, "write_set", late)
    dataset.main(CIFAR)
    assert read_meta()["seed"] == 5


def test_a_folder_with_other_content_is_left_alone():
    write_cifar()
    write_tree({"set/thesis.tex": b"all of it", "file": b"a file", "set/cifar10_val.npz": b""})
    check_rejected(lambda: dataset.main(CIFAR), "--data set", "thesis.tex")
    check_rejected(lambda: dataset.main(["--data", "file", "--raw", "raw"]), "--data file")
    check_rejected(lambda: dataset.main(["--data", "file/x", "--raw", "raw"]), "--data file/x")


# ------------------------------------------------------------------------------ published files


def test_published_files_are_read_as_they_are():
    content = write_published()
    before = tree()
    data = load("--data", "published")
    for split, file in zip(SPLITS, FILES):
        found = getattr(data, split)
        assert all(np.array_equal(found[c], content[file][c]) for c in range(10))
    assert np.array_equal(data.pool, content["80m_150k"]["data"])
    assert data.order == [9, 8, 7, 1, 5, 0, 3, 4, 6, 2]
    dataset.main(["--data", "published"])
    assert set(tree()) - set(before) == {"published/preview.png"}
    for flags in ("--unlabeled pool.npy", "--per_class 10", "--seed 1"):
        call = ["--data", "published", *flags.split()]
        line = check_rejected(lambda call=call: dataset.main(call), flags.split()[0], "published")
        assert "remove published" not in line  # they can be had no more


SPLIT = {c: random_images(3, c) for c in range(10)}
BAD_SPLITS = {
    "missing": None,
    "hostile": Hostile(),
    "a class missing": {c: SPLIT[c] for c in range(9)},
    "floats": SPLIT | {3: SPLIT[3].astype(np.float32)},
    "channels first": SPLIT | {3: SPLIT[3].transpose(0, 3, 1, 2)},
    "other size": SPLIT | {3: random_images(3, 3, side=16)},
    "too small": {c: random_images(3, c, side=8) for c in range(10)},
    "no dict": SPLIT[0],
}


@pytest.mark.parametrize("file", [*FILES, "80m_150k"])
@pytest.mark.parametrize("content", BAD_SPLITS.values(), ids=BAD_SPLITS)
def test_a_bad_published_file(file, content):
    write_published()
    path = Path(f"published/cifar10_{file}.pkl")
    path.unlink()
    if content is not None:
        path.write_bytes(pickle.dumps(content))
    check_rejected(lambda: load("--data", "published"), "published")
    assert not Path("done").exists()


# ------------------------------------------------------------------------------ prepared files


def cut(name):
    return lambda: os.truncate(f"set/{name}", os.path.getsize(f"set/{name}") // 2)


def flip(name):
    """A byte in the middle changes."""

    def damage():
        content = bytearray(Path("set", name).read_bytes())
        content[len(content) // 2] ^= 255
        Path("set", name).write_bytes(content)

    return damage


def put_val(arrays):
    return lambda: np.savez("set/cifar10_val.npz", **{str(c): own for c, own in arrays.items()})


def put_meta(**changes):
    return lambda: Path(META).write_text(json.dumps(read_meta() | changes))


DAMAGES = {
    "another dataset": (put_meta(dataset="cifar100"), "--dataset cifar100"),
    "train damaged": (flip("cifar10_train.npz"), "cifar10_train.npz"),
    "test missing": (lambda: os.unlink("set/cifar10_test.npz"), "cifar10_test.npz"),
    "pool cut": (cut("cifar10_pool.npy"), "cifar10_pool.npy"),
    "pool of another size": (
        lambda: np.save("set/cifar10_pool.npy", random_images(4, 4, 16)),
        "[16",
    ),
    "a class missing": (put_val({c: SPLIT[c] for c in range(9)}), "class 9"),
    "a class of objects": (put_val(SPLIT | {3: np.array([None])}), "cifar10_val.npz"),
    "meta cut": (cut("meta.json"), "meta.json"),
}


def test_a_damaged_prepared_dataset():
    write_cifar(train=10, tests=1)
    dataset.main(["--data", "whole", "--raw", "raw"])
    for damage, word in DAMAGES.values():
        shutil.rmtree("set", ignore_errors=True)
        shutil.copytree("whole", "set")
        damage()
        check_rejected(lambda: load("--data", "set"), "set", word)


BAD_FLAGS = [
    ("--dataset mnist", "--dataset"),
    ("--dataset digits --data set", "--data"),
    ("--dataset digits --per_class 20", "--per_class"),
    ("--dataset folder", "python dataset.py --dataset folder"),
    ("--dataset folder --raw raw --source raw", "--raw"),
    ("--data new --source raw", "--source"),
    ("--data new --raw nowhere", "--raw nowhere"),
    ("--data new --raw raw --unlabeled nowhere.npy", "nowhere.npy"),
    ("--data new --raw raw --per_class 3", "--per_class"),
    ("--data new --raw raw --pool_size 0", "--pool_size"),
    ("--data new --raw raw --classifiers 6", "--classifiers 6"),
    (f"--data new --raw {5000 * 'x'}", "--raw"),
]


@pytest.mark.parametrize("argv, word", BAD_FLAGS)
def test_bad_flags(argv, word):
    write_cifar()
    check_rejected(lambda: dataset.main(argv.split()), word)


@pytest.mark.parametrize("argv", ["--data nowhere", "--data empty", "--data file",
                                  "--dataset folder", "--dataset folder --data empty"])  # fmt: skip
def test_a_script_says_how_to_prepare_what_is_not_there(argv):
    Path("empty").mkdir()
    Path("file").write_text("no folder")
    check_rejected(lambda: load(*argv.split()), "python dataset.py --dataset")
