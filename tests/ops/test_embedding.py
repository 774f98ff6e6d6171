"""Rows of a table that is cut up over devices, and its gradient: those of plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import sharding
from daajax.ops.devices import ONE_DEVICE
from daajax.ops.embedding import lookup

MESHES = [
    None,
    dict(data=8, fsdp=1, tensor=1),
    dict(data=1, fsdp=8, tensor=1),
    dict(data=1, fsdp=1, tensor=8),
    dict(data=2, fsdp=2, tensor=2),
    dict(data=1, fsdp=4, tensor=2),
    dict(fsdp=2, tensor=2, context=2),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(("axis", "entries"), [("vocab", 40), ("positions", 12)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_and_gradient_are_those_of_indexing(sizes, axis, entries, dtype):
    random = np.random.default_rng(0)
    table = jnp.asarray(random.standard_normal((entries, 16)), jnp.float32)
    numbers = random.integers(0, entries, (8, 6), np.int32)
    numbers[:, 0] = 3  # a row that many want
    weights = jnp.asarray(random.standard_normal((8, 6, 16)), dtype)
    devices = ONE_DEVICE
    if sizes is not None:
        mesh = sharding.make_mesh(sizes)
        devices = sharding.MeshDevices(mesh)
        table = jax.device_put(table, sharding.sharding(mesh, (axis, "embed")))
        numbers = jax.device_put(numbers, sharding.sharding(mesh, ("rows", "length")))
    found, pull = jax.vjp(jax.jit(lambda table: lookup(table, numbers, axis, dtype, devices)), table)
    np.testing.assert_array_equal(found, np.asarray(table)[np.asarray(numbers)].astype(dtype))
    wanted = np.zeros(table.shape, np.float32)
    np.add.at(wanted, np.asarray(numbers), np.asarray(weights, np.float32))
    (gradient,) = pull(weights)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_the_partitioner_is_left_nothing_to_gather():
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    devices = sharding.MeshDevices(mesh)
    table = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding.sharding(mesh, ("vocab", "embed")))
    numbers = jax.ShapeDtypeStruct((8, 24), jnp.int32, sharding=sharding.sharding(mesh, ("rows",)))
    rows = sharding.sharding(mesh, ("rows",))

    def gradient(table, numbers):
        def loss(table):
            x = jax.lax.with_sharding_constraint(lookup(table, numbers, "vocab", jnp.float32, devices), rows)
            return jnp.square(x).sum()

        return jax.grad(loss)(table)

    text = jax.jit(gradient, out_shardings=table.sharding).lower(table, numbers).compile().as_text()
    gathered = [row for row in text.splitlines() if " all-gather(" in row]
    assert gathered
    assert not [row for row in gathered if "f32[" in row]  # numbers alone
