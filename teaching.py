"""Lottery teaching: query the pool for images near the exemplars, store the teacher's logits.

METHOD.md section 5; section 3.3 of the paper. Files in --save_data_path, for each task t:

    task{t}_select_index.npy      int64 [n], places in the pool
    task{t}_img.npy               uint8 [n,3,H,W], augmented once (published: float32, normalised)
    task{t}_dis_label.npy         float32 [n, t*c], logits of the random heads
    task{t}_dis_label_main.npy    float32 [n, t*c], logits of the balanced heads
    task{t}_sha256sums.txt        their checksums, as sha256sum writes them (not published)
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dataset
import utils
from trainer import extract, make_task
from utils import Refusal

SUMS = "task{}_sha256sums.txt"
DISTANCES_AT_ONCE = 2**24  # 64 MiB of float32


def query(exemplars, pool, num):
    """Each exemplar in turn takes its `num` nearest pool rows that are not yet taken.

    exemplars: features [m,d]; pool: features [p,d]. Returns int64 [min(m*num, p)]: the places in
    the pool, exemplar after exemplar, nearest first. Equal distances: the lower place first.
    Distances are Euclidean; a block of exemplars is compared with the pool at a time.
    """
    taken = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
    centre = pool.mean(0)  # a common shift changes no distance and saves digits below
    exemplars, pool = exemplars - centre, pool - centre
    squares = pool.square().sum(1)
    norms = squares.sqrt()
    rounding = pool.shape[1] * torch.finfo(pool.dtype).eps
    at_once = max(1, DISTANCES_AT_ONCE // len(pool))
    # both are made once: large pieces that come and go between small ones would fragment memory
    block = pool.new_empty(min(at_once, len(exemplars)), len(pool))
    selected = taken.new_empty(min(num * len(exemplars), len(pool)), dtype=torch.long)
    done = 0
    for place, exemplar in enumerate(tqdm(exemplars, "query", disable=None, leave=False)):
        wanted = min(num, len(selected) - done)
        if not wanted:
            break
        if place % at_once == 0:
            # |e-p|^2 less |e|^2, which is the same for all p
            some = exemplars[place : place + at_once]
            torch.addmm(squares, some, pool.T, alpha=-2, out=block[: len(some)])
        row = block[place % at_once].masked_fill_(taken, torch.inf)
        # The product is rounded, by `error` at most: all that it cannot tell from the nearest
        # are compared once more, by their differences.
        error = rounding * (exemplar.norm() + norms).square()
        near = (row - error <= utils.kth_smallest(row + error, wanted)).nonzero().squeeze(1)
        distances = (pool[near] - exemplar).square().sum(1)
        nearest = near[distances.sort(stable=True).indices[:wanted]]
        taken[nearest] = True
        selected[done : done + wanted] = nearest
        done += wanted
    return selected


def teach(model, data, run, t):
    """Query with the teacher's features of all exemplars so far; store images and logits.

    model: the teacher, task t's model. Writes the files above, once in the life of the run;
    with --no_teaching none at all.
    """
    step, args = f"task{t}_teaching", run.args
    if args.no_teaching or run.done(step):
        return
    exemplars, _ = data.of_tasks(data.exemplars, 1, t)
    wanted = args.unlabel_num * len(exemplars)
    with torch.no_grad():
        selected = query(
            extract(model, exemplars, data, args),
            extract(model, data.pool, data, args, f"task {t}: features of the pool"),
            args.unlabel_num,
        )
        if len(selected) < wanted:
            print(
                f"task {t}: the pool ran out, its {len(selected)} images stand for the "
                f"{wanted} that {len(exemplars)} exemplars would query"
            )
        generator = utils.stream(args.seed, f"task{t}", 0, "teaching")
        draws = dataset.draw_views(len(selected), data.pad, generator)
        chunks = (each.to(selected.device).split(args.batch_size) for each in draws)
        images = torch.cat(
            [
                dataset.augment(data.pool[rows], *views, data.pad)
                for rows, *views in zip(selected.split(args.batch_size), *chunks)
            ]
        )
        features = extract(model, images, data, args)
        labels, labels_main = (model.logits(features, t, main_fc) for main_fc in (False, True))
    images = images.permute(0, 3, 1, 2).contiguous()
    files = {
        "select_index": selected,
        "dis_label": labels.float(),
        "dis_label_main": labels_main.float(),
        "img": images,
    }
    names = {name: f"data/task{t}_{name}.npy" for name in files}
    sums = f"data/{SUMS.format(t)}"
    # they belong together: without the images, which come last, they are none
    for name in (names["img"], sums):
        run.remove(name)
    for name, tensor in files.items():
        run.keep(names[name], utils.save_array, tensor.cpu().numpy())
    lines = [f"{run.sums[name]}  {Path(name).name}\n" for name in names.values()]
    run.keep(sums, utils.save_text, "".join(lines))
    run.finish(step, *names.values(), sums)


def lesson_files(args, t):
    """Where lesson() finds the images, the logits and logits_main; none where it gives None."""
    names = ("img", "dis_label", "dis_label_main") if t > 1 and not args.no_teaching else ()
    return [Path(args.save_data_path) / f"task{t - 1}_{name}.npy" for name in names]


def lesson(data, args, t):
    """What task t learns from the teacher of task t-1: images, logits, logits_main.

    None for t = 1 and with --no_teaching. images: uint8 [n,H,W,3], or float32 [n,3,H,W] from
    published files. Raises Refusal when a file is missing, does not fit, or is not what its
    checksum says (published ones have none).
    """
    if t == 1 or args.no_teaching:
        return None
    folder, teacher = Path(args.save_data_path), t - 1
    sums = folder / SUMS.format(teacher)
    lines = sums.read_text(errors="replace").splitlines() if sums.is_file() else ()
    known = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
    for path in lesson_files(args, t):
        if not path.exists():
            raise Refusal(
                f"--save_data_path {folder}: holds no {path.name}; name the data folder of a run "
                f"with task {teacher}, or give --no_teaching"
            )
        if path.name in known and utils.file_checksum(path) != known[path.name]:
            raise Refusal(f"{path}: is not what {sums} says; let the run make it again")
    images, labels, labels_main = map(utils.load_array, lesson_files(args, t))
    shape = (3, *data.pool.shape[1:3])
    kinds = (np.uint8, np.float32)
    if images.dtype not in kinds or images.shape[1:] != shape or not len(images):
        raise Refusal(
            f"{folder}/task{teacher}_img.npy: found {images.dtype} {list(images.shape)}, "
            f"give uint8 or float32 [n,{shape[0]},{shape[1]},{shape[2]}], n > 0"
        )
    for name, array in (("dis_label", labels), ("dis_label_main", labels_main)):
        wanted = (len(images), teacher * data.classes_per_classifier)
        if array.dtype != np.float32 or array.shape != wanted:
            raise Refusal(
                f"{folder}/task{teacher}_{name}.npy: found {array.dtype} {list(array.shape)}, "
                f"give float32 {list(wanted)}"
            )
    for name, array in (("img", images), ("dis_label", labels), ("dis_label_main", labels_main)):
        if not np.isfinite(array).all():
            raise Refusal(f"{folder}/task{teacher}_{name}.npy: not finite, give another file")
    images, labels, labels_main = (
        torch.from_numpy(array).to(data.pool.device) for array in (images, labels, labels_main)
    )
    if images.dtype == torch.uint8:
        images = images.permute(0, 2, 3, 1)
    return images, labels, labels_main


def taught_task(data, args, t):
    """The training data of task t, with what the teacher of task t-1 left for it."""
    return make_task(data, t, lesson(data, args, t))
