"""The runs behind the README's evidence, in one command; given again, it goes on.

    python reproduce.py                  the reduced protocol: CIFAR-10, a CPU, about two hours
    python reproduce.py --full           the published protocol, for a GPU
    python reproduce.py --seeds 0        one seed of it

Three seeds of: the dense network, the top-down and the bottom-up tickets, the bottom-up tickets of
tasks 3 and 5 trained anew (task-rewound) beside their controls; then tickets chosen on test images,
and the dense network without lottery teaching. Each run has a log; in the end report.py sets all
side by side, in DIR/results.
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import utils
from utils import Refusal

HERE = Path(__file__).parent

# What makes the reduced protocol small: 540 training images a class, a narrow network, 7 epochs.
# The batches stay as large as published: with smaller ones, of which BatchNorm sees but a few new
# images apart, the newest classes were hardly ever told right (README). In bottom-up pruning, one
# of 36 % stands for two of 20 %, and the least sparsity is such that task 1's ticket is of
# 2.81 % = 0.8^16 at most, as in the paper's Figure 4.
DATA = "--per_class 600"
TRAIN = "--device cpu --width 16 --epochs 7 --decreasing_lr 4,6 --lr 0.05 --batch_size 256"
PRUNE = "--iter_epochs 1"
BOTTOM_UP = "--percent 0.36 --max_iter_prun 13 --base_sparsity 97.5"
# of both protocols
SCHEDULE = "--prune_scheduler 1,1,3,4,5"  # of the paper's Figure 4: 4.40 % remain
TICKETS = (3, 5)  # the tasks whose bottom-up tickets are trained anew


def parse(argv):
    parser = utils.Parser(__doc__)
    flag = parser.add_argument
    flag("--full", action="store_true", help="the published settings, on whole CIFAR-10")
    flag("--seeds", type=utils.whole_list, default=[0, 1, 2], help="default 0,1,2")
    flag("--out", type=utils.place, metavar="DIR", help="default reproduce, or reproduce_full")
    flag("--data", type=utils.place, metavar="DIR", help="prepared set (default: made in DIR/data)")
    flag("--raw", type=utils.place, metavar="PATH", help="official files, as in dataset.py")
    words = "pool, as in dataset.py"
    flag("--unlabeled", nargs="+", type=utils.place, metavar="PATH", help=words)
    words = "runs at once, which share the cores (default: one a core; 1 with --full)"
    flag("--jobs", type=utils.whole(1, 64), metavar="N", help=words)
    args = parser.parse_args(argv)
    args.out = Path(args.out or ("reproduce_full" if args.full else "reproduce"))
    args.data = args.data or str(args.out / "data")
    args.seeds = [*dict.fromkeys(args.seeds)]
    if not args.seeds:
        raise Refusal("--seeds: found none, give some, as in 0,1,2")
    chains = 4 * len(args.seeds)  # see plan(): more than these cannot run at once
    args.jobs = args.jobs or (1 if args.full else min(utils.cores(), chains))
    return args


def plan(args):
    """Chains of (name, command): those of a chain in their order, the chains in any."""
    small = not args.full
    common, out = f"--data {shlex.quote(args.data)} {TRAIN * small}", shlex.quote(str(args.out))

    def run(script, seed, name, flags=""):
        flags = f"{common} --seed {seed} --save_dir {out}/seed{seed}/{name} {flags}"
        return f"seed{seed}/{name}", shlex.split(f"{script}.py {flags}")

    def tickets(seed, name, controls):
        """The tickets of a run of main_BU, trained anew in its folder, and their controls."""
        folder = f"{out}/seed{seed}/{name}"
        for t in TICKETS:
            ticket = f"--weight {folder}/task{t - 1}_best_model.pt --mask {folder}/mask-{t}.pt"
            for control in controls:
                flags = f"{ticket} --state {t} --control {control}"
                _, command = run("main_train", seed, name, flags)
                yield f"seed{seed}/{name}_task{t}_{control}", command

    prune, select = PRUNE * small, f"{PRUNE} {BOTTOM_UP}" * small + " --select_on "
    chains = []
    for seed in args.seeds:
        chosen = run("main_BU", seed, "BU", select + "val")
        chains.append([chosen, *tickets(seed, "BU", utils.CONTROLS)])
        top_down = run("main_TD", seed, "TD", f"{prune} {SCHEDULE}")
        chains.append([run("main_CIL", seed, "CIL"), top_down])
    for seed in args.seeds:
        chosen = run("main_BU", seed, "BU_on_test", select + "test")
        chains.append([chosen, *tickets(seed, "BU_on_test", ["none"])])
        chains.append([run("main_CIL", seed, "CIL_no_teaching", "--no_teaching")])
    return chains


def prepare(args):
    """Make the data set of the protocol, or see that what is there is the one asked for."""
    command = ["dataset.py", "--data", args.data, *(DATA * (not args.full)).split()]
    command += ["--raw", args.raw] if args.raw else []
    command += ["--unlabeled", *args.unlabeled] if args.unlabeled else []
    if subprocess.call(python(command)):
        raise Refusal(f"--data {args.data}: cannot be used, see above")


def python(command):
    """The command line of a script of this folder, called from anywhere."""
    return [sys.executable, str(HERE / command[0]), *command[1:]]


def go(chain, args, stop, running):
    """The runs of a chain that are not done yet, one after the other. Raises Refusal.

    stop: a threading.Event that ends it before the next run; running: a set of the processes.
    """
    cores = max(1, utils.cores() // args.jobs)
    environment = {"OMP_NUM_THREADS": str(cores)} | os.environ
    for name, command in chain:
        log = args.out / "logs" / (name.replace("/", "_") + ".txt")
        done, asked, began = log.with_suffix(".done"), " ".join(command), time.monotonic()
        there = Path(command[command.index("--save_dir") + 1]).exists()
        if stop.is_set() or there and done.exists() and done.read_text() == asked:
            continue
        print(f"{name}: begins", flush=True)
        with open(log, "a") as file:
            process = subprocess.Popen(python(command), stdout=file, stderr=file, env=environment)
            running.add(process)
            if stop.is_set():  # in this very moment
                process.terminate()
            status = process.wait()
            running.remove(process)
        lines = log.read_text(errors="replace").split("\n")
        if status:
            *_, last = ["", *filter(str.strip, lines)]
            raise Refusal(f"{log}: ends with status {status}: {last}")
        done.write_text(asked)  # half-written, it is not what is asked, and nothing is lost
        *_, state = ["", *(line for line in lines if line.startswith("state"))]
        print(f"{name}: {time.monotonic() - began:.0f} s, {state}", flush=True)


def collect(args):
    """Copy the records of all runs to DIR/results, and let report.py set them side by side."""
    folders = set()
    found = [path for seed in args.seeds for path in args.out.glob(f"seed{seed}/*/*results.json")]
    for path in sorted(found):
        copy = args.out / "results" / path.relative_to(args.out)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        folders.add(str(copy.parent))
    command = ["report.py", *sorted(folders), "--out", str(args.out / "results")]
    if status := subprocess.call(python(command)):
        sys.exit(status)


def main(argv=None):
    args = parse(argv)
    try:
        (args.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        words = f"cannot be written ({utils.first_line(error)}); name another folder"
        raise Refusal(f"--out {args.out}: {words}") from None
    prepare(args)
    chains = plan(args)
    stop, running = threading.Event(), set()
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            futures = [pool.submit(go, chain, args, stop, running) for chain in chains]
            for future in as_completed(futures):
                future.result()
        except BaseException:  # a run that failed, or a signal: the others store what they have
            stop.set()
            for process in list(running):
                process.terminate()
            raise
    collect(args)


if __name__ == "__main__":
    utils.run(main)
