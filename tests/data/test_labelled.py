"""Pairs taken apart, and mismatched responses, read back token by token."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from daajax.data import labelled
from daajax.data.batches import Batches
from daajax.data.labelled import partners, unpaired, with_mismatched
from daajax.data.tokens import concatenate
from daajax.errors import UserError
from tests.data import sets
from tests.data.test_batches import Raw, planned, random_examples, tokenized_data
from tests.data.test_draws import chi_squared

MAX_LENGTH = 9
COLUMNS = ("tokens", "scored", "starts", "lengths", "weights", "scores", "labels", "prompt_probabilities", "sources")


def single_responses(prompts, rng):
    """Examples with a response each, and their data; `prompts` has a number for each, the same for equal prompts.

    Prompt 0 is empty. The tokens of example i's response are 100 i, 100 i + 1, ….
    """
    examples = []
    for index, number in enumerate(prompts):
        prompt = [] if number == 0 else [number] * (1 + number % 3)
        length = int(rng.integers(1 + (not prompt), MAX_LENGTH - len(prompt) + 1))
        scored = rng.random(length) < 0.7
        scored[-1] = True
        scored[0] &= bool(prompt)
        response = [100 * index + place for place in range(length)]
        examples.append(Raw(prompt, [response], [scored.tolist()], float(rng.integers(1, 5))))
    data = dataclasses.replace(
        tokenized_data(examples),
        labels=rng.integers(0, 2, len(prompts)).astype(np.int8),
        scores=rng.normal(size=(len(prompts), 1)).astype(np.float32),
        prompt_probabilities=rng.random(len(prompts)).astype(np.float32),
        sources=rng.integers(0, 2, len(prompts)).astype(np.int16),
        source_names=("a", "b"),
    )
    return examples, data


def pieces(data, example):
    """An example's prompt and responses, each as its tokens and which of them are scored."""
    bounds = data.starts[example] + np.cumsum([0, *data.lengths[example]])
    assert bounds[-1] == data.starts[example + 1]
    spans = [slice(*each) for each in itertools.pairwise(bounds)]
    return [(data.tokens[span].tolist(), data.scored[span].tolist()) for span in spans]


def assert_same(one, two):
    for name in COLUMNS:
        left, right = getattr(one, name), getattr(two, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)


# ---------------------------------------------------------------------- mismatched responses

half_at_most = st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(
    lambda prompts: 2 * max(collections.Counter(prompts).values()) <= len(prompts)
)


@settings(deadline=None, max_examples=300)
@given(prompts=half_at_most, seed=st.integers(0, 2**40), drawn=st.integers(0, 2**32))
def test_each_example_is_given_another_prompts_response_and_each_response_is_given_once(prompts, seed, drawn):
    examples, data = single_responses(prompts, np.random.default_rng(drawn))
    found = with_mismatched(data, seed=seed, max_length=MAX_LENGTH)
    givers = []
    for index, example in enumerate(examples):
        prompt, own, (theirs, scored) = pieces(found, index)
        assert [prompt, own] == pieces(data, index)
        giver = theirs[0] // 100
        givers.append(giver)
        assert examples[giver].prompt != example.prompt
        room = MAX_LENGTH - len(example.prompt)
        assert theirs == examples[giver].responses[0][:room]
        expected = examples[giver].scored[0][:room]
        assert scored == [expected[0] and bool(example.prompt), *expected[1:]]
    assert sorted(givers) == list(range(len(examples)))
    assert givers == partners(data, seed).tolist()
    np.testing.assert_array_equal(found.scores, np.stack([data.scores[:, 0], np.full(len(examples), np.nan)], axis=1))
    for name in ("weights", "labels", "prompt_probabilities", "sources", "source_names", "ids"):
        assert getattr(found, name) is getattr(data, name)
    whole = np.array([len(examples[giver].responses[0]) for giver in givers])
    assert f"; {(found.lengths[:, 2] < whole).sum()} of them are cut at max_length" in found.notices[-1]


@settings(deadline=None)
@given(prompts=half_at_most, seed=st.integers(0, 2**40))
def test_who_is_given_what_is_a_function_of_data_and_seed(prompts, seed):
    (_, one), (_, two) = (single_responses(prompts, np.random.default_rng(1)) for _ in range(2))
    first, second = (with_mismatched(data, seed=seed, max_length=MAX_LENGTH) for data in (one, two))
    assert_same(first, second)
    assert first.digest == second.digest != one.digest


@settings(deadline=None)
@given(prompts=st.lists(st.integers(0, 3), min_size=1, max_size=12), seed=st.integers(0, 9))
def test_more_than_half_of_one_prompt_is_refused_and_nothing_else(prompts, seed):
    (most, count), *_ = collections.Counter(prompts).most_common(1)
    _, data = single_responses(prompts, np.random.default_rng(0))
    if 2 * count <= len(prompts):
        partners(data, seed)
        return
    name = f"row/{prompts.index(most)}"
    with pytest.raises(
        UserError, match=rf" {count} of {len(prompts)} examples .* the same prompt as '{name}'"
    ) as error:
        with_mismatched(data, seed=seed, max_length=MAX_LENGTH)
    assert "\n" not in str(error.value)


def test_everyone_elses_response_is_given_equally_often():
    _, data = single_responses([1, 2, 3, 4, 5, 5], np.random.default_rng(0))
    given_to_first = collections.Counter(int(partners(data, seed)[0]) for seed in range(2000))
    given_to_last = collections.Counter(int(partners(data, seed)[5]) for seed in range(2000))
    assert abs(chi_squared({n: c for n, c in given_to_first.items() if n < 4}, 3)) < 4
    assert abs(chi_squared(given_to_last, 4)) < 4
    assert 0 not in given_to_first
    assert not {4, 5} & given_to_last.keys()


