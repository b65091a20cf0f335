"""tools.export and tools.pack --shrink: files that compute the same, who reads them, bad input."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from sets import check_error, check_rejected

import dataset
import main_train
import pruning_utils
import test as test_script
from models import BACKBONES
from models.batchnorm import BatchNorm2d
from runtime import packed
from tools import classify, export, pack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import shrink as benchmark

ROOT = Path(__file__).parent.parent
SPEC = dataset.DATASETS["digits"]
HEADER = {
    "kind": "ticket",
    "half": False,
    "dataset": "digits",
    "class_order": [4, 2, 7, 6, 9, 0],
    "class_names": ["4", "2", "7", "6", "9", "0"],
    "mean": [*SPEC.mean],
    "std": [*SPEC.std],
    "image_size": [32, 32],
    "state": 2,
    "accuracy": [90.0, 80.0],  # test, percent
}


@pytest.fixture(autouse=True)
def ticket(tmp_path, monkeypatch):
    """ticket.npz in the current folder, of random weights: 3 tasks of 2 digits, 2 learned."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = BACKBONES["resnet18"](2, 3, 4)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
    weights = pruning_utils.weights(model)
    masks = {name: (torch.rand(weight.shape) < 0.1).float() for name, weight in weights.items()}
    pruning_utils.apply_mask(model, masks)
    header = dict.fromkeys(packed.FIELDS) | HEADER | packed.describe_network(model.state_dict())
    header["density"] = pruning_utils.density(masks)
    packed.write("ticket.npz", header, model.state_dict())
    return model.eval()


def run_pack(*argv):
    return pack.main(argv)


def run_export(*argv):
    return export.main(argv)


# ------------------------------------------------------------------------------ shrunk files


def test_a_shrunk_file(ticket, capsys):
    """test.py and tools.classify take it and find the same; main_train.py and tools.pack do not."""
    header = run_pack("ticket.npz", "--shrink", "--out", "shrunk.npz")
    assert "multiply-accumulates" in capsys.readouterr().out
    assert header == packed.read_header("shrunk.npz")
    assert header["shapes"]["conv1.weight"][1:] == [3, 3, 3]
    flags = ["--device", "cpu", "--batch_size", "100"]
    results = [
        test_script.main(["--pretrained", "ticket.npz", "--pruned", *flags]),
        test_script.main(["--pretrained", "shrunk.npz", *flags]),
    ]
    rows = [result["states"][0] for result in results]
    for key in ("accuracy", "task_aware", "confusion", "density"):
        assert rows[0][key] == rows[1][key]
    before = pruning_utils.network_record({}, Namespace(**header), Namespace(image_size=(32, 32)))
    assert rows[1]["cost"]["macs"] < before["cost"]["macs"]
    picture = str(ROOT / "docs/demo.png")
    shares = [
        classify.main(["--pretrained", name, picture]) for name in ("ticket.npz", "shrunk.npz")
    ]
    torch.testing.assert_close(*shares)
    retrain = ["--mask", "ticket.npz", "--state", "2", "--save_dir", "run"]
    message = "shrunk.npz: is a shrunk network, which can only be evaluated"
    check_rejected(lambda: main_train.main(["--weight", "shrunk.npz", *retrain]), message)
    check_rejected(
        lambda: test_script.main(["--pretrained", "shrunk.npz", "--pruned", *flags]),
        "found a dense model, leave out --pruned",
    )
    for flag in ("--shrink", "--unpack"):
        again = ["shrunk.npz", flag, "--out", "again.npz"]
        check_rejected(lambda again=again: run_pack(*again), "is a shrunk network")


@pytest.mark.parametrize("kept", [0, 1])
def test_all_and_nothing_is_shrunk(ticket, kept):
    """A network without any weight is a constant; its file, with empty arrays, reads as well."""
    masks = {name: torch.full_like(w, kept) for name, w in pruning_utils.weights(ticket).items()}
    pruning_utils.apply_mask(ticket, masks)
    header = packed.read_header("ticket.npz") | {"density": 100.0 * kept}
    header, shrunk = pack.shrink("ticket.npz", header, ticket)
    packed.write("shrunk.npz", header, shrunk.state_dict())
    _, back = packed.read_shrunk("shrunk.npz")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(back.eval()(x, main_fc=True), ticket(x, main_fc=True))


# ------------------------------------------------------------------------------ exported files


