"""Devices: every strategy and every number of devices trains the same run."""

import jax
import numpy as np
import pytest

from gpt_jax import sharding
from tests import test_step as one


def run(strategy, data, steps, state=None, first=0):
    """Trains `steps` steps on `data` devices; returns the losses and the state."""
    made = sharding.make(
        4, strategy=strategy, data=data, fsdp=1, tensor=1, cpu_devices=data
    )
    function, tx = one.make_step()

    def step(state, batch, key, hyper, *, reduce):
        return function(state, batch, key, hyper, reduce=reduce)

    compiled = made.compile(step)
    state = made.place(one.begin(tx) if state is None else state)
    losses = []
    for n in range(first, first + steps):
        batch = jax.tree.map(np.asarray, one.make_batch(2, 4, seed=n))
        state, sums, _ = compiled(state, made.put(batch), one.KEY, one.make_hyper())
        losses.append(float(sums["loss"]))
    return losses, made.view(state)


@pytest.fixture(scope="module")
def alone():
    return run("mesh", 1, 20)


@pytest.mark.parametrize("strategy, data", [("mesh", 2), ("pmap", 1), ("pmap", 2)])
def test_losses_equal_those_of_one_device_over_20_steps(alone, strategy, data):
    losses, state = run(strategy, data, 20)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    one.assert_close(state.params, alone[1].params, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["mesh", "pmap"])
def test_a_state_from_two_devices_goes_on_on_one(alone, strategy):
    losses, state = run(strategy, 2, 10)
    on_host = jax.tree.map(np.asarray, state)
    rest, _ = run("mesh", 1, 10, state=on_host, first=10)
    np.testing.assert_allclose(losses + rest, alone[0], rtol=1e-5)


def test_place_copies_so_that_donation_keeps_the_original():
    made = sharding.make(4, strategy="mesh", data=1, fsdp=1, tensor=1, cpu_devices=1)
    original = jax.numpy.arange(4.0)
    placed = made.place({"x": original})
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(placed)
    np.testing.assert_array_equal(original, [0.0, 1.0, 2.0, 3.0])


def test_a_cpu_mesh_has_the_largest_divisor_of_the_micro_batch():
    wanted = {12: 6, 7: 7, 11: 1, 16: 8}  # of the 8 devices that the tests run on
    found = {}
    for batch in wanted:
        mesh = sharding.make_mesh(batch, data=-1, fsdp=1, tensor=1, cpu_devices=0)
        found[batch] = mesh.size
    assert found == wanted


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"data": 99}, "mesh.data is 99 but there are"),
        ({"data": 3}, "micro-batch of 4 examples does not divide over 3"),
        ({"data": 0}, "mesh.data is 0"),
        ({"fsdp": 2}, "not supported yet"),
        ({"strategy": "mesch"}, "not one of: mesh, pmap"),
    ],
)
def test_axes_that_do_not_fit_are_refused_with_the_numbers(axes, message):
    options = {"strategy": "mesh", "data": 1, "fsdp": 1, "tensor": 1, "cpu_devices": 0}
    with pytest.raises(ValueError, match=message):
        sharding.make(4, **{**options, **axes})
