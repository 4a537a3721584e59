"""Gemma 3, the text model: Gemma 2 with normalised queries and keys in the place of caps, and one layer in six that sees everything, under
another RoPE (arXiv 2503.19786).

Sizes are those of the published config.json files.
"""

DEFAULTS = dict(norm="rmsnorm", norm_zero_centered=True, norm_place="both", norm_eps=1e-6, activation="geglu", position="rope", rope_theta=1e6,
                rope_local_theta=10000.0, qk_norm=True, tie_embeddings=True, scale_embeddings=True, sliding_window=1024, sliding_window_freq=6,
                vocab_size=262208, max_position=131072, query_pre_attn_scalar=256)

_LINEAR = dict(kind="linear", factor=8.0)

SIZES = {
    "270m": dict(num_layers=18, hidden_size=640, ffn_hidden_size=2048, num_attention_heads=4, num_query_groups=1, head_dim=256,
                 sliding_window=512, vocab_size=262144, max_position=32768),
    "1b": dict(num_layers=26, hidden_size=1152, ffn_hidden_size=6912, num_attention_heads=4, num_query_groups=1, head_dim=256,
               sliding_window=512, vocab_size=262144, max_position=32768),
    "4b": dict(num_layers=34, hidden_size=2560, ffn_hidden_size=10240, num_attention_heads=8, num_query_groups=4, head_dim=256,
               rope_scaling=_LINEAR),
    "12b": dict(num_layers=48, hidden_size=3840, ffn_hidden_size=15360, num_attention_heads=16, num_query_groups=8, head_dim=256,
                rope_scaling=_LINEAR),
    "27b": dict(num_layers=62, hidden_size=5376, ffn_hidden_size=21504, num_attention_heads=32, num_query_groups=16, head_dim=128,
                query_pre_attn_scalar=168, rope_scaling=_LINEAR),
}
