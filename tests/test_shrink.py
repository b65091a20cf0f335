"""Shrinking (models/shrink.py): narrower networks that compute the same, in float64."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import pruning_utils
import utils
from models import BACKBONES
from models.batchnorm import BatchNorm2d
from models.cost import layers_of, macs, parameters, weights
from models.shrink import Block, ShrunkNet, shrink_network

ROOT = Path(__file__).parent.parent
BU = json.loads((ROOT / "results/reduced/seed0/BU/results.json").read_text())

# density of each layer, and layers (by the ends of their names) without any weight
CASES = {
    "10 %": (0.1, ()),
    "3 %": (0.03, ()),
    "1 %": (0.01, ()),
    "a bottom-up ticket": (BU["states"][-1]["layer_density"], ()),
    "no stem": (0.2, ("conv1",)),
    "no last convolution": (0.1, ("layer1.0.conv2", "layer2.1.conv2", "layer3.0.conv2")),
    "no first convolution": (0.1, ("layer1.0.conv1", "layer2.0.conv1", "layer3.1.conv1")),
    "no shortcut": (0.3, ("shortcut.0",)),
    "only shortcuts": (0.3, (".conv1", ".conv2")),
    "nothing": (0.0, ()),
    "everything": (1.0, ()),
}


def network(arch, width, generator):
    """A float64 network with random weights and BatchNorms, some with a scale of 0 or below."""

    def random(like):
        return torch.randn(like.shape, generator=generator).double()

    model = BACKBONES[arch](2, 3, width).double().eval()
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.copy_(random(values))
            module.running_var.copy_(0.1 + random(module.running_var) ** 2)
            module.weight.data[3::7] = 0
        elif isinstance(module, nn.Conv2d):
            module.weight.data = random(module.weight)
    return model


def random_masks(model, density, empty, generator):
    """Masks of this density (or {layer: percent}) in each layer, but 0 where `empty` says so."""
    masks = {}
    for name, weight in pruning_utils.weights(model).items():
        share = density[name] / 100 if isinstance(density, dict) else density
        share = 0 if name.endswith(empty) and empty else share
        masks[name] = (torch.rand(weight.shape, generator=generator) < share).double()
    return masks


def compute(model, x):
    """Features and the balanced logits of two heads."""
    with torch.no_grad():
        return model(x, is_feature=True), model(x, 2, main_fc=True)


def difference(one, other, x):
    """The largest difference between what two networks compute, on the scale of the values."""
    pairs = zip(compute(one, x), compute(other, x))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


@pytest.mark.parametrize("size", [(9, 9), (13, 18)], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ["resnet18", "resnet32"])
def test_a_shrunk_network_computes_the_same(arch, case, size):
    density, empty = CASES[case]
    if isinstance(density, dict) and arch == "resnet32":
        pytest.skip("the ticket is one of resnet18")
    generator = utils.stream(0, arch, case, size)
    model = network(arch, 12, generator)
    pruning_utils.apply_mask(model, random_masks(model, density, empty, generator))
    shrunk = shrink_network(model, size).eval()
    x = torch.randn(3, 3, *size, generator=generator).double()
    assert difference(shrunk, model, x) < 1e-12
    again = ShrunkNet(shrunk.state_dict()).eval()
    assert difference(again, shrunk, x) == 0
    if case != "everything":
        old, new = (layers_of(each, size) for each in (model, shrunk))
        assert macs(new) < macs(old) and weights(new) < weights(old)
    for conv1, conv2 in ((b.conv1, b.conv2) for b in blocks(shrunk) if b.conv1):
        # nothing is left to remove: each channel between them is written and read
        assert conv1.weight.any(-1).any(-1).any(1).all()
        assert conv2.weight.any(-1).any(-1).any(0).all()
        assert conv2.weight.any(-1).any(-1).any(1).all()


def blocks(shrunk):
    return [module for module in shrunk.modules() if isinstance(module, Block)]


def only(model, **kept):
    """Put a model under masks without any weight but those at {layer: index} (layer1_0_conv1)."""
    masks = {
        name: torch.zeros_like(weight) for name, weight in pruning_utils.weights(model).items()
    }
    for name, index in kept.items():
        masks[name.replace("_", ".")][index] = 1
    pruning_utils.apply_mask(model, masks)


def test_counts_by_hand():
    """One path of single channels through the shortcuts, 16x16 images, heads of 3 x 2 classes."""
    model = network("resnet18", 2, utils.stream(0, "path"))
    path = {"layer2_0_shortcut_0": (1, 0), "layer3_0_shortcut_0": (2, 1)}
    only(model, conv1=(0, 1, 1, 1), **path, layer4_0_shortcut_0=(3, 2))
    shrunk = shrink_network(model, (16, 16))
    conv1, heads = 3 * 3 * 3, 16 * 6  # the stem keeps its three input channels
    assert macs(layers_of(shrunk, (16, 16))) == conv1 * 256 + 64 + 16 + 4 + heads
    shortcuts = 3 * (1 + 1 + 1)  # weight, scale and shift
    assert parameters(shrunk) == conv1 + shortcuts + 16 + heads + 6  # 16: the constant features
    assert {name: len(getattr(shrunk, name)) for name in ("layer2", "layer3", "layer4")} == {
        "layer2": 1,
        "layer3": 1,
        "layer4": 1,
    }
    assert not hasattr(shrunk, "layer1")


@pytest.mark.parametrize("beta, sent", [(3.0, 3.0), (-3.0, 0.0)])
def test_a_constant_channel_at_the_border(beta, sent):
    """conv2 of ones reads a channel without weights before it: 9, 6 or 4 times relu(beta)."""
    model = network("resnet18", 2, utils.stream(0, "border"))
    path = {"layer2_0_shortcut_0": (0, 0), "layer3_0_shortcut_0": (0, 0)}
    only(model, conv1=0, layer1_0_conv2=(0, 1), **path, layer4_0_shortcut_0=(0, 0))
    for norm in (model.layer1[0].bn2, model.layer2[0].bn1):
        norm.weight.data.fill_(1)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        norm.bias.data.fill_(beta)
    model.layer1[0].conv2.weight_orig.data.fill_(1)
    shift = shrink_network(model, (9, 11)).layer2["0"].shift[0]
    expected = torch.full((9, 11), 9 * sent)
    expected[[0, -1]] = 6 * sent
    expected[:, [0, -1]] = 6 * sent
    expected[0, 0] = expected[0, -1] = expected[-1, 0] = expected[-1, -1] = 4 * sent
    assert shift.shape == ((9, 11) if sent else (1, 1))
    torch.testing.assert_close(shift.float().expand(9, 11), expected + beta)


def test_precision_and_what_is_refused():
    """The shrunk network has the model's dtype; other backbones and image sizes are refused."""
    generator = utils.stream(0, "float32")
    model = network("resnet18", 8, generator).float()
    pruning_utils.apply_mask(model, random_masks(model, 0.2, (), generator))
    shrunk = shrink_network(model, (16, 16)).eval()
    x = torch.randn(8, 3, 16, 16, generator=generator)
    assert difference(shrunk, model, x) < 1e-5
    assert difference(ShrunkNet(shrunk.state_dict(), bf16=True).eval(), model, x) < 0.1
    with pytest.raises(ValueError, match="takes images of"):
        shrunk(x[:, :, :9], 2, main_fc=True)
    with pytest.raises(ValueError, match="cannot be shrunk"):
        shrink_network(shrunk, (16, 16))


