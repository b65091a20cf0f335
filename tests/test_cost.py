"""models/cost.py against hand counts, brute force, files, and the records of results/reduced."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pruning_utils
from models import build_model
from models.cost import HEADS, cost, layer_macs
from runtime import packed
from runtime.checkpoint import save_checkpoint
from tools import report

ROOT = Path(__file__).parent.parent
CONV = 3 * 3


def stage(side, inputs, outputs, convs, shortcut=True):
    """MACs of a stage: 3x3 convolutions, the first from `inputs` channels, and a 1x1 shortcut."""
    first, others = inputs * outputs * CONV, (convs - 1) * outputs**2 * CONV
    return side**2 * (first + others + shortcut * inputs * outputs)


def resnet18(width, side, classes):
    w = width
    stages = stage(side, w, w, 4, shortcut=False) + stage(side // 2, w, 2 * w, 4)
    stages += stage(side // 4, 2 * w, 4 * w, 4) + stage(side // 8, 4 * w, 8 * w, 4)
    return side**2 * 3 * w * CONV + stages + 8 * w * classes


def resnet32(width, side, classes):
    w = width
    stages = stage(side, w, w, 10, shortcut=False) + stage(side // 2, w, 2 * w, 10, shortcut=False)
    stages += stage(side // 4, 2 * w, 4 * w, 10, shortcut=False)
    return side**2 * 3 * w * CONV + stages + 4 * w * classes


def flags(arch, width, classes=10):
    return Namespace(
        arch=arch, width=width, classifiers=classes // 2, classes_per_classifier=2, precision="fp32"
    )


@pytest.mark.parametrize(
    "arch, width, side, by_hand, millions",
    [
        ("resnet18", 64, 32, resnet18, 555.4),
        ("resnet18", 64, 64, resnet18, 2221.7),
        ("resnet18", 16, 32, resnet18, 35.0),
        ("resnet32", 16, 32, resnet32, 68.9),
    ],
)
def test_multiply_accumulates_of_the_dense_networks(arch, width, side, by_hand, millions):
    found = cost(flags(arch, width), (side, side), {})
    assert found["macs"] == by_hand(width, side, 10)
    assert round(found["macs"] / 1e6, 1) == millions
    assert found["macs_percent"] == 100
    if (arch, width) == ("resnet18", 64):
        assert found["weights"] == 11_159_232  # SPEC section 3


@pytest.fixture(params=["resnet18", "resnet32"])
def ticket(request):
    """Flags of a tiny network, and the network under a mask of a third of its weights."""
    torch.manual_seed(0)
    args = flags(request.param, 4, classes=6)
    model = build_model(args).eval()
    masks = {n: torch.rand(w.shape) for n, w in pruning_utils.weights(model).items()}
    masks = {name: (mask < 1 / 3).float() for name, mask in masks.items()}
    pruning_utils.apply_mask(model, masks)
    return args, model, masks


def test_what_remains_is_every_product_with_a_weight_that_remains(ticket):
    """On an image that is not square, with each product of a convolution written out."""
    args, model, masks = ticket
    products = {HEADS: sum(head.weight.numel() for head in model.linear_main)}

    def write_out(name):
        def hook(conv, inputs, output):
            columns = F.unfold(inputs[0], conv.kernel_size, 1, conv.padding, conv.stride)[0]
            terms = masks[name].flatten(1)[:, :, None] * torch.ones_like(columns)
            products[name] = int(terms.count_nonzero())

        return hook

    for name, conv in pruning_utils.convolutions(model).items():
        conv.register_forward_hook(write_out(name))
    model(torch.rand(1, 3, 16, 24), main_fc=True)
    densities = pruning_utils.densities(masks)
    found = cost(args, (16, 24), densities)
    assert found["macs"] == sum(products.values())
    assert found["weights"] == sum(int(mask.sum()) for mask in masks.values())
    dense = cost(args, (16, 24), {})["macs"]
    layers = layer_macs(args, (16, 24), densities)
    expected = {name: pytest.approx(100 * n / dense) for name, n in products.items()}
    assert {name: left for name, (left, _) in layers.items()} == expected
    assert sum(whole for _, whole in layers.values()) == pytest.approx(100)


@pytest.mark.parametrize("pruned", [True, False])
def test_bytes_of_a_checkpoint_are_those_of_its_file(ticket, pruned, tmp_path):
    args, model, masks = ticket
    if not pruned:
        pruning_utils.remove_mask(model)
    save_checkpoint(tmp_path / "state.pt", model.state_dict())
    densities = pruning_utils.densities(masks) if pruned else {}
    found = cost(args, (32, 32), densities)["checkpoint_bytes"]
    around = (tmp_path / "state.pt").stat().st_size - found  # names and the zip file's headers
    assert 0 < around < 1000 + 400 * len(model.state_dict())


@pytest.mark.parametrize("pruned", [True, False])
def test_packed_bytes_are_those_of_the_arrays_of_a_packed_file(ticket, pruned):
    args, model, masks = ticket
    if not pruned:
        pruning_utils.remove_mask(model)
    header = vars(args) | {"kind": "ticket" if pruned else "dense", "half": False}
    found = sum(array.nbytes for array in packed.pack(header, model.state_dict()).values())
    densities = pruning_utils.densities(masks) if pruned else {}
    assert cost(args, (32, 32), densities)["packed_bytes"] == found


def test_densities_of_other_layers_are_an_error():
    with pytest.raises(ValueError, match="densities"):
        cost(flags("resnet18", 4), (32, 32), {"conv1": 50.0})


def test_the_sparser_tickets_of_the_reduced_protocol_cost_more():
    """The figures of docs/evidence-small.md, of three seeds."""
    folders = sorted((ROOT / "results" / "reduced").glob("seed*/*"))
    groups = report.group([run for folder in folders for run in report.read(folder)])
    macs, density = {"TD": [], "BU": []}, {"TD": [], "BU": []}
    for one in groups:
        if (name := one["label"].split()[0]) in macs:
            macs[name] += one["macs"][5].values()
            density[name] += one["density"][5].values()
    found = {name: [f"{f(values):.1f}" for f in (min, max)] for name, values in macs.items()}
    assert found == {"TD": ["16.0", "16.6"], "BU": ["21.6", "24.8"]}
    assert max(density["BU"]) < min(density["TD"])
