"""The five scripts end to end on a handful of digits, and the decisions that each of them makes."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main_BU
import main_CIL
import main_TD
import main_train
import pruning_utils
import teaching
import test as test_script
import trainer
from datasets import prepare
from models import build_model
from runtime import metrics, process, ranks
from runtime.checkpoint import load_checkpoint, read_state_dict
from runtime.errors import UserError
from tools import report

BASE = ["--dataset", "digits", "--classifiers", "3", "--width", "4"]
TRAIN = [*BASE, "--epochs", "2", "--batch_size", "48"]
TINY = [*TRAIN, "--unlabel_num", "2"]
pytestmark = pytest.mark.usefixtures("few_digits", "on_device")


def results(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def best(folder, name):
    return read_state_dict(folder / f"{name}_best_model.pt")


def same(a, b):
    """Whether two state dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key].cpu(), b[key].cpu()) for key in a)


def masks_are(state, masks):
    """Whether a state dict is under these masks."""
    own = pruning_utils.extract_mask(state)
    return own.keys() == masks.keys() and all(torch.equal(own[n].cpu(), masks[n]) for n in masks)


def is_within(inner, outer):
    """Whether every weight that remains in one dict of masks remains in another too."""
    return all(bool((inner[name] <= outer[name]).all()) for name in inner)


def run_CIL(folder, *flags):
    main_CIL.main([*TINY, "--save_dir", str(folder), *flags])
    return results(folder)


def run_TD(folder, *flags):
    main_TD.main([*TINY, "--iter_epochs", "1", "--save_dir", str(folder), *flags])
    return results(folder)


def run_BU(folder, *flags):
    tiny = [*TINY, "--iter_epochs", "1", "--max_iter_prun", "3"]
    main_BU.main([*tiny, "--save_dir", str(folder), *flags])
    return results(folder)


def run_train(folder, weight, mask, state, *flags):
    files = ["--weight", str(weight), "--mask", str(mask), "--save_dir", str(folder)]
    main_train.main([*TRAIN, *files, "--state", str(state), *flags])
    return results(folder, f"retrain_task{state}_results.json")["states"][0]


def run_test(path, *flags):
    """The row that test.py reports of a checkpoint."""
    return test_script.main([*BASE, "--pretrained", str(path), *flags])["states"][0]


@pytest.fixture
def on_device(device, monkeypatch):
    """The scripts find this device, and no other."""
    for module in (trainer, main_train, test_script):
        monkeypatch.setattr(module, "pick_device", lambda args: device)


@pytest.fixture
def starts(monkeypatch):
    """The state dicts from which train_task() was called, in order."""
    seen, real = [], trainer.train_task

    def train_task(model, *rest):
        seen.append(pruning_utils.clone_state(model))
        return real(model, *rest)

    monkeypatch.setattr(trainer, "train_task", train_task)
    return seen


@pytest.fixture
def falling_accuracies(monkeypatch):
    """Validation accuracies fall, so the best epoch is the first one, not the last."""
    falling = iter(range(99, 0, -1))
    monkeypatch.setattr(trainer, "validate", lambda *args: next(falling))


# ------------------------------------------------------------------------------ main_CIL


@pytest.mark.device
def test_CIL_trains_all_tasks_and_writes_its_records(tmp_path, device, capsys):
    run = run_CIL(tmp_path)
    matrix = [row["accuracy"] for row in run["states"]]
    assert [len(row) for row in matrix] == [1, 2, 3]
    assert all(row["density"] == 100 and row["seconds"] > 0 for row in run["states"])
    assert run["states"][2]["mean"] == pytest.approx(sum(matrix[2]) / 3)
    assert run["average_incremental_accuracy"] == metrics.average_incremental_accuracy(matrix)
    assert run["forgetting"] == metrics.forgetting(matrix)
    assert run["config"]["epochs"] == 2 and run["versions"]["torch"] == torch.__version__
    assert run["device"].startswith(str(device))
    log = (tmp_path / "log_results.txt").read_text().splitlines()
    assert log[0].split("\t")[:5] == ["state", "task1", "task2", "task3", "mean"]
    assert log[3].split("\t")[3] == f"{matrix[2][2]:.2f}"
    for t in (1, 2, 3):
        saved = torch.load(tmp_path / f"task{t}_checkpoint.pt", weights_only=True)
        assert saved["epoch"] == 2
        assert saved["best_prec1"] == run["states"][t - 1]["training"]["best_val"]
    assert (tmp_path / "data" / "task2_img.npy").exists()
    assert not (tmp_path / "data" / "task3_img.npy").exists()  # no task would use it
    assert capsys.readouterr().err == ""  # no progress bar without a terminal
    # test.py tests the last task unless another is given: here task 3, not 5
    tested = run_test(tmp_path / "task3_best_model.pt")
    assert tested["state"] == 3 and tested["accuracy"] == matrix[2]


