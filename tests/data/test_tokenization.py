import datetime
import gzip
import itertools
import json
import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from daajax.data.sources import BadRows, Example, Examples, read
from daajax.data.tokenization import tokenize
from daajax.data.tokenizer import check_vocabulary, load_tokenizer
from daajax.data.tokens import Ids, array_digest, summary
from daajax.errors import UserError

WORDS = "the cat sat on a red mat and saw dogs run far away; why? because it could. été 東京 🙂"
CORPUS = [" ".join(random.Random(seed).choices(WORDS.split(), k=30)) + "\n\n" for seed in range(60)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "why the cat?"}
YES = {"role": "assistant", "content": "because it sat."}
NO = {"role": "assistant", "content": "a dog saw it."}


def save(folder, backend, **config):
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level(folder, *, use_regex=True, corpus=CORPUS, specials=("<|end|>",), **config):
    """Like GPT-2: bytes, spaces before words, no BOS. Without the regex its tokens reach across words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(corpus, trainer)
    return save(folder, backend, **{"eos_token": "<|end|>"} | config)


def llama_like(folder, *, template="<s> $A", specials=("<unk>", "<s>", "</s>"), **config):
    """Like Llama 2: "▁" before the text and for spaces, BOS from a post-processor."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(specials))
    backend.train_from_iterator([word for line in CORPUS for word in line.split(" ")], trainer)
    ids = [(token, backend.token_to_id(token)) for token in specials[1:3]]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return save(folder, backend, **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config)


KINDS = {
    "byte_level": byte_level,
    "crossing": lambda folder: byte_level(folder, use_regex=False),
    "llama_like": llama_like,
    "adds_eos": lambda folder: llama_like(folder, template="<s> $A </s>"),
    "no_bos": lambda folder: llama_like(folder, template="$A", bos_token=None),
    "bos_is_eos": lambda folder: llama_like(folder, eos_token="<s>"),
    "chatml": lambda folder: byte_level(folder, specials=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>"),
}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: load_tokenizer(make(folder / name)) for name, make in KINDS.items()}


@pytest.fixture(scope="session")
def assets():
    folder = os.environ.get("DAAJAX_ASSETS")
    if not folder:
        pytest.skip("DAAJAX_ASSETS names no folder of real data")
    return Path(folder)


def examples_of(*rows, tolerated=0, **fields):
    """Examples of (prompt, response, …) tuples."""
    made = [Example(row[0], tuple(row[1:]), id=f"id{i}", location=f"f:{i}", **fields) for i, row in enumerate(rows)]
    return Examples(made, bad_rows=BadRows(tolerated))


def parts_of(data, example=0):
    """The token ids of prompt and responses, as lists."""
    edges = data.starts[example] + np.cumsum([0, *data.lengths[example]])
    return [data.tokens[begin:end].tolist() for begin, end in itertools.pairwise(edges)]


def scores_of(data, example=0):
    edges = data.starts[example] + np.cumsum([0, *data.lengths[example]])
    return [data.scored[begin:end].tolist() for begin, end in itertools.pairwise(edges)]


def slow_sequence(tokenizer, prompt, response):
    """A text response tokenized and marked one token at a time, by the rule as it is written."""
    encoded = tokenizer(prompt + response, return_offsets_mapping=True)
    ids, scored = [], []
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids.append(token)
        scored.append(end > len(prompt))
    while not scored[-1] and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:  # added by the tokenizer
        del ids[-1], scored[-1]
    ids.append(tokenizer.eos_token_id)
    scored.append(True)
    scored[0] = False
    return ids, scored


