"""Gates of MLPs, which keep their input for the backward pass and nothing else.

    layer = placed(layer, model)    # a layer's specification, with this model's gate in its MLP or its experts
    SwiGLU(config)(x)               # x = [gate, up], [..., 2 f] -> [..., f]

megatron builds them as an MLP's activation module where its configuration says `use_te_activation_func`. Written out, as megatron has them
otherwise, a gate keeps up to three tensors more. Under torch.compile the plain formula is used, which the compiler fuses itself.
Left out: weights of experts, which megatron multiplies with afterwards, but in its own fused SwiGLU for Transformer Engine's experts.
"""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.jit import jit_fuser  # torch.compile on a GPU, nothing on a CPU
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec


class _Gate(MegatronModule):
    """act(gate) * up. act_backward(grad, gate, grad_input=) writes the gradient of act."""

    def forward(self, x):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _InputKept.apply(x, self)
        return self.value(x)

    def value(self, x):
        gate, up = x.chunk(2, dim=-1)
        return self.act(gate).mul_(up)

    def gradient(self, grad, x):
        grad_x = torch.empty_like(x)
        (gate, up), (of_gate, of_up) = x.chunk(2, dim=-1), grad_x.chunk(2, dim=-1)
        torch.mul(self.act(gate), grad, out=of_up)
        self.act_backward(grad * up, gate, grad_input=of_gate)
        return grad_x


class SwiGLU(_Gate):
    """silu(gate) * up (arXiv 2002.05202)."""

    act = staticmethod(F.silu)
    act_backward = staticmethod(torch.ops.aten.silu_backward.grad_input)


class GeGLU(_Gate):
    """gelu(gate) * up, with the tanh form of gelu (arXiv 2002.05202; Gemma)."""

    act = functools.partial(F.gelu, approximate="tanh")
    act_backward = functools.partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh")


class ClampedSwiGLU(_Gate):
    """g sigmoid(alpha g) * (u + 1) with g = min(gate, limit), u = clamp(up, -limit, limit) (gpt-oss, arXiv 2508.10925)."""

    def __init__(self, config, alpha: float, limit: float):
        super().__init__(config)
        self.alpha, self.limit = alpha, limit

    def value(self, x):
        return _clamped(x, self.alpha, self.limit)

    def gradient(self, grad, x):
        return _clamped_gradient(grad, x, self.alpha, self.limit)


class _InputKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate):
        ctx.save_for_backward(x)
        ctx.gate = gate
        return gate.value(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.gate.gradient(grad, *ctx.saved_tensors), None


@jit_fuser
def _clamped(x, alpha: float, limit: float):
    gate, up = x.chunk(2, dim=-1)
    g = gate.clamp(max=limit)
    return g.mul_((alpha * g).sigmoid_()).mul_(up.clamp(-limit, limit).add_(1))


@jit_fuser
def _clamped_gradient(grad, x, alpha: float, limit: float):
    gate, up = x.chunk(2, dim=-1)
    g = gate.clamp(max=limit)
    steep = (alpha * g).sigmoid_()
    swish = g.mul_(steep)
    of_gate = (1 - steep).mul_(swish).mul_(alpha).add_(steep)      # d swish / d g
    of_gate.mul_(up.clamp(-limit, limit).add_(1)).mul_(grad).masked_fill_(gate > limit, 0)
    return torch.cat([of_gate, swish.mul_(grad).masked_fill_(up.abs() > limit, 0)], -1)


def placed(layer: ModuleSpec, model) -> ModuleSpec:
    """`layer` with the gate of this model in every MLP of it, as it is where the model has no gate."""
    gates = {"swiglu": ModuleSpec(module=SwiGLU), "geglu": ModuleSpec(module=GeGLU),
             "clamped_swiglu": ModuleSpec(module=ClampedSwiGLU, params={"alpha": model.swiglu_alpha, "limit": model.swiglu_limit})}
    gate = gates.get(model.activation)
    if gate is None:
        return layer
    mlp = layer.submodules.mlp
    if hasattr(mlp.submodules, "experts"):
        parts = {name: _with(getattr(mlp.submodules, name), activation_func=gate) for name in ("experts", "shared_experts")}
    else:
        parts = {"activation_func": gate}
    return _with(layer, mlp=_with(mlp, **parts))


def _with(spec: ModuleSpec, **parts) -> ModuleSpec:
    return replace(spec, submodules=replace(spec.submodules, **parts))
