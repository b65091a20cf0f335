"""Masks against torch.nn.utils.prune and plain Python; criteria, rewinding, loading."""

import copy

import pytest
import torch
from reference import random_masks
from torch import nn
from torch.nn.utils import prune as torch_prune

import main_TD
import pruning_utils
import trainer
from models import ResNet18, ResNet32
from models.base import dense_state
from runtime.errors import UserError

CPU = torch.device("cpu")


def make(seed, width=4, device=CPU):
    """A small network in float64 whose BatchNorm and heads are not the initial ones."""
    torch.manual_seed(seed)
    model = ResNet18(2, 3, width).double()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "bn" in key or "linear" in key:
                value.copy_(10 * torch.rand(value.shape) + 1)
    return model.to(device)


def shake(*models, seed):
    """Add the same noise to the convolution weights of each model, as training might."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for weight in pruning_utils.weights(model).values():
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.add_(noise.to(weight.device) * weight.std())


def same(a, b):
    """Whether two dicts hold the same tensors; masks may be of the weights' dtype in a model."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k].double().cpu(), b[k].double().cpu()) for k in a
    )


def count(masks):
    return sum(int(mask.sum()) for mask in masks.values())


# ------------------------------------------------------------------------------ prune


def prune_by_torch(model, percent, current=True):
    """torch's own global pruning; current: rank the trained weights, not the cached product."""
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    trained = [getattr(conv, "weight_orig", conv.weight).detach() for conv in convs.values()]
    pairs = [(conv, "weight") for conv in convs.values()]
    scores = dict(zip(pairs, trained)) if current else None
    torch_prune.global_unstructured(
        pairs, torch_prune.L1Unstructured, importance_scores=scores, amount=percent
    )
    return {name: conv.weight_mask.clone().cpu() for name, conv in convs.items()}


@pytest.mark.device
@pytest.mark.parametrize("percent", [0.2, 0.37])
def test_pruning_is_torchs_global_pruning_of_the_current_weights(args, device, percent):
    ours, args.percent = make(0, device=device), percent
    theirs, stale = copy.deepcopy(ours), copy.deepcopy(ours)
    as_published = []
    for number in range(4):
        shake(ours, theirs, stale, seed=number)
        before = pruning_utils.masks_of(ours)
        masks = pruning_utils.prune_once(ours, None, before, args, "stream")
        assert same(masks, prune_by_torch(theirs, percent))
        assert all(bool((masks[name] <= before[name]).all()) for name in masks)
        assert count(masks) == count(before) - round(percent * count(before))
        as_published.append(same(masks, prune_by_torch(stale, percent, current=False)))
        pruning_utils.apply_mask(ours, masks)
    assert as_published == [True] + [False] * 3  # the cached product makes a difference


def plain_prune(scores, masks, percent, kept):
    """One weight after the other in plain Python; sorted() leaves ties in the model's order."""
    score, mask, held = (
        [v for part in each.values() for v in part.flatten().tolist()]
        for each in (scores, masks, kept)
    )
    ranked = [i for i in range(len(mask)) if mask[i] and not held[i]]
    for i in sorted(ranked, key=score.__getitem__)[: round(percent * len(ranked))]:
        mask[i] = 0.0
    parts = torch.tensor(mask).split([part.numel() for part in masks.values()])
    return {name: part.view_as(masks[name]) for name, part in zip(masks, parts)}


@pytest.mark.device
@pytest.mark.parametrize("coarse", [False, True])
def test_regrowth_ranks_only_the_weights_outside_the_kept_mask(device, coarse):
    """coarse: scores in steps of 0.1, so that nearly every threshold is a tie."""
    model = make(1, device=device)
    kept = {name: mask.to(device) for name, mask in random_masks(model, 0, 0.2).items()}
    masks = pruning_utils.masks_of(model)  # re-growth starts dense
    outside = count(masks) - count(kept)
    for number in range(3):
        shake(model, seed=10 + number)
        scores = pruning_utils.magnitude(model)
        if coarse:
            scores = {name: (10 * score).round() / 10 for name, score in scores.items()}
        expected = plain_prune(scores, masks, 0.2, kept)
        masks = pruning_utils.prune(scores, masks, 0.2, kept=kept)
        assert same(masks, expected)
        assert all(bool((masks[name] >= kept[name]).all()) for name in kept)
        outside -= round(0.2 * outside)
        assert count(masks) == count(kept) + outside


# 2.5 and 0.5: half to even, as Python's round
COUNTS = [(5, 0.5, 2), (7, 0.5, 4), (3, 0.5, 2), (1, 0.5, 0), (10, 0.06, 1), (9, 0.2, 2)]
COUNTS += [(10, 0.04, 0), (10, 0.96, 10), (10, 0.0, 0), (40_000, 1e-5, 0)]


