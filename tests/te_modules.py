"""Transformer Engine's own modules on a machine without a GPU, where they can be built and saved, though not run.

    python tests/te_modules.py        # in an environment with Transformer Engine and a CUDA build of torch (docs/gpu.md); prints a JSON object

te_stub.py's networks are built of them, written as a checkpoint, and read by the torch layers, whose weights must then be those that the same
seed gives them. With FP8 said to be on, as a layer believes after its first step, the states of all recipes are written and read too.
Left out: every kernel.
"""

import json
import pickle
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformer_engine.pytorch as te  # noqa: E402

import parity_table  # noqa: E402
import te_stub  # noqa: E402
from engine.mcore import build, checkpoint, run, safe_load, topology  # noqa: E402, F401


def pretend() -> None:
    """From a network's topology on there is a GPU, as far as modules ask for one when they are built, saved and loaded."""
    start, real = topology.start, sys.modules["transformer_engine"]

    def without(config):
        sys.modules["transformer_engine"], torch.cuda.is_available = None, lambda: False
        try:
            return start(config)
        finally:
            sys.modules["transformer_engine"], torch.cuda.is_available = real, lambda: True

    topology.start = without
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="H100")
    build.te_problem = safe_load.te_problem = ""
    build.backend_of = lambda config, device: config.train.backend


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for chunk in model.chunks for name, parameter in chunk.named_parameters()}


def read_by_torch(name: str, sections: dict, prepare=lambda network: None) -> bool:
    """Does a checkpoint of te's modules hold, for the torch layers, the weights that the same seed gives them?"""
    written = te_stub.network(name, "te", **sections)
    prepare(written)
    reader = te_stub.network(name, "torch", **sections, run={"seed": 99, "device": "auto"})
    expected, before = weights(te_stub.network(name, "torch", **sections)), weights(reader)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.load(reader, checkpoint.save(written, folder, checkpoint.Position()))
    found = weights(reader)
    return all(found[key].equal(expected[key]) for key in expected) and any(not before[key].equal(expected[key]) for key in expected)


def believing(recipe):
    """Makes every module of te's think that it has run in FP8 by this recipe."""
    def prepare(network) -> None:
        for chunk in network.chunks:
            for module in chunk.modules():
                if isinstance(module, te.module.base.TransformerEngineBaseModule):
                    module.fp8_meta |= {"fp8_checkpoint": True, "recipe": recipe, "num_gemms": getattr(module, "num_gemms", 1)}
                    module.fp8 = True
    return prepare


def delayed_state(config) -> bool:
    """Is megatron's own recipe there again when safe_load.py has read a state that holds it?"""
    from megatron.core.extensions.transformer_engine import TEDelayedScaling
    from transformer_engine.common.recipe import Format

    recipe = TEDelayedScaling(config, Format.HYBRID)
    written = torch.frombuffer(bytearray(pickle.dumps({"recipe": recipe, "scale_fwd": torch.ones(3)})), dtype=torch.uint8)
    return pickle.loads(safe_load.clean_fp8_state(written).numpy().tobytes())["recipe"] == recipe


def main() -> None:
    from transformer_engine.common import recipe

    pretend()
    cases = {name: (name, {}) for name in parity_table.MODELS} | te_stub.VARIED
    found = {"read by torch": {label: read_by_torch(name, sections) for label, (name, sections) in cases.items() if name != "gemma" or sections}}
    recipes = {"tensorwise": recipe.Float8CurrentScaling(), "blockwise": recipe.Float8BlockScaling(), "mxfp8": recipe.MXFP8BlockScaling()}
    found["read by torch, of FP8"] = {f"{name} {label}": read_by_torch(name, {}, believing(made))
                                      for label, made in recipes.items() for name in ("dense", "moe-mixed", "latent-moe")}
    found["delayed state"] = delayed_state(te_stub.network("dense", "te").chunks[0].config)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
