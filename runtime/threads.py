"""How many threads compute on a CPU, and how they wait. To be imported before torch.

OpenMP's threads wait for each other by spinning, which is fastest on a quiet machine. Where other
processes want the cores too, a thread that the system takes off its core stops all others, and
training becomes many times slower (docs/speed.md). So the spinning is short, and on Linux there is
nearly none while this process has to wait for a core (yield_cores). OpenMP reads its settings when
PyTorch loads it; what the user has set is kept.
"""

import contextlib
import glob
import math
import os
import threading
import time
from pathlib import Path

WAITING = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}  # GNU's; Intel's and LLVM's, in ms
CHECK_SECONDS = 1
BUSY = 0.05  # seconds that our threads together wait for a core in a second, on a busy machine


def allowed_cores():
    """Number of cores that this process may run on."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(cgroup=Path("/sys/fs/cgroup")):
    """Cores' worth of time that a cgroup (version 2 or 1) may use; infinite without a limit."""
    files = ["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]
    for names in files:
        try:
            limit, period = " ".join((cgroup / name).read_text() for name in names).split()
            return int(limit) / int(period) if int(limit) > 0 else math.inf
        except (OSError, ValueError):  # no such file; 'max'
            continue
    return math.inf


def usable_cores():
    """Number of threads worth starting: a core for each, and no more than the quota gives time."""
    return max(1, min(allowed_cores(), math.ceil(min(quota(), 2**10))))


def settle_threads():
    """Set how OpenMP's threads wait, and their number where a quota allows fewer than cores."""
    if not {"OMP_WAIT_POLICY", *WAITING} & {*os.environ}:
        os.environ.update(WAITING)
    if usable_cores() < allowed_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


# ------------------------------------------------------------------------------ a busy machine


def waited():
    """Seconds that the threads of this process have waited for a core; 0 where unknown."""
    waits = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has just ended
            waits += int(Path(path).read_text().split()[1])
    return waits / 1e9


def hold_threads(torch, until):
    """Keep OpenMP's threads of this Python thread until an event. They compute nothing."""
    torch.ones(2**20).add_(1)  # large enough that they all are started
    until.wait()


def yield_cores():
    """While this process competes for cores, let OpenMP's threads sleep instead of spin: forever.

    GNU's OpenMP hardly spins while it has more threads than cores (its manual, GOMP_SPINCOUNT). It
    counts all threads of a process, so some that do nothing make the others sleep, not spin. The
    number of threads that compute does not change, nor does any result.
    """
    import torch

    crowd, before = None, waited()  # crowd: the event that ends the idle threads
    while torch.get_num_threads() > 1:  # one waits for none
        time.sleep(CHECK_SECONDS)
        now = waited()
        busy, before = now - before > BUSY * CHECK_SECONDS, now
        if busy and not crowd:
            crowd = threading.Event()
            for _ in range(-(-allowed_cores() // torch.get_num_threads())):
                threading.Thread(target=hold_threads, args=(torch, crowd), daemon=True).start()
        elif crowd and not busy:
            crowd.set()
            crowd = None


def start_yielding():
    """yield_cores() in a thread of its own, unless the user has set how OpenMP waits."""
    if all(os.environ.get(name) == value for name, value in WAITING.items()):
        threading.Thread(target=yield_cores, daemon=True).start()


settle_threads()
