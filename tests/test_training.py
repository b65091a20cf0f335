"""Training against docs/METHOD.md section 4: steps in float64, batches, views, and the loop."""

import argparse
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
from models import BACKBONES, ResNet18
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.epochs import read_epochs
from runtime.errors import UserError
from runtime.process import Interrupted
from runtime.run import Run

CPU = torch.device("cpu")
# float64: far above rounding, far below any mistake; what was read from a file is on the CPU
CLOSE = {"rtol": 1e-9, "atol": 1e-11, "check_device": False}
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4


# ------------------------------------------------------------------------------ helpers


def make_pair(classifiers=5, arch="resnet18", device=CPU):
    """The same narrow network twice, in float64: for the code under test and the reference."""
    torch.manual_seed(1)
    model = BACKBONES[arch](2, classifiers, width=4).to(device, torch.float64)
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
    """Four sub-batches of these sizes of task k, with two classes per task."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n_unlabeled, 2 * (k - 1), generator=generator, dtype=torch.float64)
    return (
        labeled(n_random, 0, 2 * k, generator),
        labeled(n_new, 2 * (k - 1), 2 * k, generator),
        labeled(n_old, 0, 2 * (k - 1), generator),
        (images(n_unlabeled, generator), *(3 * logits)),
    )


def on(device, batch):
    """A batch, or a tuple of sub-batches, on the device."""
    return tuple(on(device, each) if type(each) is tuple else each.to(device) for each in batch)


def plain_sgd(model, lr=LR):
    return torch.optim.SGD(model.parameters(), lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def take_step(loss, optimizer):
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
    """Parameters, masks, running statistics and the number of passes."""
    ours, plain = (m if isinstance(m, dict) else m.state_dict() for m in (ours, plain))
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture
def in_float64(monkeypatch):
    """Batches are normalized in float64, so that a float64 network can be trained on them."""
    normalize = dataset.normalize
    monkeypatch.setattr(dataset, "normalize", lambda *both: normalize(*both).double())


def train_epochs(model, optimizer, task, args, epochs=1):
    """Epochs of trainer.train_epoch() alone, without validation or checkpoints."""
    for epoch in range(1, epochs + 1):
        for _ in trainer.train_epoch(
            model, optimizer, task, args, "task", trainer.Progress(epoch=epoch)
        ):
            pass


# ------------------------------------------------------------------------------ a step


KD_SIZES = [(6, 3, 3, 6), (2, 3, 1, 6), (6, 1, 3, 2), (1, 3, 3, 6)]


@pytest.mark.device
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "kind, k, sub, sizes, arch",
    [
        ("task1_loss", 1, 6, [6, 5, 1, 6], "resnet18"),
        ("kd_loss", 2, 6, KD_SIZES, "resnet18"),
        ("kd_loss", 3, 7, [(7, 2, 4, 7), (3, 2, 1, 7), (7, 1, 4, 1), (7, 2, 2, 7)], "resnet18"),
        ("kd_loss", 2, 6, KD_SIZES[:2], "resnet32"),
        ("kd_loss_merged", 2, 6, KD_SIZES, "resnet18"),
        ("exemplars_loss", 2, 6, [(6, 3, 3, 1), (2, 3, 1, 1)], "resnet18"),
        ("exemplars_loss", 3, 7, [(7, 2, 4, 1)] * 3, "resnet18"),
        ("exemplars_loss", 3, 7, [(7, 2, 0, 1), (3, 2, 0, 1)], "resnet18"),
    ],
)
def test_steps_equal_those_of_separate_passes(args, device, kind, k, sub, sizes, arch, masked):
    """Task 1: two passes; with teaching five, the published ones; with --no_teaching three.

    With --finetune, which has no old images: two. With --merge_batchnorm one.
    """
    ours, plain = make_pair(arch=arch, device=device)
    # made before the masks, as in main_TD: the parameters must stay the same objects
    optimizer = trainer.make_optimizer(ours, args, LR)
    if masked:
        reference.apply_masks(plain, random_masks(plain))
        pruning_utils.apply_mask(ours, random_masks(ours))
    plain_optimizer = plain_sgd(plain)
    for seed, size in enumerate(sizes):
        if k == 1:
            inputs = on(device, labeled(size, 0, 2, torch.Generator().manual_seed(seed)))
            loss, _ = trainer.task1_loss(ours, *inputs)
        else:
            parts = 3 if kind == "exemplars_loss" else 4
            inputs = (k, sub, on(device, sub_batches(k, *size, seed=seed)[:parts]))
            loss, _ = trainer.kd_loss(ours, *inputs, kind == "kd_loss_merged")
        wanted = getattr(reference, kind)(plain, *inputs)
        torch.testing.assert_close(loss, wanted, **CLOSE)
        take_step(loss, optimizer)
        take_step(wanted, plain_optimizer)
        assert_same_gradients(ours, plain)
        assert_same_state(ours, plain)


def test_pruned_weights_only_decay(args):
    """Masked weights have no gradient, but weight decay and momentum still change them."""
    model, _ = make_pair()
    masks = random_masks(model)
    pruning_utils.apply_mask(model, masks)
    hidden = masks["layer3.0.conv2"] == 0
    wanted = pruning_utils.weights(model)["layer3.0.conv2"][hidden].clone()
    velocity = torch.zeros_like(wanted)
    optimizer = trainer.make_optimizer(model, args, LR)
    for seed in range(3):
        loss, _ = trainer.kd_loss(model, 2, 4, sub_batches(2, 4, 2, 2, 4, seed))
        take_step(loss, optimizer)
        velocity = MOMENTUM * velocity + WEIGHT_DECAY * wanted
        wanted = wanted - LR * velocity
    found = pruning_utils.weights(model)["layer3.0.conv2"][hidden]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_groups_of_a_step_do_not_affect_the_next_pass(fails):
    """The next batch of the same size is one group, even after a step that failed."""
    model, plain = make_pair()
    batches = sub_batches(2, 4, 2, 2, 4)
    if fails:
        batches = [(x.repeat(1, 2, 1, 1), *rest) for x, *rest in batches]  # 6 channels
        with pytest.raises(RuntimeError, match="channels"):
            trainer.kd_loss(model, 2, 4, batches)
    else:
        trainer.kd_loss(model, 2, 4, batches)
        plain.load_state_dict(model.state_dict())
    x = images(12, torch.Generator().manual_seed(5))
    torch.testing.assert_close(model(x, main_fc=True), plain(x, main_fc=True), **CLOSE)
    assert_same_state(model, plain)


def test_in_eval_mode_groups_have_no_effect():
    model, plain = make_pair()
    x = images(7, torch.Generator().manual_seed(5))
    found = model.eval().features(x, groups=((4, 1), (3, 2)))
    assert torch.equal(found, plain.eval().features(x))
    assert_same_state(model, plain)


def relative(found, wanted):
    """The distance of two lists of tensors, relative to the norm of the second."""
    found, wanted = (torch.cat([tensor.flatten() for tensor in each]) for each in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.device
@pytest.mark.parametrize("masked", [False, True])
def test_steps_in_bf16_are_close_to_fp32_and_keep_everything_in_fp32(
    args, device, masked, monkeypatch
):
    """Rounding to bf16 is off by up to 2^-9; over some 40 layers that adds up to about 1 %.

    It also switches ReLUs that are near zero on or off, which alone changes a gradient by 20 %
    here; so a smooth function replaces them.
    """
    monkeypatch.setattr(torch.nn.functional, "relu", torch.nn.functional.softplus)
    batches = [
        [tensor.float() if tensor.is_floating_point() else tensor for tensor in batch]
        for batch in on(device, sub_batches(2, 12, 6, 6, 12))
    ]
    found = {}
    for precision in ("fp32", "bf16"):
        args.precision = precision
        model = trainer.make_model(args, device).train()
        optimizer = trainer.make_optimizer(model, args, LR)
        masks = random_masks(model) if masked else {}
        pruning_utils.apply_mask(model, masks)
        before = pruning_utils.clone_state(model)
        loss, _ = trainer.kd_loss(model, 2, 12, batches)
        take_step(loss, optimizer)
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


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_training_does_not_change_the_heads_to_come(args, data, in_float64, t, used):
    """Neither do gradients nor weight decay, whose share of a step would be visible here.

    used: all heads have gradients of zeros from another pass, enough for weight decay.
    """
    model, _ = make_pair()
    optimizer = trainer.make_optimizer(model, args, LR)
    for main_fc in (True, False) if used else ():
        model(images(2, torch.Generator()), main_fc=main_fc).sum().mul(0).backward()
    before = copy.deepcopy(model.state_dict())
    unlabeled = (data.pool[:9], *torch.zeros(2, 9, 2 * t - 2, dtype=torch.float64))
    train_epochs(model, optimizer, trainer.make_task(data, t, unlabeled if t > 1 else None), args)
    after = model.state_dict()
    for kind in ("linear", "linear_main"):
        for head in range(5):
            for name in (f"{kind}.{head}.weight", f"{kind}.{head}.bias"):
                assert torch.equal(before[name], after[name]) == (head >= t), name


# ------------------------------------------------------------------------------ the parts of a loss


# sub-batch and tensor (labels or stored logits) on which only this part of the loss depends
ONLY_IN = {"random": (0, 1), "new": (1, 1), "old": (2, 1), "kd": (3, 1), "kd_main": (3, 2)}


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
def test_the_weights_of_the_parts_depend_only_on_k_and_sub(k, sub, a, b, sizes):
    weights = {"random": 1, "kd": 1, "new": a / 2, "old": b / 2, "kd_main": 1 / 2}
    batches = sub_batches(k, *sizes)
    ours, plain = make_pair()
    loss, _ = trainer.kd_loss(ours, k, sub, batches)
    parts = reference.kd_parts(plain, k, *batches)
    for part, (batch, row) in ONLY_IN.items():
        changed = [list(tensors) for tensors in batches]
        tensor = changed[batch][row]
        # another class of the same task, or other logits
        changed[batch][row] = tensor ^ 1 if batch < 3 else tensor.flip(1) + tensor
        change = trainer.kd_loss(ours, k, sub, changed)[0] - loss
        wanted = reference.kd_parts(plain, k, *changed)[part] - parts[part]
        assert wanted.abs() > 1e-6
        torch.testing.assert_close(change, weights[part] * wanted, rtol=1e-7, atol=1e-11)


def test_distillation_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits, stored = 5 * torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    found = trainer.distillation(logits, stored, len(logits))
    torch.testing.assert_close(found, reference.distillation(logits, stored), **CLOSE)
    flat = torch.zeros(3, 4, dtype=torch.float64)
    assert trainer.distillation(flat, flat, len(flat)).item() == pytest.approx(4 * math.log(4))
    # softmax of (2 log 3)/2 and 0 is 3/4 and 1/4
    stored = torch.tensor([[2 * math.log(3), 0]], dtype=torch.float64)
    wanted = 4 * -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert trainer.distillation(stored, stored, len(stored)).item() == pytest.approx(wanted)


def test_temperature_and_balanced_weight_are_the_constants(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, stored = 5 * torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    model, _ = make_pair()
    batches = sub_batches(2, 4, 2, 2, 4)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "TEMPERATURE", 3)
        # the reference has temperature 2
        wanted = 9 / 4 * reference.distillation(logits * 2 / 3, stored * 2 / 3)
        torch.testing.assert_close(
            trainer.distillation(logits, stored, len(logits)), wanted, **CLOSE
        )
    losses = []
    for weight in (0, 0.5, 2):
        monkeypatch.setattr(trainer, "BALANCED_WEIGHT", weight)
        losses.append(trainer.kd_loss(model, 2, 4, batches)[0])
    parts = reference.kd_parts(model, 2, *batches)
    torch.testing.assert_close(losses[0], parts["random"] + parts["kd"], **CLOSE)
    torch.testing.assert_close(losses[2] - losses[0], 4 * (losses[1] - losses[0]), **CLOSE)


# ------------------------------------------------------------------------------ an epoch


NEW, OLD, UNLABELED = 17, 7, 11


def constant_images(first, n):
    """n images of one value each, their number, which their views hold too."""
    return torch.arange(first, first + n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 16, 16, 3)


def numbered_task(data, t=3):
    """Images 1.. are new, 101.. old, 201.. unlabeled; labels and logits hold the number too."""
    new, old = constant_images(1, NEW), constant_images(101, OLD)
    unlabeled = constant_images(201, UNLABELED)
    new, old = ((x, x[:, 0, 0, 0].long()) for x in (new, old))
    number = unlabeled[:, 0, 0, :1].float()
    logits = number + torch.arange(2 * (t - 1)) / 100
    both = tuple(torch.cat(pair) for pair in zip(new, old))
    return trainer.Task(t, data, both, new, old, (unlabeled, logits, -logits))


@pytest.fixture
def epoch_of(args, monkeypatch):
    """A function that trains an epoch with a loss of 1.5 and returns what the loss was given.

    That is a list of the sub-batches for each step. batch: steps that were taken before.
    """
    seen, arguments = [], set()

    def task1_loss(model, *batch):
        seen.append([tuple(tensor.clone() for tensor in batch)])
        return 0 * model.conv1.weight.sum() + 1.5, {"new": torch.tensor(0.5)}

    def kd_loss(model, k, sub, batches, merged):
        arguments.add((k, sub, merged))
        seen.append([tuple(tensor.clone() for tensor in batch) for batch in batches])
        return 0 * model.conv1.weight.sum() + 1.5, {"new": torch.tensor(0.5)}

    monkeypatch.setattr(trainer, "task1_loss", task1_loss)
    monkeypatch.setattr(trainer, "kd_loss", kd_loss)

    def train(task, step="task3", epoch=1, batch=0):
        seen.clear()
        arguments.clear()
        model = ResNet18(2, 3, width=1)
        progress, count = trainer.Progress(epoch=epoch, batch=batch), 0
        optimizer = trainer.make_optimizer(model, args, LR)
        for _ in trainer.train_epoch(model, optimizer, task, args, step, progress):
            count += sum(len(part[0]) for part in seen[-1])
            assert progress.batch == batch + len(seen) and progress.images == count
            assert progress.total_loss == 1.5 * len(seen)
            assert progress.parts == {"new": 0.5 * len(seen)}
        assert progress.batch == trainer.batches_per_epoch(task, args)
        assert arguments <= {(task.t, args.batch_size // 4, args.merge_batchnorm)}
        return copy.copy(seen)

    return train


def numbers(batch, data):
    """Which of the numbered images the batch holds: the padding is darker than any of them."""
    return ((batch[0] * data.std + data.mean) * 255).round().amax((1, 2, 3)).long().tolist()


def test_an_epoch_of_task_1_is_one_pass(args, data, epoch_of):
    task = numbered_task(data, 1)
    args.batch_size = 9
    batches = [batch for (batch,) in epoch_of(task)]
    assert [len(batch[0]) for batch in batches] == [9, 9, 6]  # small batches are not dropped
    found = [numbers(batch, data) for batch in batches]
    assert sorted(sum(found, [])) == sorted(task.random[1].tolist())
    assert sum(found, []) != task.random[1].tolist()
    assert [batch[1].tolist() for batch in batches] == found


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
def test_an_epoch_is_one_pass_of_the_random_batches_and_the_others_start_over(
    args, data, epoch_of, t, batch_size, steps, sizes
):
    args.batch_size, task = batch_size, numbered_task(data, t)
    random, new, old, unlabeled = zip(*epoch_of(task))
    assert [len(x) for x, _ in random] == steps
    found = sum((numbers(batch, data) for batch in random), [])
    assert sorted(found) == sorted(task.random[1].tolist())
    assert found != task.random[1].tolist()
    for batches, size, all_numbers in zip(
        (new, old, unlabeled), sizes, (range(1, 18), range(101, 108), range(201, 212))
    ):
        n = len(all_numbers)
        one_pass = [min(size, n - start) for start in range(0, n, size)]
        wanted = (one_pass * len(batches))[: len(batches)]
        assert [len(batch[0]) for batch in batches] == wanted
        found = sum((numbers(batch, data) for batch in batches), [])
        passes = [found[i : i + n] for i in range(0, len(found), n)]
        assert all(set(p) <= set(all_numbers) and len(set(p)) == len(p) for p in passes)
        full = [tuple(p) for p in passes if len(p) == n]
        assert len(set(full)) == len(full), "two passes have the same order"
        assert tuple(all_numbers) not in full


def test_without_teaching_the_other_batches_are_the_same(data, epoch_of):
    task = numbered_task(data)
    with_teaching = epoch_of(task)
    without = epoch_of(task._replace(unlabeled=None))
    assert len(without) == len(with_teaching)
    for batches, wanted in zip(without, with_teaching):
        assert len(batches) == 3
        assert all(torch.equal(a, b) for x, y in zip(batches, wanted) for a, b in zip(x, y))


def test_rows_of_a_batch_stay_together(data, epoch_of):
    for batches in epoch_of(numbered_task(data)):
        for batch in batches[:3]:
            assert batch[1].tolist() == numbers(batch, data)
        x, logits, logits_main = batches[3]
        assert logits[:, 0].tolist() == numbers(batches[3], data)
        assert torch.equal(logits_main, -logits) and logits.shape == (len(x), 4)


def noise(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (n, 16, 16, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("published", [False, True])
def test_training_images_are_augmented_and_unlabeled_ones_are_not(args, data, epoch_of, published):
    """published: the stored images are float32, normalized, as in the published files."""
    new, old, unlabeled = noise(6, 1), noise(6, 2), noise(6, 3)
    rows = torch.arange(6)
    stored = reference.normalize(unlabeled, [0.5] * 3, [0.25] * 3).float()
    soft_labels = rows[:, None].float(), rows[:, None].float()
    unlabeled = (stored if published else unlabeled, *soft_labels)
    task = trainer.Task(2, data, (new, rows), (new, rows), (old, rows), unlabeled)
    args.batch_size, views = 8, {"random": [], "new": [], "old": []}
    for epoch in (1, 2, 3):
        for batches in epoch_of(task, epoch=epoch):
            for (name, found), (x, labels), originals in zip(
                views.items(), batches, (new, new, old)
            ):
                pixels = ((x * data.std + data.mean) * 255).round().byte().permute(0, 2, 3, 1)
                for image, row in zip(pixels.numpy(), labels):
                    view = reference.find_view(image, originals[row].numpy(), pad=4)
                    assert view is not None, f"{name}: not a view of its image"
                    found.append(view)
            x, logits, _ = batches[3]
            torch.testing.assert_close(x, stored[logits[:, 0].long()])
    for found in views.values():
        flips, down, right = (set(draws) for draws in zip(*found))
        assert flips == {False, True} and len(down) > 3 and len(right) > 3
        # each image has its own view, and dy does not depend on dx
        assert len(set(found)) > 0.75 * len(found)
        assert sum(dy not in (dx, 8 - dx) for _, dy, dx in found) > len(found) / 2


def same_batches(some, other):
    some, other = (
        [[t for batch in step for t in batch] for step in each] for each in (some, other)
    )
    return len(some) == len(other) and all(
        all(torch.equal(a, b) for a, b in zip(*step)) for step in zip(some, other)
    )


@pytest.mark.parametrize("t", [1, 3])
def test_batches_depend_only_on_seed_step_and_epoch(args, data, epoch_of, t):
    task = numbered_task(data, t)
    args.batch_size = 9 if t == 1 else 24
    first = epoch_of(task, epoch=2)
    torch.manual_seed(99)
    others = [epoch_of(task, epoch=epoch) for epoch in (1, 3)]
    torch.rand(5)
    np.random.seed(7)
    assert same_batches(first, epoch_of(task, epoch=2))
    assert same_batches(first[2:], epoch_of(task, epoch=2, batch=2))  # resumed
    others.append(epoch_of(task, step="task4", epoch=2))
    args.seed = 1
    others.append(epoch_of(task, epoch=2))
    assert not any(same_batches(first, other) for other in others)


@pytest.mark.parametrize("change", [{"epoch": 2}, {"step": "task4"}, {"seed": 1}])
def test_each_sub_batch_has_its_own_random_stream(args, data, epoch_of, change):
    """Seed, step and epoch change each of the four."""
    task = numbered_task(data, 2)
    first = epoch_of(task)
    change = dict(change)
    args.seed = change.pop("seed", args.seed)
    other = epoch_of(task, **change)
    for some, others in zip(zip(*first), zip(*other)):
        found = [sum((numbers(b, data) for b in batches), []) for batches in (some, others)]
        assert found[0] != found[1]


@pytest.mark.parametrize("t", [1, 2, 3])
def test_a_task_learns_from_new_images_and_old_exemplars(data, t):
    task, c = trainer.make_task(data, t, "soft labels"), 2
    order = [3, 1, 5, 0, 2, 4]  # a label is the position of the class in it
    wanted = {"new": [], "old": []}
    for label in range((t - 1) * c, t * c):
        wanted["new"] += [(label, image) for image in data.train[order[label]]]
    for label in range((t - 1) * c):
        wanted["old"] += [(label, image) for image in data.exemplars[order[label]]]
    wanted["random"] = wanted["new"] + wanted["old"]
    for name, rows in wanted.items():
        x, y = getattr(task, name)
        found = sorted((label, image.numpy().tobytes()) for label, image in zip(y.tolist(), x))
        assert found == sorted((label, image.numpy().tobytes()) for label, image in rows), name
        assert x.dtype == torch.uint8 and y.dtype == torch.int64
    assert (task.t, task.data, task.unlabeled) == (t, data, "soft labels")


# ------------------------------------------------------------------------------ views


@pytest.mark.parametrize("pad", [4, 2])
def test_augment_makes_each_view(pad):
    """All flips and offsets are reached; whether the flip or the crop comes first is free."""
    side = range(2 * pad + 1)
    draws = [(f, dy, dx) for f in (False, True) for dy in side for dx in side]
    pixels = noise(len(draws), 4)[:, :12]  # not square, so that rows are not columns
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
def test_views_are_drawn_uniformly_and_independently(pad):
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


def test_normalize_is_the_formula(data):
    data.mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    data.std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    before = pixels.clone()
    found = dataset.normalize(pixels, data)
    assert found.dtype == torch.float32 and found.shape == (1, 3, 16, 16)
    wanted = reference.normalize(pixels, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(pixels, before)
    assert torch.equal(dataset.normalize(found.clone(), data), found)  # the published form


@pytest.mark.parametrize("n", [1, 5])
def test_normalized_images_have_their_channels_last_in_memory(data, n):
    pixels = noise(n, 4)
    found = dataset.normalize(pixels, data)
    published = found.clone(memory_format=torch.contiguous_format)
    for images in (found, dataset.normalize(published, data)):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, found)
    assert published.is_contiguous()  # unchanged


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("t", [1, 2])
def test_batches_reach_the_network_with_their_channels_last(args, data, t, published):
    """published: the stored images are float32, normalized, and their channels come first."""
    unlabeled = noise(9, 3).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # as stored
    if published:
        unlabeled = reference.normalize(unlabeled, [0.5] * 3, [0.25] * 3).float()
    task = trainer.make_task(data, t, (unlabeled, torch.zeros(9, 2), torch.zeros(9, 2)))
    model, seen = ResNet18(2, 3, width=4), []
    model.conv1.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    train_epochs(model, trainer.make_optimizer(model, args, LR), task, args)
    assert len(seen) == trainer.batches_per_epoch(task, args) > 1
    assert all(seen)


# ------------------------------------------------------------------------------ the loop


def scripted(monkeypatch, accuracies, losses=None):
    """Epochs that set conv1 to their number, and validations with the given accuracies.

    Returns what was seen: the learning rate and optimizer of each epoch, and what was validated.
    """
    seen = {"lr": [], "validated": [], "optimizers": []}

    def epoch(model, optimizer, task, args, step, progress):
        assert not progress.batch
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        seen["optimizers"].append(optimizer)
        optimizer.step()  # without gradients nothing moves
        model.conv1.weight.data.fill_(progress.epoch)
        for loss in losses[progress.epoch - 1] if losses else (1.0, 2.0):
            progress.batch += 1
            progress.total_loss += torch.tensor(loss)
            progress.images += 3
            yield

    answers = iter(accuracies)

    def validate(model, part, task, args):
        seen["validated"].append((part, task.t, model.conv1.weight[0, 0, 0, 0].item()))
        return next(answers)

    for name, stand_in in (("train_epoch", epoch), ("validate", validate)):
        monkeypatch.setattr(trainer, name, stand_in)
    return seen


@pytest.fixture
def setting(args, data):
    """A model and task 2, for scripted epochs."""
    args.width = 1
    return trainer.make_model(args, CPU), trainer.make_task(data, 2, None)


def checkpoints(args):
    return {path.name for path in Path(args.save_dir).glob("*.pt")}


@pytest.mark.parametrize("milestones", [[60, 80], [7, 9], [], [1], [3, 3, 5]])
def test_the_learning_rate_is_that_of_multisteplr(milestones):
    """Bit for bit, whatever the optimizer had before."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    for lr in (0.01, 0.1, 0.05, 1 / 3, 7e-4):
        theirs = torch.optim.SGD([parameter], lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(theirs, milestones, gamma=0.1)
        ours = torch.optim.SGD([parameter], 99.0)
        plan = trainer.Plan("task1", 100, lr, milestones)
        for epoch in range(1, 101):
            trainer.set_learning_rate(ours, plan, epoch)
            assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"], epoch
            theirs.step()
            schedule.step()


def test_the_learning_rate_falls_to_a_tenth_after_each_milestone(setting, args, run, monkeypatch):
    seen = scripted(monkeypatch, range(1, 7))
    args.epochs, args.decreasing_lr = 6, [2, 4]
    trainer.train_task(*setting, run, "task2")
    assert seen["lr"] == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


@pytest.mark.parametrize("validated", [True, False])
def test_retraining_has_a_constant_lr_and_keeps_the_last_epoch(
    setting, args, run, data, monkeypatch, validated
):
    seen = scripted(monkeypatch, [4.0, 6.0, 5.0])
    args.iter_epochs = 3
    found = trainer.retrain(*setting, run, "round", part=data.test if validated else None)
    assert seen["lr"] == pytest.approx([0.0001] * 3)
    assert [(part is data.test, t) for part, t, _ in seen["validated"]] == [(True, 2)] * (
        3 * validated
    )
    assert (found.best, found.best_epoch) == ((6.0, 2) if validated else (-1.0, 0))
    rows = [(row["step"], row["epoch"], row["loss"], row.get("accuracy")) for row in run.epochs]
    accuracies = [4.0, 6.0, 5.0] if validated else [None] * 3
    assert rows == [("round", epoch + 1, 1.5, accuracies[epoch]) for epoch in range(3)]
    assert checkpoints(args) == {"round_checkpoint.pt"}
    assert run.load("round_checkpoint.pt")["epoch"] == 3


@pytest.mark.parametrize("part", ["test", None])
def test_with_0_epochs_of_retraining_the_model_is_measured_as_it_is(args, run, data, part):
    args.iter_epochs = 0
    model, task = trainer.make_model(args, CPU), trainer.make_task(data, 2, None)
    pruning_utils.apply_mask(model, random_masks(model))
    before = pruning_utils.clone_state(model)
    part = part and data.test
    accuracy = trainer.validate(model, part, task, args) if part else -1.0
    for _ in range(2):  # the second time it is done already
        found = trainer.retrain(model, task, run, "round", part=part)
        assert (found.best, found.best_epoch, run.epochs) == (accuracy, 0, [])
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert checkpoints(args) == {"round_checkpoint.pt"}
    assert run.load("round_checkpoint.pt")["epoch"] == 0


@pytest.mark.parametrize(
    "accuracies, best",
    [
        ([10.0, 30.0, 30.0, 20.0], 2),  # a tie keeps the earlier
        ([30.0, 20.0, 10.0, 30.0], 1),
        ([0.0, 0.0, 10.0, 10.0], 3),
        ([10.0, 20.0, 30.0, 40.0], 4),
    ],
)
def test_the_best_and_the_last_epoch_are_saved(
    setting, args, run, data, monkeypatch, accuracies, best
):
    seen = scripted(monkeypatch, accuracies)
    args.epochs = 4
    found = trainer.train_task(*setting, run, "task2")
    assert seen["validated"] == [(data.val, 2, e) for e in (1, 2, 3, 4)]  # after each epoch
    assert checkpoints(args) == {"task2_checkpoint.pt", "task2_best_model.pt"}
    for name, epoch in (("checkpoint", 4), ("best_model", best)):
        stored = torch.load(Path(args.save_dir) / f"task2_{name}.pt", weights_only=True)
        assert set(stored) == {"epoch", "state_dict", "best_prec1", "optimizer"}
        assert stored["epoch"] == epoch
        assert stored["best_prec1"] == max(accuracies)
        assert (stored["state_dict"]["conv1.weight"] == epoch).all()
        assert stored["state_dict"].keys() == setting[0].state_dict().keys()
    assert (found.best, found.best_epoch) == (max(accuracies), best)
    assert (found.best_state["conv1.weight"] == best).all()
    assert (setting[0].conv1.weight == 4).all()  # the model is that of the last epoch


def test_the_best_state_does_not_change_with_the_model(setting, args, run, monkeypatch):
    scripted(monkeypatch, [1.0, 2.0])
    model, task = setting
    found = trainer.train_task(model, task, run, "task2")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert (found.best_state["conv1.weight"] == 2).all()


def test_the_initialization_is_saved_once_in_the_published_form(args, run):
    model = trainer.make_model(args, CPU)
    initial = pruning_utils.clone_state(model)
    for _ in range(2):
        trainer.save_initialization(model, run)
        model.conv1.weight.data.zero_()
    content = run.load("task0_checkpoint_weight.pt")
    assert content.keys() == {"state_dict"}
    assert all(torch.equal(content["state_dict"][key], value) for key, value in initial.items())


# ------------------------------------------------------------------------------ progress


def test_a_loop_that_ends_with_an_error_keeps_its_last_progress(setting, args, run, monkeypatch):
    scripted(monkeypatch, [50.0, 40.0, 30.0], losses=[(1.0,), (1.0, 2.0), (math.nan,)])
    args.epochs, args.checkpoint_seconds = 3, 0
    with pytest.raises(UserError):
        trainer.train_task(*setting, run, "task2")
    assert checkpoints(args) == {"task2_progress.pt"}
    stored = torch.load(Path(args.save_dir) / "task2_progress.pt", weights_only=True)
    assert (stored["epoch"], stored["batch"], stored["total_loss"].item()) == (2, 2, 3.0)
    assert (stored["best"], stored["best_epoch"]) == (50, 1)
    ((epoch, loss, accuracy),) = ((r["epoch"], r["loss"], r["accuracy"]) for r in stored["history"])
    assert (epoch, loss, accuracy) == (1, 1.0, 50.0)
    assert (stored["best_checkpoint"]["state_dict"]["conv1.weight"] == 1).all()
    assert (stored["state_dict"]["conv1.weight"] == 2).all()


def test_progress_comes_back_from_a_checkpoint(args, data, tmp_path):
    """With the model, its masks, and the optimizer with its momentum."""

    def make(seed, masked):
        args.seed = seed
        model = trainer.make_model(args, CPU)
        pruning_utils.apply_mask(model, random_masks(model) if masked else {})
        return model, trainer.make_optimizer(model, args, LR)

    model, optimizer = make(0, masked=True)
    train_epochs(model, optimizer, trainer.make_task(data, 1, None), args)
    best = trainer.checkpoint_dict(model, optimizer, 2, 60.0)
    progress = trainer.Progress(
        epoch=3,
        batch=4,
        total_loss=torch.tensor(5.5),
        parts={"new": torch.tensor(2.5)},
        best=60.0,
        best_epoch=2,
        best_checkpoint=best,
        images=70,
        training_seconds=8.5,
        seconds=9.5,
        history=[{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 2.25, "accuracy": 60.0}],
    )
    content = progress.to_checkpoint(model, optimizer)
    assert content.keys() == trainer.Progress.keys()
    save_checkpoint(tmp_path / "progress.pt", content)
    other, its_optimizer = make(1, masked=False)
    content = load_checkpoint(tmp_path / "progress.pt")
    found = trainer.Progress.from_checkpoint(content, other, its_optimizer)
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(vars(found), vars(progress), **same)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), **same)
    assert its_optimizer.state_dict()["state"]
    torch.testing.assert_close(its_optimizer.state_dict(), optimizer.state_dict(), **same)


