"""Conversations to tokens and masks: ids against transformers, masks against texts written by hand and against TRL's marked templates."""

import json
from pathlib import Path

import pytest
from chats import SPECIALS, SYSTEM, TALK, TOOL_TALK, TOOLS, call, runs, said, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.chat import BUILT_IN, Template, extended_tokenizer
from engine.data.indexed import DataError
from engine.data.offsets import load_offsets

OURS = Path(__file__).parents[2] / "engine/data/templates"
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "tags": "</s>"}


@pytest.fixture(scope="session")
def spec(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def trl_template(name) -> str:
    trl = pytest.importorskip("trl", reason="TRL brings real templates of model families")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this TRL has no {name}.jinja")
    return str(path)


def transformers_ids(spec, template_file, messages, tools=None, **flags):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=spec.removeprefix("hf:") + "/tokenizer.json", bos_token="<s>", eos_token="</s>")
    # With trimmed offsets its mask is empty where a turn begins with a space.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.chat_template = Path(template_file).read_text()
    return tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, **flags)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("messages, tools", [(TALK, None), (TALK[1:], None), (TALK[:3], TOOLS), (TOOL_TALK, TOOLS)],
                         ids=["talk", "no system", "tools", "calls"])
def test_tokens_are_those_of_transformers(spec, name, messages, tools):
    expected = transformers_ids(spec, OURS / f"{name}.jinja", messages, tools, return_assistant_tokens_mask=True)
    found = Template.load(name, spec).encode(messages, tools)
    assert found.ids == expected["input_ids"]
    assert found.mask == [bool(m) for m in expected["assistant_masks"]]
    before = messages[:[message["role"] for message in messages].index("assistant")]
    prompt = Template.load(name, spec).prompt(before, tools)
    assert prompt == transformers_ids(spec, OURS / f"{name}.jinja", before, tools, add_generation_prompt=True)["input_ids"]
    assert found.ids[:len(prompt)] == prompt      # what is trained follows what inference asks


@pytest.mark.parametrize("name, tools", [("llama3", None), ("qwen2_5", TOOLS), ("qwen2_5", None), ("cohere", None), ("gemma3", None)])
def test_unmarked_templates_of_model_families(spec, name, tools):
    """Tokens equal transformers'; what TRL marks in its own copy of the template is trained, less the line break behind an end token."""
    messages = TALK[1:] if tools else TALK
    expected = transformers_ids(spec, trl_template(name), messages, tools)
    found = Template.load(trl_template(name), spec).encode(messages, tools)
    assert found.ids == expected["input_ids"]
    marked = transformers_ids(spec, trl_template(f"{name}_training"), messages, tools, return_assistant_tokens_mask=True)
    assert marked["input_ids"] == found.ids
    newline = load_offsets(spec).encode("\n")[0][0]
    differing = [(token, found.mask[k]) for k, token in enumerate(found.ids) if found.mask[k] != marked["assistant_masks"][k]]
    assert all(difference == (newline, False) for difference in differing) and sum(found.mask) > 8


def test_nothing_is_added_to_what_the_template_writes(tmp_path):
    spec = write_tokenizer(tmp_path, adds_bos=True)
    begin = load_offsets(spec).specials["<s>"]
    assert Template.load("mistral", spec).encode(TALK).ids.count(begin) == 1
    assert Template.load("chatml", spec).encode(TALK).ids.count(begin) == 0


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, expected", [
    ("chatml", ["Hello, you!<|im_end|>", "Good bye. \U0001f600<|im_end|>"]),
    ("llama3", ["Hello, you!<|eot_id|>", "Good bye. \U0001f600<|eot_id|>"]),
    ("mistral", [" Hello, you!</s>", " Good bye. \U0001f600</s>"]),
    ("tags", ["Hello, you!</s>", "Good bye. \U0001f600</s>"]),
])
def test_an_answer_and_its_end_are_trained(spec, name, expected):
    assert said(Template.load(name, spec).encode(TALK), spec) == expected


