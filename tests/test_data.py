"""From a user's own data to a model directory: every source, every form of a row, mixtures, held-out data."""

import json

import numpy as np
import pytest

from daajax import inputs
from daajax.config import losses
from daajax.data.sources import read
from daajax.errors import UserError
from daajax.losses.terms import bind
from daajax.models.families import read_architecture
from tests import worlds
from tests.data import sets

SFT = ("--config.loss={'name':'sft'}", "--config.reference.mode=none")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"), count=24)


@pytest.fixture
def trained(world, tmp_path, capsys):
    """Trains two updates on data; returns the metrics and what was printed."""

    def train(name, path, *overrides):
        flags = [f"--config.data.name={name}", f"--config.data.path={path}", "--config.steps=2", *overrides]
        history = worlds.train(tmp_path / "run", *world.flags, *flags)
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
        return history, capsys.readouterr().out

    return train


def load(*flags, part="data"):
    """The tokenized data that a command line comes to."""
    config, _ = worlds.parse(*flags)
    return inputs.load_data(config, config[part], read_architecture(config.model.path), bind(losses(config)), part)


# ---------------------------------------------------------------------- sources


@pytest.mark.slow
@pytest.mark.parametrize("kind", sets.KINDS)
def test_every_source_trains_the_same_model(world, trained, tmp_path, kind):
    """The same pairs from any kind of file, in the order of the rows, give the same losses as from JSONL."""
    rows = worlds.pairs(24)
    name, path, *flags = sets.KINDS[kind](tmp_path / "data", rows)
    ours, said = trained(name, path, *flags)
    assert "data: 24 of 24 examples kept" in said
    if kind.startswith("tfds"):  # it shuffles what it is given
        data = load(*world.flags, f"--config.data.name={name}", f"--config.data.path={path}", *flags)
        plain = load(*world.flags)
        ours, theirs = (sorted(map(bytes, np.split(d.tokens, d.starts[1:-1]))) for d in (data, plain))
        assert ours == theirs
        return
    plain = worlds.train(tmp_path / "plain", *world.flags, "--config.steps=2")
    assert worlds.deviation(worlds.column(ours, "loss"), worlds.column(plain, "loss")) == 0


@pytest.mark.slow
def test_hh_rlhf_as_anthropic_published_it_trains_a_model(trained, tmp_path):
    root = sets.hh_folder(tmp_path / "hh-rlhf", worlds.pairs(16))
    _, said = trained("hh", root, "--config.data.split=train")
    assert "data: 16 of 16 examples kept" in said


def test_real_conversations_are_taken_apart_where_their_authors_did(assets, tmp_path):
    pairs = read("jsonl", assets / "data" / "hh_helpful.test.jsonl.gz").examples
    rows = [{"chosen": e.prompt + e.responses[0], "rejected": e.prompt + e.responses[1]} for e in pairs]
    whole = read("hh", worlds.write_rows(tmp_path / "whole.jsonl", rows)).examples
    assert [(e.prompt, e.responses) for e in whole] == [(e.prompt, e.responses) for e in pairs]


@pytest.mark.slow
def test_a_data_set_of_the_hub_by_name_trains_a_model(world, tmp_path):
    """From the cache of the `datasets` library, without a network, as a process of its own."""
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    cache = sets.hub_cache(tmp_path / "cache", "owner/pairs", worlds.pairs(16))
    flags = ["--config.data.name=hub", "--config.data.path=owner/pairs", "--config.steps=2"]
    done = worlds.command(
        "train",
        f"--config={worlds.STORIES}",
        f"--workdir={tmp_path / 'run'}",
        *world.flags,
        *flags,
        HF_DATASETS_CACHE=str(cache),
        HF_HUB_OFFLINE="1",
        JAX_NUM_CPU_DEVICES="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: 16 of 16 examples kept" in done.stdout
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_split_is_chosen(world, tmp_path):
    name, path, *_ = sets.parquet_folder(tmp_path / "data", worlds.pairs(12), splits={"train": 8, "test": 4})
    flags = [*world.flags, f"--config.data.name={name}", f"--config.data.path={path}"]
    assert len(load(*flags, "--config.data.split=train").ids) == 8
    assert len(load(*flags, "--config.data.split=test").ids) == 4
    with pytest.raises(UserError, match=r"data\.path=.* has the splits test, train; choose one with data\.split"):
        load(*flags)


# ---------------------------------------------------------------------- forms


def test_scored_responses_are_ranked_and_that_the_loss_reads_no_scores_is_said(trained, tmp_path):
    rows = [
        {"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"]], "scores": [0.5, 2]}
        for row in worlds.pairs(16)
    ]
    ours, said = trained("jsonl", worlds.write_rows(tmp_path / "scored.jsonl", rows))
    assert "16 examples whose responses were put in order of their scores, best first" in said
    assert "data: scores are not read by loss 'dpo': only the order of the responses counts" in said
    assert np.isfinite(worlds.column(ours, "loss")).all()


