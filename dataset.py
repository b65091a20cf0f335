"""Dict-of-classes data sets, held on the device as uint8, and the batches made there.

A set is a dict {class id: uint8 [n,H,W,3]} for each of train, val, test and exemplars, and a pool
of unlabeled images uint8 [n,H,W,3] (METHOD.md section 2). As a script it prepares one, by
prepare.py, and shows it:

    python dataset.py --dataset cifar10                      downloads what it needs to data/raw
    python dataset.py --dataset tiny_imagenet --raw FILE     the official file, already here
    python dataset.py --dataset folder --source DIR          images of your own: DIR/train/<class>/*
    python dataset.py --dataset cifar10 --per_class 300 --data data/small
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import utils
from prepare import PARTS, check_images, classes_in, file_of, prepare, shuffled, split
from utils import Refusal

DIGITS = Path(__file__).parent / "data" / "digits.npz"


def permuted(classes, seed=1993):
    """A class order. Sets with no published one have that of seed 1993, as in iCaRL and since."""
    return np.random.RandomState(seed).permutation(classes).tolist()


class Facts(NamedTuple):
    """What is known of a data set: its tasks, published class order and normalisation."""

    classifiers: int
    classes_per_classifier: int
    order: list  # None: none was published
    mean: tuple
    std: tuple
    pad: int  # black pixels around a training image before the random crop


DATASETS = {
    "cifar10": Facts(
        classifiers=5,
        classes_per_classifier=2,
        order=[9, 8, 7, 1, 5, 0, 3, 4, 6, 2],
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        pad=4,
    ),
    "cifar100": Facts(
        classifiers=10,
        classes_per_classifier=10,
        order=None,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2009, 0.1984, 0.2023),
        pad=4,
    ),
    "tiny_imagenet": Facts(
        classifiers=10,
        classes_per_classifier=20,
        order=None,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        pad=8,
    ),
    "digits": Facts(
        classifiers=5,
        classes_per_classifier=2,
        order=None,
        mean=(0.3066, 0.3066, 0.3066),  # of its own training images
        std=(0.3767, 0.3767, 0.3767),
        pad=4,
    ),
    "folder": None,  # its images tell; an eighth of their side is padded, as with the others
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
    for flag in ("source", "image_size"):
        if args.dataset != "folder" and getattr(args, flag) is not None:
            raise Refusal(f"--{flag} {getattr(args, flag)}: goes with --dataset folder alone")
    facts, total = DATASETS[args.dataset], count_classes(args)
    tasks, classes = args.classifiers, args.classes_per_classifier
    whole = facts and total >= facts.classifiers * facts.classes_per_classifier
    if whole:
        tasks = tasks or facts.classifiers
        classes = classes or facts.classes_per_classifier
    else:
        tasks, classes = share_out(args, total)
    args.classifiers, args.classes_per_classifier = tasks, classes
    found = f"--classifiers {tasks} x --classes_per_classifier {classes} = {tasks * classes}"
    if tasks * classes > total:
        raise Refusal(f"{found}: {args.dataset} has {total} classes, give fewer")
    if not facts and tasks * classes != total:
        raise Refusal(f"{found}: there are {total} classes, leave none out or take some away")


def count_classes(args):
    """How many classes the set has: as prepared, or as its source has them."""
    meta = read_meta(set_folder(args))
    if isinstance(names := meta.get("names"), dict) and names:
        return len(names)
    if facts := DATASETS[args.dataset]:
        return facts.classifiers * facts.classes_per_classifier
    if not args.source:
        raise Refusal(
            f"--dataset folder: {set_folder(args)} is not prepared; name the images with "
            f"--source DIR, or the prepared set with --data"
        )
    return len(classes_in(args.source))


def share_out(args, total):
    """Tasks and classes of each; where one or both are not given, no class may be left over.

    With neither: the most tasks up to ten, of two classes at least. Raises Refusal.
    """
    tasks, classes = args.classifiers, args.classes_per_classifier
    if tasks and classes:
        return tasks, classes
    found = f"the {total} classes of {args.source or set_folder(args)}"
    for number, flag in ((tasks, "classifiers"), (classes, "classes_per_classifier")):
        if number and total % number:
            raise Refusal(f"--{flag} {number}: {found} do not divide evenly, give another number")
    if tasks or classes:
        return tasks or total // classes, classes or total // tasks
    for tasks in range(min(10, total // 2), 1, -1):
        if total % tasks == 0:
            return tasks, total // tasks
    raise Refusal(
        f"--dataset {args.dataset}: {found} do not divide evenly into 2 to 10 tasks of two or "
        f"more; take some away, or give --classifiers"
    )


def set_folder(args):
    """The folder of the prepared set."""
    return Path(args.data or f"data/{args.dataset}")


def read_meta(source):
    """What meta.json of a prepared set says; {} where there is none, or none that can be read."""
    try:
        meta = json.loads((source / "meta.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def holds_set(name, source):
    """Whether a folder holds a prepared set or the published pickles, by the names of files."""
    files = (source / "meta.json", source / f"{name}_train.pkl")
    return any(map(os.path.exists, files))  # which takes a name that is too long for an absent one


def obtain(args, source, per_class=None, seed=None):
    """Prepare the set in `source` if it is not there. Raises Refusal on one of other wishes."""
    wishes = {
        "per_class": per_class,
        "pool": ", ".join(args.unlabeled) if args.unlabeled else None,
        "seed": seed,
        "source": args.source and str(Path(args.source)),
        "image_size": args.image_size,
    }
    if not holds_set(args.dataset, source):
        if args.dataset == "folder" and not args.source:
            raise Refusal(f"--data {source}: no prepared set; name the images with --source DIR")
        prepare(
            args.dataset,
            source,
            args.raw,
            args.unlabeled,
            per_class,
            seed or 0,
            args.source,
            args.image_size,
        )
    made = read_meta(source)
    for key, wish in wishes.items():
        if wish is not None and made.get(key) != wish:
            if not os.path.exists(source / "meta.json"):  # nobody can get these anew
                flag = "unlabeled" if key == "pool" else key
                raise Refusal(
                    f"--data {source}: holds the published files, which --{flag} does not change; "
                    f"leave it out, or name another folder"
                )
            raise Refusal(
                f"--data {source}: was prepared with {key} {made.get(key)}, not {wish}; "
                f"delete it or name another"
            )


def load(args, device, beside=None, pool=True):
    """The data set of args.dataset and args.data on `device`. Raises Refusal.

    Without --data, data/<dataset> is prepared first if it is not there. beside: a file of a run,
    whose class order is taken. pool: whether the unlabeled images are needed; with --no_teaching
    they are not, and nothing of them is read.
    """
    pool = pool and not args.no_teaching
    if args.dataset == "digits":
        for flag in ("data", "raw", "unlabeled"):
            if getattr(args, flag):
                raise Refusal(f"--{flag} {getattr(args, flag)}: digits are embedded, leave it out")
        source, (parts, images, names) = DIGITS, digits()
        meta = {"names": names}
    else:
        source = set_folder(args)
        absent = not os.path.isdir(source) or not any(source.iterdir())
        if absent and args.data and not (args.raw or args.source):
            raise Refusal(
                f"--data {source}: no such folder, or empty; make it with: python dataset.py "
                f"--dataset {args.dataset} --data {source}"
            )
        if absent or holds_set(args.dataset, source):
            obtain(args, source)
        parts, images, meta = read(args.dataset, source, pool)
    facts, names = DATASETS[args.dataset], meta["names"]
    tasks, classes = args.classifiers, args.classes_per_classifier
    total = len(names) or facts.classifiers * facts.classes_per_classifier
    if tasks * classes > total:
        raise Refusal(
            f"--classifiers {tasks} x --classes_per_classifier {classes} = {tasks * classes}: "
            f"{source} has {total} classes, give fewer"
        )
    order = class_order(args, names, total, beside)[: tasks * classes]
    shape = images.shape[1:] if pool else first_shape(parts["train"])
    for part in PARTS:
        check_part(source, part, parts[part], order, shape)
    if min(shape[:2]) < 9:  # the last layer would see one pixel, too few for BatchNorm
        raise Refusal(f"{source}: found images of {list(shape)}, give at least 9x9")
    if not pool:
        images = np.zeros((0, *shape), np.uint8)
    mean, std = (facts.mean, facts.std) if facts else (meta["mean"], meta["std"])
    if not facts or total < facts.classifiers * facts.classes_per_classifier:
        print(
            f"{source}: {total} classes, {tasks} tasks of {classes} (--classifiers and "
            f"--classes_per_classifier choose others)",
            flush=True,
        )
    parts, on_device = {**parts}, {}
    for part in PARTS:  # a part that is on the device is kept there alone
        arrays = parts.pop(part)
        on_device[part] = {c: torch.from_numpy(arrays[c]).to(device) for c in order}
    return Data(
        source=str(source),
        classifiers=tasks,
        classes_per_classifier=classes,
        order=order,
        pool=torch.from_numpy(images).to(device),
        mean=torch.tensor(mean, device=device).view(3, 1, 1),
        std=torch.tensor(std, device=device).view(3, 1, 1),
        pad=facts.pad if facts else shape[0] // 8,
        names=names,
        **on_device,
    )


def first_shape(arrays):
    """[H,W,3] of a part's images, or None where it is none."""
    for images in arrays.values() if isinstance(arrays, dict) else ():
        return getattr(images, "shape", (None,))[1:]
    return None


