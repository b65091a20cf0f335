"""Run all experiments behind docs/evidence.md; the same command resumes them.

    python -m tools.reproduce                    CIFAR-10 made small: a CPU, about two hours
    python -m tools.reproduce --size medium      all of CIFAR-10, a narrow network, few epochs
    python -m tools.reproduce --size full        the published protocol, for a GPU
    python -m tools.reproduce --seeds 0          one seed
    python -m tools.reproduce --status           what is done, at work, failed, and the time left

For each of three seeds, in order of worth: the top-down tickets and the dense network; the
bottom-up tickets, those of tasks 3 and 5 retrained (task-rewound), and their controls; the dense
network without lottery teaching; last, bottom-up tickets selected on test images. All sizes but
small also prune top-down at random and train the joint upper bound. Each run has a log in DIR/logs.
At the end the records are copied to DIR/results and compared there (tools/report.py).

Elsewhere than on this machine (docs/cluster.md), prepare the data and run the plan piece by piece:

    python -m tools.reproduce --prepare          the data alone; shows the number of chains
    python -m tools.reproduce --chain 0          a run that needs no other, and those that need it
    python -m tools.reproduce --list             chain, name, needs and command of each run
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import dataset
from datasets.prepare import ensure_prepared, holds_set
from runtime import cli
from runtime.epochs import epochs_path
from runtime.errors import UserError, first_line
from runtime.process import STOPPING, Interrupted, check_signals, hold_signals, run_script
from runtime.threads import usable_cores
from tools import report, status

ROOT = Path(__file__).parent.parent
POLL_SECONDS = 0.2


class Size(NamedTuple):
    about: str  # for --help
    out: str  # default of --out
    data: str | None = ""  # flags of dataset.py; None: an embedded set, which needs no preparation
    train: str = ""  # flags of every run
    prune: str = ""  # of main_TD and main_BU
    bottom_up: str = ""  # of main_BU
    more: bool = True  # also the control of TD and the upper bound
    jobs: int | None = 1  # default of --jobs; None: one a core


# One pruning of 36 % replaces two of 20 %, and --base_sparsity keeps task 1's ticket at or below
# 2.81 % = 0.8^16, as in the paper's Figure 4.
BOTTOM_UP = "--percent 0.36 --max_iter_prun 13 --base_sparsity 97.5"
SIZES = {
    # 540 training images a class, a narrow network, 7 epochs. Batches are as large as published:
    # in smaller ones BatchNorm normalizes only a few new images together, and the newest classes
    # were hardly ever classified correctly (docs/evidence-small.md).
    "small": Size(
        about="CIFAR-10, 600 images a class, width 16, 7 epochs",
        out="reproduce",
        data="--per_class 600",
        train="--device cpu --width 16 --epochs 7 --decreasing_lr 4,6 --lr 0.05 --batch_size 256",
        prune="--iter_epochs 1",
        bottom_up=BOTTOM_UP,
        more=False,
        jobs=None,
    ),
    # All images, so that 72 steps or more lie between two prunings; batch size, momentum and weight
    # decay are the published ones.
    "medium": Size(
        about="all of CIFAR-10, width 16, 10 epochs",
        out="reproduce_medium",
        train="--arch resnet18 --width 16 --epochs 10 --decreasing_lr 6,8 --lr 0.02",
        prune="--iter_epochs 2",
        bottom_up=BOTTOM_UP,
    ),
    "full": Size(about="the published protocol", out="reproduce_full"),
    "rehearsal": Size(
        about="the same runs on the embedded digits, to try a machine",
        out="reproduce_rehearsal",
        data=None,
        train="--dataset digits --device cpu --width 2 --epochs 1 --lr 0.05 --batch_size 64",
        prune="--iter_epochs 1",
        bottom_up="--percent 0.8 --max_iter_prun 3 --base_sparsity 95",
        jobs=None,
    ),
}
# of all sizes
SCHEDULE = "--prune_scheduler 1,1,3,4,5"  # of the paper's Figure 4: 4.40 % remain
TICKETS = (3, 5)  # the tasks whose bottom-up tickets are retrained


class Job(NamedTuple):
    name: str  # of its log
    command: list  # the script and its arguments
    journal: Path  # the run.json that it writes
    needs: tuple = ()  # names of the Jobs that must have finished before


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
    message = "more flags of every run, such as --flags='--precision bf16'"
    flag("--flags", type=cli.flag_text, metavar="FLAGS", help=message)


def fill_in(args, out):
    """Check the flags of add_protocol_flags() and fill in the defaults; out: that of --out."""
    embedded = SIZES[args.size].data is None
    for name in ("data", "raw", "unlabeled"):
        if embedded and getattr(args, name):
            raise UserError(f"--{name}: a rehearsal takes the embedded digits, leave it out")
    args.out = Path(args.out or out)
    args.data = None if embedded else args.data or str(args.out / "data")
    args.flags = args.flags or ""
    args.seeds = [*dict.fromkeys(args.seeds)]
    if not args.seeds:
        raise UserError("--seeds: the list is empty; give seeds such as 0,1,2")


def parse(argv):
    parser = cli.Parser(__doc__, "python -m tools.reproduce")
    flag = parser.add_argument
    sizes = "; ".join(f"{name}: {size.about}" for name, size in SIZES.items())
    flag("--size", choices=SIZES, default="small", help=f"{sizes} {cli.DEFAULT}")
    message = "the same as --size full"
    flag("--full", dest="size", action="store_const", const="full", help=message)
    add_protocol_flags(flag, "reproduce, reproduce_medium and so on")
    flag(
        "--jobs",
        type=cli.int_range(1, 64),
        metavar="N",
        help="parallel runs, which share the cores (default: one a core; medium and full: 1)",
    )
    flag = parser.add_argument_group("instead of running all").add_mutually_exclusive_group()
    flag = flag.add_argument
    flag("--prepare", action="store_true", help="prepare the data")
    flag("--chain", type=cli.int_range(0), metavar="I", help="run chain I, once data are prepared")
    message = "print a line for each run: chain, name, needs, command; separated by tabs"
    flag("--list", action="store_true", help=message)
    flag("--status", action="store_true", help="print how far each run is, and the time left")
    flag("--report", action="store_true", help="copy and compare the records so far")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    fill_in(args, size.out)
    default = min(usable_cores(), 64) if size.jobs is None else size.jobs
    if args.chain is not None and args.jobs:
        raise UserError("--chain --jobs: the runs of a chain follow one another; leave --jobs out")
    args.jobs = 1 if args.chain is not None else args.jobs or default
    return args


# ------------------------------------------------------------------------------ the plan


def plan(args):
    """All Jobs in order of worth. A Job comes after those that it needs."""
    size, out = SIZES[args.size], shlex.quote(str(args.out))
    data = f"--data {shlex.quote(args.data)}" if args.data else ""
    bottom_up = f"{size.prune} {size.bottom_up} --select_on"

    def job(script, seed, folder, flags="", step="", needs=()):
        folders = f"--seed {seed} --save_dir {out}/seed{seed}/{folder}"
        flags = f"{data} {size.train} {folders} {flags} {args.flags}"
        name = f"seed{seed}/{folder}"
        journal = args.out / name / (f"{step}_run.json" if step else "run.json")
        name += f"_{step}" * bool(step)
        return Job(name, shlex.split(f"{script}.py {flags}"), journal, needs)

    def retrainings(seed, folder, controls):
        """The tickets of a run of main_BU, retrained in its folder, or controls of them."""
        path = f"{out}/seed{seed}/{folder}"
        for t in TICKETS:
            ticket = f"--weight {path}/task{t - 1}_best_model.pt --mask {path}/mask-{t}.pt"
            for control in controls:
                flags = f"{ticket} --state {t} --control {control}"
                step = f"retrain_task{t}" + f"_{control}" * (control != "none")
                yield job("main_train", seed, folder, flags, step, (f"seed{seed}/{folder}",))

    jobs = []
    for seed in args.seeds:
        top_down = f"{size.prune} {SCHEDULE}"
        jobs += [job("main_TD", seed, "TD", top_down), job("main_CIL", seed, "CIL")]
        jobs += [job("main_BU", seed, "BU", f"{bottom_up} val"), *retrainings(seed, "BU", ["none"])]
        if size.more:
            jobs += [job("main_TD", seed, "TD_random", f"{top_down} --criterion random")]
        jobs += retrainings(seed, "BU", [name for name in cli.CONTROLS if name != "none"])
        jobs += [job("main_CIL", seed, "CIL_no_teaching", "--no_teaching")]
        if size.more:
            jobs += [job("main_CIL", seed, "CIL_joint", "--joint")]
    for seed in args.seeds:
        jobs += [job("main_BU", seed, "BU_on_test", f"{bottom_up} test")]
        jobs += retrainings(seed, "BU_on_test", ["none"])
    return jobs


def chains(jobs):
    """Jobs divided into lists: a Job that needs no other, then those that need it."""
    first, found = {}, {}
    for job in jobs:
        first[job.name] = first[job.needs[0]] if job.needs else job.name
        found.setdefault(first[job.name], []).append(job)
    return [*found.values()]


def chain_of(jobs, number):
    """The Jobs of --chain. Raises UserError."""
    found = chains(jobs)
    if number >= len(found):
        raise UserError(
            f"--chain {number}: these flags make {len(found)} chains, give 0 to {len(found) - 1}"
        )
    return found[number]


def chain_numbers(jobs):
    """{name of a Job: the number of its chain}."""
    return {job.name: i for i, chain in enumerate(chains(jobs)) for job in chain}


def listing(jobs):
    """A line for each Job: the number of its chain, name, needs ('-': none) and command.

    The fields are separated by tabs, the names of the needs by commas; a shell runs the command.
    """
    number, rows = chain_numbers(jobs), []
    for job in jobs:
        command = shlex.join(python(job.command))
        if "\n" in command:
            raise UserError(f"--list: found a line break in a name ({command!r}), rename the file")
        rows.append([str(number[job.name]), job.name, ",".join(job.needs) or "-", command])
    return ["\t".join(row) for row in rows]


def check_flags(args, jobs):
    """Raise UserError if a script does not take the --flags."""
    for job in {job.command[0]: job for job in jobs}.values() if args.flags else ():
        try:
            status.parsed(job)
        except UserError as error:
            raise UserError(f"--flags {args.flags!r}: {job.command[0]}: {error}") from None


def python(command):
    """The command line of a top-level script, callable from any folder."""
    return [sys.executable, str(ROOT / command[0]), *command[1:]]


# ------------------------------------------------------------------------------ the data


def data_command(args):
    """The command that prepares the protocol's data set, or checks the one that is there."""
    command = ["dataset.py", "--data", args.data, *SIZES[args.size].data.split()]
    command += ["--raw", args.raw] if args.raw else []
    return command + (["--unlabeled", *args.unlabeled] if args.unlabeled else [])


