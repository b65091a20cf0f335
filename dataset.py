"""Dict-of-classes data sets, held on the device as uint8, and the batches made there.

A set is a dict {class id: uint8 [n,H,W,3]} for each of train, val, test and exemplars, and a pool
of unlabeled images uint8 [n,H,W,3] (METHOD.md section 2). As a script it prepares one:

    python dataset.py --dataset cifar10                      downloads what it needs to data/raw
    python dataset.py --dataset cifar10 --raw DIR            DIR holds the official files
    python dataset.py --dataset cifar10 --per_class 300 --data data/small
"""

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

import utils
from utils import Refusal

EXEMPLARS = 100  # of each class, a part of train, kept for good
PARTS = ("train", "val", "test", "exemplars")
DIGITS = Path(__file__).parent / "data" / "digits.npz"


def permuted(classes):
    """The class order of sets with no published one: seed 1993, as iCaRL and its successors do."""
    return np.random.RandomState(1993).permutation(classes).tolist()


class Facts(NamedTuple):
    """What is known of a data set: its tasks, published class order and normalisation."""

    classifiers: int
    classes_per_classifier: int
    order: list
    mean: tuple
    std: tuple
    pad: int = 4  # black pixels around a training image before the random crop


DATASETS = {
    "cifar10": Facts(
        classifiers=5,
        classes_per_classifier=2,
        order=[9, 8, 7, 1, 5, 0, 3, 4, 6, 2],
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "digits": Facts(
        classifiers=5,
        classes_per_classifier=2,
        order=permuted(10),
        mean=(0.3066, 0.3066, 0.3066),  # of its own training images
        std=(0.3767, 0.3767, 0.3767),
    ),
}


@dataclass
class Data:
    """A data set on a device. order: the class ids of all tasks, task after task.

    train, val, test, exemplars: {class id: uint8 [n,H,W,3]}; pool: uint8 [n,H,W,3].
    mean, std: float32 [3,1,1]. A label is the class's place in the order.
    """

    source: str
    classifiers: int
    classes_per_classifier: int
    order: list
    train: dict
    val: dict
    test: dict
    exemplars: dict
    pool: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    pad: int
    names: dict = field(default_factory=dict)  # class id -> its name, where known

    def of_tasks(self, part, first, last):
        """Images uint8 [n,H,W,3] and labels int64 [n] of tasks first..last (from 1).

        part: one of the four dicts. Both are empty when last < first.
        """
        c = self.classes_per_classifier
        places = range((first - 1) * c, last * c)
        images = [part[self.order[place]] for place in places]
        if not images:
            images = [next(iter(part.values()))[:0]]
        labels = [torch.full((len(i),), place) for place, i in zip(places, images)]
        images = torch.cat(images)
        return images, torch.cat(labels or [torch.empty(0, dtype=torch.long)]).to(images.device)


# ------------------------------------------------------------------------------ batches


def normalise(images, data):
    """uint8 [n,H,W,3] to float32 [n,3,H,W], normalised; what is float already is so.

    In memory the channels come last, where convolutions on a CPU are fastest.
    """
    if images.is_floating_point():
        return images.contiguous(memory_format=torch.channels_last)
    images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    return images.div_(255).sub_(data.mean).div_(data.std)


def draw_views(n, pad, generator):
    """Flips (bool [n]) and crop offsets dy, dx (int64 [n], 0..2*pad) for n training images."""
    flip = torch.rand(n, generator=generator) < 0.5
    dy, dx = torch.randint(2 * pad + 1, (2, n), generator=generator)
    return flip, dy, dx


def augment(images, flip, dy, dx, pad):
    """Pad by `pad` black pixels, crop back at (dy, dx), flip: uint8 [n,H,W,3] to the same.

    flip: bool or 0/1 [n]; dy, dx: int64 [n].
    """
    n, height, width, _ = images.shape
    device = images.device
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    rows = dy[:, None] + torch.arange(height, device=device)  # n x H
    columns = dx[:, None] + torch.arange(width, device=device)  # n x W
    columns = torch.where(flip[:, None] > 0, columns.flip(1), columns)
    which = torch.arange(n, device=device)
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def one_pass(tensors, size, data, generator, augmented=True):
    """Yield shuffled batches of at most `size`: images normalised (and augmented), then the rest.

    tensors: images first (uint8 [n,H,W,3], or float32 [n,3,H,W] as they are), then what goes with
    them row by row. The last batch holds what is left. All draws of the pass are made at its
    start and go to the device at once.
    """
    images, *others = tensors
    n, device = len(images), images.device
    order = torch.randperm(n, generator=generator)
    draws = torch.stack([order, *draw_views(n, data.pad, generator)] if augmented else [order])
    if device.type == "cuda":  # from pinned memory the copy waits for nothing
        draws = draws.pin_memory().to(device, non_blocking=True)
    for rows, *views in draws.to(device).split(size, dim=1):
        batch = augment(images[rows], *views, data.pad) if augmented else images[rows]
        yield normalise(batch, data), *(other[rows] for other in others)


def endless(tensors, size, data, seed, *purpose, augmented=True):
    """one_pass after one_pass, each with a stream of its own."""
    number = 0
    while True:
        generator = utils.stream(seed, *purpose, number)
        yield from one_pass(tensors, size, data, generator, augmented)
        number += 1


# ------------------------------------------------------------------------------ loading


def complete(args):
    """Check --dataset and fill in the number of tasks and of their classes. Raises Refusal."""
    if args.dataset not in DATASETS:
        raise Refusal(f"--dataset {args.dataset}: unknown; give one of {', '.join(DATASETS)}")
    facts = DATASETS[args.dataset]
    args.classifiers = args.classifiers or facts.classifiers
    args.classes_per_classifier = args.classes_per_classifier or facts.classes_per_classifier
    tasks, classes = args.classifiers, args.classes_per_classifier
    if tasks * classes > len(facts.order):
        raise Refusal(
            f"--classifiers {tasks} x --classes_per_classifier {classes} = {tasks * classes}: "
            f"{args.dataset} has {len(facts.order)} classes, give fewer"
        )


def load(args, device):
    """The data set of args.dataset and args.data on `device`. Raises Refusal.

    Without --data, data/<dataset> is prepared first if it is not there.
    """
    if args.dataset == "digits":
        if args.data:
            raise Refusal(f"--data {args.data}: digits are embedded, leave --data out")
        source, (parts, pool, names) = DIGITS, digits()
    else:
        source = Path(args.data or f"data/{args.dataset}")
        if not source.is_dir() or not any(source.iterdir()):
            if args.data:
                raise Refusal(
                    f"--data {source}: no such folder, or empty; make it with: python dataset.py "
                    f"--dataset {args.dataset} --data {source}"
                )
            prepare(args.dataset, source)
        parts, pool, names = read(args.dataset, source)
    facts = DATASETS[args.dataset]
    order = facts.order[: args.classifiers * args.classes_per_classifier]
    shape = pool.shape[1:]
    if min(shape[:2]) < 9:  # the last layer would see one pixel, too few for BatchNorm
        raise Refusal(f"{source}: found images of {list(shape)}, give at least 9x9")
    for part in PARTS:
        check_part(source, part, parts[part], order, shape)
    on_device = {
        part: {c: torch.from_numpy(parts[part][c]).to(device) for c in order} for part in PARTS
    }
    return Data(
        source=str(source),
        classifiers=args.classifiers,
        classes_per_classifier=args.classes_per_classifier,
        order=order,
        pool=torch.from_numpy(pool).to(device),
        mean=torch.tensor(facts.mean, device=device).view(3, 1, 1),
        std=torch.tensor(facts.std, device=device).view(3, 1, 1),
        pad=facts.pad,
        names=names,
        **on_device,
    )


def fingerprint(data):
    """SHA-256 over the images of all parts and their order: tells whether a set is the same."""
    digest = hashlib.sha256(repr((data.order, data.classes_per_classifier)).encode())
    for images in (*(getattr(data, part)[c] for part in PARTS for c in data.order), data.pool):
        digest.update(repr(images.shape).encode())
        digest.update(images.cpu().contiguous().numpy())
    return digest.hexdigest()


def check_part(source, part, arrays, order, shape):
    """Refuse a part that is no dict of non-empty uint8 [n,H,W,3] for every class in order."""
    if not isinstance(arrays, dict):
        raise Refusal(f"{source}: {part} is no dict of classes; prepare the set anew")
    for c in order:
        images = arrays.get(c)
        if images is None:
            raise Refusal(f"{source}: {part} has no class {c}; prepare the set anew")
        check_images(f"{source}: {part}, class {c}", images)
        if images.shape[1:] != shape:
            raise Refusal(
                f"{source}: {part}, class {c}: found images of {list(images.shape[1:])}, "
                f"give {list(shape)} as in the pool"
            )


def check_images(where, images):
    """Refuse what is not a uint8 array [n,H,W,3] of at least one image."""
    if not isinstance(images, np.ndarray):
        found = type(images).__name__
    elif images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        found = f"{images.dtype} {list(images.shape)}"
    else:
        return
    raise Refusal(f"{where}: found {found}, give uint8 [n,H,W,3], n > 0")


def read(name, source):
    """Parts, pool and class names of a folder: a prepared set, or the published pickles."""
    if (source / "meta.json").exists():
        return read_prepared(name, source)
    if (source / f"{name}_train.pkl").exists():
        return read_published(name, source)
    raise Refusal(
        f"--data {source}: holds neither a prepared {name} set nor the published pickles "
        f"({name}_train.pkl, ...); make one with: python dataset.py --dataset {name} --data DIR"
    )


def file_of(part):
    """The published files call the exemplars save_100."""
    return f"save_{EXEMPLARS}" if part == "exemplars" else part


def read_prepared(name, source):
    path = source / "meta.json"
    try:
        meta = json.loads(path.read_text())
        if meta["dataset"] != name:
            raise Refusal(f"--data {source}: holds {meta['dataset']}, give it as --dataset")
        names = {int(c): word for c, word in meta["names"].items()}
        if not all(isinstance(word, str) for word in names.values()):
            raise ValueError("names are text")
        parts = {}
        for part in PARTS:
            path = source / f"{name}_{file_of(part)}.npz"
            utils.check_archive(path)
            with np.load(path, allow_pickle=False) as arrays:
                parts[part] = {int(c): arrays[c] for c in arrays.files}
                if len(parts[part]) < len(arrays.files):
                    raise ValueError("a class is there twice")
        pool = utils.load_array(source / f"{name}_pool.npy")
    except Refusal:
        raise
    except Exception as error:  # a damaged file can raise anything
        words = utils.first_line(error)
        raise Refusal(
            f"--data {source}: {path.name} is damaged or missing ({words}); delete the folder, "
            f"prepare it anew"
        ) from None
    check_images(source / f"{name}_pool.npy", pool)
    return parts, pool, names


def read_published(name, source):
    parts = {
        part: utils.load_arrays_pickle(source / f"{name}_{file_of(part)}.pkl") for part in PARTS
    }
    path = source / f"{name}_80m_150k.pkl"
    content = utils.load_arrays_pickle(path)
    pool = content.get("data") if isinstance(content, dict) else None
    check_images(f"{path}: 'data'", pool)
    return parts, pool, {}


def digits():
    """The embedded digits as 32x32 RGB: per class 30 test and 50 pool images, the rest train, val.

    Always the same split; 20 exemplars per class, since a class has about 90 training images.
    """
    with np.load(DIGITS, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    # 0..16 to 0..255, each pixel to 4x4, grey to RGB
    images = np.round(images * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    images = np.ascontiguousarray(np.broadcast_to(images[..., None], (*images.shape, 3)))
    parts, pool = {part: {} for part in PARTS}, []
    for c in range(10):
        own = shuffled(images[labels == c], 0, "digits", c)
        parts["test"][c] = own[:30]
        pool.append(own[30:80])
        split(own[80:], c, parts, seed=0, exemplars=20)
    return parts, np.concatenate(pool), {c: str(c) for c in range(10)}


# ------------------------------------------------------------------------------ preparing


def shuffled(images, seed, *purpose):
    return images[torch.randperm(len(images), generator=utils.stream(seed, *purpose)).numpy()]


def split(images, c, parts, seed, exemplars=EXEMPLARS):
    """Split the training images of class c 9:1 into train and val; draw exemplars from train."""
    images = shuffled(images, seed, "split", c)
    held_out = round(len(images) / 10)
    parts["val"][c], parts["train"][c] = images[:held_out], images[held_out:]
    parts["exemplars"][c] = shuffled(parts["train"][c], seed, "exemplars", c)[:exemplars]


def official(kind, raw, given):
    """A torchvision set, train and test, from the folder raw, downloaded unless `given`."""
    # "downloading" a sound archive that is there already only unpacks it
    download = not given or check_integrity(raw / kind.filename, kind.tgz_md5)
    try:
        return [kind(raw, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        words, wanted = utils.first_line(error), f"{kind.filename} or the folder {kind.base_folder}"
        pool = (
            ", or give another pool with --unlabeled"
            if kind is CIFAR100
            else f"; likewise {CIFAR100.filename}"
        )
        if given:
            raise Refusal(
                f"--raw {raw}: holds no sound {kind.__name__} ({words}); put {wanted} there{pool}"
            ) from None
        raise Refusal(
            f"{kind.__name__} cannot be downloaded ({words}); put {wanted} into {raw}, or name its "
            f"folder with python dataset.py --raw DIR{pool}"
        ) from None


def prepare(name, folder, raw=None, unlabeled=None, per_class=None, seed=0):
    """Make the prepared set `folder` from the official files: wholly, or not at all.

    raw: folder of the official files (default: <folder>/../raw, downloaded to). unlabeled: .npy
    file uint8 [n,H,W,3] for the pool (default: the CIFAR-100 training images). per_class: at most
    so many training (before the split) and test images of each class. Raises Refusal.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refusal(f"--data {folder}: exists and is not empty; delete it or name another")
    given, raw = raw is not None, Path(raw or folder.parent / "raw")
    if given and not raw.is_dir():
        raise Refusal(f"--raw {raw}: no such folder, give that of the official files")
    if given and raw.name in (CIFAR10.base_folder, CIFAR100.base_folder):
        raw = raw.parent
    if unlabeled:
        pool, origin = utils.load_array(unlabeled), str(unlabeled)
        check_images(f"--unlabeled {unlabeled}", pool)
    print(f"preparing {name} in {folder} ...", flush=True)
    train, test = official(CIFAR10, raw, given)
    if not unlabeled:
        pool, origin = official(CIFAR100, raw, given)[0].data, "CIFAR-100 training images"
    if pool.shape[1:] != train.data.shape[1:]:
        found = f"found images of {list(pool.shape)}, give [n,32,32,3]"
        raise Refusal(f"--unlabeled {unlabeled}: {found}")
    parts = {part: {} for part in PARTS}
    for c in range(len(train.classes)):
        own = train.data[np.array(train.targets) == c]
        split(shuffled(own, seed, "per_class", c)[:per_class], c, parts, seed)
        parts["test"][c] = test.data[np.array(test.targets) == c][:per_class]
    meta = {
        "dataset": name,
        "names": dict(enumerate(train.classes)),
        "pool": origin,
        "per_class": per_class,
        "seed": seed,
    }
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


def table(data):
    """The classes in task order with the counts of each part, as lines of text."""
    row = "{:>4}  {:>5}  {:<12}  {:>6}  {:>6}  {:>6}  {:>9}".format
    lines = [row("task", "class", "name", *PARTS)]
    c = data.classes_per_classifier
    for place, k in enumerate(data.order):
        counts = [len(getattr(data, part)[k]) for part in PARTS]
        lines.append(row(place // c + 1, k, data.names.get(k, ""), *counts))
    totals = [sum(len(images) for images in getattr(data, part).values()) for part in PARTS]
    lines.append(row("", "", "all", *totals))
    height, width = data.pool.shape[1:3]
    return "\n".join([*lines, f"pool: {len(data.pool)} unlabeled images; all {height}x{width}"])


def preview(data, path, columns=8, scale=2):
    """Write a picture: a row for each task, `columns` training images of each of its classes."""
    c = data.classes_per_classifier
    height, width = (scale * side for side in data.pool.shape[1:3])
    margin, gap, label = 70, 12, 16
    size = (margin + c * (columns * width + gap), data.classifiers * (height + label + 4) + 4)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for place, k in enumerate(data.order):
        task, column = divmod(place, c)
        x, y = margin + column * (columns * width + gap), task * (height + label + 4) + 4
        draw.text((x, y), f"{k} {data.names.get(k, '')}", fill="black")
        if not column:
            draw.text((8, y + label + height // 2 - 6), f"task {task + 1}", fill="black")
        for i, image in enumerate(data.train[k][:columns].cpu().numpy()):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (x + i * width, y + label))
    utils.write_whole(path, lambda file: picture.save(file, "PNG"))


def main(argv=None):
    parser = utils.Parser(__doc__)
    flag = parser.add_argument
    flag("--dataset", default="cifar10", metavar="NAME", help="cifar10 (default) or digits")
    flag(
        "--data",
        type=utils.place,
        metavar="DIR",
        help="where the set goes (default data/<dataset>)",
    )
    words = "folder of the official files, so that nothing is downloaded"
    flag("--raw", type=utils.place, metavar="DIR", help=words)
    words = "the pool, uint8 [n,32,32,3] (default: CIFAR-100)"
    flag("--unlabeled", type=utils.place, metavar="FILE.npy", help=words)
    flag(
        "--per_class",
        type=utils.whole(10),
        metavar="N",
        help="a smaller set: at most N training and N test images of each class",
    )
    flag("--seed", type=utils.whole(0), metavar="N", help="of the split (default 0)")
    args = parser.parse_args(argv)
    args.classifiers = args.classes_per_classifier = None
    complete(args)
    folder = Path(args.data or f"data/{args.dataset}")
    wishes = {"per_class": args.per_class, "pool": args.unlabeled, "seed": args.seed}
    wishes = {key: wish for key, wish in wishes.items() if wish is not None}
    if args.dataset == "digits":
        if wishes or args.raw:
            raise Refusal("--dataset digits: embedded, leave out all flags but --data")
    else:
        args.data = str(folder)
        if (folder / "meta.json").exists():
            print(f"{folder}: prepared before")
        elif not (folder / f"{args.dataset}_train.pkl").exists():
            prepare(args.dataset, folder, args.raw, args.unlabeled, args.per_class, args.seed or 0)
    data = load(args, torch.device("cpu"))
    meta = folder / "meta.json"
    made = json.loads(meta.read_text()) if meta.exists() else {}
    for key, wish in wishes.items():
        if made.get(key) != wish:
            raise Refusal(
                f"--data {folder}: was prepared with {key} {made.get(key)}, not {wish}; "
                f"delete it or name another"
            )
    print(table(data))
    preview(data, folder / "preview.png")
    print(f"picture: {folder / 'preview.png'}")
    return data


if __name__ == "__main__":
    utils.run(main)
