"""Dict-of-classes datasets, held on the device as uint8, and the batches made there.

A dataset is a dict {class id: uint8 [n,H,W,3]} for each of train, val, test and exemplars, and a
pool of unlabeled images uint8 [n,H,W,3] (docs/METHOD.md section 2). As a script it prepares a
dataset (see datasets/prepare.py) and shows it:

    python dataset.py --dataset cifar10                      downloads what it needs to data/raw
    python dataset.py --dataset tiny_imagenet --raw FILE     the official file, already here
    python dataset.py --dataset folder --source DIR          images of your own: DIR/train/<class>/*
    python dataset.py --per_class 300 --pool_size 5000 --data data/few
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

import utils
from datasets import DATASETS, prepare
from datasets.spec import SPLITS
from datasets.tasks import class_order, draw, not_prepared, resolve_tasks, set_folder, table
from runtime.args import Parser, add_data_flags, int_range, path
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.process import run_script


@dataclass
class Data:
    """A dataset on a device. order: the class ids of all tasks, task after task.

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

    def select_tasks(self, split, first, last):
        """Images uint8 [n,H,W,3] and labels int64 [n] of tasks first..last (from 1).

        split: one of the four dicts. Both are empty when last < first.
        """
        c = self.classes_per_classifier
        classes = range((first - 1) * c, last * c)
        images = torch.cat([split[self.order[i]] for i in classes] or [self.pool[:0]])
        labels = [torch.full((len(split[self.order[i]]),), i) for i in classes]
        labels = torch.cat(labels or [torch.empty(0, dtype=torch.long)])
        return images, labels.to(images.device)

    def fingerprint(self):
        """SHA-256 of the loaded images and their order in hex: equal for equal datasets."""
        digest = hashlib.sha256(repr((self.order, self.classes_per_classifier)).encode())
        splits = [split for split in (self.train, self.val, self.test, self.exemplars) if split]
        for images in (*(split[c] for split in splits for c in self.order), self.pool):
            digest.update(repr(images.shape).encode())
            digest.update(images.cpu().contiguous().numpy())
        return digest.hexdigest()

    def counts(self):
        """Number of images in each split and in the pool: {"train": n, ..., "pool": n}."""
        counts = {split: sum(map(len, getattr(self, split).values())) for split in SPLITS}
        return counts | {"pool": len(self.pool)}


# ------------------------------------------------------------------------------ batches


def normalize(images, data):
    """uint8 [n,H,W,3] to normalized float32 [n,3,H,W]; float images are normalized already.

    In memory the channels come last, which is fastest for convolutions on a CPU; first on mps,
    where BatchNorm then gave wrong gradients (PyTorch issue 175189).
    """
    mps = images.device.type == "mps"
    layout = torch.contiguous_format if mps else torch.channels_last
    if images.is_floating_point():
        return images.contiguous(memory_format=layout)
    images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
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
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    numbers = torch.arange(max(n, height, width), device=images.device)
    rows = dy[:, None] + numbers[:height]  # n x H
    columns = dx[:, None] + numbers[:width]  # n x W
    columns = torch.where(flip[:, None] > 0, columns.flip(1), columns)
    return padded[numbers[:n, None, None], rows[:, :, None], columns[:, None, :]]


def epoch_draws(n, size, data, generator, first=0, augmented=True):
    """Draw shuffled batches of at most `size` of n images; the last one holds what is left.

    Yields int64 [4, m]: row (from `first`), flip, dy and dx of each image; [1, m], the rows, unless
    augmented. All random draws of the epoch are made first and go to the device together.
    """
    order, device = first + torch.randperm(n, generator=generator), data.pool.device
    draws = torch.stack([order, *draw_views(n, data.pad, generator)] if augmented else [order])
    if device.type == "cuda":  # a copy from pinned memory does not block
        draws = draws.pin_memory().to(device, non_blocking=True)
    yield from draws.to(device).split(size, dim=1)


def infinite_draws(n, size, data, seed, *purpose, first=0, augmented=True):
    """epoch_draws again and again, each time with a random stream of its own."""
    number = 0
    while True:
        generator = utils.make_generator(seed, *purpose, number)
        yield from epoch_draws(n, size, data, generator, first, augmented)
        number += 1


def take(tensors, draws, data):
    """The batch of some draws: images normalized (and augmented), then rows of the other tensors.

    tensors: images first (uint8 [n,H,W,3], or normalized float32 [n,3,H,W]), then tensors with a
    row for each image.
    """
    (images, *others), (rows, *views) = tensors, draws
    batch = augment(images[rows], *views, data.pad) if views else images[rows]
    return normalize(batch, data), *(other[rows] for other in others)


# ------------------------------------------------------------------------------ loading


