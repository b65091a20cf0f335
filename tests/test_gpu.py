"""tools/gpu.py: a rehearsal on the CPU, what a call leaves to the next one, failures, bad input."""

import json
import sys
import time

import pytest
import torch

from runtime.errors import UserError
from tools import gpu, reproduce


def record_of(folder):
    return json.loads((folder / "gpu.json").read_text())


def started(capsys):
    """The parts that the last call has started."""
    lines = capsys.readouterr().out.splitlines()
    return [line.partition(":")[0] for line in lines if ": started" in line]


def test_a_rehearsal_runs_every_part_once(tmp_path, monkeypatch, capsys):
    """One of the protocol's runs stands in for all."""
    plan = reproduce.plan
    monkeypatch.setattr(reproduce, "plan", lambda args: plan(args)[1:2])
    command = ["--rehearsal", "--seeds", "0", "--out", str(tmp_path)]
    gpu.main(command)
    parts = ["tests", "benchmark", "profile", "seed0/CIL", "report"]
    assert started(capsys) == parts
    record = record_of(tmp_path)
    assert [*record["parts"]] == parts and record["machine"]["torch"] == torch.__version__
    assert {entry["outcome"] for entry in record["parts"].values()} == {"done"}
    assert " passed" in record["parts"]["tests"]["last_line"]
    assert record["parts"]["seed0/CIL"]["last_line"].startswith("state 5: test accuracy")
    page = (tmp_path / "gpu.md").read_text()
    for text in ("4 of 4 parts", "| query_T5 |", "| bf16 | eager |", "needs CUDA", "report.png"):
        assert text in page
    assert (tmp_path / "results" / "report.png").exists()
    gpu.main(command)
    assert started(capsys) == ["report"]
    again = record_of(tmp_path)
    for each in (record, again):
        each["parts"].pop("report")
    assert again == record


# ------------------------------------------------------------------------------ without training

ENDS = "print('good')"
FAILS = "import sys; sys.exit('no GPU | here')"
SAVES = """
import pathlib, signal, sys, time
saved = pathlib.Path({!r})
if saved.exists():
    sys.exit(print("resumes"))
def save(*_):
    saved.touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
time.sleep(60)
"""
IGNORES = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
while True:
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(0.05)
"""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """A function that calls the tool with these programs as parts; returns those it started."""

    def call(programs, *flags):
        parts = [gpu.Part(name, [sys.executable, "-c", code]) for name, code in programs.items()]
        monkeypatch.setattr(gpu, "plan", lambda args: parts)
        gpu.main(["--device", "cpu", "--out", str(tmp_path), *flags])
        return started(capsys)

    return call


def outcomes(folder):
    return {name: entry["outcome"] for name, entry in record_of(folder)["parts"].items()}


def test_when_the_time_is_up_a_part_saves_and_the_next_call_goes_on(tmp_path, call):
    programs = {"tests": ENDS, "profile": FAILS, "TD": SAVES.format(str(tmp_path / "saved"))}
    programs["CIL"] = ENDS
    start = time.monotonic()
    assert call(programs, "--minutes", "0.1") == ["tests", "profile", "TD"]
    assert time.monotonic() - start < 6
    failed = {"tests": "done", "profile": "failed with status 1"}
    assert outcomes(tmp_path) == failed | {"TD": "stopped"}
    assert record_of(tmp_path)["parts"]["TD"]["status"] == 143
    page = (tmp_path / "gpu.md").read_text()
    assert "1 of 4 parts" in page and r"(logs/profile.txt) | no GPU \| here |" in page
    before = record_of(tmp_path)["parts"]["TD"]["seconds"]
    assert call(programs) == ["profile", "TD", "CIL"]  # what has failed is tried again
    assert outcomes(tmp_path) == failed | {"TD": "done", "CIL": "done"}
    assert record_of(tmp_path)["parts"]["TD"]["seconds"] > before
    assert call(programs | {"tests": FAILS}) == ["tests", "profile"]  # another command


def test_what_ignores_the_signal_is_killed_with_its_children(tmp_path, call):
    start = time.monotonic()
    call({"TD": IGNORES}, "--minutes", "0.1")
    assert time.monotonic() - start < 6
    assert record_of(tmp_path)["parts"]["TD"]["status"] == -9
    log = tmp_path / "logs" / "TD.txt"
    printed = log.read_text()
    assert len({*printed.split()}) == 2  # two processes
    time.sleep(0.3)
    assert log.read_text() == printed


def test_without_data_there_are_no_runs(tmp_path, call):
    assert call({"data": FAILS, "TD": ENDS}) == ["data"]


def test_the_protocol_is_in_order_of_priority():
    names = [part.name for part in gpu.plan(gpu.parse(["--device", "cpu", "--seeds", "1,0"]))]
    assert names[:7] == [
        *("tests", "benchmark", "profile", "data"),
        *("seed1/TD", "seed1/CIL", "seed1/BU"),
    ]
    assert names[7] == "seed1/BU_retrain_task3" and len(names) == 4 + 2 * 21
    assert names[21:23] == ["seed1/CIL_joint", "seed0/TD"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--device cuda: .* --rehearsal"),
        (["--minutes", "0"], "--minutes: found '0'"),
        (["--seeds", ""], "--seeds"),
        (["--rehearsal", "--data", "d"], "--data: a rehearsal"),
        (["--rehearsal", "--flags", "--lr 0"], "--lr 0': main_TD.py: argument --lr: found '0'"),
        (["--rehearsal", "--out", "file"], "--out file: cannot be written"),
        (["--rehearsal", "--out", "other"], "--out other: holds what ran on cuda:0"),
        (["--rehearsal", "--out", "bad"], "bad/gpu.json: is damaged"),
    ],
)
def test_bad_input_gives_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    machine = {"device": "cuda:0", "torch": "2.14", "cuda": "13.0"}
    other = json.dumps({"machine": machine, "parts": {}})
    for name, text in (("other", other), ("bad", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gpu.json").write_text(text)
    monkeypatch.setattr(gpu, "run_parts", None)
    with pytest.raises(UserError, match=message) as error:
        gpu.main(flags)
    assert "\n" not in str(error.value)
