"""Train a ticket on a task: weights W under mask M (METHOD.md section 6).

    D=BU_cifar10
    python main_train.py --weight $D/task2_best_model.pt --mask $D/mask-3.pt --state 3

That is the paper's task-rewound bottom-up ticket ("TR-BU") of task 3: its mask on the dense
weights of task 2. The soft labels of task t-1 are those of a finished run (--save_data_path).

    python main_train.py --weight $D/task2_best_model.pt --mask $D/mask-3.pt --state 3 \\
        --control shuffle_mask

trains a control in its place: what a ticket must beat, see take_control().
"""

import dataset
import pruning_utils
import teaching
import utils
from run import Run
from trainer import make_model, test, train_task


def parse(argv):
    parser = utils.make_parser(__doc__, "BU_<dataset>")
    flag = parser.add_argument_group("the ticket").add_argument
    flag(
        "--weight",
        type=utils.place,
        required=True,
        metavar="W",
        help="checkpoint to start from; its own mask is dropped",
    )
    words = "mask file, or any pruned checkpoint"
    flag("--mask", type=utils.place, required=True, metavar="M", help=words)
    utils.add_state(flag, "task to train")
    flag(
        "--control",
        choices=utils.CONTROLS,
        default="none",
        help="train in place of the ticket (none, default): random_mask, a mask of its density "
        "anywhere; shuffle_mask, the mask shuffled within each layer; reinit, the mask on a new "
        "initialisation; shuffle_weights, the weights that remain shuffled within each layer; "
        "dense, no mask",
    )
    args = parser.parse_args(argv)
    dataset.complete(args)
    utils.settle(args, "BU_{}")
    return args


def take_control(model, masks, args, device):
    """Put the model, dense with the weights W, under the masks, as the --control wants it.

    Returns the masks that it is under then; an empty dict is dense. What each control keeps, and
    which claim about the ticket it tests. (The sources train from an initialisation. W here is what
    earlier tasks have taught, and a control that moves the mask or the weights loses some of that
    too, reinit all of it.)

    random_mask      the number of weights. Is it the mask, or would any of its density do? (the
                     random sparse networks of Frankle & Carbin 2019; Frankle et al. 2021)
    shuffle_mask     the number in each layer. Is it which weights remain, or only how many in
                     which layer? (Su et al. 2020; Frankle et al. 2021)
    reinit           the mask, on a network that is wholly new, BatchNorm and heads too. Do the
                     weights matter that the ticket starts from? (Frankle & Carbin 2019; Frankle
                     et al. 2021; a winning ticket must beat it: Ma et al. 2021)
    shuffle_weights  the mask, and each layer's distribution of weights. Does it matter which
                     weight stands where? (Su et al. 2020)
    dense            W without a mask. Does the ticket do as well as the whole network? (Frankle &
                     Carbin 2019)

    Frankle & Carbin, The Lottery Ticket Hypothesis, ICLR 2019; Su et al., Sanity-Checking Pruning
    Methods, NeurIPS 2020; Frankle et al., Pruning Neural Networks at Initialization: Why Are We
    Missing the Mark?, ICLR 2021; Ma et al., Sanity Checks for Lottery Tickets, NeurIPS 2021.
    """
    kind = args.control
    generator = utils.stream(args.seed, "control", kind, args.state)
    if kind == "random_mask":
        masks = pruning_utils.random_mask(masks, generator)
    elif kind == "shuffle_mask":
        masks = pruning_utils.shuffle_mask(masks, generator)
    elif kind == "reinit":
        new = make_model(args, device, "control", kind, args.state)
        pruning_utils.load_state(model, new.state_dict())
    elif kind == "shuffle_weights":
        pruning_utils.shuffle_weights(model, masks, generator)
    elif kind == "dense":
        masks = {}
    pruning_utils.apply_mask(model, masks)
    return masks


def main(argv=None):
    args = parse(argv)
    t = args.state
    step = f"retrain_task{t}" + f"_{args.control}" * (args.control != "none")
    device = utils.pick_device(args.device, args.gpu, args.deterministic)
    weights, masks = utils.read_state(args.weight), pruning_utils.load_masks(args.mask)
    model = make_model(args, device)
    pruning_utils.load_state(model, weights, masks={}, source=f"--weight {args.weight}")
    pruning_utils.check_masks(model, masks, f"--mask {args.mask}")
    masks = take_control(model, masks, args, device)
    data = dataset.load(args, device, beside=args.weight)
    task = teaching.taught_task(data, args, t)
    inputs = {"--weight": args.weight, "--mask": args.mask}
    inputs |= {path.name: path for path in teaching.lesson_files(args, t)}
    checksums = {flag: utils.file_checksum(path) for flag, path in inputs.items()}
    run = Run("main_train", args, data, device, f"{step}_", checksums)
    trained = train_task(model, task, data, run, step)
    pruning_utils.load_state(model, trained.best_state)
    run.add(
        state=t,
        accuracy=run.once(f"{step}_test", test, model, data.test, t, data, args),
        density=pruning_utils.density(masks) if masks else 100.0,
        layer_density=pruning_utils.densities(masks),
        training=trained.words(),
    )
    return run.close()


if __name__ == "__main__":
    utils.run(main)
