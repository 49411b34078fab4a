"""Facts about the mesh in sight: who shares examples, what is added up, what splits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import mesh, sharding


def made(data, fsdp, tensor):
    return sharding.make_mesh(8, data=data, fsdp=fsdp, tensor=tensor, cpu_devices=0)


def test_without_a_mesh_in_sight_everything_is_of_one_device():
    x = jnp.arange(6.0)
    assert mesh.in_sight() is None and mesh.sharers() == mesh.length("tensor") == 1
    assert mesh.constrained(x, mesh.EXAMPLES) is x and mesh.added(x, 0) is x
    assert mesh.by_examples(jnp.sin, (mesh.ROWS,), mesh.ROWS) is jnp.sin


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("width", [8, 6])  # what fsdp=4 divides, and does not
def test_what_devices_add_up_over_their_examples_is_the_sum_of_all(axes, width):
    """Oracle: numpy."""
    rows_BD = np.random.default_rng(0).normal(size=(16, width)).astype(np.float32)
    grid = made(*axes)

    def total(x_BD):
        gives = mesh.share((width,), 0)
        add = lambda part_BD: mesh.added(part_BD.sum(0), 0)  # noqa: E731
        return mesh.by_examples(add, (mesh.ROWS,), gives)(x_BD)

    with jax.set_mesh(grid):
        found = jax.jit(sharding.within(grid, total))(rows_BD)
    np.testing.assert_allclose(found, rows_BD.sum(0), rtol=1e-5, atol=1e-6)


def test_what_does_not_divide_is_not_split():
    grid, seen = made(2, 2, 2), {}

    def look(x_BH, few_BH):
        seen["sharers"], seen["tensor"] = mesh.sharers(), mesh.length("tensor")
        return [mesh.constrained(x, mesh.EXAMPLES, "tensor") for x in (x_BH, few_BH)]

    with jax.set_mesh(grid):
        arrays = jnp.ones((4, 6)), jnp.ones((3, 5))
        whole, few = jax.jit(sharding.within(grid, look))(*arrays)
    assert seen == {"sharers": 4, "tensor": 2}
    assert whole.sharding.shard_shape(whole.shape) == (1, 3)
    assert few.sharding.shard_shape(few.shape) == (3, 5)
