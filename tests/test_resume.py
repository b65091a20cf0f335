"""Runs that are killed, stopped, damaged, short of room or given twice, in processes of their own.

What must come out is what the undisturbed run leaves, byte for byte (soak.outcome).
"""

import fcntl
import io
import json
import os
import pty
import random
import re
import shutil
import signal
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
import run as run_module
import trainer
import utils
from run import Run

ROOT = Path(__file__).parent.parent
TD = soak.COMMANDS["TD"].split()


@pytest.fixture(scope="module")
def whole(scripts, tmp_path_factory):
    """A folder with the undisturbed run of each script, and the seconds that each took."""
    folder = tmp_path_factory.mktemp("whole")
    seconds = {
        name: soak.undisturbed(scripts, command, folder / name)
        for name, command in soak.COMMANDS.items()
    }
    return folder, seconds


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the finished run of main_TD; the folder to start it in."""
    shutil.copytree(whole[0] / "TD", tmp_path / "TD")
    return tmp_path / "TD"


def wait_until(true):
    limit = time.monotonic() + 60
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.001)


def in_task(folder, t):
    """Whether a run is at its training of task t."""
    return (folder / "run" / f"task{t}_progress.pt").exists()


def refused(ended, *words):
    """One clear line and status 2; returns the line."""
    assert ended.status == 2, ended
    (line,) = ended.err.splitlines()
    assert all(word in line for word in words), line
    return line


def assert_same_but_for(flag, folder, other):
    """The files of two runs are the same, a flag in their configurations aside."""
    found, wanted = soak.outcome(folder), soak.outcome(other)
    for each in (found, wanted):
        for name in ("run.json", "results.json"):
            each[name]["config"].pop(flag, None)
    assert found == wanted


# ------------------------------------------------------------------------------ killed


@pytest.mark.parametrize("name", soak.COMMANDS)
def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(scripts, whole, tmp_path, name):
    folder, seconds = whole
    if name == "train":  # it works on the files of BU
        os.symlink(folder / "BU", tmp_path / "BU")
    draw, longest = random.Random(name), 0.3 + seconds[name] / 2
    killed, _ = soak.kill_until_done(
        scripts, soak.COMMANDS[name], tmp_path / name, draw, longest, kills=4
    )
    assert killed  # else another seed is needed
    assert soak.outcome(tmp_path / name) == soak.outcome(folder / name)


def test_what_is_done_is_not_done_again_and_the_run_says_where_it_goes_on(scripts, whole, tmp_path):
    argv = [*TD, "--checkpoint_seconds", "0"]
    process = scripts.start(argv, tmp_path)
    wait_until(lambda: in_task(tmp_path, 3))
    os.kill(process, signal.SIGKILL)
    assert scripts.wait().status == -signal.SIGKILL
    files = [tmp_path / "run" / f"task{t}_{name}.pt" for t in (1, 2) for name in ("best_model",)]
    before = [path.stat().st_mtime_ns for path in files]
    ended = scripts.run(argv, tmp_path)
    assert [path.stat().st_mtime_ns for path in files] == before
    first, second = ended.out.splitlines()[:2]
    assert first == "run: goes on after task2_ticket"
    assert re.fullmatch("task3: goes on at epoch [12] of 2, after batch [0-9]+ of [0-9]+", second)
    assert "task1" not in ended.out and "task2:" not in ended.out
    assert soak.outcome(tmp_path) == soak.outcome(whole[0] / "TD")


def test_a_finished_run_is_left_as_it_is(scripts, finished):
    before = soak.outcome(finished)
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*.pt")}
    ended = scripts.run(TD, finished)
    assert ended.status == 0 and "goes on after result_test" in ended.out
    assert soak.outcome(finished) == before
    assert files == {path: path.stat().st_mtime_ns for path in finished.rglob("*.pt")}


# ------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stores_the_step_and_ends_the_run(scripts, whole, tmp_path, signum):
    process = scripts.start(TD, tmp_path)
    wait_until(lambda: (tmp_path / "run" / "task1_ticket.pt").exists())
    time.sleep(0.2)  # in the training of task 2
    began = time.monotonic()
    os.kill(process, signum)
    ended = scripts.wait()
    assert time.monotonic() - began < 5
    assert ended.status == 128 + signum
    (line,) = ended.err.splitlines()
    assert re.fullmatch(
        f"main_TD.py: stopped by {signum.name}(, task2 is stored at epoch . of 2, after batch "
        f"[0-9]+ of [0-9]+)?; give the same command again to go on",
        line,
    )
    assert in_task(tmp_path, 2) == ("stored" in line)
    assert scripts.run(TD, tmp_path).status == 0
    assert soak.outcome(tmp_path) == soak.outcome(whole[0] / "TD")


def left_at(args, data, folder, monkeypatch, stop):
    """A loop of task 2, stopped at the stop-th moment at which a signal counts (None: never).

    Then it is gone through again, in a run that finds what the first left. Two prunings with one
    optimizer come before it, as in main_TD. Returns the state and the momentum at the end.
    """
    args.save_dir, args.save_data_path = str(folder), str(folder / "data")
    args.epochs, args.decreasing_lr, args.iter_epochs, args.lr = 3, [1, 2], 2, 0.05
    generator = torch.Generator().manual_seed(6)
    task = trainer.make_task(data, 2, (data.pool[:12], *torch.randn(2, 12, 2, generator=generator)))
    moments = iter(range(10**6))

    def check_signals():
        if next(moments) == stop:
            raise utils.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(utils, "check_signals", check_signals)
    for _ in range(2):
        model = trainer.make_model(args, torch.device("cpu"))
        optimizer = trainer.make_optimizer(model, args, args.lr / 100)
        try:
            run = Run("test", args, data, torch.device("cpu"))
            for number in (1, 2):
                weights, masks = pruning_utils.weights(model), pruning_utils.masks_of(model)
                pruning_utils.apply_mask(model, pruning_utils.prune(weights, masks, 0.2))
                trainer.retrain(model, task, data, run, f"prune{number}", optimizer=optimizer)
            found = trainer.train_task(model, task, data, run, "task2")
        except utils.Interrupted:
            continue
        momentum = run.load("task2_checkpoint.pt")["optimizer"]["state"]
        return next(moments), model.state_dict(), found.best_state, momentum, found.best_epoch
    raise AssertionError("it did not go on")


def test_a_loop_stopped_at_any_moment_goes_on_to_the_same_bits(args, data, tmp_path, monkeypatch):
    moments, *wanted = left_at(args, data, tmp_path / "whole", monkeypatch, None)
    assert moments > 30
    for stop in range(0, moments - 1, 2):
        _, *found = left_at(args, data, tmp_path / str(stop), monkeypatch, stop)
        for state, other in zip(wanted[:2], found[:2]):
            assert state.keys() == other.keys()
            assert all(torch.equal(value, other[key]) for key, value in state.items()), stop
        for key, value in wanted[2].items():
            assert torch.equal(value["momentum_buffer"], found[2][key]["momentum_buffer"]), stop
        assert wanted[3] == found[3]


def test_signals_wait_for_what_belongs_together():
    def main():
        with pytest.raises(utils.Interrupted) as end, utils.hold_signals():
            for signum in (signal.SIGTERM, signal.SIGINT):
                with utils.hold_signals():
                    os.kill(os.getpid(), signum)
                time.sleep(0.01)  # not at the end of the inner one
            done.append("whole")
            utils.check_signals()
            done.append("not reached")
        return end.value.signum

    done = []
    before = signal.getsignal(signal.SIGTERM)
    assert utils.run(main) == signal.SIGINT and done == ["whole"]
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------ no room


@pytest.mark.parametrize(
    "size, name",
    [
        (300, "run.json"),
        (3_000, "task0_checkpoint_weight.pt"),
        (230_000, "task1_checkpoint.pt"),
        (450_000, "task2_checkpoint.pt"),
    ],
)
def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(scripts, whole, tmp_path, size, name):
    """A limit on the size of files stands in for it: `name` is the first that does not fit."""
    ended = scripts.run(TD, tmp_path, limit=size)
    refused(ended, f"run/{name}: cannot be written (File too large); make room")
    assert not (tmp_path / "run" / name).exists() and not soak.half_written(tmp_path)
    assert scripts.run(TD, tmp_path).status == 0
    assert soak.outcome(tmp_path) == soak.outcome(whole[0] / "TD")


# ------------------------------------------------------------------------------ damage


def flip(content):
    """One bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {"flipped": flip, "cut": lambda content: content[: len(content) // 2], "gone": None}
FILES = {
    "task0_checkpoint_weight.pt": "initialisation",
    "task1_best_model.pt": "task1",
    "task2_checkpoint.pt": "task2",
    "task3_ticket.pt": "task3_ticket",
    "task4_best_model.pt": "task4",
    "data/task2_img.npy": "task2_teaching",
    "data/task1_dis_label.npy": "task1_teaching",
    "data/task1_select_index.npy": "task1_teaching",
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_its_step_done_again(scripts, whole, finished, name, kind):
    path = finished / "run" / name
    content = path.read_bytes()
    path.unlink()
    if DAMAGES[kind]:
        path.write_bytes(DAMAGES[kind](content))
    ended = scripts.run(TD, finished)
    assert ended.status == 0, ended
    what = "is damaged" if DAMAGES[kind] else "is missing"
    assert f"run/{name}: {what}, so {FILES[name]} is done again\n" in ended.out
    assert soak.outcome(finished) == soak.outcome(whole[0] / "TD")


def something_else(content):
    file = io.BytesIO()
    torch.save({"epoch": 1}, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", [flip, lambda c: c[:-50], lambda c: b"", something_else])
def test_damaged_progress_is_named_and_the_step_begun_anew(scripts, whole, tmp_path, damage):
    process = scripts.start([*TD, "--checkpoint_seconds", "0"], tmp_path)
    wait_until(lambda: in_task(tmp_path, 2))
    os.kill(process, signal.SIGKILL)
    scripts.wait()
    path = tmp_path / "run" / "task2_progress.pt"
    path.write_bytes(damage(path.read_bytes()))
    ended = scripts.run(TD, tmp_path)
    assert re.search(r"run/task2_progress.pt: .*; task2 begins anew\n", ended.out)
    assert soak.outcome(tmp_path) == soak.outcome(whole[0] / "TD")


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

    def contents():  # but for the locks, which hold the id of the last process
        files = (path for path in finished.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.read_bytes() for path in files}

    before = contents()
    refused(scripts.run(TD, finished), "run/run.json", "damaged", "--overwrite")
    assert contents() == before


@pytest.mark.parametrize("name", ["results.json", "log_results.txt"])
def test_damaged_records_are_written_anew(scripts, whole, finished, name):
    (finished / "run" / name).write_text("{")
    assert scripts.run(TD, finished).status == 0
    assert soak.outcome(finished) == soak.outcome(whole[0] / "TD")


@pytest.mark.parametrize(
    "name, words",
    [
        ("current_mask.pt", ""),
        ("mask-1.pt", "run/mask-1.pt: is damaged, so task1_ticket is done again\n"),
        ("task2_prune_weight.pt", "so task2_ticket is done again\n"),
        ("task3_prun_checkpoint.pt", "so task3_prun is done again\n"),
    ],
)
def test_damaged_tickets_are_made_again(scripts, whole, tmp_path, name, words):
    """And current_mask.pt is that of the last task all the same."""
    shutil.copytree(whole[0] / "BU", tmp_path / "BU")
    path = tmp_path / "BU" / "run" / name
    path.write_bytes(flip(path.read_bytes()))
    ended = scripts.run(soak.COMMANDS["BU"].split(), tmp_path / "BU")
    assert ended.status == 0 and words in ended.out
    assert soak.outcome(tmp_path / "BU") == soak.outcome(whole[0] / "BU")


def test_a_step_that_comes_out_otherwise_is_an_error_where_others_were_built_on_it(
    scripts, finished
):
    """As on another machine: here the journal is made to remember another outcome."""
    path = finished / "run" / "run.json"
    journal = json.loads(path.read_text())
    journal.pop("checksum")
    journal["steps"]["task2"]["files"]["task2_best_model.pt"] = 64 * "0"
    path.write_text(json.dumps(journal | {"checksum": run_module.checksum_of(journal)}))
    for _ in range(2):
        ended = scripts.run(TD, finished)
        refused(ended, "--save_dir run: task2, done again, came out otherwise", "--overwrite")


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "flags, words",
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
    ],
)
def test_other_settings_are_listed_and_refused(scripts, finished, flags, words):
    before = soak.outcome(finished)
    line = refused(scripts.run([*TD, *flags.split()], finished), "--save_dir run", "--overwrite")
    assert all(word in line for word in words) and line.count("(now") == len(words)
    assert soak.outcome(finished) == before


def test_another_script_is_refused(scripts, finished):
    argv = f"main_CIL.py {soak.TINY}".split()
    refused(scripts.run(argv, finished), "--save_dir run", "main_TD.py")


def test_flags_that_change_no_result_may_differ(scripts, finished):
    moved = finished / "moved"
    (finished / "run").rename(moved)
    flags = "--save_dir moved --print_freq 3 --gpu 1 --device cpu --checkpoint_seconds 7"
    ended = scripts.run([*TD, *flags.split()], finished)
    assert ended.status == 0 and "goes on after result_test" in ended.out


def test_without_teaching_the_number_of_queried_images_may_differ(args, data, run):
    args.no_teaching, args.overwrite = True, True
    Run("test", args, data, torch.device("cpu"))
    args.unlabel_num, args.overwrite = 7, False
    Run("test", args, data, torch.device("cpu"))
    args.no_teaching = False
    with pytest.raises(utils.Refusal, match="with --no_teaching True .now False.; go"):
        Run("test", args, data, torch.device("cpu"))


def test_other_images_are_noticed(args, data, run):
    Run("test", args, data, torch.device("cpu"))
    data.train[3][0, 0, 0, 0] ^= 1
    with pytest.raises(utils.Refusal, match="--data of content"):
        Run("test", args, data, torch.device("cpu"))


def test_results_without_a_journal_are_not_written_over(scripts, finished):
    (finished / "run" / "run.json").unlink()
    before = soak.outcome(finished)
    refused(scripts.run(TD, finished), "--save_dir run", "run.json", "--overwrite")
    assert soak.outcome(finished) == before
    assert scripts.run([*TD, "--overwrite"], finished).status == 0


def test_progress_of_another_run_is_not_taken_up(scripts, whole, tmp_path):
    """Its journal is lost, its progress is not."""
    process = scripts.start([*TD, "--checkpoint_seconds", "0", "--seed", "1"], tmp_path)
    wait_until(lambda: in_task(tmp_path, 1))
    os.kill(process, signal.SIGKILL)
    scripts.wait()
    (tmp_path / "run" / "run.json").write_text("{")
    ended = scripts.run([*TD, "--overwrite"], tmp_path)
    assert "task1_progress.pt: is of another run; task1 begins anew" in ended.out
    assert_same_but_for("overwrite", tmp_path, whole[0] / "TD")


def test_overwrite_leaves_other_runs_alone(scripts, whole, tmp_path):
    for name in ("CIL", "TD"):
        shutil.copytree(whole[0] / name, tmp_path / name)
    before = soak.outcome(tmp_path / "CIL")
    other = f"main_TD.py {soak.COMMANDS['TD'].split(' ', 1)[1]} --overwrite"
    refused(scripts.run(other.split(), tmp_path / "CIL"), "a run of main_CIL.py")
    assert soak.outcome(tmp_path / "CIL") == before
    # the data folder of another run: what lies there is not this run's
    flags = ["--save_data_path", "../CIL/run/data", "--overwrite"]
    process = scripts.start([*TD, *flags], tmp_path / "TD")
    wait_until(lambda: not (tmp_path / "TD" / "run" / "task4_best_model.pt").exists())
    os.kill(process, signal.SIGKILL)
    scripts.wait()
    assert soak.outcome(tmp_path / "CIL") == before


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(scripts, whole, finished):
    run = finished / "run"
    mine = [run / "notes.txt", run / "task9_best_model.pt", run / "data" / "task9_img.npy"]
    for path in mine:
        path.write_text("mine")
    (run / ".task1_progress.pt.part").write_text("half")  # a killed one left it
    process = scripts.start([*TD, "--overwrite", "--seed", "1"], finished)
    wait_until(lambda: not (run / "task4_best_model.pt").exists())
    time.sleep(0.5)  # in the training of task 1, or just after it
    os.kill(process, signal.SIGTERM)
    assert scripts.wait().status == 143
    left = {path.name for path in run.rglob("*") if path.is_file()} - {path.name for path in mine}
    assert not any("task3" in name or "task4" in name for name in left)
    assert all(path.read_text() == "mine" for path in mine)
    refused(scripts.run(TD, finished), "--seed 1 (now 0)")
    assert scripts.run([*TD, "--overwrite"], finished).status == 0
    for path in mine:
        path.unlink()
    assert_same_but_for("overwrite", finished, whole[0] / "TD")


def test_main_train_notices_another_ticket(scripts, whole, tmp_path):
    for name in ("BU", "train"):
        shutil.copytree(whole[0] / name, tmp_path / name)
    argv = soak.COMMANDS["train"].split()
    other = [word.replace("mask-3", "mask-1") for word in argv]
    refused(scripts.run(other, tmp_path / "train"), "--mask of content")
    shutil.copy(tmp_path / "BU/run/mask-3.pt", tmp_path / "same.pt")
    same = [word.replace("../BU/run/mask-3.pt", "../same.pt") for word in argv]
    assert scripts.run(same, tmp_path / "train").status == 0


# ------------------------------------------------------------------------------ two at once


def test_two_runs_do_not_share_a_data_folder_at_once(scripts, tmp_path):
    process = scripts.start(TD, tmp_path)
    wait_until(lambda: (tmp_path / "run" / "task0_checkpoint_weight.pt").exists())
    command = [*soak.COMMANDS["CIL"].split(), "--save_data_path", "run/data", "--save_dir", "cil"]
    second = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, capture_output=True
    )
    assert second.returncode == 2
    assert b"--save_data_path run/data: process %d is at work in it" % process in second.stderr
    os.kill(process, signal.SIGKILL)
    scripts.wait()


def test_two_processes_on_one_folder(scripts, whole, tmp_path):
    process = scripts.start(TD, tmp_path)
    wait_until(lambda: (tmp_path / "run" / "task0_checkpoint_weight.pt").exists())
    second = subprocess.run(
        [sys.executable, ROOT / TD[0], *TD[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert second.returncode == 2 and second.stdout == ""
    assert second.stderr == (
        f"main_TD.py: --save_dir run: process {process} is at work in it; "
        f"wait for it, or name another folder\n"
    )
    os.kill(process, signal.SIGKILL)
    scripts.wait()
    assert scripts.run(TD, tmp_path).status == 0  # the lock of a killed one does not block
    assert soak.outcome(tmp_path) == soak.outcome(whole[0] / "TD")


# ------------------------------------------------------------------------------ the same bits


def test_a_loss_that_is_not_finite_ends_the_run_without_a_model(scripts, tmp_path):
    ended = scripts.run([*TD, "--lr", "1e30", "--checkpoint_seconds", "0"], tmp_path)
    refused(ended, "task1, epoch 1", "learning rate of 1e+30", "--lr")
    paths = {path.name: path for path in tmp_path.rglob("*.pt")}
    assert paths.keys() <= {"task0_checkpoint_weight.pt", "task1_progress.pt"}
    for path in paths.values():
        content = utils.load_checkpoint(path)
        tensors = content.get("state_dict", content).values()
        assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_with_a_terminal_and_another_print_freq_the_bits_are_the_same(whole, tmp_path):
    """A process started by itself, its progress bars on a terminal."""
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
    assert_same_but_for("print_freq", tmp_path, whole[0] / "TD")


def test_deterministic_gives_the_same_masks_and_queries(scripts, whole, tmp_path):
    """On a CPU, where it changes no more than how the k-th smallest is found."""
    assert scripts.run([*TD, "--deterministic"], tmp_path).status == 0
    found, wanted = soak.outcome(tmp_path), soak.outcome(whole[0] / "TD")
    for name, content in wanted.items():
        assert name.endswith(".json") or found[name] == content
