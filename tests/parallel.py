"""Run a script in float64, for tests/test_ranks.py: what ranks compute differs by rounding alone.

    python tests/parallel.py main_TD.py --dataset digits ...
    python tests/parallel.py steps OUT       losses, gradients and statistics of some steps, to OUT
    python tests/parallel.py query OUT       queried places
    python tests/parallel.py "rank 1:" WHAT main_TD.py ...      rank 1 has other flags or images

A program of its own, because the ranks are processes.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import importlib  # noqa: E402

import dataset  # noqa: E402  isort: skip
import torch  # noqa: E402

import teaching  # noqa: E402
import trainer  # noqa: E402
from runtime import ranks  # noqa: E402
from runtime.process import run_script  # noqa: E402

SETTINGS = {"classifiers": 3, "classes_per_classifier": 2, "arch": "resnet18", "width": 2}
SETTINGS |= {"precision": "fp32", "seed": 0, "batch_size": 24, "lr": 0.05, "momentum": 0.9}
SETTINGS |= {"weight_decay": 5e-4}


def normalize(images, data, of=dataset.normalize):
    return of(images, data).double()


def make_data():
    """Six classes of random 16x16 images, with other numbers in each."""
    generator = torch.Generator().manual_seed(0)

    def part(count):
        noise = {c: torch.rand(count + c, 16, 16, 3, generator=generator) for c in range(6)}
        return {c: (40 * c + 50 * x).to(torch.uint8) for c, x in noise.items()}

    pool = (255 * torch.rand(23, 16, 16, 3, generator=generator)).to(torch.uint8)
    train, mean = part(11), torch.full((3, 1, 1), 0.5)
    numbers = {"mean": mean, "std": mean / 2, "pad": 2, "classifiers": 3}
    parts = {"train": train, "val": part(4), "test": part(5)}
    parts["exemplars"] = {c: images[:4] for c, images in train.items()}
    order = {"order": [3, 1, 5, 0, 2, 4], "classes_per_classifier": 2, "source": "test"}
    return dataset.Data(pool=pool, **parts, **numbers, **order)


def steps(out):
    """An epoch of each task, of the last also merged: all that ranks must agree on, in a file."""
    data, found = make_data(), {}
    for t, merged in ((1, False), (2, False), (3, False), (3, True)):
        args = Namespace(**SETTINGS, merge_batchnorm=merged)
        epoch = f"task {t}, merged {merged}"
        generator = torch.Generator().manual_seed(t)
        logits = torch.randn(2, 23, 2 * t - 2, generator=generator, dtype=torch.float64)
        task = trainer.make_task(data, t, (data.pool, *logits) if t > 1 else ())
        model = trainer.make_model(args, torch.device("cpu"), t).double()
        optimizer, progress = trainer.make_optimizer(model, args, args.lr), trainer.Progress()
        for _ in trainer.train_epoch(model, optimizer, task, args, f"task{t}", progress):
            step = f"{epoch}, step {progress.batch}: "
            found[f"{step}loss"] = torch.as_tensor(progress.total_loss).clone()
            found |= {f"{step}{name}": torch.as_tensor(x) for name, x in progress.parts.items()}
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[f"{step}gradient of {name}"] = parameter.grad.clone()
            found |= {f"{step}{name}": x.clone() for name, x in model.state_dict().items()}
        evaluated = trainer.evaluate(model, data.val, t, data, 7)
        found[f"{epoch}, confusion"] = torch.tensor(evaluated["confusion"])
        found[f"{epoch}, features"] = trainer.extract_features(model, data.pool, data, 7)
    if ranks.rank() == 0:
        torch.save(found, out)


def query(out):
    """Queries of small pools, with ties, by few and many exemplars; the last takes all."""
    found, generator = {}, torch.Generator().manual_seed(0)
    for number, (m, n, num) in enumerate([(5, 40, 3), (4, 7, 1), (3, 1, 1), (9, 30, 4)]):
        exemplars, pool = (torch.randn(k, 6, generator=generator).round() for k in (m, n))
        found[number] = teaching.query(exemplars, pool, num)
    if ranks.rank() == 0:
        torch.save(found, out)


def change(what, flags, load=dataset.load):
    """The flags of this rank, when `what` is wrong: flags of rank 1, images, or its GPUs."""

    def changed(*args, **kwargs):
        data = load(*args, **kwargs)
        if what == "few images":
            data.train = {c: images[: c == data.order[0]] for c, images in data.train.items()}
        elif ranks.rank():
            data.test[data.order[0]][0] += 1
        return data

    if what == "GPUs":
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2 * ranks.rank()
        return flags
    if what in ("few images", "other images"):
        dataset.load = changed
        return flags
    return [*flags, *what.split()] if ranks.rank() else flags


def main():
    dataset.normalize = normalize
    script, *flags = sys.argv[1:]
    if script in ("steps", "query"):
        return globals()[script](*flags)
    if script == "rank 1:":
        what, script, *flags = flags
        flags = change(what, flags)
    if ranks.rank():  # rank 0 alone reads and writes the run's folder
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")
    make_model = trainer.make_model
    trainer.make_model = lambda *args: make_model(*args).double()
    return importlib.import_module(script.removesuffix(".py")).main(flags)


if __name__ == "__main__":
    run_script(main, parallel=True)
