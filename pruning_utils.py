"""Masks: score, prune globally, apply, extract, rewind, count (docs/METHOD.md section 6).

A dict of masks maps the name of a convolution ('layer1.0.conv1') to a float32 0/1 tensor of its
weight's shape, 1 where the weight remains; an empty dict means dense. In a model and in
checkpoints a mask lives as torch.nn.utils.prune has it: weight_orig and weight_mask in place of
weight. Convolutions alone are pruned and counted.
"""

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import utils
from models.base import MASK, dense_state
from models.cost import cost
from runtime.errors import UserError


def convolutions(model):
    """{name: Conv2d} in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def weights(model):
    """{name: weight} of the convolutions: what is trained, weight_orig where one is pruned."""
    return {
        name: conv.weight_orig.detach() if torch_prune.is_pruned(conv) else conv.weight.detach()
        for name, conv in convolutions(model).items()
    }


def masks_of(model):
    """A copy of the masks that the model is under; all ones where it is dense."""
    own = extract_mask(clone_state(model))
    return own or {n: torch.ones_like(w, dtype=torch.float32) for n, w in weights(model).items()}


# ------------------------------------------------------------------------------ criteria


def magnitude(model, task=None, generator=None):
    """Scores: the magnitude of each weight (published)."""
    return {name: weight.abs() for name, weight in weights(model).items()}


def random_scores(model, task, generator):
    """Scores: uniform random numbers, the same on every device. A control."""
    return {
        name: torch.rand(weight.shape, generator=generator).to(weight.device)
        for name, weight in weights(model).items()
    }


# --criterion: {name: function of the model, the trainer.Task that it has learned and a CPU
# torch.Generator, which returns a float score for each weight, {convolution: tensor of the weight's
# shape}; the smallest are pruned}
CRITERIA = {"magnitude": magnitude, "random": random_scores}


def prune_once(model, task, masks, args, stream, kept=None):
    """The masks after one more pruning by --criterion and --percent; stream: see utils.py.

    The scores are of the current weights, unlike the published code's, which are of a cached
    product of weight and mask. kept: as in prune(). Raises UserError if no weight is left.
    """
    generator = utils.make_generator(args.seed, stream, "scores")
    scores = CRITERIA[args.criterion](model, task, generator)
    pruned = prune(scores, masks, args.percent, kept)
    if not any(mask.any() for mask in pruned.values()):
        raise UserError(
            f"--percent {args.percent:g}: no weight is left; choose fewer prunings or a smaller "
            f"--percent"
        )
    return pruned


def prune(scores, masks, percent, kept=None):
    """Prune the round(percent * n) lowest-scored of the n remaining weights, over all layers.

    scores, masks: {name: tensor}; percent: a share (0.2 = 20 %); kept: masks of weights that are
    neither ranked nor pruned (re-growth keeps the current mask). Returns new masks, float32.
    Equal scores at the threshold: the first in the model's order go.
    """
    flat = torch.cat([masks[name].flatten() for name in scores])
    ranked = flat != 0
    if kept is not None:
        ranked &= torch.cat([kept[name].flatten() for name in scores]).to(flat.device) == 0
    ranking = torch.cat([each.flatten() for each in scores.values()])
    ranking.masked_fill_(~ranked, torch.inf)
    count = round(percent * int(ranked.count_nonzero()))
    if count:
        threshold = utils.kth_smallest(ranking, count)
        drop = ranking < threshold
        ties = (ranking == threshold).nonzero().squeeze(1)
        drop[ties[: count - int(drop.count_nonzero())]] = True
        flat.masked_fill_(drop, 0)
    parts = flat.float().split([each.numel() for each in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts)}


# ------------------------------------------------------------------------------ masks in a model


def density(masks):
    """Share of the convolution weights that remain, in percent."""
    if not masks:
        return 100.0
    left = sum(int(mask.count_nonzero()) for mask in masks.values())
    return 100.0 * left / sum(mask.numel() for mask in masks.values())


def densities(masks):
    """Share of the weights that remain in each convolution, {name: percent}."""
    return {name: density({name: mask}) for name, mask in masks.items()}


def network_record(masks, args, data):
    """The fields of a record that describe the network of args under masks (see models/cost.py)."""
    layers = densities(masks)
    costs = cost(args, data.image_size, layers)
    return {"density": density(masks), "layer_density": layers, "cost": costs}


def ticket_record(masks, args, data, tested):
    """The fields of a record of a ticket, made after a network of density `tested` was tested."""
    found = network_record(masks, args, data)
    return found | {"ticket_density": found["density"], "density": tested}


def describe(masks):
    """The density of masks as text, and which layers they leave without a weight."""
    empty = [name for name, mask in masks.items() if not mask.any()]
    return f"{density(masks):.2f} % remain" + f", none in {', '.join(empty)}" * bool(empty)


def apply_mask(model, masks):
    """Put the model under masks (replacing those it has); an empty dict makes it dense.

    Parameters stay the same objects, so that an optimizer goes on with its momentum.
    """
    remove_mask(model)
    for name, mask in masks.items():
        conv = model.get_submodule(name)
        torch_prune.custom_from_mask(conv, "weight", mask.to(conv.weight))


def remove_mask(model):
    """Make the model dense again; all of weight_orig comes back, masked weights too."""
    for conv in convolutions(model).values():
        if torch_prune.is_pruned(conv):
            dense = conv.weight_orig.detach().clone()
            torch_prune.remove(conv, "weight")
            conv.weight.data = dense


def extract_mask(state):
    """The masks in a state dict of the published form; an empty dict if it is dense."""
    return {key[: -len(MASK)]: mask for key, mask in state.items() if key.endswith(MASK)}


def clone_state(model):
    """A copy of the model's state dict, which further training does not change."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def load_state(model, state, masks=None, source="the state dict"):
    """Put a state dict, pruned or dense, into the model.

    masks: what to put the model under instead of the state's own masks ({}: dense).
    Raises UserError, naming `source`, when the state does not fit the model.
    """
    dense = dense_state(state)
    masks = extract_mask(state) if masks is None else masks
    check_state(model, dense, source)
    check_masks(model, masks, source)
    remove_mask(model)
    model.load_state_dict(dense)
    apply_mask(model, masks)


