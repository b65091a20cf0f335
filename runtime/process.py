"""The process of a script: how it starts and ends, signals and memory."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

from runtime.errors import UserError, first_line, one_line
from runtime.threads import start_yielding

# After these a run saves its progress and ends with status 128 + signal. Slurm and other schedulers
# send SIGUSR1 or SIGUSR2, where asked to, before a time limit.
STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has two
]


def run_script(main):
    """Run a script's main(). A UserError becomes one line on stderr and exit status 2.

    The signals STOPPING end it with status 128 + signal (143 after SIGTERM), after the current
    training step is saved.
    """
    global _pending
    _pending = None
    _arrived.clear()
    keep_freed_memory()
    start_yielding()
    previous = {signum: signal.signal(signum, on_signal) for signum in STOPPING}
    try:
        return main()
    except UserError as error:
        message, status = error, 2
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not out_of_memory(error):
            raise
        message, status = f"{first_line(error)}; give a smaller --batch_size or --width", 2
    except Interrupted as interrupt:
        signum = interrupt.signum
        same = "the same command without --overwrite"
        command = same if "--overwrite" in sys.argv else "the same command"
        message = f"stopped by {signal.Signals(signum).name}{interrupt.position}"
        message, status = f"{message}; give {command} to resume", 128 + signum
    except BrokenPipeError:
        sys.stdout = None  # otherwise Python complains again at exit
        message, status = "its output was closed; give the same command to resume", 2
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
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
        self.signum, self.position = signum, position


_held = False  # whether signals wait for check_signals()
_pending = None  # the signal that waits
_arrived = set()  # all of this run


def on_signal(signum, frame):
    """Raise Interrupted, or keep the signal for check_signals() while signals are held.

    The first signal counts. A second Ctrl-C ends the process at once, also while it saves its
    progress. Others do not: a scheduler sends SIGTERM to all processes of a job, and those that
    have children pass it on.
    """
    global _pending
    if signum == signal.SIGINT and signum in _arrived:
        os._exit(128 + signum)
    first = not _arrived
    _arrived.add(signum)
    if first and not _held:
        raise Interrupted(signum)
    if first:
        _pending = signum


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
        check_signals()


def check_signals():
    """Raise Interrupted if a signal is waiting."""
    global _pending
    if _pending:
        signum, _pending = _pending, None
        raise Interrupted(signum)


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
