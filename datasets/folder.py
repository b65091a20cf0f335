"""Any images of your own: a folder with train/<class>/, test/<class>/ and unlabeled/."""

import hashlib
import os
import unicodedata
from pathlib import Path

from datasets.images import list_images
from datasets.spec import RawSet
from runtime.errors import UserError


def normalize_name(name):
    """A class name in which an accented letter is one code point; in file names it may be two."""
    return unicodedata.normalize("NFC", name)


def list_classes(source):
    """The names of the class folders in --source, sorted. Raises UserError if there are none."""
    train = Path(source, "train")
    found = train.iterdir() if os.path.isdir(train) else ()
    names = {normalize_name(p.name) for p in found if p.is_dir() and not p.name.startswith(".")}
    if not names:
        raise UserError(f"--source {source}: put a folder of images for each class into {train}")
    return sorted(names)


def read(source, download, with_pool):
    """Names of files. Without a folder test/ the test split is empty."""
    label, names = f"--source {source}", list_classes(source)
    splits = {split: {name: [] for name in names} for split in ("train", "test")}
    pool, left_out, listing = [], {}, hashlib.sha256()
    files = list_images(source, left_out)
    for file, path in files.items():
        top, *folders, _ = file.split("/")
        if top == "unlabeled":
            pool.append(file)
        elif top in splits and folders:
            name = normalize_name(folders[0])
            if name not in names:
                raise UserError(f"{label}: test has a class {name!r} that train lacks; remove it")
            splits[top][name].append(file)
        else:
            kind = f"in {top}" if folders else "in no folder of a class"
            left_out.setdefault(kind, []).append(path)
            continue
        listing.update(f"{file} {path.stat().st_size}\n".encode(errors="surrogateescape"))
    if not any(splits["test"].values()):
        if (source / "test").is_dir():
            raise UserError(
                f"{label}: test has no folder of images for each class; sort them into such "
                f"folders, or remove test to hold out some training images"
            )
        del splits["test"]
    for split, by_class in splits.items():
        if empty := [name for name, own in by_class.items() if not own]:
            folder = source / split / empty[0]
            raise UserError(f"{label}: {folder} has no image; add some, or remove the class")
    train, test = (dict(enumerate(splits.get(s, {}).values())) for s in ("train", "test"))
    return RawSet(train, test, dict(enumerate(names)), pool, files, left_out, listing.hexdigest())