def slow_example(tokenizer, prompt, responses):
    sequences = [slow_sequence(tokenizer, prompt, response) for response in responses]
    shared = 0
    while all(not scored[shared] and ids[shared] == sequences[0][0][shared] for ids, scored in sequences):
        shared += 1
    return [sequences[0][0][:shared], *(ids[shared:] for ids, _ in sequences)], [
        [False] * shared,
        *(scored[shared:] for _, scored in sequences),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_scores_equal_a_loop_over_offsets(tokenizers, kind):
    draw = random.Random(kind)
    rows = []
    for _ in range(60):
        text = draw.choice(CORPUS)
        start = draw.randrange(0, 20)
        end = draw.randrange(start, 40) if draw.random() < 0.9 else start
        rows.append((text[start:end], text[end:80], draw.choice(CORPUS)[draw.randrange(5) : 50]))
    data = tokenize(examples_of(*rows), tokenizers[kind], max_length=1000)
    assert data.lengths.shape == (60, 3)
    for place, (prompt, *responses) in enumerate(rows):
        tokens, scored = slow_example(tokenizers[kind], prompt, responses)
        assert parts_of(data, place) == tokens
        assert scores_of(data, place) == scored


def test_arrays_have_the_promised_types_and_agree_with_each_other(tokenizers):
    data = tokenize(
        examples_of(("the cat", " sat", " saw"), ("a", " mat", " dog"), weight=0.5),
        tokenizers["llama_like"],
        max_length=99,
    )
    assert (data.tokens.dtype, data.scored.dtype, data.starts.dtype) == (np.int32, bool, np.int64)
    assert (data.lengths.dtype, data.weights.dtype) == (np.int32, np.float32)
    assert data.starts.tolist() == [0, *np.cumsum(data.lengths.sum(1))]
    assert data.starts[-1] == len(data.tokens) == len(data.scored)
    assert data.weights.tolist() == [0.5, 0.5]
    assert list(data.ids) == ["id0", "id1"]
    assert data.counters["scored_tokens"] == data.scored.sum()


def test_scored_lengths_count_each_response(tokenizers):
    rows = [("the cat", " sat", " saw a dog"), ("a", " mat")]
    data = tokenize(examples_of(*rows), tokenizers["byte_level"], max_length=99)
    want = [[sum(part) for part in scores_of(data, place)[1:]] for place in range(2)]
    assert data.scored_lengths().tolist() == want
    assert want[1][1] == 0


def test_a_straddling_token_is_scored_in_every_branch_and_counted(tmp_path):
    # Merges only ever made of the whole word: "ab" + "cd" is one token, whatever the boundary inside it.
    tokenizer = load_tokenizer(byte_level(tmp_path, use_regex=False, corpus=["abcd"] * 50))
    data = tokenize(examples_of(("x ab", "cd", "zz")), tokenizer, max_length=99)
    prompt, chosen, rejected = parts_of(data)
    assert tokenizer.decode(prompt) == "x "
    assert tokenizer.convert_ids_to_tokens(chosen) == ["abcd", "<|end|>"]
    assert scores_of(data)[1] == [True, True]
    # The other branch has the prompt's own tokens there: unscored, and not shared.
    assert tokenizer.decode(rejected) == "abzz<|end|>"
    unscored = scores_of(data)[2].count(False)
    assert tokenizer.decode(rejected[:unscored]) == "ab"
    assert data.counters["straddling_tokens"] == 1


def test_a_token_that_ends_in_a_space_after_the_prompt_is_scored(tmp_path):
    # The file asks for offsets without spaces, by which "ab " would end with the prompt.
    tokenizer = load_tokenizer(byte_level(tmp_path, use_regex=False, corpus=["ab "] * 50))
    data = tokenize(examples_of(("xab", " ", " y")), tokenizer, max_length=99)
    assert tokenizer.convert_ids_to_tokens(parts_of(data)[1]) == ["abĠ", "<|end|>"]
    assert scores_of(data)[1] == [True, True]
    assert data.counters["straddling_tokens"] == 2


def test_prompt_and_response_are_tokenized_as_one_string(tokenizers):
    tokenizer = tokenizers["llama_like"]
    prompt, chosen, _ = parts_of(tokenize(examples_of(("the cat", "sat", "s")), tokenizer, max_length=99))
    assert prompt + chosen == [*tokenizer("the catsat")["input_ids"], tokenizer.eos_token_id]
    alone = tokenizer("sat")["input_ids"][1:]
    assert chosen[:-1] != alone  # by itself it would begin with a "▁" that is not there


@pytest.mark.parametrize("kind", KINDS)
def test_text_has_exactly_one_eos_scored_and_at_most_one_bos(tokenizers, kind):
    tokenizer = tokenizers[kind]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    data = tokenize(examples_of(("the cat", " sat", " saw"), ("", "the mat", "a dog")), tokenizer, max_length=99)
    for place in range(2):
        prompt, *responses = parts_of(data, place)
        for response, scored in zip(responses, scores_of(data, place)[1:], strict=True):
            whole = prompt + response
            assert whole[-1] == eos
            assert scored[-1]
            assert whole[1:].count(eos) == 1
            assert whole.count(bos) == (bos is not None) + (bos == eos)


@pytest.mark.parametrize("kind", ["llama_like", "adds_eos", "bos_is_eos"])
@pytest.mark.parametrize("prompt", ["the cat", ""])
def test_a_text_that_begins_with_bos_does_not_get_two(tokenizers, kind, prompt):
    tokenizer = tokenizers[kind]
    rows = [("<s>" + prompt, " sat", " saw")] if prompt else [("", "<s>the sat", "<s>the saw")]
    data = tokenize(examples_of(*rows), tokenizer, max_length=99)
    sequence = parts_of(data)[0] + parts_of(data)[1]
    assert sequence[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in sequence[1:-1]
    assert scores_of(data)[0][:1] == [False]
    assert data.counters["double_bos_removed"] == 2
    plain = tokenize(examples_of((prompt, " sat" if prompt else "the sat", " saw")), tokenizer, max_length=99)
    assert tokenizer.decode(sequence, skip_special_tokens=True) == tokenizer.decode(
        parts_of(plain)[0] + parts_of(plain)[1], skip_special_tokens=True
    )


@pytest.mark.parametrize("ending", ["</s>", "</s></s>"])
def test_a_text_that_ends_with_eos_does_not_get_two(tokenizers, ending):
    tokenizer = tokenizers["llama_like"]
    data = tokenize(examples_of(("the cat", " sat" + ending, " saw")), tokenizer, max_length=99)
    plain = tokenize(examples_of(("the cat", " sat", " saw")), tokenizer, max_length=99)
    assert data.digest == plain.digest
    assert data.counters["eos_in_text"] == 1


def test_an_empty_prompt_leaves_bos_alone_as_the_shared_prompt(tokenizers):
    tokenizer = tokenizers["bos_is_eos"]
    data = tokenize(examples_of(("", "the cat", "the mat")), tokenizer, max_length=99)
    assert parts_of(data)[0] == [tokenizer.bos_token_id]
    assert scores_of(data)[1] == [True] * data.lengths[0, 1]
    assert data.counters["unscored_first_tokens"] == 0


def test_without_bos_the_first_token_of_an_empty_prompt_is_not_scored_and_counted(tokenizers):
    tokenizer = tokenizers["byte_level"]
    data = tokenize(examples_of(("", "the cat sat", "red mat"), ("", "the cat", "the mat")), tokenizer, max_length=99)
    assert parts_of(data, 0)[0] == []  # the responses begin otherwise, so nothing is shared
    for scored in scores_of(data, 0)[1:]:
        assert scored[0] is False
        assert all(scored[1:])
    assert tokenizer.decode(parts_of(data, 1)[0]) == "the"  # unscored in both and equal: it is their prompt
    assert data.counters["unscored_first_tokens"] == 4


def test_prompts_that_differ_at_their_end_are_shared_up_to_there(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path, use_regex=False, corpus=["abcd"] * 50))
    rows = [("x ab", "cd", "cd!", "zz")]
    prompt, *responses = parts_of(tokenize(examples_of(*rows), tokenizer, max_length=99))
    assert tokenizer.decode(prompt) == "x "
    assert [tokenizer.decode(response[:-1]) for response in responses] == ["abcd", "abcd!", "abzz"]


def test_a_file_may_ask_for_truncation_and_padding_and_gets_neither(tmp_path):
    folder = llama_like(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = tokenize(examples_of((CORPUS[0], CORPUS[1], "a")), load_tokenizer(folder), max_length=999)
    backend.enable_truncation(8)
    backend.enable_padding(length=300)
    backend.save(str(folder / "tokenizer.json"))
    data = tokenize(examples_of((CORPUS[0], CORPUS[1], "a")), load_tokenizer(folder), max_length=999)
    assert data.digest == plain.digest


# Chat


def test_chat_is_rendered_whole_and_ends_as_its_template_ends(tokenizers):
    tokenizer = tokenizers["chatml"]
    data = tokenize(examples_of(([USER], [YES], [NO])), tokenizer, max_length=999, template=CHATML)
    prompt, chosen, rejected = parts_of(data)
    header = "<|im_start|>user\nwhy the cat?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt) == header
    assert tokenizer.decode(chosen) == "because it sat.<|im_end|>\n"
    assert tokenizer.decode(rejected) == "a dog saw it.<|im_end|>\n"
    assert all(scores_of(data)[1])
    whole = tokenizer.apply_chat_template([USER, YES], chat_template=CHATML, tokenize=False)
    assert prompt + chosen == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_chat_template_that_writes_bos_gives_one(tokenizers):
    tokenizer = tokenizers["adds_eos"]
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant {% endif %}"
    data = tokenize(examples_of(([USER], [YES], [NO])), tokenizer, max_length=999, template=template)
    prompt, chosen, _ = parts_of(data)
    assert prompt[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in prompt[1:] + chosen
    assert tokenizer.eos_token_id not in prompt + chosen  # the template ends without one


def test_a_default_system_prompt_is_rendered_once(tokenizers):
    template = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}" + CHATML
    tokenizer = tokenizers["chatml"]
    prompt, chosen, _ = parts_of(
        tokenize(examples_of(([USER], [YES], [NO])), tokenizer, max_length=999, template=template)
    )
    assert tokenizer.decode(prompt).count("be kind") == 1
    assert "be kind" not in tokenizer.decode(chosen)


def test_text_and_chat_rows_mix_and_so_do_numbers_of_responses(tokenizers):
    rows = [("the cat", " sat", " saw"), ([USER], [YES], [NO]), ("a", " mat")]
    data = tokenize(examples_of(*rows), tokenizers["chatml"], max_length=999, template=CHATML)
    for place, row in enumerate(rows):
        alone = tokenize(
            examples_of(row), tokenizers["chatml"], max_length=999, template=CHATML if place == 1 else None
        )
        assert parts_of(data, place)[: len(row)] == parts_of(alone)
    assert data.lengths[2, 2] == 0


def test_a_template_may_be_a_file(tokenizers, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    rows = examples_of(([USER], [YES], [NO]))
    by_path = tokenize(rows, tokenizers["chatml"], max_length=999, template=str(tmp_path / "chat.jinja"))
    assert by_path.digest == tokenize(rows, tokenizers["chatml"], max_length=999, template=CHATML).digest


def test_the_tokenizers_own_template_is_the_default(tmp_path):
    folder = byte_level(tmp_path, specials=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(folder)
    rows = examples_of(([USER], [YES], [NO]))
    own = tokenize(rows, tokenizer, max_length=999)
    assert own.digest == tokenize(rows, tokenizer, max_length=999, template=CHATML).digest


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no .default. chat template"),
        ("nowhere.jinja", "cannot be read"),
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ strftime_now(now) }}", "today's date"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizers, template, message):
    with pytest.raises(UserError, match=message):
        tokenize(examples_of(([USER], [YES])), tokenizers["chatml"], max_length=99, template=template)


UNSTABLE = CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] if not loop.last or m['role'] == 'assistant' else 'x' }}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (UNSTABLE, "renders the first 1 message.s. otherwise when more follow"),
        ("{{ raise_exception('roles must alternate') }}", "cannot render it: TemplateError: roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "cannot render it: TypeError"),
        ("{{ messages[0].__class__.__mro__ }}", "cannot render it: SecurityError"),
        ("{{ '' }}", "renders the first 1 message.s. otherwise"),
    ],
)
def test_rows_that_the_template_cannot_render_are_bad_rows(tokenizers, template, message):
    rows = [("the", " cat", " dog"), ([USER], [YES], [NO])]
    options = {"max_length": 999, "template": template}
    with pytest.raises(UserError, match=rf"^f:1: .*{message}"):
        tokenize(examples_of(*rows), tokenizers["chatml"], **options)
    data = tokenize(examples_of(*rows, tolerated=1), tokenizers["chatml"], **options)
    assert (data.counters["bad_rows"], data.counters["examples_kept"]) == (1, 1)
    assert any(notice.startswith("bad row skipped: f:1: ") for notice in data.notices)


