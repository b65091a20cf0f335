"""prepare.py: Tiny-ImageNet, CIFAR-100, folders of images, pools; class orders; --no_teaching.

All on small files in the real formats, which the tests make themselves.
"""

import importlib
import io
import json
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import test_dataset
import torch
from PIL import Image
from test_dataset import bag, load, official, random_images, refused, tree  # noqa: F401

import dataset
import main_CIL
import main_train
import prepare
import test as test_script
import utils
from utils import Refusal

downloads = test_dataset.downloads  # no test may reach the network
WNIDS = ["n03", "n01", "n04", "n02"]
TINY = ["--dataset", "tiny_imagenet", "--data", "set", "--classifiers", "2"]
FOLDER = ["--dataset", "folder", "--data", "set"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def noise(seed, side=64, mode="RGB"):
    """A smooth random image, which survives JPEG."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, bands), dtype=np.uint8)
    image = Image.fromarray(small.squeeze(-1) if bands == 1 else small)
    return image.resize((side, side), Image.Resampling.BILINEAR)


def jpeg(seed, mode="RGB", side=64):
    file = io.BytesIO()
    noise(seed, side, mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def pixels(content):
    """What Pillow makes of the bytes of an image."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


# ------------------------------------------------------------------------------ Tiny-ImageNet


def tiny_files(per_class=12, tests=3, pool=5):
    """{name: bytes} as in tiny-imagenet-200.zip, of four classes; some JPEGs are greyscale."""
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


def write_zip(files, path="tiny.zip"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tree(files, folder="."):
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_entries_of_folders_in_an_archive_are_no_images():
    files = tiny_files()
    folders = {f"{parent}/": b"" for name in files for parent in list(Path(name).parents)[:-1]}
    assert "tiny-imagenet-200/train/n01/images/" in folders
    write_zip({f"inner/{name}": content for name, content in (folders | files).items()})
    check_tiny(dataset.main([*TINY, "--raw", "tiny.zip"]), files)


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


def test_tiny_imagenet_has_ten_tasks_of_twenty():
    args = utils.make_parser("words", "run").parse_args(["--dataset", "tiny_imagenet"])
    dataset.complete(args)
    assert (args.classifiers, args.classes_per_classifier) == (10, 20)
    args = utils.make_parser("words", "run").parse_args(["--dataset", "cifar100"])
    dataset.complete(args)
    assert (args.classifiers, args.classes_per_classifier) == (10, 10)


def test_greyscale_jpegs_are_grey_in_all_channels():
    write_zip(tiny_files())
    data = dataset.main([*TINY, "--raw", "tiny.zip"])
    for images in (*data.train.values(), *data.test.values()):
        grey = (images == images[..., :1]).all(-1).all(-1).all(-1)
        assert 0 < int(grey.sum()) < len(images)


def test_several_processes_decode_the_same(monkeypatch):
    write_zip(tiny_files())
    one = dataset.main([*TINY, "--raw", "tiny.zip"])
    monkeypatch.setattr(prepare, "FEW", 0)
    several = dataset.main([*TINY[:3], "other", *TINY[4:], "--raw", "tiny.zip"])
    assert dataset.fingerprint(one) == dataset.fingerprint(several)


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
def test_bad_tiny_imagenet_is_refused_by_name(monkeypatch, damage, word, packed, several):
    if several:
        monkeypatch.setattr(prepare, "FEW", 0)
    files = tiny_files()
    damage(files)
    write_zip(files) if packed else write_tree(files)
    before = tree()
    raw = "tiny.zip" if packed else "tiny-imagenet-200"
    refused(lambda: dataset.main([*TINY, "--raw", raw]), word, raw)
    assert tree() == before


@pytest.mark.parametrize("content", [b"", b"text", write_zip])
def test_a_raw_file_that_is_no_archive_is_refused(content):
    if callable(content):
        write_zip(tiny_files())
        content = Path("tiny.zip").read_bytes()[:-500]
    Path("tiny.zip").write_bytes(content)
    before = tree()
    refused(lambda: dataset.main([*TINY, "--raw", "tiny.zip"]), "tiny.zip")
    assert tree() == before


def test_an_archive_writes_nowhere():
    """Names that climb out of the folder are looked at as names alone."""
    files = tiny_files()
    files["../../escaped.JPEG"] = jpeg(0)
    write_zip(files)
    dataset.main([*TINY, "--raw", "tiny.zip"])
    assert sorted(os.listdir()) == ["set", "tiny.zip"]


def test_a_file_of_an_archive_may_not_become_any_size(monkeypatch):
    files = tiny_files()
    name = "tiny-imagenet-200/train/n02/images/n02_3.JPEG"
    files[name] += bytes(2**20)
    write_zip(files)
    monkeypatch.setattr(prepare, "MEMBER", 2**20)
    refused(lambda: dataset.main([*TINY, "--raw", "tiny.zip"]), "n02_3.JPEG", "MiB")


def test_without_network_the_user_is_told_where_to_put_the_archive(downloads):  # noqa: F811
    refused(lambda: load("--dataset", "tiny_imagenet"), "tiny-imagenet-200.zip", "data/raw")
    assert not [path for path in Path(".").rglob("*") if path.is_file()]


def test_fewer_classes_than_asked_for_are_told():
    write_zip(tiny_files())
    dataset.main([*TINY, "--raw", "tiny.zip"])
    assert load(*TINY[:4]).classifiers == 2  # its own tasks: two of two
    call = [*TINY[:4], "--classifiers", "2", "--classes_per_classifier", "3"]
    refused(lambda: load(*call), "--classifiers 2", "4 classes")
    assert load(*TINY[:4], "--classifiers", "1", "--classes_per_classifier", "3").order


def test_a_class_of_tiny_imagenet_with_few_images_is_refused():
    """With less than five none would be left for val, and the set could not be read."""
    write_zip(tiny_files(per_class=4))
    before = tree()
    refused(lambda: dataset.main([*TINY, "--raw", "tiny.zip"]), "tiny.zip", "class n01", "10")
    assert tree() == before


def noted(source, name, side):
    """In the place of prepare.picture: leaves a file for the process that it runs in."""
    (Path(source) / str(os.getpid())).touch()
    time.sleep(0.01)
    return np.full((side, side, 3), int(name), np.uint8)


def test_more_than_one_process_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "FEW", 0)
    monkeypatch.setattr(prepare, "picture", noted)
    found = prepare.decode(tmp_path, {"pool": np.arange(128).astype(str)}, 2)["pool"]
    assert found[:, 0, 0, 0].tolist() == [*range(128)]
    processes = {int(path.name) for path in tmp_path.iterdir()}
    assert len(processes) > 1 and os.getpid() not in processes


def test_a_process_that_is_ended_from_outside_is_told(monkeypatch):
    write_zip(tiny_files())
    monkeypatch.setattr(prepare, "FEW", 0)
    monkeypatch.setattr(prepare, "picture", die)
    before = tree()
    refused(lambda: dataset.main([*TINY, "--raw", "tiny.zip"]), "tiny.zip", "memory")
    assert tree() == before


def die(*args, **options):
    os._exit(9)


# ------------------------------------------------------------------------------ CIFAR-100


def test_cifar100_has_the_training_images_of_cifar10_for_its_pool(official):  # noqa: F811
    call = ["--dataset", "cifar100", "--data", "set", "--raw", "raw"]
    call += ["--classifiers", "1", "--classes_per_classifier", "2"]
    data = dataset.main(call)
    assert bag(data.pool) == bag(official.cifar10.sets[True].data)
    assert bag(*data.test.values()) == bag(official.cifar100.sets[False].data)
    assert data.mean.flatten().tolist() == pytest.approx([0.5071, 0.4866, 0.4409])
    assert json.loads(Path("set/meta.json").read_text())["pool"] == "CIFAR-10 training images"


def test_a_set_of_the_earlier_form_is_read(official):  # noqa: F811
    dataset.main(["--data", "set", "--raw", "raw"])
    path = Path("set/meta.json")
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({k: meta[k] for k in ("dataset", "names", "pool", "per_class")}))
    assert len(load("--data", "set").pool) == 40
    assert len(dataset.main(["--data", "set"]).pool) == 40


