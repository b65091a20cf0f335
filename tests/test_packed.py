"""Packed files: bit for bit there and back, their size, what they tell, and who reads them."""

import json
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sets import check_error

import dataset
import main_BU
import main_TD
import main_train
import pruning_utils
import test as test_script
from models import BACKBONES, ResNet18, build_model
from runtime import packed
from runtime.checkpoint import load_checkpoint, read_state_dict
from runtime.files import file_checksum
from tools import classify, pack

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def network(arch="resnet18", width=4, share=0.3):
    """The header and the state dict of a network under random masks; share 1: a dense one.

    The BatchNorm parameters and statistics are not the initial ones.
    """
    torch.manual_seed(0)
    model = BACKBONES[arch](2, 3, width)
    model.train()(torch.rand(8, 3, 16, 16), main_fc=True)
    if share < 1:
        weights = pruning_utils.weights(model)
        masks = {name: (torch.rand(w.shape) < share).float() for name, w in weights.items()}
        pruning_utils.apply_mask(model, masks)
    header = dict.fromkeys(packed.FIELDS) | packed.describe_network(model.state_dict())
    header["half"] = False
    header["density"] = pruning_utils.density(pruning_utils.masks_of(model))
    return header, pruning_utils.clone_state(model)


def rounded(header, state):
    """The state as it comes back: zeros outside the masks, float16 values if the header says so."""
    _, convolutions = packed.tensors_of(header)
    expected = {}
    for key, value in state.items():
        weight = key.replace("weight_orig", "weight") in convolutions
        half = value.half().float() if weight and header["half"] else value
        expected[key] = half * state[key[:-4] + "mask"] if key.endswith("_orig") else half
    return expected


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.0, 1])
@pytest.mark.parametrize("arch", BACKBONES)
def test_there_and_back(arch, share, half):
    header, state = network(arch, share=share)
    header["half"] = half
    checksum = packed.write("a.npz", header, state)
    assert checksum == file_checksum("a.npz")
    found, back = packed.read("a.npz")
    assert found == header == packed.read_header("a.npz")
    expected = rounded(header, state)
    assert list(back) == list(expected)
    for key, value in expected.items():
        assert torch.equal(back[key], value) and back[key].dtype == value.dtype, key
    assert packed.write("b.npz", found, back) == checksum
    with np.load("a.npz", allow_pickle=False) as arrays:
        assert all(arrays[key].dtype.kind in "uif" for key in arrays.files)
        bits = [np.unpackbits(arrays[key]).sum() for key in arrays.files if key.endswith("_mask")]
    assert sum(bits) == sum(int(v.sum()) for key, v in state.items() if key.endswith("_mask"))
    if not half:  # what is outside the masks changes no output
        one, other = (build_model(Namespace(**header, precision="fp32")).eval() for _ in range(2))
        pruning_utils.load_state(one, state)
        pruning_utils.load_state(other, back)
        images = torch.rand(2, 3, 16, 16)
        assert torch.equal(one(images, main_fc=True), other(images, main_fc=True))


def test_signed_zeros_and_subnormal_weights_come_back():
    header, state = network()
    weight, mask = state["conv1.weight_orig"], state["conv1.weight_mask"]
    mask.fill_(1)
    weight.flatten()[:3] = torch.tensor([-0.0, 1e-45, -3e38])
    masks = pruning_utils.extract_mask(state)
    packed.write("a.npz", header | {"density": pruning_utils.density(masks)}, state)
    back = packed.read("a.npz")[1]["conv1.weight_orig"]
    assert back.numpy().tobytes() == weight.numpy().tobytes()
    message = "conv1.weight holds values too large for float16"
    check_error(lambda: packed.write("b.npz", header | {"half": True}, state), message)


def test_the_paper_s_network_at_4_40_percent_takes_at_most_2_4_megabytes():
    """With the densities of its layers as in a recorded ticket, at random positions."""
    rows = json.loads((ROOT / "results/reduced/seed0/TD/results.json").read_text())["states"]
    model = ResNet18(2, 5, 64)
    weights = pruning_utils.weights(model)
    share = {name: percent / 100 for name, percent in rows[4]["layer_density"].items()}
    kept = sum(share[name] * weight.numel() for name, weight in weights.items())
    scale = 0.0440 * sum(map(torch.numel, weights.values())) / kept
    torch.manual_seed(0)
    masks = {n: (torch.rand(w.shape) < scale * share[n]).float() for n, w in weights.items()}
    for weight in weights.values():
        weight.normal_()
    pruning_utils.apply_mask(model, masks)
    header = dict.fromkeys(packed.FIELDS) | packed.describe_network(model.state_dict())
    header |= {"half": False, "density": pruning_utils.density(masks)}
    assert header["density"] == pytest.approx(4.40, abs=0.01)
    packed.write("a.npz", header, model.state_dict())
    assert Path("a.npz").stat().st_size <= 2.4e6


