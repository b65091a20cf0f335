"""Image files as arrays: which formats are read, decoding and resizing.

Files come from elsewhere: Pillow alone reads them, with a limit on their pixels.
"""

import functools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from datasets.archive import open_file
from runtime.errors import UserError, first_line
from runtime.threads import usable_cores

MIN_PARALLEL = 256  # fewer images are decoded sooner than other processes start


@functools.cache
def formats():
    """The formats that Pillow reads, by its names; not EPS, which another program interprets."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - {"EPS"}))


@functools.cache
def suffixes():
    """The suffixes of image files, in lower case: '.jpg', ..."""
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in formats())


def list_images(folder, pattern="*"):
    """The image files in a folder, sorted, without hidden ones: names relative to it."""
    paths = (path.relative_to(folder) for path in sorted(folder.glob(pattern)) if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if path.suffix.lower() in suffixes() and not any(p.startswith(".") for p in path.parts)
    ]


def to_rgb(image):
    """A Pillow image as RGB, upright; transparent pixels become white."""
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


def read_image(source, name, side):
    """An image file as uint8 [side,side,3]. source, name: as in open_file. Raises UserError."""
    label = Path(source) / name if Path(source).is_dir() else f"{source}: {name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                open_file(source, name) as file,
                Image.open(file, formats=formats()) as image,
            ):
                return resize(to_rgb(image), side)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise UserError(f"{label}: has more than {most}; shrink or remove it") from None
    except FileNotFoundError:
        raise UserError(f"{label}: no such file, give an image") from None
    except Exception as error:  # a damaged file can raise anything
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError):  # its message shows the file object
            reason = "unknown format"
        raise UserError(f"{label}: not a readable image ({reason}); repair or remove it") from None


def decode(source, wanted, side):
    """The images of an archive or folder: {key: names} to {key: uint8 [n,side,side,3]}.

    source, names: as in open_file. From MIN_PARALLEL images on, several processes decode them.
    Raises UserError.
    """
    names = [str(name) for own in wanted.values() for name in own]
    images = {key: np.empty((len(own), side, side, 3), np.uint8) for key, own in wanted.items()}
    rows = (row for array in images.values() for row in array)
    read = functools.partial(read_image, source, side=side)
    with tqdm(total=len(names), desc="images", unit="image", disable=None, leave=False) as bar:
        for image, row in zip(map_parallel(read, names, source), rows):
            row[:] = image
            bar.update()
    return images


def map_parallel(read, names, source):
    """map(read, names), from MIN_PARALLEL names on by several processes, 32 at a time."""
    if len(names) < MIN_PARALLEL:
        yield from map(read, names)
        return
    # fork where it is safe: otherwise each process would import PyTorch again
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    count = max(2, min(8, usable_cores()))
    with ProcessPoolExecutor(count, context, start_worker) as workers:
        try:
            yield from workers.map(read, names, chunksize=32)
        except BrokenProcessPool:
            raise UserError(
                f"{source}: a process that decodes its images was killed, perhaps for lack of "
                f"memory; give the same command again"
            ) from None


def start_worker():
    """In a new process: leave signals to the parent, and end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
