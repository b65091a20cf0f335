"""The files of a source, in a folder or in a zip archive, and the download of an official one."""

import os
import zipfile
from pathlib import Path

from filelock import FileLock

from runtime.errors import UserError, first_line
from runtime.files import check_zip

MAX_UNPACKED = 2**32  # bytes that a zip archive may unpack to


def list_files(source):
    """All files below a folder or in a zip archive: {name relative to it, with '/': path}.

    Sorted, without hidden ones; links to folders are followed. A path in an archive is a
    zipfile.Path, which is read as others are; threads may share it.
    """
    if not os.path.isdir(source):
        try:
            check_zip(source, MAX_UNPACKED)
            archive = zipfile.ZipFile(source)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{source}: is not a zip archive ({first_line(error)})") from None
        names = [name for name in archive.namelist() if not name.endswith("/")]
        found = {name: zipfile.Path(archive, name) for name in names}
    else:
        found, above = {}, {str(source): {os.path.realpath(source)}}
        for here, folders, files in os.walk(source, onerror=refuse, followlinks=True):
            for path in [os.path.join(here, folder) for folder in folders]:
                real = os.path.realpath(path)
                if real in above[here]:  # a link to a folder above it
                    folders.remove(os.path.basename(path))
                above[path] = above[here] | {real}
            paths = (Path(here, file) for file in files)
            found |= {path.relative_to(source).as_posix(): path for path in paths}
    visible = (name for name in found if "/." not in f"/{name}")
    return {name: found[name] for name in sorted(visible, key=lambda name: name.split("/"))}


def refuse(error):
    """For os.walk, which passes over folders that it cannot read."""
    raise UserError(f"{error.filename}: cannot be read ({first_line(error)})")


def download_file(url, path, md5):
    """Download the file `path` unless it is there. Raises UserError, which says where to put it."""
    from torchvision.datasets.utils import download_url  # slow: it doubles the start time

    part = path.with_name(f"{path.name}.part")  # never half-written under its own name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock")):
            if not path.exists():
                download_url(url, path.parent, part.name, md5)
                os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path.name} cannot be downloaded ({first_line(error)}); put it into {path.parent}, "
            f"or give its folder with --raw"
        ) from None
