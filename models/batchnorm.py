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
        momenta = [1 - (1 - self.momentum) ** times for times in passes]
        parameters = self.running_mean, self.running_var, self.weight, self.bias
        if len(sizes) == 1:
            return F.batch_norm(x, *parameters, True, momenta[0], self.eps)
        return NormalizeGroups.apply(x, *parameters, sizes, momenta, self.eps)


class NormalizeGroups(torch.autograd.Function):
    """F.batch_norm of each group, in training, into one output; the gradients are summed once.

    x [n,C,H,W]; running_mean, running_var (updated), weight and bias [C]; sizes: those of the
    groups, n together; momenta: one for each group.
    """

    @staticmethod
    def forward(ctx, x, running_mean, running_var, weight, bias, sizes, momenta, eps):
        running, y = (running_mean, running_var), torch.empty_like(x)
        statistics = weight.new_empty(len(sizes), 2, len(weight))  # means, inverse deviations
        for part, *out, momentum in zip(x.split(sizes), y.split(sizes), statistics, momenta):
            out = out[0], *out[1]
            torch.native_batch_norm(part, weight, bias, *running, True, momentum, eps, out=out)
        ctx.save_for_backward(x, weight, statistics, *running)
        ctx.sizes, ctx.eps = sizes, eps
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, weight, statistics, *running = ctx.saved_tensors
        parts = zip(gradient.split(ctx.sizes), x.split(ctx.sizes), statistics)
        gradients = [
            torch.ops.aten.native_batch_norm_backward(
                dy, part, weight, *running, *own, True, ctx.eps, (True, True, True)
            )
            for dy, part, own in parts
        ]
        dx, dw, db = zip(*gradients)
        # the last group first, as autograd would add them
        dw, db = torch.cat(dw[::-1] + db[::-1]).view(2, len(dw), -1).sum(1)
        return torch.cat(dx), None, None, dw, db, None, None, None
