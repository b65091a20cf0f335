"""Lottery teaching against docs/METHOD.md section 5: the query, its files, reading them back."""

import copy
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dataset
import teaching
import trainer
from runtime.errors import UserError

ORDER = [3, 1, 5, 0, 2, 4]  # the class order of the fixture `data`
FILES = ("select_index", "img", "dis_label", "dis_label_main")


# ------------------------------------------------------------------------------ the query


def random_features(m, p, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m + p, d, generator=generator, dtype=dtype).split([m, p])


@pytest.mark.parametrize(
    "m, p, d, num",
    [
        (1, 1, 1, 1),
        (1, 30, 3, 30),
        (7, 50, 1, 3),
        (20, 101, 16, 5),
        (13, 64, 33, 1),
        (9, 97, 8, 11),
    ],
)
@pytest.mark.device
def test_query_equals_brute_force(device, m, p, d, num):
    exemplars, pool = random_features(m, p, d)
    found = teaching.query(exemplars.to(device), pool.to(device), num)
    assert found.dtype == torch.int64
    assert found.tolist() == reference.query(exemplars, pool, num)


def test_query_by_hand():
    """The first exemplar takes what is nearest to the second too; nearest first."""
    pool = torch.tensor([[5.0], [0.0], [2.0], [9.0], [3.5]], dtype=torch.float64)
    exemplars = torch.tensor([[2.1], [2.0]], dtype=torch.float64)
    assert teaching.query(exemplars, pool, 2).tolist() == [2, 4, 1, 0]
    assert teaching.query(exemplars.flip(0), pool, 2).tolist() == [2, 4, 1, 0]
    exemplars = torch.tensor([[6.0], [-4.0]], dtype=torch.float64)
    assert teaching.query(exemplars, pool, 2).tolist() == [0, 4, 1, 2]
    assert teaching.query(exemplars.flip(0), pool, 2).tolist() == [1, 2, 0, 4]


def test_query_depends_on_the_order_of_the_exemplars():
    exemplars, pool = random_features(12, 40, 4)
    orders = [exemplars, exemplars.flip(0)]
    found, reverse = (teaching.query(e, pool, 3).tolist() for e in orders)
    assert [found, reverse] == [reference.query(e, pool, 3) for e in orders]
    assert set(found) != set(reverse)


@pytest.mark.parametrize("m, p, num", [(4, 10, 3), (4, 10, 5), (3, 10, 25), (5, 10, 2), (2, 1, 4)])
def test_a_pool_that_runs_out_is_taken_once(m, p, num):
    exemplars, pool = random_features(m, p, 6)
    found = teaching.query(exemplars, pool, num).tolist()
    assert found == reference.query(exemplars, pool, num)
    assert sorted(found) == list(range(p))


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("m, p, d", [(15, 41, 3), (15, 257, 64), (2, 41, 4), (3, 1003, 4)])
def test_of_equal_pool_images_the_lower_index_comes_first(device, m, p, d, dtype):
    """Rounding must not separate equal images, wherever they are in the pool."""
    exemplars, images = random_features(m, 20, d, dtype=dtype)
    pool = images[torch.randint(20, (p,), generator=torch.Generator().manual_seed(1))]
    found = teaching.query(exemplars.to(device), pool.to(device), 2)
    assert found.tolist() == reference.query(exemplars, pool, 2)


def test_the_pool_may_hold_an_exemplar_many_times():
    pool = torch.zeros(9, 4, dtype=torch.float64)
    assert teaching.query(pool[:2], pool, 3).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("at_once", [1, 40, 100, 399, 400])
def test_the_block_size_does_not_change_the_result(monkeypatch, at_once):
    exemplars, pool = random_features(20, 40, 8)
    wanted = teaching.query(exemplars, pool, 3)
    monkeypatch.setattr(teaching, "DISTANCES_AT_ONCE", at_once)
    found = teaching.query(exemplars, pool, 3)
    assert torch.equal(found, wanted)
    assert len(found) == 40  # the pool runs out in the middle of a block


def test_all_distances_are_never_in_memory_at_once(monkeypatch):
    sizes, blocks = [], set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result,) if isinstance(t, torch.Tensor))
            if "addmm" in str(func):
                blocks.add(result.data_ptr())
            return result

    monkeypatch.setattr(teaching, "DISTANCES_AT_ONCE", 500)
    exemplars, pool = random_features(60, 100, 4)
    with Watch():
        teaching.query(exemplars, pool, 1)
    assert sizes and max(sizes) <= 500
    assert len(blocks) == 1  # allocated once, so that memory is not fragmented


