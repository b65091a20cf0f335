"""The benchmark compares equals: its published way computes what ours does."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import pruning_utils
import teaching
import trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import bench
import published


def test_training_steps(args):
    torch.manual_seed(0)
    ours = trainer.make_model(args, torch.device("cpu")).double().train()
    plain = published.plain(copy.deepcopy(ours))
    for model in (ours, plain):
        bench.prune_once(model)
    optimizers = [trainer.make_optimizer(model, args, 0.01) for model in (ours, plain)]
    x, y = torch.randn(5, 3, 16, 16).double(), torch.randint(2, (5,))
    parts = [(torch.randn(n, 3, 16, 16).double(), torch.randint(4, (n,))) for n in (6, 2, 4)]
    parts.append((torch.randn(6, 3, 16, 16).double(), *torch.randn(2, 6, 4).double()))
    loss, _ = trainer.task1_loss(ours, x, y)
    bench.descend(optimizers[0], loss)
    assert published.task1_step(plain, optimizers[1], x, y) == pytest.approx(loss.item(), 1e-9)
    unlabeled, *logits = parts[3]
    batch = trainer.Batch(*parts[:3], (unlabeled, *map(trainer.soften, logits)))
    loss, _ = trainer.kd_loss(ours, 3, 6, batch)
    bench.descend(optimizers[0], loss)
    expected = published.kd_step(plain, optimizers[1], 3, 6, *parts)
    assert expected == pytest.approx(loss.item(), 1e-9)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-9, atol=1e-11)


def test_query_and_two_prunings(args):
    features = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    both = [run(features[:7], features[7:], 9) for run in (teaching.query, published.query)]
    assert torch.equal(*both)
    ours = trainer.make_model(args, torch.device("cpu"))
    plain = copy.deepcopy(ours)
    for _ in range(2):
        published.prune(plain, 0.2)
        bench.prune_once(ours)
    found, expected = pruning_utils.masks_of(ours), pruning_utils.masks_of(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_benchmark_from_the_command_line(tmp_path, capsys, monkeypatch):
    """The ratios are those of its own times, printed and written."""
    narrow = {name: (row[0], 1, row[2], 1) for name, row in bench.ROWS.items()}
    monkeypatch.setattr(bench, "ROWS", narrow)
    out = tmp_path / "bench.json"
    flags = ["--device", "cpu", "--repeats", "1", "--out", str(out), "--rows", "kd_step", "prune"]
    bench.main(flags)
    steps, prunings = json.loads(out.read_text())["rows"]
    assert "fp32" in steps["ratio"] and steps["share"].keys() == steps["ratio"].keys()
    assert [*prunings["ratio"]] == ["fp32"] and not prunings["share"]
    assert 0 < steps["share"]["fp32"] < 100
    printed = capsys.readouterr().out
    for row in (steps, prunings):
        for way, ratio in row["ratio"].items():
            assert ratio == row["seconds"]["published"] / row["seconds"][way] > 0
            assert f" {ratio:.2f} " in printed
