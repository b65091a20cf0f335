"""Pre-activation ResNet-18 for small images, with two linear heads per task (METHOD.md section 3).

He et al. 2016, "Identity Mappings in Deep Residual Networks"; the heads are those of the paper's
published code: `linear` learns from random batches, `linear_main` from class-balanced ones and
gives the predictions.
"""

import torch
import torch.nn.functional as F
from torch import nn


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that sees the groups of a batch apart, each as if it had passed by itself.

    groups: ((size, passes), ...) along the batch. The running statistics move as if the groups
    had come one after the other, each `passes` times: the statistics are the same every time, so
    that is momentum 1-(1-m)^passes once. Empty: the whole batch, once. In eval mode they do not
    matter.
    """

    groups = ()

    def forward(self, x):
        if not self.training or not self.groups:
            return super().forward(x)
        sizes, passes = zip(*self.groups)
        self.num_batches_tracked += sum(passes)
        running = self.running_mean, self.running_var, self.weight, self.bias
        parts = [
            F.batch_norm(part, *running, True, 1 - (1 - self.momentum) ** times, self.eps)
            for part, times in zip(x.split(sizes), passes)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Block(nn.Module):
    """Two 3x3 convolutions, each behind BatchNorm and ReLU, and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if stride != 1 or inputs != outputs:
            # a Sequential only because published checkpoints name it shortcut.0
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False))
        self.stride = stride

    def forward(self, x):
        h = F.relu(self.bn1(x))
        # The stride of the 1x1 convolution is taken beforehand: the same, but PyTorch 2.15's CPU
        # one writes past its memory (channels last, an odd batch, fewer than 16 channels).
        s = self.stride
        shortcut = self.shortcut(h[:, :, ::s, ::s]) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + shortcut


class ResNet(nn.Module):
    """The backbone and its heads: `classifiers` tasks of `classes_per_classifier` classes each.

    width: channels of the first layer (64 in the paper); layer4 has 8 times as many.
    bf16: the backbone computes in bfloat16 (autocast); weights, statistics, features and heads
    are float32 all the same.
    """

    def __init__(self, classes_per_classifier, classifiers, width=64, bf16=False):
        super().__init__()
        self.bf16 = bf16
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(Block(4 * width, 8 * width, 2), Block(8 * width, 8 * width, 1))

        def heads():
            return nn.ModuleList(
                nn.Linear(8 * width, classes_per_classifier) for _ in range(classifiers)
            )

        self.linear_main = heads()
        self.linear = heads()

    def features(self, x, groups=()):
        """Images [n,3,H,W], normalised, to features [n, 8*width], float32.

        groups: ((size, passes), ...), the sub-batches that BatchNorm sees apart while training.
        """
        for module in self.modules():
            if isinstance(module, BatchNorm2d):
                module.groups = groups
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        # global average pooling; no BatchNorm or ReLU after layer4
        return x.mean((2, 3), dtype=self.conv1.weight.dtype)

    def logits(self, features, out_idx, main_fc):
        """Features [n, 8*width] to the logits [n, out_idx*c] of the first `out_idx` heads.

        main_fc: the balanced heads (True) or the random ones (False).
        """
        heads = self.linear_main if main_fc else self.linear
        return torch.cat([head(features) for head in heads[:out_idx]], dim=1)

    def forward(self, x, out_idx=None, main_fc=True, is_feature=False):
        """The published call: logits of the first `out_idx` heads (None: all), or the features."""
        features = self.features(x)
        return features if is_feature else self.logits(features, out_idx, main_fc)
