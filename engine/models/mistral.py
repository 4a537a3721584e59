"""Mistral: a Llama whose layers may see a sliding window alone (arXiv 2310.06825). Sizes are those of the published config.json files."""

DEFAULTS = dict(norm="rmsnorm", activation="swiglu", position="rope", norm_eps=1e-5)

_7B = dict(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8)

SIZES = {
    "7b_v0.1": dict(_7B, vocab_size=32000, max_position=32768, sliding_window=4096),
    "7b_v0.2": dict(_7B, vocab_size=32000, max_position=32768, rope_theta=1e6),
    "7b_v0.3": dict(_7B, vocab_size=32768, max_position=32768, rope_theta=1e6),
    "nemo_12b": dict(num_layers=40, hidden_size=5120, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, head_dim=128,
                     vocab_size=131072, max_position=131072, rope_theta=1e6),
    "small_24b": dict(num_layers=40, hidden_size=5120, ffn_hidden_size=32768, num_attention_heads=32, num_query_groups=8, head_dim=128,
                      vocab_size=131072, max_position=32768, rope_theta=1e8),
}
