"""CIFAR-10 and CIFAR-100; the pool of each is the training images of the other.

Their files are pickles, read by the project's own reader, which runs no code that they may hold.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from datasets.images import download_file
from datasets.spec import RawSet
from runtime.errors import UserError, explain
from runtime.files import load_pickle


def read(name, other, path, download, with_pool):
    """name, other: of torchvision's classes. The rest, and what it returns: see DatasetSpec."""
    train, test, names = read_official(name, path, download)
    by_class = [{c: x[y == c] for c in range(len(names))} for x, y in (train, test)]
    pool = read_official(other, path, download)[0][0] if with_pool else ()
    return RawSet(*by_class, dict(enumerate(names)), pool)


def read_official(name, path, download):
    """Training and test split, each (uint8 [n,32,32,3], labels int64 [n]), and the class names.

    path: holds the archive or the folder that it unpacks to, or is that folder.
    """
    from torchvision import datasets  # slow: it doubles the start time

    official = getattr(datasets, name)
    for folder in (path / official.base_folder, path.parent / official.base_folder):
        if folder.is_dir():
            return read_folder(official, folder)
    archive = path / official.filename
    if download:
        download_file(official.url, archive, official.tgz_md5)
    if not archive.is_file():
        wanted = f"{official.filename} nor {official.base_folder}"
        raise UserError(f"--raw {path}: has neither {wanted}; put one there, or give --unlabeled")
    with tempfile.TemporaryDirectory() as unpacked:  # `path` may be read-only
        with explain(archive, "cannot be unpacked"):
            shutil.unpack_archive(archive, unpacked, filter="data")
        return read_folder(official, Path(unpacked, official.base_folder))


def read_folder(official, folder):
    """See read_official; official: a torchvision class."""
    with explain(folder, "is not as published", "; get a new copy"):
        lists = official.train_list, official.test_list
        splits = [read_batches([folder / name for name, _ in files]) for files in lists]
        meta = load_pickle(folder / official.meta["filename"])
        return *splits, meta[official.meta["key"]]


def read_batches(paths):
    """Images uint8 [n,32,32,3] and labels int64 [n] of some batch files."""
    batches = [load_pickle(path) for path in paths]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    labels = [batch["labels"] if "labels" in batch else batch["fine_labels"] for batch in batches]
    return images, np.concatenate(labels)
