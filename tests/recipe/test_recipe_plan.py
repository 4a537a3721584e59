"""What a recipe plans: sources, models, steps, estimates; and what it refuses before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipe_stub import CHAT, MODEL, TEXT, TRAIN, base, chain, measure, stage, write
from scipy.optimize import minimize_scalar

from engine.config import ConfigError
from engine.recipe import scaling
from engine.recipe.execute import read_state
from engine.recipe.plan import make_plan
from engine.recipe.report import plan_text

ROOT = Path(__file__).parents[2]


def test_a_stage_starts_from_the_one_before_and_roles_from_the_ones_they_name(tmp_path):
    plan = make_plan(write(tmp_path, chain(base=base(), sft=stage("sft"), reward=stage("reward"),
                                           dpo=stage("dpo", **{"from": "sft", "roles": {"reference": "sft"}}), fresh=base())))
    assert [(step.name, step.sources) for step in plan.steps] == [
        ("base", {}), ("sft", {"load": "base"}), ("reward", {"load": "sft"}), ("dpo", {"load": "sft", "reference": "sft"}), ("fresh", {})]
    assert [step.script for step in plan.steps] == ["pretrain.py", "align.py", "align.py", "align.py", "pretrain.py"]
    wired = plan.step("dpo").wired({"load": Path("a/sft"), "reference": Path("b/sft")})
    assert wired["run"] == {"dir": str(tmp_path / "work/dpo")} and wired["checkpoint"] == {"load": "a/sft", "roles": {"reference": "b/sft"}}
    assert wired["stage"] == "dpo" and "model" not in wired      # the engine takes the checkpoint's
    assert plan.descendants("sft") == ["reward", "dpo"] and plan.descendants("fresh") == []


def test_the_model_follows_the_chain_through_a_ladder(tmp_path):
    ladder = {"ladder": [{"seq_len": 64, "tokens": 512, "global_batch": 4, "rope_theta": 30000}, {"seq_len": 128, "tokens": 1024, "global_batch": 4}]}
    long = stage("long_context")
    long["keys"] = {**long["keys"], "long_context": {**ladder, "needle_samples": 0}}
    plan = make_plan(write(tmp_path, chain(base=base(), long=long, sft=stage("sft"))))
    assert [path.name for path in plan.step("long").folders] == ["rung_1_64", "rung_2_128"]
    assert plan.step("sft").run.model.rope_theta == 30000 and plan.step("sft").run.model.hidden_size == 32
    assert plan.step("sft").run.checkpoint.load == str(tmp_path / "work/long/rung_2_128")
    assert [step.run.model.rope_theta for step in plan.steps][0] == 10000


def test_configuration_files_lie_beside_the_recipe_and_keys_over_them(tmp_path):
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({"stage": "sft", "run": {"dir": "elsewhere", "seed": 7}, **CHAT}))
    path = write(tmp_path, chain(base=base(), sft={"config": "sft.yaml", "keys": {"train": {"steps": 3}}}))
    plan = make_plan(path, ["stages.sft.keys.optim.lr=0.5"])
    run = plan.step("sft").run
    assert (run.run.seed, run.train.steps, run.train.seq_len, run.optim.lr) == (7, 3, 32, 0.5)
    assert run.run.dir == str(tmp_path / "work/sft")


# --- tokens -------------------------------------------------------------------------------------------------------------


# By hand: embedding and output 2 * 62 * 32; final norm 32; per layer query and output 2 * 32 * 32, key and value 2 * 16 * 32,
# gate, up and down 3 * 32 * 48, two norms 64.
PARAMETERS = 2 * 62 * 32 + 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32)


@pytest.mark.parametrize("entry, steps", [({"tokens": 1000}, 8), ({"tokens": 1024}, 8), ({"tokens": 1.025e3}, 9), ({}, 6),
                                          ({"tokens": "chinchilla"}, -(-PARAMETERS * 20 // 128)),
                                          ({"tokens": "chinchilla", "tokens_per_parameter": 0.5}, -(-PARAMETERS // 256))])
def test_tokens_become_steps_of_128_tokens(tmp_path, entry, steps):
    assert make_plan(write(tmp_path, chain(base=base(**entry)))).step("base").run.train.steps == steps


def test_a_law_says_the_tokens_that_make_a_size_the_best_for_its_compute(tmp_path):
    law = scaling.Law("surface", {"E": 1.5, "A": 40.0, "B": 90.0, "alpha": 0.4, "beta": 0.3})
    scaling.write(law, tmp_path / "law.json")
    plan = make_plan(write(tmp_path, chain(base=base(tokens="chinchilla", law=str(tmp_path / "law.json")))))
    tokens = plan.step("base").run.train.steps * 128
    best = minimize_scalar(lambda log_n: law.loss(10**log_n, PARAMETERS * tokens / 10**log_n), bracket=(3, 5))      # along constant 6 N D
    assert 10**best.x == pytest.approx(PARAMETERS, rel=0.01)


# --- refusals -------------------------------------------------------------------------------------------------------------


def gated(**gate) -> dict:
    return {**chain(base=base(), sft=stage("sft", gates=[{"metric": "valid_loss", **gate}])), "measures": {"kept": measure()}}


REFUSED = {
    "stages.sft.form is no key of a recipe; did you mean from?": chain(base=base(), sft=stage("sft", form="base")),
    "mesures is no key of a recipe; did you mean measures?": {**chain(), "mesures": {}},
    "stages.sft.gates.0.at_leest is no key": gated(set="held_out", at_leest=1),
    "stages.sft: from=bas is no stage of this recipe; did you mean base?": chain(base=base(), sft=stage("sft", **{"from": "bas"})),
    "stages.sft: from=more does not run before it": chain(
        base=base(), sft=stage("sft", **{"from": "more"}), more=stage("continued", **{"from": "base"})),
    "stages.dpo: it would start from reward, a reward model": chain(base=base(), reward=stage("reward"), dpo=stage("dpo")),
    "stages.sft: train.seq_len is required": chain(
        base=base(), sft={"keys": {"stage": "sft", "data": CHAT["data"], "train": {"global_batch": 4, "steps": 1}}}),
    "stages.sft: no configuration file at": chain(base=base(), sft={"config": "none.yaml"}),
    "stages.sft: it has no configuration": chain(base=base(), sft={}),
    "stages.sft: stage=sftt is unknown; did you mean sft?": chain(base=base(), sft=stage("sftt")),
    "stages.base.tokens='many': give a whole number of tokens, or chinchilla": chain(base=base(tokens="many")),
    "say from: nothing to load that": chain(base=base(), sft={"keys": {"stage": "sft", **CHAT, "checkpoint": {"load": "x"}}}),
    "it starts from base, but its configuration sets checkpoint.load=x": chain(
        base=base(), sft={"from": "base", "keys": {"stage": "sft", **CHAT, "checkpoint": {"load": "x"}}}),
    "stages.a/b: a name becomes a folder": chain(**{"a/b": base()}),
    "stages.sft.gates.0: it has no limit": gated(set="held_out"),
    "stages.sft.gates.0: it has at_least and at_most; give one": gated(set="held_out", at_least=1, at_most=2),
    "stages.sft.gates.0: say where its metric is found": gated(at_most=2),
    "stages.sft.gates.0: measure=ket is no measure of this recipe; did you mean kept?": gated(measure="ket", at_most=2),
    "stages.sft.gates.0: set=held is no validation set of sft; did you mean held_out?": gated(set="held", at_most=2),
    "stages.sft.gates.0: at_most_of=bass is no stage before this one; did you mean base?": gated(set="held_out", at_most_of="bass"),
    "stages.sft.gates.0: times, plus and minus change the number of another stage": gated(set="held_out", at_most=1, times=2),
    "stages.sft.gates.0: rollback_to=base is read with on_failure: rollback": gated(set="held_out", at_most=1, rollback_to="base"),
    "stages.base.gates.0: on_failure: rollback needs an earlier checkpoint": chain(
        base=base(gates=[{"metric": "valid_loss", "set": "held_out", "at_most": 1, "on_failure": "rollback"}])),
    "rollback_to=sft has another kind of network than reward": chain(base=base(), sft=stage("sft"), reward=stage("reward", gates=[
        {"metric": "accuracy", "set": "held_out", "at_least": 1, "on_failure": "rollback"}])),
    "measures.kept: after names reward, whose network has no probabilities": {
        **chain(base=base(), reward=stage("reward")), "measures": {"kept": measure(after=["reward"])}},
    "measures.kept: after names bse, which is no stage of this recipe; did you mean base?": {**chain(), "measures": {"kept": measure(after=["bse"])}},
    "measures.kept: train.eval_samples is 0": {**chain(), "measures": {"kept": {"keys": {**TEXT, "train": {**TRAIN, "eval_samples": 0}}}}},
    "measures.kept: no stage of this recipe has a network": {**chain(), "measures": {"kept": measure("reward")}},
    "parallel.tp(3)": chain(base=base(), sft={"keys": {"stage": "sft", **CHAT, "parallel": {"tp": 3}}}),
    "does not divide the world size 2": chain(base=base(), sft={"ranks": 2, "keys": {"stage": "sft", **CHAT, "parallel": {"tp": 4}}}),
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(tmp_path, text):
    with pytest.raises(ConfigError) as error:
        make_plan(write(tmp_path, REFUSED[text]))
    assert text in str(error.value)
    assert not (tmp_path / "work").exists()


def test_mistakes_of_all_stages_are_told_together_and_what_follows_from_them_is_not(tmp_path):
    recipe = chain(base={"keys": {"stage": "pretrain", "model": {**MODEL, "num_layers": -1}, **TEXT}}, sft=stage("sft"),
                   other={"from": "nothing", "keys": {"model": MODEL, **TEXT, "train": {**TRAIN, "stepz": 1}}})
    with pytest.raises(ConfigError) as error:
        make_plan(write(tmp_path, recipe))
    assert [problem.split(":")[0] for problem in error.value.problems] == ["stages.base", "stages.other"]


def test_a_gate_of_a_measure_that_is_not_taken_there(tmp_path):
    recipe = gated(measure="kept", at_most=2)
    recipe["measures"]["kept"]["after"] = ["base"]
    with pytest.raises(ConfigError, match="measure=kept is not taken after sft; it is after base"):
        make_plan(write(tmp_path, recipe))


def test_a_measure_takes_the_network_that_is_there(tmp_path):
    taken = measure()
    taken["keys"] = {**taken["keys"], "model": {**MODEL, "rope_theta": 5.0}}
    plan = make_plan(write(tmp_path, {**chain(), "measures": {"kept": taken}}))
    assert "model" not in plan.measures[0].wired(tmp_path, tmp_path) and plan.measures[0].run.model.rope_theta == 10000


def test_the_example_could_start():
    plan = make_plan(ROOT / "examples/full_recipe/recipe.yaml")
    assert [step.kind for step in plan.steps] == ["pretrain", "long_context", "anneal", "sft", "reward", "dpo", "grpo"]
    assert plan.step("dpo").start == "sft" and plan.step("sft").run.model.rope_theta == 20000      # that of the ladder


# --- the plan as text -----------------------------------------------------------------------------------------------------


def dry(tmp_path, recipe, **options) -> str:
    plan = make_plan(write(tmp_path, recipe))
    return plan_text(plan, read_state(plan), **options)


def row(text: str, name: str) -> list[str]:
    return next([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {name} "))


def test_dry_run_tells_layout_steps_tokens_and_time(tmp_path):
    recipe = {**gated(measure="kept", at_most_of="base", times=1.1, on_failure="rollback"), "ranks": 2}
    text = dry(tmp_path, recipe, speed=8.0)
    # 6 steps of 4 samples of 32 tokens; at 8 tokens per second
    cells = row(text, "base")
    assert cells[:8] + cells[9:] == ["base", "pretrain", "nothing", "2", "DP2", "6", "768", f"{PARAMETERS / 1e3:.3g}k", "1:36", "to do"]
    assert "time of base, sft: based on --speed 8 tokens/s" in text and "all stages: 1.54k tokens" in text and "3:12" in text
    assert "gate: kept/valid_loss at most base * 1.1, else rollback" in text and "measures: kept" in text
    assert f"sft: reads load {tmp_path / 'work/base'}; writes {tmp_path / 'work/sft'}/checkpoints" in text


def test_time_from_the_peak_that_the_recipe_assumes(tmp_path):
    text = dry(tmp_path, {**chain(base=base()), "hardware": {"peak_tflops": 1e-6, "mfu": 0.5}, "ranks": 2})
    # multiply-adds per token and layer: projections 3072, both attention products 2 * 32 * 32, gated MLP 4608; logits 62 * 32. Forward and
    # backward are three times forward, and a multiply-add is two FLOPs.
    flops = 768 * 6 * (2 * (3072 + 2048 + 4608) + 1984)
    assert row(text, "base")[8] == f"{flops / 1e6:.3g}M"
    minutes, seconds = map(int, row(text, "base")[9].split(":"))
    assert 60 * minutes + seconds == round(flops / (2 * 1e6 * 0.5))
    assert "based on 50% of 1e-06 TFLOP/s per rank, assumed" in text
    assert "based on nothing; give --speed" in dry(tmp_path, chain(base=base()))


def command(tmp_path, *args: str) -> subprocess.CompletedProcess:
    """launch/recipe.py where importing torch or megatron fails."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = sys.modules['megatron'] = None\n")
    return subprocess.run([sys.executable, str(ROOT / "launch/recipe.py"), *args], capture_output=True, text=True, timeout=60, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})


def test_dry_run_and_refusals_need_no_torch_and_leave_nothing(tmp_path):
    path = write(tmp_path, chain())
    done = command(tmp_path, str(path), "--dry-run", "--speed", "100", "stages.sft.keys.train.steps=11")
    assert done.returncode == 0 and row(done.stdout, "sft")[5] == "11", done.stderr
    wrong = command(tmp_path, str(path), "stages.sft.keys.train.stepz=11", "stages.more.ranks=-1")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and "stages.more.ranks=-1: " in wrong.stderr
    unknown = command(tmp_path, str(path), "--redo", "sfd")
    assert unknown.returncode == 2 and "--redo sfd is no stage of this recipe; did you mean sft?" in unknown.stderr
    assert not (tmp_path / "work").exists()
