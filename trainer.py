"""Train one task (docs/METHOD.md section 4): the losses, an epoch, evaluation, the one loop.

A step, from the command line to the loss: main() of a script, train_task(), run_epochs(),
train_epoch(), task1_loss() or kd_loss(), and the model's features() and logits().
"""

import contextlib
import copy
import dataclasses
import math
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import dataset
import pruning_utils
import utils
from models import build_model
from runtime import ranks
from runtime.checkpoint import save_checkpoint
from runtime.device import pick_device
from runtime.errors import UserError
from runtime.process import Interrupted, check_signals, hold_signals
from runtime.run import Run

TEMPERATURE = 2  # of the distillation (Hinton et al. 2015)
BALANCED_WEIGHT = 0.5  # of the balanced heads' losses in tasks 2, 3, ...
LOG_SECONDS = 30  # without a progress bar, an epoch is logged at most this often


class Task(NamedTuple):
    """What task t learns from: images uint8 [n,H,W,3] with labels int64 [n]."""

    t: int  # the number of the task, and of the heads in use
    data: dataset.Data  # the whole set, for validation
    random: tuple  # new training images, and those kept of the old classes
    new: tuple
    old: tuple
    unlabeled: tuple  # images, logits, logits_main of the teacher; None without one


def make_task(data, t, unlabeled, memory=None):
    """The training data of task t; unlabeled: teaching.load_soft_labels(...).

    memory: the images kept of the old classes, {class id: uint8 [n,H,W,3]}; None: the exemplars.
    """
    new = data.of_tasks(data.train, t, t)
    old = data.of_tasks(data.exemplars if memory is None else memory, 1, t - 1)
    both = tuple(torch.cat(pair) for pair in zip(new, old))
    new, old = zip(*(each.split([len(new[1]), len(old[1])]) for each in both))  # no copies
    if len(both[0]) < ranks.world():
        raise UserError(
            f"torchrun started {ranks.world()} processes, but task {t} has {len(both[0])} training "
            f"images; start no more processes than that"
        )
    return Task(t, data, both, new, old, unlabeled)


def make_model(args, device, *purpose):
    """A freshly initialized network on `device`; the same for the same seed and purpose."""
    with torch.random.fork_rng(devices=[]):
        purpose = purpose or ("initialisation",)
        torch.default_generator.manual_seed(utils.derive_seed(args.seed, *purpose))
        model = build_model(args)
    return model.to(device)


def start_run(script, args):
    """The fresh network and the Run of a script that trains from the start: (model, run).

    The data set, run.data, is loaded first. The initialization is saved, once in the run's life.
    """
    device = pick_device(args)
    data = dataset.load(args, device)
    model = make_model(args, device)
    run = Run(script, args, data, model)
    save_initialization(model, run)
    return model, run


def save_initialization(model, run):
    """Save the initial weights under the published name, once in the life of the run."""
    if not run.done("initialization"):
        initial = {"state_dict": model.state_dict()}
        run.save("task0_checkpoint_weight.pt", save_checkpoint, initial)
        run.finish("initialization", "task0_checkpoint_weight.pt")


def make_optimizer(model, args, lr):
    """SGD over all parameters. Those without a gradient, the heads to come, stay as they are."""
    model.zero_grad(set_to_none=True)
    return torch.optim.SGD(
        model.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay
    )


# ------------------------------------------------------------------------------ the losses


# Of several ranks, each passes its share of every sub-batch. The losses are means over all ranks'
# images, so that a rank's share is a sum over its own images, divided by the number of all.


def own_rows(tensors):
    """This rank's share of the rows of each tensor."""
    return [each[ranks.share(len(each))] for each in tensors]


def cross_entropy(logits, labels, n):
    """This rank's share of the mean over n images. logits [m,classes]; labels [m] or soft."""
    return F.cross_entropy(logits, labels, reduction="sum") / n


