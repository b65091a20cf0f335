"""One writer for a folder: a lock, and a name tag for where locks do not reach.

The lock (flock) keeps a second process out, and that of a killed process is gone with it. On some
shared file systems it holds within a machine only, or does nothing. So whoever works in a folder
also writes its name to a file there, and looks before each write whether it still is its own. A
second process that gets past the lock changes the name, and the first one ends with an error: the
files are then those of one of them.
"""

import atexit
import os
import secrets
import socket
import warnings
from pathlib import Path

import filelock

from runtime.errors import UserError, first_line
from runtime.files import save_text

LOCKS = {}  # {key of a lock: (lock or None, owner)} of the folders that this process works in


def key(path):
    """The path of a lock, however it is spelled."""
    return Path(os.path.realpath(path))


def owner_path(lock):
    """Where the owner's name is, beside a lock (a Path): .owner, or .<prefix>owner."""
    return lock.with_name(lock.name.removesuffix("lock") + "owner")


def read_owner(lock):
    """(host, process id) of the last process to work in a folder, and its name as a whole.

    None and '' where it has left, or nothing can be read.
    """
    try:
        name = owner_path(lock).read_text()
        host, pid, _ = name.split()
        return (host, int(pid)), name
    except (OSError, ValueError):
        return None, ""


def lock_folder(folder, flag, prefix=""):
    """Take a folder. Raises UserError if another process works in it. Returns the path of the lock.

    A killed process holds no lock.
    """
    path = folder / f".{prefix}lock"
    if key(path) in LOCKS:  # of an earlier run in this process
        leave(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        reason = first_line(error)
        raise UserError(
            f"--{flag} {folder}: cannot be written ({reason}); name another folder"
        ) from None
    lock = filelock.FileLock(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file system on which another lock is used
            lock.acquire(timeout=0)
    except filelock.Timeout:
        host, pid = read_owner(path)[0] or (None, None)
        process = f"another process ({pid} on {host})" if host else "another process"
        raise UserError(
            f"--{flag} {folder}: {process} is working in it; wait for it, or name another folder"
        ) from None
    except (OSError, NotImplementedError):
        lock = None
        print(
            f"{folder}: no locks on this file system; start no second process in it, or one of "
            f"the two will stop",
            flush=True,
        )
    owner = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
    LOCKS[key(path)] = lock, owner
    save_text(owner_path(path), owner)
    return path


def check(path, flag):
    """Raise UserError if another process has taken the folder of this lock since."""
    found, name = read_owner(path)
    if name == LOCKS[key(path)][1]:
        return
    if not found:  # the other one may have left, with its name
        raise UserError(
            f"--{flag} {path.parent}: its {owner_path(path).name} is gone, so that another process "
            f"was in it past the lock, or it was removed; give the same command to resume"
        )
    host, pid = found
    raise UserError(
        f"--{flag} {path.parent}: process {pid} on {host} works in it too, past the lock of this "
        f"file system; this one stops, and the other one has what is saved"
    )


def leave(path):
    """Give a folder back."""
    lock, owner = LOCKS.pop(key(path))
    if read_owner(path)[1] == owner:
        owner_path(path).unlink(missing_ok=True)
    if lock:
        lock.release()


@atexit.register
def leave_all():
    for path in [*LOCKS]:
        leave(path)
