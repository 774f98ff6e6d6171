"""Links: their slopes as the literature has them, and what two of them have to do with each other."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from daajax.losses import links
from tests.losses.worlds import quick

Z = np.array([-30.0, -5.0, -1.0, -1e-3, 0.0, 1e-3, 0.4, 3.0, 30.0])
SHARES = st.floats(0, 0.49)
LOGITS = st.floats(-50, 50)


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def slope(link, z):
    return np.asarray(jax.vmap(jax.grad(lambda x: link(x[None])[0]))(jnp.asarray(z)))


@pytest.mark.parametrize(
    ("link", "value", "wanted"),
    [
        (links.logistic, lambda z: np.logaddexp(0, -z), lambda z: -sigmoid(-z)),
        (lambda z: links.logistic(z, 0.1), None, lambda z: 0.1 - sigmoid(-z)),
        (lambda z: links.robust(z, 0.1), None, lambda z: -sigmoid(-z) - 0.1 / 0.8),
        (links.hinge, lambda z: np.maximum(0, 1 - z), lambda z: -1.0 * (z < 1)),
        (lambda z: links.square(z, 0.7), lambda z: (z - 0.7) ** 2, lambda z: 2 * (z - 0.7)),
        (links.linear, lambda z: -z, lambda z: -np.ones_like(z)),
        (
            links.cauchy,
            lambda z: -np.log(np.arctan(z) / np.pi + 0.5),
            lambda z: -1 / (np.pi * (1 + z**2) * (np.arctan(z) / np.pi + 0.5)),
        ),
        (
            lambda z: links.log_ratio_modulated(z, 2.0),
            lambda z: sigmoid(-z / 2) * np.logaddexp(0, -z) + sigmoid(z / 2) * np.exp(-z),
            None,
        ),
        (links.exponential_logistic, lambda z: (np.exp(-z) + np.logaddexp(0, -z)) / 2, None),
    ],
    ids=["logistic", "smoothed", "robust", "hinge", "square", "linear", "cauchy", "lrml", "cell"],
)
def test_values_and_slopes_are_those_of_the_formula(link, value, wanted):
    if value is not None:
        np.testing.assert_allclose(link(jnp.asarray(Z)), value(Z), rtol=1e-9, atol=1e-13)
    if wanted is not None:
        np.testing.assert_allclose(slope(link, Z), wanted(Z), rtol=1e-9, atol=1e-13)


def test_the_slope_of_the_hinge_at_its_kink_is_zero():
    assert slope(links.hinge, np.array([1.0])) == 0


def test_tails_of_the_cauchy_link_keep_their_digits():
    # atan(z) = ±π/2 - 1/z + 1/(3 z³) - … for large |z|
    np.testing.assert_allclose(links.cauchy(jnp.array([-1e6, 1e6])), [np.log(np.pi * 1e6), 1e-6 / np.pi], rtol=1e-6)
    in_float32 = links.cauchy(jnp.array([-1e6, 1e6], jnp.float32))
    np.testing.assert_allclose(in_float32, [np.log(np.pi * 1e6), 1e-6 / np.pi], rtol=1e-6)


def test_discopop_has_a_value_where_its_code_has_none():
    # z = -790: σ(z/τ) is e^-15800 and exp(-z) is e^790; their product is nothing beside -log σ(z) = 790.
    np.testing.assert_allclose(links.log_ratio_modulated(jnp.array([-790.0])), [790.0], rtol=1e-12)


@quick
@hypothesis.given(LOGITS, SHARES)
def test_flipping_the_logit_is_flipping_the_labels(z, share):
    z = jnp.array([z])
    np.testing.assert_allclose(links.logistic(-z, share), links.logistic(z, 1 - share), rtol=1e-12)


@quick
@hypothesis.given(LOGITS, SHARES)
def test_the_mean_of_the_robust_link_over_noisy_labels_is_the_logistic_link_of_true_ones(z, share):
    z = jnp.array([z])
    mean = (1 - share) * links.robust(z, share) + share * links.robust(-z, share)
    np.testing.assert_allclose(mean, links.logistic(z), rtol=1e-9, atol=1e-10)
