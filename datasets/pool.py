"""The pool of unlabeled images: files of your own, and which of their images stay."""

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.files import MAX_UNPACKED
from datasets.images import decode, list_images, print_left_out, resize
from datasets.spec import check_images, shuffle
from runtime.errors import UserError, first_line
from runtime.files import check_zip, load_array, load_pickle


def read_pool(path, side):
    """A pool of your own: a .npy or .npz file, the published pickle, or a folder of images.

    Returns uint8 [n,side,side,3]. Raises UserError.
    """
    label, path, left_out = f"--unlabeled {path}", Path(path), {}
    if os.path.isdir(path):
        files = list_images(path, left_out)
        print_left_out(label, left_out)
        if not files:
            raise UserError(f"{label}: has no image; choose another folder")
        return decode(files, {"pool": files}, side)["pool"]
    if path.suffix.lower() == ".npz":
        images = load_npz(path, label)
    elif path.suffix.lower() in (".pkl", ".pickle"):
        images = read_published_pool(path)
    else:
        images = load_array(path, label)
    check_images(label, images)
    if images.shape[1:3] == (side, side):
        return images
    print(f"{label}: {images.shape[1]}x{images.shape[2]}, resized to {side}x{side}", flush=True)
    images = tqdm(images, "resizing", disable=None, leave=False)
    return np.stack([resize(Image.fromarray(image), side) for image in images])


def read_published_pool(path):
    """The published pickle: {'data': uint8 [n,H,W,3], 'label': ...}."""
    content = load_pickle(path)
    images = content.get("data") if isinstance(content, dict) else None
    check_images(f"{path}: 'data'", images)
    return images


def load_npz(path, label):
    """The one array in an .npz file, compressed or not, of at most MAX_UNPACKED bytes."""
    try:
        check_zip(path, MAX_UNPACKED)
        with np.load(path, allow_pickle=False) as arrays:
            (name,) = arrays.files
            return arrays[name]
    except Exception as error:  # a damaged file can raise anything
        reason = first_line(error)
        raise UserError(f"{label}: is not an .npz file with one plain array ({reason})") from None


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
    print(
        f"pool: {origin}: {len(pool)} images, less {equal} that are also in the dataset and "
        f"{dropped['repeated']} duplicates",
        flush=True,
    )
    if not kept:
        raise UserError(f"--unlabeled {origin}: the dataset holds all of its images")
    if size is not None and size < len(kept):
        kept = np.sort(shuffle(np.array(kept), seed, "pool_size")[:size])
        print(f"pool: {size} of them are kept, chosen at random (--pool_size)", flush=True)
    return (pool if len(kept) == len(pool) else pool[kept]), dropped
