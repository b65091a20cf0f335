"""Does bf16 cost accuracy? Compare runs of main_TD.py in both precisions, a few seeds each.

    python dataset.py --per_class 300 --unlabeled pool.npy --data data/small
    F="--data data/small --width 16 --epochs 20 --decreasing_lr 12,16 --lr 0.05 --batch_size 64"
    F="$F --unlabel_num 10 --iter_epochs 2"
    for s in 0 1 2; do for p in fp32 bf16; do
        python main_TD.py $F --seed $s --precision $p --save_dir runs/$p-$s
    done; done
    python benchmarks/precision.py runs/fp32-* runs/bf16-*

Prints accuracies by precision, and the overlap of the final masks (intersection over union, in
percent): of one seed in both precisions, and of two seeds in one precision. docs/speed.md has the
results of these runs, with 10,000 of the CIFAR-100 training images as pool.npy.
"""

import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pruning_utils
from runtime.cli import Parser
from runtime.errors import UserError
from runtime.metrics import mean_and_sd
from runtime.process import run_script
from tools import report


def overlap(masks, others):
    """Weights that remain in both masks, in percent of those that remain in either."""
    both = sum(int((masks[name] * others[name]).sum()) for name in masks)
    either = sum(int((masks[name] + others[name]).count_nonzero()) for name in masks)
    return 100 * both / either


def read(folder):
    """What is compared of a finished run of main_TD.py. Raises UserError if it is not one."""
    results = report.read(folder)[0]
    if results["script"] != "main_TD" or "average_incremental_accuracy" not in results:
        raise UserError(f"{folder}: contains no finished run of main_TD.py; give one")
    config, last = results["config"], results["states"][-1]
    masks = pruning_utils.load_masks(Path(folder) / f"task{last['state']}_best_model.pt")
    return {
        "precision": config["precision"],
        "seed": config["seed"],
        "accuracies": [row["mean"] for row in results["states"]],
        "average": results["average_incremental_accuracy"],
        "masks": masks,
    }


def summary(values):
    mean, deviation = mean_and_sd(values)
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run of main_TD.py")
    runs = [read(folder) for folder in parser.parse_args(argv).runs]
    kinds = sorted({run["precision"] for run in runs}, reverse=True)
    for kind in kinds:
        own = [run for run in runs if run["precision"] == kind]
        states = " | ".join(summary(column) for column in zip(*(run["accuracies"] for run in own)))
        average = summary([run["average"] for run in own])
        print(f"{kind}, {len(own)} seed(s): mean accuracy by state {states}; average {average}")
        for run in own:
            print(f"  seed {run['seed']}: " + " ".join(f"{a:.1f}" for a in run["accuracies"]))
    for kind in kinds:
        pairs = combinations([run for run in runs if run["precision"] == kind], 2)
        print_overlaps(f"two seeds in {kind}", pairs)
    pairs = [(a, b) for a, b in combinations(runs, 2) if a["seed"] == b["seed"]]
    print_overlaps("one seed in both", pairs)


def print_overlaps(title, pairs):
    overlaps = [overlap(a["masks"], b["masks"]) for a, b in pairs]
    if overlaps:
        listed = ", ".join(f"{value:.2f}" for value in overlaps)
        print(f"overlap of the final masks, {title}: {listed} %")


if __name__ == "__main__":
    run_script(main)
