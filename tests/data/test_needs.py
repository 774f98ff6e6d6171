"""What data lack, in words."""

import dataclasses

import numpy as np
import pytest

from daajax.data.needs import lacking
from daajax.data.tokens import UNLABELLED
from tests.data.test_batches import random_examples, tokenized_data


@pytest.fixture
def pairs():
    """Ten pairs with scores."""
    scores = np.arange(20, dtype=np.float32).reshape(10, 2)
    return dataclasses.replace(tokenized_data(random_examples(10)), scores=scores)


@pytest.fixture
def singles():
    """Ten single responses, with labels and probabilities."""
    data = tokenized_data(random_examples(10, responses=1))
    labels = np.arange(10, dtype=np.int8) % 2
    return dataclasses.replace(data, labels=labels, prompt_probabilities=np.linspace(0, 1, 10, dtype=np.float32))


def test_nothing_is_lacking_where_all_is_there(pairs, singles):
    assert lacking(pairs, ["scores"]) is None
    assert lacking(singles, ["labels", "prompt_probabilities"]) is None
    assert lacking(tokenized_data(random_examples(3)), []) is None


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("scores", "add `score_chosen` and `score_rejected` to pairs, `scores` to lists of responses"),
        ("labels", "add `label` to single responses, true where they are wanted, else false"),
        ("prompt_probabilities", "add `prompt_probability` to single responses, a number from 0 to 1"),
        ("finished", "it is known only of responses that are sampled in training"),
    ],
)
def test_data_without_any_are_said_to_have_none(field, remedy):
    data = tokenized_data(random_examples(10, responses=1))
    assert lacking(data, [field]) == f"needs {field} but 10 of 10 examples have none, such as 'row/0': {remedy}."


def test_those_that_lack_it_are_counted_and_the_first_is_named(pairs, singles):
    pairs.scores[4, 1] = pairs.scores[7] = np.nan
    assert "needs scores but 2 of 10 examples have none, such as 'row/4': " in lacking(pairs, ["scores"])
    singles.labels[3:6] = UNLABELLED
    assert "needs labels but 3 of 10 examples have none, such as 'row/3': " in lacking(singles, ["labels"])
    singles.prompt_probabilities[9] = np.nan
    fields = ["prompt_probabilities", "labels"]
    assert "needs prompt_probabilities but 1 of 10 examples have none, such as 'row/9'" in lacking(singles, fields)


def test_a_response_that_there_is_not_needs_no_score():
    data = tokenized_data(random_examples(10, responses=3, ragged=True))
    scores = np.where(data.lengths[:, 1:] > 0, 1, np.nan).astype(np.float32)
    assert np.isnan(scores).any()
    assert lacking(dataclasses.replace(data, scores=scores), ["scores"]) is None
