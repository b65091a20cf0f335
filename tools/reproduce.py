"""Run all experiments behind docs/evidence.md; the same command resumes them.

    python -m tools.reproduce                    CIFAR-10 made small: a CPU, about two hours
    python -m tools.reproduce --size medium      all of CIFAR-10, a narrow network, few epochs
    python -m tools.reproduce --size full        the published protocol, for a GPU
    python -m tools.reproduce --size rehearsal   the same runs on the embedded digits, in minutes

For each of three seeds, by priority: the top-down tickets and the dense network; the bottom-up
tickets, those of tasks 3 and 5 retrained (task-rewound), and their controls; the dense network
without lottery teaching; last, bottom-up tickets selected on test images. All sizes but small also
prune top-down at random and train the joint upper bound. Each run has a log in DIR/logs. At the end
the records are copied to DIR/results and compared there (tools/report.py).

On a cluster, prepare the dataset once (--prepare) and run the plan chain by chain; a chain is a run
that needs no other and those that need it (slurm/reproduce.sbatch).
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from runtime.args import CONTROLS, DEFAULT, Parser, int_list, int_range, path
from runtime.errors import UserError
from runtime.files import save_text
from runtime.process import STOPPING, Interrupted, run_script
from runtime.threads import allowed_cores, quota_cores
from tools import report

ROOT = Path(__file__).parent.parent
# {exit status: signal} of a run that was stopped; negative where it had not come to run_script()
SIGNALS = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
STOPPED = {status: signum for signum in SIGNALS for status in (128 + signum, -signum)}
POLL_SECONDS = 0.2
WRITES_SECONDS = 900  # a run at work writes more often: metrics.csv has a line for each epoch

# ------------------------------------------------------------------------------ the plan


class Size(NamedTuple):
    data: str | None = ""  # flags of dataset.py; None: the embedded digits, not to be prepared
    train: str = ""  # flags of every run
    prune: str = ""  # of main_TD and main_BU
    bottom_up: str = ""  # of main_BU


# One pruning of 36 % replaces two of 20 %, and --base_sparsity keeps task 1's ticket at or below
# 2.81 % = 0.8^16, as in the paper's Figure 4.
BOTTOM_UP = "--percent 0.36 --max_iter_prun 13 --base_sparsity 97.5"
SIZES = {
    # Batches are as large as published: with smaller ones BatchNorm saw only a few new images
    # together, and the newest classes were hardly ever predicted correctly.
    "small": Size(
        data="--per_class 600",
        train="--device cpu --width 16 --epochs 7 --decreasing_lr 4,6 --lr 0.05 --batch_size 256",
        prune="--iter_epochs 1",
        bottom_up=BOTTOM_UP,
    ),
    "medium": Size(
        train="--arch resnet18 --width 16 --epochs 10 --decreasing_lr 6,8 --lr 0.02",
        prune="--iter_epochs 2",
        bottom_up=BOTTOM_UP,
    ),
    "full": Size(),
    "rehearsal": Size(
        data=None,
        train="--dataset digits --device cpu --width 2 --epochs 1 --lr 0.05 --batch_size 64",
        prune="--iter_epochs 1",
        bottom_up="--percent 0.8 --max_iter_prun 3 --base_sparsity 95",
    ),
}
SCHEDULE = "--prune_scheduler 1,1,3,4,5"  # of the paper's Figure 4: 4.40 % remain
TICKETS = (3, 5)  # the tasks whose bottom-up tickets are retrained
# What a run takes, very roughly, in dense runs; for the time left
COST = {"main_CIL.py": 1, "main_TD.py": 1.4, "main_BU.py": 2.5, "main_train.py": 0.15}


class Job(NamedTuple):
    chain: int
    name: str  # seed0/BU_retrain_task3, also of its log
    command: list  # the script and its arguments
    journal: Path  # the run.json that it writes
    needs: str = ""  # name of the Job, of the same chain, that must have finished before


def plan(args):
    """All Jobs by priority. A Job comes after the one that it needs."""
    size, jobs, chains = SIZES[args.size], [], {}
    shared = [*args.flags, *["--data", args.data] * bool(args.data), *size.train.split()]

    def add(script, seed, folder, flags="", files=(), stage=""):
        """stage: of main_train, which works in the folder of the run that it needs."""
        name, out = f"seed{seed}/{folder}", args.out / f"seed{seed}" / folder
        command = [script, *shared, "--seed", str(seed), "--save_dir", str(out)]
        command += [*flags.split(), *files]
        number = chains.setdefault(name, len(chains))
        whole, prefix = (f"{name}_{stage}", f"{stage}_") if stage else (name, "")
        journal = out / f"{prefix}run.json"
        jobs.append(Job(number, whole, command, journal, name if stage else ""))

    def retrain(seed, folder, controls):
        """The tickets of a run of main_BU, or controls of them."""
        out = args.out / f"seed{seed}" / folder
        for t in TICKETS:
            files = ["--weight", f"{out}/task{t - 1}_best_model.pt", "--mask", f"{out}/mask-{t}.pt"]
            for control in controls:
                stage = f"retrain_task{t}" + f"_{control}" * (control != "none")
                flags = f"--state {t} --control {control}"
                add("main_train.py", seed, folder, flags, files, stage)

    more = args.size != "small"
    top_down, bottom_up = f"{size.prune} {SCHEDULE}", f"{size.prune} {size.bottom_up}"
    for seed in args.seeds:
        add("main_TD.py", seed, "TD", top_down)
        add("main_CIL.py", seed, "CIL")
        add("main_BU.py", seed, "BU", f"{bottom_up} --select_on val")
        retrain(seed, "BU", ["none"])
        if more:
            add("main_TD.py", seed, "TD_random", f"{top_down} --criterion random")
        retrain(seed, "BU", [name for name in CONTROLS if name != "none"])
        add("main_CIL.py", seed, "CIL_no_teaching", "--no_teaching")
        if more:
            add("main_CIL.py", seed, "CIL_joint", "--joint")
    for seed in args.seeds:
        add("main_BU.py", seed, "BU_on_test", f"{bottom_up} --select_on test")
        retrain(seed, "BU_on_test", ["none"])
    return jobs


def python(command):
    """The command line of a top-level script, callable from any folder."""
    return [sys.executable, str(ROOT / command[0]), *command[1:]]


def listing(jobs):
    """A line for each Job: chain, name, need ('-': none) and command, with tabs between."""
    rows = [(str(j.chain), j.name, j.needs or "-", shlex.join(python(j.command))) for j in jobs]
    return "\n".join(map("\t".join, rows))


# ------------------------------------------------------------------------------ the command line


def parse(argv):
    parser = Parser(__doc__, "python -m tools.reproduce")
    flag = parser.add_argument
    flag("--size", choices=SIZES, default="small", help=f"see above {DEFAULT}")
    flag("--seeds", type=int_list, default=[0, 1, 2], metavar="S,S", help="default 0,1,2")
    message = "folder of all runs (default reproduce, reproduce_medium and so on)"
    flag("--out", type=path, metavar="DIR", help=message)
    flag("--data", type=path, metavar="DIR", help="dataset (default DIR/data, prepared if missing)")
    message = "more flags of every run, such as --flags='--precision bf16'"
    flag("--flags", type=shlex.split, default=[], metavar="FLAGS", help=message)
    message = "parallel runs (default: one per core for small and rehearsal; for --chain 1)"
    flag("--jobs", type=int_range(1, 64), metavar="N", help=message)
    flag = parser.add_argument_group("instead of running all").add_mutually_exclusive_group()
    flag = flag.add_argument
    flag("--prepare", action="store_true", help="prepare the dataset")
    flag("--chain", type=int_range(0), metavar="I", help="run chain I, on the prepared dataset")
    flag("--list", action="store_true", help="print chain, name, need and command of each run")
    flag("--status", action="store_true", help="print how far each run is, and the time left")
    flag("--report", action="store_true", help="copy and compare the records so far")
    args = parser.parse_args(argv)
    embedded = SIZES[args.size].data is None
    if embedded and args.data:
        raise UserError("--data: a rehearsal uses the embedded digits; remove --data")
    args.seeds = [*dict.fromkeys(args.seeds)]
    if not args.seeds:
        raise UserError("--seeds: expected at least one seed")
    args.out = Path(args.out or ("reproduce" if args.size == "small" else f"reproduce_{args.size}"))
    args.data = None if embedded else args.data or str(args.out / "data")
    several = args.chain is None and "--device cpu" in SIZES[args.size].train
    args.jobs = args.jobs or (cores() if several else 1)
    planned = {word for job in plan(args) for word in job.command[1 + len(args.flags) :]}
    for name in [word.partition("=")[0] for word in args.flags]:
        if name.startswith("--") and name in planned:
            raise UserError(f"--flags: {name} is set by the plan (see --list); remove {name}")
    return args


def cores():
    """Number of cores that this process may keep busy."""
    return min(allowed_cores(), quota_cores())


# ------------------------------------------------------------------------------ running


def prepare_data(args):
    """Prepare the dataset with dataset.py, or have it check the one that is there."""
    command = ["dataset.py", "--data", args.data, *SIZES[args.size].data.split()]
    if subprocess.call(python(command)):
        raise UserError(f"--data {args.data}: cannot be used, see above")


def read_journal(job):
    """What the run.json of a Job holds, and whether that says that this very command is done."""
    try:
        journal = json.loads(job.journal.read_text()) if job.journal.exists() else {}
    except ValueError:
        journal = {}  # a damaged one, which the run itself reports
    return journal, "finished" in journal and journal["command"] == job.command[1:]


def log_path(args, job):
    return args.out / "logs" / (job.name.replace("/", "_") + ".txt")


def run_all(jobs, args):
    """Run the unfinished Jobs, --jobs in parallel, each as soon as the one it needs has finished.

    When one fails or a signal arrives, the others are stopped. Raises UserError, Interrupted.
    """
    waiting, running = [job for job in jobs if not read_journal(job)[1]], []
    if not waiting:
        print("nothing left to run", flush=True)
    try:
        while waiting or running:
            pending = {job.name for job in waiting} | {job.name for job, _ in running}
            ready = [job for job in waiting if job.needs not in pending]
            for job in ready[: args.jobs - len(running)]:
                running.append((job, start(job, args)))
                waiting.remove(job)
            time.sleep(POLL_SECONDS)
            for job, process in [each for each in running if each[1].poll() is not None]:
                check_end(job, process.returncode, args)
                running.remove((job, process))
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()


def start(job, args):
    """Start a Job, with its output in its log. Returns the process."""
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // args.jobs))} | os.environ
    print(f"{job.name}: started", flush=True)
    with open(log_path(args, job), "a") as log:
        return subprocess.Popen(python(job.command), stdout=log, stderr=log, env=environment)


def check_end(job, status, args):
    """Raise UserError if a run has failed, Interrupted if a signal has stopped it."""
    if status in STOPPED:
        raise Interrupted(STOPPED[status])
    if status:
        log = log_path(args, job)
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"{log}: ends with status {status}: {last}")
    print(f"{job.name}: done", flush=True)


def compare_records(args):
    """Copy the records of all runs with a result to DIR/results, and compare them there."""
    found = [f for seed in args.seeds for f in args.out.glob(f"seed{seed}/*/*results.json")]
    if not found:
        raise UserError(f"--out {args.out}: contains no results yet; run the plan first")
    copies = []
    for folder in sorted({each.parent for each in found}):
        copy = args.out / "results" / folder.relative_to(args.out)
        copy.mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "metrics.csv", "confusion.csv"):
            for record in folder.glob(f"*{name}"):
                shutil.copyfile(record, copy / record.name)
        copies.append(str(copy))
    report.main([*copies, "--out", str(args.out / "results")])


# ------------------------------------------------------------------------------ --status


def state_of(job, done):
    """One of: done, running (on whatever machine), stopped, not started."""
    if done:
        return "done"
    metrics = job.journal.with_name(job.journal.name.replace("run.json", "metrics.csv"))
    written = [file.stat().st_mtime for file in (job.journal, metrics) if file.exists()]
    if not written:
        return "not started"
    return "running" if time.time() - max(written) < WRITES_SECONDS else "stopped"


def show_status(jobs, args):
    """Print a line for each run, and an estimate of the time left. Changes nothing."""
    if not args.out.is_dir():
        raise UserError(f"--out {args.out}: no such folder, so nothing has run there yet")
    row = "{:>5}  {:34}  {:11}  {:>8}  {}"
    print(row.format("chain", "run", "state", "spent", "last stage"))
    spent, cost, left = 0, 0, 0  # cost: of what is done, as in COST; left: of the rest
    for job in jobs:
        journal, done = read_journal(job)
        last, seconds = ["", *journal.get("stages", [])][-1], journal.get("seconds", 0)
        state = state_of(job, done)
        print(row.format(job.chain, job.name, state, duration(seconds), last).rstrip())
        if done:
            spent, cost = spent + seconds, cost + COST[job.command[0]]
        else:
            left += COST[job.command[0]]
    estimate = duration(spent / cost * left) if cost else "unknown until a run is done"
    print(f"time left, one run after the other: {estimate}")


def duration(seconds):
    return str(timedelta(seconds=round(seconds)))


# ------------------------------------------------------------------------------ all of it


def main(argv=None):
    args = parse(argv)
    jobs = plan(args)
    if args.list:
        print(listing(jobs))
    elif args.status:
        show_status(jobs, args)
    elif args.report:
        compare_records(args)
    else:
        run_plan(jobs, args)


def run_plan(jobs, args):
    """The dataset, the runs and their comparison; of --prepare and --chain a part of it."""
    last = max(job.chain for job in jobs)
    if args.chain is not None:
        if args.chain > last:
            raise UserError(f"--chain {args.chain}: expected 0 to {last} with these flags")
        if args.data and not os.path.exists(args.data):
            raise UserError(f"--data {args.data}: no such folder; run --prepare, flags as here")
    save_text(args.out / "logs" / "plan.txt", listing(jobs) + "\n")
    if args.data:
        prepare_data(args)
    if args.prepare:
        print(f"prepared; --chain takes 0 to {last}")
        return
    run_all([job for job in jobs if args.chain in (None, job.chain)], args)
    if args.chain is None:
        compare_records(args)


if __name__ == "__main__":
    run_script(main)
