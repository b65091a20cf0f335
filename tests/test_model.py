"""The networks against docs/METHOD.md section 3: plain ones, sizes, initial values, mismatches."""

from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

from models import BACKBONES, build_model
from models.base import dense_state
from models.batchnorm import BatchNorm2d

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64
ARCHS = pytest.mark.parametrize("arch", ["resnet18", "resnet32"])


def make(arch="resnet18"):
    """A narrow network in float64 whose BatchNorm values are far from 0 and 1."""
    torch.manual_seed(0)
    model = BACKBONES[arch](2, 3, width=4).double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for values in (norm.weight.data, norm.running_var):
            values.uniform_(0.5, 2)
        for values in (norm.bias.data, norm.running_mean):
            values.normal_()
    return model


def images(n=3, height=16, width=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, height, width, generator=generator).double()


# ------------------------------------------------------------------------------ features


class Plain:
    """The networks in eval mode, from the state dict alone."""

    def __init__(self, state):
        self.state = state

    def conv(self, x, name, stride=1, padding=1):
        return F.conv2d(x, self.state[f"{name}.weight"], stride=stride, padding=padding)

    def norm(self, x, name):
        keys = "running_mean", "running_var", "weight", "bias"
        mean, var, weight, bias = (self.state[f"{name}.{key}"].view(-1, 1, 1) for key in keys)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def resnet18(self, x):
        x = self.conv(x, "conv1")
        for layer, block in [(layer, block) for layer in (1, 2, 3, 4) for block in (0, 1)]:
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            h = self.norm(x, f"{name}.bn1").clamp(min=0)
            shortcut = self.conv(h, f"{name}.shortcut.0", 2, padding=0) if stride == 2 else x
            out = self.norm(self.conv(h, f"{name}.conv1", stride), f"{name}.bn2").clamp(min=0)
            x = self.conv(out, f"{name}.conv2") + shortcut
        return x

    def resnet32(self, x):
        x = self.norm(self.conv(x, "conv1"), "bn1").clamp(min=0)
        for layer, block in [(layer, block) for layer in (1, 2, 3) for block in range(5)]:
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = self.norm(self.conv(x, f"{name}.conv1", stride), f"{name}.bn1").clamp(min=0)
            out = self.norm(self.conv(out, f"{name}.conv2"), f"{name}.bn2")
            x = x[:, :, ::stride, ::stride]
            zeros = x.new_zeros(len(x), out.shape[1] - x.shape[1], *x.shape[2:])
            x = (out + torch.cat([x, zeros], dim=1)).clamp(min=0)
        return x


@ARCHS
@pytest.mark.parametrize("size", [(16, 16), (17, 22)])
def test_features_equal_those_of_the_plain_network(arch, size):
    model, x = make(arch).eval(), images(3, *size)
    expected = getattr(Plain(model.state_dict()), arch)(x).mean((2, 3))
    torch.testing.assert_close(model(x, is_feature=True), expected, **CLOSE)


LAYOUTS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "some channels": lambda x: x[:, 1:3],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_groups_of_any_layout_are_normalized(layout):
    generator = torch.Generator().manual_seed(0)
    x = layout(torch.randn(9, 4, 6, 8, generator=generator, dtype=torch.float64)).requires_grad_()
    norm, plain = (BatchNorm2d(x.shape[1]).double().train() for _ in range(2))
    norm.groups, wanted = ((2, 1), (4, 1), (3, 1)), torch.cat([*map(plain, x.split([2, 4, 3]))])
    found, slope = norm(x), torch.randn(x.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, **CLOSE)
    gradients = (torch.autograd.grad((y * slope).sum(), x)[0] for y in (found, wanted))
    torch.testing.assert_close(*gradients, **CLOSE)


# ------------------------------------------------------------------------------ heads and sizes


def test_logits_are_those_of_the_first_heads_of_one_kind():
    model = make().eval()
    state, features = model.state_dict(), model(images(), is_feature=True)
    for main_fc, name in ((True, "linear_main"), (False, "linear")):
        single = [
            features @ state[f"{name}.{t}.weight"].T + state[f"{name}.{t}.bias"] for t in range(3)
        ]
        for k in (1, 2, 3, None):
            found = model(images(), out_idx=k, main_fc=main_fc)
            torch.testing.assert_close(found, torch.cat(single[:k], dim=1))
    with pytest.raises(TypeError, match="main_fc=True"):
        model(images(), 2)


