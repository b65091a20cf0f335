"""NumPy files: .npy arrays, and the pickles of arrays in which the published data sets came."""

import pickle
from collections import OrderedDict

import numpy as np

from runtime.errors import UserError, first_line
from runtime.files import atomic_write, is_archive


def save_array(path, array):
    """Write a plain array as .npy, atomically. Returns the file's SHA-256."""
    return atomic_write(path, lambda file: np.save(file, array, allow_pickle=False))


def load_array(path, label=None):
    """A plain array from a .npy file. Nothing is unpickled; raises UserError for anything else.

    label: what an error calls the file, by default its path.
    """
    label = label or path
    try:
        if is_archive(path):
            raise UserError(f"{label}: found an archive, give a plain .npy array")
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{label}: no such file, give a .npy array") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = first_line(error)
        raise UserError(f"{label}: not a plain .npy array ({reason}), give another file") from None


# ------------------------------------------------------------------------------ pickles of arrays


def plain_dtype(kind, *_):
    """A NumPy dtype of plain values; arrays of objects would hold pointers."""
    dtype = np.dtype(kind, copy=True)
    if dtype.kind not in "biufcSU":
        raise pickle.UnpicklingError(f"it holds values of type {dtype}")
    return dtype


# Every name that the pickles of the published data sets may hold. The array type itself is only a
# string here: calling it would make arrays over bytes of the file.
ARRAY_NAMES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): plain_dtype,
    # bytes in the pickles of Python 3, protocol 2: always latin-1
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin-1"),
}
for core in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
    ARRAY_NAMES |= {
        (f"{core}.multiarray", "_reconstruct"): lambda *_: np._core.multiarray._reconstruct(
            np.ndarray, (0,), b"b"
        ),
        (f"{core}.multiarray", "scalar"): np._core.multiarray.scalar,
        (f"{core}.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    }


class ArraysUnpickler(pickle._Unpickler):
    """Unpickles arrays and plain containers; the names in ARRAY_NAMES and no other.

    The unpickler in C would let a file of nine bytes fill gigabytes with an empty memo; this one,
    in Python, does not.
    """

    def find_class(self, module, name):
        try:
            return ARRAY_NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it holds {module}.{name}") from None

    def build(self):
        """Set the state of an array, or the byte order of a dtype; of nothing else."""
        target, state = self.stack[-2:]
        if isinstance(target, np.dtype):
            if state[2:] != target.__reduce__()[2][2:]:
                raise pickle.UnpicklingError("it forges a dtype")
        elif not isinstance(target, np.ndarray):
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")
        self.load_build()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: build}


def load_arrays_pickle(path):
    """Read a published data pickle. Raises UserError if it holds anything but plain arrays."""
    try:
        with open(path, "rb") as file:
            return ArraysUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, give the published pickle") from None
    except Exception as error:  # a hostile pickle can raise anything
        raise UserError(
            f"{path}: not a pickle of plain arrays ({first_line(error)}), give an intact copy"
        ) from None
