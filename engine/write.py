"""A model that writes: texts or conversations in, answers out; launch/generate.py's three ways to ask.

    writer = Writer(run, args, has_messages=False)         # on every rank; args: the command's
    answer_prompt(writer, "def main():")                   # streams to rank 0's terminal
    answer_file(writer, read_lines("prompts.jsonl"), "answers.jsonl")
    converse(writer)                                       # lines of the terminal, until it ends

Left out: drawing (engine/mcore/generate.py), and which model (launch/generate.py).
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from data_tools.tokenizer import load_tokenizer
from engine.config import ConfigError
from engine.data.chat import Template
from engine.data.offsets import load_offsets
from engine.hf import FAMILIES
from engine.hf.load import open_hf
from engine.mcore import topology
from engine.mcore.fill import fill
from engine.mcore.run import ParallelModel
from engine.sampling import Sampling, Text
from engine.score import Scoring
from engine.stage import Role
from engine.train import Trainer


class Writer:
    """A model on its ranks, and the tokenizer and the template it was trained with."""

    def __init__(self, run, args, has_messages: bool):
        if run.model.head != "tokens":
            raise ConfigError([f"{args.model} is a reward model, which says no tokens; launch/score.py runs it"])
        if not run.data.tokenizer:
            raise ConfigError([f"{args.model} names no tokenizer; give one: --tokenizer hf:DIR"])
        self.args, self.run = args, run
        self.tokenizer, self.reader = load_tokenizer(run.data.tokenizer), load_offsets(run.data.tokenizer)
        self.template = Template.load(run.chat.template, run.data.tokenizer) if args.chat or has_messages else None
        eod = run.data.eod_id if run.data.eod_id >= 0 else self.tokenizer.eod_id
        self.begin = self._begin_of_text()
        self.nothing = [] if eod is None else [eod]  # what stands for no text: in a corpus a document begins behind the end of another
        self.stop_tokens = {*self.nothing, *self._end_of_turn(), *self._own_ends()}
        self.sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty,
                                 tuple(sorted(self.stop_tokens)), tuple(args.stop), args.seed)
        self.model = _network(run, args)
        self.place = self.model.topology

    def decode(self, ids: list[int]) -> str:
        """A model may have more ids than its tokenizer; those mean nothing."""
        return self.tokenizer.decode([number for number in ids if number < self.tokenizer.vocab_size])

    def _begin_of_text(self) -> list[int]:
        """What a Hugging Face tokenizer puts before every text; the corpora that checkpoints of ours were trained on have nothing there."""
        file = Path(self.run.data.tokenizer.removeprefix("hf:"), "tokenizer.json")
        if not self.args.is_hf or not file.is_file():
            return []
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file)).encode("").ids[:1]

    def _end_of_turn(self) -> list[int]:
        """The special token with which the chat template ends what the assistant says, if it is one."""
        if not self.template:
            return []
        turn = self.template.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        last = [token for token, is_said in zip(turn.ids, turn.mask) if is_said][-1]
        return [last] if last in self.reader.specials.values() else []

    def _own_ends(self) -> list[int]:
        """What a Hugging Face folder lists as ends, more than one where turns end otherwise than documents."""
        found = []
        for name in ("config.json", "generation_config.json") if self.args.is_hf else ():
            file = Path(self.args.model, name)
            ends = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
            found += ends if isinstance(ends, list) else [] if ends is None else [ends]
        return found

    def ids(self, asked: str | list[dict]) -> list[int]:
        """Tokens of a text to go on with, or of messages to answer."""
        if isinstance(asked, list):
            return self.template.prompt(asked)
        if self.args.chat:
            return self.template.prompt([{"role": "user", "content": asked}])
        return self.begin + self.reader.encode(asked)[0] or self.nothing

    def write(self, asked: list, on_text=None) -> list[tuple[str, str]]:
        """(text, reason) of --samples answers to each text or list of messages; on every rank. on_text: called with parts of the first answer."""
        prompts = [ids for ids in map(self.ids, asked) for _ in range(self.args.samples)]
        share = -(-len(prompts) // self.place.dp)
        own = range(min(self.place.dp_rank * share, len(prompts)), min((self.place.dp_rank + 1) * share, len(prompts)))
        shown = Text(self.decode)

        def on_token(row: int, token: int) -> None:
            if row == 0 and token not in self.stop_tokens:
                on_text(shown.add(token))

        answers = self.model.generate([prompts[row] for row in own], self.sampling, list(own), self.decode, on_token if on_text else None, self.args.batch)
        if on_text:
            on_text(shown.rest())
        return self.model.gathered(lambda: [(self.text(answer), answer.reason) for answer in answers])

    def text(self, answer) -> str:
        """What was said, without the token that ended it."""
        return self.decode(answer.tokens[:-1] if answer.tokens[-1] in self.stop_tokens else answer.tokens)


def _network(run, args):
    """The model with its weights, spread over the ranks as run.parallel says."""
    place = topology.start(run)
    if not args.is_hf:
        return Trainer(run, Scoring("tokens"), place).frozen()
    model = ParallelModel(run, place, Scoring("tokens"), "policy", Role(train=False))
    fill(model, dict(FAMILIES[run.model.family].from_hf(run.model, open_hf(args.model, drop_mtp=True)[1])))
    return model


# --- the three ways to ask ---------------------------------------------------------------------------------------------


def say(place, text: str) -> None:
    if place.rank == 0:
        print(text, end="", flush=True)


def answer_prompt(writer: Writer, asked: str | list[dict]) -> str:
    """Print the answers to one text or conversation; the first appears as it is drawn. Returns it."""
    found = writer.write([asked], lambda text: say(writer.place, text))
    for text, _ in found[1:]:
        say(writer.place, f"\n---\n{text}")
    say(writer.place, "\n")
    return found[0][0]


def answer_file(writer: Writer, lines: list[dict], target: str) -> None:
    """Write `target`, the lines with their answers; it appears when it is whole."""
    found = writer.write([_asked(line) for line in lines])
    if writer.place.rank:
        return
    temporary, samples = Path(f"{target}.tmp{os.getpid()}"), writer.args.samples
    with open(temporary, "w", encoding="utf-8") as out:
        for i, line in enumerate(lines):
            texts, reasons = zip(*found[i * samples:(i + 1) * samples])
            added = {"answer": texts[0], "reason": reasons[0]} if samples == 1 else {"answers": texts, "reasons": reasons}
            out.write(json.dumps({**line, **added}, ensure_ascii=False) + "\n")
    os.replace(temporary, target)


def read_lines(source: str) -> list[dict]:
    """The lines of a file of prompts. Raises ValueError for one that asks nothing."""
    found = []
    for number, text in enumerate(Path(source).read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source}, line {number} is not JSON: {error}") from None
        if not isinstance(line, dict) or not isinstance(_asked(line), (str, list)):
            raise ValueError(f'{source}, line {number} has neither "prompt", a text, nor "messages", a list')
        found.append(line)
    return found


def _asked(line: dict) -> str | list[dict]:
    return line.get("messages", line.get("prompt"))


def converse(writer: Writer) -> None:
    """Answer lines of the terminal until it ends; with --chat each line belongs to one conversation."""
    messages = []
    while True:
        line = [_read_line() if writer.place.rank == 0 else None]
        dist.broadcast_object_list(line, src=0)
        if line[0] is None:
            return
        if not writer.args.chat:
            answer_prompt(writer, line[0])
            continue
        messages.append({"role": "user", "content": line[0]})
        messages.append({"role": "assistant", "content": answer_prompt(writer, messages)})


def _read_line() -> str | None:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None
