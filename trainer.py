"""Train one task (docs/METHOD.md section 4): the losses, an epoch, evaluation, the one loop.

From the command line to the loss: main() of a script, train_task(), fit(), train_epoch(), and
task1_loss() or kd_loss().
"""

import copy
import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import dataset
import pruning_utils
import utils
from models import build_model
from runtime.args import pick_device
from runtime.errors import UserError
from runtime.run import Run

TEMPERATURE = 2  # of the distillation (Hinton et al. 2015)
BALANCED_WEIGHT = 0.5  # of the balanced heads' losses in tasks 2, 3, ...


class Task(NamedTuple):
    """What task t learns from."""

    t: int  # the number of the task, and of the heads in use
    data: dataset.Data  # the whole dataset, for validation
    random: tuple  # images uint8 [n,H,W,3] and labels int64 [n]: the new, then those kept of old
    new: int  # how many of them are new
    unlabeled: tuple = None  # images and soft labels by both kinds of heads; None: no teaching


class Batch(NamedTuple):
    """The sub-batches of a step in task k > 1: images float32 [n,3,H,W], normalized."""

    random: tuple  # images, labels int64 [n]
    new: tuple
    old: tuple
    unlabeled: tuple = None  # images, two soft labels float32 [n,(k-1)c], see soften(); or None

    def sub_batches(self):
        """The images of each sub-batch: [n,3,H,W]."""
        return [part[0] for part in self if part]


def make_model(args, device, *purpose):
    """A freshly initialized network on `device`; the same for the same seed and purpose."""
    with torch.random.fork_rng(devices=[]):
        purpose = purpose or ("initialisation",)
        torch.default_generator.manual_seed(utils.derive_seed(args.seed, *purpose))
        model = build_model(args)
    # On CUDA they lie as the images do, else each step converts them; the kernels of a CPU do not
    # care, and those for few channels have been wrong.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return model.to(device, memory_format=layout)


def start_run(script, args):
    """The fresh network and the Run of a script that trains from the start: (model, run).

    The dataset, run.data, is loaded first. The initialization is saved, once in the run's life.
    """
    device = pick_device(args)
    data = dataset.load(args, device)
    model = make_model(args, device)
    run = Run(script, args, data, model)
    if not run.done("initialization"):
        initial = {"state_dict": model.state_dict()}
        run.save_checkpoint("task0_checkpoint_weight.pt", initial, state=None)
        run.finish("initialization", "task0_checkpoint_weight.pt")
    return model, run


def make_optimizer(model, args, lr):
    """SGD over all parameters. Those without a gradient, the heads to come, stay as they are."""
    return torch.optim.SGD(
        model.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay
    )


# ------------------------------------------------------------------------------ the losses


def soften(logits):
    """The soft labels of a teacher's logits [n,classes]: their softmax at TEMPERATURE.

    Times TEMPERATURE squared, by which the distillation is weighted: once here, not in each step.
    """
    return TEMPERATURE**2 * F.softmax(logits / TEMPERATURE, dim=1)


def distillation(logits, soft_labels):
    """Soft cross-entropy at TEMPERATURE over the classes of the teacher, a scalar.

    logits: [n,classes]; soft_labels: see soften(), [n, classes of the tasks before].
    """
    return F.cross_entropy(logits[:, : soft_labels.shape[1]] / TEMPERATURE, soft_labels)


def task1_loss(model, x, y):
    """Task 1: CE of the random head plus CE of the balanced head. x [n,3,H,W], y [n].

    Returns the loss, and its terms {name: value} without gradients. The published code passes the
    batch twice, once for each head; BatchNorm accounts for that.
    """
    both = model.logits(model.features(x, groups=((len(x), 2),)), 1, main_fc=None)
    random, new = (F.cross_entropy(logits, y) for logits in both.chunk(2, dim=1))
    return random + new, {"random": random.detach(), "new": new.detach()}


