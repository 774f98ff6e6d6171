"""Adapters: their mathematics, and runs that train nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax.errors import UserError
from daajax.models import decoder, lora
from daajax.models.families import architecture_of
from daajax.ops import attention
from tests import worlds
from tests.models.test_decoder import rows
from tests.oracle import make_values as oracle

FLAGS = ["--config.lora.rank=4", "--config.optimizer.learning_rate=1e-2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


def model_of(name, targets=("all-linear",), **options):
    architecture = architecture_of(oracle.MODELS[name])
    adapters = lora.Lora(4, 8.0, lora.targets_of(architecture, targets), **options)
    model = decoder.Decoder(architecture, attend=attention.dense, lora=adapters)
    params = decoder.init_params(model, jax.random.key(0))
    drawn = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params["lora"])
    return model, params, {**params, "lora": drawn}


def hidden(model, params):
    tokens, positions, mask = rows()
    return model.apply(decoder.variables(params), tokens, positions, mask)[0]


@pytest.mark.parametrize("name", ["llama31", "biased_linear", "gpt2"])
def test_fresh_adapters_change_nothing_and_others_are_added_to_the_weights(name):
    model, fresh, moved = model_of(name)
    base = hidden(model, lora.without(fresh))
    np.testing.assert_array_equal(hidden(model, fresh), base)
    assert np.abs(hidden(model, moved) - base).max() > 0.1
    layers = dict(moved["layers"])
    for target in model.lora.targets:
        a, b = (np.asarray(moved["lora"]["layers"][f"{target}_{side}"], np.float64) for side in "ab")
        layers[target] = jnp.asarray(np.asarray(layers[target], np.float64) + 2.0 * a @ b, jnp.float32)
    np.testing.assert_allclose(
        hidden(model, moved), hidden(model, {**lora.without(moved), "layers": layers}), atol=2e-4
    )
    np.testing.assert_allclose(hidden(model, lora.merged(moved, model.lora)), hidden(model, moved), atol=2e-4)


def test_rank_stabilized_adapters_weigh_by_the_root_of_the_rank():
    assert lora.Lora(16, 8.0, ("q_proj",)).scale == 0.5
    assert lora.Lora(16, 8.0, ("q_proj",), rslora=True).scale == 2.0


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("llama31", ["c_attn"], "'c_attn'"),
        ("gpt2", ["gate_proj"], "'gate_proj'"),
        ("mixtral", ["up_proj"], "'up_proj'"),
    ],
)
def test_targets_that_are_not_there_are_refused(name, targets, words):
    with pytest.raises(UserError, match=words):
        lora.targets_of(architecture_of(oracle.MODELS[name]), targets)


def test_a_run_trains_its_adapters_alone_and_its_model_is_the_melted_one(world, tmp_path, capsys):
    folder = tmp_path / "run"
    worlds.train(folder, *world.flags, *FLAGS)
    said = capsys.readouterr().out
    assert "first loss: 0.693147" in said
    assert "parameters are trained, the others stay" in said
    before, after = worlds.load_tensors(world.model), worlds.load_tensors(folder / "model")
    moved = {name for name in before if np.abs(before[name] - after[name]).max() > 1e-6}
    assert moved == {name for name in before if "_proj" in name}
    for name in moved:  # no more than the rank
        assert np.linalg.matrix_rank(after[name] - before[name], tol=1e-4) <= 4


def test_a_stopped_run_goes_on_bit_for_bit_and_its_checkpoints_hold_the_adapters_alone(world, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*world.flags, *FLAGS, "--config.checkpoint.every=2"]
    worlds.train(whole, *flags, "--config.optimizer.schedule=constant", "--config.steps=4")
    worlds.train(parts, *flags, "--config.optimizer.schedule=constant", "--config.steps=2")
    worlds.train(parts, *flags, "--config.optimizer.schedule=constant", "--config.steps=4")
    one, other = (worlds.load_tensors(folder / "model") for folder in (whole, parts))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    size = sum(file.stat().st_size for file in (whole / "checkpoints" / "4" / "params").rglob("*") if file.is_file())
    assert size < sum(value.nbytes for value in one.values())
