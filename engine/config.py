"""Every field a user may set, each with its sentence; read a YAML file and dotted overrides into one frozen RunConfig.

    run = load_config("examples/quickstart/pretrain.yaml", ["train.steps=20", "parallel.tp=2"], world_size=2)

A family (and a size) of `engine/models` fills the model's defaults first, then the file, then the overrides. Mistakes are
collected and raised together as one ConfigError: unknown keys with the nearest known one, wrong types, values out of range,
and, from `engine/checks.py`, everything that several fields decide together (which layouts are legal).
Left out: anything read from data or devices. This module must stay importable without torch, so that `--help` is instant.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError
from yaml import YAMLError

from engine.foreign import written_config
from engine.launch_sections import Slurm
from engine.model_sections import Model
from engine.models import FAMILIES, family_defaults
from engine.online_sections import Grpo, Ppo, RewardPart, Rollout
from engine.run_folder import find
from engine.safety_sections import Checkpoint, Faults
from engine.section import Section, Unreadable  # noqa: F401 (Unreadable: for engine/checks.py)
from engine.stage_sections import Anneal, Average, Chat, Dpo, LongContext, Lora, Reward, Tune


class ConfigError(ValueError):
    """One or more mistakes of the user; `problems` is the list, str() prints all of them."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(f"  - {problem}" for problem in problems))


class Run(Section):
    dir: str
    """Folder of everything this run writes."""
    seed: int = Field(1234, ge=0)
    """Seeds weights (the same in every layout), data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when torch sees a GPU."""
    deterministic: bool = False
    """Ask torch for deterministic kernels and fail where there is none."""
    timeout_minutes: float = Field(30, gt=0)
    """How long a collective may wait for a missing rank."""


class Parallel(Section):
    tp: int = Field(1, ge=1)
    """Tensor parallel: each matrix is split over this many ranks."""
    pp: int = Field(1, ge=1)
    """Pipeline parallel: layers are split over this many ranks."""
    vpp: int = Field(1, ge=1)
    """Model chunks per pp rank (interleaved schedule)."""
    pp_layers: list[Annotated[int, Field(ge=1)]] = []
    """Layers of each chunk in the order in which a batch meets them, pp * vpp numbers; empty splits evenly."""
    cp: int = Field(1, ge=1)
    """Context parallel: each sequence is split over this many ranks."""
    ep: int = Field(1, ge=1)
    """Expert parallel: experts are split over this many ranks."""
    etp: int = Field(0, ge=0)
    """Tensor parallel inside experts; 0 means tp."""
    sequence_parallel: bool = False
    """Split the sequence over the tp ranks between matrices."""
    zero1: bool = False
    """Split optimizer state over the dp ranks (megatron's distributed optimizer)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs (with zero1)."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with matrix products (te backend)."""
    overlap_p2p: bool = True
    """Overlap pipeline sends with compute (interleaved schedule)."""
    nvls: bool = False
    """NCCL may reduce inside NVLink's switch, which takes buffers on every GPU (NCCL_NVLS_ENABLE)."""
    p2p_chunk_kib: int = Field(2048, ge=0)
    """Pieces in which NCCL sends from pp rank to pp rank over a network (NCCL_P2P_NET_CHUNKSIZE); 0 leaves it to NCCL."""
    norm_sm_margin: int = Field(16, ge=0, le=64)
    """SMs that te's norms leave to the collectives of overlap_grad_reduce and overlap_param_gather beside them."""

    @property
    def expert_tp(self) -> int:
        return self.etp or self.tp


class Phase(Section):
    after_tokens: int = Field(ge=0)
    """Tokens of this run after which the mixture begins to change."""
    ramp_tokens: int = Field(0, ge=0)
    """Tokens over which it changes linearly; 0 changes it at once."""
    train: list[str]
    """The mixture from then on: WEIGHT PREFIX WEIGHT PREFIX ..."""


