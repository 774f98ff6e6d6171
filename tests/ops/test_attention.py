"""Attention against the rule, evaluated query by query in float64, values and gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax.ops import attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


class Row(NamedTuple):
    """The three arrays that say what a row holds."""

    segments: np.ndarray
    branches: np.ndarray
    positions: np.ndarray


def row(length, *examples, sharing=True, before=0, between=0):
    """A row of examples (prompt tokens, [tokens of each response]), with padding in front, between and behind."""
    arrays = Row(*(np.zeros(length, np.int32) for _ in range(3)))
    at = before
    for segment, (prompt, responses) in enumerate(examples, start=1):
        there = [(k, tokens) for k, tokens in enumerate(responses, start=1) if tokens]
        if sharing:
            pieces = [(0, 0, prompt), *((k, prompt, tokens) for k, tokens in there)]
        else:
            pieces = [(k, 0, prompt + tokens) for k, tokens in there]
        for branch, position, tokens in pieces:
            span = slice(at, at + tokens)
            arrays.segments[span], arrays.branches[span] = segment, branch
            arrays.positions[span] = np.arange(position, position + tokens)
            at += tokens
        at += between
    assert at - between <= length
    return arrays


def stacked(*rows):
    return Row(*map(np.stack, zip(*rows, strict=True)))


def gathered(rows, responses):
    """Gathered keys that each row needs: prompt and response, once per response."""
    count = 0
    for segments, branches in zip(rows.segments, rows.branches, strict=True):
        needed = 0
        for segment in set(segments[segments > 0].tolist()):
            mine = branches[segments == segment].tolist()
            for k in range(1, responses + 1):
                if k in mine:
                    needed += mine.count(0) + mine.count(k)
        count = max(count, needed)
    return count


# Rows and K, in two shapes, so that little is compiled: [3, 80] with 256 gathered keys, and [2, 400] with 640, where
# ranges span several blocks of keys. Neither length is a multiple of a block.
CASES = {
    "K=1": (stacked(row(80, (5, [7]), (3, [9]), (0, [4])), row(80, (76, [4])), row(80, (1, [1]))), 1),
    "K=2": (stacked(row(80, (5, [7, 3]), (9, [2, 11])), row(80, (1, [1, 1]), (20, [20, 21])), row(80, (0, [9, 4]))), 2),
    "K=3 ragged": (
        stacked(
            row(80, (5, [7, 0, 3]), (4, [0, 6, 0]), (3, [0, 2, 5])), row(80, (2, [3, 4, 5])), row(80, (50, [9, 9, 9]))
        ),
        3,
    ),
    "own prompts": (
        stacked(*(row(80, (n, [7, 3]), (9, [2, 11]), sharing=False) for n in (5, 0, 12))),
        2,
    ),
    "padding": (
        stacked(row(80, (5, [7, 3]), (9, [2, 11]), before=6, between=5), row(80), row(80, (3, [2, 0]), before=75)),
        2,
    ),
    "long": (stacked(row(400, (150, [100, 149])), row(400, (10, [180, 30]), (40, [70, 70]))), 2),
    "long, own prompts": (
        stacked(row(400, (30, [100, 140]), sharing=False), row(400, (3, [190, 180]), before=20, sharing=False)),
        2,
    ),
}
CAPACITY = {80: 256, 400: 640}
WINDOWS = {80: (None, 6), 400: (None, 150)}
CASES_AND_WINDOWS = [(name, window) for name, (rows, _) in CASES.items() for window in WINDOWS[rows.segments.shape[1]]]


def operands(rows, seed=0):
    """Queries, keys, values and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    shape = rows.segments.shape
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [rng.normal(size=(*shape, count, HEAD_DIM)).astype(np.float32) for count in heads]


def sees(rows, at, query, window=None):
    """The keys that one query of row `at` sees: the rule, word by word."""
    segments, branches, positions = (array[at].tolist() for array in rows)
    return [
        key
        for key in range(len(segments))
        if segments[query] != 0
        and segments[key] == segments[query]
        and key <= query
        and (branches[key] == 0 or branches[key] == branches[query])
        and (window is None or positions[query] - positions[key] < window)
    ]


def by_the_rule(rows, queries, keys, values, cotangent, window=None, scale=HEAD_DIM**-0.5, softcap=None):
    """Output and gradients of queries, keys and values; float64, query by query, derivatives written out."""
    queries, keys, values, cotangent = (x.astype(np.float64) for x in (queries, keys, values, cotangent))
    output, d_queries, d_keys, d_values = (np.zeros_like(x) for x in (queries, queries, keys, values))
    for at in range(len(queries)):
        for query in range(queries.shape[1]):
            visible = sees(rows, at, query, window)
            if not visible:
                continue
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                q, k, v = queries[at, query, head], keys[at, visible, group], values[at, visible, group]
                scores, slope = k @ q * scale, 1.0
                if softcap is not None:
                    scores, slope = softcap * np.tanh(scores / softcap), 1 / np.cosh(scores / softcap) ** 2
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                output[at, query, head] = weights @ v
                d_output = cotangent[at, query, head]
                d_weights = v @ d_output
                d_scores = weights * (d_weights - weights @ d_weights) * slope * scale
                d_queries[at, query, head] = d_scores @ k
                d_keys[at, visible, group] += np.outer(d_scores, q)
                d_values[at, visible, group] += np.outer(weights, d_output)
    return output, d_queries, d_keys, d_values


