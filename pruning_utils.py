"""Masks: prune globally, apply, extract, rewind, count (METHOD.md section 6).

A dict of masks maps the name of a convolution ('layer1.0.conv1') to a float32 0/1 tensor of its
weight's shape, 1 where the weight remains; an empty dict means dense. In a model and in
checkpoints a mask lives as torch.nn.utils.prune has it: weight_orig and weight_mask in place of
weight. Convolutions alone are pruned and counted.
"""

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import utils
from utils import Refusal

ORIG, MASK = ".weight_orig", ".weight_mask"


def convolutions(model):
    """{name: Conv2d} in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def weights(model):
    """{name: weight} of the convolutions: the trained tensors, weight_orig where one is pruned."""
    return {
        name: conv.weight_orig.detach() if torch_prune.is_pruned(conv) else conv.weight.detach()
        for name, conv in convolutions(model).items()
    }


def masks_of(model):
    """A copy of the masks that the model is under; all ones where it is dense."""
    own = extract_mask(clone_state(model))
    return own or {n: torch.ones_like(w, dtype=torch.float32) for n, w in weights(model).items()}


def prune(weights, masks, percent, kept=None):
    """Drop the round(percent * n) smallest of the n remaining weights, over all layers together.

    weights, masks: {name: tensor}; percent: a share (0.2 = 20 %); kept: masks of weights that are
    neither ranked nor dropped (re-growth keeps the current mask). Returns new masks. The ranks
    are those of the given weights, unlike the published code's, which reads a cached product.
    Equal magnitudes at the threshold: the first in the model's order go.
    """
    flat = torch.cat([masks[name].flatten() for name in weights])
    ranked = flat != 0
    if kept is not None:
        ranked &= torch.cat([kept[name].flatten() for name in weights]).to(flat.device) == 0
    magnitude = torch.cat([w.flatten() for w in weights.values()]).abs_()
    magnitude.masked_fill_(~ranked, torch.inf)
    count = round(percent * int(ranked.count_nonzero()))
    if count:
        threshold = utils.kth_smallest(magnitude, count)
        drop = magnitude < threshold
        ties = (magnitude == threshold).nonzero().squeeze(1)
        drop[ties[: count - int(drop.count_nonzero())]] = True
        flat.masked_fill_(drop, 0)
    parts = flat.float().split([w.numel() for w in weights.values()])
    return {name: part.view_as(weights[name]) for name, part in zip(weights, parts)}


def density(masks):
    """Share of the convolution weights that remain, in percent."""
    left = sum(int(mask.count_nonzero()) for mask in masks.values())
    return 100.0 * left / sum(mask.numel() for mask in masks.values())


def densities(masks):
    """Share of the weights that remain in each convolution, {name: percent}."""
    return {name: density({name: mask}) for name, mask in masks.items()}


def apply_mask(model, masks):
    """Put the model under masks (replacing those it has); an empty dict makes it dense.

    Parameters stay the same objects, so that an optimizer goes on with its momentum.
    """
    if not masks:
        remove_mask(model)
    for name, conv in convolutions(model).items() if masks else ():
        if torch_prune.is_pruned(conv):
            conv.weight_mask.copy_(masks[name])
        else:
            mask = masks[name].to(conv.weight.device, conv.weight.dtype, copy=True)
            torch_prune.custom_from_mask(conv, "weight", mask)


def remove_mask(model):
    """Make the model dense again: weight_orig is taken whole, what the mask hid included."""
    for conv in convolutions(model).values():
        if torch_prune.is_pruned(conv):
            whole = conv.weight_orig.detach().clone()
            torch_prune.remove(conv, "weight")
            conv.weight.data = whole


def extract_mask(state):
    """The masks in a state dict of the published form; an empty dict if it is dense."""
    return {key[: -len(MASK)]: mask for key, mask in state.items() if key.endswith(MASK)}


def dense_state(state):
    """A state dict with weight_orig taken whole as weight, and no masks."""
    return {
        key.replace(ORIG, ".weight"): value
        for key, value in state.items()
        if not key.endswith(MASK)
    }


def clone_state(model):
    """A copy of the model's state dict, which further training leaves alone."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def load_state(model, state, masks=None, source="the state dict"):
    """Put a state dict, pruned or dense, into the model.

    masks: what to put the model under instead of the state's own masks ({}: dense).
    Raises Refusal, naming `source`, when the state does not fit the model.
    """
    own = extract_mask(state)
    dense = dense_state(state)
    refuse_misfit(model, dense, source)
    masks = own if masks is None else masks
    check_masks(model, masks, source)
    remove_mask(model)
    model.load_state_dict(dense)
    apply_mask(model, masks)


