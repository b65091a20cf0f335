"""Training against docs/METHOD.md section 4: steps in float64, batches, views, and the loop."""

import copy
from pathlib import Path

import pytest
import reference
import torch

import dataset
import pruning_utils
import teaching
import trainer
import utils
from models import BACKBONES

CPU = torch.device("cpu")
# float64: far above rounding, far below any mistake; what was read from a file is on the CPU
CLOSE = {"rtol": 1e-9, "atol": 1e-11, "check_device": False}
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
ORDER = [3, 1, 5, 0, 2, 4]  # the class order of the fixture `data`


# ------------------------------------------------------------------------------ helpers


def make_pair(classifiers=5, arch="resnet18", device=CPU):
    """The same narrow network twice, in float64: for the code under test and the reference."""
    torch.manual_seed(1)
    model = BACKBONES[arch](2, classifiers, width=4).to(device, torch.float64)
    return model.train(), copy.deepcopy(model).train()


def images(n, generator):
    return torch.randn(n, 3, 16, 16, generator=generator, dtype=torch.float64)


def labeled(n, first, last, generator):
    """Images and labels of the classes first..last-1."""
    return images(n, generator), torch.randint(first, last, (n,), generator=generator)


def make_batch(k, sizes, seed=3, device=CPU):
    """Four sub-batches of these sizes in task k, of two classes a task; size 0: no unlabeled."""
    generator = torch.Generator().manual_seed(seed)
    n_random, n_new, n_old, n_unlabeled = sizes
    logits = torch.randn(2, n_unlabeled, 2 * (k - 1), generator=generator, dtype=torch.float64)
    parts = [
        labeled(n_random, 0, 2 * k, generator),
        labeled(n_new, 2 * (k - 1), 2 * k, generator),
        labeled(n_old, 0, 2 * (k - 1), generator),
        (images(n_unlabeled, generator), *(3 * logits)) if n_unlabeled else None,
    ]
    return trainer.Batch(*(part and tuple(each.to(device) for each in part) for part in parts))


def softened(batch):
    """A Batch for our loss: soft labels instead of the teacher's logits."""
    if not batch.unlabeled:
        return batch
    unlabeled, *logits = batch.unlabeled
    return batch._replace(unlabeled=(unlabeled, *map(trainer.soften, logits)))


