"""Prepared datasets: made from official files or a folder of images, and read again.

A prepared dataset is a folder of plain arrays: <name>_{train,val,test,save_100}.npz with an array
uint8 [n,H,W,3] for each class id, <name>_pool.npy uint8 [n,H,W,3], and meta.json, which is written
last: with it the dataset is complete.
"""

import functools
import json
import os
from pathlib import Path

import numpy as np
from filelock import FileLock

from datasets import DATASETS
from datasets.images import decode, print_left_out
from datasets.pool import digests, read_pool, read_published_pool, reduce_pool
from datasets.spec import SPLITS, check_images, file_of, shuffle
from runtime.errors import UserError, explain
from runtime.files import atomic_write, check_zip, load_array, load_pickle, save_array, save_text

MIN_IMAGES = 10  # training images of a class, so that val gets one

# ------------------------------------------------------------------------------ what is there


def read_meta(folder):
    """The content of a prepared dataset's meta.json; {} if it is missing or damaged."""
    path = folder / "meta.json"
    with explain(path):
        try:
            return json.loads(path.read_text()) if os.path.exists(path) else {}
        except ValueError:
            return {}


def holds_set(name, folder):
    """Whether a folder holds a prepared dataset or published pickles, by the names of files."""
    names = ["meta.json", *(f"{name}_{file_of(split)}.pkl" for split in SPLITS)]
    return any(os.path.exists(folder / name) for name in names)


def ensure_prepared(name, folder, raw=None, **options):
    """Prepare the dataset in `folder` if it is not there; see prepare().

    Of two processes at once the second waits, and uses what the first has prepared. Raises
    UserError if that was made with other options, where None means any, or from a --source that
    has changed since.
    """
    if not holds_set(name, folder):
        with explain(f"--data {folder}", "cannot be written", "; choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock").acquire()
        with lock:
            if not holds_set(name, folder):
                prepare(name, folder, raw, **options)
                return
    made = read_meta(folder)
    for key, value in options.items():
        if value is not None and absolute(value) != made.get(key):
            found = f"was prepared with {made.get(key)}" if made else "holds the published files"
            raise UserError(f"--{key} {value}: {folder} {found}; choose another folder with --data")
    if source := options.get("source"):
        listing = DATASETS[name].read(Path(source), False, True).listing
        if listing != made.get("listing", listing):
            advice = f"remove {folder}, or choose another folder with --data"
            raise UserError(f"--source {source}: has changed since it was prepared; {advice}")


def absolute(option):
    """An option of prepare() as meta.json has it, which holds wherever its reader stands."""
    if isinstance(option, list):
        return [os.path.realpath(path) for path in option]
    return os.path.realpath(option) if isinstance(option, str) else option


# ------------------------------------------------------------------------------ preparing


def prepare(name, folder, raw=None, **options):
    """Make the prepared dataset `folder`. Raises UserError.

    raw: folder of the official files (None: <folder>/../raw, downloaded to), or Tiny-ImageNet's
    archive. options: source and image_size, for images of your own; unlabeled, a list of what
    read_pool() reads, for the pool (None: the dataset's own); per_class, at most so many training
    images (before the split) and test images per class; pool_size, so many of the pool; seed, of
    all random choices.
    """
    spec, source, unlabeled = DATASETS[name], options.get("source"), options.get("unlabeled")
    side, seed = options.get("image_size") or spec.side, options.get("seed") or 0
    path = Path(source or raw or folder.parent / "raw")
    print(f"preparing {name} in {folder} ...", flush=True)
    pools = [read_pool(each, side) for each in unlabeled or ()]
    raw_set = spec.read(path, not (source or raw), with_pool=not pools)
    print_left_out(path, raw_set.left_out)
    splits = make_splits(path, raw_set, spec.exemplars, options.get("per_class"), seed)
    if raw_set.files:
        splits = {split: decode(raw_set.files, own, side) for split, own in splits.items()}
    pool, origin = raw_set.pool, "the dataset's own"
    if pools:
        pool, origin = np.concatenate(pools), ", ".join(map(str, unlabeled))
    elif raw_set.files:
        pool = decode(raw_set.files, {"pool": pool}, side)["pool"]
    known, test = {*digests(splits["train"], splits["val"])}, digests(splits["test"])
    if repeated := sum(image in known for image in test):
        print(f"{path}: {repeated} of {len(test)} test images are also training images", flush=True)
    meta = {key: absolute(option) for key, option in options.items()}
    meta |= {"dataset": name, "names": raw_set.names, "pool": None, "image_size": side}
    meta |= {"seed": seed, "listing": raw_set.listing, "test_in_train": repeated}
    if len(pool):
        size = options.get("pool_size")
        pool, meta["dropped"] = reduce_pool(pool, origin, known.union(test), size, seed)
        meta["pool"] = origin
    else:
        print(f"{folder}: no pool; train with --no_teaching, or give --unlabeled")
    if spec.mean is None:
        meta["mean"], meta["std"] = channel_statistics(splits["train"].values())
    write_set(folder, splits, pool, meta)


