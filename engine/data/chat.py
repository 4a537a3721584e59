"""Conversations to tokens, and which of them the assistant said.

    template = Template.load("chatml", "hf:work/tokenizer")
    encoded = template.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    encoded.ids, encoded.mask                    # list[int], list[bool]: True on "Hello<|im_end|>"

A conversation is rendered once by its jinja template and tokenized once as a whole, so tokens are what inference sees. The turns of the
assistant are found as characters of the rendered text, by one of two ways:
  marks      templates with {% generation %} ... {% endgeneration %} around what the assistant says, its end token included (all of ours);
  prefixes   other templates: the text up to the turn, with the generation prompt, and the text up to its end must both be beginnings of
             the whole text. Where they are not (a template that writes earlier turns otherwise), the template is refused for this
             conversation; no mask is guessed. White space after the special token that ends a turn does not belong to it.
A token belongs to the turn in which its first character stands: one that begins in the header is not trained, because the prompt of
inference would have cut it, and one that begins in the turn is.

Templates come with models and are code: jinja's immutable sandbox runs them, and who takes them from others calls `encode` in a worker
of engine/data/sandbox.py, which also bounds time and memory (engine/data/conversations.py does). Nothing is compiled before the first
call, so `load` runs no such code. Left out: images and sound in messages, reasoning fields beyond what a template itself reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

from engine.data.indexed import DataError
from engine.data.offsets import OffsetTokenizer, load_offsets, read_json

ROLES = ("system", "user", "assistant", "tool")
BUILT_IN = {      # name: the special tokens that its text needs
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "tags": (),
}
CURE = "put {% generation %} ... {% endgeneration %} around what the assistant says in a copy of the template and name that file in chat.template"


@dataclass(frozen=True)
class Encoded:
    """Tokens of a conversation; mask: True on those that the assistant said, the token that ends each turn included.

    num_cut: turns whose first word hangs on a token that begins in the header, and so is not trained.
    """

    ids: list[int]
    mask: list[bool]
    num_cut: int = 0


@dataclass(frozen=True)
class Template:
    """name: for errors. sources: template text by name, "default" and perhaps "tool_use", which serves conversations with tools."""

    name: str
    sources: Mapping[str, str]
    tokenizer: OffsetTokenizer

    @classmethod
    def load(cls, spec: str, tokenizer_spec: str) -> Template:
        """spec as in Chat.template: empty (the tokenizer's own), the name of one of ours, or a .jinja file.

        Raises DataError when there is no such template, and when a template of ours needs special tokens that the tokenizer lacks.
        """
        tokenizer = load_offsets(tokenizer_spec)
        if spec in BUILT_IN:
            _check_tokens(spec, tokenizer, tokenizer_spec)
        if spec:
            return cls(f"chat template {spec}", {"default": source_of(spec)}, tokenizer)
        return cls(f"the chat template of {tokenizer_spec}", _own_templates(tokenizer_spec), tokenizer)

    def encode(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, train_on: Literal["all", "last"] = "all") -> Encoded:
        """messages: dicts with role and content, as in a chat API: content a string or text parts, assistants perhaps with tool_calls.

        "weight": 0 or "train": false in a message of the assistant switches it off; train_on last keeps only the last one.
        Raises DataError for messages that are malformed, for a template that fails on them, and where no exact mask can be had.
        """
        messages, on = _checked(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError("no message of role assistant, so there is nothing to learn; leave the conversation out")
        wanted = [i for i in (turns if train_on == "all" else turns[-1:]) if on[i]]
        kind = self._kind(tools)
        compiled = self._compiled(kind)
        text = self._render(compiled, messages, tools)
        find = self._marked if "endgeneration" in self.sources[kind] else self._prefixed
        spans = list(find(compiled, messages, tools, text, turns, wanted))
        ids, starts = self.tokenizer.encode(text)
        mask, num_cut = [False] * len(ids), 0
        for turn, begin, end in spans:
            end = begin + len(self._without_trailing_space(text[begin:end]))
            self._check_said(messages[turn], turn, text[begin:end])
            first, last = bisect_left(starts, begin), bisect_left(starts, end)
            if first == last:
                raise DataError(f"{self.name}: the turn of message {turn + 1} has no token of its own; {CURE}")
            mask[first:last] = [True] * (last - first)
            num_cut += bool(text[begin:starts[first]].strip())
        return Encoded(ids, mask, num_cut)

    def prompt(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None) -> list[int]:
        """Tokens of a conversation that the assistant is to go on: the generation prompt stands at the end. Errors as encode."""
        messages, _ = _checked(messages)
        compiled = self._compiled(self._kind(tools))
        return self.tokenizer.encode(self._render(compiled, messages, tools, add_generation_prompt=True))[0]

    # --- rendering --------------------------------------------------------------------------------------------------

    def _kind(self, tools) -> str:
        return "tool_use" if tools and "tool_use" in self.sources else "default"

    def _compiled(self, kind: str):
        if kind not in self._cache:
            self._cache[kind] = self._guarded(lambda: _environment().from_string(self.sources[kind]), "cannot be read")
        return self._cache[kind]

    @cached_property
    def _cache(self) -> dict:
        return {}

    def _render(self, compiled, messages, tools, marks: tuple[str, str] = ("", ""), **flags) -> str:
        compiled.environment.marks = marks
        values = {"documents": None, "add_generation_prompt": False, **self.tokenizer.variables, **flags}
        return self._guarded(lambda: compiled.render(messages=messages, tools=tools or None, **values), "failed")

    def _guarded(self, act, what: str):
        """act(), whatever a template may raise told as a DataError."""
        try:
            return act()
        except MemoryError:
            raise      # for the worker, which knows the limit
        except RecursionError:
            raise DataError(f"{self.name} {what}: it calls itself without end; mend it") from None
        except Exception as error:
            line = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""
            raise DataError(f"{self.name} {what}: {error or type(error).__name__}{line}") from None

    # --- finding turns: (message number, first character, character after the last) -----------------------------------

    def _marked(self, compiled, messages, tools, text, turns, wanted):
        marks = _unused(text)
        marked = self._render(compiled, messages, tools, marks)
        spans, plain = _split_marks(marked, marks)
        if plain != text:
            raise DataError(f"{self.name}: the text of {{% generation %}} blocks is changed after them; apply filters inside the block instead")
        if len(spans) != len(turns):
            raise DataError(f"{self.name} has {len(spans)} {{% generation %}} blocks for {len(turns)} turns of the assistant; "
                            "put exactly one around each turn")
        return [(turn, *span) for turn, span in zip(turns, spans) if turn in wanted]

    def _prefixed(self, compiled, messages, tools, text, turns, wanted):
        for turn in wanted:
            try:
                before = self._render(compiled, messages[:turn], tools, add_generation_prompt=True)
                until = self._render(compiled, messages[:turn + 1], tools)
            except DataError as error:
                raise DataError(f"the turn of message {turn + 1} cannot be found in the text, because a part of the conversation does not "
                                f"render: {error}; {CURE}") from None
            if not until.startswith(before):
                raise self._unstable(turn, "the text before it, with the generation prompt, is not how the text with the turn begins")
            until = before + self._without_trailing_space(until[len(before):])
            if not text.startswith(until):
                raise self._unstable(turn, "the template writes it otherwise when more messages follow", ", or set chat.train_on=last")
            if before == self._render(compiled, messages[:turn], tools) and not self._is_without_header(compiled, messages[:turn], tools, before):
                raise self._unstable(turn, "the template writes a header before it, but none when asked for a generation prompt")
            yield turn, len(before), len(until)

    def _without_trailing_space(self, text: str) -> str:
        stripped = text.rstrip()
        return stripped if stripped.endswith(tuple(self.tokenizer.specials)) else text

    def _is_without_header(self, compiled, messages, tools, before: str) -> bool:
        """Does a turn begin with its content, after white space at most? Asked of templates that know no generation prompt."""
        probe = self._render(compiled, [*messages, {"role": "assistant", "content": "probe"}], tools)
        return probe.startswith(before) and probe[len(before):].lstrip().startswith("probe")

    def _unstable(self, turn: int, why: str, cure: str = "") -> DataError:
        return DataError(f"{self.name}: the turn of message {turn + 1} cannot be told from its surroundings exactly ({why}); {CURE}{cure}")

    def _check_said(self, message: dict, turn: int, said: str) -> None:
        words = message["content"].split()[-1:]
        if words and words[0] not in said:
            raise DataError(f"{self.name} leaves out the content of message {turn + 1}, as some do beside tool calls, or where they want content as "
                            "a list of parts; name another template in chat.template")


def source_of(spec: str) -> str:
    """The text of one of our templates, or of a .jinja file. Raises DataError when there is none."""
    if spec in BUILT_IN:
        return _read(Path(__file__).parent / "templates" / f"{spec}.jinja")
    if not Path(spec).is_file():
        raise DataError(f"chat.template={spec} is neither a file nor one of {', '.join(BUILT_IN)}; check the path")
    return _read(Path(spec))


def extended_tokenizer(spec: str, tokens: Sequence[str], folder: str | Path) -> str:
    """The spec of this tokenizer with more special tokens, written to `folder`; `spec` itself when it has them all.

    Safe when several processes call it at once: they write the same, and the rename is atomic. Raises DataError for other kinds than hf.
    """
    tokenizer = load_offsets(spec)
    missing = [token for token in dict.fromkeys(tokens) if token not in tokenizer.specials]
    if not missing:
        return spec
    if not spec.startswith("hf:"):
        raise DataError(f"chat.add_tokens={missing}: only hf: tokenizers take more tokens, but data.tokenizer={spec}; use chat.template=tags, "
                        "which needs none")
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as FastTokenizer

    source, folder = Path(spec.removeprefix("hf:")), Path(folder)
    file = source / "tokenizer.json" if source.is_dir() else source
    fast = FastTokenizer.from_file(str(file))
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    folder.mkdir(parents=True, exist_ok=True)
    for other in [*file.parent.glob("*.json"), *file.parent.glob("*.jinja")]:
        if other.name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja"):
            _place(folder / other.name, lambda path, other=other: shutil.copyfile(other, path))
    _place(folder / "tokenizer.json", lambda path: fast.save(str(path)))
    return f"hf:{folder}"


def _place(path: Path, write) -> None:
    """A file that is there whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(descriptor)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)      # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# --- messages ---------------------------------------------------------------------------------------------------------


