"""Masks against torch.nn.utils.prune and plain Python; criteria, rewinding, loading."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import main_TD
import pruning_utils
import trainer
from models import ResNet18, ResNet32
from models.base import dense_state
from runtime.checkpoint import save_checkpoint
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


def random_masks(model, seed, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.rand(weight.shape, generator=generator) < share).float()
        for name, weight in pruning_utils.weights(model).items()
    }


def same(a, b):
    """Whether two dicts hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key].cpu(), b[key].cpu()) for key in a)


def same_masks(a, b):
    """Masks may be of the weights' dtype in a model and are float32 outside."""
    return same({n: m.double() for n, m in a.items()}, {n: m.double() for n, m in b.items()})


def count(masks):
    return sum(int(mask.sum()) for mask in masks.values())


# ------------------------------------------------------------------------------ criteria


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


@pytest.mark.device
@pytest.mark.parametrize("percent", [0.2, 0.37])
def test_pruning_by_magnitude_is_torchs_global_pruning_of_the_current_weights(
    args, device, percent
):
    ours, args.percent = make(0, device=device), percent
    theirs, stale = copy.deepcopy(ours), copy.deepcopy(ours)
    as_published = []
    for number in range(5):
        shake(ours, theirs, stale, seed=number)
        masks = pruning_utils.prune_once(ours, pruning_utils.masks_of(ours), args, "step")
        assert same_masks(masks, prune_by_torch(theirs, percent))
        as_published.append(same_masks(masks, prune_by_torch(stale, percent, current=False)))
        pruning_utils.apply_mask(ours, masks)
    assert as_published == [True] + [False] * 4  # the cached product makes a difference


@pytest.mark.parametrize("criterion", pruning_utils.CRITERIA)
def test_a_criterion_scores_each_weight_and_changes_none(criterion):
    weights = pruning_utils.weights(make(0))
    before = copy.deepcopy(weights)
    scores = pruning_utils.CRITERIA[criterion](weights, torch.Generator())
    assert [*scores] == [*weights] and same(weights, before)
    assert all(scores[name].shape == weight.shape for name, weight in weights.items())


def test_random_scores_are_on_the_device_of_the_weights():
    weights = {"conv1": torch.empty(4, 3, device="meta")}
    assert pruning_utils.random_scores(weights, torch.Generator())["conv1"].device.type == "meta"


def test_random_scores_depend_only_on_seed_and_step(args):
    args.criterion = "random"

    def pruned(step="step", model_seed=0):
        model = make(model_seed)
        return pruning_utils.prune_once(model, pruning_utils.masks_of(model), args, step)

    first = pruned()
    torch.manual_seed(99)
    assert same(pruned(), first)
    assert same(pruned(model_seed=1), first)  # the weights make no difference
    others = [pruned("other step")]
    args.seed = 1
    others.append(pruned())
    args.criterion = "magnitude"
    others.append(pruned())
    assert not any(torch.equal(other["conv1"], first["conv1"]) for other in others)
    assert count(first) == count(others[-1])
    for name, mask in first.items():  # every layer loses about a fifth
        n = mask.numel()
        assert abs(mask.mean() - 0.8) < 5 * (0.16 / n) ** 0.5, name


# ------------------------------------------------------------------------------ prune


def prune(weights, masks, percent, kept=None):
    """One pruning by magnitude."""
    return pruning_utils.prune(pruning_utils.magnitude(weights, None), masks, percent, kept)