@pytest.mark.parametrize("arch", ["resnet18", "resnet32"])
def test_damaged_states_are_refused(arch):
    generator = utils.stream(0, "damage", arch)
    model = network(arch, 6, generator)
    pruning_utils.apply_mask(model, random_masks(model, 0.2, (), generator))
    state = shrink_network(model, (9, 9)).state_dict()
    # what makes another network that fits together: without a ReLU, or with a channel more
    fits = {"missing": r".*\.after|conv1\.shift"}
    if arch == "resnet18":
        fits["one channel more"] = r"conv1\.weight|.*\.(carry|shortcut\.weight)"
    one_of_a_kind = {re.sub(r"\d", "", key): key for key in state}
    for key in one_of_a_kind.values():
        value = state[key]
        damaged = {
            "missing": None,
            "one more dimension": value[None],
            "another dtype": value.to(torch.int32),
            "one channel more": torch.cat([value, value[-1:]]),
            "not finite": value / 0 if value.is_floating_point() else value - 10**6,
        }
        for what, tensor in damaged.items():
            others = {k: v for k, v in state.items() if k != key}
            broken = others if tensor is None else others | {key: tensor}
            if re.fullmatch(fits.get(what, "-"), key):
                continue
            with pytest.raises(ValueError, match="it lacks|does not"):
                ShrunkNet(broken)
    with pytest.raises(ValueError, match="does not belong"):
        ShrunkNet(state | {"more": torch.zeros(1)})
