"""Lottery teaching: query the pool for images near the exemplars, store the teacher's logits.

docs/METHOD.md section 5; section 3.3 of the paper. Files in --save_data_path, for each task t:

    task{t}_select_index.npy      int64 [n], indices into the pool
    task{t}_img.npy               uint8 [n,3,H,W], augmented once (published: float32, normalized)
    task{t}_dis_label.npy         float32 [n, t*c], logits of the random heads
    task{t}_dis_label_main.npy    float32 [n, t*c], logits of the balanced heads
    task{t}_sha256sums.txt        their checksums, as sha256sum writes them (not published)
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dataset
import utils
from runtime import ranks
from runtime.arrays import load_array, save_array
from runtime.errors import UserError
from runtime.files import file_checksum, save_text
from trainer import extract_features, make_task

SUMS = "task{}_sha256sums.txt"
DISTANCES_AT_ONCE = 2**24  # 64 MiB of float32


def query(exemplars, pool, num):
    """Each exemplar in turn takes its `num` nearest pool rows that are not taken yet.

    exemplars: features [m,d]; pool: features [p,d]. Returns int64 [min(m*num, p)]: indices into
    the pool, exemplar after exemplar, nearest first. Equal distances: the lower index first.
    Distances are Euclidean; a block of exemplars is compared with the pool at a time. The pool is
    shared out among the ranks.
    """
    total, own = len(pool), ranks.share(len(pool))
    center = pool.mean(0)  # a common shift changes no distance and saves digits below
    exemplars, pool = exemplars - center, pool[own] - center
    taken = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
    squares = pool.square().sum(1)
    norms = squares.sqrt()
    rounding = pool.shape[1] * torch.finfo(pool.dtype).eps
    at_once = max(1, DISTANCES_AT_ONCE // max(1, len(pool)))
    # both are allocated once: large blocks freed between small ones would fragment memory
    block = pool.new_empty(min(at_once, len(exemplars)), len(pool))
    selected = taken.new_empty(min(num * len(exemplars), total), dtype=torch.long)
    done = 0
    for index, exemplar in enumerate(tqdm(exemplars, "query", disable=None, leave=False)):
        wanted = min(num, len(selected) - done)
        if not wanted:
            break
        if index % at_once == 0:
            # |e-p|^2 less |e|^2, which is the same for all p
            some = exemplars[index : index + at_once]
            torch.addmm(squares, some, pool.T, alpha=-2, out=block[: len(some)])
        row = block[index % at_once].masked_fill_(taken, torch.inf)
        # The product is rounded, by `error` at most: all rows that it cannot tell from the nearest
        # are compared once more, by their differences.
        error = rounding * (exemplar.norm() + norms).square()
        count = min(wanted, len(row))  # of its share, a rank may have fewer left
        limit = utils.kth_smallest(row + error, count) if count else 0
        near = (row - error <= limit).nonzero().squeeze(1)
        distances = (pool[near] - exemplar).square().sum(1).masked_fill_(taken[near], torch.inf)
        nearest = merge(distances, near + own.start, wanted)
        taken[nearest[(nearest >= own.start) & (nearest < own.stop)] - own.start] = True
        selected[done : done + wanted] = nearest
        done += wanted
    return selected


def merge(distances, rows, wanted):
    """The `wanted` nearest pool rows, int64, of the candidates of all ranks.

    distances, rows: [m] of this rank's candidates, in the order of the pool.
    """
    order = distances.sort(stable=True).indices[:wanted]
    if ranks.world() == 1:
        return rows[order]
    best = distances.new_full((wanted, 2), -1, dtype=torch.float64)
    best[: len(order)] = torch.stack([distances[order].double(), rows[order].double()], 1)
    best = ranks.gather(best, ranks.rank() * wanted, ranks.world() * wanted)
    best = best[best[:, 1] >= 0]
    return best[best[:, 0].sort(stable=True).indices[:wanted], 1].long()


def teach(model, data, run, t):
    """Query with the teacher's features of all exemplars so far; store images and logits.

    model: the teacher, task t's model. Writes the files above, once in the life of the run;
    none with --no_teaching.
    """
    step, args = f"task{t}_teaching", run.args
    if args.no_teaching or run.done(step):
        return
    exemplars, _ = data.of_tasks(data.exemplars, 1, t)
    wanted = args.unlabel_num * len(exemplars)
    run.log(f"task {t}: {len(exemplars)} exemplars query the pool of {len(data.pool)} images")
    with torch.no_grad():
        selected = query(
            extract_features(model, exemplars, data, args.batch_size),
            extract_features(model, data.pool, data, args.batch_size, f"task {t}: pool features"),
            args.unlabel_num,
        )
        if len(selected) < wanted:
            print(
                f"task {t}: the pool ran out: {len(selected)} images instead of the {wanted} that "
                f"{len(exemplars)} exemplars query"
            )
        generator = utils.stream(args.seed, f"task{t}", 0, "teaching")
        images = augmented_views(data, selected, args.batch_size, generator)
        features = extract_features(model, images, data, args.batch_size)
        labels, labels_main = (model.logits(features, t, main_fc) for main_fc in (False, True))
    save_soft_labels(run, t, selected, images, labels, labels_main)
    names = [f"data/{name}" for name in soft_label_names(t)]
    run.finish(step, *names, f"data/{SUMS.format(t)}")


def augmented_views(data, indices, batch_size, generator):
    """One training view of each pool image: uint8 [n,H,W,3]."""
    draws = dataset.draw_views(len(indices), data.pad, generator)
    chunks = (each.to(indices.device).split(batch_size) for each in draws)
    return torch.cat(
        [
            dataset.augment(data.pool[rows], *views, data.pad)
            for rows, *views in zip(indices.split(batch_size), *chunks)
        ]
    )


def soft_label_names(t):
    """The names of the teacher's files of task t; a set without the images, the last, is void."""
    return [
        f"task{t}_{name}.npy" for name in ("select_index", "dis_label", "dis_label_main", "img")
    ]


