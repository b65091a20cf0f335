"""The published computation, written plainly from docs/METHOD.md, for bench.py to compare with.

Each use of a sub-batch is its own forward pass; masks are those of torch.nn.utils.prune; and every
batch ends with .item().
"""

import torch
import torch.nn.functional as F
from torch.nn.utils import prune as torch_prune


def plain(model):
    """Our ResNet18 with the stride of the shortcuts in their convolutions, as published.

    What it shares with ours: ReLU and shortcuts work in place.
    """
    for module in model.modules():
        if hasattr(module, "shortcut"):
            module.shortcut[0].stride = (module.stride, module.stride)
            module.stride = 1
    return model.to(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------ training


def distillation(logits, stored):
    """Distillation at temperature 2; both [n,classes]."""
    soft = F.softmax(stored / 2, dim=1)
    return -4 * (soft * F.log_softmax(logits / 2, dim=1)).sum(1).mean()


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def task1_step(model, optimizer, x, y):
    loss = F.cross_entropy(model(x, 1, main_fc=False), y)
    loss = loss + F.cross_entropy(model(x, 1, main_fc=True), y)
    return step(optimizer, loss)


def kd_step(model, optimizer, k, sub, random, new, old, unlabeled):
    (x, y), (x_new, y_new), (x_old, y_old), (u, stored, stored_main) = random, new, old, unlabeled
    a, b = int(sub / k) / sub, int(sub * (k - 1) / k) / sub
    loss = F.cross_entropy(model(x, k, main_fc=False), y)
    balanced = a * F.cross_entropy(model(x_new, k, main_fc=True), y_new)
    balanced = balanced + b * F.cross_entropy(model(x_old, k, main_fc=True), y_old)
    loss = loss + distillation(model(u, k - 1, main_fc=False), stored)
    balanced = balanced + distillation(model(u, k - 1, main_fc=True), stored_main)
    return step(optimizer, loss + 0.5 * balanced)


# ------------------------------------------------------------------------------ the rest


def query(exemplars, pool, num):
    """Each exemplar in turn takes its `num` nearest pool rows not yet taken: int64 [m*num].

    A plain brute-force search.
    """
    taken = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
    selected = []
    for exemplar in exemplars:
        nearest = (pool - exemplar).pow(2).sum(1).sqrt().argsort()
        nearest = nearest[~taken[nearest]][:num]
        taken[nearest] = True
        selected.append(nearest)
    return torch.cat(selected)


def prune(model, percent):
    """Prune all convolutions together once."""
    torch_prune.global_unstructured(
        [(m, "weight") for m in model.modules() if isinstance(m, torch.nn.Conv2d)],
        pruning_method=torch_prune.L1Unstructured,
        amount=percent,
    )
