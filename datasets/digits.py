"""The embedded digits (data/README.md), always split alike."""

from pathlib import Path

import numpy as np

from datasets.spec import RawSet, shuffle

FILE = Path(__file__).parents[1] / "data" / "digits.npz"


def read(path, download, with_pool):
    """32x32 RGB: per class 30 test and 50 pool images, about 100 for train and val."""
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    # 0..16 to 0..255, each pixel to 4x4, gray to RGB
    images = np.round(images * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    images = np.ascontiguousarray(np.broadcast_to(images[..., None], (*images.shape, 3)))
    own = [shuffle(images[labels == c], 0, "digits", c) for c in range(10)]
    return RawSet(
        train={c: own[c][80:] for c in range(10)},
        test={c: own[c][:30] for c in range(10)},
        names={c: str(c) for c in range(10)},
        pool=np.concatenate([own[c][30:80] for c in range(10)]),
    )
