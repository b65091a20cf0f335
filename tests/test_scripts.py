"""The five scripts end to end on a handful of digits, and the decisions that each of them owns."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dataset
import main_BU
import main_CIL
import main_TD
import main_train
import pruning_utils
import report
import reproduce
import test as test_script
import trainer
import utils

FLAGS = "--dataset digits --classifiers 3 --width 4 --epochs 2 --batch_size 48 --unlabel_num 2"
TINY = FLAGS.split()
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("few_digits")


def results(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def best(folder, name):
    return utils.read_state(folder / f"{name}_best_model.pt")


def ones(state):
    return {name: mask.bool() for name, mask in pruning_utils.extract_mask(state).items()}


# ------------------------------------------------------------------------------ main_CIL


def test_CIL_runs_all_tasks_and_leaves_its_records(tmp_path, capsys):
    main_CIL.main([*TINY, "--save_dir", str(tmp_path)])
    run = results(tmp_path)
    matrix = [row["accuracy"] for row in run["states"]]
    assert [len(row) for row in matrix] == [1, 2, 3]
    assert all(row["density"] == 100 and row["seconds"] > 0 for row in run["states"])
    assert run["states"][2]["mean"] == pytest.approx(sum(matrix[2]) / 3)
    assert run["average_incremental_accuracy"] == utils.average_incremental_accuracy(matrix)
    assert run["forgetting"] == utils.forgetting(matrix)
    assert run["config"]["epochs"] == 2 and run["versions"]["torch"] == torch.__version__
    assert run["device"].startswith("cpu") or run["device"].startswith(("cuda", "mps"))
    log = (tmp_path / "log_results.txt").read_text().splitlines()
    assert log[0].split("\t")[:5] == ["state", "task1", "task2", "task3", "mean"]
    assert log[3].split("\t")[3] == f"{matrix[2][2]:.2f}"
    for t in (1, 2, 3):
        saved = torch.load(tmp_path / f"task{t}_checkpoint.pt", weights_only=True)
        assert (
            saved["epoch"] == 2
            and saved["best_prec1"] == run["states"][t - 1]["training"]["best_val"]
        )
    assert (tmp_path / "data" / "task2_img.npy").exists()
    assert not (tmp_path / "data" / "task3_img.npy").exists()  # nobody would learn from it
    assert capsys.readouterr().err == ""  # no progress bar where there is no terminal


def test_CIL_tests_best_models_and_goes_on_from_them(tmp_path, monkeypatch):
    """With accuracies that fall, the best epoch is the first one, not the last."""
    let_accuracies_fall(monkeypatch)
    started = starts(monkeypatch, main_CIL)
    main_CIL.main([*TINY, "--save_dir", str(tmp_path)])
    for t in (1, 2):
        first, last = (
            best(tmp_path, f"task{t}"),
            utils.read_state(tmp_path / f"task{t}_checkpoint.pt"),
        )
        assert not torch.equal(first["conv1.weight"], last["conv1.weight"])
        assert same(started[t], first)
    row = test_script.main(
        [*TINY, "--pretrained", str(tmp_path / "task3_best_model.pt"), "--state", "3"]
    )
    assert row["states"][0]["accuracy"] == results(tmp_path)["states"][2]["accuracy"]


def let_accuracies_fall(monkeypatch):
    falling = iter(range(99, 0, -1))
    monkeypatch.setattr(trainer, "validate", lambda *args: next(falling))


def starts(monkeypatch, script):
    """The state dicts from which train_task was called, in order."""
    seen, real = [], script.train_task

    def train_task(model, *rest, **more):
        seen.append(pruning_utils.clone_state(model))
        return real(model, *rest, **more)

    monkeypatch.setattr(script, "train_task", train_task)
    return seen


def same(a, b, endings=""):
    """Whether two state dicts hold the same tensors, bit for bit, under keys with these endings."""
    keys = [key for key in a if key.endswith(endings)]
    assert keys
    return a.keys() == b.keys() and all(torch.equal(a[key].cpu(), b[key].cpu()) for key in keys)


# ------------------------------------------------------------------------------ main_TD


def run_TD(folder, *flags):
    main_TD.main([*TINY, "--iter_epochs", "1", "--save_dir", str(folder), *flags])
    return results(folder)


def test_TD_follows_the_curriculum(tmp_path, monkeypatch):
    retrained, real = [], main_TD.retrain

    def retrain(model, task, data, run, step, optimizer):
        retrained.append((task.t, step, optimizer))
        return real(model, task, data, run, step, optimizer=optimizer)

    monkeypatch.setattr(main_TD, "retrain", retrain)
    started = starts(monkeypatch, main_TD)
    run = run_TD(tmp_path, "--prune_scheduler", "1,0,3")
    states = run["states"]
    assert [row["state"] for row in states] == [1, 2, 3, 4]
    assert [len(row["accuracy"]) for row in states] == [1, 2, 3, 3]
    # each is tested before its own prunings
    assert [round(row["density"], 1) for row in states] == [100, 80, 80, 41]
    assert [round(row["ticket_density"], 1) for row in states[:3]] == [80, 80, 41]
    # s_t - 1 retrainings, one optimizer for the state
    assert [(t, step) for t, step, _ in retrained] == [(3, "task3_prune1"), (3, "task3_prune2")]
    assert retrained[0][2] is retrained[1][2]
    assert retrained[0][2].param_groups[0]["lr"] == pytest.approx(0.01 / 100)
    # rewound to the initialisation, convolutions alone, also where nothing was pruned
    initial = utils.read_state(tmp_path / "task0_checkpoint_weight.pt")
    convolutions = [key for key, value in initial.items() if value.ndim == 4]
    for number, start in enumerate(started[1:], start=2):
        for key in convolutions:
            assert torch.equal(
                start[key.replace(".weight", ".weight_orig")].cpu(), initial[key].cpu()
            )
        last = utils.read_state(tmp_path / f"task{number - 1}_checkpoint.pt")
        kept = [key for key in last if "bn" in key or "linear" in key]
        if number < 4:  # no retraining in between
            assert all(torch.equal(start[key].cpu(), last[key].cpu()) for key in kept)
    # masks only shrink
    masks = [ones(best(tmp_path, f"task{t}")) for t in (2, 3, 4)]
    for earlier, later in zip(masks, masks[1:]):
        assert all(bool((later[name] <= earlier[name]).all()) for name in earlier)
    # the summary takes the result for task T's row
    matrix = [states[i]["accuracy"] for i in (0, 1, 3)]
    assert run["average_incremental_accuracy"] == utils.average_incremental_accuracy(matrix)
    assert run["forgetting"] == utils.forgetting(matrix)
    assert (tmp_path / "data" / "task2_img.npy").exists()


def test_TD_prunes_the_last_model_and_teaches_with_the_best(tmp_path, monkeypatch):
    let_accuracies_fall(monkeypatch)
    seen, real = {"taught": [], "pruned": []}, (main_TD.teaching.teach, main_TD.prune_state)

    def teach(model, data, run, t):
        seen["taught"].append(pruning_utils.clone_state(model))
        return real[0](model, data, run, t)

    def prune_state(model, *rest):
        seen["pruned"].append(pruning_utils.clone_state(model))
        return real[1](model, *rest)

    monkeypatch.setattr(main_TD.teaching, "teach", teach)
    monkeypatch.setattr(main_TD, "prune_state", prune_state)
    run_TD(tmp_path, "--prune_scheduler", "1,1,1")
    for t in (1, 2):
        assert same(seen["taught"][t - 1], best(tmp_path, f"task{t}"))
        last = utils.read_state(tmp_path / f"task{t}_checkpoint.pt")
        assert same(seen["pruned"][t - 1], last) and not same(seen["taught"][t - 1], last)


def test_TD_is_the_same_twice_and_with_another_seed_not(tmp_path):
    flags = ["--prune_scheduler", "2,1,1", "--rewind", "rand"]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run_TD(tmp_path / name, *flags, "--seed", seed)
    a, b, c = (best(tmp_path / name, "task4") for name in "abc")
    assert same(a, b) and not same(a, c)
    rows = [results(tmp_path / name)["states"] for name in "ab"]
    for row in [*rows[0], *rows[1]]:
        row.pop("seconds"), row["training"].pop("images_per_second")
    assert rows[0] == rows[1]


def test_TD_in_bf16_leaves_files_in_fp32(tmp_path, monkeypatch):
    real, seen = main_TD.make_model, set()

    def make_model(*given):
        made = real(*given)
        made.layer4.register_forward_hook(lambda layer, inputs, out: seen.add(out.dtype))
        return made

    monkeypatch.setattr(main_TD, "make_model", make_model)
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
def script_accuracies(monkeypatch):
    """Let main_BU's retraining return the given accuracies, without training."""

    def install(accuracies):
        left = iter(accuracies)
        monkeypatch.setattr(
            main_BU, "retrain", lambda *a, **k: SimpleNamespace(best=next(left))
        )  # StopIteration if it retrains more often

    return install


