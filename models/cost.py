"""What a network costs to run and to store, computed from its shapes and densities, not measured.

A multiply-accumulate (MAC) is one weight used once: at each output position of a convolution every
weight is, at the border too, where it meets padding (as is usual). Counted are the convolutions and
the balanced heads of all tasks, which predict; not BatchNorm, ReLU, additions and pooling, nor the
random heads, which only train. The MACs that remain are those of the weights that remain: what a
kernel that skips each zero would need. A dense kernel does them all.
"""

import functools
import re

import torch
from torch import nn

from models import BACKBONES
from models.base import dense_state

HEADS = "linear_main"


def cost(args, size, densities):
    """What the network of args costs on an image of size (height, width), as a dict for records.

    densities: {convolution: percent of its weights that remain}; empty: dense. Raises ValueError
    unless these are the network's convolutions. The dict holds

    weights           convolution weights that remain
    macs              multiply-accumulates of one image that remain
    macs_percent      the share of the dense network's
    checkpoint_bytes  the tensors of a state dict in our checkpoints, where a pruned convolution has
                      weight_orig and weight_mask, both float32. The optimizer's momentum,
                      which *_best_model.pt also holds, is not counted
    packed_bytes      the arrays of a packed file (runtime/packed.py) before it is compressed: a
                      pruned convolution takes a bit for each weight and 4 bytes for each that
                      remains. The file also has a header, and names
    """
    layers, dense_bytes = dense_layers(*described(args), size)
    left = remaining(layers, densities)
    checkpoint_bytes = packed_bytes = dense_bytes
    if densities:
        prunable, kept = (sum(each[name][0] for name in densities) for each in (layers, left))
        checkpoint_bytes += 4 * prunable
        bits = sum(-(-layers[name][0] // 8) for name in densities)  # whole bytes of each
        packed_bytes += bits - 4 * (prunable - kept)
    return as_record(left, layers, checkpoint_bytes, packed_bytes)


def as_record(left, dense, checkpoint_bytes, packed_bytes):
    """The dict of cost(). left, dense: layers, as dense_layers() has them."""
    return {
        "weights": weights(left),
        "macs": macs(left),
        "macs_percent": 100 * macs(left) / macs(dense),
        "checkpoint_bytes": checkpoint_bytes,
        "packed_bytes": packed_bytes,
    }


def shrunk_cost(args, model):
    """The same for a ShrunkNet; args: of the network that it was."""
    layers = layers_of(model, model.size)
    dense, _ = dense_layers(*described(args), model.size)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return as_record(layers, dense, size, size)


def layer_macs(args, size, densities):
    """{layer: (MACs that remain, MACs)}, both in percent of all the dense network's; see cost."""
    layers, _ = dense_layers(*described(args), size)
    left, percent = remaining(layers, densities), macs(layers) / 100
    return {
        name: (left[name][0] * positions / percent, n * positions / percent)
        for name, (n, positions) in layers.items()
    }


def remaining(layers, densities):
    """dense_layers() with the numbers of weights that remain. Raises ValueError as cost() does."""
    if densities and densities.keys() != layers.keys() - {HEADS}:
        raise ValueError("these are not the densities of the network's convolutions")
    kept = {
        name: (round(layers[name][0] * density / 100), layers[name][1])
        for name, density in densities.items()
    }
    return layers | kept


def weights(layers):
    return sum(n for name, (n, _) in layers.items() if name != HEADS)


def macs(layers):
    return sum(n * positions for n, positions in layers.values())


def described(args):
    """What of args makes up a network's shapes."""
    return args.arch, args.classes_per_classifier, args.classifiers, args.width


@functools.cache
def dense_layers(arch, classes_per_classifier, classifiers, width, size):
    """{layer: (weights, output positions per image)} of a dense network, and its state's bytes.

    The balanced heads are one layer, HEADS. An image passes on the meta device: no memory, no
    arithmetic.
    """
    with torch.device("meta"):
        model = BACKBONES[arch](classes_per_classifier, classifiers, width, False).eval()
    state = model.state_dict().values()
    return layers_of(model, size), sum(tensor.numel() * tensor.element_size() for tensor in state)


def layers_of(model, size):
    """{layer: (weights, output positions per image)} of a network; the balanced heads are HEADS.

    The network must be in eval mode. Masks are not looked at. size: (height, width) of an image.
    """
    layers, heads = {}, [head.weight for head in model.linear_main]

    def count(name, conv, inputs, output):
        layers[name] = conv.weight.numel(), output[0, 0].numel()

    convs = {name: each for name, each in model.named_modules() if isinstance(each, nn.Conv2d)}
    hooks = [
        each.register_forward_hook(functools.partial(count, name)) for name, each in convs.items()
    ]
    model.body(torch.empty(1, 3, *size, dtype=heads[0].dtype, device=heads[0].device))
    for hook in hooks:
        hook.remove()
    layers[HEADS] = sum(weight.numel() for weight in heads), 1
    return layers


def parameters(model):
    """Numbers that a network holds for inference: weights, scales, shifts and the balanced heads.

    BatchNorm counts as one scale and one shift for each channel. Masks, random heads, and the
    channel numbers of a shrunk network are not counted.
    """
    left_out = re.compile(r"linear\.|.*\.running_|.*\.num_batches_tracked$")
    state = dense_state(model.state_dict())
    return sum(
        value.numel()
        for key, value in state.items()
        if value.is_floating_point() and not left_out.match(key)
    )