# ------------------------------------------------------------------------------ folders


def palette_with_transparency():
    """A palette PNG, 20x20: the left half is red, the right half transparent."""
    image = Image.new("P", (20, 20), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (10, 0, 20, 20))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=1)
    return file.getvalue()


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey16():
    """A 16-bit greyscale PNG, half of full brightness."""
    return encoded(Image.fromarray(np.full((16, 16), 32768, np.uint16)), "PNG")


def sideways():
    """A JPEG that is stored lying on its side: upright, its upper half is white."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)


def image_folder(classes=("b", "a", "c d", "e"), train=16, tests=2, pool=0, folder="mine"):
    """A source with images of several formats; returns {name: bytes}."""
    kinds = (("png", "PNG"), ("JPG", "JPEG"), ("bmp", "BMP"), ("TIFF", "TIFF"), ("gif", "GIF"))
    files = {}
    for c, name in enumerate(classes):
        for part, count in (("train", train), ("test", tests)):
            for i in range(count):
                ending, kind = kinds[i % len(kinds)]
                image = noise([c, i, count], 40)
                files[f"{part}/{name}/{i}.{ending}"] = encoded(image, kind)
    for i in range(pool):
        files[f"unlabeled/deep/{i}.png"] = encoded(noise([77, i], 50), "PNG")
    write_tree(files, folder)
    return files


def test_a_folder_of_images_becomes_a_set(capsys):
    image_folder(pool=6)
    write_tree(
        {"train/a/notes.txt": b"no image", "train/a/.hidden.png": b"", ".git/x": b""}, "mine"
    )
    data = dataset.main([*FOLDER, "--source", "mine"])
    assert data.names == {0: "a", 1: "b", 2: "c d", 3: "e"}
    assert (data.classifiers, data.classes_per_classifier, data.pad) == (2, 2, 4)
    counts = [[len(getattr(data, part)[c]) for c in range(4)] for part in test_dataset.PARTS]
    assert counts == [[14] * 4, [2] * 4, [2] * 4, [14] * 4]
    assert data.pool.shape == (6, 32, 32, 3)
    assert "4 classes, 2 tasks of 2" in capsys.readouterr().out
    again = load(*FOLDER)
    assert dataset.fingerprint(again) == dataset.fingerprint(data)
    stored = np.concatenate([np.asarray(images) for images in data.train.values()]) / 255
    assert again.mean.flatten().numpy() == pytest.approx(stored.mean((0, 1, 2)), abs=1e-5)
    assert again.std.flatten().numpy() == pytest.approx(stored.std((0, 1, 2)), abs=1e-5)
    meta = json.loads(Path("set/meta.json").read_text())
    assert (meta["source"], meta["image_size"], meta["dropped"]) == (
        "mine", 32, {"equal": 0, "repeated": 0},
    )  # fmt: skip


@pytest.mark.parametrize("size, pad", [(16, 2), (24, 3), (128, 16)])
def test_images_are_resized_to_the_image_size(size, pad):
    image_folder(pool=1)
    data = dataset.main([*FOLDER, "--source", "mine", "--image_size", str(size)])
    assert data.train[0].shape[1:] == data.pool.shape[1:] == (size, size, 3)
    assert data.pad == pad


def test_images_of_the_right_size_are_taken_as_they_are():
    files = image_folder()
    data = dataset.main([*FOLDER, "--source", "mine", "--image_size", "40"])
    own = [pixels(f) for name, f in files.items() if name.startswith("test/a/")]
    assert bag(data.test[0]) == bag(own)


def one(content, name="x.png", side=16):
    Path(name).write_bytes(content)
    return prepare.picture(".", name, side).astype(int)


def test_what_is_transparent_becomes_white():
    found = one(palette_with_transparency(), side=20)
    assert (found[:, :10] == [255, 0, 0]).all()
    assert (found[:, 10:] == 255).all()
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert (one(encoded(clear, "PNG")) == 255).all()
    assert (one(encoded(Image.new("LA", (20, 20), (0, 0)), "PNG")) == 255).all()
    assert (one(encoded(Image.new("RGB", (20, 20)), "PNG", transparency=(0, 0, 0))) == 255).all()


def test_sixteen_bits_of_grey_are_brought_to_eight():
    assert (one(grey16()) == 128).all()


def test_images_are_turned_upright():
    found = one(sideways(), "x.jpg")
    assert (found[:7] > 240).all()
    assert (found[9:] < 15).all()


def test_the_centre_square_is_taken():
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    assert (one(encoded(image, "PNG")) == [0, 0, 255]).all()
    assert (one(encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG")) == [0, 0, 255]).all()


def test_large_images_are_averaged_not_sampled():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    found = one(encoded(Image.fromarray(stripes), "PNG"))
    assert abs(found - 127.5).max() < 3


@pytest.mark.parametrize(
    "content", [b"", b"text", jpeg(1)[:400], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_a_broken_image_is_named(content):
    image_folder()
    Path("mine/train/c d/5.PNG").write_bytes(content)
    before = tree()
    refused(lambda: dataset.main([*FOLDER, "--source", "mine"]), "mine/train/c d/5.PNG")
    assert tree() == before


def test_an_image_of_too_many_pixels_is_refused(monkeypatch):
    image_folder()
    for most in (1000, 300):  # Pillow warns first, beyond twice as many it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        refused(lambda: dataset.main([*FOLDER, "--source", "mine"]), "mine/", "pixels")
    assert not Path("set").exists()


def test_without_a_test_folder_a_fifth_is_split_off_and_said(capsys):
    files = image_folder(train=20, tests=0)
    data = dataset.main([*FOLDER, "--source", "mine"])
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
@pytest.mark.parametrize("script", [dataset.main, lambda argv: load(*argv)], ids=["main", "load"])
def test_bad_folders_are_refused_and_nothing_is_written(script, damage, flags, word):
    image_folder()
    if damage:
        damage()
    before = tree()
    refused(lambda: script([*FOLDER, "--source", "mine", *flags.split()]), word)
    assert tree() == before


@pytest.mark.parametrize(
    "total, tasks, classes",
    [(4, 2, 2), (10, 5, 2), (20, 10, 2), (100, 10, 10), (200, 10, 20), (9, 3, 3), (22, 2, 11)],
)
def test_tasks_of_a_folder_by_default(total, tasks, classes):
    for c in range(total):
        Path("mine/train", str(c)).mkdir(parents=True)
    args = utils.make_parser("words", "run").parse_args(["--dataset", "folder", "--source", "mine"])
    dataset.complete(args)
    assert (args.classifiers, args.classes_per_classifier) == (tasks, classes)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 13])
def test_classes_that_do_not_divide_are_told(total):
    for c in range(total):
        Path("mine/train", str(c)).mkdir(parents=True)
    args = utils.make_parser("words", "run").parse_args(["--dataset", "folder", "--source", "mine"])
    refused(lambda: dataset.complete(args), f"{total} classes", "--classifiers")


def test_given_one_number_the_other_follows():
    image_folder(pool=1)
    data = dataset.main([*FOLDER, "--source", "mine", "--classifiers", "4"])
    assert (data.classifiers, data.classes_per_classifier) == (4, 1)
    data = load(*FOLDER, "--classes_per_classifier", "4")
    assert (data.classifiers, data.classes_per_classifier) == (1, 4)


def test_a_script_prepares_a_folder_by_itself():
    image_folder(pool=1)
    data = load("--dataset", "folder", "--source", "mine")
    assert data.source == "data/folder"
    refused(lambda: load("--dataset", "folder", "--source", "other"), "mine", "other")
    assert len(load("--dataset", "folder").pool) == 1


@pytest.mark.parametrize("script", [dataset.main, lambda argv: load(*argv)], ids=["main", "load"])
@pytest.mark.parametrize("name", ["mine/", "./mine", "mine//"])
def test_a_source_may_be_spelled_otherwise(script, name):
    image_folder(pool=1)
    for source in (name, "mine", name):
        assert len(script([*FOLDER, "--source", source]).pool) == 1


@pytest.mark.parametrize("argv", ["--dataset folder", "--dataset folder --data set"])
def test_a_folder_that_is_not_named_is_asked_for(argv):
    for script in (load, lambda *argv: dataset.main(argv)):
        refused(lambda script=script: script(*argv.split()), "--source")


@pytest.mark.parametrize(
    "flags",
    [
        "--raw {}",
        "--unlabeled {}",
        "--dataset folder --source {}",
        "--dataset tiny_imagenet --raw {}",
    ],
)
def test_a_name_that_is_too_long_is_refused(flags):
    flags = flags.format(5000 * "x").split()
    for script in (load, lambda *argv: dataset.main(argv)):
        refused(lambda script=script: script(*flags), "xxx")
    assert os.listdir() == []


@pytest.mark.parametrize("flag", ["--source mine", "--image_size 32"])
def test_flags_of_folders_go_with_folders_alone(flag):
    refused(lambda: load("--dataset", "cifar100", *flag.split()), flag)


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
def test_a_damaged_description_is_refused(change):
    image_folder(pool=1)
    dataset.main([*FOLDER, "--source", "mine"])
    path = Path("set/meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(lambda: load(*FOLDER), "set")


# ------------------------------------------------------------------------------ pools

CIFAR = ["--data", "set", "--raw", "raw", "--unlabeled"]
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
        write_tree({f"pool/{i % 2}/{i}.PNG": encoded(Image.fromarray(image), "PNG")})
    return "pool"


@pytest.mark.parametrize("form", [as_npy, as_npz, as_compressed_npz, as_pickle, as_folder])
def test_a_pool_comes_in_several_forms(official, form):  # noqa: F811
    name = form()
    data = dataset.main([*CIFAR, name])
    assert bag(data.pool) == bag(IMAGES)
    assert json.loads(Path("set/meta.json").read_text())["pool"] == name
    assert not official.cifar100.calls


def test_several_pools_are_put_together_and_resized(official, capsys):  # noqa: F811
    as_npy()
    np.save("large.npy", random_images(3, 1, side=64))
    wide = np.repeat(np.arange(2, dtype=np.uint8), 40 * 80 * 3).reshape(2, 40, 80, 3)
    np.save("wide.npy", wide)
    data = dataset.main([*CIFAR, "pool.npy", "large.npy", "wide.npy"])
    assert bag(data.pool[:7]) == bag(IMAGES)
    assert data.pool.shape == (12, 32, 32, 3)
    assert [int(image.float().mean()) for image in data.pool[10:]] == [0, 1]
    assert "64x64, resized to 32x32" in capsys.readouterr().out
    assert len(dataset.main([*CIFAR, "pool.npy", "large.npy", "wide.npy"]).pool) == 12
    refused(lambda: dataset.main([*CIFAR, "pool.npy"]), "--data set", "large.npy")


def test_a_pool_is_the_same_however_its_place_is_written(official):  # noqa: F811
    Path("photos").mkdir()
    Image.fromarray(IMAGES[0]).save("photos/0.png")
    for name in ("a", "b"):
        np.save(f"{name}.npy", IMAGES)
    dataset.main([*CIFAR, "a.npy", "photos/"])
    for places in (["./a.npy", "photos"], [str(Path("a.npy").resolve()), "./photos/"]):
        assert len(dataset.main([*CIFAR, *places]).pool) == len(IMAGES)
    for places in (["b.npy", "photos"], ["photos", "a.npy"], ["a.npy"]):
        refused(lambda places=places: dataset.main([*CIFAR, *places]), "--data set", "a.npy")


def test_a_pool_of_text_is_told_without_the_advice_to_unpickle_it(official):  # noqa: F811
    Path("pool.npy").write_text("no array")
    line = refused(lambda: dataset.main([*CIFAR, "pool.npy"]), "--unlabeled pool.npy", "another")
    assert "pickle" not in line


def test_images_of_the_set_and_repeated_ones_are_dropped_from_the_pool(official, capsys):  # noqa: F811
    cifar10 = official.cifar10.sets
    pool = [IMAGES, cifar10[True].data[:50], IMAGES[:2], cifar10[False].data[:30], IMAGES[6:]]
    np.save("pool.npy", np.concatenate(pool))
    data = dataset.main([*CIFAR, "pool.npy"])
    assert np.array_equal(data.pool.numpy(), IMAGES)
    assert json.loads(Path("set/meta.json").read_text())["dropped"] == {"equal": 80, "repeated": 3}
    assert "90 images, of which 80 equal images of the set and 3" in capsys.readouterr().out


def test_a_pool_of_the_set_itself_is_refused(official):  # noqa: F811
    np.save("pool.npy", official.cifar10.sets[True].data)
    before = tree()
    refused(lambda: dataset.main([*CIFAR, "pool.npy"]), "--unlabeled pool.npy")
    assert tree() == before


def of_bytes(content):
    return lambda: Path("pool.npz").write_bytes(content)


def large_header():
    """An array that says that it has 2**40 images."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 32, 32, 3)}"
    header = header.ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    write_zip({"images.npy": content + bytes(99)}, "pool.npz")


