"""Tables and plots of tools/report.py, against numbers worked out by hand; no training here."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest
from matplotlib.container import BarContainer, ErrorbarContainer
from sets import check_error

import pruning_utils
from models import ResNet18
from runtime import metrics
from runtime.epochs import read_epochs, save_epochs
from runtime.errors import UserError
from tools import plots, report, sizes_figure

ROOT = Path(__file__).parent.parent
LAYERS = {"conv1": 80.0, "layer1.0.conv1": 20.0}


def write(folder, script, rows, name="results.json", **config):
    """Write the results of a run of two tasks; rows: a dict for each state."""
    flags = {"dataset": "digits", "width": 4, "classifiers": 2, "seed": 0, "epochs": 3}
    if script == "main_BU":
        flags |= {"deacc": 2.0, "base_sparsity": 90.0, "select_on": "test"}
    folder.mkdir(parents=True, exist_ok=True)
    states = []
    for t, row in enumerate(rows, 1):
        state = {"state": t, "density": 100.0} | row
        states.append(state | {"mean": statistics.fmean(state["accuracy"])})
    content = {"script": script, "config": flags | config, "states": states}
    (folder / name).write_text(json.dumps(content))
    return folder


def dense(folder, seed, accuracies, **config):
    rows = [{"accuracy": row} for row in accuracies]
    return write(folder, "main_CIL", rows, seed=seed, save_dir=str(folder), **config)


def bottom_up(folder, seed=0, **config):
    """Three prunings of task 1, of which the second is the ticket; task 2 re-grows it in one."""
    rounds = [(80.0, 88.0, 2.0), (8.0, 89.0, 1.0), (6.4, 80.0, 10.0)]
    rounds = [dict(zip(("density", "accuracy", "decay"), values)) for values in rounds]
    more = {"layer_density": LAYERS, "dense_accuracy": [90.0]}
    first = {"accuracy": [89.0], "density": 8.0, "ticket_density": 8.0, "rounds": rounds} | more
    second = {"accuracy": [80.0, 60.0], "density": 8.0, "ticket_density": 30.0} | more
    second |= {"dense_accuracy": [84.0, 70.0]}
    second |= {"rounds": [{"density": 30.0, "accuracy": 76.5, "decay": 0.5}]}
    return write(folder, "main_BU", [first, second], seed=seed, **config)


def retrained(folder, seed, accuracy, control="none", **config):
    ending = "" if control == "none" else f"_{control}"
    paths = {"weight": f"{folder}/task1_best_model.pt", "mask": f"{folder}/mask-2.pt"}
    row = {"state": 2, "accuracy": accuracy, "density": 100.0 if control == "dense" else 30.0}
    row |= {"task_aware": [100.0, accuracy[-1]]}
    name = f"retrain_task2{ending}_results.json"
    flags = {"control": control} if ending else {}  # the oldest records lack "none"
    write(folder, "main_train", [row], name, seed=seed, state=2, **paths, **flags, **config)


def groups_of(*folders):
    return report.group([run for folder in folders for run in report.read(folder)])


def lines_of(axes):
    """{label: line} of an axes."""
    return {line.get_label(): line for line in axes.get_lines()}


def texts_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.fixture
def no_plots(monkeypatch):
    """Skip the slow part."""
    monkeypatch.setattr(plots, "draw", lambda groups: ({}, []))


# ------------------------------------------------------------------------------ grouping


def test_seeds_of_one_setting_form_a_group(tmp_path):
    """Folders and flags that change no result may differ; other flags may not."""
    a = dense(tmp_path / "a", 0, [[90.0], [80.0, 60.0]], print_freq=50, device="cpu")
    b = dense(tmp_path / "b", 1, [[96.0], [70.0, 50.0]], print_freq=10, device="cuda")
    other = dense(tmp_path / "c", 0, [[50.0], [50.0, 50.0]], no_teaching=True)
    both, alone = groups_of(b, other, a)
    assert both["accuracy"] == {1: {0: 90, 1: 96}, 2: {0: 70, 1: 60}}
    assert (both["label"], alone["label"]) == ("dense", "dense --no_teaching")
    assert alone["accuracy"] == {1: {0: 50}, 2: {0: 50}}


def test_the_same_seed_twice_forms_two_groups(tmp_path):
    dense(tmp_path / "x" / "run", 0, [[90.0], [80.0, 60.0]])
    dense(tmp_path / "y" / "run", 0, [[96.0], [70.0, 50.0]])
    groups = groups_of(tmp_path / "x" / "run", tmp_path / "y" / "run")
    assert [one["label"] for one in groups] == ["dense (x/run)", "dense (y/run)"]
    assert [len(one["seeds"]) for one in groups] == [1, 1]


def test_runs_on_different_images_form_different_groups(tmp_path):
    folders = [dense(tmp_path / str(seed), seed, [[90.0]]) for seed in range(3)]
    for folder, images in zip(folders, ("abc", "abc", "def")):
        path = tmp_path / folder.name / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"images": images}))
    assert [[*one["seeds"]] for one in groups_of(*folders)] == [[0, 1], [2]]


def test_a_folder_given_twice_counts_once(tmp_path, capsys, no_plots):
    folder = dense(tmp_path / "run", 0, [[90.0], [80.0, 60.0]])
    report.main([str(folder), f"{folder}/../run", "--out", str(tmp_path / "out")])
    assert "| dense | 1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "flags", "labels"),
    [
        ("main_TD", {"prune_scheduler": [[1, 1], [2, 1]]}, ["{} 1,1", "{} 2,1"]),
        ("main_BU", {"accept_decay": [0, 1]}, ["{} 0", "{} 1"]),
        ("main_CIL", {"no_teaching": [False, True]}, ["", "{}"]),
        ("main_TD", {"criterion": ["magnitude", "random"]}, ["", "{} random"]),
        ("main_CIL", {"arch": ["resnet18", "resnet32"]}, ["", "{} resnet32"]),
    ],
)
def test_labels_show_the_flags_that_differ(tmp_path, script, flags, labels):
    """With a list joined by commas, a 0, but nothing for the default of a later flag."""
    ((flag, values),) = flags.items()
    row = {"accuracy": [90.0], "ticket_density": 80.0, "dense_accuracy": [90.0]}
    folders = [write(tmp_path / f"{v}", script, [row], **{flag: v}) for v in values]
    name = report.METHODS[script]
    found = [one["label"] for one in groups_of(*folders)]
    assert found == [f"{name} {text.format(f'--{flag}')}".strip() for text in labels]


@pytest.mark.parametrize(
    ("script", "older", "newer"),
    [
        ("main_CIL", {}, {"joint": False, "finetune": False}),
        ("main_TD", {}, {"criterion": "magnitude"}),
        ("main_BU", {}, {"criterion": "magnitude"}),
        ("main_train", {"unlabel_num": 50}, {}),
        ("test", {"unlabel_num": 50, "epochs": 100, "lr": 0.01}, {}),
    ],
)
def test_older_results_group_with_newer_ones(tmp_path, script, older, newer):
    """Older ones lack some flags, and have others that changed nothing."""
    row = {"accuracy": [90.0], "dense_accuracy": [90.0]}
    write(tmp_path / "0", script, [row], **older)
    write(tmp_path / "1", script, [row], seed=1, arch="resnet18", **newer)
    for seed in (0, 1):  # without the flags that write() adds
        path = tmp_path / str(seed) / "results.json"
        run = json.loads(path.read_text())
        kept = {**older, **newer, "arch": 0, "seed": 0, "dataset": 0, "width": 0, "classifiers": 0}
        run["config"] = {key: value for key, value in run["config"].items() if key in kept}
        path.write_text(json.dumps(run))
    (one,) = groups_of(tmp_path / "0", tmp_path / "1")
    assert [*one["seeds"]] == [0, 1] and "--" not in one["label"]


def test_the_title_names_other_networks_than_the_papers(tmp_path):
    folders = [
        dense(tmp_path / arch, 0, [[90.0]], arch=arch, width=width)
        for arch, width in (("resnet18", 64), ("resnet32", 16))
    ]
    assert plots.title(groups_of(*folders)) == "digits, resnet32, width 16; digits, width 64"


def test_retrained_tickets_take_the_flags_of_the_run_that_found_them(tmp_path):
    """main_train does not know how its ticket was selected; the run in its folder does."""
    for select in ("val", "test"):
        for seed in (0, 1):
            folder = bottom_up(tmp_path / f"{select}{seed}", seed, select_on=select)
            retrained(folder, seed, [70.0 + seed, 60.0])
            retrained(folder, seed, [50.0, 40.0], "reinit")
    groups = groups_of(*sorted(tmp_path.iterdir()))
    found = [(one["label"], one["control"], len(one["seeds"])) for one in groups]
    assert found == [
        ("BU --select_on test", "none", 2),
        ("BU --select_on val", "none", 2),
        ("TR-BU --select_on test", "none", 2),
        ("TR-BU --select_on test", "reinit", 2),
        ("TR-BU --select_on val", "none", 2),
        ("TR-BU --select_on val", "reinit", 2),
    ]


def test_only_weights_of_the_previous_task_make_a_task_rewound_ticket(tmp_path):
    retrained(tmp_path, 0, [70.0, 60.0])
    assert groups_of(tmp_path)[0]["label"] == "TR-BU"
    path = tmp_path / "retrain_task2_results.json"
    path.write_text(path.read_text().replace("task1_best_model", "task2_best_model"))
    assert groups_of(tmp_path)[0]["label"] == "retrained"


def test_the_last_task_of_TD_has_the_accuracy_of_its_result(tmp_path):
    states = [
        {"accuracy": [90.0], "density": 100.0, "ticket_density": 80.0},
        {"accuracy": [80.0, 70.0], "density": 80.0, "ticket_density": 64.0},
        {"accuracy": [60.0, 50.0], "density": 64.0},
    ]
    (one,) = groups_of(write(tmp_path / "TD", "main_TD", states))
    assert one["accuracy"] == {1: {0: 90}, 2: {0: 55}}
    assert one["density"] == {1: {0: 80}, 2: {0: 64}}
    (begun,) = groups_of(write(tmp_path / "begun", "main_TD", states[:2]))
    assert begun["accuracy"] == {1: {0: 90}}  # 75 % is not the accuracy of the result


# ------------------------------------------------------------------------------ tables


def test_measures_of_a_matrix_worked_out_by_hand():
    matrix = [[90.0], [70.0, 80.0], [60.0, 90.0, 30.0]]
    assert metrics.last_accuracy(matrix) == 60
    assert metrics.average_incremental_accuracy(matrix) == 75  # of 90, 75, 60
    assert metrics.forgetting(matrix) == 10  # of 90 - 60 and 80 - 90
    assert metrics.forgetting([[90.0]]) is None
    assert metrics.recency([[5, 1, 2, 2], [0, 3, 5, 2], [1, 0, 8, 1], [0, 0, 4, 6]], 2) == 75
    assert metrics.recency([[3, 7], [0, 10]], 2) == 85 and metrics.recency([[9]], 1) is None
    assert metrics.mean_and_sd([1.0, 2.0, 6.0]) == (3, pytest.approx(7**0.5))
    assert metrics.mean_and_sd([4.0]) == (4, None)


def test_tables_hold_means_and_sample_standard_deviations(tmp_path, capsys, no_plots):
    """Accuracies after the tasks: 90, 70; 96, 60; 93, 62. AIA 80, 78, 77.5."""
    for seed, rows in enumerate(
        ([[90.0], [80.0, 60.0]], [[96.0], [70.0, 50.0]], [[93.0], [93.0, 31.0]])
    ):
        dense(tmp_path / f"dense{seed}", seed, rows, classes_per_classifier=2)
    runs = [str(path) for path in sorted(tmp_path.glob("dense?"))]
    report.main([*runs, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    expected = ["dense", "3", "93.0 ± 3.0", "64.0 ± 5.3", "64.0 ± 5.3", "78.5 ± 1.3", "12.0 ± 13.1"]
    (line,) = (line for line in text.splitlines() if line.startswith("| dense"))
    row = [cell.strip() for cell in line.strip("| ").split("|")]
    assert row == [*expected, "-12.0 ± 13.1", "100.00 ± 0.00", "100.0 ± 0.0"]
    assert all(f"- {name}: " in text for name in metrics.DEFINITIONS)
    assert line in capsys.readouterr().out
    assert "controls" not in text and not (tmp_path / "out" / "controls.csv").exists()
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["run"], row["seeds"], row["task 1 mean"], row["task 1 sd"]) == (
        *("dense", "3"),
        *("93.0000", "3.0000"),
    )
    assert float(row["forgetting sd"]) == pytest.approx(statistics.stdev([10, 26, 0]), abs=1e-4)
    assert float(row["AIA mean"]) == pytest.approx(78.5)


def halves(width=4):
    """The densities of a ResNet18 with half of each layer, as a record holds them."""
    return dict.fromkeys(pruning_utils.convolutions(ResNet18(2, 2, width)), 50.0)


@pytest.mark.parametrize(
    ("row", "config", "known"),
    [
        ({"layer_density": halves(), "ticket_density": 50.0}, {}, True),
        ({"layer_density": halves(), "ticket_density": 50.0}, {"dataset": "tiny_imagenet"}, True),
        ({"layer_density": halves(), "ticket_density": 50.0}, {"dataset": "folder"}, False),
        ({"layer_density": halves(), "ticket_density": 50.0}, {"arch": "resnet32"}, False),
        ({"layer_density": halves(), "ticket_density": 50.0}, {"arch": "of a fork"}, False),
        ({"layer_density": LAYERS, "ticket_density": 50.0}, {}, False),
        ({"layer_density": {}, "density": 50.0}, {}, False),
        ({"density": 50.0}, {}, False),
    ],
)
def test_multiply_accumulates_where_a_record_tells_enough(tmp_path, no_plots, row, config, known):
    """All convolutions halved, the heads not; records without "cost" and "image_size"."""
    config = {"classes_per_classifier": 2, "classifiers": 1} | config
    run = write(tmp_path, "main_CIL", [{"accuracy": [90.0]} | row], **config)
    report.main([str(run), "--out", str(tmp_path / "out")])
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        (found,) = csv.DictReader(file)
    assert found["density mean"] == "50.0000"
    assert ("MACs mean" in found) == known  # a column that no run has is left out
    if known:
        assert float(found["MACs mean"]) == pytest.approx(50, abs=0.01)


def test_the_recorded_size_of_images_decides(tmp_path):
    """Images of a folder have any size; the larger ones make the heads matter less."""
    found = []
    for side in (16, 32):
        row = {"accuracy": [90.0], "layer_density": halves(), "ticket_density": 50.0}
        config = {"dataset": "folder", "classes_per_classifier": 50}
        path = write(tmp_path / str(side), "main_CIL", [row], **config) / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": [side, side]}))
        (one,) = groups_of(path.parent)
        found.append(one["macs"][1][0])
    assert found[0] > found[1] > 50


def test_one_seed_has_no_standard_deviation(tmp_path, no_plots):
    report.main([str(dense(tmp_path, 0, [[90.0], [80.0, 60.0]])), "--out", str(tmp_path / "out")])
    assert "±" not in (tmp_path / "out" / "report.md").read_text().split("\n\n")[1]
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        assert next(csv.DictReader(file))["last sd"] == ""


def test_an_unfinished_run_is_noted(tmp_path, capsys, no_plots):
    a = dense(tmp_path / "a", 0, [[90.0], [80.0, 60.0]])
    b = dense(tmp_path / "b", 1, [[96.0]])
    report.main([str(a), str(b), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "dense, seed 1: 1 of 2 tasks so far" in text
    assert re.search(r"\| 93.0 ± 4.2 +\| 70.0 \(n = 1\) +\|", text)


def test_controls_are_compared_with_the_ticket_of_the_same_seed(tmp_path, capsys, no_plots):
    """Tickets 60, 70, 80; random masks 58, 69 and, without a ticket, 10."""
    for seed, ticket, control in (
        (0, 60.0, 58.0),
        (1, 70.0, 69.0),
        (2, 80.0, None),
        (3, None, 10.0),
    ):
        folder = bottom_up(tmp_path / f"BU{seed}", seed)
        if ticket:
            retrained(folder, seed, [ticket, ticket])
        if control:
            retrained(folder, seed, [control, control], "random_mask")
    runs = [str(path) for path in sorted(tmp_path.glob("BU?"))]
    report.main([*runs, "--out", str(tmp_path / "out")])
    with open(tmp_path / "out" / "controls.csv", newline="") as file:
        ticket, control = csv.DictReader(file)
    assert (ticket["trained"], ticket["seeds"], ticket["accuracy mean"]) == (
        *("the ticket", "3"),
        "70.0000",
    )
    assert ticket["minus the ticket mean"] == ""
    assert control["trained"] == "random mask" and control["density mean"] == "30.0000"
    assert control["minus the ticket mean"] == "-1.5000"  # of -2 and -1
    assert ticket["task-aware mean"] == "85.0000" and "recency mean" not in ticket  # not recorded
    assert control["task-aware minus the ticket mean"] == "-0.7500"
    assert float(control["minus the ticket sd"]) == pytest.approx(0.5**0.5, abs=1e-4)
    assert "-1.5 ± 0.7 (n = 2)" in capsys.readouterr().out


def test_task_aware_accuracy_and_recency_are_those_after_the_last_task(tmp_path, no_plots):
    """Of a run, a test of its model and a control; records without them are not counted."""
    first = {"accuracy": [90.0], "task_aware": [90.0], "confusion": [[9]]}
    last = {"accuracy": [30.0, 100.0], "task_aware": [80.0, 100.0], "confusion": [[3, 7], [0, 10]]}
    last["state"] = 2
    run, old = tmp_path / "0", dense(tmp_path / "1", 1, [[90.0], [80.0, 60.0]])
    write(run, "main_CIL", [first, last])
    write(run, "test", [last], "test_x_results.json", pretrained="x.pt")
    retrained(run, 0, [30.0, 100.0])
    write(run, "main_train", [last], "retrain_task2_dense_results.json", control="dense")
    for path in run.glob("*results.json"):
        content = json.loads(path.read_text()) | {"class_names": ["cat", "dog"]}
        path.write_text(json.dumps(content))
    report.main([str(run), str(old), "--out", str(tmp_path / "out")])
    found = [
        (row["seeds"], row["task-aware mean"], row["recency mean"])
        for name in ("report", "controls")
        for row in csv.DictReader((tmp_path / "out" / f"{name}.csv").read_text().splitlines())
    ]
    known, unknown = ("1", "90.0000", "85.0000"), ("1", "100.0000", "")
    assert found == [("2", *known[1:]), unknown, known, unknown, known]


def test_odd_characters_in_a_label_break_no_table(tmp_path, capsys, no_plots):
    for number, name in enumerate(("a|b", "c\nd\ud800")):
        dense(tmp_path / str(number), 0, [[90.0]], extra=name)
    report.main([str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "out")])
    table = (tmp_path / "out" / "report.md").read_text().split("\n\n")[1].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1 and len(table) == 4


# ------------------------------------------------------------------------------ plots


def test_all_plots_are_written_in_both_formats_and_identically_each_time(tmp_path):
    folder = bottom_up(tmp_path / "BU")
    retrained(folder, 0, [70.0, 60.0])
    retrained(folder, 0, [50.0, 40.0], "dense")
    names = ["controls", "layers", "matrix", "prunings", "report"]
    for out in ("one", "two"):
        report.main([str(folder), "--out", str(tmp_path / out)])
    written = sorted((tmp_path / "one").iterdir())
    assert [path.stem for path in written if path.suffix == ".png"] == names
    assert [path.stem for path in written if path.suffix == ".svg"] == names
    for path in written:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_of_accuracies(tmp_path):
    """Means with error bars, tickets as points, no controls, the dense network of main_BU."""
    for seed in (0, 1):
        folder = bottom_up(tmp_path / f"BU{seed}", seed)
        retrained(folder, seed, [70.0 + 10 * seed, 60.0])
        retrained(folder, seed, [10.0, 10.0], "reinit")
    above, below = plots.report(groups_of(tmp_path / "BU0", tmp_path / "BU1")).axes
    shown = {c.get_label(): c for c in above.containers if isinstance(c, ErrorbarContainer)}
    assert [*shown] == ["BU: 30.00 %, n = 2", "TR-BU: 30.00 %, n = 2"]
    bu, ticket = (container.lines for container in shown.values())
    assert list(bu[0].get_ydata()) == [89, 70] and bu[0].get_linestyle() == "-"
    assert list(ticket[0].get_ydata()) == [67.5] and ticket[0].get_linestyle() == "None"
    assert ticket[0].get_xdata()[0] == pytest.approx(2, abs=0.2)
    (bar,) = ticket[2][0].get_segments()
    assert bar[1][1] - bar[0][1] == pytest.approx(2 * statistics.stdev([65, 70]))
    assert list(lines_of(above)["dense network of BU"].get_ydata()) == [90, 77]
    (densities,) = below.containers
    assert list(densities.lines[0].get_ydata()) == [8, 30] and below.get_yscale() == "log"


def test_main_CIL_replaces_the_dense_network_of_main_BU(tmp_path):
    runs = groups_of(bottom_up(tmp_path / "BU"), dense(tmp_path / "CIL", 0, [[90.0], [80.0, 70.0]]))
    assert "dense network of BU" not in lines_of(plots.report(runs).axes[0])


def test_bounds_are_thin_lines_and_rows_of_their_own(tmp_path):
    folders = []
    for seed in (0, 1):
        for name, rows, flags in (
            ("CIL", [[90.0], [80.0, 60.0]], {}),
            ("joint", [[90.0], [90.0, 70.0 + 20 * seed]], {"joint": True, "no_teaching": True}),
            ("finetune", [[90.0], [0.0, 90.0]], {"finetune": True, "no_teaching": True}),
        ):
            folders.append(dense(tmp_path / f"{name}{seed}", seed, rows, **flags))
    groups = groups_of(*folders)
    assert [one["label"] for one in groups] == ["dense", "joint", "finetune"]
    (axes,) = plots.report(groups).axes
    assert [each.get_label() for each in axes.containers] == ["dense: 100.00 %, n = 2"]
    bounds = {
        "joint: upper bound, n = 2": [90, 85],
        "finetune: lower bound, n = 2": [90, 45],
    }
    lines = lines_of(axes)
    for label, accuracies in bounds.items():
        assert list(lines[label].get_ydata()) == accuracies
        assert lines[label].get_linewidth() == 1 and lines[label].get_marker() == "None"
    # they are no dense network in place of that of main_BU, and may come alone
    with_BU = lines_of(plots.report(groups_of(bottom_up(tmp_path / "BU"), *folders[1:3])).axes[0])
    assert {"dense network of BU", "joint: upper bound, n = 1"} <= {*with_BU}
    assert len(plots.report(groups[1:]).axes[0].lines) == 2


PAPER = {  # SPEC section 8
    "cifar10": {
        "TR-BU": (3.64, "96.9 89.0 81.3 74.6 73.2"),
        "TD": (4.40, "98.2 87.9 79.2 72.3 72.2"),
    },
    "cifar100": {
        "TR-BU": (7.20, "85.8 74.9 65.9 53.2 48.2 47.6 43.6 41.4 39.8 39.8"),
        "TD": (9.66, "88.2 71.5 58.8 48.5 44.1 41.2 39.4 38.1 37.2 36.8"),
    },
}


@pytest.mark.parametrize(
    ("dataset", "tasks", "classes", "drawn"),
    [
        ("cifar10", 5, 2, True),
        ("cifar100", 10, 10, True),
        ("cifar10", 2, 5, False),
        ("cifar100", 5, 20, False),
        ("digits", 5, 2, False),
    ],
)
def test_curves_of_the_paper(tmp_path, dataset, tasks, classes, drawn):
    shape = {"classifiers": tasks, "classes_per_classifier": classes}
    run = dense(tmp_path, 0, [[90.0]], dataset=dataset, **shape)
    lines = lines_of(plots.report(groups_of(run)).axes[0])
    found = {label: line for label, line in lines.items() if "paper" in label}
    assert len(found) == 2 * drawn
    for name, (density, accuracies) in PAPER[dataset].items() if drawn else ():
        (line,) = (line for label, line in found.items() if label.startswith(f"{name} of"))
        assert list(line.get_ydata()) == [float(value) for value in accuracies.split()]
        assert list(line.get_xdata()) == [*range(1, tasks + 1)]
        assert f"{density:.2f} %" in line.get_label()


def test_the_file_of_paper_curves_names_its_source():
    content = json.loads((ROOT / "data" / "figure4.json").read_text())
    assert "Figure 4" in content["source"]
    assert [content[name]["uncertainty"] for name in PAPER] == [0.2, 0.4]


def test_the_matrix_is_the_mean_over_seeds(tmp_path):
    a = dense(tmp_path / "a", 0, [[90.0], [80.0, 60.0]])
    b = dense(tmp_path / "b", 1, [[96.0], [70.0, 30.0]])
    figure = plots.matrix(groups_of(a, b))
    panel = figure.axes[0]
    assert [text.get_text() for text in panel.texts] == ["93", "75", "45"]
    assert [text.get_position() for text in panel.texts] == [(1, 1), (1, 2), (2, 2)]
    cells = panel.images[0].get_array()
    assert cells[0, 0] == 93 and list(cells[1]) == [75, 45] and not cells[0, 1] > 0
    assert panel.get_title() == "dense, n = 2"


def test_retrained_tickets_make_no_matrix(tmp_path):
    """Each starts from other weights."""
    run = bottom_up(tmp_path / "BU")
    retrained(run, 0, [90.0, 70.0])
    first = {"state": 1, "accuracy": [90.0], "density": 8.0}
    paths = {"weight": "task0_best_model.pt", "mask": "mask-1.pt"}
    write(run, "main_train", [first], "retrain_task1_results.json", seed=0, state=1, **paths)
    figure = plots.matrix(groups_of(run))
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles == ["BU, n = 1"]


def test_plot_of_layers(tmp_path):
    figure = plots.layers(
        groups_of(bottom_up(tmp_path / "BU"), dense(tmp_path / "CIL", 0, [[9.0]]))
    )
    (panel,) = figure.axes
    (bars,) = (each for each in panel.containers if isinstance(each, BarContainer))
    assert [bar.get_height() for bar in bars] == [80, 20]
    assert [text.get_text() for text in panel.get_xticklabels()] == [*LAYERS]
    assert texts_of(figure) == ["80", "20"]
    assert "30.00 %" in panel.get_title(loc="left")


def test_plot_of_what_the_layers_cost(tmp_path):
    """A panel below that of the densities, of what remains and, in gray, of the dense network."""
    ticket = {"ticket_density": 50.0, "layer_density": halves()}
    rows = [ticket | {"accuracy": [90.0] * n} for n in (1, 2)] + [{"accuracy": [80.0] * 2}]
    run = write(tmp_path, "main_TD", rows, classes_per_classifier=2)
    densities, costs = plots.layers(groups_of(run)).axes
    (bars,) = (each for each in densities.containers if isinstance(each, BarContainer))
    assert {bar.get_height() for bar in bars} == {50}
    gray, left = (each for each in costs.containers if isinstance(each, BarContainer))
    assert [2 * bar.get_height() for bar in left] == pytest.approx(
        [bar.get_height() for bar in gray]
    )
    assert sum(bar.get_height() for bar in gray) == pytest.approx(100, abs=0.02)  # without heads
    assert "50.00 % of the dense network's" in costs.get_title(loc="left")


def test_layers_of_TD_are_those_of_its_last_ticket(tmp_path):
    states = [
        {"accuracy": [90.0], "ticket_density": 80.0, "layer_density": {"conv1": 80.0}},
        {"accuracy": [80.0, 70.0], "ticket_density": 64.0, "layer_density": {"conv1": 64.0}},
        {"accuracy": [60.0, 50.0], "density": 64.0},
    ]
    figure = plots.layers(groups_of(write(tmp_path, "main_TD", states)))
    assert texts_of(figure) == ["64"]


def test_records_without_densities_of_layers(tmp_path, capsys):
    path = bottom_up(tmp_path / "BU") / "results.json"
    path.write_text(path.read_text().replace("layer_density", "something_else"))
    report.main([str(tmp_path / "BU"), "--out", str(tmp_path / "out")])
    assert "no plot of layers" in capsys.readouterr().out
    assert not (tmp_path / "out" / "layers.png").exists()
    assert (tmp_path / "out" / "report.png").exists()


def test_plot_of_prunings(tmp_path):
    """A line for each sequence of rounds, a star on each ticket, dense network and stop rule."""
    runs = [bottom_up(tmp_path / str(seed), seed) for seed in (0, 1)]
    figure = plots.prunings(groups_of(*runs))
    (panel,) = figure.axes
    stars = [line for line in panel.get_lines() if line.get_marker() == "*"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in stars] == [(8, -1), (30, -0.5)] * 2
    sequences = [line for line in panel.get_lines() if line.get_marker() == "."]
    assert [list(line.get_xdata()) for line in sequences] == [[80, 8, 6.4], [30]] * 2
    assert list(sequences[0].get_ydata()) == [-2, -1, -10]  # points lost
    flat = [line.get_ydata()[0] for line in panel.get_lines() if line.get_marker() == "None"]
    assert flat[:2] == [0, -2]
    assert panel.get_lines()[-1].get_xdata()[0] == 10 and panel.get_xscale() == "log"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:4] == ["task 1", "task 2, re-growth", "the ticket", "the dense network"]
    assert panel.get_xlim()[0] > panel.get_xlim()[1]  # from dense to sparse


def test_plot_of_controls(tmp_path):
    for seed in (0, 1):
        folder = bottom_up(tmp_path / f"BU{seed}", seed)
        retrained(folder, seed, [60.0 + 10 * seed] * 2)
        retrained(folder, seed, [50.0, 50.0], "reinit")
    figure = plots.controls(groups_of(tmp_path / "BU0", tmp_path / "BU1"))
    panel, task_aware = figure.axes
    assert [text.get_text() for text in panel.get_yticklabels()] == ["the ticket", "new network"]
    assert [each.lines[0].get_xdata()[0] for each in task_aware.containers] == [82.5, 75]
    ticket, control = panel.containers
    assert ticket.lines[0].get_xdata()[0] == 65 and control.lines[0].get_xdata()[0] == 50
    dots = [line for line in panel.get_lines() if line.get_marker() == "."]
    assert [list(line.get_xdata()) for line in dots] == [[60, 70], [50, 50]]
    assert "n = 2" in panel.get_title(loc="left")


def test_without_controls_there_is_no_plot_of_them(tmp_path):
    retrained(bottom_up(tmp_path), 0, [60.0, 60.0])
    assert plots.controls(groups_of(tmp_path)) is None


# ------------------------------------------------------------------------------ training


def with_curves(folder, accuracies, step="task1"):
    """Give a run a metrics.csv, of a step with these validation accuracies."""
    rows = read_epochs(folder / "metrics.csv")
    for epoch, accuracy in enumerate(accuracies, 1):
        row = {"step": step, "epoch": epoch, "lr": 0.1, "loss": 2.0, "accuracy": accuracy}
        rows.append(row | {"seconds": 1.0, "images_per_second": 9.0, "new": 1.5})
    save_epochs(folder / "metrics.csv", rows)
    return folder


def test_curves_are_means_over_seeds_of_the_tasks_alone(tmp_path):
    accuracies = [[90.0], [80.0, 70.0]]
    folders = [dense(tmp_path / str(seed), seed, accuracies) for seed in (0, 1)]
    for folder, offset in zip(folders, (0.0, 10.0)):
        with_curves(folder, [50.0 + offset, 60.0 + offset])
        with_curves(folder, [1.0], "task1_prune1")
        with_curves(folder, [70.0 + offset], "task2")
    figure = plots.curves(groups_of(*folders))
    left, right = figure.axes
    dotted, line = right.get_lines()  # where task 2 begins
    assert [*line.get_xdata()] == [1, 2, 3] and [*line.get_ydata()] == [55.0, 65.0, 75.0]
    assert [*dotted.get_xdata()] == [2.5, 2.5]
    assert [*left.get_lines()[1].get_ydata()] == [2.0] * 3  # the loss
    assert plots.curves(groups_of(bottom_up(tmp_path / "BU"))) is None  # of before


def test_confusion_in_percent_of_each_class(tmp_path):
    rows = [{"accuracy": [90.0]}, {"accuracy": [80.0, 70.0], "confusion": [[3, 1], [0, 2]]}]
    more = {"classes_per_classifier": 1}
    folder = write(tmp_path / "run", "main_CIL", rows, **more)
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": ["cat", "dog"]}))
    (one,) = groups_of(folder)
    assert one["recency"] == {1: {}, 2: {0: 50.0}}
    figure = plots.confusion([one])
    assert texts_of(figure) == ["75", "25", "0", "100"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog"]
    assert plots.confusion(groups_of(bottom_up(tmp_path / "BU"))) is None


# ------------------------------------------------------------------------------ bad input


def confused(matrix):
    """Give a run of two tasks of a class this confusion matrix after its last task."""

    def damage(run):
        run["class_names"] = ["cat", "dog"]
        run["states"][1]["confusion"] = matrix

    return damage


DAMAGES = {
    "state left out": lambda run: run["states"].pop(0),
    "accuracies of too many tasks": lambda run: run["states"][0]["accuracy"].append(50.0),
    "accuracy above 100": lambda run: run["states"][0]["accuracy"].__setitem__(0, 101.0),
    "accuracy true": lambda run: run["states"][0]["accuracy"].__setitem__(0, True),
    "density of a layer a string": lambda run: run["states"][0].update(layer_density={"a": "b"}),
    "densities of layers a list": lambda run: run["states"][0].update(layer_density=[1.0]),
    "more states than tasks": lambda run: run["config"].update(classifiers=1),
    "no width": lambda run: run["config"].pop("width"),
    "seed a list": lambda run: run["config"].update(seed=[0]),
    "seed not an integer": lambda run: run["config"].update(seed=0.5),
    "data set a list": lambda run: run["config"].update(dataset=["digits"]),
    "unknown control": lambda run: run["config"].update(control="magic"),
    "rounds without a ticket": lambda run: run["states"][0].pop("ticket_density"),
    "rounds without a stop rule": lambda run: run["config"].pop("deacc"),
    "rounds a number": lambda run: run["states"][0].update(rounds=3),
    "decay nan": lambda run: run["states"][0]["rounds"][0].update(decay=float("nan")),
    "sparsity above 100": lambda run: run["config"].update(base_sparsity=100.5),
    "architecture a number": lambda run: run["config"].update(arch=18),
    "task-aware accuracy above 100": lambda run: run["states"][0].update(task_aware=[101.0]),
    "no confusion": confused([]),
    "confusion not square": confused([[1, 1], [1]]),
    "confusion of nothing": confused([[0, 0], [0, 0]]),
    "confusion of half a class": confused([[1]]),
    "confusion of shares": confused([[0.5, 0], [0, 1]]),
    "confusion of more classes": confused([[1] * 4] * 4),
    "names of classes a number": lambda run: run.update(class_names=3),
    "classes a text": lambda run: run["config"].update(classes_per_classifier="2"),
    "size of images a number": lambda run: run.update(image_size=32),
    "size of images negative": lambda run: run.update(image_size=[-1, 32]),
    "selection a number": lambda run: run["config"].update(select_on=1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_results_give_one_line(tmp_path, damage, no_plots):
    path = bottom_up(tmp_path / "BU") / "results.json"
    run = json.loads(path.read_text())
    damage(run)
    path.write_text(json.dumps(run))
    with pytest.raises(UserError, match="BU: results.json is damaged") as error:
        report.main([str(tmp_path / "BU"), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"deacc": 1e300},
        {"deacc": 10**400},
        {"base_sparsity": 0},
        {"base_sparsity": 100},
        {"dataset": "$\\frac$"},
        {"seed": 2**63},
        {"extra": {"a": [1, None]}},
        {"extra": "x" * 10**5},
        {"extra": "$\\frac$"},
    ],
)
def test_odd_results_are_drawn(tmp_path, monkeypatch, change):
    drawn = []

    def write(figure, path):
        drawn.append((figure, path.name))
        path.with_suffix(".svg").write_text("<svg/>")  # for the page

    monkeypatch.setattr(plots, "write", write)
    report.main(
        [
            str(bottom_up(tmp_path / "BU", **{"seed": 0} | change)),
            str(bottom_up(tmp_path / "other", 1, extra=0)),
            *("--out", str(tmp_path / "out")),
        ]
    )
    assert [name for _, name in drawn] == ["report", "matrix", "layers", "prunings"]
    for figure, _ in drawn:
        figure.draw_without_rendering()  # which does the layout


def test_a_run_without_remaining_weights_is_drawn(tmp_path):
    path = bottom_up(tmp_path / "BU") / "results.json"
    path.write_text(re.sub(r'"(ticket_)?density": [\d.]+', r'"\1density": 0', path.read_text()))
    report.main([str(tmp_path / "BU"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "prunings.png").exists()


@pytest.mark.parametrize(
    "damage", [lambda text: text + ",", lambda text: text.replace(",1,", ",x,", 1)]
)
def test_damaged_curves_give_one_line(tmp_path, damage, no_plots):
    folder = with_curves(dense(tmp_path / "run", 0, [[90.0], [80.0, 70.0]]), [50.0, 60.0])
    path = folder / "metrics.csv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match="run/metrics.csv: is damaged; remove it"):
        report.main([str(folder), "--out", str(tmp_path / "out")])


def test_runs_without_results_are_skipped(tmp_path):
    folder = bottom_up(tmp_path)
    write(folder, "main_train", [], "retrain_task2_results.json", state=2)
    assert [one["label"] for one in groups_of(folder)] == ["BU"]


def test_an_unwritable_folder_gives_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        report.main([str(bottom_up(tmp_path / "BU")), "--out", str(tmp_path / "file")])


def test_the_figure_of_sizes(tmp_path):
    """The recorded size beside the paper; a title without a folder is an error."""
    reduced = str(ROOT / "results/reduced")
    figure = sizes_figure.draw([("small", reduced)])
    small, paper = figure.axes
    labels = [text.get_text().partition(":")[0] for text in small.get_legend().get_texts()]
    assert labels == ["dense", "TD", "BU", "TR-BU"]
    assert [line.get_ydata()[-1] for line in paper.lines] == [72.2, 73.2]
    out = ["--out", str(tmp_path / "sizes")]
    check_error(lambda: sizes_figure.main(["small", *out]), "TITLE DIR", "give a folder")
    check_error(lambda: sizes_figure.main(["small", str(tmp_path), *out]), "contains no seed*")
    assert not [*tmp_path.iterdir()]
