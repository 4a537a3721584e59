"""FP8 parameters (train.fp8.params): Transformer Engine keeps bytes and scales where other modules keep a matrix.

    with plain_parameters(chunk): ...     # fill the chunk's parameters; they are quantized at the end

A slice of an FP8 parameter is a copy, so writing into slices, as init_weights does, needs a plain stand-in.
Left out: what megatron does itself, such as master weights, gathering and checkpoints in higher precision.
"""

import contextlib

import torch
from megatron.core.fp8_utils import is_float8tensor


@contextlib.contextmanager
def plain_parameters(chunk):
    """FP8 parameters of `chunk` stand aside for plain ones of the same shape, dtype and device, uninitialised."""
    quantized = [(module, name, parameter) for module in chunk.modules() for name, parameter in module._parameters.items()
                 if is_float8tensor(parameter)]
    for module, name, parameter in quantized:
        module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device))
    yield
    for module, name, parameter in quantized:
        values = module._parameters[name].detach()
        module._parameters[name] = parameter
        parameter.copy_(values)
        if hasattr(parameter, "get_high_precision_init_val"):
            parameter.get_high_precision_init_val().copy_(values)  # megatron makes the fp32 master weight from it