def test_bad_rows_of_reading_and_of_tokenizing_share_one_account(tokenizers, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ["{", json.dumps({"prompt": "a", "response": "b"}), json.dumps({"messages": [USER, YES]})]
    path.write_text("\n".join(rows))
    options = {"max_length": 99, "template": "{{ raise_exception('no') }}"}
    data = tokenize(read("jsonl", path, max_bad_rows=2), tokenizers["chatml"], **options)
    assert data.counters["bad_rows"] == 2
    assert len([notice for notice in data.notices if notice.startswith("bad row skipped")]) == 2
    examples = read("jsonl", path, max_bad_rows=1)
    for _ in range(2):  # tokenizing leaves the account of reading as it was
        with pytest.raises(UserError, match=rf"^{path}:1: .* 2 bad row"):
            tokenize(examples, tokenizers["chatml"], **options)


def test_a_template_that_prints_the_date_gets_the_same_one_every_day(tokenizers):
    dated = "{% set today = strftime_now('%d %b %Y') %}{{ today }} " + CHATML
    data = tokenize(examples_of(([USER], [YES])), tokenizers["chatml"], max_length=999, template=dated)
    text = tokenizers["chatml"].decode(parts_of(data)[0])
    assert text.startswith("26 Jul 2024 ")
    assert datetime.date.today().strftime("%d %b %Y") not in text
    assert any("2024-07-26" in notice for notice in data.notices)


def test_a_template_that_is_not_used_is_said_so(tokenizers):
    data = tokenize(examples_of(("a", " b")), tokenizers["chatml"], max_length=99, template=CHATML)
    assert data.notices == ["chat.template is not used: the data hold no chat messages"]


def test_score_all_scores_what_the_assistant_wrote_and_nothing_else(tokenizers):
    tokenizer = tokenizers["chatml"]
    more = {"role": "user", "content": "and the mat?"}
    row = ([USER, NO, more], [YES])
    data = tokenize(examples_of(row), tokenizer, max_length=999, template=CHATML, score="all")
    assert tokenizer.decode(data.tokens[data.scored]) == "a dog saw it.<|im_end|>\nbecause it sat.<|im_end|>\n"
    last = tokenize(examples_of(row), tokenizer, max_length=999, template=CHATML)
    assert last.tokens.tolist() == data.tokens.tolist()
    # The earlier turn belongs to the response, not to the shared prompt.
    assert tokenizer.decode(parts_of(data)[0]) == "<|im_start|>user\nwhy the cat?<|im_end|>\n<|im_start|>assistant\n"


def test_score_all_refuses_pairs_and_text(tokenizers):
    options = {"max_length": 99, "template": CHATML, "score": "all"}
    with pytest.raises(UserError, match="one response"):
        tokenize(examples_of(([USER], [YES], [NO])), tokenizers["chatml"], **options)
    with pytest.raises(UserError, match="text only"):
        tokenize(examples_of(("a", " b")), tokenizers["chatml"], max_length=99, score="all")
    with pytest.raises(UserError, match=r"chat\.score='first'"):
        tokenize(examples_of(("a", " b")), tokenizers["chatml"], max_length=99, score="first")


def test_score_all_refuses_a_template_that_forgets_earlier_turns(tokenizers):
    forgetful = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '' }}")
    with pytest.raises(UserError, match="otherwise when more follow"):
        tokenize(
            examples_of(([USER, NO, USER], [YES])), tokenizers["chatml"], max_length=99, template=forgetful, score="all"
        )


