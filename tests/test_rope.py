"""Rotary positions, against their papers."""

import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import rope
from gpt_jax.rope import RopeScaling
from tests.tiny import draw

K = 8


def test_rotated_products_depend_on_distance_only():
    q_K, k_K = draw(K, seed=4), draw(K, seed=5)

    def product(q_at, k_at):
        def turned(x_K, at):
            turn = rope.rotation(jnp.array([[at]]), K, base=10000.0, scaling=None)
            return rope.rotate(x_K[None, None, None], turn).ravel()

        return turned(q_K, q_at) @ turned(k_K, k_at)

    np.testing.assert_allclose(product(7, 3), product(104, 100), rtol=1e-4)
    np.testing.assert_allclose(product(5, 5), q_K @ k_K, rtol=1e-5)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_rotation_turns_feature_i_with_feature_i_plus_half():
    x = draw(1, 1, 1, K, seed=6)
    turn = rope.rotation(jnp.array([[3]]), K, base=100.0, scaling=None)
    pair = np.asarray(x[0, 0, 0, : K // 2]) + 1j * np.asarray(x[0, 0, 0, K // 2 :])
    want = pair * np.exp(3j * 100.0 ** -(np.arange(K // 2) * 2 / K))
    got = rope.rotate(x, turn)[0, 0, 0]
    np.testing.assert_allclose(got, np.concatenate([want.real, want.imag]), atol=1e-6)


def test_llama3_scaling_follows_the_published_rule():
    # Llama 3.2 1B: head_dim 64, base 500,000, factor 32, 1 and 4, context 8,192.
    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    got = rope.rope_frequencies(64, base=500000.0, scaling=scaling)
    want = []
    for i in range(32):
        frequency = 500000.0 ** (-2 * i / 64)
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            want.append(frequency)
        elif wavelength > 8192 / 1:
            want.append(frequency / 32)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * frequency / 32 + smooth * frequency)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got[0] == 1.0
    np.testing.assert_allclose(got[-1], 500000.0 ** (-62 / 64) / 32, rtol=1e-5)


def test_linear_scaling_divides_every_frequency():
    plain = rope.rope_frequencies(K, base=10000.0, scaling=None)
    scaled = rope.rope_frequencies(K, base=10000.0, scaling=RopeScaling("linear", 8.0))
    np.testing.assert_allclose(scaled, np.asarray(plain) / 8, rtol=1e-6)


def test_yarn_follows_the_paper():
    # Qwen's: base 10,000, factor 4, 32 and 1 turns, context 4,096.
    scaling = RopeScaling(
        "yarn", 4.0, original_context=4096, beta_fast=32.0, beta_slow=1.0
    )
    got = rope.rope_frequencies(64, base=10000.0, scaling=scaling)
    turns = 4096 * 10000.0 ** (-np.arange(32) / 32) / (2 * np.pi)
    fast = int(np.argmax(turns < 32)) - 1  # the last pair that turns 32 times
    slow = int(np.argmax(turns < 1))  # the first that turns less than once
    for i in range(32):
        frequency = 10000.0 ** (-i / 32)
        divided = min(max((i - fast) / (slow - fast), 0), 1)
        want = divided * frequency / 4 + (1 - divided) * frequency
        np.testing.assert_allclose(got[i], want, rtol=1e-5)
    assert 0 < fast < slow < 31
    assert scaling.size == pytest.approx(0.1 * np.log(4) + 1)
    plain, turned = (
        rope.rotation(jnp.arange(3)[None], 64, base=10000.0, scaling=s)
        for s in (None, scaling)
    )
    np.testing.assert_allclose(turned.cos[..., 0], scaling.size * plain.cos[..., 0])


def test_longrope_divides_each_frequency_by_its_own_number():
    factors = tuple(1.0 + 0.5 * i for i in range(K // 2))
    scaling = RopeScaling(
        "longrope", 32.0, original_context=4096, short_factors=factors
    )
    plain = rope.rope_frequencies(K, base=10000.0, scaling=None)
    got = rope.rope_frequencies(K, base=10000.0, scaling=scaling)
    np.testing.assert_allclose(got * np.array(factors), plain, rtol=1e-6)
    assert scaling.size == pytest.approx(1.1902, abs=1e-4)  # as Phi 3 publishes it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ntk", "factor": 2.0}, "ntk"),
        ({"kind": "yarn", "factor": 2.0}, "beta_slow"),
        ({"kind": "linear", "factor": 2.0, "beta_fast": 3.0}, "not read beta_fast"),
        (
            {"kind": "longrope", "factor": 2.0, "short_factors": (0.0,)}
            | {"original_context": 8},
            "above 0",
        ),
        ({"kind": "linear", "factor": 0.0}, "above 0"),
        ({"kind": "llama3", "factor": 8.0}, "low_freq_factor"),
        (
            {
                "kind": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            "original_context",
        ),
    ],
)
def test_wrong_rope_scaling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**options)
