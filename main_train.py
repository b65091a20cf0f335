"""Train a ticket on a task: weights W under mask M (METHOD.md section 6).

    D=BU_cifar10
    python main_train.py --weight $D/task2_best_model.pt --mask $D/mask-3.pt --state 3

That is the paper's task-rewound bottom-up ticket ("TR-BU") of task 3: its mask on the dense
weights of task 2. The soft labels of task t-1 are those of a finished run (--save_data_path).
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
    args = parser.parse_args(argv)
    dataset.complete(args)
    utils.settle(args, "BU_{}")
    return args


def main(argv=None):
    args = parse(argv)
    t = args.state
    device = utils.pick_device(args.device, args.gpu, args.deterministic)
    weights, masks = utils.read_state(args.weight), pruning_utils.load_masks(args.mask)
    model = make_model(args, device)
    pruning_utils.load_state(model, weights, masks={}, source=f"--weight {args.weight}")
    pruning_utils.check_masks(model, masks, f"--mask {args.mask}")
    pruning_utils.apply_mask(model, masks)
    data = dataset.load(args, device, beside=args.weight)
    task = teaching.taught_task(data, args, t)
    inputs = {"--weight": args.weight, "--mask": args.mask}
    inputs |= {path.name: path for path in teaching.lesson_files(args, t)}
    checksums = {flag: utils.file_checksum(path) for flag, path in inputs.items()}
    run = Run("main_train", args, data, device, f"retrain_task{t}_", checksums)
    trained = train_task(model, task, data, run, f"retrain_task{t}")
    pruning_utils.load_state(model, trained.best_state)
    run.add(
        state=t,
        accuracy=run.once(f"retrain_task{t}_test", test, model, data.test, t, data, args),
        density=pruning_utils.density(masks),
        training=trained.words(),
    )
    return run.close()


if __name__ == "__main__":
    utils.run(main)