# ------------------------------------------------------------------------------ of a run


NETWORK = "--dataset digits --classifiers 2 --width 4"
TRAIN = "--epochs 1 --batch_size 32 --device cpu"
TINY = f"{NETWORK} {TRAIN} --iter_epochs 1 --unlabel_num 1 --class_order random:5".split()


@pytest.fixture
def run_TD(few_digits):
    """The results of a tiny top-down run in the folder TD."""
    return main_TD.main([*TINY, "--prune_scheduler", "1,2", "--save_dir", "TD"])


def run_pack(*argv):
    return pack.main([*map(str, argv)])


def test_the_ticket_of_a_run(run_TD, capsys):
    source = "TD/task3_best_model.pt"
    header = run_pack(source, "--out", "ticket.npz", "--compare")
    printed = capsys.readouterr().out
    for text in ("weights and masks", f"given: {source}", "zip", "xz", "written: ticket.npz"):
        assert text in printed
    row = run_TD["states"][2]
    assert header == packed.read_header("ticket.npz")
    assert (header["accuracy"], header["density"]) == (row["accuracy"], row["density"])
    assert header["state"] == 2 and header["sha256"] == file_checksum(source)
    assert header["class_order"] == run_TD["class_order"]
    assert header["class_names"] == run_TD["class_names"]
    assert header["command"].startswith("main_TD.py")  # pytest-xdist leaves no arguments
    assert (header["dataset"], header["image_size"]) == ("digits", [32, 32])
    assert not [key for key in header if header[key] is None]
    # back, and there again, without the run's folder
    run_pack("ticket.npz", "--unpack", "--out", "back/ticket.pt")
    state, back = read_state_dict(source), read_state_dict("back/ticket.pt")
    expected = rounded(header, state)
    assert all(torch.equal(back[key], expected[key]) for key in {*back, *expected})
    run_pack("back/ticket.pt", "--out", "again.npz")
    assert Path("again.npz").read_bytes() == Path("ticket.npz").read_bytes()
    # tested like the checkpoint, without its flags
    flags = ["--pruned", "--device", "cpu"]
    given = test_script.main(["--pretrained", source, *NETWORK.split(), *flags])
    found = test_script.main(["--pretrained", "ticket.npz", *flags])
    for key in ("accuracy", "task_aware", "confusion", "density", "layer_density", "cost"):
        assert found["states"][0][key] == given["states"][0][key], key
    assert found["class_order"] == run_TD["class_order"]
    for flag, value in (
        ("dataset", "cifar10"),
        ("width", "8"),
        ("arch", "resnet32"),
        ("classifiers", "3"),
        ("classes_per_classifier", "1"),
        ("class_order", "sorted"),
    ):
        call = ["--pretrained", "ticket.npz", *flags, f"--{flag}", value]
        check_error(partial(test_script.main, call), f"--{flag} {value}", "ticket.npz")
    check_error(lambda: test_script.main(["--pretrained", "ticket.npz"]), "add --pruned")
    # away from its run, what the file lacks can be named afterwards
    shutil.copy(source, "away.pt")
    assert run_pack("away.pt", "--out", "away.npz")["dataset"] is None
    named = run_pack("away.npz", "--dataset", "digits", "--state", "2", "--out", "named.npz")
    assert (named["mean"], named["image_size"]) == (header["mean"], header["image_size"])
    assert (named["dataset"], named["state"]) == ("digits", 2)
    call = ["named.npz", "--dataset", "digits", "--out", "other.npz"]
    check_error(partial(run_pack, *call), "tells it itself")
    call = [source, "--dataset", "cifar10", "--out", "other.npz"]
    check_error(partial(run_pack, *call), "--dataset cifar10", "is of digits")
    assert not Path("other.npz").exists()
    # by default on the tasks that it has learned
    run_pack("TD/task1_best_model.pt", "--out", "first.npz")
    assert test_script.main(["--pretrained", "first.npz"])["states"][0]["state"] == 1