def make_splits(label, raw_set, exemplars, per_class, seed):
    """Divide a RawSet, whose images it takes away: {split: {class id: images, or their names}}.

    label: what errors call the source. Raises UserError for a class with too few images.
    """
    splits, held_out = {split: {} for split in SPLITS}, not raw_set.test
    if held_out:
        print(f"{label}: no test images, so a fifth of each class in train is held out", flush=True)
    for c, name in raw_set.names.items():
        own, test = (np.asarray(split.pop(c, ())) for split in (raw_set.train, raw_set.test))
        if len(own) < MIN_IMAGES:
            wanted = f"expected at least {MIN_IMAGES}"
            raise UserError(f"{label}: class {name} has {len(own)} training images, {wanted}")
        if held_out:
            own = shuffle(own, seed, "test", c)
            test, own = np.split(own, [round(len(own) / 5)])
        if not len(test):
            raise UserError(f"{label}: class {name} has no test image; add some")
        own = shuffle(own, seed, "per_class", c)[:per_class]
        split_class(own, c, splits, seed, exemplars)
        splits["test"][c] = test[:per_class]
    return splits


def split_class(images, c, splits, seed, exemplars):
    """Split the training images of class c 9:1 into train and val; draw exemplars from train.

    images: uint8 [n,H,W,3], or names [n]. splits: {split: {}}, to which class c is added.
    """
    images = shuffle(images, seed, "split", c)
    held_out = round(len(images) / 10)
    splits["val"][c], splits["train"][c] = images[:held_out], images[held_out:]
    splits["exemplars"][c] = shuffle(splits["train"][c], seed, "exemplars", c)[:exemplars]


def channel_statistics(arrays):
    """Mean and standard deviation, in [0,1], of the channels of uint8 arrays [n,H,W,3]."""
    counts = sum(
        np.stack([np.bincount(images[..., i].ravel(), minlength=256) for i in range(3)])
        for images in arrays
    )
    values, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ values / total
    std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
    # not 0 for a constant channel: images are divided by it
    return mean.round(6).tolist(), std.round(6).clip(1 / 255).tolist()


def write_set(folder, splits, pool, meta):
    """Write a prepared dataset into the folder, meta.json last. Raises UserError."""
    name = meta["dataset"]
    for split, arrays in splits.items():
        save = functools.partial(np.savez, **{str(c): images for c, images in arrays.items()})
        atomic_write(folder / f"{name}_{file_of(split)}.npz", save)
    if len(pool):
        save_array(folder / f"{name}_pool.npy", pool)
    save_text(folder / "meta.json", json.dumps(meta, indent=1) + "\n")


# ------------------------------------------------------------------------------ reading


def read_set(name, folder, pool=True, splits=SPLITS):
    """Some splits, the pool and the meta data of a dataset: prepared, published or embedded.

    Returns {split: {class id: uint8 [n,H,W,3]}} of the splits asked for; the pool, uint8
    [n,H,W,3], or None unless asked for; and a dict with names ({id: name}), and mean and std where
    the dataset has its own. Nothing else is read. Raises UserError.
    """
    if DATASETS[name].embedded:
        arrays, images, meta = read_embedded(name)
        return {split: arrays[split] for split in splits}, images if pool else None, meta
    if (folder / "meta.json").exists():
        return read_prepared(name, folder, pool, splits)
    arrays = {split: load_pickle(folder / f"{name}_{file_of(split)}.pkl") for split in splits}
    images = read_published_pool(folder / f"{name}_80m_150k.pkl") if pool else None
    return arrays, images, {"names": {}}


def read_embedded(name):
    """All splits, the pool and the meta data of an embedded dataset; it is always split alike."""
    spec = DATASETS[name]
    raw_set = spec.read(spec.embedded, download=False, with_pool=True)
    splits = {split: {} for split in SPLITS} | {"test": raw_set.test}
    for c, images in raw_set.train.items():
        split_class(images, c, splits, 0, spec.exemplars)
    return splits, raw_set.pool, {"names": raw_set.names}


def read_prepared(name, folder, pool, splits):
    """See read_set."""
    meta = read_meta(folder)
    if meta.get("dataset", name) != name:
        raise UserError(
            f"--data {folder}: holds {meta['dataset']}; use --dataset {meta['dataset']}"
        )
    if pool and meta.get("pool", "") is None:
        advice = "train with --no_teaching, or prepare it again with --unlabeled"
        raise UserError(f"--data {folder}: was prepared without a pool; {advice}")
    arrays, advice = {}, f"; remove {folder} and prepare it again"
    with explain(folder / "meta.json", "is damaged", advice):
        meta["names"] = {int(c): str(label) for c, label in meta["names"].items()}
    for split in splits:
        path = folder / f"{name}_{file_of(split)}.npz"
        with explain(path, "is damaged", advice):
            check_zip(path)
            with np.load(path, allow_pickle=False) as content:
                arrays[split] = {int(c): content[c] for c in content.files}
    return arrays, load_array(folder / f"{name}_pool.npy") if pool else None, meta


def limit_exemplars(source, by_class, number):
    """The first `number` exemplars of each class, which are in random order. Raises UserError."""
    if (fewest := min(map(len, by_class.values()))) < number:
        raise UserError(f"--exemplars {number}: a class of {source} has {fewest} exemplars")
    return {c: images[:number] for c, images in by_class.items()}


def check_arrays(source, arrays, pool, order):
    """Check the splits for every class in order. Returns the shape of an image, [H,W,3].

    arrays: {split: {class id: uint8 [n,H,W,3]}}; pool: uint8 [n,H,W,3] or None. Raises UserError.
    """
    found = {} if pool is None else {"pool": pool}
    for split, by_class in arrays.items():
        found |= {f"{split}, class {c}": by_class.get(c) for c in order}
    size = None
    for label, images in found.items():
        check_images(f"{source}: {label}", images, size)
        size = images.shape[1:3]
    return (*size, 3)
