"""The runs of tools/reproduce.py: their command lines, resuming, failures. No training here."""

import json
import os
import re
import signal
import socket
import subprocess
from types import SimpleNamespace

import pytest

import main_BU
import main_CIL
import main_TD
import main_train
from runtime.cli import CONTROLS
from runtime.epochs import save_epochs
from runtime.errors import UserError
from runtime.process import Interrupted
from tools import report, reproduce, status

PARSE = {
    "main_TD.py": main_TD.parse,
    "main_BU.py": main_BU.parse,
    "main_train.py": main_train.parse,
    "main_CIL.py": main_CIL.parse,
}


# --size: epochs, batch size, learning rate, and the runs of a seed
SIZES = {
    "small": (7, 256, 0.05, 19),
    "medium": (10, 256, 0.02, 21),
    "full": (100, 256, 0.01, 21),
    "rehearsal": (1, 64, 0.05, 21),
}


def plan_of(*flags):
    """The plan with these flags, and the parsed flags of each run."""
    jobs = reproduce.plan(reproduce.parse([*flags]))
    return jobs, [PARSE[job.command[0]](job.command[1:]) for job in jobs]


@pytest.mark.parametrize("size", SIZES)
def test_the_scripts_accept_the_planned_commands(size):
    jobs, runs = plan_of("--size", size)
    epochs, batch_size, lr, number = SIZES[size]
    assert len({job.name for job in jobs}) == len({job.journal for job in jobs}) == 3 * number
    assert {(run.epochs, run.batch_size, run.lr) for run in runs} == {(epochs, batch_size, lr)}
    assert {run.seed for run in runs} == {0, 1, 2}
    found = {(run.state, run.control) for run in runs if "control" in run}
    assert found == {(t, control) for t in (3, 5) for control in CONTROLS}
    seen = set()
    for job, run in zip(jobs, runs):
        assert seen.issuperset(job.needs)  # which come before
        assert job.journal.parent == reproduce.Path(run.save_dir)
        if job.command[0] == "main_train.py":  # from the weights of the task before
            assert [*job.needs] == ["/".join(job.journal.parent.parts[-2:])]
            assert run.weight == f"{run.save_dir}/task{run.state - 1}_best_model.pt"
            assert run.mask == f"{run.save_dir}/mask-{run.state}.pt"
        seen.add(job.name)


def test_the_medium_plan_is_in_order_of_worth():
    jobs, runs = plan_of("--size", "medium")
    names = [job.name.removeprefix("seed0/") for job in jobs[:18]]
    assert names[:6] == ["TD", "CIL", "BU", "BU_retrain_task3", "BU_retrain_task5", "TD_random"]
    assert all("BU_retrain" in name for name in names[6:16])
    assert names[16:] == ["CIL_no_teaching", "CIL_joint"]
    assert [run.seed for run in runs] == [*([0] * 18), *([1] * 18), *([2] * 18)] + [
        seed for seed in (0, 1, 2) for _ in range(3)
    ]
    assert runs[5].criterion == "random" and runs[2].select_on == "val"
    for run in runs:
        assert getattr(run, "iter_epochs", 2) == 2  # of task 1: 2 x 36 steps between prunings


def test_full_is_an_old_name_of_a_size():
    assert vars(reproduce.parse(["--full"])) == vars(reproduce.parse(["--size", "full"]))


def test_paths_may_contain_spaces():
    for job in plan_of("--out", "my runs", "--data", "my set")[0]:
        assert job.command[job.command.index("--data") + 1] == "my set"
        assert job.command[job.command.index("--save_dir") + 1].startswith("my runs/seed")


def test_a_chain_is_a_run_and_those_that_need_it():
    jobs = plan_of("--seeds", "0")[0]
    names = [[job.name.removeprefix("seed0/") for job in chain] for chain in reproduce.chains(jobs)]
    assert [len(chain) for chain in names] == [1, 1, 13, 1, 3]
    assert [chain[0] for chain in names] == ["TD", "CIL", "BU", "CIL_no_teaching", "BU_on_test"]
    assert names[4] == ["BU_on_test", *(f"BU_on_test_retrain_task{t}" for t in (3, 5))]