@pytest.mark.parametrize(
    "name, number", [("validate", 1), ("validate", 2), ("task1_loss", 1), ("task1_loss", 3)]
)
def test_an_interrupted_loop_has_each_epoch_once_in_its_history(
    args, run, data, monkeypatch, name, number
):
    """Interrupted in a validation or after a batch, and resumed: the same, bit for bit."""
    task = trainer.make_task(data, 1, None)
    assert args.epochs == trainer.batches_per_epoch(task, args) == 2

    def train(run):
        model = trainer.make_model(args, CPU)
        found = trainer.train_task(model, task, run, "task1")
        return found, model.state_dict(), read_epochs(run.folder / "metrics.csv")

    elsewhere = argparse.Namespace(**vars(args))
    elsewhere.save_dir, elsewhere.save_data_path = args.save_dir + "2", args.save_dir + "2/data"
    wanted, *others = train(Run("test", elsewhere, data, trainer.make_model(args, CPU)))
    wanted_state, wanted_rows = others

    function, calls = getattr(trainer, name), []

    def interrupted(*arguments):
        calls.append(name)
        if name == "validate" and len(calls) == number:
            raise Interrupted(2)
        return function(*arguments)

    def check_signals(due=False):
        if name != "validate" and len(calls) == number:
            calls.append("signal")
            raise Interrupted(2)

    monkeypatch.setattr(trainer, name, interrupted)
    monkeypatch.setattr(trainer, "check_signals", check_signals)
    with pytest.raises(Interrupted) as interrupt:
        train(run)
    assert ", task1 is saved at epoch" in interrupt.value.position
    assert checkpoints(args) == {"task1_progress.pt"}
    found, state, rows = train(Run("test", args, data, trainer.make_model(args, CPU)))
    assert [row["epoch"] for row in rows] == [1, 2]
    for row, other in zip(rows, wanted_rows):
        times = {"seconds", "images_per_second"}
        assert {k: row[k] for k in row.keys() - times} == {
            k: other[k] for k in other.keys() - times
        }
    assert (found.best, found.best_epoch) == (wanted.best, wanted.best_epoch)
    torch.testing.assert_close(state, wanted_state, rtol=0, atol=0)
    torch.testing.assert_close(found.best_state, wanted.best_state, rtol=0, atol=0)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_an_error(setting, run, monkeypatch, tmp_path, bad):
    scripted(monkeypatch, [1.0, 1.0], losses=[(1.0, bad, 1.0), (1.0,)])
    with pytest.raises(UserError, match="task2, epoch 1: .* of 0.01; --lr 0.01"):
        trainer.train_task(*setting, run, "task2")
    assert not [*tmp_path.rglob("*.pt")]


