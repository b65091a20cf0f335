"""BatchNorm for several sub-batches that pass through the network together."""

import torch
import torch.nn.functional as F
from torch import nn


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalizes the groups of a batch separately, as if each had passed alone.

    groups: ((size, passes), ...) along the batch. The running statistics move as if the groups
    had come one after the other, each `passes` times: its statistics are the same every time, so
    that equals one update with momentum 1-(1-m)^passes. Empty: the whole batch, once. In eval mode
    groups have no effect.
    """

    groups = ()

    def forward(self, x):
        if not self.training or not self.groups:
            return super().forward(x)
        sizes, passes = zip(*self.groups)
        self.num_batches_tracked += sum(passes)
        running = self.running_mean, self.running_var
        outputs = []
        for group, times in zip(x.split(sizes), passes):
            momentum = 1 - (1 - self.momentum) ** times
            outputs.append(
                F.batch_norm(group, *running, self.weight, self.bias, True, momentum, self.eps)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
