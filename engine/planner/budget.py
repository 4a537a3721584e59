"""Tokens, days and money: what a plan's speed means for a whole run, and what the same compute could buy.

    cost = of_run(run, plan, tokens=0, price=2.5)      # Budget(tokens, days, gpu_hours, price)
    chinchilla(run, cost.tokens)                       # Sizes: the tokens this model wants, the model this compute wants

Compute is C = 6 N D of the parameters a token passes through (Hoffmann et al., arXiv 2203.15556). Their rule of thumb, 20 tokens for each
parameter (table 3), holds unless a law fitted to runs of one's own says otherwise (`launch/recipe.py fit`, engine/recipe/scaling.py).
"""

import math
from dataclasses import dataclass

from engine import metrics, schedule

TOKENS_PER_PARAMETER = 20.0


@dataclass(frozen=True)
class Budget:
    """price: of the whole run, in the currency of the hour's; 0 where none was given."""

    tokens: float
    days: float
    gpu_hours: float
    price: float


@dataclass(frozen=True)
class Sizes:
    """parameters: those of this model that a token passes through; best_tokens: what they want; best_parameters, tokens_of_best: what the
    run's compute would be spent on best."""

    parameters: int
    best_tokens: float
    best_parameters: float
    tokens_of_best: float


def tokens_of(run) -> int:
    """Tokens that the configuration reads in all its steps."""
    steps = schedule.planned_steps(run.train)
    return schedule.consumed_samples_after(steps, run.train) * run.train.seq_len


def of_run(run, tokens_per_second: float, num_gpus: int, tokens: float = 0, price: float = 0) -> Budget:
    """tokens: 0 takes the configuration's. tokens_per_second: of all GPUs. price: of one GPU for an hour."""
    tokens = tokens or tokens_of(run)
    hours = tokens / tokens_per_second / 3600
    return Budget(tokens, hours / 24, hours * num_gpus, hours * num_gpus * price)


def chinchilla(run, tokens: float, law=None) -> Sizes:
    """law: an engine.recipe.scaling.Law of one's own."""
    n = metrics.num_parameters(run.model, run.train.seq_len).active
    compute = 6 * n * tokens
    if law is None:
        best = math.sqrt(compute / (6 * TOKENS_PER_PARAMETER))
        return Sizes(n, TOKENS_PER_PARAMETER * n, best, TOKENS_PER_PARAMETER * best)
    low, high = 1.0, compute / 6      # parameters whose best tokens cost less, and more, than there is
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if 6 * middle * law.best_tokens(middle) < compute else (low, middle)
    return Sizes(n, law.best_tokens(n), low, compute / (6 * low))
