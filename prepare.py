"""Prepares data sets: from official files, or any folder of images, to plain arrays (METHOD.md 2).

dataset.py is the command. What comes in is bytes from elsewhere: nothing is unpickled freely,
images are read by Pillow alone, with a bound on their pixels, and no archive says where to write.
"""

import functools
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

import utils
from utils import Refusal

EXEMPLARS = 100  # of each class, a part of train, kept for good
PARTS = ("train", "val", "test", "exemplars")
LEAST = 10  # training images of a class, so that one is left for val
HELD_OUT = 5  # without a test folder, every fifth image is for the test
UNPACKED = 2**32  # bytes that a compressed .npz may become
MEMBER = 2**26  # bytes that a file of an archive may become
FEW = 256  # images that one process decodes sooner than others have started
# Its address and md5 sum are unconfirmed: the download has not been tried yet.
TINY_IMAGENET = ("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")  # its md5 sum
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def file_of(part):
    """The published files call the exemplars save_100."""
    return f"save_{EXEMPLARS}" if part == "exemplars" else part


def check_images(where, images):
    """Refuse what is not a uint8 array [n,H,W,3] of at least one image."""
    if not isinstance(images, np.ndarray):
        found = type(images).__name__
    elif images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        found = f"{images.dtype} {list(images.shape)}"
    else:
        return
    raise Refusal(f"{where}: found {found}, give uint8 [n,H,W,3], n > 0")


# ------------------------------------------------------------------------------ image files


@functools.cache
def formats():
    """What Pillow reads, by its names; EPS aside, which another program would interpret."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - {"EPS"}))


@functools.cache
def endings():
    """The endings of image files, in lower case: '.jpg', ..."""
    return frozenset(e for e, kind in Image.registered_extensions().items() if kind in formats())


def to_rgb(image):
    """A Pillow image as RGB, upright; what is transparent becomes white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("more than 16 bits of grey")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floats")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image, side):
    """The centre square of a Pillow image, resized (antialiased): uint8 [side,side,3]."""
    edge = min(image.size)
    left, top = ((length - edge) // 2 for length in image.size)
    image = image.crop((left, top, left + edge, top + edge))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def picture(source, name, side):
    """An image file as uint8 [side,side,3]. source, name: as in open_file. Raises Refusal."""
    where = Path(source) / name if Path(source).is_dir() else f"{source}: {name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                open_file(source, name) as file,
                Image.open(file, formats=formats()) as image,
            ):
                return square(to_rgb(image), side)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise Refusal(f"{where}: has more than {most}; make it smaller or take it away") from None
    except Exception as error:  # a damaged file can raise anything
        words = utils.first_line(error)
        if isinstance(error, UnidentifiedImageError):  # whose words tell of the open file
            words = "of no format that is known"
        raise Refusal(
            f"{where}: not an image that can be read ({words}); repair it or take it away"
        ) from None


def open_file(source, name):
    """A binary file: `name` in the zip archive `source`, or under the folder `source`."""
    if Path(source).is_dir():
        return open(Path(source) / name, "rb")
    content = archive(source)
    if content.getinfo(name).file_size > MEMBER:
        raise ValueError(f"unpacks to more than {MEMBER // 2**20} MiB")
    return io.BytesIO(content.read(name))


def archive(path):
    """The zip archive, open; one for each process, since they would share one's place in it."""
    path = Path(path).absolute()
    return open_archive(path, path.stat().st_mtime_ns, os.getpid())


@functools.lru_cache(1)
def open_archive(path, changed, process):
    return zipfile.ZipFile(path)


def list_files(source):
    """The names of all files in a zip archive or under a folder, relative to it, with '/'."""
    if Path(source).is_dir():
        paths = (path for path in Path(source).rglob("*") if path.is_file())
        return sorted(path.relative_to(source).as_posix() for path in paths)
    try:
        # folders have entries of their own in many archives
        return [name for name in archive(source).namelist() if not name.endswith("/")]
    except Exception as error:  # a damaged file can raise anything
        words = utils.first_line(error)
        raise Refusal(f"{source}: not a zip archive that can be read ({words})") from None


def read_text(source, name):
    """The lines of a text file in an archive or folder."""
    try:
        with open_file(source, name) as file:
            return file.read().decode().splitlines()
    except Exception as error:  # a damaged file can raise anything
        words = utils.first_line(error)
        raise Refusal(f"{source}: {name} cannot be read ({words}); get it anew") from None


