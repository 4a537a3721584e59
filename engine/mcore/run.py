"""One network on the grid of ranks: forward and backward through megatron's schedules, gradients, optimizer step, scoring.

    model = ParallelModel(run, topology, stage, "policy")
    result = model.forward_backward(micro_batches)      # loss and metrics of the global batch, equal on every rank
    norm = model.step(lr)                               # reduce, clip, update; None when fp16 skipped the step. In two parts:
    norm = model.gradient_norm(lr)                      # and then update(norm) or skip_update()

A micro-batch enters as [b, s] tensors, the same on every tp, pp and cp rank of a dp replica. This file cuts it for context
parallel, runs the network, brings its output (log-probabilities or values) back to [b, s] and hands it to the stage's loss.
The loss is divided by the global count before the backward pass, so gradients need no scaling afterwards and fp16 sees
sensible numbers. Left out: which samples, and when to stop (engine/train.py).
"""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from engine import profiling
from engine.mcore import build, generate, masks, mtp, shared, tune
from engine.sampling import Generated, Sampling
from engine.stage import Role


@dataclass(frozen=True)
class Result:
    """What a global batch amounts to, equal on every rank. sums: name -> (sum, count), `loss` among them."""

    sums: dict[str, tuple[float, float]]

    @property
    def loss(self) -> float:
        return self.means["loss"]

    @property
    def metrics(self) -> dict[str, float]:
        """The means of what else the stage reported."""
        return {name: mean for name, mean in self.means.items() if name != "loss"}

    @property
    def means(self) -> dict[str, float]:
        return {name: total / count if count else float("nan") for name, (total, count) in self.sums.items()}


def _awake(act):
    """A method of ParallelModel that needs the weights on the device: of a role that rests in host memory they are there meanwhile."""

    @wraps(act)
    def awake(self, *args, **kwargs):
        if not self.role.rests_on_host or self.topology.device == "cpu":
            return act(self, *args, **kwargs)
        for chunk in self.chunks:
            chunk.to(self.topology.device)
        try:
            return act(self, *args, **kwargs)
        finally:
            for chunk in self.chunks:
                chunk.to("cpu")

    return awake


def _outcome(act):
    """(what act() returns, None), or (None, an error of a kind that any rank can raise again)."""
    try:
        return act(), None
    except (ValueError, OSError) as error:  # a person's to mend
        return None, ValueError(str(error))
    except Exception:
        return None, RuntimeError(traceback.format_exc())


class NonFiniteGradient(ValueError):
    """The global gradient norm is NaN or infinite; no weight was changed."""