def test_labelled_responses_train_and_that_the_loss_reads_no_label_is_said(trained, tmp_path):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(PAIRS)]
    _, said = trained("jsonl", worlds.write_rows(tmp_path / "labelled.jsonl", rows), *SFT)
    assert "data: `label` is not read by loss 'sft': all responses count alike, wanted or not" in said


PAIRS = worlds.pairs(16)


# ---------------------------------------------------------------------- mixtures


def mixture(tmp_path, *, weights=(None, None), counts=(24, 8)):
    """Flags for two sources, pairs and others."""
    first = worlds.write_rows(tmp_path / "pairs.jsonl", worlds.pairs(counts[0]))
    second = worlds.write_rows(tmp_path / "others.jsonl", worlds.pairs(counts[1], seed=1))
    extra = {"name": "jsonl", "path": str(second)} | ({"weight": weights[1]} if weights[1] else {})
    flags = [f"--config.data.path={first}", f"--config.data.extra=({extra},)"]
    return [*flags, *([f"--config.data.weight={weights[0]}"] if weights[0] else [])]


def test_two_sources_train_a_model_and_each_is_cached_by_itself(world, trained, tmp_path):
    _, said = trained("jsonl", tmp_path / "pairs.jsonl", *mixture(tmp_path))
    assert "data (pairs): 24 of 24 examples kept" in said
    assert "data (others): 8 of 8 examples kept" in said
    alone = load(*world.flags, f"--config.data.path={tmp_path / 'pairs.jsonl'}")
    assert alone.notices[-1].startswith("cache: hit")
    both = load(*world.flags, *mixture(tmp_path))
    assert {name: len(found) for name, found in both.by_source().items()} == {"pairs": 24, "others": 8}
    assert both.ids[0] == "pairs/pairs.jsonl:1"
    assert both.ids[31] == "others/others.jsonl:8"


@pytest.mark.slow
def test_shares_make_the_smaller_source_repeat_and_that_is_said(trained, tmp_path):
    flags = mixture(tmp_path, weights=(1.0, 3.0))
    _, said = trained("jsonl", tmp_path / "pairs.jsonl", *flags, "--config.batch_size=16")
    assert "plan: source pairs: 0.33 epochs of 24 examples" in said  # 2 · 16 / 4 = 8 of 24
    assert "plan: source others: 3.00 epochs of 8 examples" in said  # 2 · 16 · 3 / 4 = 24 of 8


