"""Top-down lifelong tickets: prune on a curriculum, task after task (METHOD.md section 6).

    python main_TD.py                                   the published protocol on CIFAR-10
    python main_TD.py --prune_scheduler 1,1,3,4,5       the schedule of the paper's Figure 4
    python main_TD.py --dataset digits --width 8 --epochs 20 --iter_epochs 3 --unlabel_num 3

Dense task 1; then for each task: report and teach with its best model, prune and retrain its
last one, rewind the weights that are left, and train the next task under the mask. The last task
is trained once more in the end: the model of "task T+1" is the result.
"""

import dataset
import pruning_utils
import teaching
import utils
from run import Run
from trainer import make_model, make_optimizer, retrain, test, train_task
from utils import Refusal


def parse(argv):
    parser = utils.make_parser(__doc__, "TD_<dataset>")
    flag = parser.add_argument_group("top-down pruning").add_argument
    flag(
        "--prune_scheduler",
        type=utils.whole_list,
        default="1,1,2,3,5",
        metavar="S1,..,ST",
        help="number of prunings at each task (default %(default)s)",
    )
    utils.add_pruning_flags(flag)
    flag(
        "--rewind",
        choices=("zero", "best", "rand", "finetune"),
        default="zero",
        help="what the remaining weights become before the next task: those of the initialisation "
        "(zero, default), of the task's best model (best), fresh random ones (rand), or nothing "
        "new (finetune)",
    )
    flag(
        "--rewind_scope",
        choices=("conv", "all"),
        default="conv",
        help="what is rewound: the convolutions (conv, default) or BatchNorm and heads too (all)",
    )
    args = parser.parse_args(argv)
    dataset.complete(args)
    utils.settle(args, "TD_{}")
    if len(args.prune_scheduler) != args.classifiers:
        schedule = ",".join(map(str, args.prune_scheduler))
        raise Refusal(
            f"--prune_scheduler {schedule}: found {len(args.prune_scheduler)} numbers, "
            f"give {args.classifiers}, one for each task"
        )
    if (1 - args.percent) ** sum(args.prune_scheduler) < 1e-9:
        raise Refusal(
            f"--prune_scheduler {','.join(map(str, args.prune_scheduler))}: with --percent "
            f"{args.percent:g} no weight would be left, give fewer prunings"
        )
    return args


def prune_state(model, task, data, run):
    """The prunings of task t's state, with retraining between them but not after the last one."""
    args = run.args
    prunings = args.prune_scheduler[task.t - 1]
    optimizer = make_optimizer(model, args, args.lr / 100)  # one for the state, momentum kept
    for number in range(1, prunings + 1):
        masks = pruning_utils.prune(
            pruning_utils.weights(model), pruning_utils.masks_of(model), args.percent
        )
        pruning_utils.apply_mask(model, masks)
        run.say(f"task {task.t}: pruning {number}, {pruning_utils.density(masks):.2f} % remain")
        if number < prunings:
            step = f"task{task.t}_prune{number}"
            retrain(model, task, data, run, step, optimizer=optimizer)


def rewind(model, t, initial, best, args, device):
    """Set what is left after task t's prunings back to where --rewind says."""
    if args.rewind == "zero":
        pruning_utils.rewind(model, initial, args.rewind_scope)
    elif args.rewind == "best":
        pruning_utils.rewind(model, best, args.rewind_scope)
    elif args.rewind == "rand":
        fresh = make_model(args, device, f"task{t}", 0, "rewind")
        pruning_utils.rewind(model, fresh.state_dict(), args.rewind_scope)


def main(argv=None):
    args = parse(argv)
    device = utils.pick_device(args.device, args.gpu, args.deterministic)
    data = dataset.load(args, device)
    model = make_model(args, device)
    run = Run("main_TD", args, data, device)
    tasks = args.classifiers

    initial = pruning_utils.clone_state(model)
    if not run.done("initialisation"):
        run.keep("task0_checkpoint_weight.pt", utils.save, initial)
        run.finish("initialisation", "task0_checkpoint_weight.pt")
    task = teaching.taught_task(data, args, 1)
    trained = train_task(model, task, data, run, "task1")
    for t in range(1, tasks + 1):
        # 1. the best model of task t: how good it is, and what it teaches
        last = pruning_utils.clone_state(model)
        pruning_utils.load_state(model, trained.best_state)
        accuracy = run.once(f"task{t}_test", test, model, data.test, t, data, args)
        tested = pruning_utils.density(pruning_utils.masks_of(model))
        if t < tasks:
            teaching.teach(model, data, run, t)
        ticket = f"task{t}_ticket"
        if not run.done(ticket):
            # 2. the last one: prune it, as often as the curriculum says
            pruning_utils.load_state(model, last)
            prune_state(model, task, data, run)
            # 3. rewind: this is the ticket for the next task
            rewind(model, t, initial, trained.best_state, args, device)
            run.keep(f"{ticket}.pt", utils.save, model.state_dict())
            run.finish(ticket, f"{ticket}.pt")
        run.forget(f"task{t}_prune")
        pruning_utils.load_state(model, run.load(f"{ticket}.pt"))
        masks = pruning_utils.masks_of(model)
        run.add(
            state=t,
            accuracy=accuracy,
            density=tested,
            ticket_density=pruning_utils.density(masks),
            layer_density=pruning_utils.densities(masks),
            training=trained.words(),
        )
        # 4. train the next task; after the last one, that one once more
        task = teaching.taught_task(data, args, min(t + 1, tasks))
        trained = train_task(model, task, data, run, f"task{t + 1}")
    pruning_utils.load_state(model, trained.best_state)
    run.add(
        state=tasks + 1,
        accuracy=run.once("result_test", test, model, data.test, tasks, data, args),
        density=pruning_utils.density(pruning_utils.masks_of(model)),
        training=trained.words(),
    )
    # task T's row is that of the result, the model of "task T+1"
    rows = [row["accuracy"] for row in run.results["states"]]
    return run.close(rows[: tasks - 1] + rows[tasks:])


if __name__ == "__main__":
    utils.run(main)
