"""The scripts as users run them, in separate processes, without importing torch each time.

A server process imports what the scripts import and computes nothing; for each command it forks,
and the child runs the script as __main__. Run as a program, this file is that server: a line of
JSON in (argv, cwd, out, err, limit, ranks), two lines out: the child's process id, then its exit
status (negative: the signal that ended it). With several ranks, as torchrun starts them, there are
as many children, and each line has a number for each.
"""

import json
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    status: int  # negative: the signal that ended it; with several ranks a list
    out: str
    err: str


class Server:
    """Starts scripts, one at a time."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).resolve())]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ  # as torchrun sets it
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, argv, cwd, limit=None, ranks=1):
        """Start argv in folder cwd; returns its process id, or those of several ranks.

        argv: ['main_TD.py', '--epochs', '1'] or ['-m', 'tools.report', 'run'], for example.
        limit: the most bytes that a file may have (stands in for a full disk).
        """
        self.texts = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        out, err = (file.name for file in self.texts)
        order = {"argv": list(map(str, argv)), "cwd": str(cwd), "out": out, "err": err}
        self.process.stdin.write(json.dumps(order | {"limit": limit, "ranks": ranks}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self):
        numbers = [*map(int, self.process.stdout.readline().split())]
        return numbers if len(numbers) > 1 else numbers[0]

    def wait(self):
        """Wait for what was started; returns an Ended."""
        status, texts = self.answer(), []
        for file in self.texts:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(status, *texts)

    def run(self, argv, cwd, limit=None, ranks=1):
        """start() and wait()."""
        self.start(argv, cwd, limit, ranks)
        return self.wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def rank_variables(count):
    """What torchrun sets in the environment of each of its processes."""
    same = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    same |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank} | same
        yield {name: str(value) for name, value in variables.items()}


def fork(order, variables):
    """Start a child that runs an order, with more variables in its environment."""
    child = os.fork()
    if child:
        return child
    status = 0
    os.environ.update(variables)
    try:
        run_order(order)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_order(order):
    """In the child: set its output, folder and limit, and run the script."""
    for descriptor, path in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(order["cwd"])
    if order["limit"]:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], hard))
    script, *flags = order["argv"]
    if script == "-m":
        module, *flags = flags
        sys.argv = [module, *flags]  # run_module() puts the file in place of the first
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(ROOT / script), *flags]
        runpy.run_path(sys.argv[0], run_name="__main__")


def serve():
    sys.path.insert(0, str(ROOT))
    import runtime.threads  # isort: skip  # noqa: F401  (before torch is loaded)
    import torch._dynamo  # noqa: F401  (the first optimizer imports it: two seconds)

    import runtime.run  # noqa: F401
    import teaching  # noqa: F401
    import tools.plots  # noqa: F401  (and with these, all that the scripts import)

    answers, sys.stdin = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    for line in sys.stdin:
        order = json.loads(line)
        several = order["ranks"] > 1
        variables = rank_variables(order["ranks"]) if several else [{}]
        children = [fork(order, each) for each in variables]
        print(*children, file=answers, flush=True)
        ended = [os.waitpid(child, 0)[1] for child in children]
        print(*map(os.waitstatus_to_exitcode, ended), file=answers, flush=True)


if __name__ == "__main__":
    serve()
