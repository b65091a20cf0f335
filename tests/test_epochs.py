"""metrics.csv and TensorBoard's files: what a run keeps of its epochs."""

import sys

import pytest

import teaching
import trainer
from runtime import records
from runtime.errors import UserError
from runtime.run import Run


def train(args, data):
    model = trainer.make_model(args, data.pool.device)
    run = Run("test", args, data, model)
    trainer.train_task(model, teaching.build_task(data, args, 1), run, "task1", "task1")
    return run


def test_repeated_epochs_replace_those_of_before_and_are_read_as_written(args, data):
    run = Run("test", args, data, trainer.make_model(args, data.pool.device))
    run.done("a")
    for stage, epoch, loss in [("a", 1, 1 / 3), ("b", 1, 0.5), ("a", 2, 2.0), ("a", 2, 1e-300)]:
        run.record_epoch(stage, {"epoch": epoch, "lr": 0.1, "loss": loss}, images=9)
    rows = records.read_epochs(run.folder / "metrics.csv")
    assert rows == run.epochs
    assert [(row["stage"], row["epoch"], row["loss"]) for row in rows] == [
        ("a", 1, 1 / 3),
        ("b", 1, 0.5),
        ("a", 2, 1e-300),
    ]
    run.record_epoch("a", {"epoch": 1, "lr": 0.1, "loss": 4.0}, images=9)
    assert [(row["stage"], row["epoch"]) for row in run.epochs] == [("b", 1), ("a", 1)]


def test_tensorboard_shows_what_metrics_csv_holds(args, data):
    """Also after a run that repeats its epochs: none is there twice."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args.tensorboard = True
    train(args, data)
    args.overwrite = True
    run = train(args, data)
    found = events.EventAccumulator(str(run.folder / "tensorboard"))
    found.Reload()
    for name in ("loss", "random", "new", "accuracy", "lr", "images_per_second"):
        values = [(event.step, event.value) for event in found.Scalars(f"{name}/task1")]
        assert values == [(r["epoch"], pytest.approx(r[name], rel=1e-6)) for r in run.epochs]


def test_without_tensorboard_its_flag_is_an_error(args, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    args.tensorboard = True
    with pytest.raises(UserError, match="--tensorboard: TensorBoard is not installed; pip install"):
        train(args, data)