def cut():
    np.savez("pool.npz", IMAGES)
    Path("pool.npz").write_bytes(Path("pool.npz").read_bytes()[:-400])


def flipped():
    np.savez("pool.npz", IMAGES)
    content = bytearray(Path("pool.npz").read_bytes())
    content[9000] ^= 1
    Path("pool.npz").write_bytes(content)


BAD_NPZ = {
    "text": of_bytes(b"text"),
    "nothing": of_bytes(b""),
    "missing": lambda: None,
    "cut": cut,
    "a bit is another": flipped,
    "two arrays": lambda: np.savez("pool.npz", IMAGES, IMAGES),
    "no array": lambda: np.savez("pool.npz"),
    "floats": lambda: np.savez("pool.npz", IMAGES / 255),
    "objects": lambda: np.savez("pool.npz", np.array([None])),
    "channels first": lambda: np.savez("pool.npz", IMAGES.transpose(0, 3, 1, 2)),
    "large header": large_header,
    "no NumPy inside": lambda: write_zip({"a.txt": b"text"}, "pool.npz"),
}


@pytest.mark.parametrize("make", BAD_NPZ.values(), ids=BAD_NPZ)
def test_a_bad_npz_pool_is_refused(official, make):  # noqa: F811
    make()
    before = tree()
    refused(lambda: dataset.main([*CIFAR, "pool.npz"]), "--unlabeled pool.npz")
    assert tree() == before