def plain_sgd(model, lr=LR):
    return torch.optim.SGD(model.parameters(), lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def take_step(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def assert_close(found, wanted):
    """Two dicts of the same keys hold close values; the first key that does not is named."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **CLOSE, msg=lambda m, k=key: f"{k}: {m}")


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def in_float64(monkeypatch):
    """Batches are normalized in float64, so that a float64 network can be trained on them."""
    normalize = dataset.normalize
    monkeypatch.setattr(dataset, "normalize", lambda *both: normalize(*both).double())


# ------------------------------------------------------------------------------ a step


@pytest.mark.device
@pytest.mark.parametrize(
    "k, sub, sizes, arch, merged, masked",
    [
        (1, 6, [6, 5, 1, 6], "resnet18", False, False),
        (2, 6, [(6, 3, 3, 6), (2, 3, 1, 6), (1, 3, 3, 2)], "resnet18", False, False),
        (3, 7, [(7, 2, 4, 7), (3, 2, 1, 7), (7, 1, 4, 1)], "resnet18", False, True),
        (2, 6, [(6, 3, 3, 6), (2, 3, 1, 6)], "resnet32", False, True),
        (3, 7, [(7, 2, 4, 7), (3, 2, 1, 7)], "resnet18", True, True),
        (3, 7, [(7, 2, 4, 0), (3, 2, 1, 0)], "resnet18", False, True),  # --no_teaching
        (3, 7, [(7, 2, 0, 0), (3, 2, 0, 0)], "resnet18", False, False),  # --finetune
    ],
)
def test_steps_equal_those_of_separate_passes(args, device, k, sub, sizes, arch, merged, masked):
    """Task 1: two passes; with teaching five, the published ones; merged: one."""
    ours, plain = make_pair(arch=arch, device=device)
    # made before the masks, as in main_TD: the parameters must stay the same objects
    optimizer = trainer.make_optimizer(ours, args, LR)
    if masked:
        reference.apply_masks(plain, reference.random_masks(plain, 2))
        pruning_utils.apply_mask(ours, reference.random_masks(ours, 2))
    plain_optimizer = plain_sgd(plain)
    for seed, size in enumerate(sizes):
        if k == 1:
            x, y = labeled(size, 0, 2, torch.Generator().manual_seed(seed))
            x, y = x.to(device), y.to(device)
            loss, terms = trainer.task1_loss(ours, x, y)
            wanted, wanted_terms = reference.task1_loss(plain, x, y)
        else:
            batch = make_batch(k, size, seed, device)
            plain_loss = reference.kd_loss_merged if merged else reference.kd_loss
            loss, terms = trainer.kd_loss(ours, k, sub, softened(batch), merged)
            wanted, wanted_terms = plain_loss(plain, k, sub, batch)
        assert_close(terms, {name: term.detach() for name, term in wanted_terms.items()})
        torch.testing.assert_close(loss, wanted, **CLOSE)
        take_step(loss, optimizer)
        take_step(wanted, plain_optimizer)
        assert_close(gradients(ours), gradients(plain))
        assert_close(ours.state_dict(), plain.state_dict())


# ------------------------------------------------------------------------------ an epoch


def numbered(first, n):
    """n images of one value each, their number, which their views hold too; and the numbers."""
    numbers = torch.arange(first, first + n)
    return numbers.to(torch.uint8).view(n, 1, 1, 1).repeat(1, 16, 16, 3), numbers


def numbered_task(data, t):
    """Images 1..17 are new, 101..107 old, 201..211 unlabeled; labels and logits are numbers too."""
    new, old, (unlabeled, numbers) = numbered(1, 17), numbered(101, 7), numbered(201, 11)
    logits = numbers[:, None] + torch.arange(2 * (t - 1)) / 100
    both = tuple(torch.cat(pair) for pair in zip(new, old))
    return trainer.Task(t, data, both, 17, (unlabeled, logits, -logits))


def numbers_of(batch, data):
    """Which of the numbered images a batch holds: the padding is darker than any of them."""
    return ((batch[0] * data.std + data.mean) * 255).round().amax((1, 2, 3)).long().tolist()


def epoch_of(task, args, epoch=1):
    """The batches of an epoch as a list."""
    batches, number = trainer.make_batches(task, args, "task3", epoch)
    batches = list(batches)
    assert len(batches) == number
    return batches


@pytest.mark.parametrize(
    "t, batch_size, steps, sizes",
    [
        (1, 9, [9, 9, 6], ()),  # small batches are not dropped
        (2, 40, [10, 10, 4], (5, 5, 10)),
        (3, 23, [5, 5, 5, 5, 4], (1, 3, 5)),
        (2, 400, [24], (50, 50, 100)),
        (2, 8, [2] * 12, (1, 1, 2)),  # unlabeled ones pass twice
    ],
)
def test_an_epoch_is_one_pass_of_the_random_batches_and_the_others_start_over(
    args, data, t, batch_size, steps, sizes
):
    args.batch_size, task = batch_size, numbered_task(data, t)
    batches = epoch_of(task, args)
    random, *others = [batches] if t == 1 else zip(*batches)
    assert [len(x) for x, _ in random] == steps
    found = sum((numbers_of(batch, data) for batch in random), [])
    assert sorted(found) == sorted(task.random[1].tolist()) and found != task.random[1].tolist()
    assert found == sum((y.tolist() for _, y in random), [])  # rows stay together
    for each, size, numbers in zip(others, sizes, (range(1, 18), range(101, 108), range(201, 212))):
        n = len(numbers)
        one_pass = [min(size, n - start) for start in range(0, n, size)]
        assert [len(batch[0]) for batch in each] == (one_pass * len(steps))[: len(steps)]
        found = sum((numbers_of(batch, data) for batch in each), [])
        rows = torch.cat([batch[1].view(len(batch[1]), -1)[:, 0] for batch in each])
        assert found == rows.tolist()
        passes = [found[i : i + n] for i in range(0, len(found), n)]
        assert all(set(p) <= set(numbers) and len(set(p)) == len(p) for p in passes)
        full = [tuple(p) for p in passes if len(p) == n]
        assert len(set(full)) == len(full), "two passes have the same order"
    for *_, unlabeled in batches if t > 1 else ():
        assert torch.equal(unlabeled[2], -unlabeled[1])


def noise(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (n, 16, 16, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("published", [False, True])
def test_training_images_are_augmented_and_unlabeled_ones_are_not(args, data, published):
    """published: the stored images are float32, normalized, as in the published files."""
    new, old, unlabeled = noise(6, 1), noise(6, 2), noise(6, 3)
    rows = torch.arange(6)
    stored = reference.normalize(unlabeled, [0.5] * 3, [0.25] * 3).float()
    soft_labels = rows[:, None].float(), rows[:, None].float()
    unlabeled = (stored if published else unlabeled, *soft_labels)
    both = torch.cat([new, old])
    task = trainer.Task(2, data, (both, torch.arange(12)), 6, unlabeled)
    args.batch_size, views = 8, {"random": [], "new": [], "old": []}
    for epoch in (1, 2, 3):
        for batch in epoch_of(task, args, epoch=epoch):
            for found, (x, labels) in zip(views.values(), batch):
                pixels = ((x * data.std + data.mean) * 255).round().byte().permute(0, 2, 3, 1)
                for image, row in zip(pixels.numpy(), labels):
                    found.append(reference.find_view(image, both[row].numpy(), pad=4))
            x, logits, _ = batch.unlabeled
            torch.testing.assert_close(x, stored[logits[:, 0].long()])
            assert x.is_contiguous(memory_format=torch.channels_last)
    for name, found in views.items():
        assert None not in found, f"{name}: not views of its images"
        # each image has its own view, and dy does not depend on dx
        assert len(set(found)) > 0.75 * len(found)
        assert sum(dy not in (dx, 8 - dx) for _, dy, dx in found) > len(found) / 2
    flips, down, right = map(set, zip(*sum(views.values(), [])))
    assert flips == {False, True} and down == right == set(range(9))


def test_a_seed_gives_the_same_numbers_for_good():
    """utils.derive_seed() is part of what a seed means; test_scripts pins what it is given."""
    assert utils.derive_seed(0, "task1", 1, "random") == 720498275269583395


# ------------------------------------------------------------------------------ the loop


def scripted(monkeypatch, accuracies):
    """Epochs that set conv1 to their number, and validations with the given accuracies.

    Returns the learning rate of each epoch, and on what was validated.
    """
    seen, answers = {"lr": [], "splits": []}, iter(accuracies)

    def train_epoch(model, optimizer, task, args, plan, epoch):
        seen["lr"].append(optimizer.param_groups[0]["lr"])
        optimizer.step()  # without gradients nothing moves
        model.conv1.weight.data.fill_(epoch)
        return {"loss": 1.5, "new": 0.5}, 6

    def validate(model, task, args, plan):
        seen["splits"].append(plan.split)
        return next(answers)

    monkeypatch.setattr(trainer, "train_epoch", train_epoch)
    monkeypatch.setattr(trainer, "validate", validate)
    return seen


@pytest.fixture
def setting(args, data):
    """A model and task 2, for scripted epochs."""
    args.width, args.no_teaching = 1, True
    return trainer.make_model(args, CPU), teaching.build_task(data, args, 2)


def checkpoints(run):
    return {path.name for path in Path(run.args.save_dir).glob("*.pt")}


@pytest.mark.parametrize("milestones", [[60, 80], [7, 9], [], [1], [3, 3, 5], [0], [0, 0, 4]])
def test_the_learning_rate_is_that_of_multisteplr(milestones):
    """Bit for bit, whatever the optimizer had before. A milestone of 0 is before all epochs."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    for lr in (0.01, 0.1, 1 / 3, 7e-4):
        theirs = torch.optim.SGD([parameter], lr)
        schedule = torch.optim.lr_scheduler.MultiStepLR(theirs, milestones, gamma=0.1)
        ours = torch.optim.SGD([parameter], 99.0)
        plan = trainer.Plan("task1", "task1", 100, lr, milestones)
        for epoch in range(1, 101):
            trainer.set_learning_rate(ours, plan, epoch)
            assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"], epoch
            theirs.step()
            schedule.step()


@pytest.mark.parametrize(
    "accuracies, best",
    [
        ([10.0, 30.0, 30.0, 20.0], 2),  # a tie keeps the earlier
        ([30.0, 20.0, 10.0, 30.0], 1),
        ([0.0, 0.0, 10.0, 10.0], 3),
        ([0.0, 0.0, 0.0, 0.0], 1),
    ],
)
def test_the_best_and_the_last_epoch_are_saved(
    setting, args, run, data, monkeypatch, accuracies, best
):
    seen = scripted(monkeypatch, accuracies)
    args.epochs, args.decreasing_lr = 4, [2]
    found = trainer.train_task(*setting, run, "task2", "task2")
    assert seen["lr"] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert seen["splits"] == [data.val] * 4
    assert checkpoints(run) == {"task2_checkpoint.pt", "task2_best_model.pt"}
    for name, epoch in (("task2_checkpoint.pt", 4), ("task2_best_model.pt", best)):
        stored = torch.load(Path(args.save_dir) / name, weights_only=True)
        assert set(stored) == {"epoch", "state_dict", "best_prec1", "optimizer", "args"}
        assert (stored["epoch"], stored["best_prec1"]) == (epoch, max(accuracies))
        assert (stored["state_dict"]["conv1.weight"] == epoch).all()
        assert (stored["args"]["state"], stored["args"]["class_order"]) == (2, ORDER)
    assert (found.best, found.best_epoch) == (max(accuracies), best)
    assert (found.best_state["conv1.weight"] == best).all()
    assert (setting[0].conv1.weight == 4).all()  # the model is that of the last epoch


@pytest.mark.parametrize("split", ["test", None])
def test_retraining_has_a_constant_lr_and_keeps_the_last_epoch(
    setting, args, run, data, monkeypatch, split
):
    seen, args.iter_epochs = scripted(monkeypatch, [4.0, 6.0, 5.0]), 3
    found = trainer.retrain(*setting, run, "round", "stream", split and data.test)
    assert seen["lr"] == pytest.approx([0.0001] * 3)
    assert seen["splits"] == ([data.test] * 3 if split else [])
    assert (found.best, found.best_epoch) == ((6.0, 2) if split else (-1.0, 0))
    assert [row.get("accuracy") for row in run.epochs] == ([4.0, 6.0, 5.0] if split else [None] * 3)
    assert checkpoints(run) == {"round_checkpoint.pt"}
    assert run.load("round_checkpoint.pt")["epoch"] == 3


def test_with_0_epochs_of_retraining_the_model_is_measured_as_it_is(setting, args, run, data):
    args.iter_epochs, (model, task) = 0, setting
    pruning_utils.apply_mask(model, reference.random_masks(model, 2))
    before = pruning_utils.clone_state(model)
    accuracy = trainer.evaluate(model, data.test, 2, data, 9)["overall"]
    for _ in range(2):  # the second time it is done already
        found = trainer.retrain(model, task, run, "round", "stream", data.test)
        assert (found.best, found.best_epoch, run.epochs) == (accuracy, 0, [])
        assert_close(model.state_dict(), before)


def val_images(data, t):
    """The normalized val images of each class of tasks 1..t, with their labels."""
    for label, c in enumerate(ORDER[: 2 * t]):
        x = reference.normalize(data.val[c].cpu(), [0.5] * 3, [0.25] * 3)
        yield x.to(data.pool.device), torch.full((len(x),), label)


@pytest.mark.device
@pytest.mark.parametrize("t, merged", [(1, False), (2, False), (2, True)])
def test_a_task_equals_that_of_the_plain_code(
    args, device, run, monkeypatch, in_float64, t, merged
):
    """The same batches: each epoch's learning rate and accuracy, the best and the last state."""
    batches, name = [], "kd_loss" if t > 1 else "task1_loss"
    loss, plain_loss = getattr(trainer, name), getattr(reference, name + "_merged" * merged)
    args.merge_batchnorm, args.no_teaching = merged, True

    def noted(model, *inputs):
        batches.append(inputs)
        own = inputs if t == 1 else (t, inputs[1], softened(inputs[2]), merged)
        return loss(model, *own)

    monkeypatch.setattr(trainer, name, noted)
    args.epochs, args.decreasing_lr, args.lr, args.batch_size = 3, [2], 0.05, 40
    logits = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(6)).double().to(device)
    ours, data = trainer.make_model(args, device).double(), run.data
    plain, task = copy.deepcopy(ours), teaching.build_task(data, args, t)
    task = task._replace(unlabeled=(data.pool[:12], *logits) if t > 1 else None)
    found = trainer.train_task(ours, task, run, f"task{t}", "stream")

    x_val, y_val = (torch.cat(tensors) for tensors in zip(*val_images(data, t)))
    steps, optimizer, history, best = len(batches) // 3, plain_sgd(plain, 0.05), [], 0
    for epoch, lr in enumerate((0.05, 0.05, 0.005)):
        optimizer.param_groups[0]["lr"] = lr
        plain.train()
        losses = []
        for inputs in batches[epoch * steps : (epoch + 1) * steps]:
            losses.append(plain_loss(plain, *inputs[:3])[0])
            take_step(losses[-1], optimizer)
        accuracy = reference.accuracy(plain, x_val, y_val, t)
        history.append((lr, sum(losses).item() / steps, accuracy))
        if accuracy > best:
            best, best_state = accuracy, copy.deepcopy(plain.state_dict())
    assert found.best == pytest.approx(best)
    rows = [(row["lr"], row["loss"], row["accuracy"]) for row in run.epochs]
    assert rows == [pytest.approx(epoch) for epoch in history]
    assert_close(ours.state_dict(), plain.state_dict())
    assert_close(found.best_state, best_state)


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
    # image by image: heads 1..t together, and those of its own task for task_aware
    confusion, own, right, totals = [[0] * 2 * t for _ in range(2 * t)], [0] * t, [0] * t, [0] * t
    for label, (x, _) in enumerate(val_images(data, t)):
        task, first = label // 2, label - label % 2
        for logits in model.eval()(x, main_fc=True)[:, : 2 * t]:
            predicted = int(logits.argmax())
            confusion[label][predicted] += 1
            right[task] += predicted == label
            own[task] += int(logits[first : first + 2].argmax()) == label % 2
            totals[task] += 1
    found = trainer.evaluate(model, data.val, t, data, args.batch_size)
    assert found["confusion"] == confusion
    assert found["accuracy"] == [100 * n / total for n, total in zip(right, totals)]
    assert found["task_aware"] == [100 * n / total for n, total in zip(own, totals)]
    assert found["overall"] == 100 * sum(right) / sum(totals)
    of_task_t = sum(sum(row[2 * t - 2 :]) for row in confusion)
    assert found["recency"] == 100 * of_task_t / sum(totals)
    assert_close(model.state_dict(), before)