def bu_run(**changes):
    """A run of which its rounds need the arguments alone."""
    flags = {"percent": 0.2, "deacc": 2.0, "base_sparsity": 90.0, "max_iter_prun": 26}
    flags["select_on"] = "test"
    return SimpleNamespace(args=SimpleNamespace(**flags | changes), say=print)


def model():
    args = SimpleNamespace(
        classes_per_classifier=2, classifiers=3, width=4, seed=0, precision="fp32"
    )
    return trainer.make_model(args, torch.device("cpu"))


TASK, DATA = SimpleNamespace(t=1), SimpleNamespace(test={})


@pytest.mark.parametrize(
    ("accuracies", "prunings", "why"),
    [
        ([98] * 10 + [90], 10, "decayed and sparse after 11: the mask of 10"),
        ([90] * 11, 10, "decayed from the start, sparse enough only after 11 (91.4 %)"),
        ([98] * 10 + [97] * 2 + [90], 12, "decayed later"),
        ([96] * 11, 10, "a decay of exactly deacc is one"),
        ([97] * 26, 26, "never decayed: 26, the 27th undone unretrained"),
    ],
)
def test_BU_task_1_ticket(script_accuracies, accuracies, prunings, why):
    script_accuracies(accuracies)
    masks, state, rounds = main_BU.find_ticket(model(), TASK, DATA, bu_run(), 98.0)
    assert pruning_utils.density(masks) == pytest.approx(100 * 0.8**prunings, abs=0.02), why
    assert len(rounds) == len(accuracies)
    assert all(torch.equal(m, masks[n]) for n, m in pruning_utils.extract_mask(state).items())


