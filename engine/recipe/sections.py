"""Every field of a recipe, each with its sentence; read a YAML file and dotted overrides into one frozen Recipe.

    recipe = load_recipe("examples/full_recipe/recipe.yaml", ["stages.sft.keys.train.steps=20"])

As in engine/config.py: unknown keys are refused with the nearest known one, and all mistakes are told together as one ConfigError.
What the stages' own configurations hold, and what several entries decide together, is plan.py's.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError

from engine.config import ConfigError, nearest
from engine.config import read_yaml
from engine.section import Section

NOTHING = "nothing"
"""`from: nothing`: initial weights, or the checkpoint.load of the stage's own configuration."""
CHINCHILLA = "chinchilla"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _tokens(value: Any) -> int | str:
    if value == CHINCHILLA:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and value == int(value):
        return int(value)
    raise ValueError(f"give a whole number of tokens, or {CHINCHILLA}")


class Gate(Section):
    metric: str
    """A number of a validation set, a measure or the training lines, such as valid_loss, exact_match, accuracy."""
    set: str = ""
    """Validation set of the stage's own run; train is its training lines, boundary what the spike rule found."""
    measure: str = ""
    """A measure of the recipe instead, taken after this stage."""
    at_least: float | None = None
    """The number must reach this."""
    at_most: float | None = None
    """The number may not exceed this."""
    at_least_of: str = ""
    """The number must reach that of this earlier stage, changed by times, plus and minus."""
    at_most_of: str = ""
    """The number may not exceed that of this earlier stage, changed by times, plus and minus."""
    times: float = 1.0
    """at_least_of, at_most_of: factor on the earlier number."""
    plus: float = 0.0
    """at_least_of, at_most_of: added to it after that."""
    minus: float = 0.0
    """at_least_of, at_most_of: taken off it after that."""
    on_failure: Literal["stop", "rollback", "warn"] = "stop"
    """stop ends the recipe; rollback goes on, later stages taking rollback_to in place of this one; warn says so and goes on."""
    rollback_to: str = ""
    """The earlier stage whose checkpoint replaces this one; empty takes the one that this stage started from."""


class StageEntry(Section):
    config: str = ""
    """Configuration file of the stage, found beside the recipe; its run.dir is replaced."""
    keys: dict[str, Any] = {}
    """Sections and keys laid over that file, or the whole configuration."""
    start: str = Field("", alias="from")
    """Stage whose checkpoint this one loads; empty takes the one before (stage pretrain: nothing); nothing takes none."""
    roles: dict[str, str] = {}
    """Stages whose checkpoints single roles load, such as {reference: sft, reward: reward}."""
    ranks: int = Field(0, ge=0)
    """Processes on this machine; 0 takes the recipe's."""
    torchrun: list[str] = []
    """Further arguments of torchrun; empty takes the recipe's."""
    tokens: Annotated[Any, AfterValidator(_tokens)] = 0
    """Train on this many tokens, which sets train.steps; chinchilla derives them from the parameters; 0 leaves train.steps alone."""
    tokens_per_parameter: float = Field(20.0, gt=0)
    """chinchilla: tokens per parameter (arXiv 2203.15556)."""
    law: str = ""
    """chinchilla: a law file of `launch/recipe.py fit` instead, which says the tokens at which this size is the best for its compute."""
    gates: list[Gate] = []
    """What must hold before the recipe goes on."""


class MeasureEntry(Section):
    config: str = ""
    """Configuration of a stage whose validation is taken (train.steps=0), found beside the recipe."""
    keys: dict[str, Any] = {}
    """Sections and keys laid over that file."""
    set: str = ""
    """The validation set; empty where there is one only."""
    metrics: list[str] = ["valid_loss"]
    """Columns of the table."""
    after: list[str] = []
    """Stages after which it is taken; empty means every stage with a network of that kind."""
    ranks: int = Field(0, ge=0)
    """Processes on this machine; 0 takes the recipe's."""


class Spike(Section):
    tolerance: float = Field(0.1, ge=0)
    """Report a stage whose loss begins, or soon rises, by more than this share above where it should be."""
    window: int = Field(5, ge=1)
    """Steps of the running mean in which a rise is looked for."""
    share: float = Field(0.2, gt=0, le=1)
    """Part of the stage's steps that counts as its beginning."""


class Hardware(Section):
    peak_tflops: float = Field(0, ge=0)
    """Peak TFLOP/s of one rank's device, for estimates of time; 0 estimates only from what was measured."""
    mfu: float = Field(0.4, gt=0, le=1)
    """Share of the peak that is taken to be reached."""


class Recipe(Section):
    dir: str
    """Folder of everything the recipe writes: one folder per stage, state.json, table.md, report.html."""
    ranks: int = Field(1, ge=1)
    """Processes on this machine (torchrun --nproc-per-node) of stages that say nothing else."""
    torchrun: list[str] = ["--standalone"]
    """Further arguments of torchrun."""
    stages: dict[str, StageEntry] = Field(min_length=1)
    """The stages by name, in the order in which they run."""
    measures: dict[str, MeasureEntry] = {}
    """Evaluations by name, taken of the checkpoint after each stage."""
    spike: Spike = Spike()
    """When a stage's beginning is reported as a spike of the loss."""
    hardware: Hardware = Hardware()
    """What estimates of time assume."""


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides. Raises ConfigError with every mistake found."""
    raw = read_yaml(Path(path), overrides)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([_explained(mistake) for mistake in error.errors()]) from None
    problems = [f"{section}.{name}: a name becomes a folder; write letters, digits, _ . and -, and not {NOTHING}"
                for section in ("stages", "measures") for name in getattr(recipe, section) if not _NAME.fullmatch(name) or name == NOTHING]
    if problems:
        raise ConfigError(problems)
    return recipe


def _explained(mistake) -> str:
    where = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        fields = _section_at(mistake["loc"][:-1]).model_fields
        return f"{where} is no key of a recipe{nearest(str(mistake['loc'][-1]), [field.alias or name for name, field in fields.items()])}"
    if mistake["type"] == "missing":
        return f"{where} is required"
    text = mistake["msg"].removeprefix("Value error, ").replace("valid dictionary or instance of", "mapping with the keys of")
    return f"{where}={mistake['input']!r}: {text[0].lower()}{text[1:]}"


def _section_at(loc) -> type[Section]:
    """The section that the path of a mistake leads to, through the dicts and lists of sections."""
    section = Recipe
    for part in loc:
        field = section.model_fields.get(part)
        if field is None:
            continue      # a name in a dict, a place in a list
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type) and issubclass(kind, Section)]
        section = inner[0] if inner else section
    return section