def test_the_list_is_a_shell_script(tmp_path, monkeypatch, capfd):
    """Also for a folder whose name a shell would read otherwise."""
    folder = tmp_path / "it's $HOME\t#1"
    folder.mkdir()
    jobs = chain_of(folder, FINISHES, FINISHES)
    jobs[1] = jobs[1]._replace(needs=(jobs[0].name,))
    monkeypatch.setattr(reproduce, "plan", lambda args: jobs)
    reproduce.main(["--list"])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("\t")[:3] for line in lines] == [
        ["0", "seed0/0", "-"],
        ["0", "seed0/1", "seed0/0"],
    ]
    script = "".join(line.split("\t", 3)[3] + "\n" for line in lines)
    subprocess.run(["sh", "-e"], input=script, text=True, check=True)
    assert (folder / "ran").read_text() == "01" and all(map(reproduce.finished, jobs))


# ------------------------------------------------------------------------------ running

FINISHES = """
import json, sys
from pathlib import Path
path = Path(__file__)
with open(path.parent / "ran", "a") as file:
    file.write(path.stem)
journal = {"finished": True, "command": sys.argv[1:]}
path.with_suffix(".json").write_text(json.dumps(journal))
print(f"state {path.stem}: good")
"""


def chain_of(tmp_path, *programs):
    """Jobs 0, 1, ... that run these Python programs, each of which needs the one before."""
    (tmp_path / "logs").mkdir(exist_ok=True)
    jobs = []
    for number, code in enumerate(programs):
        path = tmp_path / f"{number}.py"
        path.write_text(code)
        command = [str(path), "--save_dir", str(tmp_path)]
        needs = (f"seed0/{number - 1}",) if number else ()
        jobs.append(reproduce.Job(f"seed0/{number}", command, path.with_suffix(".json"), needs))
    return jobs


@pytest.fixture
def run(tmp_path):
    return lambda jobs: reproduce.run_all(jobs, SimpleNamespace(out=tmp_path, jobs=2))


def test_the_runner_resumes_at_the_first_unfinished_run(tmp_path, run, capsys):
    failing = chain_of(tmp_path, FINISHES, "import sys; sys.exit('--lr 9: too high')")
    with pytest.raises(UserError, match="seed0_1.txt: ends with status 1: --lr 9: too high"):
        run(failing)
    assert "seed0/0: 0 s, state 0: good" in capsys.readouterr().out
    chain = chain_of(tmp_path, FINISHES, FINISHES)
    for ran in ("01", "01"):  # the second time, there is nothing to do
        run(chain)
        assert (tmp_path / "ran").read_text() == ran
    run([job._replace(command=[*job.command, "--other"]) for job in chain])
    assert (tmp_path / "ran").read_text() == "0101"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_a_signal_stopped_stops_the_runner(tmp_path, run, signum):
    """It is no failure: a scheduler that sends the signal to all processes may start it again."""
    (job,) = chain_of(tmp_path, f"import sys; sys.exit({128 + signum})")
    with pytest.raises(Interrupted) as stopped:
        run([job])
    assert stopped.value.signum == signum and stopped.value.position == ", seed0/0 is saved"


def test_a_run_starts_when_what_it_needs_has_finished(tmp_path, run):
    """Even if it is the first of the list; others start meanwhile."""
    first = "import time; time.sleep(0.5)\n" + FINISHES
    jobs = chain_of(tmp_path, FINISHES, first, FINISHES)
    needs = ("seed0/1",), (), ()
    run([job._replace(needs=names) for job, names in zip(jobs, needs)])
    assert (tmp_path / "ran").read_text() == "210"


@pytest.mark.parametrize(
    ("journal", "expected"),
    [
        ('{"finished": true, "command": ["--seed", "0"]}', True),
        ('{"finished": true, "command": ["--seed", "1"]}', False),
        ('{"command": ["--seed", "0"]}', False),
        ('{"finished": true}', False),
        ("[]", False),
        ('{"finished": tr', False),
    ],
)
def test_the_journal_tells_whether_a_run_has_finished(tmp_path, journal, expected):
    job = reproduce.Job("run", ["main_CIL.py", "--seed", "0"], tmp_path / "run.json")
    assert not reproduce.finished(job)  # no journal yet
    job.journal.write_text(journal)
    assert reproduce.finished(job) == expected


