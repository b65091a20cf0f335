"""Train one task (METHOD.md section 4): the two steps, the epoch, validation, and the one loop."""

import copy
import time
from itertools import islice
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import dataset
import pruning_utils
import utils
from models import ResNet
from utils import Refusal

WORD_SECONDS = 30  # without a progress bar, a line is printed no more often than this


class Task(NamedTuple):
    """What task t learns from: images uint8 [n,H,W,3] with labels int64 [n]."""

    t: int  # the number of the task, and of the heads in use
    random: tuple  # new training images, and the exemplars of the old classes
    new: tuple
    old: tuple
    unlabeled: tuple  # images, logits, logits_main of the teacher; None: there is none


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


def KD_loss(model, k, sub, random, new, old, unlabeled=None):
    """Task k > 1: the loss of one step over its four sub-batches.

    random, new, old: (x [n,3,H,W], y [n]); unlabeled: (x, logits [n,(k-1)c], logits_main), or None
    with --no_teaching: then nothing is distilled.
    sub: a quarter of the batch size, which sets the weights of the balanced losses whatever the
    sub-batches hold. All four pass together, and BatchNorm sees each apart, in this order; the
    published code passes the unlabeled one twice, once for each kind of heads.
    """
    (x, y), (x_new, y_new), (x_old, y_old) = random, new, old
    images = [x, x_new, x_old]
    if unlabeled:
        x_unlabeled, stored, stored_main = unlabeled
        images.append(x_unlabeled)
    sizes = [len(each) for each in images]
    features = model.features(torch.cat(images), groups=tuple(zip(sizes, (1, 1, 1, 2))))
    of_random, of_new, of_old, *of_unlabeled = features.split(sizes)
    loss = F.cross_entropy(model.logits(of_random, k, main_fc=False), y)
    if unlabeled:
        loss = loss + distillation(model.logits(*of_unlabeled, k - 1, main_fc=False), stored)
    a, b = sub // k / sub, sub * (k - 1) // k / sub
    balanced = a * F.cross_entropy(model.logits(of_new, k, main_fc=True), y_new)
    balanced = balanced + b * F.cross_entropy(model.logits(of_old, k, main_fc=True), y_old)
    if unlabeled:
        unlabeled_main = model.logits(*of_unlabeled, k - 1, main_fc=True)
        balanced = balanced + distillation(unlabeled_main, stored_main)
    return loss + 0.5 * balanced


# ------------------------------------------------------------------------------ an epoch


def random_batch(args, t):
    """How many images a random batch holds: all of the batch for task 1, then a quarter of it."""
    return args.batch_size if t == 1 else args.batch_size // 4


def train(model, optimizer, task, data, args, step, epoch, skip=0):
    """An epoch of task 1: one pass over its images. Yields (loss, number of images) per step.

    skip: so many steps of it were taken before.
    """
    model.train()
    generator = utils.stream(args.seed, step, epoch, "random")
    batches = dataset.one_pass(task.random, random_batch(args, 1), data, generator)
    for x, y in islice(batches, skip, None):
        loss = task1_loss(model, x, y)
        descend(loss, optimizer)
        yield loss.detach(), len(x)


