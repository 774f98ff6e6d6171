"""Batches, against the layout's definition read backwards: from the arrays of a row to the text they stand for."""

import collections
import itertools
from typing import NamedTuple

import numpy as np
import pytest

from daajax.data.batches import LAYOUT, Batches
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.data.tokens import Ids, TokenizedData, array_digest, digest
from daajax.data.windows import sweep_windows, training_windows


class Raw(NamedTuple):
    """An example as lists; a response that there is not is empty."""

    prompt: list[int]
    responses: list[list[int]]
    scored: list[list[bool]]
    weight: float


def random_examples(
    count, *, responses=2, seed=0, vocab=32, longest_prompt=12, longest_response=9, ragged=False, weighted=True
):
    """Examples with everything odd that the layout allows.

    Responses may begin with unscored tokens and have gaps, a prompt may be empty (its responses then begin with a token
    that nothing predicts), and with `ragged` responses may be missing.
    """
    rng = np.random.default_rng([seed, count, responses])
    examples = []
    for _ in range(count):
        prompt = rng.integers(0, vocab, rng.integers(0, longest_prompt + 1)).tolist()
        present = 1 + rng.integers(0, responses) if ragged else responses
        there = set(rng.permutation(responses)[:present].tolist())
        texts, masks = [], []
        for response in range(responses):
            length = int(rng.integers(2, longest_response + 1)) if response in there else 0
            mask = rng.random(length) < 0.8
            if length:
                mask[-1] = True
                mask[0] &= bool(prompt)
            texts.append(rng.integers(0, vocab, length).tolist())
            masks.append(mask.tolist())
        weight = float(rng.integers(1, 9) / 4) if weighted else 1.0
        examples.append(Raw(prompt, texts, masks, weight))
    return examples


def tokenized_data(examples):
    """The same examples, flat."""
    tokens, scored, lengths = [], [], []
    for example in examples:
        tokens += [*example.prompt, *itertools.chain(*example.responses)]
        scored += [*[False] * len(example.prompt), *itertools.chain(*example.scored)]
        lengths.append([len(example.prompt), *map(len, example.responses)])
    arrays = dict(
        tokens=np.array(tokens, np.int32),
        scored=np.array(scored, bool),
        lengths=np.array(lengths, np.int32),
        weights=np.array([example.weight for example in examples], np.float32),
    )
    return TokenizedData(
        **arrays,
        starts=np.concatenate([[0], np.cumsum(arrays["lengths"].sum(axis=1), dtype=np.int64)]),
        ids=Ids.of([f"row/{index}" for index in range(len(examples))]),
        counters={},
        notices=[],
        digest=digest({name: array_digest(array) for name, array in arrays.items()}),
    )


def planned(data, *, prefix_sharing=True, batch_size=8, updates=3, sweep=False, row_multiple=2, **options):
    """A plan for data with the options of `pack`."""
    sizes = Sizes.of(data, prefix_sharing=prefix_sharing)
    if sweep:
        order = sweep_windows(sizes, batch_size=batch_size)
    else:
        order = training_windows(sizes, batch_size=batch_size, updates=updates, shuffle=True, seed=1)
    defaults = dict(packing=True, micro_batches=1)
    return pack(order, sizes, row_multiple=row_multiple, **defaults | options)


LAYOUTS = {
    "shared": dict(),
    "own prompts": dict(prefix_sharing=False),
    "a row each": dict(packing=False),
    "a row each, own prompts": dict(packing=False, prefix_sharing=False),
    "micro-batches": dict(micro_batches=2),
    "more rows": dict(rows=6),
    "two lengths": dict(shapes=2),
    "ragged sweep": dict(sweep=True, batch_size=16),
}


@pytest.fixture(scope="module", params=[(1, False), (2, False), (3, True)], ids=["K=1", "K=2", "K=3 ragged"])
def case(request):
    """Examples, the same flat, and a reference log-prob for each token."""
    responses, ragged = request.param
    examples = random_examples(21, responses=responses, ragged=ragged, longest_prompt=40, longest_response=30)
    data = tokenized_data(examples)
    return examples, data, -np.random.default_rng(0).random(len(data.tokens)).astype(np.float32)


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS.keys())
def plan(request, case):
    return planned(case[1], **request.param)


def test_batches_have_the_keys_dtypes_and_shapes_of_the_layout(case, plan):
    _, data, reference = case
    batches = Batches(data, plan, reference)
    assert len(batches) == plan.updates == len(list(batches))
    for update, batch in enumerate(batches):
        shape = plan.shape(update)
        sizes = dict(
            rows=plan.rows,
            length=shape.length,
            scored=shape.scored,
            slots=shape.slots,
            responses=data.lengths.shape[1] - 1,
        )
        assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
            key: (np.dtype(dtype), (plan.micro_batches, *(sizes[axis] for axis in axes)))
            for key, (dtype, axes, _) in LAYOUT.items()
        }