@pytest.mark.parametrize("n, percent, pruned", COUNTS)
def test_the_count_is_pythons_round(n, percent, pruned):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(n))
    given = {"a": scores, "b": torch.ones(3)}, {"a": torch.ones(n), "b": torch.zeros(3)}
    found = pruning_utils.prune(*given, percent)
    assert n - count(found) == pruned
    gone, left = scores[found["a"] == 0], scores[found["a"] == 1]
    assert not len(gone) or not len(left) or gone.max() < left.min()


def test_random_scores_depend_on_seed_and_stream_alone(args):
    def pruned(criterion="random", seed=0, stream="stream", model_seed=0):
        args.criterion, args.seed, model = criterion, seed, make(model_seed)
        return pruning_utils.prune_once(model, None, pruning_utils.masks_of(model), args, stream)

    first = pruned()
    torch.manual_seed(99)
    assert same(pruned(model_seed=1), first)  # the weights make no difference
    for other in (pruned("magnitude"), pruned(seed=1), pruned(stream="other")):
        assert not torch.equal(other["conv1"], first["conv1"]) and count(other) == count(first)
    for name, mask in first.items():  # every layer loses about a fifth
        assert abs(mask.mean() - 0.8) < 5 * (0.16 / mask.numel()) ** 0.5, name


# ------------------------------------------------------------------------------ densities


def prune_repeatedly(weights, masks, percent, prunings, kept=None):
    """The masks after a number of prunings by magnitude, and the density after each as text."""
    found, scores = [], {name: weight.abs() for name, weight in weights.items()}
    for _ in range(prunings):
        masks = pruning_utils.prune(scores, masks, percent, kept)
        found.append(f"{pruning_utils.density(masks):.2f}")
    return masks, found


def test_densities_of_the_schedules():
    """A schedule is a chain of 20 % prunings; the counts do not depend on the weights.

    A narrow network is faster: rounding a count changes the density by less than 0.001.
    """
    weights = pruning_utils.weights(ResNet18(2, 5, width=16))
    dense = {name: torch.ones_like(weight) for name, weight in weights.items()}
    masks, found = prune_repeatedly(weights, dense, 0.2, 9)
    assert " ".join(found) == "80.00 64.00 51.20 40.96 32.77 26.21 20.97 16.78 13.42"
    assert prune_repeatedly(weights, masks, 0.28, 1)[1] == ["9.66"]  # CIFAR-100 in the paper
    found += prune_repeatedly(weights, masks, 0.2, 5)[1]
    # prunings so far after the last task of 1,1,2,3,5 and of the paper's 1,1,3,4,5
    assert (found[12 - 1], found[14 - 1]) == ("6.87", "4.40")


@pytest.mark.parametrize(
    "prunings, expected", [(16, ["2.81", "3.11", "3.40"]), (13, ["5.50", "5.78", "6.07"])]
)
def test_densities_of_regrown_masks(prunings, expected):
    """Bottom-up: a re-growth of 26 prunings adds (1-d) 0.8^26 to the density d."""
    weights = pruning_utils.weights(ResNet18(2, 5, width=16))
    dense = {name: torch.ones_like(weight) for name, weight in weights.items()}
    kept, found = prune_repeatedly(weights, dense, 0.2, prunings)
    found = found[-1:]
    for _ in (1, 2):
        before = kept
        kept, grown = prune_repeatedly(weights, dense, 0.2, 26, before)
        found.append(grown[-1])
        assert all(bool((kept[name] >= before[name]).all()) for name in kept)
    assert found == expected


# ------------------------------------------------------------------------------ masks in a model


def logits(model):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return model(images, main_fc=True)


def dense_copy(model):
    """A copy of the state dict in the form of a dense model: weight_orig as weight."""
    return {
        key.replace("weight_orig", "weight"): value.clone()
        for key, value in model.state_dict().items()
        if "weight_mask" not in key
    }


def test_masks_live_in_a_model_as_those_of_torch_and_leave_it_whole():
    model, plain = make(3).eval(), make(3).eval()
    dense = pruning_utils.clone_state(model)
    assert pruning_utils.extract_mask(dense) == {}
    assert all(bool((mask == 1).all()) for mask in pruning_utils.masks_of(model).values())
    for seed in (0, 1):  # from dense to pruned, and from one mask to another
        masks = random_masks(model, seed)
        pruning_utils.apply_mask(model, masks)
        product = {key: value.clone() for key, value in dense.items()}
        for name, mask in masks.items():
            product[name + ".weight"] *= mask
        plain.load_state_dict(product)
        assert torch.equal(logits(model), logits(plain))
        assert all(torch_prune.is_pruned(m) for m in pruning_utils.convolutions(model).values())
        assert same(pruning_utils.masks_of(model), masks)
        assert same(pruning_utils.extract_mask(model.state_dict()), masks)
        published = {f"{name}.weight_mask" for name in masks}
        content = pruning_utils.mask_state(pruning_utils.masks_of(model))  # of a mask file
        assert content.keys() == published < model.state_dict().keys()
        assert all(mask.dtype == torch.float32 for mask in content.values())
        masks["conv1"].zero_()  # the model holds copies
        assert int(model.conv1.weight_mask.sum()) > 0
    pruning_utils.apply_mask(model, {})
    assert same(model.state_dict(), dense) and not torch_prune.is_pruned(model)


