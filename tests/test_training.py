"""Training against METHOD.md section 4: steps in float64, batches, views, and the loop."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

import dataset
import pruning_utils
import trainer
import utils
from models import ResNet

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64: far above rounding, far below any mistake
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4


# ------------------------------------------------------------------------------ helpers


def make_pair(classifiers=5):
    """The same narrow network twice, in float64: for the code under test and the reference."""
    torch.manual_seed(1)
    model = ResNet(2, classifiers, width=4).double()
    return model.train(), copy.deepcopy(model).train()


def random_masks(model, share=0.6):
    generator = torch.Generator().manual_seed(2)
    return {
        name: (torch.rand(weight.shape, generator=generator) < share).float()
        for name, weight in pruning_utils.weights(model).items()
    }


def images(n, generator):
    return torch.randn(n, 3, 16, 16, generator=generator, dtype=torch.float64)


def labeled(n, first, last, generator):
    """Images and labels of the classes first..last-1."""
    return images(n, generator), torch.randint(first, last, (n,), generator=generator)


def sub_batches(k, n_random, n_new, n_old, n_unlabeled, seed=3):
    """Four sub-batches of task k, two classes per task, of the sizes asked for."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n_unlabeled, 2 * (k - 1), generator=generator, dtype=torch.float64)
    return (
        labeled(n_random, 0, 2 * k, generator),
        labeled(n_new, 2 * (k - 1), 2 * k, generator),
        labeled(n_old, 0, 2 * (k - 1), generator),
        (images(n_unlabeled, generator), *(3 * logits)),
    )


