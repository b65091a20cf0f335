"""Compare the speed of the published computation with ours.

    python benchmarks/bench.py                       all rows; about half an hour on 2 cores
    python benchmarks/bench.py --rows kd_step,prune  some of them
    python benchmarks/bench.py --out bench.json      write the times as JSON too, after each row;
                                                     rows that are there are not measured again

Each row is measured in up to three ways: published, ours in fp32, and ours in bf16 where that makes
a difference. Each way has its own process; they take turns, and the result is the median. The
images are random pixels, on which the time does not depend. On a CPU only a few batches of an epoch
are run: an epoch's time is that of the first batch, with the start of the workers, plus that of
another one times their number. Ours includes runtime.process.keep_freed_memory, as in our scripts;
NOTES.md says what it gains by itself. machine.py has rows of its own: busy, start and memory.
"""

import functools
import itertools
import json
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime.threads  # isort: skip  # noqa: F401  (OpenMP reads its settings with torch)

import published
import torch
from tqdm import tqdm

import dataset
import pruning_utils
import teaching
import trainer
from datasets import DATASETS
from models import BACKBONES
from runtime import cli
from runtime.device import pick_device
from runtime.errors import UserError
from runtime.files import save_text
from runtime.process import keep_freed_memory, run_script
from runtime.run import device_name

WAYS = "published", "ours_fp32", "ours_bf16"
TASKS, CLASSES, TRAIN, VAL, POOL = 5, 2, 4500, 500, 50_000  # CIFAR-10


def make_args(way, width, tasks=TASKS):
    """The defaults of the scripts."""
    parser = cli.training_parser("", "", DATASETS, BACKBONES)
    args = parser.parse_args(["--width", str(width), "--classifiers", str(tasks)])
    args.classes_per_classifier = CLASSES
    args.precision = "bf16" if way == "ours_bf16" else "fp32"
    return args


def make_data(device, tasks=TASKS, per_class=TRAIN):
    """A set of random pixels, as large as CIFAR-10."""
    generator = torch.Generator().manual_seed(0)

    def part(n):
        shape = (n, 32, 32, 3)
        return {
            c: torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
            for c in range(tasks * CLASSES)
        }

    spec = DATASETS["cifar10"]
    train = part(per_class)
    return dataset.Data(
        source="random",
        classifiers=tasks,
        classes_per_classifier=CLASSES,
        order=list(range(tasks * CLASSES)),
        train=train,
        val=part(VAL),
        test={},
        exemplars={c: images[:100] for c, images in train.items()},
        pool=part(1)[0],
        mean=torch.tensor(spec.mean, device=device).view(3, 1, 1),
        std=torch.tensor(spec.std, device=device).view(3, 1, 1),
        pad=spec.pad,
    )


def make_network(way, args, device, masked):
    """The network and its optimizer, under a mask of 64 % (two prunings) or dense."""
    model = trainer.make_model(args, device).train()
    for _ in range(2 * masked):
        prune_once(model)
    optimizer = trainer.make_optimizer(model, args, args.lr)
    return published.plain(model) if way == "published" else model, optimizer


def prune_once(model):
    """A pruning of 20 % by magnitude."""
    scores = pruning_utils.magnitude(pruning_utils.weights(model), None)
    masks = pruning_utils.prune(scores, pruning_utils.masks_of(model), 0.2)
    pruning_utils.apply_mask(model, masks)


def make_unlabeled(n, t, device):
    """Queried images as we store them (uint8), with logits of the heads before t."""
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
    return images.permute(0, 2, 3, 1), *torch.randn(2, n, (t - 1) * CLASSES, device=device)


def timed(device, work):
    """The seconds that work() takes, including what it starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed_step(device, steps, step):
    """Mean seconds of `steps` steps without the first, which is slow after a wait."""
    step()
    return timed(device, lambda: [step() for _ in range(steps - 1)]) / (steps - 1)


def descend(optimizer, loss):
    """An optimizer step, as in trainer.train_epoch."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


# ------------------------------------------------------------------------------ the rows
#
# Each takes (way, width, device) and returns a function that does the work once and returns the
# seconds it took.