def test_BU_without_any_ticket_is_an_error(script_accuracies):
    script_accuracies([50])
    with pytest.raises(utils.Refusal, match="--percent 0.95"):
        main_BU.find_ticket(model(), TASK, DATA, bu_run(percent=0.95), 98.0)


@pytest.mark.parametrize(
    ("accuracies", "prunings", "changes", "why"),
    [
        ([98] * 26, 26, {}, "never decayed: 26"),
        ([90] * 13, 13, {"base_sparsity": 85}, "decayed all along: the 14th would be too sparse"),
        ([98] * 17 + [90], 17, {"base_sparsity": 85}, "decayed after 18: the state before it"),
        ([98] * 17 + [96], 18, {"base_sparsity": 85}, "a decay of exactly deacc: remembered first"),
        ([90], 1, {"base_sparsity": 10}, "decayed after the first: that one"),
        ([90] * 26, 26, {}, "the mask is denser than 10 %: always 26"),
    ],
)
def test_BU_regrowth(script_accuracies, accuracies, prunings, changes, why):
    net = model()
    full = pruning_utils.masks_of(net)
    current = full
    for _ in range(10):
        current = pruning_utils.prune(pruning_utils.weights(net), current, 0.2)
    kept = pruning_utils.density(current)  # 10.74 %
    script_accuracies(accuracies)
    task = SimpleNamespace(t=2)
    masks, state, rounds = main_BU.regrow(net, task, DATA, bu_run(**changes), 98.0, current)
    expected = kept + (100 - kept) * 0.8**prunings
    assert pruning_utils.density(masks) == pytest.approx(expected, abs=0.03), why
    assert len(rounds) == len(accuracies)
    assert all(bool((masks[name] >= current[name]).all()) for name in masks)
    assert all(torch.equal(m, masks[n]) for n, m in pruning_utils.extract_mask(state).items())


def run_BU(folder, *flags):
    main_BU.main(
        [*TINY, "--iter_epochs", "1", "--max_iter_prun", "3", "--save_dir", str(folder), *flags]
    )
    return results(folder)


