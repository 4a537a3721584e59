"""An exported folder loads in transformers without a remark, computes the same logits, and is either complete or absent."""

import json

import pytest
import torch
from safetensors import safe_open

from engine.config import Chat, Data
from engine.hf.convert import Rounded, run_of
from engine.hf.export import export
from engine.hf.fields import HFError
from engine.hf.load import INDEX, WEIGHTS, open_hf
from engine.hf.verify import agreement, prompts, transformers_logits


def logits(network, tokens):
    with torch.no_grad():
        return network(tokens).logits.float()


def test_transformers_computes_the_same(model, tmp_path):
    out = export(model.run, model.engine_tensors(), tmp_path / "out")
    tokens = prompts(model.run.model)
    assert torch.equal(transformers_logits(out, tokens), logits(model.network, tokens))


def test_bf16_survives_and_other_dtypes_are_converted(tiny, tmp_path):
    model = tiny("llama", torch.bfloat16)
    assert model.run.train.precision == "bf16"
    for dtype, name in ((None, "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        hf, tensors = open_hf(export(model.run, model.engine_tensors(), tmp_path / name, dtype=dtype))
        assert hf["dtype"] == hf["torch_dtype"] == name
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, name)}


def test_a_lazy_mapping_is_read_once_per_tensor(tiny, tmp_path):
    class Counting(dict):
        reads = []

        def __getitem__(self, name):
            self.reads.append(name)
            return super().__getitem__(name)

    model, tensors = tiny("mixtral"), Counting(tiny("mixtral").engine_tensors())
    export(model.run, tensors, tmp_path / "out")
    assert sorted(tensors.reads) == sorted(tensors)


def test_shards_and_index_agree(tiny, tmp_path):
    model = tiny("mixtral")
    out = export(model.run, model.engine_tensors(), tmp_path / "out", shard_bytes=20_000)
    index = json.loads((out / INDEX).read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files and not (out / WEIGHTS).exists()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in model.tensors.values())
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            size = sum(opened.get_tensor(name).numel() * 4 for name in opened.keys())
            assert opened.metadata() == {"format": "pt"} and (size <= 20_000 or len(opened.keys()) == 1)
    tokens = prompts(model.run.model)
    assert torch.equal(transformers_logits(out, tokens), logits(model.network, tokens))


def test_a_failure_leaves_nothing(tiny, tmp_path):
    model, tensors = tiny("llama"), tiny("llama").engine_tensors()
    del tensors["decoder.final_layernorm.weight"]  # found out late, after the layers
    with pytest.raises(HFError, match="final_layernorm"):
        export(model.run, tensors, tmp_path / "out", shard_bytes=1000)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(HFError, match="exists already"):
        export(model.run, model.engine_tensors(), tmp_path / "out")


def test_positions_of_a_run_without_max_position(tiny, tmp_path):
    """max_position 0 means train.seq_len."""
    model = tiny("gpt2")
    run = model.run.model_copy(update={"model": model.run.model.model_copy(update={"max_position": 0})})
    assert open_hf(export(run, model.engine_tensors(), tmp_path / "out"))[0]["n_positions"] == 40
    assert dict(model.family.to_hf(run.model, model.engine_tensors()))["transformer.wpe.weight"].shape == (40, 36)


def test_special_tokens_never_default(tiny, tmp_path):
    """Llama's default end token is 2, an ordinary token of another vocabulary."""
    import transformers

    out = export(tiny("llama").run, tiny("llama").engine_tensors(), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    for config in (loaded.config, loaded.generation_config):
        assert config.bos_token_id is None and config.eos_token_id is None and config.pad_token_id is None


@pytest.mark.parametrize("end,eod", [(7, 7), (None, -1), ([7, 8], -1), (131, -1)])
def test_the_end_token_of_a_foreign_model(tiny, tmp_path, end, eod):
    model = tiny("llama")
    run = run_of(model.hf | {"eos_token_id": end}, model.tensors, model.folder, tmp_path)
    assert run.data.eod_id == eod
    hf, _ = open_hf(export(run, model.engine_tensors(), tmp_path / "out"))
    assert hf["eos_token_id"] == (eod if eod >= 0 else None)


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a small BPE tokenizer whose end token is number 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    built = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens(["<end>"])
    (tmp_path / "tokenizer").mkdir()
    built.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "secret.txt").touch()
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("bare", [True, False])
def test_tokenizer_goes_along(tiny, tmp_path, tokenizer, bare):
    import transformers

    model = tiny("llama")
    if not bare:
        (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast",
                                                                    "eos_token": {"__type": "AddedToken", "content": "<end>"}}))
    spec = f"hf:{tokenizer / 'tokenizer.json' if bare else tokenizer}"
    data = Data(tokenizer=spec, eod_id=3) if bare else Data(tokenizer=spec)
    out = export(model.run.model_copy(update={"data": data}), model.engine_tensors(), tmp_path / "out")
    assert not (out / "secret.txt").exists()
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded("ab b")["input_ids"] == [2, 1] and loaded.eos_token_id == 3
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text())["eos_token_id"] == 3


def test_the_chat_template_of_training_goes_along(tiny, tmp_path, tokenizer):
    import transformers

    model = tiny("llama")
    (tokenizer / "chat_template.jinja").write_text("another")
    run = model.run.model_copy(update={"data": Data(tokenizer=f"hf:{tokenizer}"), "chat": Chat(template="tags")})
    out = export(run, model.engine_tensors(), tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    text = loaded.apply_chat_template([{"role": "user", "content": "a?"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\na?\n<|assistant|>\n"


def test_a_lost_tokenizer_is_an_error(tiny, tmp_path, tokenizer):
    model = tiny("llama")
    run = model.run.model_copy(update={"data": Data(tokenizer=f"hf:{tmp_path / 'gone'}")})
    with pytest.raises(HFError, match="no tokenizer at .*gone"):
        export(run, model.engine_tensors(), tmp_path / "out")
    assert (export(run, model.engine_tensors(), tmp_path / "out", tokenizer_dir=tokenizer) / "tokenizer.json").exists()


def test_model_card(tiny, tmp_path):
    model = tiny("mixtral")
    card = (export(model.run, model.engine_tensors(), tmp_path / "out", tokens_trained=12345, verification="proved") / "README.md").read_text()
    num = sum(parameter.numel() for parameter in model.network.parameters())
    for part in ("# out\n", "| family | mixtral (custom) |", "| tokens trained | 12,345 |", "| conversion | proved |", f"| {num:,} |",
                 "| experts | 6, 2 per token |", "rope_theta: 1000000.0"):
        assert part in card


def test_agreement_has_a_limit():
    theirs = torch.tensor([[[1.0, -50.0]]])
    assert "5.0" in agreement(theirs + 0.004, theirs) or "4.0" in agreement(theirs + 0.004, theirs)
    for ours in (theirs + 0.006, theirs * float("nan"), theirs[..., :1]):
        with pytest.raises(HFError):
            agreement(ours, theirs)


def test_rounded_view():
    tensors = {"a": torch.tensor([1.001, 2.0]), "n": torch.tensor([7])}
    assert Rounded(tensors, "bf16")["a"].tolist() == [1.0, 2.0] and Rounded(tensors, "bf16")["a"].dtype == torch.float32
    assert Rounded(tensors, None)["a"] is tensors["a"] and Rounded(tensors, "bf16")["n"] is tensors["n"]
    assert set(Rounded(tensors, None)) == {"a", "n"} and "a" in Rounded(tensors, None) and len(Rounded(tensors, None)) == 2
