"""What the scripts share below the method: arguments, device, seeds, files, a run's records."""

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import signal
import statistics
import sys
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import torch
import torchvision

# ------------------------------------------------------------------------------ refusing


class Refusal(Exception):
    """The run cannot go on as asked: one line that names the flag or file and what to do."""


def first_line(error):
    """What an exception says, on one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.splitlines()[0]


def run(main):
    """Run a script's main(); a Refusal becomes one line on stderr and exit status 2.

    SIGINT and SIGTERM end it with 130 and 143, between two steps of training at the earliest.
    """
    keep_freed_memory()
    before = {each: signal.signal(each, Signals.come) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        return main()
    except Refusal as refusal:
        words, status = refusal, 2
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        words, status = f"{first_line(error)}; give a smaller --batch_size or --width", 2
    except Interrupted as end:
        words, status = f"stopped by {signal.Signals(end.signum).name}", 128 + end.signum
        without = " without --overwrite" if "--overwrite" in sys.argv else ""
        words += f"{end.where}; give the same command again{without} to go on"
    except BrokenPipeError:
        sys.stdout = None  # else Python complains once more at its end
        words, status = "its output was closed; give the same command again to go on", 2
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    print(f"{Path(sys.argv[0]).name}: {shown(words)}", file=sys.stderr)
    sys.exit(status)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; where: words on how far the run is stored."""

    def __init__(self, signum, where=""):
        super().__init__()
        self.signum, self.where = signum, where


class Signals:
    """SIGINT and SIGTERM raise Interrupted at once, or, where they are held, at check_signals()."""

    held, came = False, None

    @staticmethod
    def come(signum, frame):
        if not Signals.held:
            raise Interrupted(signum)
        Signals.came = signum


@contextlib.contextmanager
def hold_signals():
    """Within it only check_signals() raises Interrupted: what belongs together stays together."""
    outer, Signals.held = Signals.held, True
    try:
        yield
    finally:
        Signals.held = outer
    if not outer:
        check_signals()


def check_signals():
    """Raise Interrupted if a signal came that was held."""
    if Signals.came:
        signum, Signals.came = Signals.came, None
        raise Interrupted(signum)


def shown(words, most=800):
    """Words, what was typed and what a file holds among them, as one line for a terminal."""
    line = "".join(c if c.isprintable() else " " for c in str(words))
    return line if len(line) <= most else f"{line[: most // 2]}...{line[-most // 2 :]}"


def keep_freed_memory():
    """Let the C library keep what is freed for the next step, on Linux (glibc).

    By default each large activation is fresh memory from the system, which clears it page by
    page: on a CPU, up to 40 % of a training step (benchmarks/NOTES.md).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for anything
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


# ------------------------------------------------------------------------------ arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are Refusals and whose help shows the defaults."""

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise Refusal(f"{message} (--help lists the flags)")


def shortened(text):
    """What was typed, for a message."""
    return repr(text if len(text) <= 50 else text[:50] + "...")


def place(text):
    """An argparse type: names of files and folders, there or not."""
    try:
        os.lstat(text)
        return text
    except (FileNotFoundError, NotADirectoryError):
        if text:
            return text
        words = "found nothing"
    except OSError as error:
        words = f"found {shortened(text)} ({first_line(error)})"
    raise argparse.ArgumentTypeError(f"{words}, give the name of a file or folder")


def whole(least, most=2**63 - 1):
    """An argparse type: whole numbers from `least` to `most`."""

    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            top = "" if most == 2**63 - 1 else f" and at most {most}"
            message = f"found {shortened(text)}, give a whole number of at least {least}{top}"
            raise argparse.ArgumentTypeError(message)
        return value

    return convert


def real(words, accept):
    """An argparse type: finite numbers that `accept` takes; `words` tell the user which."""

    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not accept(value):
            raise argparse.ArgumentTypeError(f"found {text!r}, give {words}")
        return value

    return convert


# PyTorch refuses factors beyond float32
positive = real("a number above 0 and below 1e38", lambda v: 0 < v < 1e38)
not_negative = real("a number of at least 0 and below 1e38", lambda v: 0 <= v < 1e38)
share = real("a share between 0 and 1", lambda v: 0 < v < 1)
percentage = real("a percentage from 0 to below 100", lambda v: 0 <= v < 100)
any_number = real("a number", lambda v: True)