@pytest.mark.parametrize("accept", ["-1000", "1000"])
def test_BU_regrows_or_keeps_its_mask(tmp_path, monkeypatch, accept):
    """--accept_decay -1000 makes every task re-grow, 1000 none."""
    started = starts(monkeypatch, main_BU)
    run = run_BU(tmp_path, "--accept_decay", accept, "--base_sparsity", "50")
    states, regrown = run["states"], accept == "-1000"
    assert [row["state"] for row in states] == [1, 2, 3]
    assert [row.get("regrown") for row in states] == [None, regrown, regrown]
    assert [len(row["dense_accuracy"]) for row in states] == [1, 2, 3]
    # dense, and again under the mask, both from the dense best model of the task before
    assert len(started) == 5
    for t in (2, 3):
        previous = best(tmp_path, f"task{t - 1}")
        assert same(started[2 * t - 3], previous)
        assert same(pruning_utils.dense_state(started[2 * t - 2]), previous)
        masked = utils.read_state(tmp_path / f"task{t}_best_prun_model.pt")
        mask = pruning_utils.load_masks(tmp_path / f"mask-{t - 1}.pt")
        assert all(torch.equal(m, mask[n]) for n, m in pruning_utils.extract_mask(masked).items())
        assert not pruning_utils.extract_mask(best(tmp_path, f"task{t}"))
        assert states[t - 1]["density"] == states[t - 2]["ticket_density"]
        grown = pruning_utils.load_masks(tmp_path / f"mask-{t}.pt")
        assert all(bool((grown[name] >= mask[name]).all()) for name in mask)
        assert (pruning_utils.density(grown) > pruning_utils.density(mask)) == regrown
        assert (tmp_path / f"task{t}_prune_weight.pt").exists() == regrown
    last = utils.read_state(tmp_path / "current_mask.pt")
    assert same(last, utils.read_state(tmp_path / "mask-3.pt"))
    assert set(last["layer1.0.conv1.weight_mask"].unique().tolist()) <= {0.0, 1.0}
    assert last["layer1.0.conv1.weight_mask"].dtype == torch.float32
    state = utils.read_state(tmp_path / "task1_prune_weight.pt")  # a raw state dict, retrained
    mask = pruning_utils.load_masks(tmp_path / "mask-1.pt")
    assert all(torch.equal(m, mask[n]) for n, m in pruning_utils.extract_mask(state).items())


@pytest.mark.parametrize("select_on", ["test", "val"])
def test_BU_chooses_on_the_images_it_is_told_to(tmp_path, monkeypatch, select_on):
    """The retraining rounds are judged on the part that --select_on names, others never."""
    parts, real = [], main_BU.retrain

    def retrain(model, task, data, args, step, part):
        parts.append("test" if part is data.test else "val" if part is data.val else None)
        return real(model, task, data, args, step, part=part)

    monkeypatch.setattr(main_BU, "retrain", retrain)
    reads = []
    real_test = main_BU.test
    monkeypatch.setattr(
        main_BU, "test", lambda m, part, *r: (reads.append(part), real_test(m, part, *r))[1]
    )
    run_BU(tmp_path, "--select_on", select_on, "--accept_decay", "-1000")
    assert set(parts) == {select_on}
    assert len({id(part) for part in reads}) == (2 if select_on == "val" else 1)


# ------------------------------------------------------------------------------ main_train, test


def test_a_ticket_is_retrained_and_tested(tmp_path, monkeypatch, capsys):
    """The task-rewound ticket: BU's mask of task 2 on the dense weights of task 1."""
    run_BU(tmp_path, "--accept_decay", "-1000")
    before = (tmp_path / "results.json").read_bytes()
    weight, mask = tmp_path / "task1_best_model.pt", tmp_path / "mask-2.pt"
    started = starts(monkeypatch, main_train)
    paths = ["--save_dir", str(tmp_path), "--mask", str(mask), "--state", "2"]
    main_train.main([*TINY, *paths, "--weight", str(weight)])
    assert same(pruning_utils.dense_state(started[0]), best(tmp_path, "task1"))
    run = results(tmp_path, "retrain_task2_results.json")
    masks = pruning_utils.load_masks(mask)
    assert run["states"][0]["density"] == pruning_utils.density(masks)
    assert (tmp_path / "results.json").read_bytes() == before  # that is main_BU's
    assert (tmp_path / "retrain_task2_checkpoint.pt").exists()
    tested = test_script.main(
        [*TINY, "--pretrained", str(tmp_path / "retrain_task2_best_model.pt"), "--pruned"]
        + ["--state", "2", "--save_dir", str(tmp_path / "tested")]
    )
    assert tested["states"][0]["accuracy"] == run["states"][0]["accuracy"]
    assert tested["states"][0]["density"] == run["states"][0]["density"]
    assert (
        results(tmp_path / "tested", "test_retrain_task2_best_model_results.json")["script"]
        == "test"
    )

    # a pruned W is taken whole and loses its own mask; a pruned checkpoint will do for M
    pruned = tmp_path / "task2_best_prun_model.pt"
    paths[1], paths[3] = str(tmp_path / "again"), str(tmp_path / "retrain_task2_best_model.pt")
    data = ["--save_data_path", str(tmp_path / "data")]
    main_train.main([*TINY, *paths, *data, "--weight", str(pruned)])
    whole = pruning_utils.dense_state(utils.read_state(pruned))
    assert same(pruning_utils.dense_state(started[1]), whole)
    own = pruning_utils.extract_mask(started[1])
    assert all(torch.equal(own[name].cpu(), masks[name]) for name in masks)

    # report.py: a row for each run, the numbers of results.json
    capsys.readouterr()
    report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| BU " in printed and "| TR-BU     | 2    | the ticket |" in printed
    assert f"{results(tmp_path)['states'][2]['mean']:.1f}" in printed
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_last_task_is_tested_unless_another_is_named(tmp_path):
    """That of the run, here of three tasks, not 5."""
    run = main_CIL.main([*TINY, "--save_dir", str(tmp_path)])
    tested = test_script.main([*TINY, "--pretrained", str(tmp_path / "task3_best_model.pt")])
    assert tested["states"][0]["state"] == 3
    assert tested["states"][0]["accuracy"] == run["states"][2]["accuracy"]


