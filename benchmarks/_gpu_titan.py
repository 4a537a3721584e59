"""torchtitan as a contestant of gpu_table.py: its own Trainer, whose train_step is the step. Written against torchtitan 0.3.0 (peers.txt).

Taken as torchtitan has it for one GPU: the Llama of its models/llama3, fp32 weights under fully_shard's mixed precision (bf16 copies, fp32
gradients), fused AdamW, each block and the loss compiled, the loss chunk by chunk, forward and backward recorded as one CUDA graph, garbage
collected by its own handler. Switched off: recomputation, as in our run, and what is no training (logging, checkpoints, validation). Put in its
place: sizes, and tokens, which come from the caller, so there is neither tokenizer nor data set. tests/test_gpu_table.py shows on a CPU that
with equal weights its loss is the engine's.
"""

import os
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace


def trainer_of(sizes: dict, attention: str = "flex", fp8: bool = False, low_moments: bool = False, compile: bool = True,
               dtype: str = "bfloat16", lr: float = 0):
    """torchtitan's Trainer at these sizes. attention: "flex", its default, with the masks of documents; "sdpa": torch's own, causal, cuDNN's kernel
    first, which it has for other models. fp8: its Float8LinearConverter (torchao, one scale per row). low_moments: Adam's moments in bf16. dtype: of
    the products. Raises ImportError where it or a part of it is not installed."""
    import torch

    if sizes["device"] == "cpu":
        _know_the_cpu(torch)
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.components.quantization import Float8LinearConverter
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import CompileConfig, TrainingConfig
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import Llama3StateDictAdapter, parallelize_llama
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.trainer import Trainer

    class NoTokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config, *, tokenizer_path):
            super().__init__()

        encode = decode = get_vocab_size = None

    class NoData(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config, **of_the_run):
            pass

        __iter__ = state_dict = load_state_dict = None

    # A process group of one, as torchrun would ask for it.
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    model = _llama(sizes)
    if attention == "sdpa":
        for layer in model.layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    if fp8:
        model = Float8LinearConverter.Config(filter_fqns=["lm_head"], model_compile_enabled=compile).build().convert(model)
    optimizer = default_adamw(lr=lr)
    optimizer.implementation = "fused_opt_states_bf16" if low_moments else "fused"
    spec = ModelSpec(name="llama3", flavor="table", model=model, parallelize_fn=parallelize_llama, pipelining_fn=None, post_optimizer_build_fn=None,
                     state_dict_adapter=Llama3StateDictAdapter)
    folder = tempfile.TemporaryDirectory(prefix="torchtitan-")  # for traces of hung collectives
    trainer = Trainer(Trainer.Config(
        model_spec=spec, optimizer=optimizer, activation_checkpoint=None, tokenizer=NoTokenizer.Config(), dataloader=NoData.Config(),
        dump_folder=folder.name, metrics=MetricsProcessor.Config(log_freq=1 << 30),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=sizes["vocab"])), compile=CompileConfig(enable=compile),
        training=TrainingConfig(local_batch_size=sizes["batch"], global_batch_size=sizes["batch"] * sizes.get("micro_batches", 1), seq_len=sizes["seq"],
                                mixed_precision_param=dtype)))
    trainer.folder = folder  # which goes with it
    return trainer


def _llama(sizes: dict):
    """Its Llama3Model.Config, put together as its own sizes are."""
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.llama3 import _EMBEDDING_INIT, _EMBEDDING_SKIP_INIT, _NORM_INIT, Llama3Model, _build_llama3_layers, _output_linear_init

    hidden, vocab, heads, tied = sizes["hidden"], sizes["vocab"], sizes["heads"], sizes.get("tied", False)
    rope = ComplexRoPE.Config(dim=hidden // heads, max_seq_len=sizes["seq"], theta=10000.0)
    embedding = Embedding.Config(num_embeddings=vocab, embedding_dim=hidden, param_init=_EMBEDDING_SKIP_INIT if tied else _EMBEDDING_INIT)
    return Llama3Model.Config(
        dim=hidden, vocab_size=vocab, enable_weight_tying=tied, tok_embeddings=embedding,
        norm=RMSNorm.Config(normalized_shape=hidden, param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=hidden, out_features=vocab, param_init=_output_linear_init(hidden)),
        layers=_build_llama3_layers(n_layers=sizes["layers"], dim=hidden, n_heads=heads, n_kv_heads=sizes.get("groups") or heads,
                                    hidden_dim=sizes["ffn"], rope=rope, attn_backend="flex"))


def _know_the_cpu(torch) -> None:
    """torchtitan takes a machine without accelerators for one with CUDA; here it is told, for rehearsals, before it looks."""
    import torchtitan.tools.utils as utils

    nothing = lambda *_: None  # noqa: E731
    utils.device_type = "cpu"
    utils.device_module = SimpleNamespace(
        set_device=nothing, device_count=lambda: 1, current_device=lambda: 0, synchronize=nothing, empty_cache=nothing,
        reset_peak_memory_stats=nothing, get_device_name=lambda _: "CPU", get_device_properties=lambda _: SimpleNamespace(total_memory=1), memory_stats=lambda _: {})


def batch_of(tokens):
    """What torchtitan's loaders hand over, of tokens [batch, seq + 1] on the host: one document per sequence."""
    import torch

    tokens = tokens.contiguous()
    return {"input": tokens[:, :-1], "positions": torch.arange(tokens.size(1) - 1).expand(tokens.size(0), -1)}, tokens[:, 1:]