# ------------------------------------------------------------------------------ class order


def class_order(args, names, total, beside=None):
    """The ids of all classes (or those that a file lists), in the order in which they come.

    Returns a list of int. names: {id: name}, {} where unknown; total: number of classes. beside: a
    checkpoint; the order of the run that it lies in holds, from which --class_order may not differ
    if it is given. Raises Refusal.
    """
    order, facts = args.class_order, DATASETS[args.dataset]
    needed = args.classifiers * args.classes_per_classifier
    if order in (None, "published"):
        asked = (facts and facts.order) or permuted(total)
    elif order == "sorted":
        asked = list(range(total))
    elif seed := re.fullmatch(r"random:(\d{1,10})", order, re.ASCII):
        if int(seed[1]) >= 2**32:
            raise Refusal(f"--class_order {order}: the seed must be below {2**32}")
        asked = permuted(total, int(seed[1]))
    else:
        asked = read_order(order, names, total)
    if len(asked) < needed:
        raise Refusal(
            f"--class_order {order}: lists {len(asked)} classes, give at least the {needed} of "
            f"--classifiers x --classes_per_classifier"
        )
    recorded = order_beside(beside, args, needed, total) if beside else None
    if recorded and order and asked[:needed] != recorded:
        raise Refusal(
            f"--class_order {order}: the run of {beside} has the order "
            f"{','.join(map(str, recorded))}; leave the flag out to take that"
        )
    return recorded or asked


