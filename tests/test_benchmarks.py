"""The benchmark compares equals: its published way computes what ours does."""

import copy
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import dataset
import main_CIL
import pruning_utils
import teaching
import trainer
from runtime import threads
from runtime.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import batchnorm
import bench
import machine
import precision
import profile_step
import published
import shrink

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture
def pair(args):
    """Our network and the published one, both float64 and equal, with their optimizers."""
    ours = trainer.make_model(args, torch.device("cpu")).double().train()
    plain = published.plain(copy.deepcopy(ours))
    scores = pruning_utils.magnitude(pruning_utils.weights(ours), None)
    masks = pruning_utils.prune(scores, pruning_utils.masks_of(ours), 0.3)
    for model in (ours, plain):
        pruning_utils.apply_mask(model, masks)
    return ours, plain, *(trainer.make_optimizer(model, args, 0.01) for model in (ours, plain))


def assert_same_state(ours, plain):
    expected = plain.state_dict()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(
            value, expected[key], **CLOSE, msg=lambda m, key=key: f"{key} {m}"
        )


def test_plain_moves_the_strides_into_the_shortcuts(pair):
    for layer in (pair[1].layer2, pair[1].layer3, pair[1].layer4):
        assert layer[0].shortcut[0].stride == (2, 2) and layer[0].stride == 1
    assert pair[0].layer2[0].shortcut[0].stride == (1, 1)


def test_training_steps(pair):
    ours, plain, optimizer, plain_optimizer = pair
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, 16, 16).double(), torch.randint(2, (5,))
    loss, _ = trainer.task1_loss(ours, x, y)
    bench.descend(optimizer, loss)
    assert published.task1_step(plain, plain_optimizer, x, y) == pytest.approx(loss.item(), 1e-9)
    assert_same_state(ours, plain)
    batches = [(torch.randn(n, 3, 16, 16).double(), torch.randint(4, (n,))) for n in (6, 2, 4)]
    batches.append((torch.randn(6, 3, 16, 16).double(), *torch.randn(2, 6, 4).double()))
    loss, _ = trainer.kd_loss(ours, 3, 6, batches)
    bench.descend(optimizer, loss)
    expected = published.kd_step(plain, plain_optimizer, 3, 6, *batches)
    assert expected == pytest.approx(loss.item(), 1e-9)
    assert_same_state(ours, plain)


def test_query():
    features = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    both = [run(features[:7], features[7:], 9) for run in (teaching.query, published.query)]
    assert torch.equal(*both)


def test_two_prunings(args):
    ours = trainer.make_model(args, torch.device("cpu"))
    plain = copy.deepcopy(ours)
    for _ in range(2):
        published.prune(plain, 0.2)
        bench.prune_once(ours)
    found, expected = pruning_utils.masks_of(ours), pruning_utils.masks_of(plain)
    assert 63 < pruning_utils.density(found) < 65
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_validation(args, data):
    model = trainer.make_model(args, torch.device("cpu"))
    images, labels = data.of_tasks(data.val, 1, 2)
    part = published.Images(images, labels, data, augmented=False)
    plain = published.plain(copy.deepcopy(model))
    expected = published.validate(plain, part, 2, 10, torch.device("cpu"))
    task = trainer.make_task(data, 2, None)
    assert trainer.validate(model, data.val, task, args) == pytest.approx(expected)


def test_published_images_without_augmentation_are_ours(data):
    images, labels = data.of_tasks(data.val, 1, 1)
    plain = published.Images(images, labels, data, augmented=False)
    x = torch.stack([plain[i][0] for i in range(len(plain))])
    torch.testing.assert_close(x, dataset.normalize(images, data), rtol=0, atol=1e-6)


