"""A device that is not the CPU, on any machine: `with emulated("cuda") as gpu:`, or "mps".

A tensor on it wraps a CPU tensor. Below autograd, where kernels would be called, a mode checks each
operation as the device would, counts it, and has the CPU compute it: results are those of the CPU,
bit for bit. It knows where tensors are and where the host waits, but no kernels, TF32 or streams.
"""

import contextlib
import os
import sys
from collections import Counter
from importlib import import_module
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HIDDEN, CPU = torch.device("meta", 1), torch.device("cpu")  # HIDDEN: what C++ takes the device for
WAITS = {aten._local_scalar_dense: 1, aten.nonzero: 1, aten.equal: 1, aten.bincount: 2}
PLAIN = {"__torch_function__": torch._C._disabled_torch_function_impl}
Pinned = type("Pinned", (torch.Tensor,), PLAIN)  # a CPU tensor in pinned memory


class OnDevice(torch.Tensor):  # held: the CPU tensor with its values
    __torch_function__ = PLAIN["__torch_function__"]
    __torch_dispatch__ = classmethod(lambda *_: NotImplemented)  # outside of emulated()
    place, is_meta, device = None, False, property(lambda self: self.place)

    def __new__(cls, held):
        if cls.place.type == "mps" and held.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        layout = held.stride(), held.storage_offset(), None, held.dtype, torch.strided, HIDDEN
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, *layout)
        self.held = held
        return self

    def move(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    data = property(lambda self: self.detach(), move)
    tolist = lambda self: self.cpu().tolist()  # noqa: E731
    __reduce_ex__ = lambda self, protocol: self.held.__reduce_ex__(protocol)  # noqa: E731


def each(function, x):
    """function of everything in tuples and lists."""
    return type(x)(each(function, y) for y in x) if isinstance(x, (tuple, list)) else function(x)


class Emulation(TorchDispatchMode):
    """launches: operations by name, without views, a lower bound of kernels; waits of the host."""

    def __init__(self):
        super().__init__()
        self.waits, self.launches = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, tensors = kwargs or {}, []

        def held(x):
            if isinstance(x, torch.Tensor):
                tensors.append(x)
            return x.held if isinstance(x, OnDevice) else CPU if isinstance(x, torch.device) else x

        held_args, held_kwargs = each(held, args), {k: each(held, x) for k, x in kwargs.items()}
        known = {id(x.held): x for x in tensors if isinstance(x, OnDevice)}
        to = kwargs.get("device")
        if not known and (to is None or (to != HIDDEN and to.type != OnDevice.place.type)):
            return func(*args, **kwargs)
        self.check(func, args, kwargs, tensors, to)
        self.launches[str(func)] += not (func.is_view or "empty" in str(func))
        out = func(*held_args, **held_kwargs)
        if to == CPU or (func is aten.copy_.default and not isinstance(args[0], OnDevice)):
            return out
        out = each(lambda x: known.get(id(x), x), out)  # what was written to is as it was
        return each(lambda x: OnDevice(x) if type(x) is torch.Tensor else x, out)

    def check(self, func, args, kwargs, tensors, to):
        """Raise RuntimeError where the device would; count where the host waits for it."""
        kind, others = func.overloadpacket, [x for x in tensors if not isinstance(x, OnDevice)]
        if (generator := kwargs.get("generator")) and generator.device == CPU != to:
            raise RuntimeError(f"{func}: expected a generator of {OnDevice.place}")
        if torch.are_deterministic_algorithms_enabled() and kind in (aten.kthvalue, aten.histc):
            raise RuntimeError(f"{func}: has no deterministic implementation")
        if kind is aten.native_batch_norm_backward and args[5] is None:  # Normalization.cu
            raise RuntimeError(f"{func}: save_mean->defined() INTERNAL ASSERT FAILED")
        if kind in (aten.copy_, aten._to_copy):
            source, flag = args[kind is aten.copy_], kwargs.get("non_blocking") or any(args[2:])
            if flag and isinstance(source, OnDevice) and (others or to == CPU):
                raise RuntimeError(f"{func}: a copy to the host is read before it has arrived")
            if (others or to == CPU) and not (flag and isinstance(source, Pinned)):
                self.wait(f"copy from {source.device}")
        elif kind in (aten.index, aten.index_put_, aten._index_put_impl_):
            if any(x.dim() for x in others):  # the host would wait for a copy, at each use
                raise RuntimeError(f"{func}: an index, or what it indexes, is on the CPU")
            if not others and any(x is not None and x.dtype == torch.bool for x in args[1]):
                self.wait("nonzero of a mask")
        else:
            written = [id(x) for a, x in zip(func._schema.arguments, args) if a.is_write]
            scalars = torch.Tag.pointwise in func.tags or kind is aten.fill_
            if any(x.dim() or not scalars or id(x) in written for x in others):
                raise RuntimeError(f"{func}: not on one device: {[str(x.device) for x in tensors]}")
            for _ in range(WAITS.get(kind, 0)):
                self.wait(str(kind))

    def wait(self, what):
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ or "lib/python" in frame.f_code.co_filename:
            frame = frame.f_back
        self.waits[f"{what}, {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"] += 1


def conv_forward(self, x, weight, bias, original=torch.nn.Conv2d._conv_forward):
    if isinstance(x, OnDevice) and torch.is_autocast_enabled(x.place.type):
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    return original(self, x, weight, bias)


def to(self, *args, original=torch.Tensor.to, **kwargs):  # a device without index, such as mps
    bare = torch.device(OnDevice.place.type)
    args = [OnDevice.place if isinstance(x, torch.device) and x == bare else x for x in args]
    return original(self, *args, **kwargs)


@contextlib.contextmanager
def emulated(name="cuda"):
    """Within it PyTorch has such a device; gives the Emulation."""
    import_module("torch._dynamo")  # as optimizers do, but not while all this is patched
    optimizer, patch = sys.modules["torch.optim.optimizer"], mock.patch.object
    keys = "is_available", "is_bf16_supported", "get_device_name", "_lazy_init"
    answers = zip(keys, (name == "cuda", True, "emulated", None))
    foreach = [*optimizer._foreach_supported_types, OnDevice]  # as SGD computes on CUDA
    pin = lambda self: self.clone().as_subclass(Pinned)  # noqa: E731
    with (
        mock.patch.multiple(torch.cuda, **{k: lambda *a, v=v, **_: v for k, v in answers}),
        mock.patch.multiple(torch.Tensor, to=to, pin_memory=pin),
        patch(torch.backends.mps, "is_available", lambda: name == "mps"),
        patch(torch.nn.Conv2d, "_conv_forward", conv_forward),
        patch(optimizer, "_foreach_supported_types", foreach),
        patch(OnDevice, "place", torch.device(name, 0)),
        Emulation() as gpu,
    ):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor() copies a CPU tensor
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
