"""Makes megatron-core run on a CPU: replaces the CUDA calls it makes by CPU ones, once per process.

    cpu.install()          # engine/mcore/__init__.py calls it where there is no GPU; does nothing the second time

megatron-core writes "cuda" in its own code: as a device string, as streams and events it never needs on a CPU, as CUDA
random states, and as tensor type names. Each is a plain function here, so a call costs what it cost before (a
TorchFunctionMode would cost microseconds per operation and is popped inside custom backward functions).
Left out: speed. What megatron does slowly on a CPU is replaced in spec_torch.py, by choosing other modules.
"""

import contextlib
import ctypes
import functools
import os
import sys

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint", "linspace", "as_tensor",
              "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "empty_strided")
_TYPE_NAMES = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"}


def install() -> None:
    """Replace what megatron-core needs replaced. Idempotent. Runs before megatron's own import where there is no GPU."""
    if getattr(torch, "_trireme_cpu", False):
        return
    torch._trireme_cpu = True
    sys.modules.setdefault("transformer_engine", None)  # megatron would take its optimizer, which has no CPU code
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron asserts it under tp; nothing reads it here
    _devices()
    _streams()
    _random()
    _type_names()
    _megatron()


def keep_memory() -> None:
    """Let glibc reuse freed memory instead of giving it back: a large tensor then costs no page faults at every step
    (an elementwise pass over 134 MB: 46 ms before, 13 ms after). Elsewhere than on glibc nothing happens."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no mmap per allocation
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap


def _is_cuda(device) -> bool:
    return device is not None and not isinstance(device, int) and str(device).startswith("cuda")


def _devices() -> None:
    from torch.utils import _device

    _device._device_constructors()  # torch caches its own factories here for `with torch.device(...)`; fill it before they change
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    original_to = torch.Tensor.to

    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0] if isinstance(args[0], (str, torch.device)) else None):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original_to(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.set_device = lambda device: None
    torch.cuda.empty_cache = lambda: None


def _on_cpu(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return call


class _Stream:
    """Stands for a stream or an event where everything already runs in order."""

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        return event or _Stream()

    def _nothing(self, *args, **kwargs):
        return None

    wait_event = wait_stream = record = wait = synchronize = _nothing

    def query(self):
        return True


def _streams() -> None:
    stream = _Stream()
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: stream
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()


def _random() -> None:
    get = lambda *args, **kwargs: torch.get_rng_state()  # noqa: E731
    set_ = lambda state, *args, **kwargs: torch.set_rng_state(state)  # noqa: E731
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.set_rng_state = get, set_
        module.manual_seed = module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed) and None


def _type_names() -> None:
    """megatron's optimizers sort parameters by `tensor.type() == "torch.cuda.FloatTensor"` and kin."""
    for name in _TYPE_NAMES.values():
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    original_type = torch.Tensor.type

    def type_(self, *args, **kwargs):
        if not args and not kwargs and self.dtype in _TYPE_NAMES:
            return f"torch.cuda.{_TYPE_NAMES[self.dtype]}Tensor"
        return original_type(self, *args, **kwargs)

    torch.Tensor.type = type_


def _megatron() -> None:
    with _uncompiled():
        import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _gloo_split_sizes()
    _gloo_uneven()


@contextlib.contextmanager
def _uncompiled():
    """torch.compile as the identity, while megatron decorates its fused activations with it at import: each such call loads the
    whole compiler, 3.5 s of every start, for functions that a CPU run never calls or that cost more to compile than they save."""
    compiler, torch.compile = torch.compile, lambda function=None, **options: function if function else lambda f: f
    try:
        yield
    finally:
        torch.compile = compiler


def _gloo_split_sizes() -> None:
    """gloo's all_to_all_single takes split sizes as lists of int only; megatron hands over tensors and numpy arrays."""
    original = torch.distributed.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        def as_list(sizes):
            return None if sizes is None else [int(size) for size in sizes]

        return original(output, input, as_list(output_split_sizes), as_list(input_split_sizes), group, async_op)

    torch.distributed.all_to_all_single = all_to_all_single


def _gloo_uneven() -> None:
    """all_gather and reduce_scatter of tensors that differ in their first dim (experts under tp): pad to the longest for gloo."""
    all_gather, reduce_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    def padded(tensor, rows: int):
        return torch.cat([tensor, tensor.new_zeros(rows - tensor.size(0), *tensor.shape[1:])]) if tensor.size(0) < rows else tensor.contiguous()

    def gather(tensor_list, tensor, group=None, async_op=False):
        rows = max((t.size(0) for t in tensor_list if t.dim()), default=0)
        if all(t.dim() == 0 or t.size(0) == rows for t in tensor_list):
            return all_gather(tensor_list, tensor, group, async_op)
        assert not async_op, "an uneven all_gather over gloo waits for its result"
        buffers = [t.new_empty(rows, *t.shape[1:]) for t in tensor_list]
        all_gather(buffers, padded(tensor, rows), group)
        for target, buffer in zip(tensor_list, buffers):
            target.copy_(buffer[:target.size(0)])

    def scatter(output, input_list, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
        rows = max(t.size(0) for t in input_list)
        if all(t.size(0) == rows for t in input_list):
            return reduce_scatter(output, input_list, op, group, async_op)
        assert not async_op, "an uneven reduce_scatter over gloo waits for its result"
        buffer = output.new_empty(rows, *output.shape[1:])
        reduce_scatter(buffer, [padded(t, rows) for t in input_list], op, group)
        output.copy_(buffer[:output.size(0)])

    torch.distributed.all_gather, torch.distributed.reduce_scatter = gather, scatter
