"""The sections of a configuration that belong to stages, or to what stages share: tuning, adapters, averages, conversations, losses.

engine/config.py puts them into RunConfig; docs/stages.md says which stage reads which. As there: one field, one sentence, no torch.
"""

from typing import Literal

from pydantic import Field

from engine.section import Section


class RopeScaling(Section):
    kind: Literal["none", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3"] = "none"
    """How RoPE frequencies are stretched (facts and formulas in engine/rope.py)."""
    factor: float = Field(8.0, ge=1)
    """Ratio of the new to the original length."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: wavelengths above original/low are divided by factor."""
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: wavelengths below original/high are kept."""
    original_max_position: int = Field(8192, ge=1)
    """Length the model was first trained at (all kinds but linear and ntk)."""
    beta_fast: float = Field(32.0, gt=0)
    """yarn: dims that turn more often than this over the original length are kept."""
    beta_slow: float = Field(1.0, gt=0)
    """yarn: dims that turn less often than this are divided by factor."""
    truncate: bool = True
    """yarn: round the borders of the ramp to whole dims (gpt-oss does not)."""
    mscale: float = Field(0.0, ge=0)
    """yarn: with mscale_all_dim, the ratio of both scales cos and sin (DeepSeek); 0 means unset."""
    mscale_all_dim: float = Field(0.0, ge=0)
    """yarn: see mscale."""
    attention_factor: float = Field(0.0, ge=0)
    """yarn, longrope: scale of cos and sin; 0 computes it."""
    short_factor: list[float] = []
    """longrope: one divisor per pair of dims, for sequences up to original_max_position."""
    long_factor: list[float] = []
    """longrope: the same for longer sequences."""


class Tune(Section):
    freeze: list[str] = []
    """Parts that never change: embedding, output, norms, layers (all), layers:0-3, layers:7, router, experts."""
    unfreeze_every: int = Field(0, ge=0)
    """Gradual unfreezing (ULMFiT, arXiv 1801.06146): start with the top layer alone and free one more below it every n steps; 0 is off."""
    layer_lr_decay: float = Field(1.0, gt=0, le=1)
    """Layer-wise learning rates: each layer learns at this share of the rate of the layer above it."""
    l2_to_init: float = Field(0.0, ge=0)
    """L2-SP (arXiv 1802.01483): adds half of this times the squared distance from the initial weights to the loss."""
    neftune_alpha: float = Field(0.0, ge=0)
    """NEFTune (arXiv 2310.05914): uniform noise of alpha / sqrt(length * hidden) on embeddings while training; 0 is off."""


class Lora(Section):
    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains the model itself."""
    alpha: float = Field(16.0, gt=0)
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    """Linear layers by their Hugging Face names."""
    dora: bool = False
    """DoRA (arXiv 2402.09353): learn the magnitude of each output row apart from its direction."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""


class Average(Section):
    kind: Literal["none", "uniform", "ema"] = "none"
    """Mean of the weights along the way: all visited ones alike, or exponentially decaying."""
    every: int = Field(1, ge=1)
    """Take the weights every n steps."""
    start: float = Field(0.0, ge=0, lt=1)
    """Begin after this share of the run's steps."""
    decay: float = Field(0.99, gt=0, lt=1)
    """ema: what is kept of the average at each taking."""


class Anneal(Section):
    shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """How the rate falls to schedule.min_lr over train.steps."""
    start_lr: float = Field(0.0, ge=0)
    """Where it falls from; 0 takes the rate at which the loaded checkpoint stopped."""


class Rung(Section):
    seq_len: int = Field(ge=2)
    """Tokens per sample on this rung."""
    tokens: int = Field(ge=1)
    """Tokens to train on, in whole steps."""
    global_batch: int = Field(ge=1)
    """Samples per optimizer step."""
    micro_batch: int = Field(1, ge=1)
    """Samples per rank and forward pass."""
    lr: float = Field(0.0, ge=0)
    """Peak learning rate; 0 takes optim.lr."""
    rope_theta: float = Field(0.0, ge=0)
    """Base period of RoPE from this rung on; 0 keeps it."""
    rope_scaling: RopeScaling | None = None
    """Stretching of RoPE from this rung on; left out, it stays."""
    train: list[str] = []
    """Corpora of this rung; empty takes data.train."""


class LongContext(Section):
    ladder: list[Rung] = []
    """The rungs, shortest first; each starts from the one before when its gates have passed."""
    short_seq_len: int = Field(0, ge=0)
    """Length at which the short-context loss is measured; 0 takes the loaded checkpoint's train.seq_len."""
    short_tolerance: float = Field(0.02, ge=0)
    """Gate: the short-context validation loss may exceed the loaded model's by this share."""
    needle_threshold: float = Field(0.0, ge=0, le=1)
    """Gate: share of needles to be retrieved at the rung's length; 0 measures without a threshold."""
    needle_samples: int = Field(50, ge=0)
    """Haystacks per rung, with needles at depths spread over the length; 0 skips them."""
    needle_depths: int = Field(10, ge=1)
    """Depths to which needles are spread."""
    needle_tokens: int = Field(4, ge=1)
    """Tokens of the secret to be retrieved where there is no tokenizer; with one the secret is a number of five digits."""
    on_failure: Literal["stop", "warn"] = "stop"
    """What a failed gate does."""


class Chat(Section):
    template: str = ""
    """Jinja chat template: empty takes the tokenizer's own; chatml, llama3, mistral, tags; or a .jinja file."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns count in the loss."""
    too_long: Literal["drop", "truncate_left", "truncate_right", "refuse"] = "drop"
    """What becomes of what exceeds train.seq_len; every case is counted and reported."""
    pack: bool = True
    """sft: put several conversations into one row (best fit), each seeing only itself."""
    add_tokens: list[str] = []
    """Special tokens to add to the tokenizer; the embedding grows where needed."""
    exact_match: bool = False
    """sft: at validation, also the share of conversations in which greedy decoding says every trained turn exactly."""
    template_seconds: float = Field(20.0, gt=0)
    """Processor seconds a template may take for one chunk of conversations before it is stopped."""
    template_mib: int = Field(2048, ge=64)
    """Memory a template may take before it is stopped."""
    workers: int = Field(0, ge=0)
    """Processes that render and tokenize; 0 takes one per core, 8 at most."""


class Reward(Section):
    margin: bool = False
    """Subtract each pair's `margin` inside the sigmoid (Llama 2, arXiv 2307.09288)."""
    center: float = Field(0.0, ge=0)
    """Adds this times (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv 2312.09244)."""


class Dpo(Section):
    loss: Literal["dpo", "cdpo", "robust", "ipo_mean", "ipo_sum", "hinge", "kto", "simpo", "orpo", "rpo_nll", "rpo_squared",
                  "rpo_forward_kl", "rpo_backward_kl"] = "dpo"
    """Preference loss; engine/losses.py has each formula and its paper."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference (simpo, orpo: see their formulas)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """cdpo, robust: the share of labels taken to be flipped."""
    nll_weight: float = Field(0.0, ge=0)
    """Adds this times the mean -log p of the chosen tokens, to any loss (rpo_nll needs it; Llama 3 takes 0.2)."""
    gamma: float = Field(0.5, ge=0)
    """simpo: target margin of the length-averaged log-probabilities, times beta already."""
    eta: float = Field(1.0, gt=0)
    """rpo_squared, rpo_*_kl: scale of the annotated reward difference."""
    desirable_weight: float = Field(1.0, gt=0)
    """kto: weight of good answers."""
    undesirable_weight: float = Field(1.0, gt=0)
    """kto: weight of bad answers."""
    reference: Literal["role", "stored"] = "role"
    """role: a frozen copy of the loaded model; stored: its log-probabilities, computed once and kept in the data cache."""
