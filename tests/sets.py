"""Small data sets in their real formats, and what tests of data sets check alike."""

import io
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
from models import BACKBONES
from runtime import cli
from runtime.errors import UserError

PARTS = ("train", "val", "test", "exemplars")
FILES = ("train", "val", "test", "save_100")

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
    before = tree()
    line = check_error(call, *fragments)
    assert tree() == before
    return line


def tree(folder="."):
    """Everything in a folder: path -> time of change, and content."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(Path(folder).rglob("*"))
    }


def check_table(printed, data, pool):
    """A row for each class in task order: task, class, its name, the counts of the four parts."""
    rows = [line.split() for line in printed.splitlines()]
    start = next(i for i, row in enumerate(rows) if set(PARTS) <= set(row))
    for i, (row, c) in enumerate(zip(rows[start + 1 :], data.order)):
        counts = [str(len(getattr(data, part)[c])) for part in PARTS]
        name = [data.names[c]] if c in data.names else []
        assert row == [str(i // data.classes_per_classifier + 1), str(c), *name, *counts]
    totals = [str(sum(map(len, getattr(data, part).values()))) for part in PARTS]
    assert rows[start + 1 + len(data.order)][-4:] == totals
    assert str(pool) in rows[start + 2 + len(data.order)]


def runs(flags):
    """First and last+1 position of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags, [0]])))
    return list(zip(edges[::2], edges[1::2]))


def check_picture(path, data):
    """A row of images for each task, its classes beside each other, as bright as they are."""
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


# ------------------------------------------------------------------------------ sets


def parse(*argv):
    """The flags of a training script, with the number of tasks filled in."""
    args = cli.training_parser("", "run", dataset.DATASETS, BACKBONES).parse_args(argv)
    dataset.resolve_tasks(args)
    return args


def load(*argv, **options):
    """The data set as a training script loads it."""
    args = parse(*argv)
    cli.finalize_args(args, "run_{}")
    return dataset.load(args, torch.device("cpu"), **options)


def stored(folder):
    """The part files {part: {class: images}} and the pool, read as plain arrays."""
    parts = {}
    for part in FILES:
        with np.load(folder / f"cifar10_{part}.npz", allow_pickle=False) as arrays:
            parts[part] = {int(c): arrays[c] for c in arrays.files}
    return parts, np.load(folder / "cifar10_pool.npy", allow_pickle=False)


def random_images(n, seed, side=32):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def write_published(pickled=pickle.dumps, protocol=4):
    """Write the five published files to published/; returns what they hold."""
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


# ------------------------------------------------------------------------------ image files


def noise(seed, side=64, mode="RGB"):
    """A smooth random image, which survives JPEG."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, bands), dtype=np.uint8)
    image = Image.fromarray(small.squeeze(-1) if bands == 1 else small)
    return image.resize((side, side), Image.Resampling.BILINEAR)


def encode(image, kind, **options):
    """The bytes of a Pillow image in a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(seed, mode="RGB", side=64):
    return encode(noise(seed, side, mode), "JPEG", quality=90)


def pixels(content):
    """What Pillow makes of the bytes of an image."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def write_zip(files, path="tiny.zip"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
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
        for part, count in (("train", train), ("test", tests)):
            for i in range(count):
                suffix, kind = kinds[i % len(kinds)]
                image = noise([c, i, count], 40)
                files[f"{part}/{name}/{i}.{suffix}"] = encode(image, kind)
    for i in range(pool):
        files[f"unlabeled/deep/{i}.png"] = encode(noise([77, i], 50), "PNG")
    write_tree(files, folder)
    return files
