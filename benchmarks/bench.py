"""Compare the speed of the published computation with ours.

    python benchmarks/bench.py                        all rows; about ten minutes on two cores
    python benchmarks/bench.py --rows kd_step prune   some of them
    python benchmarks/bench.py --out bench.json       write the times as JSON too

A row is measured in up to three ways: published (published.py), ours in fp32, and ours in bf16
where that makes a difference and the CPU has instructions for it. They take turns in one process,
under the same settings of threads and memory; a time is the median of its turns. A share is that of
a step in the rate of matrix products. The images are random pixels, on which the time does not
depend. What loads and augments them is left out; metrics.csv of a run has its images a second.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.threads import setup_threads

setup_threads()  # before torch is imported

import json
import statistics
import time

import published
import torch
from torch.utils.flop_counter import FlopCounterMode

import dataset
import main_CIL
import pruning_utils
import teaching
import trainer
from runtime.args import Parser, int_range, path, pick_device
from runtime.files import save_text
from runtime.process import run_script

WAYS = "published", "fp32", "bf16"
TASKS, CLASSES, POOL = 5, 2, 50_000  # CIFAR-10
T = 3  # the task of kd_step


def make_args(way, width):
    """The defaults of the scripts. What is distilled is random, see make_task()."""
    precision = "bf16" if way == "bf16" else "fp32"
    return main_CIL.parse(["--no_teaching", "--width", str(width), "--precision", precision])


def make_data(device):
    """A dataset of random pixels with the shapes of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)

    def images(n):
        pixels = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
        return pixels.to(device)

    train = {c: images(200) for c in range(TASKS * CLASSES)}
    return dataset.Data(
        source="random",
        classifiers=TASKS,
        classes_per_classifier=CLASSES,
        order=list(range(TASKS * CLASSES)),
        train=train,
        val={},
        test={},
        exemplars={c: each[:100] for c, each in train.items()},
        pool=images(1),
        mean=torch.full((3, 1, 1), 0.5, device=device),
        std=torch.full((3, 1, 1), 0.25, device=device),
        pad=4,
    )


def make_network(way, args, device, prunings):
    """The network under the mask of so many prunings, and its optimizer."""
    model = trainer.make_model(args, device).train()
    for _ in range(prunings):
        prune_once(model)
    optimizer = trainer.make_optimizer(model, args, args.lr)
    return published.plain(model) if way == "published" else model, optimizer


def prune_once(model):
    """A pruning of 20 % by magnitude."""
    scores = pruning_utils.magnitude(model)
    masks = pruning_utils.prune(scores, pruning_utils.masks_of(model), 0.2)
    pruning_utils.apply_mask(model, masks)


def make_task(args, data, queried):
    """Task T, with so many queried images as we store them (uint8), and random soft labels."""
    images = torch.randint(256, (queried, 3, 32, 32), dtype=torch.uint8, device=data.pool.device)
    logits = torch.randn(2, queried, (T - 1) * CLASSES, device=data.pool.device)
    task = teaching.build_task(data, args, T)
    return task._replace(unlabeled=(images.permute(0, 2, 3, 1), *map(trainer.soften, logits)))


def descend(optimizer, loss):
    """An optimizer step, as in trainer.train_epoch."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


# ------------------------------------------------------------------------------ the rows
#
# Each takes (way, width, device) and returns a function that does the work once.


def task1_step(way, width, device):
    args, data = make_args(way, width), make_data(device)
    model, optimizer = make_network(way, args, device, prunings=0)
    images, y = data.select_tasks(data.train, 1, 1)
    x, y = dataset.normalize(images[: args.batch_size], data), y[: args.batch_size]
    if way == "published":
        x = x.contiguous()
        return lambda: published.task1_step(model, optimizer, x, y)
    return lambda: descend(optimizer, trainer.task1_loss(model, x, y)[0])


def kd_step(way, width, device):
    args, data = make_args(way, width), make_data(device)
    model, optimizer = make_network(way, args, device, prunings=2)
    sub = args.batch_size // 4
    task = make_task(args, data, sub)

    def batch_of(images_and_more, size, first=0):
        images, *more = (each[first : first + size] for each in images_and_more)
        x = dataset.normalize(images, data)
        return x.contiguous() if way == "published" else x, *more

    batch = trainer.Batch(
        random=batch_of(task.random, sub),
        new=batch_of(task.random, sub // T),
        old=batch_of(task.random, sub * (T - 1) // T, first=task.new),
        unlabeled=batch_of(task.unlabeled, sub),
    )
    if way == "published":
        return lambda: published.kd_step(model, optimizer, T, sub, *batch)
    return lambda: descend(optimizer, trainer.kd_loss(model, T, sub, batch)[0])


def query(way, width, device):
    """1,000 exemplars take 50 pool images each."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1000 + POOL, 8 * width, generator=generator).to(device)
    run = published.query if way == "published" else teaching.query
    return lambda: run(features[:1000], features[1000:], 50)


