"""What the tests share: a tiny data set in memory, and the arguments of a tiny run."""

import runtime.threads  # isort: skip  # noqa: F401  (OpenMP reads its settings with torch)

from argparse import Namespace

import processes
import pytest
import torch

from dataset import Data
from datasets import prepare
from models import build_model
from runtime.run import Run


@pytest.fixture
def args(tmp_path):
    """The flags of a tiny run: 3 tasks of 2 classes."""
    return Namespace(
        dataset="digits",
        data=None,
        classifiers=3,
        classes_per_classifier=2,
        unlabel_num=3,
        no_teaching=False,
        save_dir=str(tmp_path / "run"),
        save_data_path=str(tmp_path / "run" / "data"),
        epochs=2,
        batch_size=24,
        lr=0.01,
        decreasing_lr=[1],
        momentum=0.9,
        weight_decay=5e-4,
        iter_epochs=1,
        percent=0.2,
        width=4,
        seed=0,
        print_freq=50,
        arch="resnet18",
        precision="fp32",
        device="cpu",
        gpu=0,
        deterministic=False,
        criterion="magnitude",
        checkpoint_seconds=60,
        overwrite=False,
    )


@pytest.fixture
def data():
    """Six classes of random 16x16 images; those of class c are about 40*c bright."""
    generator = torch.Generator().manual_seed(0)

    def part(per_class):
        noise = {c: torch.rand(per_class + c, 16, 16, 3, generator=generator) for c in range(6)}
        return {c: (40 * c + 50 * x).to(torch.uint8) for c, x in noise.items()}

    train = part(11)
    return Data(
        source="test",
        classifiers=3,
        classes_per_classifier=2,
        order=[3, 1, 5, 0, 2, 4],
        train=train,
        val=part(4),
        test=part(5),
        exemplars={c: images[:4] for c, images in train.items()},
        pool=(255 * torch.rand(60, 16, 16, 3, generator=generator)).to(torch.uint8),
        mean=torch.full((3, 1, 1), 0.5),
        std=torch.full((3, 1, 1), 0.25),
        pad=4,
    )


@pytest.fixture
def few_digits(monkeypatch):
    """The embedded digits, but 12 training images per class."""
    parts, pool, meta = prepare.read_embedded("digits")
    counts = {"train": 12, "val": 5, "test": 8, "exemplars": 4}
    few = {part: {c: parts[part][c][:n] for c in range(10)} for part, n in counts.items()}
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
