"""gpt-oss: experts with biases behind a clamped gate, attention sinks, every second layer with a sliding window (arXiv 2508.10925).

Sizes are those of the published config.json files.
"""

DEFAULTS = dict(norm="rmsnorm", norm_eps=1e-5, activation="clamped_swiglu", position="rope", rope_theta=150000.0, linear_bias=True, qkv_bias=True,
                attention_sinks=True, sliding_window=128, sliding_window_freq=2, vocab_size=201088, max_position=131072, hidden_size=2880,
                ffn_hidden_size=2880, num_attention_heads=64, num_query_groups=8, head_dim=64,
                rope_scaling=dict(kind="yarn", factor=32.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0, truncate=False),
                moe=dict(top_k=4, balance="none", softmax_after_top_k=True))

SIZES = {
    "20b": dict(num_layers=24, moe=dict(num_experts=32)),
    "120b": dict(num_layers=36, moe=dict(num_experts=128)),
}
