"""As much as a limited time on a GPU allows, the most useful first; the same command resumes.

    python -m tools.gpu --minutes 30       on CUDA; all that it writes is in the folder gpu
    python -m tools.gpu --rehearsal        the same parts on a CPU: digits, tiny networks

First the tests that are marked for a device, the benchmark, and the profile of a training step.
Then the published protocol on CIFAR-10, seed after seed: the top-down tickets, the dense network,
the bottom-up tickets chosen on validation images, these retrained with their controls, and the rest
of tools/reproduce.py --size full. Last, a report on all runs (tools/report.py).

Each part runs in a process of its own, with a log in DIR/logs. A part that fails does not stop the
others. When the time is up, the current one is stopped and saves its progress. DIR/gpu.json says
what is done, and DIR/gpu.md shows it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench
import profile_step
import torch
from tqdm import tqdm

from runtime import cli
from runtime.device import pick_device
from runtime.errors import UserError, one_line
from runtime.files import save_text
from runtime.process import hold_signals, run_script
from runtime.run import device_name
from tools import reproduce

# Kept at the end, in seconds: for a part to save its progress, and for the report. Of a short time,
# a third.
STOPPING, REPORTING = 20, 25
# What the parts are given: pytest, bench.py and profile_step.py
DEFAULTS = {
    "device": "cuda",
    "tests": "-m device",
    "benchmark": "--rows task1_step,kd_step,task1_epoch,kd_epoch,query,prune,validate",
    "profile": "",
}
REHEARSAL = {
    "device": "cpu",
    "tests": "-m device tests/test_pruning.py",
    "benchmark": "--rows query_T5 --repeats 1 --width 2",
    "profile": "--ways eager,graph --repeats 1 --width 2",
}


class Part(NamedTuple):
    name: str  # of its log and in gpu.json
    command: list
    folder: Path = None  # where it runs, if not here
    job: reproduce.Job = None  # if it is a run of the protocol


def parse(argv):
    parser = cli.Parser(__doc__, "python -m tools.gpu")
    parser.set_defaults(gpu=None, deterministic=False)
    flag = parser.add_argument
    flag("--minutes", type=cli.positive, default=30, metavar="N", help="(default %(default)s)")
    flag("--device", metavar="DEVICE", help="as in the scripts (default cuda)")
    message = "a tiny setting on the embedded digits, by default on the CPU"
    flag("--rehearsal", action="store_true", help=message)
    reproduce.add_protocol_flags(flag, "gpu")
    for name in ("tests", "benchmark", "profile"):
        message = f"flags of the {name} (default '{DEFAULTS[name]}')"
        flag(f"--{name}", type=cli.flag_text, metavar="FLAGS", help=message)
    args = parser.parse_args(argv)
    args.size = "rehearsal" if args.rehearsal else "full"
    reproduce.fill_in(args, "gpu")
    given = REHEARSAL if args.rehearsal else DEFAULTS
    for name in ("device", "tests", "benchmark", "profile"):
        if getattr(args, name) is None:
            setattr(args, name, given[name])
    args.flags = f"--device {args.device} {args.flags}"
    return args


def find_machine(args):
    """What figures depend on, for the record. Raises UserError if there is no such device."""
    try:
        device = pick_device(args)
    except UserError as error:
        raise UserError(f"{error}; to rehearse on the CPU, give --rehearsal") from None
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


# ------------------------------------------------------------------------------ the parts


def plan(args):
    """All Parts but the report, in order."""
    tests = [sys.executable, "-m", "pytest", "-q", f"--device={args.device}"]
    parts = [Part("tests", [*tests, *shlex.split(args.tests)], reproduce.ROOT)]
    for name, script in (("benchmark", "bench"), ("profile", "profile_step")):
        command = [f"benchmarks/{script}.py", "--device", args.device]
        command += ["--out", str(rows_path(args, name)), *shlex.split(getattr(args, name))]
        parts.append(Part(name, reproduce.python(command)))
    if args.data:
        parts.append(Part("data", reproduce.python(reproduce.data_command(args))))
    jobs = reproduce.plan(args)
    return parts + [Part(job.name, reproduce.python(job.command), job=job) for job in jobs]


def rows_path(args, name):
    return args.out / f"{name}.json"


def is_done(part, record):
    """Whether this very command has ended well. A part that failed is tried again."""
    if part.job:
        return reproduce.finished(part.job)
    entry = record["parts"].get(part.name, {})
    return entry.get("status") == 0 and entry["command"] == part.command


def count_done(parts, record):
    return sum(is_done(part, record) for part in parts)


def run_part(part, args, seconds, grace):
    """Run a part for at most `seconds`, and `grace` to save its progress. Returns its entry."""
    log, start = reproduce.log_path(args, part.name), time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(reproduce.ROOT)}
    print(f"{part.name}: started, at most {seconds:.0f} s", flush=True)
    with open(log, "a") as file:
        process = subprocess.Popen(
            part.command,
            stdout=file,
            stderr=file,
            cwd=part.folder,
            env=environment,
            start_new_session=True,  # so that its own processes end with it
        )
        try:
            ended = wait(process, seconds, part.name, log)
        finally:
            end(process, grace)
    outcome = "done" if not process.returncode else f"failed with status {process.returncode}"
    spent = time.monotonic() - start
    last = reproduce.last_line(log, "state") or reproduce.last_line(log)
    print(f"{part.name}: {outcome if ended else 'stopped'}, {spent:.0f} s, {last}", flush=True)
    return {
        "command": part.command,
        "status": process.returncode,
        "outcome": outcome if ended else "stopped",
        "seconds": spent,
        "date": datetime.now().isoformat(" ", "seconds"),
        "log": str(log.relative_to(args.out)),
        "last_line": one_line(last, 120),
    }


def wait(process, seconds, name, log):
    """Wait for a process, at most `seconds`; a bar shows its log. Returns whether it has ended."""
    limit = time.monotonic() + seconds
    with tqdm(total=round(seconds), desc=name, unit="s", disable=None, leave=False) as bar:
        while (left := limit - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(left, 1))
                return True
            bar.set_postfix_str(reproduce.last_line(log)[:60], refresh=False)
            bar.update()
    return False


def end(process, grace):
    """End what is left of a process and of those that it started."""
    with hold_signals():
        for signum, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError, PermissionError):  # none is left
                os.killpg(process.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


# ------------------------------------------------------------------------------ the record


def read_record(args, machine):
    """What gpu.json holds: the machine, and {name: entry} of the parts. Raises UserError."""
    path = args.out / "gpu.json"
    if not path.exists():
        return {"machine": machine, "parts": {}}
    try:
        record = json.loads(path.read_text())
        found, _ = dict(record["machine"]), dict(record["parts"])
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path}: is damaged; remove it, or name another folder") from None
    if found != machine:
        raise UserError(
            f"--out {args.out}: holds what ran on {found['device']} with PyTorch "
            f"{found['torch']}; name another folder"
        )
    return record


def save_record(args, record, parts):
    save_text(args.out / "gpu.json", json.dumps(record, indent=1) + "\n")
    save_text(args.out / "gpu.md", page(args, record, parts))


def page(args, record, parts):
    """The record as Markdown."""
    machine, entries = record["machine"], record["parts"]
    lines = [f"# {machine['device']}, PyTorch {machine['torch']}, CUDA {machine['cuda']}", ""]
    lines += [f"{count_done(parts, record)} of {len(parts)} parts are done.", ""]
    lines += ["| part | outcome | seconds | ended | log | its last line |", "|---" * 6 + "|"]
    for name, entry in entries.items():
        log, last = entry["log"], entry["last_line"].replace("|", "\\|")
        cells = name, entry["outcome"], f"{entry['seconds']:.0f}", entry["date"]
        lines.append(f"| {' | '.join(cells)} | [{log}]({log}) | {last} |")
    for name, table in (("benchmark", bench.table), ("profile", profile_step.table)):
        path = rows_path(args, name)
        if path.exists():
            rows = json.loads(path.read_text())["rows"]
            lines += ["", f"## {name.capitalize()}", "", table(rows)]
    if (args.out / "results" / "report.md").exists():
        lines += ["", "## Runs", "", "[All tables](results/report.md)", ""]
        lines += ["![Accuracy after each task, and density](results/report.png)"]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------ all of it


def run_parts(parts, args, record, limit, grace):
    """Run what is not done yet, until the time `limit`; each part is recorded when it ends."""
    for part in parts:
        if is_done(part, record):
            continue
        left, earlier = limit - time.monotonic(), record["parts"].get(part.name)
        if left <= 0:
            return
        entry = run_part(part, args, left, grace)
        if earlier and earlier["outcome"] == "stopped":
            entry["seconds"] += earlier["seconds"]
        record["parts"][part.name] = entry
        save_record(args, record, parts)
        if part.name == "data" and entry["status"]:  # the rest needs it
            return


def main(argv=None):
    start = time.monotonic()
    args = parse(argv)
    machine = find_machine(args)
    reproduce.make_folders(args)
    record, parts = read_record(args, machine), plan(args)
    reproduce.check_flags(args, [part.job for part in parts if part.job])
    seconds = 60 * args.minutes
    kept = min(STOPPING + REPORTING, seconds / 3)
    grace = kept * STOPPING / (STOPPING + REPORTING)
    run_parts(parts, args, record, start + seconds - kept, grace)
    folders = reproduce.copy_records(args)
    if len(folders) > 2:  # not --out alone
        report = Part("report", [sys.executable, "-m", "tools.report", *folders])
        left = start + seconds - time.monotonic()
        record["parts"]["report"] = run_part(report, args, max(left - 1, 0), 1)
    save_record(args, record, parts)
    done = count_done(parts, record)
    resume = "" if done == len(parts) else "; the same command resumes"
    print(f"{args.out / 'gpu.md'}: {done} of {len(parts)} parts are done{resume}", flush=True)


if __name__ == "__main__":
    run_script(main)
