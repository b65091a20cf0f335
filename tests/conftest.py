"""What the tests share: the device, a tiny dataset in memory, the arguments of a tiny run."""

# ruff: noqa: E402

from runtime.threads import setup_threads  # isort: skip

setup_threads()  # before PyTorch is loaded

from argparse import Namespace

import processes
import pytest
import torch

import main_BU
from dataset import Data
from datasets import prepare
from models import build_model
from runtime.args import pick_device
from runtime.run import Run

SLOWEST = ("test_resume", "test_scripts", "test_benchmarks")


def pytest_addoption(parser):
    message = "device of the tests marked device: cpu (default) or cuda; mps has no float64"
    parser.addoption("--device", default="cpu", metavar="NAME", help=message)


def pytest_collection_modifyitems(items):
    """The slowest files first: of several workers, none is then left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in SLOWEST)


@pytest.fixture
def device(request):
    """The torch.device of --device in tests marked for it, in all others the CPU."""
    marked = request.node.get_closest_marker("device")
    name = request.config.getoption("--device") if marked else "cpu"
    return pick_device(Namespace(device=name, gpu=None, deterministic=False))


@pytest.fixture
def args(tmp_path, device):
    """The flags of a tiny run: 3 tasks of 2 classes."""
    flags = "--dataset digits --classifiers 3 --width 4 --epochs 2 --batch_size 24 --unlabel_num 3"
    flags += f" --decreasing_lr 1 --iter_epochs 1 --device {device}"
    return main_BU.parse([*flags.split(), "--save_dir", str(tmp_path / "run")])


@pytest.fixture
def data(device):
    """Six classes of random 16x16 images; those of class c are about 40*c bright."""
    generator = torch.Generator().manual_seed(0)

    def split(per_class):
        noise = {c: torch.rand(per_class + c, 16, 16, 3, generator=generator) for c in range(6)}
        return {c: (40 * c + 50 * x).to(device, torch.uint8) for c, x in noise.items()}

    train = split(11)
    return Data(
        source="test",
        classifiers=3,
        classes_per_classifier=2,
        order=[3, 1, 5, 0, 2, 4],
        train=train,
        val=split(4),
        test=split(5),
        exemplars={c: images[:4] for c, images in train.items()},
        pool=(255 * torch.rand(60, 16, 16, 3, generator=generator)).to(device, torch.uint8),
        mean=torch.full((3, 1, 1), 0.5, device=device),
        std=torch.full((3, 1, 1), 0.25, device=device),
        pad=4,
    )


@pytest.fixture
def few_digits(monkeypatch):
    """The embedded digits, but 12 training images per class."""
    splits, pool, meta = prepare.read_embedded("digits")
    counts = {"train": 12, "val": 5, "test": 8, "exemplars": 4}
    few = {split: {c: splits[split][c][:n] for c in range(10)} for split, n in counts.items()}
    monkeypatch.setattr(prepare, "read_embedded", lambda name: (few, pool[:100], meta))


@pytest.fixture
def run(args, data):
    """A run in an empty folder, with these arguments (as they are when it is used) and data."""
    return Run("test", args, data, build_model(args))


@pytest.fixture(scope="session")
def scripts():
    """Runs scripts in separate processes, see processes.py."""
    server = processes.Server()
    yield server
    server.close()
