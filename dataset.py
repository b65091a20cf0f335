"""Dict-of-classes data sets, held on the device as uint8, and the batches made there.

A set is a dict {class id: uint8 [n,H,W,3]} for each of train, val, test and exemplars, and a pool
of unlabeled images uint8 [n,H,W,3] (docs/METHOD.md section 2). As a script it prepares a set (see
datasets/prepare.py) and shows it:

    python dataset.py --dataset cifar10                      downloads what it needs to data/raw
    python dataset.py --dataset tiny_imagenet --raw FILE     the official file, already here
    python dataset.py --dataset folder --source DIR          images of your own: DIR/train/<class>/*
    python dataset.py --dataset cifar10 --per_class 300 --data data/small
"""

import runtime.threads  # isort: skip  # noqa: F401  (OpenMP reads its settings with torch)

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import utils
from datasets import DATASETS
from datasets.prepare import ensure_prepared, holds_set, read_meta, read_set
from datasets.spec import PARTS, check_images
from runtime import cli, packed, ranks
from runtime.errors import UserError, first_line
from runtime.files import atomic_write
from runtime.process import run_script
from runtime.run import record_paths


@dataclass
class Data:
    """A data set on a device. order: the class ids of all tasks, task after task.

    train, val, test, exemplars: {class id: uint8 [n,H,W,3]}, empty if not loaded; pool: uint8
    [n,H,W,3]. mean, std: float32 [3,1,1]. A label is the position of the class in the order.
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
    names: dict = field(default_factory=dict)  # class id -> name, where known

    @property
    def image_size(self):
        """(height, width) of an image."""
        return tuple(self.pool.shape[1:3])

    def of_tasks(self, part, first, last):
        """Images uint8 [n,H,W,3] and labels int64 [n] of tasks first..last (from 1).

        part: one of the four dicts. Both are empty when last < first.
        """
        c = self.classes_per_classifier
        classes = range((first - 1) * c, last * c)
        images = torch.cat([part[self.order[i]] for i in classes] or [self.pool[:0]])
        labels = [torch.full((len(part[self.order[i]]),), i) for i in classes]
        labels = torch.cat(labels or [torch.empty(0, dtype=torch.long)])
        return images, labels.to(images.device)

    def fingerprint(self):
        """SHA-256 of the loaded images and their order in hex: equal for equal sets."""
        digest = hashlib.sha256(repr((self.order, self.classes_per_classifier)).encode())
        parts = [part for part in (self.train, self.val, self.test, self.exemplars) if part]
        for images in (*(part[c] for part in parts for c in self.order), self.pool):
            digest.update(repr(images.shape).encode())
            digest.update(images.cpu().contiguous().numpy())
        return digest.hexdigest()

    def counts(self):
        """Number of images in each part and in the pool: {"train": n, ..., "pool": n}."""
        counts = {part: sum(map(len, getattr(self, part).values())) for part in PARTS}
        return counts | {"pool": len(self.pool)}


# ------------------------------------------------------------------------------ batches


def normalize(images, data):
    """uint8 [n,H,W,3] to normalized float32 [n,3,H,W]; float images are normalized already.

    In memory the channels come last, which is fastest for convolutions on a CPU.
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
    index = torch.arange(n, device=device)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def one_pass(tensors, size, data, generator, augmented=True):
    """Yield shuffled batches of at most `size`: images normalized (and augmented), then the rest.

    tensors: images first (uint8 [n,H,W,3], or normalized float32 [n,3,H,W]), then tensors with a
    row for each image. The last batch holds what is left. All random draws of the pass are made
    first and go to the device together.
    """
    images, *others = tensors
    n, device = len(images), images.device
    order = torch.randperm(n, generator=generator)
    draws = torch.stack([order, *draw_views(n, data.pad, generator)] if augmented else [order])
    if device.type == "cuda":  # a copy from pinned memory does not block
        draws = draws.pin_memory().to(device, non_blocking=True)
    for rows, *views in draws.to(device).split(size, dim=1):
        batch = augment(images[rows], *views, data.pad) if augmented else images[rows]
        yield normalize(batch, data), *(other[rows] for other in others)


def endless(tensors, size, data, seed, *purpose, augmented=True):
    """one_pass after one_pass, each with its own random stream."""
    number = 0
    while True:
        generator = utils.stream(seed, *purpose, number)
        yield from one_pass(tensors, size, data, generator, augmented)
        number += 1


