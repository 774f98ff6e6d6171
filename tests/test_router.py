"""The loss that balances the experts of a mixture: through the step and through the front door."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import sharding
from daajax.errors import UserError
from daajax.gradient import loss_and_gradient
from daajax.loss import router_loss
from daajax.losses.terms import bind
from daajax.models import decoder
from daajax.models.architecture import Experts
from daajax.models.decoder import Routing
from daajax.scoring import Scorer
from tests import worlds
from tests.oracle import make_values as oracle
from tests.test_scoring import ARCHITECTURE, BATCH_SIZE, mesh_of
from tests.test_step import batch_of

SPARSE = dataclasses.replace(ARCHITECTURE, experts=Experts(4, 2, True))
COEFFICIENT = 0.7


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@functools.cache
def model_on(sizes):
    scorer = Scorer.make(
        SPARSE, mesh_of(*sizes), attention="blockwise", remat="none", dtype=jnp.float32, param_dtype=jnp.float32
    )
    shapes, axes = decoder.abstract_params(scorer.model)
    random = np.random.default_rng(5)
    drawn = jax.tree.map(lambda x: (0.4 * random.normal(size=x.shape)).astype(np.float32), shapes)
    return scorer, jax.device_put(drawn, sharding.param_shardings(mesh_of(*sizes), shapes, axes))


def computed(sizes, coefficient=COEFFICIENT, loss="dpo", head="token", **options):
    scorer, params = model_on(sizes)
    batch, keys = batch_of(sizes, **options)
    gradient, logged, _ = jax.jit(
        lambda params, batch: loss_and_gradient(
            scorer, params, batch, bind([dict(name=loss)]), {}, batch_size=BATCH_SIZE, keys=keys,
            router_loss_coef=coefficient, head=head,
        )
    )(params, batch)  # fmt: skip
    return jax.device_get(gradient), {name: float(value) for name, value in logged.values().items()}


def test_experts_used_alike_cost_one_and_one_used_alone_costs_their_number():
    def cost(sent):
        return float(router_loss(Routing(*[jnp.asarray(sent, jnp.float32)] * 2)))  # one expert a token, surely

    assert cost([[5, 5, 5, 5], [5, 5, 5, 5]]) == pytest.approx(1)
    assert cost([[20, 0, 0, 0], [0, 20, 0, 0]]) == pytest.approx(2)
    assert cost([[20, 0, 0, 0], [20, 0, 0, 0]]) == pytest.approx(4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((8, 1, 1), dict(micro_batches=4)),
        ((2, 2, 2), dict(micro_batches=2)),
        ((2, 2, 2), dict(prefix_sharing=False)),
        ((2, 2, 2), dict(head="row")),
        ((1, 4, 2), dict(packing=False)),
    ],
    ids=str,
)
def test_it_is_that_of_the_whole_update_whatever_its_parts_and_the_mesh(sizes, options):
    wanted, expected = computed((8, 1, 1))
    plain, without = computed((8, 1, 1), coefficient=0.0)
    assert expected["loss"] == pytest.approx(without["loss"] + expected["loss/router"], rel=1e-5)
    assert "loss/router" not in without
    assert expected["loss/router"] > 1.4 * 1.01  # 2 experts a token at least, times the coefficient; some imbalance
    moved = np.abs(wanted["layers"]["router"] - plain["layers"]["router"]).max()
    assert moved > 1e-3
    gradient, found = computed(sizes, **options)
    assert found["loss/router"] == pytest.approx(expected["loss/router"], rel=1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * largest), gradient, wanted
    )


@pytest.mark.slow
def test_a_mixture_is_trained_with_and_without_it(world, tmp_path, capsys):
    config = oracle.MODELS["mixtral"] | {"vocab_size": worlds.ARCHITECTURE["vocab_size"]}
    model = worlds.make_model(tmp_path / "model")
    oracle.write_model(model, config)
    losses = {}
    for weight in (0.0, 0.5):
        flags = [*world.flags, f"--config.model.path={model}", "--config.steps=3"]
        worlds.train(tmp_path / f"run{weight}", *flags, f"--config.model.router_aux_loss_coef={weight}")
        assert "first loss: 0.693147" in capsys.readouterr().out
        lines = (tmp_path / f"run{weight}" / "metrics.jsonl").read_text().splitlines()
        losses[weight] = json.loads(lines[0])
    assert "loss/router" not in losses[0.0]
    assert losses[0.5]["loss/router"] > 1.0
    assert losses[0.5]["loss"] == pytest.approx(losses[0.0]["loss"] + losses[0.5]["loss/router"], rel=1e-5)
    found = worlds.load_tensors(tmp_path / "run0.5" / "model")
    other = worlds.load_tensors(tmp_path / "run0.0" / "model")
    assert found.keys() == oracle.tensors(config).keys()
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert np.abs(found[gate] - other[gate]).max() > 1e-5


def test_a_model_without_experts_has_nothing_to_balance(world, tmp_path):
    with pytest.raises(UserError, match=r"router_aux_loss_coef=0.1 but .* has no experts to balance"):
        worlds.train(tmp_path / "run", *world.flags, "--config.model.router_aux_loss_coef=0.1")
    assert not (tmp_path / "run").exists()