def test_a_failed_run_stops_the_others(tmp_path, monkeypatch):
    start = "import pathlib, time\npathlib.Path(__file__ + '.started').touch()\n"
    other = tmp_path / "1.py.started"
    wait = f"while not pathlib.Path({str(other)!r}).exists(): time.sleep(0.01)\n"
    failing = start + wait + "raise SystemExit('no')"
    long = start + "time.sleep(20)\npathlib.Path(__file__ + '.ended').touch()"
    failing, long = chain_of(tmp_path, failing, long)
    monkeypatch.setattr(reproduce, "plan", lambda args: [failing, long._replace(needs=())])
    monkeypatch.setattr(reproduce, "prepare_data", lambda args: None)
    with pytest.raises(UserError, match="seed0_0.txt: ends with status 1: no"):
        reproduce.main(["--out", str(tmp_path), "--jobs", "2"])
    assert not [*tmp_path.glob("*.ended")]


def test_the_records_are_copied_and_compared(tmp_path, monkeypatch):
    out = tmp_path / "out"
    copied = [
        f"CIL/{name}" for name in ("metrics.csv", "results.json", "retrain_task3_results.json")
    ]
    names = (*copied, "CIL/task1_best_model.pt")
    for name in (*(f"seed1/{name}" for name in names), "seed2/CIL/results.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"states": [1]}')
    (out / "seed1" / "BU").mkdir()
    (out / "seed1" / "BU" / "results.json").write_text('{"states": []}')  # it has just begun
    calls = []
    monkeypatch.setattr(report, "main", calls.append)
    monkeypatch.setattr(reproduce, "plan", lambda args: [])
    monkeypatch.setattr(reproduce, "prepare_data", lambda args: None)
    reproduce.main(["--out", str(out), "--seeds", "1"])
    copies = out / "results"
    found = sorted(str(path.relative_to(copies)) for path in copies.rglob("*.*"))
    assert found == [f"seed1/{name}" for name in copied]
    assert calls == [[str(copies / "seed1" / "CIL"), "--out", str(copies)]]


RAW = ["--raw", "r", "--unlabeled", "a", "b"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["--per_class", "600"]),
        (["--size", "medium"], []),
        (["--size", "full", *RAW], RAW),
    ],
)
def test_the_data_set_is_prepared(monkeypatch, flags, expected):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command))
    reproduce.prepare_data(reproduce.parse(["--out", "out", *flags]))
    assert calls == [reproduce.python(["dataset.py", "--data", "out/data", *expected])]


def test_a_chain_runs_on_prepared_data_alone(tmp_path, monkeypatch, capfd):
    jobs = chain_of(tmp_path, FINISHES, FINISHES, FINISHES)
    jobs[1] = jobs[1]._replace(needs=())
    monkeypatch.setattr(reproduce, "plan", lambda args: jobs)
    command = ["--chain", "1", "--out", str(tmp_path)]
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="data: holds no prepared data set"):
        reproduce.main(command)
    (tmp_path / "data" / "meta.json").write_text('{"per_class": 600}')
    with pytest.raises(UserError, match="data: was prepared with per_class 600, not 300"):
        small = reproduce.SIZES["small"]._replace(data="--per_class 300")
        monkeypatch.setitem(reproduce.SIZES, "medium", small)
        reproduce.main([*command, "--size", "medium"])
    reproduce.main(command)
    assert (tmp_path / "ran").read_text() == "12"


def test_a_data_set_that_cannot_be_prepared(monkeypatch):
    monkeypatch.setattr(subprocess, "call", lambda command: 2)
    with pytest.raises(UserError, match="--data out/data: cannot be used"):
        reproduce.prepare_data(reproduce.parse(["--out", "out"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", ""], "--seeds"),
        (["--out", "file"], "--out file"),
        (["--jobs", "0"], "--jobs"),
        (["--flags", "'"], "--flags: found .* close the quotation"),
        (["--flags", "--lr 0"], "--flags '--lr 0': main_TD.py: argument --lr: found '0'"),
        (["--flags=--x 3", "--prepare"], "--flags '--x 3': main_TD.py: unrecognized arguments"),
        (["--seeds", "0-2"], "--seeds: found '0-2', .* or several separated by commas"),
        (["--size", "huge"], "--size: invalid choice: 'huge'"),
        (["--size", "rehearsal", "--data", "d"], "--data: a rehearsal"),
        (["--list", "--chain", "0"], "--chain: not allowed with"),
        (["--list", "--out", "a\nb"], "--list: found a line break in a name"),
        (["--chain", "0", "--jobs", "2"], "--chain --jobs: .* leave --jobs out"),
        (["--flags", "--precision"], "argument --flags: expected .* with a dash as --flags=VALUE"),
        (["--chain", "15"], "--chain 15: these flags make 15 chains, give 0 to 14"),
        (["--chain", "0"], "--data reproduce/data: holds no prepared data set; run .* --prepare"),
        (["--status"], "--out reproduce: no such folder"),
        (["--report"], "--out reproduce: holds no results yet"),
    ],
)
def test_bad_input_gives_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message) as error:
        reproduce.main(flags)
    assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


