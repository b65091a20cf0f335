"""Masks against torch.nn.utils.prune and plain Python; what rewinding and loading leave behind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import main_TD
import pruning_utils
import trainer
import utils
from models import ResNet

CPU = torch.device("cpu")


def make(seed, width=4):
    """A small network in float64 with BatchNorm and heads as after some training."""
    torch.manual_seed(seed)
    model = ResNet(2, 3, width).double()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "bn" in key or "linear" in key:
                value.copy_(10 * torch.rand(value.shape) + 1)
    return model


def shake(*models, seed):
    """Add the same noise to the trained convolution weights of each model, as an epoch might."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for weight in pruning_utils.weights(model).values():
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.add_(noise * weight.std())


def random_masks(model, seed, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.rand(weight.shape, generator=generator) < share).float()
        for name, weight in pruning_utils.weights(model).items()
    }


def same(a, b):
    """Whether two dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_masks(a, b):
    """Masks may be of the weights' dtype in a model and are float32 outside."""
    return same({n: m.double() for n, m in a.items()}, {n: m.double() for n, m in b.items()})


def count(masks):
    return sum(int(mask.sum()) for mask in masks.values())


# ------------------------------------------------------------------------------ prune


def prune_by_torch(model, percent, current=True):
    """torch's own global pruning; current: rank the trained weights, not the cached product."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    trained = [conv.weight_orig if hasattr(conv, "weight_orig") else conv.weight for conv in convs]
    scores = {(conv, "weight"): weight.detach() for conv, weight in zip(convs, trained)}
    torch_prune.global_unstructured(
        [(conv, "weight") for conv in convs],
        torch_prune.L1Unstructured,
        importance_scores=scores if current else None,
        amount=percent,
    )
    return {
        name: m.weight_mask.clone() for name, m in model.named_modules() if isinstance(m, nn.Conv2d)
    }


@pytest.mark.parametrize("percent", [0.2, 0.37])
def test_prune_ranks_the_current_weights_as_torch_does(percent):
    ours = make(0)
    theirs, stale = copy.deepcopy(ours), copy.deepcopy(ours)
    lagged = []
    for number in range(5):
        shake(ours, theirs, stale, seed=number)
        masks = pruning_utils.prune(
            pruning_utils.weights(ours), pruning_utils.masks_of(ours), percent
        )
        assert same_masks(masks, prune_by_torch(theirs, percent))
        lagged.append(same_masks(masks, prune_by_torch(stale, percent, current=False)))
        pruning_utils.apply_mask(ours, masks)
    assert lagged == [True] + [False] * 4  # the published way would have been seen


def plain_prune(weights, masks, percent, kept):
    """One place after the other in plain Python; sorted() leaves ties in the model's order."""
    magnitude = [abs(v) for weight in weights.values() for v in weight.flatten().tolist()]
    mask = [v for part in masks.values() for v in part.flatten().tolist()]
    held = [v for part in kept.values() for v in part.flatten().tolist()]
    open_places = [i for i in range(len(mask)) if mask[i] and not held[i]]
    for i in sorted(open_places, key=magnitude.__getitem__)[: round(percent * len(open_places))]:
        mask[i] = 0.0
    parts = torch.tensor(mask).split([part.numel() for part in masks.values()])
    return {name: part.view_as(masks[name]) for name, part in zip(masks, parts)}


@pytest.mark.parametrize("coarse", [False, True])
def test_regrowth_ranks_only_what_lies_outside_the_kept_mask(coarse):
    """coarse: weights in steps of 0.1, so that nearly every threshold is a tie."""
    model = make(1)
    kept = pruning_utils.masks_of(model)
    for number in range(3):
        shake(model, seed=number)
        kept = pruning_utils.prune(pruning_utils.weights(model), kept, 0.4)
    masks = pruning_utils.masks_of(model)  # re-growth starts dense
    outside = count(masks) - count(kept)
    for number in range(4):
        shake(model, seed=10 + number)
        weights = pruning_utils.weights(model)
        if coarse:
            weights = {name: (10 * weight).round() / 10 for name, weight in weights.items()}
        expected = plain_prune(weights, masks, 0.2, kept)
        masks = pruning_utils.prune(weights, masks, 0.2, kept=kept)
        assert same(masks, expected)
        assert all(bool((masks[name] >= kept[name]).all()) for name in kept)
        outside -= round(0.2 * outside)
        assert count(masks) == count(kept) + outside


