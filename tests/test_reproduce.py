"""The runs of tools/reproduce.py: their command lines, resuming, failures. No training here."""

import subprocess
from types import SimpleNamespace

import pytest

import main_BU
import main_CIL
import main_TD
import main_train
from runtime.cli import CONTROLS
from runtime.errors import UserError
from tools import report, reproduce

PARSE = {
    "main_TD.py": main_TD.parse,
    "main_BU.py": main_BU.parse,
    "main_train.py": main_train.parse,
    "main_CIL.py": main_CIL.parse,
}


@pytest.mark.parametrize("flags", [[], ["--full"]])
def test_the_scripts_accept_the_planned_commands(flags):
    chains = reproduce.plan(reproduce.parse(flags))
    jobs = [job for chain in chains for job in chain]
    runs = [PARSE[job.command[0]](job.command[1:]) for job in jobs]
    assert len({job.name for job in jobs}) == len({job.journal for job in jobs}) == 3 * 19
    assert {args.batch_size for args in runs} == {256}
    assert {args.epochs for args in runs} == {100 if flags else 7}
    assert {args.seed for args in runs} == {0, 1, 2}
    found = {(args.state, args.control) for args in runs if "control" in args}
    assert found == {(t, control) for t in (3, 5) for control in CONTROLS}


def test_a_ticket_is_retrained_in_the_folder_of_the_run_that_found_it():
    """After that run, from the weights of the task before."""
    for chain in reproduce.plan(reproduce.parse([])):
        earlier = set()
        for job in chain:
            args = PARSE[job.command[0]](job.command[1:])
            if job.command[0] == "main_train.py":
                assert args.save_dir in earlier
                assert args.weight == f"{args.save_dir}/task{args.state - 1}_best_model.pt"
                assert args.mask == f"{args.save_dir}/mask-{args.state}.pt"
            assert job.journal.parent == reproduce.Path(args.save_dir)
            earlier.add(args.save_dir)


def test_paths_may_contain_spaces():
    args = reproduce.parse(["--out", "my runs", "--data", "my set"])
    for chain in reproduce.plan(args):
        for _, command, _ in chain:
            assert command[command.index("--data") + 1] == "my set"
            assert command[command.index("--save_dir") + 1].startswith("my runs/seed")


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
    """Jobs 0, 1, ... that run these Python programs."""
    (tmp_path / "logs").mkdir(exist_ok=True)
    jobs = []
    for number, code in enumerate(programs):
        path = tmp_path / f"{number}.py"
        path.write_text(code)
        command = [str(path), "--save_dir", str(tmp_path)]
        jobs.append(reproduce.Job(f"seed0/{number}", command, path.with_suffix(".json")))
    return jobs


@pytest.fixture
def run_chain(tmp_path):
    args, stop = SimpleNamespace(out=tmp_path, jobs=2), SimpleNamespace(is_set=lambda: False)
    return lambda chain: reproduce.run_chain(chain, args, stop, set())


def test_a_chain_resumes_at_its_first_unfinished_run(tmp_path, run_chain, capsys):
    failing = chain_of(tmp_path, FINISHES, "import sys; sys.exit('--lr 9: too high')")
    with pytest.raises(UserError, match="seed0_1.txt: ends with status 1: --lr 9: too high"):
        run_chain(failing)
    assert "seed0/0: 0 s, state 0: good" in capsys.readouterr().out
    chain = chain_of(tmp_path, FINISHES, FINISHES)
    for ran in ("01", "01"):  # the second time, there is nothing to do
        run_chain(chain)
        assert (tmp_path / "ran").read_text() == ran
    run_chain([job._replace(command=[*job.command, "--other"]) for job in chain])
    assert (tmp_path / "ran").read_text() == "0101"


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
    monkeypatch.setattr(reproduce, "plan", lambda args: [[failing], [long, failing]])
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
        (["--full"], []),
        (["--full", *RAW], RAW),
    ],
)
def test_the_data_set_is_prepared(monkeypatch, flags, expected):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command))
    reproduce.prepare_data(reproduce.parse(["--out", "out", *flags]))
    assert calls == [reproduce.python(["dataset.py", "--data", "out/data", *expected])]


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
    ],
)
def test_bad_input_gives_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message) as error:
        reproduce.main(flags)
    assert "\n" not in str(error.value)
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]
