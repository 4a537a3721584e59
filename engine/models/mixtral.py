"""Mixtral: a Llama-shaped model whose MLPs are eight experts, two per token (arXiv 2401.04088)."""

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-5, rope_theta=1e6,
                moe=dict(num_experts=8, top_k=2, balance="aux_loss", aux_loss_coeff=0.02, softmax_after_top_k=True))

SIZES = {
    "8x7b": dict(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
                 vocab_size=32000, max_position=32768),
    "8x22b": dict(num_layers=56, hidden_size=6144, ffn_hidden_size=16384, num_attention_heads=48, num_query_groups=8,
                  vocab_size=32768, max_position=65536),
}
