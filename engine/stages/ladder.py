"""The rungs of stage long_context, each a RunConfig of its own. No torch here, so that engine/checks.py can refuse them beforehand.

    for rung in rungs(run): ...       # RUN/rung_1_16384, RUN/rung_2_32768, ...

Left out: what is measured between them (long_context.py).
"""

import math
from pathlib import Path


def rungs(run) -> list:
    """One RunConfig per rung of run.long_context.ladder, shortest first; `run` itself where there is none.

    Each rung trains in a folder below run.dir and starts from the folder of the one before, the first from checkpoint.load. What a
    rung says about RoPE holds for the rungs after it too. Its seed is run.seed plus its number, for otherwise every rung would
    read the corpus in the same order from the start, and so the same documents.
    """
    found, model, load = [], with_room(run.model, run.train.seq_len), run.checkpoint.load
    for number, rung in enumerate(run.long_context.ladder, start=1):
        rope = {"rope_theta": rung.rope_theta or model.rope_theta, "rope_scaling": rung.rope_scaling or model.rope_scaling}
        model = with_room(model.model_copy(update=rope), rung.seq_len)
        folder, steps = Path(run.run.dir) / f"rung_{number}_{rung.seq_len}", -(-rung.tokens // (rung.global_batch * rung.seq_len))
        found.append(run.model_copy(update={
            "run": run.run.model_copy(update={"dir": str(folder), "seed": run.run.seed + number}),
            "model": model,
            "data": run.data.model_copy(update={"train": rung.train or run.data.train, "cache_dir": cache_dir(run)}),
            "train": run.train.model_copy(update={"seq_len": rung.seq_len, "global_batch": rung.global_batch, "micro_batch": rung.micro_batch,
                                                  "steps": steps}),
            "optim": run.optim.model_copy(update={"lr": rung.lr or run.optim.lr}),
            "long_context": run.long_context.model_copy(update={"ladder": []}),
            "profile": run.profile if run.profile.first_step <= steps else type(run.profile)(),      # only longer rungs are profiled
            "checkpoint": run.checkpoint.model_copy(update={"load": load, **_AFRESH}),
        }))
        load = str(folder)
    return found or [run.model_copy(update={"model": model, "checkpoint": run.checkpoint.model_copy(update=_AFRESH)})]


# Each rung has a schedule and a data order of its own, and the next one starts from what it saves at its end.
_AFRESH = {"load_position": False, "save_at_end": True}


def with_room(model, seq_len: int):
    """The model with max_position grown to seq_len; learned positions are weights and stay."""
    grows = model.position != "learned" and 0 < model.max_position < seq_len
    return model.model_copy(update={"max_position": seq_len}) if grows else model


def cache_dir(run) -> str:
    """The index cache that all rungs share."""
    return run.data.cache_dir or str(Path(run.run.dir) / "index_cache")


def problems(run):
    """What is wrong with the section long_context, one sentence each; engine/checks.py asks every rung for the rest."""
    if run.stage != "long_context":
        return
    wanted, train = run.long_context, run.train
    if not run.checkpoint.load:
        yield "stage=long_context lengthens the context of a trained model; name its checkpoint in checkpoint.load"
    if not train.eval_samples:
        yield "stage=long_context measures the short-context loss, but train.eval_samples is 0; set how many samples a validation reads"
    if not (run.data.valid or run.data.split):
        yield "stage=long_context measures the short-context loss, but there is no validation set; set data.valid or data.split"
    if wanted.needle_threshold and not wanted.needle_samples:
        yield (f"long_context.needle_threshold({wanted.needle_threshold:g}) but needle_samples is 0, so nothing can pass; set needle_samples, "
               "or needle_threshold=0")
    if wanted.ladder and train.max_tokens:
        yield f"train.max_tokens({train.max_tokens}) would end every rung of long_context.ladder; set it to 0 and give each rung its tokens"
    if run.parallel.tp_comm_overlap:
        yield "parallel.tp_comm_overlap fixes the number of tokens, but stage=long_context measures at other lengths too; set it to false"


def lengths(run):
    """Rungs that are not longer than the one before, and a short length that is too long or does not split; one sentence each."""
    if run.stage != "long_context":
        return
    rungs, short = run.long_context.ladder, run.long_context.short_seq_len
    for i, (before, rung) in enumerate(zip(rungs, rungs[1:]), start=1):
        if rung.seq_len <= before.seq_len:
            yield (f"long_context.ladder.{i}.seq_len({rung.seq_len}) does not exceed that of the rung before ({before.seq_len}); "
                   "list rungs by rising length")
    first = rungs[0].seq_len if rungs else run.train.seq_len
    if short > first:
        yield f"long_context.short_seq_len({short}) exceeds the length that is trained first({first}); lower it"
    yield from unsplit(run, short)


def unsplit(run, short: int):
    """Why rows of the short length do not split over the ranks of a sequence, if they do not."""
    p = run.parallel
    multiple = math.lcm(2 * p.cp if p.cp > 1 else 1, p.cp * p.tp if p.sequence_parallel else 1)
    if short % multiple:
        yield (f"long_context.short_seq_len({short}) is not divisible by {multiple}, which cp({p.cp}) and sequence_parallel need; "
               f"set it to {max(short // multiple, 1) * multiple}")
