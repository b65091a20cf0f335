"""Runs that are killed, stopped, damaged, short of disk space or given twice, in real processes.

Each must end with the files of the uninterrupted run, byte for byte (soak.outcome).
"""

import fcntl
import io
import itertools
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import soak
import torch

import pruning_utils
import trainer
from models import build_model
from runtime import locks, process, ranks
from runtime.checkpoint import load_checkpoint
from runtime.errors import UserError
from runtime.run import Run, json_checksum

ROOT = Path(__file__).parent.parent
TD = soak.COMMANDS["TD"].split()


@pytest.fixture(scope="module")
def reference(scripts, tmp_path_factory):
    """A folder with the uninterrupted run of each script, and the seconds that each took."""
    folder = tmp_path_factory.mktemp("reference")
    seconds = {
        name: soak.uninterrupted(scripts, command, folder / name)
        for name, command in soak.COMMANDS.items()
    }
    return folder, seconds


@pytest.fixture
def finished(reference, tmp_path):
    """A copy of the finished run of main_TD: the folder in which it was started."""
    shutil.copytree(reference[0] / "TD", tmp_path / "TD")
    return tmp_path / "TD"


def wait_until(condition):
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def in_task(folder, t):
    """Whether a run is training task t."""
    return (folder / "run" / f"task{t}_progress.pt").exists()


def check_error(ended, *fragments):
    """Check for status 2 and one line on stderr with all fragments; returns the line."""
    assert ended.status == 2, ended
    (line,) = ended.err.splitlines()
    assert all(each in line for each in fragments), line
    return line


def assert_same_but_for(flag, folder, other):
    """Check that the files of two runs are equal, except for a flag in their configurations."""
    found, expected = soak.outcome(folder), soak.outcome(other)
    for each in (found, expected):
        for name in ("run.json", "results.json"):
            each[name]["config"].pop(flag, None)
    assert found == expected


# ------------------------------------------------------------------------------ killed


# main_CIL.py's steps are a subset of main_TD.py's; soak.py kills it too
@pytest.mark.parametrize("name", ["TD", "BU", "train"])
def test_a_run_killed_several_times_ends_as_the_uninterrupted_one(
    scripts, reference, tmp_path, name
):
    folder, seconds = reference
    if name == "train":  # it works on the files of BU
        os.symlink(folder / "BU", tmp_path / "BU")
    draw, longest = random.Random(name), 0.3 + seconds[name] / 2
    killed, _ = soak.kill_until_done(
        scripts, soak.COMMANDS[name], tmp_path / name, draw, longest, kills=3
    )
    assert killed  # otherwise another seed is needed
    assert soak.outcome(tmp_path / name) == soak.outcome(folder / name)


def test_finished_steps_are_kept_and_the_run_prints_where_it_resumes(scripts, reference, tmp_path):
    argv = [*TD, "--checkpoint_seconds", "0"]
    pid = scripts.start(argv, tmp_path)
    wait_until(lambda: in_task(tmp_path, 3))
    os.kill(pid, signal.SIGKILL)
    assert scripts.wait().status == -signal.SIGKILL
    assert "finished" not in json.loads((tmp_path / "run" / "run.json").read_text())
    files = [tmp_path / "run" / f"task{t}_best_model.pt" for t in (1, 2)]
    before = [path.stat().st_mtime_ns for path in files]
    ended = scripts.run(argv, tmp_path)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert "  folder   run, resumes after task2_ticket\n" in ended.out
    assert re.search(
        "^task3: resumes at epoch [12] of 2, after batch [0-9]+ of [0-9]+$", ended.out, re.M
    )
    assert "task1" not in ended.out and "task2:" not in ended.out
    assert soak.outcome(tmp_path) == soak.outcome(reference[0] / "TD")


def test_a_finished_run_is_left_as_it_is(scripts, finished):
    before = soak.outcome(finished)
    journal = json.loads((finished / "run" / "run.json").read_text())
    assert journal["finished"] is True and journal["command"] == TD[1:]
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*.pt")}
    ended = scripts.run(TD, finished)
    assert ended.status == 0 and "resumes after result_evaluated_on_test" in ended.out
    assert soak.outcome(finished) == before
    assert files == {path: path.stat().st_mtime_ns for path in finished.rglob("*.pt")}