def train_KD(model, optimizer, task, data, args, step, epoch, skip=0):
    """An epoch of task t > 1: one pass of the random batches, the other three as long as it lasts.

    Those begin a new pass whenever one ends. Yields (loss, number of images) per step.
    skip: so many steps of it were taken before.
    """
    model.train()
    k, sub = task.t, random_batch(args, task.t)
    key = (args.seed, step, epoch)
    random = dataset.one_pass(task.random, sub, data, utils.stream(*key, "random"))
    new = dataset.endless(task.new, sub // k, data, *key, "new")
    old = dataset.endless(task.old, sub * (k - 1) // k, data, *key, "old")
    streams = [random, new, old]
    if task.unlabeled:
        streams.append(
            dataset.endless(task.unlabeled, sub, data, *key, "unlabeled", augmented=False)
        )
    for batches in islice(zip(*streams), skip, None):
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
        features = []
        for chunk in tqdm(chunks, words, disable=None if words else True, leave=False):
            features.append(model.features(dataset.normalise(chunk, data)))
            utils.check_signals()
        return torch.cat(features)


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
    seconds: float
    images_per_second: float  # in training, validation aside
    best_state: dict = None  # the best epoch's state dict, where a file was asked for

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
    run,
    step,
    epochs,
    lr,
    milestones=(),
    optimizer=None,
    part=None,
    best_model=None,
):
    """Train `model` on `task` for `epochs` epochs, in place: the one loop of all scripts.

    step: the name of this step of the run; its random streams derive from it. If the run has it
    done already, model and optimizer are put where it left them; if it was broken off, it goes on
    from the last checkpoint, bit for bit as if nothing had been.
    optimizer: one to go on with; None: a new one. part: data.val or data.test, on whose images of
    all classes so far the accuracy is taken after every epoch; None: not at all.
    The last epoch goes to the file '<step>_checkpoint.pt'; best_model: a file for the best one
    (strictly better, so that a tie keeps the earlier), or None. Returns a Fit. Raises Refusal when
    loss or weights are no longer finite.
    """
    optimizer = optimizer or make_optimizer(model, run.args, lr)
    checkpoint = f"{step}_checkpoint.pt"
    if run.done(step):
        last = run.load(checkpoint)
        pruning_utils.load_state(model, last["state_dict"])
        optimizer.load_state_dict(last["optimizer"])
    else:
        with utils.hold_signals():
            at = go_through(
                model, task, data, run, step, epochs, milestones, optimizer, part, bool(best_model)
            )
            run.keep(checkpoint, utils.save, contents(model, optimizer, epochs, at.best))
            if best_model:
                run.keep(best_model, utils.save, at.best_contents)
            run.finish(
                step,
                *filter(None, (checkpoint, best_model)),
                best=at.best,
                best_epoch=at.best_epoch,
                seconds=at.seconds,
                images_per_second=at.images / at.training,
            )
    best_state = run.load(best_model)["state_dict"] if best_model else None
    return Fit(**run.result(step), best_state=best_state)


def go_through(model, task, data, run, step, epochs, milestones, optimizer, part, keep_best):
    """The epochs of fit() that are not done yet. Returns how far it came, with the best epoch.

    A signal ends it after the current batch, or within a validation, when all is stored.
    """
    args, device = run.args, next(model.parameters()).device
    run_epoch = train if task.t == 1 else train_KD
    steps = -(-len(task.random[0]) // random_batch(args, task.t))
    at = SimpleNamespace(
        epoch=1,  # the one that it is in, and the batches done and the sum of the losses in it
        batch=0,
        total=torch.zeros((), device=device),
        best=-1.0,
        best_epoch=0,
        best_contents=None,
        images=0,  # of all epochs
        training=0.0,  # seconds of all epochs, validation aside
        seconds=0.0,
    )
    if stored := run.progress(step, {*vars(at), "state_dict", "optimizer"}):
        pruning_utils.load_state(model, stored.pop("state_dict"))
        optimizer.load_state_dict(stored.pop("optimizer"))
        vars(at).update(stored, total=stored["total"].to(device))
        print(f"{step}: goes on {where(at, epochs, steps)}", flush=True)
    saved = said = time.monotonic()
    began = saved - at.seconds

    def store():
        refuse_not_finite(model, at, step, args, optimizer)
        at.seconds = time.monotonic() - began
        now = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        run.save_progress(step, vars(at) | now)

    done = (at.epoch - 1) * steps + at.batch
    accuracy = None
    with tqdm(
        total=epochs * steps, initial=done, desc=step, unit="batch", disable=None, leave=False
    ) as bar:
        try:
            while at.epoch <= epochs:
                mark = time.monotonic()
                for loss, count in run_epoch(
                    model, optimizer, task, data, args, step, at.epoch, skip=at.batch
                ):
                    at.total, at.images, at.batch = at.total + loss, at.images + count, at.batch + 1
                    bar.update()
                    if not bar.disable and at.batch % args.print_freq == 0:
                        bar.set_postfix(loss=at.total.item() / at.batch, accuracy=accuracy)
                    now = time.monotonic()
                    at.training, mark = at.training + now - mark, now
                    if now - saved >= args.checkpoint_seconds:
                        store()
                        saved = mark = time.monotonic()
                    utils.check_signals()
                refuse_not_finite(model, at, step, args, optimizer)
                mean_loss = at.total.item() / at.batch
                at.training += time.monotonic() - mark
                if part is not None:
                    accuracy = validate(model, part, task.t, data, args)
                    if accuracy > at.best:
                        at.best, at.best_epoch = accuracy, at.epoch
                        if keep_best:
                            best = contents(model, optimizer, at.epoch, accuracy)
                            at.best_contents = copy.deepcopy(best)
                if not bar.disable:
                    bar.set_postfix(loss=mean_loss, accuracy=accuracy)
                for group in optimizer.param_groups:  # its state remembers the learning rate
                    group["lr"] *= 0.1 ** list(milestones).count(at.epoch)
                at.epoch, at.batch, at.total = at.epoch + 1, 0, torch.zeros_like(at.total)
                if bar.disable and time.monotonic() - said > WORD_SECONDS:
                    words = f"{step}: epoch {at.epoch - 1}/{epochs}, loss {mean_loss:.3f}"
                    words += f", accuracy {accuracy:.2f} %" if part is not None else ""
                    print(f"{words}, {at.images / at.training:.0f} images/s", flush=True)
                    said = time.monotonic()
        except utils.Interrupted as end:
            store()
            end.where = f", {step} is stored {where(at, epochs, steps)}"
            raise
    at.seconds = time.monotonic() - began
    return at


def contents(model, optimizer, epoch, best):
    """What a checkpoint holds, with the published names; epoch counts from 1."""
    return {
        "epoch": epoch,
        "state_dict": model.state_dict(),
        "best_prec1": best,
        "optimizer": optimizer.state_dict(),
    }


def where(at, epochs, steps):
    """Words on how far a loop is."""
    return f"at epoch {at.epoch} of {epochs}, after batch {at.batch} of {steps}"


def refuse_not_finite(model, at, step, args, optimizer):
    """Raise a Refusal when the losses so far or the model have become infinite or NaN."""
    tensors = [at.total, *(t for t in model.state_dict().values() if t.is_floating_point())]
    if not bool(torch.stack([t.isfinite().all() for t in tensors]).all()):
        loss, rate = at.total.item() / max(1, at.batch), optimizer.param_groups[0]["lr"]
        raise Refusal(
            f"{step}, epoch {at.epoch}: loss or weights are not finite (mean loss {loss:g}) at a "
            f"learning rate of {rate:g}; --lr {args.lr:g} is too high here, give a lower one"
        )


def train_task(model, task, data, run, step, best_model=None):
    """Train a task with all its epochs (METHOD.md section 4) and say how it went. Returns the Fit.

    best_model: name of the best epoch's file, if not '<step>_best_model.pt'.
    """
    args = run.args
    result = fit(
        model,
        task,
        data,
        run,
        step,
        args.epochs,
        args.lr,
        args.decreasing_lr,
        part=data.val,
        best_model=best_model or f"{step}_best_model.pt",
    )
    run.say(
        f"{step}: {args.epochs} epochs in {result.seconds:.0f} s "
        f"({result.images_per_second:.0f} images/s), "
        f"best val accuracy {result.best:.2f} % at epoch {result.best_epoch}"
    )
    return result


def retrain(model, task, data, run, step, part=None, optimizer=None):
    """Retrain after a pruning: --iter_epochs at a constant lr/100. Returns the Fit."""
    epochs, lr = run.args.iter_epochs, run.args.lr / 100
    return fit(model, task, data, run, step, epochs, lr, optimizer=optimizer, part=part)
