"""Why are the newest classes learned worst? What BatchNorm's statistics have to do with it.

    for s in 0 1 2; do python main_CIL.py --seed $s --save_dir runs/cil-$s $FLAGS; done
    python benchmarks/batchnorm.py runs/cil-*

In training, BatchNorm normalizes each sub-batch of a step by its own statistics: the random, the
new, the old and the unlabeled one. A test image is normalized by the running statistics, a mixture
of all. This tests the last task's best model of finished runs of main_CIL.py again, with other
statistics in place of the running ones: those of the training images so far, with equal numbers of
each class (balanced), of the new classes alone (new), and new and old test images each with the
statistics of their own kind, as in training (own). Nothing is trained.

What training with merged statistics changes is a question for --merge_batchnorm of the scripts.
docs/evidence.md has the results of both.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import dataset
import pruning_utils
import trainer
from models.batchnorm import BatchNorm2d
from runtime import cli
from runtime.checkpoint import read_state_dict
from runtime.device import pick_device
from runtime.errors import UserError
from runtime.process import run_script
from tools import report

PER_CLASS = 100  # training images a class for the statistics: as many as exemplars


def read(folder, flags):
    """The data set and the last task's best model of a run of main_CIL.py, and its task.

    flags: Namespace of data (None: the run's) and device. Raises UserError unless the run has
    finished more than one task.
    """
    results = report.read(folder)[0]
    args = argparse.Namespace(**results["config"])
    done = results["states"][-1]["state"] == args.classifiers > 1
    if results["script"] != "main_CIL" or not done:
        raise UserError(f"{folder}: give a finished run of main_CIL.py with two tasks or more")
    args.data, args.device, args.gpu = flags.data or args.data, flags.device, None
    if dataset.DATASETS[args.dataset].embedded:
        args.data = None  # recorded is its file
    device, t = pick_device(args), args.classifiers
    path = Path(folder) / f"task{t}_best_model.pt"
    data = dataset.load(args, device, checkpoint=path, pool=False, parts=("train", "test"))
    model = trainer.make_model(args, device)
    pruning_utils.load_state(model, read_state_dict(path), source=str(path))
    return data, model, t, args.batch_size


def use_statistics(model, images, data):
    """Set the running statistics to those of images (uint8 [n,H,W,3]), passed as one batch."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model.features(dataset.normalize(images, data))
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def accuracies(model, data, t, batch_size):
    """Test accuracy (percent) of the new classes and the mean of the older tasks."""
    *old, new = trainer.evaluate(model, data.test, t, data, batch_size)["accuracy"]
    return new, sum(old) / len(old)


def compare(folder, flags):
    """{statistics: (accuracy of the new classes, of the old ones)} of a run."""
    data, model, t, batch_size = read(folder, flags)
    few = {c: images[:PER_CLASS] for c, images in data.train.items()}
    sets = {
        "balanced": data.of_tasks(few, 1, t)[0],
        "new": data.of_tasks(few, t, t)[0],
        "old": data.of_tasks(few, 1, t - 1)[0],
    }
    found = {"running": accuracies(model, data, t, batch_size)}
    for name, images in sets.items():
        use_statistics(model, images, data)
        found[name] = accuracies(model, data, t, batch_size)
    old = found.pop("old")[1]
    return found | {"own": (found["new"][0], old)}


def main(argv=None):
    parser = cli.Parser(__doc__)
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="folder of a finished run of main_CIL.py")
    flag("--data", type=cli.path, metavar="DIR", help="the prepared set (default: the run's)")
    flag("--device", default="auto", metavar="DEVICE", help="as in the scripts (default auto)")
    args = parser.parse_args(argv)
    found = [compare(folder, args) for folder in args.runs]
    print("statistics   new classes    old classes")
    for name in found[0]:
        new, old = (report.cell(x, 1, len(x)) for x in zip(*(each[name] for each in found)))
        print(f"{name:<12} {new:<14} {old}")
    return found


if __name__ == "__main__":
    run_script(main)