def test_features_far_from_zero_lose_no_digits():
    """The features of a network that does not end with BatchNorm need not have mean 0."""
    exemplars, pool = (1000 + x for x in random_features(20, 60, 8, dtype=torch.float32))
    found = teaching.query(exemplars, pool, 2)
    assert found.tolist() == reference.query(exemplars, pool, 2)


# ------------------------------------------------------------------------------ teaching


@pytest.fixture
def teacher(args, device):
    """A network whose BatchNorm statistics are not the initial ones, in training mode."""
    model = trainer.make_model(args, device)
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(device)
    model.train().features(2 * x + 1)
    return model


def teach(teacher, data, run, t):
    """teaching.teach, even if the run has done it before; returns the indices queried."""
    run.journal["steps"].clear()
    teaching.teach(teacher, data, run, t)
    return arrays(run.args, t)["select_index"]


def arrays(args, t):
    folder = Path(args.save_data_path)
    return {name: np.load(folder / f"task{t}_{name}.npy", allow_pickle=False) for name in FILES}


def normalized(images):
    """Stored images, uint8 [n,3,H,W], normalized with the mean and std of the fixture."""
    return (torch.from_numpy(images).double() / 255 - 0.5) / 0.25


@pytest.mark.parametrize("t, n", [(1, 24), (2, 48), (3, 60)])
def test_the_files_of_teaching(teacher, data, args, run, t, n):
    teach(teacher, data, run, t)
    folder = Path(args.save_data_path)
    names = [f"task{t}_{name}.npy" for name in FILES]
    assert {path.name for path in folder.iterdir()} == {
        *names,
        f"task{t}_sha256sums.txt",
        ".lock",
        ".owner",
    }
    lines = (folder / f"task{t}_sha256sums.txt").read_text().splitlines()
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    assert {line.split("  ")[1]: line.split("  ")[0] for line in lines} == sums
    found = {name: (array.dtype, array.shape) for name, array in arrays(args, t).items()}
    assert found == {
        "select_index": (np.int64, (n,)),
        "img": (np.uint8, (n, 3, 16, 16)),
        "dis_label": (np.float32, (n, 2 * t)),
        "dis_label_main": (np.float32, (n, 2 * t)),
    }


@pytest.mark.device
@pytest.mark.parametrize("t", [1, 2, 3])
def test_the_query_is_by_the_features_of_all_exemplars_so_far(
    teacher, data, args, run, device, monkeypatch, t
):
    """In float64, where rounding cannot decide which of two images is nearer."""
    normalize = dataset.normalize
    monkeypatch.setattr(dataset, "normalize", lambda *both: normalize(*both).double())
    teacher.double()
    selected = teach(teacher, data, run, t)

    def features(images):
        x = reference.normalize(images.cpu(), [0.5] * 3, [0.25] * 3)
        with torch.no_grad():
            return teacher.eval()(x.to(device), is_feature=True).cpu()

    exemplars = torch.cat([data.exemplars[c] for c in ORDER[: 2 * t]])
    wanted = reference.query(features(exemplars), features(data.pool), args.unlabel_num)
    assert selected.tolist() == wanted
    assert arrays(args, t)["select_index"].tolist() == wanted


def test_stored_images_are_views_of_the_queried_ones(teacher, data, args, run):
    teach(teacher, data, run, 2)
    found = arrays(args, 2)
    views = [
        reference.find_view(image.transpose(1, 2, 0), data.pool[index].numpy(), pad=4)
        for image, index in zip(found["img"], found["select_index"])
    ]
    assert None not in views
    flips, down, right = (set(draws) for draws in zip(*views))
    assert flips == {False, True} and down == right == set(range(9))


@pytest.mark.parametrize("t", [1, 2, 3])
def test_stored_logits_are_the_teachers_on_the_stored_images(teacher, data, args, run, t):
    teach(teacher, data, run, t)
    found = arrays(args, t)
    x = normalized(found["img"]).float()
    with torch.no_grad():
        features = teacher.eval().features(x)
        for name, heads in (
            ("dis_label", teacher.linear),
            ("dis_label_main", teacher.linear_main),
        ):
            wanted = torch.cat([heads[i](features) for i in range(t)], dim=1)
            torch.testing.assert_close(
                torch.from_numpy(found[name]), wanted, rtol=1e-4, atol=1e-5, msg=name
            )
    assert not np.allclose(found["dis_label"], found["dis_label_main"])


