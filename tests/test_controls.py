"""The controls of a ticket: what each keeps of it, what each changes; and reproduce.py's runs."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import main_BU
import main_TD
import main_train
import pruning_utils
import reproduce
import trainer
import utils
from models import ResNet

CPU = torch.device("cpu")
FLAGS = "--dataset digits --classifiers 3 --width 4 --epochs 1 --batch_size 48 --seed 3"
TINY = FLAGS.split()


def network(seed):
    torch.manual_seed(seed)
    model = ResNet(2, 3, 4)
    with torch.no_grad():  # as after some training: norms and statistics of their own
        for key, value in model.state_dict().items():
            if "bn" in key and value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 1)
    return model


def ticket_of(model, share=0.3):
    weights = pruning_utils.weights(model)
    masks = pruning_utils.prune(weights, pruning_utils.masks_of(model), 1 - share)
    return {name: mask.cpu() for name, mask in masks.items()}


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def binary(masks):
    return all(bool(((m == 0) | (m == 1)).all()) for m in masks.values())


@pytest.fixture
def model():
    return network(0)


@pytest.fixture
def ticket(model):
    return ticket_of(model)


# ------------------------------------------------------------------------------ masks, weights


def test_a_random_mask_has_the_same_number_in_other_places(ticket):
    mask = pruning_utils.random_mask(ticket, utils.stream(0))
    assert binary(mask) and [*mask] == [*ticket]
    assert all(mask[name].shape == ticket[name].shape for name in ticket)
    assert sum(counts(mask).values()) == sum(counts(ticket).values())
    assert counts(mask) != counts(ticket)  # that of each layer is left to chance
    places = torch.cat([m.flatten() for m in mask.values()])
    own = torch.cat([m.flatten() for m in ticket.values()])
    both = int((places * own).sum()) / int(own.sum())
    assert 0.2 < both < 0.4  # of 30 % chosen at random 30 % are the ticket's


def test_a_random_mask_is_alike_dense_in_all_layers(ticket):
    """The ticket is not: its layers range over more than ten points."""
    own = pruning_utils.densities(ticket).values()
    assert max(own) - min(own) > 10
    mask = pruning_utils.random_mask(ticket, utils.stream(0))
    for name, density in pruning_utils.densities(mask).items():
        deviation = 100 * (0.3 * 0.7 / mask[name].numel()) ** 0.5
        assert abs(density - 30) < 5 * deviation


def test_a_shuffled_mask_has_the_same_number_in_each_layer(ticket):
    mask = pruning_utils.shuffle_mask(ticket, utils.stream(0))
    assert binary(mask) and counts(mask) == counts(ticket)
    assert all(mask[name].shape == ticket[name].shape for name in ticket)
    assert all(not torch.equal(mask[name], ticket[name]) for name in ticket)


@pytest.mark.parametrize("shuffle", ["random_mask", "shuffle_mask"])
def test_all_places_are_alike(shuffle):
    """Of 3 in 8 places each is taken 3/8 of the time, within five standard deviations."""
    masks = {"conv": torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).view(2, 4, 1, 1)}
    draw = getattr(pruning_utils, shuffle)
    taken = sum(draw(masks, utils.stream(0, i))["conv"] for i in range(2000)).flatten()
    assert taken.sum() == 6000
    assert (taken - 750).abs().max() < 5 * (2000 * 3 / 8 * 5 / 8) ** 0.5


def test_shuffled_weights_are_the_same_in_each_layer(model, ticket):
    before = {name: w.clone() for name, w in pruning_utils.weights(model).items()}
    rest = {k: v.clone() for k, v in model.state_dict().items() if "conv" not in k}
    pruning_utils.shuffle_weights(model, ticket, utils.stream(0))
    for name, weight in pruning_utils.weights(model).items():
        left = ticket[name] == 1
        assert torch.equal(weight[~left], before[name][~left])
        assert torch.equal(weight[left].sort().values, before[name][left].sort().values)
        moved = int((weight[left] != before[name][left]).sum())
        assert moved > 0.5 * int(left.sum())
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in rest.items() if "shortcut" not in k)


# ------------------------------------------------------------------------------ main_train


@pytest.fixture
def trained(tmp_path, monkeypatch, few_digits, model, ticket):
    """Runs main_train with more flags; returns its results and the state that it trained from."""
    pruning_utils.save_masks(tmp_path / "mask.pt", ticket)
    utils.save(tmp_path / "weight.pt", model.state_dict())
    paths = [f"--{key}={tmp_path / key}.pt" for key in ("weight", "mask")]
    starts = []

    def go_through(model, *rest, **more):
        starts.append(pruning_utils.clone_state(model))
        return loop(model, *rest, **more)

    loop = trainer.go_through
    monkeypatch.setattr(trainer, "go_through", go_through)

    def run(*flags, folder="out"):
        results = main_train.main(
            [*TINY, *paths, "--state", "1", "--save_dir", str(tmp_path / folder), *flags]
        )
        return results, starts.pop() if starts else None

    return run


def kept(start, model):
    """Whether BatchNorm and heads are those of the model."""
    own, dense = model.state_dict(), pruning_utils.dense_state(start)
    names = {f"{name}.weight" for name in pruning_utils.weights(model)}
    return all(torch.equal(dense[key].cpu(), own[key]) for key in own if key not in names)


def whole(start, model):
    """Whether the convolution weights are those of the model, masked or not."""
    dense = pruning_utils.dense_state(start)
    own = pruning_utils.weights(model)
    return all(torch.equal(dense[f"{name}.weight"].cpu(), w) for name, w in own.items())


@pytest.mark.parametrize("control", utils.CONTROLS)
def test_each_control_is_what_it_says(trained, model, ticket, control, tmp_path):
    results, start = trained("--control", control)
    masks = {name: m.cpu() for name, m in pruning_utils.extract_mask(start).items()}
    density = pruning_utils.density(ticket)
    row = results["states"][0]
    assert results["config"]["control"] == control
    assert row["density"] == (100 if control == "dense" else density)
    if control == "dense":
        assert masks == {} and row["layer_density"] == {}
    else:
        assert row["layer_density"] == pruning_utils.densities(masks)
        same_mask = all(torch.equal(masks[name], ticket[name]) for name in ticket)
        assert same_mask == (control in ("none", "reinit", "shuffle_weights"))
        assert (counts(masks) == counts(ticket)) == (control != "random_mask")
        assert sum(counts(masks).values()) == sum(counts(ticket).values())
    assert whole(start, model) == (control not in ("reinit", "shuffle_weights"))
    assert kept(start, model) == (control != "reinit")
    middle = "" if control == "none" else f"{control}_"
    names = {path.name for path in (tmp_path / "out").glob("*")}
    assert f"retrain_task1_{middle}results.json" in names
    assert f"retrain_task1_{middle}best_model.pt" in names


def test_reinit_is_a_new_network_and_not_the_runs_own_first_one(trained, args):
    _, start = trained("--control", "reinit")
    args.classifiers, args.classes_per_classifier, args.seed = 3, 2, 3
    first = trainer.make_model(args, CPU)
    assert not whole(start, first)
    weight = pruning_utils.dense_state(start)["layer4.1.conv2.weight"]
    bound = (1 / (32 * 9)) ** 0.5  # PyTorch's default: uniform within 1/sqrt(fan_in)
    assert 0.99 * bound < weight.abs().max() <= bound
    assert torch.equal(start["layer4.1.bn2.weight"], torch.ones(32))


@pytest.mark.parametrize("control", ["random_mask", "shuffle_mask", "reinit", "shuffle_weights"])
def test_a_control_hangs_on_the_seed(trained, control):
    _, start = trained("--control", control)
    _, again = trained("--control", control, folder="again")
    _, other = trained("--control", control, "--seed", "4", folder="other")
    assert all(torch.equal(start[key], again[key]) for key in start)
    assert any(not torch.equal(start[key], other[key]) for key in start)


def test_controls_and_ticket_live_in_one_folder(trained, tmp_path):
    ticket, _ = trained()
    control, _ = trained("--control", "shuffle_mask")
    repeated, start = trained()
    assert start is None and repeated == ticket  # it was done, nothing was trained
    stored = json.loads((tmp_path / "out" / "retrain_task1_results.json").read_text())
    assert stored["states"] == ticket["states"]
    best = [
        tmp_path / "out" / f"retrain_task1{name}_best_model.pt" for name in ("", "_shuffle_mask")
    ]
    masks = [pruning_utils.load_masks(path) for path in best]
    assert counts(masks[0]) == counts(masks[1])
    assert not all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert control["config"]["control"] == "shuffle_mask"


# ------------------------------------------------------------------------------ reproduce.py


@pytest.mark.parametrize("flags", [[], ["--full"]])
def test_the_scripts_take_the_commands_of_reproduce(flags):
    chains = reproduce.plan(reproduce.parse(flags))
    read = {
        "main_TD.py": main_TD.parse,
        "main_BU.py": main_BU.parse,
        "main_train.py": main_train.parse,
        "main_CIL.py": utils.make_parser("", "").parse_args,
    }
    runs = [(name, command, read[command[0]](command[1:])) for c in chains for name, command in c]
    assert len({name for name, _, _ in runs}) == len(runs) == 3 * 19
    assert {args.width for _, _, args in runs} == {64 if flags else 16}
    assert {args.seed for _, _, args in runs} == {0, 1, 2}
    found = {(args.state, args.control) for _, c, args in runs if c[0] == "main_train.py"}
    assert found == {(t, control) for t in (3, 5) for control in utils.CONTROLS}
    # a ticket is trained in the folder of its run, which comes before it, on the weights of t-1
    for chain in chains:
        made = set()
        for _, command in chain:
            args = read[command[0]](command[1:])
            if command[0] == "main_train.py":
                assert args.save_dir in made
                assert args.weight == f"{args.save_dir}/task{args.state - 1}_best_model.pt"
                assert args.mask == f"{args.save_dir}/mask-{args.state}.pt"
            made.add(args.save_dir)


def chain_of(tmp_path, *codes):
    """Runs that are small programs, and where they are kept."""
    (tmp_path / "logs").mkdir(exist_ok=True)
    for number, code in enumerate(codes):
        (tmp_path / f"{number}.py").write_text(code)
    folder = ["--save_dir", str(tmp_path)]
    return [(f"seed0/{n}", [str(tmp_path / f"{n}.py"), *folder]) for n in range(len(codes))]


@pytest.fixture
def go(tmp_path):
    args, stop = SimpleNamespace(out=tmp_path, jobs=2), SimpleNamespace(is_set=lambda: False)
    return lambda chain: reproduce.go(chain, args, stop, set())


def test_a_chain_goes_on_where_it_stopped(tmp_path, go, capsys):
    count = f"open({str(tmp_path / 'ran')!r}, 'a').write('%s')\nprint('state %s: good')"
    chain = chain_of(tmp_path, count % ("a", 1), "import sys; sys.exit('--lr 9: too high')")
    with pytest.raises(utils.Refusal, match="seed0_1.txt: ends with status 1: --lr 9: too high"):
        go(chain)
    assert "seed0/0: 0 s, state 1: good" in capsys.readouterr().out
    chain_of(tmp_path, count % ("a", 1), count % ("b", 2))  # mended
    go(chain)
    assert (tmp_path / "ran").read_text() == "ab"
    go(chain)
    assert (tmp_path / "ran").read_text() == "ab"
    go([(name, [*command, "--other"]) for name, command in chain])  # other settings: not done
    assert (tmp_path / "ran").read_text() == "abab"


def test_reproduce_copies_the_records_and_reports(tmp_path, monkeypatch):
    folder = tmp_path / "out" / "seed1" / "CIL"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    (folder / "retrain_task3_results.json").write_text("{}")
    (folder / "task1_best_model.pt").write_text("")
    begun = tmp_path / "out" / "seed2" / "CIL"
    begun.mkdir(parents=True)
    (begun / "results.json").write_text("{}")  # of a seed that is not asked for
    called = []
    monkeypatch.setattr(reproduce.subprocess, "call", lambda c: called.append(c) or 0)
    monkeypatch.setattr(reproduce, "plan", lambda args: [])
    monkeypatch.setattr(reproduce, "prepare", lambda args: None)
    reproduce.main(["--out", str(tmp_path / "out"), "--seeds", "1"])
    copies = tmp_path / "out" / "results"
    found = sorted(str(p.relative_to(copies)) for p in copies.rglob("*.*"))
    assert found == ["seed1/CIL/results.json", "seed1/CIL/retrain_task3_results.json"]
    report = [sys.executable, str(reproduce.HERE / "report.py"), str(copies / "seed1" / "CIL")]
    assert called == [[*report, "--out", str(copies)]]


def test_a_run_that_fails_ends_the_others(tmp_path, monkeypatch):
    begin = "import pathlib, time\npathlib.Path(__file__ + '.began').touch()\n"
    wait = f"while not pathlib.Path({str(tmp_path / '1.py.began')!r}).exists(): time.sleep(0.01)\n"
    fails = begin + wait + "raise SystemExit('no')"
    lasts = begin + "time.sleep(20)\npathlib.Path(__file__ + '.ended').touch()"
    fails, lasts = chain_of(tmp_path, fails, lasts)
    monkeypatch.setattr(reproduce, "plan", lambda args: [[fails], [lasts, fails]])
    monkeypatch.setattr(reproduce, "prepare", lambda args: None)
    with pytest.raises(utils.Refusal, match="seed0_0.txt: ends with status 1: no"):
        reproduce.main(["--out", str(tmp_path), "--jobs", "2"])
    assert not [*tmp_path.glob("*.ended"), *tmp_path.glob("logs/*.done")]


def test_places_may_have_spaces():
    args = reproduce.parse(["--out", "my runs", "--data", "my set"])
    for chain in reproduce.plan(args):
        for _, command in chain:
            assert command[command.index("--data") + 1] == "my set"
            assert command[command.index("--save_dir") + 1].startswith("my runs/seed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--seeds", ""], "--seeds"), (["--out", "file"], "--out file"), (["--jobs", "0"], "--jobs")],
)
def test_bad_input_of_reproduce_is_one_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(utils.Refusal, match=words) as refused:
        reproduce.main(flags)
    assert "\n" not in str(refused.value)
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


@pytest.mark.parametrize("control", ["none", "shuffle_mask", "reinit"])
def test_a_later_task_is_trained_with_the_lessons_of_the_run(tmp_path, few_digits, control):
    tiny = [*TINY, "--unlabel_num", "2", "--save_dir", str(tmp_path)]
    main_BU.main([*tiny, "--iter_epochs", "1", "--max_iter_prun", "2"])
    ticket = ["--weight", str(tmp_path / "task1_best_model.pt"), "--state", "2"]
    ticket += ["--mask", str(tmp_path / "mask-2.pt"), "--control", control]
    (row,) = main_train.main([*tiny, *ticket])["states"]
    assert row["density"] == pruning_utils.density(pruning_utils.load_masks(tmp_path / "mask-2.pt"))
    assert len(row["accuracy"]) == 2