def test_a_published_epoch(args, data, monkeypatch):
    """Each sub-batch has its own classes; the short sets start over within the epoch."""
    t, sub, seen = 3, 6, []
    step = published.kd_step

    def recorded(model, optimizer, k, sub, *batches):
        seen.append([len(batch[0]) for batch in batches])
        new, old = batches[1][1], batches[2][1]
        assert set(new.tolist()) <= {4, 5} and set(old.tolist()) <= {0, 1, 2, 3}
        return step(model, optimizer, k, sub, *batches)

    monkeypatch.setattr(published, "kd_step", recorded)
    model = published.plain(trainer.make_model(args, torch.device("cpu")))
    optimizer = trainer.make_optimizer(model, args, 0.01)
    task = trainer.make_task(data, t, None)
    parts = [published.Images(*part, data, True) for part in (task.random, task.new, task.old)]
    for part in parts:  # the tests' images are smaller than CIFAR-10's
        part.transform.transforms[1].size = (16, 16)
    queried = published.Queried(torch.randn(9, 3, 16, 16), *torch.randn(2, 9, 4))
    cpu = torch.device("cpu")
    losses = list(published.kd_epoch(model, optimizer, t, sub, *parts, queried, cpu))
    random = len(task.random[0])
    assert len(losses) == -(-random // sub)
    assert [sizes[0] for sizes in seen] == [sub] * (random // sub) + [random % sub] * (
        random % sub > 0
    )
    assert {sizes[1] for sizes in seen} <= {2, len(task.new[0]) % 2 or 2}
    assert [sizes[3] for sizes in seen[:3]] == [6, 3, 6]


def test_an_epoch_is_estimated_from_its_first_steps(monkeypatch):
    done, seconds = [], iter([5.0, 6.0])

    def timed(device, work):
        work()
        return next(seconds)

    monkeypatch.setattr(bench, "timed", timed)
    batches = (done.append(i) for i in range(100))
    # 5 s for the first step, 6 s for three more, so 2 s for each of the other nine
    assert bench.epoch_seconds(torch.device("cpu"), 10, 4, batches) == 5 + 9 * 2
    assert done == [0, 1, 2, 3]


def test_benchmark_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Two rows, each way in its own process, printed and written, and not measured again."""
    out = tmp_path / "bench.json"
    flags = ["--device", "cpu", "--width", "1", "--repeats", "1", "--out", str(out)]
    bench.main([*flags, "--rows", "kd_step,prune"])
    results = json.loads(out.read_text())
    assert results["torch"] == torch.__version__ and results["device"].startswith("cpu")
    steps, prunings = results["rows"]
    assert (steps["name"], prunings["name"]) == ("kd_step", "prune")
    for kind in ("fp32", "bf16"):
        assert steps[f"ratio_{kind}"] == steps["published_s"] / steps[f"ours_{kind}_s"] > 0
    assert prunings["ours_bf16_s"] is prunings["ratio_bf16"] is None
    assert steps["images"] == 64 + 21 + 42 + 64 and prunings["images"] is None
    printed = capsys.readouterr().out.splitlines()[-2:]
    assert printed[0].startswith("| kd_step |")

    def measure(name, width, *_):
        raise UserError(f"{name} at width {width}")

    monkeypatch.setattr(bench, "measure", measure)
    bench.main([*flags, "--rows", "prune,kd_step"])
    assert capsys.readouterr().out.splitlines()[-2:] == printed[::-1]
    for more, message in (
        (["--rows", "kd_step,query"], "query at width 1"),
        (["--width", "2"], "another device, PyTorch or width"),
    ):
        with pytest.raises(UserError, match=message):
            bench.main([*flags, *more])
    assert json.loads(out.read_text()) == results


def test_the_table_of_profiles():
    """The ratio is to the eager step; a GPU's kernels, a CPU's operators, and why there is none."""
    eager = {"precision": "fp32", "way": "eager", "seconds": 0.02, "first_seconds": 3.0}
    cuda = {"kernel_seconds": 0.005, "kernels": 700, "launches": 650}
    graph = eager | cuda | {"way": "graph", "seconds": 0.01}
    failed = {"precision": "bf16", "way": "compile", "failed": "no | compiler"}
    table = profile_step.table([eager | {"shares": {"aten::mm": 0.5}}, graph, failed])
    assert table.splitlines()[2:] == [
        "| fp32 | eager | 20.00 ms | 9550 | 1.00 | 3.0 s | 50 % aten::mm |",
        "| fp32 | graph | 10.00 ms | 19100 | 2.00 | 3.0 s | 50 % in 700 kernels; 650 launches |",
        "| bf16 | compile |  |  |  |  | failed: no \\| compiler |",
    ]


def test_rows_of_the_machine_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Whether they run and what they report; how large the figures are depends on the machine."""
    monkeypatch.setattr(machine, "SECONDS", 0.2)
    monkeypatch.setattr(threads, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(machine, "POLICIES", {"ours": {}})
    monkeypatch.setattr(machine, "STARTS", {"numpy": ["-c", "import numpy"], "bare": ["-c", ""]})
    out = tmp_path / "bench.json"
    flags = ["--device", "cpu", "--width", "1", "--repeats", "1", "--out", str(out)]
    bench.main([*flags, "--rows", "busy,start,memory"])
    busy, start, memory = (row["figures"] for row in json.loads(out.read_text())["rows"])
    assert len(busy) == 3 and min(value for ((value,),) in busy.values()) > 0
    assert 5 < start["bare"][0][1] < start["numpy"][0][1] < 200  # MB
    assert 0.2 < memory["all of main_TD, ours"][0][0] < 4  # GiB; its data alone takes 0.2
    assert "| start | numpy | " in capsys.readouterr().out


def test_overlap_and_comparison_of_runs(tmp_path, capsys):
    """Two runs whose masks overlap in part; a folder without a run."""
    for kind, share in (("fp32", [1, 1, 1, 0]), ("bf16", [0, 1, 1, 1])):
        folder = tmp_path / kind
        pruning_utils.save_masks(folder / "task2_best_model.pt", {"conv1": torch.tensor(share)})
        results = {
            "script": "main_TD",
            "config": {
                "precision": kind,
                "seed": 0,
                "dataset": "digits",
                "width": 1,
                "classifiers": 1,
            },
            "states": [
                {"state": t, "accuracy": [mean], "mean": mean, "density": 50.0}
                for t, mean in ((1, 90.0), (2, 70.0))
            ],
            "average_incremental_accuracy": 80.0,
        }
        (folder / "results.json").write_text(json.dumps(results))
    precision.main([str(tmp_path / "fp32"), str(tmp_path / "bf16")])
    output = capsys.readouterr().out
    assert "one seed in both: 50.00 %" in output  # 2 in both of 4 in either
    assert "fp32, 1 seed(s): mean accuracy by state 90.0 | 70.0; average 80.0" in output
    with pytest.raises(UserError, match="no results.json"):
        precision.main([str(tmp_path)])
    del results["average_incremental_accuracy"]
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="no finished run"):
        precision.main([str(folder)])


def test_other_statistics_of_a_run(tmp_path, capsys):
    """`running` is what the run recorded; the others are recomputed from their images."""
    flags = "--dataset digits --classifiers 2 --width 4 --epochs 4 --batch_size 32 --device cpu"
    folder = str(tmp_path / "run")
    more = ["--lr", "0.05", "--no_teaching", "--save_dir", folder]
    states = main_CIL.main([*flags.split(), *more])["states"]
    (found,) = batchnorm.main([folder, "--device", "cpu"])
    assert found["running"] == tuple(states[1]["accuracy"][::-1])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]] == [*found]
    data, model, _, _ = batchnorm.read(folder, Namespace(data=None, device="cpu"))
    few = {c: images[:100] for c, images in data.train.items()}
    tested = {}
    for name, tasks in {"balanced": (1, 2), "new": (2, 2), "old": (1, 1)}.items():
        batchnorm.use_statistics(model, data.of_tasks(few, *tasks)[0], data)
        tested[name] = trainer.evaluate(model, data.test, 2, data, 32)["accuracy"]
    assert found["balanced"] == tuple(tested["balanced"][::-1])
    assert found["new"] == tuple(tested["new"][::-1])
    assert found["own"] == (tested["new"][1], tested["old"][0])
    assert len({*found.values()}) == 4  # none is another's
    images = data.of_tasks(data.train, 1, 2)[0][:50]
    batchnorm.use_statistics(model, images, data)
    first = model.conv1(dataset.normalize(images, data))  # what layer1.0.bn1 normalizes
    mean, close = model.layer1[0].bn1.running_mean, {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(mean, first.mean((0, 2, 3)), **close)
    main_CIL.main(
        [*flags.replace("fiers 2", "fiers 1").split(), "--epochs", "1", "--save_dir", f"{folder}1"]
    )
    with pytest.raises(UserError, match="run1: give a finished run of main_CIL.py with two tasks"):
        batchnorm.main([f"{folder}1"])


def test_shrinking_from_the_command_line(tmp_path, capsys, monkeypatch):
    ticket = Path(__file__).parent.parent / "pretrained" / "BU_ticket.npz"
    monkeypatch.chdir(tmp_path)  # without a prepared set: random images
    quick = "--threads 1 --batch_sizes 1,2 --repeats 1 --seconds 1e-3"
    shrink.main([str(ticket), *quick.split()])
    first, head, _, *rows, last = capsys.readouterr().out.splitlines()
    assert "the same class for 500 of 500" in first and head.endswith("| threads 1, batch 2 |")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:5] for row in cells] == [
        ["BU_ticket.npz", "3.11", "masked", "700,762", "35.05 M"],
        ["BU_ticket.npz", "3.11", "folded", "700,410", "35.05 M"],
        ["BU_ticket.npz", "3.11", "shrunk", "124,384", "22.64 M"],
    ]
    assert all(float(cell.replace(",", "")) > 0 for row in cells for cell in row[5:])
    with pytest.raises(UserError, match="--batch_sizes: found '', give"):
        shrink.main([str(ticket), "--batch_sizes", ""])
    assert last.startswith("images/s; cpu")