def test_sources_that_differ_in_responses_are_refused_by_name(world, tmp_path):
    rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    path = worlds.write_rows(tmp_path / "single.jsonl", rows)
    extra = f"--config.data.extra=({{'name':'jsonl','path':'{path}'}},)"
    with pytest.raises(UserError, match=r"compares 2 responses but the data \(single\) have 1"):
        load(*world.flags, extra)
    assert load(*world.flags, extra, *SFT).lengths.shape == (24 + 16, 2)  # the first of each is read


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["data.extra=({'path':'b'},)"], "config.data.extra[0] has no 'name'"),
        (["data.extra=({'name':'jsonl'},)"], "config.data.extra[0] has no 'path'"),
        (["data.extra=('b',)"], "config.data.extra holds 'b'; it needs dicts"),
        (["data.extra=({'name':'jsonl','path':'b','shuffle':True},)"], "has the key 'shuffle'; there are name, path"),
        (["data.extra=({'name':'csv','path':'b'},)"], "config.data.extra[0].name='csv' is unknown; there are hh, hub"),
        (["data.extra=({'name':'jsonl','path':'b','limit':0},)"], "config.data.extra[0].limit=0 must be at least 1"),
        (["data.extra=({'name':'jsonl','path':'b','limit':1.5},)"], "limit=1.5 must be an integer"),
        (["data.extra=({'name':'jsonl','path':3},)"], "config.data.extra[0].path=3 must be text"),
        (["data.extra=({'name':'jsonl','path':'b','weight':0.0},)"], "weight=0.0 must be above 0"),
        (
            ["data.extra=({'name':'jsonl','path':'b','weight':0.5},)"],
            "config.data has no weight but another source has",
        ),
        (["data.weight=0.5", "data.extra=({'name':'jsonl','path':'b'},)"], "config.data.extra[0] has no weight but"),
        (["data.weight=0.5"], "but config.data.extra names no other; unset it"),
        (["eval_data.limit=5"], "config.eval_data.limit is set but config.eval_data.path is not"),
        (
            ["eval_data.path=a", "eval_data.extra=({'name':'jsonl','path':'b','weight':1.0},)"],
            "config.eval_data.extra[0] has the key 'weight'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sources_that_make_no_sense_are_refused(world, flags, says):
    with pytest.raises(UserError) as error:
        worlds.parse(*world.flags, *(f"--config.{flag}" for flag in flags))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_further_source_that_is_not_there_is_called_by_its_key(world, tmp_path):
    extra = {"name": "parquet", "path": str(tmp_path / "nowhere.parquet")}
    with pytest.raises(UserError, match=r"^data\.extra\[0\]\.path=.*nowhere.parquet does not exist"):
        load(*world.flags, f"--config.data.extra=({extra},)")


# ---------------------------------------------------------------------- held-out data


def test_held_out_data_are_read_by_the_options_of_their_own(world, tmp_path, capsys):
    rows = [*worlds.pairs(6, seed=5), {"prompt": "the dog"}]
    name, path, *_ = sets.parquet_folder(tmp_path / "data", rows, splits={"train": 2, "test": 5})
    flags = [*world.flags, f"--config.eval_data.path={path}", f"--config.eval_data.name={name}"]
    flags += ["--config.eval_data.split=test", f"--config.eval_data.cache_dir={tmp_path / 'kept'}"]
    data = load(*flags, "--config.eval_data.max_bad_rows=1", part="eval_data")
    assert list(data.ids) == [f"test-00000-of-00001.parquet:{row}" for row in range(1, 5)]
    assert "eval_data: 4 of 4 examples kept" in capsys.readouterr().out
    assert len(list((tmp_path / "kept").iterdir())) == 1
    with pytest.raises(
        UserError, match=r"but eval_data\.max_bad_rows=0: .* tolerate more with eval_data\.max_bad_rows"
    ):
        load(*flags, part="eval_data")
    flags = [flag for flag in flags if "split" not in flag]
    with pytest.raises(UserError, match=r"^eval_data\.path=.*choose one with eval_data\.split"):
        load(*flags, part="eval_data")


@pytest.mark.slow
def test_held_out_sources_are_evaluated_together_and_each_by_itself(world, tmp_path):
    """The loss over all examples is the mean of the sources' losses, by their numbers of examples."""
    ours = worlds.write_rows(tmp_path / "ours.jsonl", worlds.pairs(5, seed=7))
    theirs = worlds.write_rows(tmp_path / "theirs.jsonl", worlds.pairs(3, seed=8))
    extra = f"({{'name':'jsonl','path':'{theirs}'}},)"
    flags = [*world.flags, *mixture(tmp_path, weights=(1.0, 1.0)), f"--config.eval_data.path={ours}"]
    flags += [f"--config.eval_data.extra={extra}", "--config.steps=2", "--config.eval.every=2"]
    flags += [f"--config.eval_data.cache_dir={tmp_path / 'tokens'}"]
    found = worlds.train(tmp_path / "run", *flags)[-1]
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        both = (5 * found[f"eval/ours/{name}"] + 3 * found[f"eval/theirs/{name}"]) / 8
        assert found[f"eval/{name}"] == pytest.approx(both, rel=1e-5, abs=1e-6)
    done = worlds.command("evaluate", f"--workdir={tmp_path / 'run'}", JAX_NUM_CPU_DEVICES="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (again,) = map(json.loads, (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
    assert again["eval/theirs/loss"] == pytest.approx(found["eval/theirs/loss"], rel=1e-5)


def test_held_out_data_that_cannot_be_kept_are_called_by_their_key(world, tmp_path):
    (tmp_path / "file").write_text("in its place")
    flags = [*world.flags, f"--config.eval_data.path={world.data}", f"--config.eval_data.cache_dir={tmp_path / 'file'}"]
    with pytest.raises(UserError, match=r"^eval_data\.cache_dir="):
        load(*flags, part="eval_data")