def test_CIL_tests_best_models_and_continues_from_them(tmp_path, falling_accuracies, starts):
    run = run_CIL(tmp_path)
    for t in (1, 2):
        first, last = (
            best(tmp_path, f"task{t}"),
            read_state_dict(tmp_path / f"task{t}_checkpoint.pt"),
        )
        assert not same(first, last)
        assert same(starts[t], first)
    tested = run_test(tmp_path / "task3_best_model.pt", "--state", "3")
    assert tested["accuracy"] == run["states"][2]["accuracy"]


@pytest.mark.parametrize(
    ("flags", "part", "old", "queried"),
    [([], "exemplars", 16, 32), (["--joint"], "train", 48, 0), (["--finetune"], "train", 0, 0)],
)
def test_CIL_keeps_the_exemplars_all_old_images_or_none(
    tmp_path, monkeypatch, flags, part, old, queried
):
    """Task 3: four old classes, each with 12 training images, of which 4 are exemplars."""
    tasks, real = [], trainer.train_task

    def train_task(model, task, *rest):
        tasks.append(task)
        return real(model, task, *rest)

    monkeypatch.setattr(trainer, "train_task", train_task)
    run = run_CIL(tmp_path, *flags)
    data, task = tasks[2].data, tasks[2]
    for found, wanted in zip(task.old, data.of_tasks(getattr(data, part), 1, 2)):
        assert torch.equal(found, wanted[:old])
    for found, *wanted in zip(task.random, task.new, task.old):
        assert len(wanted[0]) == 24 and torch.equal(found, torch.cat(wanted))
    assert queried == (len(task.unlabeled[0]) if task.unlabeled else 0)
    assert (tmp_path / "data").exists() == bool(queried)
    assert [len(row["accuracy"]) for row in run["states"]] == [1, 2, 3]


# ------------------------------------------------------------------------------ main_TD


@pytest.mark.device
def test_TD_follows_the_curriculum(tmp_path, monkeypatch, starts):
    retrained, real = [], trainer.retrain

    def retrain(model, task, run, step, part=None, optimizer=None):
        retrained.append((task.t, step, optimizer))
        return real(model, task, run, step, part, optimizer)

    monkeypatch.setattr(trainer, "retrain", retrain)
    run = run_TD(tmp_path, "--prune_scheduler", "1,0,3")
    states = run["states"]
    assert [row["state"] for row in states] == [1, 2, 3, 4]
    assert [len(row["accuracy"]) for row in states] == [1, 2, 3, 3]
    # each task is tested before its own prunings
    assert [round(row["density"], 1) for row in states] == [100, 80, 80, 41]
    assert [round(row["ticket_density"], 1) for row in states[:3]] == [80, 80, 41]
    # s_t - 1 retrainings, one optimizer for the task
    assert [(t, step) for t, step, _ in retrained] == [(3, "task3_prune1"), (3, "task3_prune2")]
    assert retrained[0][2] is retrained[1][2]
    assert retrained[0][2].param_groups[0]["lr"] == pytest.approx(0.01 / 100)
    # rewound to the initialization, convolutions only, also where nothing was pruned
    initial = read_state_dict(tmp_path / "task0_checkpoint_weight.pt")
    convolutions = [key for key, value in initial.items() if value.ndim == 4]
    for number, start in enumerate(starts[1:], start=2):
        for key in convolutions:
            orig = start[key.replace(".weight", ".weight_orig")]
            assert torch.equal(orig.cpu(), initial[key].cpu())
        last = read_state_dict(tmp_path / f"task{number - 1}_checkpoint.pt")
        kept = [key for key in last if "bn" in key or "linear" in key]
        if number < 4:  # no retraining in between
            assert all(torch.equal(start[key].cpu(), last[key].cpu()) for key in kept)
    # masks only shrink
    masks = [pruning_utils.extract_mask(best(tmp_path, f"task{t}")) for t in (2, 3, 4)]
    assert is_within(masks[1], masks[0]) and is_within(masks[2], masks[1])
    # the summary takes the result for task T's row, and so does the report
    matrix = [states[i]["accuracy"] for i in (0, 1, 3)]
    assert run["average_incremental_accuracy"] == metrics.average_incremental_accuracy(matrix)
    assert run["forgetting"] == metrics.forgetting(matrix)
    assert (tmp_path / "data" / "task2_img.npy").exists()
    (group,) = report.group(report.read(tmp_path))
    assert [*group["accuracy"]] == [1, 2, 3]
    assert group["accuracy"][3] == {0: pytest.approx(states[3]["mean"])}
    assert [round(density[0], 1) for density in group["density"].values()] == [80, 80, 41]


