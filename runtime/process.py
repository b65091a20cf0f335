"""The process of a script: how it ends, after an error or a signal."""

import contextlib
import io
import signal
import sys
from pathlib import Path

from runtime.errors import UserError, first_line, one_line

# These end a run with status 128 + signal, as the shell reports them. Schedulers send SIGTERM, or
# what they are asked to, before a time limit; SIGXCPU comes at a limit of CPU time.
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


class Interrupted(SystemExit):
    """One of STOPPING arrived. It is raised where the script is: after a tensor operation."""

    def __init__(self, signum):
        super().__init__(128 + signum)
        self.signum = signum


def on_signal(signum, frame):
    signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once
    raise Interrupted(signum)


def run_script(main):
    """Run a script's main(). A UserError becomes one line on stderr and exit status 2.

    The signals STOPPING end it with status 128 + signal (143 after SIGTERM); files are written
    atomically, so nothing is half-written. A signal that is ignored, as nohup has it, stays so.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the console cannot encode
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = sys.stderr or io.StringIO()  # closed: tqdm would write to None
    for name in STOPPING:
        signum = getattr(signal, name, None)  # Windows has two of them
        if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, on_signal)
    resume = "give the same command" + " without --overwrite" * ("--overwrite" in sys.argv)
    try:
        result = main()
        if sys.stdout is not None:
            sys.stdout.flush()
        return result
    except UserError as error:
        message, status = str(error), 2
    except Interrupted as stop:
        message = f"stopped by {signal.Signals(stop.signum).name}; {resume} to go on"
        status = stop.code
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        message, status = f"{first_line(error)}; choose a smaller --batch_size or --width", 2
    except OSError as error:
        if error.filename is not None:  # of a file: a programming error, unless it was caught
            raise
        # of a stream that is closed, or on a full disk; Python must not complain again at exit
        sys.stdout = None
        message, status = f"its output cannot be written ({first_line(error)}); {resume}", 2
    with contextlib.suppress(OSError):
        print(f"{Path(sys.argv[0]).name}: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(status)


def out_of_memory(error):
    """Whether an exception reports that memory ran out, on the host or on a device."""
    known = "DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or any(text in str(error) for text in known)
