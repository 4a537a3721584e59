"""How answers are drawn, and what comes back: the words that stages, launch/generate.py and engine/mcore/generate.py share.

    answers = model.generate(prompts, Sampling(max_new_tokens=64, temperature=0.0, stop_tokens=(2,)))

Left out: drawing itself (engine/mcore/generate.py). This module needs no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sampling:
    """One way to draw tokens from logits z. In this order: repetition penalty, division by the temperature, top-k, top-p, min-p."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the most probable token (of equal ones, the lowest)."""
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach this sum (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least this share as probable as the best (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens seen already (arXiv 1909.05858); 1 is off."""
    stop_tokens: tuple[int, ...] = ()
    """A row ends with any of these, which stays in its answer."""
    stop_texts: tuple[str, ...] = ()
    """A row ends with the token that completes any of these in the answer's text; needs `decode`."""
    seed: int = 0
    """With a row's key and the place of the token it alone decides what is drawn: neither the layout nor the other rows do."""


@dataclass
class Generated:
    """One answer."""

    tokens: list[int]
    """What was drawn, the token that ended it included."""
    logps: list[float]
    """log p of each under softmax(z / temperature) (greedy: softmax(z)), before any token is penalised or left out."""
    reason: Literal["stop", "length"]


class Text:
    """The text of an answer, token by token. Characters appear once they are whole: their bytes may be spread over tokens."""

    def __init__(self, decode: Callable[[list[int]], str]):
        """decode: text of token ids. A few tokens are decoded at a time, with those before them, for what spaces they stand beside."""
        self.decode, self.tokens, self.text = decode, [], ""
        self._begin = self._told = 0  # the window that is decoded begins with the tokens that were told last

    def add(self, token: int) -> str:
        """What this token adds to the text; empty while a character is incomplete."""
        self.tokens.append(token)
        window = self.decode(self.tokens[self._begin:])
        return "" if window.endswith("\ufffd") else self._tell(window)

    def rest(self) -> str:
        """What is left when no token follows, incomplete characters among it."""
        return self._tell(self.decode(self.tokens[self._begin:]))

    def completes(self, token: int, stops: tuple[str, ...]) -> bool:
        """Add a token. Does the text now hold one of `stops` that it did not hold before?"""
        new = self.add(token)
        return any(stop in self.text[-(len(new) + len(stop) - 1):] for stop in stops if new)

    def _tell(self, window: str) -> str:
        new = window[len(self.decode(self.tokens[self._begin:self._told])):]
        self.text += new
        self._begin, self._told = self._told, len(self.tokens)
        return new