def test_every_scored_slot_scores_one_token_of_the_data_from_the_position_before_it(case, plan):
    examples, data, reference = case
    responses = len(examples[0].responses)
    for update in range(plan.updates):
        batch = Batches(data, plan, reference)[update]
        rows = [
            {key: value[part, row] for key, value in batch.items()}
            for part in range(plan.micro_batches)
            for row in range(plan.rows)
        ]
        seen = collections.Counter()
        for row in rows:
            seen.update(_check_row(row, examples, data, reference, responses, plan.prefix_sharing))
        expected = [(place, int(example)) for place, example in enumerate(plan.windows[update]) if example >= 0]
        assert seen == collections.Counter(expected)


def _check_row(row, examples, data, reference, responses, prefix_sharing):
    """Reads a row back into text; yields the (place, example) of each of its slots."""
    found = []
    taken = np.zeros(len(row["tokens"]), bool)
    for slot in range(len(row["places"])):
        mine = row["segments"] == slot + 1
        if row["places"][slot] < 0:
            assert not mine.any()
            assert row["weights"][slot] == 0
            assert not row["lengths"][slot].any()
            continue
        example = examples[row["ids"][slot]]
        found.append((int(row["places"][slot]), int(row["ids"][slot])))
        assert row["weights"][slot] == np.float32(example.weight)
        begin = int(data.starts[row["ids"][slot]])
        cursor = begin + len(example.prompt)
        for k, (response, scored) in enumerate(zip(example.responses, example.scored, strict=True), start=1):
            slots = np.flatnonzero(row["owners"] == slot * responses + k - 1)
            assert row["lengths"][slot, k - 1] == sum(scored) == len(slots)
            if not response:
                assert not (mine & (row["branches"] == k)).any()
                continue
            # What attention shows the response: the shared prompt, and its own branch, in order.
            where = np.flatnonzero(mine & ((row["branches"] == 0) | (row["branches"] == k)))
            taken[where] = True
            assert row["tokens"][where].tolist() == example.prompt + response
            assert row["positions"][where].tolist() == list(range(len(example.prompt) + len(response)))
            assert (row["branches"][where] == 0).sum() == (len(example.prompt) if prefix_sharing else 0)
            # The scored tokens of the response, in order of their offsets.
            slots = slots[np.argsort(row["offsets"][slots])]
            assert row["offsets"][slots].tolist() == list(range(len(slots)))
            for scored_slot, token in zip(slots, np.flatnonzero(scored), strict=True):
                assert row["sources"][scored_slot] == where[len(example.prompt) + token - 1]
                assert row["targets"][scored_slot] == response[token]
                assert row["reference"][scored_slot] == reference[cursor + token]
            cursor += len(response)
    padding = row["segments"] == 0
    np.testing.assert_array_equal(taken, ~padding)
    for key in ("tokens", "positions", "branches"):
        assert not row[key][padding].any()
    unowned = row["owners"] < 0
    assert (row["owners"][unowned] == -1).all()
    for key in ("sources", "targets", "offsets", "reference"):
        assert not row[key][unowned].any()
    # The head's loop ends at the last scored token: empty slots come last.
    assert (np.diff(unowned.astype(int)) >= 0).all()
    return found


def test_token_indices_lead_back_to_every_scored_token_of_the_update_once(case, plan):
    _, data, _ = case
    batches = Batches(data, plan)
    for update in range(plan.updates):
        batch, indices = batches.fill(update)
        np.testing.assert_array_equal(indices, batches.token_indices(update))
        assert batch.keys() == batches[update].keys() == LAYOUT.keys()
        real = indices >= 0
        np.testing.assert_array_equal(real, batch["owners"] >= 0)
        np.testing.assert_array_equal(data.tokens[indices[real]], batch["targets"][real])
        example_of = np.repeat(np.arange(len(data.weights)), np.diff(data.starts))
        slot_example = np.take_along_axis(batch["ids"], batch["owners"] // batch["lengths"].shape[-1], axis=2)
        np.testing.assert_array_equal(example_of[indices[real]], slot_example[real])
        expected = collections.Counter(
            index
            for example in plan.windows[update].tolist()
            if example >= 0
            for index in range(data.starts[example], data.starts[example + 1])
            if data.scored[index]
        )
        assert collections.Counter(indices[real].tolist()) == expected


def test_a_column_written_through_the_indices_comes_back_in_its_slots(case, plan):
    _, data, reference = case
    written = np.zeros_like(reference)
    first = Batches(data, plan, reference)
    for update, batch in enumerate(first):
        real = batch["owners"] >= 0
        written[first.token_indices(update)[real]] = batch["reference"][real]
    for batch, again in zip(first, Batches(data, plan, written), strict=True):
        np.testing.assert_array_equal(batch["reference"], again["reference"])


def test_without_a_reference_its_column_is_zero(case, plan):
    _, data, _ = case
    assert not any(batch["reference"].any() for batch in Batches(data, plan))


def test_an_example_twice_in_one_update_lies_there_twice():
    # 5 examples, windows of 4: the second window holds the end of one epoch and the beginning of the next.
    data = tokenized_data(random_examples(5))
    plan = planned(data, batch_size=4, updates=5)
    assert any(len(set(window)) < 4 for window in plan.windows.tolist())
    for update, batch in enumerate(Batches(data, plan)):
        real = batch["places"] >= 0
        assert sorted(batch["places"][real].tolist()) == [0, 1, 2, 3]
        assert plan.windows[update][batch["places"][real]].tolist() == batch["ids"][real].tolist()
