"""Direct preference optimisation and its kin: raise the probability of the chosen answer against the rejected one, no reward model.

Batches come from engine/data/pairs.py: pairs as adjacent rows [2n, s], or for kto single answers with a label. `prepare`
adds what the losses of engine/losses.py compare with: `reference_logps` [2n], the frozen model's log-probability of each answer,
by the same scoring path as the policy's, so that the first dpo loss is ln 2 to the bit. The loss is averaged over the pairs
(kto: rows) of the global batch.

Two means deserve a word. The NLL of the chosen tokens (dpo.nll_weight, orpo) is a mean over the tokens of the global batch; TRL
takes it over each micro-batch and averages those. kto's reference point z is a mean over the global batch; TRL takes it over the
micro-batches of one moment. Both agree with TRL where a step is one micro-batch, and here neither depends on the layout.
Left out: several losses at once, and precomputing the reference where mismatched pairs change every epoch (kto).
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engine import losses
from engine.config import ConfigError
from engine.data import conversations, pairs
from engine.data.indexed import DataError
from engine.losses import difference, sequence_logps
from engine.stage import Loss, Role, Stage

WITHOUT_REFERENCE = ("simpo", "orpo")
OF_SCORES = ("rpo_squared", "rpo_forward_kl", "rpo_backward_kl")
READ_BY = {"label_smoothing": ("cdpo", "robust"), "gamma": ("simpo",), "eta": OF_SCORES, "desirable_weight": ("kto",),
           "undesirable_weight": ("kto",)}  # option: the losses that read it

log = logging.getLogger(__name__)


class Dpo(Stage):
    def configure(self, run):
        """Sets the roles that dpo.loss needs, and what conversations need.

        Raises ConfigError for options that the chosen loss would ignore, or that it cannot do without.
        """
        if problems := list(_problems(run)):
            raise ConfigError(problems)
        self.options = run.dpo
        self.has_reference = run.dpo.loss not in WITHOUT_REFERENCE
        self.has_pairs = run.dpo.loss != "kto"
        self.rows_alike = 2 if self.has_pairs else 1
        self.has_nll = run.dpo.nll_weight > 0 or run.dpo.loss == "orpo"
        self.roles = {"policy": Role()}
        if self.has_reference and run.dpo.reference == "role":
            self.roles["reference"] = Role(train=False)
        return conversations.configured(run)

    def datasets(self, run, num_train, num_valid):
        return pairs.datasets(run, num_train, num_valid, self.has_pairs, "scores" if run.dpo.loss in OF_SCORES else "")

    def begin(self, run, trainer, datasets):
        if self.has_reference and "reference" not in self.roles:
            stored_reference(run, datasets, trainer.place, trainer.loader, lambda: trainer.frozen("reference"))

    # --- before the loss ----------------------------------------------------------------------------------------------

    def prepare(self, micro_batches, models):
        added = [{} for _ in micro_batches]
        if "reference" in models:
            for new, logps in zip(added, _scores(models["reference"], micro_batches)):
                new["reference_logps"] = logps
        if not self.has_pairs:
            z = self._reference_point(micro_batches, models)
            for new, batch in zip(added, micro_batches):
                new["z"] = z.expand(len(batch["tokens"]))
        if self.has_nll:
            scale = self._items_per_token(micro_batches, models["policy"])
            for new, batch in zip(added, micro_batches):
                new["nll_scale"] = scale.expand(len(batch["tokens"]))
        yield [{**{name: t for name, t in batch.items() if not name.startswith("kl_")}, **new} for batch, new in zip(micro_batches, added)]

    def _reference_point(self, micro_batches, models):
        """kto's z []: max(0, mean log-ratio of the global batch's mismatched pairs)."""
        mismatched = [{**batch, **{name: batch[f"kl_{name}"] for name in ("tokens", "labels", "loss_mask")}} for batch in micro_batches]
        policy, reference = (_scores(models[role], mismatched) for role in ("policy", "reference"))
        u = torch.cat(policy) - torch.cat(reference)
        total, count = models["policy"].total(torch.stack([u.sum(), torch.full_like(u[0], len(u))]))
        return (total / count).clamp(min=0)

    def _items_per_token(self, micro_batches, policy):
        """What turns a sum over chosen tokens, divided by the count, into a mean over them: items / tokens of the global batch, []."""
        items = sum(self.count("policy", batch) for batch in micro_batches)
        tokens = sum(self._chosen_tokens(batch) for batch in micro_batches)
        items, tokens = policy.total(torch.stack([items, tokens]))
        return items / tokens.clamp(min=1)  # a batch of kto may hold no chosen answer

    def _chosen_tokens(self, batch):
        return batch["loss_mask"][self._is_chosen(batch)].sum()

    # --- the loss -----------------------------------------------------------------------------------------------------

    def count(self, role, batch):
        """Pairs; kto: rows."""
        return torch.tensor(len(batch["ends"]) / (2 if self.has_pairs else 1), device=batch["ends"].device)

    def loss(self, role, output, batch):
        """output: log p(label) [2n, s]."""
        l = sequence_logps(output, batch["loss_mask"])  # noqa: E741  [2n]
        u = l - batch["reference_logps"] if self.has_reference else l / batch["loss_mask"].sum(1)
        loss = self._losses(l, u, batch)
        return Loss(sum=loss.sum(), metrics=self._metrics(l.detach(), self.options.beta * u.detach(), batch))

    def _losses(self, l, u, batch):  # noqa: E741
        """One loss per pair [n], for kto per row [2n]."""
        o, lengths = self.options, batch["loss_mask"].sum(1)
        nll = -(l * batch["nll_scale"])[self._is_chosen(batch)] if self.has_nll else None
        match o.loss:
            case "kto":
                loss = losses.kto(u, batch["is_desirable"], batch["z"], o.beta, o.desirable_weight, o.undesirable_weight)
                return torch.cat([loss, o.nll_weight * nll]) if self.has_nll else loss
            case "rpo_nll":
                return losses.rpo_nll(difference(u), nll, o.beta, o.nll_weight)
            case "orpo":
                loss = losses.orpo(l, lengths, nll, o.beta)
            case "simpo":
                loss = losses.simpo(l, lengths, o.beta, o.gamma)
            case "ipo_mean":
                loss = losses.ipo_mean(u, lengths, o.beta)
            case "cdpo" | "robust":
                loss = getattr(losses, o.loss)(difference(u), o.beta, o.label_smoothing)
            case "rpo_squared" | "rpo_forward_kl" | "rpo_backward_kl":
                loss = getattr(losses, o.loss)(difference(u), batch["margins"][0::2], o.beta, o.eta)
            case _:  # dpo, hinge, ipo_sum
                loss = getattr(losses, o.loss)(difference(u), o.beta)
        return loss + o.nll_weight * nll if o.nll_weight else loss

    def _is_chosen(self, batch):
        """bool [2n]: rows of preferred answers."""
        return torch.arange(len(batch["ends"]), device=batch["ends"].device) % 2 == 0 if self.has_pairs else batch["is_desirable"]

    def _metrics(self, l, r, batch):  # noqa: E741
        """l: log-probabilities, r: implicit rewards, [2n]."""
        is_chosen = self._is_chosen(batch)
        metrics = {f"{what}/{name}": (x[rows].sum(), rows.sum())
                   for what, x in (("rewards", r), ("logps", l)) for name, rows in (("chosen", is_chosen), ("rejected", ~is_chosen))}
        if not self.has_pairs:
            return {**metrics, "kl": (batch["z"].sum(), self.count("policy", batch))}
        r_c, r_r = losses.pairs(r)
        num_pairs = self.count("policy", batch)
        l_c, l_r = losses.pairs(l)
        metrics["logps/accuracy"] = ((l_c > l_r).float().sum(), num_pairs)
        return {**metrics, "rewards/accuracy": ((r_c > r_r).float().sum(), num_pairs), "rewards/margin": ((r_c - r_r).sum(), num_pairs)}


def _scores(model, micro_batches):
    """Log-probability of each answer, [2n] per micro-batch, by the path that the policy's loss takes."""
    return [sequence_logps(logp, batch["loss_mask"].to(logp.device)) for logp, batch in zip(model.score(micro_batches), micro_batches)]


