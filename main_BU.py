"""Bottom-up lifelong tickets: start tiny, re-grow when a new task needs room (docs/METHOD.md 6).

    python main_BU.py                                   the published protocol on CIFAR-10
    python main_BU.py --select_on val                   choose tickets on validation images
    python main_BU.py --dataset digits --width 8 --epochs 20 --iter_epochs 3 --unlabel_num 3

Task 1: train dense, then prune and retrain until the accuracy falls. Each further task: train
dense, and once more under the current mask; if the mask costs too much, prune the weights outside
it down to those that are needed, and add them. main_train.py retrains the tickets.
"""

import dataset
import pruning_utils
import teaching
import trainer
from models import BACKBONES
from runtime import cli
from runtime.checkpoint import save_checkpoint
from runtime.errors import UserError
from runtime.process import run_script


def make_parser():
    parser = cli.training_parser(__doc__, "BU_<dataset>", dataset.DATASETS, BACKBONES)
    flag = cli.add_pruning_flags(parser, "bottom-up pruning", pruning_utils.CRITERIA)
    points = {"type": cli.finite, "metavar": "POINTS"}
    message = f"accuracy loss, in points, that ends pruning past --base_sparsity {cli.DEFAULT}"
    flag("--deacc", default=2, help=message, **points)
    message = f"accuracy loss, in points, from which the mask re-grows {cli.DEFAULT}"
    flag("--accept_decay", default=1, help=message, **points)
    message = f"maximum number of prunings per task {cli.DEFAULT}"
    flag("--max_iter_prun", type=cli.int_range(1), default=26, metavar="N", help=message)
    message = f"sparsity before which pruning does not stop {cli.DEFAULT}"
    flag("--base_sparsity", type=cli.percentage, default=90, metavar="PERCENT", help=message)
    message = "images on which tickets are chosen: test (published, default) or val (recommended)"
    flag("--select_on", choices=("test", "val"), default="test", help=message)
    return parser


def parse(argv):
    args = make_parser().parse_args(argv)
    dataset.resolve_tasks(args)
    cli.finalize_args(args, "BU_{}")
    return args


def find_ticket(model, task, run, dense_accuracy):
    """Task 1's ticket: prune and retrain, round after round, until the accuracy has decayed.

    model: task 1's dense best model; dense_accuracy: its accuracy on the --select_on images.
    Returns the masks, the state retrained under them, and the rounds as dicts. Raises UserError
    when no round is within the limits.
    """
    args, masks, state, rounds = run.args, pruning_utils.masks_of(model), None, []
    decay = sparsity = 0

    def within_limits():
        return decay < args.deacc or sparsity < args.base_sparsity

    while within_limits() and len(rounds) < args.max_iter_prun:
        step = f"task1_round{len(rounds) + 1}"
        pruned = pruning_utils.prune_once(model, masks, args, step)
        sparsity = 100 - pruning_utils.density(pruned)
        decay = run_round(model, task, run, dense_accuracy, pruned, rounds)
        if within_limits():  # otherwise the mask of one pruning fewer is the ticket
            masks, state = pruned, pruning_utils.clone_state(model)
    if state is None:
        raise UserError(
            f"--percent {args.percent:g}, --deacc {args.deacc:g}, --base_sparsity "
            f"{args.base_sparsity:g}: not even the first pruning is within the limits, which "
            f"leaves no ticket; give a smaller --percent or a larger --deacc"
        )
    return masks, state, rounds


def regrow(model, task, run, dense_accuracy, current):
    """A larger ticket for task t: prune the weights outside `current` until too few are left.

    model: task t's dense best model. Returns as find_ticket; the masks hold all of `current`.
    """
    args, masks, rounds, decay = run.args, pruning_utils.masks_of(model), [], 0
    for number in range(1, args.max_iter_prun + 1):
        step = f"task{task.t}_round{number}"
        pruned = pruning_utils.prune_once(model, masks, args, step, current)
        if number == 1:  # it counts even if it is one too many, but then it is not retrained
            pruning_utils.apply_mask(model, pruned)
            masks, state = pruned, pruning_utils.clone_state(model)
        sparsity = 100 - pruning_utils.density(pruned)
        if decay >= args.deacc and sparsity >= args.base_sparsity:
            break
        decay = run_round(model, task, run, dense_accuracy, pruned, rounds)
        if decay > args.deacc and sparsity > args.base_sparsity:
            break
        masks, state = pruned, pruning_utils.clone_state(model)
    return masks, state, rounds


def run_round(model, task, run, dense_accuracy, masks, rounds):
    """Retrain under masks, with a new optimizer; add the round to `rounds`, return the decay.

    The model continues from where it is. The decay is what is lost of `dense_accuracy` (percent)
    on the --select_on images of all classes so far, at the round's best epoch.
    """
    pruning_utils.apply_mask(model, masks)
    step = f"task{task.t}_round{len(rounds) + 1}"
    part = getattr(task.data, run.args.select_on)
    accuracy = trainer.retrain(model, task, run, step, part).best
    decay, density = dense_accuracy - accuracy, pruning_utils.density(masks)
    rounds.append({"density": density, "accuracy": accuracy, "decay": decay})
    run.log(
        f"task {task.t}, pruning {len(rounds)}: {density:.2f} % remain, "
        f"accuracy {accuracy:.2f} %, decay {decay:.2f}"
    )
    return decay


