"""Bottom-up lifelong tickets: start tiny, re-grow when a new task needs room (METHOD.md section 6).

    python main_BU.py                                   the published protocol on CIFAR-10
    python main_BU.py --select_on val                   choose tickets on validation images
    python main_BU.py --dataset digits --width 8 --epochs 20 --iter_epochs 3 --unlabel_num 3

Task 1: train dense, then prune and retrain until the accuracy falls. Each further task: train
dense, and once more under the current mask; if the mask costs too much, prune the weights outside
it until those that are needed are left, and add them. The tickets are retrained by main_train.py.
"""

import dataset
import pruning_utils
import teaching
import utils
from run import Run
from trainer import make_model, retrain, test, train_task
from utils import Refusal


def parse(argv):
    parser = utils.make_parser(__doc__, "BU_<dataset>")
    flag = parser.add_argument_group("bottom-up pruning").add_argument
    utils.add_pruning_flags(flag)
    words = "accuracy that a pruned model may lose, in percentage points (default %(default)s)"
    flag("--deacc", type=utils.any_number, default=2, metavar="POINTS", help=words)
    words = "points below the dense model at which the mask re-grows (default %(default)s)"
    flag("--accept_decay", type=utils.any_number, default=1, metavar="POINTS", help=words)
    words = "most prunings of a task (default %(default)s)"
    flag("--max_iter_prun", type=utils.whole(1), default=26, metavar="N", help=words)
    words = "least sparsity at which the prunings may stop (default %(default)s)"
    flag("--base_sparsity", type=utils.percentage, default=90, metavar="PERCENT", help=words)
    words = "images that tickets are chosen on: test (published, default) or val (the sound one)"
    flag("--select_on", choices=("test", "val"), default="test", help=words)
    args = parser.parse_args(argv)
    dataset.complete(args)
    utils.settle(args, "BU_{}")
    return args


def find_ticket(model, task, data, run, dense_accuracy):
    """Task 1's ticket: prune and retrain, round after round, until the accuracy has decayed.

    model: task 1's dense best model. Returns the masks, the state retrained under them, and the
    rounds as dicts. Raises Refusal when the first round is one too many already.
    """
    args, masks, state, rounds = run.args, pruning_utils.masks_of(model), None, []
    for _ in range(args.max_iter_prun):
        pruned = pruning_utils.prune(pruning_utils.weights(model), masks, args.percent)
        sparsity = 100 - pruning_utils.density(pruned)
        decay = run_round(model, task, data, run, dense_accuracy, pruned, rounds)
        if decay >= args.deacc and sparsity >= args.base_sparsity:
            break  # the mask of one pruning fewer is the ticket
        masks, state = pruned, pruning_utils.clone_state(model)
    if state is None:
        raise Refusal(
            f"--percent {args.percent:g}: already the first pruning passes --base_sparsity and "
            f"loses {decay:.2f} points, which leaves no ticket; give a smaller --percent"
        )
    return masks, state, rounds


def regrow(model, task, data, run, dense_accuracy, current):
    """A larger ticket for task t: prune the weights outside `current` until too few are left.

    model: task t's dense best model. Returns as find_ticket; the masks hold all of `current`.
    """
    args, masks = run.args, pruning_utils.masks_of(model)
    state, rounds, decay = None, [], None
    for _ in range(args.max_iter_prun):
        weights = pruning_utils.weights(model)
        pruned = pruning_utils.prune(weights, masks, args.percent, kept=current)
        sparsity = 100 - pruning_utils.density(pruned)
        if state and decay >= args.deacc and sparsity >= args.base_sparsity:
            break  # this pruning is undone
        decay = run_round(model, task, data, run, dense_accuracy, pruned, rounds)
        too_few = decay > args.deacc and sparsity > args.base_sparsity
        if not too_few or not state:
            masks, state = pruned, pruning_utils.clone_state(model)
        if too_few:
            break  # this pruning is undone too, unless it was the first
    return masks, state, rounds


def run_round(model, task, data, run, dense_accuracy, masks, rounds):
    """Retrain under masks, with a new optimizer; add the round to `rounds`, return the decay.

    The model goes on from where it is. The decay is what is lost of `dense_accuracy` (percent) on
    the --select_on images of all classes so far, at the round's best epoch.
    """
    pruning_utils.apply_mask(model, masks)
    step = f"task{task.t}_round{len(rounds) + 1}"
    accuracy = retrain(model, task, data, run, step, getattr(data, run.args.select_on)).best
    decay, density = dense_accuracy - accuracy, pruning_utils.density(masks)
    rounds.append({"density": density, "accuracy": accuracy, "decay": decay})
    run.say(
        f"task {task.t}, pruning {len(rounds)}: {density:.2f} % remain, "
        f"accuracy {accuracy:.2f} %, decay {decay:.2f}"
    )
    return decay