# ------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_the_progress_and_ends_the_run(scripts, reference, tmp_path, signum):
    pid = scripts.start(TD, tmp_path)
    wait_until(lambda: (tmp_path / "run" / "task1_ticket.pt").exists())
    time.sleep(0.2)  # in the training of task 2
    start = time.monotonic()
    os.kill(pid, signum)
    ended = scripts.wait()
    assert time.monotonic() - start < 10
    assert ended.status == 128 + signum
    (line,) = ended.err.splitlines()
    assert re.fullmatch(
        f"main_TD.py: stopped by {signum.name}(, task2 is saved at epoch . of 2, after batch "
        f"[0-9]+ of [0-9]+)?; give the same command to resume",
        line,
    )
    assert in_task(tmp_path, 2) == ("saved" in line)
    assert scripts.run(TD, tmp_path).status == 0
    assert soak.outcome(tmp_path) == soak.outcome(reference[0] / "TD")


def stopped_and_resumed(args, data, folder, monkeypatch, stop):
    """Train task 2, stop at the stop-th check for signals (None: never), and resume in a new run.

    Two prunings with one optimizer come before it, as in main_TD. Returns the number of checks in
    the last attempt, the model's state, the best state, the momentum and the best epoch.
    """
    args.save_dir, args.save_data_path = str(folder), str(folder / "data")
    args.epochs, args.decreasing_lr, args.iter_epochs, args.lr = 3, [1, 2], 2, 0.05
    generator = torch.Generator().manual_seed(6)
    device, logits = data.pool.device, torch.randn(2, 12, 2, generator=generator)
    task = trainer.make_task(data, 2, (data.pool[:12], *logits.to(device)))
    checks = iter(range(10**6))

    def check_signals(due=False):
        if next(checks) == stop:
            raise process.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(trainer, "check_signals", check_signals)
    for _ in range(2):
        model = trainer.make_model(args, device)
        optimizer = trainer.make_optimizer(model, args, args.lr / 100)
        try:
            run = Run("test", args, data, model)
            for number in (1, 2):
                masks, step = pruning_utils.masks_of(model), f"prune{number}"
                pruning_utils.apply_mask(model, pruning_utils.prune_once(model, masks, args, step))
                trainer.retrain(model, task, run, step, optimizer=optimizer)
            trained = trainer.train_task(model, task, run, "task2")
        except process.Interrupted:
            continue
        momentum = run.load("task2_checkpoint.pt")["optimizer"]["state"]
        return next(checks), model.state_dict(), trained.best_state, momentum, trained.best_epoch
    raise AssertionError("it did not resume")


@pytest.mark.device
@pytest.mark.usefixtures("deterministic")
def test_a_loop_stopped_anywhere_resumes_to_the_same_bits(args, data, tmp_path, monkeypatch):
    checks, *expected = stopped_and_resumed(args, data, tmp_path / "all", monkeypatch, None)
    assert checks > 30
    for stop in range(0, checks - 1, 3):
        _, *found = stopped_and_resumed(args, data, tmp_path / str(stop), monkeypatch, stop)
        for state, other in zip(expected[:2], found[:2]):
            assert state.keys() == other.keys()
            assert all(torch.equal(value, other[key]) for key, value in state.items()), stop
        for key, value in expected[2].items():
            assert torch.equal(value["momentum_buffer"], found[2][key]["momentum_buffer"]), stop
        assert expected[3] == found[3]


