"""Run all experiments behind docs/evidence.md; the same command resumes them.

    python -m tools.reproduce                the reduced protocol: CIFAR-10, a CPU, about two hours
    python -m tools.reproduce --full         the published protocol, for a GPU
    python -m tools.reproduce --seeds 0      one seed

For each of three seeds: the dense network, the top-down and the bottom-up tickets, and the
bottom-up tickets of tasks 3 and 5 retrained (task-rewound) with their controls; then tickets
selected on test images, and the dense network without lottery teaching. Each run has a log in
DIR/logs. At the end the records are copied to DIR/results and compared there (tools/report.py).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from runtime import cli
from runtime.epochs import epochs_path
from runtime.errors import UserError, first_line
from runtime.process import run_script
from runtime.threads import usable_cores
from tools import report

ROOT = Path(__file__).parent.parent

# What makes the reduced protocol small: 540 training images a class, a narrow network, 7 epochs.
# Batches are as large as published: in smaller ones BatchNorm normalizes only a few new images
# together, and the newest classes were hardly ever classified correctly (docs/evidence.md). In
# bottom-up pruning, one pruning of 36 % replaces two of 20 %, and --base_sparsity keeps task 1's
# ticket at or below 2.81 % = 0.8^16, as in the paper's Figure 4.
DATA = "--per_class 600"
TRAIN = "--device cpu --width 16 --epochs 7 --decreasing_lr 4,6 --lr 0.05 --batch_size 256"
PRUNE = "--iter_epochs 1"
BOTTOM_UP = "--percent 0.36 --max_iter_prun 13 --base_sparsity 97.5"
# of both protocols
SCHEDULE = "--prune_scheduler 1,1,3,4,5"  # of the paper's Figure 4: 4.40 % remain
TICKETS = (3, 5)  # the tasks whose bottom-up tickets are retrained


class Job(NamedTuple):
    name: str  # of its log
    command: list  # the script and its arguments
    journal: Path  # the run.json that it writes


def add_protocol_flags(flag, out):
    """Which runs, with which flags and data, and where; out: the default of --out, for the help.

    flag: the add_argument of a parser.
    """
    flag(
        "--seeds",
        type=cli.int_list,
        default=[0, 1, 2],
        metavar="S,S",
        help="seeds to run (default 0,1,2)",
    )
    flag(
        "--out",
        type=cli.path,
        metavar="DIR",
        help=f"folder of all runs (default {out})",
    )
    flag(
        "--data",
        type=cli.path,
        metavar="DIR",
        help="prepared data set (default DIR/data, prepared if it is not there)",
    )
    flag("--raw", type=cli.path, metavar="PATH", help="official files, as in dataset.py")
    flag("--unlabeled", nargs="+", type=cli.path, metavar="PATH", help="pool, as in dataset.py")
    message = "more flags of every run, such as '--precision bf16'"
    flag("--flags", type=cli.flag_text, metavar="FLAGS", help=message)


def fill_in(args, out):
    """Check the flags of add_protocol_flags() and fill in the defaults; out: that of --out."""
    args.out = Path(args.out or out)
    args.data = args.data or str(args.out / "data")
    args.flags = args.flags or ""
    args.seeds = [*dict.fromkeys(args.seeds)]
    if not args.seeds:
        raise UserError("--seeds: the list is empty; give seeds such as 0,1,2")


def parse(argv):
    parser = cli.Parser(__doc__, "python -m tools.reproduce")
    flag = parser.add_argument
    flag("--full", action="store_true", help="the published settings, on all of CIFAR-10")
    add_protocol_flags(flag, "reproduce, or reproduce_full")
    flag(
        "--jobs",
        type=cli.int_range(1, 64),
        metavar="N",
        help="parallel runs, which share the cores (default: one a core; 1 with --full)",
    )
    args = parser.parse_args(argv)
    fill_in(args, "reproduce_full" if args.full else "reproduce")
    chains = 4 * len(args.seeds)  # see plan(): no more than these can run in parallel
    args.jobs = args.jobs or (1 if args.full else min(usable_cores(), chains))
    return args


def plan(args):
    """Chains of Jobs: those of a chain run in order, the chains in any order.

    args.data: None for an embedded set, which --flags name.
    """
    reduced = not args.full
    data, out = args.data and f"--data {shlex.quote(args.data)}", shlex.quote(str(args.out))
    common = f"{data or ''} {TRAIN * reduced}"

    def job(script, seed, folder, flags="", step=""):
        folders = f"--seed {seed} --save_dir {out}/seed{seed}/{folder}"
        flags = f"{common} {folders} {flags} {args.flags}"
        name = f"seed{seed}/{folder}"
        journal = args.out / name / (f"{step}_run.json" if step else "run.json")
        return Job(f"{name}_{step}" if step else name, shlex.split(f"{script}.py {flags}"), journal)

    def retrainings(seed, folder, controls):
        """The tickets of a run of main_BU, retrained in its folder, and their controls."""
        path = f"{out}/seed{seed}/{folder}"
        for t in TICKETS:
            ticket = f"--weight {path}/task{t - 1}_best_model.pt --mask {path}/mask-{t}.pt"
            for control in controls:
                flags = f"{ticket} --state {t} --control {control}"
                step = f"retrain_task{t}" + f"_{control}" * (control != "none")
                yield job("main_train", seed, folder, flags, step)

    prune, select = PRUNE * reduced, f"{PRUNE} {BOTTOM_UP}" * reduced + " --select_on "
    chains = []
    for seed in args.seeds:
        bottom_up = job("main_BU", seed, "BU", select + "val")
        chains.append([bottom_up, *retrainings(seed, "BU", cli.CONTROLS)])
        top_down = job("main_TD", seed, "TD", f"{prune} {SCHEDULE}")
        chains.append([job("main_CIL", seed, "CIL"), top_down])
    for seed in args.seeds:
        bottom_up = job("main_BU", seed, "BU_on_test", select + "test")
        chains.append([bottom_up, *retrainings(seed, "BU_on_test", ["none"])])
        chains.append([job("main_CIL", seed, "CIL_no_teaching", "--no_teaching")])
    return chains


def data_command(args):
    """The command that prepares the protocol's data set, or checks the one that is there."""
    command = ["dataset.py", "--data", args.data, *(DATA * (not args.full)).split()]
    command += ["--raw", args.raw] if args.raw else []
    return command + (["--unlabeled", *args.unlabeled] if args.unlabeled else [])


