"""Tables and figures of tools/report.py, against numbers worked out by hand; no training here."""

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

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
    keys = "accuracy", "density", "ticket_density"
    values = ([90.0], 100.0, 50.0), ([70.0, 50.0], 50.0, 20.0), ([80.0, 60.0], 20.0)
    rows = [dict(zip(keys, row)) for row in values]
    for row, macs in zip(rows, (60.0, 30.0, 30.0)):
        row["cost"] = {"macs_percent": macs}
    return write(folder, "main_TD", rows)


def bottom_up(folder, seed=0, **config):
    """Task 2 is tested under task 1's ticket of 8 %, and re-grows it to 30 %."""
    first = {"accuracy": [89.0], "density": 8.0, "ticket_density": 8.0}
    second = {"accuracy": [80.0, 60.0], "density": 8.0, "ticket_density": 30.0}
    rows = [first | {"cost": {"macs_percent": 12.0}}, second | {"cost": {"macs_percent": 40.0}}]
    return write(folder, "main_BU", rows, seed=seed, **config)


def retrained(folder, seed, accuracy, control="none", name="task1_best_model.pt", **config):
    ending = "" if control == "none" else f"_{control}"
    density = 100.0 if control == "dense" else 30.0
    row = {"state": 2, "accuracy": accuracy, "density": density, "task_aware": [99.0, accuracy[1]]}
    paths = {"weight": f"{folder}/{name}", "mask": f"{folder}/mask-2.pt", "control": control}
    file = f"retrain_task2{ending}_results.json"
    return write(folder, "main_train", [row], file, seed=seed, state=2, **paths, **config)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A function of run folders: the tables of runs and of controls, and results.csv."""
    monkeypatch.setattr(figures, "draw", lambda *frames: {})

    def run(*folders):
        report.main([*map(str, folders), "--out", str(tmp_path / "out")])
        paths = [tmp_path / f"out/{name}.csv" for name in ("runs", "controls", "results")]
        runs, *others = [pd.read_csv(path) if path.exists() else None for path in paths]
        return runs.set_index("run"), *others

    return run


def test_seeds_of_a_setting_are_averaged(tmp_path, tables):
    """Folders and flags that change no result may differ; other flags may not."""
    a = dense(tmp_path / "a", 0, [[90.0], [80.0, 60.0]], print_freq=50, device="cpu")
    b = dense(tmp_path / "b", 1, [[96.0], [70.0, 50.0]], print_freq=10, device="cuda")
    other = dense(tmp_path / "c", 0, [[50.0], [50.0, 50.0]], no_teaching=True)
    runs, _, results = tables(b, other, a, f"{a}/../a")  # a folder given twice counts once
    assert runs.index.tolist() == ["dense", "dense --no_teaching"]
    assert runs["seeds"].tolist() == [2, 1]
    assert runs.loc["dense", ["task 1 mean", "task 2 mean"]].tolist() == [93, 65]
    assert runs.loc["dense", ["task 1 sd", "task 2 sd"]].tolist() == [4.2426, 7.0711]  # of a sample
    assert np.isnan(runs.loc["dense --no_teaching", "task 1 sd"])
    assert len(results) == 3 * 3


def test_what_is_not_averaged(tmp_path, tables):
    """The same seed twice, and other images or class orders; labels then name the folders."""
    folders = [dense(tmp_path / "x" / name, seed) for seed, name in enumerate("abc")]
    path = folders[2] / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": "others"}))
    again = dense(tmp_path / "y" / "a")
    assert tables(*folders)[0]["seeds"].to_dict() == {"dense (x/a)": 2, "dense (x/c)": 1}
    assert tables(folders[0], again)[0]["seeds"].to_dict() == {"dense (x/a)": 1, "dense (y/a)": 1}


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ({"rewind": "zero"}, {"rewind": "init"}, ["dense --rewind zero", "dense --rewind init"]),
        ({"lr": 0.1}, {"lr": 0.1, "joint": True}, ["dense", "joint"]),
        ({"decreasing_lr": [6, 8]}, {}, ["dense --decreasing_lr 6,8", "dense"]),
    ],
)
def test_labels_show_the_flags_that_differ(tmp_path, tables, first, second, labels):
    folders = dense(tmp_path / "a", **first), dense(tmp_path / "b", **second)
    assert tables(*folders)[0].index.tolist() == labels


def test_retrained_tickets_take_the_flags_of_the_search_that_found_them(tmp_path, tables):
    for select_on in ("val", "test"):
        bottom_up(tmp_path / select_on, select_on=select_on)
        retrained(tmp_path / select_on, 0, [70.0, 50.0])
    retrained(tmp_path / "other", 0, [60.0, 50.0], name="task0_checkpoint_weight.pt")
    runs, _, _ = tables(*(tmp_path / name for name in ("val", "test", "other")))
    assert [run.split(" --weight")[0] for run in runs.index] == [
        *("BU --select_on val", "BU --select_on test"),
        *("TR-BU --select_on val", "TR-BU --select_on test", "retrained"),
    ]


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
        **{"ticket density mean": (20, 30), "ticket MACs mean": (30, 40)},
    }
    assert {name: (*runs[name],) for name in expected} == expected
    last = results[results["run"] == "TD"].iloc[-1]
    assert (last["state"], last["task"], last["accuracy"]) == (3, 2, 60)
    own = results[(results["run"] == "TD") & (results["task"] == 1)]
    assert [*zip(own["density"], own["macs"])] == [(100, 100), (50, 60), (20, 30)]


def test_measures_of_the_last_task(tmp_path, tables, capsys):
    """Only where it is reached: a run at work is noted, and other seeds are counted."""
    more = {"task_aware": [80.0, 90.0], "recency": 40.0}
    rows = [{"accuracy": [90.0], "task_aware": [90.0], "recency": 100.0}]
    write(tmp_path / "0", "main_CIL", [*rows, {"accuracy": [70.0, 50.0]} | more])
    write(tmp_path / "1", "main_CIL", rows, seed=1)
    runs, _, _ = tables(tmp_path / "0", tmp_path / "1")
    found = runs.loc["dense", ["task-aware mean", "recency mean", "last mean"]]
    assert found.tolist() == [85, 40, 60]
    printed = capsys.readouterr().out
    assert "dense, seed 1: 1 of 2 tasks so far" in printed and "seed 0:" not in printed
    assert "| 60.0 (n = 1)" in printed and "| 90.0 ± 0.0 |" in printed


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
    ticket, control = controls.iloc[0], controls.iloc[1]
    assert (ticket["accuracy mean"], control["accuracy mean"]) == (60, 38.6667)
    assert (control["minus the ticket mean"], control["minus the ticket sd"]) == (-7, 4.2426)
    assert control["task-aware minus the ticket mean"] == -3.5
    assert np.isnan(ticket["minus the ticket mean"])
    assert runs.index.tolist() == ["BU", "TR-BU"] and runs.loc["TR-BU", "task 2 mean"] == 60


def test_the_committed_tables_are_those_of_the_records(tables):
    folder = ROOT / "results/medium"
    runs, controls, _ = tables(*sorted(folder.glob("seed*/*")))
    pd.testing.assert_frame_equal(runs, pd.read_csv(folder / "runs.csv", index_col=0))
    pd.testing.assert_frame_equal(controls, pd.read_csv(folder / "controls.csv"))


def test_odd_characters_break_neither_table_nor_page(tmp_path, tables):
    tables(*(dense(tmp_path / str(i), rewind=text) for i, text in enumerate(("a|<b>$x", "\udce9"))))
    assert r"dense --rewind a\|<b>$x |" in (tmp_path / "out/report.md").read_text("utf-8")
    assert "a|&lt;b&gt;$x" in (tmp_path / "out/report.html").read_text("utf-8")


def test_figures_are_drawn_whatever_matplotlib_is_set_to(tmp_path, monkeypatch):
    """And look the same; a figure has more than paper."""
    folder = bottom_up(tmp_path / "run")
    retrained(folder, 0, [70.0, 50.0])
    retrained(folder, 0, [60.0, 50.0], "dense")
    epochs = "task1,1,0.1,2,1,1,,,,50,9\ntask2_prun,1,0.1,3,1,1,1,1,1,40,9\n"
    (folder / "metrics.csv").write_text(EPOCHS + epochs)
    (folder / "confusion.csv").write_text("class,a,狗\na,3,1\n狗,0,2\n")
    names = {"accuracy", "controls", "curves", "confusion"}
    found = []
    for usetex in (False, True):
        monkeypatch.setitem(matplotlib.rcParams, "text.usetex", usetex)
        monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 5 if usetex else 1)
        out = tmp_path / f"out{usetex}"
        report.main([str(folder), "--out", str(out)])
        found.append({path.stem: path.read_bytes() for path in out.glob("*.png")})
        page = (out / "report.html").read_text("utf-8")
        assert page.count("data:image/png;base64,") == 4 and "http" not in page
    assert found[0].keys() == names and found[0] == found[1]
    for png in found[0].values():
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
        assert 0.005 < (pixels < 200).mean() < 0.5


def test_a_backend_that_is_not_installed(tmp_path):
    """As a notebook sets it. Without controls and curves there are no such figures."""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-m", "tools.report", dense(tmp_path / "run"), "--out", tmp_path]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    assert [path.stem for path in tmp_path.glob("*.png")] == ["accuracy"]


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
    tables = ("class,NA,b\nNA,3,1\nb,0,2\n", "class,NA,b\nNA,1,1\nb,0,0\n", "class,NA\nNA,5\n")
    folders = [dense(tmp_path / str(seed), seed) for seed in range(3)]
    for folder, table in zip(folders, tables):  # the last seed is still at task 1
        (folder / "confusion.csv").write_text(table)
    shares = report.confusion_frames(read(*folders))["dense"]
    assert shares.index.tolist() == ["NA", "b"]
    assert shares.to_numpy().tolist() == [[62.5, 37.5], [0, 50]]


@pytest.mark.parametrize(
    ("dataset", "tasks", "drawn"),
    [("cifar10", (5, 2), True), ("cifar10", (2, 5), False), ("digits", (5, 2), False)],
)
def test_curves_of_the_paper(tmp_path, dataset, tasks, drawn):
    config = dict(zip(("classifiers", "classes_per_classifier"), tasks))
    states = report.state_frame(read(dense(tmp_path / "run", dataset=dataset, **config)))
    assert [*figures.paper_curves(states)] == ["TR-BU", "TD"] * drawn


DAMAGES = [
    ([], "text"),
    (["script"], "other"),
    (["config"], {}),
    (["config", "classifiers"], 10**6),
    (["config", "seed"], "a"),
    (["states", 1, "state"], 1),
    (["states", 1, "accuracy"], [90.0]),
    (["states", 1, "accuracy"], [90.0, 101.0]),
    (["states", 1, "accuracy"], ["90", "60"]),
    (["states", 1, "density"], float("nan")),
]


@pytest.mark.parametrize(("place", "value"), DAMAGES)
def test_a_damaged_record_is_named(tmp_path, place, value):
    path = dense(tmp_path / "run") / "results.json"
    content = {"all": json.loads(path.read_text())}
    *way, last = ["all", *place]
    functools.reduce(lambda found, key: found[key], way, content)[last] = value
    path.write_text(json.dumps(content["all"]))
    with pytest.raises(UserError, match=r"run/results.json: damaged or not a results file"):
        report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", EPOCHS + "task1,one,0.1,2,1,1,,,,50,9\n"),
        ("metrics.csv", ""),
        ("confusion.csv", "class,a\na,text\n"),
        ("confusion.csv", "class,a,b\na,1,2\n"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, name, content):
    path = dense(tmp_path / "run") / name
    path.write_text(content)
    with pytest.raises(UserError, match=f"run/{name}: damaged, put an intact copy back or remove"):
        report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])


def test_folders_without_results(tmp_path, tables):
    begun = write(tmp_path / "begun", "main_CIL", [])
    with pytest.raises(UserError, match="begun: no results.json with results"):
        report.main([str(begun)])
    retrained(begun, 0, [70.0, 50.0])
    assert tables(begun)[0].index.tolist() == ["TR-BU"]
