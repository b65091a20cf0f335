"""Train one task (METHOD.md section 4): the two steps, the epoch, validation, and the one loop."""

import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import dataset
import utils
from models import ResNet
from utils import Refusal

CHECKPOINT_SECONDS = 60  # within a step, the last epoch is stored no more often than this
WORD_SECONDS = 30  # and without a progress bar, a line is printed no more often than this


class Task(NamedTuple):
    """What task t learns from: images uint8 [n,H,W,3] with labels int64 [n]."""

    t: int  # the number of the task, and of the heads in use
    random: tuple  # new training images, and the exemplars of the old classes
    new: tuple
    old: tuple
    unlabeled: tuple  # images, logits, logits_main of the teacher; None for t = 1


def make_task(data, t, unlabeled):
    """The training data of task t; unlabeled: teaching.lesson(...)."""
    new = data.of_tasks(data.train, t, t)
    old = data.of_tasks(data.exemplars, 1, t - 1)
    both = tuple(torch.cat(pair) for pair in zip(new, old))
    return Task(t, both, new, old, unlabeled)


def make_model(args, device, *purpose):
    """A freshly initialised network on `device`; the same for the same seed and purpose."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            utils.derive(args.seed, *(purpose or ("initialisation",)))
        )
        tasks, bf16 = args.classifiers, args.precision == "bf16"
        model = ResNet(args.classes_per_classifier, tasks, args.width, bf16)
    return model.to(device)


def make_optimizer(model, args, lr):
    """SGD over all parameters; those without a gradient (heads to come) it leaves alone."""
    model.zero_grad(set_to_none=True)
    return torch.optim.SGD(
        model.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay
    )


# ------------------------------------------------------------------------------ the losses


def distillation(logits, stored):
    """Soft cross-entropy at temperature 2, times 4: both [n,classes] -> scalar (Hinton 2015)."""
    return 4 * F.cross_entropy(logits / 2, F.softmax(stored / 2, dim=1))


def task1_loss(model, x, y):
    """Task 1: CE of the random head plus CE of the balanced head. x [n,3,H,W], y [n].

    The published code passes the batch twice, once for each head; BatchNorm is told so.
    """
    features = model.features(x, groups=((len(x), 2),))
    return sum(F.cross_entropy(model.logits(features, 1, main_fc), y) for main_fc in (False, True))


def KD_loss(model, k, sub, random, new, old, unlabeled):
    """Task k > 1: the loss of one step over its four sub-batches.

    random, new, old: (x [n,3,H,W], y [n]); unlabeled: (x, logits [n,(k-1)c], logits_main).
    sub: a quarter of the batch size, which sets the weights of the balanced losses whatever the
    sub-batches hold. All four pass together, and BatchNorm sees each apart, in this order; the
    published code passes the unlabeled one twice, once for each kind of heads.
    """
    (x, y), (x_new, y_new), (x_old, y_old), (x_unlabeled, stored, stored_main) = (
        random,
        new,
        old,
        unlabeled,
    )
    images = x, x_new, x_old, x_unlabeled
    sizes = [len(each) for each in images]
    features = model.features(torch.cat(images), groups=tuple(zip(sizes, (1, 1, 1, 2))))
    of_random, of_new, of_old, of_unlabeled = features.split(sizes)
    loss = F.cross_entropy(model.logits(of_random, k, main_fc=False), y)
    loss = loss + distillation(model.logits(of_unlabeled, k - 1, main_fc=False), stored)
    a, b = sub // k / sub, sub * (k - 1) // k / sub
    balanced = a * F.cross_entropy(model.logits(of_new, k, main_fc=True), y_new)
    balanced = balanced + b * F.cross_entropy(model.logits(of_old, k, main_fc=True), y_old)
    unlabeled_main = model.logits(of_unlabeled, k - 1, main_fc=True)
    balanced = balanced + distillation(unlabeled_main, stored_main)
    return loss + 0.5 * balanced


# ------------------------------------------------------------------------------ an epoch


def random_batch(args, t):
    """How many images a random batch holds: all of the batch for task 1, then a quarter of it."""
    return args.batch_size if t == 1 else args.batch_size // 4


def train(model, optimizer, task, data, args, step, epoch):
    """An epoch of task 1: one pass over its images. Yields (loss, number of images) per step."""
    model.train()
    generator = utils.stream(args.seed, step, epoch, "random")
    for x, y in dataset.one_pass(task.random, random_batch(args, 1), data, generator):
        loss = task1_loss(model, x, y)
        descend(loss, optimizer)
        yield loss.detach(), len(x)


def train_KD(model, optimizer, task, data, args, step, epoch):
    """An epoch of task t > 1: one pass of the random batches, the other three as long as it lasts.

    Those begin a new pass whenever one ends. Yields (loss, number of images) per step.
    """
    model.train()
    k, sub = task.t, random_batch(args, task.t)
    key = (args.seed, step, epoch)
    random = dataset.one_pass(task.random, sub, data, utils.stream(*key, "random"))
    new = dataset.endless(task.new, sub // k, data, *key, "new")
    old = dataset.endless(task.old, sub * (k - 1) // k, data, *key, "old")
    unlabeled = dataset.endless(task.unlabeled, sub, data, *key, "unlabeled", augmented=False)
    for batches in zip(random, new, old, unlabeled):
        loss = KD_loss(model, k, sub, *batches)
        descend(loss, optimizer)
        yield loss.detach(), sum(len(x) for x, *_ in batches)


def descend(loss, optimizer):
    """One step of the optimizer down the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def extract(model, images, data, args, words=None):
    """Features [n,d] of images (uint8 [n,H,W,3]) in eval mode, without augmentation.

    words: what the progress bar says; None: no bar.
    """
    model.eval()
    with torch.no_grad():
        chunks = images.split(args.batch_size)
        shown = tqdm(chunks, words, disable=None if words else True, leave=False)
        return torch.cat([model.features(dataset.normalise(chunk, data)) for chunk in shown])