def layers(*values):
    """One layer for each list of numbers."""
    return {f"layer{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}


@pytest.mark.parametrize(
    "n, percent, dropped",
    [
        (5, 0.5, 2),  # 2.5: half to even
        (7, 0.5, 4),  # 3.5: half to even
        (3, 0.5, 2),  # 1.5
        (1, 0.5, 0),  # 0.5
        (10, 0.04, 0),
        (10, 0.06, 1),
        (10, 0.94, 9),
        (10, 0.96, 10),
        (40_000, 1e-5, 0),  # so little that nothing goes
        (9, 0.2, 2),  # 1.8
    ],
)
def test_the_count_is_pythons_round(n, percent, dropped):
    weights = {"a": torch.randn(n, generator=torch.Generator().manual_seed(n)), "b": torch.ones(3)}
    masks = {"a": torch.ones(n), "b": torch.zeros(3)}
    pruned = pruning_utils.prune(weights, masks, percent)
    assert n - count(pruned) == dropped
    gone, left = weights["a"].abs()[pruned["a"] == 0], weights["a"].abs()[pruned["a"] == 1]
    assert not len(gone) or not len(left) or gone.max() < left.min()


def test_of_equal_magnitudes_exactly_the_right_number_goes():
    weights = layers([2.0, -2.0, 1.0, 3.0], [[-2.0, 2.0], [2.0, -2.0]])
    masks = layers([1.0] * 4, [[1.0, 1.0], [1.0, 1.0]])
    expected = layers([0.0, 0.0, 0.0, 1.0], [[0.0, 1.0], [1.0, 1.0]])
    for _ in range(3):  # 4 of 8: the 1.0, and the first three of six equal ones
        assert same(pruning_utils.prune(weights, masks, 0.5), expected)
    kept = layers([1.0, 0.0, 0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]])
    expected = layers([1.0, 0.0, 0.0, 1.0], [[0.0, 0.0], [1.0, 1.0]])  # round(0.5 * 7) = 4
    assert same(pruning_utils.prune(weights, masks, 0.5, kept=kept), expected)