key_layout = jax.jit(attention.key_layout, static_argnames=("responses", "keys", "window"))
visible = jax.jit(attention.visible, static_argnames="window")


@functools.partial(jax.jit, static_argnames="attend")
def output_and_gradients(attend, seen, queries, keys, values, cotangent):
    output, pull = jax.vjp(lambda *x: attend(*x, seen), queries, keys, values)
    return output, *pull(cotangent.astype(output.dtype))


def dense(rows, arrays, window=None):
    return output_and_gradients(attention.dense, visible(*rows, window=window), *arrays)


def blockwise(rows, responses, arrays, window=None, capacity=None):
    capacity = capacity or CAPACITY[rows.segments.shape[1]]
    seen = key_layout(rows.segments, rows.branches, responses=responses, keys=capacity, window=window)
    return output_and_gradients(attention.blockwise, seen, *arrays)


def assert_near(found, expected, tolerance):
    for name, one, two in zip(("output", "d_queries", "d_keys", "d_values"), found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), two, rtol=tolerance, atol=tolerance * max(1, np.abs(two).max()), err_msg=name
        )


@pytest.mark.parametrize(("name", "window"), CASES_AND_WINDOWS)
def test_the_mask_is_the_rule(name, window):
    rows, _ = CASES[name]
    mask = np.asarray(visible(*rows, window=window))
    for at, query in np.ndindex(rows.segments.shape):
        assert np.flatnonzero(mask[at, query]).tolist() == sees(rows, at, query, window)


@pytest.mark.parametrize(("name", "window"), CASES_AND_WINDOWS)
def test_attention_and_its_gradients_are_the_rule(name, window):
    rows, responses = CASES[name]
    arrays = operands(rows)
    expected = by_the_rule(rows, *arrays, window)
    # Float32 rounds to 6e-8; sums over up to 250 keys of numbers near 1.
    assert_near(dense(rows, arrays, window), expected, 5e-6)
    assert_near(blockwise(rows, responses, arrays, window), expected, 5e-6)


@pytest.mark.parametrize(("scale", "softcap"), [(0.7, None), (None, 1.5), (0.7, 0.5)])
@pytest.mark.parametrize("name", ["K=3 ragged", "padding"])
def test_scaled_and_capped_scores_and_their_gradients_are_the_rule(name, scale, softcap):
    rows, responses = CASES[name]
    arrays = operands(rows)
    expected = by_the_rule(rows, *arrays, scale=scale or HEAD_DIM**-0.5, softcap=softcap)
    attend = functools.partial(attention.dense, scale=scale, softcap=softcap)
    assert_near(output_and_gradients(attend, visible(*rows), *arrays), expected, 5e-6)
    seen = key_layout(rows.segments, rows.branches, responses=responses, keys=CAPACITY[rows.segments.shape[1]])
    attend = functools.partial(attention.blockwise, scale=scale, softcap=softcap)
    assert_near(output_and_gradients(attend, seen, *arrays), expected, 5e-6)


@pytest.mark.parametrize("name", ["K=3 ragged", "padding", "long"])
def test_bfloat16_operands_lose_only_their_own_rounding(name):
    rows, responses = CASES[name]
    arrays = [x.astype(jnp.bfloat16) for x in operands(rows)]
    found = blockwise(rows, responses, arrays)
    assert {x.dtype for x in found} == {np.dtype(jnp.bfloat16)}
    # Bfloat16 has 8 bits: 4e-3 for each of the scores, the weights and the output.
    assert_near(found, by_the_rule(rows, *(x.astype(np.float32) for x in arrays)), 3e-2)