def kd_loss(model, k, sub, batch, merged=False):
    """Task k > 1: the loss of one step over its Batch, and its terms as in task1_loss().

    Without unlabeled images (--no_teaching) nothing is distilled, and without old ones (--finetune)
    their term is left out. sub: a quarter of the batch size. It sets the weights of the balanced
    losses, whatever the sub-batches hold. All pass together, and BatchNorm normalizes each
    separately, in this order; the published code passes the unlabeled one twice, once for each kind
    of heads. merged (--merge_batchnorm): it normalizes all together.
    """
    images = batch.sub_batches()
    sizes = [len(x) for x in images]
    groups = tuple((size, passes) for size, passes in zip(sizes, (1, 1, 1, 2)) if size)
    groups = ((sum(sizes), 1),) if merged else groups
    features = model.features(torch.cat(images), groups)
    both = model.logits(features, k, main_fc=None).chunk(2, dim=1)
    logits, logits_main = (Batch(*each.split(sizes)) for each in both)
    terms = {
        "random": F.cross_entropy(logits.random, batch.random[1]),
        "new": F.cross_entropy(logits_main.new, batch.new[1]),
    }
    if len(batch.old[1]):  # the mean over none is NaN
        terms["old"] = F.cross_entropy(logits_main.old, batch.old[1])
    if batch.unlabeled:
        _, soft_labels, soft_labels_main = batch.unlabeled
        terms["distillation"] = distillation(logits.unlabeled, soft_labels)
        terms["distillation_main"] = distillation(logits_main.unlabeled, soft_labels_main)
    a, b = sub // k / sub, sub * (k - 1) // k / sub
    balanced = a * terms["new"] + b * terms.get("old", 0) + terms.get("distillation_main", 0)
    loss = terms["random"] + terms.get("distillation", 0) + BALANCED_WEIGHT * balanced
    return loss, {name: term.detach() for name, term in terms.items()}


# ------------------------------------------------------------------------------ an epoch