def test_teaching_changes_neither_the_teacher_nor_the_pool(teacher, data, args, run):
    before, pool = copy.deepcopy(teacher.state_dict()), data.pool.clone()
    teach(teacher, data, run, 2)
    after = teacher.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(data.pool, pool)


def test_teaching_depends_only_on_seed_and_task(teacher, data, args, run):
    teach(teacher, data, run, 1)
    first = arrays(args, 1)
    teach(teacher, data, run, 2)
    torch.manual_seed(99)
    teach(teacher, data, run, 1)
    again = arrays(args, 1)
    assert all(np.array_equal(first[name], again[name]) for name in FILES)
    args.seed = 1
    teach(teacher, data, run, 1)
    other = arrays(args, 1)
    assert np.array_equal(first["select_index"], other["select_index"])
    assert not np.array_equal(first["img"], other["img"])


def test_each_task_draws_its_own_views(teacher, data, args, run, monkeypatch):
    draws, draw_views = [], dataset.draw_views
    monkeypatch.setattr(
        dataset, "draw_views", lambda *given: draws.append(draw_views(*given)) or draws[-1]
    )
    args.unlabel_num = 60  # every task queries all of the pool
    for t in (1, 2):
        teach(teacher, data, run, t)
    assert all(len(some) == len(other) == 60 for some, other in zip(*draws))
    assert not any(torch.equal(some, other) for some, other in zip(*draws))


@pytest.mark.parametrize("pool, num, taken", [(60, 3, 48), (48, 3, 48), (60, 4, 60), (60, 50, 60)])
def test_a_notice_says_when_the_pool_runs_out(teacher, data, args, run, capsys, pool, num, taken):
    args.unlabel_num, data.pool = num, data.pool[:pool]
    capsys.readouterr()
    assert len(teach(teacher, data, run, 2)) == taken
    _, _, out = capsys.readouterr().out.partition(" images\n")  # after the line on the query
    if taken == 16 * num:
        assert out == ""
    else:
        assert "pool ran out" in out and "60" in out and str(16 * num) in out
        assert len(out.splitlines()) == 1


# ------------------------------------------------------------------------------ soft labels