def distillation(logits, stored, n):
    """Soft cross-entropy at TEMPERATURE, times its square: both [m,classes] -> scalar, as above."""
    soft_labels = F.softmax(stored / TEMPERATURE, dim=1)
    return TEMPERATURE**2 * cross_entropy(logits / TEMPERATURE, soft_labels, n)


def task1_loss(model, x, y):
    """Task 1: CE of the random head plus CE of the balanced head. x [n,3,H,W], y [n].

    Returns the loss, and its parts {name in runtime.epochs.PARTS: value}, without gradients; of
    several ranks, this rank's share of them. The published code passes the batch twice, once for
    each head; BatchNorm accounts for that.
    """
    n, (x, y) = len(x), own_rows((x, y))
    features = model.features(x, groups=((len(x), 2),))
    random, new = (
        cross_entropy(model.logits(features, 1, main_fc), y, n) for main_fc in (False, True)
    )
    return random + new, {"random": random.detach(), "new": new.detach()}


def kd_loss(model, k, sub, batch, merged=False):
    """Task k > 1: the loss of one step over its sub-batches, and its parts as in task1_loss().

    batch: (random, new, old, unlabeled), the first three (x [n,3,H,W], y [n]), unlabeled
    (x, logits [n,(k-1)c], logits_main); without unlabeled (--no_teaching) nothing is distilled, and
    without old images (--finetune) their term is left out. sub: a quarter of the batch size. It
    sets the weights of the balanced losses, whatever the sub-batches hold. All pass together, and
    BatchNorm normalizes each separately, in this order; the published code passes the unlabeled
    one twice, once for each kind of heads. merged (--merge_batchnorm): it normalizes all together.
    """
    n, n_new, n_old, *_ = counts = [len(part[0]) for part in batch]
    (x, y), (x_new, y_new), (x_old, y_old), *unlabeled = map(own_rows, batch)
    images = [x, x_new, x_old, *(part[0] for part in unlabeled)]
    sizes = [len(each) for each in images]
    groups = tuple(group for *group, count in zip(sizes, (1, 1, 1, 2), counts) if count)
    groups = ((sum(sizes), 1),) if merged else groups
    features = model.features(torch.cat(images), groups=groups)
    of_random, of_new, of_old, *of_unlabeled = features.split(sizes)
    parts = {
        "random": cross_entropy(model.logits(of_random, k, main_fc=False), y, n),
        "new": cross_entropy(model.logits(of_new, k, main_fc=True), y_new, n_new),
    }
    a, b = sub // k / sub, sub * (k - 1) // k / sub
    loss, balanced = parts["random"], a * parts["new"]
    if n_old:  # the mean over none is NaN
        parts["old"] = cross_entropy(model.logits(of_old, k, main_fc=True), y_old, n_old)
        balanced = balanced + b * parts["old"]
    if unlabeled:
        ((_, stored, stored_main),) = unlabeled
        for name, main_fc, soft in (
            ("distillation", False, stored),
            ("distillation_main", True, stored_main),
        ):
            logits = model.logits(*of_unlabeled, k - 1, main_fc)
            parts[name] = distillation(logits, soft, counts[-1])
        loss = loss + parts["distillation"]
        balanced = balanced + parts["distillation_main"]
    return loss + BALANCED_WEIGHT * balanced, {name: x.detach() for name, x in parts.items()}


# ------------------------------------------------------------------------------ an epoch


def random_batch_size(args, t):
    """Images in a random batch: the whole batch in task 1, a quarter of it later."""
    return args.batch_size if t == 1 else args.batch_size // 4


