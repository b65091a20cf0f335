"""The networks against docs/METHOD.md section 3: plain ones, sizes, initial values, misfits."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import BACKBONES, build_model
from models.batchnorm import BatchNorm2d
from models.resnet import PreActBlock, ResNet18, ResNet32
from trainer import make_model

ROOT = Path(__file__).parent.parent
CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64
ARCHS = pytest.mark.parametrize("arch", ["resnet18", "resnet32"])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------ features


def conv(state, x, name, stride=1, padding=1):
    return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)


def plain_resnet18(state, x, norm):
    """Feature maps, from the state dict alone; norm(x, name) is BatchNorm."""
    x = conv(state, x, "conv1")
    for layer, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
        for block in (0, 1):
            name, step = f"layer{layer}.{block}", 1 if block else stride
            h = norm(x, f"{name}.bn1").clamp(min=0)
            shortcut = x
            if layer > 1 and block == 0:
                shortcut = conv(state, h, f"{name}.shortcut.0", step, padding=0)
            out = conv(state, h, f"{name}.conv1", step)
            out = norm(out, f"{name}.bn2").clamp(min=0)
            x = conv(state, out, f"{name}.conv2") + shortcut
    return x


def plain_resnet32(state, x, norm):
    """As plain_resnet18: three stages of five blocks, shortcuts without parameters."""
    x = norm(conv(state, x, "conv1"), "bn1").clamp(min=0)
    for layer in (1, 2, 3):
        for block in range(5):
            name, step = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = norm(conv(state, x, f"{name}.conv1", step), f"{name}.bn1").clamp(min=0)
            out = norm(conv(state, out, f"{name}.conv2"), f"{name}.bn2")
            x = x[:, :, ::step, ::step]
            zeros = x.new_zeros(len(x), out.shape[1] - x.shape[1], *x.shape[2:])
            x = (out + torch.cat([x, zeros], dim=1)).clamp(min=0)
    return x


PLAIN = {"resnet18": plain_resnet18, "resnet32": plain_resnet32}


def plain_features(arch, state, x, norm):
    x = PLAIN[arch](state, x, norm)
    return x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])


def scaled(x, mean, var, state, name):
    """(x - mean) / sqrt(var + 1e-5), times weight, plus bias; all of them per channel."""
    mean, var, weight, bias = (
        v.view(-1, 1, 1) for v in (mean, var, state[f"{name}.weight"], state[f"{name}.bias"])
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


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


def images(n=3, seed=1):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


@ARCHS
def test_features_in_eval_mode_equal_those_of_the_plain_network(arch):
    model = make(arch)
    state = model.state_dict()

    def norm(x, name):
        return scaled(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], state, name)

    found = model.eval()(images(), is_feature=True)
    torch.testing.assert_close(found, plain_features(arch, state, images(), norm), **CLOSE)


@ARCHS
def test_features_and_running_statistics_in_training_equal_those_of_the_plain_network(arch):
    model = make(arch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    statistics = {}

    def norm(x, name):
        n = x.numel() / x.shape[1]
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        for key, value in (("running_mean", mean), ("running_var", var * n / (n - 1))):
            statistics[f"{name}.{key}"] = 0.9 * state[f"{name}.{key}"] + 0.1 * value
        return scaled(x, mean, var, state, name)

    found = model.train()(images(), is_feature=True)
    plain = plain_features(arch, state, images(), norm)
    torch.testing.assert_close(found, plain, rtol=1e-8, atol=1e-8)
    after = model.state_dict()
    assert statistics.keys() == {key for key in after if "running" in key}
    for key, value in statistics.items():
        torch.testing.assert_close(after[key], value, **CLOSE)


@ARCHS
def test_grouped_features_equal_those_of_separate_passes(arch):
    """Gradients and running statistics too; a group with two passes passes twice."""
    ours = make(arch).train()
    plain = copy.deepcopy(ours)
    groups = ((4, 1), (2, 1), (1, 1), (3, 2))
    for seed in (1, 2):
        x = images(10, seed)
        found = ours.features(x, groups)
        wanted = [
            [plain(part, is_feature=True) for _ in range(passes)][-1]
            for part, (_, passes) in zip(x.split([size for size, _ in groups]), groups)
        ]
        wanted = torch.cat(wanted)
        torch.testing.assert_close(found, wanted, **CLOSE)
        slope = torch.randn_like(wanted)
        for model, features in ((ours, found), (plain, wanted)):
            model.zero_grad()
            (features * slope).sum().backward()
        pairs = dict(ours.named_parameters()), dict(plain.named_parameters())
        for name, parameter in pairs[0].items():
            if not name.startswith("linear"):
                torch.testing.assert_close(parameter.grad, pairs[1][name].grad, **CLOSE)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, **CLOSE)


# ------------------------------------------------------------------------------ BatchNorm


def norm_pair():
    """A BatchNorm of ours and PyTorch's, with the same values and unusual settings, in float64."""
    torch.manual_seed(2)
    plain = nn.BatchNorm2d(3, eps=1e-3, momentum=0.3).double()
    nn.init.uniform_(plain.weight, 0.5, 2)
    nn.init.normal_(plain.bias)
    plain.running_mean.normal_()
    plain.running_var.uniform_(0.5, 2)
    ours = BatchNorm2d(3, eps=1e-3, momentum=0.3).double()
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@pytest.mark.parametrize(
    "groups",
    [
        ((4, 1), (2, 1), (1, 1), (3, 2)),  # a step of a task k > 1
        ((1, 1), (1, 1), (1, 1), (1, 2)),
        ((2, 3), (1, 2), (3, 1)),
        ((5, 2),),  # a step of task 1
        ((1, 2),),
        ((4, 1),),
    ],
)
def test_batchnorm_normalizes_groups_as_if_each_had_passed_alone(groups):
    ours, plain = norm_pair()
    ours.groups = groups
    for _ in range(2):  # the running statistics continue from where they are
        x = (2 * torch.randn(sum(n for n, _ in groups), 3, 4, 5) + 1).double().requires_grad_()
        x_plain = x.detach().clone().requires_grad_()
        wanted = []
        for part, passes in zip(x_plain.split([n for n, _ in groups]), [p for _, p in groups]):
            wanted.append([plain(part) for _ in range(passes)][-1])
        found, wanted = ours(x), torch.cat(wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        slope = torch.randn_like(wanted)
        for norm, out in ((ours, found), (plain, wanted)):
            norm.zero_grad()
            (out * slope).sum().backward()
        for a, b in ((x, x_plain), (ours.weight, plain.weight), (ours.bias, plain.bias)):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-12)


