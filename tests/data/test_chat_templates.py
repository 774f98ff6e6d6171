"""Prompts, responses and what is scored of them, for the chat templates of every family of models.

The templates are in templates/, each with its origin. What a response looks like in its family is written down here, as
the family's documentation has it; prompts are compared with what transformers renders of them.
"""

import functools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from daajax.data.chat import FIXED_DATE
from daajax.data.sources import read
from daajax.data.tokenization import tokenize
from daajax.data.tokenizer import load_tokenizer
from daajax.data.tokens import summary
from daajax.errors import UserError
from tests.data.test_tokenization import examples_of, parts_of, save, scores_of

FOLDER = Path(__file__).parent / "templates"
# What a model of the family writes for an answer; where it does not depend on what went before.
ANSWERS = {
    "gemma2": lambda text: text.strip() + "<end_of_turn>\n",
    "gemma3": lambda text: text.strip() + "<end_of_turn>\n",
    "llama2": lambda text: f" {text.strip()} </s>",
    "llama3": lambda text: text.strip() + "<|eot_id|>",
    "llama3_1": lambda text: text.strip() + "<|eot_id|>",
    "llama3_2": lambda text: text.strip() + "<|eot_id|>",
    "mistral_v1": lambda text: f" {text}</s>",
    "mistral_v3": lambda text: f" {text.strip()}</s>",
    "nemotron": lambda text: text.strip() + "\n",
    "olmo2": lambda text: text + "<|endoftext|>",
    "phi3": lambda text: text + "<|end|>\n<|endoftext|>",
    "phi4": lambda text: text + "<|im_end|>",
    "phi4_mini": lambda text: text + "<|end|><|endoftext|>",
    "qwen2_5": lambda text: text + "<|im_end|>\n",
    "qwen3": lambda text: "<think>\n\n</think>\n\n" + text.lstrip("\n") + "<|im_end|>\n",
    "qwen3_training": lambda text: "<think>\n\n</think>\n\n" + text.lstrip("\n") + "<|im_end|>\n",
    "smollm2": lambda text: text + "<|im_end|>\n",
    "smollm3": lambda text: text.lstrip("\n") + "<|im_end|>\n",
    "zephyr": lambda text: text + "</s>\n",
}
CLOSING = ("phi3", "phi4_mini")  # with EOS behind the last turn only
TOOLS_PRINTED = ("llama3_1", "llama3_2", "mistral_v3", "nemotron", "qwen2_5", "qwen3", "qwen3_training", "smollm3")
WITHOUT_SYSTEM = ("gemma2", "mistral_v3")  # refuse one, or lose it once an answer follows
SPECIALS = (
    *("<s>", "</s>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", "<|end|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "<extra_id_0>", "<extra_id_1>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
)
ENDS = {  # (BOS, EOS) of a family's tokenizer
    **dict.fromkeys(("gemma2", "gemma3"), ("<bos>", "<eos>")),
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), ("<|begin_of_text|>", "<|eot_id|>")),
    **dict.fromkeys(("llama2", "mistral_v1", "mistral_v3", "nemotron", "zephyr"), ("<s>", "</s>")),
    "olmo2": ("<|endoftext|>", "<|endoftext|>"),
    **dict.fromkeys(("phi3", "phi4_mini"), ("<s>", "<|endoftext|>")),
    **dict.fromkeys(("phi4", "qwen2_5", "qwen3", "qwen3_training", "smollm2", "smollm3"), (None, "<|im_end|>")),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SYSTEM = {"role": "system", "content": "be kind"}
USER = {"role": "user", "content": "warm in Bern?"}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "21 degrees"}
YES = {"role": "assistant", "content": "yes, warm"}
NO = {"role": "assistant", "content": "no"}
FURTHER = {"role": "user", "content": "and now?"}