class Fim(Section):
    rate: float = Field(0.0, ge=0, le=1)
    """Share of the documents in a sample whose middle is moved behind its suffix (arXiv 2207.14255); 0 leaves all text as it is."""
    spm_rate: float = Field(0.5, ge=0, le=1)
    """Of those, the share written suffix first (SPM); the others are PSM."""
    prefix_id: int = Field(-1, ge=-1)
    """Token before the prefix."""
    middle_id: int = Field(-1, ge=-1)
    """Token before the middle."""
    suffix_id: int = Field(-1, ge=-1)
    """Token before the suffix."""
    valid: bool = False
    """Validation sets too; false keeps their losses those of plain text."""


class Data(Section):
    train: list[str] = []
    """Corpora of the training set: PREFIX ... or WEIGHT PREFIX WEIGHT PREFIX ..."""
    valid: dict[str, list[str]] = {}
    """Validation sets by name, each a list like train; their losses are logged separately."""
    split: str = ""
    """Megatron's split string, such as 969,30,1: cuts train into train, valid and test; excludes data.valid."""
    tokenizer: str = ""
    """hf:DIR | sentencepiece:FILE | tiktoken:FILE | bytes: names the EOD token and goes into exports."""
    eod_id: int = Field(-1, ge=-1)
    """End-of-document token; -1 asks the tokenizer."""
    reset_at_eod: bool = False
    """Tokens see only their own document, and positions restart in each."""
    eod_mask_loss: bool = False
    """No loss where the input token is the end of a document."""
    phases: list[Phase] = []
    """Mixtures that follow data.train as the run goes on."""
    replay: list[str] = []
    """continued: corpora of the training before, a list like train."""
    replay_share: float = Field(0.05, ge=0, lt=1)
    """continued: share of samples taken from data.replay."""
    one_epoch: bool = False
    """Refuse to read any token twice."""
    max_epochs: dict[str, Annotated[float, Field(gt=0)]] = {}
    """How often single corpora may be read, such as {PREFIX: 2, "*": 4}; "*" stands for those that are not named."""
    at_cap: Literal["drop", "stop"] = "drop"
    """When a corpus has been read that often: drop goes on with the others in their proportions, stop refuses such a run."""
    valid_by_source: bool = False
    """Validation tells the loss of every corpus of a set beside the whole."""
    train_by_source: bool = False
    """So does every step of training."""
    fim: Fim = Fim()
    """Fill in the middle."""
    cache_dir: str = ""
    """Folder of the index cache, and of what was read of remote corpora; empty means run.dir/index_cache."""
    storage: Literal["mmap", "pread"] = "mmap"
    """How .bin files are read: mmap while they stay in memory, pread when the disk or the network must answer (docs/storage.md)."""
    prefetch: int = Field(2, ge=0)
    """Global batches read ahead while one trains; 0 or false reads each when it is needed, true is 1."""
    threads: int = Field(1, ge=1)
    """C++ threads that gather a batch of text."""
    buffer: Literal["auto", "plain", "pinned", "shared"] = "auto"
    """Host memory batches are read into: auto is pinned for a GPU, else plain; shared: what ranks of one machine map (read_on=first_rank)."""
    read_on: Literal["every_rank", "first_rank"] = "every_rank"
    """Who reads: every rank its own batches, or the first of the tp * pp * cp ranks that share them, which passes them on."""
    feed: Literal["auto", "copy", "dali"] = "auto"
    """How batches reach a GPU: auto and copy from pinned memory on a stream of their own; dali through NVIDIA DALI."""


class Rampup(Section):
    start: int = Field(0, ge=0)
    """First global batch; 0 switches the ramp-up off."""
    increment: int = Field(1, ge=1)
    """Step of the global batch."""
    samples: int = Field(0, ge=0)
    """Samples over which the batch grows to train.global_batch."""


class Fp8(Section):
    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """FP8 scaling recipe (te backend, GPU)."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: e4m3 forward, e5m2 gradients."""
    params: bool = False
    """Keep parameters in FP8 (the all-gather of zero1 moves half the bytes)."""
    amax_history: int = Field(1024, ge=1)
    """Steps of the delayed recipe's history."""


class StopWhen(Section):
    metric: str = ""
    """A number of validation, such as valid_loss or reward/exact; empty never stops."""
    set: str = ""
    """The validation set it is taken of; empty means the first."""
    at_most: float | None = None
    """Stop once the number is this or less."""
    at_least: float | None = None
    """Stop once the number is this or more."""


