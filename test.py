"""Test a model on all tasks so far.

    python test.py --pretrained TD_cifar10/task6_best_model.pt --pruned --state 5
    python test.py --pretrained BU_cifar10/task3_best_model.pt --state 3
    python test.py --pretrained ticket.npz --pruned

The last is a packed file (tools/pack.py), which tells the network, data set, class order and state.
A shrunk one is dense: leave out --pruned.
Prints the test accuracy of tasks 1..t by the balanced heads 1..t, their mean, the density, and what
the model costs (models/cost.py).
With --save_dir the records are written there too, as test_<P>_state<t>_results.json.
"""

import json
import os
import time
from pathlib import Path

import dataset
import pruning_utils
from models import BACKBONES, build_model
from models.cost import shrunk_cost
from models.shrink import ShrunkNet
from runtime import cli, packed
from runtime.checkpoint import read_state_dict
from runtime.device import pick_device
from runtime.errors import UserError
from runtime.process import run_script
from runtime.run import Record
from trainer import evaluate


def make_parser():
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser, dataset.DATASETS)
    cli.add_network_flags(parser, BACKBONES)
    flag = parser.add_argument_group("the model").add_argument
    flag(
        "--pretrained",
        type=cli.path,
        required=True,
        metavar="P",
        help="checkpoint or packed file to test",
    )
    flag("--pruned", action="store_true", help="it holds masks")
    default = "the last; of a packed file, the last that it has learned"
    cli.add_state_flag(flag, "test on the classes of tasks 1..t", default)
    cli.add_batch_size_flag(flag)
    flag("--save_dir", type=cli.path, metavar="DIR", help="where records go (default: nowhere)")
    return parser


def parse(argv):
    args = packed.parse_args(make_parser(), argv, "pretrained", dataset.DATASETS, ("state",))
    dataset.resolve_tasks(args)
    cli.finalize_args(args)
    return args


def cost_line(weights, macs, macs_percent, checkpoint_bytes, packed_bytes):
    """A line on the cost of a model, as models/cost.py computes it."""
    return (
        f"cost (computed): {weights:,} convolution weights, {macs:,} multiply-accumulates per "
        f"image ({macs_percent:.2f} % of the dense network's), {checkpoint_bytes:,} bytes as in a "
        f"checkpoint, {packed_bytes:,} packed, before compression"
    )


def load_model(args, device):
    """The model of --pretrained, its masks, and its density in percent. Raises UserError."""
    header, model = packed.read_shrunk(args.pretrained, args.precision == "bf16")
    state = {} if model else read_state_dict(args.pretrained)
    masks = pruning_utils.extract_mask(state)
    if bool(masks) != args.pruned:
        kind, advice = ("pruned", "add") if masks else ("dense", "leave out")
        raise UserError(f"--pretrained {args.pretrained}: found a {kind} model, {advice} --pruned")
    if model:
        return model.to(device), masks, header["density"]
    model = build_model(args).to(device)
    pruning_utils.load_state(model, state, source=f"--pretrained {args.pretrained}")
    return model, masks, pruning_utils.density(pruning_utils.masks_of(model))


def check_record(args, prefix):
    """Raise UserError if --save_dir holds this record of another checkpoint."""
    path = Path(args.save_dir or "") / f"{prefix}results.json"
    try:
        tested = args.save_dir and json.loads(path.read_text())["config"]["pretrained"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if tested and os.path.realpath(tested) != os.path.realpath(args.pretrained):
        raise UserError(
            f"--save_dir {args.save_dir}: holds {path.name} of {tested}; name another folder"
        )


def main(argv=None):
    args, start = parse(argv), time.monotonic()
    device = pick_device(args)
    model, masks, density = load_model(args, device)
    data = dataset.load(args, device, checkpoint=args.pretrained, pool=False, parts=("test",))
    described = pruning_utils.network_record(masks, args, data)
    if isinstance(model, ShrunkNet):
        if model.size != data.image_size:
            raise UserError(
                f"--pretrained {args.pretrained}: takes images of {list(model.size)}, found "
                f"{list(data.image_size)} in {data.source}; give the set that it was shrunk for"
            )
        described["cost"] = shrunk_cost(args, model)
    prefix = f"test_{Path(args.pretrained).stem}_state{args.state}_"
    check_record(args, prefix)
    record = Record("test", args, data, model, prefix)
    record.write()  # a folder that cannot be written is reported now
    print(record.header, end="", flush=True)
    evaluated = evaluate(model, data.test, args.state, data, args.batch_size)
    record.add(
        state=args.state,
        **evaluated,
        density=density,
        **described,
        seconds=time.monotonic() - start,
    )
    print(cost_line(**record.results["states"][-1]["cost"]))
    return record.close()


if __name__ == "__main__":
    run_script(main, parallel=True)
