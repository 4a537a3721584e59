"""What one micro-batch keeps from its forward for its backward pass, in bytes of one rank: what autograd saves, each storage once.

    saved = Saved(run, "torch")                       # or "te": Transformer Engine's layers
    saved.layer(is_moe=False, is_windowed=False)      # one layer, as train.recompute says
    saved.chunk(chunk), saved.logits                  # a model chunk without its logits; the logits

The torch backend's formulas follow engine/mcore/spec_torch.py, ops_torch.py and megatron's layers tensor by tensor; tests/planner compares them
with what autograd saves on CPU ranks. Those of te follow Transformer Engine's sources (norm and matrix product fused, flash attention, one fused
gate) and have not been compared with anything yet. In the letters of Korthikanti et al. (arXiv 2205.05198, sec. 4) with s b h = tokens * hidden.
Experts are taken to be evenly busy; masks of documents (data.reset_at_eod) are counted for the torch backend.
"""

from functools import cached_property

from engine import loss_memory
from engine.planner.weights import Chunk, count_kinds
from engine.stages import TEXT


class Saved:
    """Bytes for one micro-batch on one rank of this run. device: torch's attention chooses other kernels on a CPU than on a GPU."""

    def __init__(self, run, backend: str, device: str = "cuda"):
        model, p, train = run.model, run.parallel, run.train
        self.run, self.model, self.backend, self.device, self._layers = run, model, backend, device, {}
        self.bytes = 4 if train.precision == "fp32" else 2
        self.input_bytes = 1 if train.fp8.recipe != "none" and backend == "te" else self.bytes      # of what a matrix product keeps
        self.seq, self.batch, self.tp, self.cp = train.seq_len, train.micro_batch, p.tp, p.cp
        self.tokens = self.seq // p.cp * self.batch                                    # in attention and MLP
        self.stream = self.tokens // (p.tp if p.sequence_parallel else 1)              # in the residual stream and the norms
        self.keys = self.seq * self.batch if backend == "torch" else self.tokens       # torch gathers them over cp; te's ring does not
        self.heads = model.num_attention_heads // p.tp
        self.q, self.kv = self.heads * model.head_size, model.kv_heads * model.head_size // p.tp
        self.v = self.heads * model.value_size if model.is_latent else self.kv
        self.out = self.heads * model.value_size
        self.knows_proportions = run.stage in (*TEXT, "sft")      # the stages that say Stage.proportions

    # --- a model chunk ------------------------------------------------------------------------------------------------

    def chunk(self, chunk: Chunk) -> int:
        """All layers of a chunk and its ends, without the logits."""
        model = self.model
        total = sum(num * self.layer(*kind) for kind, num in count_kinds(model, (chunk,)).items())
        if chunk.is_first:
            total += 8 * self.tokens * (2 if model.position == "learned" else 1) + self._dropped(self.stream * model.hidden_size)
        if chunk.is_last:
            total += self._normed_residual() + self._output(self.knows_proportions) + self._further()
        if chunk.layers and self.run.train.recompute == "full" and model.position == "rope":
            total += 4 * self.seq * model.rope_dims      # the angles, handed to every layer
        return total

    @property
    def logits(self) -> int:
        """Kept by the last chunk from forward to backward: the logits in the model's precision, those of further tokens too, or what
        linear_ce.py makes instead in the forward pass, the gradient of the output matrix in fp32 (for both alike once more)."""
        model = self.model
        if model.head != "tokens":
            return 0
        ids, kept = model.padded_vocab_size // self.tp, 0
        for rows, knows in self.losses:
            kept += 4 * ids * model.hidden_size if self.is_early(rows, knows) else rows * ids * self.bytes
        return kept

    @property
    def losses(self) -> list[tuple[int, bool]]:
        """(rows, is known beforehand what their gradient is proportional to) of each product with the output matrix: next tokens, further ones."""
        num = self.model.mtp.num_learning
        return [(self.tokens, self.knows_proportions), *([(self.tokens * num, True)] if num else [])]

    def is_early(self, rows: int, knows_proportions: bool) -> bool:
        """Are the gradients of the loss of so many rows made in the forward pass?"""
        model = self.model
        return knows_proportions and loss_memory.is_early(rows, model.hidden_size, model.padded_vocab_size // self.tp, self.bytes, self.device)

    def layer(self, is_moe: bool, is_windowed: bool = False) -> int:
        """One layer: everything, all but the core attention, or its input alone, as train.recompute says."""
        kind = is_moe, is_windowed
        if kind not in self._layers:
            is_whole = self.run.train.recompute != "full"
            self._layers[kind] = self.whole_layer(*kind) if is_whole else self.stream * self.model.hidden_size * self.bytes
        return self._layers[kind]

    def whole_layer(self, is_moe: bool, is_windowed: bool = False) -> int:
        return self._attention(is_windowed) + (self._moe() if is_moe else self._mlp(self.model.ffn_hidden_size))

    def _output(self, knows_proportions: bool) -> int:
        """What the output layer multiplies, gathered under sequence parallel; labels int64, a flag, log-sum-exp and proportions fp32."""
        return self.tokens * (self.model.hidden_size * self.bytes + (13 + 4 * knows_proportions) * (self.model.head == "tokens"))

    def _further(self) -> int:
        """Modules for further tokens, but for their transformer layers."""
        model, num = self.model, self.model.mtp.num_learning
        h, is_split = model.hidden_size, self.tokens > self.stream
        if not num:
            return 0
        one = 8 * self.tokens + self._dropped(self.stream * h) + self._output(True)      # of the embedding and of the output layer
        if self.run.train.recompute != "full":
            # Norms of the embedding and of the hidden states, whose outputs are joined; the layer, which begins with a part of a whole sequence; a norm.
            one += self._normed_residual() + self._statistics(self.stream, h) + 2 * self.stream * h * self.input_bytes
            one += (self.tokens - self.stream) * h * self.bytes + self._normed_residual()
        # Hidden states that a module reads: without sequence parallel the first one's are those that the output layer keeps.
        return num * one + (num - 1 + is_split) * self.stream * h * self.bytes

    # --- parts of a layer ---------------------------------------------------------------------------------------------

    def _statistics(self, tokens: int, width: int) -> int:
        """Of a norm: 1 / rms, or mean and 1 / std, in fp32; norms around zero of the torch layers keep 1 + weight too."""
        return 4 * tokens * (1 if self.model.norm == "rmsnorm" else 2) + 4 * width * (self.model.norm_zero_centered and self.backend == "torch")

    def _dropped(self, numel: int) -> int:
        """The mask of a dropout: one byte on a GPU, on a CPU a number of the model's precision."""
        return numel * (self.bytes if self.device == "cpu" else 1) if self.model.hidden_dropout else 0

    def _normed_residual(self) -> int:
        """The input of a norm that is there in every model, and what it keeps."""
        return self.stream * self.model.hidden_size * self.bytes + self._statistics(self.stream, self.model.hidden_size)

    def _residual_and_norm(self) -> int:
        """The residual stream (input of the norm, or of the product where there is no norm in front) and what the norm keeps."""
        h, has_norm = self.model.hidden_size, self.model.norm_place in ("pre", "both")
        return self.stream * h * self.bytes + (self._statistics(self.stream, h) if has_norm else 0)

    def _normed_input(self) -> int:
        """A norm's output, kept as input of the product behind it."""
        return self.stream * self.model.hidden_size * self.input_bytes if self.model.norm_place in ("pre", "both") else 0

    def _behind(self) -> int:
        """A norm behind a sublayer, and dropout."""
        h = self.model.hidden_size
        norm = self.stream * h * self.bytes + self._statistics(self.stream, h) if self.model.norm_place in ("post", "both") else 0
        return norm + self._dropped(self.stream * h)

    def _attention(self, is_windowed: bool) -> int:
        total = self._residual_and_norm() + self._normed_input() + self._behind()
        total += self._latents() if self.model.is_latent else self._qk_norms()
        if self.model.position == "rope" and self.backend == "torch":
            total += 4 * (self.seq // self.cp) * self.model.rope_dims // 2 * self.bytes      # cos and sin, of queries and of keys
        return total + self._core(is_windowed)

    def _qk_norms(self) -> int:
        """Norms of queries and keys: their inputs, of which keys are a part of the fused product's output and keep all of it."""
        model, tokens = self.model, self.tokens
        if not model.qk_norm:
            return 0
        if model.qk_norm_width == "all":
            copies = 1 if self.tp == 1 else 3
            return copies * tokens * (self.q + self.kv) * self.bytes + 4 * tokens * 2 * (1 if self.tp == 1 else 2)
        queries = tokens * self.q * self.bytes if self.q != self.kv else 0
        statistics = 2 * self._statistics(tokens * self.heads, model.head_size) * (self.q + self.kv) // (2 * self.q)
        return queries + tokens * (self.q + 2 * self.kv) * self.bytes + statistics

    def _latents(self) -> int:
        """Multi-head latent attention: the latents before and behind their norms. The torch layers' norm keeps the key that RoPE turns with its latent;
        under FP8 each of the two products that read the hidden states keeps a copy of its own."""
        mla, stream = self.model.mla, self.stream
        ranks = mla.kv_lora_rank + mla.q_lora_rank
        kept = stream * (ranks + (mla.qk_rope_head_dim if self.backend == "torch" else 0)) * self.bytes + stream * ranks * self.input_bytes
        if self.input_bytes < self.bytes:
            kept += stream * self.model.hidden_size * self.input_bytes
        return kept + self._statistics(stream, mla.kv_lora_rank) + (self._statistics(stream, mla.q_lora_rank) if mla.q_lora_rank else 0)

    def _core(self, is_windowed: bool) -> int:
        """The attention itself, and the input of the product behind it."""
        kept = self._checkpointed() if self.run.train.recompute == "selective" else self.core(is_windowed)
        is_kept_by_flash = self.backend == "te" and self.run.train.recompute != "selective" and self.input_bytes == self.bytes
        return kept + (0 if is_kept_by_flash else self.tokens * self.out * self.input_bytes)

    def _checkpointed(self) -> int:
        """Queries, keys and values of an attention that is computed again. Values are a part of the product that made them and keep all of it."""
        model, tokens = self.model, self.tokens
        if model.is_latent:
            made = self.heads * (model.mla.qk_nope_head_dim + model.mla.v_head_dim)
            return (2 * tokens * self.q + tokens * made) * self.bytes
        made = 0 if model.qk_norm and model.qk_norm_width == "head" else tokens * (self.q + 2 * self.kv)      # counted with the norms
        if model.position != "rope":
            return (made + (0 if self.q == self.kv or model.qk_norm else tokens * self.q)) * self.bytes
        return (tokens * (self.q + self.kv) + made) * self.bytes

    def core(self, is_windowed: bool) -> int:
        """What an attention keeps that is not computed again."""
        q, k, v = self.tokens * self.q, self.keys * self.kv, self.keys * self.v
        if self.model.is_latent:
            k = self.keys * self.q
        statistics = 4 * self.tokens * self.heads
        if self.backend == "te":
            # Values are a part of the fused product's output; those of latent attention are copied out of theirs.
            made = self.tokens * (self.v if self.model.is_latent else self.q + 2 * self.kv)
            return (q + k + made + self.tokens * self.out) * self.bytes + statistics
        model, scores = self.model, self.tokens * self.heads * self.seq
        mask = self.mask(is_windowed)
        if model.attention_softcap or model.attention_sinks:
            groups = self.heads // max(self.kv // model.head_size, 1)
            kept = 4 * scores * (2 if model.attention_softcap else 1) + (self.bytes * scores if self.bytes == 2 else 0)
            flags = self.seq * self.seq // self.cp * (self.batch if self.run.data.reset_at_eod else 1)
            return (q + (k + v) * groups) * self.bytes + kept + flags
        if self._is_written_out(mask > 0):
            kept = self.bytes * scores * (2 if model.attention_dropout else 1)
            return (q + k * (self.heads * model.head_size // self.kv if not model.is_latent else 1) + v) * self.bytes + kept + mask
        return (q + k + v + self.tokens * self.out) * self.bytes + statistics + mask

    def _is_written_out(self, has_mask: bool) -> bool:
        """Does torch keep the whole matrix of probabilities? Its flash kernels on a CPU want values as wide as keys and no dropout; on a GPU the one
        that takes a mask has no grouped-query heads."""
        if self.device == "cpu":
            return self.model.is_latent and self.model.value_size != self.model.head_size or self.model.attention_dropout > 0
        return has_mask and self.q != self.kv and not self.model.is_latent

    def mask(self, is_windowed: bool) -> int:
        """A mask that is no plain causal one, as numbers that are added: one for all samples, or with documents one for each."""
        has_documents = self.run.data.reset_at_eod
        if not (has_documents or is_windowed or self.cp > 1):
            return 0
        return self.seq // self.cp * self.seq * (self.batch if has_documents else 1) * self.bytes

    def _mlp(self, width: int) -> int:
        tokens, local = self.tokens, width // self.tp
        return self._residual_and_norm() + self._normed_input() + self._behind() + self._gate(tokens, local)

    def _gate(self, rows: int, width: int) -> int:
        """Between the two products of an MLP: the input of the activation, what it keeps besides, and the input of the second product."""
        second = rows * width * self.input_bytes
        if self.model.gated:
            return 2 * rows * width * self.bytes + second
        if self.model.activation == "relu":
            return second      # relu keeps its output
        return (2 if self.model.activation == "squared_relu" else 1) * rows * width * self.bytes + second

    def _moe(self) -> int:
        model, moe, p = self.model, self.model.moe, self.run.parallel
        total = self._residual_and_norm() + self._normed_input() + self._behind()
        # The router: choices and their scores, the scores for the balancing loss, and the map of tokens to experts.
        total += self.stream * (moe.top_k * (8 + 4 + 8) + moe.num_experts * (4 + 4 + 1))
        # Where each row goes: its number, or for the fused kernels rows and experts of each token, and both orders of the rows of local experts.
        is_fused = self.backend == "te" and moe.permute_fusion
        total += 4 * self.stream * (2 * moe.num_experts + 1) + 8 * self.expert_rows if is_fused else 8 * self.stream * moe.top_k
        if moe.shared_expert_ffn_hidden_size:
            total += self._gate(self.tokens, moe.shared_expert_ffn_hidden_size // self.tp)
        rows, width = self.expert_rows, model.moe_ffn_hidden_size // p.expert_tp
        # Tokens in the order of experts; in the experts the activation's output before it is weighted, and the weights. megatron's kernel
        # for te, of SwiGLU without biases, weights it itself (build.py).
        is_weighted = self.backend == "te" and model.activation == "swiglu" and not model.linear_bias
        weighted = 0 if is_weighted else rows * width * self.bytes
        return total + rows * model.hidden_size * self.input_bytes + self._gate(rows, width) + weighted + rows * 4

    @cached_property
    def expert_rows(self) -> int:
        """Rows that the experts of this rank multiply, when all experts are equally busy."""
        moe, p = self.model.moe, self.run.parallel
        share = min(moe.capacity_factor, 1.0) if moe.capacity_factor and not moe.pad_to_capacity else moe.capacity_factor or 1.0
        return int(self.stream * moe.top_k * p.expert_tp * share)
