"""Do two implementations of one model agree? Prompts, what transformers says to them, and the verdict.

    questions = prompts(model, tokenizer)                     # a few rows of token ids
    theirs = answers(transformers_network(folder), questions)
    print(Verdict(answers(ours, questions), theirs, tolerance=1e-4).table())

A network here is a function from token ids [1, s] to logits [1, s, vocab]. Everything in fp32 on the CPU, so that a wrong name map
(differences of order 1) stands far above rounding (order 1e-6).
Left out: the engine's network, which comes from engine/mcore, and any judgement of the model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config import Model
from engine.hf.fields import HFError, head_of
from engine.hf.load import mtp_prefixes, read_json

TOLERANCE = 1e-4


NUM_NEW = 12  # tokens that both go on with
TEXTS = ("The capital of France is", "def main():\n", "1, 2, 3, 4,")

Network = Callable[[Tensor], Tensor]


def prompts(model: Model, num_prompts: int = 4, num_tokens: int = 48) -> Tensor:
    """Random token ids [num_prompts, s] over the whole vocabulary, the same on every call; s stays within model.max_position."""
    length = min(num_tokens, model.max_position or num_tokens)
    return torch.randint(model.vocab_size, (num_prompts, length), generator=torch.Generator().manual_seed(0))


def questions(model: Model, tokenizer: str = "") -> list[Tensor]:
    """Rows of token ids [1, s]: those of `prompts`, and TEXTS where `tokenizer` is a folder or file with a tokenizer.json of this vocabulary."""
    found = list(prompts(model).split(1))
    file = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    if not tokenizer or not file.is_file():
        return found
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(file))
    texts = [encoder.encode(text).ids for text in TEXTS]
    return found + [torch.tensor([ids]) for ids in texts if ids and max(ids) < model.vocab_size and len(ids) + NUM_NEW <= (model.max_position or 2**31)]


@dataclass(frozen=True)
class Answer:
    """What a network says to one row of ids: logits [s, vocab] for the row, and the tokens it goes on with, for which the second half of a long
    row makes room."""

    logits: Tensor
    greedy: list[int]
    gaps: Tensor
    """[num_new, vocab]: how far each token's logit lies below the greatest, where each of `greedy` was chosen."""


@torch.no_grad()
def answers(network: Network, rows: list[Tensor]) -> list[Answer]:
    """The Answer to each row [1, s], one row at a time; a scalar head goes on with nothing."""
    found = []
    for row in rows:
        logits, ids, gaps = network(row)[0].float(), row if row.size(1) <= NUM_NEW else row[:, :-NUM_NEW], []
        if logits.size(-1) == 1:
            found.append(Answer(logits, [], torch.empty(0, 1)))
            continue
        for _ in range(NUM_NEW if row.size(1) > NUM_NEW else min(NUM_NEW, row.size(1))):
            last = network(ids)[0, -1].float()
            gaps.append(last.max() - last)
            ids = torch.cat([ids, last.argmax().view(1, 1)], dim=1)
        found.append(Answer(logits, ids[0, -len(gaps):].tolist(), torch.stack(gaps)))
    return found


