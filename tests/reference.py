"""Training and querying as in the published code, plain and slow (docs/METHOD.md sections 4, 5).

Nothing here is shared with the code under test. Each use of a batch is a separate forward pass, so
BatchNorm needs no groups, and distances are computed one exemplar at a time.
"""

import numpy as np
import torch
from torch.nn.utils import prune as torch_prune


def cross_entropy(logits, labels):
    """Mean over n of -log softmax at the label. logits [n,classes], labels [n]."""
    total = 0
    for row, label in zip(logits, labels):
        total = total + row.exp().sum().log() - row[label]
    return total / len(logits)


def distillation(logits, stored):
    """4 * mean over n of -sum softmax(stored/2) log_softmax(logits/2); both [n,classes]."""
    total = 0
    for row, teacher in zip(logits / 2, stored / 2):
        soft = teacher.exp() / teacher.exp().sum()
        total = total - (soft * (row - row.exp().sum().log())).sum()
    return 4 * total / len(logits)


def task1_loss(model, x, y):
    """The loss and its terms. The batch passes twice, once for each kind of heads."""
    random = cross_entropy(model(x, 1, main_fc=False), y)
    new = cross_entropy(model(x, 1, main_fc=True), y)
    return random + new, {"random": random, "new": new}


def kd_terms(model, k, random, new, old, unlabeled):
    """The terms of the loss of task k, from as many passes in the published order.

    Two less without unlabeled images (--no_teaching), one less without old ones (--finetune).
    """
    (x, y), (x_new, y_new), (x_old, y_old) = random, new, old
    terms = {
        "random": cross_entropy(model(x, k, main_fc=False), y),
        "new": cross_entropy(model(x_new, k, main_fc=True), y_new),
    }
    if len(x_old):
        terms["old"] = cross_entropy(model(x_old, k, main_fc=True), y_old)
    if unlabeled:
        u, stored, stored_main = unlabeled
        terms["distillation"] = distillation(model(u, k - 1, main_fc=False), stored)
        terms["distillation_main"] = distillation(model(u, k - 1, main_fc=True), stored_main)
    return terms


def kd_loss(model, k, sub, batch):
    """The loss of task k and its terms; a and b depend on the batch size, not on the batch."""
    terms = kd_terms(model, k, *batch)
    a, b = int(sub / k) / sub, int(sub * (k - 1) / k) / sub
    balanced = a * terms["new"] + b * terms.get("old", 0) + terms.get("distillation_main", 0)
    return terms["random"] + terms.get("distillation", 0) + 0.5 * balanced, terms


def kd_loss_merged(model, k, sub, batch):
    """As kd_loss(), but all images pass once, together: --merge_batchnorm."""
    images = [part[0] for part in batch if part]
    features = model(torch.cat(images), is_feature=True).split([len(x) for x in images])
    features = {id(x): of_x for x, of_x in zip(images, features)}

    def forward(x, heads, main_fc):
        return model.logits(features[id(x)], heads, main_fc)

    return kd_loss(forward, k, sub, batch)


def random_masks(model, seed, share=0.5):
    """Masks of all convolutions: {name: float32 of 0 and 1}, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.rand(module.weight.shape, generator=generator) < share).float()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    }


def apply_masks(model, masks):
    """Prune with torch.nn.utils.prune. masks: {name of a convolution: 0/1 tensor}."""
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        torch_prune.custom_from_mask(modules[name], "weight", mask.to(modules[name].weight))


def accuracy(model, x, labels, k):
    """Percent of the images x [n,3,H,W] that heads 1..k classify correctly, one by one."""
    model.eval()
    correct = 0
    for image, label in zip(x, labels):
        with torch.no_grad():
            correct += int(model(image[None], k, main_fc=True).argmax()) == int(label)
    return 100 * correct / len(labels)


def view(image, flip, dy, dx, pad):
    """One training view of an image [H,W,3] (NumPy): flip, then pad with black, then crop."""
    height, width, _ = image.shape
    if flip:
        image = image[:, ::-1]
    padded = np.zeros((height + 2 * pad, width + 2 * pad, 3), image.dtype)
    padded[pad : pad + height, pad : pad + width] = image
    return padded[dy : dy + height, dx : dx + width]


def find_view(found, image, pad):
    """The (flip, dy, dx) with which `found` [H,W,3] is a view of `image`, or None."""
    for flip in (False, True):
        for dy in range(2 * pad + 1):
            for dx in range(2 * pad + 1):
                if np.array_equal(found, view(image, flip, dy, dx, pad)):
                    return flip, dy, dx
    return None


def normalize(images, mean, std):
    """uint8 [n,H,W,3] to [n,3,H,W]: to [0,1], then mean and std (floats per channel)."""
    images = np.asarray(images).astype(np.float64) / 255
    channels = [(images[..., i] - mean[i]) / std[i] for i in range(3)]
    return torch.from_numpy(np.stack(channels, axis=1))


def query(exemplars, pool, num):
    """Indices into the pool: each exemplar takes its `num` nearest images not taken yet."""
    exemplars, pool = np.asarray(exemplars, np.float64), np.asarray(pool, np.float64)
    taken = []
    for exemplar in exemplars:
        distances = np.array([np.sqrt(((exemplar - image) ** 2).sum()) for image in pool])
        free = [i for i in np.argsort(distances, kind="stable") if i not in set(taken)]
        taken += free[:num]
    return taken