def test_TD_prunes_the_last_model_and_teaches_with_the_best(
    tmp_path, monkeypatch, falling_accuracies
):
    teachers, pruned, real = [], [], (teaching.teach, main_TD.prune_task)

    def teach(model, *rest):
        teachers.append(pruning_utils.clone_state(model))
        return real[0](model, *rest)

    def prune_task(model, *rest):
        pruned.append(pruning_utils.clone_state(model))
        return real[1](model, *rest)

    monkeypatch.setattr(teaching, "teach", teach)
    monkeypatch.setattr(main_TD, "prune_task", prune_task)
    run_TD(tmp_path, "--prune_scheduler", "1,1,1")
    for t in (1, 2):
        assert same(teachers[t - 1], best(tmp_path, f"task{t}"))
        last = read_state_dict(tmp_path / f"task{t}_checkpoint.pt")
        assert same(pruned[t - 1], last) and not same(teachers[t - 1], last)


def test_TD_with_random_scores_is_repeatable_and_has_the_same_densities(tmp_path):
    flags = ["--epochs", "1", "--prune_scheduler", "2,0,1", "--rewind", "rand"]
    runs = {
        "magnitude": run_TD(tmp_path / "magnitude", *flags)["states"],
        "random": run_TD(tmp_path / "random", *flags, "--criterion", "random")["states"],
        "repeated": run_TD(tmp_path / "repeated", *flags, "--criterion", "random")["states"],
        "seed": run_TD(tmp_path / "seed", *flags, "--criterion", "random", "--seed", "1")["states"],
    }
    for rows in runs.values():
        assert [row["density"] for row in rows] == [row["density"] for row in runs["random"]]
        for row in rows:
            row.pop("seconds"), row["training"].pop("images_per_second")
    assert runs["random"] == runs["repeated"]
    assert same(best(tmp_path / "random", "task4"), best(tmp_path / "repeated", "task4"))
    for t in (2, 4):
        random, *others = (
            torch.cat([mask.flatten() for mask in pruning_utils.load_masks(path).values()])
            for path in (
                tmp_path / n / f"task{t}_best_model.pt" for n in ("random", "magnitude", "seed")
            )
        )
        for other in others:  # independent masks have density² of the weights in common
            assert (random * other).mean().item() == pytest.approx(
                random.mean().item() ** 2, abs=0.02
            )


def test_TD_in_bf16_writes_float32_files(tmp_path, monkeypatch):
    real, seen = trainer.make_model, set()

    def make_model(*given):
        made = real(*given)
        made.layer4.register_forward_hook(lambda layer, inputs, out: seen.add(out.dtype))
        return made

    monkeypatch.setattr(trainer, "make_model", make_model)
    run = run_TD(tmp_path, "--prune_scheduler", "2,1,1", "--precision", "bf16")
    assert seen == {torch.bfloat16}
    assert run["config"]["precision"] == "bf16"
    assert [round(row["density"], 1) for row in run["states"]] == [100, 64, 51.2, 41]
    for t in (1, 2, 3, 4):
        for name in ("checkpoint", "best_model"):
            saved = torch.load(tmp_path / f"task{t}_{name}.pt", weights_only=True)
            momentum = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
            for tensor in (*saved["state_dict"].values(), *momentum):
                assert tensor.dtype == (torch.float32 if tensor.ndim else torch.int64)
                assert bool(tensor.isfinite().all())


# ------------------------------------------------------------------------------ main_BU


