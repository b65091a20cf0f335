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
    """Up to --max_iter_prun masks, each pruned further outside `kept`, and their sparsity (%)."""
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
    may_start = args.deacc > 0 or args.base_sparsity > 0  # published: no drop, no sparsity yet
    for pruned, sparsity in pruning_rounds(model, task, args) if may_start else ():
        drop = retrain_round(model, task, run, dense_accuracy, pruned, rounds)
        if drop >= args.deacc and sparsity >= args.base_sparsity:
            break
        masks, state = pruned, pruning_utils.clone_state(model)
    if masks is None:
        limits = f"--percent {args.percent:g}, --deacc {args.deacc:g}"
        advice = "choose a smaller --percent or a larger --deacc"
        raise UserError(f"{limits}: no pruning is within these limits, so no ticket; {advice}")
    return masks, state, rounds


def regrow(model, task, run, dense_accuracy, current):
    """A larger ticket for task t: prune the weights outside `current` until too few are left.

    model: task t's dense best model. Returns as find_ticket; the masks hold all of `current`.
    """
    args, masks, state, rounds, drop = run.args, None, None, [], 0
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
    return masks, state, rounds


def retrain_round(model, task, run, dense_accuracy, masks, rounds):
    """Retrain under masks, with a new optimizer; add the round to `rounds`, return the drop.

    The drop is what is lost of `dense_accuracy` (percent) on the --select_on images of all classes
    so far, at the round's best epoch. The model goes on from the last one.
    """
    pruning_utils.apply_mask(model, masks)
    t, number, images = task.t, len(rounds) + 1, getattr(task.data, run.args.select_on)
    stage, stream = f"task{t}_round{number}", utils.BOTTOM_UP.format(t, number)
    accuracy = trainer.retrain(model, task, run, stage, stream, images).best
    drop = round(dense_accuracy - accuracy, 9)  # so that one of 1 point equals 1
    rounds.append({"density": pruning_utils.density(masks), "accuracy": accuracy, "decay": drop})
    left = pruning_utils.describe(masks)
    run.log(f"task {t}: pruning {number}, {left}, accuracy {accuracy:.2f} %, drop {drop:.2f}")
    return drop


def keep_or_regrow(model, task, run, dense, masked, current):
    """The next ticket: `current` while it costs less than --accept_decay. Returns as regrow.

    dense, masked: the two models of task t, evaluated on the --select_on images.
    """
    cost = round((sum(dense["accuracy"]) - sum(masked["accuracy"])) / task.t, 9)
    keep = cost < run.args.accept_decay
    verb = "stays" if keep else "re-grows"
    run.log(f"task {task.t}: the mask costs {cost:.2f} points, so it {verb}")
    return (current, None, []) if keep else regrow(model, task, run, dense["overall"], current)


def next_ticket(find, model, task, run, *more):
    """What find() finds, saved. Returns the masks, and a dict of regrown and rounds."""
    t, most = task.t, run.args.max_iter_prun
    stage, mask, weight = f"task{t}_ticket", f"mask-{t}.pt", f"task{t}_prune_weight.pt"
    if not run.done(stage):
        masks, state, rounds = find(model, task, run, *more)
        files = {mask: pruning_utils.mask_state(masks)} | ({weight: state} if state else {})
        for name, content in [*files.items(), ("current_mask.pt", files[mask])]:
            run.save_checkpoint(name, content, t)
        run.finish(stage, *files, regrown=bool(state) and t > 1, rounds=rounds)
        searched = f", after {len(rounds)} of at most {most} rounds" * bool(rounds)
        run.log(f"task {t}: the ticket has {pruning_utils.density(masks):.2f} %{searched}")
    run.discard(f"task{t}_round")
    return pruning_utils.extract_mask(run.load_weights(mask)), run.result(stage)


def evaluate(model, state, task, run, name):
    """A state of task t, put into the model, on the test and on the --select_on images."""
    pruning_utils.load_state(model, state)
    splits = ("test", run.args.select_on)
    return [trainer.evaluate_tasks(model, task, run, f"task{task.t}_{name}", s) for s in splits]


def train_dense(model, task, run):
    """Train task t dense, test its best model and teach with it.

    Returns its state, its accuracies on the --select_on images, and what a record says of it.
    """
    trained = trainer.train_task(model, task, run, f"task{task.t}", utils.TASK.format(task.t))
    tested, selected = evaluate(model, trained.best_state, task, run, "dense")
    if task.t < run.args.classifiers:
        teaching.teach(model, task.data, run, task.t)
    record = {"dense_accuracy": tested["accuracy"], "dense_training": trainer.summary(trained)}
    return trained.best_state, selected, record


def main(argv=None):
    args = parse(argv)
    model, run = trainer.start_run("main_BU", args)
    data = run.data

    # task 1: dense, then the ticket
    task = teaching.build_task(data, args, 1)
    dense, selected, record = train_dense(model, task, run)
    masks, found = next_ticket(find_ticket, model, task, run, selected["overall"])
    pruning_utils.load_state(model, run.load_weights("task1_prune_weight.pt"))
    tested = trainer.evaluate_tasks(model, task, run, "task1_ticket")
    described = pruning_utils.ticket_record(masks, args, data, pruning_utils.density(masks))
    run.add(1, tested, **described, **record, rounds=found["rounds"])

    for t in range(2, args.classifiers + 1):
        # 1. train dense, from the dense best model of the task before
        task, start, current = teaching.build_task(data, args, t), dense, masks
        pruning_utils.load_state(model, start)
        dense, selected, record = train_dense(model, task, run)
        # 2. once more under the ticket
        pruning_utils.load_state(model, start, current)
        stream, best_model = utils.TASK_UNDER_MASK.format(t), f"task{t}_best_prun_model.pt"
        trained = trainer.train_task(model, task, run, f"task{t}_prun", stream, best_model)
        tested, masked = evaluate(model, trained.best_state, task, run, "prun")
        # 3. keep the ticket, or re-grow it from the dense best model
        pruning_utils.load_state(model, dense)
        masks, found = next_ticket(keep_or_regrow, model, task, run, selected, masked, current)
        described = pruning_utils.ticket_record(masks, args, data, pruning_utils.density(current))
        run.add(t, tested, **described, **record, training=trainer.summary(trained), **found)
    return run.close([row["accuracy"] for row in run.results["states"]])


if __name__ == "__main__":
    run_script(main)
