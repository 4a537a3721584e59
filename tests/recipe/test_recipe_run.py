"""Running a recipe with a launcher that trains nothing: order, gates, rollback, being killed anywhere, redoing, refusals, lineage, report."""

import hashlib
import json
import re
import shutil

import pytest
import yaml
from recipe_stub import CHAT, TEXT, TRAIN, Launcher, base, chain, line, measure, stage, write

from engine.recipe import execute, lineage, outcome
from engine.recipe.execute import Execution, RecipeStopped
from engine.recipe.plan import make_plan
from engine.recipe.report import table, write_report
from engine.recipe.sections import Spike


def start(tmp_path, recipe, launcher=None, redo=(), overrides=()):
    """(state, what was run, what was said) of one start."""
    launcher, said = launcher or Launcher(), []
    execution = Execution(make_plan(write(tmp_path, recipe), overrides), launcher, said.append)
    execution.run(redo)
    return execution.state, launcher.titles, "\n".join(said)


def config_of(tmp_path, name: str) -> dict:
    return yaml.safe_load((tmp_path / "work" / name / "stage.yaml").read_text())


def gated(stages=("base", "more", "sft"), **gate) -> dict:
    """base -> more -> sft, the gate on more, two measures."""
    made = {"base": base(), "more": stage("continued", gates=[{"metric": "valid_loss", **gate}]), "sft": stage("sft"), "reward": stage("reward")}
    return {**chain(**{name: made[name] for name in stages}), "measures": {"kept": measure(), "says": measure("sft")}}


# --- order and wiring -----------------------------------------------------------------------------------------------------


def test_stages_run_in_order_each_from_the_one_before_and_once(tmp_path):
    recipe = gated(at_most=9, set="held_out", stages=("base", "more", "sft", "reward"))
    state, titles, _ = start(tmp_path, recipe)
    assert titles == ["base", "kept of base", "says of base", "more", "kept of more", "says of more", "sft", "kept of sft", "says of sft", "reward"]
    assert config_of(tmp_path, "more")["checkpoint"] == {"load": str(tmp_path / "work/base")}
    assert "checkpoint" not in config_of(tmp_path, "base")
    taken = config_of(tmp_path, "sft/measures/kept")
    assert taken["checkpoint"] == {"load": str(tmp_path / "work/sft"), "load_optimizer": False, "roles": {}} and taken["train"]["steps"] == 0
    assert [entry["status"] for entry in state["stages"].values()] == ["done"] * 4
    again, titles, _ = start(tmp_path, recipe)
    assert titles == [] and again == state


def test_the_command_of_a_stage(tmp_path):
    launcher = Launcher()
    start(tmp_path, chain(base=base(), sft=stage("sft", ranks=2, torchrun=["--rdzv-backend=c10d"])), launcher)
    first, second = (job.command for job in launcher.jobs)
    assert first[1:6] == ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone"] and first[6].endswith("/launch/pretrain.py")
    assert second[4:6] == ["2", "--rdzv-backend=c10d"] and second[6].endswith("/launch/align.py")
    assert second[7] == str(tmp_path / "work/sft/stage.yaml")


def test_a_measure_that_changed_is_taken_anew_and_no_stage_is(tmp_path):
    start(tmp_path, gated(set="held_out", at_most=9))
    changed, stale = ["measures.kept.keys.train.eval_samples=8"], tmp_path / "work/sft/measures/kept/stale"
    stale.touch()
    _, titles, _ = start(tmp_path, gated(set="held_out", at_most=9), overrides=changed)
    assert titles == ["kept of base", "kept of more", "kept of sft"] and not stale.exists()
    with pytest.raises(RecipeStopped, match="the measure kept shows accuracy, but its run gave valid_loss; change measures.kept.metrics"):
        start(tmp_path, gated(set="held_out", at_most=9), overrides=["measures.kept.metrics=[accuracy]", *changed, "measures.kept.keys.optim.lr=1"])


