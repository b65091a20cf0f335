"""Files that are never half-written, and checks of what comes in."""

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path

from runtime.errors import UserError, first_line
from runtime.process import hold_signals


def temp_path(path):
    """Where atomic_write() writes a file before it is renamed to `path`."""
    return path.with_name(f".{path.name}.part")


def atomic_write(path, write):
    """Write the file `path` with write(file): a temporary file beside it, then renamed.

    The content is flushed to the disk before the rename. What a killed process left is overwritten.
    Returns the SHA-256 of the content in hex. Raises UserError when it cannot be written.
    """
    path = Path(path)
    temporary = temp_path(path)
    try:
        with hold_signals():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "w+b") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                    file.seek(0)
                    checksum = sha256(file)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = os_error(error)
        if cause is None:
            raise
        raise UserError(
            f"{path}: cannot be written ({first_line(cause)}); make room or name another folder"
        ) from None
    return checksum


def os_error(error):
    """The OSError that an exception is, or during which it was raised; else None.

    On a full disk torch.save still closes its archive, which raises a RuntimeError in turn.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def sync_folder(folder):
    """Flush the entries of a folder, such as the new name of a renamed file, to the disk."""
    with contextlib.suppress(OSError):  # not possible on Windows
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(file):
    """SHA-256 in hex of what is left of an open file."""
    digest = hashlib.sha256()
    while block := file.read(2**22):
        digest.update(block)
    return digest.hexdigest()


def file_checksum(path):
    """SHA-256 of a file in hex; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return sha256(file)
    except OSError:
        return None


def save_text(path, text):
    """Write a text file atomically. Returns its SHA-256."""
    return atomic_write(path, lambda file: file.write(text.encode()))


def is_archive(path):
    """Whether a file is a zip archive by its first bytes, which is how PyTorch and NumPy decide."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def check_archive(path):
    """Raise UserError for a zip archive with damaged, duplicate or compressed records.

    torch.save and np.savez compress nothing, and compressed records may unpack to any size.
    Neither PyTorch nor NumPy verifies all checksums. Other files pass; raises OSError if the file
    cannot be read, zipfile.BadZipFile for an archive that is cut off.
    """
    if not is_archive(path):
        return
    with zipfile.ZipFile(path) as archive:
        check_records(path, archive, zipfile.ZIP_STORED)
        if damaged := archive.testzip():
            raise UserError(f"{path}: is damaged at {damaged}, give an intact copy")


def check_records(path, archive, method):
    """Raise UserError unless an archive is the file's only one, with records of different names.

    All must be compressed by this method of zipfile's.
    """
    records = archive.infolist()
    for record in records:
        if record.compress_type != method:
            wanted = "deflated" if method == zipfile.ZIP_DEFLATED else "uncompressed"
            raise UserError(f"{path}: {record.filename} is not {wanted}, give it {wanted}")
    if len(set(archive.namelist())) < len(records):
        raise UserError(f"{path}: holds two records of one name, give an intact copy")
    if records and min(record.header_offset for record in records) > 0:
        # zipfile would read the last of several archives in the file, PyTorch the first
        raise UserError(f"{path}: holds more than one archive, give an intact copy")