def test_task_1_is_retrained_without_soft_labels(tmp_path):
    main_CIL.main([*TINY, "--save_dir", str(tmp_path / "cil")])
    masks = pruning_utils.prune(
        pruning_utils.weights(model()), pruning_utils.masks_of(model()), 0.5
    )
    pruning_utils.save_masks(tmp_path / "mask.pt", masks)
    weight = tmp_path / "cil" / "task1_best_model.pt"
    flags = ["--weight", str(weight), "--mask", str(tmp_path / "mask.pt"), "--state", "1"]
    run = main_train.main([*TINY, *flags, "--save_dir", str(tmp_path / "out")])
    assert run["states"][0]["density"] == pytest.approx(50, abs=0.01)
    assert not (tmp_path / "out" / "data").exists()


def test_report_puts_the_result_of_TD_at_task_T(tmp_path):
    run = run_TD(tmp_path, "--prune_scheduler", "1,1,1")
    (group,) = report.group(report.read(tmp_path))
    assert [*group["accuracy"]] == [1, 2, 3]
    assert group["accuracy"][3] == {0: pytest.approx(run["states"][3]["mean"])}
    assert [round(density[0], 1) for density in group["density"].values()] == [80, 64, 51.2]


# ------------------------------------------------------------------------------ bad input


