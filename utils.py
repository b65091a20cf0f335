"""Random streams, and the k-th smallest of many numbers."""

import hashlib

import torch

# What the random draws of a stage derive from, beside the seed. These texts are part of what a seed
# means: stages and files may be renamed, these may not.
TASK = "task{}"
TASK_UNDER_MASK = "task{}_prun"  # main_BU
TOP_DOWN = "task{}_prune{}"  # a task and its pruning round, in main_TD
BOTTOM_UP = "task{}_round{}"  # likewise in main_BU
RETRAINING = "retrain_task{}"  # main_train; of a control, retrain_task{}_<control>


def derive_seed(seed, *purpose):
    """A 63-bit seed from the run's seed and what it is for: stage, epoch, purpose, ..."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_generator(seed, *purpose):
    """A CPU torch.Generator of its own for each purpose: no draw depends on what was drawn before.

    It is a CPU one whatever the device, so that the draws are the same everywhere.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def kth_smallest(values, k):
    """The k-th smallest (from 1) of values [n], as a scalar tensor.

    kthvalue has no deterministic form on CUDA, because of the index that it also returns.
    """
    if torch.are_deterministic_algorithms_enabled():
        return values.sort().values[k - 1]
    return values.kthvalue(k).values
