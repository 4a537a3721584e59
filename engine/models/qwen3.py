"""Qwen3: a Llama that normalises queries and keys head by head, heads of 128 (arXiv 2505.09388).

Sizes are those of the published config.json files, none of which uses its sliding window.
"""

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-6, rope_theta=1e6, qk_norm=True, head_dim=128,
                max_position=40960)

SIZES = {
    "0.6b": dict(num_layers=28, hidden_size=1024, ffn_hidden_size=3072, num_attention_heads=16, num_query_groups=8, vocab_size=151936,
                 tie_embeddings=True),
    "1.7b": dict(num_layers=28, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=16, num_query_groups=8, vocab_size=151936,
                 tie_embeddings=True),
    "4b": dict(num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32, num_query_groups=8, vocab_size=151936,
               tie_embeddings=True),
    "8b": dict(num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, num_query_groups=8, vocab_size=151936),
    "14b": dict(num_layers=40, hidden_size=5120, ffn_hidden_size=17408, num_attention_heads=40, num_query_groups=8, vocab_size=151936),
    "32b": dict(num_layers=64, hidden_size=5120, ffn_hidden_size=25600, num_attention_heads=64, num_query_groups=8, vocab_size=151936),
}
