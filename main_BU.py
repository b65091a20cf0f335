"""Bottom-up lifelong tickets: start tiny, re-grow when a new task needs room (docs/METHOD.md 6).

    python main_BU.py                                   the published protocol on CIFAR-10
    python main_BU.py --select_on val                   choose tickets on validation images
    python main_BU.py --dataset digits --width 8 --epochs 20 --iter_epochs 3 --unlabel_num 3

Task 1: train dense, then prune and retrain until the accuracy falls. Each further task: train
dense, and once more under the current mask; if the mask costs too much, prune the weights outside
it down to those that are needed, and add them. main_train.py retrains the tickets.
"""

from runtime.threads import setup_threads

setup_threads()  # before PyTorch is loaded

import dataset
import pruning_utils
import teaching
import trainer
import utils
from models import BACKBONES
from runtime import args as flags
from runtime.errors import UserError
from runtime.process import run_script


def make_parser():
    parser = flags.training_parser(__doc__, "BU_<dataset>", dataset.DATASETS, BACKBONES)
    flag = flags.add_pruning_flags(parser, "bottom-up pruning", pruning_utils.CRITERIA)
    points = {"type": flags.finite, "metavar": "POINTS"}
    message = f"accuracy drop, in points, that ends pruning past --base_sparsity {flags.DEFAULT}"
    flag("--deacc", default=2, help=message, **points)
    message = f"accuracy drop, in points, from which the mask re-grows {flags.DEFAULT}"
    flag("--accept_decay", default=1, help=message, **points)
    message = f"maximum number of pruning rounds per task {flags.DEFAULT}"
    flag("--max_iter_prun", type=flags.int_range(1), default=26, metavar="N", help=message)
    message = f"sparsity before which pruning does not stop {flags.DEFAULT}"
    flag("--base_sparsity", type=flags.percentage, default=90, metavar="PERCENT", help=message)
    message = "images on which tickets are chosen: test (published, default) or val (recommended)"
    flag("--select_on", choices=("test", "val"), default="test", help=message)
    return parser


def parse(argv):
    args = make_parser().parse_args(argv)
    dataset.resolve_tasks(args)
    flags.finalize_args(args, "BU_{}")
    return args


def pruning_rounds(model, task, args, kept=None):
    """Up to --max_iter_prun prunings, each of the masks and weights that the one before has left.

    Yields the masks, to be retrained by the caller, and their sparsity in percent. kept: masks of
    weights that stay in any case.
    """
    masks = pruning_utils.masks_of(model)
    for number in range(1, args.max_iter_prun + 1):
        stream = utils.BOTTOM_UP.format(task.t, number)
        masks = pruning_utils.prune_once(model, task, masks, args, stream, kept)
        yield masks, 100 - pruning_utils.density(masks)


def find_ticket(model, task, run, dense_accuracy):
    """Task 1's ticket: prune and retrain, round after round, until the accuracy has dropped.

    model: task 1's dense best model; dense_accuracy: its accuracy on the --select_on images.
    Returns the masks, the state retrained under them, and the rounds as dicts. Raises UserError
    when no round is within the limits.
    """
    args, masks, state, rounds = run.args, None, None, []
    limits = f"a drop of --deacc {args.deacc:g} past --base_sparsity {args.base_sparsity:g}"
    may_start = args.deacc > 0 or args.base_sparsity > 0  # published: no drop, no sparsity yet
    for pruned, sparsity in pruning_rounds(model, task, args) if may_start else ():
        drop = retrain_round(model, task, run, dense_accuracy, pruned, rounds)
        if drop >= args.deacc and sparsity >= args.base_sparsity:
            break
        masks, state = pruned, pruning_utils.clone_state(model)
    else:
        limits = f"--max_iter_prun {args.max_iter_prun}"
    if masks is None:
        raise UserError(
            f"--percent {args.percent:g}, --deacc {args.deacc:g}: no pruning is within these "
            f"limits, so there is no ticket; choose a smaller --percent or a larger --deacc"
        )
    run.log(f"task 1: the search ended at {limits}")
    return masks, state, rounds


def regrow(model, task, run, dense_accuracy, current):
    """A larger ticket for task t: prune the weights outside `current` until too few are left.

    model: task t's dense best model. Returns as find_ticket; the masks hold all of `current`.
    """
    args, masks, rounds, drop = run.args, None, [], 0
    limits = f"a drop of --deacc {args.deacc:g} past --base_sparsity {args.base_sparsity:g}"
    for pruned, sparsity in pruning_rounds(model, task, args, current):
        if masks is None:  # it counts even if it is one too many, but then it is not retrained
            pruning_utils.apply_mask(model, pruned)
            masks, state = pruned, pruning_utils.clone_state(model)
        if drop >= args.deacc and sparsity >= args.base_sparsity:
            break
        drop = retrain_round(model, task, run, dense_accuracy, pruned, rounds)
        if drop > args.deacc and sparsity > args.base_sparsity:
            break
        masks, state = pruned, pruning_utils.clone_state(model)
    else:
        limits = f"--max_iter_prun {args.max_iter_prun}"
    run.log(f"task {task.t}: the search ended at {limits}")
    return masks, state, rounds


