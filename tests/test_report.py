"""Tables and figures of tools/report.py, against numbers worked out by hand; no training here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import main_BU
import main_TD
from runtime import measures
from runtime.errors import UserError
from tools import figures, report

ROOT = Path(__file__).parent.parent
EPOCHS = "stage,epoch,lr,loss,random,new,old,distillation,distillation_main,accuracy,seconds\n"


def write(folder, script, rows, name="results.json", **config):
    """Write the records of a run of two tasks; rows: a dict for each state."""
    flags = {"dataset": "digits", "arch": "resnet18", "width": 4, "classifiers": 2, "seed": 0}
    folder.mkdir(parents=True, exist_ok=True)
    states = [{"state": t, "density": 100.0} | row for t, row in enumerate(rows, 1)]
    record = {"script": script, "config": flags | {"classes_per_classifier": 1} | config}
    (folder / name).write_text(json.dumps(record | {"states": states}))
    return folder


def dense(folder, seed=0, accuracies=((90.0,), (80.0, 60.0)), **config):
    rows = [{"accuracy": row} for row in accuracies]
    return write(folder, "main_CIL", rows, seed=seed, save_dir=str(folder), **config)


def top_down(folder):
    """Task 2 is pruned to 20 %, and trained again as state 3."""
    rows = [
        {"accuracy": [90.0], "ticket_density": 50.0, "cost": {"macs_percent": 60.0}},
        {"accuracy": [70.0, 50.0], "density": 50.0, "ticket_density": 20.0},
        {"accuracy": [80.0, 60.0], "density": 20.0, "cost": {"macs_percent": 30.0}},
    ]
    return write(folder, "main_TD", rows)


def bottom_up(folder, seed=0, dense_accuracy=(), **config):
    """Task 2 is tested under task 1's ticket of 8 %, and re-grows it to 30 %.

    dense_accuracy: of its dense networks, after each task.
    """
    first = {"accuracy": [89.0], "density": 8.0, "ticket_density": 8.0}
    second = {"accuracy": [80.0, 60.0], "density": 8.0, "ticket_density": 30.0}
    rows = [first | {"cost": {"macs_percent": 12.0}}, second | {"cost": {"macs_percent": 40.0}}]
    for row, accuracy in zip(rows, dense_accuracy):
        row["dense_accuracy"] = accuracy
    return write(folder, "main_BU", rows, seed=seed, **config)


def retrained(folder, seed, accuracy, control="none"):
    ending = "" if control == "none" else f"_{control}"
    row = {"state": 2, "accuracy": accuracy, "density": 30.0, "task_aware": [99.0, accuracy[1]]}
    config = {"weight": f"{folder}/task1_best_model.pt", "mask": f"{folder}/mask-2.pt"}
    config |= {"control": control, "seed": seed, "state": 2}
    return write(folder, "main_train", [row], f"retrain_task2{ending}_results.json", **config)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A function of run folders: the tables of runs and of controls, and results.csv."""
    monkeypatch.setattr(figures, "draw", lambda *frames: [])

    def run(*folders):
        report.main([*map(str, folders), "--out", str(tmp_path / "out")])
        paths = [tmp_path / f"out/{name}.csv" for name in ("runs", "controls", "results")]
        runs, *others = [pd.read_csv(path) if path.exists() else None for path in paths]
        return runs.set_index("run"), *others

    return run


def test_seeds_of_a_setting_are_averaged(tmp_path, tables):
    """Flags that change no result may differ, others may not; the third seed is still at task 1."""
    a = dense(tmp_path / "a", 0, [[90.0], [80.0, 60.0]], print_freq=50)
    b = dense(tmp_path / "b", 1, [[96.0], [70.0, 50.0]], print_freq=10)
    begun = dense(tmp_path / "c", 2, [[93.0]])
    other = dense(tmp_path / "d", no_teaching=True)
    runs, _, results = tables(b, other, begun, a, f"{a}/../a")  # a folder given twice counts once
    assert runs["seeds"].to_dict() == {"dense": 3, "dense --no_teaching": 1}
    means, deviations = ([f"task {t} {name}" for t in (1, 2)] for name in ("mean", "std"))
    assert runs.loc["dense", means].tolist() == [93, 65]
    assert runs.loc["dense", deviations].tolist() == [3, 7.0711]  # of a sample
    assert runs.loc["dense", "last mean"] == 65
    assert np.isnan(runs.loc["dense --no_teaching", "task 1 std"])
    assert len(results) == 3 * 3 + 1


