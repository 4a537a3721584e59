"""OLMo-2: a Llama that normalises what attention and MLP put out, and queries and keys over their whole width (arXiv 2501.00656).

Sizes are those of the published config.json files.
"""

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-6, rope_theta=500000.0, max_position=4096, norm_place="post",
                qk_norm=True, qk_norm_width="all", vocab_size=100352)

SIZES = {
    "1b": dict(num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=16),
    "7b": dict(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32),
    "13b": dict(num_layers=40, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40),
    "32b": dict(num_layers=64, hidden_size=5120, ffn_hidden_size=27648, num_attention_heads=40, num_query_groups=8),
}