def test_weights_and_another_mask(run_TD):
    """main_train.py takes both as packed files; tools.pack makes one file of them."""
    run_pack("TD/task1_best_model.pt", "--out", "weight.npz")
    run_pack("TD/task2_ticket.pt", "--out", "mask.npz")
    flags = f"{TRAIN} --state 2 --save_data_path TD/data".split()
    given = [
        "--weight",
        "TD/task1_best_model.pt",
        "--mask",
        "TD/task2_ticket.pt",
        "--save_dir",
        "a",
    ]
    found = ["--weight", "weight.npz", "--mask", "mask.npz", "--save_dir", "b"]
    main_train.main([*flags, *given, *NETWORK.split()])
    main_train.main([*flags, *found])
    name = "retrain_task2_checkpoint.pt"
    one, other = read_state_dict(f"a/{name}"), read_state_dict(f"b/{name}")
    assert all(torch.equal(one[key], other[key]) for key in {*one, *other})
    call = [*flags, *found, "--width", "8"]
    check_error(lambda: main_train.main(call), "--width 8", "weight.npz", "width 4")
    call = ["TD/task1_best_model.pt", "--mask", "TD/task2_ticket.pt", "--out", "ticket.npz"]
    header = run_pack(*call)
    masks = pruning_utils.load_masks("TD/task2_ticket.pt")
    weight = read_state_dict("TD/task1_best_model.pt")["conv1.weight"]
    back = packed.read("ticket.npz")[1]
    assert torch.equal(back["conv1.weight_orig"], weight * masks["conv1"])
    assert (header["kind"], header["state"], header["accuracy"]) == ("ticket", 1, None)
    assert header["density"] == pruning_utils.density(masks)


def test_which_accuracy_is_a_checkpoint_s(tmp_path):
    rows = [
        {"state": 1, "accuracy": [1.0], "dense_accuracy": [2.0]},
        {"state": 2, "accuracy": [3.0, 4.0], "dense_accuracy": [5.0, 6.0]},
    ]
    for script, name, expected in (
        ("main_BU", "task2_best_model.pt", [5.0, 6.0]),
        ("main_BU", "task2_best_prun_model.pt", [3.0, 4.0]),
        ("main_BU", "task2_checkpoint.pt", None),
        ("main_BU", "task2_prune_weight.pt", None),
        ("main_CIL", "task2_best_model.pt", [3.0, 4.0]),
        ("main_train", "retrain_task2_best_model.pt", [3.0, 4.0]),
        ("main_train", "retrain_task2_shuffle_mask_best_model.pt", [3.0, 4.0]),
        ("main_TD", "task3_best_model.pt", None),
        ("main_TD", "mine.pt", None),
    ):
        record = {"script": script, "states": rows}
        journal = {"steps": {"task2": {"files": {name: "sum", "other.pt": "more"}}}}
        assert pack.accuracy_of(name, "sum", record, journal) == expected, name
        assert pack.accuracy_of(name, "changed", record, journal) is None
        assert pack.accuracy_of(name, "sum", record, {}) is None