def image_side(text):
    """An argparse type: a multiple of 8 from 16 to 128."""
    if not text.isdecimal() or int(text) not in range(16, 129, 8):
        raise argparse.ArgumentTypeError(f"found {text!r}, give a multiple of 8 from 16 to 128")
    return int(text)


def word(text):
    """An argparse type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("found nothing, give a word")
    return text


def whole_list(text):
    """An argparse type: whole numbers of at least 0, separated by commas: '60,80'."""
    return [whole(0)(word) for word in text.split(",") if text]


def make_parser(description, save_dir):
    """A parser with the flags that every script takes; names and defaults are the published ones.

    save_dir: words for the default of --save_dir, e.g. 'TD_<dataset>'.
    """
    parser = Parser(description)
    flag = parser.add_argument_group("data").add_argument
    add_data_flags(flag)
    flag(
        "--unlabel_num",
        type=whole(1),
        default=50,
        metavar="N",
        help="pool images that each exemplar queries (default %(default)s)",
    )
    flag(
        "--no_teaching",
        action="store_true",
        help="train with exemplars alone, without the unlabeled images (an ablation of the paper)",
    )
    flag = parser.add_argument_group("files").add_argument
    words = f"where the run's files go (default {save_dir})"
    flag("--save_dir", type=place, metavar="DIR", help=words)
    flag(
        "--save_data_path",
        type=place,
        metavar="DIR",
        help="queried images and soft labels (default <save_dir>/data)",
    )
    flag(
        "--checkpoint_seconds",
        type=not_negative,
        default=60,
        metavar="S",
        help="most seconds of training between two checkpoints, from which the same command, "
        "given again, goes on (default %(default)s)",
    )
    flag(
        "--overwrite",
        action="store_true",
        help="begin anew: remove what a run of this script has written to --save_dir (without it "
        "the run goes on)",
    )
    flag = parser.add_argument_group("training").add_argument
    number = "(default %(default)s)"
    flag("--epochs", type=whole(1), default=100, metavar="N", help=f"epochs of a task {number}")
    flag("--batch_size", type=whole(1), default=256, metavar="N", help=number)
    flag("--lr", type=positive, default=0.01, help=f"learning rate {number}")
    flag(
        "--decreasing_lr",
        type=whole_list,
        default="60,80",
        metavar="E,E",
        help=f"epochs after which the learning rate falls to a tenth {number}",
    )
    below_one = real("a number from 0 to below 1", lambda v: 0 <= v < 1)
    flag("--momentum", type=below_one, default=0.9, help=number)
    flag("--weight_decay", type=not_negative, default=5e-4, help=number)
    flag = parser.add_argument_group("network and machine").add_argument
    flag(
        "--width",
        type=whole(1, 4096),
        default=64,
        metavar="N",
        help=f"channels of the first layer {number}",
    )
    flag(
        "--device",
        default="auto",
        help="auto (cuda:<--gpu>, else mps, else cpu), cpu, cuda, cuda:N or mps (default auto)",
    )
    flag("--gpu", type=whole(0), default=0, metavar="N", help=f"the CUDA device of auto {number}")
    flag(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="in which the backbone computes: fp32 (default), or bf16 (autocast), several times "
        "faster where the hardware has it; weights, statistics, heads and ranks are fp32 always",
    )
    flag("--seed", type=whole(0), default=0, metavar="N", help=number)
    flag(
        "--deterministic",
        action="store_true",
        help="the same bits every time on a CUDA device too, at some cost of speed (a CPU gives "
        "them anyway)",
    )
    flag(
        "--print_freq",
        type=whole(1),
        default=50,
        metavar="N",
        help=f"batches between updates of the loss in the progress bar {number}",
    )
    return parser


def add_data_flags(flag):
    """What a data set is and where it is from, in dataset.py and all scripts; flag: add_argument.

    The --source, --image_size and --unlabeled of a prepared set must be those it has; of --raw it
    has no more use.
    """
    flag(
        "--dataset",
        default="cifar10",
        metavar="NAME",
        help="cifar10 (default), cifar100, tiny_imagenet, digits, or folder: images of your own",
    )
    flag(
        "--data",
        type=place,
        metavar="DIR",
        help="prepared or published data set (default data/<dataset>)",
    )
    flag(
        "--raw",
        type=place,
        metavar="PATH",
        help="folder of the official files (or tiny-imagenet-200.zip), so that nothing is "
        "downloaded; needed only where the set is not prepared yet, as are the next three",
    )
    flag(
        "--source",
        type=place,
        metavar="DIR",
        help="for --dataset folder: DIR/train/<class>/*, DIR/test/<class>/* and, if you like, a "
        "pool DIR/unlabeled/*, in any format that Pillow reads",
    )
    flag(
        "--image_size",
        type=image_side,
        metavar="N",
        help="for --dataset folder: images become NxN, a multiple of 8 from 16 to 128 (default 32)",
    )
    flag(
        "--unlabeled",
        nargs="+",
        type=place,
        metavar="PATH",
        help="the pool: .npy or .npz of uint8 [n,H,W,3], the published pickle, or a folder of "
        "images; several may be given (default: the set's own)",
    )
    flag("--classifiers", type=whole(1), metavar="T", help="number of tasks (default: the set's)")
    flag(
        "--classes_per_classifier",
        type=whole(1),
        metavar="C",
        help="classes of each task (default: the set's)",
    )
    flag(
        "--class_order",
        type=word,
        metavar="ORDER",
        help="published (default; where none was: the permutation of seed 1993), sorted, "
        "random:SEED, or a file with a class name or id a line",
    )


def settle(args, save_dir, trains=True):
    """Check --state and --batch_size and fill in where files go. Raises Refusal.

    args: with the number of tasks filled in. save_dir: the default of --save_dir, with {} for the
    data set's name. trains: whether a task is trained, for which the batch must be shared out.
    """
    last = getattr(args, "state", None) or args.classifiers
    if "state" in args:
        args.state = last
    if last > args.classifiers:
        raise Refusal(f"--state {last}: there are {args.classifiers} tasks, give 1 to that")
    if trains and last > 1 and args.batch_size // 4 < last:
        raise Refusal(
            f"--batch_size {args.batch_size}: a quarter of it is shared out among {last} tasks, "
            f"give at least {4 * last}"
        )
    args.save_dir = args.save_dir or save_dir.format(args.dataset)
    args.save_data_path = args.save_data_path or str(Path(args.save_dir) / "data")
    for key in ("save_dir", "save_data_path") if trains else ():
        path = getattr(args, key)
        there = next(p for p in (Path(path), *Path(path).parents) if p.exists())
        if not there.is_dir():
            raise Refusal(f"--{key} {path}: {there} is a file, give another folder")


def add_pruning_flags(flag):
    """The flags of main_TD and main_BU alike; flag: the add_argument of a group."""
    flag("--percent", type=share, default=0.2, help="share pruned at once (default %(default)s)")
    flag(
        "--iter_epochs",
        type=whole(1),
        default=30,
        metavar="N",
        help="epochs of retraining after a pruning, at lr/100 (default %(default)s)",
    )


# What main_train.py trains in a ticket's place (its take_control), in the words of the report.
CONTROLS = {
    "none": "the ticket",
    "random_mask": "random mask",
    "shuffle_mask": "shuffled mask",
    "reinit": "new network",
    "shuffle_weights": "shuffled weights",
    "dense": "dense, no mask",
}


def add_state(flag, words):
    """The flag of main_train and test alike; flag: the add_argument of a group."""
    flag("--state", type=whole(1), metavar="t", help=f"{words} (default: the last)")


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pick_device(name, gpu=0, deterministic=False):
    """The torch.device for --device `name`. Raises Refusal where there is no such device.

    deterministic: let PyTorch use no operation that may give other bits another time.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        if count > gpu:
            return torch.device("cuda", gpu)
        if count:
            raise Refusal(
                f"--gpu {gpu}: this machine has {count} CUDA device(s), give 0..{count - 1}"
            )
        return torch.device("mps" if mps else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not re.fullmatch("cuda:[0-9]+", name)):
        raise Refusal(f"--device {name}: unknown; give auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and count <= int(index or gpu):
        raise Refusal(f"--device {name}: this machine has {count} CUDA device(s); try --device cpu")
    if kind == "mps" and not mps:
        raise Refusal("--device mps: PyTorch finds no mps device here; try --device cpu")
    return torch.device("cuda", int(index or gpu)) if kind == "cuda" else torch.device(kind)


# ------------------------------------------------------------------------------ randomness


def derive(seed, *purpose):
    """A 63-bit seed from the run's seed and what it is for: step, epoch, purpose, ..."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(seed, *purpose):
    """A CPU generator of its own for each purpose, so that nothing hangs on what was drawn before.

    It is a CPU one whatever the device: the same draws everywhere.
    """
    return torch.Generator().manual_seed(derive(seed, *purpose))


def kth_smallest(values, k):
    """The k-th smallest (from 1) of values [n], a scalar tensor.

    kthvalue has no deterministic form on CUDA, because of the place that it gives too.
    """
    if torch.are_deterministic_algorithms_enabled():
        return values.sort().values[k - 1]
    return values.kthvalue(k).values


# ------------------------------------------------------------------------------ files


def beside(path):
    """Where a file is made before it is renamed to `path`."""
    return path.with_name(f".{path.name}.part")


def write_whole(path, write):
    """Make the file `path` with write(file), wholly or not at all: beside it, then renamed.

    It is on the disk before it is renamed. What a killed process left beside is written over.
    Returns the content's SHA-256 in hex.
    """
    path = Path(path)
    part, content = beside(path), io.BytesIO()
    write(content)
    try:
        with hold_signals():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(part, "wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            flush_folder(path.parent)
    except OSError as error:
        words = f"cannot be written ({first_line(error)})"
        raise Refusal(f"{path}: {words}; make room or name another folder") from None
    return hashlib.sha256(content.getbuffer()).hexdigest()


def flush_folder(folder):
    """Flush a folder's entries, a renamed file's new name among them, to the disk."""
    with contextlib.suppress(OSError):  # Windows has no such thing
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def file_checksum(path):
    """SHA-256 of a file in hex; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def save(path, content):
    """torch.save, wholly or not at all; tensors as CPU ones, which load anywhere."""
    return write_whole(path, lambda file: torch.save(to_cpu(content), file))


def to_cpu(content):
    """Nested dicts and lists with their tensors on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if isinstance(content, dict):
        return {key: to_cpu(value) for key, value in content.items()}
    if isinstance(content, list):
        return [to_cpu(value) for value in content]
    return content


def save_text(path, text):
    """Write a text, wholly or not at all."""
    return write_whole(path, lambda file: file.write(text.encode()))


def save_array(path, array):
    """np.save of a plain array, wholly or not at all."""
    return write_whole(path, lambda file: np.save(file, array, allow_pickle=False))


def load_array(path, where=None):
    """A plain array from a .npy file. Raises Refusal on anything else; nothing is unpickled.

    where: what a Refusal calls the file, if not by its path.
    """
    where = where or path
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise Refusal(f"{where}: no such file, give a .npy array") from None
    except Exception as error:  # a damaged file can raise anything
        words = first_line(error)
        if "allow_pickle" in words:  # NumPy takes all that it does not know for a pickle
            words = "it is of another kind"
        raise Refusal(f"{where}: not a plain .npy array ({words}), give another file") from None
    if not isinstance(array, np.ndarray):
        raise Refusal(f"{where}: found an archive, give a plain .npy array")
    return array


class Inert:
    """Stands in for the optimizer objects inside published checkpoints; does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# All that the pickles of published checkpoints may name; torch itself resolves the storages.
CHECKPOINT_NAMES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "dict"): dict,
    ("__builtin__", "dict"): dict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.optim.sgd", "SGD"): Inert,
    ("torch.optim.optimizer", "_RequiredParameter"): Inert,
}