def prune(way, width, device):
    """A pruning of a pruned network, as nearly all are."""
    model, _ = make_network(way, make_args(way, width), device, prunings=1)
    if way == "published":
        return lambda: published.prune(model, 0.2)
    return lambda: prune_once(model)


# name: (function, width, ways, times in a turn)
ROWS = {
    "task1_step": (task1_step, 64, WAYS, 3),
    "kd_step": (kd_step, 64, WAYS, 5),
    "kd_step_width16": (kd_step, 16, WAYS, 20),
    "query": (query, 64, WAYS[:2], 1),
    "prune": (prune, 64, WAYS[:2], 1),
}


# ------------------------------------------------------------------------------ taking turns


def seconds_of(work, device, times):
    """Mean seconds of work(), done so many times, including what it starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / times


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def product_rate(way, device):
    """FLOP a second in the product of two matrices, 2048 x 2048; the fastest of five."""
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    a = torch.randn(2048, 2048, device=device).to(dtype)
    return 2 * 2048**3 / min(seconds_of(lambda: a @ a, device, 3) for _ in range(5))


def measure(name, device, repeats):
    """A row: name, width, seconds {way: median}, ratio {way: times as fast as published}, and of a
    step share {way: of the rate of matrix products, in percent}.
    """
    make, width, ways, times = ROWS[name]
    if device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        ways = WAYS[:2]  # emulated, a step in bf16 takes minutes
    torch.manual_seed(0)
    works = {way: make(way, width, device) for way in ways}
    turns = {way: [] for way in ways}
    for _ in range(repeats):
        for way, work in works.items():
            if times > 1:
                work()  # the first step after another way's turn is slow
            turns[way].append(seconds_of(work, device, times))
    seconds = {way: statistics.median(each) for way, each in turns.items()}
    row = {"name": name, "width": width, "seconds": seconds, "share": {}}
    row["ratio"] = {way: seconds["published"] / seconds[way] for way in ways[1:]}
    if "step" in name:
        with FlopCounterMode(display=False) as counter:
            works["fp32"]()
        rates = {way: product_rate(way, device) for way in ways[1:]}
        flop = counter.get_total_flops()
        row["share"] = {way: 100 * flop / seconds[way] / rate for way, rate in rates.items()}
    return row


HEAD = """\
| row | width | published | ours, fp32 | ours, bf16 | ratio fp32 | bf16 | share % fp32 | bf16 |
|---|---|---|---|---|---|---|---|---|"""


def line(row):
    """A row as a line of a Markdown table."""
    ours = WAYS[1:]
    columns = ("seconds", WAYS, "{:.4g} s"), ("ratio", ours, "{:.2f}"), ("share", ours, "{:.0f}")
    cells = [
        text.format(row[key][way]) if way in row[key] else ""
        for key, ways, text in columns
        for way in ways
    ]
    return f"| {' | '.join([row['name'], str(row['width']), *cells])} |"


def main(argv=None):
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=", ".join(ROWS))
    flag("--device", help="as in the scripts")
    flag("--repeats", type=int_range(1), default=3, metavar="N", help="turns (default %(default)s)")
    flag("--out", type=path, metavar="FILE", help="write the times as JSON")
    parser.set_defaults(gpu=None, deterministic=False)
    args = parser.parse_args(argv)
    device = pick_device(args)
    results = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in results.items()))
    print(HEAD)
    results["rows"] = []
    for name in args.rows:
        results["rows"].append(measure(name, device, args.repeats))
        print(line(results["rows"][-1]), flush=True)
    if args.out:
        save_text(args.out, json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    run_script(main)
