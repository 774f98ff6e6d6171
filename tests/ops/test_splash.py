"""The splash kernel in interpret mode against the rule; one program for nearly all of it, for they compile long."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from daajax.errors import UserError
from daajax.ops import splash
from tests.ops.rows import (
    CASES,
    CASES_AND_WINDOWS,
    assert_near,
    assert_nothing_leaks,
    assert_padding_is_silent,
    by_the_rule,
    key_layout,
    operands,
    output_and_gradients,
)

interpreted = functools.partial(splash.splash, interpret=True)
SHORT = [case for case in CASES_AND_WINDOWS if "long" not in case[0]]
LONG = [case for case in CASES_AND_WINDOWS if "long" in case[0]]


def by_splash(rows, arrays, window=None):
    return output_and_gradients(interpreted, key_layout(rows, window), *arrays)


@pytest.mark.parametrize(("name", "window"), SHORT + [pytest.param(*case, marks=pytest.mark.slow) for case in LONG])
def test_attention_and_its_gradients_are_the_rule(name, window):
    rows = CASES[name]
    arrays = operands(rows)
    assert_near(by_splash(rows, arrays, window), by_the_rule(rows, *arrays, window), 5e-6)


def test_padding_puts_out_zero_and_passes_no_gradient_whatever_it_holds():
    assert_padding_is_silent(by_splash, CASES["padding"])


@pytest.mark.parametrize(
    ("name", "window"), [("K=2", None), ("K=4 ragged", None), ("K=4 ragged", 6), ("own prompts", 6), ("padding", None)]
)
def test_nothing_outside_what_a_query_sees_reaches_it(name, window):
    assert_nothing_leaks(by_splash, CASES[name], window)


@pytest.mark.slow
def test_nothing_outside_what_a_query_sees_reaches_it_across_blocks():
    assert_nothing_leaks(by_splash, CASES["long"], 150)


@pytest.mark.slow
@pytest.mark.parametrize("block", [128, 256])
def test_rows_of_several_blocks_and_those_that_no_block_divides_are_the_rule(monkeypatch, block):
    monkeypatch.setattr(splash, "BLOCK", block)
    attend = functools.partial(interpreted)  # another function, or the program of another block would serve
    for name in ("long", "long, own prompts"):  # 400 queries, 640 keys
        for window in (None, 150):
            rows = CASES[name]
            arrays = operands(rows)
            found = output_and_gradients(attend, key_layout(rows, window), *arrays)
            assert_near(found, by_the_rule(rows, *arrays, window), 5e-6)


@pytest.mark.slow
def test_scaled_and_capped_scores_and_their_gradients_are_the_rule():
    attend = functools.partial(interpreted, scale=0.7, softcap=0.5)
    for name in ("K=4 ragged", "padding"):
        rows = CASES[name]
        arrays = operands(rows)
        found = output_and_gradients(attend, key_layout(rows), *arrays)
        assert_near(found, by_the_rule(rows, *arrays, scale=0.7, softcap=0.5), 5e-6)


@pytest.mark.slow
def test_bfloat16_operands_lose_only_their_own_rounding():
    rows = CASES["padding"]
    arrays = [x.astype(jnp.bfloat16) for x in operands(rows)]
    found = by_splash(rows, arrays)
    assert {x.dtype for x in found} == {np.dtype(jnp.bfloat16)}
    # Bfloat16 has 8 bits: 4e-3 for each of the scores, the weights and the output.
    assert_near(found, by_the_rule(rows, *(x.astype(np.float32) for x in arrays)), 3e-2)


def test_a_range_of_any_two_keys_is_told_by_its_32_bits():
    first, last, key = np.random.default_rng(0).integers(0, 2**16 - 1, (3, 10_000)).astype(np.int32)
    first, last = np.minimum(first, last), np.maximum(first, last)
    key[:4000] = np.concatenate([first[:1000], last[1000:2000], first[2000:3000] - 1, last[3000:4000] + 1])
    found = splash._sees(16)(jnp.asarray(last - first) << 16 | last, jnp.asarray(key))
    np.testing.assert_array_equal(found, (first <= key) & (key <= last))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long", "long, own prompts"])
def test_rows_that_gather_more_keys_than_a_range_can_tell_are_the_rule(monkeypatch, name):
    monkeypatch.setattr(splash, "BITS", 18)  # 10 for one of 640 keys, 8 for how many there are before it
    splash._sees.cache_clear()
    attend = functools.partial(interpreted)
    for window in (None, 150):
        splash.check(640, [window])
        rows = CASES[name]
        arrays = operands(rows)
        found = output_and_gradients(attend, key_layout(rows, window), *arrays)
        assert_near(found, by_the_rule(rows, *arrays, window), 5e-6)
    splash._sees.cache_clear()


def test_a_window_that_a_range_cannot_tell_is_refused():
    splash.check(65_535, [4096, 2**16, None])
    splash.check(131_072, [2**14 - 1, None])
    with pytest.raises(UserError, match=r"131,072 keys.*windows of at most 16,383 tokens, not 32,768.*blockwise"):
        splash.check(131_072, [32_768, None])