@pytest.mark.parametrize("flags", [[], ["--shrink", "--float_input"]], ids=["masked", "shrunk"])
def test_onnx(ticket, flags, capsys):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run_export("ticket.npz", "--out", "model.onnx", *flags)
    assert "compared with PyTorch on 120 test images" in capsys.readouterr().out
    properties = {each.key: each.value for each in onnx.load("model.onnx").metadata_props}
    assert json.loads(properties["class_names"]) == ["4", "2", "7", "6"]
    assert json.loads(properties["accuracy"]) == HEADER["accuracy"]
    session = runtime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    images = np.random.RandomState(0).randint(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    mean, std = (np.array(HEADER[key], np.float32) for key in ("mean", "std"))
    x = torch.from_numpy((images / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = ticket(x, 2, main_fc=True).numpy()
    images = images / np.float32(255) if flags else images
    for n in (1, 5):
        (logits,) = session.run(None, {"images": images[:n]})
        np.testing.assert_allclose(logits, expected[:n], rtol=1e-4, atol=1e-5)


def test_pt2(ticket):
    run_pack("ticket.npz", "--shrink", "--out", "shrunk.npz")
    run_export("shrunk.npz", "--out", "model.pt2", "--state", "3")
    extra = {"metadata.json": ""}
    module = torch.export.load("model.pt2", extra_files=extra).module()
    metadata = json.loads(extra["metadata.json"])
    assert metadata["class_names"] == HEADER["class_names"]
    assert metadata["state"] == 3 and "accuracy" not in metadata
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    expected = export.Predictor(ticket, HEADER, 3)(images)
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_file_is_not_written(monkeypatch):
    monkeypatch.setattr(export, "to_pt2", lambda *_: b"")
    monkeypatch.setattr(export, "load_exported", lambda *_: lambda x: torch.zeros(len(x), 4))
    check_rejected(lambda: run_export("ticket.npz", "--out", "a.pt2"), "differs too much")


BAD = {
    "another ending": (["--out", "a.pt"], "--out a.pt: give a name that ends in .onnx or .pt2"),
    "no such task": (["--out", "a.pt2", "--state", "4"], "--state 4: give a task from 1 to 3"),
    "embedded": (["--out", "a.pt2", "--data", "."], "digits is part of this repository"),
    "it knows its set": (["--out", "a.pt2", "--dataset", "digits"], "tells it itself"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case):
    argv, message = BAD[case]
    check_rejected(lambda: run_export("ticket.npz", *argv), message)


def test_what_is_missing(monkeypatch):
    for key in ("mean", "image_size"):
        header, state = packed.read("ticket.npz")
        packed.write("unknown.npz", header | {key: None}, state)
        message = f"unknown.npz: {key} is unknown"
        check_rejected(lambda: run_export("unknown.npz", "--out", "a.pt2"), message)
    check_rejected(lambda: run_pack("unknown.npz", "--shrink", "--out", "a.npz"), message)
    check_rejected(lambda: run_pack("none.npz", "--out", "ticket.npz"), "none.npz: no such file")
    Path("text.npz").write_text("x")
    check_rejected(lambda: run_pack("text.npz", "--out", "a.npz"), "text.npz: not a packed file")
    packed.write("cifar.npz", header | {"dataset": "cifar10", "image_size": [32, 32]}, state)
    message = "--data .: holds neither a prepared cifar10 set"
    check_rejected(lambda: run_export("cifar.npz", "--out", "a.pt2", "--data", "."), message)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "needs the packages onnx and onnxscript and onnxruntime, type: pip install -r"
    check_rejected(lambda: run_export("ticket.npz", "--out", "a.onnx"), message)


def test_images_of_a_set_that_is_not_here():
    header = packed.read_header("ticket.npz") | {"dataset": "cifar10"}
    images, what = export.pick_images(Namespace(checkpoint="ticket.npz", data=None), header, 2)
    assert images.shape == (500, 32, 32, 3) and images.dtype == torch.uint8
    assert what.startswith("random images (no prepared cifar10 set here")


def test_benchmark(capsys):
    argv = ["ticket.npz", "--threads", "1", "--batch_sizes", "1,2", "--repeats", "1"]
    lines = benchmark.main([*argv, "--seconds", "1e-9"])
    assert [line.split(" | ")[2] for line in lines[2:]] == ["masked", "folded", "shrunk"]
    check_error(lambda: benchmark.main([*argv, "--threads", "0"]), "give numbers of at least 1")
