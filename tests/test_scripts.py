"""The five scripts end to end on a handful of digits, and the decisions that each of them makes."""

import contextlib
import functools
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import reference
import torch

import dataset
import main_BU
import main_CIL
import main_TD
import main_train
import pruning_utils
import teaching
import test as test_script
import trainer
import utils
from models import BACKBONES, build_model
from models.base import dense_state
from runtime.checkpoint import load_checkpoint, read_weights
from runtime.errors import UserError
from runtime.records import read_epochs
from runtime.run import Run

FLAGS = "--dataset digits --classifiers 3 --width 2 --epochs 2 --batch_size 96"
TINY = FLAGS.split()
QUERY = ["--unlabel_num", "2"]
SHORT = [*TINY, *QUERY, "--iter_epochs", "1"]
pytestmark = pytest.mark.usefixtures("few_digits", "on_device")


def results(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def state(path):
    return read_weights(path)[1]


def masks_of(path):
    return pruning_utils.extract_mask(state(path))


def same(a, b):
    """Whether two dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key].cpu(), b[key].cpu()) for key in a)


def is_within(inner, outer):
    """Whether every weight that remains in one dict of masks remains in another too."""
    return all(bool((inner[name] <= outer[name]).all()) for name in inner)


def about(*densities):
    """Of a narrow network, whose counts are rounded."""
    return pytest.approx(densities, abs=0.1)


@pytest.fixture
def on_device(device, monkeypatch):
    """The scripts find this device, and no other."""
    monkeypatch.setattr(trainer, "pick_device", lambda args: device)
    monkeypatch.setattr("runtime.args.pick_device", lambda args: device)


@pytest.fixture
def seen(monkeypatch):
    """Of each training: the state dict that it started from and its task. Of derive_seed(): what
    the draws of training and pruning derive from. Validation accuracies fall, so that the best
    epoch is the first, not the last.
    """
    seen = SimpleNamespace(starts=[], tasks=[], draws=set())
    train_task, derive_seed, falling = trainer.train_task, utils.derive_seed, iter(range(99, 0, -1))

    def recorded(model, task, *rest):
        seen.starts.append(pruning_utils.clone_state(model))
        seen.tasks.append(task)
        return train_task(model, task, *rest)

    def derived(seed, *purpose):
        seen.draws.add(purpose[:3])  # without the number of the pass
        return derive_seed(seed, *purpose)

    monkeypatch.setattr(trainer, "train_task", recorded)
    monkeypatch.setattr(trainer, "validate", lambda *_: next(falling))
    monkeypatch.setattr(utils, "derive_seed", derived)
    return seen


def training(stream, t, epochs=2):
    """What the draws of a training stage of task t derive from, besides the seed."""
    kinds = ("random",) if t == 1 else ("random", "new", "old", "unlabeled")
    return {(stream, epoch, kind) for epoch in range(1, epochs + 1) for kind in kinds}


def plain_accuracies(path, data, t):
    """Test accuracies of tasks 1..t by the model in a checkpoint, image by image."""
    known, tensors = read_weights(path)
    model = build_model(SimpleNamespace(**known, precision="fp32")).to(data.pool.device)
    pruning_utils.load_state(model, tensors)
    accuracies = []
    for first in range(0, 2 * t, 2):
        images = [data.test[c] for c in data.order[first : first + 2]]
        labels = [label for label, x in enumerate(images, first) for _ in x]
        mean, std = (each.flatten().tolist() for each in (data.mean, data.std))
        x = reference.normalize(torch.cat(images).cpu(), mean, std).to(data.pool.device)
        accuracies.append(reference.accuracy(model, x.float(), labels, t))
    return accuracies


# ------------------------------------------------------------------------------ main_CIL


@pytest.mark.parametrize(
    "flags, split, old",
    [("--no_teaching", "exemplars", 16), ("--joint", "train", 48), ("--finetune", "train", 0)],
)
def test_CIL_keeps_the_exemplars_all_old_images_or_none(tmp_path, seen, flags, split, old):
    """Task 3 has four old classes, each with 12 training images, of which 4 are exemplars."""
    run = main_CIL.main([*TINY, "--epochs", "1", flags, "--save_dir", str(tmp_path)])
    task, data = seen.tasks[2], seen.tasks[2].data
    new, kept = data.select_tasks(data.train, 3, 3), data.select_tasks(getattr(data, split), 1, 2)
    for found, *wanted in zip(task.random, new, kept):
        assert torch.equal(found[: task.new], wanted[0])
        assert torch.equal(found[task.new :], wanted[1][:old])
    assert task.unlabeled is None and not (tmp_path / "data").exists()
    best = tmp_path / "task3_best_model.pt"
    assert run["states"][2]["accuracy"] == plain_accuracies(best, data, 3)


@pytest.mark.device
def test_CIL_trains_all_tasks_and_writes_its_records(tmp_path, seen, device, capsys):
    command = [*TINY, *QUERY, "--save_dir", str(tmp_path)]
    run = main_CIL.main(command)
    assert capsys.readouterr().err == ""  # no progress bar without a terminal
    stored, data = results(tmp_path), seen.tasks[0].data
    assert stored == json.loads(json.dumps(run)) and results(tmp_path, "run.json")["finished"]
    assert stored["config"]["data"] == "embedded"  # no path of this machine
    rows = stored["states"]
    for t, row in enumerate(rows, 1):
        best, last = tmp_path / f"task{t}_best_model.pt", tmp_path / f"task{t}_checkpoint.pt"
        assert row["accuracy"] == plain_accuracies(best, data, t)
        assert (row["state"], row["density"]) == (t, 100)
        assert not same(state(best), state(last))
        assert t == 3 or same(seen.starts[t], state(best))  # the next task starts from it
        assert (tmp_path / "data" / f"task{t}_img.npy").exists() == (t < 3)
    assert len(seen.tasks[2].unlabeled[0]) == 32
    wanted = {("initialisation",), ("task1", 0, "teaching"), ("task2", 0, "teaching")}
    assert seen.draws == wanted.union(*(training(f"task{t}", t) for t in (1, 2, 3)))
    matrix = [row["accuracy"] for row in rows]
    means = [sum(row) / len(row) for row in matrix]
    assert [row["mean"] for row in rows] == pytest.approx(means)
    assert stored["average_incremental_accuracy"] == pytest.approx(sum(means) / 3)
    lost = [max(matrix[0][0], matrix[1][0]) - matrix[2][0], matrix[1][1] - matrix[2][1]]
    assert stored["forgetting"] == pytest.approx(sum(lost) / 2)
    gained = [matrix[2][0] - matrix[0][0], matrix[2][1] - matrix[1][1]]
    assert stored["backward_transfer"] == pytest.approx(sum(gained) / 2)
    assert stored["config"]["epochs"] == 2 and stored["device"].startswith(str(device))
    log = (tmp_path / "log_results.txt").read_text().splitlines()
    assert log[0].split("\t")[:5] == ["state", "task1", "task2", "task3", "mean"]
    assert log[3].split("\t")[3] == f"{matrix[2][2]:.2f}"
    epochs = read_epochs(tmp_path / "metrics.csv")
    assert [(row["stage"], row["epoch"]) for row in epochs] == [
        (f"task{t}", epoch) for t in (1, 2, 3) for epoch in (1, 2)
    ]
    last, a, b = epochs[5], 8 / 24, 16 / 24  # a quarter of the batch size is 24; three tasks
    balanced = a * last["new"] + b * last["old"] + last["distillation_main"]
    wanted = last["random"] + last["distillation"] + balanced / 2
    assert last["loss"] == pytest.approx(wanted, rel=1e-5)
    best = max(row["accuracy"] for row in epochs[4:])
    assert rows[2]["training"]["best_val"] == best
    assert load_checkpoint(tmp_path / "task3_checkpoint.pt")["best_prec1"] == best
    confusion = [line.split(",") for line in (tmp_path / "confusion.csv").read_text().splitlines()]
    assert [row[0] for row in confusion[1:]] == confusion[0][1:] == [str(c) for c in data.order]
    right = [int(row[i + 1]) for i, row in enumerate(confusion[1:])]
    assert matrix[2] == [100 * sum(right[i : i + 2]) / 16 for i in (0, 2, 4)]
    assert main_CIL.main(command)["states"] == rows and len(seen.starts) == 6  # it resumes


# ------------------------------------------------------------------------------ main_TD


@pytest.mark.device
def test_TD_follows_the_curriculum(tmp_path, monkeypatch, seen):
    called = {"retrain": [], "teach": [], "prune_task": []}
    for module, name in ((trainer, "retrain"), (teaching, "teach"), (main_TD, "prune_task")):

        def recorded(real, calls, model, *rest, **more):
            calls.append((pruning_utils.clone_state(model), *rest, more))
            return real(model, *rest, **more)

        real = getattr(module, name)
        monkeypatch.setattr(module, name, functools.partial(recorded, real, called[name]))
    matrices, close = [], Run.close
    monkeypatch.setattr(Run, "close", lambda run, rows: matrices.append(rows) or close(run, rows))
    run = main_TD.main([*SHORT, "--prune_scheduler", "1,0,3", "--save_dir", str(tmp_path)])
    rows, data = run["states"], seen.tasks[0].data
    assert [row["state"] for row in rows] == [1, 2, 3, 4]
    # each task is tested before its own prunings
    assert [row["density"] for row in rows] == about(100, 80, 80, 40.96)
    assert [row["ticket_density"] for row in rows[:3]] == about(80, 80, 40.96)
    for t, row in enumerate(rows, 1):
        best, last = (state(tmp_path / f"task{t}_{n}.pt") for n in ("best_model", "checkpoint"))
        path = tmp_path / f"task{t}_best_model.pt"
        assert row["accuracy"] == plain_accuracies(path, data, min(t, 3))
        assert row["density"] == pruning_utils.density(masks_of(path))
        assert t > 2 or same(called["teach"][t - 1][0], best)
        assert t > 3 or same(called["prune_task"][t - 1][0], last)
        assert not same(best, last)
    # s_t - 1 retrainings, one optimizer for the task, at a hundredth of --lr
    assert [given[3] for given in called["retrain"]] == ["task3_prune1", "task3_prune2"]
    first, second = (given[-1]["optimizer"] for given in called["retrain"])
    assert first is second and first.param_groups[0]["lr"] == pytest.approx(0.01 / 100)
    # rewound to the initialization, convolutions only, also where nothing was pruned
    initial = state(tmp_path / "task0_checkpoint_weight.pt")
    for t, start in enumerate(seen.starts[1:], 1):
        last = state(tmp_path / f"task{t}_checkpoint.pt")
        for key, value in dense_state(start).items():
            if initial[key].ndim == 4:
                assert torch.equal(value.cpu(), initial[key].cpu()), key
            elif t < 3:  # no retraining in between
                assert torch.equal(value.cpu(), last[key].cpu()), key
    masks = [masks_of(tmp_path / f"task{t}_best_model.pt") for t in (2, 3, 4)]
    assert is_within(masks[1], masks[0]) and is_within(masks[2], masks[1])
    # the summary takes the result for task T's row, even where both are equal
    pairs = zip(matrices[0], (0, 1, 3), strict=True)
    assert all(accuracies is rows[i]["accuracy"] for accuracies, i in pairs)
    stages = [(f"task{t}", min(t, 3), 2) for t in (1, 2, 3, 4)]
    stages += [("task3_prune1", 3, 1), ("task3_prune2", 3, 1)]
    wanted = {draw for stream, t, epochs in stages for draw in training(stream, t, epochs=epochs)}
    wanted |= {("initialisation",), ("task1", 0, "teaching"), ("task2", 0, "teaching")}
    wanted |= {(f"task{t}_prune{n}", "scores") for t, n in ((1, 1), (3, 1), (3, 2), (3, 3))}
    assert seen.draws == wanted
    # the initialization is a checkpoint that test.py reads, without further flags
    tested = test_script.main(["--pretrained", str(tmp_path / "task0_checkpoint_weight.pt")])
    assert len(tested["states"][0]["accuracy"]) == 3


def test_TD_with_resnet32_random_scores_and_bf16(tmp_path, seen, monkeypatch):
    """The backbone computes in bf16; weights, statistics and momentum stay float32."""
    body, dtypes = BACKBONES["resnet32"].body, set()

    def recorded(model, images):
        features = body(model, images)
        dtypes.add(features.dtype)
        return features

    monkeypatch.setattr(BACKBONES["resnet32"], "body", recorded)
    flags = "--arch resnet32 --precision bf16 --criterion random --rewind rand --classifiers 2"
    flags = [*flags.split(), "--epochs", "1", "--iter_epochs", "0", "--prune_scheduler", "2,1"]
    run = main_TD.main([*TINY, *QUERY, *flags, "--save_dir", str(tmp_path)])
    assert [row["density"] for row in run["states"]] == about(100, 64, 51.2)
    assert {("task1_prune2", "scores"), ("task1", 0, "rewind")} < seen.draws
    assert torch.bfloat16 in dtypes
    saved = load_checkpoint(tmp_path / "task3_best_model.pt")
    momentum = [each["momentum_buffer"] for each in saved["optimizer"]["state"].values()]
    for tensor in (*saved["state_dict"].values(), *momentum):
        assert tensor.dtype == (torch.float32 if tensor.ndim else torch.int64)


@pytest.mark.parametrize(
    "schedule, percent, left",
    [("0,9", "0.5", True), ("9,0", "0.9", False), ("1,3", "0.99", False), ("0,200", "0.2", True)],
)
def test_TD_refuses_a_schedule_that_leaves_no_weight(schedule, percent, left):
    flags = ["--classifiers", "2", "--prune_scheduler", schedule, "--percent", percent]
    message = "--prune_scheduler: .* no weight is left after task"
    with contextlib.nullcontext() if left else pytest.raises(UserError, match=message):
        main_TD.parse([*TINY, *flags])


# ------------------------------------------------------------------------------ main_BU


@pytest.mark.device
@pytest.mark.parametrize("accept", ["-1000", "1000"])
def test_BU_regrows_or_keeps_its_mask(tmp_path, seen, accept, monkeypatch):
    """--accept_decay -1000 makes every task re-grow, 1000 none."""
    tested, measure = [], trainer.evaluate

    def evaluate(model, *rest):
        tested.append(pruning_utils.clone_state(model))
        return measure(model, *rest)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    flags = ["--accept_decay", accept, "--base_sparsity", "40", "--max_iter_prun", "3"]
    flags += ["--deacc", "-1000"]  # the third round of task 1 is one too many
    run = main_BU.main([*SHORT, *flags, "--save_dir", str(tmp_path)])
    rows, regrown, data = run["states"], accept == "-1000", seen.tasks[0].data
    assert [row["state"] for row in rows] == [1, 2, 3]
    assert [row.get("regrown") for row in rows] == [None, regrown, regrown]
    assert len(seen.starts) == 5
    files = ["task1_best_model", "task1_prune_weight"]
    files += [f"task{t}_best_{name}model" for t in (2, 3) for name in ("", "prun_")]
    for model, name in zip(tested, files, strict=True):
        assert same(model, state(tmp_path / f"{name}.pt")), name
    assert rows[0]["accuracy"] == plain_accuracies(tmp_path / "task1_prune_weight.pt", data, 1)
    assert rows[0]["dense_accuracy"] == plain_accuracies(tmp_path / "task1_best_model.pt", data, 1)
    for t in (2, 3):
        # dense, and again under the mask, both from the dense best model of the task before
        previous = state(tmp_path / f"task{t - 1}_best_model.pt")
        assert same(seen.starts[2 * t - 3], previous)
        assert same(dense_state(seen.starts[2 * t - 2]), previous)
        mask, grown = (masks_of(tmp_path / f"mask-{n}.pt") for n in (t - 1, t))
        best, masked = (tmp_path / f"task{t}_best{name}model.pt" for name in ("_", "_prun_"))
        assert same(masks_of(masked), mask) and not masks_of(best)
        assert rows[t - 1]["accuracy"] == plain_accuracies(masked, data, t)
        assert rows[t - 1]["dense_accuracy"] == plain_accuracies(best, data, t)
        density = pruning_utils.density(mask)
        assert rows[t - 1]["density"] == rows[t - 2]["ticket_density"] == density
        assert is_within(mask, grown)
        assert (pruning_utils.density(grown) > density) == regrown
        assert (tmp_path / f"task{t}_prune_weight.pt").exists() == regrown
    content = state(tmp_path / "current_mask.pt")
    assert same(content, state(tmp_path / "mask-3.pt"))
    assert {*torch.cat([m.flatten() for m in content.values()]).tolist()} == {0.0, 1.0}
    assert same(masks_of(tmp_path / "task1_prune_weight.pt"), masks_of(tmp_path / "mask-1.pt"))
    tasks = range(1, 4) if regrown else [1]
    rounds = [(t, n) for t in tasks for n in range(1, len(rows[t - 1]["rounds"]) + 1)]
    pruned = {name[0] for name in seen.draws if name[1:] == ("scores",)}
    assert {f"task{t}_round{n}" for t, n in rounds} <= pruned
    stages = [("task1", 1, 2), *((f"task{t}{x}", t, 2) for t in (2, 3) for x in ("", "_prun"))]
    stages += [(f"task{t}_round{n}", t, 1) for t, n in rounds]
    wanted = {draw for stream, t, epochs in stages for draw in training(stream, t, epochs=epochs)}
    wanted |= {("initialisation",), ("task1", 0, "teaching"), ("task2", 0, "teaching")}
    assert seen.draws == wanted | {(name, "scores") for name in pruned}


# ------------------------------------------------------------------------------ main_train, test


@pytest.mark.device
def test_a_ticket_is_retrained_and_tested(tmp_path, seen, capsys, monkeypatch):
    """The task-rewound ticket: the mask of task 2 on the dense weights of task 1. Every later
    command takes network, dataset, tasks and class order from the checkpoints.
    """
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    measure, on_val = trainer.evaluate, itertools.count(60)

    def evaluate(model, split, t, data, batch_size):  # no two accuracies on val are alike
        found = measure(model, split, t, data, batch_size)
        n = next(on_val) if split is data.val else None
        return found | {"accuracy": [n + 0.5] * t, "overall": n} if n else found

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    flags = "--max_iter_prun 1 --accept_decay -100 --class_order random:5 --classifiers 2"
    flags += " --select_on val"
    rows = main_BU.main([*SHORT, *flags.split(), "--save_dir", str(run)])["states"]
    # tickets are chosen on the images that --select_on names
    stages, printed = results(run, "run.json")["stages"], capsys.readouterr().out
    dense, masked = (stages[f"task2_{n}_evaluated_on_val"]["result"] for n in ("dense", "prun"))
    cost = sum(dense["accuracy"]) / 2 - sum(masked["accuracy"]) / 2
    assert f"the mask costs {cost:.2f} points, so it re-grows" in printed
    assert printed.count("%, after 1 of at most 1 rounds") == 2  # which limit ended the searches
    first = stages["task1_dense_evaluated_on_val"]["result"]
    for row, found in zip(rows, (first, dense)):
        (round_,) = row["rounds"]
        assert round_["decay"] == pytest.approx(found["overall"] - round_["accuracy"])
    weight, mask, records = run / "task1_best_model.pt", run / "mask-2.pt", run / "results.json"
    data, before = seen.tasks[0].data, records.read_bytes()
    seen.draws.clear(), seen.starts.clear()
    short = ["--epochs", "2", "--batch_size", "96", "--save_dir", str(run), "--state", "2"]
    files = ["--weight", str(weight), "--mask", str(mask)]
    (row,) = main_train.main([*short, *files])["states"]
    assert same(dense_state(seen.starts[0]), state(weight))
    retrained = run / "retrain_task2_best_model.pt"
    assert same(masks_of(retrained), masks_of(mask))
    assert row["accuracy"] == plain_accuracies(retrained, data, 2)
    assert row["density"] == rows[1]["ticket_density"]
    assert seen.draws == {("initialisation",), ("control", "none", 2)} | training(
        "retrain_task2", 2
    )
    assert results(run, "retrain_task2_results.json")["class_order"] == data.order
    assert records.read_bytes() == before  # that of main_BU
    # of a pruned W all weights are taken and its mask is dropped; M may be a pruned checkpoint
    pruned, flags = run / "task2_best_prun_model.pt", ["--save_data_path", str(run / "data")]
    files = ["--weight", str(pruned), "--mask", str(retrained)]
    main_train.main([*short, *files, *flags, "--save_dir", str(elsewhere), "--epochs", "1"])
    assert same(dense_state(seen.starts[1]), dense_state(state(pruned)))
    assert same(pruning_utils.extract_mask(seen.starts[1]), masks_of(mask))
    # test.py needs no flags, even elsewhere; the state is the last that was learned
    copied = str(shutil.copy(retrained, elsewhere / "ticket.pt"))
    capsys.readouterr()
    tested = test_script.main(["--pretrained", copied, "--pruned", "--save_dir", str(elsewhere)])
    assert tested["class_order"] == data.order != dataset.DATASETS["digits"].order
    (found,) = tested["states"]
    assert [found[key] for key in ("state", "accuracy", "density", "cost")] == [
        2, *(row[key] for key in ("accuracy", "density", "cost"))
    ]  # fmt: skip
    assert f"{row['cost']['state_dict_bytes']:,} bytes of state dict" in capsys.readouterr().out
    assert results(elsewhere, "test_ticket_state2_results.json")["states"] == [found]
    assert (elsewhere / "test_ticket_state2_confusion.csv").exists()
    first = test_script.main(["--pretrained", copied, "--pruned", "--state", "1"])["states"][0]
    assert len(first["accuracy"]) == 1
    for flag, wanted in {
        "--state 3": "has learned tasks 1 to 2",
        "--width 4": "remove --width",
        "--arch resnet32": "remove --arch",
        "--classifiers 3": "remove --classifiers",
        "--dataset cifar10": "remove --dataset",
    }.items():
        with pytest.raises(UserError, match=f"{flag}: .*{wanted}"):
            test_script.main(["--pretrained", copied, "--pruned", *flag.split()])
    with pytest.raises(UserError, match="add --pruned"):
        test_script.main(["--pretrained", copied])
