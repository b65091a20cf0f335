"""Test a model on all tasks so far.

    python test.py --pretrained TD_cifar10/task6_best_model.pt --pruned
    python test.py --pretrained BU_cifar10/task3_best_model.pt --state 2
    python test.py --pretrained ticket.npz --pruned

Checkpoints of ours and packed files (tools/tickets.py) say which network, dataset, class order and
tasks they are of; those of the published scripts need flags where the defaults do not fit.
Prints the test accuracy of tasks 1..t by the balanced heads 1..t, their mean, the density, and what
the model costs (models/cost.py). With --save_dir the records are written there too, as
test_<P>_state<t>_results.json.
"""

from runtime.threads import setup_threads

setup_threads()  # before PyTorch is loaded

import json
import os
import time
from pathlib import Path
from statistics import mean

import dataset
import pruning_utils
from models import BACKBONES, build_model
from runtime import args as flags
from runtime import records
from runtime.checkpoint import read_weights
from runtime.errors import UserError, explain
from runtime.files import save_text
from runtime.process import run_script
from trainer import evaluate


def make_parser():
    parser = flags.Parser(__doc__)
    flag = parser.add_argument_group("the model").add_argument
    message = "checkpoint or packed file to test"
    flag("--pretrained", type=flags.path, required=True, metavar="P", help=message)
    flag("--pruned", action="store_true", help="the checkpoint is pruned: it has masks")
    default = "the last that it has learned, or else the last of all"
    flags.add_state_flag(flag, "test on the classes of tasks 1..t", default)
    flag("--batch_size", **flags.BATCH_SIZE | {"help": f"images at a time {flags.DEFAULT}"})
    message = "where records go (default: nowhere)"
    flag("--save_dir", type=flags.path, metavar="DIR", help=message)
    flags.add_data_flags(parser, dataset.DATASETS)
    flags.add_network_flags(parser, BACKBONES)
    return parser


def check_state(args, known):
    """The task of --state is by default the last that the model has learned; no later one."""
    learned = known and known["state"]
    if learned and args.state and args.state > learned:
        raise UserError(
            f"--state {args.state}: {args.pretrained} has learned tasks 1 to {learned}; choose one"
        )
    args.state = args.state or learned


def check_record(args, prefix):
    """Raise UserError if --save_dir holds the record of another checkpoint under this name."""
    path = Path(args.save_dir or "", f"{prefix}results.json")
    if args.save_dir and os.path.exists(path):
        with explain(path, "is not a results file", "; choose another folder"):
            tested = json.loads(path.read_text())["config"]["pretrained"]
        if os.path.realpath(tested) != os.path.realpath(args.pretrained):
            raise UserError(f"{path}: belongs to {tested}; choose another --save_dir")


def main(argv=None):
    args, start = make_parser().parse_args(argv), time.monotonic()
    known, state = read_weights(args.pretrained)
    flags.adopt(args, known, args.pretrained)
    check_state(args, known)
    dataset.resolve_tasks(args)
    flags.finalize_args(args)
    masks = pruning_utils.extract_mask(state)
    if bool(masks) != args.pruned:
        kind, advice = ("pruned", "add") if masks else ("dense", "remove")
        raise UserError(f"--pretrained {args.pretrained}: is a {kind} model; {advice} --pruned")
    device = flags.pick_device(args)
    model = build_model(args).to(device)
    pruning_utils.load_state(model, state, source=f"--pretrained {args.pretrained}")
    data = dataset.load(args, device, pool=False, splits=("test",), known=known)
    prefix = f"test_{Path(args.pretrained).stem}_state{args.state}_"
    check_record(args, prefix)
    results = records.new_results("test", args, data, model)
    print(records.run_summary(results, data, model), end="", flush=True)
    evaluated = evaluate(model, data.test, args.state, data, args.batch_size)
    confusion = evaluated.pop("confusion")
    row = {"state": args.state, "mean": mean(evaluated["accuracy"])} | evaluated
    row |= pruning_utils.network_record(masks, args, data)
    row["seconds"] = time.monotonic() - start
    results["states"] = [row]
    if args.save_dir:
        folder = Path(args.save_dir)
        records.write_results(folder, prefix, results)
        table = records.confusion_table(confusion, results["class_names"])
        save_text(folder / f"{prefix}confusion.csv", table)
    records.print_state(row)
    text = (
        "cost (computed): {weights:,} convolution weights, {macs:,} multiply-accumulates per image "
        "({macs_percent:.2f} % of the dense network's), {state_dict_bytes:,} bytes of state dict, "
        "{packed_bytes:,} of a packed file's arrays"
    )
    print(text.format(**row["cost"]))
    return results


if __name__ == "__main__":
    run_script(main)
