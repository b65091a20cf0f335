"""Bad command lines: status 2 and one line with the flag and the value; nothing is written."""

import shlex

import processes
import pytest
import torch

import pruning_utils
from models import ResNet18
from runtime.checkpoint import save_checkpoint
from runtime.process import out_of_memory

SET = "--data published --epochs 1 "
BASE = {  # tiny runs, so that a case that is accepted does not take long
    "main_TD.py": processes.TINY + SET + "--no_teaching --prune_scheduler 1,1 --iter_epochs 1 ",
    "main_BU.py": processes.TINY + SET + "--no_teaching --max_iter_prun 1 --iter_epochs 1 ",
    "main_CIL.py": processes.TINY + SET,
    "main_train.py": processes.TINY + SET + "--no_teaching ",
    "test.py": processes.TINY + "--data published ",
    "dataset.py": "",
}
WEIGHT, MASK = "--weight dense.pt ", "--mask mask.pt "
TICKET = WEIGHT + MASK
HUGE = "9" * 5000

CASES = [  # script, its flags, what the line must contain
    # numbers
    ("main_TD.py", "--epochs 0", "--epochs: expected an integer >= 1, got '0'"),
    ("main_CIL.py", "--epochs=--", "--epochs"),
    ("main_BU.py", "--iter_epochs -3", "--iter_epochs", "'-3'"),
    ("main_TD.py", "--batch_size 7", "--batch_size 7", "at least 8"),
    ("main_TD.py", "--lr 0", "--lr: expected a number > 0, got '0'"),
    ("main_CIL.py", "--lr nan", "--lr", "'nan'"),
    ("main_CIL.py", "--decreasing_lr 60,late", "--decreasing_lr", "'late'"),
    ("main_TD.py", "--momentum 1", "--momentum", "'1'"),
    ("main_BU.py", "--weight_decay=-1e-4", "--weight_decay", "-1e-4"),
    ("main_CIL.py", "--width 0", "--width", "'0'"),
    ("main_TD.py", "--seed -1", "--seed", "'-1'"),
    ("main_CIL.py", f"--seed {HUGE}", "--seed"),
    ("main_TD.py", "--unlabel_num 0", "--unlabel_num", "--no_teaching"),
    ("main_TD.py", "--exemplars 999", "--exemplars 999: a class of"),
    ("main_CIL.py", "--classifiers 0", "--classifiers", "'0'"),
    ("main_CIL.py", "--classifiers 6", "--classifiers 6"),
    ("main_BU.py", "--percent 1", "--percent: expected a number >= 0 and < 1, got '1'"),
    ("main_BU.py", "--deacc nan", "--deacc", "'nan'"),
    ("main_BU.py", "--base_sparsity 101", "--base_sparsity", "'101'"),
    ("dataset.py", "--per_class 0", "--per_class", "'0'"),
    ("main_train.py", TICKET + "--state 3", "--state 3", "1 to 2"),
    ("test.py", "--pretrained dense.pt --state 0", "--state", "'0'"),
    # names and lists
    ("main_TD.py", "--prune_scheduler 1", "--prune_scheduler"),
    ("main_TD.py", "--prune_scheduler 1,-1", "--prune_scheduler", "'-1'"),
    ("main_TD.py", "--rewind back", "--rewind", "'back'"),
    ("main_BU.py", "--criterion gradient", "--criterion", "'gradient'"),
    ("main_TD.py", "--arch vgg16", "--arch", "'vgg16'"),
    ("main_CIL.py", "--device tpu", "--device tpu"),
    ("main_CIL.py", "--device cuda:99", "--device cuda:99"),
    ("main_CIL.py", "--gpu 99", "--gpu", "99"),
    ("main_TD.py", "--per_class 20", "--per_class", "dataset.py"),
    # flags that contradict each other, or a file
    ("main_CIL.py", "--joint --finetune", "--joint", "--finetune"),
    ("main_CIL.py", "--gpu 1 --device cpu", "--gpu", "--device"),
    ("main_CIL.py", "--classifiers 1 --merge_batchnorm", "--merge_batchnorm"),
    ("main_CIL.py", "--dataset digits", "--data"),
    ("main_train.py", WEIGHT + "--mask dense.pt", "--mask dense.pt", "holds no masks"),
    ("main_train.py", "--weight mask.pt " + MASK, "--weight mask.pt", "is a mask file"),
    ("test.py", "--pretrained mask.pt --pruned", "mask.pt", "is a mask file"),
    ("test.py", "--pretrained dense.pt --pruned", "dense.pt", "remove --pruned"),
    ("test.py", "--pretrained pruned.pt", "pruned.pt", "add --pruned"),
    ("test.py", "--pretrained dense.pt --classifiers 3", "dense.pt", "--classifiers"),
    # folders
    ("main_TD.py", "--save_dir file", "file"),
    ("main_CIL.py", "--save_data_path file/data", "file/data"),
    ("main_CIL.py", f"--save_dir {5000 * 'x'}", "xxx"),
    ("test.py", "--pretrained dense.pt --save_dir file", "file"),
    ("main_CIL.py", "--data nowhere", "nowhere"),
    ("dataset.py", "--dataset folder --source nowhere", "nowhere"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Valid input for the cases, in a folder that they must leave as it is."""
    folder = tmp_path_factory.mktemp("folder")
    processes.write_published(folder / "published")
    (folder / "file").write_text("neither a folder nor a checkpoint\n")
    model = ResNet18(2, 2, width=4)
    save_checkpoint(folder / "dense.pt", {"epoch": 1, "state_dict": model.state_dict()})
    masks = {name: torch.ones_like(each) for name, each in pruning_utils.masks_of(model).items()}
    save_checkpoint(folder / "mask.pt", pruning_utils.mask_state(masks))
    pruning_utils.apply_mask(model, masks)
    save_checkpoint(folder / "pruned.pt", model.state_dict())
    return folder


@pytest.mark.parametrize(
    ("script", "flags", "fragments"),
    [pytest.param(*case[:2], case[2:], id=f"{case[0]} {case[1][:50]}") for case in CASES],
)
def test_a_bad_command_line_is_an_error_of_one_line(scripts, folder, script, flags, fragments):
    before = processes.tree(folder)
    ended = scripts.run([script, *shlex.split(BASE[script]), *shlex.split(flags)], folder)
    line = ended.check_error(f"{script}: ", *fragments)
    assert line[:-1].isprintable() and len(line) < 1000
    assert processes.tree(folder) == before


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("main_TD.py", "--percent 0 --save_dir ~/TD"),
        ("main_BU.py", "--deacc 200 --base_sparsity 0 --save_dir {}/BU"),
        ("main_train.py", TICKET + "--save_dir {}/train"),
        ("test.py", "--pretrained pruned.pt --pruned --save_dir {}/test"),
    ],
)
def test_good_command_lines_are_accepted(scripts, folder, tmp_path, script, flags):
    """Otherwise a case above could fail for another reason than its own; ~ is expanded."""
    argv = [*shlex.split(BASE[script]), *flags.replace("~", str(tmp_path)).format(tmp_path).split()]
    ended = scripts.run([script, *argv], folder)
    assert (ended.status, ended.err) == (0, ""), ended


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_class_names_that_the_output_cannot_encode(scripts, folder, tmp_path, encoding):
    """The list of classes is an error of one line, or printed with escapes."""
    (tmp_path / "order.txt").write_text("狗\nmaçã\n", encoding="utf-8")
    flags = f"{BASE['main_CIL.py']} --class_order {tmp_path}/order.txt"
    ended = scripts.run(f"main_CIL.py {flags}", folder, encoding=encoding)
    ended.check_error(r"\u72d7")


@pytest.mark.parametrize(
    "error, known",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=str,
)
def test_memory_that_runs_out_is_known(error, known):
    """run_script() then advises a smaller batch or network; anything else is a traceback."""
    assert out_of_memory(error) == known