texts = st.text(" \n\tab7.é🙂<|", max_size=8)
answers = texts.filter(lambda text: bool(text.strip()))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One for every pair of `ENDS`: bytes, and the special tokens of all families."""

    def make(bos, eos):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
        return saved(tmp_path_factory.mktemp("bytes"), backend, bos, eos)

    return functools.cache(make)


def saved(folder, backend, bos, eos, specials=SPECIALS):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return load_tokenizer(save(folder, backend, bos_token=bos, eos_token=eos))


def jinja(family):
    return (FOLDER / f"{family}.jinja").read_text()


def rendered(tokenizer, family, messages, **arguments):
    """By transformers alone, with the date that daajax gives."""
    text = jinja(family)
    for form in ("%d %b %Y", "%d %B %Y"):
        for quote in "'\"":
            text = text.replace(f"strftime_now({quote}{form}{quote})", repr(FIXED_DATE.strftime(form)))
    arguments = {"add_generation_prompt": False, "tokenize": False} | arguments
    return tokenizer.apply_chat_template(messages, chat_template=text, **arguments)


def tokenized(tokenizer, family, *row, score="last", **fields):
    template = str(FOLDER / f"{family}.jinja") if family in ANSWERS else family
    return tokenize(examples_of(row, **fields), tokenizer, max_length=100_000, template=template, score=score)


def scored_text(tokenizer, data, response=1):
    part, scored = parts_of(data)[response], scores_of(data)[response]
    return tokenizer.decode([token for token, counts in zip(part, scored, strict=True) if counts])


def test_there_is_an_answer_for_every_template_and_a_template_for_every_answer():
    assert {file.stem for file in FOLDER.glob("*.jinja")} == set(ANSWERS) == set(ENDS)


@st.composite
def pairs(draw, *, system):
    """(prompt, chosen, rejected) of one to three turns, spaces around anything."""
    content = lambda role, text: {"role": role, "content": draw(text)}  # noqa: E731
    prompt = [content("system", texts)] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [content("user", texts), content("assistant", answers)]
    prompt.append(content("user", texts))
    chosen, rejected = draw(st.lists(answers, min_size=2, max_size=2, unique=True))
    return prompt, [{"role": "assistant", "content": chosen}], [{"role": "assistant", "content": rejected}]


@pytest.mark.parametrize("family", ANSWERS)
def test_the_prompt_is_the_generation_prompt_and_the_answer_is_scored(tokenizers, family):
    tokenizer = tokenizers(*ENDS[family])

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(pair=pairs(system=family not in WITHOUT_SYSTEM), tools=st.sampled_from([None, [TOOL], [TOOL, TOOL]]))
    def check(pair, tools):
        data = tokenized(tokenizer, family, *pair, tools=tools)
        wanted = rendered(tokenizer, family, pair[0], tools=tools, add_generation_prompt=True)
        prompt, *responses = parts_of(data)
        assert tokenizer.decode(prompt) == wanted
        assert tokenizer.encode(wanted, add_special_tokens=False) == prompt
        assert not any(scores_of(data)[0])
        for place, ids in enumerate(responses, start=1):
            assert all(scores_of(data)[place])
            assert tokenizer.decode(ids) == ANSWERS[family](pair[place][0]["content"])
            whole = rendered(tokenizer, family, [*pair[0], *pair[place]], tools=tools)
            assert tokenizer.encode(whole, add_special_tokens=False) == prompt + ids
        assert data.counters["straddling_tokens"] == data.counters["unscored_first_tokens"] == 0
        assert data.counters["tools_not_rendered"] == (tools is not None and family not in TOOLS_PRINTED)
        bos = tokenizer.bos_token_id
        if bos is not None and family != "llama2":  # which writes one before every turn
            assert prompt[1:].count(bos) == (wanted.count(tokenizer.eos_token) - 1 if family == "olmo2" else 0)
        assert data.counters["double_bos_removed"] == data.counters["messages_not_rendered"] == 0
        assert data.counters["responses_without_end"] == (2 if family == "nemotron" else 0)

    check()


@pytest.mark.parametrize(
    "family", sorted(ANSWERS.keys() - {"qwen3"})
)  # which drops the thinking of earlier turns: refused
def test_score_all_scores_what_the_model_would_have_written_at_every_turn(tokenizers, family):
    tokenizer = tokenizers(*ENDS[family])

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(pair=pairs(system=family not in WITHOUT_SYSTEM))
    def check(pair):
        prompt, chosen, _ = pair
        data = tokenized(tokenizer, family, prompt, chosen, score="all")
        earlier = [ANSWERS[family](entry["content"]) for entry in prompt if entry["role"] == "assistant"]
        if family in CLOSING:
            earlier = [text.removesuffix(tokenizer.eos_token) for text in earlier]
        assert tokenizer.decode(data.tokens[data.scored]) == "".join([*earlier, ANSWERS[family](chosen[0]["content"])])
        assert data.tokens.tolist() == tokenized(tokenizer, family, prompt, chosen).tokens.tolist()

    check()


@pytest.mark.parametrize("family", ANSWERS)
def test_a_tokenizer_that_merges_across_the_boundary_scores_the_whole_answer(tmp_path, family):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["\n\n", "\n \n", "user\n\n ", "\nab", "  ab", " \n"] * 20, trainer)
    tokenizer = saved(tmp_path, backend, *ENDS[family])

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(pair=pairs(system=family not in WITHOUT_SYSTEM))
    def check(pair):
        data = tokenized(tokenizer, family, *pair)
        straddling = 0
        for place in (1, 2):
            answer = ANSWERS[family](pair[place][0]["content"])
            whole = rendered(tokenizer, family, [*pair[0], *pair[place]])
            assert parts_of(data)[0] + parts_of(data)[place] == tokenizer.encode(whole, add_special_tokens=False)
            scored = scored_text(tokenizer, data, place)
            assert scored.endswith(answer)
            straddling += scored != answer
        assert data.counters["straddling_tokens"] == straddling

    check()


# Thinking


def test_qwen3_scores_thinking_and_drops_that_of_earlier_turns_from_the_prompt(tokenizers):
    tokenizer = tokenizers(*ENDS["qwen3"])
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    apart = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    for answer in (thought, apart):
        data = tokenized(tokenizer, "qwen3", [USER, answer, FURTHER], [answer], [NO])
        assert "hm" not in tokenizer.decode(parts_of(data)[0])
        assert scored_text(tokenizer, data) == "<think>\nhm\n</think>\n\nyes<|im_end|>\n"
        assert scored_text(tokenizer, data, 2) == "<think>\n\n</think>\n\nno<|im_end|>\n"


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_without_thinking_its_empty_block_belongs_to_the_prompt(tokenizers, family):
    tokenizer = tokenizers(*ENDS[family])
    data = tokenized(tokenizer, family, [USER], [YES], [NO], template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(parts_of(data)[0]).rstrip().endswith("<think>\n\n</think>")
    assert scored_text(tokenizer, data) == "yes, warm<|im_end|>\n"
    assert data.counters["unknown_template_kwargs"] == 0


def test_smollm3_is_told_by_its_system_message_not_to_think(tokenizers):
    tokenizer = tokenizers(*ENDS["smollm3"])
    data = tokenized(tokenizer, "smollm3", [SYSTEM | {"content": "be kind /no_think"}, USER], [YES], [NO])
    assert tokenizer.decode(parts_of(data)[0]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    assert "26 July 2024" in tokenizer.decode(parts_of(data)[0])
    assert scored_text(tokenizer, data) == "yes, warm<|im_end|>\n"


def refusal(*arguments, **fields):
    with pytest.raises(UserError) as error:
        tokenized(*arguments, **fields)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("f:0: ")
    return str(error.value)


def test_an_answer_that_thinks_where_thinking_is_off_is_refused(tokenizers):
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    fields = {"template_kwargs": {"enable_thinking": False}}
    line = refusal(tokenizers(*ENDS["qwen3"]), "qwen3", [USER], [thought], [NO], **fields)
    assert r"'ant\n<think>\n\n</think>\n\n' as 'ant\n<think>\nhm" in line


@pytest.mark.parametrize("fields", [{}, {"template_kwargs": {"enable_thinking": False}}])
def test_score_all_refuses_qwen3_because_earlier_turns_are_not_what_it_would_write(tokenizers, fields):
    line = refusal(tokenizers(*ENDS["qwen3"]), "qwen3", [USER, NO, FURTHER], [YES], score="all", **fields)
    assert "otherwise when more follow" in line
    tokenized(tokenizers(*ENDS["qwen3"]), "qwen3", [USER], [YES], score="all")


def test_answers_of_several_turns_are_refused_where_the_first_loses_its_thinking(tokenizers):
    response = [YES, FURTHER, NO]
    line = refusal(tokenizers(*ENDS["qwen3"]), "qwen3", [USER], response, [NO])
    assert "the first 2 message(s) otherwise when more follow" in line
    tokenizer = tokenizers(*ENDS["qwen2_5"])
    data = tokenized(tokenizer, "qwen2_5", [USER], response, [NO])
    header = "<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
    assert scored_text(tokenizer, data) == f"yes, warm<|im_end|>\n{header}no<|im_end|>\n"


# Templates that refuse, or move what was said


@pytest.mark.parametrize(
    ("family", "prompt", "message"),
    [
        ("gemma2", [SYSTEM, USER], "System role not supported"),
        ("gemma3", [USER, USER], "roles must alternate"),
        ("mistral_v1", [USER, USER], "roles must alternate"),
        ("mistral_v3", [USER, USER], "roles must alternate"),
        ("llama2", [USER, YES, USER, USER], "roles must alternate"),
        ("mistral_v1", [SYSTEM, RESULT], "roles must alternate|Only user and assistant"),
    ],
)
def test_what_a_template_refuses_is_one_line_that_names_the_example(tokenizers, family, prompt, message):
    line = refusal(tokenizers(*ENDS[family]), family, prompt, [YES], [NO])
    assert any(part in line for part in message.split("|"))


def test_mistral_loses_its_system_message_once_an_answer_follows_and_is_refused(tokenizers):
    line = refusal(tokenizers(*ENDS["mistral_v3"]), "mistral_v3", [SYSTEM, USER], [YES], [NO])
    assert "'<s>[INST] be kind" in line
    assert "as '<s>[INST] warm in Bern?" in line


def test_mistral_moves_its_tools_to_the_last_user_so_that_earlier_turns_cannot_be_scored(tokenizers):
    tokenizer = tokenizers(*ENDS["mistral_v3"])
    row = ([USER, NO, FURTHER], [YES])
    line = refusal(tokenizer, "mistral_v3", *row, score="all", tools=[TOOL])
    assert "[AVAILABLE_TOOLS]"[:8] in line
    assert scored_text(tokenizer, tokenized(tokenizer, "mistral_v3", *row, tools=[TOOL])) == " yes, warm</s>"


def test_score_all_refuses_a_conversation_that_the_assistant_begins(tokenizers):
    line = refusal(tokenizers(*ENDS["zephyr"]), "zephyr", [NO, USER], [YES], score="all")
    assert "begins with an assistant message" in line


def test_a_special_token_that_takes_the_spaces_behind_it_is_not_scored_for_them(tmp_path):
    # As Phi-3's tokenizer has them: the header's token reaches into a response that begins with a space.
    specials = [AddedToken(token, rstrip=True, special=True) for token in ("<|user|>", "<|assistant|>", "<|end|>")]
    alphabet = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    specials = ["<s>", "<|endoftext|>", *specials]
    tokenizer = saved(tmp_path, Tokenizer(models.BPE(alphabet, [])), "<s>", "<|endoftext|>", specials)
    row = ([USER], [YES | {"content": "  \nyes"}], [NO])
    data = tokenized(tokenizer, "phi3", *row)
    assert tokenizer.decode(parts_of(data)[0]) == "<|user|>warm in Bern?<|end|><|assistant|>"
    assert [scored_text(tokenizer, data, place) for place in (1, 2)] == [
        "yes<|end|><|endoftext|>",
        "no<|end|><|endoftext|>",
    ]
    assert data.counters["straddling_tokens"] == 0


# Tools


@pytest.mark.parametrize("family", ["llama3_1", "mistral_v3", "qwen2_5", "qwen3"])
def test_calls_and_results_in_a_prompt_are_rendered_as_transformers_does(tokenizers, family):
    tokenizer = tokenizers(*ENDS[family])
    prompt = [USER, CALLING, RESULT]
    data = tokenized(tokenizer, family, prompt, [YES], [NO], tools=[TOOL])
    wanted = rendered(tokenizer, family, prompt, tools=[TOOL], add_generation_prompt=True)
    assert tokenizer.decode(parts_of(data)[0]) == wanted
    assert wanted.count('"city": "Bern"') == 1
    assert scored_text(tokenizer, data) == ANSWERS[family]("yes, warm")


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("llama3_1", '{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>'),
        ("qwen2_5", '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>\n'),
        ("mistral_v3", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}, "id": "abcdefghi"}]</s>'),
    ],
)
def test_a_call_may_be_the_answer(tokenizers, family, call):
    tokenizer = tokenizers(*ENDS[family])
    data = tokenized(tokenizer, family, [USER], [CALLING], [NO], tools=[TOOL])
    # Qwen2.5 writes the line end of the header with the call.
    assert call.endswith(scored_text(tokenizer, data))
    assert call.lstrip() == scored_text(tokenizer, data).lstrip()


@pytest.fixture
def rows(tmp_path):
    """Reads rows through a source."""

    def through(name, content):
        path = tmp_path / f"rows.{name}"
        if name == "jsonl":
            path.write_text("\n".join(map(json.dumps, content)))
        else:
            pq.write_table(pa.Table.from_pylist(content), path)
        return read(name, path)

    return through


ROW = {"prompt": [USER, CALLING, RESULT], "chosen": [YES], "rejected": [NO], "tools": [TOOL], "id": "a"}
PLAIN = {"prompt": [USER], "chosen": [YES], "rejected": [NO], "id": "b"}
AS_TEXT = CALL | {"function": CALL["function"] | {"arguments": '{"city": "Bern"}'}}


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        ROW,
        ROW | {"tools": json.dumps([TOOL])},
        ROW | {"prompt": [USER, CALLING | {"tool_calls": [AS_TEXT]}, RESULT]},
        ROW | {"prompt": [USER | {"tool_calls": None}, CALLING | {"name": None}, RESULT]},
    ],
    ids=["objects", "tools as JSON", "arguments as JSON", "nulls"],
)
def test_tools_come_through_every_source_and_form_the_same(tokenizers, rows, name, row):
    tokenizer = tokenizers(*ENDS["qwen3"])
    other = PLAIN | {"tools": [TOOL | {"function": {"name": "sun", "parameters": {"properties": {"day": {"a": 1}}}}}]}
    examples = rows(name, [row, PLAIN, other if isinstance(row["tools"], list) else PLAIN])
    data = tokenize(examples, tokenizer, max_length=9999, template=str(FOLDER / "qwen3.jinja"))
    wanted = rendered(tokenizer, "qwen3", ROW["prompt"], tools=[TOOL], add_generation_prompt=True)
    assert tokenizer.decode(parts_of(data)[0]) == wanted
    assert "weather" not in tokenizer.decode(parts_of(data, 1)[0])
    assert examples.notices == []


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_template_arguments_come_with_each_example(tokenizers, rows, name):
    tokenizer = tokenizers(*ENDS["qwen3"])
    given = [PLAIN | {"chat_template_kwargs": {"enable_thinking": think}} for think in (True, False)]
    as_text = PLAIN | {"chat_template_kwargs": '{"enable_thinking": false}'}
    data = tokenize(rows(name, given), tokenizer, max_length=9999, template=str(FOLDER / "qwen3.jinja"))
    ends = [tokenizer.decode(parts_of(data, place)[0]).endswith("</think>\n\n") for place in range(2)]
    assert ends == [False, True]
    other = tokenize(rows(name, [as_text]), tokenizer, max_length=9999, template=str(FOLDER / "qwen3.jinja"))
    assert parts_of(other) == parts_of(data, 1)


def test_no_tools_are_as_none(tokenizers, rows):
    # Llama's template prints a frame for an empty list.
    tokenizer = tokenizers(*ENDS["llama3_1"])
    options = {"max_length": 9999, "template": str(FOLDER / "llama3_1.jinja")}
    empty = tokenize(rows("jsonl", [PLAIN | {"tools": []}]), tokenizer, **options)
    assert empty.digest == tokenize(rows("jsonl", [PLAIN]), tokenizer, **options).digest


def test_what_a_template_leaves_out_is_counted_and_said(tokenizers):
    tokenizer = tokenizers(*ENDS["zephyr"])
    given = {"tools": [TOOL], "template_kwargs": {"enable_thinking": False}}
    lines = summary(tokenized(tokenizer, "zephyr", [USER], [YES], **given).counters)
    assert "1 examples whose tools the chat template does not print" in lines
    assert "1 examples with chat_template_kwargs that the chat template does not know" in lines


@pytest.mark.parametrize(
    ("family", "prompt", "response"),
    [
        ("phi3", [USER, CALLING, RESULT], [YES]),  # prints neither calls nor results
        ("zephyr", [USER], [CALLING]),
        ("zephyr", [USER], [CALLING, RESULT, YES]),
        ("qwen2_5", [SYSTEM | {"role": "developer"}, USER], [YES]),
        ("smollm3", [USER, YES, SYSTEM, USER], [YES]),  # no system message but the first
        ("{% for m in messages %}{{ m.content[0].text }}|{% endfor %}", [USER], [YES]),  # for images, texts in parts
    ],
)
def test_messages_that_a_template_leaves_out_are_counted_and_said(tokenizers, family, prompt, response):
    data = tokenized(tokenizers(*ENDS.get(family, (None, "<eos>"))), family, prompt, response)
    said = "1 examples with messages or calls of tools that the chat template does not print"
    assert said in summary(data.counters)


def test_a_trajectory_of_calls_and_results_is_scored_whole_and_counted(tokenizers, rows):
    tokenizer = tokenizers(*ENDS["qwen2_5"])
    examples = rows("jsonl", [PLAIN | {"chosen": [CALLING, RESULT, YES], "tools": [TOOL]}])
    assert examples.counters["examples_with_later_turns"] == 1
    data = tokenize(examples, tokenizer, max_length=9999, template=str(FOLDER / "qwen2_5.jinja"))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>\n'
    result = "<|im_start|>user\n<tool_response>\n21 degrees\n</tool_response><|im_end|>\n"
    assert scored_text(tokenizer, data) == f"{call}{result}<|im_start|>assistant\nyes, warm<|im_end|>\n"
    assert data.counters["messages_not_rendered"] == 0


def test_score_all_scores_calls_but_not_their_results(tokenizers):
    tokenizer = tokenizers(*ENDS["qwen2_5"])
    data = tokenized(tokenizer, "qwen2_5", [USER, CALLING, RESULT], [YES], tools=[TOOL], score="all")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>\n'
    assert scored_text(tokenizer, data) == f"{call}yes, warm<|im_end|>\n"


def test_a_template_for_tools_takes_over_where_there_are_tools(tmp_path, tokenizers):
    folder = tmp_path / "tokenizer"
    tokenizers(None, "<|im_end|>").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}plain {{ m.content }} {% endfor %}")
    (folder / "additional_chat_templates").mkdir()
    other = "{{ tools[0].function.name }} {% for m in messages %}tooled {{ m.content }} {% endfor %}"
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(other)
    tokenizer = load_tokenizer(folder)
    texts = {}
    for name, tools in {"with": [TOOL], "without": None}.items():
        data = tokenize(examples_of(([USER], [YES]), tools=tools), tokenizer, max_length=999)
        texts[name] = tokenizer.decode(data.tokens)
    assert texts["without"] == "plain warm in Bern? plain yes, warm "
    assert texts["with"] == "weather tooled warm in Bern? tooled yes, warm "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "{"}, "`tools` is text but not JSON"),
        ({"tools": {"name": "x"}}, "needed a list of JSON schemas"),
        ({"tools": ["x"]}, "needed a list of JSON schemas"),
        ({"tools": [{"name": "\ud800"}]}, "`tools` holds half a surrogate pair"),
        ({"chat_template_kwargs": [1]}, "needed an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize', which is not for the data to set"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}, "`tools` beside text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "chat_template_kwargs": {"x": 1}}, "_kwargs` beside text"),
        ({"prompt": [USER | {"tool_calls": [CALL]}]}, "only the assistant calls tools"),
        ({"prompt": [USER, CALLING | {"tool_calls": "x"}, RESULT]}, "needed a list of calls"),
        ({"prompt": [USER, CALLING | {"tool_calls": [{"id": "x"}]}, RESULT]}, "needed a call with a `function`"),
        (
            {"prompt": [USER, {"role": "assistant", "tool_calls": [{"name": "x", "arguments": "{"}]}, RESULT]},
            r"tool_calls\[0\].arguments` is text but not JSON",
        ),
        (
            {"prompt": [USER, {"role": "assistant", "tool_calls": [{"name": "x", "arguments": "[1]"}]}, RESULT]},
            r"tool_calls\[0\].arguments` is list \[1\], needed an object",
        ),
        ({"tools": "[" * 100_000}, "`tools` is text but not JSON"),
        ({"tools": "a\nb"}, "`tools` is text but not JSON"),
        ({"prompt": [USER, {"role": "assistant"}, RESULT]}, "missing as `content`"),
        ({"prompt": [USER, YES, RESULT | {"tool_call_id": 3}]}, "int 3 as `tool_call_id`"),
        ({"chosen": [{"role": "assistant", "content": " "}]}, "`chosen` is empty"),
    ],
)
def test_tools_and_messages_that_cannot_be_used_are_bad_rows(rows, change, message):
    with pytest.raises(UserError, match=message) as error:
        rows("jsonl", [PLAIN | change])
    assert "\n" not in str(error.value)


def test_fields_of_messages_that_are_not_used_are_named(rows):
    row = PLAIN | {"prompt": [USER | {"mood": "good", "name": "Ann"}]}
    assert rows("jsonl", [row]).notices == ["columns not used: prompt[].mood"]