class Train(Section):
    seq_len: int = Field(ge=2)
    """Tokens per sample."""
    micro_batch: int = Field(1, ge=1)
    """Samples per rank and forward pass."""
    global_batch: int = Field(ge=1)
    """Samples per optimizer step, over all ranks."""
    rampup: Rampup = Rampup()
    """Growth of the global batch at the start."""
    steps: int = Field(ge=0)
    """Optimizer steps; 0 validates and changes nothing."""
    max_tokens: int = Field(0, ge=0)
    """Stop after this many tokens; 0 means no limit."""
    max_minutes: float = Field(0, ge=0)
    """Save and stop after this wall-clock time; 0 means no limit."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of weights and activations; bf16 and fp16 keep fp32 master weights."""
    fp8: Fp8 = Fp8()
    """FP8 matrix products."""
    backend: Literal["auto", "torch", "te"] = "auto"
    """Layers: torch runs anywhere; te is Transformer Engine. auto takes te on a GPU that has it."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Recompute nothing, core attention, or whole layers in the backward pass."""
    compile: bool = False
    """torch.compile every layer."""
    cuda_graphs: bool = False
    """Record the kernels of each layer in the first step and replay them (te backend, one shape, no pipeline): for small models."""
    eval_every: int = Field(0, ge=0)
    """Steps between validations; 0 validates only at the end."""
    stop_when: StopWhen = StopWhen()
    """Save and stop after a validation that found this; train.steps is then the limit."""
    eval_at_start: bool = False
    """Validate before the first step too."""
    eval_samples: int = Field(0, ge=0)
    """Samples per validation set; 0 means no validation."""
    manual_gc: int = Field(0, ge=0)
    """Collect garbage every n steps instead of at random moments; 0 leaves it to Python."""