def task1_step(way, width, device):
    args, data = make_args(way, width), make_data(device, per_class=200)
    model, optimizer = make_network(way, args, device, masked=False)
    images, y = data.of_tasks(data.train, 1, 1)
    x, y = dataset.normalize(images[: args.batch_size], data), y[: args.batch_size]
    if way == "published":
        x = x.contiguous()
        return lambda: timed_step(device, 3, lambda: published.task1_step(model, optimizer, x, y))
    return lambda: timed_step(
        device, 3, lambda: descend(optimizer, trainer.task1_loss(model, x, y)[0])
    )


def kd_setting(way, width, device, t):
    """What a step of task t needs: network, optimizer, size of a random batch, sub-batches."""
    args = make_args(way, width, max(t, TASKS))
    data = make_data(device, max(t, TASKS), per_class=200)
    model, optimizer = make_network(way, args, device, masked=True)
    sub = trainer.random_batch_size(args, t)
    task = trainer.make_task(data, t, make_unlabeled(sub, t, device))
    parts = task.random, task.new, task.old, task.unlabeled
    sizes = sub, sub // t, sub * (t - 1) // t, sub
    batches = [
        (dataset.normalize(images[:size], data), *(other[:size] for other in others))
        for (images, *others), size in zip(parts, sizes)
    ]
    return model, optimizer, sub, batches


def kd_step(way, width, device, t=3):
    model, optimizer, sub, batches = kd_setting(way, width, device, t)
    if way == "published":
        batches = [[tensor.contiguous() for tensor in batch] for batch in batches]
        return lambda: timed_step(
            device, 6, lambda: published.kd_step(model, optimizer, t, sub, *batches)
        )
    return lambda: timed_step(
        device, 6, lambda: descend(optimizer, trainer.kd_loss(model, t, sub, batches)[0])
    )


def epoch_seconds(device, steps, number, batches):
    """The seconds of an epoch of `steps` steps, estimated from the first `number` of them.

    batches: an iterator that takes a step each time.
    """

    def some(n):
        for _ in itertools.islice(batches, n):
            pass

    first = timed(device, lambda: some(1))
    others = timed(device, lambda: some(number - 1))
    batches.close()
    return first + (steps - 1) * others / (number - 1)


def task1_epoch(way, width, device):
    args, data = make_args(way, width), make_data(device)
    model, optimizer = make_network(way, args, device, masked=False)
    task = trainer.make_task(data, 1, None)
    steps = trainer.batches_per_epoch(task, args)
    number = 3 if device.type == "cpu" else steps
    images = published.Images(*to_cpu(task.random), data, True) if way == "published" else None
    epoch = itertools.count(1)

    def work():
        if way == "published":
            batches = published.task1_epoch(model, optimizer, images, args.batch_size, device)
        else:
            progress = trainer.Progress(epoch=next(epoch))
            batches = trainer.train_epoch(model, optimizer, task, args, "task1", progress)
        return epoch_seconds(device, steps, number, batches)

    return work


def kd_epoch(way, width, device, t=3):
    args, data = make_args(way, width), make_data(device)
    model, optimizer = make_network(way, args, device, masked=True)
    sub = trainer.random_batch_size(args, t)
    queried = 50 * 100 * CLASSES * (t - 1)
    task = trainer.make_task(data, t, make_unlabeled(queried, t, device))
    steps = trainer.batches_per_epoch(task, args)
    number = 6 if device.type == "cpu" else steps
    if way == "published":
        random, new, old = (
            published.Images(*to_cpu(part), data, True)
            for part in (task.random, task.new, task.old)
        )
        images, *logits = task.unlabeled
        stored = torch.cat([dataset.normalize(x, data).cpu() for x in images.split(1000)])
        unlabeled = published.Queried(stored.contiguous(), *to_cpu(logits))
    epoch = itertools.count(1)

    def work():
        if way == "published":
            batches = published.kd_epoch(
                model, optimizer, t, sub, random, new, old, unlabeled, device
            )
        else:
            progress = trainer.Progress(epoch=next(epoch))
            batches = trainer.train_epoch(model, optimizer, task, args, f"task{t}", progress)
        return epoch_seconds(device, steps, number, batches)

    return work


def to_cpu(tensors):
    return [tensor.cpu() for tensor in tensors]


def query(way, width, device, exemplars=1000, pool=POOL, num=50):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(exemplars + pool, 8 * width, generator=generator).to(device)
    features = features[:exemplars], features[exemplars:]
    run = published.query if way == "published" else teaching.query
    return lambda: timed(device, lambda: run(*features, num))


