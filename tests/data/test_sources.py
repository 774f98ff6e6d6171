import gzip
import json
import subprocess
import sys

import pytest

from daajax.data.sources import SOURCES, read
from daajax.errors import UserError

USER = {"role": "user", "content": "Is it red?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}
PAIR = {"prompt": "Is it red?", "chosen": " Yes.", "rejected": " No."}
HH = "\n\nHuman: Is it red?\n\nAssistant:"


@pytest.fixture
def write(tmp_path):
    """Writes rows, or raw lines, as a JSONL file."""

    def write_lines(*rows, name="pairs.jsonl", end=b"\n"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        content = b"".join(line + end for line in lines)
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write_lines


def only(path, **options):
    (example,) = read("jsonl", path, **options).examples
    return example


def test_a_text_pair_becomes_an_example(write):
    path = write(PAIR | {"id": "a/1", "weight": 0.5})
    example = only(path)
    assert example.prompt == "Is it red?"
    assert example.responses == (" Yes.", " No.")
    assert (example.weight, example.id, example.location) == (0.5, "a/1", f"{path}:1")


def test_a_row_without_id_is_called_by_file_and_line(write):
    examples = read("jsonl", write(PAIR, b"", b"  ", PAIR)).examples
    assert [example.id for example in examples] == ["pairs.jsonl:1", "pairs.jsonl:4"]
    assert examples[0].weight == 1.0


def test_an_integer_id_becomes_text(write):
    assert only(write(PAIR | {"id": 17})).id == "17"


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_byte_order_mark_and_crlf_change_nothing(write, name):
    plain = write(PAIR, PAIR, name=name)
    want = [example.responses for example in read("jsonl", plain).examples]
    marked = write(b"\xef\xbb\xbf" + json.dumps(PAIR).encode(), PAIR, name=name, end=b"\r\n")
    assert [example.responses for example in read("jsonl", marked).examples] == want


def test_a_last_line_without_newline_counts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR))
    assert len(read("jsonl", path).examples) == 2


def test_messages_with_an_explicit_prompt(write):
    example = only(write({"prompt": [USER], "chosen": [YES], "rejected": [NO]}))
    assert example.prompt == [USER]
    assert example.responses == ([YES], [NO])


def test_text_answers_to_a_chat_prompt_are_assistant_messages(write):
    assert only(write({"prompt": [USER], "chosen": "Yes.", "rejected": "No."})).responses == ([YES], [NO])


def test_a_text_prompt_of_chat_answers_is_a_user_message(write):
    assert only(write({"prompt": "Is it red?", "chosen": [YES], "rejected": [NO]})).prompt == [USER]


@pytest.mark.parametrize("prompt", ["Is it red?", [USER], None])
def test_answers_that_repeat_the_prompt_lose_it(write, prompt):
    example = only(write({"prompt": prompt, "chosen": [USER, YES], "rejected": [USER, NO]}))
    assert (example.prompt, example.responses) == ([USER], ([YES], [NO]))


def test_implicit_chat_prompt_is_the_common_leading_messages(write):
    first = {"role": "assistant", "content": "Which?"}
    then = {"role": "user", "content": "This."}
    example = only(write({"chosen": [USER, first, then, YES], "rejected": [USER, first, then, NO]}))
    assert example.prompt == [USER, first, then]
    assert example.responses == ([YES], [NO])


def test_human_assistant_text_is_split_on_turns_not_on_common_characters(write):
    example = only(write({"chosen": HH + " No, it is blue.", "rejected": HH + " No, it is green."}))
    assert example.prompt == HH
    assert example.responses == (" No, it is blue.", " No, it is green.")


def test_human_assistant_text_is_split_after_the_last_common_turn(write):
    earlier = HH + " Which?\n\nHuman: This.\n\nAssistant:"
    result = read("jsonl", write({"chosen": earlier + " Yes.", "rejected": earlier + " No."}))
    assert result.examples[0].prompt == earlier
    assert result.counters["examples_with_later_turns"] == 0