def test_an_npz_pool_may_not_become_any_size(official, monkeypatch):  # noqa: F811
    as_compressed_npz()
    monkeypatch.setattr(prepare, "UNPACKED", 20000)
    refused(lambda: dataset.main([*CIFAR, "pool.npz"]), "pool.npz", "GiB")


@pytest.mark.parametrize("flags", ["--unlabeled pool.npy", "--per_class 10", "--seed 1"])
def test_flags_of_preparing_do_not_go_with_published_files(flags):
    """Nobody is told to delete those, which can no longer be had."""
    as_npy()
    test_dataset.published()
    before = tree()
    with pytest.raises(Refusal) as refusal:
        dataset.main(["--data", "published", *flags.split()])
    assert flags.split()[0] in str(refusal.value)
    assert "delete" not in str(refusal.value)
    assert tree() == before


def test_a_hostile_pickle_pool_is_refused(official):  # noqa: F811
    Path("pool.pkl").write_bytes(test_dataset.calling("os", "system", "touch done"))
    before = tree()
    refused(lambda: dataset.main([*CIFAR, "pool.pkl"]), "pool.pkl")
    assert tree() == before


def test_a_broken_image_in_a_pool_is_named(official):  # noqa: F811
    as_folder()
    Path("pool/1/9.jpg").write_bytes(b"text")
    refused(lambda: dataset.main([*CIFAR, "pool"]), "pool/1/9.jpg")
    assert not Path("set").exists()