@pytest.mark.parametrize(
    "arch, width, features, conv_weights, parameters",
    [
        ("resnet18", 64, 512, 11_159_232, 11_166_016),
        # 464,154 in the literature, whose ResNet-32 has one head of 10 classes (650 parameters)
        ("resnet32", 16, 64, 461_232, 463_504),
    ],
)
def test_sizes_at_the_default_width(arch, width, features, conv_weights, parameters):
    """parameters: of the backbone, without heads."""
    tasks = {"classes_per_classifier": 10, "classifiers": 4}
    args = Namespace(arch=arch, width=None, precision="fp32", **tasks)
    model = build_model(args)
    assert len(model.conv1.weight) == args.width == width
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(conv.weight.numel() for conv in convs) == conv_weights
    of_backbone = [p for name, p in model.named_parameters() if not name.startswith("linear")]
    assert sum(p.numel() for p in of_backbone) == parameters
    assert [head.weight.shape for head in model.linear] == [(10, features)] * 4


def plain_initialization(arch, width, classes, tasks):
    """PyTorch's own layers, made in the order of the network's parts from the global state."""

    def conv(inputs, outputs, side=3):
        return nn.Conv2d(inputs, outputs, side, bias=False)

    made, inputs, norm = {"conv1": conv(3, width)}, width, nn.BatchNorm2d
    if arch == "resnet32":
        made["bn1"] = norm(width)
    layers, count = (4, 2) if arch == "resnet18" else (3, 5)
    for layer, block in [(layer, b) for layer in range(1, layers + 1) for b in range(count)]:
        name, outputs = f"layer{layer}.{block}", width * 2 ** (layer - 1)
        made[f"{name}.conv1"] = conv(inputs, outputs)
        made[f"{name}.bn1"] = norm(inputs if arch == "resnet18" else outputs)
        made[f"{name}.conv2"] = conv(outputs, outputs)
        made[f"{name}.bn2"] = norm(outputs)
        if arch == "resnet18" and inputs != outputs:
            made[f"{name}.shortcut.0"] = conv(inputs, outputs, 1)
        inputs = outputs
    for heads in ("linear_main", "linear"):
        made |= {f"{heads}.{t}": nn.Linear(inputs, classes) for t in range(tasks)}
    return {
        f"{name}.{key}": value
        for name, part in made.items()
        for key, value in part.state_dict().items()
    }


@ARCHS
def test_names_and_initial_values_are_the_published_ones(arch):
    """Also of a pruned network, whose dense state has weight_orig as weight and no masks."""
    torch.manual_seed(3)
    model = BACKBONES[arch](2, 3, width=4)
    torch.manual_seed(3)
    plain = plain_initialization(arch, 4, 2, 3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            torch_prune.random_unstructured(module, "weight", 0.5)
    dense = dense_state(model.state_dict())
    assert dense.keys() == plain.keys()
    assert all(torch.equal(dense[key], plain[key]) for key in plain)
    BACKBONES[arch](2, 3, width=4).load_state_dict(plain)


# ------------------------------------------------------------------------------ mismatches


def state(arch="resnet18", classes=2, tasks=3, width=4, drop=(), **more):
    """That of another network, without the keys `drop`; more: shapes to put in, __ for a dot."""
    content = BACKBONES[arch](classes, tasks, width).state_dict()
    content = {key: value for key, value in content.items() if key not in drop}
    return content | {key.replace("__", "."): torch.zeros(size) for key, size in more.items()}


R18, R32 = "resnet18", "resnet32"
MISMATCHES = [
    (R18, state(), None),
    (R32, state(R32), None),
    (R18, state(R32), "does not fit resnet18 at layer2.0.shortcut.0.weight; choose another --arch"),
    (R32, state(R18, width=8), "does not fit resnet32 at bn1.weight; choose another --arch"),
    (R18, state(width=8, tasks=5), "has width 8, not 4; use --width 8"),
    (R32, state(R32, width=16), "has width 16, not 4; use --width 16"),
    (R18, state(tasks=4), "has 4 heads of 2 classes, not 3 of 2; choose other --dataset, --"),
    (R18, state(classes=3), "has 3 heads of 3 classes, not 3 of 2; choose other --dataset, --"),
    (R18, state(drop=["linear_main.1.bias"]), "at linear_main.1.bias; choose another file"),
    (R18, state(conv1__weight=[]), "does not fit resnet18 at conv1.weight; choose another file"),
]


@pytest.mark.parametrize("arch, content, reason", MISMATCHES)
def test_explain_mismatch_says_how_a_state_dict_differs(arch, content, reason):
    found = BACKBONES[arch](2, 3, width=4).explain_mismatch(content)
    assert found == reason or reason in found
