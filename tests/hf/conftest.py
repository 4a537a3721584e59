"""Tiny random transformers models with odd shapes, saved once per session, and the run that would train each.

Every parameter is random, norms and biases too, so that a tensor put in the wrong place cannot pass for the right one.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import RunConfig
from engine.hf import FAMILIES
from engine.hf.convert import run_of
from engine.hf.load import Tensors, open_hf

LLAMA = dict(vocab_size=131, hidden_size=48, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, head_dim=10, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
MIXTRAL = dict(vocab_size=77, hidden_size=40, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=6, max_position_embeddings=64, num_local_experts=5, num_experts_per_tok=2,
               bos_token_id=None, eos_token_id=None)
GPT2 = dict(vocab_size=101, n_positions=40, n_embd=36, n_layer=2, n_head=3, n_inner=50, bos_token_id=None, eos_token_id=None)
# An original length of 16 brings the wavelengths of a small head on both sides of both bounds.
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=4.0, low_freq_factor=1.5, high_freq_factor=3.0,
              original_max_position_embeddings=16)

MODELS = {
    "llama": ("Llama", LLAMA | dict(rope_parameters=LLAMA3)),
    "llama_tied": ("Llama", LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=6, head_dim=8, rms_norm_eps=1e-3,
                                         rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4))),
    "llama_bias": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "llama_geglu": ("Llama", LLAMA | dict(hidden_act="gelu_pytorch_tanh", intermediate_size=96)),
    "llama_attention_bias": ("Llama", LLAMA | dict(attention_bias=True)),
    "mixtral": ("Mixtral", MIXTRAL | dict(sliding_window=7)),
    "mixtral_tied": ("Mixtral", MIXTRAL | dict(tie_word_embeddings=True, num_experts_per_tok=3)),
    "gpt2": ("GPT2", GPT2),
    "gpt2_untied": ("GPT2", GPT2 | dict(tie_word_embeddings=False, n_inner=None, activation_function="relu")),
}


@dataclasses.dataclass
class Tiny:
    """One saved model and what open_hf makes of it."""

    folder: Path
    network: Any
    hf: dict
    tensors: Tensors
    run: RunConfig

    @property
    def family(self):
        return FAMILIES[self.run.model.family]

    def engine_tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.family.from_hf(self.run.model, self.tensors))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(name) -> the Tiny of MODELS[name]; tiny(name, dtype=torch.bfloat16) in another dtype."""
    import transformers

    made = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
        if (name, dtype) not in made:
            kind, sizes = MODELS[name]
            config = getattr(transformers, f"{kind}Config")(**sizes)
            network = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
            folder = tmp_path_factory.mktemp(name)
            network.save_pretrained(folder)
            hf, tensors = open_hf(folder)
            made[name, dtype] = Tiny(folder, network, hf, tensors, run_of(hf, tensors, folder, folder / "run"))
        return made[name, dtype]

    return make


@pytest.fixture(params=MODELS)
def model(request, tiny) -> Tiny:
    """Each of MODELS in turn."""
    return tiny(request.param)
