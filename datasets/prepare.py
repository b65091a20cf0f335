"""Prepared data sets: made from official files or a folder of images, and read again.

A prepared set is a folder of plain arrays: <name>_{train,val,test,save_100}.npz with an array
uint8 [n,H,W,3] for each class id, <name>_pool.npy uint8 [n,H,W,3], and meta.json.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from datasets import DATASETS
from datasets.images import decode
from datasets.pool import deduplicate, read_pool, read_published_pool
from datasets.spec import PARTS, check_images, file_of, shuffle
from runtime.arrays import load_array, load_arrays_pickle
from runtime.errors import UserError, first_line
from runtime.files import check_archive

MIN_IMAGES = 10  # training images of a class, so that one is left for val
TEST_SHARE = 5  # without test images, one in five training images is held out

# ------------------------------------------------------------------------------ what is there


def read_meta(folder):
    """The content of a prepared set's meta.json; {} if it is missing or cannot be read."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def published_file(name, folder, part):
    """Where the published pickle of a part lies."""
    return folder / f"{name}_{file_of(part)}.pkl"


def holds_set(name, folder):
    """Whether a folder holds a prepared set or published pickles, by the names of files."""
    files = [folder / "meta.json", *(published_file(name, folder, part) for part in PARTS)]
    return any(map(os.path.exists, files))  # a name that is too long is merely not found


def ensure_prepared(args, folder, per_class=None, seed=None):
    """Prepare the set in `folder` if it is not there; raise UserError if it was made otherwise.

    args: with the flags of cli.add_data_flags. per_class, seed: as in prepare(); None: any.
    """
    if not holds_set(args.dataset, folder):
        prepare(args, folder, per_class, seed or 0)
    made = read_meta(folder)
    wanted = {
        "per_class": per_class,
        "pool": ", ".join(args.unlabeled) if args.unlabeled else None,
        "seed": seed,
        "source": args.source and str(Path(args.source)),
        "image_size": args.image_size,
    }
    for key, value in wanted.items():
        if value is None or comparable(key, made.get(key)) == comparable(key, value):
            continue
        if not os.path.exists(folder / "meta.json"):  # never suggest to delete published files
            flag = "unlabeled" if key == "pool" else key
            raise UserError(
                f"--data {folder}: holds the published files, which --{flag} does not change; "
                f"leave it out, or name another folder"
            )
        raise UserError(
            f"--data {folder}: was prepared with {key} {made.get(key)}, not {value}; give the "
            f"same, or name another folder"
        )


def comparable(key, value):
    """A value of meta.json; paths as absolute ones, since they can be written in several ways."""
    paths = str(value).split(", ") if key in ("pool", "source") else ()
    return [os.path.realpath(path) for path in paths] or value


# ------------------------------------------------------------------------------ preparing


def prepare(args, folder, per_class=None, seed=0):
    """Make the prepared set `folder` from its source, atomically. Raises UserError.

    args: dataset; raw: folder of the official files (None: <folder>/../raw, downloaded to), or the
    archive; unlabeled: what read_pool reads, for the pool (None: the set's own); source and
    image_size, for images of your own. per_class: at most so many training images (before the
    split) and test images per class.
    """
    spec, folder = DATASETS[args.dataset], Path(folder)
    if os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--data {folder}: exists and is not empty; name another folder")
    path, download = find_source(spec, folder, args)
    side = args.image_size or spec.side
    pools = [read_pool(each, side) for each in args.unlabeled or ()]
    print(f"preparing {args.dataset} in {folder} ...", flush=True)
    raw = spec.read(path, download, with_pool=not pools)
    if pools:
        raw.pool, origin = None, ", ".join(map(str, args.unlabeled))
    else:
        origin = str(path / spec.pool) if spec.from_source else spec.pool
    label = f"--source {path}" if spec.from_source else raw.files or args.dataset
    if not raw.test:
        hold_out_test(label, raw, seed)
    check_counts(label, raw)
    parts = split_all(raw, spec.exemplars, per_class, seed)
    if raw.files:
        decode_all(raw, parts, side)
    if raw.pool is not None and len(raw.pool):
        pools.append(raw.pool)
    meta = {"dataset": args.dataset, "names": raw.names, "pool": origin if pools else None}
    meta |= {"per_class": per_class, "seed": seed, "image_size": side}
    if spec.from_source:
        meta["source"] = str(path)
    if spec.mean is None:
        meta["mean"], meta["std"] = channel_statistics(parts["train"].values())
    pool = None
    if pools:
        raw.pool = None  # it may be large
        pool, meta["dropped"] = join_pools(pools, origin, parts)
    else:
        reason = f"found no images in {origin}, and there is no --unlabeled"
        print(f"{folder}: no pool ({reason}); train with --no_teaching")
    write_set(folder, parts, pool, meta)


