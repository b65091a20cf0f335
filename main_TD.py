"""Top-down lifelong tickets: prune on a curriculum, task after task (docs/METHOD.md section 6).

    python main_TD.py                                   the published protocol on CIFAR-10
    python main_TD.py --prune_scheduler 1,1,3,4,5       the schedule of the paper's Figure 4
    python main_TD.py --dataset digits --width 8 --epochs 20 --iter_epochs 3 --unlabel_num 3

Dense task 1; then for each task: evaluate its best model and teach with it, prune and retrain its
last one, rewind the remaining weights, and train the next task under the mask. The last task is
trained once more at the end: the model of "task T+1" is the result.
"""

from runtime.threads import setup_threads

setup_threads()  # before PyTorch is loaded

import torch

import dataset
import pruning_utils
import teaching
import trainer
import utils
from models import BACKBONES, build_model
from runtime import args as flags
from runtime.errors import UserError
from runtime.process import run_script


def make_parser():
    parser = flags.training_parser(__doc__, "TD_<dataset>", dataset.DATASETS, BACKBONES)
    flag = flags.add_pruning_flags(parser, "top-down pruning", pruning_utils.CRITERIA)
    message = "number of prunings at each task (default 1,1,2,3,5 for five tasks)"
    flag("--prune_scheduler", type=flags.int_list, metavar="S1,..,ST", help=message)
    message = (
        "what remaining weights become before the next task: the initialization (zero, default), "
        "those of the task's best model (best), new random ones (rand), or no change (finetune)"
    )
    flag("--rewind", choices=("zero", "best", "rand", "finetune"), default="zero", help=message)
    return parser


def parse(argv):
    args = make_parser().parse_args(argv)
    dataset.resolve_tasks(args)
    flags.finalize_args(args, "TD_{}")
    tasks = args.classifiers
    if args.prune_scheduler is None and tasks == 5:
        args.prune_scheduler = [1, 1, 2, 3, 5]  # published
    if len(args.prune_scheduler or ()) != tasks:
        ones = ",".join(["1"] * tasks)
        raise UserError(
            f"--prune_scheduler: expected {tasks} numbers, one for each task, for example "
            f"--prune_scheduler {ones} (its default is for 5 tasks)"
        )
    check_schedule(args)
    return args


def check_schedule(args):
    """Raise UserError if the curriculum leaves no weight."""
    with torch.device("meta"):  # no memory
        model = build_model(args)
    left = sum(p.numel() for p in model.parameters() if p.dim() == 4)  # of convolutions
    for t, prunings in enumerate(args.prune_scheduler, 1):
        for _ in range(prunings):
            left -= round(args.percent * left)
        if not left:
            raise UserError(
                f"--prune_scheduler: with --percent {args.percent:g} no weight is left after task "
                f"{t}; choose fewer prunings or a smaller --percent"
            )


def prune_task(model, task, run):
    """The prunings of task t, with retraining between them but not after the last one."""
    args, t = run.args, task.t
    prunings = args.prune_scheduler[t - 1]
    # one optimizer for the task: its momentum is kept across prunings
    optimizer = trainer.make_optimizer(model, args, args.lr / 100)
    masks = pruning_utils.masks_of(model)
    for number in range(1, prunings + 1):
        stream = utils.TOP_DOWN.format(t, number)
        masks = pruning_utils.prune_once(model, task, masks, args, stream)
        pruning_utils.apply_mask(model, masks)
        run.log(f"task {t}: pruning {number}, {pruning_utils.describe(masks)}")
        if number < prunings:
            trainer.retrain(model, task, run, f"task{t}_prune{number}", stream, optimizer=optimizer)


def rewind(model, t, best, run):
    """Set the weights that remain after task t's prunings back to where --rewind says.

    best: the state dict of task t's best model.
    """
    args = run.args
    if args.rewind == "zero":
        pruning_utils.rewind(model, run.load_weights("task0_checkpoint_weight.pt"))
    elif args.rewind == "best":
        pruning_utils.rewind(model, best)
    elif args.rewind == "rand":
        fresh = trainer.make_model(args, run.data.pool.device, utils.TASK.format(t), 0, "rewind")
        pruning_utils.rewind(model, fresh.state_dict())


def make_ticket(model, task, run, last, best):
    """Put task t's ticket into the model: its last state, pruned and rewound. Returns the masks."""
    stage = f"task{task.t}_ticket"
    if not run.done(stage):
        pruning_utils.load_state(model, last)
        prune_task(model, task, run)
        rewind(model, task.t, best, run)
        run.save_checkpoint(f"{stage}.pt", model.state_dict(), task.t)
        run.finish(stage, f"{stage}.pt")
    run.discard(f"task{task.t}_prune")
    pruning_utils.load_state(model, run.load_weights(f"{stage}.pt"))
    return pruning_utils.masks_of(model)


def main(argv=None):
    args = parse(argv)
    model, run = trainer.start_run("main_TD", args)
    data, tasks = run.data, args.classifiers

    task = teaching.build_task(data, args, 1)
    trained = trainer.train_task(model, task, run, "task1", utils.TASK.format(1))
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
            t,
            evaluated,
            **pruning_utils.ticket_record(masks, args, data, tested),
            training=trainer.summary(trained),
        )
        # 4. train the next task; after the last one, that one once more
        task = teaching.build_task(data, args, min(t + 1, tasks))
        trained = trainer.train_task(model, task, run, f"task{t + 1}", utils.TASK.format(t + 1))
    pruning_utils.load_state(model, trained.best_state)
    run.add(
        tasks + 1,
        trainer.evaluate_tasks(model, task, run, "result"),
        **pruning_utils.network_record(masks, args, data),
        training=trainer.summary(trained),
    )
    # task T's row is that of the result, the model of "task T+1"
    rows = [row["accuracy"] for row in run.results["states"]]
    return run.close(rows[: tasks - 1] + rows[tasks:])


if __name__ == "__main__":
    run_script(main)
