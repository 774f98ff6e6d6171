"""Several sources as one data set, and the columns that only some bring."""

import numpy as np
import pytest

from daajax.data import tokens
from daajax.data.tokens import UNLABELLED, Ids, concatenate, source_names
from daajax.errors import UserError
from tests.data import sets
from tests.data.test_batches import random_examples, tokenized_data

PAIR = {"prompt": "the dog", "chosen": " saw a cat", "rejected": " was sad"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokenizes rows."""
    return sets.tokenizing(tmp_path_factory.mktemp("made"), max_length=64)


def test_scores_are_a_column_in_the_order_of_the_responses(made):
    rows = [
        {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 3, 2]},
        {"prompt": "a", "responses": ["b", "c"]},
    ]
    data = made(*rows, {"prompt": "a", "responses": ["c", "d"], "scores": [0, -1]})
    np.testing.assert_array_equal(data.scores, np.array([[3, 2, 1], [np.nan] * 3, [0, -1, np.nan]], np.float32))
    assert data.labels is None
    assert data.counters["examples_sorted_by_score"] == 1


def test_labels_are_a_column_with_a_value_for_unknown(made):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, None)]
    data = made(*rows)
    assert data.labels.tolist() == [1, 0, UNLABELLED]
    assert data.scores is None


def test_prompt_probabilities_are_a_column_with_nan_for_unknown(made):
    rows = [{"prompt": "a", "completion": "b", "prompt_probability": p} for p in (1, 0.25, None)]
    data = made(*rows)
    np.testing.assert_array_equal(data.prompt_probabilities, np.array([1, 0.25, np.nan], np.float32))
    assert data.labels is None


def test_columns_count_in_the_digest_and_only_where_they_are(made):
    plain = made(PAIR)
    scored, other = (made(PAIR | {"score_chosen": s, "score_rejected": 0}) for s in (1, 2))
    labelled = [made({"prompt": "a", "completion": "b"} | label) for label in ({}, {"label": True}, {"label": False})]
    likely = [made({"prompt": "a", "completion": "b", "prompt_probability": p}) for p in (0.5, 1)]
    assert len({data.digest for data in (plain, scored, other, *labelled, *likely)}) == 8
    assert made(PAIR | {"note": 3}).digest == plain.digest


def test_first_responses_cut_scores_too(made):
    data = made({"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 3, 2]})
    first = data.first_responses(2)
    assert first.scores.tolist() == [[3, 2]]
    assert first.digest == made({"prompt": "a", "responses": ["c", "d"], "scores": [3, 2]}).digest


def test_first_responses_keep_what_belongs_to_the_example(made):
    single = {"prompt": "a", "completion": "b", "label": False, "prompt_probability": 0.5}
    first = made(single, PAIR).first_responses(1)
    assert first.labels.tolist() == [0, UNLABELLED]
    np.testing.assert_array_equal(first.prompt_probabilities, np.array([0.5, np.nan], np.float32))
    alone = made(single, {"prompt": PAIR["prompt"], "completion": PAIR["chosen"]})
    assert first.digest == alone.digest


def test_sources_lie_one_behind_the_other(made):
    one, two = made(PAIR, PAIR | {"id": "x", "weight": 2}), made(PAIR | {"prompt": "a"})
    both = concatenate({"first": one, "second": two})
    assert list(both.ids) == ["first/rows.jsonl:1", "first/x", "second/rows.jsonl:1"]
    assert both.weights.tolist() == [1, 2, 1]
    assert {name: found.tolist() for name, found in both.by_source().items()} == {"first": [0, 1], "second": [2]}
    for index, (data, place) in enumerate([(one, 0), (one, 1), (two, 0)]):
        ours = slice(both.starts[index], both.starts[index + 1])
        theirs = slice(data.starts[place], data.starts[place + 1])
        np.testing.assert_array_equal(both.tokens[ours], data.tokens[theirs])
        np.testing.assert_array_equal(both.scored[ours], data.scored[theirs])
        np.testing.assert_array_equal(both.lengths[index], data.lengths[place])
    assert both.counters["examples_kept"] == 3
    assert both.sources.dtype == np.int16


def test_a_single_source_stays_as_it_is_but_has_a_name(made):
    data = made(PAIR, PAIR)
    named = concatenate({"pairs": data})
    assert named.tokens is data.tokens
    assert (named.ids, named.digest) == (data.ids, data.digest)
    assert {name: found.tolist() for name, found in named.by_source().items()} == {"pairs": [0, 1]}


def test_sources_with_and_without_a_column_are_filled_up(made):
    scored = made(PAIR | {"score_chosen": 2, "score_rejected": 1})
    both = concatenate({"a": made(PAIR), "b": scored})
    np.testing.assert_array_equal(both.scores, np.array([[np.nan, np.nan], [2, 1]], np.float32))
    single = {"prompt": "a", "completion": "b"}
    assert concatenate({"a": made(single | {"label": False}), "b": made(single)}).labels.tolist() == [0, UNLABELLED]
    likely = concatenate({"a": made(single), "b": made(single | {"prompt_probability": 0.5})})
    np.testing.assert_array_equal(likely.prompt_probabilities, np.array([np.nan, 0.5], np.float32))
    assert (likely.scores, likely.labels) == (None, None)


def test_the_digest_of_sources_tells_their_order(made):
    one, two = made(PAIR), made(PAIR | {"prompt": "a"})
    digests = {concatenate(dict(zip("ab", pair, strict=True))).digest for pair in [(one, two), (two, one), (one, one)]}
    assert len(digests) == 3


def test_sources_of_unlike_responses_are_refused_by_name(made):
    with pytest.raises(UserError, match="need equally many responses an example, but there are 2 in a, 1 in b"):
        concatenate({"a": made(PAIR), "b": made({"prompt": "a", "response": "b"})})


def test_joined_ids_are_those_of_the_sources_behind_their_names():
    parts = {"é": Ids.of(["a", "", "ü" * 9]), "b/c": Ids.of([]), "d": Ids.of(["7"])}
    assert list(Ids.joined(parts)) == ["é/a", "é/", "é/" + "ü" * 9, "d/7"]


@pytest.mark.parametrize(
    ("addresses", "names"),
    [
        ([("data/pairs.jsonl.gz", None)], ["pairs"]),
        ([("a/pairs.jsonl", None), ("b/pairs.parquet", None)], ["pairs", "b-pairs"]),
        ([("hh-rlhf/", "train"), ("hh-rlhf", "test")], ["hh-rlhf-train", "hh-rlhf-test"]),
        ([("owner/name", "train"), ("other/name", "train")], ["name-train", "other-name-train"]),
        ([("pairs.jsonl", None)] * 3, ["pairs", "pairs-2", "pairs-3"]),
    ],
)
def test_sources_have_short_names_of_their_own(addresses, names):
    assert source_names(addresses) == names


@pytest.mark.parametrize("at_once", [1, 5, 1000])
def test_scored_tokens_are_counted_however_many_responses_are_looked_at_in_one_go(monkeypatch, at_once):
    examples = random_examples(30, responses=3, ragged=True)
    monkeypatch.setattr(tokens, "_AT_ONCE", at_once)
    expected = [[sum(mask) for mask in example.scored] for example in examples]
    assert tokenized_data(examples).scored_lengths().tolist() == expected
