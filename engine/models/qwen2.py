"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v (arXiv 2407.10671, 2412.15115).

Sizes are those of the published config.json files, none of which uses its sliding window.
"""

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-6, rope_theta=1e6, qkv_bias=True)

_HALF_B = dict(num_layers=24, hidden_size=896, ffn_hidden_size=4864, num_attention_heads=14, num_query_groups=2, vocab_size=151936,
               tie_embeddings=True)
_1_5B = dict(num_layers=28, hidden_size=1536, ffn_hidden_size=8960, num_attention_heads=12, num_query_groups=2, vocab_size=151936,
             tie_embeddings=True)
_7B = dict(num_layers=28, hidden_size=3584, ffn_hidden_size=18944, num_attention_heads=28, num_query_groups=4, vocab_size=152064)
_72B = dict(num_layers=80, hidden_size=8192, ffn_hidden_size=29568, num_attention_heads=64, num_query_groups=8, vocab_size=152064)

SIZES = {
    "qwen2_0.5b": dict(_HALF_B, max_position=131072),
    "qwen2_1.5b": dict(_1_5B, max_position=131072),
    "qwen2_7b": dict(_7B, max_position=131072),
    "qwen2_72b": dict(_72B, max_position=131072, norm_eps=1e-5),
    "qwen2.5_0.5b": dict(_HALF_B, max_position=32768),
    "qwen2.5_1.5b": dict(_1_5B, max_position=131072),
    "qwen2.5_3b": dict(num_layers=36, hidden_size=2048, ffn_hidden_size=11008, num_attention_heads=16, num_query_groups=2, vocab_size=151936,
                       tie_embeddings=True, max_position=32768),
    "qwen2.5_7b": dict(_7B, max_position=131072),
    "qwen2.5_14b": dict(num_layers=48, hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40, num_query_groups=8, vocab_size=152064,
                        max_position=131072, norm_eps=1e-5),
    "qwen2.5_32b": dict(num_layers=64, hidden_size=5120, ffn_hidden_size=27648, num_attention_heads=40, num_query_groups=8, vocab_size=152064,
                        max_position=131072, norm_eps=1e-5),
    "qwen2.5_72b": dict(_72B, max_position=131072, norm_eps=1e-5),
}
