"""The network against METHOD.md section 3: a plain one, its sizes, its initial values."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import ResNet
from models.resnet import BatchNorm2d, Block
from trainer import make_model

ROOT = Path(__file__).parent.parent


def plain_features(state, x, norm):
    """The backbone written down from the state dict alone; norm(x, name) is BatchNorm."""

    def conv(x, name, stride=1, padding=1):
        return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)

    x = conv(x, "conv1")
    for layer, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
        for block in (0, 1):
            name, step = f"layer{layer}.{block}", 1 if block else stride
            h = norm(x, f"{name}.bn1").clamp(min=0)
            shortcut = x
            if layer > 1 and block == 0:
                shortcut = conv(h, f"{name}.shortcut.0", step, padding=0)
            out = conv(h, f"{name}.conv1", step)
            out = norm(out, f"{name}.bn2").clamp(min=0)
            x = conv(out, f"{name}.conv2") + shortcut
    return x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])


def scaled(x, mean, var, state, name):
    """(x - mean) / sqrt(var + 1e-5), times weight, plus bias; all of them per channel."""
    mean, var, weight, bias = (
        v.view(-1, 1, 1) for v in (mean, var, state[f"{name}.weight"], state[f"{name}.bias"])
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


@pytest.fixture
def model():
    """A narrow one in float64, its BatchNorm far from the initial ones and zeros."""
    torch.manual_seed(0)
    model = ResNet(2, 3, width=4).double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for values in (norm.weight.data, norm.running_var):
            values.uniform_(0.5, 2)
        for values in (norm.bias.data, norm.running_mean):
            values.normal_()
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def test_features_in_eval_mode_are_those_of_the_plain_network(model, images):
    state = model.state_dict()

    def norm(x, name):
        return scaled(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], state, name)

    found = model.eval()(images, is_feature=True)
    torch.testing.assert_close(found, plain_features(state, images, norm), rtol=1e-10, atol=1e-10)


def test_features_in_training_and_the_running_statistics_are_those_of_the_plain_network(
    model, images
):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    statistics = {}

    def norm(x, name):
        n = x.numel() / x.shape[1]
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        for key, value in (("running_mean", mean), ("running_var", var * n / (n - 1))):
            statistics[f"{name}.{key}"] = 0.9 * state[f"{name}.{key}"] + 0.1 * value
        return scaled(x, mean, var, state, name)

    found = model.train()(images, is_feature=True)
    torch.testing.assert_close(found, plain_features(state, images, norm), rtol=1e-8, atol=1e-8)
    after = model.state_dict()
    assert statistics.keys() == {key for key in after if "running" in key}
    for key, value in statistics.items():
        torch.testing.assert_close(after[key], value, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------ BatchNorm


def norm_pair():
    """A BatchNorm of ours and PyTorch's, of the same values and unusual settings, in float64."""
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
        ((4, 1), (2, 1), (1, 1), (3, 2)),  # the step of a task k > 1
        ((1, 1), (1, 1), (1, 1), (1, 2)),
        ((2, 3), (1, 2), (3, 1)),
        ((5, 2),),  # the step of task 1
        ((1, 2),),
        ((4, 1),),
    ],
)
def test_batchnorm_sees_groups_as_if_they_had_passed_by_themselves(groups):
    ours, plain = norm_pair()
    ours.groups = groups
    for _ in range(2):  # the running statistics go on from where they are
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
def test_the_shortcut_is_a_1x1_convolution_of_the_blocks_stride(stride, side):
    torch.manual_seed(4)
    block = Block(3, 5, stride).double().eval()
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
from models import ResNet

