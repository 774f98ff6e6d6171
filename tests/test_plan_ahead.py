"""Plans by the compilers of chips that are not there: through the command, as from a laptop."""

import importlib.machinery
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
AHEAD = pathlib.Path(sys.prefix) / "ahead"  # where `make setup-ahead` puts the compilers
GIB = 2**30


def plan(tmp_path, package, *flags, loss="dpo"):
    """The numbers of a plan of 8B, and what was said."""
    if importlib.machinery.PathFinder.find_spec(package, [str(AHEAD), *sys.path]) is None:
        pytest.skip(f"{package} is not installed: make setup-ahead")
    # As a user's: whatever the command needs of the environment it sets by itself.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TPU_"))}
    recipe, file = f"--config=configs/dpo_llama.py:{loss}", tmp_path / "plan.json"
    own = [recipe, "--model=llama-3.1-8b", f"--cache={tmp_path / 'plans'}", f"--output={file}"]
    done = subprocess.run(
        [sys.executable, "-m", "daajax.plan", *own, *flags],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.mark.slow
def test_8b_on_one_host_of_h200(tmp_path):
    values, said = plan(tmp_path, "jax_cuda13_plugin", "--topology=h200:8")
    assert values["fits"]
    # 12 bytes a parameter, cut over 8, and the norms.
    assert values["bytes"]["parameters"] + values["bytes"]["optimizer"] == pytest.approx(12 * 8.03e9 / 8, rel=1e-3)
    assert values["bytes"]["gradients"] == pytest.approx(4 * 8.03e9 / 8, rel=1e-3)
    assert 15 * GIB < values["peak"] < 24 * GIB
    assert values["reference_pass_peak"] < values["peak"]
    # Weights of the layers in bfloat16 come twice, 7 of 8 parts of them; the gradient goes once.
    layers = 2 * 6.98e9 * 7 / 8
    assert 2 * layers < values["collectives"]["all-gather"]["bytes"] < 2.2 * layers
    assert layers < values["collectives"]["reduce-scatter"]["bytes"] < 1.3 * layers
    assert "fits: " in said


@pytest.mark.slow
def test_a_pair_of_131072_tokens_a_response_on_one_host_of_h200(tmp_path):
    row = ["--lengths=98304,32768,32768", "--config.max_length=131072", "--config.batch_size=1", "--config.remat=full"]
    mesh = ["--config.mesh.fsdp=1", "--config.mesh.context=8"]
    values, _ = plan(tmp_path, "jax_cuda13_plugin", "--topology=h200:8", *row, *mesh, loss="simpo")
    assert (values["rows"], values["row_length"], values["attention"]) == (1, 163840, "cudnn")
    assert values["fits"]
    assert values["peak"] < 30 * GIB
    # Parameters are cut over the axis, and the layers' inputs: an eighth of the row, 4,096 features of 2 bytes.
    assert values["bytes"]["parameters"] == pytest.approx(4 * 8.03e9 / 8, rel=1e-3)
    assert values["bytes"]["activations"] == 32 * 163840 // 8 * 4096 * 2
    # Queries, keys, values and outputs go forward and again backward, and their gradients: 7 of 8 parts.
    sent = 32 * 163840 // 8 * 3 * 2 * (4096 + 1024) * 2 * 7 / 8
    assert sent < values["collectives"]["all-to-all"]["bytes"] < 1.02 * sent


@pytest.mark.slow
def test_8b_on_v5e_with_a_row_of_2048_tokens_a_chip(tmp_path):
    # Without a reference pass, which takes half as long to compile as the update.
    flags = ["--topology=v5e:4x4", "--config.batch_size=32", "--lengths=256,384,384"]
    values, said = plan(tmp_path, "libtpu", *flags, loss="simpo")
    assert (values["rows"], values["row_length"], values["attention"]) == (1, 2048, "splash")
    assert values["fits"]
    assert values["peak"] < 15.75 * GIB
    assert values["bytes"]["parameters"] == pytest.approx(4 * 8.03e9 / 16, rel=2e-3)
    assert values["reference_pass_peak"] is None
    assert "fits: " in said


LIMITS = """
import re
from daajax import plan
plan.prepare()
import jax
import numpy as np
from daajax import sharding
from daajax.planning import topologies
for name in ("v4:2x2x1", "v5e:4x4", "v5e:1x1", "v5p:4x4x4", "v6e:16x16", "tpu7x:2x2x1"):
    found = topologies.describe(name)
    # 64 × 4 on a torus of 16 × 16: axes that are no product of the torus's own.
    tensor = 4 if len(found.devices) > 4 else 1
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": tensor}, found.devices)
    whole = sharding.replicated(mesh)
    x = jax.ShapeDtypeStruct((300, 2**30), np.int8, sharding=whole)
    try:
        jax.jit(lambda x: x + 1, out_shardings=whole).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        limit = float(re.search(r"available HBM \\(([\\d.]+)G\\)", str(error))[1])
    print(name, limit, round(found.memory / 2**30, 2), found.chips, mesh.shape["fsdp"])
"""

SLICES = """
from daajax import plan
plan.prepare()
from daajax import sharding
from daajax.errors import UserError
from daajax.planning import search, topologies
from daajax.models.families import architecture_of
from daajax.planning.shapes import SHAPES
found = topologies.describe("v5e:2x4", slices=2)
print(found.name, found.slices, found.of_host, found.chips)
mesh = sharding.make_mesh({"data": 4, "fsdp": -1, "tensor": 2}, found.devices)
print([sorted({device.slice_index for device in part.flat}) for part in mesh.devices])
print(sorted({shape[0] for shape in search.meshes(found, architecture_of(SHAPES["llama-3.2-1b"]))}))
for refused in (
    lambda: sharding.make_mesh({"data": 1, "fsdp": -1}, found.devices),
    lambda: topologies.describe("tpu7x:2x2x1", slices=2),
    lambda: topologies.describe("h200:8", slices=2),
):
    try:
        refused()
    except UserError as error:
        print(error)
"""


def said(script):
    """What a script prints that describes TPUs, by line."""
    if importlib.machinery.PathFinder.find_spec("libtpu", [str(AHEAD), *sys.path]) is None:
        pytest.skip("libtpu is not installed: make setup-ahead")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TPU_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_slices_of_tpus_are_replicas():
    described, parts, replicas, *refused = said(SLICES)
    assert described == "2 slices of v5e:2x4 2 8 16.0"
    assert parts == "[[0], [0], [1], [1]]"
    assert replicas == "[2, 4, 8, 16]"
    assert len(refused) == 3
    assert "are of 2 slices" in refused[0]
    assert "set mesh.data to 2" in refused[0]
    assert "between slices of tpu7x nothing is known" in refused[1]
    assert refused[2] == "--slices=2 are of TPUs; hosts of GPUs are written as h200:2x8."


@pytest.mark.slow
def test_tpus_have_the_memory_that_their_compiler_says(tmp_path):
    rows = [line.split() for line in said(LIMITS)]
    assert all(limit == memory for _, limit, memory, *_ in rows)
    assert [(name, float(chips), int(fsdp)) for name, _, _, chips, fsdp in rows] == [
        ("v4:2x2x1", 4, 4),
        ("v5e:4x4", 16, 4),
        ("v5e:1x1", 1, 1),
        ("v5p:4x4x4", 64, 16),
        ("v6e:16x16", 256, 64),
        ("tpu7x:2x2x1", 4, 2),  # of 8 devices
    ]
