"""Draws, against the distributions that they are of."""

import collections
import itertools
import math

import numpy as np
import pytest

from daajax.data.draws import generator, keep

TRIALS = 3000


def chi_squared(counts, outcomes):
    """Pearson's statistic against a uniform distribution, in standard deviations from its mean.

    It has `outcomes - 1` degrees of freedom: that mean, and twice that variance.
    """
    expected = sum(counts.values()) / outcomes
    assert len(counts) <= outcomes
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    statistic += expected * (outcomes - len(counts))
    return (statistic - (outcomes - 1)) / math.sqrt(2 * (outcomes - 1))


def test_a_generator_is_a_function_of_its_key_and_every_part_of_the_key_counts():
    def draw(*key):
        stream, seed, update, place = key
        return generator(stream, seed=seed, update=update, place=place).random()

    keys = [*itertools.product(("gumbel", "kept", "reference_kept", "mismatched"), (0, 1, 2**32), (0, 1, 7), (0, 1, 9))]
    drawn = [draw(*key) for key in keys]
    assert drawn == [draw(*key) for key in keys]
    assert len(set(drawn)) == len(keys)


def test_the_same_key_gives_the_same_numbers_in_every_version_of_numpy():
    # Philox 4x64-10 for this counter and key, as random123 specifies it, from an implementation in plain Python.
    raw = generator("kept", seed=3, update=5, place=9).bit_generator.random_raw(4)
    assert raw.tolist() == philox([1, 0, 9, 5], [3, 2])


def philox(counter, key):
    """Philox 4x64 of ten rounds (Salmon et al. 2011). NumPy adds 1 to its counter before it draws."""
    mask = 2**64 - 1
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [b >> 64 ^ counter[1] ^ key[0], b & mask, a >> 64 ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


@pytest.mark.parametrize("lengths", [[3, 7], [7, 3], [5, 5], [4, 0], [0, 4, 9], [0, 0], [1, 6, 2], [8]])
def test_of_every_response_as_many_tokens_are_kept_as_the_shortest_has(lengths):
    shortest = min([length for length in lengths if length], default=0)
    for place in range(20):
        masks = keep(generator("kept", seed=0, place=place), lengths)
        assert [len(mask) for mask in masks] == lengths
        assert [int(mask.sum()) for mask in masks] == [min(length, shortest) for length in lengths]


def test_every_subset_of_a_response_is_kept_equally_often():
    counts = collections.Counter()
    for place in range(TRIALS):
        one, two, all_of_it = keep(generator("kept", seed=0, place=place), [4, 5, 2])
        counts[tuple(np.flatnonzero(one)), tuple(np.flatnonzero(two))] += 1
        assert all_of_it.all()
    assert abs(chi_squared(counts, math.comb(4, 2) * math.comb(5, 2))) < 4


def test_the_two_draws_of_tokens_are_independent():
    counts = collections.Counter()
    for place in range(TRIALS):
        drawn = [keep(generator(name, seed=0, place=place), [2, 4])[1] for name in ("kept", "reference_kept")]
        counts[tuple(tuple(np.flatnonzero(mask)) for mask in drawn)] += 1
    assert abs(chi_squared(counts, math.comb(4, 2) ** 2)) < 4


@pytest.mark.parametrize("which", ["seed", "update", "place"])
def test_gumbel_draws_of_neighbouring_keys_have_the_standard_distribution(which):
    drawn = np.sort([generator("gumbel", **{"seed": 1, which: n}).gumbel() for n in range(TRIALS)])
    probabilities = np.exp(-np.exp(-drawn))  # the distribution function
    steps = np.arange(TRIALS + 1) / TRIALS
    distance = max((steps[1:] - probabilities).max(), (probabilities - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(TRIALS)  # Kolmogorov's: exceeded once in a thousand