def correct(model, images, labels, k, data, args):
    """Which images the balanced heads 1..k tell right among all classes so far: bool [n]."""
    features = extract(model, images, data, args)
    with torch.no_grad():
        return model.logits(features, k, main_fc=True).argmax(1) == labels


def validate(model, part, t, data, args):
    """Accuracy (percent) on the images of `part` (data.val or data.test) of tasks 1..t together."""
    images, labels = data.of_tasks(part, 1, t)
    return 100.0 * int(correct(model, images, labels, t, data, args).sum()) / len(labels)


def test(model, part, t, data, args):
    """Accuracies (percent) on the images of `part` of each task 1..t, by heads 1..t: a list."""
    images, labels = data.of_tasks(part, 1, t)
    right = correct(model, images, labels, t, data, args)
    tasks = labels // data.classes_per_classifier
    counts = [(int(right[tasks == i].sum()), int((tasks == i).sum())) for i in range(t)]
    return [100.0 * told / of for told, of in counts]


# ------------------------------------------------------------------------------ the loop


class Fit(NamedTuple):
    """What came of a loop; the last epoch's weights are in the model."""

    best: float  # accuracy in percent; -1 when none was taken
    best_epoch: int
    best_state: dict  # the best epoch's state dict, where files were asked for
    seconds: float
    images_per_second: float  # in training, validation aside

    def words(self):
        """What of it goes into the records."""
        return {
            "best_val": self.best,
            "best_epoch": self.best_epoch,
            "images_per_second": round(self.images_per_second, 1),
        }


