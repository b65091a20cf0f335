"""The device of --device and --gpu."""

import os
import re

import torch

from runtime import ranks
from runtime.errors import UserError


def pick_device(args):
    """The torch.device of --device and --gpu. Raises UserError if there is no such device.

    With --deterministic PyTorch then uses no operation that may give other bits another time.
    Under torchrun each rank has a device of its own.
    """
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    name, gpu = args.device, args.gpu or 0
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks.world() > 1:
        return rank_device(args, count)
    mps = torch.backends.mps.is_available()
    if name == "auto":
        if count > gpu:
            return torch.device("cuda", gpu)
        if gpu:  # 0, the default, is as if not given
            advice = f"give 0..{count - 1}" if count else "leave it out"
            raise UserError(f"--gpu {gpu}: this machine has {count} CUDA device(s), {advice}")
        return torch.device("mps" if mps else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not re.fullmatch("cuda:[0-9]+", name)):
        raise UserError(f"--device {name}: unknown; give auto, cpu, cuda, cuda:N or mps")
    if gpu and name not in ("cuda", f"cuda:{gpu}"):
        raise UserError(f"--device {name} --gpu {gpu}: are two devices; give one")
    if kind == "cuda" and count <= int(index or gpu):
        raise UserError(
            f"--device {name}: this machine has {count} CUDA device(s); try --device cpu"
        )
    if kind == "mps" and not mps:
        raise UserError("--device mps: PyTorch finds no mps device here; try --device cpu")
    return torch.device("cuda", int(index or gpu)) if kind == "cuda" else torch.device(kind)


def rank_device(args, count):
    """The torch.device of this rank under torchrun, of `count` CUDA devices."""
    number, processes = ranks.local()
    if args.gpu is not None:
        raise UserError(
            f"--gpu {args.gpu}: under torchrun each process takes a GPU of its own; leave it out"
        )
    if args.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {args.device}: under torchrun give auto, cpu or cuda")
    kind = "cuda" if args.device == "cuda" or (args.device == "auto" and count) else "cpu"
    ranks.compare({f"--device {args.device}": kind})  # else some would wait for the others forever
    if kind == "cpu":
        return torch.device("cpu")
    if count < processes:
        fewer = f"give torchrun --nproc_per_node {count}, or " if count else "give "
        raise UserError(
            f"--device {args.device}: this machine has {count} CUDA device(s); {fewer}--device cpu "
            f"to the script"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
