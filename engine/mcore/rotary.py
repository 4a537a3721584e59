"""megatron's rotary embedding with the frequencies of engine/rope.py.

    install(chunk, model)      # after GPTModel is built, before its first forward pass

megatron scales frequencies in two of the six ways and has a factor on cos and sin for one of them; this replaces the module that
makes angles, and the function by which megatron's attention asks for that factor.
"""

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.utils import is_layer_window_attention

from engine import rope
from engine.mcore import mtp
from engine.rope import BY_LENGTH, attention_factor, inverse_frequencies

# megatron's own derives a yarn factor from fields that exist for latent attention only.
megatron_attention._yarn_get_concentration_factor_from_config = lambda config: getattr(config, "rope_attention_factor", 1.0)


def install(chunk, model) -> None:
    """Give a GPTModel the RoPE that `model` (config.Model) describes; nothing where it has none."""
    if model.position != "rope":
        return
    chunk.rotary_pos_emb = Rotary(model, chunk.rotary_pos_emb.cp_group)
    if model.rope_local_theta:
        for layer in mtp.transformer_layers(chunk):
            layer.self_attention.register_forward_pre_hook(_own_angles, with_kwargs=True)
    chunk.config.rope_attention_factor = attention_factor(model.rope_scaling)
    if chunk.config.rope_attention_factor != 1.0:
        chunk.config.apply_rope_fusion = False  # Transformer Engine's kernel has no such factor, and ignores it for packed documents


def _own_angles(attention, args, kwargs):
    """Of angles for both kinds of layers, those of this one, as rows without gaps, which Transformer Engine's kernel takes them for."""
    everywhere, local = kwargs["rotary_pos_emb"].chunk(2, dim=-1)
    is_windowed = is_layer_window_attention(attention.config.window_size, attention.config.window_attn_skip_freq, attention.layer_number)
    return args, {**kwargs, "rotary_pos_emb": (local if is_windowed else everywhere).contiguous()}


class Rotary(RotaryEmbedding):
    """Angles [s, 1, 1, d] by number of tokens; megatron's forward keeps those of the last lengths it was asked for.

    Frequencies that depend on the length take that of the rows, before context parallel cuts them. While decoding with a key cache
    that is the room in the cache, so that all keys in it have been turned alike. Where layers with a sliding window have frequencies of their
    own, angles of both lie side by side, [s, 1, 1, 2 d], and each layer takes its half.
    """

    def __init__(self, model, cp_group):
        super().__init__(model.rope_dims, 1.0, rotary_base=model.rope_theta, cp_group=cp_group)
        self.theta, self.scaling = model.rope_theta, model.rope_scaling
        self.local = Rotary(rope.local(model), cp_group) if model.rope_local_theta else None
        self.positions = None  # int64 [b, s / cp] of the micro-batch at hand, where they are not the places

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group=None) -> torch.Tensor:
        """Angles [s, 1, 1, d] as megatron's, or [s, b, 1, d] of `positions`."""
        if self.local is not None:
            self.local.positions = self.positions
            return torch.cat([self._angles(max_seq_len, offset, packed_seq, cp_group), self.local(max_seq_len, offset, packed_seq, cp_group)], -1)
        return self._angles(max_seq_len, offset, packed_seq, cp_group)

    def _angles(self, max_seq_len: int, offset: int, packed_seq: bool, cp_group) -> torch.Tensor:
        if self.positions is None:
            return super().forward(max_seq_len, offset, packed_seq, cp_group)
        angles = self.get_freqs_non_repeated(max_seq_len)
        return torch.cat([angles, angles], -1)[self.positions].transpose(0, 1)[:, :, None]

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """[max_seq_len, d / 2]: position * frequency, from position `offset` on."""
        frequencies, _ = inverse_frequencies(self.theta, 2 * self.inv_freq.numel(), self.scaling, offset + max_seq_len)
        frequencies = frequencies.to(self.inv_freq.device)
        return torch.outer(torch.arange(offset, offset + max_seq_len, device=frequencies.device, dtype=torch.float32), frequencies)

    def get_rotary_seq_len(self, inference_context, transformer, transformer_input, transformer_config, packed_seq_params=None, **kwargs):
        """As megatron's; but for documents laid end to end that is the longest one, where other backends see the whole row."""
        packed = None if self.scaling.kind in BY_LENGTH else packed_seq_params
        return super().get_rotary_seq_len(inference_context, transformer, transformer_input, transformer_config, packed, **kwargs)