def plain_dtype(kind, *_):
    """A NumPy dtype of plain values: no objects, whose arrays would hold pointers."""
    dtype = np.dtype(kind, copy=True)
    if dtype.kind not in "biufcSU":
        raise pickle.UnpicklingError(f"it holds values of type {dtype}")
    return dtype


# All that the published data sets' pickles may name: NumPy arrays and plain containers. The
# array type itself is a mere name here: called, it would make arrays over bytes of the file.
ARRAY_NAMES = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): plain_dtype,
    # bytes in the pickles of Python 3, protocol 2: always latin-1
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin-1"),
}
for core in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
    ARRAY_NAMES |= {
        (f"{core}.multiarray", "_reconstruct"): lambda *_: np._core.multiarray._reconstruct(
            np.ndarray, (0,), b"b"
        ),
        (f"{core}.multiarray", "scalar"): np._core.multiarray.scalar,
        (f"{core}.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    }


def restricted(names):
    """A stand-in for the pickle module whose Unpickler admits exactly `names`.

    names: dict (module, name) -> what to put there. `storages` and `loaded` of what is returned:
    the keys of torch's storages that were asked for, and what load() gave.
    """
    storages, loaded = set(), []

    class Unpickler(pickle._Unpickler):
        """The one in Python: for nine bytes, the one in C fills gigabytes with an empty memo."""

        def find_class(self, module, name):
            try:
                return names[module, name]
            except KeyError:
                raise pickle.UnpicklingError(f"it names {module}.{name}") from None

        def build(self):
            """A state fills arrays and stand-ins, but changes no function, class, dtype, dict."""
            made, state = self.stack[-2:]
            if isinstance(made, OrderedDict):  # torch's _metadata, of no use here
                self.stack.pop()
                return
            if isinstance(made, np.dtype):  # but for the byte order, as it is
                if state[2:] != made.__reduce__()[2][2:]:
                    raise pickle.UnpicklingError("it forges a dtype")
            elif not isinstance(made, (Inert, np.ndarray)):
                raise pickle.UnpicklingError(f"it changes a {type(made).__name__}")
            self.load_build()

        def persistent(self):
            """Storages alone: for other ids torch reads sources, and writes patches of them."""
            saved_id = self.stack[-1]
            if not isinstance(saved_id, tuple) or saved_id[:1] not in (("storage",), (b"storage",)):
                raise pickle.UnpicklingError("it asks for something that is no storage")
            storages.add(saved_id[2])
            self.load_binpersid()

        dispatch = pickle._Unpickler.dispatch | {
            pickle.BUILD[0]: build,
            pickle.BINPERSID[0]: persistent,
        }

    def load(file, **options):
        loaded.append(Unpickler(file, **options).load())
        return loaded[-1]

    return types.SimpleNamespace(
        Unpickler=Unpickler, load=load, storages=storages, loaded=loaded, __name__="restricted"
    )


def load_arrays_pickle(path):
    """Read a published data pickle. Raises Refusal if it names anything but arrays."""
    try:
        with open(path, "rb") as file:
            return restricted(ARRAY_NAMES).load(file, encoding="latin1")
    except Exception as error:  # a hostile pickle can raise anything
        words = f"not a pickle of plain arrays ({first_line(error)}), give a sound copy"
        raise Refusal(f"{path}: {words}") from None


def check_archive(path):
    """Refuse a zip archive with damaged records, or compressed ones, which may become any size.

    torch.save and np.savez compress nothing. Neither torch nor NumPy looks at all checksums.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise Refusal(f"{path}: {record.filename} is compressed, give it uncompressed")
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise Refusal(f"{path}: holds two records of one name, get it anew")
        damaged = archive.testzip()
        if damaged:
            raise Refusal(f"{path}: is damaged at {damaged}, get it anew")


def load_checkpoint(path):
    """Read a checkpoint: ours, a published one, or a raw state dict; tensors on the CPU.

    Returns the dict in the file. Published checkpoints hold the optimizer as a pickled object,
    which weights_only loading refuses: they go through an unpickler that admits exactly
    CHECKPOINT_NAMES. Raises Refusal when there is no such file or it is no checkpoint.
    """
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a refusal is one line
            content = load_zip(path) if zipfile.is_zipfile(path) else load_legacy(path)
    except FileNotFoundError:
        raise Refusal(f"{path}: no such file, give a checkpoint") from None
    except Refusal:
        raise
    except Exception as error:  # a hostile or damaged file can raise anything
        words = f"not a checkpoint that can be read ({first_line(error)}), give another file"
        raise Refusal(f"{path}: {words}") from None
    if not isinstance(content, dict):
        raise Refusal(f"{path}: found {type(content).__name__}, give a checkpoint or state dict")
    return dict(dict.items(content))  # an OrderedDict's own methods can be the file's


def load_zip(path):
    """What torch.save has written since 1.6."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise Refusal(f"{path}: a TorchScript archive, give a checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return load_published(path, restricted(CHECKPOINT_NAMES))


def load_legacy(path):
    """What torch.save wrote before. Raises Refusal if the file does not fill all its storages."""
    if tarfile.is_tarfile(path):
        raise Refusal(f"{path}: a tar archive, give a checkpoint")
    names = restricted(CHECKPOINT_NAMES)
    content = load_published(path, names)
    if not names.storages <= set(names.loaded[-1]):  # weights would be what was in memory
        raise Refusal(f"{path}: lacks the values of some tensors, give another file")
    return content


def load_published(path, names):
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=names)


def read_state(path):
    """The state dict of a checkpoint file, in either form: {'state_dict': ...} or raw."""
    content = load_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state:
        raise Refusal(f"{path}: holds no state dict, give a checkpoint")
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in dict.items(state)):
        raise Refusal(
            f"{path}: holds no state dict (something in it is no named tensor), give a checkpoint"
        )
    for key, value in dict.items(state):
        odd = value.is_meta or value.is_quantized or value.is_nested
        if odd or value.layout is not torch.strided:
            raise Refusal(f"{path}: {key} is no plain tensor, give another file")
    return OrderedDict(dict.items(state))


