"""What a network costs to run and to store, computed from its shapes and densities, not measured.

A multiply-accumulate (MAC) is one weight used once: at each output position of a convolution every
weight is, at the border too, where it meets padding (as is usual). The convolutions and the
balanced heads of all tasks, which predict, are counted; BatchNorm, ReLU, additions and pooling are
not, nor are the random heads, which only train. The MACs that remain are those of the weights that
remain: what a kernel that skips each zero would need. A dense kernel does them all.
"""

import functools
import math

import torch
from torch import nn

from models import BACKBONES

HEADS = "linear_main"


def cost(args, size, densities):
    """What the network of args costs on an image of size (height, width), as a dict for records.

    densities: {convolution: percent of its weights that remain}; empty: dense. Raises ValueError
    unless these are the network's convolutions. The dict holds

    weights           convolution weights that remain
    macs              multiply-accumulates of one image that remain
    macs_percent      their share of the dense network's, in percent
    state_dict_bytes  the tensors of a state dict; a pruned convolution has weight_orig and
                      weight_mask there, both float32. A checkpoint file is larger: it holds the
                      optimizer's momentum too
    packed_bytes      the arrays of a packed file (runtime/packed.py) before compression: a pruned
                      convolution takes a bit for each weight and 4 bytes for each that remains
    """
    shape = args.arch, args.classes_per_classifier, args.classifiers, args.width
    layers, dense_bytes = dense_network(*shape, tuple(size))
    if densities and densities.keys() != layers.keys() - {HEADS}:
        raise ValueError("these are not the densities of the network's convolutions")
    left = {name: round(n * densities.get(name, 100) / 100) for name, (n, _) in layers.items()}
    macs = sum(left[name] * positions for name, (_, positions) in layers.items())
    dense_macs = sum(n * positions for n, positions in layers.values())
    pruned = [(layers[name][0], left[name]) for name in densities]
    return {
        "weights": sum(n for name, n in left.items() if name != HEADS),
        "macs": macs,
        "macs_percent": 100 * macs / dense_macs,
        "state_dict_bytes": dense_bytes + sum(4 * n for n, _ in pruned),
        "packed_bytes": dense_bytes + sum(math.ceil(n / 8) - 4 * (n - kept) for n, kept in pruned),
    }


@functools.cache
def dense_network(arch, classes_per_classifier, classifiers, width, size):
    """{layer: (weights, output positions per image)}, and the bytes of the state dict.

    The balanced heads are one layer, HEADS. An image passes on the meta device: no memory, no
    arithmetic.
    """
    with torch.device("meta"):
        model = BACKBONES[arch](classes_per_classifier, classifiers, width).eval()
        image = torch.empty(1, 3, *size)
    layers = {}

    def count(name, conv, inputs, output):
        layers[name] = conv.weight.numel(), output[0, 0].numel()

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(functools.partial(count, name))
    model.body(image)
    layers[HEADS] = sum(head.weight.numel() for head in model.linear_main), 1
    state = model.state_dict().values()
    return layers, sum(tensor.numel() * tensor.element_size() for tensor in state)
