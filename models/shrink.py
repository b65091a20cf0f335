"""Exact shrinking: a masked network as a narrower dense one that computes the same features.

A channel is kept if it *varies*, that is if a path of weights other than zero leads from the image
to it, and is *needed*, that is if such a path leads on from it to the features. One pass forwards
finds the first, one backwards among the channels that vary finds the second. What is kept lies on
whole paths from the image to the features, so removing the rest makes nothing else removable. Each
convolution keeps the rows and columns of these channels: it reads a selection of the residual
stream and adds to a selection of it. A block whose branch is empty is gone.

A channel that does not vary is the same for every image, but rarely zero: a convolution without
weights puts out 0, of which BatchNorm and ReLU make relu(beta - mean*gamma/sigma). Nor does it stay
uniform, since at the border the next convolution sees zero padding in place of it. What these
channels send is therefore computed here, once, as a map [C,H,W], for images of one size. It joins
the shift of the BatchNorm that comes next (or the features). That is exact at borders and for
constants made of constants, and it costs no operation: BatchNorm adds its shift anyway. (A constant
input channel for each convolution would suit images of every size, but costs multiply-accumulates
and a copy of the input, and is exact only for uniform constants.) A shift that is uniform stays one
number for each channel.

BatchNorm in eval mode is a scale and a shift. The scale is folded into the convolution before it,
except at the entry of a pre-activation block, where the shortcut takes the stream without it.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.base import LifelongNet
from models.resnet import BasicBlock, PreActBlock, ResNet18, ResNet32

# the last parts of the keys of tensors of int64; all others are floating-point ones
INTEGERS = {"image_size", "live", "reads", "carry", "writes"}

# ------------------------------------------------------------------------------ the network


class ShrunkNet(LifelongNet):
    """The network that shrink_network() makes, for inference: it has the balanced heads alone.

    Its state dict is all there is to it: the shapes say which channels and blocks it has.
    """

    arch = "shrunk"

    def __init__(self, state, bf16=False):
        """state: {key: CPU tensor}. Raises ValueError, naming a tensor, if it makes no network."""
        super().__init__(bf16)
        tensors = Tensors(state)
        self.register_buffer("image_size", tensors.take("image_size", torch.int64, ((2,),)))
        self.size = size = tuple(self.image_size.tolist())
        if min(size) < 1:
            raise ValueError("image_size does not fit")
        self.conv1 = Conv.build(tensors, "conv1", 3, size)
        channels = len(self.conv1.weight) if self.conv1 else 0
        for stage, number in tensors.blocks():
            if not hasattr(self, stage):
                self.add_module(stage, nn.ModuleDict())
            block = Block(tensors, f"{stage}.{number}.", channels, size)
            getattr(self, stage)[number] = block
            size, channels = block.size, block.outputs
        self.register_buffer("constant", tensors.take("constant", tensors.dtype, ((),)))
        self.register_buffer("live", tensors.index("live", len(self.constant), count=channels))
        self.register_buffer("places", places(self.live, len(self.constant)), persistent=False)
        self.linear_main = tensors.heads(len(self.constant))
        if tensors.left:
            raise ValueError(f"{next(iter(tensors.left))} does not belong to it")

    def body(self, x):
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(f"this network takes images of {self.size}, not {tuple(x.shape[2:])}")
        x = self.conv1(x) if self.conv1 else x[:, :0]
        if self.conv1 and self.conv1.shift is not None:
            x = F.relu(x)
        for stage in self.children():
            for block in stage.values() if isinstance(stage, nn.ModuleDict) else ():
                x = block(x)
        return x

    def features(self, x, groups=()):
        """Images [n,3,H,W], normalized, to features [n,d]. groups: not used in eval mode."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.body(x)
        x = x.mean((2, 3), dtype=self.constant.dtype)
        if x.shape[1] < len(self.constant):
            x = F.pad(x, (0, 1)).index_select(1, self.places)
        return self.constant + x


