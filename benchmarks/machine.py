"""Rows of bench.py that depend on the machine around a run: other processes, start, memory.

busy    images/s of KD steps (batch size 64), alone, beside as many pure-Python loops as cores, and
        beside a second such run; with OpenMP's waiting as PyTorch sets it, and as we do
start   seconds and peak resident MB of a bare `import torch`, of `main_TD.py --help`, and of a
        wrong flag
memory  peak resident GiB of a whole main_TD.py on a set as large as CIFAR-10, with one step in each
        epoch, beside that of task 1 alone the published way
"""

import contextlib
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import bench
import torch

import dataset
import main_TD
import teaching
import trainer
from runtime import threads
from runtime.process import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
SPAWN = multiprocessing.get_context("spawn")
LOOP = "while True: pass"
# A setting of the user's turns ours off; this one is the default of Intel's and LLVM's OpenMP.
POLICIES = {"as PyTorch sets it": {"KMP_BLOCKTIME": "200"}, "ours": {}}
SECONDS = 8  # of a measurement of `busy`, and of what passes before it
BATCH_SIZE = 64


@contextlib.contextmanager
def environment(settings):
    """os.environ for the processes started here: without our own settings, with these."""
    kept = {key: value for key, value in os.environ.items() if key not in threads.WAITING}
    with mock.patch.dict(os.environ, kept | settings, clear=True):
        yield


@contextlib.contextmanager
def serving(work, width):
    """The pipe of a process that runs work(pipe, width); it is ended afterwards."""
    pipe, end = SPAWN.Pipe()
    process = SPAWN.Process(target=work, args=(end, width))
    process.start()
    end.close()
    try:
        yield pipe
    finally:
        process.kill()
        process.join()


# ------------------------------------------------------------------------------ busy


def train_steps(pipe, width):
    """Train in a process of its own. For each number of seconds received, send images/s of them."""
    keep_freed_memory()
    threads.start_yielding()
    device, t = torch.device("cpu"), 3
    args = bench.make_args("ours_fp32", width)
    args.batch_size, sub = BATCH_SIZE, BATCH_SIZE // 4
    data = bench.make_data(device, per_class=100)
    model, optimizer = bench.make_network("ours_fp32", args, device, masked=True)
    task = trainer.make_task(data, t, bench.make_unlabeled(sub, t, device))

    def steps():
        """The images so far, after each step."""
        before = 0
        for epoch in itertools.count(1):
            progress = trainer.Progress(epoch=epoch, images=before)
            for _ in trainer.train_epoch(model, optimizer, task, args, "task3", progress):
                before = progress.images
                yield before

    images = steps()
    next(images)
    pipe.send("ready")
    while seconds := pipe.recv():
        first, start = next(images), time.monotonic()
        while time.monotonic() - start < seconds:
            last = next(images)
        pipe.send((last - first) / (time.monotonic() - start))


@contextlib.contextmanager
def loops(width):
    """As many processes as cores, each of which keeps a core busy."""
    command = [sys.executable, "-c", LOOP]
    started = [subprocess.Popen(command) for _ in range(threads.usable_cores())]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


@contextlib.contextmanager
def second_run(width):
    """Another process that trains as the first does."""
    with serving(train_steps, width) as pipe:
        bench.answer(pipe)
        pipe.send(10**6)
        yield


BESIDE = {
    "alone": lambda width: contextlib.nullcontext(),
    "beside loops": loops,
    "beside a second run": second_run,
}


def images_per_second(pipe):
    """Of SECONDS, after a second in which the process notices what is beside it."""
    for seconds in (threads.CHECK_SECONDS * 2, SECONDS):
        pipe.send(seconds)
        found = bench.answer(pipe)
    return found


def busy(width, repeats, bar):
    """{condition: [(images/s,) of each repeat]}; they take turns."""
    found = {f"{policy}, {beside}": [] for policy in POLICIES for beside in BESIDE}
    for _, policy in itertools.product(range(repeats), POLICIES):
        with environment(POLICIES[policy]), serving(train_steps, width) as pipe:
            bench.answer(pipe)  # it is ready
            for beside, company in BESIDE.items():
                bar.set_postfix_str(f"busy, {policy}, {beside}")
                with company(width):
                    found[f"{policy}, {beside}"].append((images_per_second(pipe),))
                bar.update()
    return found


