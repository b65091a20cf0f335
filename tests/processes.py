"""The scripts as users run them, in separate processes, without importing torch each time.

A server process imports what the scripts import and computes nothing; for each command it forks,
and the child runs the script as __main__. Run as a program, this file is that server: an order
comes in as a line of JSON, two lines go out: the child's process id, then its exit status.
"""

import json
import os
import pickle
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
TINY = (  # four classes of published images of 12x12 pixels
    "--dataset cifar10 --classifiers 2 --classes_per_classifier 2 --width 4 --batch_size 16 "
)


class Ended(NamedTuple):
    status: int  # negative: the signal that ended it
    out: str
    err: str

    def check_error(self, *fragments):
        """Check for status 2 and one line on stderr with all fragments; returns the line."""
        assert self.status == 2 and len(self.err.splitlines()) == 1, self
        assert all(each in self.err for each in fragments), (fragments, self.err)
        return self.err


class Server:
    """Starts scripts, one at a time."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).resolve())]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, argv, cwd, **order):
        """Start argv in folder cwd; returns its process id.

        argv: ['main_TD.py', '--epochs', '1'] or ['-m', 'tools.report', 'run'], for example.
        order: stop, (function, n, signal): the process sends itself this signal in the n-th call;
        ignored, a signal that is; save_seconds, for runtime.run; limit, the most bytes that a file
        may have, as on a full disk; out and err, devices for its output, or '' for closed ones;
        encoding, of both.
        """
        self.texts = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        out, err = (file.name for file in self.texts)
        order = {"argv": [*map(str, argv)], "cwd": str(cwd), "out": out, "err": err} | order
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """Wait for what was started; returns an Ended."""
        status, texts = int(self.process.stdout.readline()), []
        for file in self.texts:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(status, *texts)

    def run(self, argv, cwd, **order):
        """start() and wait(). argv may be a text."""
        self.start(argv.split() if isinstance(argv, str) else argv, cwd, **order)
        return self.wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def write_published(folder, side=12):
    """Write the published files of a dataset with few and small images; return what they hold."""
    folder.mkdir()
    generator = np.random.default_rng(0)

    def images(n, c=0):
        noise = generator.integers(0, 120, (n, side, side, 3))
        return (noise + 13 * c).astype(np.uint8)

    counts = {"train": 10, "val": 4, "test": 5, "save_100": 3}
    content = {name: {c: images(n, c) for c in range(10)} for name, n in counts.items()}
    content["80m_150k"] = {"data": images(30, 5), "label": np.zeros(30)}
    for name, own in content.items():
        (folder / f"cifar10_{name}.pkl").write_bytes(pickle.dumps(own, 2))
    return content


def tree(folder):
    """{path: content} of all files in a folder but locks."""
    paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in paths if not path.name.endswith("lock")}


# ------------------------------------------------------------------------------ the server


def fork(order):
    """Start a child that carries out an order."""
    child = os.fork()
    if child:
        return child
    status = 0
    try:
        prepare(**order)
        run_script(*order["argv"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)


def prepare(
    cwd, out, err, stop=(), ignored=None, save_seconds=60, limit=None, encoding="utf-8", **_
):
    """In the child: what Server.start() says."""
    for descriptor, name, path in ((1, "stdout", out), (2, "stderr", err)):
        if path:
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
            setattr(sys, name, open(descriptor, "w", 1, encoding))  # noqa: SIM115
        else:
            setattr(sys, name, None)
            os.close(descriptor)
    os.chdir(cwd)
    for name in import_module("runtime.process").STOPPING:  # also if pytest runs under nohup
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ignored:
        signal.signal(signal.Signals[ignored], signal.SIG_IGN)
    if limit:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    import_module("runtime.run").SAVE_SECONDS = save_seconds
    if stop:
        stop_in(*stop)


def stop_in(function, number, name):
    """Send this process a signal in the given call (from 1) of a function, 'module.function'."""
    module, *path, attribute = function.split(".")
    owner = import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, attribute), iter(range(1, 10**6))

    def stopping(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.Signals[name])
        return original(*args, **kwargs)

    setattr(owner, attribute, stopping)


def run_script(script, *flags):
    if script == "-m":
        module, *flags = flags
        sys.argv = [module, *flags]  # run_module() puts the file in place of the first
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(ROOT / script), *flags]
        runpy.run_path(sys.argv[0], run_name="__main__")


def serve():
    sys.path.insert(0, str(ROOT))
    from runtime.threads import setup_threads

    setup_threads()
    import_module("torch._dynamo")  # the first optimizer imports it: two seconds
    import_module("teaching")  # and with it what the scripts import
    answers, sys.stdin = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    for line in sys.stdin:
        child = fork(json.loads(line))
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    serve()
