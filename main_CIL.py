"""The dense baseline: all tasks with lottery teaching, no pruning (docs/METHOD.md section 6).

    python main_CIL.py                                  the published protocol on CIFAR-10
    python main_CIL.py --dataset digits --width 8 --epochs 20 --unlabel_num 3

Each task starts from the best model of the one before; all tests are of best models.
"""

import dataset
import pruning_utils
import teaching
import trainer
import utils
from models import BACKBONES
from runtime import cli
from runtime.process import run_script
from runtime.run import Run


def make_parser():
    return cli.training_parser(__doc__, "<dataset>_cil", dataset.DATASETS, BACKBONES)


def parse(argv):
    args = make_parser().parse_args(argv)
    dataset.resolve_tasks(args)
    cli.finalize_args(args, "{}_cil")
    return args


def main(argv=None):
    args = parse(argv)
    device = utils.pick_device(args)
    data = dataset.load(args, device)
    model = trainer.make_model(args, device)
    run = Run("main_CIL", args, data, model)
    trainer.save_initialization(model, run)
    for t in range(1, args.classifiers + 1):
        task = teaching.build_task(data, args, t)
        trained = trainer.train_task(model, task, run, f"task{t}")
        pruning_utils.load_state(model, trained.best_state)
        if t < args.classifiers:
            teaching.teach(model, data, run, t)
        run.add(
            state=t,
            **trainer.evaluate_tasks(model, task, run, f"task{t}"),
            density=100.0,
            **pruning_utils.network_record({}, args, data),
            training=trained.summary(),
        )
    return run.close([row["accuracy"] for row in run.results["states"]])


if __name__ == "__main__":
    run_script(main)
