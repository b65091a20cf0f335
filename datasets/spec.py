"""What a data set is: an entry of the registry, what its reader returns, and its parts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import utils
from runtime.errors import UserError

PARTS = ("train", "val", "test", "exemplars")
EXEMPLARS = 100  # of each class, a fixed part of train


@dataclass(frozen=True)
class DatasetSpec:
    """All that is special to a data set.

    read(path, download, with_pool) returns a RawSet. path: the folder of the official files, the
    --source, or the embedded file. download: whether missing files may be downloaded there.
    with_pool: whether the set's own pool is wanted. It raises UserError.
    """

    read: Callable
    classifiers: int | None = None  # tasks; None: as many as its classes allow
    classes_per_classifier: int | None = None
    order: tuple | None = None  # class ids in published order; None: none was published
    mean: tuple | None = None  # per channel, in [0,1]; None: that of its own training images
    std: tuple | None = None
    side: int = 32  # images are side x side
    pad: int | None = None  # black pixels around a training image; None: an eighth of the side
    exemplars: int = EXEMPLARS  # per class
    pool: str = "the set's own"  # what its pool is; for a set from --source, the folder in there
    raw_file: bool = False  # whether --raw may name the archive itself
    embedded: Path | None = None  # the file in this repository that holds it: never prepared
    list_classes: Callable | None = None  # names of the classes in --source, where images come from

    @property
    def classes(self):
        """Number of classes in the official set; None if that depends on --source."""
        return self.classifiers and self.classifiers * self.classes_per_classifier

    @property
    def from_source(self):
        """Whether its images come from --source."""
        return self.list_classes is not None


@dataclass
class RawSet:
    """What a reader returns: images by class as uint8 [n,side,side,3], or as names of image files.

    The names are relative to `files`, a folder or a zip archive, and still to be decoded.
    """

    train: dict  # class id -> images or names
    test: dict  # likewise; empty: some of train become the test part
    names: dict  # class id -> name; the ids count from 0
    pool: np.ndarray | list | None = None  # unlabeled images or names, if there are any
    files: Path | None = None  # None: the images are arrays


def file_of(part):
    """The name of a part in files: the published ones call the exemplars save_100."""
    return f"save_{EXEMPLARS}" if part == "exemplars" else part


def check_images(label, images):
    """Raise UserError for anything but a uint8 array [n,H,W,3] of at least one image."""
    if not isinstance(images, np.ndarray):
        found = type(images).__name__
    elif images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        found = f"{images.dtype} {list(images.shape)}"
    else:
        return
    raise UserError(f"{label}: found {found}, give uint8 [n,H,W,3], n > 0")


def shuffle(images, seed, *purpose):
    """The rows of an array (images, or their names), in random order; see utils.stream."""
    return images[torch.randperm(len(images), generator=utils.stream(seed, *purpose)).numpy()]