def test_runs_that_lack_states_are_marked(tmp_path, tables):
    """The result of TD is a third state."""
    begun = [dense(tmp_path / str(seed), seed, [[93.0]]) for seed in (1, 2)]
    lacking = write(tmp_path / "TD", "main_TD", [{"accuracy": [90.0]}, {"accuracy": [70.0, 50.0]}])
    tables(*begun, dense(tmp_path / "3", 3), lacking, bottom_up(tmp_path / "BU"))
    text = (tmp_path / "out/report.md").read_text()
    assert "| dense | 3     | seed 1 after state 1 of 2, seed 2 after state 1 of 2 |" in text
    assert "| TD    | 1     | seed 0 after state 2 of 3 " in text and text.count("of 3") == 1
    tables(top_down(tmp_path / "TD2"), tmp_path / "3")
    assert "not finished" not in (tmp_path / "out/report.md").read_text()


def test_a_seed_that_is_given_twice(tmp_path):
    folders = [dense(tmp_path / name, lr=0.1) for name in "ab"]
    with pytest.raises(UserError, match="/b: dense, seed 0, is given twice; omit one"):
        report.main([*map(str, folders), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ({"rewind": "init"}, {"rewind": "zero"}, ["dense --rewind init", "dense"]),
        ({"data": "x/small"}, {"data": "y/big"}, ["dense --data small", "dense --data big"]),
        ({"lr": 0.1}, {"lr": 0.1, "joint": True}, ["dense", "joint"]),
        ({"decreasing_lr": [6, 8]}, {}, ["dense --decreasing_lr 6,8", "dense"]),
    ],
)
def test_labels_show_the_flags_that_differ(tmp_path, tables, first, second, labels):
    folders = dense(tmp_path / "a", **first), dense(tmp_path / "b", **second)
    assert tables(*folders)[0].index.tolist() == labels


def test_labels_show_datasets_that_differ_between_methods(tmp_path, tables):
    runs, *_ = tables(dense(tmp_path / "a", lr=0.1), bottom_up(tmp_path / "b", dataset="cifar10"))
    assert runs.index.tolist() == ["dense --dataset digits", "BU --dataset cifar10"]


def test_defaults_that_labels_leave_out_are_those_of_the_scripts():
    parsers = [script.make_parser() for script in (main_TD, main_BU)]
    for flag, value in report.DEFAULTS.items():
        assert value in [parser.get_default(flag) for parser in parsers]


def test_retrained_tickets_take_the_flags_of_the_search_that_found_them(tmp_path, tables):
    for select_on in ("val", "test"):
        bottom_up(tmp_path / select_on, select_on=select_on)
        retrained(tmp_path / select_on, 0, [70.0, 50.0])
    runs, _, _ = tables(tmp_path / "val", tmp_path / "test")
    assert runs.index.tolist() == ["BU --select_on val", "BU", "TR-BU --select_on val", "TR-BU"]


def test_measures_of_a_matrix_worked_out_by_hand():
    matrix = [[90.0], [60.0, 80.0], [75.0, 50.0, 40.0]]
    assert measures.average_incremental_accuracy(matrix) == (90 + 70 + 55) / 3
    assert measures.forgetting(matrix) == (15 + 30) / 2  # from the highest before the last state
    assert measures.backward_transfer(matrix) == (-15 - 30) / 2
    assert measures.forgetting([[50.0], [70.0, 80.0], [60.0, 90.0, 40.0]]) == (10 - 10) / 2
    assert measures.forgetting([[90.0]]) is measures.backward_transfer([[90.0]]) is None