def test_batchnorm_without_groups_is_that_of_pytorch():
    ours, plain = norm_pair()
    x = torch.randn(6, 3, 4, 5).double()
    for train in (True, False):
        assert torch.equal(ours.train(train)(x), plain.train(train)(x))
        assert same(ours.state_dict(), plain.state_dict())
    ours.groups = ((2, 1), (4, 2))
    assert torch.equal(ours(x), plain(x))  # in eval mode
    assert same(ours.state_dict(), plain.state_dict())


# ------------------------------------------------------------------------------ the shortcut


@pytest.mark.parametrize("side", [(8, 8), (7, 9), (5, 6), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcut_is_a_strided_1x1_convolution(stride, side):
    torch.manual_seed(4)
    block = PreActBlock(3, 5, stride).double().eval()
    plain = copy.deepcopy(block)
    shortcut = nn.Conv2d(3, 5, 1, stride=stride, bias=False).double()
    shortcut.load_state_dict(plain.shortcut[0].state_dict())
    x = torch.randn(2, 3, *side).double().requires_grad_()
    x_plain = x.detach().clone().requires_grad_()
    h = F.relu(plain.bn1(x_plain))
    wanted = plain.conv2(F.relu(plain.bn2(plain.conv1(h)))) + shortcut(h)
    found = block(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(wanted)
    (found * slope).sum().backward()
    (wanted * slope).sum().backward()
    for a, b in (
        (x, x_plain),
        (block.shortcut[0].weight, shortcut.weight),
        (block.conv1.weight, plain.conv1.weight),
        (block.bn1.weight, plain.bn1.weight),
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


NARROW_STEPS = """
import torch
from models import ResNet18

model = ResNet18(2, 1, width=8)
for n in (3, 5):
    x = torch.randn(n, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    model(x, main_fc=True).sum().backward()
"""


def test_small_odd_batches_do_not_crash_a_narrow_network():
    """oneDNN's weight gradient of a strided 1x1 convolution would, on a CPU with AVX-512."""
    threads = {"OMP_NUM_THREADS": "2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    command = [sys.executable, "-c", NARROW_STEPS]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------ bf16


@ARCHS
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("groups", [(), ((12, 1), (6, 1), (6, 2))])
def test_features_and_logits_in_bf16_are_float32_and_close_to_those_in_fp32(arch, train, groups):
    """Rounding to bf16 is off by up to 2^-9; over some 40 layers that adds up to about 1 %."""
    torch.manual_seed(5)
    model, bf16 = (BACKBONES[arch](2, 3, width=8, bf16=bf16) for bf16 in (False, True))
    bf16.load_state_dict(model.state_dict())
    x = torch.randn(24, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    inside = []
    bf16.layer3.register_forward_hook(lambda layer, inputs, out: inside.append(out.dtype))
    with torch.no_grad():
        wanted, found = (m.train(train).features(x, groups) for m in (model, bf16))
        pairs = [(found, wanted)]
        for main_fc in (True, False):
            pairs.append((bf16.logits(found, 3, main_fc), model.logits(wanted, 3, main_fc)))
    assert inside == [torch.bfloat16]
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype == torch.float32
        assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.05
    dtypes = [{key: value.dtype for key, value in m.state_dict().items()} for m in (model, bf16)]
    assert dtypes[0] == dtypes[1]


# ------------------------------------------------------------------------------ heads and sizes


@pytest.mark.parametrize("main_fc, heads", [(True, "linear_main"), (False, "linear")])
def test_logits_are_those_of_the_first_heads_of_one_kind(main_fc, heads):
    model = make().eval()
    state, features = model.state_dict(), model(images(), is_feature=True)
    single = [
        features @ state[f"{heads}.{t}.weight"].T + state[f"{heads}.{t}.bias"] for t in range(3)
    ]
    for k in (1, 2, 3):
        found = model(images(), out_idx=k, main_fc=main_fc)
        assert found.shape == (3, 2 * k)
        torch.testing.assert_close(found, torch.cat(single[:k], dim=1))
        torch.testing.assert_close(model.logits(features, k, main_fc), found)
    assert torch.equal(model(images(), main_fc=main_fc), found)


def test_forward_needs_the_kind_of_heads_except_for_features():
    model = make().eval()
    for out_idx in (None, 2):
        with pytest.raises(TypeError, match="main_fc=True"):
            model(images(), out_idx)
    assert model(images(), is_feature=True).shape == (3, 32)


@pytest.mark.parametrize(
    "network, features, convolutions, conv_weights, norms, parameters",
    [
        (ResNet18, 512, 20, 11_159_232, 16, 11_166_016),
        # 464,154 in the literature, whose ResNet-32 has one head of 10 classes (650 parameters)
        (ResNet32, 64, 31, 461_232, 31, 463_504),
    ],
)
def test_sizes_at_the_default_width(
    network, features, convolutions, conv_weights, norms, parameters
):
    """parameters: of the backbone, without heads."""
    model = network(10, 4).eval()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == convolutions and all(conv.bias is None for conv in convs)
    assert sum(conv.weight.numel() for conv in convs) == conv_weights
    of_backbone = [p for name, p in model.named_parameters() if not name.startswith("linear")]
    assert sum(p.numel() for p in of_backbone) == parameters
    found = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(found) == norms and {(m.eps, m.momentum) for m in found} == {(1e-5, 0.1)}
    for heads in (model.linear_main, model.linear):
        assert [head.weight.shape for head in heads] == [(10, features)] * 4
    stages = [stage for name, stage in model.named_children() if name.startswith("layer")]
    assert [len(stage) for stage in stages] == ([2] * 4 if network is ResNet18 else [5] * 3)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 16, 16), is_feature=True).shape == (2, features)
        assert model.logits(torch.zeros(2, features), 3, main_fc=False).shape == (2, 30)


@ARCHS
def test_images_may_have_any_size(arch):
    model = make(arch)
    with torch.no_grad():
        for side in (32, 64):  # CIFAR and Tiny-ImageNet
            x = torch.zeros(2, 3, side, side).double()
            assert model(x, is_feature=True).shape == (2, len(model.linear[0].weight[0]))


@pytest.mark.parametrize(
    "arch, given, width",
    [("resnet18", None, 64), ("resnet32", None, 16), ("resnet18", 4, 4), ("resnet32", 4, 4)],
)
def test_the_width_defaults_to_that_of_the_backbone(args, arch, given, width):
    args.arch, args.width = arch, given
    model = build_model(args)
    assert model.arch == arch and len(model.conv1.weight) == width
    assert args.width == width  # for the records
    assert [head.weight.shape[0] for head in model.linear] == [2, 2, 2]


def plain_initialization(arch, width, classes, tasks):
    """PyTorch's own layers, made in the order of the network's parts from the global state."""

    def conv(inputs, outputs, side=3):
        return nn.Conv2d(inputs, outputs, side, bias=False)

    made, inputs, norm = {"conv1": conv(3, width)}, width, nn.BatchNorm2d
    if arch == "resnet18":
        blocks = [(layer, block) for layer in (1, 2, 3, 4) for block in (0, 1)]
    else:
        blocks = [(layer, block) for layer in (1, 2, 3) for block in range(5)]
        made["bn1"] = norm(width)
    for layer, block in blocks:
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
def test_initialization_is_that_of_pytorch(arch):
    torch.manual_seed(3)
    found = BACKBONES[arch](2, 3, width=4).state_dict()
    torch.manual_seed(3)
    assert same(found, plain_initialization(arch, 4, 2, 3))


def test_make_model_depends_only_on_seed_and_purpose(args):
    def state(seed, *purpose):
        args.seed = seed
        return make_model(args, torch.device("cpu"), *purpose).state_dict()

    torch.manual_seed(1)
    first = state(0)
    torch.manual_seed(2)
    assert same(state(0), first)
    for other in (state(1), state(0, "task1", 0, "rewind")):
        assert other.keys() == first.keys()
        assert not torch.equal(other["conv1.weight"], first["conv1.weight"])
        assert not torch.equal(other["linear.2.weight"], first["linear.2.weight"])
    assert first["conv1.weight"].shape == (4, 3, 3, 3) and len(first["linear.0.weight"]) == 2


def test_make_model_does_not_change_the_global_random_state(args):
    def states():
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return [torch.get_rng_state(), *devices]

    torch.rand(5)
    before = states()
    make_model(args, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(before, states()))


# ------------------------------------------------------------------------------ misfits


def state(arch="resnet18", classes=2, tasks=3, width=4, drop=(), **more):
    """The state dict of another network; drop: keys to leave out; more: tensors to put in.

    In the names of these, __ stands for a dot.
    """
    content = BACKBONES[arch](classes, tasks, width).state_dict()
    content = {key: value for key, value in content.items() if key not in drop}
    return content | {name.replace("__", "."): value for name, value in more.items()}


ARCH = "does not fit {} at {}, see --arch"
WIDTH = "has width {}, this run has --width 4; give the same"
HEADS = (
    "has {} heads of {} classes, this run 3 of 2; "
    "see --dataset, --classifiers, --classes_per_classifier"
)
OTHER = "does not fit this network at {}, give another file"
R18, R32 = "resnet18", "resnet32"


MISFITS = [
    (R18, state(R32), ARCH, R18, "layer2.0.shortcut.0.weight"),
    (R32, state(R18), ARCH, R32, "bn1.weight"),
    (R18, state(R32, classes=5, width=8), ARCH, R18, "layer2.0.shortcut.0.weight"),
    (R18, state(drop=["layer2.0.bn1.weight"]), ARCH, R18, "layer2.0.bn1.weight"),
    (R18, state(more__weight=torch.zeros(2)), ARCH, R18, "more.weight"),
    (R18, {"conv1.weight": torch.zeros(4, 3, 3, 3)}, ARCH, R18, "layer1.0.bn1.weight"),
    (R18, state(width=8), WIDTH, 8),
    (R18, state(width=8, tasks=5), WIDTH, 8),
    (R32, state(R32, width=16), WIDTH, 16),
    (R18, state(tasks=4), HEADS, 4, 2),
    (R18, state(classes=3), HEADS, 3, 3),
    (R18, state(linear__0__weight=torch.tensor(3.0)), HEADS, 3, 0),
    (R18, state(drop=["linear_main.1.bias"]), OTHER, "linear_main.1.bias"),
    (R18, state(linear_main__3__bias=torch.zeros(2)), OTHER, "linear_main.3.bias"),
    (R18, state(linear__1__bias=torch.zeros(3)), OTHER, "linear.1.bias"),
    (R18, state(conv1__weight=torch.tensor(3.0)), OTHER, "conv1.weight"),
    (R18, state(conv1__weight=torch.zeros(4, 3, 5, 5)), OTHER, "conv1.weight"),
    (R18, state(layer3__1__bn2__bias=torch.zeros(4)), OTHER, "layer3.1.bn2.bias"),
]


@pytest.mark.parametrize("case", MISFITS, ids=lambda case: case[2].format(*case[3:]))
def test_misfit_says_how_a_state_differs(case):
    arch, content, reason, *values = case
    assert BACKBONES[arch](2, 3, width=4).misfit(content) == reason.format(*values)


@ARCHS
def test_a_state_of_the_same_network_fits(arch):
    assert BACKBONES[arch](2, 3, width=4).misfit(state(arch)) is None
