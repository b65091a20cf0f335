"""The pool of unlabeled images: files of your own, and which of their images stay."""

import functools
import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.images import decode, list_images, resize
from datasets.spec import check_images
from runtime.arrays import load_array, load_arrays_pickle
from runtime.errors import UserError, first_line

MAX_UNPACKED = 2**32  # bytes that a compressed .npz may unpack to


def read_pool(path, side):
    """A pool of your own: a .npy or .npz file, the published pickle, or a folder of images.

    Returns uint8 [n,side,side,3]. Raises UserError.
    """
    label, path = f"--unlabeled {path}", Path(path)
    if os.path.isdir(path):
        names = list_images(path, "**/*")
        if not names:
            raise UserError(f"{label}: a folder without images, name another")
        return decode(path, {"pool": names}, side)["pool"]
    suffix = path.suffix.lower()
    if suffix == ".npz":
        images = load_npz(path)
    elif suffix in (".pkl", ".pickle"):
        images = read_published_pool(path, label)
    else:
        images = load_array(path, label)
    check_images(label, images)
    return resize_all(label, images, side)


def read_published_pool(path, label=None):
    """The published pickle: {'data': uint8 [n,H,W,3], 'label': ...}. label: for error messages."""
    content = load_arrays_pickle(path)
    images = content.get("data") if isinstance(content, dict) else None
    check_images(f"{label or path}: 'data'", images)
    return images


def resize_all(label, images, side):
    """uint8 [n,H,W,3] to [n,side,side,3]; as they are if they have that size."""
    if images.shape[1:3] == (side, side):
        return images
    print(f"{label}: {images.shape[1]}x{images.shape[2]}, resized to {side}x{side}", flush=True)
    resized = np.empty((len(images), side, side, 3), np.uint8)
    for row, image in zip(resized, tqdm(images, "resizing", disable=None, leave=False)):
        row[:] = resize(Image.fromarray(image), side)
    return resized


def load_npz(path):
    """The one array in an .npz file, compressed or not, of at most MAX_UNPACKED bytes."""
    label = f"--unlabeled {path}"
    try:
        with zipfile.ZipFile(path) as content:
            size = sum(record.file_size for record in content.infolist())
            if size > MAX_UNPACKED:
                raise UserError(
                    f"{label}: unpacks to {size / 2**30:.1f} GiB, more than the limit of "
                    f"{MAX_UNPACKED / 2**30:g}; give it as a .npy file"
                )
            if damaged := content.testzip():
                raise UserError(f"{label}: is damaged at {damaged}, get a new copy")
        with np.load(path, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                found = ", ".join(arrays.files[:9]) or "no array"
                raise UserError(f"{label}: holds {found}; give a file with one array")
            return arrays[arrays.files[0]]
    except FileNotFoundError:
        raise UserError(f"{label}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{label}: not an .npz of plain arrays ({first_line(error)})") from None


def deduplicate(pool, parts):
    """Keep each pool image once, and none that train, val or test hold bit for bit.

    pool: uint8 [n,H,W,3]; parts: {part: {class id: uint8 [n,H,W,3]}}. Returns uint8 [m,H,W,3] in
    the order of the pool, and how many were dropped: {"equal": of the set, "repeated": ...}.
    """

    def digest(image):
        return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()

    bar = functools.partial(tqdm, desc="duplicates", unit="image", disable=None, leave=False)
    arrays = [images for part in ("train", "val", "test") for images in parts[part].values()]
    known = {digest(image) for images in bar(arrays, unit="class") for image in images}
    kept, seen = [], set()
    dropped = {"equal": 0, "repeated": 0}
    for i, image in enumerate(bar(pool)):
        key = digest(image)
        if key in known:
            dropped["equal"] += 1
        elif key in seen:
            dropped["repeated"] += 1
        else:
            seen.add(key)
            kept.append(i)
    return (pool if len(kept) == len(pool) else pool[kept]), dropped
