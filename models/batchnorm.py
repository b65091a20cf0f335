"""BatchNorm for several sub-batches that pass through the network together, on one or more ranks.

torch.nn.SyncBatchNorm knows no sub-batches and runs on CUDA only.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that normalizes the groups of a batch separately, as if each had passed alone.

    groups: ((size, passes), ...) along the batch. The running statistics move as if the groups
    had come one after the other, each `passes` times: its statistics are the same every time, so
    that equals one update with momentum 1-(1-m)^passes. Empty: the whole batch, once. In eval mode
    groups have no effect. Under torchrun a size is that of this rank's share of the group, which
    may be 0, and the statistics are those of the whole group.
    """

    groups = ()

    def forward(self, x):
        if not self.training or not self.groups:
            return super().forward(x)
        sizes, passes = zip(*self.groups)
        self.num_batches_tracked += sum(passes)
        momenta = [1 - (1 - self.momentum) ** times for times in passes]
        running = self.running_mean, self.running_var
        if dist.is_available() and dist.is_initialized():
            n, mean, var = statistics = group_statistics(x.split(sizes), *running)
            for old, new in zip(running, (mean, var * (n / (n - 1)))):
                for of_group, momentum in zip(new, momenta):
                    old.lerp_(of_group, momentum)
            return Normalize.apply(x, self.weight, self.bias, (sizes, *statistics), self.eps)
        parts = [
            F.batch_norm(part, *running, self.weight, self.bias, True, momentum, self.eps)
            for part, momentum in zip(x.split(sizes), momenta)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def group_statistics(parts, running_mean, running_var):
    """Over all ranks: number of values [g,1], mean [g,c] and biased variance [g,c] of each group.

    parts: this rank's share of each, [n,c,H,W]. The running statistics only say the dtype.
    """
    channels = len(running_mean)
    own = running_mean.new_zeros(len(parts), 1 + 2 * channels)
    for row, part in zip(own, parts):
        if len(part):
            row[0] = part.numel() // channels
            row[1:] = torch.cat(
                torch.batch_norm_update_stats(part, running_mean, running_var, momentum=0.0)
            )
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    n, means, variances = torch.stack(everyone).split([1, channels, channels], dim=2)
    total = n.sum(0)
    mean = (n * means).sum(0) / total
    return total, mean, (n * (variances + (means - mean).square())).sum(0) / total


class Normalize(torch.autograd.Function):
    """Normalizes each group of a batch by its mean and variance, which depend on all ranks' values.

    groups: (sizes, *group_statistics()). The gradients of weight and bias are this rank's shares,
    as those of all parameters are.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        sizes, n, mean, var = groups
        ctx.save_for_backward(x, weight, n, mean, var)
        ctx.sizes, ctx.eps = sizes, eps
        parts = zip(x.split(sizes), mean, var)
        return torch.cat(
            [F.batch_norm(part, *each, weight, bias, False, 0.0, eps) for part, *each in parts]
        )

    @staticmethod
    def backward(ctx, grad):
        x, weight, n, mean, var = ctx.saved_tensors
        grads, parts = grad.split(ctx.sizes), x.split(ctx.sizes)
        sums = mean.new_zeros(2, *mean.shape)  # of grad * normalized x, and of grad
        of_parts = []  # as if mean and variance were constants
        for i, (part, of_output) in enumerate(zip(parts, grads)):
            of_parts.append(torch.empty_like(part))
            if len(part):
                of_parts[i], sums[0, i], sums[1, i] = torch.ops.aten.native_batch_norm_backward(
                    of_output, part, weight, mean[i], var[i], None, None, False, ctx.eps, [True] * 3
                )
        own = sums.sum(1)
        dist.all_reduce(sums)
        scale = (var + ctx.eps).rsqrt()
        slope = -weight * scale.square() * sums[0] / n
        offset = -weight * scale * sums[1] / n - slope * mean
        for of_part, part, a, b in zip(of_parts, parts, slope, offset):
            of_part.addcmul_(part, a[:, None, None]).add_(b[:, None, None])
        return torch.cat(of_parts), *own, None, None