def test_the_row_of_a_run(tmp_path, tables):
    """The last task of TD is its result; BU is shown with the density that was tested."""
    runs, _, results = tables(top_down(tmp_path / "TD"), bottom_up(tmp_path / "BU"))
    expected = {
        **{"task 1 mean": (90, 89), "task 2 mean": (70, 70)},
        **{"AIA mean": (80, 79.5), "forgetting mean": (10, 9)},
        **{"density mean": (20, 8), "MACs mean": (30, 12)},
        "ticket density mean": (20, 30),
    }
    assert {name: (*runs[name],) for name in expected} == expected
    own = results[(results["run"] == "TD") & (results["task"] == 1)]
    assert [*zip(own["density"], own["macs"])] == [(100, 100), (50, 60), (20, 30)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", {"dense": [85, 60], "BU": [89, 70]}),
        ("dense", {"dense": [90, 70], "BU": [89, 70]}),
        ("TD", {"dense": [85, 60], "TD": [90, 70], "BU": [89, 70]}),
    ],
)
def test_the_dense_row_is_that_of_main_bu_without_a_run_of_main_cil(
    tmp_path, tables, given, expected
):
    own = bottom_up(tmp_path / "BU", dense_accuracy=([85.0], [70.0, 50.0]))
    others = {"": [], "dense": [dense], "TD": [top_down]}[given]
    runs, *_ = tables(own, *(other(tmp_path / given) for other in others))
    found = runs[["task 1 mean", "task 2 mean"]].T.to_dict("list")
    assert found == expected and list(found) == list(expected)
    assert runs.loc["dense", "density mean"] == 100


def test_controls_are_compared_with_the_ticket_of_the_same_seed(tmp_path, tables):
    """Of seed 2 there is no ticket."""
    for seed, ticket, control in ((0, 70.0, 60.0), (1, 50.0, 46.0), (2, None, 10.0)):
        folder = bottom_up(tmp_path / str(seed), seed)
        retrained(folder, seed, [control, control], "reinit")
        if ticket:
            retrained(folder, seed, [ticket, ticket])
    runs, controls, _ = tables(*(tmp_path / str(seed) for seed in range(3)))
    assert controls["trained"].tolist() == ["the ticket", "new network"]
    assert controls["seeds"].tolist() == [2, 3]
    assert controls["accuracy mean"].tolist() == [60, 38.6667]
    differences = controls.filter(like="minus the ticket")
    assert differences.loc[0].isna().all()
    assert differences.loc[1].tolist() == [-7, 4.2426, -3.5, 2.1213]
    assert runs.loc["TR-BU", "task 2 mean"] == 60


def test_the_committed_tables_are_those_of_the_records(tables):
    folder = ROOT / "results/medium"
    runs, controls, _ = tables(*sorted(folder.glob("seed*/*")))
    pd.testing.assert_frame_equal(runs, pd.read_csv(folder / "runs.csv", index_col=0))
    pd.testing.assert_frame_equal(controls, pd.read_csv(folder / "controls.csv"))


def test_odd_characters_break_neither_table_nor_page(tmp_path, tables):
    tables(*(dense(tmp_path / str(i), rewind=text) for i, text in enumerate(("a|<b>$x", "\udce9"))))
    assert r"dense --rewind a\|<b>$x |" in (tmp_path / "out/report.md").read_text("utf-8")
    assert "a|&lt;b&gt;$x" in (tmp_path / "out/report.html").read_text("utf-8")


