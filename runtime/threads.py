"""How many threads compute on a CPU, and how they wait. To be imported before torch.

OpenMP's threads wait for each other by spinning. Where other processes want the cores too, a thread
that the system takes off its core stops all others, and training becomes many times slower
(docs/speed.md). OpenMP reads these settings when PyTorch loads it; what the user has set is kept.
"""

import math
import os
from pathlib import Path

WAITING = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}  # GNU's; Intel's and LLVM's, in ms


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


settle_threads()
