"""Every policy gives the same gradient, recomputes what it says, and needs less memory than the one before."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import sharding, step
from daajax.data.batches import Batches
from daajax.losses.terms import bind
from daajax.models import decoder, remat
from daajax.models.architecture import Experts
from daajax.models.families import architecture_of
from daajax.ops import attention, experts
from daajax.scoring import Scorer
from tests import worlds
from tests.data.test_batches import planned, random_examples, tokenized_data

LLAMA = architecture_of(worlds.ARCHITECTURE | {"num_hidden_layers": 8, "intermediate_size": 128})
ARCHITECTURES = {
    "llama": LLAMA,
    "norms behind the blocks": dataclasses.replace(LLAMA, norms=("post_attention_norm", "post_mlp_norm")),
    "blocks side by side": dataclasses.replace(LLAMA, parallel=True, gated=False),
    "experts": dataclasses.replace(LLAMA, experts=Experts(4, 2, True)),
}
MATMULS = {"qkv": 3, "attention": 2, "o": 1, "mlp": 2, "down": 1}  # of a gated layer


@functools.cache
def batch():
    data = tokenized_data(random_examples(8))
    plan = planned(data, batch_size=8, updates=1, row_multiple=1)
    return Batches(data, plan, np.zeros(len(data.tokens), np.float32))[0], plan.shape(0).keys


@functools.cache
def traced(architecture, policy, attention="blockwise"):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    scorer = Scorer.make(
        ARCHITECTURES[architecture],
        mesh,
        attention=attention,
        remat=policy,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    update, keys = batch()
    differentiated = jax.jit(
        lambda params, update: step.loss_and_gradient(
            scorer, params, update, bind([dict(name="dpo")]), {}, batch_size=8, keys=keys
        )[:2]
    )
    shapes = decoder.abstract_params(scorer.model)[0]
    return differentiated.lower(shapes, update), shapes


@functools.cache
def compiled(policy):
    lowered, shapes = traced("llama", policy)
    random, program = np.random.default_rng(0), lowered.compile()
    params = jax.tree.map(lambda x: (0.1 * random.normal(size=x.shape)).astype(np.float32), shapes)
    gradient, logged = program(params, batch()[0])
    return program.memory_analysis().temp_size_in_bytes, jax.device_get(gradient), float(logged.values()["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("policy", [name for name in remat.REMAT if name != "none"])
def test_a_policy_changes_no_number(policy):
    _, gradient, loss = compiled(policy)
    _, expected, expected_loss = compiled("none")
    assert loss == expected_loss
    for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        # The same operations on the same numbers; a fusion may round once less.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.optimized
def test_policies_stand_in_the_order_of_the_memory_that_they_need():
    sizes = [compiled(policy)[0] for policy in remat.REMAT]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def matmuls(lowered):
    return len(re.findall(r"stablehlo\.dot_general", lowered.as_text()))


@pytest.mark.parametrize(
    ("architecture", "policy"),
    [("llama", name) for name in remat.REMAT if name != "none"]
    + [(name, "full") for name in ARCHITECTURES if name != "llama"]
    + [("experts", "save_except_mlp")],
)
def test_the_products_that_are_said_to_be_recomputed_are_and_no_others(architecture, policy):
    a = ARCHITECTURES[architecture]
    of_product = MATMULS | {"mlp": 1 + a.gated + (a.experts is not None)}
    said = sum(of_product[product] for product in remat.recomputed(policy, a))
    assert matmuls(traced(architecture, policy)[0]) - matmuls(traced(architecture, "none")[0]) == said


def test_what_is_recomputed_in_full_is_what_the_backward_pass_reads():
    found = {name: remat.recomputed("full", a) for name, a in ARCHITECTURES.items()}
    assert found == {
        "llama": ("qkv", "attention", "o", "mlp"),
        "norms behind the blocks": ("qkv", "attention", "o", "mlp", "down"),
        "blocks side by side": ("qkv", "attention", "mlp"),
        "experts": ("qkv", "attention", "o", "mlp", "down"),
    }
    assert all(remat.recomputed("none", a) == () for a in ARCHITECTURES.values())


# ---------------------------------------------------------------------- one layer, against plain autodiff


ROWS, LENGTH = 1, 64


def drawn(random, *shape):
    """Numbers that bfloat16 has, in float32."""
    return np.asarray(random.normal(size=shape).astype(jnp.bfloat16), np.float32)


@functools.cache
def layer():
    """A layer's function of (parameters, x), and both in float32."""
    shapes = decoder.abstract_params(decoder.Decoder(LLAMA, lambda q, k, v, seen: q))[0]["layers"]
    random = np.random.default_rng(0)
    params = {name: drawn(random, *shape.shape[1:]) / shape.shape[1] ** 0.5 for name, shape in shapes.items()}
    x = drawn(random, ROWS, LENGTH, LLAMA.hidden_size)
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None]

    def apply(params, x):
        return decoder.decoder_layer(params, x, None, mask, None, LLAMA, attention.dense, experts.mix)[0]

    return apply, params, x


def gradients(function, dtype):
    _, params, x = layer()
    params, x = jax.tree.map(lambda value: value.astype(dtype), (params, x))
    cotangent = drawn(np.random.default_rng(1), *x.shape).astype(dtype)
    found = jax.jit(lambda params, x: jax.vjp(function, params, x)[1](cotangent))(params, x)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)]


def kept(policy):
    return jax.checkpoint(layer()[0], policy=remat.policy(policy), prevent_cse=False)


def test_none_is_plain_autodiff():
    for found, wanted in zip(gradients(kept("none"), jnp.float32), gradients(layer()[0], jnp.float32), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_in_bfloat16_none_is_as_far_from_the_truth_as_plain_autodiff():
    truth = gradients(layer()[0], jnp.float32)
    found, plain = (gradients(function, jnp.bfloat16) for function in (kept("none"), layer()[0]))
    for one, other, wanted in zip(found, plain, truth, strict=True):
        assert np.linalg.norm(one - wanted) <= 1.05 * np.linalg.norm(other - wanted)


@pytest.mark.parametrize(
    ("policy", "widths"), [("none", 2), ("dots", 2), ("save_except_mlp", 0), ("save_attention", 0), ("full", 0)]
)
def test_of_arrays_as_wide_as_the_mlp_two_are_kept_or_none(policy, widths):
    _, params, x = layer()
    pull = jax.eval_shape(lambda params, x: jax.vjp(kept(policy), params, x)[1], params, x)
    wide = [leaf for leaf in jax.tree.leaves(pull) if leaf.size == ROWS * LENGTH * LLAMA.intermediate_size]
    assert len(wide) == widths


def test_attention_that_is_one_primitive_of_jax_is_kept_and_not_run_again(monkeypatch):
    """cuDNN's names nothing inside; it is traced here as on a GPU, and not compiled."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    q = jnp.zeros((2, 128, 4, 64), jnp.bfloat16)

    def runs(policy):
        attend = jax.checkpoint(
            lambda q: jax.nn.dot_product_attention(q * 2, q, q, implementation="cudnn").astype(jnp.float32).sum(),
            policy=remat.policy(policy),
        )
        return str(jax.make_jaxpr(jax.grad(attend))(q)).count("dot_product_attention_fwd_wrapper[")

    assert [runs(policy) for policy in ("none", "save_attention", "full", "dots")] == [1, 1, 2, 2]