@pytest.fixture
def retrain_to(monkeypatch):
    """Let trainer.retrain() return the given accuracies, without training."""

    def install(accuracies):
        left = iter(accuracies)  # StopIteration if it is called more often

        def retrain(*args, **more):
            return SimpleNamespace(best=next(left))

        monkeypatch.setattr(trainer, "retrain", retrain)

    return install


def BU_run(**changes):
    """The part of a run that the search for a ticket uses."""
    flags = {"percent": 0.2, "deacc": 2.0, "base_sparsity": 90.0, "max_iter_prun": 26}
    flags |= {"select_on": "test", "criterion": "magnitude", "seed": 0}
    return SimpleNamespace(args=SimpleNamespace(**flags | changes), log=print)


def task_of(t):
    return SimpleNamespace(t=t, data=SimpleNamespace(test={}))


@pytest.fixture
def model(args):
    return trainer.make_model(args, torch.device("cpu"))


@pytest.mark.parametrize(
    ("accuracies", "prunings", "changes", "why"),
    [
        ([98] * 10 + [90], 10, {}, "decayed and sparse after 11: the mask of 10"),
        ([90] * 11, 10, {}, "decayed from the start, sparse enough only after 11 (91.4 %)"),
        ([98] * 10 + [97] * 2 + [90], 12, {}, "decayed later"),
        ([96] * 11, 10, {}, "a decay of exactly deacc is too much"),
        ([97] * 26, 26, {}, "never decayed: 26, the 27th is undone without retraining"),
        ([90] * 26, 26, {"base_sparsity": 100.0}, "never sparse enough: 26"),
        ([90] * 26, 0, {"percent": 0.0}, "nothing is pruned, so never sparse enough: 26"),
        ([98] * 11, 10, {"deacc": 0.0}, "no decay is too much"),
        ([99.5] * 11, 10, {"deacc": -2.0}, "a gain of less than 2 points is a decay too"),
    ],
)
def test_BU_ticket_of_task_1(model, retrain_to, accuracies, prunings, changes, why):
    retrain_to(accuracies)
    masks, state, rounds = main_BU.find_ticket(model, task_of(1), BU_run(**changes), 98.0)
    assert pruning_utils.density(masks) == pytest.approx(100 * 0.8**prunings, abs=0.02), why
    assert len(rounds) == len(accuracies)
    assert masks_are(state, masks)


@pytest.mark.parametrize(
    ("accuracies", "changes", "flag"),
    [
        ([50], {"percent": 0.95}, "--percent 0.95"),
        ([], {"deacc": 0.0, "base_sparsity": 0.0}, "--deacc 0, "),  # published: not entered
        ([], {"deacc": -1.0, "base_sparsity": 0.0}, "--deacc -1, "),
    ],
)
def test_BU_without_a_ticket_is_an_error(model, retrain_to, accuracies, changes, flag):
    retrain_to(accuracies)
    with pytest.raises(UserError, match=flag):
        main_BU.find_ticket(model, task_of(1), BU_run(**changes), 98.0)


@pytest.mark.parametrize(
    ("accuracies", "prunings", "changes", "why"),
    [
        ([98] * 26, 26, {}, "never decayed: 26"),
        ([90] * 13, 13, {"base_sparsity": 85}, "always decayed: the 14th would be too sparse"),
        ([98] * 17 + [90], 17, {"base_sparsity": 85}, "decayed after 18: the state before it"),
        ([98] * 17 + [96], 18, {"base_sparsity": 85}, "a decay of exactly deacc: saved first"),
        ([90], 1, {"base_sparsity": 10}, "decayed after the first: that one"),
        ([90] * 26, 26, {}, "the mask is denser than 10 %: always 26"),
        ([90] * 26, 26, {"base_sparsity": 100}, "never sparse enough: 26"),
        ([90] * 26, 0, {"percent": 0.0}, "nothing is pruned: 26 rounds"),
        ([], 1, {"deacc": 0, "base_sparsity": 10}, "published: the loop is not entered"),
        ([], 1, {"deacc": -5, "base_sparsity": 17}, "the same"),
        ([98], 1, {"deacc": -5, "base_sparsity": 18}, "entered, but the second is too sparse"),
    ],
)
def test_BU_regrowth(model, retrain_to, accuracies, prunings, changes, why):
    current = pruning_utils.masks_of(model)
    for _ in range(10):
        scores = pruning_utils.magnitude(pruning_utils.weights(model), None)
        current = pruning_utils.prune(scores, current, 0.2)
    kept = pruning_utils.density(current)  # 10.74 %
    retrain_to(accuracies)
    masks, state, rounds = main_BU.regrow(model, task_of(2), BU_run(**changes), 98.0, current)
    expected = kept + (100 - kept) * 0.8**prunings
    assert pruning_utils.density(masks) == pytest.approx(expected, abs=0.03), why
    assert len(rounds) == len(accuracies)
    assert is_within(current, masks)
    assert masks_are(state, masks)


