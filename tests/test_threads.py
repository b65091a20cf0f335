"""How OpenMP's threads wait and how many there are: settled before torch is loaded."""

import math
import os
import subprocess
import sys
import threading
import time

import pytest
from test_house import ROOT

from runtime import threads

SETTINGS = (*threads.WAITING, "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


@pytest.fixture
def bare(monkeypatch):
    """An environment in which nothing is set."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("own", [{}, *({name: "7"} for name in SETTINGS)], ids=str)
def test_what_the_user_has_set_is_kept(bare, own):
    for name, value in own.items():
        bare.setenv(name, value)
    bare.setattr(threads, "usable_cores", lambda: 3)
    bare.setattr(threads, "allowed_cores", lambda: 4)
    threads.settle_threads()
    found = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    waits = {} if own.keys() - {"OMP_NUM_THREADS"} else threads.WAITING
    assert found == waits | {"OMP_NUM_THREADS": "3"} | own


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.max": "nonsense"}, math.inf),
    ],
)
def test_the_quota_of_a_cgroup_limits_the_threads(bare, tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota(tmp_path) == cores
    bare.setattr(threads, "quota", lambda: cores)
    bare.setattr(threads, "allowed_cores", lambda: 4)
    assert threads.usable_cores() == min(4, max(1, math.ceil(min(cores, 4))))


def busy_process():
    return subprocess.Popen([sys.executable, "-c", "while True: pass"])


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="needs Linux's schedstat")
def test_a_process_knows_how_long_it_waits_for_a_core(bare):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    other = busy_process()
    try:
        before, start = threads.waited(), time.monotonic()
        while time.monotonic() < start + 1:
            pass
        assert threads.waited() - before > threads.BUSY  # about half of it
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}], ids=str)
def test_threads_are_held_while_the_machine_is_busy(bare, own):
    """With 2 of 3 cores used, two Python threads hold their OpenMP threads while it is busy."""
    waits = iter([0, 0, 1, 2, 2, 2])  # quiet, busy, busy, quiet
    held, seen = [], []

    def waited():
        time.sleep(0.05)  # until the threads are there
        seen.append(sum(not until.is_set() for until in held))
        if len(seen) == 6:  # enough: with one thread the watch ends
            bare.setattr("torch.get_num_threads", lambda: 1)
        return next(waits)

    def hold(torch, until):
        held.append(until)
        until.wait()

    bare.setattr(threads, "waited", waited)
    bare.setattr(threads, "CHECK_SECONDS", 0.05)
    bare.setattr(threads, "hold_threads", hold)
    bare.setattr(threads, "allowed_cores", lambda: 3)
    bare.setattr("torch.get_num_threads", lambda: 2)
    for name, value in own.items():
        bare.setenv(name, value)
    threads.settle_threads()
    before = {*threading.enumerate()}
    threads.start_yielding()
    for thread in {*threading.enumerate()} - before:
        thread.join(5)
    assert seen == ([] if own else [0, 0, 0, 2, 2, 0])


@pytest.mark.parametrize("script", ["main_BU", "dataset"])
def test_scripts_settle_it_before_torch_is_loaded(bare, script):
    """-X importtime lists imports as they finish."""
    command = [sys.executable, "-X", "importtime", f"{script}.py", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finished = [line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()]
    assert finished.index("runtime.threads") < finished.index("torch._C")
