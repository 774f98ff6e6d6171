"""Batches, against the layout's definition read backwards: from the arrays of a row to the text they stand for."""

import collections
import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
import pytest

from daajax.data.batches import LAYOUT, OPTIONAL, Batches
from daajax.data.draws import generator
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.data.tokens import UNLABELLED, Ids, TokenizedData, array_digest, digest
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


# ---------------------------------------------------------------------- what is there only where it is asked for

FIELDS = ("scores", "labels", "prompt_probabilities")
DRAWS = ("gumbel", "kept", "reference_kept")


@pytest.fixture(scope="module")
def asked(case):
    """The data with every column, and all that may be asked for."""
    _, data, _ = case
    rng = np.random.default_rng(3)
    count, parts = data.lengths.shape
    scores = rng.normal(size=(count, parts - 1)).astype(np.float32)
    scores[::5] = np.nan
    data = dataclasses.replace(
        data,
        scores=scores,
        labels=rng.integers(UNLABELLED, 2, count).astype(np.int8),
        prompt_probabilities=rng.random(count).astype(np.float32),
    )
    entropies = rng.random(len(data.tokens)).astype(np.float32)
    return data, dict(fields=FIELDS, draws=DRAWS, seed=5, entropies=entropies)


def by_place(batch):
    """What a batch holds of each place, by key; of what lies in scored slots by key and response, in its order."""
    keys = {"ids", "lengths", "targets", *OPTIONAL}
    found = {}
    for part, row, slot in np.argwhere(batch["places"] >= 0):
        here = {key: batch[key][part, row] for key in batch}
        mine = {key: here[key][slot] for key in keys if "slots" in (LAYOUT | OPTIONAL)[key][1]}
        for k in range(batch["lengths"].shape[-1]):
            scored = np.flatnonzero(here["owners"] == slot * batch["lengths"].shape[-1] + k)
            scored = scored[np.argsort(here["offsets"][scored])]
            mine |= {(key, k): here[key][scored] for key in keys - mine.keys()}
        found[int(here["places"][slot])] = mine
    return found


def test_what_is_asked_for_is_there_and_nothing_else(asked, plan):
    data, everything = asked
    batch, shape = Batches(data, plan, **everything)[0], plan.shape(0)
    assert batch.keys() == LAYOUT.keys() | OPTIONAL.keys()
    sizes = dict(rows=plan.rows, scored=shape.scored, slots=shape.slots, responses=data.lengths.shape[1] - 1)
    absent = {"slots": batch["places"] < 0, "scored": batch["owners"] < 0}
    for key, (dtype, axes, nothing) in OPTIONAL.items():
        assert batch[key].dtype == dtype
        assert batch[key].shape == (plan.micro_batches, *(sizes[axis] for axis in axes))
        assert (batch[key][absent[axes[1]]] == nothing).all()
    entropies = everything["entropies"]
    for names, options in [
        ({"labels"}, dict(fields=["labels"])),
        ({"gumbel", "reference_kept"}, dict(draws=["reference_kept", "gumbel"], seed=5)),
        ({"entropies"}, dict(entropies=entropies)),
    ]:
        alone = Batches(data, plan, **options)[0]
        assert alone.keys() - LAYOUT.keys() == names
        for name in names:  # the same, whatever else is asked for
            np.testing.assert_array_equal(alone[name], batch[name])


def test_columns_of_the_data_come_to_their_examples_and_tokens(asked, plan):
    data, everything = asked
    batches = Batches(data, plan, **everything)
    for update in range(plan.updates):
        batch, indices = batches.fill(update)
        real = batch["places"] >= 0
        for name in FIELDS:
            np.testing.assert_array_equal(batch[name][real], getattr(data, name)[batch["ids"][real]])
        np.testing.assert_array_equal(batch["entropies"][indices >= 0], everything["entropies"][indices[indices >= 0]])


def test_no_layout_changes_what_a_place_is_given(asked, plan):
    data, everything = asked
    plain = pack(plan.windows, Sizes.of(data, prefix_sharing=False), packing=False, micro_batches=1, row_multiple=1)
    for batch, other in zip(Batches(data, plan, **everything), Batches(data, plain, **everything), strict=True):
        ours, theirs = by_place(batch), by_place(other)
        assert ours.keys() == theirs.keys()
        for place in ours:
            assert ours[place].keys() == theirs[place].keys()
            for key in ours[place]:
                np.testing.assert_array_equal(ours[place][key], theirs[place][key], err_msg=f"{key} of place {place}")


def test_of_every_response_as_many_tokens_are_kept_as_the_shortest_of_its_example_has(asked, plan):
    data, everything = asked
    for batch in Batches(data, plan, **everything):
        for values in by_place(batch).values():
            lengths = values["lengths"]
            for k, length in enumerate(lengths):
                for key in ("kept", "reference_kept"):
                    assert len(values[key, k]) == length
                    assert values[key, k].sum() == min(length, lengths[lengths > 0].min())


def test_draws_differ_between_updates_places_and_seeds(asked):
    data, everything = asked
    plan = planned(data, batch_size=8, updates=4)
    drawn = np.stack(
        [
            [values["gumbel"] for _, values in sorted(by_place(batch).items())]
            for seed in (0, 1)
            for batch in Batches(data, plan, **everything | dict(seed=seed))
        ]
    )
    assert len(np.unique(drawn)) == drawn.size == 2 * 4 * 8


def test_draws_of_a_sweep_belong_to_the_examples_whatever_the_batches(asked):
    data, everything = asked
    found = []
    for batch_size, options in [(16, {}), (5, dict(prefix_sharing=False)), (21, dict(packing=False))]:
        plan = planned(data, sweep=True, batch_size=batch_size, **options)
        batches = Batches(data, plan, **everything, sweep=True)
        found.append({int(values["ids"]): values for batch in batches for values in by_place(batch).values()})
    assert [sorted(each) for each in found] == [list(range(21))] * 3
    for other in found[1:]:
        for example, values in other.items():
            for key in values:
                np.testing.assert_array_equal(values[key], found[0][example][key])
    for example, values in found[0].items():
        assert values["gumbel"] == np.float32(generator("gumbel", seed=5, place=example).gumbel())


def test_a_column_that_the_data_lack_is_refused(case):
    _, data, _ = case
    with pytest.raises(ValueError, match="the data have no scores and no labels"):
        Batches(data, planned(data), fields=["scores", "labels"])