# --- the reference, stored --------------------------------------------------------------------------------------------


def stored_reference(run, datasets, place, make_loader, build_reference) -> None:
    """Give every dataset (engine/data/pairs.py) the reference log-probabilities of its answers: read from the data cache, and computed
    and written there first where they are missing. Collective: every rank calls, before training; nothing is built where all is there.

    place: engine/mcore/topology.py's. make_loader(dataset) -> Loader of this rank. build_reference() -> Model with the reference's
    weights; it is let go on return. The files are keyed by data, checkpoint and model. Rank 0 writes a file when all of it is known, so
    that one that was broken off leaves none. Raises DataError for a file that does not fit the data.
    """
    identity, model = _identity(run), None
    for dataset in datasets:
        references = []
        for source in dataset.sources:
            path = source.folder / f"reference-{identity}.npy"
            if not _on_rank_0(path.is_file):
                model = model or build_reference()
                values = _reference_of(run, source, make_loader, model)
                if place.rank == 0:
                    _write_whole(path, values)
                    log.info(f"wrote {values.size} reference log-probabilities to {path}")
                dist.barrier()
            references.append(_read(path, len(source.tokens)))
        dataset.references = references


def _reference_of(run, source, make_loader, model) -> np.ndarray:
    """Log-probability of every answer of a source, float32 [rows], equal on every rank."""
    num_pairs, size = len(source.tokens) // 2, run.train.global_batch
    loader = make_loader(pairs.in_order(source, run.train.seq_len, -(-num_pairs // size) * size))
    found = torch.zeros(2, 2 * num_pairs, dtype=torch.float64)  # what this replica scored, and where
    for first in range(0, len(loader.dataset), size):
        numbers = torch.from_numpy(loader.sample_numbers(first, size) % num_pairs)  # [micro-batches, pairs of one]
        logps = torch.stack(_scores(model, loader.batches(first, size))).cpu().double()
        rows = (2 * numbers[..., None] + torch.tensor([0, 1])).flatten()
        found[0, rows], found[1, rows] = logps.flatten(), 1.0
    values, counts = model.total(found).cpu()
    return (values / counts).float().numpy()


def _identity(run) -> str:
    """A digest of what the reference computes: the checkpoint it is loaded from, or the seed it is drawn from, and the model."""
    load = run.checkpoint.roles.get("reference") or run.checkpoint.load
    found = sorted(Path(load).rglob("metadata.json")) if load else []
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    key = [str(Path(load).resolve()) if load else run.run.seed, files, run.model.model_dump(), run.train.precision]
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()


def _on_rank_0(ask) -> bool:
    """Rank 0's answer, on every rank: a file may appear between two looks at a shared disk."""
    answer = [ask()]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _write_whole(path: Path, values: np.ndarray) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, values)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}; make room, or choose another data.cache_dir") from None


def _read(path: Path, num_rows: int) -> np.ndarray:
    try:
        values = np.load(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it, and the reference is computed again") from None
    if values.shape != (num_rows,) or not np.isfinite(values).all():
        raise DataError(f"{path} holds {values.size} log-probabilities, or some that are not finite, but the data has {num_rows} answers; remove it, "
                        "and the reference is computed again")
    return values


# --- options that do not go together ----------------------------------------------------------------------------------


def _problems(run):
    o, default = run.dpo, type(run.dpo)()
    for option, readers in READ_BY.items():
        value = getattr(o, option)
        if o.loss not in readers and value != getattr(default, option):
            yield f"dpo.{option}={value} is read by dpo.loss={' and '.join(readers)} only, not by {o.loss}; leave it out or change dpo.loss"
    if o.loss == "rpo_nll" and not o.nll_weight:
        yield "dpo.loss=rpo_nll without dpo.nll_weight would be plain dpo; set dpo.nll_weight (0.2 in Llama 3) or dpo.loss=dpo"
    if o.loss == "kto" and run.train.global_batch < 2:
        yield (f"dpo.loss=kto compares answers with other prompts of the batch, but train.global_batch is {run.train.global_batch}; "
               "raise it to 2 or more")
    if o.reference == "stored" and o.loss == "kto":
        yield "dpo.reference=stored cannot serve kto, whose mismatched pairs change every epoch; set dpo.reference=role"
    if o.reference == "stored" and o.loss in WITHOUT_REFERENCE:
        yield f"dpo.reference=stored, but dpo.loss={o.loss} has no reference; leave it out"
