"""Files in a folder or in a zip archive, read alike. No archive says where to write."""

import functools
import io
import os
import zipfile
from pathlib import Path

from runtime.errors import UserError, first_line

MAX_FILE = 2**26  # bytes that a file of an archive may unpack to


def open_file(source, name):
    """A binary file: `name` in the zip archive `source`, or in the folder `source`."""
    if Path(source).is_dir():
        return open(Path(source) / name, "rb")
    content = open_archive(source)
    if content.getinfo(name).file_size > MAX_FILE:
        raise ValueError(f"unpacks to more than {MAX_FILE // 2**20} MiB")
    return io.BytesIO(content.read(name))


def open_archive(path):
    """The zip archive, opened once per process: processes must not share a file position."""
    path = Path(path).absolute()
    return cached_archive(path, path.stat().st_mtime_ns, os.getpid())


@functools.lru_cache(1)
def cached_archive(path, modified, process):
    return zipfile.ZipFile(path)


def list_files(source):
    """The names of all files in a zip archive or folder, relative to it, with '/'."""
    if Path(source).is_dir():
        paths = (path for path in Path(source).rglob("*") if path.is_file())
        return sorted(path.relative_to(source).as_posix() for path in paths)
    try:
        # many archives have entries for folders
        return [name for name in open_archive(source).namelist() if not name.endswith("/")]
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{source}: not a readable zip archive ({first_line(error)}); get a new copy"
        ) from None


def read_lines(source, name):
    """The lines of a text file in an archive or folder."""
    try:
        with open_file(source, name) as file:
            return file.read().decode().splitlines()
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{source}: {name} cannot be read ({first_line(error)}); get a new copy"
        ) from None