class Verdict:
    """Two networks' answers to the same rows, compared. Raises HFError when the logits' shapes differ.

    tolerance: largest difference of logits as a share of the largest logit. Greedy tokens must be equal, except from a place on where the two
    choices lie closer together than rounding within the tolerance can tell.
    """

    def __init__(self, ours: list[Answer], theirs: list[Answer], tolerance: float = TOLERANCE, who: str = "engine and transformers"):
        self.tolerance, self.who, self.rows = tolerance, who, []
        for one, other in zip(ours, theirs, strict=True):
            if one.logits.shape != other.logits.shape:
                raise HFError(f"the engine gives logits of shape {list(one.logits.shape)}, transformers {list(other.logits.shape)}")
        self.scale = max(answer.logits.abs().max().item() for answer in theirs)
        self.worst = max((one.logits - other.logits).abs().max().item() for one, other in zip(ours, theirs))
        for one, other in zip(ours, theirs):
            same = next((i for i, pair in enumerate(zip(one.greedy, other.greedy)) if pair[0] != pair[1]), len(one.greedy))
            is_tie = same < len(one.greedy) and max(one.gaps[same][other.greedy[same]], other.gaps[same][one.greedy[same]]) <= 2 * tolerance * self.scale
            difference = (one.logits - other.logits).abs().max().item()
            top = (one.logits.argmax(-1) == other.logits.argmax(-1)).float().mean().item()
            self.rows.append((len(one.logits), difference, top, same, len(one.greedy), is_tie))

    @property
    def agrees(self) -> bool:
        return self.worst <= self.tolerance * self.scale and all(same == total or is_tie for *_, same, total, is_tie in self.rows)  # NaN fails too

    def __str__(self) -> str:
        """A sentence for the model card."""
        num_tokens, greedy = sum(row[0] for row in self.rows), sum(row[3] for row in self.rows)
        return (f"logits of {self.who} differ by at most {self.worst:.2e} over {len(self.rows)} prompts of {num_tokens} tokens (largest logit "
                f"{self.scale:.3g}, tolerance {self.tolerance:g} of it); {greedy} of {sum(row[4] for row in self.rows)} greedy tokens equal")

    def table(self) -> str:
        """One line per prompt."""
        lines = ["prompt  tokens  largest difference  most probable token equal  greedy tokens equal"]
        for number, (tokens, difference, top, same, total, is_tie) in enumerate(self.rows, 1):
            greedy = f"{same} of {total}" + (", then a tie" if is_tie else "")
            lines.append(f"{number:>6}  {tokens:>6}  {difference:>18.2e}  {100 * top:>24.1f}%  {greedy:>19}")
        return "\n".join(lines)

    def check(self) -> str:
        """The sentence; HFError where they do not agree."""
        if not self.agrees:
            raise HFError(f"{self}\n{self.table()}")
        return str(self)


def transformers_network(folder: str | Path, adapter: str | Path | None = None, allow_pickle: bool = False,
                         rounded: torch.dtype | None = None) -> Network:
    """The model in `folder`, with PEFT's adapter of the folder `adapter` if there is one, by transformers; a classifier gives its number at each
    token, [b, s, 1].

    rounded: the weights go through this dtype. Tensors of modules for further tokens may lie in the folder; transformers does not load them with the model.
    No code from the folder is run. Raises HFError when transformers finds a tensor missing, unexpected or of another shape.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    except ImportError as error:
        raise HFError(f"comparing logits needs transformers ({error}); install it: pip install transformers") from None
    config = read_json(Path(folder) / "config.json")
    is_classifier, further = head_of(config) == "scalar", mtp_prefixes(config)
    loader = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(folder, dtype=torch.float32, use_safetensors=None if allow_pickle else True, local_files_only=True,
                                             trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # whatever a config.json makes transformers raise: it has many kinds
        raise HFError(f"transformers does not load {folder} ({type(error).__name__}: {error}); mend the folder, or leave the comparison out: "
                      "--no-verify") from error
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not name.startswith(further)]
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise HFError(f"transformers does not load {folder} cleanly: {wrong}")
    if rounded:
        with torch.no_grad():
            for parameter in model.parameters():  # not buffers, which keep fp32 in every dtype
                parameter.copy_(parameter.to(rounded))
    if adapter:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise HFError(f"comparing logits of adapters needs peft ({error}); install it: pip install peft") from None
        model = PeftModel.from_pretrained(model, adapter).get_base_model()  # with the adapters in its layers
    model.eval()
    if is_classifier:
        return lambda tokens: model.score(model.base_model(tokens).last_hidden_state).float()
    return lambda tokens: model(tokens).logits.float()


@torch.no_grad()
def transformers_logits(folder: str | Path, tokens: Tensor) -> Tensor:
    """Logits [b, s, vocab] in fp32 of the model in `folder` for tokens [b, s], by transformers (values [b, s, 1] of a classifier)."""
    return transformers_network(folder)(tokens)


def agreement(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE, who: str = "engine and transformers") -> str:
    """A sentence; HFError when the largest difference exceeds tolerance * the largest logit.

    ours, theirs: fp32 logits [b, s, vocab]; who they are.
    """
    if ours.shape != theirs.shape:
        raise HFError(f"the engine gives logits of shape {list(ours.shape)}, transformers {list(theirs.shape)}")
    scale, worst = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    sentence = (f"logits of {who} differ by at most {worst:.2e} over {ours.shape[0]} prompts of {ours.shape[1]} "
                f"tokens (largest logit {scale:.3g}, tolerance {tolerance:g} of it)")
    if not worst <= tolerance * scale:  # so that NaN fails too
        raise HFError(sentence)
    return sentence