def retrain_round(model, task, run, dense_accuracy, masks, rounds):
    """Retrain under masks, with a new optimizer; add the round to `rounds`, return the drop.

    The model continues from where it is. The drop is what is lost of `dense_accuracy` (percent)
    on the --select_on images of all classes so far, at the round's best epoch.
    """
    pruning_utils.apply_mask(model, masks)
    t, number = task.t, len(rounds) + 1
    stage, stream = f"task{t}_round{number}", utils.BOTTOM_UP.format(t, number)
    images = getattr(task.data, run.args.select_on)
    accuracy = trainer.retrain(model, task, run, stage, stream, images).best
    drop = round(dense_accuracy - accuracy, 9)  # so that one of 1 point equals 1
    rounds.append({"density": pruning_utils.density(masks), "accuracy": accuracy, "decay": drop})
    run.log(
        f"task {t}: pruning {number}, {pruning_utils.describe(masks)}, accuracy {accuracy:.2f} %, "
        f"drop {drop:.2f}"
    )
    return drop


def keep_or_regrow(model, task, run, dense, masked, current):
    """The next ticket: `current` while it costs less than --accept_decay. Returns as regrow.

    dense, masked: the two models of task t, evaluated on the --select_on images.
    """
    dense_mean, masked_mean = (sum(each["accuracy"]) / task.t for each in (dense, masked))
    cost = round(dense_mean - masked_mean, 9)
    keep = cost < run.args.accept_decay
    verb = "stays" if keep else "re-grows"
    run.log(f"task {task.t}: the mask costs {cost:.2f} points, so it {verb}")
    return (current, None, []) if keep else regrow(model, task, run, dense["overall"], current)


def evaluate(model, task, run, name):
    """A model of task t, evaluated on the test images, and on the --select_on images."""
    splits = ("test", run.args.select_on)
    return [trainer.evaluate_tasks(model, task, run, f"task{task.t}_{name}", s) for s in splits]


def find_or_load_ticket(run, t, find, *arguments):
    """Save what find(*arguments) finds. Returns the masks, and a dict of regrown and rounds."""
    stage, mask, weight = f"task{t}_ticket", f"mask-{t}.pt", f"task{t}_prune_weight.pt"
    if not run.done(stage):
        masks, state, rounds = find(*arguments)
        run.save_checkpoint(mask, pruning_utils.mask_state(masks), t)
        if state:
            run.save_checkpoint(weight, state, t)
        files = [mask, weight] if state else [mask]
        run.finish(stage, *files, regrown=bool(state) and t > 1, rounds=rounds)
        run.log(f"task {t}: the ticket has {pruning_utils.density(masks):.2f} % of the weights")
    run.discard(f"task{t}_round")
    masks = pruning_utils.extract_mask(run.load_weights(mask))
    if not run.result(f"task{t + 1}_ticket"):  # the newest
        run.save_checkpoint("current_mask.pt", pruning_utils.mask_state(masks), t)
    return masks, run.result(stage)


def first_task(model, run):
    """Task 1: dense, then its ticket. Returns the dense best state and the ticket's masks."""
    args, data = run.args, run.data
    task = teaching.build_task(data, args, 1)
    trained = trainer.train_task(model, task, run, "task1", utils.TASK.format(1))
    pruning_utils.load_state(model, trained.best_state)
    dense, selected = evaluate(model, task, run, "dense")
    if args.classifiers > 1:
        teaching.teach(model, data, run, 1)
    find = find_ticket, model, task, run, selected["overall"]
    masks, found = find_or_load_ticket(run, 1, *find)
    pruning_utils.load_state(model, run.load_weights("task1_prune_weight.pt"))
    run.add(
        1,
        trainer.evaluate_tasks(model, task, run, "task1_ticket"),
        **pruning_utils.ticket_record(masks, args, data, pruning_utils.density(masks)),
        dense_accuracy=dense["accuracy"],
        dense_training=trainer.summary(trained),
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
    trained = trainer.train_task(model, task, run, f"task{t}", utils.TASK.format(t))
    pruning_utils.load_state(model, start, current)
    stream, best_model = utils.TASK_UNDER_MASK.format(t), f"task{t}_best_prun_model.pt"
    masked = trainer.train_task(model, task, run, f"task{t}_prun", stream, best_model)
    pruning_utils.load_state(model, trained.best_state)
    dense_tested, dense_selected = evaluate(model, task, run, "dense")
    pruning_utils.load_state(model, masked.best_state)
    tested, selected = evaluate(model, task, run, "prun")
    pruning_utils.load_state(model, trained.best_state)
    if t < args.classifiers:
        teaching.teach(model, data, run, t)
    find = keep_or_regrow, model, task, run, dense_selected, selected, current
    masks, found = find_or_load_ticket(run, t, *find)
    run.add(
        t,
        tested,
        **pruning_utils.ticket_record(masks, args, data, pruning_utils.density(current)),
        dense_accuracy=dense_tested["accuracy"],
        training=trainer.summary(masked),
        dense_training=trainer.summary(trained),
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
    run_script(main)
