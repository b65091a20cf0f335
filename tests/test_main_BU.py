"""The decisions of main_BU (docs/METHOD.md section 6) on accuracies that are given."""

from types import SimpleNamespace

import pytest
import torch

import main_BU
import pruning_utils
import trainer
from runtime.errors import UserError


def about(density):
    """Of a narrow network, whose counts are rounded."""
    return pytest.approx(density, abs=0.1)


@pytest.fixture
def model(args):
    args.width = 2
    return trainer.make_model(args, torch.device("cpu"))


@pytest.fixture
def search(model, monkeypatch):
    """Run a search of main_BU with accuracies in place of retraining, which counts in `bn1`.

    Returns the ticket's density, the numbers of retrainings in its state and of rounds, the masks.
    """

    def search(find, t, accuracies, changes, *arguments):
        flags = {"percent": 0.2, "deacc": 2.0, "base_sparsity": 90.0, "max_iter_prun": 26}
        flags |= {"select_on": "val", "criterion": "magnitude", "seed": 0, "accept_decay": 1.0}
        left = iter(accuracies)  # StopIteration if it is called more often

        def retrain(model, task, run, stage, stream, split):
            assert split is task.data.val
            model.layer1[0].bn1.weight.data += 1
            return SimpleNamespace(best=next(left))

        monkeypatch.setattr(trainer, "retrain", retrain)
        run = SimpleNamespace(args=SimpleNamespace(**flags | changes), log=print)
        task = SimpleNamespace(t=t, data=SimpleNamespace(test={}, val={}))
        masks, state, rounds = find(model, task, run, *arguments)
        assert all(torch.equal(state[f"{name}.weight_mask"], masks[name]) for name in masks)
        retrained = round(state["layer1.0.bn1.weight"][0].item()) - 1
        return pruning_utils.density(masks), retrained, len(rounds), masks

    return search


def points(k, n=3000, less=0):
    """k of n, in percent."""
    return 100.0 * (k - less) / n


# drops of exactly 2 points that the difference of two floats misses
BELOW, ABOVE = (
    next(k for k in range(100, 3000) if wrong(points(k) - points(k, less=60)))
    for wrong in (lambda drop: drop < 2, lambda drop: drop > 2)
)


@pytest.mark.parametrize(
    "accuracies, prunings, changes, why",
    [
        ([98] * 10 + [90], 10, {}, "dropped and sparse after 11: the mask of 10"),
        ([90] * 11, 10, {}, "dropped from the start, sparse only after 11 (91.4 %)"),
        ([98] * 10 + [97] * 2 + [90], 12, {}, "dropped later"),
        ([96] * 11, 10, {}, "a drop of exactly deacc is too much"),
        ([96.01] * 26, 26, {}, "and less is not"),
        ([97] * 26, 26, {}, "never dropped: 26, the 27th is undone without retraining"),
        ([90] * 26, 26, {"base_sparsity": 100.0}, "never sparse enough: 26"),
        ([90] * 3, 3, {"max_iter_prun": 3}, "at most 3"),
        ([98] * 11, 10, {"deacc": 0.0}, "no drop is too much"),
        ([99.5] * 11, 10, {"deacc": -2.0}, "a gain below 2 points is a drop too"),
    ],
)
def test_BU_ticket_of_task_1(search, accuracies, prunings, changes, why):
    density, retrained, rounds, _ = search(main_BU.find_ticket, 1, accuracies, changes, 98.0)
    assert density == about(100 * 0.8**prunings), why
    assert (retrained, rounds) == (prunings, len(accuracies)), why


@pytest.mark.parametrize("k", [BELOW, ABOVE])
def test_BU_a_drop_of_exactly_deacc_is_one_whatever_the_rounding(search, model, k):
    accuracies = [points(k)] * 10 + [points(k, less=60)]
    assert search(main_BU.find_ticket, 1, accuracies, {}, points(k))[2] == 11
    # a re-growth keeps the state after it: of two rounds, nothing being kept
    pruning_utils.apply_mask(model, {})
    nothing = {name: torch.zeros_like(mask) for name, mask in pruning_utils.masks_of(model).items()}
    changes = {"base_sparsity": 30.0, "max_iter_prun": 2}
    found = search(main_BU.regrow, 2, [points(k), accuracies[-1]], changes, points(k), nothing)
    assert found[0] == about(64)


@pytest.mark.parametrize(
    "accuracies, changes", [([50], {"percent": 0.95}), ([], {"deacc": 0.0, "base_sparsity": 0.0})]
)
def test_BU_without_a_ticket_is_an_error(search, accuracies, changes):
    """The first pruning is too much; published: with these limits there is none."""
    with pytest.raises(UserError, match=f"--percent {changes.get('percent', 0.2)}, --deacc"):
        search(main_BU.find_ticket, 1, accuracies, changes, 98.0)


@pytest.mark.parametrize(
    "accuracies, prunings, retrained, changes, why",
    [
        ([98] * 26, 26, 26, {}, "never dropped: 26"),
        ([90] * 13, 13, 13, {"base_sparsity": 85}, "the 14th would be too sparse"),
        ([98] * 17 + [90], 17, 17, {"base_sparsity": 85}, "the state before the 18th"),
        ([98] * 17 + [96], 18, 18, {"base_sparsity": 85}, "exactly deacc: it counts"),
        ([90], 1, 0, {"base_sparsity": 10}, "dropped after the first: not retrained"),
        ([90] * 26, 26, 26, {}, "a mask denser than 10 %: never sparse enough"),
        ([], 1, 0, {"deacc": 0, "base_sparsity": 10}, "published: not entered"),
        ([98], 1, 1, {"deacc": -5, "base_sparsity": 18}, "the second is too sparse"),
    ],
)
def test_BU_regrowth(search, model, accuracies, prunings, retrained, changes, why):
    current = pruning_utils.masks_of(model)
    scores = pruning_utils.magnitude(model)
    for _ in range(10):
        current = pruning_utils.prune(scores, current, 0.2)
    kept = pruning_utils.density(current)  # 10.74 %
    found = search(main_BU.regrow, 2, accuracies, changes, 98.0, current)
    assert found[0] == about(kept + (100 - kept) * 0.8**prunings), why
    assert found[1:3] == (retrained, len(accuracies)), why
    assert all(bool((current[name] <= found[3][name]).all()) for name in current)


@pytest.mark.parametrize(
    "accept, less, regrown",
    [(1, 0, False), (1, 89, False), (1, 90, True), (0, 0, True), (-1, -89, True), (2, 179, False)],
)
def test_BU_keeps_its_mask_while_it_costs_less_than_accept_decay(
    monkeypatch, accept, less, regrown
):
    """Costs are of integer counts: 90 of 3 x 3000 images are exactly 1 point, for all counts."""
    monkeypatch.setattr(main_BU, "regrow", lambda model, task, run, *given: given)
    run = SimpleNamespace(args=SimpleNamespace(accept_decay=accept), log=print)
    task, generator = SimpleNamespace(t=3), torch.Generator().manual_seed(0)
    for counts in torch.randint(600, 2900, (200, 3), generator=generator).tolist():
        dense = {"accuracy": [points(k) for k in counts], "overall": 12.5}
        masked = {"accuracy": [points(k, less=n) for k, n in zip(counts, (less, 7, -7))]}
        found = main_BU.keep_or_regrow(None, task, run, dense, masked, "mask")
        assert found == ((12.5, "mask") if regrown else ("mask", None, []))
