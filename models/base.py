"""What every backbone shares: heads, features, logits, and whether a state dict fits.

The heads are those of the published code: `linear` learns from random batches, `linear_main` from
class-balanced ones and gives the predictions (docs/METHOD.md section 3).
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from models.batchnorm import BatchNorm2d

ORIG, MASK = ".weight_orig", ".weight_mask"  # as torch.nn.utils.prune names them


class LifelongNet(nn.Module):
    """A backbone and its heads. A subclass sets `arch` and `default_width`, builds its layers,
    calls add_heads() and defines body(): images [n,3,H,W] to feature maps [n,d,h,w].

    arch: its name in --arch. default_width: channels of the first layer unless --width is given.
    bf16: the backbone computes in bfloat16 (autocast); weights, statistics, features and heads
    stay float32.
    """

    arch, default_width = None, None
    bf16 = False

    def add_heads(self, features, classes_per_classifier, classifiers):
        """Add two heads for each task; features: length of the feature vector."""
        self.linear_main, self.linear = (
            nn.ModuleList(nn.Linear(features, classes_per_classifier) for _ in range(classifiers))
            for _ in range(2)
        )

    def features(self, x, groups=()):
        """Images [n,3,H,W], normalized, to features [n,d], float32.

        groups: ((size, passes), ...), the sub-batches that BatchNorm normalizes separately.
        """
        norms = [module for module in self.modules() if isinstance(module, BatchNorm2d)]
        for norm in norms:
            norm.groups = groups
        if norms and self.training and groups:
            passes = sum(times for _, times in groups)
            torch._foreach_add_([norm.num_batches_tracked for norm in norms], passes)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.body(x)
        return x.mean((2, 3), dtype=self.linear[0].weight.dtype)  # global average pooling

    def logits(self, features, out_idx, main_fc):
        """Features [n,d] to the logits [n, out_idx*c] of the first `out_idx` heads.

        main_fc: the balanced heads (True), the random ones (False), or both, the random ones first
        (None): [n, 2*out_idx*c].
        """
        kinds = self.linear, self.linear_main
        kinds = kinds if main_fc is None else [kinds[main_fc]]
        heads = [head for kind in kinds for head in kind[:out_idx]]
        weight = torch.cat([head.weight for head in heads])
        return F.linear(features, weight, torch.cat([head.bias for head in heads]))

    def forward(self, x, out_idx=None, main_fc=None, is_feature=False):
        """Logits of the first `out_idx` heads (None: all), or the features [n,d].

        The arguments are those of the published forward. Its default, main_fc=False, gives the
        heads that do not predict, so here one of the two must be named.
        """
        features = self.features(x)
        if is_feature:
            return features
        if main_fc is None:
            raise TypeError("give main_fc=True (balanced heads) or main_fc=False (random heads)")
        return self.logits(features, out_idx, main_fc)

    def explain_mismatch(self, state):
        """Why a dense state dict does not fit this network, as the end of a message; None if it
        does. state: {key: tensor} of any shapes.
        """
        own, found = (
            {key: tuple(value.shape) for key, value in each.items()}
            for each in (dense_state(self.state_dict()), state)
        )
        keys = [*own, *(key for key in found if key not in own)]
        for key in keys:
            if not key.startswith("linear") and (key not in own or key not in found):
                return f"does not fit {self.arch} at {key}; choose another --arch"
        first = keys[0]  # the first convolution, whose outputs are the width
        if own[first] != found[first] and own[first][1:] == found[first][1:]:
            width = found[first][0]
            return f"has width {width}, not {own[first][0]}; use --width {width}"
        heads, expected = count_heads(found), count_heads(own)
        if heads != expected:
            return (
                f"has {heads[0]} heads of {heads[1]} classes, not {expected[0]} of {expected[1]}; "
                f"choose other --dataset, --classifiers or --classes_per_classifier"
            )
        for key in keys:
            if own.get(key) != found.get(key):
                return f"does not fit {self.arch} at {key}; choose another file"
        return None


def count_heads(shapes):
    """Number of heads of each kind and classes of the first, from {key: shape}."""
    rows = [shape[:1] for key, shape in shapes.items() if re.fullmatch(r"linear\.\d+\.weight", key)]
    return len(rows), rows[0][0] if rows and rows[0] else 0


def dense_state(state):
    """A state dict with weight_orig as weight, and without masks."""
    return {
        key.replace(ORIG, ".weight"): value
        for key, value in state.items()
        if not key.endswith(MASK)
    }