# ------------------------------------------------------------------------------ --status


def leave_run(out, name, prefix="", owner=None, log=None, **journal):
    """What a run leaves behind: run.json, two epochs of task 1 in 60 s, owner and log."""
    folder = out / "seed0" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}run.json").write_text(json.dumps({"seconds": 60.0, "steps": {}} | journal))
    rows = [{"step": "task1", "epoch": epoch, "seconds": 20.0} for epoch in (1, 2)]
    save_epochs(folder / f"{prefix}metrics.csv", rows)
    if owner:
        (folder / f".{prefix}owner").write_text(f"{owner[0]} {owner[1]} 0123456789abcdef")
    if log:
        (out / "logs" / f"seed0_{name}.txt").write_text(log)


def ended_process():
    with subprocess.Popen(["true"]) as child:
        pass
    return child.pid


def test_status_shows_how_far_each_run_is(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    here = socket.gethostname()
    leave_run(tmp_path, "TD", owner=(here, os.getpid()))
    flags = ["--seeds", "0,1", "--out", str(tmp_path)]
    (dense,) = [job for job in plan_of(*flags)[0] if job.name == "seed0/CIL"]
    leave_run(tmp_path, "CIL", finished=True, command=dense.command[1:], seconds=4000.0)
    stopped = "main_BU.py: stopped by SIGTERM; give the same command to resume\n"
    leave_run(tmp_path, "BU", owner=(here, ended_process()), log=stopped)
    failed = "main_CIL.py: --lr 9 is too high\n"
    leave_run(tmp_path, "CIL_no_teaching", log=f"{failed}{status.ENDED}2\n")
    leave_run(tmp_path, "BU_on_test", owner=("elsewhere", 1))
    leave_run(tmp_path, "BU_on_test", "retrain_task5_", owner=("elsewhere", 1))
    for path in tmp_path.glob("seed0/BU_on_test/retrain_task5_*"):
        os.utime(path, (0, 0))
    leave_run(tmp_path, "BU", "retrain_task3_", finished=True, command=["--width", "1"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    reproduce.main([*flags, "--status"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    header, *lines, summary = capsys.readouterr().out.splitlines()
    found = {line.split()[1].removeprefix("seed0/"): line.strip() for line in lines}
    columns = {name: re.split(r"  +", line)[2:] for name, line in found.items()}
    assert [found[name].split()[0] for name in ("TD", "CIL", "BU", "BU_retrain_task3")] == [*"0122"]
    assert columns["BU_retrain_task3"][0] == "other flags"
    # epochs, in those of task 1: 139 of TD, 344 at most of BU, 21 of a retrained ticket
    assert columns["TD"] == ["at work", "1 %", "1 min", "1 h 08 min", "task1, epoch 2 of 7"]
    assert columns["CIL"] == ["done", "100 %", "1 h 06 min"]
    assert columns["BU"] == ["stopped", "1 %", "1 min", "<2 h 51 min", "task1, epoch 2 of 7"]
    assert columns["CIL_no_teaching"][0] == "failed"
    assert columns["CIL_no_teaching"][-1] == "main_CIL.py: --lr 9 is too high"
    assert columns["BU_on_test"][0] == "at work"
    assert columns["BU_on_test_retrain_task5"][0] == "stopped"
    assert columns["seed1/CIL"] == ["waiting", "0 %", "1 h 06 min"]  # as that of seed 0
    assert summary.startswith("1 of 38 runs are done, 2 at work, 2 stopped, 1 failed; one after")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7500, "2 h 05 min"), (274000, "3 d 04 h")],
)
def test_durations(seconds, text):
    assert status.duration(seconds) == text


def test_the_status_of_a_damaged_run(tmp_path):
    leave_run(tmp_path, "TD")
    for name, flag, message in (
        ("run.json", "--status", "is damaged"),
        (
            "results.json",
            "--report",
            "cannot be read or copied .*; its command, shown by --list, writes",
        ),
    ):
        (tmp_path / "seed0" / "TD" / name).write_text("{")
        with pytest.raises(UserError, match=f"TD/{name}: {message}"):
            reproduce.main(["--out", str(tmp_path), flag])