# ------------------------------------------------------------------------------ records


# Of an accuracy matrix a_{t,i}, the test accuracy of task i after task t, in percent. The functions
# below take it as rows: row t holds the accuracies of tasks 1..t.
DEFINITIONS = {
    "last accuracy": "the mean over i of a_{T,i}, after the last task T",
    "average incremental accuracy (AIA)": "the mean over t of the mean over i <= t of a_{t,i} "
    "(iCaRL, Rebuffi et al. 2017)",
    "forgetting": "the mean over i < T of max_{i <= t < T} a_{t,i} - a_{T,i}, in percentage "
    "points; negative where old tasks gained (Chaudhry et al. 2018)",
}


def last_accuracy(matrix):
    """See DEFINITIONS; in percent."""
    return sum(matrix[-1]) / len(matrix[-1])


def average_incremental_accuracy(matrix):
    """See DEFINITIONS; in percent."""
    return sum(sum(row) / len(row) for row in matrix) / len(matrix)


def forgetting(matrix):
    """See DEFINITIONS; in percentage points; None with one task: nothing can be forgotten."""
    last = matrix[-1]
    drops = [
        max(matrix[state][task] for state in range(task, len(matrix) - 1)) - last[task]
        for task in range(len(last) - 1)
    ]
    return sum(drops) / len(drops) if drops else None


