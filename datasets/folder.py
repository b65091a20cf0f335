"""Any images of your own: a folder with train/<class>/, test/<class>/ and unlabeled/."""

import os
from pathlib import Path

from datasets.images import list_images
from datasets.spec import RawSet
from runtime.errors import UserError

POOL = "unlabeled"


def list_classes(source):
    """The names of the class folders in --source, sorted. Raises UserError if there are none."""
    train = Path(source) / "train"
    found = train.glob("[!.]*") if os.path.isdir(train) else ()
    names = sorted(path.name for path in found if path.is_dir())
    if not names:
        raise UserError(f"--source {source}: put a folder of images for each class into {train}")
    return names


def read(source, download, with_pool):
    """Names of files. Without a folder test/ the test part is empty."""
    names = list_classes(source)
    train = list_part(source, "train", names)
    test = {}
    if (source / "test").is_dir():
        test = list_part(source, "test", names)
        others = {p.name for p in (source / "test").glob("[!.]*") if p.is_dir()} - {*names}
        if others:
            raise UserError(
                f"--source {source}: test has a class {min(others)!r} that train lacks; remove "
                f"it, or put its training images into train"
            )
    pool = [f"{POOL}/{file}" for file in list_images(source / POOL, "**/*")]
    return RawSet(train, test, dict(enumerate(names)), pool, source)


def list_part(source, part, names):
    """The image files of train/ or test/: {class id: names}."""
    files = {}
    for c, name in enumerate(names):
        own = list_images(source / part / name)
        if not own:
            raise UserError(
                f"--source {source}: {source / part / name} holds no image; put some there, or "
                f"remove the class"
            )
        files[c] = [f"{part}/{name}/{file}" for file in own]
    return files
