"""ResNets for small images (docs/METHOD.md section 3).

ResNet18 is the paper's: pre-activation blocks (He et al. 2016, "Identity Mappings in Deep Residual
Networks"). ResNet32 is the CIFAR network of He et al. 2015, "Deep Residual Learning", which iCaRL,
FACIL and PyCIL use: 0.46 M parameters at width 16. Both keep PyTorch's default initialization.
"""

import functools

import torch.nn.functional as F
from torch import nn

from models.base import LifelongNet
from models.batchnorm import BatchNorm2d

conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
relu = functools.partial(F.relu, inplace=True)  # what it gets is not needed again


def subsample(x, stride):
    """x[:, :, ::stride, ::stride], whose own gradient is slow."""
    return F.avg_pool2d(x, 1, stride) if stride > 1 else x


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride=stride)
        self.bn2 = BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        if stride != 1 or inputs != outputs:
            # a Sequential only because published checkpoints name it shortcut.0
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False))
        self.stride = stride

    def forward(self, x):
        h = relu(self.bn1(x))
        # The stride of the 1x1 convolution is taken beforehand, which is the same: PyTorch 2.15's
        # CPU kernel writes past its memory (channels last, an odd batch, fewer than 16 channels).
        shortcut = self.shortcut(subsample(h, self.stride)) if hasattr(self, "shortcut") else x
        h = self.conv2(relu(self.bn2(self.conv1(h))))
        return h.add_(shortcut)


class ResNet18(LifelongNet):
    """Four stages of two pre-activation blocks; features [n, 8*width].

    width: channels of the first layer (64 in the paper).
    """

    arch, default_width = "resnet18", 64

    def __init__(self, classes_per_classifier, classifiers, width=64):
        super().__init__()
        self.conv1 = conv3x3(3, width)
        self.layer1 = blocks(PreActBlock, 2, width, width, 1)
        self.layer2 = blocks(PreActBlock, 2, width, 2 * width, 2)
        self.layer3 = blocks(PreActBlock, 2, 2 * width, 4 * width, 2)
        self.layer4 = blocks(PreActBlock, 2, 4 * width, 8 * width, 2)
        self.add_heads(8 * width, classes_per_classifier, classifiers)

    def body(self, x):
        # no BatchNorm or ReLU after layer4, as published
        return self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each before BatchNorm; the shortcut has no parameters.

    Where the shape changes the shortcut takes every second pixel, and zeros are the new channels
    (option A of the paper).
    """

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride=stride)
        self.bn1 = BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = BatchNorm2d(outputs)
        self.stride, self.new_channels = stride, outputs - inputs

    def forward(self, x):
        shortcut = x
        if self.stride != 1 or self.new_channels:
            shortcut = F.pad(subsample(x, self.stride), (0, 0, 0, 0, 0, self.new_channels))
        h = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(h)) + shortcut)


class ResNet32(LifelongNet):
    """Three stages of five basic blocks; features [n, 4*width].

    width: channels of the first layer (16 in the literature).
    """

    arch, default_width = "resnet32", 16

    def __init__(self, classes_per_classifier, classifiers, width=16):
        super().__init__()
        self.conv1 = conv3x3(3, width)
        self.bn1 = BatchNorm2d(width)
        self.layer1 = blocks(BasicBlock, 5, width, width, 1)
        self.layer2 = blocks(BasicBlock, 5, width, 2 * width, 2)
        self.layer3 = blocks(BasicBlock, 5, 2 * width, 4 * width, 2)
        self.add_heads(4 * width, classes_per_classifier, classifiers)

    def body(self, x):
        x = relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


def blocks(block, count, inputs, outputs, stride):
    """`count` blocks in a row; the first has the stride and changes the number of channels."""
    first = block(inputs, outputs, stride)
    return nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(count - 1)))