def prepare_data(args):
    """Run data_command(). Raises UserError."""
    if args.data and subprocess.call(python(data_command(args))):
        raise UserError(f"--data {args.data}: cannot be used, see above")


def check_data(args):
    """Raise UserError unless the data set is prepared as data_command() would. Writes nothing."""
    if args.data:
        wanted = dataset.parse(data_command(args)[1:])
        if not holds_set(wanted.dataset, Path(args.data)):
            raise UserError(
                f"--data {args.data}: holds no prepared data set; run python -m tools.reproduce "
                f"--prepare with the same flags first"
            )
        ensure_prepared(wanted, Path(args.data), wanted.per_class, wanted.seed)


# ------------------------------------------------------------------------------ running


def finished(job):
    """Whether the journal says that this very command has finished."""
    try:
        return status.is_done(job, status.read_journal(job.journal))
    except UserError:
        return False  # the run itself reports what is wrong


def log_path(args, name):
    return args.out / "logs" / (name.replace("/", "_") + ".txt")


def last_line(log, start=""):
    """The last line of a log that is not blank and starts with `start`; '' without one."""
    lines = log.read_text(errors="replace").split("\n")
    *_, last = ["", *(line for line in lines if line.strip() and line.startswith(start))]
    return last


class Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    start: float


def start_job(job, args):
    """Start a Job in the background, with its output in its log. Returns a Running."""
    threads = max(1, usable_cores() // args.jobs)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    print(f"{job.name}: started", flush=True)
    with open(log_path(args, job.name), "a") as file:
        process = subprocess.Popen(python(job.command), stdout=file, stderr=file, env=environment)
    return Running(job, process, time.monotonic())


def end_job(running, args):
    """Report a process that has ended. Raises UserError if it failed, Interrupted if stopped."""
    job, process, start = running
    log, code = log_path(args, job.name), process.returncode
    signum = -code if code < 0 else code - 128
    if signum in STOPPING:
        raise Interrupted(signum, f", {job.name} is saved")
    if code:
        last = last_line(log)
        status.note_failure(log, code)
        raise UserError(f"{log}: ends with status {code}: {last}")
    seconds = time.monotonic() - start
    print(f"{job.name}: {seconds:.0f} s, {last_line(log, 'state')}", flush=True)


def run_all(jobs, args):
    """Run the unfinished Jobs, --jobs in parallel, each as soon as what it needs has finished.

    When one fails or a signal arrives, stop the others. Raises UserError, Interrupted.
    """
    waiting = [job for job in jobs if not finished(job)]
    running = []
    if not waiting:
        print("nothing left to run", flush=True)
    with hold_signals():
        try:
            while waiting or running:
                pending = {job.name for job in waiting} | {each.job.name for each in running}
                ready = [job for job in waiting if not pending.intersection(job.needs)]
                for job in ready[: args.jobs - len(running)]:
                    running.append(start_job(job, args))
                    waiting.remove(job)
                time.sleep(POLL_SECONDS)
                check_signals()
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    end_job(each, args)
        finally:
            for each in running:
                each.process.terminate()  # it saves its progress
            for each in running:
                each.process.wait()


def copy_records(args):
    """Copy the records of all runs with a result to DIR/results.

    Returns the arguments with which tools.report compares them. Raises UserError.
    """
    folders = set()
    found = [path for seed in args.seeds for path in args.out.glob(f"seed{seed}/*/*results.json")]
    for path in found:
        try:
            if not json.loads(path.read_text())["states"]:
                continue
            copy = args.out / "results" / path.relative_to(args.out)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            if epochs_path(path).exists():
                shutil.copyfile(epochs_path(path), epochs_path(copy))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read or copied ({first_line(error)}); its command, shown by "
                f"--list, writes it again"
            ) from None
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
    jobs = plan(args)
    check_flags(args, jobs)
    if args.list:
        print(*listing(jobs), sep="\n")
    elif args.status:
        logs = [log_path(args, job.name) for job in jobs]
        status.show(jobs, args.out, logs, chain_numbers(jobs))
    elif args.report:
        *folders, _, _ = arguments = copy_records(args)
        if not folders:
            raise UserError(f"--out {args.out}: holds no results yet; run the plan first")
        report.main(arguments)
    elif args.chain is not None:
        chain = chain_of(jobs, args.chain)
        check_data(args)
        make_folders(args)
        run_all(chain, args)
    else:
        make_folders(args)
        prepare_data(args)
        if args.prepare:
            print(f"prepared; --chain takes 0 to {len(chains(jobs)) - 1}")
        else:
            run_all(jobs, args)
            report.main(copy_records(args))


if __name__ == "__main__":
    run_script(main)
