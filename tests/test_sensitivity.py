"""Which numbers matter: slopes against forward-mode derivatives; what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from gpt_jax import adapters, data, model, optimizer, sensitivity, step, train
from gpt_jax.report import run as report
from tests import tiny

STEPS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns the folder of a run of three steps, and its config."""
    folder = tmp_path_factory.mktemp("sensitivity")
    config = tiny.on_text(folder)
    # Nothing depends on a bias of keys: a gradient of exactly 0 in its moments has no
    # derivative of its root, and which element has one is the machine's rounding.
    config.model.update(attention="plain", qkv_bias=False)
    # A rate below the best one: at the best the slope is next to nothing.
    config.hyper.update(lr=1e-2, warmup_steps=1.0, weight_decay=0.5, clip=0.4)
    config.update(steps=STEPS, eval_every=STEPS, checkpoint_every=STEPS, eval_windows=0)
    config.early_from = 0
    train.train(config, folder / "run")
    return folder, config


def derivatives(config, folder, keys):
    """Returns d val_loss / d number after the run's steps, by forward mode."""
    parts = train.parts_of(config, folder / "run")
    task, cfg = parts.task, parts.task.model.cfg
    adapter = adapters.make(model.declared(cfg), **config.adapter)
    rule = config.optimizer.to_dict()
    del rule["ema"]
    tx = optimizer.make(adapter.declared, **rule)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    examples = {"batch_size": config.batch_size, "accumulate": 1, "seed": config.seed}
    source = data.batches(
        task.train, **examples, start=0, rows=[0, 1, 2, 3], timeout_s=60
    )
    batches = [next(source) for _ in range(STEPS)]
    source.close()
    held_out = task.evals["val"]
    (evals,) = data.once(held_out, batch_size=len(held_out))
    start, hyper = parts.first(init_key), train.make_hyper(train.unpack(config), task)

    @jax.jit  # traced and differentiated once for all steps
    def update(state, batch, own):
        how = {"loss": task.loss, "join": parts.join, "tx": tx}
        state, *_ = step.train_step(
            *(state, batch, key, own), **how, reduce=lambda tree: tree
        )
        return state

    def loss(numbers):
        own, state = hyper._replace(**numbers), start
        for batch in batches:
            state = update(state, batch, own)
        one = jax.tree.map(lambda x: x[0], evals)
        sums = task.loss(state.params, {}, one, None, own)
        return sums["loss"] / sums["weight"]

    at = {key: getattr(hyper, key) for key in keys}
    slope = jax.jit(lambda tangent: jax.jvp(loss, (at,), (tangent,))[1])
    return {key: float(slope({k: jnp.float32(k == key) for k in keys})) for key in keys}


def test_slopes_are_the_derivatives_through_the_steps(made, tmp_path):
    folder, config = made
    keys = ("lr", "weight_decay", "clip")
    found = sensitivity.measure(
        folder / "run",
        tmp_path / "out",
        knobs=keys,
        count=1,
        first=config.seed,
        factor=1.05,
        report=lambda *told: None,
    )
    wanted = derivatives(config, folder, keys)
    assert {knob.key for knob in found} == {f"hyper.{key}" for key in keys}
    for knob in found:
        key = knob.key.removeprefix("hyper.")
        doubled = wanted[key] * config.hyper[key] * math.log(2)
        assert knob.effects[0] == pytest.approx(doubled, rel=0.05, abs=2e-4), key
    sizes = [abs(knob.mean.value) for knob in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1e-2
    noted = json.loads((folder / "run" / sensitivity.FILE).read_text())
    assert noted["knobs"][0]["mean"] is None  # of one seed there is no interval


def test_the_report_of_a_run_shows_what_was_found(made):
    run = made[0] / "run"
    knobs = [
        sensitivity.Knob("hyper.lr", 0.03, x, sensitivity.seeds.mean(x))
        for x in ([0.2, 0.21, 0.19], [-0.3, 0.3, 0.1])
    ]
    sensitivity.note(run, knobs, 1.25)
    page = report.write(run).read_text()
    assert "Which numbers matter" in page and "+0.2000" in page
    assert "+0.1752 to +0.2248" in page
    bars = page[page.index("Which numbers matter") :]
    assert "var(--red)" in bars and "background:var(--line)" in bars  # one holds 0
    (run / sensitivity.FILE).unlink()
    assert "Which numbers matter" not in report.write(run).read_text()


def test_shares_near_one_move_by_what_is_missing():
    assert sensitivity.moved("lr", 0.02, 1.25) == pytest.approx(0.025)
    assert sensitivity.moved("beta2", 0.95, 2.0) == pytest.approx(0.9)
    assert sensitivity.moved("beta2", 0.95, 0.5) == pytest.approx(0.975)


def test_the_first_knobs_are_those_that_the_run_reads(made):
    found = sensitivity.chosen_knobs(made[1], ())
    assert found[:3] == ["lr", "weight_decay", "warmup_steps"]
    assert len(found) == sensitivity.MOST and "momentum" not in found
    assert sensitivity.chosen_knobs(made[1], ["hyper.lr", "lr"]) == ["lr"]


@pytest.mark.parametrize(
    ("knobs", "change", "sentence"),
    [
        (["lrr"], {}, r"did you mean lr\?"),
        (["momentum"], {}, "optimizer adamw does not read it"),
        (["z_loss"], {}, "it is 0 in this run"),
        (["lr"], {"factor": 1.0}, "a factor above 1"),
        (["lr"], {"count": 0}, "at least one seed"),
    ],
)
def test_knobs_that_are_none_are_refused(made, tmp_path, knobs, change, sentence):
    how = {"knobs": knobs, "count": 1, "first": 0, "factor": 1.25, **change}
    with pytest.raises(ValueError, match=sentence):
        sensitivity.measure(made[0] / "run", tmp_path / "x", report=print, **how)
    assert not (tmp_path / "x").exists()
