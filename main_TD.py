"""Top-down lifelong tickets: prune on a curriculum, task after task (docs/METHOD.md section 6).

    python main_TD.py                                   the published protocol on CIFAR-10
    python main_TD.py --prune_scheduler 1,1,3,4,5       the schedule of the paper's Figure 4
    python main_TD.py --dataset digits --width 8 --epochs 20 --iter_epochs 3 --unlabel_num 3

Dense task 1; then for each task: evaluate its best model and teach with it, prune and retrain its
last one, rewind the remaining weights, and train the next task under the mask. The last task is
trained once more at the end: the model of "task T+1" is the result.
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
    parser = cli.training_parser(__doc__, "TD_<dataset>", dataset.DATASETS, BACKBONES)
    flag = cli.add_pruning_flags(parser, "top-down pruning", pruning_utils.CRITERIA)
    flag(
        "--prune_scheduler",
        type=cli.int_list,
        default="1,1,2,3,5",
        metavar="S1,..,ST",
        help="number of prunings at each task (default %(default)s)",
    )
    flag(
        "--rewind",
        choices=("zero", "best", "rand", "finetune"),
        default="zero",
        help="what the remaining weights become before the next task: those of the initialization "
        "(zero, default), of the task's best model (best), new random ones (rand), or no change "
        "(finetune)",
    )
    flag(
        "--rewind_scope",
        choices=("conv", "all"),
        default="conv",
        help="what is rewound: the convolutions (conv, default), or BatchNorm and heads too (all)",
    )
    return parser


def parse(argv):
    args = make_parser().parse_args(argv)
    dataset.resolve_tasks(args)
    cli.finalize_args(args, "TD_{}")
    if args.rewind == "finetune" and args.rewind_scope != "conv":
        raise UserError(
            f"--rewind finetune --rewind_scope {args.rewind_scope}: nothing is rewound; leave "
            f"--rewind_scope out"
        )
    schedule = ",".join(map(str, args.prune_scheduler))
    if len(args.prune_scheduler) != args.classifiers:
        raise UserError(
            f"--prune_scheduler {schedule}: found {len(args.prune_scheduler)} numbers, "
            f"give {args.classifiers}, one for each task"
        )
    if (1 - args.percent) ** sum(args.prune_scheduler) < 1e-9:
        raise UserError(
            f"--prune_scheduler {schedule}: with --percent {args.percent:g} no weight would "
            f"remain, give fewer prunings"
        )
    return args


def prune_task(model, task, run):
    """The prunings of task t, with retraining between them but not after the last one."""
    args, t = run.args, task.t
    prunings = args.prune_scheduler[t - 1]
    # one optimizer for the task: its momentum is kept across prunings
    optimizer = trainer.make_optimizer(model, args, args.lr / 100)
    for number in range(1, prunings + 1):
        step = f"task{t}_prune{number}"
        masks = pruning_utils.prune_once(model, pruning_utils.masks_of(model), args, step)
        pruning_utils.apply_mask(model, masks)
        run.log(f"task {t}: pruning {number}, {pruning_utils.density(masks):.2f} % remain")
        if number < prunings:
            trainer.retrain(model, task, run, step, optimizer=optimizer)


def rewind(model, t, best, run):
    """Set the weights that remain after task t's prunings back to where --rewind says.

    best: the state dict of task t's best model.
    """
    args = run.args
    if args.rewind == "zero":
        initial = run.load("task0_checkpoint_weight.pt")["state_dict"]
        pruning_utils.rewind(model, initial, args.rewind_scope)
    elif args.rewind == "best":
        pruning_utils.rewind(model, best, args.rewind_scope)
    elif args.rewind == "rand":
        device = next(model.parameters()).device
        fresh = trainer.make_model(args, device, f"task{t}", 0, "rewind")
        pruning_utils.rewind(model, fresh.state_dict(), args.rewind_scope)


def make_ticket(model, task, run, last, best):
    """Put task t's ticket into the model: its last state, pruned and rewound. Returns the masks."""
    step = f"task{task.t}_ticket"
    if not run.done(step):
        pruning_utils.load_state(model, last)
        prune_task(model, task, run)
        rewind(model, task.t, best, run)
        run.save(f"{step}.pt", save_checkpoint, model.state_dict())
        run.finish(step, f"{step}.pt")
    run.discard_steps(f"task{task.t}_prune")
    pruning_utils.load_state(model, run.load(f"{step}.pt"))
    return pruning_utils.masks_of(model)


def main(argv=None):
    args = parse(argv)
    model, run = trainer.start_run("main_TD", args)
    data, tasks = run.data, args.classifiers

    task = teaching.build_task(data, args, 1)
    trained = trainer.train_task(model, task, run, "task1")
    for t in range(1, tasks + 1):
        # 1. the best model of task t: evaluate it and teach with it
        last = pruning_utils.clone_state(model)
        pruning_utils.load_state(model, trained.best_state)
        evaluated = trainer.evaluate_tasks(model, task, run, f"task{t}")
        tested = pruning_utils.density(pruning_utils.masks_of(model))
        if t < tasks:
            teaching.teach(model, data, run, t)
        # 2. and 3. prune the last one as often as the curriculum says, and rewind it
        masks = make_ticket(model, task, run, last, trained.best_state)
        run.add(
            state=t,
            **evaluated,
            density=tested,
            **pruning_utils.ticket_record(masks, args, data),
            training=trained.summary(),
        )
        # 4. train the next task; after the last one, that one once more
        task = teaching.build_task(data, args, min(t + 1, tasks))
        trained = trainer.train_task(model, task, run, f"task{t + 1}")
    pruning_utils.load_state(model, trained.best_state)
    run.add(
        state=tasks + 1,
        **trainer.evaluate_tasks(model, task, run, "result"),
        density=pruning_utils.density(pruning_utils.masks_of(model)),
        **pruning_utils.network_record(masks, args, data),
        training=trained.summary(),
    )
    # task T's row is that of the result, the model of "task T+1"
    rows = [row["accuracy"] for row in run.results["states"]]
    return run.close(rows[: tasks - 1] + rows[tasks:])


if __name__ == "__main__":
    run_script(main, parallel=True)
