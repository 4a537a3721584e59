"""Rewards by rules, libraries and functions of the user: what each kind says, against truths written by hand and the libraries' own
verdicts; and what is refused, with part, item and cure. Programs: test_reward_programs.py."""

import logging
import math
import os
import textwrap
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from engine.config import ConfigError
from engine.online_sections import RewardPart
from engine.rewards import Item, RewardError, Scorer, rules


def part(kind, **options):
    return RewardPart(kind=kind, **options)


def scores(pairs, kind, **options):
    """Rewards of (answer, what the record holds under `answer`)."""
    with Scorer([part(kind, name="it", **options)]) as scorer:
        return [row["it"] for row in scorer.score([Item("Ask.", answer, {"answer": wanted}) for answer, wanted in pairs])]


@pytest.fixture
def function(tmp_path, monkeypatch):
    """function(source, name) -> path of a function in a module of the user that workers find on PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source, name="f", module="mine"):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        return f"{module}:{name}"

    return write


# --- exact, regex -----------------------------------------------------------------------------------------------------


def test_exact_texts():
    table = [("42", "42", 1), (" 42\n", "42", 1), ("42", 42, 1), ("1.5", 1.5, 1), ("PARIS  is\nit", "Paris is it", 1), ("\uff14\uff12", "42", 1),
             ("straße", "STRASSE", 1), ("42.", "42", 0), ("4 2", "42", 0), ("", "42", 0), ("142", "42", 0)]
    assert scores([row[:2] for row in table], "exact") == [row[2] for row in table]


def test_exact_takes_the_last_match_of_a_pattern():
    table = [("so\n#### 42", "42", 1), ("#### 41 #### 42", "42", 0), ("#### 41\n#### 42", "42", 1), ("42", "42", 0), ("####", "42", 0)]
    assert scores([row[:2] for row in table], "exact", pattern=r"#### (.*)") == [row[2] for row in table]
    assert scores([("<a>1</a><b>", "1"), ("<b>", "1")], "exact", pattern=r"<a>(.*?)</a>|<b>") == [0.0, 0.0]      # a last match without the group


def test_regex():
    assert scores([("<think>x</think> y", 0), ("<think>x", 0), ("a\n<think>\n</think>", 0)], "regex", pattern=r"(?s)^<think>.*</think>") == [1, 0, 0]


# --- math -------------------------------------------------------------------------------------------------------------


def test_math_against_truths_by_hand():
    table = [(r"The answer is $\frac{1}{2}$.", "0.5", 1), (r"so \boxed{\frac{2}{4}}", r"\frac{1}{2}", 1), ("It is 1/2", "1/2", 1),
             ("It is 7", "8", 0),
             (r"$3+2x$", "2x+3", 1), (r"$2x+4$", "2x+3", 0), ("2", "2x+3", 0), (r"$10^5$", "100000", 1), ("10", r"10^{5}", 0), ("1,234", "1234", 1),
             (r"$(x+1)^2$", "x^2+2x+1", 1), (r"$(1,2)$", "(1,2)", 1), (r"$(1,3)$", "(1,2)", 0), (r"$\{2, 1\}$", r"\{1,2\}", 1), ("no idea", "1", 0),
             (r"\boxed{", "1", 0), ("$" * 50, "1", 0), ("", "1", 0), (r"$\sqrt{8}$", r"2\sqrt{2}", 1)]
    assert scores([row[:2] for row in table], "math", seconds=60) == [row[2] for row in table]


def test_math_reads_all_of_what_a_pattern_finds():
    table = [("#### 2x+3", "3+2x", 1), ("#### 2x+4", "2", 0), ("#### 7", "7.", 1), ("#### 7.", "7", 1),
             ("2", "2", 0), (r"#### \frac{1}{2}", "0.5", 1)]
    assert scores([row[:2] for row in table], "math", seconds=60, pattern="#### (.*)") == [row[2] for row in table]


def test_math_that_takes_too_long_is_worth_nothing_and_costs_no_other_answer(caplog):
    """Off the main thread too, where signals cannot help."""
    pairs = [("5", "5"), ("$9^{9^{9^{9}}}$", "5"), ("6", "5"), ("$5$", "5")]
    with ThreadPoolExecutor(1) as threads, caplog.at_level(logging.WARNING):
        assert threads.submit(scores, pairs, "math", seconds=8).result() == [1, 0, 0, 1]
    assert "reward it: 1 of 4 answers count 0 because they could not be judged" in caplog.text


def test_math_refuses_an_answer_in_the_data_that_is_no_mathematics():
    with pytest.raises(RewardError, match=r"reward it failed for answer 1 \(.*\): math-verify reads no expression in answer '\?\?'; mend the data"):
        scores([("1", "1"), ("1", "??")], "math", seconds=60)


def test_answers_that_a_library_fails_on_are_told(monkeypatch):
    monkeypatch.setattr(rules, "limit_memory", lambda mib: None)      # it would hold for this process
    job = rules.Math("answer", "")
    monkeypatch.setattr(job.library, "verify", lambda *_, **__: 1 / 0)
    assert list(job([("Ask.", "1", {"answer": "1"})])) == [(0.0, "math-verify failed on '1': ZeroDivisionError: division by zero")]


# --- reasoning-gym ----------------------------------------------------------------------------------------------------


def test_reasoning_gym_says_what_the_library_says():
    import reasoning_gym

    cases = [(name, said, entry) for name in ("basic_arithmetic", "countdown", "spell_backward")
             for entry in reasoning_gym.create_dataset(name, size=3, seed=7)
             for said in (entry["answer"], "0", f"{entry['answer']} or so", "", "é\n((")]
    items = [Item("Ask.", text, {"reasoning_gym": {"dataset": name, "entry": entry}}) for name, said, entry in cases
             for text in (said, f"<answer>1</answer> no: <answer> {said} </answer>.", f"Answer: {said}")]
    with Scorer([part("reasoning_gym", seconds=60), part("reasoning_gym", name="pattern", pattern="Answer: (.*)", seconds=60)]) as scorer:
        found = scorer.score(items)
    for k, (name, said, entry) in enumerate(cases):
        judge = reasoning_gym.get_score_answer_fn(name)
        plain, tagged, introduced = found[3 * k:3 * k + 3]
        assert plain["reasoning_gym"] == tagged["reasoning_gym"] == judge(said.strip(), entry)
        assert introduced["pattern"] == judge(said.splitlines()[0] if said else "", entry)
    assert len({row["reasoning_gym"] for row in found}) > 2


def test_reasoning_gym_refuses_broken_lines(monkeypatch):
    monkeypatch.setattr(rules, "limit_memory", lambda mib: None)
    job = rules.ReasoningGym("")
    refusal = lambda made: pytest.raises(ValueError, match=made)  # noqa: E731
    with refusal("reasoning_gym is not"):
        list(job([("Ask.", "1", {})]))
    with refusal("reasoning-gym has no dataset 'sums'"):
        list(job([("Ask.", "1", {"reasoning_gym": {"dataset": "sums", "entry": {}}})]))
    job.judges["strict"] = lambda answer, entry: {"yes": 1.0}[answer]
    strict = {"reasoning_gym": {"dataset": "strict", "entry": {"answer": "yes"}}}
    assert list(job([("Ask.", "no", strict), ("Ask.", "yes", strict)])) == [(0.0, "reasoning-gym failed on 'no': KeyError: 'no'"), (1.0, "")]
    strict["reasoning_gym"]["entry"]["answer"] = "perhaps"
    with refusal("cannot score the entry's own answer"):
        list(job([("Ask.", "no", strict)]))


# --- functions of the user --------------------------------------------------------------------------------------------


def test_a_function_gets_all_and_keeps_its_process(function):
    path = function("""
        calls = []
        def f(prompts, answers, records):
            calls.append(1)
            print("in the worker")
            return [len(prompt) + 10 * len(answer) + 100 * record["n"] + 1000 * len(calls)
                    for prompt, answer, record in zip(prompts, answers, records)]
        """)
    items = [Item("p" * k, "a" * (k + 1), {"n": k + 2}) for k in range(3)]
    with Scorer([part("python", path=path, name="mine")]) as scorer:
        for call in (1, 2):
            assert scorer.score(items) == [{"mine": k + 10 * (k + 1) + 100 * (k + 2) + 1000 * call} for k in range(3)]


@pytest.mark.parametrize("body, sentence", [
    ("return [1.0]", "failed for 2 answers: mine:f returned 1 rewards for 2 answers"),
    ("return 1.0", "failed for 2 answers: mine:f returned a float for 2 answers; return a list with one number for each"),
    ("return [1.0, 'good']", "failed for 2 answers: mine:f returned 'good' for answer 1, expected a number"),
    ("return [1.0, None]", "failed for 2 answers: mine:f returned None for answer 1"),
    ("return [1.0, float('nan')]", r"gave nan for answer 1 \(prompt 'Two.', answer 'b'\); a reward must be a finite number"),
    ("return [float('-inf'), 1.0]", "gave -inf for answer 0"),
    ("return {}['x']", r"failed for 2 answers: KeyError: 'x' \(.*mine.py:2\)"),
    ("raise SystemExit(3)", "failed for 2 answers: its process ended with code 3"),
    ("import os; os._exit(5)", "failed for 2 answers: its process ended with code 5"),
    ("import time; time.sleep(1000)", "took more than 1 s for 2 answers; mend the function or raise rewards.0.seconds"),
    ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", "took more than 1 s for 2 answers; mend the function"),
])
def test_a_function_that_gives_no_rewards_is_refused_and_may_be_asked_again(function, body, sentence):
    path = function(f"def f(prompts, answers, records):\n    if answers[0] != 'fine': {body}\n    return [1] * len(answers)\n")
    with Scorer([part("python", path=path, seconds=1)]) as scorer:
        with pytest.raises(RewardError, match="^reward python " + sentence):
            scorer.score([Item("One.", "a"), Item("Two.", "b")])
        scorer._parts["python"].part = part("python", path=path, seconds=60)
        assert scorer.score([Item("One.", "fine")]) == [{"python": 1.0}]


def test_a_pattern_that_hangs_is_refused_with_the_answer():
    with Scorer([part("regex", pattern="^(a+)+$", seconds=1)]) as scorer:
        with pytest.raises(RewardError, match=r"reward regex took more than 1 s for answer 1 \(prompt 'Ask.', answer 'aaa.*; mend the pattern"):
            scorer.score([Item("Ask.", "aaa"), Item("Ask.", "a" * 60 + "b")])


# --- all together -----------------------------------------------------------------------------------------------------


def test_parts_are_named_kept_in_order_and_weighed():
    parts = [part("exact", weight=2.0), part("regex", name="form", pattern="!", weight=-0.5), part("model", weight=0.1)]
    with Scorer(parts) as scorer:
        rows = scorer.score([Item("Ask.", answer, {"answer": "yes"}) for answer in ("yes", "yes!", "no", "!")])
        assert rows == [{"exact": 1, "form": 0}, {"exact": 0, "form": 1}, {"exact": 0, "form": 0}, {"exact": 0, "form": 1}]
        for row in rows:
            row["model"] = 3.0
        assert [scorer.total(row) for row in rows] == pytest.approx([2.3, -0.2, 0.3, -0.2])
        with pytest.raises(RewardError, match="reward model is missing, expected a finite number"):
            scorer.total({"exact": 1.0, "form": 0.0})
        with pytest.raises(RewardError, match="reward model is nan"):
            scorer.total({"exact": 1.0, "form": 0.0, "model": math.nan})
        assert scorer.score([]) == []
    with Scorer([part("model")]) as scorer:
        assert scorer.score([Item("Ask.", "x")]) == [{}]


@pytest.mark.parametrize("record, sentence", [({}, "answer is None, expected a text or a number"), ({"answer": " "}, "answer is ' '"),
                                              ({"answer": ["1"]}, r"answer is \['1'\]"), ({"answer": True}, "answer is True")])
@pytest.mark.parametrize("pattern", ["", "(.*)"])
def test_a_line_without_an_answer_is_refused(record, sentence, pattern):
    with Scorer([part("exact", pattern=pattern)]) as scorer:
        with pytest.raises(RewardError, match=rf"reward exact failed for answer 1 \(.*\): {sentence}"):
            scorer.score([Item("Ask.", "1", {"answer": "1"}), Item("Ask.", "1", record)])


def test_all_mistakes_of_a_configuration_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        Scorer([part("exact", pattern="("), part("exact", path="x:y"), part("regex"), part("math", pattern="a+"), part("python", path="module.f"),
                part("model", workers=3), part("regex", name="r", pattern="x", key="y")])
    for sentence in ("rewards.0: pattern='(' is no regular expression (missing )", "rewards.1: another part is called exact already",
                     "rewards.1: path is read by kind python, not by exact", "rewards.2: kind regex needs a pattern",
                     "rewards.3: pattern='a+' has no group", "rewards.4: path='module.f' is not of the form package.module:function",
                     "rewards.5: workers is read by kind code, not by model", "rewards.6: key is read by kind exact, math, code, not by regex"):
        assert sentence in str(error.value)


def test_what_cannot_be_imported_is_refused(function, tmp_path):
    function("import nothing_of_this_name", module="broken")
    function("raise RuntimeError('no disk')", module="raises")
    function("f = 3")
    with pytest.raises(ConfigError) as error:
        Scorer([part("python", name=str(k), path=path) for k, path in enumerate(("nowhere:f", "broken:f", "mine:g", "mine:f", "raises:f"))])
    for sentence in ("rewards.0: path=nowhere:f: no module nowhere in the working folder or on PYTHONPATH",
                     "rewards.1: path=broken:f: no module nothing_of",
                     "rewards.2: path=mine:g: mine has no g",
                     "rewards.3: path=mine:f is a int, not a function", "rewards.4: RuntimeError: no disk"):
        assert sentence in str(error.value)


def test_a_missing_library_is_told_with_its_cure(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['math_verify'] = sys.modules['reasoning_gym'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        Scorer([part("math"), part("reasoning_gym")])
    assert "rewards.0: kind math needs math-verify, which is not installed; pip install 'trireme-lm[rl]'" in str(error.value)
    assert "rewards.1: kind reasoning_gym needs reasoning-gym, which is not installed" in str(error.value)


def test_no_process_is_left():
    before = {process.pid for process in psutil.Process(os.getpid()).children()}
    with Scorer([part("regex", pattern="x"), part("exact", pattern="(x)")]) as scorer:
        scorer.score([Item("Ask.", "x", {"answer": "x"})])
        assert len({process.pid for process in psutil.Process(os.getpid()).children()} - before) == 2
    assert not {process.pid for process in psutil.Process(os.getpid()).children()} - before