def spread(values):
    """Mean and standard deviation (sample: n - 1) of numbers; of one number that is None."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def device_name(device):
    """The device in words, for the records."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()})"


class Record:
    """What a run has to say: results.json for programs, log_results.txt (tab-separated) for people.

    Both are written anew after every state, wholly or not at all. prefix: goes before both names
    (main_train and test may work in the folder of another run). Without a --save_dir, which
    test.py need not have, nothing is written.
    """

    def __init__(self, script, args, data, device, prefix=""):
        self.folder, self.prefix = args.save_dir, prefix
        self.results = {
            "script": script,
            "config": vars(args) | {"data": str(data.source)},
            "class_order": data.order,
            "device": device_name(device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": np.__version__,
            },
            "states": [],
        }

    def add(self, state, accuracy, density, **more):
        """Add a row: accuracy is a list (percent, tasks 1..), density that of the model tested."""
        row = {"state": state, "accuracy": accuracy, "mean": sum(accuracy) / len(accuracy)}
        row |= {"density": density} | more
        self.results["states"].append(row)
        self.write()
        listed = " ".join(f"{a:.2f}" for a in accuracy)
        print(f"state {state}: test accuracy {listed}, mean {row['mean']:.2f} %", end="")
        print(f" at {density:.2f} % of the weights", flush=True)

    def close(self, matrix=None):
        """Write the last time; with the accuracy matrix of all states, its summaries too."""
        if matrix:
            average, lost = average_incremental_accuracy(matrix), forgetting(matrix)
            self.results |= {"average_incremental_accuracy": average, "forgetting": lost}
            print(f"average incremental accuracy {average:.2f} %", end="")
            print("" if lost is None else f", forgetting {lost:.2f}")
        self.write()
        if self.folder:
            print(f"records: {self.folder}/{self.prefix}results.json", flush=True)
        return self.results

    def write(self):
        texts = {"results.json": json.dumps(self.results, indent=1) + "\n"}
        texts["log_results.txt"] = self.table()
        for name, text in texts.items() if self.folder else ():
            save_text(Path(self.folder) / (self.prefix + name), text)

    def table(self):
        """The states as tab-separated lines under a line of names."""
        rows = self.results["states"]
        tasks = max((len(row["accuracy"]) for row in rows), default=0)
        names = ["state", *(f"task{t + 1}" for t in range(tasks))]
        lines = [[*names, "mean", "density_tested", "density_ticket", "seconds"]]
        for row in rows:
            cells = [f"{a:.2f}" for a in row["accuracy"]]
            cells += [""] * (tasks - len(cells))
            for name, digits in (
                ("mean", 2),
                ("density", 2),
                ("ticket_density", 2),
                ("seconds", 0),
            ):
                cells.append(f"{row[name]:.{digits}f}" if name in row else "")
            lines.append([str(row["state"]), *cells])
        return "".join("\t".join(line) + "\n" for line in lines)