def find_source(spec, folder, args):
    """The path that the set's reader starts from, and whether it may download to there."""
    raw = Path(args.raw or folder.parent / "raw")
    # os.path: a name that is too long is merely not found
    if args.raw and not os.path.isdir(raw) and not (spec.raw_file and os.path.isfile(raw)):
        found = "a file" if os.path.isfile(raw) else "no such folder"
        raise UserError(f"--raw {raw}: {found}, give the folder of the official files")
    return (Path(args.source), False) if spec.from_source else (raw, not args.raw)


def hold_out_test(label, raw, seed):
    """Take a test part out of the training images; label: what messages call the source."""
    print(
        f"{label}: no test images, so a fifth of the training images of each class is held out",
        flush=True,
    )
    for c, own in raw.train.items():
        own = shuffle(np.asarray(own), seed, "test", c)
        count = round(len(own) / TEST_SHARE)
        raw.test[c], raw.train[c] = own[:count], own[count:]


def check_counts(label, raw):
    """Raise UserError for a class with too few images; label: as in hold_out_test."""
    for c, name in raw.names.items():
        if (count := len(raw.train[c])) < MIN_IMAGES:
            raise UserError(
                f"{label}: class {name} has {count} training images, give at least {MIN_IMAGES}"
            )
        if not len(raw.test[c]):
            raise UserError(f"{label}: class {name} has no test image; put some there")


def split_all(raw, exemplars, per_class, seed):
    """Split a RawSet, whose images it takes away: {part: {class id: images, or their names}}."""
    parts = {part: {} for part in PARTS}
    for c in raw.names:
        own = shuffle(np.asarray(raw.train.pop(c)), seed, "per_class", c)[:per_class]
        split(own, c, parts, seed, exemplars)
        parts["test"][c] = np.asarray(raw.test.pop(c))[:per_class]
    return parts


def split(images, c, parts, seed, exemplars):
    """Split the training images of class c 9:1 into train and val; draw exemplars from train.

    images: uint8 [n,H,W,3], or names [n]. parts: {part: {}}, to which class c is added.
    """
    images = shuffle(images, seed, "split", c)
    held_out = round(len(images) / 10)
    parts["val"][c], parts["train"][c] = images[:held_out], images[held_out:]
    parts["exemplars"][c] = shuffle(parts["train"][c], seed, "exemplars", c)[:exemplars]


def decode_all(raw, parts, side):
    """Decode the image files of all parts and of the pool: arrays take the place of names."""
    wanted = {(part, c): own for part in PARTS for c, own in parts[part].items()}
    images = decode(raw.files, wanted | ({"pool": raw.pool} if raw.pool else {}), side)
    raw.pool = images.pop("pool", None)
    for (part, c), own in images.items():
        parts[part][c] = own


