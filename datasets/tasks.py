"""The tasks of a dataset: how many, of which classes, and how they look."""

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from datasets import DATASETS
from datasets.folder import normalize_name
from datasets.prepare import read_meta
from datasets.spec import SPLITS
from runtime.errors import UserError, explain, one_line


def set_folder(args):
    """The folder of the prepared dataset."""
    return Path(args.data or f"data/{args.dataset}")


def not_prepared(args):
    """The error for a dataset that is not there, with the command that prepares it."""
    source = "" if DATASETS[args.dataset].classes else " --source DIR"
    command = f"python dataset.py --dataset {args.dataset} --data {set_folder(args)}{source}"
    return UserError(f"--data {set_folder(args)}: contains no prepared dataset; run: {command}")


def resolve_tasks(args):
    """Fill in args.dataset and the numbers of tasks and of classes per task. Raises UserError.

    By default those of the dataset; of a folder, as many tasks as possible: up to ten, of at least
    two classes.
    """
    args.dataset = args.dataset or "cifar10"
    spec = DATASETS[args.dataset]
    if spec.embedded and args.data:
        raise UserError(f"--data {args.data}: {args.dataset} is embedded; remove --data")
    names = {} if spec.embedded else read_meta(set_folder(args)).get("names")
    total = len(names or ()) or spec.classes
    if not total:
        raise not_prepared(args)
    tasks, classes = args.classifiers, args.classes_per_classifier
    if spec.classes and total >= spec.classes:
        tasks = tasks or spec.classifiers
        classes = classes or spec.classes_per_classifier
    elif not (tasks or classes):
        tasks = max(n for n in range(1, max(1, min(10, total // 2)) + 1) if total % n == 0)
    tasks = tasks or max(1, total // classes)
    classes = classes or max(1, total // tasks)
    args.classifiers, args.classes_per_classifier = tasks, classes
    learned = isinstance(args.class_order, list)  # by a checkpoint: class_order() compares them
    if tasks * classes > total or (tasks * classes < total and not spec.classes and not learned):
        raise UserError(
            f"--classifiers {tasks} x --classes_per_classifier {classes} = {tasks * classes}, but "
            f"{args.dataset} has {total} classes; choose other numbers"
        )


def class_order(args, names, total, known=None):
    """The ids of classes, int, in the order in which they come, at least those of all tasks.

    args.class_order: None, as typed, or a list of ids. names: {id: name}, {} if unknown; total:
    number of classes. known: the `args` in a checkpoint. Raises UserError, also if the checkpoint
    has learned other classes or another order.
    """
    order, published = args.class_order or "published", DATASETS[args.dataset].order
    if order == "published" and not published:
        order = "random:1993"  # as iCaRL and its successors
    needed = args.classifiers * args.classes_per_classifier
    if isinstance(order, list):
        ids = order
    elif order == "published":
        ids = list(published)
    elif order == "sorted":
        ids = list(range(total))
    elif seed := re.fullmatch(r"random:(\d{1,9})", order, re.ASCII):
        ids = np.random.RandomState(int(seed[1])).permutation(total).tolist()
    else:
        ids = read_order(order, names, total)
    if len(ids) < needed or len({*ids} & {*range(total)}) < len(ids):
        wanted = f"at least {needed} ids below {total}, each once"
        raise UserError(f"--class_order {order}: expected {wanted}, got {len(ids)}")
    if known and ids[:needed] != known["class_order"][:needed]:
        raise UserError(f"--class_order {order}: the checkpoint has another order; remove the flag")
    for c, learned in zip(ids[:needed], known["class_names"] if known else ()):
        if names and normalize_name(names[c]) != normalize_name(learned) and learned != str(c):
            raise UserError(
                f"--data {set_folder(args)}: class {c} is {names[c]!r}, where the checkpoint has "
                f"{learned!r}; choose the dataset that it was trained on"
            )
    return ids


def read_order(path, names, total):
    """The class ids that a file lists, a name or an id on each line; a name counts first."""
    known = {str(c): c for c in range(total)} | {normalize_name(n): c for c, n in names.items()}
    with explain(f"--class_order {path}", advice="; give published, sorted, random:SEED or a file"):
        lines = Path(path).read_text("utf-8-sig").splitlines()
    lines = [normalize_name(line.strip()) for line in lines if line.strip()]
    # np.savetxt wrote the published files: 9.000e+00
    savetxt = re.compile(r"\d\.\d*e\+\d\d")
    lines = [f"{float(line):g}" if savetxt.fullmatch(line) else line for line in lines]
    if unknown := [line for line in lines if line not in known]:
        raise UserError(f"--class_order {path}: {unknown[0][:40]!r} is not a class")
    return [known[line] for line in lines]


def table(data):
    """The classes in task order with the counts of each split, as lines of text."""
    names = {k: one_line(data.names.get(k, "")) for k in data.order}
    width = max(12, *map(len, names.values()))
    row = f"{{:>4}}  {{:>5}}  {{:<{width}}}  {{:>6}}  {{:>6}}  {{:>6}}  {{:>9}}".format
    lines = [row("task", "class", "name", *SPLITS)]
    for i, k in enumerate(data.order):
        counts = [len(getattr(data, split)[k]) for split in SPLITS]
        lines.append(row(i // data.classes_per_classifier + 1, k, names[k], *counts))
    *totals, pool = data.counts().values()
    lines.append(row("", "", "all", *totals))
    height, width = data.image_size
    return "\n".join([*lines, f"pool: {pool} unlabeled images; all {height}x{width}"])


def draw(data):
    """A Pillow image: a row for each task, some training images of each of its classes."""
    c = data.classes_per_classifier
    columns = max(2, 16 // c)
    height, width = (max(1, 64 // side) * side for side in data.image_size)
    cell, row = columns * width + 12, height + 20
    picture = Image.new("RGB", (c * cell, data.classifiers * row), "white")
    pen = ImageDraw.Draw(picture)
    for i, k in enumerate(data.order):
        x, y = i % c * cell, i // c * row
        pen.text((x, y), f"task {i // c + 1}: {k} {one_line(data.names.get(k, ''))}", fill="black")
        images = data.train[k][:columns].cpu().numpy()
        strip = Image.fromarray(np.hstack(images))
        strip = strip.resize((len(images) * width, height), Image.Resampling.NEAREST)
        picture.paste(strip, (x, y + 16))
    return picture
