"""Several processes, as torchrun starts them: they compute what one process does, and end as one.

Most tests fork the processes (processes.py), which takes a second; torchrun itself takes several.
"""

import contextlib
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from soak import outcome, without_times
from soak_ranks import children, torchrun, wait_until_gone

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64
TINY = (
    "--dataset digits --classifiers 2 --width 1 --epochs 1 --batch_size 128 --device cpu "
    "--unlabel_num 2 --iter_epochs 1 --save_dir run"
)
TD = f"main_TD.py {TINY} --prune_scheduler 3,2"
BU = f"main_BU.py {TINY} --max_iter_prun 3 --base_sparsity 40 --accept_decay -100"
FLOAT64 = "tests/parallel.py"


@pytest.mark.parametrize("program", ["steps", "query"])
def test_ranks_compute_what_one_process_computes(program, scripts, tmp_path):
    """Losses, gradients, statistics, weights, features and confusions of some steps; queries.

    Shares are uneven, and some are empty: task 1 has a last batch of two images, for three ranks.
    """
    found = {}
    for count in (1, 2, 3):
        ended = scripts.run([FLOAT64, program, f"{count}.pt"], tmp_path, ranks=count)
        assert ended.err == "", ended
        found[count] = torch.load(tmp_path / f"{count}.pt")
    assert len(found[1]) > (1000 if program == "steps" else 3)
    for count in (2, 3):
        assert found[count].keys() == found[1].keys()
        for name, wanted in found[1].items():
            torch.testing.assert_close(found[count][name], wanted, **CLOSE, msg=name)


def decisions(folder):
    """What of a run must be equal whatever the rounding: masks, queried places, the records."""
    results = without_times(json.loads((folder / "results.json").read_text()))["states"]
    found = {"records": json.dumps(results)}
    for path in sorted(folder.glob("data/*_select_index.npy")):
        found[path.name] = np.load(path).tolist()
    for path in sorted(folder.glob("*.pt")):
        content = torch.load(path)
        for key, value in content.get("state_dict", content).items():
            if key.endswith("weight_mask"):
                found[f"{path.name}: {key}"] = value.tolist()
    return found


@pytest.mark.parametrize("command", [TD, BU], ids=["TD", "BU"])
def test_a_run_of_ranks_is_that_of_one_process(command, scripts, tmp_path):
    """In float64: equal masks, queried places, accuracies and confusions, after many prunings."""
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        ended = scripts.run([FLOAT64, *command.split()], tmp_path / str(ranks), ranks=ranks)
        assert ended.err == "", ended
        assert ended.out.count("records: run/results.json") == 1, ended  # rank 0 alone prints
    wanted, found = (decisions(tmp_path / str(ranks) / "run") for ranks in (1, 2))
    assert found == wanted
    assert not [*(tmp_path / "2/elsewhere").iterdir()]  # where rank 1 is
    assert sum("weight_mask" in name for name in found) > 100 and len(found["records"]) > 1000


def wait_for(folder, pattern, limit=60):
    """Return when a file has been written since this call."""
    start = time.time()
    while True:
        with contextlib.suppress(FileNotFoundError):  # it has just been removed
            if any(path.stat().st_mtime > start for path in folder.glob(pattern)):
                return
        assert time.time() < start + limit
        time.sleep(0.005)


def test_one_process_begins_and_two_finish(scripts, tmp_path):
    """And one again. In float64, since other shares round differently."""
    argv = [FLOAT64, *TD.split(), "--checkpoint_seconds", "0"]
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    assert scripts.run(argv, tmp_path / "undisturbed").status == 0
    stopped = tmp_path / "stopped"
    for ranks, step in ((1, "task1"), (2, "task2"), (1, "task3")):
        pids = scripts.start(argv, stopped, ranks=ranks)
        wait_for(stopped, f"run/{step}_progress.pt")
        os.kill(pids if ranks == 1 else pids[1], signal.SIGTERM)
        ended = scripts.wait()
        assert ended.status == (143 if ranks == 1 else [143, 143])
        assert f"{step} is saved at epoch" in ended.err
    ended = scripts.run(argv, stopped, ranks=2)
    assert ended.status == [0, 0] and "task3: resumes at epoch" in ended.out
    assert decisions(stopped / "run") == decisions(tmp_path / "undisturbed/run")


