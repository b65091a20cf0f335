"""Any images of your own: a folder with train/<class>/, test/<class>/ and unlabeled/."""

import hashlib
import unicodedata

from datasets.images import list_images
from datasets.spec import RawSet
from runtime.errors import UserError, explain


def normalize_name(name):
    """A class name in which an accented letter is one code point; in file names it may be two."""
    return unicodedata.normalize("NFC", name)


def read(source, download, with_pool):
    """Names of files. Without a folder test/ the test split is empty."""
    label, train = f"--source {source}", source / "train"
    with explain(label):
        found = train.iterdir() if train.is_dir() else ()
        found = [p.name for p in found if p.is_dir() and not p.name.startswith(".")]
    names = sorted({*map(normalize_name, found)})
    if not names:
        raise UserError(f"{label}: put a folder of images for each class into {train}")
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
            left_out.setdefault("in no folder of a class", []).append(path)
            continue
        listing.update(f"{file} {path.stat().st_size}\n".encode(errors="surrogateescape"))
    if not any(splits["test"].values()):
        if (source / "test").is_dir():
            raise UserError(
                f"{label}: test has no folder of images for each class; sort them into such "
                f"folders, or remove test to hold out some training images"
            )
        del splits["test"]
    train, test = (dict(enumerate(splits.get(s, {}).values())) for s in ("train", "test"))
    return RawSet(train, test, dict(enumerate(names)), pool, files, left_out, listing.hexdigest())
