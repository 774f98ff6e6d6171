"""Runs that learn: held-out accuracy, real preferences end to end, and the exported model in another program."""

import gzip
import json
import math
import re
import sys

import numpy as np
import pytest

from daajax import inputs, policy, run, sharding
from daajax.config import losses
from daajax.data.sizes import Sizes
from daajax.data.windows import sweep_windows
from daajax.losses.terms import bind
from daajax.models.families import read_architecture
from daajax.reference import examples_of, responses_of
from tests import worlds

pytestmark = pytest.mark.optimized  # runs that take longer than their compilation


def summed_logps(model, data, cache, *arguments, limit=None):
    """Log-probs of every response of a file under a model directory, `[examples, K]`, by the reference pass."""
    limited = () if limit is None else (f"--config.data.limit={limit}",)
    flags = (
        f"--config.model.path={model}",
        f"--config.data.path={data}",
        f"--config.data.cache_dir={cache}",
        f"--config.reference.cache_dir={cache}",
        *limited,
        *arguments,
    )
    with worlds.visible(1):
        config, _ = worlds.parse(*flags, recipe=f"{worlds.STORIES}:learn")
        architecture = read_architecture(config.model.path)
        mesh = sharding.make_mesh(config.mesh.to_dict())
        terms = bind(losses(config))
        found = inputs.load_data(config, config.data, architecture, terms)
        sizes = Sizes.of(found, prefix_sharing=True)
        windows = sweep_windows(sizes, batch_size=config.batch_size)
        plan = inputs.pack(config, windows, sizes, mesh, found.ids)
        scorer = policy.make_scorer(config, architecture, mesh)
        params = policy.load_params(config.model.path, scorer, mesh)
        tokens = run.load_reference(config, [(found, plan)], scorer, scorer, params, terms, mesh).columns[0]["logps"]
    assert len(examples_of(plan)) == len(found.weights)
    return np.array(
        [[tokens[response.tokens].sum() for response in responses_of(found, n)] for n in range(len(found.weights))]
    )


def accuracy(trained, initial):
    """Share of pairs whose chosen response gained more than its rejected one."""
    ratios = trained - initial
    return float((ratios[:, 0] > ratios[:, 1]).mean())


@pytest.mark.slow
def test_a_small_model_learns_its_pairs(tmp_path):
    # Every chosen response ends in "happy", every rejected one in "sad": what a few updates can pick up.
    rows = worlds.pairs(64)
    for row in rows:
        row["chosen"] += " happy"
        row["rejected"] += " sad"
    train = worlds.write_rows(tmp_path / "train.jsonl", rows[:48])
    held_out = worlds.write_rows(tmp_path / "test.jsonl", rows[48:])
    world = worlds.World(tmp_path, worlds.make_model(tmp_path / "model"), train)
    history = worlds.train(tmp_path / "run", *world.flags, "--config.steps=18", "--config.optimizer.learning_rate=3e-3")
    assert history[-1]["loss"] < 0.6
    initial, trained = (
        summed_logps(model, held_out, tmp_path / "cache", "--config.max_length=128")
        for model in (world.model, tmp_path / "run" / "model")
    )
    assert accuracy(trained, initial) >= 0.9


@pytest.fixture(scope="module")
def learned(assets, tmp_path_factory):
    """The run of `configs/stories.py:learn`, as anyone would type it."""
    folder = tmp_path_factory.mktemp("learned")
    caches = [f"--config.{name}.cache_dir={folder / 'cache'}" for name in ("data", "reference")]
    line = ("--config=configs/stories.py:learn", f"--workdir={folder / 'run'}", *caches)
    result = worlds.command("train", *line, timeout=1800, JAX_NUM_CPU_DEVICES="1", DAAJAX_ASSETS=str(assets))
    assert result.returncode == 0, result.stderr
    return folder, worlds.read_metrics(folder / "run")


@pytest.mark.slow
def test_held_out_accuracy_rises_from_chance_to_four_fifths(assets, learned):
    folder, history = learned
    held_out = assets / "data" / "stories_sentiment.test.jsonl.gz"
    initial, trained = (
        summed_logps(model, held_out, folder / "cache") for model in (assets / "tiny_model", folder / "run" / "model")
    )
    before = float((initial[:, 0] > initial[:, 1]).mean())  # log-ratios of the initial model are all 0
    after = accuracy(trained, initial)
    sys.stdout.write(f"held-out accuracy {after:.3f} of {len(initial)} pairs; by log-probs before {before:.3f}\n")
    assert len(history) == 150
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert before < 0.6
    assert after >= 0.8