# --- killed anywhere --------------------------------------------------------------------------------------------------------


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(found) for key, found in value.items() if key not in ("began", "ended", "seconds")}
    return value


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A plan whose later stages depend on what was judged, and what an undisturbed start of it comes to."""
    recipe = gated(set="held_out", at_most=2.0, on_failure="rollback")
    recipe["measures"].pop("says")
    plan = make_plan(write(tmp_path_factory.mktemp("cut"), recipe))
    launcher = Launcher()
    state = go_on(plan, launcher, anew=True)
    assert state["stages"]["sft"]["parents"] == {"load": "base"} and len(launcher.titles) == 6
    return plan, state, launcher.titles


def go_on(plan, launcher=None, anew=False) -> dict:
    """The state, times aside, after a start over what earlier ones left."""
    if anew:
        shutil.rmtree(plan.dir, ignore_errors=True)
    execution = Execution(plan, launcher or Launcher(), lambda line: None)
    execution.run()
    return without_times(execution.state)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("is_killed", [False, True], ids=["interrupted", "killed"])
def test_cut_off_in_any_launch_the_same_command_goes_on(cut, monkeypatch, call, late, is_killed):
    plan, state, titles = cut
    first, second = Launcher(interrupt_at=call, late=late), Launcher()
    write_json = lineage.write_json

    def living(path, value):      # who was killed does not write that it was
        if is_killed and len(first.titles) == call:
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(execute, "write_json", living)
        go_on(plan, first, anew=True)
    assert go_on(plan, second) == state
    assert first.titles[:-1] + second.titles == titles      # what was done is not done again, what was cut off is


@pytest.mark.parametrize("is_written", [False, True], ids=["before", "after"])
def test_killed_at_any_write_the_same_command_goes_on(cut, monkeypatch, is_written):
    plan, state, _ = cut
    write_json, num_writes, fatal = lineage.write_json, 0, 0

    def dying(path, value):
        nonlocal num_writes
        num_writes += 1
        if not fatal or num_writes < fatal or (num_writes == fatal and is_written):
            write_json(path, value)
        if fatal and num_writes >= fatal:      # the dead write nothing more
            raise KeyboardInterrupt

    monkeypatch.setattr(execute, "write_json", dying)
    assert go_on(plan, anew=True) == state
    total = num_writes
    for fatal in range(1, total + 1):
        num_writes = 0
        with pytest.raises(KeyboardInterrupt):
            go_on(plan, anew=True)
        fatal = 0
        assert go_on(plan) == state
    assert total > 12


def test_a_failed_stage_tells_why_and_is_resumed(tmp_path):
    with pytest.raises(RecipeStopped) as error:
        start(tmp_path, chain(), Launcher(codes={"more": 1}))
    assert "more failed (exit code 1); the same command resumes it" in str(error.value)
    assert str(error.value).endswith("error: the corpus is gone")      # neither noise before nor torchrun's words after
    _, titles, _ = start(tmp_path, chain())
    assert titles == ["more", "sft"]


def test_a_failed_measure_tells_why_and_is_taken_again(tmp_path):
    recipe = {**chain(base=base()), "measures": {"kept": measure()}}
    with pytest.raises(RecipeStopped, match="the measure kept of base failed .exit code 1.[^$]*error: the corpus is gone$"):
        start(tmp_path, recipe, Launcher(codes={"kept of base": 1}))
    assert start(tmp_path, recipe)[1] == ["kept of base"]


def test_a_stage_that_ended_without_its_last_checkpoint_is_not_done(tmp_path):
    class Short(Launcher):
        def _write(self, job):
            super()._write(job)
            position = next(job.folders[0].glob("checkpoints/iter_*")) / "position.json"
            position.write_text('{"step": 4, "consumed_samples": 16, "tokens": 512}')

    with pytest.raises(RecipeStopped, match="base ended at step 4 of 6"):
        start(tmp_path, chain(), Short())
    for name in "bc":
        (tmp_path / name).mkdir()
    _, _, said = start(tmp_path / "b", chain(base={"keys": {**base()["keys"], "train": {**TRAIN, "max_minutes": 1}}}), Short())
    assert "ended by train.max_minutes at step 4 of 6" in said
    goal = {**TRAIN, "eval_every": 2, "stop_when": {"metric": "valid_loss", "at_most": 2.0}}
    _, _, said = start(tmp_path / "c", chain(base={"keys": {**base()["keys"], "train": goal}}), Short())
    assert "ended by train.stop_when at step 4 of 6" in said


# --- changed recipes ---------------------------------------------------------------------------------------------------------


def test_a_changed_stage_is_refused_before_anything_runs(tmp_path):
    start(tmp_path, chain())
    launcher = Launcher()
    with pytest.raises(RecipeStopped) as error:
        start(tmp_path, chain(), launcher, overrides=["stages.more.keys.optim.lr=0.5", "stages.more.keys.train.steps=7"])
    assert "more is done with another configuration" in str(error.value) and launcher.titles == []
    assert "- optim.lr: not set -> 0.5" in str(error.value) and "- train.steps: 6 -> 7" in str(error.value)
    assert "train more, sft again with --redo more" in str(error.value)


def test_what_does_not_change_the_result_may_change(tmp_path):
    start(tmp_path, chain())
    changes = ["ranks=2", "stages.more.keys.parallel.tp=2", "stages.more.keys.log.every=1", "stages.base.ranks=4"]
    _, titles, _ = start(tmp_path, chain(), overrides=changes)
    assert titles == []


def test_another_parent_is_another_stage(tmp_path):
    start(tmp_path, chain())
    with pytest.raises(RecipeStopped, match="sft was started from more, but the recipe and its gates now ask for base"):
        start(tmp_path, chain(), overrides=["stages.sft.from=base"])


def test_redo_puts_aside_the_stage_and_what_depends_on_it(tmp_path):
    recipe = chain(base=base(), sft=stage("sft"), reward=stage("reward"), dpo=stage("dpo", **{"from": "sft"}))
    start(tmp_path, recipe)
    _, titles, said = start(tmp_path, recipe, redo=["reward"])
    assert titles == ["reward"] and "reward.aside-1" in said
    state, titles, _ = start(tmp_path, recipe, redo=["sft"])
    assert titles == ["sft", "reward", "dpo"]
    assert sorted(path.name for path in (tmp_path / "work").iterdir() if path.is_dir()) == [
        "base", "dpo", "dpo.aside-1", "reward", "reward.aside-1", "reward.aside-2", "sft", "sft.aside-1"]
    assert list(state) == ["stages"] and len(state["stages"]) == 4


def test_killed_while_putting_aside(tmp_path, monkeypatch):
    start(tmp_path, chain())
    rename, calls = execute.Path.rename, []

    def dying(self, target):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(execute.Path, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, chain(), redo=["base"])
    _, titles, _ = start(tmp_path, chain())
    assert titles == ["base", "more", "sft"] and len(list((tmp_path / "work").glob("*.aside-1"))) == 3


def test_a_run_that_the_state_does_not_know_is_not_continued(tmp_path):
    start(tmp_path, chain())
    (tmp_path / "work/state.json").unlink()
    with pytest.raises(RecipeStopped, match="base holds a run that .*state.json does not know"):
        start(tmp_path, chain())
    (tmp_path / "work/state.json").write_text("{")
    with pytest.raises(RecipeStopped, match="state.json is damaged"):
        start(tmp_path, chain())


def test_a_checkpoint_that_is_gone_is_missed_when_it_is_needed(tmp_path):
    start(tmp_path, chain())
    for path in (tmp_path / "work/more/checkpoints").glob("*/metadata.json"):
        path.unlink()
    assert start(tmp_path, chain())[1] == []
    with pytest.raises(RecipeStopped, match="more is done by .*state.json, but its checkpoint in .* is gone; train it again with --redo more"):
        start(tmp_path, chain(), redo=["sft"])


# --- gates ---------------------------------------------------------------------------------------------------------------------


LIMITS = [  # gate, losses after base and more, is it open
    ({"at_most": 2.0}, (9, 2.0), True), ({"at_most": 2.0}, (9, 2.01), False),
    ({"at_least": 2.0}, (9, 2.0), True), ({"at_least": 2.0}, (9, 1.99), False),
    ({"at_most_of": "base"}, (2.0, 2.0), True), ({"at_most_of": "base", "times": 1.02}, (2.0, 2.03), True),
    ({"at_most_of": "base", "times": 1.02}, (2.0, 2.05), False), ({"at_least_of": "base", "minus": 0.1}, (2.0, 1.91), True),
    ({"at_least_of": "base", "minus": 0.1}, (2.0, 1.89), False), ({"at_most_of": "base", "plus": 0.1, "times": 0.5}, (2.0, 1.09), True),
    ({"at_most": 2.0}, (9, float("nan")), False), ({"at_least": 0.0}, (9, float("nan")), False), ({"at_least": 0}, (9, -0.5), False)]


@pytest.mark.parametrize("where", [{"set": "held_out"}, {"measure": "kept"}], ids=["set", "measure"])
@pytest.mark.parametrize("gate, losses, is_open", LIMITS)
def test_limits(tmp_path, gate, losses, is_open, where):
    prefix = "kept of " if "measure" in where else ""
    launcher = Launcher({f"{prefix}base": losses[0], f"{prefix}more": losses[1]})
    recipe = gated(**gate, **where)
    if is_open:
        assert "gate open" in start(tmp_path, recipe, launcher)[2]
    else:
        with pytest.raises(RecipeStopped, match="more: gate shut: (held_out|kept)/valid_loss at (most|least) "):
            start(tmp_path, recipe, launcher)
        assert "sft" not in launcher.titles


def test_a_stopped_recipe_goes_on_when_the_gate_is_changed(tmp_path):
    shut = gated(set="held_out", at_most=1.0)
    for _ in range(2):      # a gate stays shut at the next start
        with pytest.raises(RecipeStopped, match=r"held_out/valid_loss at most 1: it is 2.5\. Its checkpoint is kept in .*more\. .* --redo more"):
            start(tmp_path, shut)
    state, titles, _ = start(tmp_path, gated(set="held_out", at_most=3.0))
    assert titles == ["sft", "kept of sft", "says of sft"] and state["stages"]["more"]["verdicts"][0]["passed"]


def test_warn_goes_on(tmp_path):
    state, titles, said = start(tmp_path, gated(set="held_out", at_most=1.0, on_failure="warn"))
    assert "sft" in titles and "gate SHUT: held_out/valid_loss at most 1: it is 2.5" in said
    assert state["stages"]["sft"]["parents"] == {"load": "more"}


def test_rollback_continues_from_the_earlier_checkpoint_and_says_why(tmp_path):
    recipe = gated(set="held_out", at_most=1.0, on_failure="rollback")
    _, titles, said = start(tmp_path, recipe)
    assert config_of(tmp_path, "sft")["checkpoint"]["load"] == str(tmp_path / "work/base")
    assert "later stages take base in place of more, because held_out/valid_loss at most 1: it is 2.5" in said and "sft" in titles
    plan = make_plan(write(tmp_path, recipe))
    assert "shut (rollback to base)" in table(plan, execute.read_state(plan))
    assert start(tmp_path, recipe)[1] == []


def test_rollback_of_a_stage_that_was_rolled_back_to(tmp_path):
    gates = [{"metric": "valid_loss", "set": "held_out", "at_most": 1.0, "on_failure": "rollback"}]
    recipe = chain(base=base(), a=stage("continued", gates=gates), b=stage("continued", gates=gates, **{"from": "a"}),
                   sft=stage("sft", roles={"reference": "b"}))
    start(tmp_path, recipe)
    assert config_of(tmp_path, "b")["checkpoint"]["load"] == str(tmp_path / "work/base")
    assert config_of(tmp_path, "sft")["checkpoint"] == {"load": str(tmp_path / "work/base"), "roles": {"reference": str(tmp_path / "work/base")}}


def test_rollback_to_a_named_stage(tmp_path):
    gates = [{"metric": "valid_loss", "set": "held_out", "at_most": 1.0, "on_failure": "rollback", "rollback_to": "base"}]
    start(tmp_path, chain(base=base(), a=stage("continued"), b=stage("continued", gates=gates), sft=stage("sft")))
    assert config_of(tmp_path, "b")["checkpoint"]["load"] == str(tmp_path / "work/a")
    assert config_of(tmp_path, "sft")["checkpoint"]["load"] == str(tmp_path / "work/base")


def test_a_gate_that_changes_its_mind_does_not_change_what_was_trained(tmp_path):
    start(tmp_path, gated(set="held_out", at_most=1.0, on_failure="rollback"))
    with pytest.raises(RecipeStopped, match="sft was started from base, but the recipe and its gates now ask for more"):
        start(tmp_path, gated(set="held_out", at_most=3.0, on_failure="rollback"))


def test_a_metric_that_was_not_measured_names_those_that_were(tmp_path):
    gate = {"metric": "acuracy", "set": "held_out", "at_least": 0.5}
    with pytest.raises(RecipeStopped) as error:
        start(tmp_path, chain(base=base(gates=[gate])), Launcher(extra={"base": {"accuracy": 0.7}}))
    assert "asks for held_out/acuracy after base, which was not measured; there are " in str(error.value) and "held_out/accuracy" in str(error.value)
    assert start(tmp_path, chain(base=base(gates=[{**gate, "metric": "accuracy"}])))[1] == []


# --- where losses begin -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_higher_before_the_first_step_than_where_the_parent_ended(tmp_path):
    recipe = chain(base=base(), more={"keys": {"stage": "continued", **TEXT, "train": {**TRAIN, "eval_at_start": True}}})
    state, _, said = start(tmp_path, recipe, Launcher({"base": 2.0, "start of more": 2.3}))
    found = state["stages"]["more"]["boundary"]
    assert found["before"] == 2.0 and found["start"] == 2.3 and found["start_ratio"] == pytest.approx(1.15)
    assert "more: loss spike at its start: 2.3000 on held_out before its first step, 1.15 times the 2.0000" in said
    for name in "bc":
        (tmp_path / name).mkdir()
    state, _, said = start(tmp_path / "b", recipe, Launcher({"base": 2.0, "start of more": 2.19}))
    assert "spike" not in said and state["stages"]["more"]["spikes"] == []
    other_rows = ["stages.more.keys.train.eval_samples=8"]      # not the same measurement
    state, _, _ = start(tmp_path / "c", recipe, Launcher({"base": 2.0, "start of more": 2.3}), overrides=other_rows)
    assert "start_ratio" not in state["stages"]["more"]["boundary"]


def test_a_validation_set_that_is_cut_out_of_the_corpus_is_the_same_for_the_same_cut(tmp_path):
    cut = {"data": {"train": ["corpus"], "split": "90,10,0", "eod_id": 3}, "train": {**TRAIN, "eval_at_start": True}}
    recipe = chain(base={"keys": {**base()["keys"], **cut}}, more={"keys": {"stage": "continued", **cut}})
    state, _, _ = start(tmp_path, recipe, Launcher({"base": 2.0, "start of more": 2.3}, split="valid"))
    assert state["stages"]["more"]["boundary"]["start_ratio"] == pytest.approx(1.15)
    for name in "bc":
        (tmp_path / name).mkdir()
    other = ["stages.more.keys.data.split='80,20,0'"]
    state, _, _ = start(tmp_path / "b", recipe, Launcher({"base": 2.0, "start of more": 2.3}, split="valid"), overrides=other)
    assert "start_ratio" not in state["stages"]["more"]["boundary"]


@pytest.mark.parametrize("tolerance, is_spike", [(0.34, True), (0.36, False)])
def test_a_training_loss_that_rises_soon_after_the_start(tmp_path, tolerance, is_spike):
    losses = [1.0, 1.0, 1.5, 1.2, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0]      # window 2, first 40%: means 1.0, 1.25, 1.35; what comes later does not count
    recipe = chain(base=base(), sft={"keys": {"stage": "sft", **CHAT, "train": {**TRAIN, "steps": 10}}})
    recipe["spike"] = {"tolerance": tolerance, "window": 2, "share": 0.4}
    state, _, said = start(tmp_path, recipe, Launcher(curves={"sft": losses}))
    found = state["stages"]["sft"]["boundary"]
    assert (found["first"], found["peak"], found["peak_step"]) == (1.0, pytest.approx(1.35), 4) and found["rise"] == pytest.approx(0.35)
    assert ("rose from 1.0000 to 1.3500 (+35%) by step 4" in said) == is_spike
    assert state["stages"]["sft"]["numbers"]["boundary/rise"] == found["rise"]


def test_a_loss_that_falls_is_no_spike():
    assert outcome.spike_sentences("x", {"start_ratio": 1.05, "rise": 0.0}, Spike()) == []


# --- what is left ---------------------------------------------------------------------------------------------------------------------


def test_lineage_leads_back_to_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.bin").write_bytes(b"tokens")
    (tmp_path / "corpus.idx").write_bytes(b"index")
    (tmp_path / "chat.jsonl").write_text("{}\n")
    start(tmp_path, chain(base=base(), sft=stage("sft", gates=[{"metric": "valid_loss", "set": "held_out", "at_most": 3}])))
    made = json.loads((tmp_path / "work/sft/checkpoints/lineage.json").read_text())
    assert [file["path"] for file in made["data"]] == ["chat.jsonl"] and made["git_commit"] == "abc"
    assert made["gates"][0]["passed"] and made["numbers"]["held_out/valid_loss"] == 2.5 and made["config"]["stage"] == "sft"
    parent = made["parents"]["load"]
    assert parent["stage"] == "base" and parent["checkpoint"].endswith("base/checkpoints/iter_0000006") and parent["position"]["step"] == 6
    assert [(file["path"], file["bytes"], file["sha256"], file["sha256_of"]) for file in parent["data"]] == [
        ("corpus.bin", 6, hashlib.sha256(b"tokens").hexdigest(), "whole"), ("corpus.idx", 5, hashlib.sha256(b"index").hexdigest(), "whole")]


def test_of_a_huge_file_both_ends_are_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(lineage, "WHOLE_BYTES", 10)
    monkeypatch.setattr(lineage, "PART_BYTES", 3)
    (tmp_path / "big").write_bytes(b"abcdefghijklm")
    assert lineage._file(tmp_path / "big")["sha256"] == hashlib.sha256(b"abcklm").hexdigest()


def test_table_and_report(tmp_path):
    recipe = gated(measure="says", at_most_of="base", times=2, stages=("base", "more", "sft", "reward"))
    recipe["measures"]["says"]["metrics"] = ["valid_loss", "exact_match"]
    titles = [f"says of {name}" for name in ("base", "more", "sft")]
    launcher = Launcher({"kept of sft": 4.125, "reward": 0.5}, extra={title: {"exact_match": 0.25} for title in titles})
    start(tmp_path, recipe, launcher)
    plan = make_plan(write(tmp_path, recipe))
    state = execute.read_state(plan)
    write_report(plan, state)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "work/table.md").read_text().splitlines()]
    assert rows[0] == ["after", "starts from", "tokens", "time", "own loss", "kept: valid_loss", "says: valid_loss", "says: exact_match", "gates"]
    assert rows[4][:3] + rows[4][4:] == ["sft", "more", "768", "2.5", "4.125", "2.5", "0.25", ""]
    assert rows[5][4:] == ["0.5", "", "", "", ""]      # a reward model: these measures say nothing of it
    assert rows[3][-1] == "open"
    page = (tmp_path / "work/report.html").read_text()
    assert page.count("data:image/png;base64,") == 5      # measures, and the losses of four stages
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page) and "says/valid_loss at most 5 (base * 2)" in page
    for entry in state["stages"].values():
        assert entry["identity"][:12] in page


def test_a_recipe_that_stopped_has_a_table_of_what_is_done(tmp_path):
    with pytest.raises(RecipeStopped):
        start(tmp_path, gated(set="held_out", at_most=1.0))
    plan = make_plan(write(tmp_path, gated(set="held_out", at_most=1.0)))
    assert [line.split("|")[1].strip() for line in table(plan, execute.read_state(plan)).splitlines()[2:]] == ["base", "more"]


def test_ladders_are_read_rung_by_rung(tmp_path):
    ladder = {"ladder": [{"seq_len": 64, "tokens": 512, "global_batch": 4}, {"seq_len": 128, "tokens": 1024, "global_batch": 4}], "needle_samples": 0}
    keys = {"stage": "long_context", **TEXT, "long_context": ladder}

    class Rungs(Launcher):
        def _write(self, job):      # 2 steps of 4 * 64 and of 4 * 128 tokens
            super()._write(job)
            if job.title != "long":
                return
            for folder, loss in zip(job.folders, (2.0, 1.5)):
                records = [line(1, loss), line(2, loss), {"step": 2, "split": "held_out", "valid_loss": loss},
                           {"step": 2, "split": "long_context", "short_loss": loss + 1, "needle_by_depth": {"50": 0.5}}]
                (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    gate = {"metric": "short_loss", "set": "long_context", "at_most": 2.6}
    state, _, said = start(tmp_path, chain(base=base(), long={"keys": keys, "gates": [gate]}, sft=stage("sft")), Rungs())
    numbers = state["stages"]["long"]["numbers"]
    assert numbers["long_context/short_loss"] == 2.5 and numbers["long_context/needle_by_depth/50"] == 0.5
    assert "long (long_context): 4 steps" in said
    assert config_of(tmp_path, "sft")["checkpoint"]["load"].endswith("long/rung_2_128")
    plan = make_plan(tmp_path / "recipe.yaml")
    assert outcome.validation_curves(plan.step("long")) == {"held_out": [(2, 2.0), (4, 1.5)]}