def make_batches(task, args, stream, epoch):
    """The batches of an epoch and their number, one for each optimizer step.

    Task 1: x and y of one pass over its images. Task k > 1: a Batch; one pass of the random
    sub-batches is an epoch, the others start over when they run out. stream: what the random draws
    derive from, besides seed and epoch.
    """
    data, k, key = task.data, task.t, (args.seed, stream, epoch)
    n, size = len(task.random[0]), args.batch_size if k == 1 else args.batch_size // 4
    random = dataset.epoch_draws(n, size, data, utils.make_generator(*key, "random"))
    number = -(-n // size)
    if k == 1:
        return (dataset.take(task.random, draws, data) for draws in random), number
    old_size = size * (k - 1) // k
    new = dataset.infinite_draws(task.new, size // k, data, *key, "new")
    old = dataset.infinite_draws(n - task.new, old_size, data, *key, "old", first=task.new)
    unlabeled = itertools.repeat(None)
    if task.unlabeled:
        n = len(task.unlabeled[0])
        unlabeled = dataset.infinite_draws(n, size, data, *key, "unlabeled", augmented=False)
    return (take_batch(task, *draws) for draws in zip(unlabeled, random, new, old)), number


def take_batch(task, unlabeled, *draws):
    """The Batch of the draws of its four sub-batches; those with labels are made together."""
    taken = dataset.take(task.random, torch.cat(draws, dim=1), task.data)
    sizes = [each.shape[1] for each in draws]
    parts = zip(*(each.split(sizes) for each in taken))
    return Batch(*parts, task.unlabeled and dataset.take(task.unlabeled, unlabeled, task.data))


def train_epoch(model, optimizer, task, args, plan, epoch):
    """Train one epoch: the means of the loss and its terms, and how many images the network saw."""
    model.train()
    sub, images, sums = args.batch_size // 4, 0, 0.0
    batches, number = make_batches(task, args, plan.stream, epoch)
    text = f"{plan.stage} {epoch}/{plan.epochs}"
    with tqdm(batches, text, number, unit="batch", disable=None, leave=False) as bar:
        for step, batch in enumerate(bar, 1):
            if task.t == 1:
                loss, terms = task1_loss(model, *batch)
            else:
                loss, terms = kd_loss(model, task.t, sub, batch, args.merge_batchnorm)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            terms = {"loss": loss.detach(), **terms}
            sums = sums + torch.stack([*terms.values()])
            images += len(batch[0]) if task.t == 1 else sum(map(len, batch.sub_batches()))
            if not bar.disable and (step - 1) % args.print_freq == 0:
                bar.set_postfix(loss=float(sums[0]) / step)
    return {name: total / number for name, total in zip(terms, sums.tolist())}, images


# ------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def extract_features(model, images, data, batch_size, desc=None):
    """Features [n,d] of images (uint8 [n,H,W,3]) in eval mode, without augmentation.

    desc: text of the progress bar; None: no bar.
    """
    model.eval()
    bar = tqdm(images.split(batch_size), desc, disable=None if desc else True, leave=False)
    return torch.cat([model.features(dataset.normalize(chunk, data)) for chunk in bar])


@torch.no_grad()
def evaluate(model, split, t, data, batch_size):
    """How the images of `split` (data.val or data.test) of tasks 1..t are classified: a dict.

    accuracy: percent in each task, among all classes so far. task_aware: the same by the task's own
    heads, that is among its own classes. overall: percent of all images together. recency: percent
    of all images that are taken for a class of task t. confusion: [[n]], the images of each class
    (a row; classes in the order of the run) by the class that they are taken for.
    """
    images, labels = data.select_tasks(split, 1, t)
    features, c = extract_features(model, images, data, batch_size), data.classes_per_classifier
    logits = model.logits(features, t, main_fc=True)
    predicted, classes, tasks = logits.argmax(1), t * c, labels // c
    own_heads = logits.view(-1, t, c)[torch.arange(len(labels), device=labels.device), tasks]
    correct, correct_aware = predicted == labels, own_heads.argmax(1) == labels % c
    totals = torch.bincount(tasks, minlength=t)

    def percent(right):
        by_task = torch.bincount(tasks[right], minlength=t)
        return [100.0 * n / total for n, total in zip(by_task.tolist(), totals.tolist())]

    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2)
    return {
        "accuracy": percent(correct),
        "task_aware": percent(correct_aware),
        "overall": 100.0 * int(correct.sum()) / len(labels),
        "recency": 100.0 * int((predicted // c == t - 1).sum()) / len(labels),
        "confusion": confusion.view(classes, classes).tolist(),
    }


def evaluate_tasks(model, task, run, name, split="test"):
    """evaluate() on data.<split> after a task, once in the life of the run; name: the model.

    confusion.csv holds that of the last model that was tested.
    """
    stage = f"{name}_evaluated_on_{split}"
    if not run.done(stage):
        images = getattr(task.data, split)
        evaluated = evaluate(model, images, task.t, task.data, run.args.batch_size)
        confusion = evaluated.pop("confusion")
        if split == "test":
            run.save_confusion(confusion)
        run.finish(stage, **evaluated)
    return run.result(stage)


# ------------------------------------------------------------------------------ the loop


class Plan(NamedTuple):
    """How fit() trains."""

    stage: str  # its name in the run and its files
    stream: str  # what its random draws derive from, besides seed and epoch (see utils.py)
    epochs: int
    lr: float
    milestones: list = ()  # epochs after which the learning rate is divided by 10
    split: dict = None  # data.val or data.test, to validate on after each epoch; None: not at all
    best_model: str = None  # file of the best epoch; None: it is not kept


def train_task(model, task, run, stage, stream, best_model=None):
    """Train a task with all its epochs and log the outcome. Returns as fit().

    best_model: name of the best epoch's file, by default '<stage>_best_model.pt'.
    """
    args, best_model = run.args, best_model or f"{stage}_best_model.pt"
    plan = Plan(stage, stream, args.epochs, args.lr, args.decreasing_lr, task.data.val, best_model)
    result = fit(model, task, run, plan)
    run.log(
        f"{stage}: {args.epochs} epochs in {result.seconds:.0f} s "
        f"({result.images_per_second:.0f} images/s), "
        f"best val accuracy {result.best:.2f} % at epoch {result.best_epoch}"
    )
    return result


def retrain(model, task, run, stage, stream, split=None, optimizer=None):
    """Retrain after a pruning: --iter_epochs at a constant lr/100. Returns as fit()."""
    plan = Plan(stage, stream, run.args.iter_epochs, run.args.lr / 100, split=split)
    return fit(model, task, run, plan, optimizer)


def fit(model, task, run, plan, optimizer=None):
    """Train `model` on `task` in place, epoch after epoch: the one loop of all scripts.

    If the run has done this stage, model and optimizer are put where it left them; if it was
    interrupted in it, it resumes at the end of an epoch, bit for bit as if uninterrupted.
    optimizer: one to continue with; None: a new one. The last epoch goes to
    '<stage>_checkpoint.pt', the best to plan.best_model. Raises UserError when the loss or the
    weights are no longer finite.
    """
    args, last_model = run.args, f"{plan.stage}_checkpoint.pt"
    optimizer = optimizer or make_optimizer(model, args, plan.lr)
    if run.done(plan.stage):
        restore(model, optimizer, run.load(last_model))
    else:
        done, best = 0, {"epoch": 0, "best_prec1": -1.0}  # no accuracy was measured
        if saved := run.progress(plan.stage):
            restore(model, optimizer, saved["last"])
            done, best = saved["last"]["epoch"], saved["best_checkpoint"] or best
            print(f"{plan.stage}: resumes after epoch {done}", flush=True)
        for epoch in range(done + 1, plan.epochs + 1):
            set_learning_rate(optimizer, plan, epoch)
            losses, images = train_epoch(model, optimizer, task, args, plan, epoch)
            check_finite(model, losses, plan, args, epoch)
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], **losses}
            if plan.split is not None:
                row["accuracy"] = validate(model, task, args, plan)
            run.record_epoch(plan.stage, row, images)
            last = make_checkpoint(model, optimizer, epoch, row.get("accuracy", -1.0))
            if last["best_prec1"] > best["best_prec1"]:  # a tie keeps the earlier
                best = copy.deepcopy(last)
            run.save_progress(plan.stage, {"last": last, "best_checkpoint": best})
        if not plan.epochs and plan.split is not None:  # pruned without retraining
            best["best_prec1"] = validate(model, task, args, plan)
        last = make_checkpoint(model, optimizer, plan.epochs, best["best_prec1"])
        run.save_checkpoint(last_model, last, task.t)
        if plan.best_model:
            run.save_checkpoint(plan.best_model, best, task.t)
        files = filter(None, (last_model, plan.best_model))
        run.finish(plan.stage, *files, **outcome(best, run, plan))
    best_state = run.load(plan.best_model)["state_dict"] if plan.best_model else None
    return SimpleNamespace(**run.result(plan.stage), best_state=best_state)


def outcome(best, run, plan):
    """What is recorded of a loop.

    best: accuracy in percent, -1 if none was measured; images_per_second: validation included.
    """
    rows = [row for row in run.epochs if row["stage"] == plan.stage]
    seconds = sum(row["seconds"] for row in rows)
    speed = sum(row["seconds"] * row["images_per_second"] for row in rows) / max(seconds, 1e-9)
    times = {"seconds": seconds, "images_per_second": speed}
    return {"best": best["best_prec1"], "best_epoch": best["epoch"]} | times


def summary(trained):
    """What a record says of a training."""
    speed = round(trained.images_per_second, 1)
    return {"best_val": trained.best, "best_epoch": trained.best_epoch, "images_per_second": speed}


def restore(model, optimizer, checkpoint):
    """Put model and optimizer where a checkpoint has them."""
    pruning_utils.load_state(model, checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])


