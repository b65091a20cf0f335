"""What a dataset is: an entry of the registry, what its reader returns, and its splits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import utils
from runtime.errors import UserError

SPLITS = ("train", "val", "test", "exemplars")


@dataclass
class DatasetSpec:
    """All that is special to a dataset.

    read(path, download, with_pool) returns a RawSet, or raises UserError. path: of the official
    files, the --source, or the embedded file. download: whether missing files may be downloaded
    there. with_pool: whether the dataset's own pool is wanted.
    """

    read: Callable
    classifiers: int | None = None  # tasks; None: as many as its classes allow
    classes_per_classifier: int | None = None
    order: tuple | None = None  # class ids in published order; None: none was published
    mean: tuple | None = None  # per channel, in [0,1]; None: that of its own training images
    std: tuple | None = None
    side: int = 32  # images are side x side
    exemplars: int = 100  # per class, a fixed part of train
    embedded: Path | None = None  # the file in this repository that holds it: never prepared
    classes: int | None = field(init=False)  # in all; None: those of --source

    def __post_init__(self):
        self.classes = self.classifiers and self.classifiers * self.classes_per_classifier


@dataclass
class RawSet:
    """What a reader returns: images by class as uint8 [n,side,side,3], or as names of image files.

    The names are those of `files`, which are still to be decoded.
    """

    train: dict  # class id -> images or names
    test: dict  # likewise; empty: some of train become the test split
    names: dict  # class id -> name; the ids count from 0
    pool: np.ndarray | list = ()  # unlabeled images or names, if there are any
    files: dict | None = None  # name -> path; None: the images are arrays
    left_out: dict = field(default_factory=dict)  # kind -> files that are not used
    listing: str | None = None  # SHA-256 of the names and sizes of the files of a --source


def file_of(split):
    """The name of a split in files: the published ones call the exemplars save_100."""
    return "save_100" if split == "exemplars" else split


def check_images(label, images, size=None):
    """Raise UserError unless images are uint8 [n,H,W,3], n > 0; size: (H, W), if it matters."""
    found = type(images).__name__
    if isinstance(images, np.ndarray):
        found = f"{images.dtype} {list(images.shape)}"
        rgb = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
        if rgb and images.size and images.shape[1:3] == (size or images.shape[1:3]):
            return
    wanted = ",".join(map(str, size or "HW"))
    raise UserError(f"{label}: expected uint8 [n,{wanted},3] with n > 0, got {found}")


def shuffle(images, seed, *purpose):
    """The rows of an array (images, or their names), in random order; see utils.make_generator."""
    generator = utils.make_generator(seed, *purpose)
    return images[torch.randperm(len(images), generator=generator).numpy()]