def stay_or_regrow(model, task, run, dense, masked, current):
    """The next ticket: `current` while it costs less than --accept_decay. Returns as regrow.

    dense, masked: the two models of task t, evaluated on the --select_on images.
    """
    dense_mean, masked_mean = (sum(each["accuracy"]) / task.t for each in (dense, masked))
    cost = dense_mean - masked_mean
    if cost < run.args.accept_decay:
        run.log(f"task {task.t}: the mask costs {cost:.2f} points, so it stays")
        return current, None, []
    run.log(f"task {task.t}: the mask costs {cost:.2f} points, so it re-grows")
    return regrow(model, task, run, trainer.pooled(dense), current)


def evaluate(model, task, run, name):
    """trainer.evaluate() of a model of task t on the test images, and on the --select_on images."""
    parts = ("test", run.args.select_on)
    return [trainer.evaluate_tasks(model, task, run, f"task{task.t}_{name}", p) for p in parts]


def take_ticket(run, t, find, *arguments):
    """Save what find(*arguments) finds. Returns the masks, and a dict of regrown and rounds."""
    step, mask, weight = f"task{t}_ticket", f"mask-{t}.pt", f"task{t}_prune_weight.pt"
    if not run.done(step):
        masks, state, rounds = find(*arguments)
        run.save(mask, pruning_utils.save_masks, masks)
        if state:
            run.save(weight, save_checkpoint, state)
        files = [mask, weight] if state else [mask]
        run.finish(step, *files, regrown=bool(state) and t > 1, rounds=rounds)
        run.log(f"task {t}: the ticket has {pruning_utils.density(masks):.2f} % of the weights")
    run.discard_steps(f"task{t}_round")
    masks = pruning_utils.extract_mask(run.load(mask))
    if not run.result(f"task{t + 1}_ticket"):  # the newest
        run.save("current_mask.pt", pruning_utils.save_masks, masks)
    return masks, run.result(step)


def first_task(model, run):
    """Task 1: dense, then its ticket. Returns the dense best state and the ticket's masks."""
    args, data = run.args, run.data
    task = teaching.build_task(data, args, 1)
    trained = trainer.train_task(model, task, run, "task1")
    pruning_utils.load_state(model, trained.best_state)
    dense, selected = evaluate(model, task, run, "dense")
    if args.classifiers > 1:
        teaching.teach(model, data, run, 1)
    masks, found = take_ticket(run, 1, find_ticket, model, task, run, trainer.pooled(selected))
    pruning_utils.load_state(model, run.load("task1_prune_weight.pt"))
    run.add(
        state=1,
        **trainer.evaluate_tasks(model, task, run, "task1_ticket"),
        density=pruning_utils.density(masks),
        **pruning_utils.ticket_record(masks, args, data),
        dense_accuracy=dense["accuracy"],
        dense_training=trained.summary(),
        rounds=found["rounds"],
    )
    return trained.best_state, masks


def next_task(model, t, run, start, current):
    """Task t > 1, from the dense best state of task t-1: dense, then under the current mask.

    Returns the dense best state and the masks of the next ticket.
    """
    args, data = run.args, run.data
    task = teaching.build_task(data, args, t)
    pruning_utils.load_state(model, start)
    trained = trainer.train_task(model, task, run, f"task{t}")
    pruning_utils.load_state(model, start, current)
    pruned = trainer.train_task(model, task, run, f"task{t}_prun", f"task{t}_best_prun_model.pt")
    pruning_utils.load_state(model, pruned.best_state)
    tested, masked = evaluate(model, task, run, "prun")
    pruning_utils.load_state(model, trained.best_state)
    dense_tested, dense = evaluate(model, task, run, "dense")
    if t < args.classifiers:
        teaching.teach(model, data, run, t)
    masks, found = take_ticket(run, t, stay_or_regrow, model, task, run, dense, masked, current)
    run.add(
        state=t,
        **tested,
        density=pruning_utils.density(current),
        **pruning_utils.ticket_record(masks, args, data),
        dense_accuracy=dense_tested["accuracy"],
        training=pruned.summary(),
        dense_training=trained.summary(),
        **found,
    )
    return trained.best_state, masks


def main(argv=None):
    args = parse(argv)
    model, run = trainer.start_run("main_BU", args)
    dense, masks = first_task(model, run)
    for t in range(2, args.classifiers + 1):
        dense, masks = next_task(model, t, run, dense, masks)
    return run.close([row["accuracy"] for row in run.results["states"]])


if __name__ == "__main__":
    run_script(main, parallel=True)
