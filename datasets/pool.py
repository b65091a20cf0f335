"""The pool of unlabeled images: files of your own, and which of their images stay."""

import hashlib
from pathlib import Path

import numpy as np

from datasets.images import decode, list_images, print_left_out
from datasets.spec import check_images, shuffle
from runtime.errors import UserError
from runtime.files import load_array, load_pickle


def read_pool(path, side):
    """A pool of your own: a .npy file, the published pickle, or a folder of images.

    Returns uint8 [n,side,side,3]. Raises UserError.
    """
    label, path, left_out = f"--unlabeled {path}", Path(path), {}
    if path.is_dir():
        files = list_images(path, left_out)
        print_left_out(label, left_out)
        images = decode(files, {"pool": files}, side)["pool"]
    elif path.suffix in (".pkl", ".pickle"):
        images = read_published_pool(path)
    else:
        images = load_array(path, label)
    check_images(label, images, (side, side))
    return images


def read_published_pool(path):
    """The published pickle: {'data': uint8 [n,H,W,3], 'label': ...}."""
    content = load_pickle(path)
    images = content.get("data") if isinstance(content, dict) else None
    check_images(f"{path}: 'data'", images)
    return images


def digests(*splits):
    """A digest for each image of some splits {class id: uint8 [n,H,W,3]}, equal for equal ones."""
    return [
        hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
        for split in splits
        for images in split.values()
        for image in images
    ]


def reduce_pool(pool, origin, known, size=None, seed=0):
    """Keep each pool image once, none whose digest is in `known`, and at most `size` at random.

    pool: uint8 [n,H,W,3], which comes from `origin`. Returns uint8 [m,H,W,3] in the order of the
    pool, and how many were dropped: {"equal": known ones, "repeated": ...}. Raises UserError if
    none is left.
    """
    first, keys = {}, digests({"pool": pool})
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    kept = [i for key, i in first.items() if key not in known]
    equal = sum(key in known for key in keys)
    dropped = {"equal": equal, "repeated": len(pool) - equal - len(kept)}
    if not kept:
        raise UserError(
            f"pool: all images of {origin} are also in the dataset; choose others with --unlabeled"
        )
    if size:
        kept = np.sort(shuffle(np.array(kept), seed, "pool_size")[:size])
    print(
        f"pool: {origin}: {len(pool)} images, less {equal} that are also in the dataset and "
        f"{dropped['repeated']} duplicates" + f"; {len(kept)} are kept (--pool_size)" * bool(size)
    )
    return pool[kept], dropped
