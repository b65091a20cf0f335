"""How OpenMP's threads wait and how many there are: settled before torch is loaded."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import threads

ROOT = Path(__file__).parent.parent
SETTINGS = (*threads.WAITING, "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


@pytest.mark.parametrize("quota", [3, math.inf])
@pytest.mark.parametrize("own", [{}, *({name: "7"} for name in SETTINGS)], ids=str)
def test_what_the_user_has_set_is_kept(monkeypatch, own, quota):
    """PyTorch chooses the number of threads, unless a quota gives less time than cores."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "7")  # so that it is restored
        if name not in own:
            monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "quota_cores", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    threads.setup_threads()
    found = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    waits = {} if own.keys() - {"OMP_NUM_THREADS"} else threads.WAITING
    assert found == waits | ({"OMP_NUM_THREADS": "3"} if quota == 3 else {}) | own


@pytest.mark.parametrize("script", ["main_TD", "main_BU", "main_CIL", "main_train", "test"])
def test_scripts_settle_it_before_torch_is_loaded(script):
    """Importing a script's modules changes nothing; running it sets what OpenMP will read."""
    code = f"""
import os, runpy, sys
class Finder:
    def find_spec(name, *_):
        if name == "torch":
            sys.exit("set" if "GOMP_SPINCOUNT" in os.environ else "not set")
sys.meta_path.insert(0, Finder)
sys.argv = ["{script}.py", "--help"]
runpy.run_path("{script}.py", run_name="__main__")
"""
    bare = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True, text=True
    )
    assert done.stderr.strip() == "set"
