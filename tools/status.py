"""How far the runs of tools/reproduce.py are, from what they leave in their folders."""

import importlib
import json
import os
import re
import socket
import time
from statistics import mean
from typing import NamedTuple

from runtime.epochs import read_epochs
from runtime.errors import UserError, one_line
from runtime.locks import read_owner

ENDED = "tools.reproduce: ended with status "  # the last line of the log of a run that has failed
WRITES_SECONDS = 900  # a run at work writes more often: each epoch, and --checkpoint_seconds (60)
# Of an epoch of a task after the first, in epochs of the first: each new image comes with one of a
# balanced batch and an unlabeled one.
LATER_TASK = 3


class Progress(NamedTuple):
    name: str
    state: str  # done, at work, failed, stopped, waiting, other flags: was done with others
    position: str  # last epoch, or last line of the log
    spent: float  # seconds
    done: float  # epochs, in epochs of task 1
    planned: float  # as done; of main_BU at most
    at_most: bool


def note_failure(log, code):
    """Record in a log that its process has failed."""
    with open(log, "a") as file:
        file.write(f"{ENDED}{code}\n")


def show(jobs, out, logs, chains):
    """Print the table. Raises UserError.

    out: the folder of all runs; logs: of each Job; chains: {name of a Job: number of its chain}.
    """
    if not out.is_dir():
        raise UserError(f"--out {out}: no such folder, so nothing has run there yet")
    runs = [progress_of(job, log) for job, log in zip(jobs, logs)]
    lefts = [seconds_left(run, runs) for run in runs]
    print(table(runs, lefts, chains))
    states = [run.state for run in runs]
    counts = [f"{states.count(s)} {s}" for s in ("at work", "stopped", "failed") if s in states]
    summary = ", ".join([f"{states.count('done')} of {len(runs)} runs are done", *counts])
    if left := sum(filter(None, lefts)):
        summary += f"; one after the other, the rest takes about {duration(left)}"
    print(summary)


def table(runs, lefts, chains):
    """Aligned columns."""
    rows = [("chain", "run", "state", "progress", "spent", "left", "")]
    for run, left in zip(runs, lefts):
        share = 100 if run.state == "done" else 100 * min(run.done / run.planned, 0.99)
        shown = "" if left is None or not left else "<" * run.at_most + duration(left)
        spent = duration(run.spent) if run.spent else ""
        cells = str(chains[run.name]), run.name, run.state, f"{share:.0f} %", spent, shown
        rows.append((*cells, run.position))
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = str.rjust, str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust
    lines = ("  ".join(f(cell, w) for f, cell, w in zip(align, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds):
    """Seconds as text: '35 s', '12 min', '2 h 05 min', '3 d 04 h'."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days:.0f} d {hours % 24:02.0f} h"
    if hours:
        return f"{hours:.0f} h {minutes % 60:02.0f} min"
    return f"{minutes:.0f} min" if minutes else f"{seconds:.0f} s"


# ------------------------------------------------------------------------------ one run


def parsed(job):
    """The flags of a Job, parsed by its script. Raises UserError."""
    return importlib.import_module(job.command[0].removesuffix(".py")).parse(job.command[1:])


def progress_of(job, log):
    """The Progress of a Job. Raises UserError where its records are damaged."""
    args = parsed(job)
    journal = read_journal(job.journal)
    rows = read_epochs(job.journal.with_name(job.journal.name.replace("run.json", "metrics.csv")))
    last = rows[-1] if rows else None
    position = f"{last['step']}, epoch {last['epoch']} of {epochs_of(last, args)}" if last else ""
    lines = [line for line in read_lines(log) if line.strip()]
    state = "waiting"
    if journal.get("finished"):
        state, position = "done" if is_done(job, journal) else "other flags", ""
    elif lines and lines[-1].startswith(ENDED):
        state, position = "failed", one_line(lines[-2] if len(lines) > 1 else lines[-1], 120)
    elif is_at_work(job.journal):
        state = "at work"
    elif journal or lines:
        state = "stopped"
    done = sum(weight(task_of(row["step"])) for row in rows)
    spent = journal.get("seconds", 0)
    return Progress(job.name, state, position, spent, done, planned_epochs(args), "deacc" in args)


def is_done(job, journal):
    """Whether a journal (read_journal) says that this very command has finished."""
    return journal.get("finished") is True and journal.get("command") == job.command[1:]


def read_journal(path):
    """What a run.json holds; an empty dict where there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: is damaged; the run itself tells what to do") from None


def read_lines(log):
    return log.read_text(errors="replace").split("\n") if log.exists() else []


def is_at_work(journal):
    """Whether the process that took the run's folder works there; on another machine: wrote lately.

    journal: the path of its run.json.
    """
    prefix = journal.name.removesuffix("run.json")
    found, _ = read_owner(journal.with_name(f".{prefix}lock"))
    if found is None:
        return False
    host, pid = found
    if host == socket.gethostname():
        return is_alive(pid)
    files = [journal, *journal.parent.glob(f"{prefix}metrics.csv")]
    times = [path.stat().st_mtime for path in files if path.exists()]
    return bool(times) and time.time() - max(times) < WRITES_SECONDS


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


# ------------------------------------------------------------------------------ epochs


def task_of(step):
    """The number in the name of a step, such as task3_round12."""
    return int(re.search(r"task(\d+)", step)[1])


def weight(task):
    """What an epoch of a task takes, in epochs of task 1."""
    return 1 if task == 1 else LATER_TASK


def epochs_of(row, args):
    """The epochs of the training that a row of metrics.csv is of."""
    retrained = re.search(r"_(prune|round)\d+$", row["step"])
    return args.iter_epochs if retrained else args.epochs


def planned_epochs(args):
    """The epochs of a run, in epochs of task 1; of main_BU at most."""
    if "mask" in args:  # main_train
        return args.epochs * weight(args.state)
    weights = [weight(t + 1) for t in range(args.classifiers)]
    epochs = args.epochs * sum(weights)
    if "prune_scheduler" in args:  # main_TD, which trains the last task once more
        prunings = zip(weights, args.prune_scheduler)
        retraining = sum(w * max(0, number - 1) for w, number in prunings)
        epochs += args.epochs * weights[-1] + args.iter_epochs * retraining
    elif "deacc" in args:  # main_BU, which trains later tasks twice, and may re-grow at each
        epochs += args.epochs * sum(weights[1:])
        epochs += args.iter_epochs * args.max_iter_prun * sum(weights)
    return epochs


def seconds_left(run, runs):
    """An estimate; 0 for a run that is done, None where nothing is known.

    From the same run of another seed, if one is done; else from what an epoch has taken in this
    run, else in all of them.
    """
    if run.state == "done":
        return 0
    name = run.name.partition("/")[2]
    alike = [r.spent for r in runs if r.state == "done" and r.name.partition("/")[2] == name]
    if alike:
        return max(0, mean(alike) - run.spent)
    known = [run] if run.done else [each for each in runs if each.done]
    if not known:
        return None
    rate = sum(each.spent for each in known) / sum(each.done for each in known)
    return rate * max(0, run.planned - run.done)