def channel_statistics(arrays):
    """Mean and standard deviation of each channel of uint8 arrays [n,H,W,3], in [0,1].

    Returns two lists of three.
    """
    counts = sum(
        np.stack([np.bincount(some[..., i].ravel(), minlength=256) for i in range(3)])
        for images in arrays
        for some in np.array_split(images, -(-len(images) // 256))  # bincount makes them int64
    )
    values, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
    # not 0 for a constant channel: images are divided by it
    return mean.round(6).tolist(), std.round(6).clip(1 / 255).tolist()


def join_pools(pools, origin, parts):
    """One pool from a list of arrays, which it empties, and how many images were dropped.

    See deduplicate(). origin: where the images come from. Raises UserError if none is left.
    """
    pool = pools.pop() if len(pools) == 1 else np.concatenate(pools)
    total = len(pool)
    pool, dropped = deduplicate(pool, parts)
    print(
        f"pool: {origin}: {total} images, less {dropped['equal']} that are also in the set and "
        f"{dropped['repeated']} duplicates"
    )
    if not len(pool):
        raise UserError(f"--unlabeled {origin}: the set holds all of its images; give others")
    return pool, dropped


def write_set(folder, parts, pool, meta):
    """Write the files to a temporary folder beside `folder` and rename it, atomically."""
    name = meta["dataset"]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"--data {folder}: cannot be written ({first_line(error)})") from None
    try:
        for part, arrays in parts.items():
            by_name = {str(c): images for c, images in arrays.items()}
            np.savez(temporary / f"{name}_{file_of(part)}.npz", **by_name)
        if pool is not None:
            np.save(temporary / f"{name}_pool.npy", pool)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        temporary.chmod(0o755)  # mkdtemp makes it private
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.rename(temporary, folder)
    except OSError as error:
        if not (folder / "meta.json").exists():  # else another process has made the same set
            raise UserError(f"--data {folder}: cannot be written ({first_line(error)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------ reading


def read_set(name, folder, pool=True, parts=PARTS):
    """Some parts, the pool and the meta data of a set: prepared, published or embedded.

    Returns {part: {class id: uint8 [n,H,W,3]}} of the parts asked for; the pool, uint8 [n,H,W,3],
    or None unless asked for; and a dict with names ({id: name}), and mean and std where the set has
    its own. Nothing else is read. Raises UserError; the arrays of the parts are not checked yet.
    """
    if DATASETS[name].embedded:
        arrays, images, meta = read_embedded(name)
        return {part: arrays[part] for part in parts}, images if pool else None, meta
    if (folder / "meta.json").exists():
        return read_prepared(name, folder, pool, parts)
    if holds_set(name, folder):
        return read_published(name, folder, pool, parts)
    raise UserError(
        f"--data {folder}: holds neither a prepared {name} set nor the published pickles "
        f"({name}_train.pkl, ...); make one with: python dataset.py --dataset {name} --data DIR"
    )


def read_embedded(name):
    """All parts, the pool and the meta data of an embedded set; it is always split alike."""
    spec = DATASETS[name]
    raw = spec.read(spec.embedded, download=False, with_pool=True)
    parts = {part: {} for part in PARTS} | {"test": raw.test}
    for c, images in raw.train.items():
        split(images, c, parts, 0, spec.exemplars)
    return parts, raw.pool, {"names": raw.names}


def read_prepared(name, folder, pool, parts):
    """See read_set."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        check_meta(name, folder, meta)
        if pool and meta.get("pool", "") is None:
            raise UserError(
                f"--data {folder}: was prepared without a pool; train with --no_teaching, or "
                f"prepare it again with --unlabeled"
            )
        arrays = {}
        for part in parts:
            path = folder / f"{name}_{file_of(part)}.npz"
            arrays[part] = load_part(path)
        path = folder / f"{name}_pool.npy"
        images = load_array(path) if pool else None
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"--data {folder}: {path.name} is damaged or missing ({first_line(error)}); delete "
            f"the folder and prepare it again"
        ) from None
    if pool:
        check_images(path, images)
    return arrays, images, meta


def check_meta(name, folder, meta):
    """Check the content of meta.json; its names become {id: name}, mean and std floats.

    Raises UserError for a set of another name, or any other exception for a damaged file.
    """
    if meta["dataset"] != name:
        raise UserError(f"--data {folder}: holds {meta['dataset']}, give it as --dataset")
    spec = DATASETS[name]
    meta["names"] = {int(c): label for c, label in meta["names"].items()}
    if spec.classes is None and not meta["names"]:
        raise ValueError("meta.json names no class")
    if sorted(meta["names"]) != list(range(len(meta["names"]))):
        raise ValueError("the classes in meta.json do not count from 0")
    if not all(isinstance(label, str) for label in meta["names"].values()):
        raise ValueError("a class name in meta.json is not a text")
    for key in ("mean", "std") if spec.mean is None else ():
        meta[key] = [float(value) for value in meta[key]]
        if len(meta[key]) != 3 or not all(0 <= value <= 1 for value in meta[key]):
            raise ValueError(f"{key} in meta.json is not three numbers from 0 to 1")
        if key == "std" and not all(meta[key]):
            raise ValueError("std in meta.json is 0")


def load_part(path):
    """The arrays of a part's .npz file: {class id: array}. A damaged file can raise anything."""
    check_archive(path)
    with np.load(path, allow_pickle=False) as arrays:
        part = {int(c): arrays[c] for c in arrays.files}
        if len(part) < len(arrays.files):
            raise ValueError("it holds two arrays of one class")
    return part


def read_published(name, folder, pool, parts):
    """See read_set."""
    arrays = {part: load_arrays_pickle(published_file(name, folder, part)) for part in parts}
    images = read_published_pool(folder / f"{name}_80m_150k.pkl") if pool else None
    return arrays, images, {"names": {}}
