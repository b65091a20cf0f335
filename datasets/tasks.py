"""How the classes of a dataset are divided into tasks, and in which order they come."""

import re
from pathlib import Path

import numpy as np

from datasets import DATASETS
from datasets.folder import normalize_name
from datasets.prepare import read_meta
from runtime.errors import UserError, first_line


def set_folder(args):
    """The folder of the prepared dataset."""
    return Path(args.data or f"data/{args.dataset}")


def not_prepared(args):
    """The error for a dataset that is not there, with the command that prepares it."""
    source = "" if DATASETS[args.dataset].classes else " --source DIR"
    command = f"python dataset.py --dataset {args.dataset} --data {set_folder(args)}{source}"
    return UserError(f"--data {set_folder(args)}: holds no {args.dataset}; prepare it: {command}")


def resolve_tasks(args, total=None):
    """Fill in args.dataset and the numbers of tasks and of classes per task. Raises UserError.

    By default those of the dataset; of a folder, as many tasks as possible: up to ten, of at least
    two classes. total: the number of classes, if the dataset is not prepared yet.
    """
    args.dataset = args.dataset or "cifar10"
    spec = DATASETS[args.dataset]
    if spec.embedded and args.data:
        raise UserError(f"--data {args.data}: {args.dataset} is embedded; remove --data")
    if not (total or spec.embedded):
        total = len(read_meta(set_folder(args)).get("names") or ())
    total = total or spec.classes
    if not total:
        raise not_prepared(args)
    tasks, classes = args.classifiers, args.classes_per_classifier
    if spec.classes and total >= spec.classes:
        tasks = tasks or spec.classifiers
        classes = classes or spec.classes_per_classifier
    elif not (tasks or classes):
        even = [n for n in range(2, min(10, total // 2) + 1) if total % n == 0]
        tasks = max(even, default=1)
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
        raise UserError(f"--class_order {order}: expected {needed} different ids below {total}")
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
    """The class ids that a file lists: a name or id per line, or ids as np.savetxt writes them.

    A line that is the name of one class and the id of another counts as the name.
    """
    known = {str(c): c for c in range(total)} | {normalize_name(n): c for c, n in names.items()}
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"--class_order {path}: expected published, sorted, random:SEED or a readable file "
            f"({first_line(error)})"
        ) from None
    order = []
    for number, line in enumerate(lines, 1):
        if re.fullmatch(r"\d\.\d*e\+\d\d", line):  # 9.000e+00
            line = f"{float(line):g}"
        if line and (c := known.get(normalize_name(line), -1)) in [-1, *order]:
            what = "repeats a class" if c in order else "is not a class"
            raise UserError(f"--class_order {path}: line {number}, {line[:40]!r}, {what}")
        if line:
            order.append(c)
    return order
