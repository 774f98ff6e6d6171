"""Attention against the rule, evaluated query by query in float64, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daajax.ops import attention, sequences
from daajax.ops.blockwise import blockwise
from tests.ops.rows import (
    CAPACITY,
    CASES,
    CASES_AND_WINDOWS,
    HEAD_DIM,
    RESPONSES,
    SLOTS,
    WINDOWS,
    assert_near,
    assert_nothing_leaks,
    assert_padding_is_silent,
    by_the_rule,
    dense,
    gathered,
    key_layout,
    operands,
    output_and_gradients,
    sees,
    visible,
)

sequence_layout = jax.jit(sequences.sequences, static_argnames=("slots", "responses", "keys", "longest", "window"))
# cuDNN's twin on any platform, under all windows of a length of row: as in a model with layers of several kinds.
TWINS = {
    length: functools.partial(sequences.attend, implementation="xla", windows=windows)
    for length, windows in WINDOWS.items()
}


def by_blocks(rows, arrays, window=None, capacity=None):
    return output_and_gradients(blockwise, key_layout(rows, window, capacity), *arrays)


def sequences_of(rows, window=None, longest=None):
    length = rows.segments.shape[1]
    return sequence_layout(
        *rows[:2],
        slots=SLOTS,
        responses=RESPONSES,
        keys=CAPACITY[length],
        longest=longest,
        window=WINDOWS[length].index(window),
    )


def in_sequences(rows, arrays, window=None):
    return output_and_gradients(TWINS[rows.segments.shape[1]], sequences_of(rows, window), *arrays)


@pytest.mark.parametrize(("name", "window"), CASES_AND_WINDOWS)
def test_the_mask_is_the_rule(name, window):
    rows = CASES[name]
    mask = np.asarray(visible(*rows, window=window))
    for at, query in np.ndindex(rows.segments.shape):
        assert np.flatnonzero(mask[at, query]).tolist() == sees(rows, at, query, window)


@pytest.mark.parametrize(("name", "window"), CASES_AND_WINDOWS)
def test_attention_and_its_gradients_are_the_rule(name, window):
    rows = CASES[name]
    arrays = operands(rows)
    expected = by_the_rule(rows, *arrays, window)
    # Float32 rounds to 6e-8; sums over up to 250 keys of numbers near 1.
    assert_near(dense(rows, arrays, window), expected, 5e-6)
    assert_near(by_blocks(rows, arrays, window), expected, 5e-6)
    assert_near(in_sequences(rows, arrays, window), expected, 5e-6)


@pytest.mark.parametrize(("scale", "softcap"), [(0.7, None), (None, 1.5), (0.7, 0.5)])
@pytest.mark.parametrize("name", ["K=4 ragged", "padding"])
def test_scaled_and_capped_scores_and_their_gradients_are_the_rule(name, scale, softcap):
    rows = CASES[name]
    arrays = operands(rows)
    expected = by_the_rule(rows, *arrays, scale=scale or HEAD_DIM**-0.5, softcap=softcap)
    attend = functools.partial(attention.dense, scale=scale, softcap=softcap)
    assert_near(output_and_gradients(attend, visible(*rows), *arrays), expected, 5e-6)
    attend = functools.partial(blockwise, scale=scale, softcap=softcap)
    assert_near(output_and_gradients(attend, key_layout(rows), *arrays), expected, 5e-6)


@pytest.mark.parametrize("name", ["K=4 ragged", "padding", "long"])
def test_bfloat16_operands_lose_only_their_own_rounding(name):
    rows = CASES[name]
    arrays = [x.astype(jnp.bfloat16) for x in operands(rows)]
    found = by_blocks(rows, arrays)
    assert {x.dtype for x in found} == {np.dtype(jnp.bfloat16)}
    # Bfloat16 has 8 bits: 4e-3 for each of the scores, the weights and the output.
    assert_near(found, by_the_rule(rows, *(x.astype(np.float32) for x in arrays)), 3e-2)


@pytest.mark.parametrize("name", ["K=4 ragged", "long"])
def test_a_capacity_may_be_exactly_full(name):
    rows = CASES[name]
    arrays = operands(rows)
    exact = gathered(rows)
    assert exact < CAPACITY[rows.segments.shape[1]]
    for one, two in zip(by_blocks(rows, arrays, capacity=exact), by_blocks(rows, arrays), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("attend", [dense, by_blocks, in_sequences])
def test_padding_puts_out_zero_and_passes_no_gradient_whatever_it_holds(attend):
    rows = CASES["padding"]
    assert (rows.segments[1] == 0).all()
    assert_padding_is_silent(attend, rows)


@pytest.mark.parametrize("attend", [by_blocks, in_sequences])
@pytest.mark.parametrize(
    ("name", "window"),
    [("K=2", None), ("K=4 ragged", None), ("K=4 ragged", 6), ("own prompts", 6), ("padding", None), ("long", 150)],
)
def test_nothing_outside_what_a_query_sees_reaches_it(attend, name, window):
    assert_nothing_leaks(attend, CASES[name], window)


@pytest.mark.parametrize(("name", "window"), CASES_AND_WINDOWS)
def test_the_key_layout_is_prompt_and_response_once_per_response(name, window):
    rows = CASES[name]
    capacity = CAPACITY[rows.segments.shape[1]]
    layout = key_layout(rows, window)
    for at in range(len(rows.segments)):
        source, copies = np.zeros(capacity, int), np.full((rows.segments.shape[1], RESPONSES), capacity)
        first, last = np.zeros(len(copies), int), np.full(len(copies), -1)
        filled = 0
        for segment in sorted(set(rows.segments[at].tolist()) - {0}):
            mine = np.flatnonzero(rows.segments[at] == segment)
            branches = rows.branches[at][mine]
            answered = False
            for k in range(1, RESPONSES + 1):
                if k not in branches:
                    continue
                members = mine[(branches == 0) | (branches == k)]
                for index, member in enumerate(members.tolist()):
                    source[filled + index] = member
                    copies[member, k - 1] = filled + index
                    # The prompt looks through its copy in front of the first response.
                    if rows.branches[at][member] == k or not answered:
                        last[member] = filled + index
                        first[member] = max(filled, filled + index + 1 - (window or capacity))
                answered = True
                filled += len(members)
        np.testing.assert_array_equal(layout.source[at], source)
        np.testing.assert_array_equal(layout.copies[at], copies)
        np.testing.assert_array_equal(layout.last[at], last)
        np.testing.assert_array_equal(layout.first[at], first)


def test_gathering_keys_and_its_gradient_are_a_selection_and_its_transpose():
    rows = CASES["K=4 ragged"]
    layout = key_layout(rows)
    x = jnp.asarray(operands(rows)[1])
    found, pull = jax.vjp(lambda x: attention.gather_keys(x, layout), x)
    source, copies = np.asarray(layout.source), np.asarray(layout.copies)
    np.testing.assert_array_equal(found, np.stack([np.asarray(x)[at, source[at]] for at in range(len(x))]))
    cotangent = np.random.default_rng(2).normal(size=found.shape).astype(np.float32)
    expected = np.zeros(x.shape)
    for at, position, response in np.ndindex(copies.shape):
        if copies[at, position, response] < source.shape[1]:
            expected[at, position] += cotangent[at, copies[at, position, response]]
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], expected, rtol=1e-6, atol=1e-6)


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=40),
    spare=st.tuples(*[st.integers(0, 300)] * 3),
)
def test_any_sequences_within_the_capacities_fit_into_the_classes_in_order_of_length(lengths, spare):
    count, keys, longest = len(lengths) + spare[0], sum(lengths) + spare[1], max(lengths) + spare[2]
    shapes = sequences.classes(count, keys=keys, longest=longest)
    room = [size for number, size in shapes for _ in range(number)]
    assert len(room) == count
    assert room == sorted(room, reverse=True)
    assert all(need <= size for need, size in zip(sorted(lengths, reverse=True), room, strict=False))


def test_a_sequence_beyond_the_longest_that_was_announced_is_not_a_number_and_leaves_the_others_alone():
    rows = CASES["K=1"]  # in row 1 a sequence of 80 tokens, elsewhere none of more than 12
    *operands_, _ = arrays = operands(rows)
    found = np.asarray(jax.jit(TWINS[80])(*operands_, sequences_of(rows, longest=40)))  # in classes of 64
    beyond = np.isnan(found).any(axis=(2, 3))
    assert np.argwhere(beyond).tolist() == [[1, position] for position in range(64, 80)]
    np.testing.assert_allclose(found[~beyond], by_the_rule(rows, *arrays)[0][~beyond], rtol=5e-6, atol=5e-6)


def test_scores_beyond_what_exp_can_hold_stay_finite():
    rows = CASES["long"]
    arrays = operands(rows)
    arrays[0] *= 1e3  # scores of ± 1e4 nats; exp overflows at 88
    arrays[1] *= 10
    found = by_blocks(rows, arrays)
    assert all(np.isfinite(x).all() for x in found)
    # One key takes all the weight unless two tie: rounding of 1e4 by 6e-8 is 1e-3 nats.
    np.testing.assert_allclose(found[0], by_the_rule(rows, *arrays)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_bfloat16_outputs_do_not_depend_on_where_a_response_lies():
    """Rounding to bfloat16 may differ where a float32 sum lies on the edge, not in general."""
    prompt, response = 150, 60
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, prompt + response, 2, 8)), jnp.bfloat16) for _ in range(3))

    def outputs(before: int):
        """Of the second response, behind a first one of so many tokens."""
        branches = jnp.asarray([[0] * prompt + [1] * before + [2] * response], jnp.int32)
        layout = attention.key_layout(jnp.ones_like(branches), branches, responses=2, keys=640)
        between = jnp.ones((1, before, 2, 8), jnp.bfloat16)
        placed = (jnp.concatenate([x[:, :prompt], between, x[:, prompt:]], axis=1) for x in (q, k, v))
        return np.asarray(blockwise(*placed, layout)[0, -response:], np.float32)

    first, second = outputs(37), outputs(50)
    assert (first != second).mean() < 0.01
    np.testing.assert_allclose(first, second, rtol=2**-7, atol=2**-9)
