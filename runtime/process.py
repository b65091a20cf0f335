"""The process of a script: how it starts and ends, signals and memory."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

from runtime import ranks
from runtime.errors import UserError, first_line, one_line
from runtime.threads import start_yielding

# After these a run saves its progress and ends with status 128 + signal. Slurm and other schedulers
# send SIGUSR1 or SIGUSR2, where asked to, before a time limit.
STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has two
]


def run_script(main, parallel=False):
    """Run a script's main(). A UserError becomes one line on stderr and exit status 2.

    parallel: whether torchrun may start several processes of it.

    The signals STOPPING end it with status 128 + signal (143 after SIGTERM), after the current
    training step is saved. Of several ranks, under torchrun, all end, and rank 0 alone writes the
    line.
    """
    global _held, _pending
    _arrived.clear()
    keep_freed_memory()
    start_yielding()
    previous = {signum: signal.signal(signum, on_signal) for signum in STOPPING}
    same = "the same command" + " without --overwrite" * ("--overwrite" in sys.argv)
    try:
        try:
            ranks.start(parallel)
            result = main()
            ranks.stop()
            return result
        finally:
            _held = True  # a signal that comes now would be raised out of what follows
    except UserError as error:
        message, status = error, error.status
    except ranks.Ended as end:
        message, status = "", end.status
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if ranks.lost(error):
            message = f"another of the {ranks.world()} processes was killed or failed"
            message, status = f"{message}; give {same} to resume", ranks.LOST
        elif out_of_memory(error):
            message, status = f"{first_line(error)}; give a smaller --batch_size or --width", 2
        else:
            raise
    except Interrupted as interrupt:
        message = f"stopped by {signal.Signals(interrupt.signum).name}{interrupt.position}"
        message, status = f"{message}; give {same} to resume", interrupt.status
    except BrokenPipeError:
        sys.stdout = None  # otherwise Python complains again at exit
        message, status = "its output was closed; give the same command to resume", 2
    finally:
        for signum, handler in previous.items():  # torchrun stops the ranks when one has ended
            signal.signal(signum, signal.SIG_IGN if ranks.world() > 1 else handler)
        _held, _pending = False, None  # whatever the process does next, no signal waits for it
    message, status = ranks.last_words(message, status)
    if message is not None:
        print(f"{Path(sys.argv[0]).name}: {one_line(message)}", file=sys.stderr)
    sys.exit(status)


def out_of_memory(error):
    """Whether an exception reports that memory ran out.

    Other errors with "memory" in their text, such as CUDA's illegal memory access, are bugs.
    """
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return True
    return type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch here


# ------------------------------------------------------------------------------ signals


class Interrupted(KeyboardInterrupt):
    """One of STOPPING arrived. position: text on how far the run is saved."""

    def __init__(self, signum, position=""):
        super().__init__()
        self.signum, self.position, self.status = signum, position, 128 + signum


_held = False  # whether signals wait for check_signals()
_pending = None  # the signal that waits for check_signals()
_arrived = set()  # all of this run


def on_signal(signum, frame):
    """Keep the signal for check_signals(), and raise Interrupted unless signals are held.

    It is kept in any case, since Python ignores exceptions in some places, such as the locks of
    imports. The first signal counts. A second Ctrl-C ends the process at once, also while it saves
    its progress. Others do not: a scheduler sends SIGTERM to all processes of a job, and those that
    have children pass it on.
    """
    global _pending
    if signum == signal.SIGINT and signum in _arrived:
        os._exit(128 + signum)
    first = not _arrived
    _arrived.add(signum)
    if first:
        _pending = signum
        if not _held:
            raise Interrupted(signum)


@contextlib.contextmanager
def hold_signals():
    """Within this context signals wait for check_signals(), so that files stay consistent."""
    global _held
    outer, _held = _held, True
    try:
        yield
    finally:
        _held = outer
    if not outer:
        raise_interrupted(_pending)


def raise_interrupted(signum):
    """Raise Interrupted for a signal that has waited, if there is one."""
    global _pending
    if signum:
        _pending = None
        raise Interrupted(signum)


def check_signals(due=False):
    """Raise Interrupted if a signal is waiting: on all ranks, if it is on one.

    One that arrives meanwhile waits for the next call, or this rank would raise alone. Returns
    whether anything is due on any rank.
    """
    signum, due = ranks.agree(_pending or 0, due)
    raise_interrupted(signum)
    return due


# ------------------------------------------------------------------------------ the machine


def keep_freed_memory():
    """Let the C library keep freed memory for the next step, on Linux (glibc).

    By default each large activation is fresh memory, which the system clears page by page: on a
    CPU, up to 40 % of a training step (benchmarks/NOTES.md).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for any allocation
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
