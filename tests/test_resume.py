"""Runs that are killed, stopped, damaged, short of disk space or given twice, in real processes.

Each must end with the files of the uninterrupted run (outcome()).
"""

import json
import shutil
import signal

import processes
import pytest
import torch

from runtime.run import lock

FLAGS = f"{processes.TINY} --data {{data}} --save_dir run --lr 0.05 --epochs 3 --decreasing_lr 1,2 "
TEACHING = f"{FLAGS} --unlabel_num 2 "
COMMANDS = {
    "CIL": f"main_CIL.py {TEACHING}",
    "TD": f"main_TD.py {TEACHING} --iter_epochs 2 --prune_scheduler 1,3 --rewind rand",
    "BU": f"main_BU.py {TEACHING} --iter_epochs 1 --max_iter_prun 2 --base_sparsity 40 "
    "--deacc 200 --accept_decay -100 --criterion random",
    # retrains a ticket in the folder of BU
    "train": f"main_train.py {FLAGS} --weight run/task1_best_model.pt --mask run/mask-2.pt",
}
# Where a run is killed: in the n-th call of a function, one after the other.
KILLS = {
    "in the first epoch": ("torch.optim.SGD.step", 2),
    "in an epoch after one that was saved": ("torch.optim.SGD.step", 4),
    "after an epoch was saved": ("trainer.set_learning_rate", 2),
    "as a trained task is stored": ("runtime.run.Run.finish", 1),
    "in the query": ("teaching.query", 1),
    "as soft labels are written": ("numpy.save", 3),
    "before a written file is renamed": ("os.replace", 9),
    "after a task": ("runtime.run.Run.add", 1),
    "as a ticket is made": ("runtime.run.Run.discard", 1),
    "in the second task": ("torch.optim.SGD.step", 9),
    "as the records are written": ("runtime.run.Run.close", 1),
}
SKIPPED = {"CIL": {"as a ticket is made"}, "TD": {}, "BU": {}}
SKIPPED["train"] = {*KILLS} - {*[*KILLS][:4], "as the records are written"}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """COMMANDS, as lists, on a small dataset."""
    data = tmp_path_factory.mktemp("published") / "set"
    processes.write_published(data)
    return {name: text.format(data=data).split() for name, text in COMMANDS.items()}


@pytest.fixture(scope="module")
def reference(scripts, commands, tmp_path_factory):
    """A folder with the uninterrupted run of each script."""
    folder = tmp_path_factory.mktemp("reference")
    for name, argv in commands.items():
        if name == "train":
            shutil.copytree(folder / "BU", folder / name)
        (folder / name).mkdir(exist_ok=True)
        ended = scripts.run(argv, folder / name)
        assert (ended.status, ended.err) == (0, ""), ended
    return folder


@pytest.fixture
def finished(reference, tmp_path):
    """A copy of the finished run of main_CIL: the folder in which it was started."""
    return shutil.copytree(reference / "CIL", tmp_path / "CIL")


def without_times(value):
    if isinstance(value, dict):
        times = "seconds", "images_per_second", "command", "wrote", "files"
        return {key: without_times(item) for key, item in value.items() if key not in times}
    return [*map(without_times, value)] if isinstance(value, list) else value


def plain(content):
    """The content of a checkpoint, to be compared: its pickle may repeat a text, or refer to it."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    return content.numpy().tobytes() if isinstance(content, torch.Tensor) else content


def outcome(folder):
    """{file: what must be equal}: contents, and those of records without the times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            found[path.name] = without_times(json.loads(path.read_text()))
        elif path.name.endswith("log_results.txt"):
            found[path.name] = [line.rsplit("\t", 1)[0] for line in path.read_text().splitlines()]
        elif path.name.endswith("metrics.csv"):  # the last two columns are times
            found[path.name] = [line.rsplit(",", 2)[0] for line in path.read_text().splitlines()]
        elif path.suffix == ".pt":
            found[path.name] = plain(torch.load(path, weights_only=True))
        elif path.is_file() and not path.name.endswith("lock"):
            found[path.name] = path.read_bytes()
    return found


# ------------------------------------------------------------------------------ killed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_again_and_again_ends_as_the_uninterrupted_one(
    scripts, commands, reference, tmp_path, name
):
    folder = tmp_path / name
    if name == "train":
        shutil.copytree(reference / "BU", folder)
    folder.mkdir(exist_ok=True)
    for moment, (function, number) in KILLS.items():
        if moment not in SKIPPED[name]:
            stop = function, number, "SIGKILL"
            ended = scripts.run(commands[name], folder, stop=stop, save_seconds=0)
            assert ended.status == -signal.SIGKILL, (moment, ended)
    ended = scripts.run(commands[name], folder)
    assert ended.status == 0 and "resumes after" in ended.out
    assert outcome(folder) == outcome(reference / name)