# Truncation: one token a letter, BOS first, so that lengths can be counted by eye.


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    backend = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1} | {chr(97 + i): i + 2 for i in range(26)}, unk_token="z")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = save(tmp_path_factory.mktemp("letters"), backend, bos_token="<s>", eos_token="</s>")
    return load_tokenizer(folder)


def spelled(tokenizer, data, example=0):
    return ["".join(tokenizer.convert_ids_to_tokens(part)) for part in parts_of(data, example)]


@pytest.mark.parametrize(
    ("limits", "want"),
    [
        ({"max_length": 20}, ["<s>abcd", "efgh</s>", "ij</s>"]),
        ({"max_length": 10}, ["<s>abcd", "efgh</s>", "ij</s>"]),
        ({"max_length": 9}, ["<s>abcd", "efgh", "ij</s>"]),
        ({"max_length": 6}, ["<s>abcd", "e", "i"]),
        ({"max_length": 20, "max_prompt_length": 4}, ["<s>abcd", "efgh</s>", "ij</s>"]),
        ({"max_length": 20, "max_prompt_length": 3}, ["<s>bcd", "efgh</s>", "ij</s>"]),
        ({"max_length": 5, "max_prompt_length": 3}, ["<s>bcd", "e", "i"]),
        ({"max_length": 5, "max_prompt_length": 1}, ["<s>d", "efg", "ij</s>"]),
    ],
)
def test_prompts_lose_their_beginning_and_responses_their_end(letters, limits, want):
    data = tokenize(examples_of(("abcd", "efgh", "ij")), letters, **limits)
    assert spelled(letters, data) == want
    assert data.counters["truncated_prompts"] == (want[0] != "<s>abcd")
    assert data.counters["truncated_chosen"] == (want[1] != "efgh</s>")
    assert data.counters["truncated_rejected"] == (want[2] != "ij</s>")
    assert data.counters["eos_kept"] == "".join(want).count("</s>")


