"""Lottery teaching: query the pool for images near the exemplars, store the teacher's logits.

docs/METHOD.md section 5; section 3.3 of the paper. Files in --save_data_path, for each task t:

    task{t}_select_index.npy      int64 [n], indices into the pool
    task{t}_img.npy               uint8 [n,3,H,W], augmented once (published: float32, normalized)
    task{t}_dis_label.npy         float32 [n, t*c], logits of the random heads
    task{t}_dis_label_main.npy    float32 [n, t*c], logits of the balanced heads
"""

import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dataset
import utils
from runtime.errors import UserError
from runtime.files import load_array, save_array
from trainer import Task, extract_features, soften

DISTANCES_AT_ONCE = 2**24  # 128 MiB of float64
ROUNDING = 1e-12  # of a product of features, relative to their squares: more than it can be


@torch.no_grad()
def query(exemplars, pool, num):
    """Each exemplar in turn takes its `num` nearest pool rows that are not taken yet.

    exemplars: features [m,d]; pool: features [p,d]. Returns int64 [min(m*num, p)]: indices into
    the pool, exemplar after exemplar, nearest first. Equal distances: the lower index first.
    Distances are Euclidean, in float64; a block of exemplars is compared with the pool at a time.
    """
    if pool.device.type == "mps":  # has no float64
        return query(exemplars.cpu(), pool.cpu(), num).to(pool.device)
    exemplars, pool = exemplars.double(), pool.double()
    squares = pool.square().sum(1)
    longest = squares.max()
    taken = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
    selected = taken.new_empty(min(num * len(exemplars), len(pool)), dtype=torch.long)
    done, block_size = 0, max(1, DISTANCES_AT_ONCE // max(1, len(pool)))
    with tqdm(desc="query", total=len(exemplars), disable=None, leave=False) as bar:
        for block in exemplars.split(block_size):
            # |e-p|^2 less |e|^2, which is the same for all p
            for exemplar, distances in zip(block, torch.addmm(squares, block, pool.T, alpha=-2)):
                wanted = min(num, len(selected) - done)
                if not wanted:
                    return selected
                distances.masked_fill_(taken, torch.inf)
                # Those that rounding cannot tell from the nearest are compared by differences,
                # which are the same for equal images: their products may not be.
                margin = ROUNDING * (exemplar.square().sum() + longest)
                limit = utils.kth_smallest(distances, wanted) + margin
                near = (distances <= limit).nonzero().squeeze(1)
                exact = (pool[near] - exemplar).square().sum(1)
                nearest = near[exact.sort(stable=True).indices[:wanted]]
                taken[nearest] = True
                selected[done : done + wanted] = nearest
                done += wanted
                bar.update()
    return selected


@torch.no_grad()
def teach(model, data, run, t):
    """Query with the teacher's features of all exemplars so far; store images and logits.

    model: the teacher, task t's model. Writes the files above, once in the life of the run;
    none with --no_teaching.
    """
    stage, args = f"task{t}_teaching", run.args
    if args.no_teaching or run.done(stage):
        return
    exemplars, _ = data.select_tasks(data.exemplars, 1, t)
    run.log(f"task {t}: {len(exemplars)} exemplars query the pool of {len(data.pool)} images")
    selected = query(
        extract_features(model, exemplars, data, args.batch_size),
        extract_features(model, data.pool, data, args.batch_size, f"task {t}: pool features"),
        args.unlabel_num,
    )
    wanted = args.unlabel_num * len(exemplars)
    if len(selected) < wanted:
        print(f"task {t}: the pool ran out: {len(selected)} images instead of {wanted}")
    generator = utils.make_generator(args.seed, utils.TASK.format(t), 0, "teaching")
    images = augmented_views(data, selected, args.batch_size, generator)
    features = extract_features(model, images, data, args.batch_size)
    arrays = {
        "select_index": selected,
        "dis_label": model.logits(features, t, main_fc=False).float(),
        "dis_label_main": model.logits(features, t, main_fc=True).float(),
        "img": images.permute(0, 3, 1, 2).contiguous(),
    }
    names = {f"data/task{t}_{name}.npy": tensor.cpu().numpy() for name, tensor in arrays.items()}
    for name, array in names.items():
        run.save(name, save_array, array)
    run.finish(stage, *names)


def augmented_views(data, indices, batch_size, generator):
    """One training view of each pool image: uint8 [n,H,W,3]."""
    views = torch.stack(dataset.draw_views(len(indices), data.pad, generator)).to(indices.device)
    parts = zip(indices.split(batch_size), views.split(batch_size, dim=1))
    return torch.cat([dataset.augment(data.pool[rows], *own, data.pad) for rows, own in parts])


def soft_label_files(args, t):
    """Paths of the images, logits and logits_main that task t learns from; none without any."""
    names = ("img", "dis_label", "dis_label_main") if t > 1 and not args.no_teaching else ()
    return [Path(args.save_data_path) / f"task{t - 1}_{name}.npy" for name in names]


def load_logits(data, args, t):
    """What task t learns from the teacher of task t-1: images, logits, logits_main, on the device.

    images: uint8 [n,H,W,3], or float32 [n,3,H,W] from published files; logits float32 [n,(t-1)c].
    Raises UserError when a file is missing or does not fit.
    """
    paths = soft_label_files(args, t)
    if missing := [path.name for path in paths if not os.path.exists(path)]:
        raise UserError(
            f"--save_data_path {args.save_data_path}: holds no {missing[0]}; choose the data "
            f"folder of a run that has finished task {t - 1}, or give --no_teaching"
        )
    images, *logits = map(load_array, paths)
    n, classes = len(images), (t - 1) * data.classes_per_classifier
    if not n or images.dtype not in (np.uint8, np.float32):
        raise UserError(f"{paths[0]}: expected uint8 or float32 images, got {images.dtype}")
    expected = ((n, 3, *data.image_size), (n, classes), (n, classes))
    for path, array, shape in zip(paths, (images, *logits), expected):
        if array.shape != shape:
            raise UserError(f"{path}: expected shape {list(shape)}, got {list(array.shape)}")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: is not finite; choose another file")
    if images.dtype == np.uint8:
        images = images.transpose(0, 2, 3, 1)
    labels = (array.astype(np.float32, copy=False) for array in logits)
    return tuple(torch.from_numpy(each).to(data.pool.device) for each in (images, *labels))


def build_task(data, args, t, memory=None):
    """The training data of task t, with the soft labels that the teacher of task t-1 stored.

    memory: the images kept of the old classes, {class id: uint8 [n,H,W,3]}; None: the exemplars.
    """
    new = data.select_tasks(data.train, t, t)
    old = data.select_tasks(data.exemplars if memory is None else memory, 1, t - 1)
    random = tuple(torch.cat(pair) for pair in zip(new, old))
    unlabeled = None
    if t > 1 and not args.no_teaching:
        images, *logits = load_logits(data, args, t)
        unlabeled = images, *map(soften, logits)
    return Task(t, data, random, len(new[1]), unlabeled)