@pytest.mark.parametrize("given", [None, {}, "masks"])
@pytest.mark.parametrize("into_pruned", [False, True])
@pytest.mark.parametrize("from_pruned", [False, True])
def test_load_state_from_dense_or_pruned_into_dense_or_pruned(from_pruned, into_pruned, given):
    source, model = make(5), make(6)
    own = random_masks(source, 0) if from_pruned else {}
    pruning_utils.apply_mask(source, own)
    pruning_utils.apply_mask(model, random_masks(model, 1) if into_pruned else {})
    parameters = [id(p) for p in model.parameters()]
    masks = random_masks(model, 2) if given == "masks" else given
    wanted = own if masks is None else masks
    pruning_utils.load_state(model, source.state_dict(), masks)
    assert same(dense_copy(model), dense_copy(source))
    assert same(pruning_utils.extract_mask(model.state_dict()), wanted)
    assert [id(p) for p in model.parameters()] == parameters
    before = pruning_utils.clone_state(source)
    shake(model, seed=0)
    assert same(source.state_dict(), before)  # the models share no tensors


def test_what_does_not_fit_is_an_error_and_changes_nothing():
    model = make(7)
    state, masks = pruning_utils.clone_state(model), random_masks(model, 0)
    wrong = masks["conv1"].clone()
    wrong[0, 0, 0, 0] = 0.5
    nan = torch.full_like(state["conv1.weight"], torch.nan)
    less = {name: mask for name, mask in masks.items() if name != "layer3.0.conv2"}
    cases = [
        (ResNet32(2, 3, 4).double().state_dict(), None, "--arch"),
        (make(0, width=8).state_dict(), None, "--width"),
        (ResNet18(2, 4, 4).double().state_dict(), None, "--classifiers"),
        ({**state, "more.weight": torch.zeros(2)}, None, "more.weight"),
        ({**state, "conv1.weight": nan}, None, "conv1.weight is not finite"),
        (pruning_utils.mask_state(masks), None, "mask file"),
        (state, random_masks(make(12, width=8), 0), "--width"),
        (state, less, "layer3.0.conv2"),
        (state, {**masks, "layer5": torch.ones(1)}, "layer5"),
        (state, {**masks, "conv1": wrong}, "conv1"),
        (state, {**masks, "conv1": nan}, "conv1"),
    ]
    pruning_utils.load_state(model, state, masks)  # these fit
    before = pruning_utils.clone_state(model)
    for bad, bad_masks, fragment in cases:
        with pytest.raises(UserError, match=f"^W.pt: .*{fragment}"):
            pruning_utils.load_state(model, bad, bad_masks, source="W.pt")
        assert same(pruning_utils.clone_state(model), before)


# ------------------------------------------------------------------------------ rewind


def test_rewinding_sets_the_convolutions_alone(args, run):
    initial, model, best = trainer.make_model(args, CPU), make(10).float(), make(11).float()
    run.save_checkpoint("task0_checkpoint_weight.pt", {"state_dict": initial.state_dict()}, None)
    pruning_utils.apply_mask(model, random_masks(model, 0, 0.3))
    pruning_utils.apply_mask(best, random_masks(best, 1, 0.7))
    before = pruning_utils.clone_state(model)
    trained = [key for key in before if key.endswith("weight_orig")]
    sources = {"zero": initial.state_dict(), "best": best.state_dict(), "finetune": before}

    def rewind(kind, t=2, seed=0):
        args.rewind, args.seed = kind, seed
        pruning_utils.load_state(model, before)
        main_TD.rewind(model, t, best.state_dict(), run)
        after = pruning_utils.clone_state(model)
        others = before.keys() - trained  # masks, BatchNorm, heads
        assert len(trained) == 20 and same(
            {k: after[k] for k in others}, {k: before[k] for k in others}
        )
        return {key.replace("weight_orig", "weight"): after[key] for key in trained}

    for kind, source in sources.items():
        found = rewind(kind)
        assert same(found, {key: dense_state(source)[key] for key in found})
    # new random weights depend on seed and task alone
    new = rewind("rand")
    torch.manual_seed(2)
    assert same(rewind("rand"), new)
    others = [rewind("zero"), rewind("rand", t=3), rewind("rand", seed=1)]
    for key, weight in new.items():
        assert not any(torch.equal(weight, other[key]) for other in others)
        bound = weight[0].numel() ** -0.5  # PyTorch's default: uniform within 1/sqrt(fan-in)
        assert 0.8 * bound < weight.abs().max() <= bound * 1.0001