class Optim(Section):
    lr: float = Field(3e-4, ge=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled; not applied to biases and norms."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's second moment."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    clip_grad: float = Field(1.0, ge=0)
    """Clip the global gradient norm; 0 does not clip."""
    precision_aware: bool = False
    """Keep moments and gradients in lower precision (te's FusedAdam, with zero1)."""
    loss_scale: float = Field(0, ge=0)
    """fp16: a constant loss scale; 0 means dynamic."""
    initial_loss_scale: float = Field(2**32, gt=0)
    """fp16: where the dynamic scale starts."""
    loss_scale_window: int = Field(1000, ge=1)
    """fp16: good steps before the scale doubles."""


class Schedule(Section):
    kind: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Linear from init_lr to optim.lr."""
    init_lr: float = Field(0.0, ge=0)
    """Where the warm-up starts: the learning rate of step 1."""
    min_lr: float = Field(0.0, ge=0)
    """Where the decay ends."""
    decay_steps: int = Field(0, ge=0)
    """Steps after which the rate is min_lr; 0 means train.steps."""
    wsd_decay_steps: int = Field(0, ge=0)
    """wsd: length of the final decay."""
    wsd_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """wsd: shape of the final decay."""


class Log(Section):
    every: int = Field(10, ge=1)
    """Steps between console lines; metrics.jsonl gets every step."""
    tensorboard: bool = True
    """Write tb/."""
    wandb: str = ""
    """Weights & Biases project; empty means off."""
    norms: bool = False
    """Log the weight and gradient norm of every layer."""
    progress: Literal["auto", "bar", "plain"] = "auto"
    """A progress bar on a terminal, plain lines elsewhere."""
    peak_tflops: float = Field(0, ge=0)
    """Peak of one device for MFU; 0 looks the GPU up, and leaves MFU out on a CPU."""


class Profile(Section):
    first_step: int = Field(0, ge=0)
    """The first step that is profiled, those before a resume counted too; 0 profiles nothing. The first steps of a run are not like the others."""
    num_steps: int = Field(2, ge=1)
    """Steps that are profiled."""
    ranks: list[Annotated[int, Field(ge=0)]] = [0]
    """Ranks that record."""
    kind: Literal["torch", "nsys"] = "torch"
    """torch writes a trace and a summary into RUN/profile; nsys marks the steps for `nsys profile --capture-range=cudaProfilerApi`."""
    memory: bool = False
    """Record allocations too."""


class RunConfig(Section):
    run: Run
    stage: str = "pretrain"
    """A file of engine/stages, or package.module:Class of your own."""
    stage_options: dict[str, Any] = {}
    """What a stage of your own wants to be told."""
    model: Model
    parallel: Parallel = Parallel()
    data: Data = Data()
    train: Train
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    tune: Tune = Tune()
    lora: Lora = Lora()
    average: Average = Average()
    anneal: Anneal = Anneal()
    long_context: LongContext = LongContext()
    chat: Chat = Chat()
    reward: Reward = Reward()
    dpo: Dpo = Dpo()
    rollout: Rollout = Rollout()
    rewards: list[RewardPart] = []
    """What an answer of ppo, grpo and online_dpo is worth: the weighted sum of these parts."""
    ppo: Ppo = Ppo()
    grpo: Grpo = Grpo()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    log: Log = Log()
    profile: Profile = Profile()
    slurm: Slurm = Slurm()


def load_config(path: str | Path, overrides: list[str] = (), world_size: int | None = None, instead: dict[str, Any] | None = None) -> RunConfig:
    """Read `path`, apply `key=value` overrides, validate.

    instead: top-level keys that stand for the file's, below the overrides. world_size: number of ranks when known (torchrun's WORLD_SIZE); None skips the checks that need it.
    Raises ConfigError with every mistake found.
    """
    raw = read_yaml(Path(path), overrides, instead)
    return validate(raw, world_size)


def validate(raw: dict[str, Any], world_size: int | None = None) -> RunConfig:
    """Turn a nested dict into a RunConfig, or raise ConfigError with every mistake in it.

    Fields that are wrong by themselves and fields that do not go together are told in one go; a check that needs a refused
    field stays silent.
    """
    from engine.checks import cross_checks

    problems = []
    raw, preset_is_known = _with_family(_with_checkpoints_model(raw), problems)
    try:
        run = RunConfig.model_validate(raw)
    except ValidationError as error:
        mistakes = error.errors()
        run = _readable_part(raw, mistakes)
        problems += [_explain(mistake) for mistake in mistakes if preset_is_known or not _would_be_in_preset(mistake)]
    problems += cross_checks(run, world_size)
    if problems:
        raise ConfigError(problems)
    return run


def dump_config(run: RunConfig) -> str:
    """YAML of every field, usable as input again."""
    return OmegaConf.to_yaml(OmegaConf.create(run.model_dump()))


def nearest(word: str, known) -> str:
    """` (did you mean X?)`, or the known words when none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def read_yaml(path: Path, overrides, instead: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file with `instead` and then the overrides laid over it, as plain Python. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError([f"no configuration file at {path}"])
    changes = _parsed(overrides)
    try:
        file = OmegaConf.load(path)
        if not OmegaConf.is_dict(file):
            raise ConfigError([f"{path} holds no mapping of sections; see examples/quickstart/pretrain.yaml"])
        for key, value in (instead or {}).items():
            file[key] = value
        merged = OmegaConf.merge(file, changes)
        return OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([f"{path}: {str(error).strip()}"]) from None
    except TypeError:  # OmegaConf's, for a key that reaches into a list
        raise ConfigError([f"{', '.join(overrides)}: an override replaces a list as a whole, such as data.train=[a,b]; it cannot reach into one"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path} is not text"]) from None


def _parsed(overrides):
    changes, problems = OmegaConf.create(), []
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            problems.append(f"override {override!r} is not of the form key=value, such as train.steps=100")
            continue
        try:
            changes = OmegaConf.merge(changes, OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException, ValueError) as error:
            problems.append(f"override {override!r}: {str(error).strip()}")
    if problems:
        raise ConfigError(problems)
    return changes


def _with_checkpoints_model(raw: dict[str, Any]) -> dict[str, Any]:
    """Where no model.family is given, the model of checkpoint.load, with the user's own model keys laid over it."""
    own = raw.get("model") or {}
    section = raw.get("checkpoint")
    load = section.get("load") if isinstance(section, dict) else None
    if not load or not isinstance(own, dict) or own.get("family") is not None:
        return raw
    folder = find(load)
    if folder is None:
        raise ConfigError([f"the configuration has no model, and checkpoint.load={load}, which would say, holds no complete checkpoint (iter_*/metadata.json)"])
    try:
        written = written_config(folder)["model"]
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError([f"checkpoint.load={load}: its configuration cannot be read ({error}); name another checkpoint"]) from None
    written.pop("head", None)  # the stage's business
    return {**raw, "model": OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(written), OmegaConf.create(own)))}


