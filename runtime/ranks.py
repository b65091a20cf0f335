"""Data-parallel training under torchrun: what its processes, the ranks, do together.

Every rank holds the whole model and data set, makes the same draws, and computes its share of each
batch. What is added up or gathered here makes the result that of one process, except for rounding.
Rank 0 alone reads and writes the run's folder and prints. With one process all functions return at
once, and torch.distributed is not used. A function called on one rank must be called on all.
"""

import contextlib
import ctypes
import functools
import io
import os
import signal
import socket
import sys
from datetime import timedelta

from runtime.errors import UserError, first_line, one_line

VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}  # torchrun sets them
START = timedelta(minutes=5)  # between the starts of two ranks, at most
# Longer than rank 0 may need to prepare a data set. A rank that ends is noticed at once.
TIMEOUT = timedelta(days=1)
LOST = 1  # the exit status of a rank that has lost another one
_rank, _world = 0, 1
_store = None  # what torchrun holds for all ranks; here a rank leaves why it ended
_alone = False  # while rank 0 does what the others wait for


def rank():
    """The number of this process; rank 0 writes and prints."""
    return _rank


def world():
    """Number of processes."""
    return 1 if _alone else _world


def local():
    """(number of this process on its machine, number of processes there)."""
    return int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", _world))


# ------------------------------------------------------------------------------ start and end


def start(parallel):
    """Join the other ranks if torchrun has started this process: gloo on CPUs, NCCL on CUDA.

    parallel: whether this script may have others. Raises UserError if not, or if none come.
    """
    global _rank, _world, _store
    if not {*os.environ} >= VARIABLES or os.environ["WORLD_SIZE"] == "1":
        return
    if not parallel:
        raise UserError("runs as one process; leave out torchrun")
    end_with_parent()
    import torch
    import torch.distributed as dist

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    both = torch.cuda.is_available() and dist.is_nccl_available()
    handlers = {each: signal.getsignal(each) for each in signal.valid_signals()}
    handlers = {signum: handler for signum, handler in handlers.items() if callable(handler)}
    for signum in handlers:  # PyTorch waits in C++, where none of them would run
        signal.signal(signum, signal.SIG_DFL)
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # else rank 0 will listen
            socket.create_connection(address).close()  # refused at once if torchrun is gone
        _store, _rank, _world = next(dist.rendezvous("env://", timeout=START))
        options = {"store": _store, "rank": _rank, "world_size": _world, "timeout": TIMEOUT}
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", **options)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"torchrun is not found at {address[0]}, port {address[1]} ({first_line(error)}); give "
            f"the same command again"
        ) from None
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if _rank:  # no lines, and no progress bars, which tqdm shows on terminals only
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = NoTerminal(os.fdopen(os.dup(2), "wb"), line_buffering=True)


class NoTerminal(io.TextIOWrapper):
    def isatty(self):
        return False


def end_with_parent():
    """On Linux: SIGTERM for this process when torchrun, which started it, has been killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def stop():
    """Leave the other ranks when all is done."""
    global _rank, _world, _store
    if _world > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
        _rank, _world, _store = 0, 1, None


class Ended(Exception):
    """Rank 0 has ended with this status and said why."""

    def __init__(self, status):
        super().__init__()
        self.status = status


def lost(error):
    """Whether an exception says that another rank is gone: its connection is, says gloo or NCCL."""
    if _world == 1:
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def last_words(message, status):
    """What this process says and its exit status, when it ends with these: rank 0 alone speaks.

    An error of another rank is the reason why rank 0 lost it, or was stopped by torchrun.
    """
    if _world == 1:
        return message, status
    with contextlib.suppress(Exception), silent():  # torchrun may be gone, and its store
        if _rank and message and status != LOST:
            _store.set("end", f"{status} rank {_rank}: {one_line(message)}")
        elif not _rank and status != UserError.status and _store.check(["end"]):
            found, _, reason = _store.get("end").decode().partition(" ")
            if status == LOST or int(found) == UserError.status:
                message, status = reason, int(found)
    return None if _rank else message, status


@contextlib.contextmanager
def silent():
    """Without what C++ code writes to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# ------------------------------------------------------------------------------ rank 0 alone


def on_rank0(function):
    """A function that rank 0 alone executes, as if there were no others; they get its result.

    The result is made of tensors, which the others get on the CPU, and plain values. If the
    function raises an exception, the others raise Ended.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        global _alone
        if world() == 1:
            return function(*args, **kwargs)
        if _rank:
            answer = broadcast(None)
            if "ended" in answer:
                raise Ended(answer["ended"])
            return answer["result"]
        _alone = True
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            _alone = False
            with contextlib.suppress(RuntimeError):  # the others have ended before
                broadcast({"ended": getattr(error, "status", 1)})
            raise
        _alone = False
        broadcast({"result": result})
        return result

    return call


def broadcast(value, source=0):
    """The value of rank `source`, on all ranks."""
    import torch
    import torch.distributed as dist

    if _rank == source:
        file = io.BytesIO()
        torch.save(value, file)
        content = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    size = torch.tensor([len(content) if _rank == source else 0])
    dist.broadcast(size, source)
    content = content if _rank == source else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, source)
    if _rank == source:
        return value
    return torch.load(io.BytesIO(content.numpy()), map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------ shares


def share(n):
    """This rank's share of n items, a slice. Shares differ by one at most, and may be empty."""
    return slice(n * _rank // _world, n * (_rank + 1) // _world) if world() > 1 else slice(0, n)


def largest_share(n):
    """Number of items in the largest share of n."""
    return -(-n // world())


def add_up(tensors):
    """Sum each tensor over all ranks, in place. All have one dtype and device."""
    if world() > 1:
        import torch
        import torch.distributed as dist

        flat = torch.cat([each.reshape(-1) for each in tensors])
        dist.all_reduce(flat)
        for each, total in zip(tensors, flat.split([each.numel() for each in tensors])):
            each.copy_(total.view_as(each))


def gather(rows, start, n):
    """All n rows on all ranks, of which this rank has those from `start` on."""
    if world() == 1:
        return rows
    import torch.distributed as dist

    everything = rows.new_zeros(n, *rows.shape[1:])
    everything[start : start + len(rows)] = rows
    dist.all_reduce(everything)  # zeros elsewhere
    return everything


def agree(*values):
    """The maximum over all ranks of each of some integers."""
    if world() == 1:
        return values
    import torch
    import torch.distributed as dist

    agreed = torch.tensor(values)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.tolist()


def compare(settings):
    """Raise UserError unless all ranks have the same settings, {name: plain value}."""
    if world() == 1:
        return
    theirs = broadcast(settings)
    differing = [name for name in settings if settings[name] != theirs.get(name)]
    (number,) = agree(_rank if differing else 0)
    if number:
        names = ", ".join(broadcast(differing, number))
        raise UserError(
            f"{names}: rank {number} has another value or content than rank 0; start all ranks "
            f"with the same command, on the same files"
        )
