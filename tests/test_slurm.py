"""slurm/reproduce.sbatch with stand-ins for Slurm and Python: what it passes on and requeues."""

import os
import subprocess

import pytest

from tools.reproduce import ROOT

PROGRAMS = {
    "srun": """while [[ $1 == --* ]]; do shift; done; "$@" """,
    "scontrol": """echo "$@" >requeued""",
    "python": """printf '%s\\n' "$@" >arguments; exit "$STATUS" """,
}
VARIABLES = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "8"}


@pytest.fixture
def submit(tmp_path):
    """A function that runs the script: its exit status and request to requeue, or ''."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def call(*flags, **variables):
        environment = os.environ | VARIABLES | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", ROOT / "slurm" / "reproduce.sbatch", *flags]
        status = subprocess.call(command, cwd=tmp_path, env=environment | variables)
        requeued = tmp_path / "requeued"
        return status, requeued.read_text() if requeued.exists() else ""

    return call


@pytest.mark.parametrize("status", [0, 1, 2, 137, 138, 140, 143])
def test_an_element_that_was_stopped_is_requeued_alone(submit, tmp_path, status):
    requeued = "requeue 7_3\n" if status in (138, 140, 143) else ""
    assert submit("--out", "a b", STATUS=str(status), PYTHON="python") == (status, requeued)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == ["-m", "tools.reproduce", "--chain", "3", "--out", "a b"]


def test_bad_input_gives_one_line(submit, capfd):
    assert submit(SLURM_ARRAY_TASK_ID="", PYTHON="python")[0] != 0
    (line,) = capfd.readouterr().err.splitlines()
    assert "reproduce.sbatch: give --array=0-N" in line
    assert submit()[0] == 127  # there is no .venv
    assert ".venv/bin/python" in capfd.readouterr().err
