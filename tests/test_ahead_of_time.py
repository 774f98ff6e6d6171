"""What an update needs, read off its program before it runs: with adapters, nothing that a frozen base does not.

Llama 3.1 8B is compiled for chips that are not there, with the numbers of `benchmarks.memory`; what comes out is
compared with counts of parameters, and the texts of the programs are searched for what must not be.
"""

import dataclasses
import functools
import importlib.machinery
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from benchmarks.memory import LLAMA, PEAKS, RECORDED, peak
from daajax import policy, run, sharding
from daajax.compiler_options import SETS
from daajax.config import losses
from daajax.data.batches import Batches
from daajax.losses.terms import bind
from daajax.models.families import architecture_of
from daajax.ops.attention import dense
from daajax.ops.logits import CHUNK
from daajax.ops.splash import BLOCK
from tests import worlds
from tests.data.test_batches import planned, random_examples, tokenized_data

ROOT = pathlib.Path(__file__).parents[1]
AHEAD = pathlib.Path(sys.prefix) / "ahead"  # where `make setup-ahead` puts the compilers
LENGTH, ROWS, RANK = 4096, 2, 16  # tokens a row, rows a chip: two, so that no activation has the shape of a weight

pytestmark = pytest.mark.optimized


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


def multiplied(text):
    """Dtypes and shapes of both operands of every product in a compiled program, which names them."""
    defined = re.findall(r"%([\w.\-]+) = (\w+)\[([\d,]*)\]", text)
    defined += re.findall(r"%?([\w.\-]+): (\w+)\[([\d,]*)\]", text)  # what a computation is given
    types = {name: (dtype, tuple(map(int, sizes.split(","))) if sizes else ()) for name, dtype, sizes in defined}
    for operands in re.findall(r" = [^=]*? (?:dot|convolution)\(([^)]*)\)", text):
        yield [types[name] for name in re.findall(r"%([\w.\-]+)", operands)]


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


def over_two(text, sizes):
    """Shapes in a program two of whose axes have these sizes, as a mask or scores of queries by keys would."""
    found = set(re.findall(r"\[([\d,]+)\]", text)) | {s.strip("x") for s in re.findall(r"tensor<((?:\d+x)+)\w+>", text)}
    return {shape for shape in found if sum(int(size) in sizes for size in re.findall(r"\d+", shape)) > 1}


# ---------------------------------------------------------------------- any program, on CPU


SMALL = worlds.ARCHITECTURE | {  # no two sizes alike
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "tie_word_embeddings": False,
}


def small_update(*flags, micro_batches=1):
    """The update of a small model on one CPU device, and its program."""
    architecture = architecture_of(SMALL)
    data = tokenized_data(random_examples(8))
    plan = planned(data, batch_size=8, updates=1, row_multiple=1, micro_batches=micro_batches)
    batch = Batches(data, plan, np.zeros(len(data.tokens), np.float32))[0]
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    flags = ["--config.model.dtype=bfloat16", "--config.batch_size=8", *flags]
    options, _ = worlds.parse("--config.model.path=model", "--config.data.path=data", *flags)
    scorer = policy.make_scorer(options, architecture, mesh, adapters=policy.lora_of(options, architecture))
    update = run.make_update(options, scorer, scorer, bind(losses(options)), updates=1)
    return update, update.lower(batch, keys=plan.shape(0).keys).as_text()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_update_of_adapters_has_no_gradient_and_no_moment_of_the_base(micro_batches):
    found = {}
    for rank in (0, 4):
        update, text = small_update(f"--config.lora.rank={rank}", micro_batches=micro_batches)
        found[rank] = large_in_lowered(text, SMALL)
        held = {shape_of(str(leaf.shape)) for leaf in jax.tree.leaves(update.state)}
        assert (held & forms(SMALL) == set()) == (rank > 0)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(update.beside.frozen)} == ({"bfloat16"} if rank else set())
    assert found[4] == set()
    assert {shape_of(shape) for shape in found[0]} == forms(SMALL)  # the search finds what there is


