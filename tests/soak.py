"""Kill runs with SIGKILL at random moments until they finish; compare with uninterrupted ones.

    python tests/soak.py --kills 120          at least so many kills over the four scripts
    make soak                                 the same

Every batch is followed by a checkpoint (--checkpoint_seconds 0). Half of the kills wait for a file
write and hit it, which the temporary file proves. Each script runs on the embedded digits in a
separate process; the same command is given again after each kill. In the end every file must equal
that of the uninterrupted run, byte for byte (JSON files and the log: except for the times).
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import processes

TINY = (
    "--dataset digits --classifiers 3 --width 4 --epochs 2 --decreasing_lr 1 --batch_size 64 "
    "--save_dir run"
)
TEACHING = f"{TINY} --unlabel_num 2"
BU = f"{TEACHING} --iter_epochs 1 --max_iter_prun 3 --base_sparsity 40 --accept_decay -100"
TRAIN = "--weight ../BU/run/task2_best_model.pt --mask ../BU/run/mask-3.pt --state 3"
COMMANDS = {  # folder: command; the last one needs the folder BU
    "CIL": f"main_CIL.py {TEACHING}",
    "TD": f"main_TD.py {TEACHING} --iter_epochs 1 --prune_scheduler 1,2,3 --rewind rand",
    "BU": f"main_BU.py {BU} --criterion random",
    "train": f"main_train.py {TINY} {TRAIN} --save_data_path ../BU/run/data",
}
# what differs between equal runs: times, and the command, where --checkpoint_seconds does
IGNORED = ("seconds", "images_per_second", "checksum", "checkpoint_seconds", "command")


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in IGNORED}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def outcome(folder):
    """{file: what must be equal}: checksums, and the content of JSON files without the times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            content = without_times(json.loads(path.read_text()))
            content.pop("wrote", None)  # also lists the progress files
            found[path.name] = content
        elif path.name.endswith("log_results.txt"):
            found[path.name] = [line.rsplit("\t", 1)[0] for line in path.read_text().splitlines()]
        elif path.name.endswith("metrics.csv"):  # the last two columns are times
            found[path.name] = [line.rsplit(",", 2)[0] for line in path.read_text().splitlines()]
        elif path.is_file() and not path.name.endswith(("lock", "owner")):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def uninterrupted(scripts, command, folder):
    """Run a command to its end; returns the seconds it took."""
    folder.mkdir()
    start = time.monotonic()
    ended = scripts.run(command.split(), folder)
    assert ended.status == 0, ended
    return time.monotonic() - start


def half_written(folder):
    """Whether a temporary file of an atomic write is there."""
    return any(folder.glob("run/**/.*.part"))


def wait_for_a_write(folder):
    """Return during a file write, or after a second without one."""
    limit = time.monotonic() + 1
    while not half_written(folder) and time.monotonic() < limit:
        pass


def kill_until_done(scripts, command, folder, draw, longest, kills):
    """Kill a command after 0..longest seconds, again and again, until it finishes.

    draw: a random.Random. kills: after so many the command is left alone. Returns the number of
    kills, and how many of them left a half-written file.
    """
    folder.mkdir()
    killed = in_a_write = 0
    argv = [*command.split(), "--checkpoint_seconds", "0"]
    while killed < kills:
        process = scripts.start(argv, folder)
        while not killed and not any(folder.glob("run/*_progress.pt")):
            time.sleep(0.001)  # the first kill comes while it trains
        time.sleep(draw.uniform(0, longest) if killed else 0)
        if draw.random() < 0.5:
            wait_for_a_write(folder)
        with contextlib.suppress(ProcessLookupError):  # it had ended
            os.kill(process, signal.SIGKILL)
        ended = scripts.wait()
        if ended.status == 0:
            return killed, in_a_write
        assert ended.status == -signal.SIGKILL, ended
        killed += 1
        in_a_write += half_written(folder)
    ended = scripts.run(argv, folder)
    assert ended.status == 0, ended
    return killed, in_a_write


def parse(description, flag, count):
    """The arguments of a soak: --seed, and its number of stops under the name `flag`."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument(flag, type=int, default=count, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    return parser.parse_args()


def end(failed):
    """Say whether all runs ended as undisturbed ones, and exit. failed: how many did not."""
    print(f"{failed} runs differ" if failed else "all runs ended as the undisturbed ones")
    sys.exit(failed > 0)


def main():
    args = parse(__doc__, "--kills", 120)
    scripts, draw = processes.Server(), random.Random(args.seed)
    kills, in_a_write, failed, start = 0, 0, 0, time.monotonic()
    print(f"{'script':<8} {'kills':>6} {'in a write':>11} {'files':>6}  equal", flush=True)
    with tempfile.TemporaryDirectory() as root:
        reference, killed = Path(root, "reference"), Path(root, "killed")
        reference.mkdir()
        seconds = {
            name: uninterrupted(scripts, command, reference / name)
            for name, command in COMMANDS.items()
        }
        expected = {name: outcome(reference / name) for name in COMMANDS}
        while kills < args.kills:
            killed.mkdir()
            for name, command in COMMANDS.items():
                longest = 0.3 + seconds[name] / 4
                found = kill_until_done(scripts, command, killed / name, draw, longest, 1000)
                equal = outcome(killed / name) == expected[name]
                kills, in_a_write = kills + found[0], in_a_write + found[1]
                failed += not equal
                files = len(expected[name])
                print(f"{name:<8} {found[0]:>6} {found[1]:>11} {files:>6}  {equal}", flush=True)
            shutil.rmtree(killed)
    scripts.close()
    print(f"{kills} kills, {in_a_write} of them in a write, in {time.monotonic() - start:.0f} s")
    end(failed)


if __name__ == "__main__":
    main()