def make_checkpoint(model, optimizer, epoch, best):
    """What a checkpoint holds, under the published names; epoch counts from 1."""
    return {
        "epoch": epoch,
        "state_dict": model.state_dict(),
        "best_prec1": best,
        "optimizer": optimizer.state_dict(),
    }


def set_learning_rate(optimizer, plan, epoch):
    """plan.lr, divided by 10 for each milestone before this epoch."""
    lr = plan.lr
    for past in range(epoch):  # one after the other, as MultiStepLR rounds
        lr *= 0.1 ** plan.milestones.count(past)
    for group in optimizer.param_groups:
        group["lr"] = lr


def validate(model, task, args, plan):
    """Accuracy (percent) on the images of plan.split of tasks 1..t together."""
    return evaluate(model, plan.split, task.t, task.data, args.batch_size)["overall"]


def check_finite(model, losses, plan, args, epoch):
    """Raise UserError when the mean loss of an epoch or the model is infinite or NaN."""
    tensors = [each for each in model.state_dict().values() if each.is_floating_point()]
    finite = torch.stack([each.isfinite().all() for each in tensors]).all()  # waits once
    if not (finite and math.isfinite(losses["loss"])):
        raise UserError(
            f"--lr {args.lr:g}: loss or weights are not finite in {plan.stage}, epoch {epoch} "
            f"(mean loss {losses['loss']:g}); choose a lower --lr"
        )