@pytest.mark.parametrize("name, expected", [
    ("chatml", ['<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>',
                'Three.\n<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>\n'
                '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call><|im_end|>', "Seven.<|im_end|>"]),
    ("llama3", ['{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>',
                'Three.\n{"name": "add", "parameters": {"a": 3, "b": 4}}\n{"name": "add", "parameters": {"a": "é"}}<|eot_id|>', "Seven.<|eot_id|>"]),
    ("mistral", ['[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "abc123def"}]</s>',
                 ' Three.[TOOL_CALLS] [{"name": "add", "arguments": {"a": 3, "b": 4}, "id": "abc123def"}, '
                 '{"name": "add", "arguments": {"a": "é"}, "id": "abc123deg"}]</s>', " Seven.</s>"]),
    ("tags", ['<|call|>{"name": "add", "arguments": {"a": 1, "b": 2}}</s>',
              'Three.\n<|call|>{"name": "add", "arguments": {"a": 3, "b": 4}}\n<|call|>{"name": "add", "arguments": {"a": "é"}}</s>', "Seven.</s>"]),
])
def test_calls_are_trained_and_results_are_not(spec, name, expected):
    assert said(Template.load(name, spec).encode(TOOL_TALK, TOOLS), spec) == expected


def test_texts_of_the_templates(spec):
    """The whole text by hand, so that a template cannot drift with its oracle."""
    tokenizer = load_offsets(spec)

    def text(name, messages):
        return tokenizer._tokenizer.decode(Template.load(name, spec).encode(messages).ids, skip_special_tokens=False)

    two = [SYSTEM, *({"role": role, "content": letter} for role, letter in zip(["user", "assistant"] * 2, "ABCD"))]
    assert text("chatml", two) == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
                                   "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\nD<|im_end|>\n")
    assert text("llama3", two) == ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                                   "<|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
                                   "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>"
                                   "<|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|>"
                                   "<|start_header_id|>assistant<|end_header_id|>\n\nD<|eot_id|>")
    assert text("llama3", [two[1], {"role": "assistant", "content": " \n B \n"}]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>")
    assert text("mistral", two) == "<s>[INST] Be brief.\n\nA[/INST] B</s>[INST] C[/INST] D</s>"
    assert text("tags", two) == "<|system|>\nBe brief.\n<|user|>\nA\n<|assistant|>\nB</s><|user|>\nC\n<|assistant|>\nD</s>"


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(lambda text: text.strip() == text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(BUILT_IN)), system=st.booleans(), turns=st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=4))
def test_whatever_is_said_is_what_is_trained(spec, name, system, turns):
    messages = [SYSTEM] * system
    for question, answer, on in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "weight": int(on)}]
    expected = [(" " if name == "mistral" else "") + answer + ENDS[name] for _, answer, on in turns if on]
    assert said(Template.load(name, spec).encode(messages), spec) == expected


def test_turns_can_be_switched_off(spec):
    template = Template.load("chatml", spec)
    first, last = ["Hello, you!<|im_end|>"], ["Good bye. \U0001f600<|im_end|>"]
    assert said(template.encode(TALK, train_on="last"), spec) == last
    assert said(template.encode([*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]), spec) == last
    assert said(template.encode([*TALK[:4], {**TALK[4], "train": False}]), spec) == first
    assert said(template.encode([*TALK[:4], {**TALK[4], "train": False}], train_on="last"), spec) == []
    assert template.encode([*TALK[:4], {**TALK[4], "weight": 0}]).ids == template.encode(TALK).ids