@ranks.on_rank0
def save_soft_labels(run, t, selected, images, labels, labels_main):
    """Write the files of task t and their checksums."""
    names, sums = soft_label_names(t), f"data/{SUMS.format(t)}"
    images = images.permute(0, 3, 1, 2).contiguous()
    run.remove(f"data/{names[-1]}")
    run.remove(sums)
    for name, tensor in zip(names, (selected, labels.float(), labels_main.float(), images)):
        run.save(f"data/{name}", save_array, tensor.cpu().numpy())
    lines = [f"{run.checksums[f'data/{name}']}  {name}\n" for name in names]
    run.save(sums, save_text, "".join(lines))


def soft_label_files(args, t):
    """Paths of the images, logits and logits_main that task t learns from; none without any."""
    names = ("img", "dis_label", "dis_label_main") if t > 1 and not args.no_teaching else ()
    return [Path(args.save_data_path) / f"task{t - 1}_{name}.npy" for name in names]


@ranks.on_rank0
def load_soft_labels(data, args, t):
    """What task t learns from the teacher of task t-1: images, logits, logits_main, on the CPU.

    None for t = 1 and with --no_teaching. images: uint8 [n,H,W,3], or float32 [n,3,H,W] from
    published files; logits float32 [n,(t-1)c]. Raises UserError when a file is missing, does not
    fit, or does not match its checksum (published ones have none).
    """
    if t == 1 or args.no_teaching:
        return None
    paths = soft_label_files(args, t)
    check_sums(Path(args.save_data_path), paths, t - 1)
    images, *labels = map(load_array, paths)
    height, width = data.pool.shape[1:3]
    if (
        images.dtype not in (np.uint8, np.float32)
        or images.shape[1:] != (3, height, width)
        or not len(images)
    ):
        raise UserError(
            f"{paths[0]}: found {images.dtype} {list(images.shape)}, "
            f"give uint8 or float32 [n,3,{height},{width}], n > 0"
        )
    classes = (t - 1) * data.classes_per_classifier
    for path, array in zip(paths[1:], labels):
        rows, columns = array.shape if array.ndim == 2 else (0, 0)
        if array.dtype != np.float32 or rows != len(images) or not 0 < columns <= classes:
            raise UserError(
                f"{path}: found {array.dtype} {list(array.shape)}, "
                f"give float32 {[len(images), classes]}"
            )
    for path, array in zip(paths, (images, *labels)):
        if not np.isfinite(array).all():
            raise UserError(f"{path}: not finite, give another file")
    images, *labels = map(torch.from_numpy, (images, *labels))
    if images.dtype == torch.uint8:
        images = images.permute(0, 2, 3, 1)
    # fewer columns than the heads of tasks 1..t-1: zeros fill the rest, as published
    return images, *(F.pad(each, (0, classes - each.shape[1])) for each in labels)


def check_sums(folder, paths, teacher):
    """Raise UserError when a file is missing or does not match the folder's checksums."""
    sums = folder / SUMS.format(teacher)
    lines = sums.read_text(errors="replace").splitlines() if sums.is_file() else ()
    known = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
    for path in paths:
        if not path.exists():
            raise UserError(
                f"--save_data_path {folder}: holds no {path.name}; name the data folder of a run "
                f"with task {teacher}, or give --no_teaching"
            )
        if path.name in known and file_checksum(path) != known[path.name]:
            raise UserError(f"{path}: does not match {sums}; let the run write it again")


def build_task(data, args, t, memory=None):
    """The training data of task t, with the soft labels that the teacher of task t-1 stored.

    memory: as in make_task().
    """
    if unlabeled := load_soft_labels(data, args, t):
        unlabeled = tuple(each.to(data.pool.device) for each in unlabeled)
    return make_task(data, t, unlabeled, memory)
