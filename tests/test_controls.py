"""The controls of a ticket: what each keeps of it and what it changes."""

import json

import pytest
import torch

import main_train
import pruning_utils
import trainer
import utils
from models import ResNet18
from models.base import dense_state
from runtime.args import CONTROLS
from runtime.checkpoint import read_weights, save_checkpoint

FLAGS = "--dataset digits --classifiers 3 --width 4 --epochs 1 --batch_size 48 --seed 3 --state 1"


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.fixture
def model():
    """A network whose BatchNorm has weights and statistics of its own, as after training."""
    torch.manual_seed(0)
    model = ResNet18(2, 3, 4)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "bn" in key and value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 1)
    return model


@pytest.fixture
def ticket(model):
    """Masks of 30 %."""
    scores = pruning_utils.magnitude(model)
    return pruning_utils.prune(scores, pruning_utils.masks_of(model), 0.7)


# ------------------------------------------------------------------------------ masks, weights


@pytest.mark.parametrize("shuffle", ["random_mask", "shuffle_mask"])
def test_all_positions_are_equally_likely(shuffle):
    """3 of 8 positions: each is drawn 3/8 of the time, within five standard deviations."""
    masks = {"conv": torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).view(2, 4, 1, 1)}
    draw = getattr(pruning_utils, shuffle)
    drawn = sum(draw(masks, utils.make_generator(0, i))["conv"] for i in range(1000)).flatten()
    assert drawn.sum() == 3000
    assert (drawn - 375).abs().max() < 5 * (1000 * 3 / 8 * 5 / 8) ** 0.5


def test_shuffled_weights_stay_in_their_layer(model, ticket):
    before = {name: w.clone() for name, w in pruning_utils.weights(model).items()}
    pruning_utils.shuffle_weights(model, ticket, utils.make_generator(0))
    for name, weight in pruning_utils.weights(model).items():
        left = ticket[name] == 1
        assert torch.equal(weight[~left], before[name][~left])
        assert torch.equal(weight[left].sort().values, before[name][left].sort().values)
        assert int((weight[left] != before[name][left]).sum()) > 0.5 * int(left.sum())


# ------------------------------------------------------------------------------ main_train


@pytest.fixture
def trained(tmp_path, monkeypatch, few_digits, model, ticket):
    """Run main_train with more flags; return its results and the state that it trained from."""
    save_checkpoint(tmp_path / "mask.pt", pruning_utils.mask_state(ticket))
    save_checkpoint(tmp_path / "weight.pt", model.state_dict())
    paths = [f"--{key}={tmp_path / key}.pt" for key in ("weight", "mask")]
    starts, train_epoch = [], trainer.train_epoch

    def recorded(model, *args):
        starts.append(pruning_utils.clone_state(model))
        return train_epoch(model, *args)

    monkeypatch.setattr(trainer, "train_epoch", recorded)

    def run(*flags, folder="out"):
        argv = [*FLAGS.split(), *paths, "--save_dir", str(tmp_path / folder), *flags]
        results = main_train.main(argv)
        return results, starts.pop() if starts else None

    return run


@pytest.mark.parametrize("control", CONTROLS)
def test_what_each_control_keeps(trained, model, ticket, control, tmp_path, args):
    results, start = trained("--control", control)
    (row,) = results["states"]
    masks = pruning_utils.extract_mask(start)
    assert results["config"]["control"] == control
    assert row["density"] == pruning_utils.density(masks)
    assert row["layer_density"] == pruning_utils.densities(masks)
    if control == "dense":
        assert masks == {} and row["density"] == 100
    else:
        assert all(bool(((m == 0) | (m == 1)).all()) for m in masks.values())
        assert sum(counts(masks).values()) == sum(counts(ticket).values())
        assert (counts(masks) == counts(ticket)) == (control != "random_mask")
        same_mask = all(torch.equal(masks[name], ticket[name]) for name in ticket)
        assert same_mask == (control in ("none", "reinit", "shuffle_weights"))
    found, own = dense_state(start), model.state_dict()
    convs = {f"{name}.weight" for name in pruning_utils.weights(model)}
    same = {key for key in own if torch.equal(found[key], own[key])}
    assert (convs <= same) == (control not in ("reinit", "shuffle_weights"))
    assert (own.keys() - convs <= same) == (control != "reinit")
    if control == "reinit":  # a network of its own, not the initialization of the run
        args.seed = 3
        assert not torch.equal(
            trainer.make_model(args, torch.device("cpu")).conv1.weight, found["conv1.weight"]
        )
        assert torch.equal(found["layer4.1.bn2.weight"], torch.ones(32))
    middle = "" if control == "none" else f"{control}_"
    names = {path.name.removeprefix(f"retrain_task1_{middle}") for path in tmp_path.glob("out/*")}
    wanted = {"results.json", "best_model.pt", "checkpoint.pt", "metrics.csv", "run.json"}
    assert names >= wanted | {"confusion.csv", "log_results.txt"}


def test_a_ticket_and_its_controls_share_a_folder(trained, tmp_path):
    ticket, _ = trained()
    control, _ = trained("--control", "shuffle_mask")
    repeated, start = trained()
    assert start is None and repeated["states"] == ticket["states"]  # it was finished
    stored = json.loads((tmp_path / "out" / "retrain_task1_results.json").read_text())
    assert stored["states"] == ticket["states"] != control["states"]
    known, state = read_weights(tmp_path / "out" / "retrain_task1_best_model.pt")
    assert (known["state"], known["width"], known["dataset"]) == (1, 4, "digits")
    assert (
        pruning_utils.densities(pruning_utils.extract_mask(state))
        == stored["states"][0]["layer_density"]
    )