def read_order(path, names, total):
    """The class ids that a file lists, one name or id a line. Raises Refusal.

    What is a name and an id, of another class perhaps, is taken for the name.
    """
    known = {str(c): c for c in range(total)} | {name: c for c, name in names.items()}
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise Refusal(
            f"--class_order {path}: neither published, sorted, random:SEED nor a file that can be "
            f"read ({utils.first_line(error)})"
        ) from None
    order = []
    for number, line in enumerate(lines, 1):
        if line and line not in known:
            raise Refusal(f"--class_order {path}: line {number}, {line[:40]!r}, is no class")
        if line and known[line] in order:
            raise Refusal(f"--class_order {path}: line {number} lists {line!r} once more")
        if line:
            order.append(known[line])
    return order


def order_beside(path, args, needed, total):
    """The class order of the run whose file `path` is; None if none of this set is recorded."""
    path = Path(path)
    prefix = re.match(r"(retrain_task\d+_)?", path.name)[0]
    for record in (path.with_name(f"{prefix}results.json"), path.with_name("results.json")):
        if not record.exists():
            continue
        try:
            content = json.loads(record.read_text())
            if content["config"]["dataset"] != args.dataset:
                return None
            order = content["class_order"][:needed]
            fits = len(order) == needed == len({*order}) and {*order} <= {*range(total)}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            fits = False
        if fits:
            return order
        if args.class_order:
            return None
        raise Refusal(f"{record}: tells no class order that fits; give it with --class_order")
    return None


# ------------------------------------------------------------------------------ reading sets


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


def read(name, source, pool=True):
    """Parts, pool and meta of a folder: a prepared set, or the published pickles.

    Parts: {part: {class id: uint8 [n,H,W,3]}}; pool: uint8 [n,H,W,3], None unless it is wanted;
    meta: a dict with names ({id: name}), and mean and std where the set has its own. Raises
    Refusal; check_part() then looks at the arrays themselves.
    """
    if (source / "meta.json").exists():
        return read_prepared(name, source, pool)
    if (source / f"{name}_train.pkl").exists():
        return read_published(name, source, pool)
    raise Refusal(
        f"--data {source}: holds neither a prepared {name} set nor the published pickles "
        f"({name}_train.pkl, ...); make one with: python dataset.py --dataset {name} --data DIR"
    )


