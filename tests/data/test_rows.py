"""Columns beside prompt and responses: scores, labels, lists of objects, objects of lists."""

import pytest

from daajax.data.bad_rows import BadRow
from daajax.data.rows import parse, unused_names

USER = {"role": "user", "content": "Is it red?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LIST = {"prompt": "a", "responses": ["b", "c", "d"]}
SINGLE = {"prompt": "a", "completion": "b"}


def example(**row):
    return parse(row, "folder/rows.jsonl:1")


def test_scored_responses_are_put_in_order_best_first():
    found = example(**LIST, scores=[-1, 2.5, 0])
    assert (found.responses, found.scores) == (("c", "d", "b"), (2.5, 0.0, -1.0))
    assert found.oddities == ("examples_sorted_by_score",)


def test_equal_scores_leave_responses_as_they_came():
    found = example(prompt="a", responses=["b", "c", "d", "e"], scores=[1, 2, 1, 2])
    assert (found.responses, found.scores) == (("c", "e", "b", "d"), (2, 2, 1, 1))
    assert example(**LIST, scores=[1, 1, 1]).responses == ("b", "c", "d")


def test_what_is_in_order_already_is_no_oddity():
    assert example(**LIST, scores=[3, 2, 2]).oddities == ()
    assert example(**LIST).scores is None


def test_scored_pairs_keep_their_order_and_one_against_it_is_counted():
    found = example(**PAIR, score_chosen=4.0, score_rejected=7)
    assert (found.responses, found.scores) == (("b", "c"), (4.0, 7.0))
    assert found.oddities == ("pairs_scored_against_their_order",)
    assert example(**PAIR, score_chosen=7, score_rejected=7).oddities == ()


def test_a_row_of_ultrafeedback_is_read_as_it_is_published():
    completions = [
        {"model": "alpaca", "response": "Red.", "overall_score": 6.5, "annotations": {"honesty": {"Rating": "4"}}},
        {"model": "gpt-4", "response": "Blue.", "overall_score": 8.0, "annotations": {"honesty": {"Rating": "5"}}},
    ]
    row = {"source": "evol", "instruction": "Which?", "models": ["alpaca", "gpt-4"], "completions": completions}
    found = example(**row)
    assert (found.prompt, found.responses, found.scores) == ("Which?", ("Blue.", "Red."), (8.0, 6.5))
    assert sorted(set(unused_names(row))) == ["completions[].annotations", "completions[].model", "models", "source"]


def test_a_row_of_binarized_ultrafeedback_is_read_as_it_is_published():
    row = {"prompt": USER["content"], "prompt_id": "x", "chosen": [USER, YES], "rejected": [USER, NO]}
    row |= {"messages": [USER, YES], "score_chosen": 8.0, "score_rejected": 5.5}
    found = example(**row)
    assert (found.prompt, found.responses, found.scores) == ([USER], ([YES], [NO]), (8.0, 5.5))
    assert unused_names(row) == ["prompt_id", "messages"]


@pytest.mark.parametrize("text", ["content", "text", "response"])
def test_entries_of_a_list_may_be_objects(text):
    found = example(prompt="a", responses=[{text: "b", "score": 1}, {text: "c", "score": 2}])
    assert (found.responses, found.scores) == (("c", "b"), (2, 1))


def test_entries_of_a_list_may_be_messages_with_a_score():
    found = example(prompt=[USER], responses=[YES | {"score": 1}, NO | {"score": 2}])
    assert (found.responses, found.scores) == (([NO], [YES]), (2, 1))


def test_an_object_of_lists_is_a_list_of_objects():
    chat = {"role": ["user", "assistant"], "content": ["Is it red?", "Yes."]}
    found = example(chosen=chat, rejected=chat | {"content": ["Is it red?", "No."]})
    assert (found.prompt, found.responses) == ([USER], ([YES], [NO]))
    scored = example(prompt="a", responses={"text": ["b", "c"], "score": [1, 2]})
    assert (scored.responses, scored.scores) == (("c", "b"), (2, 1))


@pytest.mark.parametrize("label", [True, False, None])
@pytest.mark.parametrize("row", [{"prompt": "a", "completion": "b"}, {"messages": [USER, YES]}])
def test_a_single_response_may_be_labelled(row, label):
    assert example(**row, label=label).label is label
    assert example(**row).label is None


@pytest.mark.parametrize("probability", [0, 1, 0.25, 1.0, None])
@pytest.mark.parametrize("row", [{"prompt": "a", "completion": "b"}, {"messages": [USER, YES], "label": False}])
def test_the_prompt_of_a_single_response_may_have_a_probability(row, probability):
    row = row | {"prompt_probability": probability}
    assert example(**row).prompt_probability == probability
    assert unused_names(row) == []


def test_a_prompt_probability_beside_several_responses_is_a_column_not_used():
    for row in (PAIR, LIST):
        assert example(**row, prompt_probability=7).prompt_probability is None
        assert unused_names(row | {"prompt_probability": 7}) == ["prompt_probability"]


def test_a_label_beside_a_pair_is_a_column_not_used():
    assert example(**PAIR, label=3).label is None
    assert unused_names(PAIR | {"label": 3}) == ["label"]


def test_other_names_of_scores_are_columns_not_used():
    row = PAIR | {"chosen_score": 1, "rejected_score": 2, "scores": [1, 2], "margin": None}
    assert example(**row).scores is None
    assert unused_names(row) == ["chosen_score", "rejected_score", "scores"]


BAD = {
    "`scores` is list [1, 2], needed a list of 3 numbers": LIST | {"scores": [1, 2]},
    "`scores` is int 1, needed a list of 3 numbers": LIST | {"scores": 1},
    "`scores[1]` is float nan": LIST | {"scores": [1, float("nan"), 2]},
    "`scores[0]` is float -inf": LIST | {"scores": [float("-inf"), 1, 2]},
    "`scores[2]` is missing": LIST | {"scores": [1, 2, None]},
    "`scores[2]` is str '3'": LIST | {"scores": [1, 2, "3"]},
    "`scores[2]` is bool True": LIST | {"scores": [1, 2, True]},
    "`scores[0]` is int 1000": LIST | {"scores": [10**400, 1, 2]},
    "`score_chosen` alone": PAIR | {"score_chosen": 1},
    "`score_rejected` alone": PAIR | {"score_rejected": 1},
    "`score_rejected` is float nan": PAIR | {"score_chosen": 1, "score_rejected": float("nan")},
    "1 of 2 `responses` bring a score, the other 1 do not": {
        "prompt": "a",
        "responses": [{"text": "b", "score": 1}, {"text": "c"}],
    },
    "2 of 2 `responses` bring a score, and so does `scores`": {
        "prompt": "a",
        "responses": [{"text": "b", "score": 1}, {"text": "c", "score": 2}],
        "scores": [1, 2],
    },
    "`responses[1]` is missing, needed text": {"prompt": "a", "responses": [{"text": "b"}, {"model": "x"}]},
    "`completions` is list []": {"instruction": "a", "completions": []},
    "no `prompt`; only a pair": {"instruction": "a", "responses": ["b", "c"]},
    "`label` is int 1, needed true": {"prompt": "a", "completion": "b", "label": 1},
    "`label` is str 'true'": {"prompt": "a", "completion": "b", "label": "true"},
    "`prompt_probability` is float 1.5, needed a number from 0 to 1": SINGLE | {"prompt_probability": 1.5},
    "`prompt_probability` is float -0.1": SINGLE | {"prompt_probability": -0.1},
    "`prompt_probability` is float nan": SINGLE | {"prompt_probability": float("nan")},
    "`prompt_probability` is bool True": SINGLE | {"prompt_probability": True},
    "`prompt_probability` is str '0.5'": SINGLE | {"prompt_probability": "0.5"},
}


@pytest.mark.parametrize("reason", BAD)
def test_what_makes_no_sense_is_a_bad_row(reason):
    with pytest.raises(BadRow) as error:
        example(**BAD[reason])
    assert reason in str(error.value)


def test_a_row_without_an_id_is_called_by_its_file_and_row():
    assert example(**PAIR).id == "rows.jsonl:1"
    assert parse(PAIR, "folder/rows.jsonl:1", "sub/rows.jsonl:1").id == "sub/rows.jsonl:1"