def refuse_misfit(model, dense, source):
    """Say in one line how a dense state dict and the model differ, if they do."""
    wanted = dense_state(model.state_dict())

    def rows(state, key):
        return state[key].shape[0] if key in state and state[key].ndim else 0

    width, own = (rows(s, "conv1.weight") for s in (dense, wanted))
    if width and width != own:
        raise Refusal(f"{source}: is of width {width}, this run has --width {own}; give the same")
    heads = [sum(key.startswith("linear.") for key in s) // 2 for s in (dense, wanted)]
    classes = [rows(s, "linear.0.weight") for s in (dense, wanted)]
    if heads[0] and (heads[0] != heads[1] or classes[0] != classes[1]):
        raise Refusal(
            f"{source}: has {heads[0]} heads of {classes[0]} classes, this run {heads[1]} of "
            f"{classes[1]}; see --dataset, --classifiers, --classes_per_classifier"
        )
    differing = [
        key
        for key in {**wanted, **dense}
        if key not in wanted or key not in dense or wanted[key].shape != dense[key].shape
    ]
    if differing:
        raise Refusal(f"{source}: does not fit this network at {differing[0]}, give another file")
    for key, value in dense.items():  # after their shapes: one value can be expanded to any number
        if value.dtype != wanted[key].dtype or not bool(value.isfinite().all()):
            words = f"holds no finite {wanted[key].dtype} numbers, give another file"
            raise Refusal(f"{source}: {key} {words}")


def check_masks(model, masks, source):
    """Refuse masks that are not of the model's convolutions or hold more than zeros and ones."""
    if not masks:
        return
    convs = weights(model)
    for name in {**convs, **masks}:
        if name not in masks or name not in convs or masks[name].shape != convs[name].shape:
            raise Refusal(f"{source}: its masks do not fit this network at {name}, see --width")
        if masks[name].dtype not in (torch.float32, convs[name].dtype):
            raise Refusal(f"{source}: the mask of {name} is {masks[name].dtype}, give float32")
        if not bool(((masks[name] == 0) | (masks[name] == 1)).all()):
            raise Refusal(f"{source}: the mask of {name} is not of zeros and ones, give another")


def rewind(model, state, scope="conv"):
    """Set the convolution weights back to those of `state`, under the masks that the model has.

    scope 'conv' leaves BatchNorm and heads as they are (published); 'all' rewinds them too.
    """
    source = dense_state(state)
    with torch.no_grad():
        for name, weight in weights(model).items():
            weight.copy_(source[name + ".weight"])
        if scope == "all":
            kept = {name + ending for name in weights(model) for ending in (".weight", ORIG, MASK)}
            for key, value in model.state_dict().items():
                if key not in kept:
                    value.copy_(source[key])


def random_mask(masks, generator):
    """Masks of as many weights in all, anywhere in the network; generator: a CPU torch.Generator.

    masks as above; the density is exactly the same, that of each layer is left to chance.
    """
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    order = torch.randperm(flat.numel(), generator=generator).to(flat.device)
    parts = flat[order].split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(masks[name]) for name, part in zip(masks, parts)}


def shuffle_mask(masks, generator):
    """Masks of as many weights in every layer, in random places; generator as in random_mask."""
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for name, mask in masks.items()
    }


def shuffle_weights(model, masks, generator):
    """Shuffle the weights that `masks` leave among their places in each layer, in place.

    generator as in random_mask. Weights outside the masks stay as they are.
    """
    for name, weight in weights(model).items():
        left = masks[name].to(weight.device) != 0
        values = weight[left]
        weight[left] = values[torch.randperm(len(values), generator=generator).to(weight.device)]


def save_masks(path, masks):
    """Write masks as the published files hold them: '<conv>.weight_mask' -> float32 0/1."""
    return utils.save(path, {name + MASK: mask.float() for name, mask in masks.items()})


def load_masks(path):
    """Masks from a mask file or any pruned checkpoint. Raises Refusal if there are none."""
    masks = extract_mask(utils.read_state(path))
    if not masks:
        raise Refusal(f"{path}: holds no masks, give a mask file or a pruned checkpoint")
    return masks
