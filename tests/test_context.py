"""Rows whose length is cut over devices: runs on a mesh with the axis context are those on one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import attention, sharding
from daajax.data import parts
from daajax.errors import UserError
from daajax.models.architecture import LayerKind
from tests import worlds
from tests.ops import rows as of_rows
from tests.test_scoring import ARCHITECTURE

MESH = ("--config.mesh.fsdp=2", "--config.mesh.context=4")
PAIRS = str(worlds.ROOT / "configs" / "dpo_llama.py")
SMALL = ("batch_size=8", "steps=3", "epochs=None", "log.every=1", "model.dtype=float32", "remat=none")
SMALL = tuple(f"--config.{option}" for option in SMALL)
CASES = {  # name: recipe, flags; a coupled loss in parts, whole distributions, a projection that is not trained
    "kto": (f"{PAIRS}:kto", SMALL),
    "aot": (f"{PAIRS}:aot", (*SMALL, "--config.micro_batches=2", "--config.packing.prefix_sharing=False")),
    "tdpo2": (f"{PAIRS}:tdpo2", (*SMALL, "--config.remat=full")),
    "lora": (worlds.STORIES, ("--config.lora.rank=4", "--config.remat=dots", "--config.packing.enabled=False")),
    "int8": (
        worlds.STORIES,
        ("--config.lora.rank=4", "--config.lora.quantization=int8", "--config.reference.live=True"),
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_on_rows_that_are_cut_is_the_run_on_one_device(world, tmp_path, name):
    recipe, flags = CASES[name]
    held_out = [f"--config.eval_data.path={world.data}", f"--config.eval_data.cache_dir={tmp_path / 'tokens'}"]
    flags = [*world.flags, *flags, *held_out]
    one = worlds.train(tmp_path / "one", *flags, recipe=recipe)
    own = f"--config.reference.cache_dir={tmp_path / 'reference'}"  # scored on the mesh as well
    cut = worlds.train(tmp_path / "cut", *flags, *MESH, own, recipe=recipe, devices=8)
    for column, within in (("loss", 1e-5), ("grad_norm", 5e-5)):
        assert worlds.deviation(worlds.column(cut, column), worlds.column(one, column)) < within, column
    assert cut[-1]["eval/loss"] == pytest.approx(one[-1]["eval/loss"], rel=1e-5)
    for folder in ("model", "adapter"):
        written, expected = (worlds.load_tensors(tmp_path / run / folder) for run in ("cut", "one"))
        assert written.keys() == expected.keys()
        for tensor, value in expected.items():
            np.testing.assert_allclose(written[tensor], value, atol=2e-4, err_msg=tensor)


@functools.cache
def attention_of_parts(name, window, keys):
    """Attention over four devices, each with a quarter of every row."""
    sizes = dict(num_attention_heads=of_rows.HEADS, num_key_value_heads=of_rows.KV_HEADS, head_dim=of_rows.HEAD_DIM)
    model = dataclasses.replace(ARCHITECTURE, **sizes, kinds=(LayerKind(sliding_window=window),))
    devices = sharding.MeshDevices(sharding.make_mesh(dict(context=4), jax.devices()[:4]))
    see, attend = attention.make(name, model, devices)

    @jax.jit
    def run(rows, queries, keys_, values, cotangent):
        nothing = jnp.zeros((len(queries), of_rows.SLOTS, of_rows.RESPONSES), jnp.int32)
        seen = see({**rows._asdict(), "lengths": nothing}, keys)
        output, pull = jax.vjp(lambda *x: attend(*x, seen), queries, keys_, values)
        return output, *pull(cotangent)

    return run


def cut_in_four(rows, arrays, window=None, name="blockwise"):
    """Output and gradients, of rows whose tokens lie part by part."""
    length = rows.segments.shape[1]
    order, places = parts.order(length, 4), parts.places(length, 4)
    run = attention_of_parts(name, window, of_rows.CAPACITY[length])
    found = run(type(rows)(*(x[:, order] for x in rows)), *(x[:, order] for x in arrays))
    return [np.asarray(x)[:, places] for x in found]


@pytest.mark.parametrize(("name", "window"), [("K=2", None), ("K=4 ragged", 6), ("own prompts", None), ("padding", 6)])
def test_nothing_outside_what_a_query_sees_reaches_it_from_another_device(name, window):
    rows = of_rows.CASES[name]
    arrays = of_rows.operands(rows)
    found = cut_in_four(rows, arrays, window)
    of_rows.assert_near(found, of_rows.by_the_rule(rows, *arrays, window), 5e-6)
    of_rows.assert_nothing_leaks(cut_in_four, rows, window)


def test_padding_is_silent_on_every_device():
    of_rows.assert_padding_is_silent(cut_in_four, of_rows.CASES["padding"])


def test_the_mask_of_rows_that_are_cut_is_the_rule():
    rows = of_rows.CASES["K=4 ragged"]
    arrays = of_rows.operands(rows)
    found = cut_in_four(rows, arrays, 6, "dense")
    of_rows.assert_near(found, of_rows.by_the_rule(rows, *arrays, 6), 5e-6)


def refused(world, tmp_path, *flags):
    with pytest.raises(UserError) as error:
        worlds.train(tmp_path / "run", *world.flags, *MESH, *flags, devices=8)
    assert not (tmp_path / "run").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--config.packing.row_length=640"],
            r"^packing\.row_length=640 must be a multiple of 512: 128 tokens on each of mesh\.context=4 devices; round",
        ),
        (["--config.head=row"], r"^head='row' does not do: no device has a whole row, mesh\.context=4 cuts each; set"),
    ],
)
def test_what_does_not_go_with_rows_that_are_cut_is_refused_in_one_line(world, tmp_path, flags, says):
    assert re.search(says, refused(world, tmp_path, *flags))


def test_parameters_that_do_not_divide_over_both_axes_are_named(tmp_path):
    narrow = worlds.make_world(tmp_path / "world")
    worlds.make_model(tmp_path / "world" / "model", hidden_size=20, num_attention_heads=2)
    line = refused(narrow, tmp_path)
    assert "axis 'embed': 20 do not divide over 8 devices of mesh axis 'fsdp' × 'context'; choose a mesh" in line
