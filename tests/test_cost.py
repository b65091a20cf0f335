"""models/cost.py against hand counts, every product written out, and the bytes of tensors."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import pruning_utils
from models import build_model
from models.cost import cost


def flags(arch, width, classes=10):
    tasks = {"classifiers": classes // 2, "classes_per_classifier": 2}
    return Namespace(arch=arch, width=width, precision="fp32", **tasks)


@pytest.mark.parametrize(
    "arch, width, side, millions",
    [
        ("resnet18", 64, 32, 555.4),
        ("resnet18", 64, 64, 2221.7),
        ("resnet18", 16, 32, 35.0),
        ("resnet32", 16, 32, 68.9),
    ],
)
def test_multiply_accumulates_of_the_dense_networks(arch, width, side, millions):
    found = cost(flags(arch, width), [side, side], {})
    assert round(found["macs"] / 1e6, 1) == millions
    assert found["macs_percent"] == 100
    assert found["state_dict_bytes"] == found["packed_bytes"]
    with pytest.raises(ValueError, match="densities"):
        cost(flags(arch, width), [side, side], {"conv1": 50.0})


@pytest.mark.parametrize("arch", ["resnet18", "resnet32"])
def test_cost_of_a_ticket(arch):
    """On an image that is not square, with each product of a convolution written out."""
    torch.manual_seed(0)
    args = flags(arch, 5, classes=6)  # 5 * 3 * 9 weights are not whole bytes of mask bits
    model = build_model(args).eval()
    masks = {n: torch.rand(w.shape) for n, w in pruning_utils.weights(model).items()}
    masks = {name: (mask < 1 / 3).float() for name, mask in masks.items()}
    pruning_utils.apply_mask(model, masks)
    products = [head.weight.numel() for head in model.linear_main]

    def write_out(mask):
        def hook(conv, inputs, output):
            columns = F.unfold(inputs[0], conv.kernel_size, 1, conv.padding, conv.stride)[0]
            terms = mask.flatten(1)[:, :, None] * torch.ones_like(columns)
            products.append(int(terms.count_nonzero()))

        return hook

    for name, conv in pruning_utils.convolutions(model).items():
        conv.register_forward_hook(write_out(masks[name]))
    model(torch.rand(1, 3, 16, 24), main_fc=True)
    found = cost(args, (16, 24), pruning_utils.densities(masks))
    dense = cost(args, (16, 24), {})
    left = sum(int(mask.sum()) for mask in masks.values())
    state = {key: tensor.nbytes for key, tensor in model.state_dict().items()}
    others = sum(n for key, n in state.items() if "weight_orig" not in key and "mask" not in key)
    bits = sum(-(-mask.numel() // 8) for mask in masks.values())
    assert found == {
        "weights": left,
        "macs": sum(products),
        "macs_percent": pytest.approx(100 * sum(products) / dense["macs"]),
        "state_dict_bytes": sum(state.values()),
        "packed_bytes": others + 4 * left + bits,
    }