def _checked(messages) -> tuple[list[dict], list[bool]]:
    """(messages as templates take them, for each whether it may be trained). Raises DataError."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("messages is not a list with at least one message; write [{\"role\": \"user\", \"content\": \"...\"}, ...]")
    pairs = [_checked_message(message, number) for number, message in enumerate(messages, start=1)]
    return [message for message, _ in pairs], [on for _, on in pairs]


def _checked_message(message, number: int) -> tuple[dict, bool]:
    if not isinstance(message, Mapping):
        raise DataError(f"message {number} is a {type(message).__name__}, expected an object with role and content")
    if message.get("role") not in ROLES:
        raise DataError(f"message {number} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}")
    clean = {key: value for key, value in message.items() if key not in ("weight", "train")}
    clean["content"] = _text(message.get("content"), number)
    if message.get("tool_calls"):
        clean["tool_calls"] = [_call(call, number) for call in message["tool_calls"]]
    elif message["role"] != "assistant" and message.get("content") is None:
        raise DataError(f"message {number} of role {message['role']} has no content; give it a string")
    return clean, _is_on(message, number)


def _text(content, number: int) -> str:
    is_parts = isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content)
    text = "".join(part["text"] for part in content) if is_parts else "" if content is None else content
    if isinstance(text, str) and not re.search("[\ud800-\udfff]", text):
        return text
    if isinstance(text, str):
        raise DataError(f"message {number} holds half a character (a lone surrogate, U+D800 to U+DFFF), which is no text; mend or remove it")
    raise DataError(f"message {number} has content that is neither a string nor a list of {{\"type\": \"text\", \"text\": ...}} parts")


def _call(call, number: int) -> dict:
    """A tool call as {"type": "function", "function": {"name", "arguments": object}, ...}; arguments may arrive as JSON text."""
    call = dict(call) if isinstance(call, Mapping) else {}
    function = call.get("function", {key: call[key] for key in ("name", "arguments") if key in call})
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"message {number} has a tool call without a function name; write {{\"function\": {{\"name\": ..., \"arguments\": ...}}}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise DataError(f"message {number}: the arguments of the call to {function['name']} are not JSON: {arguments[:80]!r}") from None
    rest = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    return {**rest, "type": "function", "function": {**function, "arguments": arguments}}


def _is_on(message, number: int) -> bool:
    for key, legal in (("weight", (0, 1)), ("train", (False, True))):
        if message.get(key, 1) not in legal:
            raise DataError(f"message {number} has {key}={message[key]!r}, expected one of {legal}")
    return bool(message.get("weight", 1)) and bool(message.get("train", True))


# --- templates --------------------------------------------------------------------------------------------------------


def _check_tokens(name: str, tokenizer: OffsetTokenizer, spec: str) -> None:
    missing = [token for token in BUILT_IN[name] if token not in tokenizer.specials]
    if missing:
        raise DataError(f"chat template {name} needs the special tokens {', '.join(missing)}, which {spec} lacks; add them with "
                        f"chat.add_tokens={json.dumps(missing)} (hf: tokenizers), or use chat.template=tags")
    if name == "tags" and not tokenizer.eos:
        raise DataError(f"chat template tags ends answers with the end-of-document token, but {spec} names none; set eos_token in its "
                        "tokenizer_config.json")


def _own_templates(spec: str) -> dict[str, str]:
    """The templates of an hf: folder; files go before tokenizer_config.json, as in transformers."""
    where = f"name one of {', '.join(BUILT_IN)} or a .jinja file in chat.template"
    if not spec.startswith("hf:"):
        raise DataError(f"{spec} carries no chat template; {where}")
    path = Path(spec.removeprefix("hf:"))
    folder = path if path.is_dir() else path.parent
    found = read_json(folder / "chat_template.json").get("chat_template") or read_json(folder / "tokenizer_config.json").get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found if isinstance(entry, dict) and {"name", "template"} <= entry.keys()}
    for file in [folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")]:
        if file.is_file():
            found["default" if file.name == "chat_template.jinja" else file.stem] = _read(file)
    if "default" not in found:
        raise DataError(f"{spec} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); {where}")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8; save the template again") from None


def _environment():
    """The environment that templates on model hubs are written for: trimmed blocks, loop controls, plain tojson and two functions."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: its text, between the environment's marks."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

        def _between_marks(self, caller) -> str:
            begin, end = self.environment.marks
            return begin + caller() + end

    def raise_exception(text):
        raise jinja2.TemplateError(text)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    now = datetime.now()      # one moment for all: the parts of a conversation must render alike
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
    environment.marks = ("", "")
    return environment


def _unused(text: str) -> tuple[str, str]:
    """Two characters for private use that the text does not hold."""
    free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
    return next(free), next(free)


def _split_marks(marked: str, marks: tuple[str, str]) -> tuple[list[tuple[int, int]], str]:
    """(the outermost marked spans, as characters of the text without marks; that text)."""
    parts, spans, position, depth, begin = [], [], 0, 0, 0
    for part in re.split(f"([{marks[0]}{marks[1]}])", marked):
        if part == marks[0]:
            begin, depth = (position if depth == 0 else begin), depth + 1
        elif part == marks[1]:
            depth -= 1
            spans += [(begin, position)] if depth == 0 else []
        else:
            parts.append(part)
            position += len(part)
    return spans, "".join(parts)
