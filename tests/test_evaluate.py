"""Held-out metrics against NumPy in float64, the same in every layout, and never in the way of a run."""

import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from daajax import evaluate as evaluation
from daajax.data.token_cache import tokenized
from daajax.errors import UserError
from tests import test_learning, worlds

SIMPO = ("--config.loss={'name':'simpo','beta':2.0,'gamma':1.0}", "--config.reference.mode=none")
SFT = ("--config.loss={'name':'sft'}", "--config.reference.mode=none")
EVAL = ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "eval/logps/chosen", "eval/rewards/chosen")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def held_out(world):
    """Thirteen pairs that are not trained on, with weights."""
    rows = [row | {"weight": 0.25 + n / 8} for n, row in enumerate(worlds.pairs(13, seed=5))]
    return worlds.write_rows(world.folder / "held_out.jsonl", rows)


@pytest.fixture(scope="module")
def flags(world, held_out):
    return (
        *world.flags,
        f"--config.eval_data.path={held_out}",
        f"--config.eval_data.cache_dir={world.folder / 'tokens'}",
        "--config.checkpoint.every=2",
        "--config.checkpoint.keep=9",
    )


@pytest.fixture(scope="module")
def run(world, flags):
    """A run with an evaluation after every update."""
    workdir = world.folder / "run"
    return workdir, worlds.train(workdir, *flags, "--config.eval.every=1")


@pytest.fixture
def copy(run, tmp_path):
    """The same run, to change."""
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def evaluate(workdir, *arguments, devices=1):
    """Runs `python -m daajax.evaluate` in this process; returns the line it added."""
    worlds.at(evaluation.evaluate, workdir, *arguments, devices=devices)
    return json.loads((pathlib.Path(workdir) / "evaluations.jsonl").read_text().splitlines()[-1])


# ---------------------------------------------------------------------- the numbers


@pytest.fixture(scope="module")
def scored(world, held_out, run):
    """Summed log-probs of the trained and the initial model, float64 `[examples, 2]`, lengths and weights."""
    cache = world.folder / "cache"
    trained, initial = (
        test_learning.summed_logps(model, held_out, cache, "--config.max_length=128").astype(np.float64)
        for model in (run[0] / "model", world.model)
    )
    data = tokenized("jsonl", held_out, world.model, max_length=128)
    return trained, initial, data.scored_lengths().astype(np.float64), data.weights.astype(np.float64)


def softplus(x):
    return np.logaddexp(0.0, x)


def means(logps, weights, losses, rewards):
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "eval/loss": (weights * losses).sum() / len(weights),
        "eval/rewards/chosen": rewards[:, 0].mean(),
        "eval/rewards/rejected": rewards[:, 1].mean(),
        "eval/rewards/margins": margins.mean(),
        "eval/rewards/accuracies": (margins > 0).mean(),
        "eval/logps/chosen": logps[:, 0].mean(),
        "eval/logps/rejected": logps[:, 1].mean(),
    }


def dpo(trained, initial, lengths, weights):
    """Eq. 7 of Rafailov et al. 2023."""
    rewards = 0.1 * (trained - initial)
    return means(trained, weights, softplus(-(rewards[:, 0] - rewards[:, 1])), rewards)


def ipo(trained, initial, lengths, weights):
    """Eq. 17 of Azar et al. 2023."""
    ratios = trained - initial
    return means(trained, weights, (ratios[:, 0] - ratios[:, 1] - 1 / (2 * 0.1)) ** 2, 0.1 * ratios)


def simpo(trained, initial, lengths, weights):
    """Eq. 6 of Meng et al. 2024: rewards are beta times the mean log-prob of a token."""
    rewards = 2.0 * trained / lengths
    return means(trained, weights, softplus(-(rewards[:, 0] - rewards[:, 1] - 1.0)), rewards)


