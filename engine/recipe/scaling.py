"""Scaling laws: the loss as a function of parameters and tokens, fitted to several small runs.

    law = fit(points)                     # points: [(parameters, tokens, loss in nats), ...]
    law.loss(N, D); law.best_tokens(N)    # and law.error, the root mean square of log(predicted / measured)
    write(law, "law.json"); read("law.json")

With six runs or more of at least three sizes and three lengths, L(N, D) = E + A / N^alpha + B / D^beta by approach 3 of Hoffmann et al. (arXiv
2203.15556, section 3.3 and appendix D.2): Huber loss (delta 1e-3) of log L, minimised by L-BFGS from a grid of starts. With fewer,
L(C) = a C^-b in C = 6 N D, a line through the logarithms, which knows no best share of tokens.
Left out: laws of other forms, and runs whose learning rate had not come to its end (their losses lie above the law).
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engine.config import ConfigError

Point = tuple[float, float, float]
"""(parameters, tokens, loss)"""
HUBER_DELTA = 1e-3
# The paper's grid of starts: log A, log B, log E, alpha, beta.
STARTS = ((0, 5, 10, 15, 20, 25), (0, 5, 10, 15, 20, 25), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2), (0, 0.5, 1, 1.5, 2))
NUM_DESCENTS = 16      # starts with the least loss from which L-BFGS is run; the other thousands end in the same valleys
NUM_FOR_SURFACE = 6    # runs: one more than the law has constants


@dataclass(frozen=True)
class Law:
    """A fitted law. constants: E A B alpha beta of the surface, or a b of the line. error: root mean square of log(predicted / measured);
    held_out_error: the same for each point by the law of the others, nan where too few are left to fit it."""

    kind: str
    constants: dict[str, float]
    error: float = math.nan
    held_out_error: float = math.nan
    points: list[Point] = field(default_factory=list)

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        c = self.constants
        if self.kind == "surface":
            return c["E"] + c["A"] / parameters ** c["alpha"] + c["B"] / tokens ** c["beta"]
        return c["a"] * (6 * parameters * tokens) ** -c["b"]

    def best_tokens(self, parameters: float) -> float:
        """Tokens with which a model of this size is the best that its compute 6 N D can buy: alpha A / N^alpha = beta B / D^beta, where
        the derivatives of L along a line of constant compute cancel. Raises ConfigError for a law of compute alone."""
        if self.kind != "surface":
            raise ConfigError([f"this law knows compute alone (L = a C^-b), not how to share it; fit one to {NUM_FOR_SURFACE} runs or more of "
                               "several sizes and lengths, or use tokens_per_parameter"])
        c = self.constants
        return (c["beta"] * c["B"] * parameters ** c["alpha"] / (c["alpha"] * c["A"])) ** (1 / c["beta"])

    def __str__(self) -> str:
        c = self.constants
        if self.kind == "surface":
            return f"L(N, D) = {c['E']:.4g} + {c['A']:.4g} / N^{c['alpha']:.4g} + {c['B']:.4g} / D^{c['beta']:.4g}"
        return f"L(C) = {c['a']:.4g} * C^-{c['b']:.4g}, C = 6 N D"


def fit(points: list[Point]) -> Law:
    """The law of these points: the surface where they suffice for it, the line otherwise. Raises ConfigError for fewer than three."""
    points = [tuple(map(float, point)) for point in points]
    bad = [point for point in points if not all(math.isfinite(x) and x > 0 for x in point)]
    if bad:
        raise ConfigError([f"parameters, tokens and losses must be positive numbers, but one run has {bad[0]}"])
    if len({(n, d) for n, d, _ in points}) < 3:
        raise ConfigError([f"{len(points)} runs are too few for a law; give three or more of different sizes or lengths"])
    law = _surface(points) if _suffice(points) else _line(points)
    others = [points[:i] + points[i + 1:] for i in range(len(points))]
    held_out = math.nan
    if all(len({(n, d) for n, d, _ in rest}) >= 3 and _suffice(rest) == _suffice(points) for rest in others):
        laws = [_surface(rest, law) if law.kind == "surface" else _line(rest) for rest in others]
        held_out = _rms([math.log(other.loss(n, d) / loss) for other, (n, d, loss) in zip(laws, points)])
    return Law(law.kind, law.constants, _rms([math.log(law.loss(n, d) / loss) for n, d, loss in points]), held_out, points)


def _suffice(points: list[Point]) -> bool:
    sizes, lengths = {n for n, _, _ in points}, {d for _, d, _ in points}
    return len(points) >= NUM_FOR_SURFACE and len(sizes) >= 3 and len(lengths) >= 3


def _rms(errors: list[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def _line(points: list[Point]) -> Law:
    import numpy as np

    compute, loss = (np.log([x for x in column]) for column in ([6 * n * d for n, d, _ in points], [loss for _, _, loss in points]))
    if np.ptp(compute) == 0:
        raise ConfigError(["all runs took the same compute, so nothing tells how the loss depends on it; add a smaller or a larger one"])
    slope, height = np.polyfit(compute, loss, 1)
    return Law("line", {"a": float(np.exp(height)), "b": float(-slope)})


def _surface(points: list[Point], near: Law | None = None) -> Law:
    """Approach 3 of arXiv 2203.15556, equation 10. near: a law of almost the same points to start from, in place of the grid."""
    import numpy as np
    from scipy.optimize import minimize

    log_n, log_d, log_loss = np.log(np.array(points)).T

    def objective(p):
        """Huber loss and its gradient at p = (log A, log B, log E, alpha, beta) [..., 5]."""
        a, b, e, alpha, beta = (x[..., None] for x in np.moveaxis(p, -1, 0))
        terms = np.stack([a - alpha * log_n, b - beta * log_d, np.broadcast_to(e, (*p.shape[:-1], len(log_n)))])  # [3, ..., points]
        predicted = np.logaddexp.reduce(terms)
        residual = predicted - log_loss
        inside = np.abs(residual) <= HUBER_DELTA
        value = np.where(inside, residual**2 / 2, HUBER_DELTA * (np.abs(residual) - HUBER_DELTA / 2)).sum(-1)
        share = np.exp(terms - predicted) * np.where(inside, residual, HUBER_DELTA * np.sign(residual))
        return value, np.stack([*share.sum(-1), -(share[0] * log_n).sum(-1), -(share[1] * log_d).sum(-1)], -1)

    if near is None:
        starts = np.stack(np.meshgrid(*STARTS, indexing="ij"), -1).reshape(-1, 5).astype(float)
        starts = starts[np.argsort(objective(starts)[0], kind="stable")[:NUM_DESCENTS]]
    else:
        c = near.constants
        starts = [np.array([math.log(c["A"]), math.log(c["B"]), math.log(c["E"]), c["alpha"], c["beta"]])]
    # Scaled: the loss of a good fit is far below L-BFGS's own tolerances.
    found = [minimize(lambda p: tuple(x / HUBER_DELTA**2 for x in objective(p)), start, jac=True, method="L-BFGS-B",
                      options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10}) for start in starts]
    a, b, e, alpha, beta = map(float, min(found, key=lambda result: result.fun).x)
    return Law("surface", {"E": math.exp(e), "A": math.exp(a), "B": math.exp(b), "alpha": alpha, "beta": beta})


def point_of(run_dir: str | Path, split: str = "") -> Point:
    """(parameters, tokens, loss) of a finished pretraining run: the last loss of a validation set (the only one where `split` is empty).

    Raises ConfigError where the folder holds no such run.
    """
    from engine import metrics
    from engine.config import RunConfig, nearest
    from engine.foreign import written_config
    from engine.log import read_metrics

    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file() or not (run_dir / "metrics.jsonl").is_file():
        raise ConfigError([f"{run_dir} is no run's folder: it has no config.yaml and metrics.jsonl"])
    run = RunConfig.model_validate(written_config(run_dir))
    if run.stage != "pretrain" or run.checkpoint.load:
        raise ConfigError([f"{run_dir} is of stage {run.stage}{' from a checkpoint' * bool(run.checkpoint.load)}; a law is fitted to models trained "
                           "from the start (stage pretrain)"])
    sets = list(run.data.valid) or ["valid"]
    if split and split not in sets or not split and len(sets) > 1:
        meant = nearest(split, sets) if split else ""
        raise ConfigError([f"{run_dir} has the validation sets {', '.join(sets)}; name one of them in --set{meant}"])
    lines, valid = read_metrics(run_dir), read_metrics(run_dir, split or sets[0])
    if not lines or not valid or valid[-1]["step"] != lines[-1]["step"] or valid[-1]["valid_loss"] is None:
        raise ConfigError([f"{run_dir} has no validation loss of {split or sets[0]} after its last step; set train.eval_samples and run it "
                           "to its end"])
    tokens = lines[-1]["consumed_samples"] * run.train.seq_len
    return float(metrics.num_parameters(run.model, run.train.seq_len).total), float(tokens), float(valid[-1]["valid_loss"])


def write(law: Law, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(asdict(law), indent=1) + "\n")


def read(path: str | Path) -> Law:
    """Raises ConfigError for a file that `write` did not write."""
    try:
        return Law(**json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError([f"{path} cannot be read as a law ({type(error).__name__}: {error}); `launch/recipe.py fit` writes one"]) from None


def describe(law: Law, names: list[str]) -> str:
    """The law, its error, and each run beside what the law says of it. names: of the runs, in the order of law.points."""
    width = max(map(len, names))
    lines = [str(law), f"root mean square error of log L: {law.error:.2%}; of each run by the law of the others: "
             + (f"{law.held_out_error:.2%}" if math.isfinite(law.held_out_error) else "too few runs")]
    lines += [f"  {name:{width}}  N {n:.3g}  D {d:.3g}  loss {loss:.4f}  law {law.loss(n, d):.4f}  ({law.loss(n, d) / loss - 1:+.2%})"
              for name, (n, d, loss) in zip(names, law.points)]
    if law.kind == "surface":
        lines += [f"best tokens for {n:.3g} parameters: {law.best_tokens(n):.3g} ({law.best_tokens(n) / n:.3g} per parameter)"
                  for n in sorted({n for n, _, _ in law.points})]
    return "\n".join(lines)


def draw(law: Law, path: str | Path) -> None:
    """The points, and the law as one curve per size over tokens, or as a line over compute."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    sizes = sorted({n for n, _, _ in law.points})
    for i, size in enumerate(sizes):
        own = [(d, loss) for n, d, loss in law.points if n == size]
        xs = [d if law.kind == "surface" else 6 * size * d for d, _ in own]
        axes.plot(xs, [loss for _, loss in own], "o", color=f"C{i}", label=f"{size:.3g} parameters")
        grid = np.geomspace(min(d for _, d, _ in law.points) / 2, max(d for _, d, _ in law.points) * 4, 100)
        if law.kind == "surface":
            axes.plot(grid, [law.loss(size, d) for d in grid], color=f"C{i}", linewidth=1)
    if law.kind == "line":
        computes = np.geomspace(*(f(6 * n * d for n, d, _ in law.points) for f in (min, max)), 100)
        axes.plot(computes, [law.loss(1, c / 6) for c in computes], color="black", linewidth=1)
    unit = "tokens" if law.kind == "surface" else "compute (FLOPs, 6 N D)"
    axes.set(xscale="log", yscale="log", xlabel=unit, ylabel="loss (nats per token)", title=str(law))
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
