"""Top-k and top-p against a loop over sorted tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import sampling

VOCAB = 40


def scores_of(rows=200, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, VOCAB)) * rng.uniform(0.2, 4, (rows, 1))).astype(np.float32)


def allowed(row, top_k, top_p):
    """Tokens that may be drawn, best first: by the definition, one at a time."""
    row = row.astype(np.float64)
    order = sorted(range(len(row)), key=lambda token: -row[token])[:top_k]
    weights = np.exp(row[order] - row[order].max())
    kept, mass = [], 0.0
    for token, probability in zip(order, weights / weights.sum(), strict=True):
        kept.append(token)
        mass += probability
        if top_p is not None and mass >= top_p:
            break
    return kept


def drawn_from(scores, *, count, temperature, top_k, top_p):
    """How often each token is drawn, one row of scores drawn from `count` times."""
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.jit(sampling.draw, static_argnames="top_k")(
        jnp.tile(jnp.asarray(scores)[None], (count, 1)),
        keys,
        temperature=jnp.float32(temperature),
        top_k=top_k,
        top_p=None if top_p is None else jnp.float32(top_p),
    )
    return np.bincount(np.asarray(tokens), minlength=VOCAB) / count


@pytest.mark.parametrize("k", [1, 2, 7, VOCAB, VOCAB + 5])
def test_top_k_keeps_the_k_best(k):
    scores = scores_of()
    found = np.asarray(sampling.within_top_k(jnp.asarray(scores), k))
    for row, mask in zip(scores, found, strict=True):
        assert set(np.flatnonzero(mask)) == set(allowed(row, k, None))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    scores = scores_of()
    found = np.asarray(sampling.within_top_p(jnp.asarray(scores), jnp.float32(p)))
    for row, mask in zip(scores, found, strict=True):
        assert set(np.flatnonzero(mask)) == set(allowed(row, None, p))


def test_equals_of_the_last_one_are_kept():
    scores = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2, 0.0]]))
    assert sampling.within_top_k(scores, 2).tolist() == [[True, True, True, True, False]]
    assert sampling.within_top_p(scores, jnp.float32(0.5)).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (2.0, 5, None), (1.0, None, 0.7), (0.7, 8, 0.8), (1.5, 1, None)],
)
def test_draws_have_the_distribution_of_temperature_then_top_k_then_top_p(temperature, top_k, top_p):
    row, count = scores_of(1, seed=3)[0], 20_000
    tempered = (row / np.float32(temperature)).astype(np.float64)
    kept = allowed(tempered, top_k, top_p)
    expected = np.zeros(VOCAB)
    expected[kept] = np.exp(tempered[kept]) / np.exp(tempered[kept]).sum()
    found = drawn_from(row, count=count, temperature=temperature, top_k=top_k, top_p=top_p)
    assert not found[expected == 0].any()
    # 5 standard deviations of a count, and room for rare tokens, whose counts are skewed.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 3 / count).all()


def test_top_p_is_of_what_top_k_left():
    # 0.35 of 0.75 is 0.47: two tokens reach 0.6 only together. Of all, 0.35 + 0.25 = 0.6 would need a rounding.
    scores = np.full(VOCAB, -np.inf, np.float32)
    scores[:5] = np.log([0.35, 0.25, 0.15, 0.15, 0.1])
    found = drawn_from(scores, count=2000, temperature=1.0, top_k=2, top_p=0.55)
    assert set(np.flatnonzero(found)) == {0}  # 0.35 / 0.6 = 0.58
    found = drawn_from(scores, count=2000, temperature=1.0, top_k=None, top_p=0.55)
    assert set(np.flatnonzero(found)) == {0, 1}


def test_without_a_temperature_the_most_probable_is_taken():
    scores = scores_of(50)
    keys = jax.random.split(jax.random.key(0), 50)
    found = sampling.draw(jnp.asarray(scores), keys, temperature=None, top_k=None, top_p=None)
    np.testing.assert_array_equal(found, scores.argmax(axis=1))


def test_a_rows_key_is_a_function_of_key_prompt_and_sample_alone():
    data = [
        jax.random.key_data(sampling.row_keys(jax.random.key(0), jnp.array(p), jnp.array(s)))
        for p, s in (([3, 1, 3], [0, 0, 1]), ([1, 5, 3], [0, 0, 0]))
    ]
    assert len({tuple(row) for row in np.asarray(data[0]).tolist()}) == 3
    np.testing.assert_array_equal(data[0][0], data[1][2])
    np.testing.assert_array_equal(data[0][1], data[1][0])
