"""Files: written atomically, and read without running any code that they may hold."""

import hashlib
import math
import os
import pickle
import secrets
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from runtime.errors import UserError, explain, first_line

# ------------------------------------------------------------------------------ writing


def atomic_write(path, write):
    """Write the file `path` with write(file): a temporary file beside it, then renamed.

    The content is flushed to the disk before the rename. Returns its SHA-256 in hex. Raises
    UserError if the file cannot be written, or if `path` is a folder, device or pipe.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is not a regular file; choose another name")
    # a name of its own for each writer, so that two of one file do not mix
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "x+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                checksum = sha256(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        cause = first_cause(error)
        if not isinstance(cause, OSError):
            raise cause from None
        raise UserError(
            f"{path}: cannot be written ({first_line(cause)}); free some space or choose another "
            f"folder"
        ) from None
    return checksum


def first_cause(error):
    """The exception during which a RuntimeError was raised, or the error itself.

    After an error of the disk, or a signal, torch.save still closes its archive, which raises a
    RuntimeError in turn.
    """
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__
    return error


def save_text(path, text):
    """Write a text file atomically, in UTF-8. Returns its SHA-256."""
    return atomic_write(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def save_array(path, array):
    """Write a plain array as .npy, atomically. Returns the file's SHA-256."""
    return atomic_write(path, lambda file: np.save(file, array, allow_pickle=False))


# ------------------------------------------------------------------------------ reading


def sha256(file):
    """SHA-256 in hex of what is left of an open file."""
    digest = hashlib.sha256()
    while block := file.read(2**22):
        digest.update(block)
    return digest.hexdigest()


def file_checksum(path):
    """SHA-256 of a file in hex; None if there is none."""
    with explain(path):
        if not os.path.exists(path):
            return None
        with open(path, "rb") as file:
            return sha256(file)


def check_zip(path, limit=math.inf):
    """Raise UserError for a zip archive (.npz, .zip) that unpacks to more than `limit` bytes.

    Its own list says so before anything is unpacked. Records must be stored or deflated, which
    unpack to at most a thousand times their size, where bzip2 and LZMA know no bound. Raises
    zipfile.BadZipFile for a damaged archive.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    for record in records:
        if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{path}: {record.filename} is not deflated; compress it again")
    if (size := sum(record.file_size for record in records)) > limit:
        raise UserError(f"{path}: unpacks to {size:,} bytes, expected at most {limit:,}")


def load_array(path, label=None):
    """A plain array from a .npy file. Nothing is unpickled; raises UserError for anything else.

    label: what an error calls the file, by default its path.
    """
    with explain(label or path, "is not a plain .npy array", "; choose another"):
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive")
    return array


class PickledDtype:
    """Stands in for a numpy.dtype while a pickle is read: numbers and text alone."""

    def __init__(self, kind, *_):
        self.dtype = np.dtype(kind)
        if self.dtype.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"it holds values of type {self.dtype}")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """Stands in for a numpy.ndarray while a pickle is read; see without_stand_ins()."""

    def __init__(self, *_):
        self.array = np.zeros(0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # of Python 2
        self.array = from_bytes(raw, dtype, shape, "F" if fortran else "C")


def from_bytes(raw, dtype, shape=(), order="C"):
    """An array of these bytes; dtype: a PickledDtype."""
    return np.frombuffer(bytearray(raw), dtype.dtype).reshape(shape, order=order)


class ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, numbers, text and plain containers; any other name in a pickle is refused.

    NumPy's own constructors are not called: some make arrays over memory that they do not own.
    """

    NAMES = {
        "collections.OrderedDict": OrderedDict,
        "numpy.ndarray": "numpy.ndarray",  # only an argument of _reconstruct
        "numpy.dtype": PickledDtype,
        "multiarray._reconstruct": PickledArray,
        "multiarray.scalar": lambda dtype, raw=b"\0" * 16: from_bytes(raw, dtype)[()],
        "numeric._frombuffer": from_bytes,
        # bytes in the pickles of Python 3, protocol 2
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    }

    def find_class(self, module, name):
        full = f"{module}.{name}".removeprefix("numpy.core.").removeprefix("numpy._core.")
        if full not in self.NAMES:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return self.NAMES[full]


def without_stand_ins(content):
    """Nested containers with arrays in place of PickledArray."""
    if isinstance(content, PickledArray):
        return content.array
    if isinstance(content, dict):
        return {key: without_stand_ins(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_stand_ins(value) for value in content]
    return content


def load_pickle(path):
    """A pickle of plain arrays in dicts and lists: published data files, CIFAR's batches.

    Raises UserError if it holds anything else.
    """
    with explain(path, "is not a pickle of plain arrays"), open(path, "rb") as file:
        return without_stand_ins(ArrayUnpickler(file, encoding="latin1").load())
