"""metrics.csv and TensorBoard's files: what a run keeps of its epochs."""

import sys

import pytest

import trainer
from runtime import epochs
from runtime.errors import UserError
from runtime.run import Run


def row(step, epoch, loss=1.0):
    return {"step": step, "epoch": epoch, "lr": 0.1, "loss": loss}


@pytest.mark.parametrize(
    ("before", "new", "expected"),
    [
        ([], ("a", 1), [("a", 1)]),
        ([("a", 1)], ("a", 2), [("a", 1), ("a", 2)]),
        ([("a", 1)], ("b", 1), [("a", 1), ("b", 1)]),
        ([("a", 1), ("a", 2), ("a", 3)], ("a", 2), [("a", 1), ("a", 2)]),
        ([("a", 1), ("a", 2), ("b", 1)], ("a", 1), [("a", 1), ("b", 1)]),
        ([("a", 1), ("b", 1)], ("a", 2), [("a", 1), ("a", 2), ("b", 1)]),
    ],
)
def test_repeated_epochs_replace_those_of_before(before, new, expected):
    rows = epochs.replace_epochs([row(*each) for each in before], row(*new, loss=2.0))
    assert [(each["step"], each["epoch"]) for each in rows] == expected
    assert [each["loss"] for each in rows].count(2.0) == 1


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.csv"
    assert epochs.read_epochs(path) == []
    rows = [row("task1", 1, 1 / 3) | {"accuracy": 50.0}, row('a,"b', 2, 1e-300)]
    epochs.save_epochs(path, rows)
    assert epochs.read_epochs(path) == rows


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "junk",
        lambda text: "x" + text,
        lambda text: text[:-9],
        lambda text: text.replace("task1,1", "task1,0"),
        lambda text: text.replace("task1,1", ",1"),
        lambda text: text.replace("task1,1", "task1,1" + "0" * 400),
        lambda text: text.replace("0.1", "nan"),
        lambda text: text.replace("0.1", "much"),
        lambda text: text + "\0",
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, damage):
    path = tmp_path / "metrics.csv"
    epochs.save_epochs(path, [row("task1", 1)])
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match="metrics.csv: is damaged; remove it"):
        epochs.read_epochs(path)


def train(args, data, device="cpu"):
    model = trainer.make_model(args, device)
    run = Run("test", args, data, model)
    trainer.train_task(model, trainer.make_task(data, 1, None), run, "task1")
    return run


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
