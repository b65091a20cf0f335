"""Test a model on all tasks so far (METHOD.md section 6).

    python test.py --pretrained TD_cifar10/task6_best_model.pt --pruned --state 5
    python test.py --pretrained BU_cifar10/task3_best_model.pt --state 3

Prints the test accuracy of tasks 1..t by the balanced heads 1..t, their mean, and the density.
With --save_dir the records are written there too, as test_<P>_results.json.
"""

import time
from pathlib import Path

import dataset
import pruning_utils
import utils
from trainer import make_model, test
from utils import Refusal


def parse(argv):
    parser = utils.make_parser(__doc__, "none: nothing is written")
    flag = parser.add_argument_group("the model").add_argument
    words = "checkpoint to test"
    flag("--pretrained", type=utils.place, required=True, metavar="P", help=words)
    flag("--pruned", action="store_true", help="it is a pruned one")
    utils.add_state(flag, "task whose classes, with all before, are told apart")
    args = parser.parse_args(argv)
    dataset.complete(args)
    utils.settle(args, save_dir="", trains=False)
    return args


def main(argv=None):
    args, began = parse(argv), time.monotonic()
    device = utils.pick_device(args.device, args.gpu, args.deterministic)
    state = utils.read_state(args.pretrained)
    pruned = bool(pruning_utils.extract_mask(state))
    if pruned != args.pruned:
        kind, advice = ("pruned", "add") if pruned else ("dense", "leave out")
        raise Refusal(f"--pretrained {args.pretrained}: found a {kind} model, {advice} --pruned")
    model = make_model(args, device)
    pruning_utils.load_state(model, state, source=f"--pretrained {args.pretrained}")
    data = dataset.load(args, device, beside=args.pretrained, pool=False)
    record = utils.Record("test", args, data, device, f"test_{Path(args.pretrained).stem}_")
    record.write()  # a folder that cannot be written is told now
    record.add(
        state=args.state,
        accuracy=test(model, data.test, args.state, data, args),
        density=pruning_utils.density(pruning_utils.masks_of(model)),
        seconds=time.monotonic() - began,
    )
    return record.close()


if __name__ == "__main__":
    utils.run(main)
