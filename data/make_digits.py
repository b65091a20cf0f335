"""Write data/digits.npz, the small data set that is kept in the repository.

Usage:
    pip install scikit-learn
    python data/make_digits.py

The 1,797 handwritten digits come from sklearn.datasets.load_digits, in its order. scikit-learn is
needed only here: the project itself reads the .npz file with numpy. The file holds

    images  uint8 [1797, 8, 8]  original values, 0 to 16
    labels  uint8 [1797]        0 to 9

The script needs no network. Its output carries no time stamp, so a second run with the same
numpy and zlib gives the same bytes.
"""

import hashlib
from pathlib import Path

import numpy as np
import sklearn
from sklearn.datasets import load_digits

OUT = Path(__file__).resolve().parent / "digits.npz"
COUNT = 1797
PER_CLASS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def check(condition, message):
    if not condition:
        raise ValueError(message)


def read_digits():
    """Return (images, labels) as uint8 after checking that the conversion loses nothing."""
    raw = load_digits()
    images, labels = raw.images.astype(np.uint8), raw.target.astype(np.uint8)
    check(images.shape == (COUNT, 8, 8), f"unexpected image shape {images.shape}")
    check(labels.shape == (COUNT,), f"unexpected label shape {labels.shape}")
    check(np.array_equal(images, raw.images), "image values changed in the cast to uint8")
    check(np.array_equal(labels, raw.target), "labels changed in the cast to uint8")
    check(images.min() == 0 and images.max() == 16, "image values do not span 0 to 16")
    counts = np.bincount(labels).tolist()
    check(counts == PER_CLASS, f"unexpected class counts {counts}")
    return images, labels


def main():
    images, labels = read_digits()
    np.savez_compressed(OUT, images=images, labels=labels)
    with np.load(OUT) as saved:
        check(np.array_equal(saved["images"], images), "images differ after reading back")
        check(np.array_equal(saved["labels"], labels), "labels differ after reading back")
    blob = OUT.read_bytes()
    print(f"scikit-learn {sklearn.__version__}, numpy {np.__version__}")
    print(f"{OUT.name}: {len(blob)} bytes, sha256 {hashlib.sha256(blob).hexdigest()}")
    print("per class:", np.bincount(labels).tolist())


if __name__ == "__main__":
    main()