@pytest.mark.parametrize("name", ["K=3 ragged", "long"])
def test_a_capacity_may_be_exactly_full(name):
    rows, responses = CASES[name]
    arrays = operands(rows)
    exact = gathered(rows, responses)
    assert exact < CAPACITY[rows.segments.shape[1]]
    for one, two in zip(
        blockwise(rows, responses, arrays, capacity=exact), blockwise(rows, responses, arrays), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_padding_puts_out_zero_and_passes_no_gradient_whatever_it_holds():
    rows, responses = CASES["padding"]
    padding = rows.segments == 0
    assert padding.any(axis=1).all()
    assert padding[1].all()
    arrays = operands(rows)
    expected = by_the_rule(rows, *arrays)
    for x in arrays:
        x[padding] = 1e6
    for found in (dense(rows, arrays), blockwise(rows, responses, arrays)):
        assert not any(np.asarray(x)[padding].any() for x in found)
        assert_near(found, expected, 5e-6)


@pytest.mark.parametrize(
    ("name", "window"),
    [("K=2", None), ("K=3 ragged", None), ("K=3 ragged", 6), ("own prompts", 6), ("padding", None), ("long", 150)],
)
def test_nothing_outside_what_a_query_sees_reaches_it(name, window):
    rows, responses = CASES[name]
    queries, keys, values, _ = operands(rows)
    rng = np.random.default_rng(1)
    places = []  # the last token of every prompt and of every response, and a random one of each
    for at, (segments, branches) in enumerate(zip(rows.segments, rows.branches, strict=True)):
        for segment, branch in sorted(set(zip(segments.tolist(), branches.tolist(), strict=True)) - {(0, 0)}):
            members = np.flatnonzero((segments == segment) & (branches == branch))
            places += [(at, int(members[-1])), (at, int(rng.choice(members)))]
    none = np.zeros_like(queries)
    output = np.asarray(blockwise(rows, responses, (queries, keys, values, none), window)[0])
    for at, query in places:
        seen = sees(rows, at, query, window)
        hidden = np.ones(rows.segments.shape, bool)
        hidden[at, seen] = False
        others = np.ones(rows.segments.shape, bool)
        others[at, query] = False
        noisy = [
            np.where(mask[:, :, None, None], 100 * rng.normal(size=x.shape), x).astype(np.float32)
            for mask, x in ((others, queries), (hidden, keys), (hidden, values))
        ]
        cotangent = none.copy()
        cotangent[at, query] = rng.normal(size=cotangent[at, query].shape)
        found = blockwise(rows, responses, (*noisy, cotangent), window)
        changed, d_queries, d_keys, d_values = map(np.asarray, found)
        np.testing.assert_array_equal(changed[at, query], output[at, query])
        assert not d_keys[hidden].any()
        assert not d_values[hidden].any()
        assert not d_queries[others].any()
        assert np.abs(d_values[at, seen]).max(axis=(1, 2)).min() > 0  # everything that it sees does reach it


@pytest.mark.parametrize(("name", "window"), CASES_AND_WINDOWS)
def test_the_key_layout_is_prompt_and_response_once_per_response(name, window):
    rows, responses = CASES[name]
    capacity = CAPACITY[rows.segments.shape[1]]
    layout = key_layout(rows.segments, rows.branches, responses=responses, keys=capacity, window=window)
    for at in range(len(rows.segments)):
        source, copies = np.zeros(capacity, int), np.full((rows.segments.shape[1], responses), capacity)
        first, last = np.zeros(len(copies), int), np.full(len(copies), -1)
        filled = 0
        for segment in sorted(set(rows.segments[at].tolist()) - {0}):
            mine = np.flatnonzero(rows.segments[at] == segment)
            branches = rows.branches[at][mine]
            answered = False
            for k in range(1, responses + 1):
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
    rows, responses = CASES["K=3 ragged"]
    layout = key_layout(rows.segments, rows.branches, responses=responses, keys=256)
    x = jnp.asarray(operands(rows)[1])
    found, pull = jax.vjp(lambda x: attention.gather_keys(x, layout), x)
    source, copies = np.asarray(layout.source), np.asarray(layout.copies)
    np.testing.assert_array_equal(found, np.stack([np.asarray(x)[at, source[at]] for at in range(len(x))]))
    cotangent = np.random.default_rng(2).normal(size=found.shape).astype(np.float32)
    expected = np.zeros(x.shape)
    for at, position, response in np.ndindex(copies.shape):
        if copies[at, position, response] < source.shape[1]:
            expected[at, position] += cotangent[at, copies[at, position, response]]
    np.testing.assert_allclose(pull(cotangent)[0], expected, rtol=1e-6, atol=1e-6)


def test_scores_beyond_what_exp_can_hold_stay_finite():
    rows, responses = CASES["long"]
    arrays = operands(rows)
    arrays[0] *= 1e3  # scores of ± 1e4 nats; exp overflows at 88
    arrays[1] *= 10
    found = blockwise(rows, responses, arrays)
    assert all(np.isfinite(x).all() for x in found)
    # One key takes all the weight unless two tie: rounding of 1e4 by 6e-8 is 1e-3 nats.
    np.testing.assert_allclose(found[0], by_the_rule(rows, *arrays)[0], rtol=1e-2, atol=1e-2)


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
        return np.asarray(attention.blockwise(*placed, layout)[0, -response:], np.float32)

    first, second = outputs(37), outputs(50)
    assert (first != second).mean() < 0.01
    np.testing.assert_allclose(first, second, rtol=2**-7, atol=2**-9)