def test_nothing_is_dropped_twice():
    """Weights that are gone are not counted among the smallest, whatever their magnitude."""
    weights = layers([0.0, 9.0, 3.0, 4.0, 5.0, 6.0])
    masks = layers([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    expected = layers([0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    assert same(pruning_utils.prune(weights, masks, 0.5), expected)


def test_a_remaining_weight_of_zero_counts_as_any_other():
    weights, masks = layers([5.0, 0.0, -0.0, 1.0]), layers([1.0, 1.0, 1.0, 1.0])
    halved = pruning_utils.prune(weights, masks, 0.5)
    assert same(halved, layers([1.0, 0.0, 0.0, 1.0]))
    assert count(pruning_utils.prune(weights, masks, 0.25)) == 3


def test_masks_only_shrink_and_what_is_given_stays_as_it_was():
    model = make(2)
    masks = random_masks(model, 0)
    for number in range(4):
        shake(model, seed=number)
        weights = pruning_utils.weights(model)
        before = copy.deepcopy((weights, masks))
        pruned = pruning_utils.prune(weights, masks, 0.3)
        assert same(weights, before[0]) and same(masks, before[1])
        assert all(mask.dtype == torch.float32 for mask in pruned.values())
        assert all(bool((pruned[name] <= masks[name]).all()) for name in masks)
        assert count(pruned) == count(masks) - round(0.3 * count(masks))
        masks = pruned


def test_what_is_given_stays_as_it_was_also_in_a_single_layer():
    weights, masks = layers([-1.0, 2.0, -3.0, 4.0]), layers([1.0, 1.0, 0.0, 1.0])
    before = copy.deepcopy((weights, masks))
    assert same(pruning_utils.prune(weights, masks, 0.4), layers([0.0, 1.0, 0.0, 1.0]))
    assert same(weights, before[0]) and same(masks, before[1])


# ------------------------------------------------------------------------------ densities


def densities(weights, masks, percent, prunings, kept=None):
    """The masks of so many prunings in a row, and the density after each."""
    found = []
    for _ in range(prunings):
        masks = pruning_utils.prune(weights, masks, percent, kept=kept)
        found.append(pruning_utils.density(masks))
    return masks, found


def printed(found, places):
    return [f"{found[place - 1]:.2f}" for place in places]


def test_densities_of_the_schedules_at_full_width():
    """A schedule is a chain of 20 % prunings; the weights make no difference to the counts."""
    weights = pruning_utils.weights(ResNet(2, 5))
    assert sum(weight.numel() for weight in weights.values()) == 11_159_232
    masks, found = densities(weights, {n: torch.ones_like(w) for n, w in weights.items()}, 0.2, 9)
    _, (last,) = densities(weights, masks, 0.28, 1)
    masks, more = densities(weights, masks, 0.2, 5)
    found += more
    left = 11_159_232
    for density in found:
        left -= round(0.2 * left)
        assert density == pytest.approx(100 * left / 11_159_232, rel=1e-12)
    # prunings so far after each task of 1,1,2,3,5 and of the paper's two
    assert printed(found, (1, 2, 4, 7, 12)) == ["80.00", "64.00", "40.96", "20.97", "6.87"]
    assert printed(found, (1, 2, 5, 9, 14)) == ["80.00", "64.00", "32.77", "13.42", "4.40"]
    one_each = ["80.00", "64.00", "51.20", "40.96", "32.77", "26.21", "20.97", "16.78", "13.42"]
    assert [*printed(found, range(1, 10)), f"{last:.2f}"] == [*one_each, "9.66"]


@pytest.mark.parametrize(
    "prunings, expected", [(16, ["2.81", "3.11", "3.40"]), (13, ["5.50", "5.78", "6.07"])]
)
def test_densities_of_regrown_masks(prunings, expected):
    """Bottom-up: a re-growth of 26 prunings adds (1-d) 0.8^26 to the density d.

    In a narrower network, for speed: a rounded count moves the density by less than 0.001.
    """
    weights = pruning_utils.weights(ResNet(2, 5, width=16))
    ones = {name: torch.ones_like(weight) for name, weight in weights.items()}
    kept, found = densities(weights, ones, 0.2, prunings)
    found = found[-1:]
    for _ in (1, 2):
        before = kept
        kept, grown = densities(weights, ones, 0.2, 26, kept=before)
        found.append(grown[-1])
        assert all(bool((kept[name] >= before[name]).all()) for name in kept)
        assert found[-1] - found[-2] == pytest.approx((100 - found[-2]) * 0.8**26, abs=0.001)
    assert printed(found, (1, 2, 3)) == expected


def test_density_counts_over_all_layers_together():
    assert pruning_utils.density(layers([1.0, 0.0, 0.0, 0.0], [1.0])) == 40.0
    assert pruning_utils.density(layers([1.0], [[1.0]])) == 100.0


# ------------------------------------------------------------------------------ masks in a model


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)


def whole_state(model):
    """A copy of the state dict as of the dense model: weight_orig as weight."""
    return {
        key.replace("weight_orig", "weight"): value.clone()
        for key, value in model.state_dict().items()
        if "weight_mask" not in key
    }


def test_a_pruned_model_computes_with_weight_times_mask():
    model, plain = make(3).eval(), make(3).eval()
    for seed in (0, 1):  # dense to pruned, and from one mask to another
        masks = random_masks(model, seed)
        pruning_utils.apply_mask(model, masks)
        state = make(3).state_dict()
        for name, mask in masks.items():
            state[name + ".weight"] *= mask
        plain.load_state_dict(state)
        assert torch.equal(model(images()), plain(images()))
    shake(model, seed=5)  # the product is made anew at each pass
    assert not torch.allclose(model(images()), plain(images()))


def test_masks_in_a_model_are_those_of_torch_and_can_be_read_back():
    model = make(3)
    assert pruning_utils.extract_mask(model.state_dict()) == {}
    dense = pruning_utils.masks_of(model)
    assert dense.keys() == pruning_utils.convolutions(model).keys()
    assert all(bool((mask == 1).all()) for mask in dense.values())
    masks = random_masks(model, 0)
    pruning_utils.apply_mask(model, masks)
    assert all(torch_prune.is_pruned(m) for m in pruning_utils.convolutions(model).values())
    assert same_masks(pruning_utils.masks_of(model), masks)
    assert same_masks(pruning_utils.extract_mask(model.state_dict()), masks)
    keys = set(model.state_dict())
    for name in masks:
        assert {name + ".weight_orig", name + ".weight_mask"} <= keys
        assert name + ".weight" not in keys
    masks["conv1"].zero_()  # the model has masks of its own
    assert int(model.conv1.weight_mask.sum()) > 0


def test_removing_masks_takes_the_weights_whole():
    model = make(3).eval()
    whole = pruning_utils.clone_state(model)
    for remove in (pruning_utils.remove_mask, lambda m: pruning_utils.apply_mask(m, {})):
        pruning_utils.apply_mask(model, random_masks(model, 0))
        model(images())
        remove(model)
        assert same(model.state_dict(), whole)
        assert not torch_prune.is_pruned(model)
        remove(model)  # of a dense one: nothing to do
        assert same(model.state_dict(), whole)
    assert torch.equal(model(images()), make(3).eval()(images()))


def test_an_optimizer_goes_on_through_masks_that_come_change_and_go():
    """SGD by hand, with momentum and weight decay, beside one optimizer made while dense."""
    model = make(4)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01)
    first, second = random_masks(model, 0), random_masks(model, 1)
    expected, velocity = parameters[0].detach().clone(), 0.0
    for masks in ({}, first, second, {}):
        pruning_utils.apply_mask(model, masks)
        assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
        optimizer.zero_grad()
        model(images()).square().mean().log().backward()
        gradient = parameters[0].grad
        if masks:
            assert bool((gradient[masks["conv1"] == 0] == 0).all())
        velocity = 0.9 * velocity + gradient + 0.01 * expected
        expected = expected - 0.1 * velocity
        optimizer.step()
        torch.testing.assert_close(pruning_utils.weights(model)["conv1"], expected)


@pytest.mark.parametrize("given", [None, {}, "masks"])
@pytest.mark.parametrize("into_pruned", [False, True])
@pytest.mark.parametrize("from_pruned", [False, True])
def test_load_state_takes_dense_and_pruned_into_dense_and_pruned(from_pruned, into_pruned, given):
    source, model = make(5), make(6)
    own = random_masks(source, 0) if from_pruned else {}
    pruning_utils.apply_mask(source, own)
    if into_pruned:
        pruning_utils.apply_mask(model, random_masks(model, 1))
    parameters = [id(p) for p in model.parameters()]
    masks = random_masks(model, 2) if given == "masks" else given
    state = source.state_dict()
    pruning_utils.load_state(model, state, masks)
    wanted = own if masks is None else masks
    assert same(whole_state(model), whole_state(source))
    assert same_masks(pruning_utils.extract_mask(model.state_dict()), wanted)
    assert [id(p) for p in model.parameters()] == parameters
    pruning_utils.apply_mask(source, wanted)
    assert torch.equal(model.eval()(images()), source.eval()(images()))
    before = copy.deepcopy(dict(source.state_dict()))
    shake(model, seed=0)
    pruning_utils.apply_mask(model, {n: torch.zeros_like(m) for n, m in wanted.items()})
    assert same(dict(source.state_dict()), before)  # nothing is shared with what was loaded


def test_dense_state_and_clone_state_are_what_they_say():
    model = make(5)
    whole = whole_state(model)
    pruning_utils.apply_mask(model, random_masks(model, 0))
    state = pruning_utils.clone_state(model)
    assert same(pruning_utils.dense_state(state), whole)
    assert same(pruning_utils.dense_state(whole), whole)
    shake(model, seed=0)
    assert same(pruning_utils.dense_state(state), whole)  # a clone stays as it was
    assert not torch.equal(model.state_dict()["conv1.weight_orig"], state["conv1.weight_orig"])


def without(state, key):
    return {k: value for k, value in state.items() if k != key}


@pytest.mark.parametrize(
    "state, words",
    [
        (lambda: make(0, width=8).state_dict(), "--width"),
        (lambda: ResNet(2, 4, 4).double().state_dict(), "--classifiers"),
        (lambda: ResNet(3, 3, 4).double().state_dict(), "--classes_per_classifier"),
        (lambda: without(make(0).state_dict(), "layer2.0.bn1.weight"), "layer2.0.bn1.weight"),
        (lambda: {**make(0).state_dict(), "more.weight": torch.zeros(2)}, "more.weight"),
        (lambda: {"conv1.weight": torch.tensor(3.0)}, ""),
        (lambda: {**make(0).state_dict(), "linear.0.weight": torch.tensor(3.0)}, ""),
    ],
    ids=["width", "tasks", "classes", "missing", "more", "conv1_number", "head_number"],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state, words):
    model = make(7)
    pruning_utils.apply_mask(model, random_masks(model, 0))
    before = pruning_utils.clone_state(model)
    with pytest.raises(utils.Refusal) as refusal:
        pruning_utils.load_state(model, state(), source="W.pt")
    assert str(refusal.value).startswith("W.pt: ") and words in str(refusal.value)
    assert same(pruning_utils.clone_state(model), before)


# ------------------------------------------------------------------------------ rewind


def keys_of(model):
    """Keys of the convolutions' trained weights, of their masks, and of everything else."""
    state = model.state_dict()
    convs = pruning_utils.convolutions(model)
    trained = [key for key in state if key.rpartition(".")[0] in convs and "mask" not in key]
    masks = [key for key in state if key.endswith("weight_mask")]
    return trained, masks, [key for key in state if key not in trained and key not in masks]


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("pruned_source", [False, True])
@pytest.mark.parametrize("scope", ["conv", "all"])
def test_rewind_takes_the_weights_whole_and_leaves_the_masks(pruned, pruned_source, scope):
    model, source = make(8), make(9)
    source.layer1[0].bn1.num_batches_tracked.fill_(7)
    if pruned:
        pruning_utils.apply_mask(model, random_masks(model, 0))
    if pruned_source:
        pruning_utils.apply_mask(source, random_masks(source, 1))
    before, whole = pruning_utils.clone_state(model), whole_state(source)
    parameters = [id(p) for p in model.parameters()]
    pruning_utils.rewind(model, source.state_dict(), scope)
    after = model.state_dict()
    trained, masks, others = keys_of(model)
    assert len(trained) == 20 and len(masks) == (20 if pruned else 0)
    for key in trained:
        assert torch.equal(after[key], whole[key.replace("weight_orig", "weight")])
    for key in masks:
        assert torch.equal(after[key], before[key])
    for key in others:
        assert torch.equal(after[key], (before if scope == "conv" else whole)[key])
    assert after.keys() == before.keys() and [id(p) for p in model.parameters()] == parameters
    product, plain = whole_state(model), make(0)
    for key in masks:
        product[key.replace("weight_mask", "weight")] *= after[key]
    plain.load_state_dict(product)
    assert torch.equal(model.eval()(images()), plain.eval()(images()))


@pytest.fixture
def ticket(args):
    """A pruned model after training, the initialisation, and a best model pruned otherwise."""
    args.rewind_scope = "conv"
    initial = pruning_utils.clone_state(trainer.make_model(args, CPU))
    model, best = make(10).float(), make(11).float()
    pruning_utils.apply_mask(model, random_masks(model, 0, 0.3))
    pruning_utils.apply_mask(best, random_masks(best, 1, 0.7))
    return model, initial, pruning_utils.clone_state(best)


def rewound(args, ticket, kind, t=2):
    """The state after main_TD's rewinding; the ticket itself stays as it is."""
    trained, initial, best = ticket
    args.rewind, model = kind, make(0).float()
    pruning_utils.load_state(model, trained.state_dict())
    main_TD.rewind(model, t, initial, best, args, CPU)
    return pruning_utils.clone_state(model)


def test_each_kind_of_rewinding_leaves_masks_norms_and_heads(args, ticket):
    before = pruning_utils.clone_state(ticket[0])
    _, masks, others = keys_of(ticket[0])
    for kind in ("zero", "best", "rand", "finetune"):
        after = rewound(args, ticket, kind)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in masks + others)


def test_zero_best_and_finetune_are_the_weights_of_their_names(args, ticket):
    model, initial, best = ticket
    names = pruning_utils.convolutions(model)
    zero, tuned = rewound(args, ticket, "zero"), rewound(args, ticket, "finetune")
    at_best = rewound(args, ticket, "best")
    for name in names:
        assert torch.equal(zero[f"{name}.weight_orig"], initial[f"{name}.weight"])
        assert torch.equal(at_best[f"{name}.weight_orig"], best[f"{name}.weight_orig"])
    assert same(tuned, pruning_utils.clone_state(model))


def test_rand_is_fresh_and_hangs_on_the_seed_and_the_task_alone(args, ticket):
    trained, _, _ = keys_of(ticket[0])
    torch.manual_seed(1)
    first = rewound(args, ticket, "rand")
    torch.manual_seed(2)
    assert same(rewound(args, ticket, "rand"), first)
    others = [rewound(args, ticket, kind) for kind in ("zero", "best", "finetune")]
    others.append(rewound(args, ticket, "rand", t=3))
    args.seed = 1
    others.append(rewound(args, ticket, "rand"))
    for other in others:
        assert not any(torch.equal(first[key], other[key]) for key in trained)
    for key in trained:  # PyTorch's default initialisation: uniform within 1/sqrt(fan-in)
        bound = first[key][0].numel() ** -0.5
        assert 0.8 * bound < first[key].abs().max() <= bound * 1.0001


def test_the_wider_scope_rewinds_norms_and_heads_too(args, ticket):
    args.rewind_scope = "all"
    _, initial, best = ticket
    _, masks, others = keys_of(ticket[0])
    before = pruning_utils.clone_state(ticket[0])
    for kind, source in (("zero", initial), ("best", best), ("finetune", before)):
        after = rewound(args, ticket, kind)
        assert all(torch.equal(after[key], source[key]) for key in others)
        assert all(torch.equal(after[key], before[key]) for key in masks)


# ------------------------------------------------------------------------------ mask files


def test_mask_files_hold_the_published_keys(tmp_path):
    model = make(12)
    masks = random_masks(model, 0)
    pruning_utils.apply_mask(model, masks)
    path = tmp_path / "mask-1.pt"
    pruning_utils.save_masks(path, pruning_utils.masks_of(model))  # float64, as the model is
    content = torch.load(path, weights_only=True)
    assert content.keys() == {f"{name}.weight_mask" for name in masks}
    for name, mask in masks.items():
        found = content[f"{name}.weight_mask"]
        assert found.dtype == torch.float32 and torch.equal(found, mask)
    assert same(pruning_utils.load_masks(path), masks)


def test_masks_come_from_any_pruned_checkpoint(tmp_path, args):
    model = make(12)
    masks = random_masks(model, 0)
    pruning_utils.apply_mask(model, masks)
    optimizer = trainer.make_optimizer(model, args, 0.1)
    utils.save(tmp_path / "whole.pt", trainer.contents(model, optimizer, 1, 50.0))
    utils.save(tmp_path / "raw.pt", model.state_dict())
    for name in ("whole.pt", "raw.pt"):
        assert same_masks(pruning_utils.load_masks(tmp_path / name), masks)


def test_a_dense_checkpoint_holds_no_masks(tmp_path):
    path = tmp_path / "dense.pt"
    utils.save(path, make(12).state_dict())
    with pytest.raises(utils.Refusal, match="holds no masks") as refusal:
        pruning_utils.load_masks(path)
    assert str(path) in str(refusal.value)


def damaged(kind):
    """Masks that are not of the network of width 4, and a name that the refusal must hold."""
    masks = random_masks(make(12), 0)
    if kind == "width":
        return random_masks(make(12, width=8), 0), "--width"
    if kind == "missing":
        return without(masks, "layer3.0.conv2"), "layer3.0.conv2"
    if kind == "more":
        return {**masks, "layer5": torch.ones(1)}, "layer5"
    masks["layer1.1.conv1"][0, 0, 0, 0] = float(kind)
    return masks, "layer1.1.conv1"


@pytest.mark.parametrize("kind", ["width", "missing", "more", "2", "0.5", "-1", "nan", "inf"])
def test_masks_of_another_network_or_of_other_numbers_are_refused(tmp_path, kind):
    model = make(12)
    pruning_utils.apply_mask(model, random_masks(model, 1))
    before = pruning_utils.clone_state(model)
    masks, words = damaged(kind)
    pruning_utils.save_masks(tmp_path / "M.pt", masks)
    masks = pruning_utils.load_masks(tmp_path / "M.pt")
    for refused in (
        lambda: pruning_utils.check_masks(model, masks, "--mask M.pt"),
        lambda: pruning_utils.load_state(model, before, masks, source="--mask M.pt"),
    ):
        with pytest.raises(utils.Refusal) as refusal:
            refused()
        assert str(refusal.value).startswith("--mask M.pt: ") and words in str(refusal.value)
    assert same(pruning_utils.clone_state(model), before)


def test_sound_masks_are_taken():
    model = make(12)
    pruning_utils.check_masks(model, random_masks(model, 0), "M.pt")
    pruning_utils.check_masks(model, pruning_utils.masks_of(model), "M.pt")
    pruning_utils.check_masks(model, {}, "M.pt")  # dense
