"""Old runs, new code: every release's run folder still opens, computes and goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt_jax import checkpoint, runs, train
from tests.golden import make_run

FOLDERS = sorted(make_run.HERE.glob("run-*"))


@pytest.mark.fault(22)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_run_of_an_earlier_version_has_the_logits_it_had(folder):
    answers = np.load(folder / "answers.npz")
    run = runs.open(folder, step=make_run.STEPS)
    found = make_run.logits(run, answers["ids"])
    np.testing.assert_allclose(found, answers["logits"], atol=1e-6, rtol=1e-6)


@pytest.mark.fault(22)
@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_run_of_an_earlier_version_goes_on(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    config = make_run.config(str(tmp_path / "data"), make_run.STEPS + 2)
    result = train.train(config, copy)
    assert (result.reason, result.step) == ("steps", make_run.STEPS + 2)


@pytest.mark.fault(22)
def test_a_checkpoint_of_a_later_format_is_refused_by_its_number(tmp_path):
    copy = Path(shutil.copytree(FOLDERS[-1], tmp_path / "run"))
    path = copy / "checkpoints" / str(make_run.STEPS) / checkpoint.MANIFEST
    manifest = checkpoint.sealing.read(path.parent)
    body = {**manifest, "format": checkpoint.FORMAT + 1}
    told = {**body, "sha256": checkpoint.sealing._body_hash(body)}
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"format {checkpoint.FORMAT + 1}, this code"):
        runs.open(copy, step=make_run.STEPS)