def test_the_digest_tells_seeds_and_cuts_apart():
    _, data = single_responses(range(1, 30), np.random.default_rng(0))
    ample = with_mismatched(data, seed=0, max_length=2 * MAX_LENGTH)
    assert with_mismatched(data, seed=0, max_length=3 * MAX_LENGTH).digest == ample.digest
    others = [with_mismatched(data, seed=seed, max_length=MAX_LENGTH) for seed in (0, 1)]
    assert len({each.digest for each in (data, ample, *others)}) == 4


def test_the_halves_of_a_pair_are_never_given_to_each_other():
    data = unpaired(tokenized_data(random_examples(2, longest_prompt=40, seed=3)))
    for seed in range(20):
        assert {*partners(data, seed)[:2].tolist()} == {2, 3}


def test_mismatched_responses_lie_in_batches_as_second_ones():
    _, data = single_responses([0, *range(20), 0], np.random.default_rng(4))
    found = with_mismatched(data, seed=2, max_length=MAX_LENGTH)
    givers = partners(data, 2)
    for batch in Batches(found, planned(found, batch_size=11, updates=2), fields=["labels"]):
        real = batch["owners"] >= 0
        assert (batch["sources"][real] >= 0).all()
        ids = np.take_along_axis(batch["ids"], batch["owners"] // 2, axis=2)[real]
        writers = np.where(batch["owners"][real] % 2, givers[ids], ids)
        np.testing.assert_array_equal(batch["targets"][real] // 100, writers)


# ---------------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokenizes rows."""
    return sets.tokenizing(tmp_path_factory.mktemp("made"), max_length=12)


PAIRS = [
    {"prompt": "the dog", "chosen": " saw a cat", "rejected": " was sad", "id": "x", "weight": 2},
    {"prompt": "a girl", "chosen": " went home", "rejected": " was not happy at all", "id": "y", "weight": 0.5},
]


@pytest.mark.parametrize("scored", [False, True])
def test_pairs_taken_apart_are_what_their_responses_are_by_themselves(made, scored):
    pairs = [pair | ({"score_chosen": n, "score_rejected": -n} if scored else {}) for n, pair in enumerate(PAIRS)]
    rows = [
        {"id": f"{pair['id']}/{side}", "prompt": pair["prompt"], "completion": pair[side], "weight": pair["weight"]}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    labels = [True, False, True, False]
    alone = made(*(row | {"label": label} for row, label in zip(rows, labels, strict=True)))
    apart = unpaired(made(*pairs))
    assert list(apart.ids) == list(alone.ids)
    assert scored == (apart.scores is not None)
    if scored:
        np.testing.assert_array_equal(apart.scores, np.array([[0], [0], [1], [-1]], np.float32))
    assert_same(dataclasses.replace(apart, scores=None), alone)
    assert apart.notices[-1].startswith("2 pairs are taken apart")


def test_every_token_of_a_pair_and_whether_it_is_scored_is_kept():
    examples = random_examples(30, seed=2)
    data = unpaired(tokenized_data(examples))
    for index, example in enumerate(examples):
        for k in range(2):
            prompt, response = pieces(data, 2 * index + k)
            assert prompt == (example.prompt, [False] * len(example.prompt))
            assert response == (example.responses[k], example.scored[k])
            assert data.labels[2 * index + k] == 1 - k
            assert data.weights[2 * index + k] == example.weight


def test_sources_of_pairs_and_of_single_responses_mix(made):
    single = made({"prompt": "the girl", "completion": " was happy", "label": False})
    both = concatenate({"pairs": unpaired(made(*PAIRS)), "single": single})
    assert both.labels.tolist() == [1, 0, 1, 0, 0]
    assert list(both.ids)[:2] == ["pairs/x/chosen", "pairs/x/rejected"]
    mixed = unpaired(concatenate({"a": made(*PAIRS), "b": made(PAIRS[0])}))
    assert {name: where.tolist() for name, where in mixed.by_source().items()} == {"a": [0, 1, 2, 3], "b": [4, 5]}


def test_the_digest_of_pairs_taken_apart_follows_theirs(made):
    one, again, other = made(*PAIRS), made(*PAIRS), made(PAIRS[0])
    assert unpaired(one).digest == unpaired(again).digest
    assert len({one.digest, unpaired(one).digest, unpaired(other).digest}) == 3


def test_how_many_pieces_are_gathered_at_once_changes_nothing(monkeypatch):
    pairs = tokenized_data(random_examples(13, longest_prompt=40, seed=7))
    whole = unpaired(pairs)
    monkeypatch.setattr(labelled, "_PIECES_AT_ONCE", 5)
    assert_same(unpaired(pairs), whole)


@settings(deadline=None, max_examples=30)
@given(responses=st.integers(1, 4), labels=st.booleans(), ragged=st.booleans())
def test_only_whole_pairs_without_labels_can_be_taken_apart(responses, labels, ragged):
    assume(not ragged or responses == 2)
    data = tokenized_data(random_examples(9, responses=responses, ragged=ragged))
    if labels:
        data = dataclasses.replace(data, labels=np.zeros(9, np.int8))
    says = "without labels"
    if ragged:
        says = r"examples have fewer than 2 responses, such as 'row/\d'; complete or remove them"
    elif responses != 2:
        says = f"the data have {responses} responses a prompt, not 2"
    if responses == 2 and not labels and not ragged:
        assert len(unpaired(data).weights) == 18
    else:
        with pytest.raises(UserError, match=says):
            unpaired(data)


def test_mismatched_responses_are_for_single_ones():
    with pytest.raises(UserError, match="put beside single ones, but the data have 2 responses a prompt, not 1"):
        with_mismatched(tokenized_data(random_examples(9)), seed=0, max_length=99)
