"""Schedules against megatron-core's own classes, and the data position against counting step by step.

Left out: how the trainer uses them; that is tested with the trainer.
"""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import Optim, Rampup, Schedule, Train
from engine.schedule import consumed_samples_after, global_batch, learning_rate, planned_steps, step_of_sample

MEGATRON_KIND = {"constant": "constant", "cosine": "cosine", "linear": "linear", "inverse_sqrt": "inverse-square-root", "wsd": "WSD"}
SHAPES = ("linear", "cosine", "exponential", "minus_sqrt")
KINDS = [(kind, "linear") for kind in ("constant", "cosine", "linear", "inverse_sqrt")] + [("wsd", shape) for shape in SHAPES]


def megatron_rates(optim: Optim, schedule: Schedule, total_steps: int, steps: int) -> list[float]:
    """The rate of each step of a Megatron-LM loop: take the step, then move the scheduler by one."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    group = {}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), init_lr=schedule.init_lr, max_lr=optim.lr, min_lr=schedule.min_lr,
        lr_warmup_steps=schedule.warmup_steps, lr_decay_steps=schedule.decay_steps or total_steps,
        lr_decay_style=MEGATRON_KIND[schedule.kind], start_wd=0.1, end_wd=0.1, wd_incr_steps=1, wd_incr_style="constant",
        wsd_decay_steps=schedule.wsd_decay_steps, lr_wsd_decay_style=schedule.wsd_shape)
    rates = []
    for _ in range(steps):
        rates.append(group["lr"])
        scheduler.step(1)
    return rates


@pytest.mark.parametrize("kind, shape", KINDS)
@pytest.mark.parametrize("warmup, init, floor, decay_steps", [(0, 0.0, 0.0, 0), (7, 0.0, 1e-5, 0), (13, 2e-5, 3e-5, 37)])
def test_every_shape_equals_megatron_bit_for_bit(kind, shape, warmup, init, floor, decay_steps):
    optim = Optim(lr=3e-4)
    schedule = Schedule(kind=kind, warmup_steps=warmup, init_lr=init, min_lr=floor, decay_steps=decay_steps,
                        wsd_decay_steps=11, wsd_shape=shape)
    ours = [learning_rate(step, optim, schedule, total_steps=50) for step in range(1, 61)]
    assert ours == megatron_rates(optim, schedule, total_steps=50, steps=60)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_schedule_equals_megatron(data):
    kind, shape = data.draw(st.sampled_from(KINDS))
    total = data.draw(st.integers(3, 200))
    warmup = data.draw(st.integers(0, total - 2))
    lr = data.draw(st.floats(1e-6, 1.0))
    schedule = Schedule(kind=kind, warmup_steps=warmup, init_lr=lr * data.draw(st.floats(0, 1)), min_lr=lr * data.draw(st.floats(0, 1)),
                        wsd_decay_steps=data.draw(st.integers(1, total - warmup)), wsd_shape=shape)
    ours = [learning_rate(step, Optim(lr=lr), schedule, total) for step in range(1, total + 3)]
    assert ours == megatron_rates(Optim(lr=lr), schedule, total, total + 2)


def test_numbering_of_the_warm_up_and_of_the_end():
    schedule = Schedule(kind="linear", warmup_steps=4, init_lr=0.0, min_lr=0.0)
    rates = [learning_rate(step, Optim(lr=1.0), schedule, total_steps=8) for step in range(1, 10)]
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]      # the zero at the end is step 9, after the run


@pytest.mark.parametrize("shape, half", [("linear", 0.5), ("cosine", 0.5), ("exponential", math.sqrt(2) - 1), ("minus_sqrt", 1 - math.sqrt(0.5))])
def test_tails_of_wsd_by_their_formulas(shape, half):
    schedule = Schedule(kind="wsd", wsd_decay_steps=10, wsd_shape=shape, min_lr=1.0)
    rate = {step: learning_rate(step, Optim(lr=2.0), schedule, total_steps=30) for step in (1, 21, 26, 31)}
    assert rate[1] == rate[21] == 2.0
    assert rate[26] == pytest.approx(1.0 + half)
    assert rate[31] == pytest.approx(1.0)


def train(**fields) -> Train:
    return Train(**{"seq_len": 16, "global_batch": 32, "steps": 100, **fields})


RAMPS = [(8, 8, 200, 32), (4, 4, 97, 64), (16, 16, 16, 48), (2, 2, 1000, 8), (32, 8, 100, 32), (2, 1, 1_000_003, 1501)]


@pytest.mark.parametrize("start, increment, samples, full", [ramp for ramp in RAMPS if ramp[0] != ramp[3]])
def test_ramp_up_equals_megatron(start, increment, samples, full):
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    megatron = RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size=full, micro_batch_size=1, data_parallel_size=1, decrease_batch_size_if_needed=False, rank=1,
        start_global_batch_size=start, batch_size_increment=increment, ramup_samples=samples)
    config = train(global_batch=full, rampup=Rampup(start=start, increment=increment, samples=samples))
    for consumed in {*range(0, min(samples, 2000)), *range(0, samples, 501), samples - 1, samples, samples + 1, 10 * samples}:
        megatron.update(consumed, consistency_check=False)
        assert global_batch(consumed, config) == megatron.get_current_global_batch_size(), consumed


@pytest.mark.parametrize("start, increment, samples, full", [*RAMPS, (0, 1, 0, 32)])
def test_position_of_a_step_equals_counting(start, increment, samples, full):
    config = train(global_batch=full, rampup=Rampup(start=start, increment=increment, samples=samples))
    consumed = 0
    for step in range(1, 400):
        assert consumed_samples_after(step - 1, config) == consumed
        batch = global_batch(consumed, config)
        assert step_of_sample(consumed, config) == step
        assert step_of_sample(consumed + batch - 1, config) == step
        consumed += batch


def test_without_ramp_up_the_position_is_a_product():
    assert consumed_samples_after(0, train()) == 0
    assert consumed_samples_after(10**9, train()) == 32 * 10**9
    assert global_batch(0, train()) == global_batch(10**12, train()) == 32


def test_ramp_up_starts_small_and_ends_full():
    config = train(rampup=Rampup(start=8, increment=8, samples=96))
    batches = [consumed_samples_after(n + 1, config) - consumed_samples_after(n, config) for n in range(9)]
    assert batches == [8, 8, 8, 8, 16, 16, 24, 24, 32]


@pytest.mark.parametrize("max_tokens, steps", [(0, 100), (1, 1), (512, 1), (513, 2), (512 * 40, 40), (512 * 1000, 100)])
def test_tokens_may_end_a_run_before_its_steps(max_tokens, steps):
    assert planned_steps(train(max_tokens=max_tokens)) == steps