# ------------------------------------------------------------------------------ class order


def args_of(*argv):
    args = utils.make_parser("words", "run").parse_args(argv)
    dataset.complete(args)
    return args


@pytest.mark.parametrize(
    "name, given, order",
    [
        ("cifar10", None, [9, 8, 7, 1, 5, 0, 3, 4, 6, 2]),
        ("cifar10", "published", [9, 8, 7, 1, 5, 0, 3, 4, 6, 2]),
        ("cifar10", "sorted", list(range(10))),
        ("cifar10", "random:1993", np.random.RandomState(1993).permutation(10).tolist()),
        ("digits", None, np.random.RandomState(1993).permutation(10).tolist()),
        ("digits", "published", np.random.RandomState(1993).permutation(10).tolist()),
        ("digits", "random:7", np.random.RandomState(7).permutation(10).tolist()),
        ("cifar100", None, np.random.RandomState(1993).permutation(100).tolist()),
    ],
)
def test_class_orders(name, given, order):
    args = args_of("--dataset", name, *(["--class_order", given] if given else []))
    assert dataset.class_order(args, {}, len(order)) == order


def test_the_order_may_stand_in_a_file(tmp_path):
    Path("order.txt").write_text("\n7\n3\nzero\n 5 \n1\n2\n")
    flags = ["--dataset", "digits", "--class_order", "order.txt"]
    args = args_of(*flags, "--classifiers", "3")
    assert dataset.class_order(args, {0: "zero", 2: "7", 7: "2"}, 10) == [2, 3, 0, 5, 1, 7]
    for mark in ("", "\ufeff"):  # editors of Windows put that before a text
        Path("order.txt").write_text(f"{mark}7\n3\n", "utf-8")
        assert load(*flags, "--classifiers", "1").order == [7, 3]