def test_human_assistant_text_whose_turns_part_early_is_split_there_and_counted(write):
    chosen, rejected = HH + " Yes.\n\nHuman: Sure?\n\nAssistant: Yes.", HH + " No.\n\nHuman: Sure?\n\nAssistant: No."
    result = read("jsonl", write({"chosen": chosen, "rejected": rejected}))
    assert result.examples[0].prompt == HH
    assert result.counters["examples_with_later_turns"] == 1


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "a", "response": "b"}, "a", ("b",)),
        ({"prompt": "a", "completion": "b"}, "a", ("b",)),
        ({"prompt": [USER], "completion": [YES]}, [USER], ([YES],)),
        ({"messages": [USER, NO, USER, YES]}, [USER, NO, USER], ([YES],)),
        ({"prompt": "a", "responses": ["b", "c", "d"]}, "a", ("b", "c", "d")),
        ({"prompt": "", "chosen": "b", "rejected": "c", "response": None}, "", ("b", "c")),
    ],
)
def test_every_form_of_responses(write, row, prompt, responses):
    example = only(write(row))
    assert (example.prompt, example.responses) == (prompt, responses)


def test_unused_columns_are_named_once(write):
    rows = [PAIR | {"reward": 1.0}, PAIR | {"reward": 2.0, "source": "x", "messages": [USER, YES]}]
    assert read("jsonl", write(*rows)).notices == ["columns not used: reward, source, messages"]


def test_unused_fields_of_messages_are_named(write):
    row = {"prompt": [USER], "chosen": [YES | {"score": 1}], "rejected": [NO]}
    result = read("jsonl", write(row))
    assert result.notices == ["columns not used: chosen[].score"]
    assert result.examples[0].responses[0] == [YES]


BAD = {
    "not JSON": b'{"prompt": "a", ',
    "not UTF-8 at byte 12": b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}',
    "needed a JSON object": ["a"],
    "no responses": {"prompt": "a"},
    "no `rejected`": {"prompt": "a", "chosen": "b", "rejected": None},
    "no `chosen`": {"prompt": "a", "rejected": "b"},
    "`prompt` is int 3": PAIR | {"prompt": 3},
    "`chosen` is dict": PAIR | {"chosen": {"role": "assistant"}},
    "`chosen` is list []": PAIR | {"chosen": []},
    "`responses` is str": {"prompt": "a", "responses": "b"},
    "`messages` is text": {"messages": "a"},
    "`weight` is float nan": PAIR | {"weight": float("nan")},
    "`weight` is float inf": PAIR | {"weight": float("inf")},
    "`weight` is int -1": PAIR | {"weight": -1},
    "`weight` is int 1000000": PAIR | {"weight": 10**400},
    "`weight` is float 1e+39": PAIR | {"weight": 1e39},
    "`weight` is bool True": PAIR | {"weight": True},
    "`weight` is str '1'": PAIR | {"weight": "1"},
    "`id` is list": PAIR | {"id": ["a"]},
    "`chosen` is empty": PAIR | {"chosen": " \n\t"},
    "`rejected` is empty": PAIR | {"rejected": ""},
    "`rejected` is empty ": {"prompt": [USER], "chosen": [YES], "rejected": [NO | {"content": " "}]},
    "`chosen` and `rejected` are equal": PAIR | {"rejected": PAIR["chosen"]},
    "`chosen` and `rejected` are equal ": {"chosen": [USER, YES], "rejected": [USER, YES]},
    "`responses[0]` and `responses[2]` are equal": {"prompt": "a", "responses": ["b", "c", "b"]},
    "`chosen[0]` has missing as `content`": {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [NO]},
    "`chosen[0]` has missing as `role`": {"prompt": [USER], "chosen": [{"from": "gpt"}], "rejected": [NO]},
    "`prompt[0]` has the role 'bot'": {"prompt": [USER | {"role": "bot"}], "chosen": [YES], "rejected": [NO]},
    "`prompt[0]` is str": {"prompt": ["a"], "chosen": [YES], "rejected": [NO]},
    "does not begin and end in an assistant message": {"prompt": [USER], "chosen": [YES, USER], "rejected": [NO]},
    "the prompt ends in an assistant": {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, NO, YES]},
    "the prompt ends in an assistant message": {"prompt": [USER, YES], "chosen": [NO], "rejected": [YES]},
    "a single message": {"messages": [YES]},
    "no leading message in common": {"chosen": [USER, YES], "rejected": [YES, NO]},
    "is the beginning of the other": {"chosen": [USER, YES], "rejected": [USER, YES, USER, NO]},
    "one of `chosen` and `rejected` is text": {"chosen": [USER, YES], "rejected": "No."},
    "no `prompt`; only a pair": {"response": "a"},
    "needed a column `prompt`": {"chosen": "It is red.", "rejected": "It is blue."},
    "needed a column `prompt` ": {"chosen": HH + " Yes.", "rejected": HH.replace("red", "blue") + " No."},
    "half a surrogate pair at character 1": b'{"prompt": "a\\ud800", "chosen": "a", "rejected": "b"}',
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_ends_the_run_with_file_line_reason_and_remedy(write, reason):
    path = write(PAIR, BAD[reason])
    with pytest.raises(UserError) as error:
        read("jsonl", path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert reason.strip() in str(error.value)
    assert "data.max_bad_rows" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reason", BAD)
def test_a_tolerated_bad_row_is_counted_and_named(write, reason):
    path = write(PAIR, BAD[reason], PAIR)
    result = read("jsonl", path, max_bad_rows=1)
    assert [example.id for example in result.examples] == ["pairs.jsonl:1", "pairs.jsonl:3"]
    assert result.counters["bad_rows"] == 1
    assert result.counters["rows"] == 3
    assert any(notice.startswith(f"bad row skipped: {path}:2: ") for notice in result.notices)


def test_one_bad_row_too_many_names_the_first(write):
    path = write(PAIR, b"{", PAIR, b"{", b"{")
    assert read("jsonl", path, max_bad_rows=3).counters["bad_rows"] == 3
    with pytest.raises(UserError, match=rf"^{path}:2: .* 3 bad row\(s\), but data.max_bad_rows=2"):
        read("jsonl", path, max_bad_rows=2)


def test_only_the_first_five_bad_rows_are_named(write):
    result = read("jsonl", write(PAIR, *[b"{"] * 9), max_bad_rows=9)
    assert len(result.bad_rows.reasons) == 5
    assert result.counters["bad_rows"] == 9


def test_deeply_nested_json_is_a_bad_row(write):
    assert read("jsonl", write(PAIR, b"[" * 200_000), max_bad_rows=1).counters["bad_rows"] == 1


def test_limit_takes_the_first_good_rows(write):
    rows = [PAIR | {"id": str(number)} for number in range(5)]
    path = write(b"{", *rows)
    assert [example.id for example in read("jsonl", path, limit=2, max_bad_rows=1).examples] == ["0", "1"]
    assert len(read("jsonl", path, limit=99, max_bad_rows=1).examples) == 5


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -1}, {"limit": True}, {"max_bad_rows": -1}])
def test_a_limit_that_makes_no_sense_is_refused(write, options):
    (name,) = options
    with pytest.raises(UserError, match=f"data.{name}="):
        read("jsonl", write(PAIR), **options)