def test_a_checkpoint_without_a_run(few_digits, capsys):
    header, state = network(share=1)
    torch.save(state, "task2_mine.pt")
    found = run_pack("task2_mine.pt", "--out", "a.npz")
    assert found["state"] == 2 and found["dataset"] is found["class_order"] is None
    assert "unknown: dataset" in capsys.readouterr().out
    flags = ["--dataset", "digits", "--class_order", "sorted", "--state", "1"]
    found = run_pack("task2_mine.pt", "--out", "b.npz", *flags)
    assert (found["state"], found["class_order"]) == (1, [0, 1, 2, 3, 4, 5])
    assert found["class_names"] == list("012345") and found["mean"] == [0.3066] * 3
    run_pack("a.npz", "--unpack", "--out", "lacks.pt")
    for words, *fragments in (
        ("task2_mine.pt --unpack --out c", "not a packed file", "--unpack"),
        ("none.npz --unpack --out c", "none.npz", "no such file"),
        ("task2_mine.pt --out task2_mine.pt", "--out task2_mine.pt", "itself"),
        ("task2_mine.pt --state 4 --out c", "--state 4", "from 1 to 3"),
        ("task2_mine.pt --data set --out c", "--data set: give --dataset too"),
        ("task2_mine.pt --class_order sorted --out c", "--class_order sorted: give --dataset too"),
        ("task2_mine.pt --dataset mnist --out c", "--dataset mnist", "digits"),
        ("task2_mine.pt --mask b.npz --out c", "b.npz", "no masks"),
        ("b.npz --dataset digits --out c", "--dataset digits", "b.npz", "leave the flag out"),
        ("lacks.pt --data set --out c", "--data set: give --dataset too"),
        ("b.npz --unpack --half --out c", "--half"),
        ("b.npz --unpack --out b.npz/c", "b.npz/c"),
    ):
        check_error(partial(run_pack, *words.split()), *fragments)
    assert not Path("c").exists()
    forged = load_checkpoint("task2_mine.pt") | {}
    for change in ({"width": 8, "extra": 1}, {"state": "two"}, {"class_order": [1]}):
        torch.save({"state_dict": forged, "packed": header | change}, "forged.pt")
        check_error(lambda: run_pack("forged.pt", "--out", "c"), "forged.pt")
    for record in ('{"script": "main_CIL"}', '{"config": []}', '{"config": {"dataset": ["x"]}}'):
        Path("results.json").write_text(record)
        Path("run.json").write_text('{"finished": true}')
        check_error(lambda: run_pack("task2_mine.pt", "--out", "c"), "task2_mine.pt")


# ------------------------------------------------------------------------------ classify


def test_pictures_are_classified_as_test_py_does(few_digits, capsys):
    main_BU.main([*TINY, "--max_iter_prun", "2", "--deacc", "50", "--save_dir", "BU"])
    args = Namespace(dataset="digits", class_order=None, classifiers=2, classes_per_classifier=2)
    args.__dict__ |= {"data": None, "raw": None, "unlabeled": None}
    data = dataset.load(args, torch.device("cpu"), checkpoint="BU/x.pt", pool=False)
    images = data.of_tasks(data.test, 1, 2)[0][::5]
    for number, image in enumerate(images.numpy()):
        Image.fromarray(image).save(f"{number}.png")
    Image.fromarray(np.pad(images[0].numpy(), ((0, 0), (8, 8), (0, 0)))).save("wide.bmp")
    run_pack("BU/task2_best_prun_model.pt", "--out", "ticket.npz")
    capsys.readouterr()
    pictures = ["wide.bmp", *(f"{number}.png" for number in range(len(images)))]
    packed_shares = classify.main(["--pretrained", "ticket.npz", *pictures])
    lines = capsys.readouterr().out.splitlines()
    shares = classify.main(["--pretrained", "BU/task2_best_prun_model.pt", *pictures])
    assert torch.equal(shares, packed_shares)
    assert capsys.readouterr().out.splitlines() == lines and len(lines) == 1 + len(pictures)
    model = build_model(Namespace(**packed.read_header("ticket.npz"), precision="fp32")).eval()
    pruning_utils.load_state(model, read_state_dict("BU/task2_best_prun_model.pt"))
    expected = model(dataset.normalize(images, data), main_fc=True).softmax(1)
    torch.testing.assert_close(shares[1:], expected)
    torch.testing.assert_close(shares[0], expected[0])  # the center square of the wide one
    best = [data.names[data.order[i]] for i in shares.argmax(1)]
    for line, name, row, picture in zip(lines[1:], best, shares, pictures):
        assert line.split()[:3] == [picture, name, f"{100 * row.max():.1f}"]
    first = classify.main(["--pretrained", "ticket.npz", "--state", "1", "--top", "2", "0.png"])
    torch.testing.assert_close(first[0], expected[0, :2] / expected[0, :2].sum())
    for flags, *fragments in (
        ("--state 3 0.png", "--state 3", "from 1 to 2"),
        ("nothing.png", "nothing.png"),
        ("ticket.npz", "ticket.npz", "not a readable image"),
    ):
        call = ["--pretrained", "ticket.npz", *flags.split()]
        check_error(partial(classify.main, call), *fragments)
    Path("alone").mkdir()
    Path("BU/task2_best_model.pt").rename("alone/x.pt")
    call = ["--pretrained", "alone/x.pt", "0.png"]
    check_error(lambda: classify.main(call), "alone/x.pt", "mean is unknown", "--dataset")