@pytest.mark.parametrize(
    "text, words",
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
def test_a_bad_order_file_is_refused(text, words):
    if text is not None:
        Path("order.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    call = ["--dataset", "digits", "--class_order", "order.txt"]
    refused(lambda: load(*call), "--class_order order.txt", *words)


@pytest.mark.parametrize(
    "order", ["random", "random:", "random:x", "random:-1", "random:9999999999"]
)
def test_a_bad_order_is_refused(order):
    refused(lambda: load("--dataset", "digits", "--class_order", order), f"--class_order {order}")


SMALL = "--dataset digits --classifiers 2 --width 4 --epochs 1 --batch_size 32 --unlabel_num 1"
SMALL = SMALL.split()


def test_the_order_of_a_run_is_taken_by_the_scripts_that_go_on_with_it(few_digits):
    order = np.random.RandomState(5).permutation(10).tolist()[:4]
    main_CIL.main([*SMALL, "--save_dir", "run", "--class_order", "random:5"])
    assert json.loads(Path("run/results.json").read_text())["class_order"] == order
    check = [*SMALL, "--pretrained", "run/task2_best_model.pt", "--state", "2"]
    accuracy = json.loads(Path("run/results.json").read_text())["states"][1]["accuracy"]
    for flags in ([], ["--class_order", "random:5"]):
        found = test_script.main([*check, *flags])
        assert (found["class_order"], found["states"][0]["accuracy"]) == (order, accuracy)
    refused(lambda: test_script.main([*check, "--class_order", "sorted"]), "--class_order sorted")
    state = utils.read_state("run/task1_best_model.pt")
    weights = {name[:-6]: weight for name, weight in state.items() if weight.ndim == 4}
    ones = {f"{name}weight_mask": torch.ones_like(weight) for name, weight in weights.items()}
    utils.save("ones.pt", ones)
    call = [*SMALL, "--weight", "run/task1_best_model.pt", "--mask", "ones.pt", "--state", "2"]
    call += ["--save_data_path", "run/data"]
    assert main_train.main([*call, "--save_dir", "again"])["class_order"] == order
    # a retrained model elsewhere has its own record beside it
    check[check.index("--pretrained") + 1] = "again/retrain_task2_best_model.pt"
    assert test_script.main([*check, "--pruned"])["class_order"] == order
    # going on with the run: the same order in other words, then another order
    Path("order.txt").write_text("".join(f"{c}\n" for c in order))
    main_CIL.main([*SMALL, "--save_dir", "run", "--class_order", "order.txt"])
    refused(lambda: main_CIL.main([*SMALL, "--save_dir", "run"]), "--class_order")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"config": {"dataset": "digits"}}', "[" * 99999]
    + ['{"config": {"dataset": "digits"}, "class_order": ' + order + "}"
       for order in ("[1, 2]", '"abcd"', "[1, 2, 3, 3]", "[1, 2, 3, 10]", "[1, 2, 3, [4]]")],
)  # fmt: skip
def test_a_record_that_tells_no_order_is_refused(text):
    Path("results.json").write_text(text)
    args = args_of("--dataset", "digits", "--classifiers", "2")
    refused(lambda: dataset.class_order(args, {}, 10, "x.pt"), "results.json", "--class_order")
    args.class_order = "sorted"
    assert dataset.class_order(args, {}, 10, "x.pt") == list(range(10))


