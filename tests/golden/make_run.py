"""Makes the run folder that later versions must still read: once for each release.

    python -m tests.golden.make_run

It trains a very small model for four steps into tests/golden/run-<version>, with
answers.npz beside its checkpoints: ids [2, T] and the logits [2, T, V] of its weights.
"""

import os
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TEXT = HERE / "run.txt"
CONTEXT, STEPS = 8, 4


def config(folder: str, steps: int):
    """Returns the config of the run, as this version's configs would make it."""
    from configs import common

    made = common.tiny(common.base())
    made.model.update(context_length=CONTEXT, n_layers=1, d_model=8, n_heads=2)
    made.data.update(source=os.path.relpath(TEXT), tokenizer="char", folder=folder)
    made.data.seq_len = CONTEXT
    made.update(steps=steps, eval_every=2, checkpoint_every=2, keep=1, compile_cache="")
    made.update(tensorboard=False, batch_size=4)
    made.mesh.data = 1
    return made


def logits(run, ids_BT):
    """Returns the logits of an opened run as numpy."""
    import jax.numpy as jnp

    found, _ = run.model.apply({"params": run.params}, jnp.asarray(ids_BT))
    return np.asarray(found)


def main() -> None:
    """Makes the folder."""
    import tempfile

    import gpt_jax
    from gpt_jax import runs, train

    target = HERE / f"run-{gpt_jax.__version__}"
    with tempfile.TemporaryDirectory() as place:
        train.train(config(f"{place}/data", STEPS), target)
    for name in ("loss.png", "run.lock"):
        (target / name).unlink(missing_ok=True)
    text = (target / "config.json").read_text()
    (target / "config.json").write_text(text.replace(f"{place}/data", "data"))
    run = runs.open(target, step=STEPS)
    rng = np.random.default_rng(0)
    ids_BT = rng.integers(0, run.tokenizer.vocab_size, (2, CONTEXT)).astype(np.int32)
    np.savez(target / "answers.npz", ids=ids_BT, logits=logits(run, ids_BT))


if __name__ == "__main__":
    main()
