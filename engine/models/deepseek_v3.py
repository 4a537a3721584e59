"""DeepSeek-V3: V2's latent attention and experts, routed by sigmoid scores whose bias keeps them busy (arXiv 2412.19437).

The size is that of the published config.json, its module for predicting a second token included.
"""

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-6, rope_theta=10000.0,
                mla=dict(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
                moe=dict(score="sigmoid", balance="aux_free", bias_update_rate=1e-3, first_dense_layers=3, group_score_top=2))

SIZES = {
    "671b": dict(num_layers=61, hidden_size=7168, ffn_hidden_size=18432, num_attention_heads=128, vocab_size=129280, max_position=163840,
                 rope_scaling=dict(kind="yarn", factor=40.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0,
                                   mscale_all_dim=1.0),
                 moe=dict(num_experts=256, top_k=8, ffn_hidden_size=2048, shared_expert_ffn_hidden_size=2048, scaling_factor=2.5,
                          num_groups=8, group_top_k=4), mtp=dict(num_layers=1)),
}
