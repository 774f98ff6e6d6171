"""Statistics of an update: of its examples alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from daajax.losses import statistics

VALUES = jnp.array([3.0, -99.0, 1.0, 7.0, 1e9, 2.0])
REAL = jnp.array([True, False, True, True, False, True])


def test_mean_and_deviation_are_those_of_the_examples():
    among = np.array([3.0, 1.0, 7.0, 2.0])
    np.testing.assert_allclose(statistics.mean(VALUES, REAL), among.mean(), rtol=1e-6)
    np.testing.assert_allclose(statistics.deviation(VALUES, REAL), among.std(ddof=1), rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_of_no_example_or_one_they_are_numbers(count):
    real = jnp.arange(6) < count
    np.testing.assert_array_equal(statistics.mean(VALUES, real), 3.0 * count)
    np.testing.assert_array_equal(statistics.deviation(VALUES, real), 0)


def test_ranks_count_the_examples_from_the_lowest_and_the_others_come_last():
    np.testing.assert_array_equal(statistics.ascending(VALUES, REAL)[:4], [2, 5, 0, 3])
    np.testing.assert_array_equal(np.asarray(statistics.ranks(VALUES, REAL))[np.asarray(REAL)], [2, 0, 3, 1])
    assert (np.asarray(statistics.ranks(VALUES, REAL))[~np.asarray(REAL)] >= 4).all()