class Conv(nn.Conv2d):
    """A convolution, and the shift [C,1,1] or [C,H,W] after it, if any."""

    def __init__(self, weight, stride=1, shift=None):
        outputs, inputs, size, _ = weight.shape
        super().__init__(inputs, outputs, size, stride, size // 2, bias=False, dtype=weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("shift", shift)

    @classmethod
    def build(cls, tensors, key, inputs, size, stride=1):
        """The 3x3 convolution of this key, or None; size: (height, width) of its output."""
        weight = tensors.weight(f"{key}.weight", inputs, 3, optional=True)
        if weight is None:
            return None
        stem = key == "conv1"  # of the pre-activation network: without a shift
        return cls(weight, stride, tensors.shift(f"{key}.shift", len(weight), size, optional=stem))

    def forward(self, x):
        if self.shift is not None and self.shift.shape[1:] == (1, 1):
            # a bias costs no pass over the output
            return self._conv_forward(x, self.weight, self.shift.flatten())
        x = self._conv_forward(x, self.weight, None)
        return x if self.shift is None else x + self.shift


class Block(nn.Module):
    """What is left of a residual block, with pre-activation (scale and shift) or without (after).

    reads: channels of the stream that the branch, and a convolutional shortcut, start from; carry:
    without such a shortcut, the channel of x that each channel of the stream after the block comes
    from (beyond those of x: zeros); writes: channels of that stream to which the branch adds. Each
    is int64 [n], and all but carry strictly increase. What the block does not have is None.
    """

    def __init__(self, tensors, prefix, inputs, size):
        """inputs: channels of the stream; size: its (height, width). Raises ValueError."""
        super().__init__()
        self.stride = 2 if re.fullmatch(r"layer[2-9]\.0\.", prefix) else 1
        self.size = halved(size, self.stride)
        has_convs = any(f"{prefix}{name}.weight" in tensors.left for name in ("conv1", "shortcut"))
        reads = tensors.index(f"{prefix}reads", inputs, optional=not has_convs)
        h = inputs if reads is None else len(reads)
        scale = tensors.shift(f"{prefix}scale", h, optional=True)
        shift = None if scale is None else tensors.shift(f"{prefix}shift", h, size)
        weight = tensors.weight(f"{prefix}shortcut.weight", h, 1, optional=True)
        self.shortcut, carry = None if weight is None else Conv(weight), None
        if weight is None:
            carry = tensors.carry(f"{prefix}carry", inputs)
            self.zeros = max([0, *(carry - inputs + 1).tolist()])
            self.moves = not torch.equal(carry, torch.arange(inputs + self.zeros))
        self.outputs = len(carry if weight is None else weight)
        self.conv1 = Conv.build(tensors, f"{prefix}conv1", h, self.size, self.stride)
        writes = None
        if self.conv1:
            self.conv2 = Conv(tensors.weight(f"{prefix}conv2.weight", len(self.conv1.weight), 3))
            writes = tensors.index(f"{prefix}writes", self.outputs, count=len(self.conv2.weight))
            self.register_buffer("places", places(writes, self.outputs), persistent=False)
        after = tensors.shift(f"{prefix}after", self.outputs, self.size, optional=True)
        buffers = {"reads": reads, "carry": carry, "writes": writes}
        for name, value in (buffers | {"scale": scale, "shift": shift, "after": after}).items():
            self.register_buffer(name, value)

    def forward(self, x):
        h = x if self.reads is None or len(self.reads) == x.shape[1] else pick(x, self.reads)
        if self.scale is not None:
            h = F.relu(scaled(h, self.scale, self.shift), inplace=True)
        s = self.stride  # taken before the 1x1 convolution, see PreActBlock
        out = self.shortcut(h[:, :, ::s, ::s]) if self.shortcut else self.carried(x[:, :, ::s, ::s])
        if self.conv1:
            branch = self.conv2(F.relu(self.conv1(h), inplace=True))
            if branch.shape[1] < self.outputs:  # a gather, as few runtimes scatter well
                branch = pick(F.pad(branch, (0, 0, 0, 0, 0, 1)), self.places)
            out = out + branch
        return out if self.after is None else F.relu(out + self.after, inplace=True)

    def carried(self, x):
        """The shortcut without a convolution."""
        x = F.pad(x, (0, 0, 0, 0, 0, self.zeros)) if self.zeros else x
        return pick(x, self.carry) if self.moves else x


def halved(size, stride):
    """(height, width) after a convolution of this stride."""
    return tuple(-(-side // stride) for side in size)


def pick(x, channels):
    """The channels [k] of x [n,C,h,w], in the memory format of images."""
    return x.index_select(1, channels).contiguous(memory_format=torch.channels_last)


def scaled(x, scale, shift):
    """x * scale + shift; scale: [C,1,1]; shift: [C,1,1] or [C,h,w]."""
    if shift.shape != scale.shape:
        return torch.addcmul(shift, x, scale)
    scale, shift = scale.flatten(), shift.flatten()
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return F.batch_norm(x, zeros, ones, scale, shift, eps=0.0)  # one operation in all runtimes


def places(channels, count):
    """For each of `count` channels its place in channels [k]; k for those that are not there."""
    found = torch.full((count,), len(channels))
    found[channels] = torch.arange(len(channels))
    return found


class Tensors:
    """The tensors of a state dict, taken one by one; whatever does not fit is a ValueError."""

    def __init__(self, state):
        self.left = dict(state)
        floats = (torch.float32, torch.float64)
        self.dtype = next((v.dtype for v in state.values() if v.dtype in floats), torch.float32)

    def take(self, key, dtype, shape, optional=False):
        """shape: for each dimension the numbers that it may be; empty: any but 0."""
        if key not in self.left:
            if optional:
                return None
            raise ValueError(f"it lacks {key}")
        value = self.left.pop(key)
        fits = value.dtype == dtype and value.dim() == len(shape)
        fits &= all(n in numbers if numbers else n > 0 for n, numbers in zip(value.shape, shape))
        if not fits or not bool(value.isfinite().all()):
            raise ValueError(f"{key} does not fit")
        return value

    def weight(self, key, inputs, kernel, optional=False):
        """The weight of a convolution, [any number,inputs,kernel,kernel]."""
        return self.take(key, self.dtype, ((), (inputs,), (kernel,), (kernel,)), optional)

    def shift(self, key, channels, size=(1, 1), optional=False):
        """A shift or scale, [channels,1,1] or [channels,*size]."""
        shape = (channels,), (1, size[0]), (1, size[1])
        shift = self.take(key, self.dtype, shape, optional)
        # in memory the channels come last, as in the images
        return None if shift is None else shift.permute(1, 2, 0).contiguous().permute(2, 0, 1)

    def index(self, key, below, count=None, optional=False):
        """Channels, int64 [count] (None: any number), strictly increasing, from 0 to below-1."""
        counts = range(below + 1) if count is None else (count,)
        index = self.take(key, torch.int64, (counts,), optional)
        if index is not None and len(index):
            inside = index[0] >= 0 and index[-1] < below
            if not inside or bool((index.diff() <= 0).any()):
                raise ValueError(f"{key} does not fit")
        return index

    def carry(self, key, inputs):
        """Channels, int64 [n], of the `inputs` that there are or, from that number on, zeros."""
        carry = self.take(key, torch.int64, (range(2**16),))
        if bool((carry < 0).any()) or bool((carry >= inputs + len(carry)).any()):
            raise ValueError(f"{key} does not fit")
        return carry

    def blocks(self):
        """(stage, number) of each block that some key names, in the network's order."""
        found = (re.match(r"(layer[1-9])\.(\d)\.", key) for key in self.left)
        return sorted({(each[1], each[2]) for each in found if each})

    def heads(self, features):
        """The balanced heads, as a ModuleList of Linear."""
        heads = nn.ModuleList()
        while (key := f"linear_main.{len(heads)}.") + "weight" in self.left:
            weight = self.take(key + "weight", self.dtype, ((), (features,)))
            bias = self.take(key + "bias", self.dtype, ((len(weight),),))
            heads.append(nn.Linear(features, len(weight), dtype=self.dtype))
            heads[-1].load_state_dict({"weight": weight, "bias": bias})
        return heads


# ------------------------------------------------------------------------------ shrinking


class Flow(NamedTuple):
    """A feature map before any image is seen: a part that depends on the image, plus a constant."""

    varies: torch.Tensor  # bool [C]: which channels have the first part
    constant: torch.Tensor  # float64 [C,H,W]


class Trace(NamedTuple):
    """A residual block: its weights, and the Flows on the way from x to out."""

    x: Flow
    entry: Flow  # after the BatchNorm of the pre-activation; without one, x
    h: Flow  # what conv1 and a convolutional shortcut read
    inner: Flow  # after conv1 and its BatchNorm
    branch: Flow  # after conv2 and its BatchNorm, if it has one
    total: Flow  # branch and shortcut
    out: Flow  # after the ReLU, if one ends the block
    scale: torch.Tensor  # of the pre-activation, [C]; None without one
    conv1: torch.Tensor  # effective weights, float64
    conv2: torch.Tensor
    shortcut: torch.Tensor  # None if it has none


def shrink_network(model, size):
    """The ShrunkNet with the same features and balanced logits as `model` in eval mode.

    model: a ResNet18 or ResNet32, masked or not; size: (height, width) of the images. The result
    is on the CPU, computed in float64 and stored with the model's dtype. Raises ValueError for
    another backbone.
    """
    if not isinstance(model, (ResNet18, ResNet32)):
        raise ValueError(f"{model.arch} cannot be shrunk, resnet18 and resnet32 can")
    weight, shift = folded(model.conv1, getattr(model, "bn1", None))
    image = Flow(torch.ones(3, dtype=torch.bool), torch.zeros(3, *size, dtype=torch.float64))
    stem = convolve(image, weight, shift)
    stream, traces = stem if shift is None else rectify(stem), {}
    for name, block in model.named_modules():
        if isinstance(block, (PreActBlock, BasicBlock)):
            traces[name] = trace(stream, block)
            stream = traces[name].out
    streams = [stream.varies]  # the channels that are kept, before each block and at the end
    for each in reversed(traces.values()):
        streams.insert(0, channels_before(each, streams[0]))
    tensors = {"image_size": torch.tensor(size)}
    if streams[0].any():
        tensors["conv1.weight"] = weight[streams[0]]
        if shift is not None:
            tensors["conv1.shift"] = uniform(stem.constant[streams[0]])
    for (name, each), before, after in zip(traces.items(), streams, streams[1:]):
        block = narrow(each, before, after)
        tensors |= {f"{name}.{key}": value for key, value in block.items()}
    tensors["live"] = stream.varies.nonzero().flatten()
    tensors["constant"] = stream.constant.mean((1, 2))
    heads = model.linear_main.state_dict()
    tensors |= {f"linear_main.{key}": value.to("cpu", copy=True) for key, value in heads.items()}
    dtype = model.linear_main[0].weight.dtype
    # + 0: no -0, so that equal networks become equal files
    return ShrunkNet(
        {key: v.to(dtype) + 0 if v.is_floating_point() else v for key, v in tensors.items()}
    )


# ------------------------------------------------------------------------------ forwards


def effective(conv):
    """The weight of a convolution under its mask, float64 on the CPU."""
    weight = conv.weight_orig * conv.weight_mask if hasattr(conv, "weight_mask") else conv.weight
    return weight.detach().to("cpu", torch.float64)


def affine(bn):
    """BatchNorm in eval mode: its scale and shift, float64 [C,1,1]."""
    values = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    gamma, beta, mean, var = (v.detach().to("cpu", torch.float64)[:, None, None] for v in values)
    scale = gamma / (var + bn.eps).sqrt()
    return scale, beta - mean * scale


def folded(conv, bn):
    """Effective weight and shift [C,1,1] of a convolution and the BatchNorm after it, if any."""
    weight = effective(conv)
    if bn is None:
        return weight, None
    scale, shift = affine(bn)
    return weight * scale[..., None], shift


def convolve(x, weight, shift=None, stride=1):
    """The Flow after a convolution (with zero padding) and a shift [C,1,1]."""
    varies = (nonzero(weight) & x.varies).any(1)
    padding = weight.shape[-1] // 2
    constant = F.conv2d(x.constant[None], weight, stride=stride, padding=padding)[0]
    return Flow(varies, constant if shift is None else constant + shift)


def rectify(x):
    """The Flow after a ReLU, which has then taken in the constant of the channels that vary."""
    return Flow(x.varies, x.constant.relu().masked_fill(x.varies[:, None, None], 0))


def nonzero(weight):
    """Which outputs [C] of a convolution have weights at which inputs [D], bool [C,D]."""
    return (weight != 0).any(-1).any(-1)


def trace(x, block):
    """The Trace of a residual block from the Flow before it."""
    entry, scale, s = x, None, block.stride
    if isinstance(block, PreActBlock):
        scale, shift = affine(block.bn1)
        entry = Flow(x.varies & (scale != 0).flatten(), x.constant * scale + shift)
        conv1, conv2 = folded(block.conv1, block.bn2), folded(block.conv2, None)
    else:
        conv1, conv2 = folded(block.conv1, block.bn1), folded(block.conv2, block.bn2)
    h = x if scale is None else rectify(entry)
    inner = convolve(h, *conv1, s)
    branch = convolve(rectify(inner), *conv2)
    shortcut, weight = Flow(x.varies, x.constant[:, ::s, ::s]), None
    if hasattr(block, "shortcut"):
        weight = effective(block.shortcut[0])
        shortcut = convolve(Flow(h.varies, h.constant[:, ::s, ::s]), weight)
    new = len(branch.varies) - len(shortcut.varies)
    varies = branch.varies | F.pad(shortcut.varies, (0, new))
    total = Flow(varies, branch.constant + F.pad(shortcut.constant, (0, 0, 0, 0, 0, new)))
    out = total if scale is not None else rectify(total)
    return Trace(x, entry, h, inner, branch, total, out, scale, conv1[0], conv2[0], weight)


# ------------------------------------------------------------------------------ backwards


def kept(block, after):
    """Which channels of a block are kept, given those of the stream after it, bool [C].

    Returns those that the branch (and a convolutional shortcut) reads, those between its
    convolutions, and those that it writes.
    """
    writes = block.branch.varies & after
    inner = block.inner.varies & nonzero(block.conv2)[writes].any(0)
    reads = nonzero(block.conv1)[inner].any(0)
    if block.shortcut is not None:
        reads |= nonzero(block.shortcut)[after].any(0)
    return block.h.varies & reads, inner, writes


def channels_before(block, after):
    """Which channels of the stream before a block are kept, bool [C]; after: those after it."""
    reads, _, _ = kept(block, after)
    if block.shortcut is not None:
        return reads
    return reads | (block.x.varies & after[: len(block.x.varies)])


def narrow(block, before, after):
    """The tensors of the narrower Block; before, after: the channels of the stream, bool [C].

    Empty if nothing is left to do.
    """
    reads, inner, writes = kept(block, after)
    tensors = {}
    if reads.any():
        tensors["reads"] = positions(reads, before)
        if block.scale is not None:
            tensors["scale"] = block.scale[reads]
            tensors["shift"] = uniform(block.entry.constant[reads])
    if block.shortcut is not None and reads.any():
        tensors["shortcut.weight"] = block.shortcut[after][:, reads]
    else:
        tensors["carry"] = carry(before, after)
    if inner.any():
        tensors["conv1.weight"] = block.conv1[inner][:, reads]
        tensors["conv1.shift"] = uniform(block.inner.constant[inner])
        tensors["conv2.weight"] = block.conv2[writes][:, inner]
        tensors["writes"] = positions(writes, after)
    if block.scale is None:
        tensors["after"] = uniform(block.total.constant[after])
    elif block.shortcut is None and not inner.any():
        return {}
    return tensors


def positions(channels, stream):
    """Where some channels of the stream are among those that are kept; both bool [C]."""
    return channels[stream].nonzero().flatten()


def carry(before, after):
    """The channels of the narrow stream before a block that its own channels come from; see Block.

    before: bool [C]; after: bool [D], D >= C.
    """
    before = F.pad(before, (0, len(after) - len(before)))
    channels = (before.cumsum(0) - 1)[after]
    new = ~before[after]
    channels[new] = before.sum() + torch.arange(int(new.sum()))
    return channels


def uniform(shift):
    """A shift [C,H,W] as [C,1,1] if it is the same at all positions."""
    first = shift[:, :1, :1]
    return first if bool((shift == first).all()) else shift