@pytest.mark.parametrize("limits", [{"max_length": 5}, {"max_length": 2}, {"max_length": 4, "max_prompt_length": 3}])
def test_an_example_whose_prompt_fills_the_length_is_dropped_and_counted(letters, limits):
    data = tokenize(examples_of(("abcd", "e", "f"), ("", "e", "f")), letters, **limits)
    assert list(data.ids) == ["id1"]
    assert data.counters["dropped_prompt_too_long"] == 1
    assert data.counters["truncated_prompts"] == data.counters["straddling_tokens"] == 0


@pytest.mark.parametrize("limits", [{"max_length": 7}, {"max_length": 9, "max_prompt_length": 3}])
def test_drop_drops_what_truncate_would_cut(letters, limits):
    rows = [("abcd", "ef", "gh"), ("abcd", "efg", "h"), ("abc", "e", "f")]
    cut = tokenize(examples_of(*rows), letters, **limits)
    dropped = tokenize(examples_of(*rows), letters, truncation="drop", **limits)
    whole = [
        place
        for place, row in enumerate(rows)
        if spelled(letters, cut, place) == ["<s>" + row[0], row[1] + "</s>", row[2] + "</s>"]
    ]
    assert list(dropped.ids) == [f"id{place}" for place in whole] == ["id2"]
    assert dropped.counters["dropped_too_long"] == 2
    assert dropped.counters["eos_kept"] == 2


