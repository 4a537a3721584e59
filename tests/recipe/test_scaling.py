"""Scaling laws: known constants come back, runs are read as points, and what cannot be fitted is refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from recipe_stub import MODEL, line
from scipy.optimize import minimize_scalar

from engine.config import ConfigError, validate
from engine.recipe import scaling

ROOT = Path(__file__).parents[2]
# Table A3 of arXiv 2203.15556: the constants of Chinchilla's law.
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def surface_points(c, sizes, ratios, noise=0.0):
    random = np.random.RandomState(3)
    return [(n, n * r, (c["E"] + c["A"] / n ** c["alpha"] + c["B"] / (n * r) ** c["beta"]) * math.exp(noise * random.randn()))
            for n in sizes for r in ratios]


def test_the_constants_of_chinchilla_come_back():
    law = scaling.fit(surface_points(CHINCHILLA, (1e7, 1e8, 1e9, 1e10), (2, 8, 32, 128)))
    for name, value in CHINCHILLA.items():
        assert law.constants[name] == pytest.approx(value, rel=0.001), name
    assert law.error < 1e-4 and law.held_out_error < 1e-4


def test_noise_moves_the_fit_little_and_one_outlier_less_than_its_share():
    points = surface_points(CHINCHILLA, (1e7, 1e8, 1e9), (4, 16, 64), noise=0.002)
    law = scaling.fit(points)
    assert law.loss(1e10, 2e11) == pytest.approx(1.69 + 406.4 / 1e10**0.34 + 410.7 / 2e11**0.28, rel=0.03)
    assert 5e-4 < law.error < 4e-3 and law.held_out_error > law.error
    bad = [*points[:4], (points[4][0], points[4][1], points[4][2] * 1.3), *points[5:]]      # one run diverged: Huber's loss does not follow it
    assert scaling.fit(bad).loss(*points[4][:2]) == pytest.approx(points[4][2], rel=0.02)


def test_best_tokens_is_the_least_loss_along_constant_compute():
    law = scaling.Law("surface", CHINCHILLA)
    tokens = law.best_tokens(1e9)
    best = minimize_scalar(lambda x: law.loss(10**x, 1e9 * tokens / 10**x), bracket=(8, 10))
    assert 10**best.x == pytest.approx(1e9, rel=1e-3)


def test_few_runs_get_a_line_in_compute():
    points = [(n, 20 * n, 30 * (6 * n * 20 * n) ** -0.05) for n in (1e6, 1e7, 1e8)]
    law = scaling.fit(points)
    assert law.kind == "line" and law.constants["a"] == pytest.approx(30) and law.constants["b"] == pytest.approx(0.05)
    assert law.loss(1e9, 2e10) == pytest.approx(30 * (1.2e20) ** -0.05) and math.isnan(law.held_out_error)
    with pytest.raises(ConfigError, match="knows compute alone"):
        law.best_tokens(1e9)
    assert scaling.fit(surface_points(CHINCHILLA, (1e7, 1e8), (1, 2, 4, 8))).kind == "line"      # two sizes tell nothing of a curve in size


@pytest.mark.parametrize("points, text", [([(1e6, 1e7, 3.0), (1e7, 1e8, 2.0)], "2 runs are too few"),
                                          ([(1e6, 1e7, 3.0)] * 5, "5 runs are too few"),
                                          ([(1e6, 1e7, 3.0), (1e7, 1e8, float("nan")), (1e8, 1e9, 1.0)], "must be positive numbers"),
                                          ([(1e6, 1e8, 3.0), (1e7, 1e7, 2.0), (1e8, 1e6, 2.5)], "all runs took the same compute")])
def test_what_cannot_be_fitted(points, text):
    with pytest.raises(ConfigError, match=text):
        scaling.fit(points)


# --- runs as points ---------------------------------------------------------------------------------------------------------


def write_run(folder: Path, loss: float, hidden: int = 32, steps: int = 6, stage: str = "pretrain", last: int | None = None) -> Path:
    from engine.config import dump_config

    raw = {"run": {"dir": str(folder)}, "stage": stage, "model": {**MODEL, "hidden_size": hidden},
           "data": {"train": ["t"], "valid": {"held_out": ["v"]}},
           "train": {"seq_len": 32, "global_batch": 4, "steps": steps, "eval_samples": 4}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(validate(raw)))
    valid = {"step": steps if last is None else last, "split": "held_out", "valid_loss": loss}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*(line(i + 1, 3.0) for i in range(steps)), valid]))
    return folder


def test_a_run_is_its_parameters_tokens_and_last_validation_loss(tmp_path):
    # by hand: embeddings 2 * 62 * 32, last norm 32, and two layers of 3072 (attention) + 4608 (MLP) + 64 (norms)
    assert scaling.point_of(write_run(tmp_path / "a", 2.5)) == (2 * 62 * 32 + 32 + 2 * (3072 + 4608 + 64), 6 * 4 * 32, 2.5)


def test_folders_that_are_no_points(tmp_path):
    with pytest.raises(ConfigError, match="is no run's folder"):
        scaling.point_of(tmp_path)
    with pytest.raises(ConfigError, match="a law is fitted to models trained from the start"):
        scaling.point_of(write_run(tmp_path / "a", 2.5, stage="continued"))
    with pytest.raises(ConfigError, match="no validation loss of held_out after its last step"):
        scaling.point_of(write_run(tmp_path / "b", 2.5, last=3))
    with pytest.raises(ConfigError, match="has the validation sets held_out; name one of them in --set; did you mean held_out"):
        scaling.point_of(write_run(tmp_path / "c", 2.5), "held")
    (tmp_path / "law.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as a law"):
        scaling.read(tmp_path / "law.json")


def test_the_command_prints_writes_and_draws(tmp_path):
    sizes = {16: 2.9, 32: 2.5, 64: 2.2}
    runs = [str(write_run(tmp_path / f"{hidden}-{steps}", loss + 10 / steps**2, hidden, steps))
            for hidden, loss in sizes.items() for steps in (6, 12, 24)]
    command = [sys.executable, str(ROOT / "launch/recipe.py"), "fit", *runs]
    outputs = ["--output", str(tmp_path / "out/law.json"), "--plot", str(tmp_path / "law.png")]
    done = subprocess.run([*command, *outputs], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    law = scaling.read(tmp_path / "out/law.json")
    assert law.kind == "surface" and str(law) in done.stdout and "root mean square error of log L: " in done.stdout
    assert [f"{run} " in done.stdout for run in runs] == [True] * 9
    assert (tmp_path / "law.png").read_bytes()[:4] == b"\x89PNG"
    few = subprocess.run([*command[:4], "--output", str(tmp_path / "x")], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert few.returncode == 2 and "1 runs are too few for a law" in few.stderr and not (tmp_path / "x").exists()


def test_a_law_survives_its_file(tmp_path):
    law = scaling.fit(surface_points(CHINCHILLA, (1e7, 1e8, 1e9), (4, 16, 64)))
    scaling.write(law, tmp_path / "law.json")
    again = scaling.read(tmp_path / "law.json")
    assert again.constants == law.constants and again.best_tokens(1e9) == law.best_tokens(1e9)
    assert yaml.safe_load((tmp_path / "law.json").read_text())["kind"] == "surface"
