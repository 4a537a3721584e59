"""Llama 1, 2 and 3: RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases.

Sizes are those of the published config.json files.
"""

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-5)

_LLAMA31 = dict(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
_LLAMA32 = {**_LLAMA31, "factor": 32.0}

SIZES = {
    "llama2_7b": dict(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, vocab_size=32000,
                      max_position=4096),
    "llama2_13b": dict(num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40, vocab_size=32000,
                       max_position=4096),
    "llama2_70b": dict(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8,
                       vocab_size=32000, max_position=4096),
    "llama3_8b": dict(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
                      vocab_size=128256, rope_theta=500000.0, max_position=8192),
    "llama3_70b": dict(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8,
                       vocab_size=128256, rope_theta=500000.0, max_position=8192),
    "llama3.1_8b": dict(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
                        vocab_size=128256, rope_theta=500000.0, max_position=131072, rope_scaling=_LLAMA31),
    "llama3.2_1b": dict(num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, num_query_groups=8,
                        head_dim=64, vocab_size=128256, rope_theta=500000.0, max_position=131072, rope_scaling=_LLAMA32,
                        tie_embeddings=True),
    "llama3.2_3b": dict(num_layers=28, hidden_size=3072, ffn_hidden_size=8192, num_attention_heads=24, num_query_groups=8,
                        head_dim=128, vocab_size=128256, rope_theta=500000.0, max_position=131072, rope_scaling=_LLAMA32,
                        tie_embeddings=True),
}
