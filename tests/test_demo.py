"""The demo: its world is what it says, its bars are bars, and the whole of it runs."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from daajax.data.tokenizer import load_tokenizer
from daajax.models.families import read_architecture
from daajax.models.parameters import parameter_count
from demo import __main__ as demo
from demo import world
from demo.results import Estimate, Results
from tests import worlds

FILES = ("reviews.jsonl", "prompts.jsonl", "held_out.jsonl")
MODEL_FILES = ("model/config.json", "model/tokenizer.json", "model/tokenizer_config.json")
GOOD = Results(
    accuracy=0.9, before=Estimate(0.0, 0.3), after=Estimate(2.0, 0.4), divergence=Estimate(3.0, 0.1), ended=250
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.make(folder)
    return folder


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (" The acting is wonderful.", 10 * 3 / 4),
        (" I hated the dull music.", 10 * (-3 - 2) / 5),
        (" My friend liked the odd ending. In short, a delight.", 10 * (1 - 1 + 2) / 10),
        (" We went home by bus.", 0.0),
        (" WONDERFUL!", 30.0),
        (" .", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_ten_times_the_mean_worth_of_the_words(response, reward):
    assert world.reward(response) == pytest.approx(reward)


def test_opinions_are_worth_what_their_kind_says_and_all_other_words_nothing():
    signs = {"good": 1, "neutral": 0, "bad": -1}
    words = [(word, signs[kind]) for kinds in world.OPINIONS.values() for kind in kinds for word in kinds[kind].split()]
    assert {word: np.sign(world.WORTH.get(word, 0)) for word, _ in words} == dict(words)
    assert set(world.WORTH) <= {word for word, _ in words}
    for alternatives in world.GRAMMAR.values():
        assert {world.reward(text) for text in alternatives} == {0.0}


def test_reviews_say_nothing_twice_and_are_of_every_mood(made):
    reviews = world.read_rows(made / "reviews.jsonl")
    for row in reviews[:500]:
        words = row["response"].replace(",", " ").replace(".", " ").split()
        opinions = [word for word in words if word in world.WORTH]
        assert len(opinions) == len(set(opinions))
    rewards = np.array([world.reward(row["response"]) for row in reviews])
    # The moods are symmetric, and so is the lexicon but for verbs and adjectives of unequal strength.
    assert abs(rewards.mean()) < 0.2
    assert 0.3 < (rewards > 0.5).mean() < 0.5
    assert 0.3 < (rewards < -0.5).mean() < 0.5


def test_a_world_is_a_function_of_its_seed(made, tmp_path):
    world.make(tmp_path / "same")
    world.make(tmp_path / "other", seed=1)
    for name in (*FILES, *MODEL_FILES):
        assert (tmp_path / "same" / name).read_bytes() == (made / name).read_bytes()
    for name in FILES:
        assert (tmp_path / "other" / name).read_bytes() != (made / name).read_bytes()


def test_no_prompt_occurs_twice_and_held_out_ones_are_the_last(made):
    reviews, prompts, held_out = ([row["prompt"] for row in world.read_rows(made / name)] for name in FILES)
    assert (len(reviews), len(prompts), len(held_out)) == (5120, 1024 + 256, 256)
    assert len({*reviews, *prompts}) == len(reviews) + len(prompts)
    assert prompts[-256:] == held_out


def test_the_tokenizer_knows_the_words_and_gives_any_text_back(made):
    tokenizer = load_tokenizer(made / "model")
    review = world.read_rows(made / "reviews.jsonl")[0]
    for text in (review["prompt"] + review["response"], "Naïve – 映画 🎬\n\ttabs  and spaces "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert max(ids) < world.VOCABULARY
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id not in (None, tokenizer.bos_token_id)
    assert all(len(tokenizer.tokenize(f" {word}")) == 1 for word in world.WORTH)


def test_the_model_is_a_llama_of_more_than_a_million_parameters_without_weights(made):
    architecture = read_architecture(str(made / "model"))
    assert architecture.model_type == "llama"
    assert architecture.num_key_value_heads < architecture.num_attention_heads
    assert parameter_count(architecture) >= 1_000_000
    assert not list((made / "model").glob("*.safetensors"))


def test_preferences_pair_the_best_response_to_a_prompt_with_the_worst():
    responses = {"a": (" dull", " superb", " neat", "  "), "b": (" neat", " pleasant"), "c": (" awful", "")}
    samples = [{"prompt": prompt, "response": text} for prompt, texts in responses.items() for text in texts]
    assert world.preferences(samples) == [{"prompt": "a", "chosen": " superb", "rejected": " dull"}]


def test_what_came_to_its_end_is_scored_against_a_stand_in():
    samples = [
        {"prompt": "a", "response": " z", "finished": True},
        {"prompt": "b", "response": " y", "finished": False},
        {"prompt": "c", "response": " ", "finished": True},
        {"prompt": "d", "response": " .", "finished": True},
    ]
    assert world.ended(samples) == [{"prompt": "a", "chosen": " z", "rejected": " ."}]


def test_an_estimate_has_its_standard_error():
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0])
    assert estimate == (2.5, pytest.approx(math.sqrt((2.25 + 0.25 + 0.25 + 2.25) / 3 / 4)))
    assert str(estimate) == "2.50 ± 0.65"


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"accuracy": 0.80}, []),
        ({"accuracy": 0.799}, ["held-out accuracy is 0.799, needed 0.80"]),
        ({"accuracy": math.nan}, ["held-out accuracy is nan, needed 0.80"]),
        ({"after": Estimate(1.5, 0.4)}, []),  # the error of the difference is 0.5
        ({"after": Estimate(1.45, 0.4)}, ["the reward rose by 2.9 standard errors, needed 3"]),
        ({"after": Estimate(-2.0, 0.4)}, ["the reward rose by -4.0 standard errors, needed 3"]),
        ({"after": Estimate(math.nan, 0.4)}, ["the reward rose by nan standard errors, needed 3"]),
    ],
)
def test_bars_are_missed_in_words(changes, missed):
    assert GOOD._replace(**changes).shortcomings() == missed


def test_the_table_has_every_number():
    table = "\n".join(GOOD.table({"world": 1.4, "language": 58.3}))
    for text in ("0.00 ± 0.30", "2.00 ± 0.40", "+4 standard errors", "0.900", "3.00 ± 0.10", "60 s in all"):
        assert text in table


@pytest.mark.parametrize(("bars", "code"), [(GOOD, 0), (GOOD._replace(accuracy=0.5), 1)], ids=["passed", "missed"])
def test_the_exit_code_says_whether_the_bars_were_passed(capsys, bars, code):
    row = {"prompt": "This film ends.", "response": " I liked it."}
    assert demo.show(bars, {}, [row], [row]) == code
    assert ("Alignment fell short: held-out accuracy is 0.500" in capsys.readouterr().out) == (code == 1)


@pytest.mark.parametrize(
    ("program", "code"), [("raise(SystemExit(42))", 42), ("import·os;os.kill(os.getpid(),9)", 128 + 9)]
)
def test_a_command_that_fails_ends_the_demo_with_its_exit_code(capfd, program, code):
    with pytest.raises(SystemExit) as end:
        demo.run(f"python -c\n    exec('{program}'.replace('·','\\40'))")
    assert end.value.code == code
    printed = capfd.readouterr().out.splitlines()
    assert printed[1].startswith("$ python -c exec(")
    assert printed[-1].startswith("the demo stops here: the command above ended with exit code")


@pytest.mark.slow
@pytest.mark.optimized  # its runs take longer than their compilation
def test_the_demo_aligns_a_model(tmp_path):
    (tmp_path / "configs").symlink_to(worlds.ROOT / "configs")
    result = subprocess.run(
        [sys.executable, "-m", "demo"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(worlds.ROOT), "HOME": str(tmp_path), "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    folder = tmp_path / "runs" / "demo"
    for name in ("world/model/config.json", "sft/model/model.safetensors", "dpo/model/model.safetensors"):
        assert (folder / name).is_file()

    # Every command is printed as it can be typed, and the recipes are the real ones.
    commands = re.findall(r"^\$ python -m (daajax\.\w+) ", result.stdout, re.MULTILINE)
    assert commands == [f"daajax.{name}" for name in ("train", "generate", "train", "evaluate", "generate", "evaluate")]
    assert "--config=configs/sft_llama.py" in result.stdout
    assert "--config=configs/dpo_llama.py" in result.stdout

    # Nothing held out was trained on, and the pairs are labelled by the reward.
    held_out = {row["prompt"] for row in world.read_rows(folder / "world" / "held_out.jsonl")}
    pairs, held_out_pairs = (world.read_rows(folder / name) for name in ("pairs.jsonl", "held_out_pairs.jsonl"))
    assert not held_out & {row["prompt"] for row in pairs}
    assert {row["prompt"] for row in held_out_pairs} <= held_out
    assert all(world.reward(row["chosen"]) > world.reward(row["rejected"]) for row in pairs + held_out_pairs)

    # The table says what the files hold.
    accuracy, comparison = world.read_rows(folder / "dpo" / "evaluations.jsonl")
    shown = rf"^held-out accuracy +- +{accuracy['eval/rewards/accuracies']:.3f} "
    assert re.search(shown, result.stdout, re.MULTILINE)
    rewards = np.array([world.reward(row["response"]) for row in world.read_rows(folder / "after.jsonl")])
    assert len(rewards) == 256
    assert f"{rewards.mean():.2f} ± {rewards.std(ddof=1) / 16:.2f}" in result.stdout
    ratios = np.array([row["log_ratios"][0] for row in world.read_rows(folder / "log_ratios.jsonl")])
    assert f"{ratios.mean():.2f} ± {ratios.std(ddof=1) / math.sqrt(len(ratios)):.2f}" in result.stdout
    beta = json.loads((folder / "dpo" / "config.json").read_text())["loss"]["beta"]
    assert comparison["eval/rewards/chosen"] == pytest.approx(beta * ratios.mean(), rel=1e-5)
    # What it writes is language: nearly every review is of the grammar's words, and ends.
    known = set(re.findall(r"\w+", json.dumps([world.GRAMMAR, world.OPINIONS])))
    after = world.read_rows(folder / "after.jsonl")
    assert np.mean([set(re.findall(r"\w+", row["response"])) <= known for row in after]) > 0.8
    assert np.mean([row["finished"] for row in after]) > 0.9