def test_figures_are_drawn_whatever_matplotlib_is_set_to(tmp_path):
    """The second time with a backend that is not installed, as a notebook sets it."""
    folder = bottom_up(tmp_path / "run")
    retrained(folder, 0, [70.0, 50.0])
    retrained(folder, 0, [60.0, 50.0], "dense")
    epochs = "task1,1,0.1,2,1,1,,,,50,9\ntask2_prun,1,0.1,3,1,1,1,1,1,40,9\n"
    (folder / "metrics.csv").write_text(EPOCHS + epochs)
    (folder / "confusion.csv").write_text("class,a,狗\na,3,1\n狗,0,2\n")
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 5")
    changed = {"MPLBACKEND": "module://missing", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    report.main([str(folder), "--out", str(tmp_path)])
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 4 and "http" not in page
    command = [sys.executable, "-m", "tools.report", folder, "--out", tmp_path / "again"]
    subprocess.run(command, env=os.environ | changed, cwd=ROOT, check=True)
    for name in figures.CAPTIONS:
        again = tmp_path / "again" / f"{name}.png"
        assert again.read_bytes() == (tmp_path / f"{name}.png").read_bytes()


def read(*folders):
    records = [record for folder in folders for record in report.read_folder(folder)]
    report.label_runs(records)
    return records


def test_curves_of_tickets_and_of_the_dense_network_have_names_of_their_own(tmp_path):
    folder = bottom_up(tmp_path / "run")
    stages = ("task1", "task1_round1", "task2_prun", "task2")
    lines = [f"{stage},1,0.1,2,1,1,,,,{i},9\n" for i, stage in enumerate(stages)]
    (folder / "metrics.csv").write_text(EPOCHS + "".join(lines))
    frame = report.epoch_frame(read(folder))
    found = [*zip(frame["curve"], frame["task"], frame["accuracy"])]
    assert found == [("BU dense", 1, 0), ("BU", 2, 2), ("BU dense", 2, 3)]


def test_confusion_in_percent_of_each_class(tmp_path):
    for seed, counts in enumerate(("NA,3,1\nb,0,2\n", "NA,1,1\nb,0,0\n")):
        dense(tmp_path / str(seed), seed)
        (tmp_path / str(seed) / "confusion.csv").write_text(f"class,NA,b\n{counts}")
    shares = report.confusion_frames(read(tmp_path / "0", tmp_path / "1"))["dense"]
    assert shares.index.tolist() == ["NA", "b"]
    assert shares.to_numpy().tolist() == [[62.5, 37.5], [0, 50]]


def test_no_axis_shows_the_source_of_a_formula(tmp_path):
    """A log axis of less than a decade labels its minor ticks."""
    rows = [{"accuracy": [90.0]}, {"accuracy": [80.0, 60.0], "density": 40.0}]
    figure = figures.accuracy(report.state_frame(read(write(tmp_path, "main_BU", rows))))
    labels = figure.axes[1].get_yticklabels(which="both")
    assert {text.get_text() for text in labels} >= {"50"}
    assert not any("$" in text.get_text() for text in labels)


def test_curves_of_the_paper(tmp_path):
    for tasks, drawn in ((5, 2), (2, 0)):
        config = {"dataset": "cifar10", "classifiers": tasks, "classes_per_classifier": 10 // tasks}
        figure = figures.accuracy(report.state_frame(read(dense(tmp_path / str(tasks), **config))))
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sum("of the paper" in text for text in legend) == drawn


DAMAGES = [
    ("results.json", "{", ""),
    ("results.json", "main_CIL", "other"),
    ("results.json", "80.0, 60.0", "80.0"),
    ("results.json", "80.0, 60.0", '"80", "60"'),
    ("results.json", '"density": 100.0', '"density": "dense"'),
    ("metrics.csv", "1,0.1", "one,0.1"),
    ("confusion.csv", "b,1", "b,one"),
]


@pytest.mark.parametrize(("name", "text", "damage"), DAMAGES)
def test_a_damaged_file_is_named(tmp_path, name, text, damage):
    folder = dense(tmp_path / "run")
    (folder / "metrics.csv").write_text(EPOCHS + "task1,1,0.1,2,1,1,,,,50,9\n")
    (folder / "confusion.csv").write_text("class,a,b\na,1,1\nb,1,1\n")
    content = (folder / name).read_text()
    assert text in content
    (folder / name).write_text(content.replace(text, damage))
    with pytest.raises(UserError, match=f"run/{name}: "):
        report.main([str(folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_folders_without_results(tmp_path):
    with pytest.raises(UserError, match="begun: no results.json with results"):
        report.main([str(write(tmp_path / "begun", "main_CIL", []))])
