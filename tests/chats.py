"""Tiny tokenizers, conversations and files of them, for the tests of what begins with conversations."""

import json
from pathlib import Path

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>",
            "<start_of_turn>", "<end_of_turn>", "<bos>", "<|endoftext|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>")

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [SYSTEM, {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello, you!"},
        {"role": "user", "content": "And  now?\n"}, {"role": "assistant", "content": "Good bye. \U0001f600"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}]


def call(name, identity="abc123def", **arguments):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


TOOL_TALK = [SYSTEM, {"role": "user", "content": "What is 1+2, and 3+4?"},
             {"role": "assistant", "content": "", "tool_calls": [call("add", a=1, b=2)]},
             {"role": "tool", "content": "3", "tool_call_id": "abc123def", "name": "add"},
             {"role": "assistant", "content": "Three.", "tool_calls": [call("add", a=3, b=4), call("add", "abc123deg", a="é")]},
             {"role": "tool", "content": "7", "tool_call_id": "abc123def", "name": "add"},
             {"role": "tool", "content": "8", "tool_call_id": "abc123deg", "name": "add"},
             {"role": "assistant", "content": "Seven."}]


def write_tokenizer(folder, specials=SPECIALS, adds_bos=False, config=None):
    """A byte-level BPE tokenizer of some merges, cut as Llama 3 cuts, in a folder. adds_bos: its post-processor begins every text with <s>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from data_tools.tokenizer import LLAMA3_PATTERN

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    words = ["hello there you Hello, you! Good bye. And now? user assistant system Be brief. Three. Seven. <tool_call>\n"
             '{"name": "add"}\n\n\n'] * 5
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(specials), show_progress=False))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} if config is None else config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return f"hf:{folder}"


def runs(encoded) -> list[list[int]]:
    """The token ids of each unbroken run of trained tokens."""
    found, before = [], False
    for token, trained in zip(encoded.ids, encoded.mask):
        if trained and not before:
            found.append([])
        if trained:
            found[-1].append(token)
        before = trained
    return found


def said(encoded, spec) -> list[str]:
    """The text of each run of trained tokens."""
    from data_tools.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    return [tokenizer.decode(ids) for ids in runs(encoded)]


def write_jsonl(path, records) -> str:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def colour_chats(num=24, seed=0) -> list[dict]:
    """Conversations of one or two turns that a model can learn: the answer is the question's word, twice."""
    import numpy as np

    random = np.random.RandomState(seed)
    turns = lambda word: [{"role": "user", "content": word}, {"role": "assistant", "content": f"{word} {word}"}]  # noqa: E731
    return [{"messages": sum(map(turns, random.choice(["red", "blue", "green", "pink"], random.randint(1, 3)).tolist()), [])} for _ in range(num)]