# ------------------------------------------------------------------------------ start


STARTS = {
    "import torch": ["-c", "import torch"],
    "main_TD.py --help": ["main_TD.py", "--help"],
    "main_TD.py --no_such_flag": ["main_TD.py", "--no_such_flag"],
}


# Linux counts the memory of the starting process as that of the started one: a small one starts it.
LAUNCH = """
import os, subprocess, sys, time
start, null = time.monotonic(), subprocess.DEVNULL
process = subprocess.Popen(sys.argv[1:], stdout=null, stderr=null)
*_, usage = os.wait4(process.pid, 0)
print(time.monotonic() - start, usage.ru_maxrss)
"""


def run_once(command):
    """Seconds and peak resident MB of a process of Python."""
    launch = [sys.executable, "-c", LAUNCH, sys.executable, *command]
    seconds, peak = subprocess.check_output(launch, cwd=ROOT).split()
    return float(seconds), float(peak) * bench.RSS_UNIT / 1e6


def start(width, repeats, bar):
    """{command: [(seconds, MB) of each repeat]}, after one in which files are read from disk."""
    found = {name: [] for name in STARTS}
    for command in STARTS.values():
        run_once(command)
    for _, name in itertools.product(range(repeats), STARTS):
        bar.set_postfix_str(f"start, {name}")
        found[name].append(run_once(STARTS[name]))
        bar.update()
    return found


# ------------------------------------------------------------------------------ memory


def first_features(model, images, data, batch_size, desc=None):
    """Features of the first batch, and zeros for all other images."""
    features = extract_features(model, images[:batch_size], data, batch_size)
    others = len(images) - len(features)
    return torch.cat([features, features.new_zeros(others, features.shape[1])])


def one_step(*arguments):
    """The first batch of an epoch."""
    return itertools.islice(batches(*arguments), 1)


extract_features, batches = trainer.extract_features, trainer.batches


def top_down(pipe, width):
    """main_TD.py on random pixels, with a step in each epoch and one pruning for each task."""
    data = bench.make_data(torch.device("cpu"))
    data.test = data.val
    for module, name, function in (
        (dataset, "load", lambda *_: data),
        (trainer, "batches", one_step),
        (trainer, "extract_features", first_features),
        (teaching, "extract_features", first_features),
    ):
        setattr(module, name, function)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as sys.stdout:
        flags = f"--device cpu --width {width} --epochs 1 --iter_epochs 1 --save_dir {folder}"
        main_TD.main([*flags.split(), "--prune_scheduler", "1,1,1,1,1"])
    pipe.send(bench.peak_gib(torch.device("cpu")))


def published_epoch(pipe, width):
    """The first steps of task 1 the published way."""
    bench.task1_epoch("published", width, torch.device("cpu"))()
    pipe.send(bench.peak_gib(torch.device("cpu")))


PEAKS = {"task 1, published": published_epoch, "all of main_TD, ours": top_down}


def memory(width, repeats, bar):
    """{name: [(GiB,) of each repeat]}, without the workers that load data the published way."""
    found = {name: [] for name in PEAKS}
    for _, name in itertools.product(range(repeats), PEAKS):
        bar.set_postfix_str(f"memory, {name}")
        with environment({}), serving(PEAKS[name], width) as pipe:
            found[name].append((bench.answer(pipe),))
        bar.update()
    return found


ROWS = {row.__name__: row for row in (busy, start, memory)}
UNITS = {"busy": ["images/s"], "start": ["s", "MB"], "memory": ["GiB"]}
TURNS = {"busy": len(POLICIES) * len(BESIDE), "start": len(STARTS), "memory": len(PEAKS)}


def measure(name, width, repeats, bar):
    """The row `name`: its figures, and their medians with units as text."""
    found = ROWS[name](width, repeats, bar)
    medians = {
        label: ", ".join(
            f"{statistics.median(values):.3g} {unit}"
            for values, unit in zip(zip(*figures), UNITS[name])
        )
        for label, figures in found.items()
    }
    return {"name": name, "figures": found, "medians": medians}


def table(rows):
    """The rows as a Markdown table."""
    lines = ["| row | | median |", "|---|---|---|"]
    for row in rows:
        lines += [f"| {row['name']} | {label} | {text} |" for label, text in row["medians"].items()]
    return "\n".join(lines)