def test_training_that_diverges_is_an_error(args, run, data, tmp_path):
    args.lr = 1e30
    model = trainer.make_model(args, CPU)
    with pytest.raises(UserError, match="--lr 1e\\+30"):
        trainer.train_task(model, trainer.make_task(data, 1, None), run, "task1")
    assert not [*tmp_path.rglob("*.pt")]


# ------------------------------------------------------------------------------ the optimizer


def test_retraining_makes_an_optimizer_unless_it_is_given_one(setting, args, run, monkeypatch):
    seen = scripted(monkeypatch, [])
    args.iter_epochs = 1
    given = trainer.make_optimizer(setting[0], args, 1.0)
    for number, optimizer in enumerate((None, None, given, given)):
        trainer.retrain(*setting, run, f"round{number}", optimizer=optimizer)
    one, two, three, four = seen["optimizers"]
    assert three is four is given and len({id(one), id(two), id(given)}) == 3
    for group in one.param_groups:
        assert (group["momentum"], group["weight_decay"]) == (MOMENTUM, WEIGHT_DECAY)
        assert not (group["nesterov"] or group["dampening"])
    assert sum(len(g["params"]) for g in one.param_groups) == len([*setting[0].parameters()])


@pytest.mark.parametrize("given", [True, False])
def test_an_optimizer_that_is_given_keeps_its_momentum(args, run, data, monkeypatch, given):
    """The retrainings of a task in main_TD share one; the rounds of main_BU do not."""
    gradient = 0.5

    def epoch(model, optimizer, task, args, step, progress):
        optimizer.zero_grad()
        model.linear[0].bias.grad = torch.full_like(model.linear[0].bias, gradient)
        optimizer.step()
        progress.batch += 1
        yield

    monkeypatch.setattr(trainer, "train_epoch", epoch)
    args.width, args.iter_epochs = 1, 2
    model = trainer.make_model(args, CPU).double()
    task = trainer.make_task(data, 1, None)
    weight, velocity = model.linear[0].bias.detach().clone(), 0
    optimizer = trainer.make_optimizer(model, args, args.lr / 100) if given else None
    for number in (1, 2):
        pruning_utils.apply_mask(model, random_masks(model))
        trainer.retrain(model, task, run, f"prune{number}", optimizer=optimizer)
        velocity = velocity if given else 0
        for _ in range(2):
            velocity = MOMENTUM * velocity + gradient + WEIGHT_DECAY * weight
            weight = weight - LR / 100 * velocity
    torch.testing.assert_close(model.linear[0].bias.detach(), weight, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------ a complete task


@pytest.mark.device
@pytest.mark.parametrize("t, merged", [(1, False), (2, False), (2, True)])
def test_a_task_equals_that_of_the_plain_code(
    args, device, run, monkeypatch, in_float64, t, merged
):
    """The same batches: each epoch's learning rate and accuracy, the best and the last state."""
    batches, name = [], "kd_loss" if t > 1 else "task1_loss"
    loss, plain_loss = getattr(trainer, name), getattr(reference, name + "_merged" * merged)
    args.merge_batchnorm = merged
    monkeypatch.setattr(
        trainer, name, lambda model, *inputs: batches.append(inputs) or loss(model, *inputs)
    )
    args.epochs, args.decreasing_lr, args.lr, args.batch_size = 3, [2], 0.05, 40
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 12, 2, generator=generator, dtype=torch.float64).to(device)
    ours, data = trainer.make_model(args, device).double(), run.data
    plain = copy.deepcopy(ours)
    task = trainer.make_task(data, t, (data.pool[:12], *logits) if t > 1 else None)
    found = trainer.train_task(ours, task, run, f"task{t}")

    x_val, y_val = (torch.cat(tensors) for tensors in zip(*val_images(data, t)))
    steps = len(batches) // 3
    assert steps == -(-len(task.random[0]) // (40 if t == 1 else 10))
    best, best_state, optimizer = 0, None, plain_sgd(plain, 0.05)
    history = []
    for epoch, lr in enumerate((0.05, 0.05, 0.005)):
        optimizer.param_groups[0]["lr"] = lr
        plain.train()
        losses = []
        for inputs in batches[epoch * steps : (epoch + 1) * steps]:
            losses.append(plain_loss(plain, *inputs[:3]))
            take_step(losses[-1], optimizer)
        accuracy = reference.accuracy(plain, x_val, y_val, t)
        history.append((lr, sum(losses).item() / steps, accuracy))
        if accuracy > best:
            best, best_state = accuracy, copy.deepcopy(plain.state_dict())
    assert found.best == pytest.approx(best)
    rows = [(row["lr"], row["loss"], row["accuracy"]) for row in run.epochs]
    assert rows == [pytest.approx(epoch) for epoch in history]
    assert_same_state(ours, plain)
    assert_same_state(found.best_state, best_state)


def val_images(data, t):
    """The normalized val images of the classes of tasks 1..t, with their labels."""
    for label, c in enumerate([3, 1, 5, 0, 2, 4][: 2 * t]):
        x = reference.normalize(data.val[c].cpu(), [0.5] * 3, [0.25] * 3)
        yield x.to(data.pool.device), torch.full((len(x),), label)


# ------------------------------------------------------------------------------ evaluation


@pytest.mark.device
@pytest.mark.parametrize("t", [1, 2, 3])
def test_accuracies_are_by_the_balanced_heads_so_far(args, device, run, data, in_float64, t):
    """On all classes so far together; heads to come would win every image here."""
    model, _ = make_pair(classifiers=3, device=device)
    for head in range(3):
        for kind in (model.linear, model.linear_main):
            kind[head].bias.data.fill_(1e3 if head >= t else 0)
    model.linear[0].bias.data.fill_(1e3)
    before = copy.deepcopy(model.state_dict())
    parts, task = [*val_images(data, t)], trainer.make_task(data, t, None)
    x, y = (torch.cat(tensors) for tensors in zip(*parts))
    total = reference.accuracy(model, x, y, t)
    by_task, sizes = [], []
    for first in range(0, 2 * t, 2):
        x, y = (torch.cat(tensors) for tensors in zip(*parts[first : first + 2]))
        by_task.append(reference.accuracy(model, x, y, t))
        sizes += [len(x) for x, _ in parts[first : first + 2]]
    found = trainer.evaluate(model, data.val, t, data, args.batch_size)
    assert found["accuracy"] == pytest.approx(by_task)
    assert trainer.pooled(found) == pytest.approx(total)
    assert trainer.validate(model, data.val, task, args) == pytest.approx(total)
    assert trainer.evaluate_tasks(model, task, run, "task2", "val") == found
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # image by image: heads 1..t together for the confusion, those of its task for task_aware
    confusion, own = [[0] * 2 * t for _ in range(2 * t)], [0] * t
    for label, (x, _) in enumerate(parts):
        for logits in model(x, main_fc=True)[:, : 2 * t]:
            confusion[label][logits.argmax()] += 1
            first = label - label % 2
            own[label // 2] += int(logits[first : first + 2].argmax()) == label % 2
    assert found["confusion"] == confusion and [sum(row) for row in confusion] == sizes
    totals = [sum(sizes[first : first + 2]) for first in range(0, 2 * t, 2)]
    assert found["task_aware"] == pytest.approx([100 * n / of for n, of in zip(own, totals)])


def test_accuracies_by_hand():
    """Tasks of 4 and 10 images: 11 of 14 are right; the mean over the tasks is 62.5."""
    confusion = [[1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 4, 0], [0, 0, 0, 6]]
    assert trainer.pooled({"confusion": confusion}) == pytest.approx(100 * 11 / 14)


def test_tasks_are_evaluated_once_in_the_life_of_a_run(args, run, data):
    """For each name and part: another model under the same name is not evaluated."""
    model, task = trainer.make_model(args, CPU), trainer.make_task(data, 3, None)
    first = trainer.evaluate_tasks(model, task, run, "task3_dense")
    assert first == trainer.evaluate(model, data.test, 3, data, args.batch_size)
    for linear in model.linear_main:
        linear.weight.data.neg_()
    assert trainer.evaluate_tasks(model, task, run, "task3_dense") == first
    assert trainer.evaluate_tasks(model, task, run, "task3_other") != first
    assert [*run.journal["steps"]] == [
        "task3_dense_evaluated_on_test",
        "task3_other_evaluated_on_test",
    ]