def prune(way, width, device):
    args = make_args(way, width)

    def work():
        model, _ = make_network(way, args, device, masked=False)
        if way == "published":  # the second round: under a mask, as nearly all are
            published.prune(model, 0.2)
            return timed(device, lambda: published.prune(model, 0.2))
        prune_once(model)
        return timed(device, lambda: prune_once(model))

    return work


def validate(way, width, device, t=2):
    args, data = make_args(way, width), make_data(device, per_class=100)
    model, _ = make_network(way, args, device, masked=True)
    if way == "published":
        images = published.Images(*to_cpu(data.of_tasks(data.val, 1, t)), data, False)
        size = args.batch_size
        return lambda: timed(device, lambda: published.validate(model, images, t, size, device))
    task = trainer.make_task(data, t, None)
    return lambda: timed(device, lambda: trainer.validate(model, data.val, task, args))


ROWS = {
    row.__name__: row
    for row in (task1_step, kd_step, task1_epoch, kd_epoch, query, prune, validate)
}
# growth with the number of tasks: the last of T tasks, with two classes and 200 exemplars each
for tasks in (5, 10, 20):
    ROWS[f"kd_step_T{tasks}"] = functools.partial(kd_step, t=tasks)
for tasks in (5, 10, 20):
    ROWS[f"query_T{tasks}"] = functools.partial(query, exemplars=100 * CLASSES * (tasks - 1))
# the largest case; with 15 images for each exemplar, the pool does not run out
ROWS["query_large"] = functools.partial(query, exemplars=10_000, pool=150_000, num=15)


# ------------------------------------------------------------------------------ taking turns

RSS_UNIT = 1 if platform.system() == "Darwin" else 1024  # bytes, of getrusage's ru_maxrss


