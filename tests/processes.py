"""The scripts as users run them, in separate processes, without importing torch each time.

A server process imports what the scripts import and computes nothing; for each command it forks,
and the child runs the script as __main__. Run as a program, this file is that server: a line of
JSON in (argv, cwd, out, err, limit), two lines out: the child's process id, then its exit status
(negative: the signal that ended it).
"""

import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    status: int  # negative: the signal that ended it
    out: str
    err: str


class Server:
    """Starts scripts, one at a time."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).resolve())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, argv, cwd, limit=None):
        """Start argv in folder cwd; returns its process id.

        argv: ['main_TD.py', '--epochs', '1'] or ['-m', 'tools.report', 'run'], for example.
        limit: the most bytes that a file may have (stands in for a full disk).
        """
        self.texts = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        out, err = (file.name for file in self.texts)
        order = {"argv": list(map(str, argv)), "cwd": str(cwd), "out": out, "err": err}
        self.process.stdin.write(json.dumps(order | {"limit": limit}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """Wait for what was started; returns an Ended."""
        status = int(self.process.stdout.readline())
        texts = []
        for file in self.texts:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(status, *texts)

    def run(self, argv, cwd, limit=None):
        """start() and wait()."""
        self.start(argv, cwd, limit)
        return self.wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


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
    import runtime.run  # noqa: F401
    import teaching  # noqa: F401
    import tools.plots  # noqa: F401  (and with these, all that the scripts import)

    answers, sys.stdin = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    for line in sys.stdin:
        child = os.fork()
        if not child:
            status = 0
            try:
                run_order(json.loads(line))
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
