"""Lottery teaching against docs/METHOD.md section 5: the query, its files, reading them back."""

import copy
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from sets import check_error

import dataset
import teaching
import trainer

ORDER = [3, 1, 5, 0, 2, 4]  # the class order of the fixture `data`
FILES = ("select_index", "img", "dis_label", "dis_label_main")


# ------------------------------------------------------------------------------ the query


def random_features(m, p, d, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(m + p, d, generator=generator, dtype=dtype).split([m, p])


@pytest.mark.device
@pytest.mark.parametrize(
    "m, p, d, num",
    [
        (1, 1, 1, 1),
        (1, 30, 3, 30),
        (7, 50, 1, 3),
        (13, 64, 33, 1),
        (9, 97, 8, 11),  # the pool runs out
        (4, 10, 6, 5),
        (2, 1, 6, 4),
    ],
)
def test_query_equals_brute_force(device, m, p, d, num):
    exemplars, pool = random_features(m, p, d)
    found = teaching.query(exemplars.to(device), pool.to(device), num)
    assert found.dtype == torch.int64
    assert found.tolist() == reference.query(exemplars, pool, num)
    assert m * num < p or sorted(found.tolist()) == list(range(p))
    if num < 11:  # the order of the exemplars decides who takes what
        reverse = teaching.query(exemplars.flip(0).to(device), pool.to(device), num)
        assert reverse.tolist() == reference.query(exemplars.flip(0), pool, num)


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("m, p, d", [(15, 41, 3), (15, 257, 64), (3, 1003, 4)])
def test_of_equal_pool_images_the_lower_index_comes_first(device, m, p, d, dtype):
    """Rounding must not separate equal images, wherever they are in the pool."""
    exemplars, images = random_features(m, 20, d, dtype)
    pool = images[torch.randint(20, (p,), generator=torch.Generator().manual_seed(1))]
    found = teaching.query(exemplars.to(device), pool.to(device), 2)
    assert found.tolist() == reference.query(exemplars, pool, 2)


def test_features_far_from_zero_lose_no_digits():
    """The features of a network that does not end with BatchNorm need not have mean 0."""
    exemplars, pool = (1000 + x for x in random_features(20, 60, 8, torch.float32))
    assert teaching.query(exemplars, pool, 2).tolist() == reference.query(exemplars, pool, 2)


@pytest.mark.parametrize("at_once", [1, 40, 100, 399])
def test_a_block_of_distances_at_a_time_gives_the_same(monkeypatch, at_once):
    """The pool runs out in the middle of a block."""
    exemplars, pool = random_features(20, 40, 8)
    wanted, addmm, sizes = teaching.query(exemplars, pool, 3), torch.addmm, []
    monkeypatch.setattr(teaching, "DISTANCES_AT_ONCE", at_once)
    monkeypatch.setattr(torch, "addmm", lambda *x, **y: sizes.append(len(x[1])) or addmm(*x, **y))
    assert torch.equal(teaching.query(exemplars, pool, 3), wanted) and len(wanted) == 40
    assert max(sizes) == max(1, at_once // 40)  # all are never in memory at once


# ------------------------------------------------------------------------------ teaching


@pytest.fixture
def teacher(args, device):
    """A network whose BatchNorm statistics are not the initial ones, in training mode."""
    model = trainer.make_model(args, device)
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(device)
    model.train().features(2 * x + 1)
    return model


def arrays(args, t):
    folder = Path(args.save_data_path)
    return {name: np.load(folder / f"task{t}_{name}.npy", allow_pickle=False) for name in FILES}


@pytest.mark.device
@pytest.mark.parametrize("t, n", [(1, 24), (2, 48), (3, 60)])
def test_teaching_stores_views_of_queried_images_and_the_teachers_logits(
    teacher, data, args, run, device, monkeypatch, capsys, t, n
):
    """In float64, where rounding cannot decide which of two images is nearer."""
    normalize = dataset.normalize
    monkeypatch.setattr(dataset, "normalize", lambda *both: normalize(*both).double())
    before, pool = copy.deepcopy(teacher.double().state_dict()), data.pool.clone()
    teaching.teach(teacher, data, run, t)
    folder = Path(args.save_data_path)
    names = {f"task{t}_{name}.npy" for name in FILES}
    assert {path.name for path in folder.iterdir()} - {".lock"} == names
    found = arrays(args, t)
    assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
        "select_index": (np.int64, (n,)),
        "img": (np.uint8, (n, 3, 16, 16)),
        "dis_label": (np.float32, (n, 2 * t)),
        "dis_label_main": (np.float32, (n, 2 * t)),
    }
    # a pool of 60 runs out in task 3, whose 24 exemplars want 72; a line says so
    assert ("60 images instead of 72" in capsys.readouterr().out) == (t == 3)

    def features(images):
        x = reference.normalize(images, [0.5] * 3, [0.25] * 3)
        with torch.no_grad():
            return teacher.eval()(x.to(device), is_feature=True)

    # the exemplars of all tasks so far query
    exemplars = torch.cat([data.exemplars[c].cpu() for c in ORDER[: 2 * t]])
    wanted = reference.query(features(exemplars).cpu(), features(pool.cpu()).cpu(), 3)
    assert found["select_index"].tolist() == wanted
    views = [
        reference.find_view(image.transpose(1, 2, 0), pool[index].cpu().numpy(), pad=4)
        for image, index in zip(found["img"], found["select_index"])
    ]
    assert None not in views and {flip for flip, *_ in views} == {False, True}
    assert len(set(views)) > n / 2
    of_images = features(found["img"].transpose(0, 2, 3, 1))
    for name, heads in (("dis_label", teacher.linear), ("dis_label_main", teacher.linear_main)):
        logits = torch.cat([heads[i](of_images) for i in range(t)], dim=1)
        np.testing.assert_allclose(found[name], logits.detach().cpu(), rtol=1e-5, atol=1e-6)
    # neither the teacher nor the pool has changed
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert torch.equal(data.pool, pool)


# ------------------------------------------------------------------------------ soft labels


def store(args, k=2, n=7, **changes):
    """Write the four files of task k; changes: other arrays or bytes for some (None: no file)."""
    generator = np.random.default_rng(0)
    content = {
        "select_index": None,  # not needed: in published files the others do not follow it
        "img": generator.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8),
        "dis_label": generator.normal(size=(n, 2 * k)).astype(np.float32),
        "dis_label_main": generator.normal(size=(n, 2 * k)).astype(np.float32),
    } | changes
    folder = Path(args.save_data_path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in content.items():
        path = folder / f"task{k}_{name}.npy"
        if array is None:
            path.unlink(missing_ok=True)
        else:
            np.save(path, array)
    return content


@pytest.mark.parametrize("t", [2, 3])
def test_soft_labels_are_those_of_the_previous_task(data, args, t):
    stored = {k: store(args, k, n=6 + k) for k in (1, 2, 3)}[t - 1]
    images, *soft_labels = teaching.build_task(data, args, t).unlabeled
    assert images.dtype == torch.uint8
    assert np.array_equal(images, stored["img"].transpose(0, 2, 3, 1))
    for found, name in zip(soft_labels, ("dis_label", "dis_label_main")):
        exponential = np.exp(stored[name] / 2)
        wanted = 4 * exponential / exponential.sum(1, keepdims=True)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert teaching.build_task(data, args, 1).unlabeled is None


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


BAD = [
    *(("img", x) for x in (None, zeros(7, 16, 16, 3, dtype=np.uint8), zeros(7, 3, 16, 8))),
    ("img", zeros(0, 3, 16, 16, dtype=np.uint8)),
    ("img", zeros(7, 3, 16, 16, dtype=np.int64)),
    ("img", np.full((7, 3, 16, 16), np.nan, np.float32)),
    ("dis_label", None),
    ("dis_label", zeros(6, 4)),  # too few rows
    ("dis_label_main", zeros(7, 2)),  # columns are missing: of the task before
    ("dis_label_main", zeros(7, 3)),
    ("dis_label", zeros(7, 6)),  # of the next task
    ("dis_label_main", zeros(28)),
    ("dis_label", np.full((7, 4), np.inf, np.float32)),
]


@pytest.mark.parametrize("name, content", BAD)
def test_a_file_that_does_not_fit_is_an_error_that_names_it(args, data, name, content):
    """Missing columns too. (The published loss appends zero probabilities for them.)"""
    store(args)
    teaching.load_logits(data, args, 3)  # these fit
    store(args, **{name: content})
    check_error(lambda: teaching.load_logits(data, args, 3), f"task2_{name}.npy")