def test_held_signals_wait_for_the_check():
    def main():
        with pytest.raises(process.Interrupted) as end, process.hold_signals():
            for signum in (signal.SIGTERM, signal.SIGINT):
                with process.hold_signals():
                    os.kill(os.getpid(), signum)
                time.sleep(0.01)  # not raised at the end of the inner one
            reached.append("the check")
            process.check_signals()
            reached.append("beyond it")
        return end.value.signum

    reached = []
    before = signal.getsignal(signal.SIGTERM)
    assert process.run_script(main) == signal.SIGTERM and reached == ["the check"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("signum", process.STOPPING)
def test_the_first_signal_counts(signum, capsys):
    """A scheduler sends it to all processes of a job, and a parent passes it on."""

    def main():
        try:
            os.kill(os.getpid(), signum)
            time.sleep(1)
        finally:
            for other in {*process.STOPPING} - {signal.SIGINT}:
                os.kill(os.getpid(), other)
            time.sleep(0.01)
            print("cleaned up")

    with pytest.raises(SystemExit) as end:
        process.run_script(main)
    out, err = capsys.readouterr()
    assert end.value.code == 128 + signum and out == "cleaned up\n"
    assert f"stopped by {signum.name}; give" in err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_where_python_ignores_exceptions_is_not_lost(capsys):
    class Stopped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def main():
        Stopped()
        print("ignored", flush=True)
        process.check_signals()

    with pytest.raises(SystemExit) as end:
        process.run_script(main)
    assert end.value.code == 143 and capsys.readouterr().out == "ignored\n"


def test_a_signal_while_a_script_ends_changes_nothing(capsys):
    class Late(UserError):
        @property
        def status(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            return 2

    def main():
        raise Late("--flag: is wrong")

    with pytest.raises(SystemExit) as end:
        process.run_script(main)
    assert end.value.code == 2 and capsys.readouterr().err.endswith(": --flag: is wrong\n")
    with process.hold_signals():
        pass  # nor does it wait for what the process does next


def test_a_signal_that_ranks_have_not_agreed_on_waits(monkeypatch, capsys):
    """If it arrived on one rank during the agreement, this rank would stop alone."""

    def agree(*values):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return values

    def main():
        with process.hold_signals():
            with monkeypatch.context() as patch:
                patch.setattr(ranks, "agree", agree)
                process.check_signals()
            print("went on", flush=True)
            process.check_signals()
            print("not here")

    with pytest.raises(SystemExit) as end:
        process.run_script(main)
    assert end.value.code == 143 and capsys.readouterr().out == "went on\n"


WAITS = """
import pathlib, time
from runtime import process

def wait(name):
    pathlib.Path(name).touch()
    time.sleep(30)

def main():
    with process.hold_signals():
        {}

process.run_script(main)
"""
SAVES = """
        try:
            while True:
                pathlib.Path("started").touch()
                time.sleep(0.01)
                process.check_signals()
        except process.Interrupted:
            wait("saving")
"""


@pytest.mark.parametrize("code", ["wait('started')", SAVES.strip()], ids=["a batch", "saving"])
def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path, code):
    """Something hangs. Other signals do not end it, however often they come."""
    command = [sys.executable, "-c", WAITS.format(code)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as child:
        wait_until(lambda: (tmp_path / "started").exists())
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            child.send_signal(signum)
            if "saving" in code:
                wait_until(lambda: (tmp_path / "saving").exists())
            time.sleep(0.3)
            assert child.poll() is None
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 128 + signal.SIGINT and time.monotonic() - start < 10
        assert child.stderr.read() == b""


# ------------------------------------------------------------------------------ a full disk


@pytest.mark.parametrize(
    "size, name",
    [
        (300, "run.json"),
        (3_000, "task0_checkpoint_weight.pt"),
        (230_000, "task1_checkpoint.pt"),
    ],
)
def test_a_full_disk_ends_the_run_and_with_room_it_resumes(
    scripts, reference, tmp_path, size, name
):
    """A limit on the size of files stands in for it; `name` is the first that is too large."""
    ended = scripts.run(TD, tmp_path, limit=size)
    check_error(ended, f"run/{name}: cannot be written (File too large); make room")
    assert not (tmp_path / "run" / name).exists() and not soak.half_written(tmp_path)
    if name == "task1_checkpoint.pt":  # the others have hardly begun
        assert scripts.run(TD, tmp_path).status == 0
        assert soak.outcome(tmp_path) == soak.outcome(reference[0] / "TD")


# ------------------------------------------------------------------------------ damage


def flip(content):
    """One bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {"flipped": flip, "cut": lambda content: content[: len(content) // 2], "gone": None}
FILES = {
    "task0_checkpoint_weight.pt": "initialization",
    "task1_best_model.pt": "task1",
    "task2_checkpoint.pt": "task2",
    "task3_ticket.pt": "task3_ticket",
    "task4_best_model.pt": "task4",
    "data/task2_img.npy": "task2_teaching",
    "data/task1_dis_label.npy": "task1_teaching",
    "data/task1_select_index.npy": "task1_teaching",
}


# each file once, and one of them with every damage
DAMAGED = {*zip(FILES, itertools.cycle(DAMAGES))}
DAMAGED |= {("task2_checkpoint.pt", kind) for kind in DAMAGES}


@pytest.mark.parametrize("name, kind", sorted(DAMAGED))
def test_a_damaged_file_is_named_and_its_step_is_done_again(
    scripts, reference, finished, name, kind
):
    path = finished / "run" / name
    content = path.read_bytes()
    path.unlink()
    if DAMAGES[kind]:
        path.write_bytes(DAMAGES[kind](content))
    ended = scripts.run(TD, finished)
    assert ended.status == 0, ended
    problem = "is damaged" if DAMAGES[kind] else "is missing"
    assert f"run/{name}: {problem}, so {FILES[name]} is done again\n" in ended.out
    assert soak.outcome(finished) == soak.outcome(reference[0] / "TD")


def another_checkpoint(content):
    file = io.BytesIO()
    torch.save({"epoch": 1}, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", [flip, another_checkpoint])
def test_damaged_progress_is_named_and_the_step_starts_over(scripts, reference, tmp_path, damage):
    pid = scripts.start([*TD, "--checkpoint_seconds", "0"], tmp_path)
    wait_until(lambda: in_task(tmp_path, 2))
    os.kill(pid, signal.SIGKILL)
    scripts.wait()
    path = tmp_path / "run" / "task2_progress.pt"
    path.write_bytes(damage(path.read_bytes()))
    ended = scripts.run(TD, tmp_path)
    assert re.search(r"run/task2_progress.pt: .*; task2 starts over\n", ended.out)
    assert soak.outcome(tmp_path) == soak.outcome(reference[0] / "TD")


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda content: content[:-50],
        lambda content: b"",
        lambda content: b"[]",
        lambda content: b'{"checksum": 1}',
        lambda content: content.replace(b'"best": ', b'"best": 1', 1),
    ],
)
def test_a_damaged_journal_is_an_error_and_nothing_is_touched(scripts, finished, damage):
    path = finished / "run" / "run.json"
    path.write_bytes(damage(path.read_bytes()))

    def contents():
        names = (".lock", ".owner")
        files = (p for p in finished.rglob("*") if p.is_file() and p.name not in names)
        return {path: path.read_bytes() for path in files}

    before = contents()
    check_error(scripts.run(TD, finished), "run/run.json", "damaged", "--overwrite")
    assert contents() == before


@pytest.mark.parametrize("damage", [lambda c: b"x" + c, lambda c: c[:-30]])
def test_damaged_curves_are_an_error(scripts, finished, damage):
    path = finished / "run" / "metrics.csv"
    path.write_bytes(damage(path.read_bytes()))
    check_error(scripts.run(TD, finished), "run/metrics.csv: is damaged; remove it")


@pytest.mark.parametrize("name", ["results.json", "log_results.txt"])
def test_damaged_records_are_written_again(scripts, reference, finished, name):
    (finished / "run" / name).write_text("{")
    assert scripts.run(TD, finished).status == 0
    assert soak.outcome(finished) == soak.outcome(reference[0] / "TD")


@pytest.mark.parametrize(
    "name, message",
    [
        ("current_mask.pt", ""),
        ("mask-1.pt", "run/mask-1.pt: is damaged, so task1_ticket is done again\n"),
        ("task2_prune_weight.pt", "so task2_ticket is done again\n"),
        ("task3_prun_checkpoint.pt", "so task3_prun is done again\n"),
    ],
)
def test_damaged_tickets_are_made_again(scripts, reference, tmp_path, name, message):
    """And current_mask.pt is still that of the last task."""
    shutil.copytree(reference[0] / "BU", tmp_path / "BU")
    path = tmp_path / "BU" / "run" / name
    path.write_bytes(flip(path.read_bytes()))
    ended = scripts.run(soak.COMMANDS["BU"].split(), tmp_path / "BU")
    assert ended.status == 0 and message in ended.out
    assert soak.outcome(tmp_path / "BU") == soak.outcome(reference[0] / "BU")


def test_another_outcome_of_a_repeated_step_is_an_error_if_others_depend_on_it(scripts, finished):
    """As on another machine; here a checksum in the journal is changed."""
    path = finished / "run" / "run.json"
    journal = json.loads(path.read_text())
    journal.pop("checksum")
    journal["steps"]["task2"]["files"]["task2_best_model.pt"] = 64 * "0"
    path.write_text(json.dumps(journal | {"checksum": json_checksum(journal)}))
    for _ in range(2):
        ended = scripts.run(TD, finished)
        check_error(ended, "--save_dir run: task2, done again, has another outcome", "--overwrite")
        assert "finished" not in json.loads(path.read_text())


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "flags, fragments",
    [
        ("--seed 1", ["--seed 0 (now 1)"]),
        ("--lr 0.1 --epochs 3", ["--epochs 2 (now 3)", "--lr 0.01 (now 0.1)"]),
        ("--prune_scheduler 1,1,1", ["--prune_scheduler 1,2,3 (now 1,1,1)"]),
        ("--decreasing_lr 60,80", ["--decreasing_lr 1 (now 60,80)"]),
        (
            "--classes_per_classifier 1",
            ["--classes_per_classifier 2 (now 1)", "--class_order of"],
        ),
        ("--precision bf16", ["--precision fp32 (now bf16)"]),
        ("--deterministic", ["--deterministic False (now True)"]),
        ("--criterion random", ["--criterion magnitude (now random)"]),
        ("--arch resnet32", ["--arch resnet18 (now resnet32)"]),
    ],
)
def test_other_settings_are_listed_in_an_error(scripts, finished, flags, fragments):
    before = soak.outcome(finished)
    line = check_error(
        scripts.run([*TD, *flags.split()], finished), "--save_dir run", "--overwrite"
    )
    assert all(each in line for each in fragments) and line.count("(now") == len(fragments)
    assert soak.outcome(finished) == before


def test_a_folder_of_another_script_is_an_error(scripts, finished):
    argv = f"main_CIL.py {soak.TINY}".split()
    check_error(scripts.run(argv, finished), "--save_dir run", "main_TD.py")


def test_flags_that_change_no_result_may_differ(scripts, finished):
    moved = finished / "moved"
    (finished / "run").rename(moved)
    (moved / "data").rename(finished / "labels")
    folders = "--save_dir moved --save_data_path labels"
    flags = f"{folders} --print_freq 3 --gpu 0 --device cpu --checkpoint_seconds 7"
    ended = scripts.run([*TD, *flags.split()], finished)
    assert ended.status == 0 and "resumes after result_evaluated_on_test" in ended.out


def test_without_teaching_the_number_of_queried_images_may_differ(args, data, run):
    args.no_teaching, args.overwrite = True, True
    model = build_model(args)
    Run("test", args, data, model)
    args.unlabel_num, args.overwrite = 7, False
    Run("test", args, data, model)
    args.no_teaching = False
    with pytest.raises(UserError, match="with --no_teaching True .now False.; resume"):
        Run("test", args, data, model)


def test_a_switch_that_came_after_a_run_was_off(args, data, run):
    args.joint = False
    Run("test", args, data, build_model(args))
    args.joint = True
    with pytest.raises(UserError, match="with --joint False .now True.; resume"):
        Run("test", args, data, build_model(args))


def test_other_images_are_an_error(args, data, run):
    data.train[3][0, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match="--data of content"):
        Run("test", args, data, build_model(args))


def test_results_without_a_journal_are_not_overwritten(scripts, finished):
    (finished / "run" / "run.json").unlink()
    before = soak.outcome(finished)
    check_error(scripts.run(TD, finished), "--save_dir run", "run.json", "--overwrite")
    assert soak.outcome(finished) == before
    assert scripts.run([*TD, "--overwrite"], finished).status == 0


def test_progress_of_another_run_is_not_used(scripts, reference, tmp_path):
    """Its journal is lost, its progress is not."""
    pid = scripts.start([*TD, "--checkpoint_seconds", "0", "--seed", "1"], tmp_path)
    wait_until(lambda: in_task(tmp_path, 1))
    os.kill(pid, signal.SIGKILL)
    scripts.wait()
    (tmp_path / "run" / "run.json").write_text("{")
    ended = scripts.run([*TD, "--overwrite"], tmp_path)
    assert "task1_progress.pt: is of another run or version; task1 starts over" in ended.out
    assert_same_but_for("overwrite", tmp_path, reference[0] / "TD")


def test_overwrite_leaves_other_runs_alone(scripts, reference, tmp_path):
    for name in ("CIL", "TD"):
        shutil.copytree(reference[0] / name, tmp_path / name)
    before = soak.outcome(tmp_path / "CIL")
    other = f"main_TD.py {soak.COMMANDS['TD'].split(' ', 1)[1]} --overwrite"
    check_error(scripts.run(other.split(), tmp_path / "CIL"), "a run of main_CIL.py")
    assert soak.outcome(tmp_path / "CIL") == before
    ours = soak.outcome(tmp_path / "TD")
    for flags in (["--overwrite"], [], ["--save_dir", "new"]):
        ended = scripts.run([*TD, "--save_data_path", "../CIL/run/data", *flags], tmp_path / "TD")
        check_error(ended, "_img.npy, soft labels that are not of this run")
        assert soak.outcome(tmp_path / "CIL") == before and soak.outcome(tmp_path / "TD") == ours


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(scripts, reference, finished):
    run = finished / "run"
    mine = [run / "notes.txt", run / "task9_best_model.pt", run / "data" / "task9_img.npy"]
    for path in mine:
        path.write_text("mine")
    (run / ".task1_progress.pt.part").write_text("half")  # of a killed run
    pid = scripts.start([*TD, "--overwrite", "--seed", "1"], finished)
    wait_until(lambda: not (run / "task4_best_model.pt").exists())
    time.sleep(0.5)  # in the training of task 1, or just after it
    os.kill(pid, signal.SIGTERM)
    ended = scripts.wait()
    assert ended.status == 143 and "give the same command without --overwrite" in ended.err
    left = {path.name for path in run.rglob("*") if path.is_file()} - {path.name for path in mine}
    assert not any("task3" in name or "task4" in name for name in left)
    assert all(path.read_text() == "mine" for path in mine)
    check_error(scripts.run(TD, finished), "--seed 1 (now 0)")
    assert scripts.run([*TD, "--overwrite"], finished).status == 0
    for path in mine:
        path.unlink()
    assert_same_but_for("overwrite", finished, reference[0] / "TD")


def test_another_ticket_is_an_error_in_main_train(scripts, reference, tmp_path):
    for name in ("BU", "train"):
        shutil.copytree(reference[0] / name, tmp_path / name)
    argv = soak.COMMANDS["train"].split()
    other = [each.replace("mask-3", "mask-1") for each in argv]
    check_error(scripts.run(other, tmp_path / "train"), "--mask of content")
    shutil.copy(tmp_path / "BU/run/mask-3.pt", tmp_path / "same.pt")
    same = [each.replace("../BU/run/mask-3.pt", "../same.pt") for each in argv]
    assert scripts.run(same, tmp_path / "train").status == 0


# ------------------------------------------------------------------------------ two at once


CIL = f"{soak.COMMANDS['CIL']} --save_data_path run/data --save_dir cil".split()


def test_a_folder_in_use_is_an_error_and_a_killed_process_does_not_block_it(
    scripts, reference, tmp_path
):
    pid = scripts.start(TD, tmp_path)
    wait_until(lambda: (tmp_path / "run" / "task0_checkpoint_weight.pt").exists())
    for command, folder in ((TD, "--save_dir run"), (CIL, "--save_data_path run/data")):
        second = subprocess.run(
            [sys.executable, ROOT / command[0], *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr == (
            f"{command[0]}: {folder}: another process ({pid} on {socket.gethostname()}) is "
            f"working in it; wait for it, or name another folder\n"
        )
    os.kill(pid, signal.SIGKILL)
    scripts.wait()
    assert scripts.run(TD, tmp_path).status == 0
    assert soak.outcome(tmp_path / "run") == soak.outcome(reference[0] / "TD" / "run")


UNLOCKED = """
import fcntl, runpy, sys
def flock(*_):
    {}
fcntl.flock = flock
sys.path[0] = {!r}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("body", ["pass", "raise OSError(37, 'ENOLCK')"], ids=["idle", "missing"])
def test_without_locks_the_first_of_two_stops(reference, tmp_path, body):
    """As on a shared file system whose locks hold within a machine, or which has none."""
    code = UNLOCKED.format(body, str(ROOT))
    command = [sys.executable, "-c", code, ROOT / TD[0], *TD[1:]]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (tmp_path / "run" / "task0_checkpoint_weight.pt").exists())
    second = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    error = first.communicate()[1]
    assert first.returncode == 2
    assert error == (
        f"main_TD.py: --save_dir run: process {second.pid} on {socket.gethostname()} works in it "
        f"too, past the lock of this file system; this one stops, and the other one has what is "
        f"saved\n"
    )
    assert second.communicate()[1] == "" and second.returncode == 0
    assert soak.outcome(tmp_path / "run") == soak.outcome(reference[0] / "TD" / "run")
    assert not [*tmp_path.rglob(".owner")]


def test_a_second_process_that_has_left_is_noticed(tmp_path):
    """Not this process, which may name a folder twice, in other words."""
    path = locks.lock_folder(tmp_path, "save_dir")
    (tmp_path / "link").symlink_to(tmp_path)
    again = locks.lock_folder(tmp_path / "link", "save_data_path")
    locks.check(again, "save_data_path")
    locks.check(path, "save_dir")
    locks.owner_path(path).unlink()
    with pytest.raises(UserError, match="--save_dir .*: its .owner is gone, so that another"):
        locks.check(path, "save_dir")


# ------------------------------------------------------------------------------ the same bits


def test_a_loss_that_is_not_finite_ends_the_run_without_a_model(scripts, tmp_path):
    ended = scripts.run([*TD, "--lr", "1e30", "--checkpoint_seconds", "0"], tmp_path)
    check_error(ended, "task1, epoch 1", "learning rate of 1e+30", "--lr")
    paths = {path.name: path for path in tmp_path.rglob("*.pt")}
    assert paths.keys() <= {"task0_checkpoint_weight.pt", "task1_progress.pt"}
    for path in paths.values():
        content = load_checkpoint(path)
        tensors = content.get("state_dict", content).values()
        assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_with_a_terminal_and_another_print_freq_the_bits_are_the_same(reference, tmp_path):
    """In a process of its own, with progress bars on a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = []

    def read():
        with open(master, "rb", buffering=0) as terminal:
            try:
                while text := terminal.read(1000):
                    shown.append(text)
            except OSError:  # its other end is closed
                pass

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, ROOT / TD[0], *TD[1:], "--print_freq", "1"]
    ended = subprocess.run(command, cwd=tmp_path, stdout=slave, stderr=slave)
    os.close(slave)
    reader.join()
    assert ended.returncode == 0 and b"task3_prune1:" in b"".join(shown)  # a bar
    assert_same_but_for("print_freq", tmp_path, reference[0] / "TD")


def test_deterministic_gives_the_same_masks_and_queries(scripts, reference, tmp_path):
    """On a CPU it only changes how the k-th smallest is found."""
    assert scripts.run([*TD, "--deterministic"], tmp_path).status == 0
    found, expected = soak.outcome(tmp_path), soak.outcome(reference[0] / "TD")
    for name, content in expected.items():
        assert name.endswith(".json") or found[name] == content
