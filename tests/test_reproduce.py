"""tools/reproduce.py: its plan, the pool, a real run stopped and resumed, --status, records."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from sets import check_error

import main_BU
import main_CIL
import main_TD
import main_train
from runtime.args import CONTROLS
from runtime.errors import UserError
from runtime.process import Interrupted
from tools import report, reproduce

PARSE = {f"{module.__name__}.py": module.parse for module in (main_TD, main_BU, main_CIL)}
PARSE["main_train.py"] = main_train.make_parser().parse_args  # its files do not exist here


def plan_of(*flags):
    """The plan with these flags, and the parsed flags of each run."""
    jobs = reproduce.plan(reproduce.parse([*flags]))
    return jobs, [PARSE[job.command[0]](job.command[1:]) for job in jobs]


@pytest.mark.parametrize(
    ("size", "epochs", "batch_size", "lr", "number"),
    [
        ("small", 7, 256, 0.05, 19),
        ("medium", 10, 256, 0.02, 21),
        ("full", 100, 256, 0.01, 21),
        ("rehearsal", 1, 64, 0.05, 21),
    ],
)
def test_the_scripts_accept_the_planned_commands(size, epochs, batch_size, lr, number):
    jobs, runs = plan_of("--size", size)
    assert len({job.name for job in jobs}) == len({job.journal for job in jobs}) == 3 * number
    assert {(run.epochs, run.batch_size, run.lr) for run in runs} == {(epochs, batch_size, lr)}
    found = {(run.state, run.control) for run in runs if "control" in run}
    assert found == {(t, control) for t in (3, 5) for control in CONTROLS}
    seen = {""}
    for job, run in zip(jobs, runs):
        folder = str(job.journal.parent)
        assert job.needs in seen and run.save_dir == folder
        if job.command[0] == "main_train.py":  # from the weights of the task before
            assert folder.endswith(job.needs) and job.needs
            assert run.weight == f"{folder}/task{run.state - 1}_best_model.pt"
            assert run.mask == f"{folder}/mask-{run.state}.pt"
        if job.command[0] == "main_BU.py":
            assert run.select_on == ("test" if "BU_on_test" in job.name else "val")
        seen.add(job.name)


def test_the_plan_is_by_priority_and_its_chains_cover_it_once():
    jobs, runs = plan_of("--size", "medium", "--seeds", "0,1,0")
    names = [job.name.removeprefix("seed0/") for job in jobs[:18]]
    assert names[:6] == ["TD", "CIL", "BU", "BU_retrain_task3", "BU_retrain_task5", "TD_random"]
    assert names[16:] == ["CIL_no_teaching", "CIL_joint"]
    assert [run.seed for run in runs] == 18 * [0] + 18 * [1] + [0, 0, 0, 1, 1, 1]
    assert runs[5].criterion == "random" and runs[16].no_teaching and runs[17].joint
    chains = [[job for job in jobs if job.chain == number] for number in range(14)]
    assert sorted(job for chain in chains for job in chain) == sorted(jobs)
    assert [len(chain) for chain in chains] == 2 * [1, 1, 13, 1, 1, 1] + [3, 3]
    for chain in chains:  # a run, and those that need it
        assert [job.needs for job in chain] == ["", *[chain[0].name] * (len(chain) - 1)]


def test_flags_go_to_every_run():
    for job, run in zip(*plan_of("--flags=--precision bf16", "--out", "my runs")):
        assert job.command[1:4] == ["--precision", "bf16", "--data"]  # before those of the plan
        assert run.data == "my runs/data" and run.save_dir.startswith("my runs/seed")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--flags", "--seed 7"], "--flags: --seed is set by the plan"),
        (["--flags=--precision bf16 --lr=0.1"], "--flags: --lr is set"),
        (["--flags", "--select_on val"], "--flags: --select_on is set"),
        (["--flags", "'"], "argument --flags: invalid"),
        (["--out", "file"], "file"),
        (["--size", "rehearsal", "--data", "d"], "--data: a rehearsal"),
        (["--list", "--chain", "0"], "--chain"),
        (["--chain", "15"], "--chain 15: expected 0 to 14"),
        (["--chain", "0"], "--data reproduce/data: no such folder; run --prepare"),
        (["--status"], "--out reproduce: no such folder"),
        (["--report"], "--out reproduce: contains no results"),
    ],
)
def test_bad_input_gives_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    check_error(lambda: reproduce.main(flags), message)
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_the_dataset_is_prepared(tmp_path, monkeypatch):
    calls, command = [], ["dataset.py", "--data", f"{tmp_path}/data", "--per_class", "600"]
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 2)
    with pytest.raises(UserError, match="data: cannot be used"):
        reproduce.main(["--out", str(tmp_path), "--prepare"])
    assert calls == [reproduce.python(command)]


# A stand-in for a script: waits for a file, notes that it ran, and finishes or ends with a status
SCRIPT = """
import json, pathlib, sys, time
path, status, awaited = pathlib.Path(__file__), {}, {!r}
with open(path.parent / "ran", "a") as file:
    file.write(path.stem)
for _ in range(3000):
    if not awaited or pathlib.Path(awaited).exists():
        break
    time.sleep(0.01)
if status:
    print("--lr 9: too high")
    sys.exit(status)
