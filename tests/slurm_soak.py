"""Run the rehearsal of tools/reproduce.py on a real Slurm, preempt it at random, and compare.

    python tests/slurm_soak.py --stops 30      at least so many starts that do not reach the end
    make slurm-soak                            the same

Needs root, slurm-wlm and munge (Debian's names), and nothing configured: a Slurm of one node starts
in a temporary folder, without systemd. slurm/reproduce.sbatch is submitted as an array of three
chains (top-down, dense, bottom-up with two retrained tickets). At random moments a job of a higher
partition preempts all elements, or one of them is requeued, or gets SIGUSR1, SIGUSR2 or SIGTERM. In
the end every file must equal that of an undisturbed run, byte for byte (except for times).
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import soak
from processes import ROOT
from soak import outcome

PROGRAMS = "munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel"
CHAINS = 0, 1, 6
FLAGS = ["--size", "rehearsal", "--seeds", "0", "--out", "runs"]
# cred_expire: seconds before which a requeued job does not start again, by default 120
CONFIGURATION = """
ClusterName=soak
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
MinJobAge=86400
SchedulerParameters=bf_interval=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def call(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ------------------------------------------------------------------------------ a Slurm


def free_ports(number):
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


@contextlib.contextmanager
def slurm(folder):
    """A Slurm of one node in a folder; SLURM_CONF names it to all its commands."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    values = {"host": call("hostname", "-s").strip(), "folder": folder, "ports": free_ports(2)}
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text(CONFIGURATION.format(**values, cores=os.cpu_count()))
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    os.environ["SLURM_CONF"] = str(conf)
    files = {"key-file": key} | {
        name: folder / f"munge.{end}"
        for name, end in (("socket", "sock"), ("log-file", "log"), ("seed-file", "seed"))
    }
    files["pid-file"] = folder / "munged.pid"
    try:
        call("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        call("slurmctld", "-c")
        call("slurmd", "-c")
        limit = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo"], capture_output=True, text=True).stdout:
            assert time.monotonic() < limit, f"Slurm does not start, see {folder}"
            time.sleep(0.5)
        yield
    finally:
        subprocess.run(["scancel", f"--user={os.geteuid()}"], capture_output=True)
        limit = time.monotonic() + 60
        while time.monotonic() < limit and {"R", "CG"} & {*squeue_states()}:
            time.sleep(0.5)
        for path in folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)
        time.sleep(2)


def squeue_states():
    """The states of all jobs; empty if Slurm does not answer."""
    command = ["squeue", "--noheader", "--format=%t"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def elements(job):
    """[{field: value}] of the elements of an array job; one stands for all that have not begun."""
    lines = call("scontrol", "show", "job", "-o", job).splitlines()
    return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]


# ------------------------------------------------------------------------------ runs


def undisturbed(folder):
    """Run the chains one after the other in a folder."""
    folder.mkdir()
    for chain in CHAINS:
        command = [sys.executable, "-m", "tools.reproduce", "--chain", str(chain), *FLAGS]
        subprocess.run(command, cwd=folder, check=True)


def wait_for_training(folder, seconds):
    """Return when a run has taken its folder, or after so many seconds."""
    limit = time.monotonic() + seconds
    while not any(folder.glob("runs/seed0/*/.*owner")) and time.monotonic() < limit:
        time.sleep(0.1)


def disturb(running, draw):
    """Stop one of the running elements, or all."""
    way = draw.choice(["preempt", "requeue", "USR1", "USR2", "TERM"])
    element = draw.choice(running)
    job = f"{element['ArrayJobId']}_{element['ArrayTaskId']}"
    if way == "preempt":
        call("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        return
    command = ["scontrol", "requeue", job] if way == "requeue" else ["scancel", f"-s{way}", job]
    subprocess.run(command, capture_output=True)  # it may just have ended


def run_array(folder, draw, stops):
    """Submit the array in a folder and disturb it until it has had `stops`; returns its elements.

    Three of four disturbances wait until a run trains; the others may come while programs start.
    """
    folder.mkdir()
    submit = ["sbatch", "--parsable", f"--array={','.join(map(str, CHAINS))}", "--cpus-per-task=1"]
    submit += [f"--chdir={folder}", f"--output={folder}/log-%a.txt"]
    job = call(*submit, str(ROOT / "slurm/reproduce.sbatch"), *FLAGS).strip()
    while True:
        if draw.random() < 0.75:
            wait_for_training(folder, 60)
        time.sleep(draw.uniform(0, 10))
        found = elements(job)
        if all(each["JobState"] in ("COMPLETED", "FAILED", "CANCELLED") for each in found):
            return found
        running = [each for each in found if each["JobState"] == "RUNNING"]
        if running and sum(int(each["Restarts"]) for each in found) < stops:
            disturb(running, draw)


def report(folder, reference, found):
    """Print what came of an array. Returns the number of stops, and of runs that differ."""
    stops = sum(int(each["Restarts"]) for each in found)
    logs = "".join(path.read_text() for path in folder.glob("log-*.txt"))
    statuses = Counter(re.findall(r"stopped with status (\d+)", logs))
    asked = ", ".join(f"{number} after status {status}" for status, number in statuses.items())
    print(f"{stops} stops: requeued {asked}, the others by Slurm itself")
    logs = "".join(path.read_text() for path in folder.glob("runs/logs/*"))
    print(f"{len(re.findall('stopped by SIG', logs))} runs stopped in their work, ", end="")
    print(f"{len(re.findall('is saved at', logs))} within a training step")
    failed = sum(each["JobState"] != "COMPLETED" for each in found)
    for run in sorted(path for path in (reference / "runs").glob("seed0/*")):
        expected = outcome(run)
        equal = outcome(folder / "runs/seed0" / run.name) == expected
        print(f"{run.name:<5} {len(expected)} files, equal: {equal}", flush=True)
        failed += not equal
    if failed:
        print(logs)
    return stops, failed


def main():
    args = soak.parse(__doc__, "--stops", 30)
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if os.geteuid() or missing:
        reason = f"found no {', '.join(missing)}" if missing else "is not run as root"
        print(f"slurm_soak.py: {reason}; needs root, slurm-wlm and munge", file=sys.stderr)
        sys.exit(2)
    os.environ |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    draw, start, stops, failed = random.Random(args.seed), time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        root = Path(root)
        undisturbed(root / "reference")
        print(f"undisturbed: {time.monotonic() - start:.0f} s", flush=True)
        with slurm(root / "slurm"):
            while stops < args.stops:
                folder = root / "disturbed"
                found = run_array(folder, draw, args.stops - stops)
                more, differing = report(folder, root / "reference", found)
                stops, failed = stops + more, failed + differing
                shutil.rmtree(folder)
                if failed:
                    break
    print(f"{stops} stops in {time.monotonic() - start:.0f} s")
    soak.end(failed)


if __name__ == "__main__":
    main()