def plain_prune(scores, masks, percent, kept):
    """One weight after the other in plain Python; sorted() leaves ties in the model's order."""
    score = [v for part in scores.values() for v in part.flatten().tolist()]
    mask = [v for part in masks.values() for v in part.flatten().tolist()]
    held = [v for part in kept.values() for v in part.flatten().tolist()]
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
    kept = pruning_utils.masks_of(model)
    for number in range(3):
        shake(model, seed=number)
        kept = prune(pruning_utils.weights(model), kept, 0.4)
    masks = pruning_utils.masks_of(model)  # re-growth starts dense
    outside = count(masks) - count(kept)
    for number in range(4):
        shake(model, seed=10 + number)
        scores = pruning_utils.magnitude(pruning_utils.weights(model), None)
        if coarse:
            scores = {name: (10 * score).round() / 10 for name, score in scores.items()}
        expected = plain_prune(scores, masks, 0.2, kept)
        masks = pruning_utils.prune(scores, masks, 0.2, kept=kept)
        assert same(masks, expected)
        assert all(bool((masks[name] >= kept[name]).all()) for name in kept)
        outside -= round(0.2 * outside)
        assert count(masks) == count(kept) + outside


def layers(*values):
    """One layer for each list of numbers."""
    return {f"layer{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}


@pytest.mark.parametrize(
    "n, percent, pruned",
    [
        (5, 0.5, 2),  # 2.5: half to even
        (7, 0.5, 4),  # 3.5: half to even
        (3, 0.5, 2),  # 1.5
        (1, 0.5, 0),  # 0.5
        (10, 0.04, 0),
        (10, 0.06, 1),
        (10, 0.94, 9),
        (10, 0.96, 10),
        (10, 0.0, 0),
        (40_000, 1e-5, 0),
        (9, 0.2, 2),  # 1.8
    ],
)
def test_the_count_is_pythons_round(n, percent, pruned):
    weights = {"a": torch.randn(n, generator=torch.Generator().manual_seed(n)), "b": torch.ones(3)}
    masks = {"a": torch.ones(n), "b": torch.zeros(3)}
    found = prune(weights, masks, percent)
    assert n - count(found) == pruned
    gone, left = weights["a"].abs()[found["a"] == 0], weights["a"].abs()[found["a"] == 1]
    assert not len(gone) or not len(left) or gone.max() < left.min()


EQUAL = [2.0, 2.0, 1.0, 3.0], [[2.0, 2.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    "scores, masks, percent, kept, expected",
    [
        # 4 of 8: the 1, and the first three of six equal scores
        (EQUAL, ([1] * 4, [[1, 1]] * 2), 0.5, None, ([0, 0, 0, 1], [[0, 1], [1, 1]])),
        # round(0.5 * 7) = 4, without the one that is kept
        (
            EQUAL,
            ([1] * 4, [[1, 1]] * 2),
            0.5,
            ([1, 0, 0, 0], [[0, 0]] * 2),
            ([1, 0, 0, 1], [[0, 0], [1, 1]]),
        ),
        # what is pruned already does not count, whatever its score
        (([0, 9, 3, 4, 5, 6],), ([0, 0, 1, 1, 1, 1],), 0.5, None, ([0, 0, 0, 0, 1, 1],)),
        # a remaining score of 0 counts like any other
        (([5, 0, 0, 1],), ([1, 1, 1, 1],), 0.5, None, ([1, 0, 0, 1],)),
        (([5, 0, 0, 1],), ([1, 1, 1, 1],), 0.25, None, ([1, 0, 1, 1],)),
        # scores may be negative: the lowest go, not the smallest in magnitude
        (([-1, 2, -3, 0.5],), ([1, 1, 1, 1],), 0.5, None, ([0, 1, 0, 1],)),
        (([-1, 2], [-3, 0.5]), ([1, 1], [0, 1]), 0.4, None, ([0, 1], [0, 1])),
    ],
)
def test_prune_by_hand(scores, masks, percent, kept, expected):
    given = layers(*scores), layers(*masks)
    before = copy.deepcopy(given)
    found = pruning_utils.prune(*given, percent, kept and layers(*kept))
    assert same(found, layers(*expected))
    assert same(given[0], before[0]) and same(given[1], before[1])


def test_masks_only_shrink_and_the_arguments_do_not_change():
    model = make(2)
    masks = random_masks(model, 0)
    for number in range(4):
        shake(model, seed=number)
        scores = pruning_utils.magnitude(pruning_utils.weights(model), None)
        before = copy.deepcopy((scores, masks))
        pruned = pruning_utils.prune(scores, masks, 0.3)
        assert same(scores, before[0]) and same(masks, before[1])
        assert all(mask.dtype == torch.float32 for mask in pruned.values())
        assert all(bool((pruned[name] <= masks[name]).all()) for name in masks)
        assert count(pruned) == count(masks) - round(0.3 * count(masks))
        masks = pruned


# ------------------------------------------------------------------------------ densities


def ones_like(weights):
    return {name: torch.ones_like(weight) for name, weight in weights.items()}


def prune_repeatedly(weights, masks, percent, prunings, kept=None):
    """The masks after a number of prunings, and the density after each."""
    found = []
    for _ in range(prunings):
        masks = prune(weights, masks, percent, kept)
        found.append(pruning_utils.density(masks))
    return masks, found


def printed(found, numbers):
    """The densities after these prunings (from 1), as text."""
    return [f"{found[number - 1]:.2f}" for number in numbers]


def test_densities_of_the_schedules():
    """A schedule is a chain of 20 % prunings; the counts do not depend on the weights.

    A narrow network is faster: rounding a count changes the density by less than 0.001.
    """
    weights = pruning_utils.weights(ResNet18(2, 5, width=16))
    total = left = count(ones_like(weights))
    masks, found = prune_repeatedly(weights, ones_like(weights), 0.2, 9)
    _, (last,) = prune_repeatedly(weights, masks, 0.28, 1)
    masks, more = prune_repeatedly(weights, masks, 0.2, 5)
    found += more
    for density in found:
        left -= round(0.2 * left)
        assert density == pytest.approx(100 * left / total, rel=1e-12)
    # prunings so far after each task of 1,1,2,3,5 and of the paper's two
    assert printed(found, (1, 2, 4, 7, 12)) == ["80.00", "64.00", "40.96", "20.97", "6.87"]
    assert printed(found, (1, 2, 5, 9, 14)) == ["80.00", "64.00", "32.77", "13.42", "4.40"]
    one_each = ["80.00", "64.00", "51.20", "40.96", "32.77", "26.21", "20.97", "16.78", "13.42"]
    assert [*printed(found, range(1, 10)), f"{last:.2f}"] == [*one_each, "9.66"]


@pytest.mark.parametrize(
    "prunings, expected", [(16, ["2.81", "3.11", "3.40"]), (13, ["5.50", "5.78", "6.07"])]
)
def test_densities_of_regrown_masks(prunings, expected):
    """Bottom-up: a re-growth of 26 prunings adds (1-d) 0.8^26 to the density d."""
    weights = pruning_utils.weights(ResNet18(2, 5, width=16))
    kept, found = prune_repeatedly(weights, ones_like(weights), 0.2, prunings)
    found = found[-1:]
    for _ in (1, 2):
        before = kept
        kept, grown = prune_repeatedly(weights, ones_like(weights), 0.2, 26, before)
        found.append(grown[-1])
        assert all(bool((kept[name] >= before[name]).all()) for name in kept)
        assert found[-1] - found[-2] == pytest.approx((100 - found[-2]) * 0.8**26, abs=0.001)
    assert printed(found, (1, 2, 3)) == expected


def test_density_is_over_all_layers_and_densities_of_each():
    masks = layers([1.0, 0.0, 0.0, 0.0], [1.0])
    assert pruning_utils.density(masks) == 40.0
    assert pruning_utils.densities(masks) == {"layer0": 25.0, "layer1": 100.0}
    assert pruning_utils.density(layers([1.0], [[1.0]])) == 100.0


# ------------------------------------------------------------------------------ masks in a model


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)


def logits(model):
    return model(images(), main_fc=True)


def dense_copy(model):
    """A copy of the state dict in the form of a dense model: weight_orig as weight."""
    return {
        key.replace("weight_orig", "weight"): value.clone()
        for key, value in model.state_dict().items()
        if "weight_mask" not in key
    }


def test_a_pruned_model_computes_with_weight_times_mask():
    model, plain = make(3).eval(), make(3).eval()
    for seed in (0, 1):  # from dense to pruned, and from one mask to another
        masks = random_masks(model, seed)
        pruning_utils.apply_mask(model, masks)
        state = make(3).state_dict()
        for name, mask in masks.items():
            state[name + ".weight"] *= mask
        plain.load_state_dict(state)
        assert torch.equal(logits(model), logits(plain))
    shake(model, seed=5)  # each pass computes the product
    assert not torch.allclose(logits(model), logits(plain))


def test_masks_live_in_a_model_as_those_of_torch_and_can_be_read_back():
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
    masks["conv1"].zero_()  # the model holds copies
    assert int(model.conv1.weight_mask.sum()) > 0


def test_removing_masks_restores_all_weights():
    model = make(3).eval()
    dense = pruning_utils.clone_state(model)
    for remove in (pruning_utils.remove_mask, lambda m: pruning_utils.apply_mask(m, {})):
        pruning_utils.apply_mask(model, random_masks(model, 0))
        logits(model)
        remove(model)
        assert same(model.state_dict(), dense)
        assert not torch_prune.is_pruned(model)
        remove(model)  # of a dense model: nothing to do
        assert same(model.state_dict(), dense)
    assert torch.equal(logits(model), logits(make(3).eval()))


def test_an_optimizer_keeps_its_momentum_while_masks_change():
    """SGD by hand, with momentum and weight decay, against an optimizer of the dense model."""
    model = make(4)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01)
    first, second = random_masks(model, 0), random_masks(model, 1)
    expected, velocity = parameters[0].detach().clone(), 0.0
    for masks in ({}, first, second, {}):
        pruning_utils.apply_mask(model, masks)
        assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
        optimizer.zero_grad()
        logits(model).square().mean().log().backward()
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
def test_load_state_from_dense_or_pruned_into_dense_or_pruned(from_pruned, into_pruned, given):
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
    assert same(dense_copy(model), dense_copy(source))
    assert same_masks(pruning_utils.extract_mask(model.state_dict()), wanted)
    assert [id(p) for p in model.parameters()] == parameters
    pruning_utils.apply_mask(source, wanted)
    assert torch.equal(logits(model.eval()), logits(source.eval()))
    before = copy.deepcopy(dict(source.state_dict()))
    shake(model, seed=0)
    pruning_utils.apply_mask(model, {n: torch.zeros_like(m) for n, m in wanted.items()})
    assert same(dict(source.state_dict()), before)  # the models share no tensors