def test_the_order_of_another_set_is_not_taken():
    content = {"config": {"dataset": "cifar10"}, "class_order": [1, 2, 3, 4]}
    Path("results.json").write_text(json.dumps(content))
    args = args_of("--dataset", "digits", "--classifiers", "2", "--class_order", "sorted")
    assert dataset.class_order(args, {}, 10, "x.pt") == list(range(10))


# ------------------------------------------------------------------------------ without teaching


def test_without_teaching_nothing_of_the_pool_is_read(official):  # noqa: F811
    dataset.main(["--data", "set", "--raw", "raw"])
    whole = load("--data", "set")
    Path("set/cifar10_pool.npy").unlink()
    data = load("--data", "set", "--no_teaching")
    assert data.pool.shape == (0, 32, 32, 3)
    assert torch.equal(data.train[3], whole.train[3])
    with pytest.raises(Refusal):
        load("--data", "set")


@pytest.mark.parametrize("content", [[IMAGES], {}, {0: [1]}, {0: None, 1: IMAGES}, IMAGES])
def test_without_the_pool_a_published_part_that_does_not_fit_is_refused(content):
    """No pool tells then which shape the images have."""
    test_dataset.published()
    Path("published/cifar10_train.pkl").write_bytes(pickle.dumps(content))
    refused(lambda: load("--data", "published", "--no_teaching"), "published: train")


