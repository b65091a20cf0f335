"""Images/s of the KD step of task 3 with one process or several, and their time in communication.

    python benchmarks/ranks.py --width 16
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 benchmarks/ranks.py --width 16

The batch size is 256 in all, the images are random pixels. Prints a row of docs/cluster.md. The
time in communication includes that spent waiting for the slowest process.
"""

import itertools
import time

import bench
import torch
import torch.distributed as dist

import trainer
from runtime import cli, ranks
from runtime.process import check_signals, run_script

COLLECTIVES = "all_reduce", "all_gather", "broadcast"


class Clock:
    """Seconds spent in torch.distributed's collectives, each of which is timed."""

    def __init__(self):
        self.seconds = 0.0
        for name in COLLECTIVES:
            setattr(dist, name, self.timed(getattr(dist, name)))

    def timed(self, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return call


def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--width", type=int, default=64, metavar="N", help=cli.DEFAULT)
    parser.add_argument("--steps", type=int, default=10, metavar="N", help=cli.DEFAULT)
    flags = parser.parse_args(argv)
    device, t, clock = torch.device("cpu"), 3, Clock()
    args = bench.make_args("ours_fp32", flags.width)
    data = bench.make_data(device, per_class=600)
    model, optimizer = bench.make_network("ours_fp32", args, device, masked=True)
    unlabeled = bench.make_unlabeled(args.batch_size, t, device)
    task, progress = trainer.make_task(data, t, unlabeled), trainer.Progress()
    steps = trainer.train_epoch(model, optimizer, task, args, "task3", progress)
    next(steps)
    images, start, clock.seconds = progress.images, time.perf_counter(), 0.0
    for _ in itertools.islice(steps, flags.steps):
        check_signals()  # as the scripts do after each step
    seconds = time.perf_counter() - start
    print("| width | processes x threads | images/s | seconds per step | in communication |")
    print(
        f"| {flags.width} | {ranks.world()} x {torch.get_num_threads()} "
        f"| {(progress.images - images) / seconds:.0f} | {seconds / flags.steps:.2f} "
        f"| {100 * clock.seconds / seconds:.1f} % |",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main, parallel=True)