def check_state(model, dense, source):
    """Raise UserError unless a dense state dict fits the model and is finite."""
    if not dense:
        raise UserError(f"{source}: is a mask file, without weights; choose a checkpoint")
    if reason := model.explain_mismatch(dense):
        raise UserError(f"{source}: {reason}")
    for key, value in dense.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{source}: {key} is not finite; choose another file")


def check_masks(model, masks, source):
    """Raise UserError unless masks are zeros and ones of the shapes of the model's convolutions."""
    if not masks:
        return
    convs = weights(model)
    for name in {**convs, **masks}:
        if name not in masks or name not in convs or masks[name].shape != convs[name].shape:
            raise UserError(
                f"{source}: its masks do not fit this network at {name}; see --arch and --width"
            )
        if not bool(((masks[name] == 0) | (masks[name] == 1)).all()):
            raise UserError(f"{source}: the mask of {name} holds other values than 0 and 1")


@torch.no_grad()
def rewind(model, state):
    """Set the convolution weights back to those of `state`.

    The model keeps its masks, BatchNorm and heads.
    """
    source = dense_state(state)
    for name, weight in weights(model).items():
        weight.copy_(source[name + ".weight"])


def random_mask(masks, generator):
    """A mask of the same density at random positions of the whole network.

    generator: a CPU torch.Generator. The density of each layer is left to chance.
    """
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    order = torch.randperm(flat.numel(), generator=generator).to(flat.device)
    parts = flat[order].split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(masks[name]) for name, part in zip(masks, parts)}


def shuffle_mask(masks, generator):
    """A mask of the same density in each layer, at random positions; generator: see random_mask."""
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for name, mask in masks.items()
    }


def shuffle_weights(model, masks, generator):
    """Shuffle the remaining weights of each layer among their positions, in place.

    generator as in random_mask. Weights outside the masks stay as they are.
    """
    for name, weight in weights(model).items():
        left = masks[name].to(weight.device) != 0
        values = weight[left]
        weight[left] = values[torch.randperm(len(values), generator=generator).to(weight.device)]


def mask_state(masks):
    """Masks as files hold them: {'<conv>.weight_mask': float32 0/1}."""
    return {name + MASK: mask.float() for name, mask in masks.items()}
