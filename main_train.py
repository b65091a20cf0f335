"""Train a ticket on a task: weights W under mask M (docs/METHOD.md section 6).

    D=BU_cifar10
    python main_train.py --weight $D/task2_best_model.pt --mask $D/mask-3.pt --state 3

retrains the ticket of task 3 from the dense weights of task 2: the paper's task-rewound bottom-up
ticket ("TR-BU"). The soft labels are those of a run that has finished task t-1
(--save_data_path).

Add --control shuffle_mask, for example, to train a control in its place, a baseline for the ticket.
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
from runtime.checkpoint import read_weights
from runtime.errors import UserError
from runtime.files import file_checksum
from runtime.process import run_script
from runtime.run import Run


def make_parser():
    parser = flags.training_parser(__doc__, "BU_<dataset>", dataset.DATASETS, BACKBONES)
    flag = parser.add_argument_group("the ticket").add_argument
    message = "checkpoint or packed file to start from; its own mask is dropped"
    flag("--weight", type=flags.path, required=True, metavar="W", help=message)
    message = "mask file, or any pruned checkpoint or packed ticket"
    flag("--mask", type=flags.path, required=True, metavar="M", help=message)
    flags.add_state_flag(flag, "task to train")
    kinds = ", ".join(f"{kind} ({text})" for kind, text in flags.CONTROLS.items())
    message = f"what to train, see docs/METHOD.md 6: {kinds}; default none"
    flag("--control", choices=flags.CONTROLS, default="none", help=message)
    return parser


def apply_control(model, masks, args, device):
    """Put the model, dense with the weights W, under the masks, as --control says.

    Returns the masks that it is then under; an empty dict is dense. What each control asks:

    random_mask      would any mask of this density do? (Frankle & Carbin 2019; Frankle et al. 2021)
    shuffle_mask     which weights remain, or only how many in which layer? (Su et al. 2020;
                     Frankle et al. 2021)
    reinit           do the weights matter that the ticket starts from? BatchNorm and heads are new
                     too (Frankle & Carbin 2019; a winning ticket must beat it: Ma et al. 2021)
    shuffle_weights  does it matter which weight of a layer is where? (Su et al. 2020)
    dense            does the ticket do as well as the whole network? (Frankle & Carbin 2019)

    (The sources train from an initialization. W here holds what earlier tasks taught, and a control
    that moves the mask or the weights loses some of that too; reinit loses all of it.)

    Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019; Su et al., Sanity-Checking Pruning
    Methods, NeurIPS 2020; Frankle et al., Pruning Neural Networks at Initialization: Why Are We
    Missing the Mark?, ICLR 2021; Ma et al., Sanity Checks for Lottery Tickets, NeurIPS 2021.
    """
    kind = args.control
    generator = utils.make_generator(args.seed, "control", kind, args.state)
    if kind == "random_mask":
        masks = pruning_utils.random_mask(masks, generator)
    elif kind == "shuffle_mask":
        masks = pruning_utils.shuffle_mask(masks, generator)
    elif kind == "reinit":
        new = trainer.make_model(args, device, "control", kind, args.state)
        pruning_utils.load_state(model, new.state_dict())
    elif kind == "shuffle_weights":
        pruning_utils.shuffle_weights(model, masks, generator)
    elif kind == "dense":
        masks = {}
    pruning_utils.apply_mask(model, masks)
    return masks


def main(argv=None):
    args = make_parser().parse_args(argv)
    known, weights = read_weights(args.weight)
    known_of_mask, state = read_weights(args.mask)
    flags.adopt(args, known, f"--weight {args.weight}")
    for key in flags.KNOWN if known and known_of_mask else ():
        if known_of_mask[key] != known[key]:
            raise UserError(
                f"--mask {args.mask}: is of {key} {known_of_mask[key]}, --weight {args.weight} of "
                f"{known[key]}; choose files of the same network and dataset"
            )
    masks = pruning_utils.extract_mask(state)
    if not masks:
        raise UserError(f"--mask {args.mask}: holds no masks; choose a pruned checkpoint")
    dataset.resolve_tasks(args)
    flags.finalize_args(args, "BU_{}")
    t = args.state
    suffix = "" if args.control == "none" else f"_{args.control}"
    stage, stream = f"retrain_task{t}{suffix}", utils.RETRAINING.format(t) + suffix
    device = flags.pick_device(args)
    model = trainer.make_model(args, device)
    pruning_utils.load_state(model, weights, masks={}, source=f"--weight {args.weight}")
    pruning_utils.check_masks(model, masks, f"--mask {args.mask}")
    masks = apply_control(model, masks, args, device)
    data = dataset.load(args, device, pool=False, known=known)
    task = teaching.build_task(data, args, t)
    inputs = {"--weight": args.weight, "--mask": args.mask}
    inputs |= {path.name: path for path in teaching.soft_label_files(args, t)}
    checksums = {flag: file_checksum(path) for flag, path in inputs.items()}
    run = Run("main_train", args, data, model, f"{stage}_", checksums)
    trained = trainer.train_task(model, task, run, stage, stream)
    pruning_utils.load_state(model, trained.best_state)
    run.add(
        t,
        trainer.evaluate_tasks(model, task, run, stage),
        **pruning_utils.network_record(masks, args, data),
        training=trainer.summary(trained),
    )
    return run.close()


if __name__ == "__main__":
    run_script(main)