def take_ticket(run, t, find, *where):
    """Task t's ticket: what find(*where) finds, stored in files. Returns its masks and rounds."""
    step, mask, weight = f"task{t}_ticket", f"mask-{t}.pt", f"task{t}_prune_weight.pt"
    if not run.done(step):
        masks, state, rounds = find(*where)
        run.keep(mask, pruning_utils.save_masks, masks)
        if rounds:
            run.keep(weight, utils.save, state)
        run.finish(step, mask, *[weight] * bool(rounds), rounds=rounds)
        run.say(f"task {t}: the ticket has {pruning_utils.density(masks):.2f} % of the weights")
    run.forget(f"task{t}_round")
    masks = pruning_utils.load_masks(run.path(mask))
    if not run.result(f"task{t + 1}_ticket"):  # the newest
        run.keep("current_mask.pt", pruning_utils.save_masks, masks)
    return masks, run.result(step)["rounds"]


def stay_or_regrow(model, task, data, run, dense_accuracy, accuracy, current):
    """The next ticket: `current` while it costs less than --accept_decay. Returns as regrow."""
    cost = dense_accuracy - accuracy
    if cost < run.args.accept_decay:
        run.say(f"task {task.t}: the mask costs {cost:.2f} points, so it stays")
        return current, None, []
    run.say(f"task {task.t}: the mask costs {cost:.2f} points, so it re-grows")
    return regrow(model, task, data, run, dense_accuracy, current)


def main(argv=None):
    args = parse(argv)
    device = utils.pick_device(args.device, args.gpu, args.deterministic)
    data = dataset.load(args, device)
    model = make_model(args, device)
    run = Run("main_BU", args, data, device)

    def tested(which, t):
        """Test accuracies of tasks 1..t, and the mean accuracy by which tickets are chosen."""
        found = {
            on: run.once(f"task{t}_{which}_{on}", test, model, getattr(data, on), t, data, args)
            for on in ("test", args.select_on)
        }
        return found["test"], sum(found[args.select_on]) / t

    # task 1: dense, then its ticket
    task = teaching.taught_task(data, args, 1)
    dense = train_task(model, task, data, run, "task1")
    pruning_utils.load_state(model, dense.best_state)
    dense_accuracy, dense_mean = tested("dense", 1)
    if args.classifiers > 1:
        teaching.teach(model, data, run, 1)
    masks, rounds = take_ticket(run, 1, find_ticket, model, task, data, run, dense_mean)
    pruning_utils.load_state(model, run.load("task1_prune_weight.pt"))
    run.add(
        state=1,
        accuracy=tested("ticket", 1)[0],
        density=pruning_utils.density(masks),
        ticket_density=pruning_utils.density(masks),
        layer_density=pruning_utils.densities(masks),
        dense_accuracy=dense_accuracy,
        dense_training=dense.words(),
        rounds=rounds,
    )

    for t in range(2, args.classifiers + 1):
        start, density = dense.best_state, pruning_utils.density(masks)
        task = teaching.taught_task(data, args, t)
        # from the dense best model of t-1, once dense and once under the mask
        pruning_utils.load_state(model, start)
        dense = train_task(model, task, data, run, f"task{t}")
        pruning_utils.load_state(model, start, masks)
        best = f"task{t}_best_prun_model.pt"
        masked = train_task(model, task, data, run, f"task{t}_prun", best)
        pruning_utils.load_state(model, masked.best_state)
        accuracy, masked_mean = tested("prun", t)
        pruning_utils.load_state(model, dense.best_state)
        dense_accuracy, dense_mean = tested("dense", t)
        if t < args.classifiers:
            teaching.teach(model, data, run, t)
        # re-grow where the mask costs too much
        where = model, task, data, run, dense_mean, masked_mean, masks
        masks, rounds = take_ticket(run, t, stay_or_regrow, *where)
        run.add(
            state=t,
            accuracy=accuracy,
            density=density,
            ticket_density=pruning_utils.density(masks),
            layer_density=pruning_utils.densities(masks),
            dense_accuracy=dense_accuracy,
            training=masked.words(),
            dense_training=dense.words(),
            regrown=bool(rounds),
            rounds=rounds,
        )
    return run.close([row["accuracy"] for row in run.results["states"]])


if __name__ == "__main__":
    utils.run(main)
