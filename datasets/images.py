"""The files of a source: found in a folder or a zip archive, downloaded, decoded by Pillow."""

import contextlib
import io
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from runtime.errors import UserError, explain, first_line
from runtime.files import check_zip

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long metadata does no harm


def list_files(source):
    """All files below a folder or in a zip archive: {name relative to it, with '/': path}.

    Sorted, without hidden ones; links to folders are followed. A path in an archive is a
    zipfile.Path, which is read as others are; threads may share it.
    """
    if os.path.isdir(source):
        found = {}
        for here, folders, files in os.walk(source, onerror=refuse, followlinks=True):
            real = Path(here).resolve()  # a link to a folder above has no end
            folders[:] = [f for f in folders if not real.is_relative_to(Path(here, f).resolve())]
            paths = (Path(here, file) for file in files)
            found |= {path.relative_to(source).as_posix(): path for path in paths}
    else:
        with explain(source, "is not a zip archive"):
            check_zip(source)
            archive = zipfile.ZipFile(source)
        names = [name for name in archive.namelist() if not name.endswith("/")]
        found = {name: zipfile.Path(archive, name) for name in names}
    visible = (name for name in found if "/." not in f"/{name}")
    return {name: found[name] for name in sorted(visible, key=lambda name: name.split("/"))}


def refuse(error):
    """For os.walk, which passes over folders that it cannot read."""
    raise UserError(f"{error.filename}: cannot be read ({first_line(error)})")


def download_file(url, path, md5):
    """Download the file `path` unless it is there. Raises UserError, which says where to put it."""
    from torchvision.datasets.utils import download_url  # slow: it doubles the start time

    part = path.with_name(f"{path.name}.part")  # never half-written under its own name
    advice = f"; put it into {path.parent}, or prepare it: dataset.py --raw DIR"
    with explain(path.name, "cannot be downloaded", advice):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url(url, path.parent, part.name, md5)
            os.replace(part, path)


def is_image(name):
    """Whether a file is an image that Pillow reads, by its suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return Image.registered_extensions().get(suffix) in Image.OPEN


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
        gray = (np.asarray(image).astype(np.int64) + 128) // 257
        image = Image.fromarray(gray.clip(0, 255).astype(np.uint8))
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
    with explain(path, "is not a readable image"):
        return resize(to_rgb(Image.open(io.BytesIO(path.read_bytes()))), side)


def decode(files, wanted, side):
    """The images of some files: {key: names} to {key: uint8 [n,side,side,3]}.

    files: {name: path}, as in list_files. Raises UserError.
    """
    images = {}
    with warnings.catch_warnings(), ThreadPoolExecutor() as threads:
        warnings.simplefilter("ignore")  # about damaged metadata
        for key, names in tqdm(wanted.items(), "decoding", disable=None, leave=False):
            own = threads.map(lambda name: read_image(files[name], side), names)
            images[key] = np.array([*own], np.uint8).reshape(-1, side, side, 3)
    return images