# ------------------------------------------------------------------------------ tasks


def resolve_tasks(args):
    """Check --dataset and fill in the number of tasks and of classes per task. Raises UserError."""
    if args.dataset not in DATASETS:
        raise UserError(f"--dataset {args.dataset}: unknown; give one of {', '.join(DATASETS)}")
    spec = DATASETS[args.dataset]
    for flag in ("source", "image_size"):
        if not spec.from_source and getattr(args, flag) is not None:
            names = " or ".join(name for name, other in DATASETS.items() if other.from_source)
            raise UserError(f"--{flag} {getattr(args, flag)}: only for --dataset {names}")
    total = count_classes(args)
    tasks, classes = args.classifiers, args.classes_per_classifier
    if spec.classes and total >= spec.classes:
        tasks = tasks or spec.classifiers
        classes = classes or spec.classes_per_classifier
    else:
        tasks, classes = divide(args, total)
    args.classifiers, args.classes_per_classifier = tasks, classes
    found = f"--classifiers {tasks} x --classes_per_classifier {classes} = {tasks * classes}"
    if tasks * classes > total:
        raise UserError(f"{found}: {args.dataset} has {total} classes, give fewer")
    if not spec.classes and tasks * classes != total:
        raise UserError(f"{found}: there are {total} classes; use all, or remove some")


def count_classes(args):
    """Number of classes of the prepared set, or else of its source."""
    spec, folder = DATASETS[args.dataset], set_folder(args)
    if isinstance(names := read_meta(folder).get("names"), dict) and names:
        return len(names)
    if spec.classes:
        return spec.classes
    if not args.source:
        raise UserError(
            f"--dataset {args.dataset}: {folder} is not prepared; name the images with --source "
            f"DIR, or a prepared set with --data"
        )
    return len(spec.list_classes(args.source))