def test_contents_in_parts_and_arguments_as_text(spec):
    template = Template.load("chatml", spec)
    parts = [*TALK[:2], {"role": "assistant", "content": [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "you!"}]}, *TALK[3:]]
    assert template.encode(parts) == template.encode(TALK)
    quoted = json.loads(json.dumps(TOOL_TALK))
    quoted[2]["tool_calls"] = [{"function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]
    quoted[2]["content"] = None
    assert template.encode(quoted, TOOLS) == template.encode(TOOL_TALK, TOOLS)


# --- templates without marks ------------------------------------------------------------------------------------------


def template_of(tmp_path, text, spec) -> Template:
    (tmp_path / "own.jinja").write_text(text)
    return Template.load(str(tmp_path / "own.jinja"), spec)


def test_a_template_that_rewrites_earlier_turns_is_refused_but_for_the_last(spec):
    template = Template.load(trl_template("qwen3"), spec)
    thinking = [TALK[1], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello"}, TALK[3], {"role": "assistant", "content": "Bye"}]
    with pytest.raises(DataError, match=r"qwen3\.jinja: the turn of message 2 .*otherwise when more messages follow.*generation.*train_on=last"):
        template.encode(thinking)
    assert said(template.encode(thinking, train_on="last"), spec) == ["<think>\n\n</think>\n\nBye<|im_end|>"]
    assert said(template.encode(thinking[:2]), spec) == ["<think>\nHm.\n</think>\n\nHello<|im_end|>"]


@pytest.mark.parametrize("text, error", [
    ("{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}", "writes a header before it"),
    ("{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}{{ eos_token }}{% if add_generation_prompt %}assistant:{% endif %}",
     "the text before it, with the generation prompt"),
    ("{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}assistant:{% else %}{{ eos_token }}{% endif %}", "otherwise when more messages follow"),
    ("{% if messages | length == 3 %}{{ raise_exception('three is odd') }}{% endif %}"
     "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}assistant:{% endif %}", "cannot be found in the text.*three is odd"),
    ("{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% else %}<|im_end|>{% endif %}{% endfor %}", "writes a header"),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "5 {% generation %} blocks for 2 turns"),
    ("{% for m in messages if m.role == 'assistant' %}{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
     "{{ x | length }}{{ x }}{% endfor %}", "changed after them"),
    ("{% for m in messages if m.role == 'assistant' %}{% generation %}{% endgeneration %}{% endfor %}", "leaves out the content of message 3"),
])
def test_no_mask_is_guessed(spec, tmp_path, text, error):
    with pytest.raises(DataError, match=f"own.jinja.*{error}" if "cannot be found" not in error else error):
        template_of(tmp_path, text, spec).encode(TALK)


def test_a_template_without_generation_prompt_or_header(spec, tmp_path):
    """Mistral's way: the answer follows the question at once, its space included."""
    template = template_of(tmp_path, "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == "
                           "'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}", spec)
    assert said(template.encode(TALK), spec) == [" Hello, you!</s>", " Good bye. \U0001f600</s>"]


def test_white_space_stays_where_no_special_token_ends_a_turn(spec, tmp_path):
    template = template_of(tmp_path, "{% for m in messages %}{{ m.role }}:{{ m.content }}\n\n{% endfor %}"
                           "{% if add_generation_prompt %}assistant:{% endif %}", spec)
    assert said(template.encode(TALK), spec)[0] == "Hello, you!\n\n"


def test_white_space_behind_an_end_token_is_not_said(spec, tmp_path):
    """Also where the marks of a template take it in."""
    template = template_of(tmp_path, "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
                           "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}", spec)
    assert said(template.encode(TALK), spec) == ["Hello, you!<|im_end|>", "Good bye. \U0001f600<|im_end|>"]


def test_a_token_belongs_to_the_turn_in_which_it_begins(tmp_path):
    """Merges across both borders of an answer: x|ab|y with the tokens xa and by."""
    from tokenizers import Tokenizer, models

    letters = {letter: number for number, letter in enumerate("qxaby")}
    Tokenizer(models.BPE({**letters, "xa": 5, "by": 6}, [("x", "a"), ("b", "y")])).save(str(tmp_path / "tokenizer.json"))
    template = template_of(tmp_path, "{% for m in messages %}{% if m.role == 'user' %}q{% else %}x{% generation %}{{ m.content }}{% endgeneration %}y"
                           "{% endif %}{% endfor %}", f"hf:{tmp_path}")
    user = {"role": "user", "content": "q"}
    encoded = template.encode([user, {"role": "assistant", "content": "ab"}])
    assert (encoded.ids, encoded.mask, encoded.num_cut) == ([0, 5, 6], [False, False, True], 1)
    encoded = template.encode([user, {"role": "assistant", "content": "ba"}])
    assert (encoded.ids, encoded.mask, encoded.num_cut) == ([0, 1, 3, 2, 4], [False, False, True, True, False], 0)
    with pytest.raises(DataError, match="message 2 has no token of its own"):
        template.encode([user, {"role": "assistant", "content": "a"}])


# --- tokenizers of other kinds ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other_specs(tmp_path_factory):
    import base64

    import sentencepiece

    folder = tmp_path_factory.mktemp("others")
    sentences = iter(["Hello there you Good bye And now Be brief user assistant system"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(folder / "sp"), vocab_size=300,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    tokens = [bytes([b]) for b in range(256)] + [b"He", b"ll", b"Hell"]
    (folder / "ranks.tiktoken").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return {"bytes": "bytes", "sentencepiece": f"sentencepiece:{folder}/sp.model", "tiktoken": f"tiktoken:{folder}/ranks.tiktoken"}


@pytest.mark.parametrize("kind, eod", [("bytes", "<eod>"), ("sentencepiece", "</s>"), ("tiktoken", "<|endoftext|>")])
def test_tags_serve_every_tokenizer(other_specs, kind, eod):
    spec = other_specs[kind]
    from data_tools.tokenizer import load_tokenizer

    encoded, plain = Template.load("tags", spec).encode(TALK), load_tokenizer(spec)
    found = [(ids[-1], plain.decode(ids[:-1])) for ids in runs(encoded)]
    assert found == [(plain.eod_id, "Hello, you!"), (plain.eod_id, "Good bye. \U0001f600")]
    assert encoded.ids.count(plain.eod_id) == 2
    assert encoded.ids[:5] == plain.encode("<|system|>\nBe brief.")[:5]


@pytest.mark.parametrize("kind", ["hf", "bytes", "sentencepiece", "tiktoken"])
def test_starts_are_where_tokens_begin(other_specs, spec, kind):
    """Each stretch of text between two starts is what the tokens that begin there decode to."""
    from data_tools.tokenizer import load_tokenizer

    own = spec if kind == "hf" else other_specs[kind]
    tokenizer, plain = load_offsets(own), load_tokenizer(own)
    text = f"Hello, é\U0001f600 you{tokenizer.eos}  now?\n\nx{tokenizer.eos}"
    ids, starts = tokenizer.encode(text)
    assert starts == sorted(starts) and starts[0] == 0
    borders = sorted({*starts, len(text)})
    for begin, end in zip(borders, borders[1:]):
        piece = [token for token, start in zip(ids, starts) if start == begin]
        decoded = tokenizer.eos if piece == [plain.eod_id] and kind == "sentencepiece" else plain.decode(piece)
        assert decoded == text[begin:end] if kind != "sentencepiece" else decoded.strip() == text[begin:end].strip()
    assert ids.count(plain.eod_id) == 2


def test_tokens_that_a_template_needs_must_be_there(tmp_path, other_specs):
    plain = write_tokenizer(tmp_path / "plain", specials=("</s>", "<s>"))
    with pytest.raises(DataError, match=r"chatml needs the special tokens <\|im_start\|>, <\|im_end\|>.*chat.add_tokens=.*tags"):
        Template.load("chatml", plain)
    with pytest.raises(DataError, match="only hf: tokenizers take more tokens.*chat.template=tags"):
        extended_tokenizer("bytes", ["<|im_start|>"], tmp_path / "more")
    nameless = write_tokenizer(tmp_path / "nameless", specials=("<|im_end|>",), config={})
    with pytest.raises(DataError, match="names none; set eos_token"):
        Template.load("tags", nameless)


def test_added_tokens(tmp_path):
    plain = write_tokenizer(tmp_path / "plain", specials=("</s>", "<s>"))
    before = load_offsets(plain).vocab_size
    more = extended_tokenizer(plain, ["<|im_start|>", "<|im_end|>", "</s>"], tmp_path / "more")
    assert more == f"hf:{tmp_path / 'more'}" and load_offsets(more).vocab_size == before + 2
    assert load_offsets(more).eos == "</s>"
    assert extended_tokenizer(more, ["<|im_start|>", "<|im_end|>"], tmp_path / "again") == more and not (tmp_path / "again").exists()
    assert said(Template.load("chatml", more).encode(TALK), more)[0] == "Hello, you!<|im_end|>"
    text = "Hello, you! Good bye."
    assert load_offsets(more).encode(text) == load_offsets(plain).encode(text)


# --- where templates come from, and what is refused -------------------------------------------------------------------


def test_the_tokenizers_own_template(tmp_path):
    marked = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}NAME {{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    spec = write_tokenizer(tmp_path, config={"chat_template": [{"name": "default", "template": marked.replace("NAME", "plain")},
                                                               {"name": "tool_use", "template": marked.replace("NAME", "tools")}]})
    assert said(Template.load("", spec).encode(TALK[:3]), spec) == ["plain Hello, you!"]
    assert said(Template.load("", spec).encode(TALK[:3], TOOLS), spec) == ["tools Hello, you!"]
    (tmp_path / "chat_template.jinja").write_text(marked.replace("NAME", "file"))
    assert said(Template.load("", spec).encode(TALK[:3]), spec) == ["file Hello, you!"]
    write_tokenizer(tmp_path / "bare")
    for spec, error in ((f"hf:{tmp_path / 'bare'}", "has no chat template"), ("bytes", "carries no chat template")):
        with pytest.raises(DataError, match=f"{error}.*chatml, llama3, mistral, tags"):
            Template.load("", spec)
    with pytest.raises(DataError, match="neither a file nor one of chatml"):
        Template.load("chatlm", "bytes")


@pytest.mark.parametrize("messages, error", [
    ([], "at least one message"),
    ("Hi", "messages is not a list"),
    (TALK[:2], "no message of role assistant"),
    ([{"role": "bot", "content": "x"}], "message 1 has role 'bot', expected one of system, user, assistant, tool"),
    ([{"content": "x"}], "message 1 has role None"),
    (["x"], "message 1 is a str"),
    ([{"role": "user", "content": 3}], "message 1 has content that is neither"),
    ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has content that is neither"),
    ([{"role": "user"}], "message 1 of role user has no content"),
    ([TALK[1], {**TALK[2], "weight": 0.5}], "message 2 has weight=0.5"),
    ([TALK[1], {"role": "assistant", "tool_calls": [{"function": {}}]}], "message 2 has a tool call without a function name"),
    ([TALK[1], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
     "message 2: the arguments of the call to f are not JSON"),
    ([TALK[1], SYSTEM, TALK[2]], None),
])
def test_messages_that_are_refused(spec, messages, error):
    if error:
        with pytest.raises(DataError, match=error):
            Template.load("chatml", spec).encode(messages)
    else:
        Template.load("chatml", spec).encode(messages)      # ChatML has a place for it,
        with pytest.raises(DataError, match="chat template mistral failed: a system message after the first user"):      # Mistral has none
            Template.load("mistral", spec).encode(messages)


def test_a_call_needs_no_wrapping(spec):
    bare = [TALK[1], {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}]
    wrapped = [TALK[1], {"role": "assistant", "content": "", "tool_calls": [call("add", a=1)]}]
    assert Template.load("chatml", spec).encode(bare) == Template.load("chatml", spec).encode(wrapped)


def test_all_special_tokens_are_read_as_such(spec):
    tokenizer = load_offsets(spec)
    for token in SPECIALS:
        assert tokenizer.encode(f"a{token}b")[0][1:-1] == [tokenizer.specials[token]]