def test_responses_that_truncation_makes_equal_are_kept_and_counted(letters):
    data = tokenize(examples_of(("ab", "cde", "cdf"), ("ab", "x", "y")), letters, max_length=5)
    assert spelled(letters, data) == ["<s>ab", "cd", "cd"]
    assert data.counters["identical_after_truncation"] == 1


def test_without_bos_a_cut_prompt_keeps_just_its_last_tokens(tokenizers):
    tokenizer = tokenizers["byte_level"]
    row = ("the cat sat on the mat", " and", " far")
    whole = parts_of(tokenize(examples_of(row), tokenizer, max_length=99))
    data = tokenize(examples_of(row), tokenizer, max_length=99, max_prompt_length=3)
    assert parts_of(data) == [whole[0][-3:], *whole[1:]]


@pytest.mark.parametrize("responses", [1, 3])
def test_counters_name_each_response(letters, responses):
    data = tokenize(examples_of(("a", "bcdef", "b", "cdefgh")[: responses + 1]), letters, max_length=4)
    want = {
        1: {"truncated_response": 1},
        3: {"truncated_response_1": 1, "truncated_response_2": 0, "truncated_response_3": 1},
    }
    named = {name: count for name, count in data.counters.items() if name.startswith("truncated_response")}
    assert named == want[responses]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": True}, "max_length=True"),
        ({"max_length": 8, "max_prompt_length": 0}, "max_prompt_length=0"),
        ({"max_length": 8, "max_prompt_length": 8}, "no room for a response"),
        ({"max_length": 8, "truncation": "keep_end"}, r"data\.truncation='keep_end'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(letters, options, message):
    with pytest.raises(UserError, match=message):
        tokenize(examples_of(("a", "b", "c")), letters, **options)


def test_when_nothing_is_left_the_error_says_what_to_do(letters):
    with pytest.raises(UserError, match=r"none of 1 examples is left: 1 .* raise max_length"):
        tokenize(examples_of(("abcdef", "b", "c")), letters, max_length=4)


def test_a_response_that_is_nothing_to_the_tokenizer_is_a_bad_row(tmp_path):
    backend = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))  # without an unknown token, other text vanishes
    tokenizer = load_tokenizer(save(tmp_path, backend, eos_token="</s>"))
    with pytest.raises(UserError, match=r"^f:0: a response holds nothing"):
        tokenize(examples_of(("a", "a", "b")), tokenizer, max_length=9)


