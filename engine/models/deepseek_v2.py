"""DeepSeek-V2: latent attention, fine-grained experts beside shared ones, a dense first layer (arXiv 2405.04434).

Sizes are those of the published config.json files; a token of the large one uses experts of 3 groups of 8.
"""

_YARN = dict(kind="yarn", factor=40.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0)

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-6, rope_theta=10000.0,
                mla=dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
                moe=dict(balance="seq_aux_loss", aux_loss_coeff=0.001, softmax_after_top_k=False, first_dense_layers=1))

SIZES = {
    "16b_lite": dict(num_layers=27, hidden_size=2048, ffn_hidden_size=10944, num_attention_heads=16, vocab_size=102400, max_position=163840,
                     rope_scaling=dict(_YARN, mscale=0.707, mscale_all_dim=0.707),
                     moe=dict(num_experts=64, top_k=6, ffn_hidden_size=1408, shared_expert_ffn_hidden_size=2816, scaling_factor=1.0)),
    "236b": dict(num_layers=60, hidden_size=5120, ffn_hidden_size=12288, num_attention_heads=128, vocab_size=102400, max_position=163840,
                 rope_scaling=dict(_YARN, mscale=0.707, mscale_all_dim=0.707), mla=dict(q_lora_rank=1536),
                 moe=dict(num_experts=160, top_k=6, ffn_hidden_size=1536, shared_expert_ffn_hidden_size=3072, scaling_factor=16.0,
                          num_groups=8, group_top_k=3, group_score_top=1)),
}