class ParallelModel:
    """One role of a stage, split over the ranks that `topology` describes."""

    last: dict[str, float] = {}  # see engine/stage.py

    def __init__(self, run, topology, stage, name: str, role: Role = Role(), adapters_of=None, copies=None):
        """Of a role that does not train no optimizer and no gradients are built. adapters_of: see build.for_role. copies: what has begun to
        move batches to the device, see engine/data/feed.py."""
        run = build.for_role(run, role.train, role.head, adapters_of)
        self.run, self.topology, self.stage, self.name, self.role = run, topology, stage, name, role
        self._to_device = copies.of if copies else lambda tensor: tensor.to(topology.device)
        self.on_te = build.backend_of(run, topology.device) == "te"
        if self.on_te:
            from engine.mcore import spec_te, tp_overlap

            spec_te.check(run)
            if run.parallel.tp_comm_overlap:
                tp_overlap.start(run)
        self.chunks = build.build_model(run, topology.device, role.train)
        for chunk in self.chunks:
            build.bare(chunk).temperature = role.temperature
        self.config = self.chunks[0].config  # the one the schedules read
        self.optimizer = build.build_optimizer(run, self.chunks) if role.train else None
        self.rows_alike = stage.rows_alike if shared.is_possible(run, self.on_te) else 1
        self.pull = tune.PullToStart(run.tune.l2_to_init) if role.train and run.tune.l2_to_init else None
        self._forward_backward = get_forward_backward_func()
        self._metric_names: dict[bool, list[str]] = {}
        self._aux_divisor = 1.0
        self.learns_further = build.learns_further(run.model)
        if role.train:
            self.config.grad_scale_func = self._scale_loss

    # --- training ---------------------------------------------------------------------------------------------------

    @profiling.phase("forward and backward")
    def forward_backward(self, micro_batches: list[dict]) -> Result:
        """Gradients of one global batch, accumulated over this replica's micro-batches. Weights stay."""
        self._biases = self._router_biases()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_moe_layer_wise_logging_tracker().clear()  # megatron sums MoE losses over calls, for observe.moe_losses
        result = self._run(micro_batches, forward_only=False)
        self.last = result.means
        return result

    def step(self, lr: float, number: int = 1) -> float | None:
        """gradient_norm and, unless fp16 overflowed, update. Raises NonFiniteGradient, weights unchanged, when the norm is not finite."""
        norm = self.gradient_norm(lr, number)
        if norm is None:
            return None
        if not math.isfinite(norm):
            self.skip_update()
            raise NonFiniteGradient(f"the gradient norm is {norm}")
        self.update(norm)
        return norm

    @torch.no_grad()
    @profiling.phase("gradient norm")
    def gradient_norm(self, lr: float, number: int = 1) -> float | None:
        """Make the gradients ready for an update with learning rate lr; `number` counts steps from 1. Returns their global norm before
        clipping, or None if fp16 overflowed and the loss scaler skips the update. `update` or `skip_update` follows. Collective."""
        tune.set_rates(self.optimizer, self.run, lr, number)
        if self.pull:
            self.pull.add_gradient(self.chunks, self.loss_scale)
        tune.drop_frozen_gradients(self.chunks, self.run, number)
        return None if self._prepare_gradients() else float(self.optimizer.get_grad_norm())

    @torch.no_grad()
    @profiling.phase("optimizer")
    def update(self, norm: float) -> None:
        """Clip the gradients, whose norm this is, and update the weights. Collective."""
        self._clip(norm)
        self.optimizer.step_with_ready_grads()
        self._forget_gradients()

    @torch.no_grad()
    def skip_update(self) -> None:
        """Drop the gradients: weights, the optimizer's state and the router's bias are bit for bit what they were before forward_backward."""
        for bias, before in self._biases:
            bias.copy_(before)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for parameter in self._fp32_parameters:
            parameter.grad = None  # it aliases main_grad; kept, the next first micro-batch would be counted twice

    def where_not_finite(self) -> tuple[list[int], list[str]]:
        """Of the last forward_backward: this replica's micro-batches whose loss is not finite (known on its last pp rank), and the parameters
        of this rank whose gradient is not."""
        losses = [i for i, report in enumerate(self._reports) if not math.isfinite(report["loss"][0])]
        parameters = (pair for chunk in self.chunks for pair in build.bare(chunk).named_parameters())
        return losses, [name for name, parameter in parameters if parameter.requires_grad and not parameter.main_grad.isfinite().all()]

    def _prepare_gradients(self) -> bool:
        """Hand the gradients to the optimizer without the loss scale; True if fp16 overflowed. megatron's own prepare_grads moves a
        scale of the dense and another of the expert parameters, but scales the loss with the dense one only."""
        parts = self.optimizer.chained_optimizers
        scaler = getattr(parts[0], "grad_scaler", None)
        if scaler is None:
            return self.optimizer.prepare_grads()
        for part in parts:
            if not part.is_stub_optimizer:
                part._copy_model_grads_to_main_grads()
        overflows = [part._unscale_main_grads_and_check_for_nan() for part in parts]  # of all parts: it is collective
        scaler.update(any(overflows))
        return any(overflows)

    def _router_biases(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each bias by which aux-free balancing steers a router, and a copy: megatron moves it at the end of the backward pass."""
        if self.run.model.moe.balance != "aux_free":
            return []
        return [(buffer, buffer.clone()) for chunk in self.chunks for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]

    def gather_weights(self) -> None:
        """Complete the weights of this rank before they are read outside a forward pass: with overlap_param_gather the next
        forward would gather them, and FP8 weights are loaded shard by shard. Collective."""
        if self.optimizer is None or not (self.run.parallel.overlap_param_gather or self.run.train.fp8.params):
            return
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)
            quantized = [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]
            if quantized:
                post_all_gather_processing(quantized)  # megatron forgets it when a gather that overlaps is forced

    def _clip(self, norm: float) -> None:
        limit = self.run.optim.clip_grad
        if not limit:
            return
        for optimizer in self.optimizer.chained_optimizers:
            parameters = [] if optimizer.is_stub_optimizer else optimizer.get_parameters()
            if parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=norm,
                                             use_decoupled_grad=optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)

    @property
    def _fp32_parameters(self):
        if self.run.train.precision != "fp32":
            return []
        return (parameter for chunk in self.chunks for parameter in chunk.parameters())

    @property
    def loss_scale(self) -> float:
        return float(self.optimizer.get_loss_scale())

    def _scale_loss(self, loss):
        # megatron applies this to the loss and to the MoE auxiliary losses alike; see _loss for the other half.
        return loss * (self.optimizer.get_loss_scale() / self._aux_divisor)

    # --- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, micro_batches: list[dict]) -> Result:
        """Loss and metrics without gradients."""
        for chunk in self.chunks:
            chunk.eval()
        return self._run(micro_batches, forward_only=True)

    @torch.no_grad()
    @_awake
    @profiling.phase("score")
    def score(self, micro_batches: list[dict]) -> list[torch.Tensor]:
        """The output of each micro-batch, fp32 [b, s], on every rank of the replica: the log-probability of each label where loss_mask
        is not 0, or with the scalar head one value per token. All micro-batches have one shape."""
        for chunk in self.chunks:
            chunk.eval()
            build.bare(chunk).wants_entropy = False
        wanted = len(micro_batches)
        if self.run.parallel.vpp > 1:  # the interleaved schedule runs whole rounds of pp micro-batches
            micro_batches = micro_batches + [micro_batches[-1]] * (-wanted % self.topology.pp)
        outputs = self._pass(self._fed(micro_batches), self._collect, forward_only=True)
        if self.topology.pp == 1:
            return outputs[:wanted]
        shape = (wanted, *micro_batches[0]["tokens"].shape)
        whole = torch.stack(outputs[:wanted]) if outputs else torch.empty(shape, device=self.topology.device)
        dist.broadcast(whole, src=mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group())
        return list(whole.unbind())

    def greedy(self, micro_batches: list[dict]) -> list[torch.Tensor]:
        """For each micro-batch, bool [b, s]: is the label the most probable token? On every rank of the replica."""
        networks = [build.bare(chunk) for chunk in self.chunks]
        for network in networks:
            network.is_greedy = True
        try:
            return [hit > 0.5 for hit in self.score(micro_batches)]
        finally:
            for network in networks:
                network.is_greedy = False

    @_awake
    @profiling.phase("generate")
    def generate(self, prompts: list[list[int]], sampling: Sampling, keys: list[int] | None = None, decode=None, on_token=None,
                 batch: int = 0) -> list[Generated]:
        """One answer for each prompt of this replica, on all its ranks; see engine/mcore/generate.py. Collective."""
        return generate.generate(self, prompts, sampling, keys, decode, on_token, batch)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all replicas."""
        values = values.to(self.topology.device, copy=True)
        dist.all_reduce(values, group=mpu.get_data_parallel_group())
        return values

    def gathered(self, act: Callable[[], list]) -> list:
        """What act() returns, called on one rank of every replica, replica by replica, on every rank. An error of any is raised on all."""
        t, found = self.topology, [None]
        if t.tp_rank == t.pp_rank == t.cp_rank == 0:
            found = [None] * t.dp
            dist.all_gather_object(found, _outcome(act), group=mpu.get_data_parallel_group())
            found = [found]
        for group in (mpu.get_context_parallel_group(), mpu.get_model_parallel_group()):
            dist.broadcast_object_list(found, src=dist.get_global_rank(group, 0), group=group)
        for things, error in found[0]:
            if error:
                raise error
        return [thing for things, _ in found[0] for thing in things]

    # --- one pass through the schedule ------------------------------------------------------------------------------

    def _run(self, micro_batches: list[dict], forward_only: bool) -> Result:
        for chunk in self.chunks:
            build.bare(chunk).wants_entropy = self.role.wants_entropy
        count = self._global_sum(self.stage.count(self.name, batch) for batch in micro_batches)
        further_count = None
        if self.learns_further:
            micro_batches = [{**batch, **mtp.targets(batch, self.run.model.mtp.num_layers)} for batch in micro_batches]
            further_count = self._global_sum(batch["further_mask"].sum() for batch in micro_batches)
        if not forward_only and not self.role.wants_entropy:
            micro_batches = [{**batch, **self._proportions(batch)} for batch in micro_batches]
        batches = self._fed(micro_batches)
        self._aux_divisor = self._tokens_for_aux(batches)
        self.num_microbatches = len(batches)
        on_output = partial(self._loss, count=count, further_count=further_count)
        return self._reduce(self._pass(batches, on_output, forward_only), count, forward_only)

    def _pass(self, batches: list[dict], on_output, forward_only: bool) -> list:
        """Drive megatron's schedule over the micro-batches; what on_output(batch, output) reports, on the last pp rank."""
        shape = batches[0]["tokens"].shape
        return self._forward_backward(
            forward_step_func=partial(self._forward_step, on_output=on_output),
            data_iterator=[iter(batches) for _ in self.chunks] if len(self.chunks) > 1 else iter(batches),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=forward_only,
        )

    def _fed(self, micro_batches: list[dict]) -> list[dict]:
        """What the network is fed with, on this rank's device: the micro-batches, rows that begin alike merged where that saves work."""
        rows, seq_len = micro_batches[0]["tokens"].shape
        if self.rows_alike > 1 and rows % self.rows_alike == 0:
            width = torch.tensor(max(shared.width(batch, self.rows_alike) for batch in micro_batches), device=self.topology.device)
            dist.all_reduce(width, op=dist.ReduceOp.MAX, group=mpu.get_data_parallel_group())  # one shape, and one decision, for all replicas
            multiple = self.topology.sequence_multiple(self.run)
            width = -(-int(width) // multiple) * multiple
            if width <= shared.WORTH * self.rows_alike * seq_len:
                micro_batches = [shared.merge(batch, width, self.rows_alike) for batch in micro_batches]
        return [self._place(batch) for batch in micro_batches]

    def _place(self, batch: dict) -> dict:
        """The micro-batch on this rank's device, with the places whose log-probabilities the loss looks at (`asked`)."""
        of = {"of": self._moved(batch["of"])} if "of" in batch else {}
        batch = {**batch, **self._asked(batch)}
        if self.on_te and "segment_ids" in batch:
            from engine.mcore.spec_te import document_bounds

            if self.topology.cp > 1:  # a stage of one's own; the configuration is refused for ours
                raise ValueError(f"the te backend has no document masks under context parallel (parallel.cp={self.topology.cp}); set train.backend=torch")
            batch = {**batch, **document_bounds(batch["segment_ids"])}
        return self._moved({name: t for name, t in batch.items() if name != "of"}) | of

    def _moved(self, batch: dict) -> dict:
        # max_document stays on the host: it is an argument of a kernel launch, not an operand.
        return {name: t if name == "max_document" else self._to_device(t) for name, t in batch.items()}

    def _proportions(self, batch: dict) -> dict:
        """What the losses' gradients of the log-probabilities are proportional to, [b, s], as far as it is known beforehand."""
        if self.run.model.head != "tokens" or self.rows_alike > 1:
            return {}
        further = {"further_proportions": batch["further_mask"]} if self.learns_further else {}
        known = self.stage.proportions(self.name, batch)
        return further if known is None else {"proportions": known, **further}

    def _asked(self, batch: dict) -> dict:
        """Places of this cp rank where loss_mask is not 0, in the order of [s / cp, b]; nothing where all or hardly any less are. Of those
        places `proportions`. Computed on the host, so that a device is not waited for."""
        if self.run.model.head != "tokens":
            return {}
        found = {}
        for asked, mask, proportions in (("asked", "loss_mask", "proportions"), ("further_asked", "further_mask", "further_proportions")):
            if mask in batch:
                own = self._flat(batch[mask], batch)
                places = own.nonzero().view(-1)
                if len(places) < 0.9 * own.numel():
                    found[asked] = places
            if proportions in batch:
                own = self._flat(batch[proportions], batch).float()
                found[proportions] = own.index_select(0, found[asked]) if asked in found else own
        return found

    def _flat(self, of_tokens, batch: dict) -> torch.Tensor:
        """[b, s] -> this cp rank's part in the order of [s / cp, b], flat."""
        t = self.topology
        return masks.shard({"tokens": batch["tokens"], "own": of_tokens}, batch["tokens"].size(1), t.cp_rank, t.cp)["own"].t().reshape(-1)

    def _global_sum(self, counts) -> torch.Tensor:
        """[1], of what this replica's micro-batches count, over all replicas."""
        count = sum(counts).float().reshape(1)
        count = count.to(self.topology.device)
        dist.all_reduce(count, group=mpu.get_data_parallel_group())
        return count

    def _tokens_for_aux(self, batches) -> float:
        """Tokens of the global batch per tp and cp rank: what turns megatron's per-token auxiliary losses into a mean.

        Its router multiplies each auxiliary loss by the tokens one rank holds; summed over tp, cp and dp ranks and
        micro-batches that is this number times the mean over micro-batches, whatever unit the stage's loss counts in.
        """
        if not self.run.model.moe.num_experts:
            return 1.0
        t = self.topology
        return sum(batch["tokens"].numel() for batch in batches) * t.dp / (t.tp * t.cp)

    def _forward_step(self, data_iterator, chunk, on_output):
        full = next(data_iterator)
        seq_len = full["tokens"].size(1)
        t = self.topology
        names = ("tokens", "labels", "position_ids", "further_tokens", "further_labels")
        batch = masks.shard({name: full[name] for name in names if name in full}, seq_len, t.cp_rank, t.cp)
        network = build.bare(chunk)
        network.asked, network.proportions = full.get("asked"), full.get("proportions")
        further = {name: full.get(name) for name in ("further_asked", "further_proportions")}
        network.further = {**batch, **further} if "further_tokens" in batch else None
        if "of" in full and network.position_embedding_type == "rope":
            network.rotary_pos_emb.positions = batch["position_ids"]
        tune.add_noise(network, full, self.run, t)
        output = chunk(
            batch["tokens"],
            batch["position_ids"],
            labels=batch["labels"],
            **self._attention(full, seq_len),
        )
        if "of" in full and network.position_embedding_type == "rope":
            network.rotary_pos_emb.positions = None
        if network.further and network.post_process:
            full, network.further_output = {**full, "further_output": network.further_output}, None
        return output, partial(on_output, full)

    def _attention(self, full, seq_len) -> dict:
        if self.on_te:
            from engine.mcore.spec_te import attention_inputs

            return attention_inputs(full)
        t = self.topology
        return dict(attention_mask=masks.document_mask(full.get("segment_ids"), seq_len, t.cp_rank, t.cp, full["tokens"].device,
                                                        has_trunk="of" in full))

    def _loss(self, batch, output, count, further_count):
        """Output [b, s / cp] -> what megatron's schedule wants: (loss to differentiate, a count it ignores, what to report)."""
        loss = self.stage.loss(self.name, self._whole(output, batch), batch.get("of", batch))
        report = {"loss": (loss.sum.detach().clone(), torch.zeros_like(count)), **loss.metrics}  # clone: the schedule divides in place
        total = loss.sum * (self._aux_divisor / count[0])
        if further_count is not None:
            mask = batch["further_mask"]
            nll = -(self._whole(batch["further_output"], batch) * mask).sum()
            total = total + nll * (self._aux_divisor * self.run.model.mtp.loss_weight / further_count[0].clamp(min=1))
            report["mtp_loss"] = nll.detach().clone(), mask.sum()
        return total, torch.zeros([], dtype=torch.int, device=output.device), report

    def _collect(self, batch, output):
        whole = self._whole(output, batch)
        return whole.sum(), torch.zeros([], dtype=torch.int, device=output.device), whole

    def _whole(self, output, batch) -> torch.Tensor:
        """Output [b, s / cp] of this cp rank -> fp32 [b, s], of the rows that the stage gave. Differentiable: every cp rank computes the
        whole loss, and backward keeps this rank's slice. Contiguous, so that a stage sums it in the same order as what `score` gave."""
        output = output.float()
        if self.topology.cp > 1:
            gathered = gather_from_sequence_parallel_region(output.transpose(0, 1).contiguous(), tensor_parallel_output_grad=False,
                                                            group=mpu.get_context_parallel_group())
            output = masks.unshard(gathered.transpose(0, 1), self.topology.cp)
        return (shared.unfold(output, batch) if "of" in batch else output).contiguous()

    # --- reporting --------------------------------------------------------------------------------------------------

    def _reduce(self, outputs: list[dict], count, forward_only: bool) -> Result:
        """Sum the last pp rank's reports over micro-batches and dp, and tell every pp rank."""
        names, self._reports = self._names(outputs, forward_only), outputs
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=count.device)
        for report in outputs:
            for row, name in enumerate(names):
                sums[row] += torch.stack([torch.as_tensor(x, device=count.device).double().reshape(()) for x in report[name]])
        dist.all_reduce(sums, group=mpu.get_data_parallel_group())
        if self.topology.pp > 1:
            dist.all_reduce(sums, group=mpu.get_pipeline_model_parallel_group())
        found = {name: (total, n) for name, (total, n) in zip(names, sums.tolist())}
        return Result({**found, "loss": (found["loss"][0], float(count))})

    def _names(self, outputs, forward_only: bool) -> list[str]:
        """Names of the reports, known on the last pp rank only, told to the others once; validation may report what training does not."""
        if forward_only not in self._metric_names:
            names = [list(outputs[0]) if outputs else []]
            if self.topology.pp > 1:
                dist.broadcast_object_list(names, src=mpu.get_pipeline_model_parallel_last_rank(),
                                           group=mpu.get_pipeline_model_parallel_group())
            self._metric_names[forward_only] = names[0]
        return self._metric_names[forward_only]
