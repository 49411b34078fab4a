"""How fast a machine trains: measured once, kept, told."""

import json
import math

import pytest

from gpt_jax import calibration

SPEED = calibration.Speed(1.5e11, 0.2, 2_000_000, "2 x cpu")


def keep(folder, text):
    path = calibration._path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_is_kept_is_not_measured_again_and_what_is_damaged_is_none(tmp_path):
    assert calibration.kept(tmp_path) is None
    keep(tmp_path, json.dumps(SPEED._asdict()))
    assert calibration.known(tmp_path) == SPEED
    for text in ("{", "[]", '{"flops": 1.0}'):
        keep(tmp_path, text)
        assert calibration.kept(tmp_path) is None


def test_a_speed_is_told_in_words():
    told = "2 x cpu: 150 GFLOP/s while it trains 2,000,000 parameters (0.2 s a step)"
    assert calibration.in_words(SPEED) == told


@pytest.mark.slow
def test_a_machine_is_measured_once_and_its_speed_is_kept(tmp_path):
    assert calibration.kept(tmp_path) is None
    found = calibration.known(tmp_path)
    assert 1e8 < found.flops < 1e16 and math.isfinite(found.seconds)
    assert calibration.kept(tmp_path) == found
    (path,) = (tmp_path / "speed").glob("*.json")
    path.write_text(json.dumps({**found._asdict(), "flops": 7.0}))
    assert calibration.known(tmp_path).flops == 7.0  # not measured again
    path.write_text("{")
    assert calibration.kept(tmp_path) is None