@pytest.mark.device
@pytest.mark.parametrize("accept", ["-1000", "1000"])
def test_BU_regrows_or_keeps_its_mask(tmp_path, starts, accept):
    """--accept_decay -1000 makes every task re-grow, 1000 none."""
    run = run_BU(tmp_path, "--accept_decay", accept, "--base_sparsity", "50")
    states, regrown = run["states"], accept == "-1000"
    assert [row["state"] for row in states] == [1, 2, 3]
    assert [row.get("regrown") for row in states] == [None, regrown, regrown]
    assert [len(row["dense_accuracy"]) for row in states] == [1, 2, 3]
    # dense, and again under the mask, both from the dense best model of the task before
    assert len(starts) == 5
    for t in (2, 3):
        previous = best(tmp_path, f"task{t - 1}")
        assert same(starts[2 * t - 3], previous)
        assert same(pruning_utils.dense_state(starts[2 * t - 2]), previous)
        mask = pruning_utils.load_masks(tmp_path / f"mask-{t - 1}.pt")
        assert masks_are(read_state_dict(tmp_path / f"task{t}_best_prun_model.pt"), mask)
        assert not pruning_utils.extract_mask(best(tmp_path, f"task{t}"))
        assert states[t - 1]["density"] == states[t - 2]["ticket_density"]
        grown = pruning_utils.load_masks(tmp_path / f"mask-{t}.pt")
        assert is_within(mask, grown)
        assert (pruning_utils.density(grown) > pruning_utils.density(mask)) == regrown
        assert (tmp_path / f"task{t}_prune_weight.pt").exists() == regrown
    last = read_state_dict(tmp_path / "current_mask.pt")
    assert same(last, read_state_dict(tmp_path / "mask-3.pt"))
    assert set(last["layer1.0.conv1.weight_mask"].unique().tolist()) <= {0.0, 1.0}
    assert last["layer1.0.conv1.weight_mask"].dtype == torch.float32
    state = load_checkpoint(tmp_path / "task1_prune_weight.pt")  # a raw state dict
    assert masks_are(state, pruning_utils.load_masks(tmp_path / "mask-1.pt"))


@pytest.mark.parametrize("select_on", ["test", "val"])
def test_BU_chooses_tickets_on_the_selected_images(tmp_path, monkeypatch, select_on):
    """Retraining is judged on the part that --select_on names, and a mask's cost too.

    On that part masks cost 40 points, so that they re-grow; on another they would gain as much.
    """
    parts, real = [], (trainer.retrain, trainer.evaluate_tasks)

    def retrain(model, task, run, step, part):
        parts.append("test" if part is task.data.test else "val" if part is task.data.val else None)
        return real[0](model, task, run, step, part)

    def evaluate_tasks(model, task, run, name, part="test"):
        accuracy = 80.0 if name.endswith("dense") == (part == select_on) else 40.0
        found = {"accuracy": [accuracy] * task.t, "confusion": [[accuracy, 100 - accuracy]]}
        return real[1](model, task, run, name, part) | found

    monkeypatch.setattr(trainer, "retrain", retrain)
    monkeypatch.setattr(trainer, "evaluate_tasks", evaluate_tasks)
    first, *later = run_BU(tmp_path, "--select_on", select_on)["states"]
    assert set(parts) == {select_on}
    assert later and all(row["regrown"] for row in later)
    for row in (first, *later):
        assert row["rounds"]
        assert all(each["decay"] == 80 - each["accuracy"] for each in row["rounds"])


