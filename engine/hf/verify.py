"""Do two implementations of one model agree? Prompts, transformers' logits for them, and the verdict.

    tokens = prompts(model)                                   # [4, s]
    agreement(engine_logits, transformers_logits(folder, tokens), tolerance=1e-4)

Everything in fp32 on the CPU, so that a wrong name map (differences of order 1) stands far above rounding (order 1e-6).
Left out: the engine's logits, which come from engine/mcore, and any judgement of the model itself.
"""

from pathlib import Path

import torch
from torch import Tensor

from engine.config import Model
from engine.hf.fields import HFError, head_of
from engine.hf.load import read_json

TOLERANCE = 1e-4


def prompts(model: Model, num_prompts: int = 4, num_tokens: int = 48) -> Tensor:
    """Random token ids [num_prompts, s] over the whole vocabulary, the same on every call; s stays within model.max_position."""
    length = min(num_tokens, model.max_position or num_tokens)
    return torch.randint(model.vocab_size, (num_prompts, length), generator=torch.Generator().manual_seed(0))


def transformers_logits(folder: str | Path, tokens: Tensor, without: tuple[str, ...] = ()) -> Tensor:
    """Logits [b, s, vocab] in fp32 of the model in `folder`, by transformers; of a classifier its number at each token, [b, s, 1].

    without: beginnings of names that the folder may hold although transformers does not load them.
    No code from the folder is run. Raises HFError when transformers finds a tensor missing, unexpected or of another shape.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    except ImportError as error:
        raise HFError(f"comparing logits needs transformers ({error}); install it: pip install transformers") from None
    is_classifier = head_of(read_json(Path(folder) / "config.json")) == "scalar"
    loader = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True)
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not (without and name.startswith(without))]
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise HFError(f"transformers does not load {folder} cleanly: {wrong}")
    with torch.no_grad():
        return (model.eval().score(model.base_model(tokens).last_hidden_state) if is_classifier else model.eval()(tokens).logits).float()


def agreement(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE, who: str = "engine and transformers") -> str:
    """A sentence for the model card; HFError when the largest difference exceeds tolerance * the largest logit.

    ours, theirs: fp32 logits [b, s, vocab]; who they are.
    """
    if ours.shape != theirs.shape:
        raise HFError(f"the engine gives logits of shape {list(ours.shape)}, transformers {list(theirs.shape)}")
    scale, worst = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    sentence = (f"logits of {who} differ by at most {worst:.2e} over {ours.shape[0]} prompts of {ours.shape[1]} "
                f"tokens (largest logit {scale:.3g}, tolerance {tolerance:g} of it)")
    if not worst <= tolerance * scale:  # so that NaN fails too
        raise HFError(sentence)
    return sentence
