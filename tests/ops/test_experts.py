"""The mixture of experts against a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax.ops import experts

EXPERTS, EACH, WIDTH, MLP = 5, 2, 6, 4


def operands(shape=(3, 7), seed=0, everyone_to=None):
    random = np.random.default_rng(seed)
    x = random.normal(size=(*shape, WIDTH))
    chosen = np.stack([random.permutation(EXPERTS)[:EACH] for _ in range(np.prod(shape))]).reshape(*shape, EACH)
    if everyone_to is not None:
        chosen[..., 0], chosen[..., 1] = everyone_to, (everyone_to + 1) % EXPERTS
    weights = random.uniform(size=(*shape, EACH))
    matrices = [random.normal(size=(EXPERTS, *inner)) for inner in ((WIDTH, MLP), (WIDTH, MLP), (MLP, WIDTH))]
    return x, chosen.astype(np.int32), weights, matrices


def by_token(x, chosen, weights, gate, up, down):
    """Every token through its experts, one at a time."""
    out = []
    for token, its, shares in zip(
        x.reshape(-1, WIDTH), chosen.reshape(-1, EACH), weights.reshape(-1, EACH), strict=True
    ):
        parts = [jnp.tanh(token @ gate[e]) * (token @ up[e]) @ down[e] for e in its]
        out.append(sum(share * part for share, part in zip(shares, parts, strict=True)))
    return jnp.stack(out).reshape(x.shape)


def single(values):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype), values)


@pytest.mark.parametrize("everyone_to", [None, 4], ids=["spread", "all to two"])
def test_every_token_passes_its_experts_and_none_is_dropped(everyone_to):
    x, chosen, weights, matrices = operands(everyone_to=everyone_to)
    cotangent = np.random.default_rng(1).normal(size=x.shape)
    with jax.enable_x64(True):

        def expected(x, weights, matrices):
            return (by_token(x, chosen, weights, *matrices) * cotangent).sum()

        value = by_token(x, chosen, weights, *matrices)
        gradients = jax.grad(expected, argnums=(0, 1, 2))(
            *(jax.tree.map(jnp.asarray, y) for y in (x, weights, matrices))
        )
    x32, weights32, matrices32 = single(x), single(weights), single(matrices)

    def found(x, weights, matrices):
        return (experts.mix(x, jnp.asarray(chosen), weights, *matrices, jnp.tanh) * cotangent.astype(np.float32)).sum()

    np.testing.assert_allclose(
        experts.mix(x32, jnp.asarray(chosen), weights32, *matrices32, jnp.tanh), value, rtol=1e-4, atol=1e-4
    )
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4),
        jax.grad(found, argnums=(0, 1, 2))(x32, weights32, matrices32),
        gradients,
    )


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_parts_of_the_experts_add_up_to_all_of_them(cut):
    x, chosen, weights, matrices = operands(seed=3)
    x, weights, matrices = single(x), single(weights), single(matrices)
    whole = experts.mix(x, jnp.asarray(chosen), weights, *matrices, jnp.tanh)
    ids = jnp.arange(EXPERTS)
    parts = [
        experts.mix(x, jnp.asarray(chosen), weights, *(m[own] for m in matrices), jnp.tanh, ids[own])
        for own in (slice(0, cut), slice(cut, EXPERTS))
    ]
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-5)
    assert np.abs(parts[0]).max() > 0.1
    assert np.abs(parts[1]).max() > 0.1


def test_an_expert_that_nobody_is_sent_to_gets_no_gradient():
    x, chosen, weights, matrices = operands(everyone_to=1)
    x, weights, matrices = single(x), single(weights), single(matrices)

    def total(matrices):
        return experts.mix(x, jnp.asarray(chosen), weights, *matrices, jnp.tanh).sum()

    for gradient in jax.grad(total)(matrices):
        busy = np.abs(gradient).reshape(EXPERTS, -1).max(axis=1) > 0
        assert busy.tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("copies", [1, 127, 128, 129, 700])
def test_every_copy_has_a_slot_of_its_own_in_a_block_of_its_expert(copies):
    chosen = np.random.default_rng(copies).integers(-1, EXPERTS + 2, copies)
    where = jax.tree.map(np.asarray, experts.layout(jnp.asarray(chosen), EXPERTS))
    here = (chosen >= 0) & (chosen < EXPERTS)
    assert (where.slot[~here] == len(where.copy)).all()
    assert len(set(where.slot[here])) == here.sum()
    assert (where.expert[where.slot[here] // experts.BLOCK] == chosen[here]).all()
    assert (where.copy[where.slot[here]] == np.flatnonzero(here)).all()
    assert (where.copy < copies).sum() == here.sum()
    assert where.slot[here].max(initial=-1) < where.blocks * experts.BLOCK
    assert where.blocks == sum(-(-(chosen == expert).sum() // experts.BLOCK) for expert in range(EXPERTS))


def test_memory_is_that_of_the_tokens_whatever_the_number_of_experts():
    def temporary(count):
        shapes = [(count, 64, 32), (count, 64, 32), (count, 32, 64)]
        arguments = [jnp.zeros((4, 1024, 64)), jnp.zeros((4, 1024, 2), jnp.int32), jnp.zeros((4, 1024, 2))]
        arguments += [jnp.zeros(shape) for shape in shapes]
        compiled = jax.jit(lambda *given: experts.mix(*given, jnp.tanh)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 32 experts may pad 4096 tokens to twice as many; a mask of tokens × experts would be 16 times larger than two's.
    assert temporary(32) < 3 * temporary(2)


def test_bfloat16_sums_in_float32():
    x, chosen, weights, matrices = operands(seed=4)
    short = [jnp.asarray(m, jnp.bfloat16) for m in (x, *matrices)]
    found = experts.mix(short[0], jnp.asarray(chosen), jnp.asarray(weights, jnp.float32), *short[1:], jnp.tanh)
    expected = by_token(
        np.asarray(short[0], np.float32), chosen, weights, *(np.asarray(m, np.float32) for m in short[1:])
    )
    assert found.dtype == jnp.float32
    # Three roundings to 8 bits on the way of numbers of about 10.
    np.testing.assert_allclose(found, expected, atol=4 * 2**-8 * np.abs(expected).max())
