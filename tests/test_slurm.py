"""The scripts in slurm/, with stand-ins for Slurm and Python: when they requeue, what they pass on.

tests/slurm_soak.py runs them on a real Slurm.
"""

import os
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parent.parent / "slurm"
PROGRAMS = {
    "srun": """while [[ $1 == --* ]]; do shift; done; "$@" """,
    "scontrol": """[ "$1" != show ] && echo "$@" >>requeued || printf 'node1\\nnode2\\n'""",
    "python": """printf '%s\\n' "$@" >arguments; [ -z "$SIGNAL" ] || kill -"$SIGNAL" $PPID
sleep 0.1; exit "$STATUS" """,
}
VARIABLES = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "8"}
VARIABLES |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "PYTHON": "python"}
VARIABLES |= {"SLURM_GPUS_ON_NODE": "4"}


@pytest.fixture
def submit(tmp_path):
    """A function that runs a script of slurm/: its exit status and requests to requeue, or ''."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def call(script, *flags, **variables):
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        environment = os.environ | VARIABLES | path | variables
        status = subprocess.call(["bash", SLURM / script, *flags], cwd=tmp_path, env=environment)
        requeued = tmp_path / "requeued"
        return status, requeued.read_text() if requeued.exists() else ""

    return call


@pytest.mark.parametrize("status", [0, 1, 2, 137, 138, 140, 143])
def test_an_element_that_was_stopped_is_requeued_alone(submit, tmp_path, status):
    requeued = "requeue 7_3\n" if status in (138, 140, 143) else ""
    assert submit("reproduce.sbatch", "--out", "a b", STATUS=str(status)) == (status, requeued)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == ["-m", "tools.reproduce", "--chain", "3", "--out", "a b"]


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("reproduce", {"SLURM_ARRAY_TASK_ID": ""}, "is no array job; give --array=0-N"),
        ("reproduce", {"PYTHON": ".venv/bin/python"}, "found no .venv/bin/python; submit from"),
        ("torchrun", {"PYTHON": ".venv/bin/python"}, "found no .venv/bin/python; submit from"),
    ],
)
def test_bad_input_gives_one_line(submit, capfd, script, variables, message):
    assert submit(f"{script}.sbatch", **variables) == (2, "")
    assert capfd.readouterr().err.startswith(f"{script}.sbatch: {message}")


@pytest.mark.parametrize("signal", ["", "TERM", "USR1", "USR2"])
@pytest.mark.parametrize("status", [0, 1])
def test_a_run_on_several_nodes_is_requeued_after_a_signal(submit, tmp_path, signal, status):
    """torchrun ends with status 1 after a signal too; with 0 when the run has finished first."""
    expected = (143, "requeue 8\n") if signal and status else (status, "")
    flags = "main_TD.py", "--save_dir", "a b"
    assert submit("torchrun.sbatch", *flags, STATUS=str(status), SIGNAL=signal) == expected
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert {"--nnodes=2", "--nproc_per_node=4", "--rdzv_endpoint=node1:20008"} <= {*arguments}
    assert arguments[-3:] == [*flags]