def sft(trained, initial, lengths, weights):
    """Minus the log-likelihood per token of the chosen responses."""
    return {
        "eval/loss": -(weights * trained[:, 0]).sum() / lengths[:, 0].sum(),
        "eval/logps/chosen": trained[:, 0].mean(),
    }


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ((), dpo),
        (("--config.loss={'name':'ipo','beta':0.1}",), ipo),
        (SIMPO, simpo),
        (SFT, sft),
    ],
    ids=["dpo", "ipo", "simpo", "sft"],
)
def test_numbers_are_those_of_float64(run, copy, scored, loss, expected):
    found = evaluate(copy, *loss)
    assert found["step"] == 5
    for name, value in expected(*scored).items():
        # Log-probs are float32: some 1e-6 of sums of about 100 nats, of which rewards take a tenth.
        assert found[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name


def test_evaluation_in_a_run_is_that_of_the_command(run, copy):
    for step in (2, 4, 5):
        found = evaluate(copy, f"--step={step}")
        assert found["step"] == step
        values = run[1][step - 1]
        for name in EVAL:
            assert found[name] == pytest.approx(values[name], rel=1e-6, abs=1e-6)


def test_step_0_is_the_initial_policy(copy, scored):
    found = evaluate(copy, "--step=0")
    assert found["eval/loss"] == pytest.approx(math.log(2) * scored[3].mean(), rel=1e-5)
    assert abs(found["eval/rewards/margins"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        (("batch_size=1",), 1),
        (("micro_batches=3", "batch_size=5"), 1),
        (("packing.enabled=False",), 1),
        (("packing.prefix_sharing=False",), 1),
        (("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), 8),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_the_same_in_every_layout(run, copy, changes, devices):
    found = evaluate(copy, *(f"--config.{change}" for change in changes), devices=devices)
    for name in EVAL:
        assert found[name] == pytest.approx(run[1][-1][name], rel=1e-6, abs=1e-6), name


# ---------------------------------------------------------------------- in a run


def evaluated(history):
    return [values["step"] for values in history if "eval/loss" in values]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("eval.every=2",), [2, 4, 5]),
        pytest.param((), [5], marks=pytest.mark.slow),
        pytest.param(("eval.every=9",), [5], marks=pytest.mark.slow),
        (("checkpoint.best=eval/loss",), [2, 4, 5]),
    ],
    ids=["2", "none", "9", "best"],
)
def test_evaluations_come_every_so_often_and_last(flags, tmp_path, changes, expected):
    history = worlds.train(
        tmp_path / "run", *flags, "--config.log.every=100", *(f"--config.{change}" for change in changes)
    )
    assert evaluated(history) == expected


def test_evaluations_change_no_number_of_the_run(world, run, tmp_path):
    history = worlds.train(tmp_path / "run", *world.flags)
    for name in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
        assert worlds.column(history, name).tolist() == worlds.column(run[1], name).tolist()
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (run[0] / "model/model.safetensors").read_bytes()
    assert evaluated(history) == []
    assert evaluated(run[1]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [ValueError("something\nelse"), MemoryError(), RuntimeError("RESOURCE_EXHAUSTED")])
def test_an_evaluation_that_fails_is_said_and_the_run_goes_on(flags, run, tmp_path, monkeypatch, capsys, error):
    calls = []
    call = evaluation.Evaluation.__call__

    def failing(self, *given):
        calls.append(None)
        if len(calls) == 2:
            raise error
        return call(self, *given)

    monkeypatch.setattr(evaluation.Evaluation, "__call__", failing)
    history = worlds.train(tmp_path / "run", *flags, "--config.eval.every=1", "--config.checkpoint.best=eval/loss")
    assert evaluated(history) == [1, 3, 4, 5]
    assert worlds.column(history, "loss").tolist() == worlds.column(run[1], "loss").tolist()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "failed (" in line]
    assert line.startswith("the evaluation after update 2 failed (")
    assert line.endswith("); the run goes on")


@pytest.mark.slow
def test_the_best_checkpoint_is_named_and_kept(world, flags, tmp_path, capsys):
    # A rate that is too high: the held-out loss gets worse and worse.
    changes = ("optimizer.learning_rate=3e-2", "checkpoint.best=eval/loss", "checkpoint.keep=1", "checkpoint.every=1")
    history = worlds.train(tmp_path / "run", *flags, *(f"--config.{change}" for change in changes))
    best = 1 + int(np.argmin(worlds.column(history, "eval/loss")))
    assert best != 5
    said = capsys.readouterr().out
    assert f"the best checkpoint by eval/loss is that of update {best}: python -m daajax.export" in said
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [str(best), "5"]


# ---------------------------------------------------------------------- eval_data


@pytest.mark.slow
def test_eval_data_has_options_of_its_own(copy, tmp_path, capsys):
    rows = worlds.pairs(9, seed=7)
    rows[8]["chosen"] *= 20  # beyond max_length
    data = worlds.write_rows(tmp_path / "other.jsonl", [*rows, "{"])
    flags = [f"--config.eval_data.path={data}", f"--config.eval_data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(UserError, match=r"other\.jsonl"):
        evaluate(copy, *flags)
    flags.append("--config.eval_data.max_bad_rows=1")
    counts = []
    for changes in ([], ["limit=4"], ["truncation=drop"]):
        capsys.readouterr()
        evaluate(copy, *flags, *(f"--config.eval_data.{change}" for change in changes))
        counts.append(int(capsys.readouterr().out.splitlines()[-1].split()[0]))
    assert counts == [9, 4, 8]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not [line for line in (copy / "config.json").read_text().splitlines() if "other.jsonl" in line]


def test_eval_data_that_cannot_be_read_are_refused_before_training(world, flags, tmp_path):
    with pytest.raises(UserError, match=r"nope\.jsonl"):
        worlds.train(tmp_path / "run", *flags, "--config.eval_data.path=nope.jsonl")
    assert not (tmp_path / "run").exists()


def test_eval_data_without_what_the_loss_compares_are_refused(world, flags, tmp_path):
    data = worlds.write_rows(tmp_path / "one.jsonl", [{"prompt": "a dog", "response": " ran"}] * 3)
    with pytest.raises(UserError, match=r"loss 'dpo' compares 2 responses but the eval_data have 1"):
        worlds.train(tmp_path / "run", *flags, f"--config.eval_data.path={data}")


@pytest.mark.parametrize("option", ["eval.every=2", "checkpoint.best=eval/loss"])
def test_what_needs_held_out_data_says_so(world, option):
    with pytest.raises(UserError, match=r"needs held-out data; set config\.eval_data\.path"):
        worlds.parse(*world.flags, f"--config.{option}")


# ---------------------------------------------------------------------- the command


def test_the_report_has_a_line_an_evaluation(copy, held_out):
    (copy / "evaluations.jsonl").unlink(missing_ok=True)
    for step in (2, 0):
        evaluate(copy, f"--step={step}")
    lines = [json.loads(line) for line in (copy / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["data"]) for line in lines] == [(2, str(held_out)), (0, str(held_out))]
    assert all(math.isfinite(line[name]) for line in lines for name in EVAL)


def test_a_number_that_is_none_is_null_in_the_report(copy, monkeypatch):
    monkeypatch.setattr(evaluation.Evaluation, "report", lambda *_: {"eval/loss": math.nan})
    evaluate(copy)
    text = (copy / "evaluations.jsonl").read_text().splitlines()[-1]
    assert json.loads(text, parse_constant=_refused)["eval/loss"] is None


def _refused(name):
    raise ValueError(name)


def test_a_report_that_cannot_be_written_is_one_line(copy, capsys):
    (copy / "evaluations.jsonl").unlink(missing_ok=True)
    (copy / "evaluations.jsonl").mkdir()
    with pytest.raises(UserError, match=r"evaluations\.jsonl cannot be written \(Is a directory\)"):
        evaluate(copy)
    assert "eval/loss: " in capsys.readouterr().out


def test_evaluating_leaves_the_run_as_it_was(copy):
    def content():
        return {
            path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "evaluations.jsonl"
        }

    before = content()
    evaluate(copy, "--step=2")
    assert content() == before


def test_a_step_that_is_not_there_is_refused(copy):
    with pytest.raises(UserError, match=r"has no checkpoint of update 3; there are: 2, 4, 5; --step=0"):
        evaluate(copy, "--step=3")


def test_a_run_without_held_out_data_is_refused(copy):
    with pytest.raises(UserError, match=r"the run has no held-out data; name some with --config\.eval_data\.path"):
        evaluate(copy, "--config.eval_data.path=None", "--config.eval.every=None")


def test_a_damaged_checkpoint_is_one_line(copy):
    (copy / "checkpoints" / "5" / "record" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"checkpoints/5 is damaged \(.*\); use another --step") as error:
        evaluate(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("step", [(), ("--step=0",)])
def test_other_weights_under_the_models_path_are_refused(tmp_path, step):
    own = worlds.make_world(tmp_path)
    worlds.train(tmp_path / "run", *own.flags, "--config.steps=1")
    worlds.make_model(own.model, seed=1)
    with pytest.raises(UserError, match="the weights of the model changed since the checkpoint"):
        evaluate(tmp_path / "run", f"--config.eval_data.path={own.data}", *step)


def test_the_best_by_rewards_needs_a_loss_that_has_some(world):
    flags = (f"--config.eval_data.path={world.data}", "--config.loss={'name':'sft'}", "--config.reference.mode=none")
    with pytest.raises(UserError, match=r"loss 'sft' has no rewards; set it to 'eval/loss'"):
        worlds.parse(*world.flags, *flags, "--config.checkpoint.best=eval/rewards/margins")