@pytest.mark.slow
@pytest.mark.oracle
def test_the_exported_model_scores_in_transformers_as_here(assets, learned):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, _ = learned
    model = folder / "run" / "model"
    file = assets / "data" / "stories_sentiment.test.jsonl.gz"
    ours = summed_logps(model, file, folder / "cache", limit=64)

    from daajax.data.token_cache import tokenized

    data = tokenized("jsonl", file, model, max_length=512, limit=64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    expected = []
    for n, (prompt, *lengths) in enumerate(data.lengths.tolist()):
        begin, at = int(data.starts[n]), int(data.starts[n]) + prompt
        for length in lengths:
            ids = np.concatenate([data.tokens[begin : begin + prompt], data.tokens[at : at + length]])
            at += length
            tokens = torch.tensor(ids, dtype=torch.int64)
            with torch.no_grad():
                logps = theirs(tokens[None]).logits[0].log_softmax(-1)
            picked = logps[:-1].gather(1, tokens[1:, None])[prompt - 1 :]
            expected.append(float(picked.sum()))
    deviation = np.abs(ours.ravel() - np.array(expected)).max()
    sys.stdout.write(f"largest deviation from transformers: {deviation:.1e} nats\n")
    assert deviation < 1e-3


def known_reward(text, lexicon):
    """Ten times the mean valence of the words: how the data's own rewards were made."""
    words = re.findall(r"[a-z']+", text.lower())
    return 10 * sum(lexicon.get(word, 0.0) for word in words) / max(len(words), 1)


@pytest.mark.slow
def test_sampled_stories_have_a_higher_reward_than_before(assets, learned):
    folder, _ = learned
    held_out = assets / "data" / "stories_sentiment.test.jsonl.gz"
    lexicon = json.loads((assets / "data" / "valence_lexicon.json").read_text())
    with gzip.open(held_out, "rt") as file:
        rows = [json.loads(line) for line in file]
    for row in rows[:50]:  # the reward here is the reward there, which is rounded to four places
        for name in ("chosen", "rejected"):
            assert known_reward(row[name], lexicon) == pytest.approx(row[f"reward_{name}"], abs=6e-5)
    rewards = {}
    for name, model in (("before", assets / "tiny_model"), ("after", folder / "run" / "model")):
        output = folder / f"{name}.jsonl"
        flags = (f"--model={model}", f"--prompts={held_out}", "--limit=256", "--max_tokens=384", f"--output={output}")
        result = worlds.command("generate", *flags, "--batch_size=128", JAX_NUM_CPU_DEVICES="1", timeout=900)
        assert result.returncode == 0, result.stderr
        samples = [json.loads(line)["response"] for line in output.read_text().splitlines()]
        assert len(samples) == 256
        rewards[name] = np.array([known_reward(sample, lexicon) for sample in samples])
    before, after = rewards["before"], rewards["after"]
    error = np.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    sys.stdout.write(f"reward {before.mean():.2f} before, {after.mean():.2f} after, standard error {error:.2f}\n")
    assert after.mean() - before.mean() > 3 * error
    assert before.mean() == pytest.approx(1.12, abs=4 * before.std() / 16)  # torch's, of the same model


@pytest.mark.slow
def test_a_thousand_helpful_pairs_run_end_to_end(assets, tmp_path):
    arguments = [
        "--config=configs/stories.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={assets / 'data' / 'hh_helpful.train.jsonl.gz'}",
        "--config.data.limit=1000",
        "--config.data.shuffle=True",
        "--config.batch_size=50",
        "--config.steps=20",
        *(f"--config.{name}.cache_dir={tmp_path / name}" for name in ("data", "reference")),
    ]
    result = worlds.command("train", *arguments, timeout=900, JAX_NUM_CPU_DEVICES="1", DAAJAX_ASSETS=str(assets))
    assert result.returncode == 0, result.stderr
    sys.stdout.write(result.stdout)
    history = worlds.read_metrics(tmp_path / "run")
    assert len(history) == 20
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(math.isfinite(value) for values in history for value in values.values())
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
