"""What the program of an update in bfloat16 holds: no product in float32, no array of tokens × vocabulary."""

import re

import jax
import numpy as np
import pytest

from daajax import policy, run, sharding
from daajax.config import losses
from daajax.data.batches import Batches
from daajax.losses.terms import bind
from daajax.models.families import architecture_of
from daajax.planning.collectives import collectives_of
from tests import worlds
from tests.data.test_batches import planned, random_examples, tokenized_data

# No two sizes are alike, so that an array is known by its shape. 4,096 scored slots are two chunks.
CONFIG = worlds.ARCHITECTURE | {"vocab_size": 992, "hidden_size": 48, "intermediate_size": 80}
EXAMPLES = 256


def program(form, **overrides):
    """The lowered update of a bfloat16 run on one device, and scored slots of its row."""
    flags = ["--config.model.dtype=bfloat16", f"--config.batch_size={EXAMPLES}", f"--config.head={form}"]
    flags += [f"--config.{name}={value}" for name, value in overrides.items()]
    config, _ = worlds.parse("--config.model.path=model", "--config.data.path=data", *flags)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    architecture = architecture_of(CONFIG)
    scorer = policy.make_scorer(config, architecture, mesh, adapters=policy.lora_of(config, architecture))
    update = run.make_update(config, scorer, scorer, bind(losses(config)), updates=1)
    data = tokenized_data(random_examples(EXAMPLES))
    plan = planned(data, batch_size=EXAMPLES, updates=1, row_multiple=1)
    batch = Batches(data, plan, np.zeros(len(data.tokens), np.float32))[0]
    return update.lower(batch, keys=plan.shape(0).keys).as_text(), plan.shape(0).scored


def products(text):
    """Dtypes and shapes of both operands of every product, and of what comes out."""
    tensor = r"tensor<((?:\d+x)*)(\w+)>"
    for match in re.finditer(rf"dot_general.*?: \({tensor}, {tensor}\) -> {tensor}", text):
        sizes, dtypes = match.groups()[::2], match.groups()[1::2]
        yield [tuple(map(int, size.split("x")[:-1])) for size in sizes], dtypes


@pytest.mark.parametrize(
    ("form", "overrides", "count"),
    [
        ("token", {}, 4),
        ("row", {}, 3),
        ("frozen", {"lora.rank": 4}, 2),
        ("row", {"loss": "{'name': 'tdpo2'}"}, 6),  # and the reference's logits, for its log-probs and twice for the kl
    ],
    ids=str,
)
def test_products_with_the_vocabulary_are_of_bfloat16_and_summed_in_float32(form, overrides, count):
    text, scored = program(form, **overrides)
    vocabulary = CONFIG["vocab_size"]
    found = [(shapes, dtypes) for shapes, dtypes in products(text) if any(vocabulary in shape for shape in shapes)]
    assert len(found) == count
    assert {dtypes for _, dtypes in found} == {("bf16", "bf16", "f32")}
    # Chunks of half the slots: no array has all of them and the vocabulary, but for the logits that `row` keeps.
    tensors = [tuple(map(int, size.split("x")[:-1])) for size in re.findall(r"tensor<((?:\d+x)+)\w+>", text)]
    with_vocabulary = {shape for shape in tensors if vocabulary in shape}
    largest = max(int(np.prod(shape)) // vocabulary for shape in with_vocabulary)
    assert scored > 2048
    assert (largest >= scored) == (form == "row")
    assert largest <= scored + 16


def test_no_product_of_a_bfloat16_update_is_of_float32_matrices():
    text, _ = program("token")
    wide = [(shapes, dtypes) for shapes, dtypes in products(text) if dtypes[:2] == ("f32", "f32")]
    # Attention's weights are not rounded before they meet the values, on a CPU.
    assert all(max(map(max, shapes)) <= 128 for shapes, _ in wide)
    assert len(list(products(text))) > 10


MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(fsdp=4, tensor=2),
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=2, context=4),
    dict(data=2, tensor=2, context=2),
]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_an_update_sends_what_its_mesh_needs_and_no_more(sizes):
    mesh = sharding.make_mesh(sizes)
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    cut = mesh.shape["fsdp"] * context  # devices that parameters are cut over, besides
    flags = ["--config.batch_size=16", "--config.head=token"]
    config, _ = worlds.parse("--config.model.path=model", "--config.data.path=data", *flags)
    architecture = architecture_of(CONFIG)
    scorer = policy.make_scorer(config, architecture, mesh)
    update = run.make_update(config, scorer, scorer, bind(losses(config)), updates=1)
    data = tokenized_data(random_examples(16))
    plan = planned(
        data, batch_size=16, updates=1, row_multiple=sharding.row_multiple(mesh), parts=context, row_length=512
    )
    batch = Batches(data, plan, np.zeros(len(data.tokens), np.float32)).shaped(0)
    found = collectives_of(update.compile(batch, keys=plan.shape(0).keys).as_text())
    sent = [one for one in found if one.group_size > 1]
    hidden, mlp, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 24
    # A layer's matrices, gathered when it is computed and again when it is differentiated: nothing else in a loop.
    widths = {hidden // tensor, kv // tensor, mlp // tensor}
    in_loop = [one for one in sent if one.in_loop and one.kind != "all-reduce"]
    gathered = [one for one in in_loop if one.kind == "all-gather"]
    matrices = [one for one in gathered if len(one.shape) == 2]
    assert all(sorted(one.shape) in [sorted((hidden, width)) for width in widths] for one in matrices)
    assert len(matrices) == (2 * 7 if cut > 1 else 0)
    assert {one.kind for one in in_loop} <= {"all-gather", "reduce-scatter"}
    # Rows that are cut: their keys and values, as often, and the gradients of these, of which each keeps its part.
    tokens = plan.rows // sharding.row_multiple(mesh) * plan.shape(0).length
    of_rows = [one for one in gathered if one not in matrices]
    assert [np.prod(one.shape) for one in of_rows] == [tokens * kv // tensor] * (4 if context > 1 else 0)
    scattered = [np.prod(one.shape) for one in in_loop if one.kind == "reduce-scatter" and len(one.shape) == 4]
    assert scattered == [tokens // context * kv // tensor] * (2 if context > 1 else 0)
    # Embeddings: hidden states of a device's own tokens, there and back.
    states = tokens // context * hidden
    exchanged = [one for one in sent if one.kind == "all-to-all"]
    assert sum(np.prod(one.shape) for one in exchanged) == (2 * states if cut > 1 else 0)
    # Outside of the loops the vocabulary's projection, and numbers of examples and tokens.
    outside = [one for one in sent if one.kind == "all-gather" and not one.in_loop and one.dtype == "f32"]
    projections = [one for one in outside if np.prod(one.shape) == CONFIG["vocab_size"] // tensor * hidden]
    assert len(projections) == (2 if cut > 1 else 0)
    assert all(np.prod(one.shape) <= 4 * 16 for one in outside if one not in projections)
    # Sums over the parts of the heads and of the gated block, [tokens, embed]: two forward, and what belongs to them
    # backward, once for each matrix that they come from.
    sums = [one for one in sent if one.kind == "all-reduce" and one.in_loop and np.prod(one.shape) == states]
    assert len(sums) == (7 if tensor > 1 else 0)