model = ResNet(2, 1, width=8)
for n in (3, 5):
    x = torch.randn(n, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    model(x).sum().backward()
"""


def test_small_odd_batches_do_not_crash_a_narrow_network():
    """oneDNN's weight gradient of a strided 1x1 convolution would, where a CPU has AVX-512."""
    threads = {"OMP_NUM_THREADS": "2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    command = [sys.executable, "-c", NARROW_STEPS]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------ bf16


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("groups", [(), ((12, 1), (6, 1), (6, 2))])
def test_bf16_gives_nearly_the_same_features_and_logits_in_fp32(train, groups):
    """A rounding to bf16 is off by up to 2^-9, some 40 of them in a row by about 1 %."""
    torch.manual_seed(5)
    model, bf16 = ResNet(2, 3, width=8), ResNet(2, 3, width=8, bf16=True)
    bf16.load_state_dict(model.state_dict())
    x = torch.randn(24, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    inside = []
    bf16.layer4.register_forward_hook(lambda layer, inputs, out: inside.append(out.dtype))
    with torch.no_grad():
        wanted, found = (m.train(train).features(x, groups) for m in (model, bf16))
        pairs = [(found, wanted)]
        for main_fc in (True, False):
            pairs.append((bf16.logits(found, 3, main_fc), model.logits(wanted, 3, main_fc)))
    assert inside == [torch.bfloat16]
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype == torch.float32
        assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.05
    kinds = [{key: value.dtype for key, value in m.state_dict().items()} for m in (model, bf16)]
    assert kinds[0] == kinds[1]


# ------------------------------------------------------------------------------ heads and sizes


@pytest.mark.parametrize("main_fc, heads", [(True, "linear_main"), (False, "linear")])
def test_logits_are_those_of_the_first_heads_of_the_kind_asked_for(model, images, main_fc, heads):
    state, features = model.eval().state_dict(), model(images, is_feature=True)
    single = [
        features @ state[f"{heads}.{t}.weight"].T + state[f"{heads}.{t}.bias"] for t in range(3)
    ]
    for k in (1, 2, 3):
        found = model(images, out_idx=k, main_fc=main_fc)
        assert found.shape == (3, 2 * k)
        torch.testing.assert_close(found, torch.cat(single[:k], dim=1))
        torch.testing.assert_close(model.logits(features, k, main_fc), found)
    assert torch.equal(model(images, main_fc=main_fc), found)


def test_balanced_heads_are_the_default(model, images):
    model.eval()
    assert torch.equal(model(images, 2), model(images, 2, main_fc=True))
    assert not torch.equal(model(images, 2), model(images, 2, main_fc=False))


def test_sizes_at_the_width_of_the_paper():
    model = ResNet(10, 4).eval()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(conv.weight.numel() for conv in convs) == 11_159_232
    assert len(convs) == 1 + 4 * 4 + 3 and all(conv.bias is None for conv in convs)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 16 and {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    for heads in (model.linear_main, model.linear):
        assert [head.weight.shape for head in heads] == [(10, 512)] * 4
    with torch.no_grad():
        x = torch.zeros(2, 3, 32, 32)
        assert model(x, is_feature=True).shape == (2, 512)
        assert model.logits(torch.zeros(2, 512), 3, main_fc=False).shape == (2, 30)


def test_images_may_be_of_any_size(model):
    with torch.no_grad():
        for side in (32, 64):  # CIFAR and Tiny-ImageNet
            assert model(torch.zeros(2, 3, side, side).double(), is_feature=True).shape == (2, 32)


def plain_initialisation(width, classes, tasks):
    """PyTorch's own layers made in the order of the network's parts, from the global state."""

    def conv(inputs, outputs, side):
        return nn.Conv2d(inputs, outputs, side, bias=False)

    made, inputs = {"conv1": conv(3, width, 3)}, width
    for layer, outputs in ((1, width), (2, 2 * width), (3, 4 * width), (4, 8 * width)):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            made[f"{name}.bn1"] = nn.BatchNorm2d(inputs)
            made[f"{name}.conv1"] = conv(inputs, outputs, 3)
            made[f"{name}.bn2"] = nn.BatchNorm2d(outputs)
            made[f"{name}.conv2"] = conv(outputs, outputs, 3)
            if inputs != outputs:
                made[f"{name}.shortcut.0"] = conv(inputs, outputs, 1)
            inputs = outputs
    for heads in ("linear_main", "linear"):
        made |= {f"{heads}.{t}": nn.Linear(8 * width, classes) for t in range(tasks)}
    return {
        f"{name}.{key}": value
        for name, part in made.items()
        for key, value in part.state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_initialisation_is_that_of_pytorch():
    torch.manual_seed(3)
    found = ResNet(2, 3, width=4).state_dict()
    torch.manual_seed(3)
    assert same(found, plain_initialisation(4, 2, 3))


def test_make_model_hangs_on_the_seed_and_the_purpose_alone(args):
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


def test_make_model_leaves_the_global_random_state_alone(args):
    def states():
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return [torch.get_rng_state(), *devices]

    torch.rand(5)
    before = states()
    make_model(args, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(before, states()))