def test_BU_a_regrowth_that_stops_at_its_first_pruning_stores_weights_not_retrained(
    tmp_path, monkeypatch
):
    real = trainer.retrain

    def retrain(model, task, *rest):
        """Task 1 never decays, the re-growth of task 2 at once."""
        return real(model, task, *rest)._replace(best=1000.0 if task.t == 1 else -1000.0)

    monkeypatch.setattr(trainer, "retrain", retrain)
    run = run_BU(tmp_path, "--classifiers", "2", "--accept_decay", "-1000", "--base_sparsity", "5")
    assert len(run["states"][1]["rounds"]) == 1
    state, dense = read_state_dict(tmp_path / "task2_prune_weight.pt"), best(tmp_path, "task2")
    assert same(pruning_utils.dense_state(state), dense)
    masks = pruning_utils.load_masks(tmp_path / "mask-2.pt")
    assert masks_are(state, masks) and pruning_utils.density(masks) < 95


def test_BU_an_unchanged_model_has_no_decay_whatever_the_class_sizes(tmp_path, monkeypatch):
    """180 test images of each class of task 1, 20 of the others; nothing is pruned or retrained."""
    read = prepare.read_embedded

    def read_embedded(name):
        parts, pool, meta = read(name)
        sizes = {c: 180 if c in (9, 8) else 20 for c in parts["test"]}
        test = {c: np.resize(parts["test"][c], (n, 32, 32, 3)) for c, n in sizes.items()}
        return parts | {"test": test}, pool, meta

    monkeypatch.setattr(prepare, "read_embedded", read_embedded)
    flags = ["--percent", "0", "--iter_epochs", "0", "--accept_decay", "-1000"]
    states = run_BU(tmp_path, *flags, "--class_order", "random:5")["states"]
    accuracies = states[2]["dense_accuracy"]
    assert max(accuracies) - min(accuracies) > 1  # else means and pooled accuracies agree anyway
    rounds = [each for row in states for each in row["rounds"]]
    assert len(rounds) == 9
    assert all(each["decay"] == 0 and each["density"] == 100 for each in rounds)
    for t in (1, 2, 3):
        state = read_state_dict(tmp_path / f"task{t}_prune_weight.pt")
        assert same(pruning_utils.dense_state(state), best(tmp_path, f"task{t}"))


def test_without_retraining_the_pruned_model_is_what_was_trained(tmp_path):
    """--iter_epochs 0 in main_TD: the second pruning ranks the weights of the last epoch too."""
    main_TD.main(
        [*TINY, "--iter_epochs", "0", "--prune_scheduler", "2,1,1", "--rewind", "finetune"]
        + ["--save_dir", str(tmp_path)]
    )
    last = read_state_dict(tmp_path / "task1_checkpoint.pt")
    ticket = load_checkpoint(tmp_path / "task1_ticket.pt")
    assert same(pruning_utils.dense_state(ticket), last)
    weights = torch.cat([v.flatten() for v in last.values() if v.ndim == 4]).abs()
    masks = torch.cat([m.flatten() for m in pruning_utils.extract_mask(ticket).values()])
    assert masks.mean().item() == pytest.approx(0.64, abs=1e-4)
    assert weights[masks == 0].max() <= weights[masks == 1].min()


# ------------------------------------------------------------------------------ main_train, test


