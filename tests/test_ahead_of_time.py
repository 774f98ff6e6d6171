"""What an update needs, read off its program before it runs: with adapters, nothing that a frozen base does not.

Llama 3.1 8B is compiled for chips that are not there, with the numbers of `benchmarks.memory`; what comes out is
compared with counts of parameters, and the texts of the programs are searched for what must not be.
"""

import dataclasses
import importlib.machinery
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.memory import LLAMA
from daajax import policy, run, sharding
from daajax.config import losses
from daajax.data.batches import Batches
from daajax.losses.terms import bind
from daajax.models.families import architecture_of
from tests import worlds
from tests.data.test_batches import planned, random_examples, tokenized_data

ROOT = pathlib.Path(__file__).parents[1]
AHEAD = pathlib.Path(sys.prefix) / "ahead"  # where `make setup-ahead` puts the compilers
LENGTH, ROWS, RANK = 4096, 2, 16  # tokens a row, rows a chip: two, so that no activation has the shape of a weight


# ---------------------------------------------------------------------- what must not be in a program


def matrices(config):
    """Shapes of the base's matrices by name: of those that there are once, and of those that every layer has."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    outer = {"embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden)}
    inner = dict(q_proj=(hidden, hidden), k_proj=(hidden, kv), v_proj=(hidden, kv), o_proj=(hidden, hidden))
    return outer, inner | dict(gate_proj=(hidden, mlp), up_proj=(hidden, mlp), down_proj=(mlp, hidden))


def forms(config, parts=1):
    """Shapes that such a matrix may have in a program: of all layers or of one, whole or cut; axes in any order."""
    outer, inner = matrices(config)
    hidden, layers = config["hidden_size"], (config["num_hidden_layers"],)
    shapes = [*outer.values(), *inner.values(), *(layers + shape for shape in inner.values())]
    found = set()
    for shape in shapes:
        cut = list(shape)
        cut[shape.index(hidden)] //= parts
        found |= {tuple(sorted(shape)), tuple(sorted(cut))}
    return found


def shape_of(text):
    """Of a tensor as programs write it, without axes of size 1, in order of size."""
    return tuple(sorted(int(size) for size in re.findall(r"\d+", text) if size != "1"))


def large_in_lowered(text, config):
    """Float32 tensors in the shape of a matrix of the base, and products that come out in it, whatever their dtype."""
    floats = re.findall(r"tensor<((?:\d+x)+)f32>", text)
    products = re.findall(r"dot_general.*-> tensor<((?:\d+x)+)\w+>", text)
    return {found for found in [*floats, *products] if shape_of(found) in forms(config)}


def large_in_compiled(text, config, parts):
    """Float32 buffers in the shape of a matrix of the base, or of one device's part of it.

    What is in a fusion is never in memory: there are no buffers in computations that a fusion calls.
    """
    fused = set(re.findall(r"calls=%?([\w.\-]+)", text))
    computations = re.split(r"\n(?=\S)", text)
    names = [re.match(r"(?:ENTRY )?%?([\w.\-]+)", computation) for computation in computations]
    kept = [c for c, name in zip(computations, names, strict=True) if name is None or name[1] not in fused]
    assert len(kept) > 10, "the text of a program has another form than this reads"
    floats = itertools.chain.from_iterable(re.findall(r"f32\[([\d,]+)\]", computation) for computation in kept)
    return {found for found in floats if shape_of(found) in forms(config, parts)}


# ---------------------------------------------------------------------- any program, on CPU


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_update_of_adapters_has_no_gradient_and_no_moment_of_the_base(micro_batches):
    config = worlds.ARCHITECTURE | {"vocab_size": 160, "hidden_size": 48, "intermediate_size": 80}
    config["tie_word_embeddings"] = False
    architecture = architecture_of(config)
    data = tokenized_data(random_examples(8))
    plan = planned(data, batch_size=8, updates=1, row_multiple=1, micro_batches=micro_batches)
    batch = Batches(data, plan, np.zeros(len(data.tokens), np.float32))[0]
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    found = {}
    for rank in (0, 4):
        flags = [f"--config.lora.rank={rank}", "--config.model.dtype=bfloat16", "--config.batch_size=8"]
        options, _ = worlds.parse("--config.model.path=model", "--config.data.path=data", *flags)
        scorer = policy.make_scorer(options, architecture, mesh, adapters=policy.lora_of(options, architecture))
        update = run.make_update(options, scorer, scorer, bind(losses(options)), updates=1)
        found[rank] = large_in_lowered(update.lower(batch, keys=plan.shape(0).keys).as_text(), config)
        held = {shape_of(str(leaf.shape)) for leaf in jax.tree.leaves(update.state)}
        assert (held & forms(config) == set()) == (rank > 0)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(update.beside.frozen)} == ({"bfloat16"} if rank else set())
    assert found[4] == set()
    assert {shape_of(shape) for shape in found[0]} == forms(config)  # the search finds what there is


# ---------------------------------------------------------------------- 8B, for chips that are not there


@dataclasses.dataclass(frozen=True)
class Chip:
    """One of several, and what it has, bytes."""

    name: str
    count: int
    memory: float
    package: str


V5E = Chip("v5e:2x2", 4, 15.75 * 2**30, "libtpu")  # of 16 GiB, what a program may have
H200 = Chip("h200:1", 1, 141e9, "jax_cuda13_plugin")
EIGHT_H200 = Chip("h200:8", 8, 141e9, "jax_cuda13_plugin")


def compiled(folder, chip, *, rank, remat, quantization=None):
    """Numbers and texts of a program."""
    if importlib.machinery.PathFinder.find_spec(chip.package, [str(AHEAD), *sys.path]) is None:
        pytest.skip(f"{chip.package} is not installed: make setup-ahead")
    shape = [f"--rank={rank}", f"--remat={remat}", f"--rows={ROWS}", f"--length={LENGTH}"]
    shape += [f"--quantization={quantization}"] if quantization else []
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    path = os.pathsep.join([str(AHEAD), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", f"--chips={chip.name}", *shape, f"--output={folder}"],
        cwd=ROOT,
        env=inherited | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts = [(folder / name).read_text() for name in ("lowered.txt", "compiled.txt")]
    return json.loads((folder / "numbers.json").read_text()), *texts


def needed(numbers):
    return numbers["arguments"] + numbers["temporaries"] + numbers["outputs"]


def argument_bytes(chips):
    """Of a chip: the base in bfloat16, adapters and their two moments in float32.

    Hidden features are cut up over the chips; norms, and adapters' sides that have no hidden features, are on all.
    """
    (outer, inner), hidden, layers = matrices(LLAMA), LLAMA["hidden_size"], LLAMA["num_hidden_layers"]
    base = sum(map(math.prod, outer.values())) + layers * sum(map(math.prod, inner.values()))
    norms = (2 * layers + 1) * hidden
    assert base + norms == 8_030_261_248  # as the model's authors count
    adapters = 0
    for name, (inputs, outputs) in inner.items():
        # A is [inputs, rank], B [rank, outputs]; it is the side of the residual stream that is cut up.
        stream, other = (outputs, inputs) if name in ("o_proj", "down_proj") else (inputs, outputs)
        adapters += layers * RANK * (stream // chips + other)
    return 2 * (base // chips + norms) + 3 * 4 * adapters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "remat"), [(V5E, "full"), (H200, "none")], ids=lambda value: getattr(value, "name", value)
)
def test_adapters_of_8b_train_on_rows_of_4096_tokens(tmp_path, chip, remat):
    numbers, lowered, program = compiled(tmp_path, chip, rank=RANK, remat=remat)
    assert needed(numbers) < chip.memory
    assert 0 < numbers["arguments"] - argument_bytes(chip.count) < 2**18  # which is the batch
    assert numbers["outputs"] < 2**20  # the state takes the place of the one before
    assert large_in_lowered(lowered, LLAMA) == set()
    assert large_in_compiled(program, LLAMA, chip.count) == set()


@pytest.mark.slow
def test_a_base_of_four_bits_is_never_there_whole_in_another_format(tmp_path):
    numbers, _, program = compiled(tmp_path, H200, rank=RANK, remat="none", quantization="nf4")
    plain, _, _ = compiled(tmp_path / "plain", H200, rank=RANK, remat="none")
    # A projection is 4 bits a weight and 8 for the scale of 64 of them; embeddings and head stay as they are.
    saved = LLAMA["num_hidden_layers"] * sum(map(math.prod, matrices(LLAMA)[1].values())) * (2 - 1 / 2 - 1 / 64)
    assert plain["arguments"] - numbers["arguments"] == pytest.approx(saved, rel=1e-3)
    # What the weights of a layer stand for is made when they are read, and not kept.
    assert numbers["temporaries"] - plain["temporaries"] < 2 * LLAMA["hidden_size"] * LLAMA["intermediate_size"]
    assert large_in_compiled(program, LLAMA, 1) == set()


@pytest.mark.slow
def test_all_of_8b_trains_on_eight_gpus_and_has_gradients_of_everything(tmp_path):
    numbers, lowered, program = compiled(tmp_path, EIGHT_H200, rank=0, remat="none")
    assert needed(numbers) < EIGHT_H200.memory
    # Parameters and two moments, cut up; norms are not.
    assert numbers["arguments"] == pytest.approx(3 * 4 * 8_030_261_248 / 8, rel=1e-3)
    # The search finds what there is: in the program every matrix of the model, here every one's part.
    assert {shape_of(shape) for shape in large_in_lowered(lowered, LLAMA)} == forms(LLAMA)
    parts = {shape_of(shape) for shape in large_in_compiled(program, LLAMA, EIGHT_H200.count)}
    assert {(32, 512, 14336), (512, 128256), (32, 512, 4096), (32, 512, 1024)} <= parts
