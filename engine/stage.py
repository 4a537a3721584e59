"""The Stage protocol: what one training stage is, said in tensors of shape [batch, seq].

A stage says which networks it needs (roles), where its data comes from, how a batch is prepared, and what is minimised.
It never sees logits, ranks, shards or process groups; `engine/mcore/run.py` brings each role's output to the full sequence
before calling `loss`. One stage is one file of `engine/stages/`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from engine.sampling import Generated, Sampling

Batch = dict[str, Tensor]  # `tokens` and `labels` int64 [b, s], `loss_mask` fp32 [b, s], and what the stage adds


@dataclass(frozen=True)
class Loss:
    """What one micro-batch adds to the loss: a sum, divided once by the count of the whole global batch.

    sum: differentiable scalar. metrics: name -> (sum, count), each divided once likewise.
    """

    sum: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Role:
    """One network a stage needs."""

    head: Literal["tokens", "scalar"] = "tokens"
    """tokens: the log-probability of each label where loss_mask is not 0 (what lies elsewhere is never computed and means nothing);
    scalar: one value per token."""
    train: bool = True
    """False: no gradients."""
    init: str = "load"
    """load: checkpoint.roles.<role> or else checkpoint.load; fresh: initial weights."""
    lr: float = 0.0
    """Peak learning rate; 0 takes optim.lr. The schedule is the run's."""
    temperature: float = 1.0
    """What logits are divided by before probabilities are taken of them."""
    wants_entropy: bool = False
    """tokens, while learning: the output is [b, s, 2], log-probability and entropy of the distribution it is taken from."""
    rests_on_host: bool = False
    """Of a network that does not learn: its weights lie in host memory between two uses."""


class Dataset(Protocol):
    """Samples by number; the whole state of reading is the number of samples consumed."""

    rows_per_sample: int
    """Neighbouring rows that make one sample: 1, or 2 for pairs."""

    def __len__(self) -> int: ...

    def batch(self, sample_numbers) -> Batch:
        """The samples with these numbers (int64 array [b]), in this order; every tensor has b * rows_per_sample rows."""

    def longest(self, sample_numbers) -> int:
        """Tokens in the longest of these samples. The loader cuts the padding of a global batch down to its longest row."""


class Model(Protocol):
    """What `prepare` may ask of a role. Collective: every rank calls it; the rows are those of this replica, and every rank
    of the replica gets the same answer."""

    def score(self, micro_batches: list[Batch]) -> list[Tensor]:
        """The role's output [b, s] in fp32 for each micro-batch, without gradients."""

    def greedy(self, micro_batches: list[Batch]) -> list[Tensor]:
        """bool [b, s]: is the label the most probable token? Greedy decoding says a text exactly when all of it is."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, keys: list[int] | None = None, decode=None, batch: int = 0) -> list[Generated]:
        """An answer to each prompt. keys: with the seed what decides a row's random numbers; `batch` rows at once, 0 all."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all replicas, for what concerns the whole global batch."""

    def gathered(self, act: Callable[[], list]) -> list:
        """What act() returns, called on one rank of every replica, replica by replica; an error of any is raised on all ranks."""

    last: Mapping[str, float]
    """What the role's last forward and backward pass found, of its whole batch: the loss and the stage's metrics."""


class Feed(Protocol):
    """The training data of a run, from where it stands on."""

    step: int
    """Number of the step underway, from 1."""
    ahead: int
    """How many of the last global batches taken are for later steps; a stage that draws ahead sets it."""

    def __next__(self) -> list[Batch]:
        """This replica's micro-batches of the next global batch, which thereby is consumed."""


class Stage:
    """Base of every stage: subclasses give roles, datasets, count and loss, and change what else they need.

    See engine/stages/pretrain.py for the shortest one. Nothing is kept on the instance but what `configure` and `begin` set and `state` tells.
    """

    roles: Mapping[str, Role] = {"policy": Role()}
    """Read after `configure`, which may set it. The first trained role is what checkpoints of this stage hold."""

    draws_freely: bool = False
    """A step may take any number of global batches, so the data must not end."""

    validates_loss: bool = True
    """False: validation measures (`measure`, of batches as the dataset gives them) and knows no loss."""

    datasets_stay_with_reader: bool = False
    """True: nothing but loaders looks at the datasets, so that with data.read_on=first_rank the other ranks need not open them; `begin`
    gets stand-ins there that know their length alone."""

    reads_text_everywhere: bool = True
    """False: `count` asks for the loss mask alone, so that with data.read_on=first_rank a rank in the middle of the pipeline may get zeros
    for tokens and labels."""

    rows_alike: int = 1
    """As many neighbouring rows (pairs: 2) may begin alike, and `ends` [b] says where each row's last token is: the engine then computes what
    they share once. Outputs at places behind `ends` mean nothing."""

    def configure(self, run):
        """The RunConfig this stage really runs with; called on every rank before anything is built."""
        return run

    def datasets(self, run, num_train: int, num_valid: int) -> tuple[Dataset, Mapping[str, Dataset]]:
        """The training set with at least num_train samples, and the validation sets by name."""
        raise NotImplementedError

    def draw(self, feed: Feed, models: Mapping[str, Model]):
        """What one step learns from, for `prepare`: the next global batch, or what a stage makes of one or more. Without gradients."""
        return next(feed)

    def prepare(self, micro_batches: list[Batch], models: Mapping[str, Model]) -> Iterator[list[Batch]]:
        """What to train on, from what was drawn: micro-batches of one shape, one optimizer step per list yielded. Without gradients."""
        yield micro_batches

    def learns(self, role: str, step: int) -> bool:
        """Does this trained role learn in this step, counted from 1?"""
        return True

    def report(self) -> Mapping[str, float]:
        """What else belongs in the record of the step just taken."""
        return {}

    def state(self) -> Mapping[str, float]:
        """What a checkpoint must hold beside networks and position for the stage to go on as if never stopped."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take back what `state` said."""

    def count(self, role: str, batch: Batch) -> Tensor:
        """What `loss` sums over in this micro-batch: tokens, pairs or sequences. Known from the batch alone, because the
        engine divides before the backward pass; that keeps auxiliary losses of MoE routers independent of the unit."""
        raise NotImplementedError

    def proportions(self, role: str, batch: Batch) -> Tensor | None:
        """Where the loss is a weighted sum of -log p(label) and the weights are known from the batch alone, up to a factor: these [b, s].
        The engine then needs no memory for logits (engine/mcore/linear_ce.py), and refuses a loss whose gradient is another. Of a role
        with head tokens, without entropy."""
        return None

    def loss(self, role: str, output: Tensor, batch: Batch) -> Loss:
        """The loss of one micro-batch, from the role's output [b, s] (fp32). Last pp rank only; no collectives."""
        raise NotImplementedError

    def measure(self, micro_batches: list[Batch], models: Mapping[str, Model]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What else validation wants to know of prepared micro-batches: name -> (sum, count) over this replica. Collective."""
        return {}

    # --- for stages that are more than one loop over one kind of batch -------------------------------------------------

    def begin(self, run, trainer, datasets: Iterable[Dataset]) -> None:
        """Called when the data is known and before training. trainer: see engine/train.py, class Trainer. Collective."""

    def runs(self, run, trainer) -> Iterator:
        """The RunConfigs to train one after the other; `finish` is called after each. Collective."""
        yield run

    def finish(self, run, model: Model) -> Mapping[str, float]:
        """After the last step of a run: what belongs in its log. Collective."""
        return {}

    def close(self) -> None:
        """End what `configure` or `begin` has started; called however the run ends."""
