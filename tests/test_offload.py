"""Moments in the hosts' memory: the numbers are the same, also after a stop, and they are not in the devices'."""

import types

import jax
import numpy as np
import optax
import pytest

from configs import base
from daajax import sharding, step
from daajax.config import resolve
from daajax.errors import UserError
from daajax.losses.terms import bind
from daajax.optimizer import make_optimizer
from tests import worlds

OFFLOAD = "--config.optimizer.offload=True"
HALF = "--config.optimizer.mu_dtype=bfloat16"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


def weights_of(folder):
    return worlds.load_tensors(folder / "model")


def assert_same_run(one, other):
    losses = [worlds.column(worlds.read_metrics(folder), "loss") for folder in (one, other)]
    np.testing.assert_array_equal(losses[0][-1], losses[1][-1])
    for name, value in weights_of(one).items():
        np.testing.assert_array_equal(value, weights_of(other)[name], err_msg=name)


def abstract(devices, **options):
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices)
    optimizer = make_optimizer("adamw", optax.constant_schedule(0.1), max_grad_norm=None, hyperparameters={})
    params = {"q_proj": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding.sharding(mesh, ("embed", None)))}
    return step.abstract_state(params, optimizer, bind([dict(name="dpo")]), mesh, **options)


def test_moments_are_with_the_host_cut_up_as_their_parameters_and_all_else_is_with_the_devices():
    state = abstract(jax.devices()[:2], offload=True)
    on_host = [leaf for leaf in jax.tree.leaves(state) if sharding.is_in_host_memory(leaf.sharding)]
    assert [leaf.shape for leaf in on_host] == [(8, 4), (8, 4)]
    assert {leaf.sharding.shard_shape(leaf.shape) for leaf in on_host} == {(4, 4)}
    assert not any(sharding.is_in_host_memory(leaf.sharding) for leaf in jax.tree.leaves(abstract(jax.devices()[:2])))


def test_devices_whose_host_has_no_such_memory_are_named():
    kinds = [types.SimpleNamespace(kind=kind) for kind in ("device", "other")]
    device = types.SimpleNamespace(device_kind="Abacus", addressable_memories=lambda: kinds)
    with pytest.raises(UserError, match=r"offload=True needs memory .* 'pinned_host', but Abacus names device, other;"):
        sharding._check_host_memory(device)


def resolved(**options):
    config = base.get_config()
    config.model.path, config.data.path, config.steps = "model", "pairs", 1
    config.optimizer.update(options)
    return resolve(config)


@pytest.mark.parametrize(
    "options", [dict(name="adamw"), dict(name="rmsprop"), dict(name="lion"), dict(name="sgd", b1=0.9)]
)
def test_optimizers_with_moments_may_have_them_with_the_host(options):
    assert resolved(**options, offload=True).optimizer.offload


# Sgd without momentum has none, adafactor keeps a row and a column of each matrix's.
@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_an_optimizer_without_moments_to_move_is_refused_in_one_line(name):
    with pytest.raises(UserError, match=rf"offload=True but optimizer '{name}' .* keeps no moment .*; leave it False"):
        resolved(name=name, offload=True)
    assert not resolved(name=name).optimizer.offload


@pytest.mark.slow
def test_a_run_with_moments_in_the_hosts_memory_is_the_run_without(world, tmp_path):
    for name, option in (("plain", []), ("offloaded", [OFFLOAD])):
        worlds.train(tmp_path / name, *world.flags, "--config.steps=2", HALF, *option, devices=2)
    assert_same_run(tmp_path / "plain", tmp_path / "offloaded")


@pytest.mark.slow
def test_a_run_with_moments_in_the_hosts_memory_goes_on_bit_for_bit(world, tmp_path):
    flags = [*world.flags, "--config.optimizer.schedule=constant", "--config.checkpoint.every=2", HALF, OFFLOAD]
    worlds.train(tmp_path / "whole", *flags, "--config.steps=4")
    worlds.train(tmp_path / "stopped", *flags, "--config.steps=2")
    worlds.train(tmp_path / "stopped", *flags, "--config.steps=4")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    # Where they lie is not part of what a run is.
    worlds.train(tmp_path / "stopped", *flags, "--config.steps=6", "--config.optimizer.offload=False")
    worlds.train(tmp_path / "whole", *flags, "--config.steps=6")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