@pytest.fixture
def files(tmp_path):
    """A dense and a pruned checkpoint of the tiny network, a mask file, and what is neither."""
    net = model()
    utils.save(tmp_path / "dense.pt", {"state_dict": net.state_dict()})
    masks = pruning_utils.prune(pruning_utils.weights(net), pruning_utils.masks_of(net), 0.5)
    pruning_utils.save_masks(tmp_path / "mask.pt", masks)
    bad = {name: mask * 0.5 for name, mask in masks.items()}
    pruning_utils.save_masks(tmp_path / "half.pt", bad)
    pruning_utils.apply_mask(net, masks)
    utils.save(tmp_path / "pruned.pt", net.state_dict())
    (tmp_path / "text.pt").write_text("not a checkpoint")
    return tmp_path


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        (main_CIL, "--dataset mnist", "--dataset mnist"),
        (main_CIL, "--device tpu", "--device tpu"),
        (main_CIL, "--device cuda:99", "--device cuda:99"),
        (main_CIL, "--dataset cifar10 --data {d}/none", "--data {d}/none"),
        (main_CIL, "--dataset cifar10 --data {d}", "--data {d}"),
        (main_CIL, "--dataset digits --data {d}", "--data"),
        (main_CIL, "--classifiers 6", "--classifiers 6"),
        (main_CIL, "--batch_size 8", "--batch_size 8"),
        (main_CIL, "--epochs 0", "--epochs"),
        (main_CIL, "--epochs many", "--epochs"),
        (main_CIL, "--lr 0", "--lr"),
        (main_CIL, "--lr nan", "--lr"),
        (main_CIL, "--momentum 1", "--momentum"),
        (main_CIL, "--decreasing_lr 6;8", "--decreasing_lr"),
        (main_CIL, "--width 0", "--width"),
        (main_CIL, "--precision fp16", "--precision"),
        (main_CIL, "--no_such_flag 1", "--no_such_flag"),
        (main_TD, "--prune_scheduler 1,1,3,4,5", "--prune_scheduler 1,1,3,4,5"),
        (main_TD, "", "--prune_scheduler 1,1,2,3,5"),
        (main_TD, "--prune_scheduler 1,-1,2", "--prune_scheduler"),
        (main_TD, "--prune_scheduler 1,1,1 --rewind back", "--rewind"),
        (main_TD, "--prune_scheduler 1,1,1 --percent 1", "--percent"),
        (main_BU, "--select_on train", "--select_on"),
        (main_BU, "--max_iter_prun 0", "--max_iter_prun"),
        (main_BU, "--base_sparsity 100", "--base_sparsity"),
        (main_train, "--mask {d}/mask.pt --state 1", "--weight"),
        (main_train, "--weight {d}/dense.pt --state 1", "--mask"),
        (main_train, "--weight {d}/dense.pt --mask {d}/dense.pt --state 1", "{d}/dense.pt"),
        (main_train, "--weight {d}/dense.pt --mask {d}/half.pt --state 1", "{d}/half.pt"),
        (main_train, "--weight {d}/mask.pt --mask {d}/mask.pt --state 1", "--weight {d}/mask.pt"),
        (main_train, "--weight {d}/dense.pt --mask {d}/mask.pt --state 4", "--state 4"),
        (main_train, "--weight {d}/dense.pt --mask {d}/mask.pt --state 0", "--state"),
        (main_train, "--weight {d}/dense.pt --mask {d}/mask.pt --state 2", "task1_img.npy"),
        (main_train, "--weight {d}/none.pt --mask {d}/mask.pt --state 1", "{d}/none.pt"),
        (main_train, "--width 8 --weight {d}/dense.pt --mask {d}/mask.pt --state 1", "--width 8"),
        (test_script, "--pretrained {d}/text.pt --state 3", "{d}/text.pt"),
        (test_script, "--pretrained {d} --state 3", "{d}"),
        (test_script, "--pretrained {d}/dense.pt --state 3 --width 8", "--width 8"),
        (test_script, "--pretrained {d}/dense.pt --state 3 --classifiers 4", "--classifiers"),
        (test_script, "--pretrained {d}/dense.pt --state 3 --pruned", "--pruned"),
        (test_script, "--pretrained {d}/pruned.pt --state 3", "--pruned"),
        (test_script, "--pretrained {d}/dense.pt --state 5", "--state 5"),
        (test_script, "--pretrained {d}/mask.pt --pruned --state 3", "{d}/mask.pt"),
        (report, "", "RUN_DIR"),
        (report, "{d}", "{d}"),
    ],
)
def test_bad_input_is_one_clear_line(files, monkeypatch, script, flags, named):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    argv = flags.format(d=files).split()
    if script is not report:
        argv = [*TINY, "--save_dir", str(files / "run"), *argv]
    with pytest.raises(utils.Refusal) as refusal:
        script.main(argv)
    message = str(refusal.value)
    assert named.format(d=files) in message
    assert "\n" not in message
    assert sorted(files.rglob("*")) == before  # nothing was written


SCRIPTS = [main_TD, main_BU, main_CIL, main_train, test_script, report, dataset, reproduce]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_how_to_use_it(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    assert f"python {script.__name__}.py" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_refusal_as_a_user_sees_it(script, tmp_path):
    """In a process of its own: one line on stderr, status 2."""
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), "--bad"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith(f"{script.__name__}.py: ")


# ------------------------------------------------------------------------------ memory


def test_scripts_let_the_C_library_keep_what_is_freed(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda option, value: asked.append(option))
    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: library)
    assert utils.run(lambda: list(asked)) == [-4, -1]  # before main: M_MMAP_MAX, M_TRIM_THRESHOLD


def no_library(name):
    raise OSError("no such library")


@pytest.mark.parametrize("load", [no_library, lambda name: SimpleNamespace()])
def test_where_the_C_library_has_no_such_thing_scripts_run_all_the_same(monkeypatch, load):
    monkeypatch.setattr(utils.ctypes, "CDLL", load)
    assert utils.run(lambda: "ran") == "ran"
