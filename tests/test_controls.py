"""The controls of a ticket: what each keeps of it and what it changes."""

import json

import pytest
import torch

import main_BU
import main_train
import pruning_utils
import trainer
import utils
from models import ResNet18
from runtime.checkpoint import save_checkpoint
from runtime.cli import CONTROLS

CPU = torch.device("cpu")
FLAGS = "--dataset digits --classifiers 3 --width 4 --epochs 1 --batch_size 48 --seed 3"
TINY = FLAGS.split()


def network(seed):
    torch.manual_seed(seed)
    model = ResNet18(2, 3, 4)
    with torch.no_grad():  # as after training: BatchNorm has its own weights and statistics
        for key, value in model.state_dict().items():
            if "bn" in key and value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 1)
    return model


def ticket_of(model, share=0.3):
    scores = pruning_utils.magnitude(pruning_utils.weights(model), None)
    masks = pruning_utils.prune(scores, pruning_utils.masks_of(model), 1 - share)
    return {name: mask.cpu() for name, mask in masks.items()}


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def binary(masks):
    return all(bool(((m == 0) | (m == 1)).all()) for m in masks.values())


@pytest.fixture
def model():
    return network(0)


@pytest.fixture
def ticket(model):
    return ticket_of(model)


# ------------------------------------------------------------------------------ masks, weights


def test_a_random_mask_has_the_density_of_the_ticket(ticket):
    mask = pruning_utils.random_mask(ticket, utils.stream(0))
    assert binary(mask) and [*mask] == [*ticket]
    assert all(mask[name].shape == ticket[name].shape for name in ticket)
    assert sum(counts(mask).values()) == sum(counts(ticket).values())
    assert counts(mask) != counts(ticket)  # the density of each layer is left to chance
    random = torch.cat([m.flatten() for m in mask.values()])
    own = torch.cat([m.flatten() for m in ticket.values()])
    shared = int((random * own).sum()) / int(own.sum())
    assert 0.2 < shared < 0.4  # 30 % of weights drawn at random are in the ticket


def test_a_random_mask_is_equally_dense_in_all_layers(ticket):
    """The ticket is not: the densities of its layers span more than ten points."""
    own = pruning_utils.densities(ticket).values()
    assert max(own) - min(own) > 10
    mask = pruning_utils.random_mask(ticket, utils.stream(0))
    for name, density in pruning_utils.densities(mask).items():
        deviation = 100 * (0.3 * 0.7 / mask[name].numel()) ** 0.5
        assert abs(density - 30) < 5 * deviation


def test_a_shuffled_mask_has_the_density_of_each_layer(ticket):
    mask = pruning_utils.shuffle_mask(ticket, utils.stream(0))
    assert binary(mask) and counts(mask) == counts(ticket)
    assert all(mask[name].shape == ticket[name].shape for name in ticket)
    assert all(not torch.equal(mask[name], ticket[name]) for name in ticket)


@pytest.mark.parametrize("shuffle", ["random_mask", "shuffle_mask"])
def test_all_positions_are_equally_likely(shuffle):
    """3 of 8 positions: each is drawn 3/8 of the time, within five standard deviations."""
    masks = {"conv": torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).view(2, 4, 1, 1)}
    draw = getattr(pruning_utils, shuffle)
    drawn = sum(draw(masks, utils.stream(0, i))["conv"] for i in range(2000)).flatten()
    assert drawn.sum() == 6000
    assert (drawn - 750).abs().max() < 5 * (2000 * 3 / 8 * 5 / 8) ** 0.5


def test_shuffled_weights_stay_in_their_layer(model, ticket):
    before = {name: w.clone() for name, w in pruning_utils.weights(model).items()}
    rest = {k: v.clone() for k, v in model.state_dict().items() if "conv" not in k}
    pruning_utils.shuffle_weights(model, ticket, utils.stream(0))
    for name, weight in pruning_utils.weights(model).items():
        left = ticket[name] == 1
        assert torch.equal(weight[~left], before[name][~left])
        assert torch.equal(weight[left].sort().values, before[name][left].sort().values)
        moved = int((weight[left] != before[name][left]).sum())
        assert moved > 0.5 * int(left.sum())
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in rest.items() if "shortcut" not in k)


# ------------------------------------------------------------------------------ main_train


@pytest.fixture
def trained(tmp_path, monkeypatch, few_digits, model, ticket):
    """Run main_train with more flags; return its results and the state that it trained from."""
    pruning_utils.save_masks(tmp_path / "mask.pt", ticket)
    save_checkpoint(tmp_path / "weight.pt", model.state_dict())
    paths = [f"--{key}={tmp_path / key}.pt" for key in ("weight", "mask")]
    starts = []

    def recorded(model, *args):
        starts.append(pruning_utils.clone_state(model))
        return train_epoch(model, *args)

    train_epoch = trainer.train_epoch
    monkeypatch.setattr(trainer, "train_epoch", recorded)

    def run(*flags, folder="out"):
        results = main_train.main(
            [*TINY, *paths, "--state", "1", "--save_dir", str(tmp_path / folder), *flags]
        )
        return results, starts.pop() if starts else None

    return run