@pytest.mark.device
def test_a_ticket_is_retrained_and_tested(tmp_path, starts, capsys):
    """The task-rewound ticket: the mask of task 2 on the dense weights of task 1."""
    run_BU(tmp_path, "--accept_decay", "-1000")
    before = (tmp_path / "results.json").read_bytes()
    weight, mask = tmp_path / "task1_best_model.pt", tmp_path / "mask-2.pt"
    starts.clear()
    row = run_train(tmp_path, weight, mask, 2)
    assert same(pruning_utils.dense_state(starts[0]), best(tmp_path, "task1"))
    masks = pruning_utils.load_masks(mask)
    assert row["density"] == pruning_utils.density(masks)
    assert (tmp_path / "results.json").read_bytes() == before  # that of main_BU
    assert (tmp_path / "retrain_task2_checkpoint.pt").exists()
    retrained = tmp_path / "retrain_task2_best_model.pt"
    tested = run_test(retrained, "--pruned", "--state", "2", "--save_dir", str(tmp_path / "tested"))
    assert (tested["accuracy"], tested["density"]) == (row["accuracy"], row["density"])
    cost = row["cost"]
    assert tested["cost"] == cost and cost["weights"] == sum(int(m.sum()) for m in masks.values())
    assert f"{cost['macs']:,} multiply-accumulates" in capsys.readouterr().out
    records = results(tmp_path / "tested", "test_retrain_task2_best_model_state2_results.json")
    assert records["script"] == "test"
    shutil.copy(retrained, tmp_path / "tested")  # another checkpoint of the same name
    flags = ["--pruned", "--state", "2", "--save_dir", str(tmp_path / "tested")]
    with pytest.raises(UserError, match=f"holds .* of {retrained}; name another folder"):
        run_test(tmp_path / "tested" / retrained.name, *flags)

    # of a pruned W all weights are taken and its mask is dropped; M may be a pruned checkpoint
    pruned = tmp_path / "task2_best_prun_model.pt"
    run_train(tmp_path / "2", pruned, retrained, 2, "--save_data_path", str(tmp_path / "data"))
    dense = pruning_utils.dense_state(read_state_dict(pruned))
    assert same(pruning_utils.dense_state(starts[1]), dense)
    assert masks_are(starts[1], masks)

    # the report has a row for each run, with the numbers of results.json
    capsys.readouterr()
    report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| BU " in printed and "| TR-BU     | 2    | the ticket |" in printed
    assert f"{results(tmp_path)['states'][2]['mean']:.1f}" in printed
    assert f"| {cost['macs_percent']:.1f} " in printed
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_task_1_is_retrained_without_soft_labels(tmp_path, model):
    run_CIL(tmp_path / "cil", "--epochs", "1")
    scores = pruning_utils.magnitude(pruning_utils.weights(model), None)
    masks = pruning_utils.prune(scores, pruning_utils.masks_of(model), 0.5)
    pruning_utils.save_masks(tmp_path / "mask.pt", masks)
    weight = tmp_path / "cil" / "task1_best_model.pt"
    row = run_train(tmp_path / "out", weight, tmp_path / "mask.pt", 1)
    assert row["density"] == pytest.approx(50, abs=0.01)
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (main_TD.main, ["--prune_scheduler", "1,1,1"]),
        (main_BU.main, ["--max_iter_prun", "1"]),
        (main_CIL.main, []),
    ],
)
def test_the_initialization_is_a_checkpoint_that_test_reads(tmp_path, monkeypatch, main, flags):
    """Also when the run stops right after it: no later step may be needed."""

    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    monkeypatch.setattr(trainer, "train_task", stop)
    with pytest.raises(Stop):
        main([*TINY, *flags, "--save_dir", str(tmp_path)])
    path = tmp_path / "task0_checkpoint_weight.pt"
    saved = torch.load(path, weights_only=True)
    arguments = SimpleNamespace(
        arch="resnet18", width=4, classifiers=3, classes_per_classifier=2, precision="fp32", seed=0
    )
    initial = trainer.make_model(arguments, torch.device("cpu")).state_dict()
    assert saved.keys() == {"state_dict"} and same(saved["state_dict"], initial)
    row = run_test(path)
    assert len(row["accuracy"]) == 3 and row["density"] == 100


# ------------------------------------------------------------------------------ another backbone


def test_resnet32_through_the_ticket_scripts(tmp_path):
    flags = ["--arch", "resnet32", "--epochs", "1"]
    td = run_TD(tmp_path / "TD", *flags, "--prune_scheduler", "1,2,1")
    assert [round(row["density"], 1) for row in td["states"]] == [100, 80, 51.2, 41]
    bu = run_BU(tmp_path / "BU", *flags, "--accept_decay", "-1000", "--base_sparsity", "100")
    densities = [51.2]  # 3 prunings; a re-growth keeps 51.2 % of what is outside the mask
    for _ in (2, 3):
        densities.append(densities[-1] + 0.512 * (100 - densities[-1]))
    assert [row["ticket_density"] for row in bu["states"]] == pytest.approx(densities, abs=0.05)
    weight, mask = tmp_path / "BU" / "task1_best_model.pt", tmp_path / "BU" / "mask-2.pt"
    row = run_train(tmp_path / "BU", weight, mask, 2, *flags)
    assert row["density"] == bu["states"][1]["ticket_density"]
    path = tmp_path / "TD" / "task4_best_model.pt"
    tested = run_test(path, "--pruned", *flags[:2])
    assert tested["accuracy"] == td["states"][3]["accuracy"]
    # a checkpoint of the other network is an error that names --arch
    with pytest.raises(UserError, match=f"--pretrained {path}: does not fit resnet18 .*--arch"):
        run_test(path, "--pruned")
    with pytest.raises(UserError, match=f"--weight {weight}: does not fit resnet18 .*--arch"):
        run_train(tmp_path / "other", weight, mask, 2)