STOPS = [  # (signal, the rank that gets it, statuses at the end, what rank 0 says)
    (signal.SIGTERM, 0, [143, 143], "stopped by SIGTERM"),
    (signal.SIGINT, 1, [130, 130], "stopped by SIGINT"),
    (signal.SIGKILL, 0, [-9, 1], ""),
    (signal.SIGKILL, 1, [1, -9], "another of the 2 processes was killed or failed"),
]


def test_all_ranks_end_when_one_is_stopped(scripts, tmp_path):
    """Within seconds, with one line; in the end the run has the bits of an undisturbed one.

    torchrun itself is stopped last.
    """
    argv = [*TD.split(), "--checkpoint_seconds", "0"]
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    assert scripts.run(argv, tmp_path / "undisturbed", ranks=2).status == [0, 0]
    stopped = tmp_path / "stopped"
    for signum, rank, statuses, message in STOPS:
        pids = scripts.start(argv, stopped, ranks=2)
        wait_for(stopped, "run/*_progress.pt")
        os.kill(pids[rank], signum)
        ended = scripts.wait()
        assert ended.status == statuses, ended
        assert ended.err.count("\n") == bool(message) and message in ended.err
    for signum, message in (
        (signal.SIGKILL, "stopped by SIGTERM"),  # which the system sends the ranks
        (signal.SIGTERM, "stopped by SIGTERM"),
        (None, "records: run/results.json"),
    ):
        process = torchrun(" ".join(argv), stopped)
        if signum:
            wait_for(stopped, "run/*_progress.pt")
            pids = children(process)
            os.kill(process.pid, signum)
            wait_until_gone(pids)
        assert (process.wait() == 0) == (signum is None)
        assert message in (stopped / "out.txt").read_text()
    assert outcome(stopped / "run") == outcome(tmp_path / "undisturbed/run")


BAD = {  # what the ranks are given: (flags, of rank 1 where they differ), and the line
    "no GPU of one's own": ("--gpu 0", None, "--gpu 0: under torchrun each process takes"),
    "device": ("--device mps", None, "--device mps: under torchrun give auto, cpu or cuda"),
    "devices": ("--device auto", "GPUs", "--device auto: rank 1 has another value or content"),
    "flag": ("--lr 0.1", "--lr 0.2", "--lr: rank 1 has another value or content than rank 0"),
    "data": ("", "other images", "--data: rank 1 has another value or content than rank 0"),
    "one has an error": ("", "--data nowhere", "rank 1: --data nowhere: digits is part of this"),
    "usage": ("--epochs x", None, "--epochs: found 'x', give an integer of at least 1"),
    "too many": ("", "few images", "torchrun started 2 processes, but task 1 has 1 training"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_of_rank_0(case, scripts, tmp_path):
    flags, others, message = BAD[case]
    argv = [FLOAT64, "rank 1:", flags if others is None else others, *TD.split(), *flags.split()]
    ended = scripts.run(argv, tmp_path, ranks=2)
    assert ended.status == [2, 2], ended
    assert ended.err.count("\n") == 1 and message in ended.err
    assert not any(tmp_path.glob("run/task1*"))


@pytest.mark.parametrize(
    "flags, limit, message",
    [
        # stands in for a full disk: a checkpoint is larger than this, the journal is not
        ("", 10_000, "cannot be written (File too large)"),
        ("--lr 1e30", None, "--lr 1e+30 is too high here, give a lower one"),
    ],
)
def test_an_error_ends_all_ranks(flags, limit, message, scripts, tmp_path):
    ended = scripts.run([*TD.split(), *flags.split()], tmp_path, limit=limit, ranks=2)
    assert ended.status == [2, 2], ended
    assert ended.err.count("\n") == 1 and message in ended.err