def peak_gib(device):
    """Peak memory so far, in GiB: of this process (without its data-loading children), or of
    tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**30


def serve(pipe, name, way, width, device):
    """One way of a row, in its own process: does the work each time that it is asked."""
    if way != "published":  # as our scripts do when they start
        keep_freed_memory()
    torch.manual_seed(0)
    work = ROWS[name](way, width, device)
    before = peak_gib(device)
    pipe.send("ready")
    while pipe.recv():
        pipe.send((work(), before, peak_gib(device)))


def ways_of(name):
    """The ways in which a row is measured."""
    if name in ("query", "prune"):  # --precision changes nothing here
        return WAYS[:2]
    return WAYS[1:2] if name.startswith("query_") else WAYS  # the published query takes minutes


def images_of(name):
    """Images of a step, or about those of an epoch; None for a row without training."""
    if not name.startswith(("task1_", "kd_")):
        return None
    t = 1 if name.startswith("task1_") else getattr(ROWS[name], "keywords", {}).get("t", 3)
    sub = trainer.random_batch_size(make_args("published", 1), t)
    random = TRAIN * CLASSES + 100 * CLASSES * (t - 1) if name.endswith("_epoch") else sub
    others = sub // t + sub * (t - 1) // t + sub if t > 1 else 0
    return random + -(-random // sub) * others


def answer(pipe):
    """What the process at the other end sends. Raises UserError when it has ended."""
    try:
        return pipe.recv()
    except EOFError:
        raise UserError("a process of the benchmark has ended, see above") from None


def measure(name, width, device, repeats, bar):
    """The row `name`: median seconds, ratios and peak memory of the ways."""
    spawn = multiprocessing.get_context("spawn")
    ways = ways_of(name)
    pipes, processes, figures = {}, [], {way: [] for way in ways}
    for way in ways:
        pipes[way], end = spawn.Pipe()
        process = spawn.Process(target=serve, args=(end, name, way, width, device))
        process.start()
        end.close()
        processes.append(process)
        answer(pipes[way])  # one at a time, since their threads would slow each other down
    for _ in range(repeats):
        for way in ways:
            bar.set_postfix_str(f"{name} {way}")
            pipes[way].send(True)
            figures[way].append(answer(pipes[way]))
            bar.update()
    for way in ways:
        pipes[way].send(False)
    for process in processes:
        process.join()
    row = {"name": name, "ways": ways, "images": images_of(name)}
    row |= {f"{way}_s": None for way in WAYS} | {"ratio_fp32": None, "ratio_bf16": None}
    for way in ways:
        seconds, before, peak = zip(*figures[way])
        row[f"{way}_s"] = statistics.median(seconds)
        row[f"{way}_all_s"] = seconds
        row[f"{way}_peak_gib"] = peak[-1]
        row[f"{way}_before_gib"] = before[0]
        if way != "published" and "published" in ways:
            row[f"ratio_{way[5:]}"] = row["published_s"] / row[f"{way}_s"]
    return row


def tables(rows):
    """The rows as Markdown: a table of those above, and one of those in machine.py."""
    import machine

    ours = [row for row in rows if row["name"] in machine.ROWS]
    others = [row for row in rows if row not in ours]
    found = [make(some) for make, some in ((table, others), (machine.table, ours)) if some]
    return "\n\n".join(found)


def table(rows):
    """The rows as a Markdown table.

    Of each way: images/s in training; memory in GiB, before the work and at its peak.
    """
    names = "row", *(way.replace("_", ", ") for way in WAYS), "ratio fp32", "ratio bf16"
    lines = [f"| {' | '.join(names)} | images/s | memory |", "|---" * 8 + "|"]
    for row in rows:
        cells = [seconds(row[f"{way}_s"]) for way in WAYS]
        cells += [f"{row[r]:.2f}" if row[r] else "" for r in ("ratio_fp32", "ratio_bf16")]
        speeds = (f"{row['images'] / row[f'{way}_s']:.0f}" for way in row["ways"])
        cells.append(", ".join(speeds) if row.get("images") else "")
        gib = (f"{row[f'{w}_before_gib']:.1f}-{row[f'{w}_peak_gib']:.1f}" for w in row["ways"])
        cells.append(", ".join(gib))
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds(s):
    return "" if s is None else f"{s:.1f} s" if s >= 10 else f"{s:.3f} s"


def earlier_rows(path, results):
    """{name: row} of those that the file `path` holds of this device, PyTorch and width."""
    try:
        found = json.loads(Path(path).read_text())
        same = all(found[key] == value for key, value in results.items())
        rows = {row["name"]: row for row in found["rows"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"--out {path}: is no results of this benchmark; name another") from None
    if not same:
        raise UserError(f"--out {path}: is of another device, PyTorch or width; name another file")
    return rows


def save_rows(path, results, rows):
    save_text(path, json.dumps(results | {"rows": [*rows.values()]}, indent=1) + "\n")


def make_parser(description, repeats):
    """A parser with the flags of all benchmarks; repeats: the default of --repeats."""
    parser = cli.Parser(description)
    flag = parser.add_argument
    flag("--device", default="auto", help="as in the scripts (default auto)")
    parser.set_defaults(gpu=None, deterministic=False)
    flag("--width", type=cli.int_range(1), default=64, metavar="N", help="default %(default)s")
    flag("--out", type=cli.path, metavar="FILE", help="write the results as JSON, and resume them")
    default = {"default": repeats, "help": "default %(default)s"}
    flag("--repeats", type=cli.int_range(1), metavar="N", **default)
    return parser


def main(argv=None):
    import machine  # which imports this module

    parser = make_parser(__doc__, repeats=3)
    rows = ",".join([*ROWS, *machine.ROWS])
    message = f"default: {rows} (the last three: CPU only)"
    parser.add_argument("--rows", metavar="A,B,..", help=message)
    args = parser.parse_args(argv)
    device = pick_device(args)
    known = [*ROWS, *machine.ROWS] if device.type == "cpu" else [*ROWS]
    names = args.rows.split(",") if args.rows else known
    for name in names:
        if name not in known:
            raise UserError(f"--rows {name}: unknown, give some of {', '.join(known)}")
    results = {
        "device": device_name(device),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "width": args.width,
    }
    cpu = f"{results['cpu']}, {results['threads']} CPU threads"
    print(f"{results['device']}, {cpu}, PyTorch {torch.__version__}", flush=True)
    rows = earlier_rows(args.out, results) if args.out else {}
    missing = [name for name in names if name not in rows]
    turns = sum(machine.TURNS.get(name) or len(ways_of(name)) for name in missing) * args.repeats
    with tqdm(total=turns, disable=None, leave=False) as bar:
        for name in missing:
            if name in machine.ROWS:
                rows[name] = machine.measure(name, args.width, args.repeats, bar)
            else:
                rows[name] = measure(name, args.width, device, args.repeats, bar)
            if bar.disable:
                print(tables([rows[name]]), flush=True)
            if args.out:
                save_rows(args.out, results, rows)
    print(tables([rows[name] for name in names]))


if __name__ == "__main__":
    run_script(main)
