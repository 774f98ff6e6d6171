"""Packed rows to attend over, and the rule evaluated query by query in float64, values and gradients."""

import functools
from typing import NamedTuple

import jax
import numpy as np

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


def gathered(rows):
    """Gathered keys that each row needs: prompt and response, once per response."""
    count = 0
    for segments, branches in zip(rows.segments, rows.branches, strict=True):
        needed = 0
        for segment in set(segments[segments > 0].tolist()):
            mine = branches[segments == segment].tolist()
            for k in range(1, RESPONSES + 1):
                if k in mine:
                    needed += mine.count(0) + mine.count(k)
        count = max(count, needed)
    return count


RESPONSES, SLOTS = 4, 3  # of every layout here; rows may have fewer
# In two shapes, so that little is compiled: [3, 80] with 256 gathered keys, and [2, 400] with 640, where ranges span
# several blocks of keys. Neither length is a multiple of a block.
CASES = {
    "K=1": stacked(row(80, (5, [7]), (3, [9]), (0, [4])), row(80, (76, [4])), row(80, (1, [1]))),
    "K=2": stacked(row(80, (5, [7, 3]), (9, [2, 11])), row(80, (1, [1, 1]), (20, [20, 21])), row(80, (0, [9, 4]))),
    "K=4 ragged": stacked(
        row(80, (5, [7, 0, 3, 1]), (4, [0, 6, 0]), (3, [0, 2, 5, 0])),
        row(80, (2, [3, 4, 5, 6])),
        row(80, (40, [9, 9, 9, 9])),
    ),
    "own prompts": stacked(*(row(80, (n, [7, 3]), (9, [2, 11]), sharing=False) for n in (5, 0, 12))),
    "padding": stacked(
        row(80, (5, [7, 3]), (9, [2, 11]), before=6, between=5), row(80), row(80, (3, [2, 0]), before=75)
    ),
    "long": stacked(row(400, (150, [100, 149])), row(400, (10, [180, 30]), (40, [70, 70]))),
    "long, own prompts": stacked(
        row(400, (30, [100, 140]), sharing=False), row(400, (3, [190, 180]), before=20, sharing=False)
    ),
}
CAPACITY = {80: 256, 400: 640}
WINDOWS = {80: (None, 6), 400: (None, 150)}
CASES_AND_WINDOWS = [(name, window) for name, rows in CASES.items() for window in WINDOWS[rows.segments.shape[1]]]


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


_key_layout = jax.jit(attention.key_layout, static_argnames=("responses", "keys", "window"))
visible = jax.jit(attention.visible, static_argnames="window")


def key_layout(rows, window=None, capacity=None):
    """What attention over gathered keys is told."""
    capacity = capacity or CAPACITY[rows.segments.shape[1]]
    return _key_layout(rows.segments, rows.branches, responses=RESPONSES, keys=capacity, window=window)


@functools.partial(jax.jit, static_argnames="attend")
def output_and_gradients(attend, seen, queries, keys, values, cotangent):
    output, pull = jax.vjp(lambda *x: attend(*x, seen), queries, keys, values)
    return output, *pull(cotangent.astype(output.dtype))


def dense(rows, arrays, window=None):
    return output_and_gradients(attention.dense, visible(*rows, window=window), *arrays)


def assert_near(found, expected, tolerance):
    for name, one, two in zip(("output", "d_queries", "d_keys", "d_values"), found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), two, rtol=tolerance, atol=tolerance * max(1, np.abs(two).max()), err_msg=name
        )


def assert_padding_is_silent(attend, rows):
    """Padding puts out zero and passes no gradient, whatever it holds; `attend` is from (rows, arrays) to results."""
    padding = rows.segments == 0
    assert padding.any(axis=1).all()
    arrays = operands(rows)
    expected = by_the_rule(rows, *arrays)
    for x in arrays:
        x[padding] = 1e6
    found = attend(rows, arrays)
    assert not any(np.asarray(x)[padding].any() for x in found)
    assert_near(found, expected, 5e-6)


def assert_nothing_leaks(attend, rows, window=None):
    """Nothing outside what a query sees reaches it: its output is the same to the last bit, gradients are zero.

    `attend` is from (rows, arrays, window) to results.
    """
    queries, keys, values, _ = operands(rows)
    rng = np.random.default_rng(1)
    places = []  # the last token of every prompt and of every response, and a random one of each
    for at, (segments, branches) in enumerate(zip(rows.segments, rows.branches, strict=True)):
        for segment, branch in sorted(set(zip(segments.tolist(), branches.tolist(), strict=True)) - {(0, 0)}):
            members = np.flatnonzero((segments == segment) & (branches == branch))
            places += [(at, int(members[-1])), (at, int(rng.choice(members)))]
    none = np.zeros_like(queries)
    output = np.asarray(attend(rows, (queries, keys, values, none), window)[0])
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
        found = attend(rows, (*noisy, cotangent), window)
        changed, d_queries, d_keys, d_values = map(np.asarray, found)
        np.testing.assert_array_equal(changed[at, query], output[at, query])
        assert not d_keys[hidden].any()
        assert not d_values[hidden].any()
        assert not d_queries[others].any()
        assert np.abs(d_values[at, seen]).max(axis=(1, 2)).min() > 0  # everything that it sees does reach it
