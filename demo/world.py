"""The demo's world: film reviews from a small grammar, a reward that is known, a tokenizer, a model yet to be trained.

It follows the controlled-sentiment experiment of the DPO paper (section 6 of https://arxiv.org/abs/2305.18290), which
has IMDb's reviews and a classifier of sentiment. Here a review begins with a neutral sentence, the prompt, and goes on
with opinions that agree more or less with each other; the reward is what the words of that response are worth. All of
it is drawn from a seed, so that the world is the same on every machine.
"""

import json
import pathlib
import random
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

Row = dict[str, Any]

REVIEWS = 5_120  # to learn the language from
PROMPTS = 1_024  # to make preference pairs from
HELD_OUT = 256  # further prompts, which nothing is trained on
VOCABULARY = 768  # tokens: bytes, words, pieces of words, and two special ones
BOS, EOS = "<bos>", "<eos>"

# What a word is worth: the lexicon of the reward. All other words are worth nothing.
VALENCE = {
    3: "wonderful superb brilliant loved masterpiece",
    2: "lovely moving clever charming enjoyed delight",
    1: "pleasant decent neat liked",
    -1: "slow odd thin doubted",
    -2: "dull clumsy tired dreary disliked letdown",
    -3: "awful dreadful hopeless hated disaster",
}
WORTH = {word: value for value, words in VALENCE.items() for word in words.split()}

# The grammar: a name in braces becomes one of its alternatives.
GRAMMAR = {
    "prompt": ["{opener} {kind} {tells} {hero} {who} {what}."],
    "opener": ["This", "The new", "Her first", "His second", "Their latest", "The long awaited"],
    "kind": ["film", "drama", "comedy", "thriller", "western", "musical"],
    "tells": ["follows", "is about", "tells of", "begins with", "looks at"],
    "hero": ["a sailor", "a young doctor", "two sisters", "an old teacher", "a lost dog", "three thieves", "a painter",
             "a farmer", "a retired spy", "the last king", "a shy student", "a piano player"],
    "who": ["who must", "trying to", "about to", "asked to", "hoping to"],
    "what": ["cross the desert", "save the harbour", "find a brother", "leave the city", "win a small race",
             "sell the family house", "write one more song", "return a stolen ring", "learn to cook", "keep a secret",
             "rob a quiet bank", "move to the coast"],
    "response": ["{part}{part}{end}", "{part}{part}{part}{end}"],
    "part": [" The {thing} is {adjective}.", " The {thing} is {adjective} and the {thing} is {adjective}.",
             " I {verb} the {thing}.", " I {verb} the {thing} because it is {adjective}.",
             " With such {adjective} {things}, one {stays} to the end.", " {somebody} {verb} the {adjective} {thing}."],
    "thing": ["story", "acting", "music", "ending", "camera work", "dialogue", "second half", "main role"],
    "things": ["songs", "jokes", "scenes", "costumes", "pictures"],
    "somebody": ["My friend", "My father", "The woman beside me", "The whole audience"],
    "stays": ["stays", "listens", "waits"],
    "end": [" In short, a {noun}.", " I saw it on a {day}.", " It is a {noun} of two hours.", " We went home by bus.",
            " It was a {noun} for all of us."],
    "day": ["Sunday", "rainy Monday", "warm evening", "free afternoon"],
}  # fmt: skip
# Alternatives of these depend on the mood of the review: words worth something, and words that are not.
OPINIONS = {
    "adjective": {
        "good": "wonderful superb brilliant lovely moving clever charming pleasant decent neat",
        "neutral": "long quiet familiar simple modern serious",
        "bad": "awful dreadful hopeless dull clumsy tired dreary slow odd thin",
    },
    "verb": {"good": "loved enjoyed liked", "neutral": "watched noticed followed", "bad": "hated disliked doubted"},
    "noun": {"good": "masterpiece delight", "neutral": "puzzle mystery", "bad": "disaster letdown"},
}
# How often an opinion is good, neutral and bad, by mood.
MOODS = {"happy": (0.7, 0.2, 0.1), "mixed": (0.3, 0.4, 0.3), "angry": (0.1, 0.2, 0.7)}


def reward(response: str) -> float:
    """Ten times the mean worth of a response's words; 0 without any."""
    words = re.findall(r"[a-z]+", response.lower())
    return 10 * sum(WORTH.get(word, 0) for word in words) / max(len(words), 1)


def write(symbol: str, mood: str, draw: random.Random, said: set[str] | None = None) -> str:
    """Expands a symbol of the grammar in a mood; nothing is `said` twice."""
    said = set() if said is None else said
    alternatives = GRAMMAR.get(symbol) or draw.choices(list(OPINIONS[symbol].values()), MOODS[mood])[0].split()
    text = draw.choice([text for text in alternatives if text not in said])
    said.add(text)
    return re.sub(r"{(\w+)}", lambda match: write(match[1], mood, draw, said), text)


def preferences(samples: Iterable[Row]) -> list[Row]:
    """Pairs of the best and the worst response to each prompt; none where all are worth the same.

    Args:
        samples: `prompt` and `response`; several a prompt.
    """
    responses: dict[str, list[str]] = {}
    for row in samples:
        if row["response"].strip():
            responses.setdefault(row["prompt"], []).append(row["response"])
    pairs = [(prompt, max(texts, key=reward), min(texts, key=reward)) for prompt, texts in responses.items()]
    return [
        {"prompt": prompt, "chosen": best, "rejected": worst}
        for prompt, best, worst in pairs
        if reward(best) > reward(worst)
    ]


def ended(samples: Iterable[Row]) -> list[Row]:
    """Samples that came to their end, as `chosen`, so that their log-ratios can be had; `rejected` stands in."""
    return [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": " ."}
        for row in samples
        if row["finished"] and row["response"].strip(" .")
    ]


def make(folder: pathlib.Path, *, seed: int = 0) -> None:
    """Writes the world: reviews.jsonl, prompts.jsonl, held_out.jsonl, and model/, a model directory without weights.

    The held-out prompts are the last of prompts.jsonl.

    Args:
        folder: Where to; made if needed.
        seed: Of every draw.
    """
    draw = random.Random(seed)
    prompts: dict[str, None] = {}  # in order of appearance, none twice: what is held out was never seen
    while len(prompts) < REVIEWS + PROMPTS + HELD_OUT:
        prompts[write("prompt", "mixed", draw)] = None
    rows = [{"prompt": prompt} for prompt in prompts]
    reviews = [row | {"response": write("response", draw.choice(list(MOODS)), draw)} for row in rows[:REVIEWS]]
    write_rows(folder / "reviews.jsonl", reviews)
    write_rows(folder / "prompts.jsonl", rows[REVIEWS:])
    write_rows(folder / "held_out.jsonl", rows[-HELD_OUT:])
    make_model(folder / "model", [row["prompt"] + row["response"] for row in reviews])


def make_model(folder: pathlib.Path, texts: Iterable[str], **changes: int) -> None:
    """Writes a Hugging Face model directory without weights: a small Llama and a byte-level BPE trained on texts.

    Args:
        folder: Where to; made if needed.
        texts: What the tokenizer is trained on.
        **changes: To the architecture, under the names of a config.json.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos = (tokenizer.token_to_id(token) for token in (BOS, EOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    architecture = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": bos,
        "eos_token_id": eos,
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "config.json").write_text(json.dumps(architecture, indent=2))


def read_rows(file: pathlib.Path) -> list[Row]:
    """Reads a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(file: pathlib.Path, rows: Iterable[Row]) -> None:
    """Writes a JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