def fit(
    model,
    task,
    data,
    args,
    step,
    epochs,
    lr,
    milestones=(),
    optimizer=None,
    part=None,
    checkpoint=None,
    best_model=None,
):
    """Train `model` on `task` for `epochs` epochs, in place: the one loop of all scripts.

    step: the name of this step of the run; its random streams derive from it.
    optimizer: one to go on with; None: a new one. part: data.val or data.test, on whose images of
    all classes so far the accuracy is taken after every epoch; None: not at all.
    checkpoint, best_model: files for the last and the best epoch (strictly better, so that a tie
    keeps the earlier). Returns a Fit. Raises Refusal when the loss is no longer finite.
    """
    optimizer = optimizer or make_optimizer(model, args, lr)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    run_epoch = train if task.t == 1 else train_KD
    steps = -(-len(task.random[0]) // random_batch(args, task.t))
    best, best_epoch, best_contents, accuracy = -1.0, 0, None, None
    began = stored = said = time.monotonic()
    images, training = 0, 0.0
    bar = tqdm(total=epochs * steps, desc=step, unit="batch", disable=None, leave=False)
    for epoch in range(1, epochs + 1):
        total, epoch_began = 0.0, time.monotonic()
        for batch, (loss, count) in enumerate(
            run_epoch(model, optimizer, task, data, args, step, epoch), start=1
        ):
            total, images = total + loss, images + count
            bar.update()
            if not bar.disable and batch % args.print_freq == 0:
                bar.set_postfix(loss=total.item() / batch, accuracy=accuracy)
        mean_loss = total.item() / batch
        training += time.monotonic() - epoch_began
        if not math.isfinite(mean_loss):
            rate = scheduler.get_last_lr()[0]
            raise Refusal(
                f"{step}, epoch {epoch}: the loss is {mean_loss} at a learning rate of {rate:g}; "
                f"--lr {args.lr:g} is too high here, give a lower one"
            )
        if part is not None:
            accuracy = validate(model, part, task.t, data, args)
        if not bar.disable:
            bar.set_postfix(loss=mean_loss, accuracy=accuracy)
        if part is not None and accuracy > best:
            best, best_epoch = accuracy, epoch
            if best_model:
                best_contents = copy.deepcopy(contents(model, optimizer, epoch, best))
        scheduler.step()
        now = time.monotonic()
        if checkpoint and (epoch == epochs or now - stored > CHECKPOINT_SECONDS):
            utils.save(checkpoint, contents(model, optimizer, epoch, best))
            utils.save(best_model, best_contents)
            stored = now
        if bar.disable and now - said > WORD_SECONDS:
            words = f"accuracy {accuracy:.2f} %, " if part is not None else ""
            words += f"{images / training:.0f} images/s"
            print(f"{step}: epoch {epoch}/{epochs}, loss {mean_loss:.3f}, {words}", flush=True)
            said = now
    bar.close()
    best_state = best_contents and best_contents["state_dict"]
    return Fit(best, best_epoch, best_state, time.monotonic() - began, images / training)


def contents(model, optimizer, epoch, best):
    """What a checkpoint holds, with the published names; epoch counts from 1."""
    return {
        "epoch": epoch,
        "state_dict": model.state_dict(),
        "best_prec1": best,
        "optimizer": optimizer.state_dict(),
    }


def train_task(model, task, data, args, step, checkpoint=None, best_model=None):
    """Train a task with all its epochs (METHOD.md section 4) and say how it went. Returns the Fit.

    checkpoint, best_model: names of the two files in --save_dir, if not '<step>_checkpoint.pt'
    and '<step>_best_model.pt'.
    """
    folder = Path(args.save_dir)
    result = fit(
        model,
        task,
        data,
        args,
        step,
        args.epochs,
        args.lr,
        args.decreasing_lr,
        part=data.val,
        checkpoint=folder / (checkpoint or f"{step}_checkpoint.pt"),
        best_model=folder / (best_model or f"{step}_best_model.pt"),
    )
    print(
        f"{step}: {args.epochs} epochs in {result.seconds:.0f} s "
        f"({result.images_per_second:.0f} images/s), "
        f"best val accuracy {result.best:.2f} % at epoch {result.best_epoch}",
        flush=True,
    )
    return result


def retrain(model, task, data, args, step, optimizer=None, part=None):
    """Retrain after a pruning: --iter_epochs at a constant lr/100; stores nothing."""
    epochs, lr = args.iter_epochs, args.lr / 100
    return fit(model, task, data, args, step, epochs, lr, optimizer=optimizer, part=part)