def test_dense_state_drops_masks_and_clone_state_copies():
    model = make(5)
    dense = dense_copy(model)
    pruning_utils.apply_mask(model, random_masks(model, 0))
    state = pruning_utils.clone_state(model)
    assert same(dense_state(state), dense)
    assert same(dense_state(dense), dense)
    shake(model, seed=0)
    assert same(dense_state(state), dense)  # a clone does not change
    assert not torch.equal(model.state_dict()["conv1.weight_orig"], state["conv1.weight_orig"])


def without(state, key):
    return {k: value for k, value in state.items() if k != key}


def changed(key, value):
    """The state dict of the network of width 4 with another tensor for `key`."""
    return {**make(0).state_dict(), key: value}


CONV = torch.zeros(4, 3, 3, 3)
MISFITS = {
    "resnet32": (lambda: ResNet32(2, 3, 4).double().state_dict(), "--arch"),
    "width": (lambda: make(0, width=8).state_dict(), "--width"),
    "tasks": (lambda: ResNet18(2, 4, 4).double().state_dict(), "--classifiers"),
    "classes": (lambda: ResNet18(3, 3, 4).double().state_dict(), "--classes_per_classifier"),
    "missing": (lambda: without(make(0).state_dict(), "layer2.0.bn1.weight"), "layer2.0.bn1"),
    "more": (lambda: changed("more.weight", torch.zeros(2)), "more.weight"),
    "more heads": (lambda: changed("linear.3.bias", torch.zeros(2)), "linear.3.bias"),
    "one number": (lambda: {"conv1.weight": torch.tensor(3.0)}, "layer1.0.bn1.weight"),
    "float32": (lambda: changed("conv1.weight", CONV), "conv1.weight does not hold finite"),
    "nan": (lambda: changed("conv1.weight", CONV.double() / 0), "conv1.weight does not hold"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(kind):
    state, fragment = MISFITS[kind]
    model = make(7)
    pruning_utils.apply_mask(model, random_masks(model, 0))
    before = pruning_utils.clone_state(model)
    with pytest.raises(UserError) as error:
        pruning_utils.load_state(model, state(), source="W.pt")
    assert str(error.value).startswith("W.pt: ") and fragment in str(error.value)
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
def test_rewind_restores_all_weights_and_keeps_the_masks(pruned, pruned_source, scope):
    model, source = make(8), make(9)
    source.layer1[0].bn1.num_batches_tracked.fill_(7)
    if pruned:
        pruning_utils.apply_mask(model, random_masks(model, 0))
    if pruned_source:
        pruning_utils.apply_mask(source, random_masks(source, 1))
    before, dense = pruning_utils.clone_state(model), dense_copy(source)
    parameters = [id(p) for p in model.parameters()]
    pruning_utils.rewind(model, source.state_dict(), scope)
    after = model.state_dict()
    trained, masks, others = keys_of(model)
    assert len(trained) == 20 and len(masks) == (20 if pruned else 0)
    for key in trained:
        assert torch.equal(after[key], dense[key.replace("weight_orig", "weight")])
    for key in masks:
        assert torch.equal(after[key], before[key])
    for key in others:
        assert torch.equal(after[key], (before if scope == "conv" else dense)[key])
    assert after.keys() == before.keys() and [id(p) for p in model.parameters()] == parameters
    product, plain = dense_copy(model), make(0)
    for key in masks:
        product[key.replace("weight_mask", "weight")] *= after[key]
    plain.load_state_dict(product)
    assert torch.equal(logits(model.eval()), logits(plain.eval()))


@pytest.fixture
def ticket(args, run):
    """A trained and pruned model, the initialization, and a best model with another mask."""
    args.rewind_scope = "conv"
    initial = trainer.make_model(args, CPU)
    trainer.save_initialization(initial, run)
    model, best = make(10).float(), make(11).float()
    pruning_utils.apply_mask(model, random_masks(model, 0, 0.3))
    pruning_utils.apply_mask(best, random_masks(best, 1, 0.7))
    return model, pruning_utils.clone_state(initial), pruning_utils.clone_state(best)


def rewound(run, ticket, kind, t=2):
    """The state after main_TD's rewinding of a copy of the ticket."""
    trained, _, best = ticket
    run.args.rewind, model = kind, make(0).float()
    pruning_utils.load_state(model, trained.state_dict())
    main_TD.rewind(model, t, best, run)
    return pruning_utils.clone_state(model)


def test_each_kind_of_rewinding_sets_the_convolutions_alone(run, ticket):
    model, initial, best = ticket
    before = pruning_utils.clone_state(model)
    trained, masks, others = keys_of(model)
    sources = {"zero": initial, "best": dense_state(best), "finetune": dense_state(before)}
    for kind in ("zero", "best", "finetune", "rand"):
        after = rewound(run, ticket, kind)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in masks + others)
        for key in trained if kind in sources else ():
            assert torch.equal(after[key], sources[kind][key.replace("weight_orig", "weight")])


def test_rand_is_new_and_depends_only_on_seed_and_task(args, run, ticket):
    trained, _, _ = keys_of(ticket[0])
    torch.manual_seed(1)
    first = rewound(run, ticket, "rand")
    torch.manual_seed(2)
    assert same(rewound(run, ticket, "rand"), first)
    others = [rewound(run, ticket, kind) for kind in ("zero", "best", "finetune")]
    others.append(rewound(run, ticket, "rand", t=3))
    args.seed = 1
    others.append(rewound(run, ticket, "rand"))
    for other in others:
        assert not any(torch.equal(first[key], other[key]) for key in trained)
    for key in trained:  # PyTorch's default initialization: uniform within 1/sqrt(fan-in)
        bound = first[key][0].numel() ** -0.5
        assert 0.8 * bound < first[key].abs().max() <= bound * 1.0001


def test_scope_all_rewinds_batchnorm_and_heads_too(args, run, ticket):
    args.rewind_scope = "all"
    _, initial, best = ticket
    _, masks, others = keys_of(ticket[0])
    before = pruning_utils.clone_state(ticket[0])
    for kind, source in (("zero", initial), ("best", best), ("finetune", before)):
        after = rewound(run, ticket, kind)
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


def test_any_pruned_checkpoint_gives_masks_and_a_dense_one_none(tmp_path, args):
    model = make(12)
    dense = tmp_path / "dense.pt"
    save_checkpoint(dense, model.state_dict())
    with pytest.raises(UserError, match="dense.pt: holds no masks"):
        pruning_utils.load_masks(dense)
    masks = random_masks(model, 0)
    pruning_utils.apply_mask(model, masks)
    optimizer = trainer.make_optimizer(model, args, 0.1)
    content = trainer.checkpoint_dict(model, optimizer, 1, 50.0)
    save_checkpoint(tmp_path / "checkpoint.pt", content)
    save_checkpoint(tmp_path / "raw.pt", model.state_dict())
    for name in ("checkpoint.pt", "raw.pt"):
        assert same_masks(pruning_utils.load_masks(tmp_path / name), masks)


def bad_masks(kind):
    """Masks that do not fit the network of width 4, and a part of the message."""
    masks = random_masks(make(12), 0)
    if kind == "width":
        return random_masks(make(12, width=8), 0), "--width"
    if kind == "arch":
        return random_masks(ResNet32(2, 3, 4), 0), "--arch"
    if kind == "missing":
        return without(masks, "layer3.0.conv2"), "layer3.0.conv2"
    if kind == "more":
        return {**masks, "layer5": torch.ones(1)}, "layer5"
    masks["layer1.1.conv1"][0, 0, 0, 0] = float(kind)
    return masks, "layer1.1.conv1"


@pytest.mark.parametrize(
    "kind", ["width", "arch", "missing", "more", "2", "0.5", "-1", "nan", "inf"]
)
def test_masks_of_another_network_or_of_other_numbers_are_an_error(tmp_path, kind):
    model = make(12)
    pruning_utils.apply_mask(model, random_masks(model, 1))
    before = pruning_utils.clone_state(model)
    masks, fragment = bad_masks(kind)
    pruning_utils.save_masks(tmp_path / "M.pt", masks)
    masks = pruning_utils.load_masks(tmp_path / "M.pt")
    for check in (
        lambda: pruning_utils.check_masks(model, masks, "--mask M.pt"),
        lambda: pruning_utils.load_state(model, before, masks, source="--mask M.pt"),
    ):
        with pytest.raises(UserError) as error:
            check()
        assert str(error.value).startswith("--mask M.pt: ") and fragment in str(error.value)
    assert same(pruning_utils.clone_state(model), before)


def test_valid_masks_pass_the_check():
    model = make(12)
    for masks in (random_masks(model, 0), pruning_utils.masks_of(model), {}):
        pruning_utils.check_masks(model, masks, "M.pt")
