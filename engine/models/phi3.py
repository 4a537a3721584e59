"""Phi-3 and Phi-4: a Llama to the engine; its folders fuse q, k, v and gate, up (arXiv 2404.14219, 2412.08905).

Sizes are those of the published config.json files that have no LongRoPE; those that do (the 128k models, Phi-4-mini) bring tables of factors,
which launch/convert.py from-hf reads from the folder.
"""

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-5)

SIZES = {
    "mini_4k": dict(num_layers=32, hidden_size=3072, ffn_hidden_size=8192, num_attention_heads=32, vocab_size=32064, max_position=4096,
                    sliding_window=2047),
    "medium_4k": dict(num_layers=40, hidden_size=5120, ffn_hidden_size=17920, num_attention_heads=40, num_query_groups=10, vocab_size=32064,
                      max_position=4096, sliding_window=2047),
    "phi4": dict(num_layers=40, hidden_size=5120, ffn_hidden_size=17920, num_attention_heads=40, num_query_groups=10, vocab_size=100352,
                 max_position=16384, rope_theta=250000.0),
}