# ------------------------------------------------------------------------------ how they start


SCRIPTS = ["main_TD", "main_BU", "main_CIL", "main_train", "test", "dataset"]
TOOLS = ["report", "reproduce", "gpu", "method_figure"]
COMMANDS = [[f"{name}.py"] for name in SCRIPTS] + [["-m", f"tools.{name}"] for name in TOOLS]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_shows_how_to_use_it_and_an_unknown_flag_is_one_line(scripts, tmp_path, command):
    ended = scripts.run([*command, "--help"], tmp_path)
    assert (ended.status, ended.err) == (0, "")
    assert " ".join(["python", *command]) in ended.out
    ended = scripts.run([*command, "--unknown"], tmp_path)
    assert (ended.status, ended.out) == (2, "")
    name = command[-1].removeprefix("tools.").removesuffix(".py")
    assert ended.err.startswith(f"{name}.py: ") and ended.err.count("\n") == 1


def test_each_run_prints_a_header(tmp_path, capsys):
    run_CIL(tmp_path, "--epochs", "1", "--decreasing_lr", "60,80")
    title, *lines = capsys.readouterr().out.splitlines()[:6]
    assert title == "main_CIL.py"
    rows = dict(line.strip().split(maxsplit=1) for line in lines)
    assert [*rows] == ["device", "data", "network", "schedule", "folder"]
    assert f"{torch.get_num_threads()} threads" in rows["device"]
    for part, count in {"train": 72, "val": 30, "test": 48, "exemplars": 24, "pool": 100}.items():
        assert f"{count} {part}" in rows["data"]
    assert "digits, 3 x 2 classes" in rows["data"]
    arguments = SimpleNamespace(
        arch="resnet18", width=4, classifiers=3, classes_per_classifier=2, precision="fp32"
    )
    parameters = sum(p.numel() for p in build_model(arguments).parameters())
    assert f"resnet18, width 4, fp32: {parameters:,} parameters" in rows["network"]
    assert rows["schedule"].startswith("epochs per task 1, batch size 48, lr 0.01")
    assert "after epochs 60, 80" in rows["schedule"] and "seed 0" in rows["schedule"]
    assert rows["folder"] == str(tmp_path)
    run_test(tmp_path / "task1_best_model.pt", "--state", "1")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["test.py"]
    assert [line[0] for line in lines[1:4]] == ["device", "data", "network"]


# ------------------------------------------------------------------------------ how they end


def out_of_cuda_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (out_of_cuda_memory, "CUDA out of memory"),
        (lambda: torch.empty(10**15), "can't allocate memory"),
        (lambda: np.empty(10**18, np.uint8), "Unable to allocate"),
    ],
)
def test_running_out_of_memory_is_one_line(capsys, main, message):
    with pytest.raises(SystemExit) as end:
        process.run_script(main)
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and message in line and "--batch_size" in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Unable to find a valid cuDNN algorithm (memory format)"),
        ValueError("a bug"),
    ],
)
def test_other_errors_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)) as caught:
        process.run_script(main)
    assert caught.value is error


def test_torchrun_does_not_start_a_tool(monkeypatch, capsys):
    for name in ranks.VARIABLES:
        monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit) as end:
        process.run_script(lambda: None)
    assert (
        end.value.code == 2 and "runs as one process; leave out torchrun" in capsys.readouterr().err
    )


def test_scripts_let_the_C_library_keep_freed_memory(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda option, value: asked.append(option))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: library)
    # before main: M_MMAP_MAX, M_TRIM_THRESHOLD
    assert process.run_script(lambda: list(asked)) == [-4, -1]


def no_library(name):
    raise OSError("no such library")


@pytest.mark.parametrize("load", [no_library, lambda name: SimpleNamespace()])
def test_scripts_run_without_that_function_too(monkeypatch, load):
    monkeypatch.setattr(process.ctypes, "CDLL", load)
    assert process.run_script(lambda: "ran") == "ran"