# ------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGXCPU"])
def test_a_signal_ends_a_run_with_its_status_and_one_line(
    scripts, commands, reference, tmp_path, name
):
    stop = "torch.optim.SGD.step", 4, name
    ended = scripts.run(commands["CIL"], tmp_path, stop=stop, save_seconds=0)
    assert ended.status == 128 + signal.Signals[name]
    assert ended.err == f"main_CIL.py: stopped by {name}; give the same command to go on\n"
    if name == "SIGTERM":
        assert '"finished"' not in (tmp_path / "run/run.json").read_text()
        ended = scripts.run(commands["CIL"], tmp_path)
        assert "task1: resumes after epoch 1\n" in ended.out
        assert outcome(tmp_path) == outcome(reference / "CIL")


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_an_ignored_signal_stays_ignored(scripts, commands, tmp_path, name):
    """As in a command that a script starts with &, or under nohup."""
    argv = [*commands["CIL"], "--epochs", "1", "--no_teaching"]
    ended = scripts.run(argv, tmp_path, stop=("torch.optim.SGD.step", 2, name), ignored=name)
    assert (ended.status, ended.err) == (0, "")


# ------------------------------------------------------------------------------ a full disk


def test_a_full_disk_ends_the_run_and_with_room_it_resumes(scripts, commands, reference, tmp_path):
    """A limit on the size of files stands in for it."""
    ended = scripts.run(commands["CIL"], tmp_path, limit=230_000)
    ended.check_error("run/task1_checkpoint.pt: cannot be written (File too large)")
    assert not [*tmp_path.rglob("*.part")]
    assert scripts.run(commands["CIL"], tmp_path).status == 0
    assert outcome(tmp_path) == outcome(reference / "CIL")


@pytest.mark.parametrize(
    ("out", "err", "status"),
    [("/dev/full", None, 2), ("", None, 0), (None, "", 0), (None, "/dev/full", 0)],
)
def test_output_that_goes_nowhere(scripts, commands, tmp_path, out, err, status):
    """A full disk under stdout is an error; closed streams and a full stderr are none."""
    streams = {key: value for key, value in (("out", out), ("err", err)) if value is not None}
    argv = [*commands["CIL"], "--epochs", "1", "--no_teaching"]
    ended = scripts.run(argv, tmp_path, **streams)
    assert ended.status == status, ended
    if status:
        ended.check_error("No space left on device", "give the same command")


# ------------------------------------------------------------------------------ other settings


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ("--seed 1", ["--seed 0 (now 1)"]),
        ("--lr 0.1 --epochs 2", ["--epochs 3 (now 2)", "--lr 0.05 (now 0.1)"]),
        ("--decreasing_lr 60,80", ["--decreasing_lr [1, 2] (now [60, 80])"]),
        ("--classes_per_classifier 1", ["--classes_per_classifier 2 (now 1)"]),
        ("--class_order sorted", ["--class_order"]),
        ("--no_teaching", ["--no_teaching False (now True)"]),
        ("--precision bf16 --arch resnet32", ["--arch resnet18 (now resnet32)", "--precision"]),
        ("--save_data_path other", ["--save_data_path"]),
    ],
)
def test_other_settings_are_named_and_nothing_is_touched(
    scripts, commands, finished, flags, fragments
):
    before = processes.tree(finished / "run")
    ended = scripts.run([*commands["CIL"], *flags.split()], finished)
    ended.check_error("--save_dir run", "--overwrite", *fragments)
    assert processes.tree(finished / "run") == before


def test_other_images_are_named(scripts, commands, finished, tmp_path):
    data = shutil.copytree(commands["CIL"][commands["CIL"].index("--data") + 1], tmp_path / "set")
    argv = [*commands["CIL"], "--data", data]
    assert scripts.run(argv, finished).status == 0  # the same images elsewhere
    path = data / "cifar10_train.pkl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x40", b"\x41"))
    scripts.run(argv, finished).check_error("--data")


def test_flags_that_change_no_result_may_differ_and_the_folder_may_move(
    scripts, commands, finished
):
    moved = (finished / "run").rename(finished / "moved")
    before = [path.stat().st_mtime_ns for path in moved.glob("*.pt")]
    flags = "--save_dir moved --print_freq 3 --gpu 0"
    ended = scripts.run([*commands["CIL"], *flags.split()], finished)
    assert ended.status == 0 and ", resumes after task2_evaluated_on_test" in ended.out
    assert [path.stat().st_mtime_ns for path in moved.glob("*.pt")] == before


