"""How OpenMP's threads wait and how many there are: settled before torch is loaded."""

import math
import os
import subprocess
import sys

import pytest
from test_house import ROOT, SCRIPTS

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


@pytest.mark.parametrize("script", [*SCRIPTS, "dataset"])
def test_scripts_settle_it_before_torch_is_loaded(bare, script):
    """-X importtime lists imports as they finish."""
    command = [sys.executable, "-X", "importtime", f"{script}.py", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finished = [line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()]
    assert finished.index("runtime.threads") < finished.index("torch._C")
