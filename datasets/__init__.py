"""Where images come from: a file for each source, and one entry here for each dataset."""

import functools

from datasets import cifar, digits, folder, tiny_imagenet
from datasets.spec import DatasetSpec

DATASETS = {
    "cifar10": DatasetSpec(
        functools.partial(cifar.read, "CIFAR10", "CIFAR100"),
        classifiers=5,
        classes_per_classifier=2,
        order=(9, 8, 7, 1, 5, 0, 3, 4, 6, 2),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "cifar100": DatasetSpec(
        functools.partial(cifar.read, "CIFAR100", "CIFAR10"),
        classifiers=10,
        classes_per_classifier=10,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2009, 0.1984, 0.2023),
    ),
    "tiny_imagenet": DatasetSpec(
        tiny_imagenet.read,
        classifiers=10,
        classes_per_classifier=20,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        side=64,
    ),
    "digits": DatasetSpec(
        digits.read,
        classifiers=5,
        classes_per_classifier=2,
        mean=(0.3066, 0.3066, 0.3066),  # of its own training images
        std=(0.3767, 0.3767, 0.3767),
        exemplars=20,  # a class has about 90 training images
        embedded=digits.FILE,
    ),
    "folder": DatasetSpec(folder.read),
}
