"""CIFAR-10 and CIFAR-100, by torchvision; the pool of each is the training images of the other."""

import pickle

import numpy as np

from datasets.spec import RawSet
from runtime.errors import UserError, first_line


def read_cifar10(path, download, with_pool):
    return read("CIFAR10", "CIFAR100", path, download, with_pool)


def read_cifar100(path, download, with_pool):
    return read("CIFAR100", "CIFAR10", path, download, with_pool)


def read(name, other, path, download, with_pool):
    """name, other: of torchvision's classes. The rest, and what it returns: see DatasetSpec."""
    from torchvision import datasets  # slow: it doubles the start time of a script

    kind, other = getattr(datasets, name), getattr(datasets, other)
    if not download and path.name in (kind.base_folder, other.base_folder):
        path = path.parent
    train, test = load_official(kind, path, download, also=other)
    images, labels = (train.data, test.data), (np.array(train.targets), np.array(test.targets))
    by_class = [{c: x[y == c] for c in range(len(train.classes))} for x, y in zip(images, labels)]
    pool = load_official(other, path, download)[0].data if with_pool else None
    return RawSet(*by_class, dict(enumerate(train.classes)), pool)


def load_official(kind, path, download, also=None):
    """The training and test set of a torchvision class, from the folder `path`.

    also: the class of the pool, still to be read; None if `kind` is that itself.
    """
    from torchvision.datasets.utils import check_integrity

    # "downloading" an intact archive that is already there only unpacks it
    fetch = download or check_integrity(path / kind.filename, kind.tgz_md5)
    try:
        return [kind(path, train=train, download=fetch) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # torchvision's advice, download=True, is not a flag here
        reason = first_line(error).partition(" You can use")[0]
        wanted = f"{kind.filename} or the folder {kind.base_folder}"
        pool = (
            f"; likewise {also.filename} (or give another pool with --unlabeled)"
            if also
            else f", or give another pool with --unlabeled ({kind.__name__} is only the pool)"
        )
        if not download:
            raise UserError(
                f"--raw {path}: holds no intact {kind.__name__} ({reason}); put {wanted} "
                f"there{pool}"
            ) from None
        raise UserError(
            f"{kind.__name__} cannot be downloaded ({reason}); put {wanted} into {path}, or name "
            f"its folder with --raw DIR{pool}"
        ) from None
