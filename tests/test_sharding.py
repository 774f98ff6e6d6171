import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from daajax import sharding
from daajax.errors import UserError
from daajax.models import decoder
from daajax.optimizer import make_optimizer
from tests.test_scoring import mesh_of, scorer_of

# Where each parameter of a decoder lies on a mesh with every axis: hidden features over fsdp and context; heads, MLP
# and vocabulary over tensor; norms on every device.
PARAMETERS = {
    "embed_tokens": P("tensor", ("fsdp", "context")),
    "lm_head": P("tensor", ("fsdp", "context")),
    "norm": P(None),
    "layers/pre_attention_norm": P(None, None),
    "layers/pre_mlp_norm": P(None, None),
    "layers/q_proj": P(None, ("fsdp", "context"), "tensor"),
    "layers/k_proj": P(None, ("fsdp", "context"), "tensor"),
    "layers/v_proj": P(None, ("fsdp", "context"), "tensor"),
    "layers/o_proj": P(None, "tensor", ("fsdp", "context")),
    "layers/gate_proj": P(None, ("fsdp", "context"), "tensor"),
    "layers/up_proj": P(None, ("fsdp", "context"), "tensor"),
    "layers/down_proj": P(None, "tensor", ("fsdp", "context")),
}


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def decoder_on_a_mesh():
    """Mesh, shapes, logical axes and shardings of a tiny decoder's parameters."""
    mesh = mesh_of(2, 2, 2)
    shapes, axes = decoder.abstract_params(scorer_of(2, 2, 2).model)
    return mesh, shapes, axes, sharding.param_shardings(mesh, shapes, axes)


def test_only_slices_of_tpus_are_apart():
    def device(platform, place):
        return types.SimpleNamespace(platform=platform, slice_index=place)

    tpus, gpus = ([device(platform, place) for place in (1, 0, 1, 0)] for platform in ("tpu", "gpu"))
    assert sharding.slices_of(tpus) == [[tpus[1], tpus[3]], [tpus[0], tpus[2]]]
    assert sharding.slices_of(gpus) == [gpus]
    assert sharding.slices_of(jax.devices()) == [jax.devices()]


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1,), (8, 1, 1, 1)),
        ((1, -1, 1), (1, 8, 1, 1)),
        ((2, -1, 2), (2, 2, 2, 1)),
        ((4, 2, -1), (4, 2, 1, 1)),
        ((1, 4, 2), (1, 4, 2, 1)),
        ((1, 2, 1, -1), (1, 2, 1, 4)),
    ],
)
def test_a_mesh_takes_all_devices_and_minus_one_the_rest(sizes, shape):
    axes = ("data", "fsdp", "tensor", "context")
    mesh = sharding.make_mesh(dict(zip(axes, sizes, strict=False)))
    assert dict(mesh.shape) == dict(zip(axes, shape, strict=True))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.row_multiple(mesh) == shape[0] * shape[1]


def test_a_mesh_takes_the_devices_that_it_is_given():
    some = jax.devices()[4:]
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 2}, some)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2, "context": 1}
    assert set(mesh.devices.flat) == set(some)
    with pytest.raises(UserError, match=r"needs 8 devices but 4 are visible"):
        sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1}, some)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (1, 3, 1),
            r"^mesh \{'data': 1, 'fsdp': 3, 'tensor': 1, 'context': 1\} needs 3 devices but 8 are visible; "
            r"set config\.mesh or use -1 for one axis\.$",
        ),
        ((16, 1, 1), r"needs 16 devices but 8 are visible"),
        ((-1, 3, 1), r"needs a multiple of 3 devices but 8 are visible"),
        ((-1, -1, 1), r"sizes must be positive, and at most one of them -1\.$"),
        ((0, 8, 1), r"sizes must be positive"),
        ((-2, 4, 1), r"sizes must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_in_one_line(sizes, message):
    with pytest.raises(UserError, match=message) as error:
        sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("use", [sharding.spec, lambda axes: sharding.constrain(mesh_of(), axes)])
def test_a_logical_axis_that_is_not_in_the_table_is_refused(use):
    with pytest.raises(ValueError, match=r"logical axes \['towers'\] are not in the sharding table; it has \['embed',"):
        use(("rows", None, "towers"))


def test_logical_axes_map_to_mesh_axes_and_none_is_never_cut():
    assert sharding.spec(("micro_batches", "rows", None)) == P(None, ("data", "fsdp"), None)
    assert sharding.spec(("heads", "embed")) == P("tensor", ("fsdp", "context"))


def test_every_parameter_lies_where_the_table_says(decoder_on_a_mesh):
    mesh, _, _, where = decoder_on_a_mesh
    assert {path: leaf.spec for path, leaf in by_path(where).items()} == PARAMETERS
    assert all(leaf.mesh == mesh for leaf in jax.tree.leaves(where))


def test_a_parameter_that_does_not_divide_is_named():
    mesh = mesh_of(1, 8, 1)
    shapes = {"layers": {"q_proj": jax.ShapeDtypeStruct((2, 12, 16), jnp.float32)}}
    axes = {"layers": {"q_proj": P("layers", "embed", "heads")}}
    message = (
        r"^parameter layers/q_proj, axis 'embed': 12 do not divide over 8 devices of mesh axis 'fsdp'; "
        r"choose a mesh whose sizes divide the model's\.$"
    )
    with pytest.raises(UserError, match=message):
        sharding.param_shardings(mesh, shapes, axes)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "lion", "adafactor", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_optimizer_state_lies_where_its_parameters_lie(decoder_on_a_mesh, name, max_grad_norm):
    mesh, shapes, _, where = decoder_on_a_mesh
    optimizer = make_optimizer(
        name, optax.constant_schedule(1e-3), max_grad_norm=max_grad_norm, hyperparameters={"b1": None}
    )
    state = jax.eval_shape(optimizer.init, shapes)
    found = sharding.optimizer_shardings(mesh, optimizer, shapes, where)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    moments = 0
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(found), strict=True):
        parameter = next(
            (p for p in PARAMETERS if jax.tree_util.keystr(path, simple=True, separator="/").endswith("/" + p)), None
        )
        if parameter and leaf.shape == by_path(shapes)[parameter].shape:
            assert place.spec == PARAMETERS[parameter]
            moments += 1
        else:  # a count, or a placeholder
            assert place.spec == P()
            assert leaf.size == 1
    assert moments == {"adamw": 2, "rmsprop": 1, "lion": 1, "adafactor": 1, "sgd": 0}[name] * len(PARAMETERS)


