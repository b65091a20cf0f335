"""The dense baseline: all tasks with lottery teaching, no pruning (METHOD.md section 6).

    python main_CIL.py                                  the published protocol on CIFAR-10
    python main_CIL.py --dataset digits --width 8 --epochs 20 --unlabel_num 3

Each task goes on from the best model of the one before; all tests are of best models.
"""

import dataset
import pruning_utils
import teaching
import utils
from run import Run
from trainer import make_model, test, train_task


def main(argv=None):
    args = utils.make_parser(__doc__, "<dataset>_cil").parse_args(argv)
    dataset.complete(args)
    utils.settle(args, "{}_cil")
    device = utils.pick_device(args.device, args.gpu, args.deterministic)
    data = dataset.load(args, device)
    model = make_model(args, device)
    run = Run("main_CIL", args, data, device)
    for t in range(1, args.classifiers + 1):
        task = teaching.taught_task(data, args, t)
        trained = train_task(model, task, data, run, f"task{t}")
        pruning_utils.load_state(model, trained.best_state)
        if t < args.classifiers:
            teaching.teach(model, data, run, t)
        run.add(
            state=t,
            accuracy=run.once(f"task{t}_test", test, model, data.test, t, data, args),
            density=100.0,
            training=trained.words(),
        )
    return run.close([row["accuracy"] for row in run.results["states"]])


if __name__ == "__main__":
    utils.run(main)