def plain_sgd(model, lr=LR):
    return torch.optim.SGD(model.parameters(), lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def plain_step(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def assert_same_gradients(ours, plain):
    wanted = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(
                parameter.grad, wanted[name].grad, **CLOSE, msg=lambda m, name=name: f"{name}: {m}"
            )


def assert_same_state(ours, plain):
    """Parameters, masks, BatchNorm's statistics and its number of passes."""
    ours, plain = (m if isinstance(m, dict) else m.state_dict() for m in (ours, plain))
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture
def in_float64(monkeypatch):
    """Batches come normalised in float64, so that a float64 network can be trained on them."""
    normalise = dataset.normalise
    monkeypatch.setattr(dataset, "normalise", lambda *both: normalise(*both).double())


# ------------------------------------------------------------------------------ the step


def make_trained_pair(args, masked):
    """The network under test and its optimizer, then those of the reference, under one mask."""
    ours, plain = make_pair()
    # made before the masks, as main_TD does: the parameters must stay the same objects
    optimizer = trainer.make_optimizer(ours, args, LR)
    if masked:
        reference.put_under(plain, random_masks(plain))
        pruning_utils.apply_mask(ours, random_masks(ours))
    plain_optimizer = plain_sgd(plain)
    return ours, optimizer, plain, plain_optimizer


@pytest.mark.parametrize("masked", [False, True])
def test_task_1_steps_are_those_of_two_passes(args, masked):
    ours, optimizer, plain, plain_optimizer = make_trained_pair(args, masked)
    generator = torch.Generator().manual_seed(4)
    for n in (6, 5, 1, 6):
        x, y = labeled(n, 0, 2, generator)
        loss, wanted = trainer.task1_loss(ours, x, y), reference.task1_loss(plain, x, y)
        torch.testing.assert_close(loss, wanted, **CLOSE)
        trainer.descend(loss, optimizer)
        plain_step(wanted, plain_optimizer)
        assert_same_gradients(ours, plain)
        assert_same_state(ours, plain)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "k, sub, sizes",
    [
        (2, 6, [(6, 3, 3, 6), (2, 3, 1, 6), (6, 1, 3, 2), (1, 3, 3, 6)]),
        (3, 7, [(7, 2, 4, 7), (3, 2, 1, 7), (7, 1, 4, 1), (7, 2, 2, 7)]),
    ],
)
def test_distillation_steps_are_those_of_five_passes(args, k, sub, sizes, masked):
    ours, optimizer, plain, plain_optimizer = make_trained_pair(args, masked)
    for seed, size in enumerate(sizes):
        batches = sub_batches(k, *size, seed=seed)
        loss = trainer.KD_loss(ours, k, sub, *batches)
        wanted = reference.KD_loss(plain, k, sub, *batches)
        torch.testing.assert_close(loss, wanted, **CLOSE)
        trainer.descend(loss, optimizer)
        plain_step(wanted, plain_optimizer)
        assert_same_gradients(ours, plain)
        assert_same_state(ours, plain)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k, sub, sizes", [(2, 6, [(6, 3, 3), (2, 3, 1)]), (3, 7, [(7, 2, 4)] * 3)])
def test_steps_without_teaching_are_those_of_three_passes(args, k, sub, sizes, masked):
    ours, optimizer, plain, plain_optimizer = make_trained_pair(args, masked)
    for seed, size in enumerate(sizes):
        batches = sub_batches(k, *size, 1, seed=seed)[:3]
        loss = trainer.KD_loss(ours, k, sub, *batches)
        wanted = reference.exemplars_loss(plain, k, sub, *batches)
        torch.testing.assert_close(loss, wanted, **CLOSE)
        trainer.descend(loss, optimizer)
        plain_step(wanted, plain_optimizer)
        assert_same_gradients(ours, plain)
        assert_same_state(ours, plain)


def test_pruned_weights_only_decay(args):
    """What a mask hides has no gradient, but weight decay and momentum still move it."""
    model, _ = make_pair()
    masks = random_masks(model)
    pruning_utils.apply_mask(model, masks)
    hidden = masks["layer3.0.conv2"] == 0
    wanted = pruning_utils.weights(model)["layer3.0.conv2"][hidden].clone()
    velocity = torch.zeros_like(wanted)
    optimizer = trainer.make_optimizer(model, args, LR)
    for seed in range(3):
        trainer.descend(trainer.KD_loss(model, 2, 4, *sub_batches(2, 4, 2, 2, 4, seed)), optimizer)
        velocity = MOMENTUM * velocity + WEIGHT_DECAY * wanted
        wanted = wanted - LR * velocity
    found = pruning_utils.weights(model)["layer3.0.conv2"][hidden]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_groups_of_a_step_are_not_those_of_the_next_pass(fails):
    """A batch of the same size that passes next is one batch, also after a step that failed."""
    model, plain = make_pair()
    batches = sub_batches(2, 4, 2, 2, 4)
    if fails:
        batches = [(x.repeat(1, 2, 1, 1), *rest) for x, *rest in batches]  # 6 channels
        with pytest.raises(RuntimeError, match="channels"):
            trainer.KD_loss(model, 2, 4, *batches)
    else:
        trainer.KD_loss(model, 2, 4, *batches)
        plain.load_state_dict(model.state_dict())
    x = images(12, torch.Generator().manual_seed(5))
    torch.testing.assert_close(model(x), plain(x), **CLOSE)
    assert_same_state(model, plain)


def test_in_eval_mode_groups_do_not_matter():
    model, plain = make_pair()
    x = images(7, torch.Generator().manual_seed(5))
    found = model.eval().features(x, groups=((4, 1), (3, 2)))
    assert torch.equal(found, plain.eval().features(x))
    assert_same_state(model, plain)


def relative(found, wanted):
    """How far two lists of tensors are apart, in units of the second."""
    found, wanted = (torch.cat([tensor.flatten() for tensor in each]) for each in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("masked", [False, True])
def test_steps_in_bf16_are_near_those_in_fp32_and_leave_all_in_fp32(args, masked, monkeypatch):
    """A rounding to bf16 is off by up to 2^-9, some 40 of them in a row by about 1 %.

    It also turns ReLUs that are near zero on or off, which alone makes a gradient differ by
    20 % here; so a smooth function takes their place.
    """
    monkeypatch.setattr(torch.nn.functional, "relu", torch.nn.functional.softplus)
    batches = [
        [tensor.float() if tensor.is_floating_point() else tensor for tensor in batch]
        for batch in sub_batches(2, 12, 6, 6, 12)
    ]
    found = {}
    for precision in ("fp32", "bf16"):
        args.precision = precision
        model = trainer.make_model(args, torch.device("cpu")).train()
        optimizer = trainer.make_optimizer(model, args, LR)
        masks = random_masks(model) if masked else {}
        pruning_utils.apply_mask(model, masks)
        before = pruning_utils.clone_state(model)
        loss = trainer.KD_loss(model, 2, 12, *batches)
        trainer.descend(loss, optimizer)
        after = model.state_dict()
        statistics = [value for key, value in after.items() if "running" in key]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        moved = [after[name] - before[name] for name, _ in model.named_parameters()]
        found[precision] = [loss.detach()[None]], statistics, gradients, moved
        buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
        assert len(buffers) == len(gradients)
        for tensor in (*model.parameters(), *statistics, *gradients, *buffers, loss):
            assert tensor.dtype == torch.float32
        for name, mask in masks.items():
            hidden = pruning_utils.convolutions(model)[name].weight_orig.grad[mask == 0]
            assert len(hidden) and not hidden.any()
    for fp32, bf16 in zip(found["fp32"], found["bf16"]):
        assert relative(bf16, fp32) < 0.05
    assert relative(found["bf16"][2], found["fp32"][2]) > 1e-4  # the gradients: it was bf16


@pytest.mark.parametrize("k", [1, 2, 3])
def test_heads_to_come_are_not_touched(args, k):
    """Neither by gradients nor by weight decay, whose share of a step would be visible here."""
    model, _ = make_pair()
    before = copy.deepcopy(model.state_dict())
    optimizer = trainer.make_optimizer(model, args, LR)
    for seed in range(3):
        batches = sub_batches(max(k, 2), 6, 3, 3, 6, seed)
        if k == 1:
            loss = trainer.task1_loss(model, batches[0][0], batches[0][1] % 2)
        else:
            loss = trainer.KD_loss(model, k, 6, *batches)
        trainer.descend(loss, optimizer)
    after = model.state_dict()
    for kind in ("linear", "linear_main"):
        for head in range(5):
            for name in (f"{kind}.{head}.weight", f"{kind}.{head}.bias"):
                assert torch.equal(before[name], after[name]) == (head >= k), name


def test_heads_to_come_are_not_touched_after_another_use_of_the_model(args):
    """A gradient left behind (of zeros, say) would let weight decay at the heads to come."""
    model, _ = make_pair()
    batches = sub_batches(2, 4, 2, 2, 4)
    model(batches[0][0]).sum().mul(0).backward()  # through all heads
    before = copy.deepcopy(model.linear_main[2].state_dict())
    optimizer = trainer.make_optimizer(model, args, LR)
    trainer.descend(trainer.KD_loss(model, 2, 4, *batches), optimizer)
    for name, value in model.linear_main[2].state_dict().items():
        assert torch.equal(value, before[name]), name


# ------------------------------------------------------------------------------ the parts


# change what one part of the loss alone depends on: labels or stored logits of a sub-batch
PLACES = {"random": (0, 1), "new": (1, 1), "old": (2, 1), "KD": (3, 1), "KD_main": (3, 2)}


@pytest.mark.parametrize(
    "k, sub, a, b",
    [
        (2, 6, 3 / 6, 3 / 6),
        (2, 7, 3 / 7, 3 / 7),
        (3, 7, 2 / 7, 4 / 7),
        (3, 8, 2 / 8, 5 / 8),
        (5, 64, 12 / 64, 51 / 64),
        (3, 3, 1 / 3, 2 / 3),
    ],
)
@pytest.mark.parametrize("sizes", [(5, 3, 4, 6), (1, 1, 7, 2)])
def test_each_part_has_its_weight_whatever_the_batch_holds(k, sub, a, b, sizes):
    weights = {"random": 1, "KD": 1, "new": a / 2, "old": b / 2, "KD_main": 1 / 2}
    batches = sub_batches(k, *sizes)
    ours, plain = make_pair()
    loss = trainer.KD_loss(ours, k, sub, *batches)
    parts = reference.KD_parts(plain, k, *batches)
    for part, (batch, place) in PLACES.items():
        changed = [list(tensors) for tensors in batches]
        tensor = changed[batch][place]
        # within the classes that the part tells apart
        changed[batch][place] = tensor ^ 1 if place == 1 and batch < 3 else tensor.flip(1) + tensor
        change = trainer.KD_loss(ours, k, sub, *changed) - loss
        wanted = reference.KD_parts(plain, k, *changed)[part] - parts[part]
        assert wanted.abs() > 1e-6
        torch.testing.assert_close(change, weights[part] * wanted, rtol=1e-7, atol=1e-11)


def test_distillation_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits, stored = 5 * torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    found = trainer.distillation(logits, stored)
    torch.testing.assert_close(found, reference.KD(logits, stored), **CLOSE)
    flat = torch.zeros(3, 4, dtype=torch.float64)
    assert trainer.distillation(flat, flat).item() == pytest.approx(4 * math.log(4))
    # softmax of (2 log 3)/2 and 0 is 3/4 and 1/4
    stored = torch.tensor([[2 * math.log(3), 0]], dtype=torch.float64)
    wanted = 4 * -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert trainer.distillation(stored, stored).item() == pytest.approx(wanted)


# ------------------------------------------------------------------------------ an epoch


NEW, OLD, UNLABELED = 17, 7, 11


def constant_images(first, n):
    """n images whose every pixel tells which one it is, views of it included."""
    return torch.arange(first, first + n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 16, 16, 3)


def numbered_task(t=3):
    """Images 1.. are new, 101.. old, 201.. unlabeled; labels and logits tell the number too."""
    new, old = constant_images(1, NEW), constant_images(101, OLD)
    unlabeled = constant_images(201, UNLABELED)
    new, old = ((x, x[:, 0, 0, 0].long()) for x in (new, old))
    number = unlabeled[:, 0, 0, :1].float()
    logits = number + torch.arange(2 * (t - 1)) / 100
    both = tuple(torch.cat(pair) for pair in zip(new, old))
    return trainer.Task(t, both, new, old, (unlabeled, logits, -logits))


def watch(monkeypatch, name):
    """Let the loss `name` of trainer note its sub-batches, and cost nothing."""
    seen = []

    def loss(model, *inputs):
        tensors = inputs[2:] if name == "KD_loss" else [inputs]
        seen.append([tuple(x.clone() for x in batch) for batch in tensors])
        return 0 * model.conv1.weight.sum()

    monkeypatch.setattr(trainer, name, loss)
    return seen


def epoch_of(seen, run_epoch, task, data, args, step="task3", epoch=1):
    """The sub-batches of one epoch: a list with a list of tuples for each step."""
    seen.clear()
    model = ResNet(2, 3, width=1)
    counts = [
        count
        for _, count in run_epoch(
            model, trainer.make_optimizer(model, args, LR), task, data, args, step, epoch
        )
    ]
    assert counts == [sum(len(batch[0]) for batch in batches) for batches in seen]
    return copy.copy(seen)


def numbers(batch, data):
    """Which of the numbered images the batch holds: the padding is darker than any of them."""
    return ((batch[0] * data.std + data.mean) * 255).round().amax((1, 2, 3)).long().tolist()


def test_an_epoch_of_task_1_is_one_pass(args, data, monkeypatch):
    seen, task = watch(monkeypatch, "task1_loss"), numbered_task()
    args.batch_size = 9
    batches = [batch for (batch,) in epoch_of(seen, trainer.train, task, data, args)]
    assert [len(batch[0]) for batch in batches] == [9, 9, 6]  # none is dropped for being small
    held = [numbers(batch, data) for batch in batches]
    assert sorted(sum(held, [])) == sorted(task.random[1].tolist())
    assert sum(held, []) != task.random[1].tolist()
    assert [batch[1].tolist() for batch in batches] == held


@pytest.mark.parametrize(
    "t, batch_size, steps, sizes",
    [
        (2, 40, [10, 10, 4], (5, 5, 10)),
        (3, 20, [5, 5, 5, 5, 4], (1, 3, 5)),
        (3, 23, [5, 5, 5, 5, 4], (1, 3, 5)),
        (3, 12, [3] * 8, (1, 2, 3)),
        (2, 16, [4] * 6, (2, 2, 4)),
        (2, 400, [24], (50, 50, 100)),
    ],
)
def test_an_epoch_is_one_random_pass_and_the_others_begin_again(
    args, data, monkeypatch, t, batch_size, steps, sizes
):
    seen, task = watch(monkeypatch, "KD_loss"), numbered_task(t)
    args.batch_size = batch_size
    epoch = epoch_of(seen, trainer.train_KD, task, data, args)
    random, new, old, unlabeled = zip(*epoch)
    assert [len(x) for x, _ in random] == steps
    held = sum((numbers(batch, data) for batch in random), [])
    assert sorted(held) == sorted(task.random[1].tolist())
    assert held != task.random[1].tolist()
    for batches, size, all_numbers in zip(
        (new, old, unlabeled), sizes, (range(1, 18), range(101, 108), range(201, 212))
    ):
        one_pass = [
            min(size, len(all_numbers) - start) for start in range(0, len(all_numbers), size)
        ]
        wanted = (one_pass * len(batches))[: len(batches)]
        assert [len(batch[0]) for batch in batches] == wanted
        held = sum((numbers(batch, data) for batch in batches), [])
        passes = [held[i : i + len(all_numbers)] for i in range(0, len(held), len(all_numbers))]
        assert all(set(p) <= set(all_numbers) and len(set(p)) == len(p) for p in passes)
        whole = [tuple(p) for p in passes if len(p) == len(all_numbers)]
        assert len(set(whole)) == len(whole), "a pass is shuffled as one before"
        assert tuple(all_numbers) not in whole


def test_without_teaching_the_other_batches_are_the_same(args, data, monkeypatch):
    seen, task = watch(monkeypatch, "KD_loss"), numbered_task()
    taught = epoch_of(seen, trainer.train_KD, task, data, args)
    alone = epoch_of(seen, trainer.train_KD, task._replace(unlabeled=None), data, args)
    assert len(alone) == len(taught)
    for batches, wanted in zip(alone, taught):
        assert len(batches) == 3
        assert all(torch.equal(a, b) for x, y in zip(batches, wanted) for a, b in zip(x, y))


def test_rows_of_a_batch_stay_together(args, data, monkeypatch):
    seen, task = watch(monkeypatch, "KD_loss"), numbered_task()
    for batches in epoch_of(seen, trainer.train_KD, task, data, args):
        for batch in batches[:3]:
            assert batch[1].tolist() == numbers(batch, data)
        x, logits, logits_main = batches[3]
        assert logits[:, 0].tolist() == numbers(batches[3], data)
        assert torch.equal(logits_main, -logits) and logits.shape == (len(x), 4)


def noise(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (n, 16, 16, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("published", [False, True])
def test_training_images_are_augmented_and_unlabeled_ones_are_not(
    args, data, monkeypatch, published
):
    """published: the stored images are float32, normalised, as in the published files."""
    seen = watch(monkeypatch, "KD_loss")
    new, old, unlabeled = noise(6, 1), noise(6, 2), noise(6, 3)
    places = torch.arange(6)
    stored = reference.normalise(unlabeled, [0.5] * 3, [0.25] * 3).float()
    lesson = (stored if published else unlabeled, places[:, None].float(), places[:, None].float())
    task = trainer.Task(2, (new, places), (new, places), (old, places), lesson)
    args.batch_size, views = 8, {"random": [], "new": [], "old": []}
    for epoch in (1, 2, 3):
        for batches in epoch_of(seen, trainer.train_KD, task, data, args, epoch=epoch):
            for (name, found), (x, labels), originals in zip(
                views.items(), batches, (new, new, old)
            ):
                pixels = ((x * data.std + data.mean) * 255).round().byte().permute(0, 2, 3, 1)
                for image, place in zip(pixels.numpy(), labels):
                    view = reference.find_view(image, originals[place].numpy(), pad=4)
                    assert view is not None, f"{name}: no view of its image"
                    found.append(view)
            x, logits, _ = batches[3]
            torch.testing.assert_close(x, stored[logits[:, 0].long()])
    for found in views.values():
        flips, down, right = (set(draws) for draws in zip(*found))
        assert flips == {False, True} and len(down) > 3 and len(right) > 3
        # each image draws for itself, and down and right apart
        assert len(set(found)) > 0.75 * len(found)
        assert sum(dy not in (dx, 8 - dx) for _, dy, dx in found) > len(found) / 2


def content(batches):
    return [[tensor for batch in step for tensor in batch] for step in batches]


def same(some, other):
    some, other = content(some), content(other)
    return len(some) == len(other) and all(
        all(torch.equal(a, b) for a, b in zip(*step)) for step in zip(some, other)
    )


@pytest.mark.parametrize("name, run", [("task1_loss", "train"), ("KD_loss", "train_KD")])
def test_batches_hang_on_seed_step_and_epoch_alone(args, data, monkeypatch, name, run):
    seen, task = watch(monkeypatch, name), numbered_task()
    run_epoch = getattr(trainer, run)
    first = epoch_of(seen, run_epoch, task, data, args, epoch=2)
    torch.manual_seed(99)
    for epoch in (1, 3):
        other = epoch_of(seen, run_epoch, task, data, args, epoch=epoch)
        assert not same(first, other)
    torch.rand(5)
    np.random.seed(7)
    assert same(first, epoch_of(seen, run_epoch, task, data, args, epoch=2))
    assert not same(first, epoch_of(seen, run_epoch, task, data, args, step="task4", epoch=2))
    args.seed = 1
    assert not same(first, epoch_of(seen, run_epoch, task, data, args, epoch=2))


@pytest.mark.parametrize("change", [{"epoch": 2}, {"step": "task4"}, {"seed": 1}])
def test_every_sub_batch_is_drawn_anew(args, data, monkeypatch, change):
    """Each of the four has a stream of its own, which seed, step and epoch change."""
    seen, task = watch(monkeypatch, "KD_loss"), numbered_task(2)
    first = epoch_of(seen, trainer.train_KD, task, data, args)
    args.seed = change.pop("seed", args.seed)
    other = epoch_of(seen, trainer.train_KD, task, data, args, **change)
    for some, others in zip(zip(*first), zip(*other)):
        held = [sum((numbers(b, data) for b in batches), []) for batches in (some, others)]
        assert held[0] != held[1]


@pytest.mark.parametrize("t", [1, 2, 3])
def test_a_task_learns_from_new_images_and_old_exemplars(data, t):
    task, c = trainer.make_task(data, t, "lesson"), 2
    order = [3, 1, 5, 0, 2, 4]  # a label is the class's place in it
    wanted = {"new": [], "old": []}
    for place in range((t - 1) * c, t * c):
        wanted["new"] += [(place, image) for image in data.train[order[place]]]
    for place in range((t - 1) * c):
        wanted["old"] += [(place, image) for image in data.exemplars[order[place]]]
    wanted["random"] = wanted["new"] + wanted["old"]
    for name, rows in wanted.items():
        x, y = getattr(task, name)
        found = sorted((label, image.numpy().tobytes()) for label, image in zip(y.tolist(), x))
        assert found == sorted((label, image.numpy().tobytes()) for label, image in rows), name
        assert x.dtype == torch.uint8 and y.dtype == torch.int64
    assert task.t == t and task.unlabeled == "lesson"


# ------------------------------------------------------------------------------ views


@pytest.mark.parametrize("pad", [4, 2])
def test_augment_makes_every_view_once(pad):
    """The draws reach all flips and offsets alike; which is first, flip or crop, is free."""
    side = range(2 * pad + 1)
    draws = [(f, dy, dx) for f in (False, True) for dy in side for dx in side]
    pixels = noise(len(draws), 4)[:, :12]  # not square: rows and columns are told apart
    flip, dy, dx = (torch.tensor(column) for column in zip(*draws))
    found = dataset.augment(pixels, flip, dy, dx, pad)
    assert found.dtype == torch.uint8 and found.shape == pixels.shape
    views = [
        reference.find_view(image, original, pad)
        for image, original in zip(found.numpy(), pixels.numpy())
    ]
    assert [view[:2] for view in views] == [draw[:2] for draw in draws]
    assert sorted(views) == draws


@pytest.mark.parametrize("pad", [4, 2])
def test_views_are_drawn_evenly_and_apart(pad):
    side = 2 * pad + 1
    n = 200 * 2 * side**2
    flip, dy, dx = dataset.draw_views(n, pad, torch.Generator().manual_seed(5))
    assert flip.dtype == torch.bool and dy.dtype == dx.dtype == torch.int64
    assert {*dy.tolist()} == {*dx.tolist()} == {*range(side)}
    assert abs(flip.double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(n)
    counts = torch.bincount((flip * side + dy) * side + dx, minlength=2 * side**2).double()
    cells = len(counts)
    assert cells == 2 * side**2
    # chi square has mean cells-1 and variance 2(cells-1)
    assert ((counts - 200) ** 2 / 200).sum() < cells - 1 + 5 * math.sqrt(2 * (cells - 1))


def test_normalise_is_the_formula(data):
    data.mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    data.std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    before = pixels.clone()
    found = dataset.normalise(pixels, data)
    assert found.dtype == torch.float32 and found.shape == (1, 3, 16, 16)
    wanted = reference.normalise(pixels, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(pixels, before)
    assert torch.equal(dataset.normalise(found.clone(), data), found)  # the published form


@pytest.mark.parametrize("n", [1, 5])
def test_what_is_normalised_has_its_channels_last_in_memory(data, n):
    pixels = noise(n, 4)
    found = dataset.normalise(pixels, data)
    published = found.clone(memory_format=torch.contiguous_format)
    for images in (found, dataset.normalise(published, data)):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, found)
    assert published.is_contiguous()  # left as it was


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("t", [1, 2])
def test_batches_reach_the_network_with_their_channels_last(args, data, t, published):
    """published: the stored images are float32, normalised, and their channels come first."""
    unlabeled = noise(9, 3).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # as stored
    if published:
        unlabeled = reference.normalise(unlabeled, [0.5] * 3, [0.25] * 3).float()
    task = trainer.make_task(data, t, (unlabeled, torch.zeros(9, 2), torch.zeros(9, 2)))
    model, seen = ResNet(2, 3, width=4), []
    model.conv1.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    run_epoch = trainer.train if t == 1 else trainer.train_KD
    steps = run_epoch(model, trainer.make_optimizer(model, args, LR), task, data, args, "task", 1)
    assert len([*steps]) == len(seen) > 1
    assert all(seen)


# ------------------------------------------------------------------------------ the loop


def scripted(monkeypatch, accuracies, losses=None):
    """Epochs that set conv1 to their number, and validations that answer as scripted.

    Returns what was seen: the lr of each epoch and what validate was asked.
    """
    seen = {"lr": [], "validated": [], "optimizers": []}

    def epoch(model, optimizer, task, data, args, step, epoch, skip):
        assert not skip
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        seen["optimizers"].append(optimizer)
        optimizer.step()  # without gradients: nothing moves, and the schedule is content
        model.conv1.weight.data.fill_(epoch)
        for loss in losses[epoch - 1] if losses else (1.0, 2.0):
            yield torch.tensor(loss), 3

    answers = iter(accuracies)

    def validate(model, part, t, data, args):
        seen["validated"].append((part, t, model.conv1.weight[0, 0, 0, 0].item()))
        return next(answers)

    for name, stand_in in (("train", epoch), ("train_KD", epoch), ("validate", validate)):
        monkeypatch.setattr(trainer, name, stand_in)
    return seen


@pytest.fixture
def setting(args, data):
    """A model and task 2, for loops whose epochs are scripted."""
    args.width = 1
    model = trainer.make_model(args, torch.device("cpu"))
    return model, trainer.make_task(data, 2, None)


def test_lr_falls_to_a_tenth_after_each_milestone(setting, args, run, data, monkeypatch):
    seen = scripted(monkeypatch, range(1, 7))
    args.epochs, args.decreasing_lr = 6, [2, 4]
    trainer.train_task(*setting, data, run, "task2")
    assert seen["lr"] == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_retraining_is_at_a_constant_hundredth_and_stores_its_end(
    setting, args, run, data, monkeypatch
):
    seen = scripted(monkeypatch, [4.0, 6.0, 5.0])
    args.iter_epochs = 3
    found = trainer.retrain(*setting, data, run, "round", part=data.test)
    assert seen["lr"] == pytest.approx([0.0001] * 3)
    assert (found.best, found.best_epoch) == (6.0, 2)
    assert [(part is data.test, t) for part, t, _ in seen["validated"]] == [(True, 2)] * 3
    assert [path.name for path in Path(args.save_dir).glob("*.pt")] == ["round_checkpoint.pt"]
    assert run.load("round_checkpoint.pt")["epoch"] == 3


def test_without_a_part_nothing_is_validated(setting, args, run, data, monkeypatch):
    seen = scripted(monkeypatch, [])
    trainer.retrain(*setting, data, run, "round")
    assert seen["lr"] and not seen["validated"]


@pytest.mark.parametrize(
    "accuracies, best",
    [
        ([10.0, 30.0, 30.0, 20.0], 2),  # a tie keeps the earlier
        ([30.0, 20.0, 10.0, 30.0], 1),
        ([0.0, 0.0, 10.0, 10.0], 3),
        ([10.0, 20.0, 30.0, 40.0], 4),
    ],
)
def test_the_best_and_the_last_epoch_are_stored(
    setting, args, run, data, monkeypatch, accuracies, best
):
    seen = scripted(monkeypatch, accuracies)
    args.epochs = 4
    found = trainer.train_task(*setting, data, run, "task2")
    assert seen["validated"] == [(data.val, 2, e) for e in (1, 2, 3, 4)]  # after each epoch
    folder = Path(args.save_dir)
    names = {"task2_checkpoint.pt", "task2_best_model.pt"}
    assert {path.name for path in folder.glob("*.pt")} == names
    for name, epoch in (("checkpoint", 4), ("best_model", best)):
        stored = torch.load(folder / f"task2_{name}.pt", weights_only=True)
        assert set(stored) == {"epoch", "state_dict", "best_prec1", "optimizer"}
        assert stored["epoch"] == epoch
        assert stored["best_prec1"] == max(accuracies)
        assert (stored["state_dict"]["conv1.weight"] == epoch).all()
        assert stored["state_dict"].keys() == setting[0].state_dict().keys()
    assert (found.best, found.best_epoch) == (max(accuracies), best)
    assert (found.best_state["conv1.weight"] == best).all()
    assert (setting[0].conv1.weight == 4).all()  # the model is the last one


def test_the_best_state_is_a_copy_of_its_own(setting, args, run, data, monkeypatch):
    """What goes on with the model must not change what was the best."""
    scripted(monkeypatch, [1.0, 2.0])
    model, task = setting
    found = trainer.train_task(model, task, data, run, "task2")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert (found.best_state["conv1.weight"] == 2).all()


def test_a_loop_that_broke_off_leaves_where_it_was(setting, args, run, data, monkeypatch):
    scripted(monkeypatch, [50.0, 40.0, 30.0], losses=[(1.0,), (1.0, 2.0), (math.nan,)])
    args.epochs, args.checkpoint_seconds = 3, 0
    with pytest.raises(utils.Refusal):
        trainer.train_task(*setting, data, run, "task2")
    assert [path.name for path in Path(args.save_dir).glob("*.pt")] == ["task2_progress.pt"]
    stored = torch.load(Path(args.save_dir) / "task2_progress.pt", weights_only=True)
    assert (stored["epoch"], stored["batch"], stored["total"].item()) == (2, 2, 3.0)
    assert (stored["best"], stored["best_epoch"]) == (50, 1)
    assert (stored["best_contents"]["state_dict"]["conv1.weight"] == 1).all()
    assert (stored["state_dict"]["conv1.weight"] == 2).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(setting, args, run, data, monkeypatch, tmp_path, bad):
    scripted(monkeypatch, [1.0, 1.0], losses=[(1.0, bad, 1.0), (1.0,)])
    with pytest.raises(utils.Refusal, match="task2, epoch 1: .* of 0.01; --lr 0.01"):
        trainer.train_task(*setting, data, run, "task2")
    assert not [*tmp_path.rglob("*.pt")]


def test_training_that_diverges_is_refused(args, run, data, tmp_path):
    args.lr = 1e30
    model = trainer.make_model(args, torch.device("cpu"))
    with pytest.raises(utils.Refusal, match="--lr 1e\\+30"):
        trainer.train_task(model, trainer.make_task(data, 1, None), data, run, "task1")
    assert not [*tmp_path.rglob("*.pt")]


def test_a_new_optimizer_unless_one_is_given(setting, args, run, data, monkeypatch):
    seen = scripted(monkeypatch, [1.0] * 9)
    args.iter_epochs = 1
    given = trainer.make_optimizer(setting[0], args, 1.0)
    for number, optimizer in enumerate((None, None, given, given)):
        trainer.retrain(*setting, data, run, f"round{number}", optimizer=optimizer)
    one, two, three, four = seen["optimizers"]
    assert three is four is given and len({id(one), id(two), id(given)}) == 3
    for group in one.param_groups:
        assert (group["momentum"], group["weight_decay"]) == (MOMENTUM, WEIGHT_DECAY)
        assert not (group["nesterov"] or group["dampening"])
    assert sum(len(g["params"]) for g in one.param_groups) == len([*setting[0].parameters()])


@pytest.mark.parametrize("given", [True, False])
def test_momentum_is_kept_when_the_optimizer_is_given(args, run, data, monkeypatch, given):
    """Two retrainings in a state of main_TD share theirs; two rounds of main_BU do not."""
    gradient = 0.5

    def epoch(model, optimizer, *_, skip):
        optimizer.zero_grad()
        model.linear[0].bias.grad = torch.full_like(model.linear[0].bias, gradient)
        optimizer.step()
        yield torch.tensor(1.0), 1

    monkeypatch.setattr(trainer, "train", epoch)
    args.width, args.iter_epochs = 1, 2
    model = trainer.make_model(args, torch.device("cpu")).double()
    task = trainer.make_task(data, 1, None)
    weight, velocity = model.linear[0].bias.detach().clone(), 0
    optimizer = trainer.make_optimizer(model, args, args.lr / 100) if given else None
    for number in (1, 2):
        pruning_utils.apply_mask(model, random_masks(model))
        trainer.retrain(model, task, data, run, f"prune{number}", optimizer=optimizer)
        velocity = velocity if given else 0
        for _ in range(2):
            velocity = MOMENTUM * velocity + gradient + WEIGHT_DECAY * weight
            weight = weight - LR / 100 * velocity
    torch.testing.assert_close(model.linear[0].bias.detach(), weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [1, 2])
def test_a_whole_task_is_that_of_the_plain_code(args, run, data, monkeypatch, in_float64, t):
    """Its own batches, replayed: every epoch's lr, validation, the best and the last state."""
    batches, name = [], "KD_loss" if t > 1 else "task1_loss"
    loss = getattr(trainer, name)
    monkeypatch.setattr(
        trainer, name, lambda model, *inputs: batches.append(inputs) or loss(model, *inputs)
    )
    args.epochs, args.decreasing_lr, args.lr, args.batch_size = 3, [2], 0.05, 40
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 12, 2, generator=generator, dtype=torch.float64)
    ours = trainer.make_model(args, torch.device("cpu")).double()
    plain = copy.deepcopy(ours)
    task = trainer.make_task(data, t, (data.pool[:12], *logits) if t > 1 else None)
    found = trainer.train_task(ours, task, data, run, f"task{t}")

    x_val, y_val = (torch.cat(tensors) for tensors in zip(*val_images(data, t)))
    steps = len(batches) // 3
    assert steps == -(-len(task.random[0]) // (40 if t == 1 else 10))
    best, best_state, optimizer = 0, None, plain_sgd(plain, 0.05)
    for epoch, lr in enumerate((0.05, 0.05, 0.005)):
        optimizer.param_groups[0]["lr"] = lr
        plain.train()
        for inputs in batches[epoch * steps : (epoch + 1) * steps]:
            plain_step(getattr(reference, name)(plain, *inputs), optimizer)
        accuracy = reference.accuracy(plain, x_val, y_val, t)
        if accuracy > best:
            best, best_state = accuracy, copy.deepcopy(plain.state_dict())
    assert found.best == pytest.approx(best)
    assert_same_state(ours, plain)
    assert_same_state(found.best_state, best_state)


def val_images(data, t):
    """The normalised val images of the classes of tasks 1..t, with their labels."""
    for place, c in enumerate([3, 1, 5, 0, 2, 4][: 2 * t]):
        x = reference.normalise(data.val[c], [0.5] * 3, [0.25] * 3)
        yield x, torch.full((len(x),), place)


# ------------------------------------------------------------------------------ validation


@pytest.mark.parametrize("t", [1, 2, 3])
def test_validation_is_by_the_balanced_heads_so_far(args, data, in_float64, t):
    """On all classes so far together; heads to come would win every vote here."""
    model, _ = make_pair(classifiers=3)
    for head in range(3):
        for kind in (model.linear, model.linear_main):
            kind[head].bias.data.fill_(1e3 if head >= t else 0)
    model.linear[0].bias.data.fill_(1e3)
    before = copy.deepcopy(model.state_dict())
    parts = [*val_images(data, t)]
    x, y = (torch.cat(tensors) for tensors in zip(*parts))
    found = trainer.validate(model, data.val, t, data, args)
    assert found == pytest.approx(reference.accuracy(model, x, y, t))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    by_task = trainer.test(model, data.val, t, data, args)
    wanted = []
    for first in range(0, 2 * t, 2):
        x, y = (torch.cat(tensors) for tensors in zip(*parts[first : first + 2]))
        wanted.append(reference.accuracy(model, x, y, t))
    assert by_task == pytest.approx(wanted)
