"""Gemma 2: GeGLU, norms before and behind each sublayer, capped logits, every second layer with a sliding window (arXiv 2408.00118).

Sizes are those of the published config.json files.
"""

DEFAULTS = dict(norm="rmsnorm", norm_zero_centered=True, norm_place="both", norm_eps=1e-6, activation="geglu", position="rope", rope_theta=10000.0,
                tie_embeddings=True, scale_embeddings=True, attention_softcap=50.0, logits_softcap=30.0, sliding_window=4096,
                sliding_window_freq=2, vocab_size=256000, max_position=8192)

SIZES = {
    "2b": dict(num_layers=26, hidden_size=2304, ffn_hidden_size=9216, num_attention_heads=8, num_query_groups=4, head_dim=256,
               query_pre_attn_scalar=256),
    "9b": dict(num_layers=42, hidden_size=3584, ffn_hidden_size=14336, num_attention_heads=16, num_query_groups=8, head_dim=256,
               query_pre_attn_scalar=256),
    "27b": dict(num_layers=46, hidden_size=4608, ffn_hidden_size=36864, num_attention_heads=32, num_query_groups=16, head_dim=128,
                query_pre_attn_scalar=144),
}