def test_a_tokenizer_that_fails_is_a_clear_error(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    tokenizer = load_tokenizer(save(tmp_path, backend, eos_token="</s>"))
    with pytest.raises(UserError, match=r"cannot encode the data .*UNK"):
        tokenize(examples_of(("a", "b")), tokenizer, max_length=9)


def test_the_summary_says_what_happened_and_only_that(letters):
    rows = [("ab", "cde", "cdf"), ("abcdefgh", "c", "d"), ("ab", "x", "y")]
    lines = summary(tokenize(examples_of(*rows), letters, max_length=5).counters)
    assert lines == [
        "2 of 3 examples kept",
        "6 tokens of prompts, 8 of responses, 8 scored",
        "1 examples dropped: the prompt leaves no room for a response",
        "1 examples with equal responses after tokenization and truncation: kept",
        "responses cut at max_length: 1 chosen, 1 rejected; 2 kept their end",
    ]


def test_the_digest_follows_the_content(letters):
    base = tokenize(examples_of(("ab", "c", "d")), letters, max_length=9)
    assert tokenize(examples_of(("ab", "c", "d")), letters, max_length=8).digest == base.digest
    assert tokenize(examples_of(("ab", "c", "e")), letters, max_length=9).digest != base.digest
    assert tokenize(examples_of(("ab", "c", "d"), weight=2.0), letters, max_length=9).digest != base.digest
    # The same tokens, divided otherwise.
    assert tokenize(examples_of(("a", "bc", "bd")), letters, max_length=9).digest != base.digest


def test_array_digests_tell_types_and_shapes_apart():
    arrays = [np.zeros(4, np.int32), np.zeros(2, np.int64), np.zeros((2, 2), np.int32), np.zeros(4, np.float32)]
    assert len({array_digest(array) for array in arrays}) == 4


def test_ids_of_any_length_survive():
    ids = Ids.of(["a", "", "東京" * 1000, "b"])
    assert list(ids) == ["a", "", "東京" * 1000, "b"]
    assert ids[-1] == "b"
    assert ids[1:3] == ["", "東京" * 1000]
    with pytest.raises(IndexError):
        ids[4]


# Tokenizers that are refused


def test_loading_a_tokenizer_asks_no_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_tokenizer(llama_like(tmp_path)).eos_token == "</s>"


@pytest.mark.parametrize("path", ["gpt2", "meta-llama/Llama-3.1-8B"])
def test_a_name_on_a_hub_is_no_folder(path):
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(path)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "None"}}'])
def test_a_broken_tokenizer_file_is_refused_in_one_line(tmp_path, content):
    (llama_like(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_its_own_code_is_refused(tmp_path):
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    folder = llama_like(tmp_path, auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    with pytest.raises(UserError, match="auto_map"):
        load_tokenizer(folder)


def test_own_code_named_in_the_models_config_is_refused(tmp_path):
    (llama_like(tmp_path) / "config.json").write_text('{"auto_map": {"AutoTokenizer": "own.Own"}}')
    with pytest.raises(UserError, match="auto_map"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(llama_like(tmp_path, eos_token=None))


def test_a_tokenizer_that_draws_at_random_is_refused(tmp_path):
    folder = llama_like(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="at random"):
        load_tokenizer(folder)


def test_a_vocabulary_larger_than_the_embedding_is_refused(letters):
    check_vocabulary(letters, 28)
    check_vocabulary(letters, 64)
    with pytest.raises(UserError, match="largest id is 27, but the model's vocab_size is 27"):
        check_vocabulary(letters, 27)


# Real data and a real tokenizer


@pytest.fixture(scope="session")
def tiny(assets):
    return load_tokenizer(assets / "tiny_model")


def test_story_ids_are_those_of_the_data(assets, tiny):
    path = assets / "data" / "stories_sentiment.test.jsonl.gz"
    data = tokenize(read("jsonl", path), tiny, max_length=512)
    assert data.counters["examples_kept"] == 500
    with gzip.open(path) as lines:
        for place, line in enumerate(lines):
            row = json.loads(line)
            assert parts_of(data, place) == [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
    assert data.scored.sum() == data.lengths[:, 1:].sum()


def test_golden_lengths_of_stories(assets, tiny):
    golden = (assets / "data" / "golden_logps.stories_test64.jsonl").read_text().splitlines()
    data = tokenize(read("jsonl", assets / "data" / "stories_sentiment.test.jsonl.gz", limit=64), tiny, max_length=512)
    rows = [json.loads(line) for line in golden]
    assert list(data.ids) == [row["id"] for row in rows]
    assert data.lengths.tolist() == [[row["n_prompt"], row["n_chosen"], row["n_rejected"]] for row in rows]


def test_sentences_without_prompt_follow_bos(assets, tiny):
    data = tokenize(read("jsonl", assets / "data" / "blimp.test.jsonl.gz"), tiny, max_length=512)
    assert (data.lengths[:, 0] == 1).all()
    assert (data.tokens[data.starts[:-1]] == tiny.bos_token_id).all()
    assert data.counters["unscored_first_tokens"] == 0


@pytest.mark.parametrize("max_prompt_length", [None, 128])
def test_helpful_pairs_are_cut_as_the_rule_says(assets, tiny, max_prompt_length):
    examples = read("jsonl", assets / "data" / "hh_helpful.test.jsonl.gz", limit=150)
    data = tokenize(examples, tiny, max_length=512, max_prompt_length=max_prompt_length)
    place = 0
    for example in examples.examples:
        (prompt, *responses), _ = slow_example(tiny, example.prompt, example.responses)
        if max_prompt_length:
            prompt = prompt[:1] + prompt[1:][-max_prompt_length:]
        responses = [response[: max(512 - len(prompt), 0)] for response in responses]
        if all(responses):
            assert data.ids[place] == example.id
            assert parts_of(data, place) == [prompt, *responses]
            place += 1
    assert place == len(data.ids) == 150 - data.counters["dropped_prompt_too_long"]


def test_helpful_chats_keep_their_prompt_and_answer(assets, tiny):
    examples = read("jsonl", assets / "data" / "hh_helpful.test.chat.jsonl.gz", limit=50)
    data = tokenize(examples, tiny, max_length=10_000, template=CHATML)
    for place, example in enumerate(examples.examples):
        prompt, chosen, rejected = map(tiny.decode, parts_of(data, place))
        assert prompt.endswith("<|im_start|>assistant\n")
        assert [chosen, rejected] == [r[-1]["content"] + "<|im_end|>\n" for r in example.responses]
