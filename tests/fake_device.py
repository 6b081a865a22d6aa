"""A device that is not the CPU, on any machine: its tensors say that they are elsewhere (torch calls the place 'meta'), though their numbers
are here. An operation on tensors of two devices is refused as a GPU refuses it, so code that forgets `device=` or `.to` is found without a
GPU; and the numbers can be compared with the CPU's.

torch's own FakeTensorMode('cuda') does not do: autograd and some operations need a build with CUDA, and the tensors have no values, which the
plan of the captions' lengths needs."""
from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device('meta')
CROSSING = ('aten::copy_', 'aten::_to_copy', 'aten::_pack_padded_sequence')   # may have tensors of two devices; the last wants lengths on the CPU


class Away(Tensor):
    "A tensor on that device"
    @staticmethod
    def __new__(cls, here: Tensor):
        away = Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
                                             device=DEVICE)
        away.here = here
        return away

    def __repr__(self) -> str: return f'Away({self.here})'

    def tolist(self): return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return compute(func, args, kwargs or {})


def compute(func, args: tuple, kwargs: dict):
    "`func` on the numbers themselves; refused if they are not in one place"
    name, tensors = func._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = {id(x.here): x for x in tensors if isinstance(x, Away)}
    target = kwargs.get('device')
    if target is not None and torch.device(target) == DEVICE: kwargs = kwargs | dict(device=torch.device('cpu'))
    if away and name not in CROSSING and any(x.ndim and not isinstance(x, Away) for x in tensors):   # numbers without dimensions may come along
        raise RuntimeError(f'{name}: tensors on two devices: {[(type(x).__name__, tuple(x.shape)) for x in tensors]}')
    if name == 'aten::copy_': goes = isinstance(args[0], Away)
    else: goes = torch.device(target) == DEVICE if target is not None else bool(away)
    def bring(x): return x.here if isinstance(x, Away) else x
    def send(x):
        if not isinstance(x, Tensor) or isinstance(x, Away) or not goes: return x
        if name == 'aten::_pack_padded_sequence' and x.ndim == 1: return x   # sizes of batches, on the CPU by definition
        return away.get(id(x)) if id(x) in away else Away(x)                            # in place: the same object again
    return tree_map(send, func(*tree_map(bring, args), **tree_map(bring, kwargs)))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return compute(func, args, kwargs or {})


class Made(TorchFunctionMode):
    "torch.tensor makes its result below all dispatch"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get('device') is not None and torch.device(kwargs['device']) == DEVICE:
            return args[0] if isinstance(args[0], Away) else Away(func(*args, **kwargs | dict(device='cpu')))
        return func(*args, **kwargs)


@contextmanager
def fake_device():
    "Inside, `DEVICE` computes; autocast, which does not know it, is off there"
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    with ExitStack() as stack:
        stack.enter_context(patch('torch.is_autocast_enabled', lambda *a: False if a == (DEVICE.type,) else enabled(*a)))
        stack.enter_context(patch('torch.autocast', lambda kind, *a, **k: nullcontext() if kind == DEVICE.type else autocast(kind, *a, **k)))
        for mode in (Made(), Dispatch()): stack.enter_context(mode)
        yield DEVICE


def move(module: nn.Module) -> nn.Module:
    "`module`, its weights on `DEVICE`"
    for m in module.modules():
        for name, p in list(m._parameters.items()):
            if p is not None: m._parameters[name] = nn.Parameter(Away(p.detach().clone()), requires_grad=p.requires_grad)
        for name, b in list(m._buffers.items()):
            if b is not None: m._buffers[name] = Away(b.clone())
    return module