def load(args, device, pool=True, splits=SPLITS, known=None):
    """The dataset of args.dataset and args.data on `device`, see class_order(). Raises UserError.

    One that is downloaded to data/<dataset> is prepared first if it is missing. splits: those that
    are needed; pool: whether the unlabeled images are (with --no_teaching they never are). Nothing
    else is read, and the other splits are empty. known: the `args` in a checkpoint, which must have
    learned the same classes in the same order.
    """
    spec = DATASETS[args.dataset]
    folder = spec.embedded or set_folder(args)
    if not spec.embedded and not prepare.holds_set(args.dataset, folder):
        if args.data or not spec.classes:
            raise not_prepared(args)
        prepare.ensure_prepared(args.dataset, folder)
    pool = pool and not getattr(args, "no_teaching", False)
    arrays, unlabeled, meta = prepare.read_set(args.dataset, folder, pool, splits)
    tasks, classes, names = args.classifiers, args.classes_per_classifier, meta["names"]
    order = class_order(args, names, len(names) or spec.classes, known)[: tasks * classes]
    shape = prepare.check_arrays(folder, arrays, unlabeled, order)
    if number := getattr(args, "exemplars", None):
        arrays["exemplars"] = prepare.limit_exemplars(folder, arrays["exemplars"], number)
    on_device = {split: {} for split in SPLITS}
    for split in splits:  # free the arrays of a split once it is on the device
        own = arrays.pop(split)
        on_device[split] = {c: torch.from_numpy(own[c]).to(device) for c in order}
    unlabeled = np.zeros((0, *shape), np.uint8) if unlabeled is None else unlabeled
    mean, std = (spec.mean, spec.std) if spec.mean else (meta["mean"], meta["std"])
    return Data(
        source="embedded" if spec.embedded else str(folder),
        classifiers=tasks,
        classes_per_classifier=classes,
        order=order,
        pool=torch.from_numpy(unlabeled).to(device),
        mean=torch.tensor(mean, device=device).view(3, 1, 1),
        std=torch.tensor(std, device=device).view(3, 1, 1),
        pad=shape[0] // 8,
        names=names,
        **on_device,
    )


# ------------------------------------------------------------------------------ the command


def make_parser():
    parser = Parser(__doc__)
    add_data_flags(parser, DATASETS)
    flag = parser.add_argument_group("preparing").add_argument
    message = "folder of the official files, or tiny-imagenet-200.zip; nothing is downloaded then"
    flag("--raw", type=path, metavar="PATH", help=message)
    message = (
        "for --dataset folder: DIR/train/<class>/*, DIR/test/<class>/* and an optional pool "
        "DIR/unlabeled/*, in any format that Pillow reads"
    )
    flag("--source", type=path, metavar="DIR", help=message)
    message = "for --dataset folder: resize to NxN, a multiple of 8 from 16 to 128 (default 32)"
    flag("--image_size", type=int, choices=range(16, 129, 8), metavar="N", help=message)
    message = (
        "the pool: .npy of uint8 [n,H,W,3], the published pickle, or a folder of images; "
        "several are joined (default: the dataset's own)"
    )
    flag("--unlabeled", type=path, nargs="+", metavar="PATH", help=message)
    message = "a smaller dataset: at most N training and N test images of each class"
    flag("--per_class", type=int_range(10), metavar="N", help=message)
    flag("--pool_size", type=int_range(1), metavar="N", help="a smaller pool: N images at random")
    flag("--seed", type=int_range(0), metavar="N", help="of all random choices (default 0)")
    return parser


PREPARING = ("raw", "source", "image_size", "unlabeled", "per_class", "pool_size", "seed")


def main(argv=None):
    args = make_parser().parse_args(argv)
    args.dataset = args.dataset or "cifar10"
    spec, folder = DATASETS[args.dataset], set_folder(args)
    options = {key: vars(args)[key] for key in PREPARING}
    foreign = ("source", "image_size") if spec.classes else ("raw",)
    for key in PREPARING if spec.embedded else foreign:
        if options[key] is not None:
            raise UserError(f"--{key}: not allowed with --dataset {args.dataset}; remove --{key}")
    if not spec.embedded:
        if not (args.source or spec.classes or prepare.holds_set(args.dataset, folder)):
            raise not_prepared(args)
        prepare.ensure_prepared(args.dataset, folder, **options)
    resolve_tasks(args)
    pool = prepare.read_meta(folder).get("pool", "") is not None
    data = load(args, torch.device("cpu"), pool)
    print(table(data))
    atomic_write(folder / "preview.png", lambda file: draw(data).save(file, "PNG"))
    print(f"picture: {folder / 'preview.png'}")
    return data


if __name__ == "__main__":
    run_script(main)