def same_rest(start, model):
    """Whether BatchNorm and heads are those of the model."""
    own, dense = model.state_dict(), pruning_utils.dense_state(start)
    names = {f"{name}.weight" for name in pruning_utils.weights(model)}
    return all(torch.equal(dense[key].cpu(), own[key]) for key in own if key not in names)


def same_weights(start, model):
    """Whether the convolution weights are those of the model, under a mask or not."""
    dense = pruning_utils.dense_state(start)
    own = pruning_utils.weights(model)
    return all(torch.equal(dense[f"{name}.weight"].cpu(), w) for name, w in own.items())


@pytest.mark.parametrize("control", CONTROLS)
def test_what_each_control_keeps(trained, model, ticket, control, tmp_path):
    results, start = trained("--control", control)
    masks = {name: m.cpu() for name, m in pruning_utils.extract_mask(start).items()}
    density = pruning_utils.density(ticket)
    row = results["states"][0]
    assert results["config"]["control"] == control
    assert row["density"] == (100 if control == "dense" else density)
    if control == "dense":
        assert masks == {} and row["layer_density"] == {}
    else:
        assert row["layer_density"] == pruning_utils.densities(masks)
        same_mask = all(torch.equal(masks[name], ticket[name]) for name in ticket)
        assert same_mask == (control in ("none", "reinit", "shuffle_weights"))
        assert (counts(masks) == counts(ticket)) == (control != "random_mask")
        assert sum(counts(masks).values()) == sum(counts(ticket).values())
    assert same_weights(start, model) == (control not in ("reinit", "shuffle_weights"))
    assert same_rest(start, model) == (control != "reinit")
    middle = "" if control == "none" else f"{control}_"
    names = {path.name for path in (tmp_path / "out").glob("*")}
    assert f"retrain_task1_{middle}results.json" in names
    assert f"retrain_task1_{middle}best_model.pt" in names


def test_reinit_is_not_the_initialization_of_the_run(trained, args):
    _, start = trained("--control", "reinit")
    args.classifiers, args.classes_per_classifier, args.seed = 3, 2, 3
    first = trainer.make_model(args, CPU)
    assert not same_weights(start, first)
    weight = pruning_utils.dense_state(start)["layer4.1.conv2.weight"]
    bound = (1 / (32 * 9)) ** 0.5  # PyTorch's default: uniform within 1/sqrt(fan_in)
    assert 0.99 * bound < weight.abs().max() <= bound
    assert torch.equal(start["layer4.1.bn2.weight"], torch.ones(32))


@pytest.mark.parametrize("control", ["random_mask", "shuffle_mask", "reinit", "shuffle_weights"])
def test_a_control_depends_on_the_seed(trained, control):
    _, start = trained("--control", control)
    _, same = trained("--control", control, folder="same")
    _, other = trained("--control", control, "--seed", "4", folder="other")
    assert all(torch.equal(start[key], same[key]) for key in start)
    assert any(not torch.equal(start[key], other[key]) for key in start)


def test_a_ticket_and_its_controls_share_a_folder(trained, tmp_path):
    ticket, _ = trained()
    control, _ = trained("--control", "shuffle_mask")
    repeated, start = trained()
    assert start is None and repeated == ticket  # it was finished, so nothing was trained
    stored = json.loads((tmp_path / "out" / "retrain_task1_results.json").read_text())
    assert stored["states"] == ticket["states"]
    best = [
        tmp_path / "out" / f"retrain_task1{name}_best_model.pt" for name in ("", "_shuffle_mask")
    ]
    masks = [pruning_utils.load_masks(path) for path in best]
    assert counts(masks[0]) == counts(masks[1])
    assert not all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert control["config"]["control"] == "shuffle_mask"


@pytest.mark.parametrize("control", ["none", "shuffle_mask", "reinit"])
def test_a_later_task_uses_the_soft_labels_of_the_run(tmp_path, few_digits, control):
    tiny = [*TINY, "--save_dir", str(tmp_path)]
    main_BU.main([*tiny, "--unlabel_num", "2", "--iter_epochs", "1", "--max_iter_prun", "2"])
    ticket = ["--weight", str(tmp_path / "task1_best_model.pt"), "--state", "2"]
    ticket += ["--mask", str(tmp_path / "mask-2.pt"), "--control", control]
    (row,) = main_train.main([*tiny, *ticket])["states"]
    assert row["density"] == pruning_utils.density(pruning_utils.load_masks(tmp_path / "mask-2.pt"))
    assert len(row["accuracy"]) == 2
