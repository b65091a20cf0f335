"""The dense baseline: all tasks with lottery teaching, no pruning (docs/METHOD.md section 6).

    python main_CIL.py                                     the published protocol on CIFAR-10
    python main_CIL.py --joint --save_dir joint_cil        upper bound: all images of old tasks
    python main_CIL.py --finetune --save_dir finetune_cil  lower bound: no images of old tasks

Each task starts from the best model of the one before; all tests are of best models. The bounds
keep the heads and the loss, but have no lottery teaching: with all old images nothing needs it, and
without exemplars nothing queries the pool.
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
from runtime.process import run_script


def make_parser():
    parser = flags.training_parser(__doc__, "<dataset>_cil", dataset.DATASETS, BACKBONES)
    flag = parser.add_argument_group("bounds").add_mutually_exclusive_group().add_argument
    message = "the upper bound: all training images of the old tasks as exemplars, without teaching"
    flag("--joint", action="store_true", help=message)
    message = "the lower bound: train with the new images alone, without exemplars or teaching"
    flag("--finetune", action="store_true", help=message)
    return parser


def parse(argv):
    args = make_parser().parse_args(argv)
    dataset.resolve_tasks(args)
    args.no_teaching |= args.joint or args.finetune
    flags.finalize_args(args, "{}_cil")
    return args


def main(argv=None):
    args = parse(argv)
    model, run = trainer.start_run("main_CIL", args)
    data = run.data
    kept = data.train if args.joint else data.exemplars  # of each class, when its task is over
    if args.finetune:
        kept = {c: images[:0] for c, images in kept.items()}
    for t in range(1, args.classifiers + 1):
        task = teaching.build_task(data, args, t, kept)
        trained = trainer.train_task(model, task, run, f"task{t}", utils.TASK.format(t))
        pruning_utils.load_state(model, trained.best_state)
        if t < args.classifiers:
            teaching.teach(model, data, run, t)
        run.add(
            t,
            trainer.evaluate_tasks(model, task, run, f"task{t}"),
            **pruning_utils.network_record({}, args, data),
            training=trainer.summary(trained),
        )
    return run.close([row["accuracy"] for row in run.results["states"]])


if __name__ == "__main__":
    run_script(main)