def test_factored_moments_are_on_every_device():
    mesh = mesh_of(2, 2, 2)
    shapes = {"embed_tokens": jax.ShapeDtypeStruct((256, 128), jnp.float32)}  # 128 and more is factored
    where = {"embed_tokens": sharding.sharding(mesh, ("vocab", "embed"))}
    optimizer = make_optimizer("adafactor", optax.constant_schedule(1e-3), max_grad_norm=None, hyperparameters={})
    state = jax.eval_shape(optimizer.init, shapes)
    assert {(128,), (256,)} <= {leaf.shape for leaf in jax.tree.leaves(state)}
    found = sharding.optimizer_shardings(mesh, optimizer, shapes, where)
    assert {leaf.spec for leaf in jax.tree.leaves(found)} == {P()}


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 1, 1, 4)])
def test_batches_become_global_arrays_cut_by_rows_and_length(sizes):
    mesh, rows, context = mesh_of(*sizes), sizes[0] * sizes[1], dict(mesh_of(*sizes).shape)["context"]
    batch = {"tokens": np.arange(2 * 8 * 12, dtype=np.int32).reshape(2, 8, 12), "weights": np.ones((2, 8), np.float32)}
    placed = sharding.place(mesh, batch)
    for name, found in placed.items():
        np.testing.assert_array_equal(found, batch[name])
    parts = {name: {shard.data.shape for shard in found.addressable_shards} for name, found in placed.items()}
    assert parts == {"tokens": {(2, 8 // rows, 12 // context)}, "weights": {(2, 8 // rows)}}


def test_devices_of_the_axis_tensor_are_nearest_and_those_of_context_next():
    numbers = np.vectorize(lambda device: device.id)(mesh_of(1, 2, 2, 2).devices)
    np.testing.assert_array_equal(numbers[0, 0], [[0, 2], [1, 3]])  # by tensor, then context


def test_a_constraint_puts_an_array_in_its_place():
    mesh = mesh_of(2, 2, 2)
    found = jax.jit(sharding.constrain(mesh, ("rows", "heads")))(jnp.ones((8, 4)))
    assert found.sharding.is_equivalent_to(sharding.sharding(mesh, ("rows", "heads")), 2)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_gradients_through_local_code_are_those_of_the_whole(sizes):
    mesh = mesh_of(*sizes)
    rng = np.random.default_rng(0)
    x, weight, scale = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 4, 3), (5, 3), (4,)))
    seen = []

    def function(x, weight, scale):
        seen.append(x.shape)
        return jnp.sin(jnp.einsum("rhe,ve->rhv", x, weight)) * scale[None, :, None]

    # Rows and heads are cut; the weight is whole on every device, the scale on those with the same heads.
    local = sharding.local(function, mesh, (("rows", "heads"), (), ("heads",)), ("rows", "heads"))

    def total(f, *operands):
        return (f(*operands) ** 2).sum()

    found = jax.jit(jax.value_and_grad(lambda *o: total(local, *o), (0, 1, 2)))(x, weight, scale)
    assert seen[0] == (8 // (sizes[0] * sizes[1]), 4 // sizes[2], 3)
    wanted = jax.value_and_grad(lambda *o: total(function, *o), (0, 1, 2))(x, weight, scale)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=2e-5, atol=1e-5), found, wanted)


def test_heads_that_do_not_divide_are_refused():
    message = r"^key-value heads: 3 do not divide over 2 devices of mesh axis 'tensor'; choose a mesh"
    with pytest.raises(UserError, match=message):
        sharding.check_divides(mesh_of(2, 2, 2), "kv_heads", 3, "key-value heads")