def batches_per_epoch(task, args):
    """Optimizer steps of an epoch: one pass of the random batches."""
    return -(-len(task.random[0]) // random_batch_size(args, task.t))


def batches(task, args, step, epoch):
    """The batches of an epoch, one for each optimizer step: the arguments of the loss.

    Task 1: x and y of one pass over its images. Task k > 1: the random, new, old and unlabeled
    sub-batches; one pass of the random ones is an epoch, the others start over when they run out.
    """
    data, k, sub = task.data, task.t, random_batch_size(args, task.t)
    key = (args.seed, step, epoch)
    random = dataset.one_pass(task.random, sub, data, utils.stream(*key, "random"))
    if k == 1:
        return random
    streams = [
        random,
        dataset.endless(task.new, sub // k, data, *key, "new"),
        dataset.endless(task.old, sub * (k - 1) // k, data, *key, "old"),
    ]
    if task.unlabeled:
        streams.append(
            dataset.endless(task.unlabeled, sub, data, *key, "unlabeled", augmented=False)
        )
    return zip(*streams)


def train_epoch(model, optimizer, task, args, step, progress):
    """Train from where `progress` stands to the end of its epoch.

    Yields None after each step, so that the caller can save or stop.
    """
    model.train()
    k, sub, merged = task.t, random_batch_size(args, task.t), args.merge_batchnorm
    for batch in islice(batches(task, args, step, progress.epoch), progress.batch, None):
        loss, parts = task1_loss(model, *batch) if k == 1 else kd_loss(model, k, sub, batch, merged)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss = loss.detach()
        ranks.add_up([*gradients(model), loss, *parts.values()])
        optimizer.step()
        progress.batch += 1
        progress.total_loss = progress.total_loss + loss
        progress.parts = {name: progress.parts.get(name, 0.0) + parts[name] for name in parts}
        progress.images += len(batch[0]) if k == 1 else sum(len(part[0]) for part in batch)
        yield


def gradients(model):
    """Those of all parameters but the heads to come, which have none."""
    return [each.grad for each in model.parameters() if each.grad is not None]


# ------------------------------------------------------------------------------ evaluation


def extract_features(model, images, data, batch_size, desc=None):
    """Features [n,d] of images (uint8 [n,H,W,3]) in eval mode, without augmentation.

    desc: text of the progress bar; None: no bar. The batches are shared out among the ranks.
    """
    model.eval()
    with torch.no_grad():
        features = []
        chunks = images.split(batch_size)
        own = ranks.share(len(chunks))
        rounds = [*chunks[own], images[:0]][: ranks.largest_share(len(chunks))]
        for chunk in tqdm(rounds, desc, disable=None if desc else True, leave=False):
            features.append(model.features(dataset.normalize(chunk, data)))
            check_signals()
        return ranks.gather(torch.cat(features), own.start * batch_size, len(images))


def evaluate(model, part, t, data, batch_size):
    """How the images of `part` (data.val or data.test) of tasks 1..t are classified: a dict.

    accuracy: percent in each task, among all classes so far. task_aware: the same by the task's own
    heads, that is among its own classes. confusion: [[n]], the images of each class (a row; classes
    in the order of the run) by the class that they are taken for.
    """
    images, labels = data.of_tasks(part, 1, t)
    features, c = extract_features(model, images, data, batch_size), data.classes_per_classifier
    with torch.no_grad():
        logits = model.logits(features, t, main_fc=True)
    classes, tasks = t * c, labels // c
    confusion = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    confusion = confusion.view(classes, classes).tolist()
    own_heads = logits.view(-1, t, c)[torch.arange(len(labels), device=labels.device), tasks]
    by_own = torch.bincount(tasks[own_heads.argmax(1) == labels % c], minlength=t).tolist()
    by_all, totals = [0] * t, [0] * t
    for label, row in enumerate(confusion):
        by_all[label // c] += row[label]
        totals[label // c] += sum(row)
    return {
        "accuracy": [100.0 * n / total for n, total in zip(by_all, totals)],
        "task_aware": [100.0 * n / total for n, total in zip(by_own, totals)],
        "confusion": confusion,
    }


def pooled(evaluated):
    """Accuracy in percent over the images of all tasks together, from evaluate()."""
    rows = evaluated["confusion"]
    return 100.0 * sum(row[i] for i, row in enumerate(rows)) / sum(map(sum, rows))


def validate(model, part, task, args):
    """Accuracy (percent) on the images of `part` (data.val or data.test) of tasks 1..t together."""
    return pooled(evaluate(model, part, task.t, task.data, args.batch_size))


def evaluate_tasks(model, task, run, name, part="test"):
    """evaluate() on data.<part> after a task, once in the life of the run; name: the model."""
    data, batch_size = task.data, run.args.batch_size
    step, images = f"{name}_evaluated_on_{part}", getattr(data, part)
    return run.cached(step, evaluate, model, images, task.t, data, batch_size)


# ------------------------------------------------------------------------------ the loop


@dataclass
class Plan:
    """How train_task() trains."""

    step: str  # name of this step of the run; its random streams derive from it
    epochs: int
    lr: float
    milestones: list = ()  # epochs after which the learning rate is divided by 10
    part: dict = None  # data.val or data.test, to validate on after each epoch; None: not at all
    best_model: str = None  # file of the best epoch; None: it is not kept


@dataclass
class Progress:
    """Where a loop stands; a progress file holds it with model and optimizer."""

    epoch: int = 1  # the current one, and the batches done and the sums of the losses in it
    batch: int = 0
    total_loss: float | torch.Tensor = 0.0
    parts: dict = field(default_factory=dict)
    best: float = -1.0  # accuracy in percent
    best_epoch: int = 0
    best_checkpoint: dict = None
    images: int = 0  # of the current epoch
    training_seconds: float = 0.0  # of the current epoch, without validation
    seconds: float = 0.0
    history: list = field(default_factory=list)  # a row of metrics.csv for each finished epoch

    def to_checkpoint(self, model, optimizer):
        """A dict for Run.save_progress()."""
        state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        return vars(self) | state

    @classmethod
    def from_checkpoint(cls, content, model, optimizer):
        """The Progress in such a dict; model and optimizer are restored too."""
        pruning_utils.load_state(model, content.pop("state_dict"))
        optimizer.load_state_dict(content.pop("optimizer"))
        return cls(**content)

    @classmethod
    def keys(cls):
        return {each.name for each in dataclasses.fields(cls)} | {"state_dict", "optimizer"}

    def position(self, plan, task, args):
        """Where it stands, as text."""
        batches = batches_per_epoch(task, args)
        return f"at epoch {self.epoch} of {plan.epochs}, after batch {self.batch} of {batches}"

    def epoch_row(self, lr, accuracy):
        """The row of the current epoch, when all its batches are done: means over them."""
        sums = {"loss": self.total_loss} | self.parts
        row = {"epoch": self.epoch, "lr": lr}
        row |= {name: float(value) / self.batch for name, value in sums.items()}
        row |= {} if accuracy is None else {"accuracy": accuracy}
        speed = self.images / max(self.training_seconds, 1e-9)
        return row | {"seconds": self.training_seconds, "images_per_second": speed}

    def images_per_second(self):
        """In training, over all finished epochs."""
        seconds = [row["seconds"] for row in self.history]
        images = sum(row["seconds"] * row["images_per_second"] for row in self.history)
        return images / max(sum(seconds), 1e-9)

    def outcome(self):
        """What is recorded of a finished loop."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second(),
        }


def epoch_summary(row, plan):
    """A row of metrics.csv on one line."""
    validated = f", accuracy {row['accuracy']:.2f} %" if "accuracy" in row else ""
    return (
        f"{plan.step}: epoch {row['epoch']}/{plan.epochs}, loss {row['loss']:.3f}{validated}, "
        f"{row['images_per_second']:.0f} images/s"
    )


class Trained(NamedTuple):
    """The outcome of train_task(); the last epoch's weights are in the model."""

    best: float  # accuracy in percent; -1 when none was measured
    best_epoch: int
    seconds: float
    images_per_second: float  # in training, without validation
    best_state: dict = None  # the best epoch's state dict, if it was kept

    def summary(self):
        """What goes into the records."""
        return {
            "best_val": self.best,
            "best_epoch": self.best_epoch,
            "images_per_second": round(self.images_per_second, 1),
        }


def train_task(model, task, run, step, best_model=None):
    """Train a task with all its epochs and log the outcome. Returns a Trained.

    best_model: name of the best epoch's file, by default '<step>_best_model.pt'.
    """
    args = run.args
    best_model = best_model or f"{step}_best_model.pt"
    plan = Plan(step, args.epochs, args.lr, args.decreasing_lr, task.data.val, best_model)
    result = run_epochs(model, task, run, plan)
    run.log(
        f"{step}: {args.epochs} epochs in {result.seconds:.0f} s "
        f"({result.images_per_second:.0f} images/s), "
        f"best val accuracy {result.best:.2f} % at epoch {result.best_epoch}"
    )
    return result


def retrain(model, task, run, step, part=None, optimizer=None):
    """Retrain after a pruning: --iter_epochs at a constant lr/100. Returns a Trained."""
    plan = Plan(step, run.args.iter_epochs, run.args.lr / 100, part=part)
    return run_epochs(model, task, run, plan, optimizer)


def run_epochs(model, task, run, plan, optimizer=None):
    """Train `model` on `task` in place, epoch after epoch: the one loop of all scripts.

    If the run has done this step, model and optimizer are put where it left them; if it was
    interrupted in it, it resumes from the last checkpoint, bit for bit as if never interrupted.
    optimizer: one to continue with; None: a new one. The last epoch goes to
    '<step>_checkpoint.pt', the best (strictly better: a tie keeps the earlier) to plan.best_model.
    Raises UserError when the loss or the weights are no longer finite.
    """
    optimizer = optimizer or make_optimizer(model, run.args, plan.lr)
    checkpoint = f"{plan.step}_checkpoint.pt"
    if run.done(plan.step):
        last = run.load(checkpoint)
        pruning_utils.load_state(model, last["state_dict"])
        optimizer.load_state_dict(last["optimizer"])
    else:
        with hold_signals():
            progress = resume(model, optimizer, task, run, plan)
            with watched(model, optimizer, task, run, plan, progress) as (after_batch, after_epoch):
                while progress.epoch <= plan.epochs:
                    set_learning_rate(optimizer, plan, progress.epoch)
                    epoch = train_epoch(model, optimizer, task, run.args, plan.step, progress)
                    for _ in timed(epoch, progress):
                        after_batch()
                    finish_epoch(model, optimizer, task, run, plan, progress)
                    after_epoch()
            if not plan.epochs and plan.part is not None:  # pruned without retraining
                progress.best = validate(model, plan.part, task, run.args)
            last = checkpoint_dict(model, optimizer, plan.epochs, progress.best)
            run.save(checkpoint, save_checkpoint, last)
            if plan.best_model:
                run.save(plan.best_model, save_checkpoint, progress.best_checkpoint)
            files = filter(None, (checkpoint, plan.best_model))
            run.finish(plan.step, *files, **progress.outcome())
    best_state = run.load(plan.best_model)["state_dict"] if plan.best_model else None
    result = run.result(plan.step)  # that of an older run may hold more
    outcome = {key: result[key] for key in Trained._fields if key != "best_state"}
    return Trained(**outcome, best_state=best_state)


def resume(model, optimizer, task, run, plan):
    """Where the loop was when it was interrupted; at the start if it was not."""
    content = run.progress(plan.step, Progress.keys())
    if not content:
        return Progress()
    progress = Progress.from_checkpoint(content, model, optimizer)
    print(f"{plan.step}: resumes {progress.position(plan, task, run.args)}", flush=True)
    return progress


def set_learning_rate(optimizer, plan, epoch):
    """plan.lr, divided by 10 for each milestone before this epoch."""
    lr = plan.lr
    for past in range(1, epoch):  # one after the other, as MultiStepLR rounds
        lr *= 0.1 ** plan.milestones.count(past)
    for group in optimizer.param_groups:
        group["lr"] = lr


def finish_epoch(model, optimizer, task, run, plan, progress):
    """Validate, keep the best epoch so far, and advance to the next one."""
    check_finite(model, optimizer, plan, run.args, progress)
    accuracy = None
    if plan.part is not None:
        accuracy = validate(model, plan.part, task, run.args)
        if accuracy > progress.best:
            progress.best, progress.best_epoch = accuracy, progress.epoch
            if plan.best_model:
                best = checkpoint_dict(model, optimizer, progress.epoch, accuracy)
                progress.best_checkpoint = copy.deepcopy(best)
    row = progress.epoch_row(optimizer.param_groups[0]["lr"], accuracy)
    run.record_epoch(plan.step, row)
    progress.history.append(row)
    progress.epoch, progress.batch, progress.images = progress.epoch + 1, 0, 0
    progress.total_loss, progress.parts, progress.training_seconds = 0.0, {}, 0.0


def check_finite(model, optimizer, plan, args, progress):
    """Raise UserError when the losses so far or the model are infinite or NaN."""
    tensors = [each for each in model.state_dict().values() if each.is_floating_point()]
    finite = torch.stack([each.isfinite().all() for each in tensors]).all()  # waits once
    if not (finite and math.isfinite(progress.total_loss)):
        loss = float(progress.total_loss) / max(1, progress.batch)
        rate = optimizer.param_groups[0]["lr"]
        raise UserError(
            f"{plan.step}, epoch {progress.epoch}: loss or weights are not finite (mean loss "
            f"{loss:g}) at a learning rate of {rate:g}; --lr {args.lr:g} is too high here, give a "
            f"lower one"
        )


def checkpoint_dict(model, optimizer, epoch, best):
    """What a checkpoint holds, under the published names; epoch counts from 1."""
    return {
        "epoch": epoch,
        "state_dict": model.state_dict(),
        "best_prec1": best,
        "optimizer": optimizer.state_dict(),
    }


# ------------------------------------------------------------------------------ around the epochs


def timed(epoch, progress):
    """The steps of train_epoch(), whose seconds are added up without what comes between them."""
    done = object()
    step = None
    while step is not done:
        start = time.monotonic()
        step = next(epoch, done)
        if step is done:
            float(progress.total_loss)  # waits for the device
        progress.training_seconds += time.monotonic() - start
        if step is not done:
            yield


@contextlib.contextmanager
def watched(model, optimizer, task, run, plan, progress):
    """The progress bar, checkpoints and signals around a loop.

    Gives two functions, to be called after each batch and after each epoch. After a signal the
    loop stops at the next batch, in training or validation, and its progress is saved.
    """
    args, batches = run.args, batches_per_epoch(task, run.args)
    last_saved = last_logged = time.monotonic()
    start = last_saved - progress.seconds

    def save():
        nonlocal last_saved
        check_finite(model, optimizer, plan, args, progress)
        progress.seconds = time.monotonic() - start
        run.save_progress(plan.step, progress.to_checkpoint(model, optimizer))
        last_saved = time.monotonic()

    def after_batch():
        bar.update()
        if not bar.disable and progress.batch % args.print_freq == 0:
            accuracy = progress.history[-1].get("accuracy") if progress.history else None
            bar.set_postfix(loss=float(progress.total_loss) / progress.batch, accuracy=accuracy)
        if check_signals(due=time.monotonic() - last_saved >= args.checkpoint_seconds):
            save()

    def after_epoch():
        nonlocal last_logged
        row = progress.history[-1]
        if not bar.disable:
            bar.set_postfix(loss=row["loss"], accuracy=row.get("accuracy"))
        elif time.monotonic() - last_logged > LOG_SECONDS:
            print(epoch_summary(row, plan), flush=True)
            last_logged = time.monotonic()

    total, done = plan.epochs * batches, (progress.epoch - 1) * batches + progress.batch
    options = {"unit": "batch", "disable": None, "leave": False}
    with tqdm(desc=plan.step, total=total, initial=done, **options) as bar:
        try:
            yield after_batch, after_epoch
        except Interrupted as interrupt:
            save()
            interrupt.position = f", {plan.step} is saved {progress.position(plan, task, args)}"
            raise
    progress.seconds = time.monotonic() - start