path.with_suffix(".json").write_text(json.dumps({{"finished": True, "command": sys.argv[1:]}}))
"""


def stand_in(folder, name, status=0, awaits="", needs=""):
    (folder / "logs").mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(SCRIPT.format(status, awaits))
    return reproduce.Job(0, name, [str(path), "--lr", "1"], folder / f"{name}.json", needs)


def run_all(folder, *jobs, number=2):
    """Returns which ones have been started until now, in order."""
    reproduce.run_all(jobs, SimpleNamespace(out=folder, jobs=number))
    return (folder / "ran").read_text()


def test_a_run_starts_when_what_it_needs_has_finished(tmp_path):
    slow = stand_in(tmp_path, "B", awaits=str(tmp_path / "C.json"))
    jobs = [stand_in(tmp_path, "A", needs="B"), slow, stand_in(tmp_path, "C")]
    assert run_all(tmp_path, *jobs) in ("BCA", "CBA")
    assert run_all(tmp_path, *jobs) in ("BCA", "CBA")  # nothing is left to run
    other = [job._replace(command=[*job.command, "--other"]) for job in jobs[1:]]
    assert len(run_all(tmp_path, *other, number=1)) == 5  # finished, but not with these flags


def test_a_failed_run_stops_the_others_and_is_the_first_to_run_again(tmp_path):
    first, waits = stand_in(tmp_path, "A"), stand_in(tmp_path, "C", awaits=str(tmp_path / "never"))
    with pytest.raises(UserError, match="B.txt: ends with status 1: --lr 9: too high"):
        run_all(tmp_path, first, stand_in(tmp_path, "B", status=1, needs="A"), waits)
    assert not (tmp_path / "C.json").exists()
    (tmp_path / "ran").unlink()
    assert run_all(tmp_path, first, stand_in(tmp_path, "B", needs="A")) == "B"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_a_signal_stopped_is_no_failure(tmp_path, signum):
    """A scheduler sends it to all processes, in any order."""
    with pytest.raises(Interrupted) as stopped:
        run_all(tmp_path, stand_in(tmp_path, "A", status=128 + signum))
    assert stopped.value.signum == signum


def test_the_list_is_a_shell_script(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "it's $HOME #1"
    folder.mkdir()
    jobs = [stand_in(folder, "A"), stand_in(folder, "B", needs="A")]
    monkeypatch.setattr(reproduce, "plan", lambda args: jobs)
    reproduce.main(["--list"])
    lines = [line.split("\t", 3) for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [["0", "A", "-"], ["0", "B", "A"]]
    subprocess.run(["sh", "-e"], input="\n".join(x[3] for x in lines), text=True, check=True)
    assert (folder / "ran").read_text() == "AB"


def test_a_stopped_chain_resumes(tmp_path):
    """The signal is for the pool alone, which passes it on."""
    command = [sys.executable, "-m", "tools.reproduce", "--size", "rehearsal", "--seeds", "5"]
    command += ["--out", str(tmp_path), "--chain", "4", "--flags", "--classifiers 2"]
    folder = tmp_path / "seed5" / "CIL_no_teaching"
    process = subprocess.Popen(command, cwd=reproduce.ROOT)
    while not (folder / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    (log,) = (tmp_path / "logs").glob("seed5*")
    assert "stopped by SIGTERM" in log.read_text()
    subprocess.run(command, cwd=reproduce.ROOT, check=True)
    assert json.loads((folder / "run.json").read_text())["finished"]


def test_status_shows_how_far_each_run_is(tmp_path, capsys):
    flags = ["--seeds", "0,1", "--out", str(tmp_path)]
    jobs, _ = plan_of(*flags)
    begun = {  # name: state, content of run.json, seconds since its last write
        "seed0/TD": ("running", {}, 0),
        "seed0/CIL": ("done", {"finished": True, "seconds": 4000}, 0),
        "seed1/CIL": ("stopped", {"finished": True, "command": ["--width", "1"]}, 5000),
        "seed1/TD": ("stopped", {}, 5000),
    }
    for job in [job for job in jobs if job.name in begun]:
        _, content, age = begun[job.name]
        content = {"seconds": 60, "stages": {"task1": {}}, "command": job.command[1:]} | content
        job.journal.parent.mkdir(parents=True)
        job.journal.write_text(json.dumps(content))
        os.utime(job.journal, (time.time() - age, time.time() - age))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    reproduce.main([*flags, "--status"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    _, *lines, summary = capsys.readouterr().out.splitlines()
    for job, line in zip(jobs, lines, strict=True):
        assert job.name in line and begun.get(job.name, ["not started"])[0] in line
    assert "task1" in lines[0] and "1:06:40" in lines[1]
    # all but the done one, in dense runs of 4,000 s: 2 TD, 4 BU, 3 dense, 28 retrained
    assert summary.endswith(reproduce.duration(4000 * (2 * 1.4 + 4 * 2.5 + 3 + 28 * 0.15)))


def test_the_records_are_copied_and_compared(tmp_path, monkeypatch):
    parts = ("results.json", "metrics.csv", "confusion.csv")
    copied = [f"seed1/BU/{prefix}{part}" for prefix in ("", "retrain_task3_") for part in parts]
    others = "seed1/BU/run.json", "seed1/BU/task1_best_model.pt", "seed2/BU/results.json"
    for name in (*copied, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    calls = []
    monkeypatch.setattr(report, "main", calls.append)
    reproduce.main(["--out", str(tmp_path), "--seeds", "1", "--report"])
    copies = tmp_path / "results"
    found = sorted(str(path.relative_to(copies)) for path in copies.rglob("*.*"))
    assert found == sorted(copied)
    assert calls == [[str(copies / "seed1" / "BU"), "--out", str(copies)]]
