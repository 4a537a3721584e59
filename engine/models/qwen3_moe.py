"""Qwen3-MoE: a Qwen3 whose MLPs are 128 small experts, eight per token (arXiv 2505.09388). Sizes are those of the published config.json files."""

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-6, rope_theta=1e6, qk_norm=True, head_dim=128,
                max_position=40960, moe=dict(num_experts=128, top_k=8, balance="aux_loss", aux_loss_coeff=0.001, softmax_after_top_k=True))

SIZES = {
    "30b_a3b": dict(num_layers=48, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=32, num_query_groups=4, vocab_size=151936,
                    moe={**DEFAULTS["moe"], "ffn_hidden_size": 768}),
    "235b_a22b": dict(num_layers=94, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=64, num_query_groups=4, vocab_size=151936,
                      moe={**DEFAULTS["moe"], "ffn_hidden_size": 1536}),
}