def stacks(config, parts=1):
    """Shapes of all layers' matrices, or of one device's part of them."""
    return {shape for shape in forms(config, parts) if len(shape) == 3}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_parameters_are_cast_a_layer_at_a_time(remat):
    _, text = small_update(f"--config.remat={remat}")
    found = {dtype: re.findall(rf"tensor<((?:\d+x)+){dtype}>", text) for dtype in ("f32", "bf16")}
    shapes = {dtype: {shape_of(shape) for shape in shapes} for dtype, shapes in found.items()}
    assert shapes["bf16"] & stacks(SMALL) == set()
    assert shapes["f32"] >= stacks(SMALL)  # the search finds what there is
    assert shapes["bf16"] >= {(48, 80), (48, 48)}  # of one layer


def test_every_product_with_parameters_is_of_two_matrices():
    """XLA copies and transposes what has more axes on a CPU; only attention's products have a batch, of heads."""
    _, text = small_update("--config.model.dtype=float32")
    lines = re.findall(r"stablehlo\.dot_general .*", text)
    batched = [line for line in lines if "batching_dims" in line]
    for line in lines:
        operands = [re.findall(r"\d+", shape) for shape in re.findall(r"tensor<((?:\d+x)+)\w+>", line)]
        if line in batched:
            assert not {"48", "80", "160"} & {size for operand in operands for size in operand}, line
        else:
            assert [len(operand) for operand in operands] == [2, 2, 2], line
    assert len(batched) == 2 + 5  # of blockwise attention: forward, and backward with the scores once more
    assert len(lines) - len(batched) >= 3 * 7  # of the projections: forward, of what went in, of the weights


def test_the_search_for_masks_and_scores_finds_those_of_dense_attention():
    x, mask = jax.ShapeDtypeStruct((1, 384, 2, 8), np.float32), jax.ShapeDtypeStruct((1, 384, 384), np.bool_)
    lowered = jax.jit(dense).lower(x, x, x, mask)
    texts = lowered.as_text(), lowered.compile().as_text()
    assert all(over_two(text, {384}) for text in texts)


# ---------------------------------------------------------------------- 8B, for chips that are not there


@dataclasses.dataclass(frozen=True)
class Chip:
    """One of several, and what it has, bytes."""

    name: str
    count: int
    memory: float
    package: str


V6E = Chip("v6e:2x2", 4, 31.25 * 2**30, "libtpu")
V5E = Chip("v5e:2x2", 4, 15.75 * 2**30, "libtpu")  # of 16 GiB, what a program may have
H200 = Chip("h200:1", 1, 141e9, "jax_cuda13_plugin")
EIGHT_H200 = Chip("h200:8", 8, 141e9, "jax_cuda13_plugin")
# No chip is looked for, and none is taken, so that other tests may compile for one meanwhile.
ALONE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
KERNELS = {  # of attention, by their names in programs
    V5E.name: ("splash_mha_fwd_residuals", "splash_mha_dq_no_residuals", "splash_mha_dkv_no_residuals"),
    H200.name: ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"),
}


def name_of(value):
    return getattr(value, "name", value)


