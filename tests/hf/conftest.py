"""Tiny random transformers models with odd shapes, saved once per session, and the run that would train each.

Every parameter is random, norms and biases too, so that a tensor put in the wrong place cannot pass for the right one.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MODELS

from engine.config import RunConfig
from engine.hf import FAMILIES
from engine.hf.convert import run_of
from engine.hf.load import Tensors, open_hf


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
                for key, buffer in network.named_buffers():
                    if key.endswith("e_score_correction_bias"):  # DeepSeek-V3's router learns it without gradients
                        buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
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