def test_another_ticket_is_named_in_main_train(scripts, commands, reference, tmp_path):
    folder = shutil.copytree(reference / "train", tmp_path / "train")
    other = [each.replace("mask-2", "mask-1") for each in commands["train"]]
    scripts.run(other, folder).check_error("another content of --mask")
    shutil.copy(folder / "run/mask-2.pt", folder / "same.pt")
    same = [each.replace("run/mask-2", "same") for each in commands["train"]]
    assert scripts.run(same, folder).status == 0
    content = torch.load(folder / "run/mask-2.pt", weights_only=True)
    content["args"]["class_order"] = content["args"]["class_order"][::-1]
    torch.save(content, folder / "same.pt")
    scripts.run(same, folder).check_error("--mask same.pt", "class_order")


def test_a_folder_of_another_run_is_left_alone(scripts, commands, finished):
    run = finished / "run"
    for flags in ([], ["--overwrite"]):
        scripts.run([*commands["TD"], *flags], finished).check_error("a run of main_CIL.py")
    (run / "run.json").unlink()  # a record that nothing says how to resume
    before = processes.tree(finished)
    scripts.run(commands["CIL"], finished).check_error("run/results.json: belongs to another run")
    assert processes.tree(finished) == before
    assert scripts.run([*commands["CIL"], "--overwrite"], finished).status == 0


def test_progress_of_another_run_or_a_damaged_one_is_not_resumed(scripts, commands, tmp_path):
    stop = "torch.optim.SGD.step", 4, "SIGKILL"
    scripts.run(commands["CIL"], tmp_path, stop=stop, save_seconds=0)
    progress = tmp_path / "run/task1_progress.pt"
    progress.write_bytes(progress.read_bytes()[:99])
    ended = scripts.run(commands["CIL"], tmp_path, stop=stop, save_seconds=0)
    assert ended.status == -signal.SIGKILL and "task1 starts over" in ended.out
    (tmp_path / "run/run.json").write_text("{")
    argv = [*commands["CIL"], "--lr", "0.02", "--overwrite"]
    ended = scripts.run(argv, tmp_path, stop=("trainer.train_epoch", 1, "SIGTERM"))
    assert ended.status == 143 and progress.exists() and "resumes after epoch" not in ended.out


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["task0_checkpoint_weight.pt", "data/task1_img.npy"])
def test_a_changed_file_of_a_finished_stage_is_named(scripts, commands, finished, name, damage):
    path = finished / "run" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // (2 if damage == "cut" else 1)])
    if damage == "remove":
        path.unlink()
    ended = scripts.run(commands["CIL"], finished)
    ended.check_error(f"run/{name}: is missing or was changed", "--overwrite")


# ------------------------------------------------------------------------------ two runs


@pytest.mark.parametrize("flags", ["", "--save_dir another --save_data_path run/data"])
def test_a_folder_in_use_is_refused(scripts, commands, tmp_path, flags):
    held = [lock(tmp_path / name, ".lock") for name in ("run", "run/data")]
    ended = scripts.run([*commands["CIL"], *flags.split()], tmp_path)
    ended.check_error("another process is working in it", "choose another folder")
    for each in held:
        each.release()


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(
    scripts, commands, reference, finished
):
    run = finished / "run"
    mine = [run / "notes.txt", run / "task9_best_model.pt", run / "data" / "other.npy"]
    for path in mine:
        path.write_text("mine")
    argv = [*commands["CIL"], "--overwrite"]
    ended = scripts.run(argv, finished, stop=("trainer.train_epoch", 1, "SIGTERM"))
    assert ended.status == 143 and "give the same command without --overwrite" in ended.err
    left = {path.name for path in run.rglob("*.*") if not path.name.endswith("lock")}
    ours = {"run.json", "task0_checkpoint_weight.pt"}
    assert left == ours | {path.name for path in mine}
    assert all(path.read_text() == "mine" for path in mine)
    assert scripts.run(argv, finished).status == 0
    for path in mine:
        path.unlink()
    found, expected = outcome(finished), outcome(reference / "CIL")
    del found["results.json"]["config"]["overwrite"]
    del expected["results.json"]["config"]["overwrite"]
    assert found == expected


@pytest.mark.parametrize("flags", ["", "--overwrite", "--save_dir new"])
def test_soft_labels_of_another_run_are_not_replaced(
    scripts, commands, reference, finished, tmp_path, flags
):
    other = shutil.copytree(reference / "TD", tmp_path / "TD")
    before = processes.tree(finished), processes.tree(other)
    argv = [*commands["CIL"], "--save_data_path", "../TD/run/data", *flags.split()]
    scripts.run(argv, finished).check_error("task1_img.npy" if "new" in flags else "")
    shutil.rmtree(finished / "new", ignore_errors=True)
    assert (processes.tree(finished), processes.tree(other)) == before


def test_a_loss_that_is_not_finite_ends_the_run_without_a_model(scripts, commands, tmp_path):
    ended = scripts.run([*commands["CIL"], "--lr", "1e30"], tmp_path, save_seconds=0)
    ended.check_error("--lr 1e+30", "task1, epoch 1")
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["task0_checkpoint_weight.pt"]