def test_a_folder_without_pool_is_for_training_without_teaching(capsys):
    image_folder(pool=0)
    assert len(dataset.main([*FOLDER, "--source", "mine"]).pool) == 0
    assert "--no_teaching" in capsys.readouterr().out
    assert sorted(os.listdir("set")) == sorted(
        ["meta.json", "preview.png"] + [f"folder_{p}.npz" for p in test_dataset.FILES]
    )
    refused(lambda: load(*FOLDER), "--no_teaching", "--unlabeled")
    assert len(load(*FOLDER, "--no_teaching").pool) == 0
    assert dataset.main(FOLDER).source == "set"


@pytest.mark.parametrize("script", ["main_CIL", "main_TD", "main_BU"])
def test_scripts_train_without_teaching(few_digits, monkeypatch, script):
    """On a folder without a pool, from start to end; nothing is queried or stored."""
    image_folder(pool=0)
    more = {
        "main_CIL": "",
        "main_TD": "--prune_scheduler 1,1 --iter_epochs 1",
        "main_BU": "--iter_epochs 1 --max_iter_prun 2",
    }
    flags = f"--dataset folder --source mine --data set {' '.join(SMALL[4:])}".split()
    call = [*flags, *more[script].split(), "--save_dir", "run"]
    main = importlib.import_module(script).main
    found = main([*call, "--no_teaching"])
    assert len(found["states"]) >= 2
    assert found["config"]["no_teaching"] is True
    assert not Path("run/data").exists()
    refused(lambda: main(call), "set", "--no_teaching")
    check = [*flags, "--state", "2", "--pretrained", "run/task2_checkpoint.pt"]
    found = test_script.main(check + (["--pruned"] if script == "main_TD" else []))
    assert len(found["states"][0]["accuracy"]) == 2
