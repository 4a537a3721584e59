"""GPT-2: LayerNorm, GELU (tanh form), learned positions, biases everywhere, tied embeddings."""

DEFAULTS = dict(norm="layernorm", activation="gelu", position="learned", linear_bias=True, qkv_bias=True, tie_embeddings=True,
                max_position=1024)

SIZES = {
    "small": dict(num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12, vocab_size=50257),
    "medium": dict(num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, vocab_size=50257),
    "large": dict(num_layers=36, hidden_size=1280, ffn_hidden_size=5120, num_attention_heads=20, vocab_size=50257),
    "xl": dict(num_layers=48, hidden_size=1600, ffn_hidden_size=6400, num_attention_heads=25, vocab_size=50257),
}