def test_an_unknown_source_is_refused_with_the_known_ones(write):
    with pytest.raises(UserError, match=r"data.name='json' is no source; known are .*jsonl"):
        read("json", write(PAIR))
    assert "jsonl" in SOURCES


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read("jsonl", tmp_path / "nowhere.jsonl")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read("jsonl", tmp_path)


@pytest.mark.parametrize("rows", [[], [b"", b" "]])
def test_an_empty_file_is_refused(write, rows):
    with pytest.raises(UserError, match="holds no rows"):
        read("jsonl", write(*rows))


def test_a_file_of_bad_rows_only_is_refused(write):
    with pytest.raises(UserError, match="2 rows, none of them good"):
        read("jsonl", write(b"{", b"{"), max_bad_rows=2)


def test_a_file_that_only_says_it_is_gzip_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_text(json.dumps(PAIR) + "\n")
    with pytest.raises(UserError, match="cannot be read to its end"):
        read("jsonl", path)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_gzip_is_refused(write, damage):
    rows = [PAIR | {"id": str(number * 7919)} for number in range(500)]
    path = write(*rows, name="pairs.jsonl.gz")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-20:]
    else:
        content[-6] ^= 4  # in the checksum
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read to its end"):
        read("jsonl", path, max_bad_rows=1000)


def test_data_modules_never_import_jax():
    modules = "bad_rows, files, rows, sources, tokenization, tokenizer, tokens, token_cache, windows"
    heavy = "{'jax', 'torch', 'pyarrow', 'tensorflow_datasets', 'datasets'}"  # the last three where they are used
    code = f"import sys; from daajax.data import {modules}; assert not {heavy} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