def python(chip, *arguments):
    """Runs this Python where the compilers for a chip are found; what it printed."""
    if importlib.machinery.PathFinder.find_spec(chip.package, [str(AHEAD), *sys.path]) is None:
        pytest.skip(f"{chip.package} is not installed: make setup-ahead")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    path = os.pathsep.join([str(AHEAD), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": path} | ALONE,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(chip, *, rank, remat, quantization=None, model="8b", length=LENGTH):
    """Numbers and texts of a program; each is compiled once."""
    return _compiled(chip, rank, remat, quantization, model, length)


@functools.cache
def _compiled(chip, rank, remat, quantization, model, length):
    shape = [f"--rank={rank}", f"--remat={remat}", f"--rows={ROWS}", f"--length={length}", f"--model={model}"]
    shape += [f"--quantization={quantization}"] if quantization else []
    with tempfile.TemporaryDirectory() as folder:
        python(chip, "-m", "benchmarks.memory", f"--chips={chip.name}", *shape, f"--output={folder}")
        files = (pathlib.Path(folder, name).read_text() for name in ("numbers.json", "lowered.txt", "compiled.txt"))
        numbers, *texts = files
    return json.loads(numbers), *texts


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
def test_adapters_of_8b_train_on_rows_of_4096_tokens(chip, remat):
    numbers, lowered, program = compiled(chip, rank=RANK, remat=remat)
    assert peak(numbers) < chip.memory
    assert 0 < numbers["arguments"] - argument_bytes(chip.count) < 2**18  # which is the batch
    assert numbers["outputs"] < 2**20  # the state takes the place of the one before
    assert large_in_lowered(lowered, LLAMA) == set()
    assert large_in_compiled(program, LLAMA, chip.count) == set()
    assert all(name in program for name in KERNELS[chip.name])


@pytest.mark.slow
def test_a_base_of_four_bits_is_never_there_whole_in_another_format():
    numbers, _, program = compiled(H200, rank=RANK, remat="none", quantization="nf4")
    plain, _, _ = compiled(H200, rank=RANK, remat="none")
    # A projection is 4 bits a weight and 8 for the scale of 64 of them; embeddings and head stay as they are.
    saved = LLAMA["num_hidden_layers"] * sum(map(math.prod, matrices(LLAMA)[1].values())) * (2 - 1 / 2 - 1 / 64)
    assert plain["arguments"] - numbers["arguments"] == pytest.approx(saved, rel=1e-3)
    # What the weights of a layer stand for is made when they are read, and not kept.
    assert numbers["temporaries"] - plain["temporaries"] < 2 * LLAMA["hidden_size"] * LLAMA["intermediate_size"]
    assert large_in_compiled(program, LLAMA, 1) == set()


@pytest.mark.slow
def test_all_of_8b_trains_on_eight_gpus_and_has_gradients_of_everything():
    numbers, lowered, program = compiled(EIGHT_H200, rank=0, remat="none")
    assert peak(numbers) < EIGHT_H200.memory
    # Parameters and two moments, cut up; norms are not.
    assert numbers["arguments"] == pytest.approx(3 * 4 * 8_030_261_248 / 8, rel=1e-3)
    # The search finds what there is: in the program every matrix of the model, here every one's part.
    assert {shape_of(shape) for shape in large_in_lowered(lowered, LLAMA)} == forms(LLAMA)
    # Nothing of all layers is there in the compute dtype: they are cast one at a time, and not kept for the backward.
    assert {shape_of(shape) for shape in re.findall(r"bf16\[([\d,]+)\]", program)} & stacks(LLAMA, 8) == set()
    parts = {shape_of(shape) for shape in large_in_compiled(program, LLAMA, EIGHT_H200.count)}
    assert {(32, 512, 14336), (512, 128256), (32, 512, 4096), (32, 512, 1024)} <= parts


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_a_step_needs_no_more_memory_than_was_recorded(name):
    shape = dict(RECORDED[name])
    assert shape.pop("rows") == ROWS
    chip = {chip.name: chip for chip in (V5E, EIGHT_H200)}[shape.pop("chips")]
    found = peak(compiled(chip, **shape)[0])  # first: without the compilers there is nothing to compare
    recorded = json.loads(PEAKS.read_text())[name]
    assert found <= 1.03 * recorded, f"{name}: {found:,} bytes a chip, {recorded:,} recorded; mend it or record anew"


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "parts"), [(V5E, 4), (EIGHT_H200, 8)], ids=["v5e", "h200"])
def test_products_with_the_vocabulary_are_of_bfloat16_and_none_is_of_all_tokens(chip, parts):
    rank, remat = (RANK, "full") if chip is V5E else (0, "none")
    _, lowered, program = compiled(chip, rank=rank, remat=remat)
    vocabulary, found = LLAMA["vocab_size"], []
    tensor = r"tensor<((?:\d+x)*)(\w+)>"
    for match in re.finditer(rf"dot_general.*?: \({tensor}, {tensor}\) -> {tensor}", lowered):
        if any(str(vocabulary) in size.split("x") for size in match.groups()[::2]):
            found.append(match.groups()[1::2])
    # A frozen head makes two products, one of a projection that is trained and rows too large to hold four.
    assert len(found) == (2 if rank else 4)
    assert set(found) == {("bf16", "bf16", "f32")}
    products = [pair for pair in multiplied(program) if any(vocabulary in shape for _, shape in pair)]
    assert len(products) == len(found)
    assert {dtype for pair in products for dtype, _ in pair} == {"bf16"}
    # Beside the projection itself, and its gradient, nothing has the vocabulary and more tokens than a chunk.
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", program)}
    hidden = {LLAMA["hidden_size"], LLAMA["hidden_size"] // parts}
    tokens = [math.prod(shape) // vocabulary for shape in shapes if vocabulary in shape and not hidden & set(shape)]
    assert CHUNK in tokens
    assert max(tokens) == CHUNK < ROWS * LENGTH * 3 // 4
    # Devices gather the projection in the compute dtype, and sum its gradient in float32, each its part.
    moved = re.findall(r"(all-gather|all-reduce|reduce-scatter)(?:-start)?[\w.]* = ([^=]*?) \1", program)
    kinds = {
        (kind, dtype)
        for kind, types in moved
        for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", types)
        if shape.split(",") == [str(vocabulary), str(LLAMA["hidden_size"])]
    }
    assert kinds <= {("all-gather", "bf16"), ("reduce-scatter", "f32")}
    assert len(kinds) == 2 or chip is V5E  # whose compiler gives them other names


SETS_FOR = """
import sys
from daajax import compiler_options, sharding
from daajax.planning.topologies import describe
mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, describe(sys.argv[1]).devices)
for name in compiler_options.SETS[sharding.device_of(mesh).platform]:
    print(name, len(compiler_options.chosen([name], mesh)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("chip", [V5E, V6E, EIGHT_H200], ids=lambda chip: chip.name)
def test_the_compilers_know_every_option_of_every_set(chip):
    sets = SETS["gpu" if chip is EIGHT_H200 else "tpu"]
    said = python(chip, "-c", SETS_FOR, chip.name).splitlines()
    assert said == [f"{name} {len(options)}" for name, options in sets.items()]


OFFLOADED = """
import json, sys
from benchmarks import memory
memory.LLAMA.update(num_hidden_layers=4, vocab_size=1024, hidden_size=1024, intermediate_size=2048)
for offload in (False, True):
    shape = dict(rank=0, quantization=None, remat="full", rows=1, length=512)
    print(json.dumps(memory.measure(None, "v5e:2x2", **shape, options=[f"optimizer.offload={offload}"])))
"""


@pytest.mark.slow
def test_moments_in_the_hosts_memory_are_not_among_what_a_tpu_holds():
    plain, offloaded = (json.loads(line) for line in python(V5E, "-c", OFFLOADED).splitlines())
    saved = plain["arguments"] - offloaded["arguments"]
    # Two of three float32 arrays a parameter; a few kilobytes of counts, batch and padding aside.
    assert saved == pytest.approx(2 / 3 * plain["arguments"], rel=0.01)
    assert offloaded["on_hosts"] == pytest.approx(saved, rel=0.01)
    assert plain["on_hosts"] == 0
    # They all come at once when the parameters are stepped; until then their room is free for activations.
    assert offloaded["temporaries"] < plain["temporaries"] + 1.5 * saved


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "model"), [(V5E, "1b"), (H200, "1b"), (H200, "8b")], ids=name_of)
def test_attention_on_chips_is_a_kernel_and_no_mask_and_no_scores_exist(chip, model):
    # Of a length that is no width of the model. Four pairs of 1,152 tokens: a prompt of 288, responses of 432.
    length, keys = 4608, 4 * 2 * (288 + 432)
    _, lowered, program = compiled(chip, rank=RANK, remat="full", model=model, length=length)
    for name in KERNELS[chip.name]:
        assert name in program, f"{name} is not called"
    sizes = {length, keys, -(-keys // BLOCK) * BLOCK}  # the last as the kernel has them
    assert over_two(lowered, sizes) == set()
    assert over_two(program, sizes) == set()