def decode(source, wanted, side):
    """The images of an archive or folder: {key: names} to {key: uint8 [n,side,side,3]}.

    source, names: as in open_file. From FEW images on several processes decode, 32 at a time.
    Raises Refusal.
    """
    names = [str(name) for own in wanted.values() for name in own]
    images = {key: np.empty((len(own), side, side, 3), np.uint8) for key, own in wanted.items()}
    rows = (row for array in images.values() for row in array)
    one = functools.partial(picture, source, side=side)
    with tqdm(total=len(names), desc="images", unit="image", disable=None, leave=False) as bar:
        if len(names) < FEW:
            found = map(one, names)
            for row, image in zip(rows, found):
                row[:] = image
                bar.update()
            return images
        # fork where it is safe: others would import PyTorch once more in each process
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        count = max(2, min(8, utils.cores()))
        with ProcessPoolExecutor(count, context, start_worker) as workers:
            try:
                for row, image in zip(rows, workers.map(one, names, chunksize=32)):
                    row[:] = image
                    bar.update()
            except BrokenProcessPool:
                raise Refusal(
                    f"{source}: a process that decodes its images was ended from outside, perhaps "
                    f"for want of memory; give the same command again"
                ) from None
    return images


def start_worker():
    """In a new process: signals are the parent's affair, and it ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def images_in(folder, below="*"):
    """The image files of a folder, sorted, hidden ones aside: their names, relative to it."""
    paths = (path.relative_to(folder) for path in sorted(folder.glob(below)) if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if path.suffix.lower() in endings() and not any(p.startswith(".") for p in path.parts)
    ]


# ------------------------------------------------------------------------------ the sets


# Each reader gives train and test by class, the names of the classes, and the set's own pool: as
# images uint8 [n,32,32,3] (CIFAR), or as the names of files that are still to be decoded. All raise
# Refusal.


def official(kind, raw, given, is_pool):
    """A torchvision set, train and test, from the folder raw, downloaded unless `given`.

    is_pool: whether it is wanted as a pool, for which --unlabeled would stand in.
    """
    # "downloading" a sound archive that is there already only unpacks it
    download = not given or check_integrity(raw / kind.filename, kind.tgz_md5)
    try:
        return [kind(raw, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # what torchvision advises, download=True, is no flag here
        words, wanted = (
            utils.first_line(error).partition(" You can use")[0],
            f"{kind.filename} or the folder {kind.base_folder}",
        )
        other = CIFAR100 if kind is CIFAR10 else CIFAR10
        pool = (
            f", or give another pool with --unlabeled ({kind.__name__} is wanted as the pool only)"
            if is_pool
            else f"; likewise {other.filename} (or give another pool with --unlabeled)"
        )
        if given:
            raise Refusal(
                f"--raw {raw}: holds no sound {kind.__name__} ({words}); put {wanted} there{pool}"
            ) from None
        raise Refusal(
            f"{kind.__name__} cannot be downloaded ({words}); put {wanted} into {raw}, or name its "
            f"folder with --raw DIR{pool}"
        ) from None


def read_cifar(name, raw, given, with_pool):
    """CIFAR-10 or CIFAR-100; the pool of each are the training images of the other."""
    kind, other = (CIFAR10, CIFAR100) if name == "cifar10" else (CIFAR100, CIFAR10)
    if given and raw.name in (CIFAR10.base_folder, CIFAR100.base_folder):
        raw = raw.parent
    both = official(kind, raw, given, is_pool=False)
    pool, origin = None, None
    if with_pool:
        pool = official(other, raw, given, is_pool=True)[0].data
        origin = f"{'CIFAR-100' if other is CIFAR100 else 'CIFAR-10'} training images"
    train, test = (
        {c: part.data[np.array(part.targets) == c] for c in range(len(part.classes))}
        for part in both
    )
    return train, test, dict(enumerate(both[0].classes)), pool, origin


def find_tiny_imagenet(raw, given):
    """The archive, or the folder that it would become, in raw or as raw; else it is downloaded."""
    file, md5 = TINY_IMAGENET
    for place in (raw, raw / file, raw / file.removesuffix(".zip")):
        if place.is_file() or (place / "val" / "val_annotations.txt").is_file():
            return place
    if given:
        raise Refusal(
            f"--raw {raw}: found neither {file} nor its folder (with val/val_annotations.txt); "
            f"put it there, or name it"
        )
    part = raw / f"{file}.part"
    try:
        download_url(TINY_IMAGENET_URL, raw, part.name, md5)
        os.replace(part, raw / file)  # only a whole one has its name
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise Refusal(
            f"Tiny-ImageNet cannot be downloaded ({utils.first_line(error)}); put {file} "
            f"into {raw}, or name it with --raw FILE"
        ) from None
    return raw / file


def read_tiny_imagenet(source):
    """Names of files in tiny-imagenet-200.zip or its folder; its validation images are the test.

    The classes are those of wnids.txt, sorted: 200, but a part of the set is read as well.
    """
    files = list_files(source)
    mark = "val/val_annotations.txt"
    found = [file for file in files if f"/{file}".endswith(f"/{mark}")]
    if len(found) != 1:
        raise Refusal(f"{source}: holds no {mark}, so it is not Tiny-ImageNet; get it anew")
    root = found[0].removesuffix(mark)  # 'tiny-imagenet-200/' in the archive
    train, known, pool = {}, set(files), []
    for file in files:
        words = file.removeprefix(root).split("/")
        if len(words) == 4 and (words[0], words[2]) == ("train", "images"):
            train.setdefault(words[1], []).append(file)
        elif words[:2] == ["test", "images"] and len(words) == 3:
            pool.append(file)
    wnids = sorted(train)
    if f"{root}wnids.txt" in known:
        wnids = sorted({line.strip() for line in read_text(source, f"{root}wnids.txt")} - {""})
    for wnid in wnids:
        if wnid not in train:
            raise Refusal(f"{source}: no images in train/{wnid}/images, though wnids.txt names it")
    test = {wnid: [] for wnid in wnids}
    for line in read_text(source, root + mark):
        file, _, rest = line.partition("\t")
        if (wnid := rest.partition("\t")[0]) in test:
            if (path := f"{root}val/images/{file}") not in known:
                raise Refusal(f"{source}: {path} is missing, though val_annotations.txt names it")
            test[wnid].append(path)
    words = {}
    if f"{root}words.txt" in known:
        for line in read_text(source, f"{root}words.txt"):
            wnid, _, rest = line.partition("\t")
            words[wnid] = rest.partition(",")[0]
    names = [words.get(wnid, wnid) for wnid in wnids]
    names = {c: n if names.count(n) == 1 else wnids[c] for c, n in enumerate(names)}
    train, test = (
        {c: sorted(part[wnid]) for c, wnid in enumerate(wnids)} for part in (train, test)
    )
    return train, test, names, sorted(pool)


def classes_in(folder):
    """The names of the class folders of --source, sorted. Raises Refusal if there are none."""
    part = Path(folder) / "train"
    found = part.glob("[!.]*") if os.path.isdir(part) else ()
    names = sorted(path.name for path in found if path.is_dir())
    if not names:
        raise Refusal(f"--source {folder}: put a folder of images for each class into {part}")
    return names


def read_folder(source, seed):
    """Names of files in train/<class>/, test/<class>/ and unlabeled/ of a folder of images."""
    names = classes_in(source)
    parts = {}
    for part in ("train", "test"):
        parts[part] = {}
        for c, name in enumerate(names) if (source / part).is_dir() else ():
            own = images_in(source / part / name)
            if not own:
                raise Refusal(
                    f"--source {source}: {source / part / name} holds no image; "
                    f"put some there, or take the class away"
                )
            parts[part][c] = [f"{part}/{name}/{file}" for file in own]
    if not parts["test"]:
        print(
            f"{source}: no folder test, so a fifth of the training images of each class "
            f"is split off for it",
            flush=True,
        )
        for c, own in parts["train"].items():
            own = shuffled(np.array(own), seed, "test", c)
            count = round(len(own) / HELD_OUT)
            parts["test"][c], parts["train"][c] = own[:count], own[count:]
    else:
        others = {p.name for p in (source / "test").glob("[!.]*") if p.is_dir()} - {*names}
        if others:
            raise Refusal(
                f"--source {source}: test has a class {min(others)!r} that train has not; "
                f"take it away, or put its training images into train"
            )
    pool = [f"unlabeled/{file}" for file in images_in(source / "unlabeled", "**/*")]
    return parts["train"], parts["test"], dict(enumerate(names)), pool


# ------------------------------------------------------------------------------ the pool


def read_pool(path, side):
    """A pool of one's own: a .npy or .npz file, the published pickle, or a folder of images.

    Returns uint8 [n,side,side,3]. Raises Refusal.
    """
    where, path = f"--unlabeled {path}", Path(path)
    if os.path.isdir(path):
        names = images_in(path, "**/*")
        if not names:
            raise Refusal(f"{where}: a folder without images, name another")
        return decode(path, {"pool": names}, side)["pool"]
    ending = path.suffix.lower()
    if ending == ".npz":
        images = load_npz(path)
    elif ending in (".pkl", ".pickle"):
        content = utils.load_arrays_pickle(path)
        images = content.get("data") if isinstance(content, dict) else None
        where += ": 'data'"
    else:
        images = utils.load_array(path, where)
    check_images(where, images)
    if images.shape[1:3] == (side, side):
        return images
    print(f"{where}: {images.shape[1]}x{images.shape[2]}, resized to {side}x{side}", flush=True)
    resized = np.empty((len(images), side, side, 3), np.uint8)
    for row, image in zip(resized, tqdm(images, "resizing", disable=None, leave=False)):
        row[:] = square(Image.fromarray(image), side)
    return resized


def load_npz(path):
    """The one array of an .npz file, compressed or not, but never more than UNPACKED bytes."""
    try:
        with zipfile.ZipFile(path) as content:
            size = sum(record.file_size for record in content.infolist())
            if size > UNPACKED:
                raise Refusal(
                    f"--unlabeled {path}: unpacks to {size / 2**30:.1f} GiB, more than the "
                    f"{UNPACKED / 2**30:g} that are read; give it as a .npy file"
                )
            if damaged := content.testzip():
                raise Refusal(f"--unlabeled {path}: is damaged at {damaged}, get it anew")
        with np.load(path, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                found = ", ".join(arrays.files[:9])
                raise Refusal(f"--unlabeled {path}: holds {found}; give a file with one array")
            return arrays[arrays.files[0]]
    except FileNotFoundError:
        raise Refusal(f"--unlabeled {path}: no such file") from None
    except Refusal:
        raise
    except Exception as error:  # a damaged file can raise anything
        words = utils.first_line(error)
        raise Refusal(f"--unlabeled {path}: not an .npz file of plain arrays ({words})") from None


def drop_known(pool, parts):
    """The pool without images that train, val or test hold bit for bit, and each image once.

    Returns uint8 [n,H,W,3] in the order of the pool, and how many were dropped for either reason.
    """

    def digest(image):
        return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()

    bar = functools.partial(tqdm, desc="duplicates", unit="image", disable=None, leave=False)
    arrays = [images for part in PARTS[:3] for images in parts[part].values()]
    known = {digest(image) for images in bar(arrays, unit="class") for image in images}
    kept, seen = [], set()
    dropped = {"equal": 0, "repeated": 0}
    for place, image in enumerate(bar(pool)):
        sum_of = digest(image)
        if sum_of in known:
            dropped["equal"] += 1
        elif sum_of in seen:
            dropped["repeated"] += 1
        else:
            seen.add(sum_of)
            kept.append(place)
    return (pool if len(kept) == len(pool) else pool[kept]), dropped


# ------------------------------------------------------------------------------ preparing


def shuffled(images, seed, *purpose):
    """The rows of an array (images or their names), in an order from a stream of its own."""
    return images[torch.randperm(len(images), generator=utils.stream(seed, *purpose)).numpy()]


def split(images, c, parts, seed, exemplars=EXEMPLARS):
    """Split the training images of class c 9:1 into train and val; draw exemplars from train.

    images: uint8 [n,H,W,3], or their names [n]. parts: {part: {}}, to which class c is added.
    """
    images = shuffled(images, seed, "split", c)
    held_out = round(len(images) / 10)
    parts["val"][c], parts["train"][c] = images[:held_out], images[held_out:]
    parts["exemplars"][c] = shuffled(parts["train"][c], seed, "exemplars", c)[:exemplars]


def mean_and_std(arrays):
    """Of each channel over all pixels of uint8 arrays [n,H,W,3], in [0,1]: two lists of three."""
    counts = sum(
        np.stack([np.bincount(some[..., i].ravel(), minlength=256) for i in range(3)])
        for images in arrays
        for some in np.array_split(images, -(-len(images) // 256))  # they become int64
    )
    values, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
    # channels that never change are not divided by zero
    return mean.round(6).tolist(), std.round(6).clip(1 / 255).tolist()


def prepare(
    name, folder, raw=None, unlabeled=(), per_class=None, seed=0, source=None, image_size=None
):
    """Make the prepared set `folder` from its source: wholly, or not at all. Raises Refusal.

    raw: folder of the official files (default: <folder>/../raw, downloaded to), or the file.
    unlabeled: what read_pool reads, for the pool (default: the set's own). per_class: at most so
    many training (before the split) and test images of each class. source: a folder of images,
    for the set 'folder', which become image_size x image_size.
    """
    folder = Path(folder)
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"--data {folder}: exists and is not empty; name another folder")
    given, raw = raw is not None, Path(raw or folder.parent / "raw")
    # os.path: a name that is too long is no error there, just not found
    if given and not os.path.isdir(raw) and not (name == "tiny_imagenet" and os.path.isfile(raw)):
        found = "a file" if os.path.isfile(raw) else "no such folder"
        raise Refusal(f"--raw {raw}: {found}, give the folder of the official files")
    side = {"tiny_imagenet": 64, "folder": image_size or 32}.get(name, 32)
    pools = [read_pool(path, side) for path in unlabeled or ()]
    origin = ", ".join(map(str, unlabeled or ()))
    print(f"preparing {name} in {folder} ...", flush=True)

    if name == "tiny_imagenet":
        files = find_tiny_imagenet(raw, given)
        train, test, names, own_files = read_tiny_imagenet(files)
        own_origin = "Tiny-ImageNet test images"
    elif name == "folder":
        files = Path(source)
        train, test, names, own_files = read_folder(files, seed)
        own_origin = f"{files / 'unlabeled'}"
    else:
        found = read_cifar(name, raw, given, with_pool=not pools)
        train, test, names, own_pool, own_origin = found
        files = None
    few = [c for c in train if len(train[c]) < LEAST]
    if few and files:
        raise Refusal(
            f"{'--source ' if source else ''}{files}: class {names[few[0]]} has "
            f"{len(train[few[0]])} training images, give at least {LEAST}"
        )
    if empty := [names[c] for c in test if not len(test[c])]:
        raise Refusal(f"{files}: class {empty[0]} has no test image; put some there")
    parts = {part: {} for part in PARTS}
    for c in names:  # of files the names are split, so that all are decoded to where they stay
        own = shuffled(np.asarray(train.pop(c)), seed, "per_class", c)[:per_class]
        split(own, c, parts, seed)
        parts["test"][c] = np.asarray(test.pop(c))[:per_class]
    if files:
        wanted = {(part, c): own for part in PARTS for c, own in parts[part].items()}
        if own_files and not pools:
            wanted["pool"] = own_files
        images = decode(files, wanted, side)
        own_pool = images.pop("pool", None)
        for (part, c), own in images.items():
            parts[part][c] = own
    if not pools:
        pools, origin = [own_pool], own_origin
    meta = {"dataset": name, "names": names, "pool": origin, "per_class": per_class, "seed": seed}
    meta["image_size"] = side
    if name == "folder":
        meta["source"] = str(files)  # without a last slash, as dataset.obtain compares it
        meta["mean"], meta["std"] = mean_and_std(parts["train"].values())
    pool = None
    if pools[0] is None:
        meta["pool"] = None
        print(
            f"{folder}: no pool, since {own_origin} holds no image and there is no --unlabeled; "
            f"train with --no_teaching"
        )
    else:
        pool = pools.pop() if len(pools) == 1 else np.concatenate(pools)
        pool, meta["dropped"] = drop_known(pool, parts)
        equal, repeated = meta["dropped"]["equal"], meta["dropped"]["repeated"]
        print(
            f"pool: {origin}: {equal + repeated + len(pool)} images, of which {equal} equal images "
            f"of the set and {repeated} are repeated: dropped"
        )
        if not len(pool):
            raise Refusal(f"--unlabeled {origin}: all images equal some of the set; give others")
    write_set(name, folder, parts, pool, meta)


def write_set(name, folder, parts, pool, meta):
    """Write the files beside `folder` and rename them into place: a half-made set never shows."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise Refusal(f"--data {folder}: cannot be written ({utils.first_line(error)})") from None
    try:
        for part, arrays in parts.items():
            by_name = {str(c): images for c, images in arrays.items()}
            np.savez(beside / f"{name}_{file_of(part)}.npz", **by_name)
        if pool is not None:
            np.save(beside / f"{name}_pool.npy", pool)
        (beside / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        beside.chmod(0o755)  # mkdtemp makes it private
        for file in beside.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.rename(beside, folder)
    except OSError as error:
        if not (folder / "meta.json").exists():  # else another process was first, with the same
            raise Refusal(
                f"--data {folder}: cannot be written ({utils.first_line(error)})"
            ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