def _with_family(raw: dict[str, Any], problems: list[str]) -> tuple[dict[str, Any], bool]:
    """Family defaults and size preset below the user's own model keys; False where a preset was named that cannot be found."""
    model = raw.get("model")
    if not isinstance(model, dict):
        return raw, True
    family, size = str(model.get("family")), str(model.get("size", "custom"))
    if model.get("family") is None:
        return raw, size == "custom"      # pydantic says that the family is missing
    if family not in FAMILIES:
        problems.append(f"model.family={family} is unknown{nearest(family, FAMILIES)}")
        return raw, size == "custom"
    sizes, is_known = FAMILIES[family].SIZES, True
    if size != "custom" and size not in sizes:
        problems.append(f"model.size={size} is no size of {family}{nearest(size, [*sizes, 'custom'])}")
        size, is_known = "custom", False
    defaults = OmegaConf.create(family_defaults(family, size))
    merged = OmegaConf.to_container(OmegaConf.merge(defaults, OmegaConf.create(model)))
    return {**raw, "model": merged}, is_known


def _would_be_in_preset(mistake) -> bool:
    return mistake["type"] == "missing" and mistake["loc"][0] == "model" and mistake["loc"] != ("model", "family")


def _explain(mistake) -> str:
    where = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return f"{where} is no key of this configuration{_nearest_key(mistake['loc'])}"
    if mistake["type"] == "missing":
        return f"{where} is required"
    text = mistake["msg"].replace("valid dictionary or instance of", "mapping with the keys of")
    return f"{where}={mistake['input']!r}: {text[0].lower()}{text[1:]}"


def _nearest_key(loc) -> str:
    """Where an unknown key may have been meant: the same name in another section, or the nearest one in this section."""
    name = str(loc[-1])
    same = [path for path in _paths(RunConfig) if path.split(".")[-1] == name]
    if same:
        return f"; did you mean {' or '.join(same)}?"
    section = RunConfig
    for part in loc[:-1]:
        section = section.model_fields[part].annotation
    return nearest(name, section.model_fields)


def _paths(section, prefix: str = ""):
    """Dotted names of every field below a section."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if _is_section(field.annotation):
            yield from _paths(field.annotation, f"{prefix}{name}.")


def _is_section(annotation) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _readable_part(raw: dict[str, Any], mistakes) -> RunConfig:
    """A RunConfig of what is right in `raw`, for checks only: reading a field that `mistakes` names raises Unreadable."""
    raw = OmegaConf.to_container(OmegaConf.create(raw))
    refused = []
    for _ in range(3):      # in the place of a refused section stands an empty one, which lacks its required fields a round later
        for mistake in mistakes:
            refused += _replace(raw, mistake)
        try:
            run = RunConfig.model_validate(raw)
            break
        except ValidationError as error:
            mistakes = error.errors()
    else:
        raise AssertionError(f"a stand-in of _replace is not legal: {mistakes}")
    for path in refused:
        section = run
        for part in path[:-1]:
            section = vars(section).get(part)
        if section is not None:
            vars(section).pop(path[-1], None)
    return run


def _replace(raw: dict[str, Any], mistake) -> list[tuple]:
    """Put something legal in the place of a mistake; the path of the field that is no longer the user's, if it is one."""
    section, node, path = RunConfig, raw, ()
    for part in mistake["loc"]:
        path = (*path, part)
        if part not in section.model_fields:      # an unknown key
            node.pop(part)
            return []
        field = section.model_fields[part]
        if not (_is_section(field.annotation) and isinstance(node.get(part), dict)):
            break                                 # the field itself, or an item in its list
        section, node = field.annotation, node[part]
    if _is_section(field.annotation):
        node[part] = {}
    elif field.is_required():
        node[part] = 2                            # legal for every required field: numbers from 1 or 2 upwards, and names
    else:
        node.pop(part, None)
    return [path]