def store(args, k=1, n=7, **changes):
    """Write the four files of task k; changes: other arrays or bytes for some (None: no file)."""
    generator = np.random.default_rng(0)
    content = {
        "select_index": np.arange(n),
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
        elif isinstance(array, bytes):
            path.write_bytes(array)
        else:
            np.save(path, array, allow_pickle=True)
    return content


def test_with_no_teaching_nothing_is_stored_and_nothing_read(teacher, data, args, run):
    args.no_teaching, data.pool = True, None
    teaching.teach(teacher, data, run, 1)
    assert not [*run.path("data/task1_img.npy").parent.glob("*.npy")]
    assert teaching.load_soft_labels(data, args, 2) is None
    assert teaching.soft_label_files(args, 2) == []
    assert teaching.build_task(data, args, 2).unlabeled is None


def test_task_1_has_no_teacher(args, data):
    assert teaching.load_soft_labels(data, args, 1) is None
    assert teaching.soft_label_files(args, 1) == []


@pytest.mark.parametrize("t", [2, 3])
def test_soft_labels_are_those_of_the_previous_task(teacher, data, args, run, t):
    for k in (1, 2, 3):
        teach(teacher, data, run, k)
    stored = arrays(args, t - 1)
    task = teaching.build_task(data, args, t)
    images, logits, logits_main = task.unlabeled
    assert task.t == t and task.data is data
    assert images.dtype == torch.uint8 and logits.dtype == logits_main.dtype == torch.float32
    assert np.array_equal(images.numpy(), stored["img"].transpose(0, 2, 3, 1))
    assert np.array_equal(logits.numpy(), stored["dis_label"])
    assert np.array_equal(logits_main.numpy(), stored["dis_label_main"])


@pytest.mark.parametrize("name", ["img", "dis_label", "dis_label_main"])
def test_a_file_with_another_checksum_is_an_error(teacher, data, args, run, name):
    teach(teacher, data, run, 1)
    path = Path(args.save_data_path) / f"task1_{name}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"task1_{name}.npy: does not match .*task1_sha256sums"):
        teaching.load_soft_labels(data, args, 2)


def test_select_index_is_not_needed(args, data):
    """In the published files the rows of the others do not follow it."""
    store(args, select_index=None)
    assert len(teaching.load_soft_labels(data, args, 2)) == 3


def test_the_published_form_gives_the_same_batches(args, data):
    content = store(args, k=2)
    ours = teaching.load_soft_labels(data, args, 3)
    store(args, k=2, img=normalized(content["img"]).float().numpy())
    published = teaching.load_soft_labels(data, args, 3)
    assert published[0].dtype == torch.float32

    def batches(tensors):
        return dataset.one_pass(tensors, 3, data, torch.Generator().manual_seed(0), augmented=False)

    for some, other in zip(batches(ours), batches(published), strict=True):
        for a, b in zip(some, other, strict=True):
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns, columns_main", [(1, 4), (4, 2), (2, 3), (4, 4)])
def test_missing_columns_are_zeros_as_published(args, data, columns, columns_main):
    """Soft labels of fewer classes than tasks 1..t-1 have: zeros stand for the other logits."""
    content = store(args, k=2)
    given = {"dis_label": columns, "dis_label_main": columns_main}
    store(args, k=2, **{name: content[name][:, :n] for name, n in given.items()})
    for (name, n), found in zip(given.items(), teaching.load_soft_labels(data, args, 3)[1:]):
        assert found.shape == (7, 4) and found.dtype == torch.float32
        assert np.array_equal(found[:, :n].numpy(), content[name][:, :n])
        assert not found[:, n:].any()


def object_array(n=7):
    """An array that only pickle can read."""
    return np.array([{"row": i} for i in range(n)], dtype=object)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def npy_file(shape):
    """The bytes of a .npy file that claims this shape and holds one number."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(4)


BAD_FOR_ALL = {
    "missing": None,
    "objects": object_array(),
    "empty file": b"",
    "plain pickle": pickle.dumps([1, 2]),
    "cut short": npy_file("(7, 4)"),
    "broken header": npy_file("(((("),
    "claims far too much": npy_file(f"({10**15},)"),
    "broken archive": b"PK\x03\x04 and then nothing of an archive",
    "a number": np.float32(1),
}
BAD_IMAGES = {
    "channels last": zeros(7, 16, 16, 3, dtype=np.uint8),
    "other size": zeros(7, 3, 32, 32, dtype=np.uint8),
    "not square": zeros(7, 3, 16, 8),
    "gray": zeros(7, 1, 16, 16, dtype=np.uint8),
    "one image": zeros(3, 16, 16),
    "float64": zeros(7, 3, 16, 16, dtype=np.float64),
    "int64": zeros(7, 3, 16, 16, dtype=np.int64),
}
BAD_LABELS = {
    "too few rows": zeros(6, 4),
    "too many rows": zeros(8, 4),
    "too many columns": zeros(7, 5),
    "of the next task": zeros(7, 6),
    "no columns": zeros(7, 0),
    "three dimensions": zeros(7, 4, 1),
    "flat": zeros(28),
    "float64": zeros(7, 4, dtype=np.float64),
    "int64": zeros(7, 4, dtype=np.int64),
}
BAD = [
    pytest.param(name, content, id=f"{name}-{what}")
    for name in ("img", "dis_label", "dis_label_main")
    for what, content in (BAD_FOR_ALL | (BAD_IMAGES if name == "img" else BAD_LABELS)).items()
]


@pytest.mark.parametrize("name, content", BAD)
def test_a_file_that_does_not_fit_is_an_error_that_names_it(args, data, name, content):
    store(args, k=2)
    teaching.load_soft_labels(data, args, 3)  # these fit
    store(args, k=2, **{name: content})
    with pytest.raises(UserError) as error:
        teaching.load_soft_labels(data, args, 3)
    message = str(error.value)
    assert f"task2_{name}.npy" in message and len(message.splitlines()) == 1


def test_nothing_is_unpickled(args, data, tmp_path):
    """A file from elsewhere must not be able to run code."""
    trace = tmp_path / "trace"

    class Hostile:
        def __reduce__(self):
            return open, (str(trace), "w")

    objects = np.array([Hostile()], dtype=object)
    for name in ("img", "dis_label", "dis_label_main"):
        for content in (objects, pickle.dumps(Hostile())):
            store(args, **{name: content})
            with pytest.raises(UserError):
                teaching.load_soft_labels(data, args, 2)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Hostile())).close()
    assert trace.exists()  # it would have left a trace
