"""The sections of a configuration that describe a network: its sizes, its attention, its experts.

engine/config.py puts them into RunConfig, after the defaults of a family (engine/models). As there: one field, one sentence, no torch.
"""

from typing import Annotated, Literal

from pydantic import Field

from engine.section import Section
from engine.stage_sections import RopeScaling


class Moe(Section):
    num_experts: int = Field(0, ge=0)
    """0 makes the model dense."""
    top_k: int = Field(2, ge=1)
    """Experts per token."""
    ffn_hidden_size: int = Field(0, ge=0)
    """Width of one expert; 0 takes model.ffn_hidden_size."""
    shared_expert_ffn_hidden_size: int = Field(0, ge=0)
    """Width of the shared experts together; 0 means none."""
    layer_freq: int = Field(1, ge=1)
    """Every n-th layer is MoE; the others are dense."""
    first_dense_layers: int = Field(0, ge=0)
    """This many layers at the bottom stay dense, as in DeepSeek-V2 and V3."""
    dense_layers: list[Annotated[int, Field(ge=0)]] = []
    """Further layers that stay dense, by number from 0 (Qwen3-MoE's mlp_only_layers)."""
    balance: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "aux_free", "none"] = "aux_loss"
    """How experts are kept busy: a loss per micro-batch, per sequence or over the global batch; Sinkhorn; DeepSeek's bias; nothing."""
    aux_loss_coeff: float = Field(0.01, ge=0)
    """Weight of the balancing loss."""
    z_loss_coeff: float = Field(0.0, ge=0)
    """Weight of the router z-loss (ST-MoE, arXiv 2202.08906)."""
    bias_update_rate: float = Field(1e-3, ge=0)
    """Speed of the aux-free expert bias (arXiv 2408.15664)."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Router score function."""
    num_groups: int = Field(0, ge=0)
    """Equal groups of experts, of which a token may use group_top_k; 0 does not group (DeepSeek-V2, arXiv 2405.04434, sec. 2.2.2)."""
    group_top_k: int = Field(0, ge=0)
    """Groups a token may use: those with the highest scores."""
    group_score_top: int = Field(1, ge=1)
    """A group's score is the sum over this many of its best experts: 1 in DeepSeek-V2, 2 in V3 (arXiv 2412.19437, sec. 2.1.2)."""
    softmax_after_top_k: bool = True
    """True (Mixtral, Qwen3-MoE renormalised): the weights of the chosen k sum to 1."""
    scaling_factor: float = Field(0.0, ge=0)
    """Multiplies the routed weights (DeepSeek); 0 means 1."""
    capacity_factor: float = Field(0.0, ge=0)
    """Tokens an expert takes, as a multiple of the even share; 0 drops nothing."""
    pad_to_capacity: bool = False
    """Pad every expert's input to its capacity (fixed shapes)."""
    grouped_gemm: bool = True
    """One grouped matrix product over the local experts where the backend has it."""
    permute_fusion: bool = True
    """Tokens put in the order of experts, and back, by fused kernels where the backend has them."""


class Mla(Section):
    kv_lora_rank: int = Field(0, ge=0)
    """Width of the latent that keys and values are made from; 0 means ordinary attention."""
    q_lora_rank: int = Field(0, ge=0)
    """Width of the latent that queries are made from; 0 makes them from the hidden state."""
    qk_nope_head_dim: int = Field(128, ge=0)
    """Dims of a query and key that carry no position."""
    qk_rope_head_dim: int = Field(64, ge=2)
    """Dims that RoPE turns; the key's are shared by all heads."""
    v_head_dim: int = Field(128, ge=1)
    """Dims of a value."""


class Mtp(Section):
    num_layers: int = Field(0, ge=0)
    """Layers behind the last one, each of which predicts one token further on, of the last layer's kind; 0 means none."""
    loss_weight: float = Field(0.3, ge=0)
    """Weight of their loss (DeepSeek-V3: 0.3, later 0.1); 0 keeps these layers as they are: not computed, not changed, saved."""

    @property
    def num_learning(self) -> int:
        """Those that are computed and learn; without a weight there are none."""
        return self.num_layers if self.loss_weight else 0


