"""Stop runs of several ranks at random moments until they finish; compare with uninterrupted ones.

    python tests/soak_ranks.py --stops 50          at least so many stops

Each stop is a SIGKILL or SIGTERM to one of two ranks or to torchrun itself, at random; the others
must end by themselves, without a traceback. The same command is given again, a third of the times
to torchrun; otherwise the ranks are forked as in test_ranks.py, which is faster, and nobody but
themselves ends them. In the end every file must equal that of the uninterrupted run, as in soak.py.
Linux only.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import processes
import soak
from soak import outcome

ROOT = Path(__file__).parent.parent
TINY = (
    "--dataset digits --classifiers 2 --width 1 --epochs 2 --batch_size 128 --device cpu "
    "--unlabel_num 2 --iter_epochs 1 --checkpoint_seconds 0 --save_dir run"
)
COMMANDS = {
    "TD": f"main_TD.py {TINY} --prune_scheduler 3,2 --rewind rand",
    "BU": f"main_BU.py {TINY} --max_iter_prun 3 --base_sparsity 40 --accept_decay -100",
}


def torchrun(command, folder, ranks=2):
    """Start a command under torchrun in a folder, with its output in out.txt; returns a Popen."""
    options = ["--standalone", "--nproc_per_node", str(ranks)]
    script, *flags = command.split()
    argv = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / script), *flags]
    with open(folder / "out.txt", "w") as out:
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        return subprocess.Popen(argv, cwd=folder, stdout=out, stderr=out, env=environment)


def children(process, count=2):
    """The process ids of torchrun's ranks, in their order, when all have started."""
    path, pids = Path(f"/proc/{process.pid}/task/{process.pid}/children"), []
    while len(pids) < count and process.poll() is None:
        pids = [*map(int, path.read_text().split())]
    return pids


def wait_until_gone(pids, limit=330):
    """Wait for processes that are not ours."""
    start = time.monotonic()
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < start + limit, f"{pids} are still there"
        time.sleep(0.01)


def wait_for_text(path, text, pid):
    """Return when a file contains a text, or a process has ended."""
    while text not in path.read_text() and os.path.exists(f"/proc/{pid}"):
        time.sleep(0.01)


def stop_once(scripts, command, folder, draw, longest):
    """Start a command and stop something of it after 0..longest seconds of its work.

    Returns the signal and what got it, as text, None if the command has finished before; and the
    seconds until all had ended.
    """
    under_torchrun = draw.random() < 1 / 3
    target, moment = draw.randrange(2 + under_torchrun), draw.uniform(0, longest)
    signum = draw.choice([signal.SIGKILL, signal.SIGTERM])
    if under_torchrun:
        process = torchrun(command, folder)
        pids, out = children(process), folder / "out.txt"
    else:
        pids, out = scripts.start(command.split(), folder, ranks=2), Path(scripts.texts[0].name)
    # Before ranks have found each other only torchrun ends them; they would wait 5 minutes.
    if not under_torchrun or draw.random() < 0.7:
        wait_for_text(out, "  folder ", pids[0])
    time.sleep(moment)
    victim = pids[target] if target < 2 else process.pid
    name = "torchrun" if target == 2 else f"rank {target}" + " under torchrun" * under_torchrun
    if os.path.exists(f"/proc/{victim}"):
        os.kill(victim, signum)
    start = time.monotonic()
    if under_torchrun:
        status = process.wait()
        wait_until_gone(pids)
        text, done = out.read_text(), status == 0
    else:
        ended = scripts.wait()
        text, done = ended.err, ended.status == [0, 0]
    assert "[rank" not in text and (under_torchrun or "Traceback" not in text), text
    return None if done else f"{signum.name} to {name}", time.monotonic() - start


def main():
    args = soak.parse(__doc__, "--stops", 50)
    draw, scripts, start = random.Random(args.seed), processes.Server(), time.monotonic()
    stops, runs, failed, slowest = Counter(), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as root:
        seconds, expected, folder = {}, {}, Path(root, "stopped")
        for name, command in COMMANDS.items():
            Path(root, name).mkdir()
            begun = time.monotonic()
            ended = scripts.run(command.split(), Path(root, name), ranks=2)
            assert ended.status == [0, 0], ended
            seconds[name], expected[name] = time.monotonic() - begun, outcome(Path(root, name))
        while sum(stops.values()) < args.stops:
            name = [*COMMANDS][runs % 2]
            folder.mkdir()
            longest = seconds[name] / 6
            while True:
                stopped, wait = stop_once(scripts, COMMANDS[name], folder, draw, longest)
                longest *= 1.05  # so that it ends on a machine that has become slower
                if not stopped:
                    break
                stops[stopped], slowest = stops[stopped] + 1, max(slowest, wait)
                print(f"{name}: {stopped}; all had ended within {wait:.1f} s", flush=True)
            (folder / "out.txt").unlink(missing_ok=True)
            equal = outcome(folder) == expected[name]
            runs, failed = runs + 1, failed + (not equal)
            print(f"{name}: finished, {len(expected[name])} files, equal: {equal}", flush=True)
            shutil.rmtree(folder)
    scripts.close()
    print(f"{dict(stops)} in {runs} runs, {time.monotonic() - start:.0f} s")
    print(f"all had ended within {slowest:.1f} s")
    soak.end(failed)


if __name__ == "__main__":
    main()