def prepare_data(args):
    """Run data_command(). Raises UserError."""
    if subprocess.call(python(data_command(args))):
        raise UserError(f"--data {args.data}: cannot be used, see above")


def python(command):
    """The command line of a top-level script, callable from any folder."""
    return [sys.executable, str(ROOT / command[0]), *command[1:]]


def finished(job):
    """Whether the journal says that this very command has finished."""
    try:
        journal = json.loads(job.journal.read_text())
        return journal["finished"] is True and journal["command"] == job.command[1:]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False  # the run itself reports what is wrong


def log_path(args, name):
    return args.out / "logs" / (name.replace("/", "_") + ".txt")


def last_line(log, start=""):
    """The last line of a log that is not blank and starts with `start`; '' without one."""
    lines = log.read_text(errors="replace").split("\n")
    *_, last = ["", *(line for line in lines if line.strip() and line.startswith(start))]
    return last


def run_chain(chain, args, stop, running):
    """Run the unfinished Jobs of a chain in order. Raises UserError when one fails.

    stop: a threading.Event that ends the chain before its next run. running: the set of processes.
    """
    threads = max(1, usable_cores() // args.jobs)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    for job in chain:
        if stop.is_set() or finished(job):
            continue
        log = log_path(args, job.name)
        start = time.monotonic()
        print(f"{job.name}: started", flush=True)
        with open(log, "a") as file:
            process = subprocess.Popen(
                python(job.command), stdout=file, stderr=file, env=environment
            )
            running.add(process)
            if stop.is_set():  # set since the check above
                process.terminate()
            status = process.wait()
            running.remove(process)
        if status:
            raise UserError(f"{log}: ends with status {status}: {last_line(log)}")
        seconds = time.monotonic() - start
        print(f"{job.name}: {seconds:.0f} s, {last_line(log, 'state')}", flush=True)


def run_all(chains, args):
    """Run all chains, --jobs in parallel. When one fails or a signal arrives, stop the others."""
    stop, running = threading.Event(), set()
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            futures = [pool.submit(run_chain, chain, args, stop, running) for chain in chains]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            for process in list(running):
                process.terminate()  # it saves its progress
            raise


def copy_records(args):
    """Copy the records of all runs with a result to DIR/results.

    Returns the arguments with which tools.report compares them.
    """
    folders = set()
    found = [path for seed in args.seeds for path in args.out.glob(f"seed{seed}/*/*results.json")]
    for path in found:
        if json.loads(path.read_text())["states"]:
            copy = args.out / "results" / path.relative_to(args.out)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            if epochs_path(path).exists():
                shutil.copyfile(epochs_path(path), epochs_path(copy))
            folders.add(str(copy.parent))
    return [*sorted(folders), "--out", str(args.out / "results")]


def make_folders(args):
    """Make --out and its folder of logs. Raises UserError."""
    try:
        (args.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = first_line(error)
        raise UserError(
            f"--out {args.out}: cannot be written ({reason}); name another folder"
        ) from None


def main(argv=None):
    args = parse(argv)
    make_folders(args)
    prepare_data(args)
    run_all(plan(args), args)
    report.main(copy_records(args))


if __name__ == "__main__":
    run_script(main)
