"""Small datasets in their real formats, and what tests of datasets check alike."""

import io
import os
import pickle
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import tree

import dataset
from runtime.args import Parser, add_data_flags
from runtime.errors import UserError

SPLITS = ("train", "val", "test", "exemplars")
FILES = ("train", "val", "test", "save_100")
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10_NAMES += ["dog", "frog", "horse", "ship", "truck"]

# ------------------------------------------------------------------------------ checks


def bag(*arrays):
    """The images of all arrays as a multiset."""
    return Counter(np.asarray(image).tobytes() for images in arrays for image in images)


def check_error(call, *fragments):
    """Check that call() raises a UserError of one line with all fragments; return the line."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    for fragment in fragments:
        assert fragment in line
    return line


def check_rejected(call, *fragments):
    """check_error(), and no file in the current folder has changed; return the line."""
    before = tree(".")
    line = check_error(call, *fragments)
    assert tree(".") == before
    return line


# ------------------------------------------------------------------------------ loading


def parse(*argv, **more):
    """The flags of a script that choose a dataset, with the number of tasks filled in."""
    parser = Parser("")
    add_data_flags(parser, dataset.DATASETS)
    args = Namespace(**vars(parser.parse_args(argv)), **more)
    dataset.resolve_tasks(args)
    return args


def load(*argv, pool=True, splits=SPLITS, known=None, **more):
    """The dataset as a script loads it; more: other attributes of its args."""
    return dataset.load(parse(*argv, **more), torch.device("cpu"), pool, splits, known)


def stored(folder):
    """The splits {split: {class: images}} and the pool of a prepared cifar10, as plain arrays."""
    splits = {}
    for split in FILES:
        with np.load(Path(folder, f"cifar10_{split}.npz"), allow_pickle=False) as arrays:
            splits[split] = {int(c): arrays[c] for c in arrays.files}
    return splits, np.load(Path(folder, "cifar10_pool.npy"), allow_pickle=False)


# ------------------------------------------------------------------------------ sources


class Hostile:
    """Makes a folder `done` when it is unpickled freely."""

    def __reduce__(self):
        return os.mkdir, ("done",)


def random_images(n, seed, side=32):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def write_batch(path, images, labels, key):
    """A batch file as CIFAR's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), key: labels}
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_cifar(train=20, tests=10):
    """Both official sets, in raw/; returns CIFAR-10's {split: {class: images}} and the pool."""
    folder = Path("raw/cifar-10-batches-py")
    labels = {"train": [*range(10)] * train, "test": [*range(10)] * tests}
    images = {split: random_images(len(own), len(own)) for split, own in labels.items()}
    for i in range(5):
        part = slice(i * 2 * train, (i + 1) * 2 * train)
        name = f"data_batch_{i + 1}"
        write_batch(folder / name, images["train"][part], labels["train"][part], "labels")
    write_batch(folder / "test_batch", images["test"], labels["test"], "labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10_NAMES}))
    folder, pool = Path("raw/cifar-100-python"), random_images(40, 77)
    write_batch(folder / "train", pool, [*range(20)] * 2, "fine_labels")
    write_batch(folder / "test", pool[:3], [0, 1, 2], "fine_labels")
    names = {"fine_label_names": [f"fine{c}" for c in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    by_class = {
        s: {c: own[np.array(labels[s]) == c] for c in range(10)} for s, own in images.items()
    }
    return by_class, pool


def noise(seed, side=64, mode="RGB"):
    """A smooth random image, which survives JPEG."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, bands), dtype=np.uint8)
    image = Image.fromarray(small.squeeze(-1) if bands == 1 else small)
    return image.resize((side, side), Image.Resampling.BILINEAR)


def encode(image, kind="PNG", **options):
    """The bytes of a Pillow image in a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content):
    """What Pillow makes of the bytes of an image."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def write_zip(files, path="tiny.zip", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tree(files, folder="."):
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_folder(classes=("b", "a", "c d", "e"), train=16, tests=2, pool=0, folder="mine"):
    """A source with images of several formats; returns {name: bytes}."""
    kinds = (("png", "PNG"), ("JPG", "JPEG"), ("bmp", "BMP"), ("TIFF", "TIFF"), ("gif", "GIF"))
    files = {}
    for c, name in enumerate(classes):
        for split, count in (("train", train), ("test", tests)):
            for i in range(count):
                suffix, kind = kinds[i % len(kinds)]
                image = noise([c, i, count], 40)
                files[f"{split}/{name}/{i}.{suffix}"] = encode(image, kind)
    for i in range(pool):
        files[f"unlabeled/deep/{i}.png"] = encode(noise([77, i], 50))
    write_tree(files, folder)
    return files