def divide(args, total):
    """Numbers of tasks and of classes per task; what is not given must divide the classes evenly.

    By default as many tasks as possible: up to ten, of at least two classes. Raises UserError.
    """
    tasks, classes = args.classifiers, args.classes_per_classifier
    if tasks and classes:
        return tasks, classes
    found = f"the {total} classes of {args.source or set_folder(args)}"
    for number, flag in ((tasks, "classifiers"), (classes, "classes_per_classifier")):
        if number and total % number:
            raise UserError(f"--{flag} {number}: {found} do not divide evenly, give another number")
    if tasks or classes:
        return tasks or total // classes, classes or total // tasks
    for tasks in range(min(10, total // 2), 1, -1):
        if total % tasks == 0:
            return tasks, total // tasks
    raise UserError(
        f"--dataset {args.dataset}: {found} do not divide evenly into 2 to 10 tasks of two or "
        f"more; remove some classes, or give --classifiers"
    )


# ------------------------------------------------------------------------------ loading


def set_folder(args):
    """The folder of the prepared set."""
    return Path(args.data or f"data/{args.dataset}")


def find_set(args):
    """The folder (or embedded file) of the set, which is prepared first if it is missing."""
    if embedded := DATASETS[args.dataset].embedded:
        for flag in ("data", "raw", "unlabeled"):
            if getattr(args, flag):
                raise UserError(
                    f"--{flag} {getattr(args, flag)}: {args.dataset} is part of this repository, "
                    f"leave the flag out"
                )
        return embedded
    folder = set_folder(args)
    missing = not os.path.isdir(folder) or not any(folder.iterdir())
    if missing and args.data and not (args.raw or args.source):
        raise UserError(
            f"--data {folder}: no such folder, or empty; make it with: python dataset.py "
            f"--dataset {args.dataset} --data {folder}"
        )
    if missing or holds_set(args.dataset, folder):
        ranks.on_rank0(ensure_prepared)(args, folder)
    return folder


def load(args, device, checkpoint=None, pool=True, parts=PARTS):
    """The data set of args.dataset and args.data on `device`. Raises UserError.

    Without --data, data/<dataset> is prepared first if it is missing. checkpoint: a file of a run,
    whose class order is used. parts: those that are needed; pool: whether the unlabeled images are
    (with --no_teaching they never are). Nothing else is read, and the other parts are empty.
    """
    spec, source = DATASETS[args.dataset], find_set(args)
    pool = pool and not getattr(args, "no_teaching", False)
    arrays, unlabeled, meta = read_set(args.dataset, source, pool, parts)
    tasks, classes, names = args.classifiers, args.classes_per_classifier, meta["names"]
    total = len(names) or spec.classes
    if tasks * classes > total:
        raise UserError(
            f"--classifiers {tasks} x --classes_per_classifier {classes} = {tasks * classes}: "
            f"{source} has {total} classes, give fewer"
        )
    order = class_order(args, names, total, checkpoint)[: tasks * classes]
    shape = check_arrays(source, arrays, unlabeled, order)
    if not spec.classes or total < spec.classes:
        print(
            f"{source}: {total} classes, {tasks} tasks of {classes} (change them with "
            f"--classifiers and --classes_per_classifier)",
            flush=True,
        )
    on_device = {part: {} for part in PARTS}
    for part in parts:  # free the arrays of a part once it is on the device
        own = arrays.pop(part)
        on_device[part] = {c: torch.from_numpy(own[c]).to(device) for c in order}
    unlabeled = np.zeros((0, *shape), np.uint8) if unlabeled is None else unlabeled
    mean, std = (spec.mean, spec.std) if spec.mean else (meta["mean"], meta["std"])
    return Data(
        source=str(source),
        classifiers=tasks,
        classes_per_classifier=classes,
        order=order,
        pool=torch.from_numpy(unlabeled).to(device),
        mean=torch.tensor(mean, device=device).view(3, 1, 1),
        std=torch.tensor(std, device=device).view(3, 1, 1),
        pad=shape[0] // 8 if spec.pad is None else spec.pad,
        names=names,
        **on_device,
    )


def check_arrays(source, arrays, pool, order):
    """Check the parts for every class in order. Returns the shape of an image, [H,W,3].

    arrays: {part: {class id: uint8 [n,H,W,3]}}; pool: uint8 [n,H,W,3] or None. Raises UserError.
    """
    shape = None if pool is None else pool.shape[1:]
    for part, by_class in arrays.items():
        if not isinstance(by_class, dict):
            raise UserError(f"{source}: {part} is not a dict of classes; prepare the set again")
        for c in order:
            if (images := by_class.get(c)) is None:
                raise UserError(f"{source}: {part} has no class {c}; prepare the set again")
            check_images(f"{source}: {part}, class {c}", images)
            shape = shape or images.shape[1:]
            if images.shape[1:] != shape:
                raise UserError(
                    f"{source}: {part}, class {c}: found images of {list(images.shape[1:])}, "
                    f"give {list(shape)} as everywhere in the set"
                )
    if min(shape[:2]) < 9:  # the last layer would see one pixel, too few for BatchNorm
        raise UserError(f"{source}: found images of {list(shape)}, give at least 9x9")
    return shape


# ------------------------------------------------------------------------------ class order


def permutation(classes, seed=1993):
    """A random class order; seed 1993 as in iCaRL and since, for sets without a published one."""
    return np.random.RandomState(seed).permutation(classes).tolist()


def class_order(args, names, total, checkpoint=None):
    """The ids of all classes (or those that a file lists), in the order in which they come.

    Returns a list of int. names: {id: name}, {} if unknown; total: number of classes. checkpoint:
    a file of a run, whose recorded order is used; --class_order, if given, must agree with it.
    Raises UserError.
    """
    order, published = args.class_order, DATASETS[args.dataset].order
    needed = args.classifiers * args.classes_per_classifier
    if order in (None, "published"):
        wanted = list(published) if published else permutation(total)
    elif order == "sorted":
        wanted = list(range(total))
    elif seed := re.fullmatch(r"random:(\d{1,10})", order, re.ASCII):
        if int(seed[1]) >= 2**32:
            raise UserError(f"--class_order {order}: the seed must be below {2**32}")
        wanted = permutation(total, int(seed[1]))
    else:
        wanted = read_order(order, names, total)
    if len(wanted) < needed:
        raise UserError(
            f"--class_order {order}: lists {len(wanted)} classes, give at least the {needed} of "
            f"--classifiers x --classes_per_classifier"
        )
    recorded = recorded_order(checkpoint, args, needed, total) if checkpoint else None
    if recorded and order and wanted[:needed] != recorded:
        raise UserError(
            f"--class_order {order}: the run of {checkpoint} has the order "
            f"{','.join(map(str, recorded))}; leave the flag out to use that"
        )
    return recorded or wanted


def read_order(path, names, total):
    """The class ids that a file lists, one name or id per line. Raises UserError.

    A line that is the name of one class and the id of another counts as the name.
    """
    known = {str(c): c for c in range(total)} | {name: c for c, name in names.items()}
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"--class_order {path}: neither published, sorted, random:SEED nor a readable file "
            f"({first_line(error)})"
        ) from None
    order = []
    for number, line in enumerate(lines, 1):
        if line and line not in known:
            raise UserError(f"--class_order {path}: line {number}, {line[:40]!r}, is not a class")
        if line and known[line] in order:
            raise UserError(f"--class_order {path}: line {number} repeats {line!r}")
        if line:
            order.append(known[line])
    return order


def recorded_order(path, args, needed, total):
    """The class order of the run whose file `path` is; None if none of this set is recorded.

    A packed file holds it, a checkpoint has the results.json of its run beside it.
    """
    header = packed.read_header(path)
    for record in [path] if header else filter(os.path.exists, record_paths(path)):
        try:
            content = header or json.loads(record.read_text())
            config = header or content["config"]
            if config["dataset"] != args.dataset:
                return None
            order = content["class_order"][:needed]
            valid = len(order) == needed == len({*order}) and {*order} <= {*range(total)}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            valid = False
        if valid:
            return order
        if args.class_order:
            return None
        raise UserError(f"{record}: has no matching class order; give it with --class_order")
    return None


# ------------------------------------------------------------------------------ the command


def table(data):
    """The classes in task order with the counts of each part, as lines of text."""
    width = max(12, *(len(data.names.get(k, "")) for k in data.order))
    row = f"{{:>4}}  {{:>5}}  {{:<{width}}}  {{:>6}}  {{:>6}}  {{:>6}}  {{:>9}}".format
    lines = [row("task", "class", "name", *PARTS)]
    for i, k in enumerate(data.order):
        counts = [len(getattr(data, part)[k]) for part in PARTS]
        task = i // data.classes_per_classifier + 1
        lines.append(row(task, k, data.names.get(k, ""), *counts))
    *totals, pool = data.counts().values()
    lines.append(row("", "", "all", *totals))
    height, width = data.pool.shape[1:3]
    return "\n".join([*lines, f"pool: {pool} unlabeled images; all {height}x{width}"])


def preview(data, path):
    """Write a picture: a row for each task, some training images of each of its classes."""
    c = data.classes_per_classifier
    columns = max(2, 16 // c)
    height, width = (max(1, 64 // side) * side for side in data.pool.shape[1:3])
    margin, gap, label = 70, 12, 16
    size = (margin + c * (columns * width + gap), data.classifiers * (height + label + 4) + 4)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, k in enumerate(data.order):
        task, column = divmod(i, c)
        x, y = margin + column * (columns * width + gap), task * (height + label + 4) + 4
        draw.text((x, y), f"{k} {data.names.get(k, '')}", fill="black")
        if not column:
            draw.text((8, y + label + height // 2 - 6), f"task {task + 1}", fill="black")
        for j, image in enumerate(data.train[k][:columns].cpu().numpy()):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (x + j * width, y + label))
    atomic_write(path, lambda file: picture.save(file, "PNG"))


def parse(argv):
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser, DATASETS)
    flag = parser.add_argument_group("preparing").add_argument
    flag(
        "--per_class",
        type=cli.int_range(10),
        metavar="N",
        help="a smaller set: at most N training and N test images of each class",
    )
    flag("--seed", type=cli.int_range(0), metavar="N", help="of the split (default 0)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    folder = set_folder(args)
    given = {key: vars(args)[key] for key in ("classifiers", "classes_per_classifier")}
    resolve_tasks(args)  # reports errors before anything is made
    if DATASETS[args.dataset].embedded:
        flags = (args.per_class, args.seed, args.raw, args.unlabeled)
        if any(value is not None for value in flags):
            raise UserError(
                f"--dataset {args.dataset}: part of this repository, leave out --per_class, "
                f"--seed, --raw and --unlabeled"
            )
    else:
        args.data = str(folder)
        if os.path.exists(folder / "meta.json"):
            print(f"{folder}: already prepared")
        ensure_prepared(args, folder, args.per_class, args.seed)
        vars(args).update(given)
        resolve_tasks(args)  # only now are the classes of an incomplete Tiny-ImageNet known
    data = load(args, torch.device("cpu"), pool=read_meta(folder).get("pool", "") is not None)
    print(table(data))
    preview(data, folder / "preview.png")
    print(f"picture: {folder / 'preview.png'}")
    return data


if __name__ == "__main__":
    run_script(main)
