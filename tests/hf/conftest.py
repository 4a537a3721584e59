"""Tiny random transformers models with odd shapes, saved once per session, and the run that would train each."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MODELS, random_network

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
    made = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
        if (name, dtype) not in made:
            network = random_network(name, dtype)
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