def read_prepared(name, source, pool):
    path = source / "meta.json"
    try:
        meta = json.loads(path.read_text())
        if meta["dataset"] != name:
            raise Refusal(f"--data {source}: holds {meta['dataset']}, give it as --dataset")
        if pool and meta.get("pool", "") is None:
            raise Refusal(
                f"--data {source}: was prepared without a pool; train with --no_teaching, or "
                f"prepare it anew with --unlabeled"
            )
        meta["names"] = {int(c): word for c, word in meta["names"].items()}
        if name == "folder" and not meta["names"]:
            raise ValueError("meta.json names no class")
        if sorted(meta["names"]) != list(range(len(meta["names"]))):
            raise ValueError("the classes in meta.json do not count from 0")
        if not all(isinstance(name, str) for name in meta["names"].values()):
            raise ValueError("a class name in meta.json is no text")
        for key in ("mean", "std") if name == "folder" else ():
            meta[key] = [float(value) for value in meta[key]]
            if len(meta[key]) != 3 or not all(0 <= value <= 1 for value in meta[key]):
                raise ValueError(f"{key} in meta.json is not three numbers from 0 to 1")
        if name == "folder" and not all(meta["std"]):
            raise ValueError("std in meta.json is 0")
        parts = {}
        for part in PARTS:
            path = source / f"{name}_{file_of(part)}.npz"
            utils.check_archive(path)
            with np.load(path, allow_pickle=False) as arrays:
                parts[part] = {int(c): arrays[c] for c in arrays.files}
                if len(parts[part]) < len(arrays.files):
                    raise ValueError("a class is there twice")
        images = utils.load_array(source / f"{name}_pool.npy") if pool else None
    except Refusal:
        raise
    except Exception as error:  # a damaged file can raise anything
        words = utils.first_line(error)
        raise Refusal(
            f"--data {source}: {path.name} is damaged or missing ({words}); delete the folder, "
            f"prepare it anew"
        ) from None
    if pool:
        check_images(source / f"{name}_pool.npy", images)
    return parts, images, meta


def read_published(name, source, pool):
    parts = {
        part: utils.load_arrays_pickle(source / f"{name}_{file_of(part)}.pkl") for part in PARTS
    }
    images = None
    if pool:
        path = source / f"{name}_80m_150k.pkl"
        content = utils.load_arrays_pickle(path)
        images = content.get("data") if isinstance(content, dict) else None
        check_images(f"{path}: 'data'", images)
    return parts, images, {"names": {}}


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


# ------------------------------------------------------------------------------ the command


def table(data):
    """The classes in task order with the counts of each part, as lines of text."""
    width = max(12, *(len(data.names.get(k, "")) for k in data.order))
    row = f"{{:>4}}  {{:>5}}  {{:<{width}}}  {{:>6}}  {{:>6}}  {{:>6}}  {{:>9}}".format
    lines = [row("task", "class", "name", *PARTS)]
    c = data.classes_per_classifier
    for place, k in enumerate(data.order):
        counts = [len(getattr(data, part)[k]) for part in PARTS]
        lines.append(row(place // c + 1, k, data.names.get(k, ""), *counts))
    totals = [sum(len(images) for images in getattr(data, part).values()) for part in PARTS]
    lines.append(row("", "", "all", *totals))
    height, width = data.pool.shape[1:3]
    return "\n".join([*lines, f"pool: {len(data.pool)} unlabeled images; all {height}x{width}"])


def preview(data, path):
    """Write a picture: a row for each task, some training images of each of its classes."""
    c = data.classes_per_classifier
    columns = max(2, 16 // c)
    height, width = (max(1, 64 // side) * side for side in data.pool.shape[1:3])
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
    utils.add_data_flags(flag)
    flag(
        "--per_class",
        type=utils.whole(10),
        metavar="N",
        help="a smaller set: at most N training and N test images of each class",
    )
    flag("--seed", type=utils.whole(0), metavar="N", help="of the split (default 0)")
    args = parser.parse_args(argv)
    args.no_teaching = False
    folder = set_folder(args)
    if args.dataset == "digits":
        wishes = (args.per_class, args.unlabeled, args.seed, args.raw)
        if any(wish is not None for wish in wishes):
            raise Refusal(
                "--dataset digits: embedded, leave out --per_class, --seed, --raw and --unlabeled"
            )
    asked = {key: vars(args)[key] for key in ("classifiers", "classes_per_classifier")}
    complete(args)  # what is wrong is told before anything is made
    if args.dataset != "digits":
        args.data = str(folder)
        if os.path.exists(folder / "meta.json"):
            print(f"{folder}: prepared before")
        obtain(args, folder, args.per_class, args.seed)
        vars(args).update(asked)
        complete(args)  # a part of Tiny-ImageNet has its classes counted only now
    data = load(args, torch.device("cpu"), pool=read_meta(folder).get("pool", "") is not None)
    print(table(data))
    preview(data, folder / "preview.png")
    print(f"picture: {folder / 'preview.png'}")
    return data


if __name__ == "__main__":
    utils.run(main)
