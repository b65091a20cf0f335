"""The scripts and a training step on an emulated device (fakegpu.py): where tensors are, where the
host waits, how many operations a step is.
"""

import sys
from pathlib import Path

import processes
import pytest
import torch
from fakegpu import emulated
from torch.utils._pytree import tree_map

import dataset
import main_BU
import main_CIL
import main_TD
import main_train
import test as test_script
import trainer
from runtime.checkpoint import load_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import bench

LIMIT = 400  # operations of a step of task 3 that are no views, a launch or more each
FLAGS = f"{processes.TINY} --data set --batch_size 64"
TRAINING = f"{FLAGS} --epochs 1 --lr 0.05 --unlabel_num 2"
SCRIPTS = {
    "BU": (main_BU, f"{TRAINING} --iter_epochs 1 --max_iter_prun 1 --accept_decay -100"),
    "CIL": (main_CIL, TRAINING),
    "TD": (main_TD, f"{TRAINING} --iter_epochs 1 --prune_scheduler 1,2"),
    "train": (
        main_train,
        f"{TRAINING} --weight BU/task1_best_model.pt --mask BU/mask-2.pt --save_data_path BU/data",
    ),
    "test": (test_script, f"{FLAGS} --pretrained BU/task2_best_prun_model.pt --pruned"),
}


# ------------------------------------------------------------------------------ whole scripts


def outcome(name, device, folder, more=""):
    """Run a script beside the folder of BU: {what: must be equal}, of its rows and files."""
    script, flags = SCRIPTS[name]
    argv = f"{flags} {more} --device {device} --save_dir {folder}".split()
    rows = script.main(argv)["states"]
    found = {key: [row[key] for row in rows] for key in ("accuracy", "task_aware", "density")}

    def plain(value):
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    for path in Path(folder).rglob("*"):
        if path.suffix == ".pt":
            found[path.name] = tree_map(plain, load_checkpoint(path))
        elif path.suffix == ".npy" or path.name.endswith("confusion.csv"):
            found[path.name] = path.read_bytes()
    return found


def check_equal(found, wanted):
    assert found.keys() == wanted.keys()
    assert not [name for name in found if found[name] != wanted[name]]


def lay_out_as_on(kind, patch):
    """Let images and weights lie in the memory of the CPU as they do on a device."""
    normalize, make_model = dataset.normalize, trainer.make_model
    if kind == "mps":
        patch.setattr(dataset, "normalize", lambda *both: normalize(*both).contiguous())
    else:
        last = torch.channels_last
        patch.setattr(trainer, "make_model", lambda *all: make_model(*all).to(memory_format=last))


@pytest.fixture(scope="module", params=["cuda", "mps"])
def kind_and_wanted(request, tmp_path_factory):
    """A device, and {script: outcome} of the CPU."""
    kind = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(kind))
        processes.write_published(Path("set"))
        with patch.context() as on_cpu:
            lay_out_as_on(kind, on_cpu)
            wanted = {name: outcome(name, "cpu", name) for name in SCRIPTS}
        yield kind, wanted


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_compute_the_bits_of_the_cpu(kind_and_wanted, name):
    kind, wanted = kind_and_wanted
    with emulated(kind) as gpu:
        check_equal(outcome(name, kind, f"{name}_{kind}"), wanted[name])
    assert gpu.launches


@pytest.fixture
def restored_settings(monkeypatch):
    """What --deterministic sets is set back."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_bf16_and_deterministic_algorithms(tmp_path, monkeypatch, restored_settings):
    monkeypatch.chdir(tmp_path)
    processes.write_published(Path("set"))
    flags = "--precision bf16 --deterministic --iter_epochs 0"
    with monkeypatch.context() as on_cpu:
        lay_out_as_on("cuda", on_cpu)
        wanted = outcome("TD", "cpu", "bf16_cpu", flags)
    with emulated():
        check_equal(outcome("TD", "cuda", "bf16_cuda", flags), wanted)
    assert not torch.utils.deterministic.fill_uninitialized_memory


# ------------------------------------------------------------------------------ a training step


def kd_task(device):
    """Task 3 of the benchmark at width 4, two steps an epoch: task, args, network, optimizer."""
    args, data = bench.make_args("fp32", 4), bench.make_data(device)
    task = bench.make_task(args, data, 100)
    random = tuple(each[task.new - 64 : task.new + 64] for each in task.random)
    task = task._replace(random=random, new=64)
    return task, args, *bench.make_network("fp32", args, device, prunings=2)


def test_a_step_is_few_operations():
    with emulated() as gpu:
        task, args, model, optimizer = kd_task(torch.device("cuda", 0))
        batches, _ = trainer.make_batches(task, args, "task3", epoch=1)
        for _ in range(2):  # of the first step it is more: momentum, the draws of the epoch
            totals = [gpu.launches.total()]
            batch = next(batches)
            totals.append(gpu.launches.total())
            loss, _ = trainer.kd_loss(model, 3, args.batch_size // 4, batch)
            totals.append(gpu.launches.total())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            totals.append(gpu.launches.total())
            optimizer.step()
            totals.append(gpu.launches.total())
    phases = [after - before for before, after in zip(totals, totals[1:])]
    phases = dict(zip(("batch", "forward", "backward", "SGD"), phases))
    print(phases)
    assert sum(phases.values()) <= LIMIT, phases


def check_no_wait_in_an_epoch():
    with emulated() as gpu:
        task, args, model, optimizer = kd_task(torch.device("cuda", 0))
        gpu.waits.clear()
        plan = trainer.Plan("task3", "task3", epochs=1, lr=0.01)
        means, _ = trainer.train_epoch(model, optimizer, task, args, plan, epoch=1)
    assert means and gpu.waits.total() == 1, gpu.waits  # they go to the host at the end


def test_training_does_not_wait_for_the_device():
    check_no_wait_in_an_epoch()


# What must be noticed: wrong versions of our functions, with the words that tell of them.


def order_on_the_cpu(n, size, data, generator, *more):
    draws = torch.stack([torch.randperm(n, generator=generator), *torch.zeros(3, n).long()])
    yield from draws.split(size, dim=1)


def labels_on_the_cpu(*args, right=dataset.Data.select_tasks):
    images, labels = right(*args)
    return images, labels.cpu()


def draws_on_the_device(n, pad, generator):
    return torch.randint(2, (3, n), generator=generator, device="cuda:0")


def loss_read_in_each_step(*args, right=trainer.kd_loss):
    loss, terms = right(*args)
    assert float(loss.detach()) < 1000
    return loss, terms


MISTAKES = {
    "order": (dataset, "epoch_draws", order_on_the_cpu, "index.* on the CPU"),
    "labels": (dataset.Data, "select_tasks", labels_on_the_cpu, "index.* on the CPU"),
    "generator": (dataset, "draw_views", draws_on_the_device, "expected a generator"),
    "loss": (trainer, "kd_loss", loss_read_in_each_step, "_local_scalar_dense, test_fakegpu.py"),
}


@pytest.mark.parametrize("owner, name, wrong, words", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_noticed(monkeypatch, owner, name, wrong, words):
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((RuntimeError, AssertionError), match=words):
        check_no_wait_in_an_epoch()