class Model(Section):
    family: str
    """A file of engine/models."""
    size: str = "custom"
    """A size of that family, or custom."""
    num_layers: int = Field(ge=1)
    """Transformer layers."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    ffn_hidden_size: int = Field(ge=1)
    """Width of the MLP."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_query_groups: int = Field(0, ge=0)
    """Key/value heads; 0 means as many as query heads."""
    head_dim: int = Field(0, ge=0)
    """Width of one head; 0 means hidden_size / num_attention_heads."""
    vocab_size: int = Field(ge=2)
    """Token ids the model knows."""
    vocab_pad_multiple: int = Field(128, ge=1)
    """The embedding is padded to a multiple of this; padding never enters a softmax."""
    max_position: int = Field(0, ge=0)
    """Longest sequence (learned positions, export); 0 means train.seq_len."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the normalisation."""
    norm_zero_centered: bool = False
    """Norms multiply by 1 + their weight (Gemma)."""
    activation: Literal["swiglu", "geglu", "clamped_swiglu", "gelu", "relu", "squared_relu", "silu"] = "swiglu"
    """MLP activation; swiglu, geglu and gpt-oss's clamped_swiglu are gated. gelu is the tanh form."""
    swiglu_alpha: float = Field(1.702, gt=0)
    """clamped_swiglu: steepness of the gate's sigmoid."""
    swiglu_limit: float = Field(7.0, gt=0)
    """clamped_swiglu: largest value of the gate, and of the other factor either way."""
    position: Literal["rope", "learned", "none"] = "rope"
    """Position embedding."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base period of RoPE."""
    rope_local_theta: float = Field(0.0, ge=0)
    """Base period in layers that see the sliding window alone, which then have no scaling; 0 takes that of the others (Gemma 3)."""
    rope_percent: float = Field(1.0, gt=0, le=1)
    """Share of a head that RoPE rotates."""
    rope_scaling: RopeScaling = RopeScaling()
    """Stretching of RoPE."""
    head: Literal["tokens", "scalar"] = "tokens"
    """tokens: probabilities of the next token; scalar: one number per token (reward and value models; set by the stage)."""
    scale_embeddings: bool = False
    """Embeddings times sqrt(hidden_size) (Gemma)."""
    logits_softcap: float = Field(0.0, ge=0)
    """Logits become cap * tanh(logits / cap); 0 leaves them (Gemma 2, arXiv 2408.00118)."""
    tie_embeddings: bool = False
    """One matrix for input and output embedding."""
    qkv_bias: bool = False
    """Bias on the query, key and value projection."""
    linear_bias: bool = False
    """Bias on every linear layer."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    qk_norm_width: Literal["head", "all"] = "head"
    """What one of these norms spans: each head (Qwen3), or all of them together (OLMo-2)."""
    norm_place: Literal["pre", "post", "both"] = "pre"
    """What is normalised: the input of attention and MLP, their output before the residual is added (OLMo-2), or both."""
    query_pre_attn_scalar: float = Field(0.0, ge=0)
    """Attention logits are divided by the square root of this; 0 takes the size of a head."""
    attention_softcap: float = Field(0.0, ge=0)
    """The same as logits_softcap for attention logits."""
    attention_sinks: bool = False
    """Each head has a learned logit that takes part in its softmax and has no value (gpt-oss)."""
    sliding_window: int = Field(0, ge=0)
    """A token sees this many tokens, itself included; 0 means all before it."""
    sliding_window_freq: int = Field(1, ge=1)
    """n: every n-th layer sees everything, the others the window; 1 means the window in all layers."""
    full_attention_layers: int = Field(0, ge=0)
    """This many layers at the bottom see everything too (Qwen2's max_window_layers)."""
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after attention, MLP and embedding."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on attention weights."""
    init_std: float = Field(0.02, gt=0)
    """Std of initial weights; output projections get init_std / sqrt(2 * num_layers)."""
    mla: Mla = Mla()
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, sec. 2.1)."""
    moe: Moe = Moe()
    """Mixture of experts."""
    mtp: Mtp = Mtp()
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, sec. 2.2)."""

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def is_latent(self) -> bool:
        """Multi-head latent attention?"""
        return self.mla.kv_lora_rank > 0

    @property
    def head_size(self) -> int:
        """Dims of a query and of a key."""
        if self.is_latent:
            return self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def value_size(self) -> int:
        """Dims of a value."""
        return self.mla.v_head_dim if self.is_latent else self.head_size

    @property
    def rope_dims(self) -> int:
        """Dims of a head that RoPE turns."""
        return self.mla.qk_rope_head_dim if self.is_latent else int(self.head_size * self.rope_percent)

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_pad_multiple) * self.vocab_pad_multiple

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu", "clamped_swiglu")

    @property
    def moe_ffn_hidden_size(self) -> int:
        return self.moe.ffn_hidden_size or self.ffn_hidden_size

    @property
    def moe_layers(self) -> list[bool]:
        """One flag per layer: is it a mixture of experts?"""
        moe = self.moe
        return [moe.num_experts > 0 and i >= moe.first_dense_layers and i % moe.layer_freq == 0 and i not in moe.dense_layers
                for i in range(self.num_layers)]

    @property
    def window_layers(self) -> list[bool]:
        """One flag per layer: does it see the sliding window alone?"""
        freq = self.sliding_window_freq
        return [self.sliding_window > 0 and i >= self.full_attention_layers and (freq == 1 or (i + 1) % freq != 0)
                for i in range(self.num_layers)]
