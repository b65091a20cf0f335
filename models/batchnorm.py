"""BatchNorm for several sub-batches that pass through the network together."""

import torch
import torch.nn.functional as F
from torch import nn


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalizes the groups of a batch separately, as if each had passed alone.

    groups: ((size, passes), ...) along the batch. The running statistics move as if the groups
    had come one after the other, each `passes` times: its statistics are the same every time, so
    that equals one update with momentum 1-(1-m)^passes. Empty: the whole batch, once. In eval mode
    groups have no effect. LifelongNet sets groups, and counts the passes.
    """

    groups = ()

    def forward(self, x):
        if not self.training or not self.groups:
            return super().forward(x)
        groups = [(size, 1 - (1 - self.momentum) ** passes) for size, passes in self.groups]
        running = self.running_mean, self.running_var
        if len(groups) == 1:
            return F.batch_norm(x, *running, self.weight, self.bias, True, groups[0][1], self.eps)
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()  # with out=, the CPU kernel reads other strides wrongly
        return NormalizeGroups.apply(x, self.weight, self.bias, running, groups, self.eps)


class NormalizeGroups(torch.autograd.Function):
    """F.batch_norm of each group, in training, into one output; the gradients are joined once.

    x [n,C,H,W]; weight and bias [C]; running: mean and variance [C], updated in place; groups:
    (size, momentum) of each.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running, groups, eps):
        ctx.sizes, momenta = zip(*groups)
        ctx.eps, y = eps, torch.empty_like(x)
        statistics = weight.new_empty(len(groups), 2, len(weight))  # means, inverse deviations
        parts = zip(x.split(ctx.sizes), y.split(ctx.sizes), statistics, momenta)
        for part, out, own, momentum in parts:
            torch.native_batch_norm(
                part, weight, bias, *running, True, momentum, eps, out=(out, *own)
            )
        ctx.save_for_backward(x, weight, statistics)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, statistics = ctx.saved_tensors
        gradients = [
            torch.ops.aten.native_batch_norm_backward(
                dy, part, weight, None, None, *own, True, ctx.eps, (True, True, True)
            )
            for dy, part, own in zip(gradient.split(ctx.sizes), x.split(ctx.sizes), statistics)
        ]
        dx, dw, db = zip(*gradients)
        # the last group first, as autograd would add them
        dw, db = torch.cat(dw[::-1] + db[::-1]).view(2, len(dw), -1).sum(1)
        return torch.cat(dx), dw, db, None, None, None
