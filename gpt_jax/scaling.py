"""How the loss falls with parameters and tokens: a miniseries, its law, a prediction.

    L(N, D) = E + A / N^alpha + B / D^beta

(Hoffmann et al. 2022, "Training compute-optimal large language models", section 3.3.)
The miniseries is cheap: of each size one trunk is trained at the full rate, and every
horizon is a fork of it that decays (fork.py). A run one step larger is predicted, with
its interval, before it is trained.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax import files, metrics, model, runs, tokenizers, train

FILE = "scaling.json"
DECAY = 0.2  # the share of a horizon in which its rate decays
HUBER = 1e-3  # of residuals in log loss, as in the paper
TRIES = 200  # fits of the bootstrap
SURE = (2.5, 97.5)  # percentiles
MOST_POWER = 3.0  # of a power: beyond it a term is but a step


class Point(NamedTuple):
    """One run: parameters (all but the table of tokens), training tokens, last loss."""

    parameters: float
    tokens: float
    loss: float


class Law(NamedTuple):
    """The five numbers of L(N, D)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, parameters: Any, tokens: Any) -> Any:
        """Returns the loss of so many parameters and tokens."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta


class Ladder(NamedTuple):
    """What a miniseries is made of.

    Attributes:
      config: of every run, whose width, heads and steps are replaced.
      widths: of the sizes, the last of them held out.
      steps: of the longest horizon.
      horizons: how many, evenly spaced up to `steps`.
    """

    config: Any
    widths: Sequence[int]
    steps: int
    horizons: int


# --- the law --------------------------------------------------------------------------


def fit(points: Sequence[Point], start: Law | None = None) -> Law:
    """Returns the law that is nearest to points, in Huber's sense, in log loss.

    Args:
      points: at least 6, of at least 3 sizes and 3 lengths.
      start: where to begin; None = from a grid, of which the best end counts.

    Raises:
      ValueError: there are too few.
    """
    from scipy import optimize

    N, D, L = np.array(points, float).T
    if len(points) < 6 or len({*N}) < 3 or len({*D}) < 3:
        raise ValueError(
            f"{len(points)} runs of {len({*N})} sizes and {len({*D})} lengths: a law "
            "of five numbers needs at least 6, of 3 sizes and 3 lengths"
        )
    # Powers of numbers in units of their own geometric mean: as steep in A as in alpha.
    n, d = np.log(N) - np.log(N).mean(), np.log(D) - np.log(D).mean()

    def terms(x):
        e, a, b, alpha, beta = x
        return np.array([e + 0 * n, a - alpha * n, b - beta * d])

    def residuals(x):
        return np.logaddexp.reduce(terms(x)) - np.log(L)

    def slopes(x):
        each = terms(x)
        share = np.exp(each - np.logaddexp.reduce(each))
        return np.stack([*share, -share[1] * n, -share[2] * d], 1)

    lowest = math.log(L.min())
    bounds = [
        (lowest - 9, lowest),
        (lowest - 12, lowest + 3),
        (lowest - 12, lowest + 3),
    ]
    bounds += [(0.01, MOST_POWER)] * 2
    if start is None:
        starts = [
            (lowest + e, lowest + share, lowest + share, alpha, beta)
            for e in (-1.0, -0.2)
            for share in (-3.0, -1.0)
            for alpha in (0.2, 0.6)
            for beta in (0.2, 0.6)
        ]
    else:
        starts = [
            (
                math.log(start.E),
                math.log(start.A) - start.alpha * np.log(N).mean(),
                math.log(start.B) - start.beta * np.log(D).mean(),
                *start[3:],
            )
        ]
    low, high = np.array(bounds).T
    ends = [
        optimize.least_squares(
            residuals,
            np.clip(x, low + 1e-6, high - 1e-6),
            slopes,  # type: ignore[arg-type]
            bounds=(low, high),
            loss="huber",
            f_scale=HUBER,
            x_scale="jac",
            max_nfev=200,
        )
        for x in starts
    ]
    e, a, b, alpha, beta = min(ends, key=lambda end: end.cost).x
    return Law(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * np.log(N).mean())),
        B=float(np.exp(b + beta * np.log(D).mean())),
        alpha=float(alpha),
        beta=float(beta),
    )


def bootstrap(
    points: Sequence[Point], law: Law, seed: int = 0, tries: int = TRIES
) -> tuple[list[Law], np.ndarray]:
    """Returns laws of points with other residuals, and a residual for each, log loss.

    Residuals are drawn from those of the fit, made as wide as they would be without
    the five numbers that were fitted to them.
    """
    N, D, L = np.array(points, float).T
    found = law(N, D)
    off = np.log(L) - np.log(found)
    off = (off - off.mean()) * math.sqrt(len(points) / max(len(points) - 5, 1))
    rng = np.random.default_rng(seed)
    laws, drawn = [], rng.choice(off, tries)
    for _ in range(tries):
        again = found * np.exp(rng.choice(off, len(points)))
        laws.append(fit([*map(Point, N, D, again)], start=law))
    return laws, drawn


def predict(
    laws: Sequence[Law], residuals: np.ndarray, parameters: float, tokens: float
) -> tuple[float, float]:
    """Returns the 95 % interval of the loss of one run, from a bootstrap."""
    losses = np.array([law(parameters, tokens) for law in laws]) * np.exp(residuals)
    low, high = np.percentile(losses, SURE)
    return float(low), float(high)


def optimal(law: Law, flops: float) -> tuple[float, float]:
    """Returns the parameters and tokens of the least loss for 6 N D = flops."""
    total = law.alpha + law.beta
    ratio = (law.alpha * law.A / (law.beta * law.B)) ** (1 / total)
    parameters = ratio * (flops / 6) ** (law.beta / total)
    return parameters, flops / 6 / parameters


# --- the miniseries -------------------------------------------------------------------


def check(ladder: Ladder) -> None:
    """Refuses a miniseries that cannot be.

    Raises:
      ValueError: names what is too little or does not divide.
    """
    config, widths = ladder.config, ladder.widths
    if len(widths) < 4 or list(widths) != sorted({*widths}):
        raise ValueError(
            f"widths {', '.join(map(str, widths))}: give at least 4, rising; the last "
            "one is held out"
        )
    if ladder.horizons < 3 or ladder.steps % (5 * ladder.horizons):
        raise ValueError(
            f"{ladder.steps} steps in {ladder.horizons} horizons: give at least 3, and "
            f"steps that are a multiple of {5 * ladder.horizons}, so that each decays "
            "for a fifth of its length"
        )
    if config.optimizer.schedule != "wsd":
        raise ValueError(
            f"optimizer.schedule is {config.optimizer.schedule}: horizons are branches "
            "of one trunk, which needs wsd"
        )
    head = head_of(config)
    if bad := [width for width in widths if width % head]:
        raise ValueError(
            f"width {bad[0]} is not a multiple of the {head} features of a head"
        )
    for width in widths:
        train.check(sized(config, width))


def head_of(config: Any) -> int:
    """Returns the features of a head, which every width keeps."""
    return config.model.head_dim or config.model.d_model // config.model.n_heads


def sized(config: Any, width: int) -> Any:
    """Returns a config of another width, with as many heads as that makes."""
    head = head_of(config)
    config = config.copy_and_resolve_references()
    config.model.update(d_model=width, n_heads=width // head, d_ff=0)
    return config


def series(ladder: Ladder, out: Path, tell: Any) -> tuple[list[Point], int]:
    """Returns the points of all sizes but the last, trained where they are not yet.

    Returns:
      The points, and the exit code of a signal, 0 without one.
    """
    points = []
    unit = ladder.steps // ladder.horizons
    for width in ladder.widths[:-1]:
        trunk = sized(ladder.config, width)
        fork = unit * 4 // 5
        trunk.update(steps=fork * ladder.horizons, checkpoint_every=fork)
        trunk.update(keep=ladder.horizons, eval_every=0, early_from=0)
        trunk.hyper.update(decay_fraction=0.0, decay_steps=0.0)
        folder = out / f"width={width}"
        if code := train.train(trunk, folder / "trunk").exit_code:
            return points, code
        for number in range(1, ladder.horizons + 1):
            branch = sized(ladder.config, width)
            branch.fork = f"{folder / 'trunk'}:step={fork * number}"
            branch.update(steps=unit * number, eval_every=0, early_from=0, keep=1)
            branch.hyper.update(decay_fraction=DECAY, decay_steps=0.0)
            where = folder / f"steps={branch.steps}"
            if code := train.train(branch, where).exit_code:
                return points, code
            points.append(point_of(where))
            tell(f"{where}: {in_words(points[-1])}")
    return points, 0


def held_out(ladder: Ladder, out: Path) -> tuple[Any, Path]:
    """Returns the config of the run that is predicted, and its folder."""
    config = sized(ladder.config, ladder.widths[-1])
    config.update(steps=ladder.steps, eval_every=0, early_from=0, keep=1)
    config.hyper.update(decay_fraction=DECAY, decay_steps=0.0)
    return config, out / "held_out"


def size_of(config: Any, folder: Path) -> tuple[float, float]:
    """Returns parameters (all but the table of tokens) and training tokens.

    Args:
      config: of the run.
      folder: a run with the same tokenizer.
    """
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    cfg = runs.model_config(config, tokenizer)
    table = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.d_model
    each = config.batch_size * (config.data.seq_len or cfg.context_length)
    return float(model.count(cfg) - table), float(config.steps * each)


def point_of(folder: Path) -> Point:
    """Returns the point that a run is."""
    config = runs.read_config(folder)
    _, loss = metrics.points(metrics.read(folder), "val_loss")[-1]
    return Point(*size_of(config, folder), loss)


def in_words(point: Point) -> str:
    """Returns a point as a line."""
    return (
        f"{point.parameters:,.0f} parameters, {point.tokens:,.0f} tokens: val_loss "
        f"{point.loss:.4f}"
    )


def climb(ladder: Ladder, out: str | Path, tell: Any) -> dict[str, Any] | int:
    """Trains the series, predicts the run that is held out, trains it, and tells.

    Returns:
      What is written to FILE: points, law, intervals, the prediction and the truth; or
      the exit code of a signal.

    Raises:
      ValueError: see `check`.
    """
    check(ladder)
    out = files.expand(out)
    points, code = series(ladder, out, tell)
    if code:
        return code
    law = fit(points)
    laws, residuals = bootstrap(points, law)
    config, folder = held_out(ladder, out)
    first = out / f"width={ladder.widths[0]}" / "trunk"
    parameters, tokens = size_of(config, first)
    low, high = predict(laws, residuals, parameters, tokens)
    found = {
        "points": [list(point) for point in points],
        "law": law._asdict(),
        "intervals": {
            name: np.percentile([getattr(one, name) for one in laws], SURE).tolist()
            for name in Law._fields
        },
        "laws": [list(one) for one in laws],
        "held_out": {
            "parameters": parameters,
            "tokens": tokens,
            "predicted": law(parameters, tokens),
            "interval": [low, high],
        },
    }
    write(out, found)  # before it is known
    tell(f"predicted: val_loss {law(parameters, tokens):.4f}, {low:.4f} to {high:.4f}")
    if code := train.train(config, folder).exit_code:
        return code
    truth = point_of(folder)
    found["held_out"]["loss"] = truth.loss
    write(out, found)
    tell(f"and it is: {in_words(truth)}")
    return found


def write(out: Path, found: dict[str, Any]) -> None:
    """Writes FILE."""
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / FILE, json.dumps(found, indent=1) + "\n")
