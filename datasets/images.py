"""Image files as arrays: which are images, decoding and resizing, all by Pillow."""

import contextlib
import functools
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from datasets.files import list_files
from runtime.errors import UserError, first_line

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long metadata does no harm


@functools.cache
def suffixes():
    """The suffixes of the formats that Pillow reads, in lower case: '.jpg', ..."""
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def is_image(name):
    """Whether a file is an image, by its suffix."""
    return os.path.splitext(name)[1].lower() in suffixes()


def list_images(folder, left_out):
    """The image files below a folder, sorted: {name relative to it: path}.

    left_out: {kind: paths}, to which the other files are added.
    """
    images = {}
    for name, path in list_files(folder).items():
        if path.is_file() and is_image(name):
            images[name] = path
        else:
            kind = (path.suffix or "without suffix") if path.is_file() else "dangling links"
            left_out.setdefault(kind, []).append(path)
    return images


def print_left_out(label, left_out):
    """Say in one line which files are not used. left_out: {kind: paths}."""
    if left_out:
        kinds = (f"{len(paths)} {kind} ({paths[0]})" for kind, paths in sorted(left_out.items()))
        print(f"{label}: left out: {', '.join(kinds)}", flush=True)


def to_rgb(image):
    """A Pillow image as RGB, upright; transparent pixels become white."""
    image.load()
    with contextlib.suppress(Exception):  # odd metadata says nothing about the pixels
        image.getexif()  # read once; exif_transpose would write all tags anew, and fail at some
        image.info.pop("exif", None)
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("more than 16 bits of gray")
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floats")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize(image, side):
    """The center square of a Pillow image, resized (antialiased): uint8 [side,side,3]."""
    edge = min(image.size)
    left, top = ((length - edge) // 2 for length in image.size)
    image = image.crop((left, top, left + edge, top + edge))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def read_image(path, side):
    """An image file as uint8 [side,side,3]; path: as in list_files. Raises UserError."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels")
            return resize(to_rgb(image), side)
    except Exception as error:  # a damaged file can raise anything
        reason = first_line(error).partition(" <")[0]  # Pillow's may show the file object
        raise UserError(f"{path}: is not a readable image ({reason})") from None


def decode(files, wanted, side):
    """The images of some files: {key: names} to {key: uint8 [n,side,side,3]}.

    files: {name: path}, as in list_files. Raises UserError.
    """
    images = {key: np.empty((len(own), side, side, 3), np.uint8) for key, own in wanted.items()}
    paths = [files[name] for own in wanted.values() for name in own]
    rows = [row for array in images.values() for row in array]

    def read(path, row):
        row[:] = read_image(path, side)

    with warnings.catch_warnings(), ThreadPoolExecutor() as threads:
        warnings.simplefilter("ignore")  # about damaged metadata
        done = threads.map(read, paths, rows)
        for _ in tqdm(done, "images", len(paths), unit="image", disable=None, leave=False):
            pass
    return images
