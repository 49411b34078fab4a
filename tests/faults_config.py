"""Bad configuration at the doors: exit code 2 and one sentence, before any device.

Every case is a process of its own, told to use a platform that does not exist: whoever
asks JAX for a device would fail of that instead. Run by `make test-faults`; its name
keeps it out of `make test`, which has the same mistakes without processes in
test_train.py, test_door.py and test_properties.py.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 20.0  # a user may expect a tenth of it
TRAIN = ("--config=configs/quickstart.py:size=tiny",)

CASES = {
    # keys and flags that are mistyped
    "key": ("--config.hyper.lrr=1", "lr"),
    "key of the root": ("--config.batchsize=8", "batch_size"),
    "key of the model": ("--config.model.n_head=2", "n_heads"),
    "key of no part": ("--config.hyperr.lr=1", "hyper"),
    "flag": ("--workdirr=x", "workdir"),
    "no flag at all": ("steps=3", "flags are written --name=value"),
    "option": ("--config=configs/quickstart.py:sise=tiny", "size"),
    "choice of an option": ("--config=configs/gpt2.py:size=huge", "small, medium"),
    "config file": ("--config=configs/quikstart.py", "configs/quikstart.py"),
    # values of another type
    "float for int": ("--config.steps=1e3", "steps"),
    "text for int": ("--config.batch_size=four", "batch_size"),
    "quoted number": ('--config.hyper.lr="1e-4"', "lr"),
    "None": ("--config.steps=None", "steps"),
    "text for bool": ("--config.model.scan_layers=maybe", "scan_layers"),
    "number for tuple": (
        "--config.optimizer.freeze=3",
        "optimizer.freeze[0] is 3: it must be text",
    ),
    "broken tuple": ("--config.optimizer.freeze=('a',", "freeze"),
    "tuple of tuples": (
        "--config.optimizer.decay=(('a',),)",
        "optimizer.decay[0] is ('a',)",
    ),
    # numbers out of range
    "negative steps": ("--config.steps=-1", "steps is -1"),
    "empty batch": ("--config.batch_size=0", "batch_size is 0"),
    "negative rate": ("--config.hyper.lr=-0.1", "hyper.lr is -0.1"),
    "NaN": ("--config.hyper.weight_decay=nan", "hyper.weight_decay is nan"),
    "NaN seconds": ("--config.max_seconds=nan", "max_seconds is nan"),
    "no float32": ("--config.hyper.lr=1e300", "hyper.lr is 1e+300"),
    "certain dropout": ("--config.hyper.dropout_attn=1", "below 1"),
    "beta of 1": ("--config.hyper.beta2=1.0", "hyper.beta2"),
    "negative seed": ("--config.seed=-1", "seed is -1"),
    "huge seed": ("--config.seed=99999999999999999999", "seed"),
    "no layers": ("--config.model.n_layers=0", "n_layers is 0"),
    "all is validation": ("--config.data.val_fraction=1.0", "val_fraction is 1.0"),
    "negative stride": ("--config.data.stride=-2", "stride is -2"),
    "no patience with data": ("--config.data_timeout_s=0", "data_timeout_s is 0"),
    "patience without end": ("--config.data_timeout_s=inf", "data_timeout_s is inf"),
    "grace without end": ("--config.grace_s=inf", "grace_s is inf"),
    "a spike of one loss": ("--config.spike_window=1", "spike_window is 1"),
    "top_p": ("--config.sample_every=1 --config.sample.top_p=2", "top_p is 2.0"),
    # choices that there are not
    "optimizer": ("--config.optimizer.name=adam", "adamw"),
    "schedule": ("--config.optimizer.schedule=cos", "cosine"),
    "activation": ("--config.model.activation=swiglu", "silu"),
    "strategy": ("--config.mesh.strategy=ddp", "pmap"),
    "split": ("--config.data.split=random", "fraction"),
    "attention": ("--config.model.attention=flash", "cudnn"),
    # what does not go together
    "heads": ("--config.model.n_heads=5", "d_model 32 is not a multiple of n_heads 5"),
    "kv heads": ("--config.model.n_kv_heads=3", "n_kv_heads"),
    "window": ("--config.data.seq_len=64", "model.context_length"),
    "accumulate": ("--config.accumulate=3", "multiple of accumulate 3"),
    "head bias": (
        "--config.model.head_bias=True --config.model.tie_embeddings=True",
        "tie_embeddings",
    ),
    "dropout for nobody": (
        "--config.hyper.dropout_adapter=0.1",
        "dropout_adapter",
    ),
    "bad regex": ("--config.optimizer.freeze=('(',)", "regular expression"),
}


def say(door, *arguments, cwd=ROOT):
    """Returns (code, stderr, seconds) of a door."""
    env = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{door}", *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr, time.monotonic() - began


def refused(found, words):
    code, said, seconds = found
    assert code == 2, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert "Traceback" not in said and "no_such_platform" not in said
    assert seconds < SECONDS


@pytest.mark.fault(21)
@pytest.mark.parametrize("case", CASES)
def test_a_bad_setting_ends_with_a_sentence_before_any_device(case, tmp_path):
    given, words = CASES[case]
    config = () if "--config=" in given else TRAIN
    where = () if "--workdir" in given else (f"--workdir={tmp_path / 'run'}",)
    where += (f"--config.data.folder={tmp_path / 'data'}",)
    more = given.split(" ") if " --" in given else [given]
    refused(say("train", *config, *where, *more), words)
    assert not (tmp_path / "run" / "config.json").exists()


SWEEP = """
config = "configs/quickstart.py:size=tiny"
def points():
    return [{"seed": 1}, {KEY: VALUE}]
"""


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hyper.lrr", 1.0, "hyper.lr"),
        ("hyper.lr", "1e-4", "hyper.lr"),
        ("model.n_heads", 5, "multiple of n_heads 5"),
        ("steps", None, "steps"),
    ],
)
def test_a_bad_point_of_a_sweep_ends_it_before_its_first_trial(
    tmp_path, key, value, words
):
    text = SWEEP.replace("KEY", repr(key)).replace("VALUE", repr(value))
    (tmp_path / "mine.py").write_text(text)
    out = tmp_path / "out"
    refused(say("sweep", f"--sweep={tmp_path / 'mine.py'}", f"--out={out}"), words)
    assert not out.exists()
