"""Out of memory: what XLA says is read, the largest buffers are named, and what would help."""

import pathlib

import jax
import numpy as np
import pytest

from configs import base
from daajax import sharding, shortage, step
from daajax.config import resolve
from daajax.errors import UserError
from daajax.shortage import Buffer, Shortage
from tests import worlds

MESSAGES = pathlib.Path(__file__).parent / "out_of_memory"
GIB = 2**30


def message(name):
    return (MESSAGES / f"{name}.txt").read_text()


def config_of(**options):
    config = base.get_config()
    config.model.path, config.data.path, config.steps = "model", "pairs", 1
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in options.items()})
    return resolve(config)


# ---------------------------------------------------------------------- what XLA says


def test_what_a_compiler_for_gpus_lists_is_read():
    assert shortage.listed_in(message("gpu")) == [
        Buffer("layers/attention_block/bqhd,bkhd->bhqk/dot_general", "bf16[128,6,256,256]", 96 * 2**20),
        Buffer("loop_fusion.7", "f32[128,256,768]", 96 * 2**20),
        Buffer("an argument", "f32[256,128,3]", 384 * 2**10),
    ]


def test_what_a_compiler_for_tpus_lists_is_read():
    assert shortage.listed_in(message("tpu")) == [
        Buffer("transpose/layers/mlp_block/dot_general", "f32[8,4096,14336]", 1792 * 2**20),
        Buffer("while/body/attention_block/reduce_max", "bf16[32,1,4096,4096]", 1 * GIB),
        Buffer("copy.17", "s32[8,4096]", 128 * 2**10),
    ]


def test_a_message_that_lists_nothing_has_no_buffers():
    assert shortage.listed_in(message("tpu_temporaries")) == []
    assert shortage.listed_in("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6291456 bytes.") == []


def test_the_first_line_is_said_without_what_all_of_them_say():
    assert shortage.said_by_xla(jax.errors.JaxRuntimeError(message("tpu"))) == (
        "Ran out of memory in memory space hbm. Used 16.90G of 15.75G hbm. Exceeded hbm capacity by 1.15G"
    )
    error = jax.errors.JaxRuntimeError(message("tpu_temporaries"))
    assert shortage.said_by_xla(error) == (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (188.30G) exceeds available HBM "
        "(15.75G)"
    )


# ---------------------------------------------------------------------- the largest buffers


def test_buffers_that_are_alike_are_one_and_the_largest_come_first():
    buffers = [Buffer("a", "f32[1]", 5 * 2**20), *[Buffer("b", "f32[2]", GIB)] * 3, Buffer("c", "bf16[3]", 2 * GIB)]
    assert shortage.described(buffers) == "c bf16[3] of 2.00 GiB, 3 × b f32[2] of 1.00 GiB, a f32[1] of 5.00 MiB"
    assert shortage.described([Buffer(str(n), "f32[]", n) for n in range(9)]).count(" of ") == shortage.NAMED


def test_of_what_a_run_holds_the_part_on_one_device_counts():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    where = sharding.sharding(mesh, ("vocab", "embed"))
    tree = {"params": {"embed_tokens": jax.ShapeDtypeStruct((512, 64), np.float32, sharding=where)}}
    assert shortage.held_buffers(tree) == [Buffer("params/embed_tokens", "float32[256,32]", 512 * 64)]


# ---------------------------------------------------------------------- where it happens


def small():
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    where = sharding.sharding(mesh, ())
    held = {"state": {"params": jax.ShapeDtypeStruct((GIB // 4,), np.float32, sharding=where)}}
    return Shortage(config_of(), mesh, held)


def test_what_xla_lists_goes_before_what_is_held():
    with pytest.raises(UserError) as error, small().explained("the run"):
        raise jax.errors.JaxRuntimeError(message("gpu"))
    said = str(error.value)
    assert said.startswith("the run is out of memory (Out of memory while trying to allocate 96.00MiB); the largest ")
    assert "bf16[128,6,256,256] of 0.09 GiB" in said
    assert "params" not in said
    assert said.endswith("; set micro_batches=2 in place of 1, or set remat=dots in place of none, or "
                         "with more devices, set mesh.fsdp=2 in place of 1.")  # fmt: skip
    assert "\n" not in said


def test_where_xla_lists_nothing_the_largest_that_are_held_are_named(monkeypatch):
    held = r"state/params float32\[268435456\] of 1\.00 GiB; "
    with pytest.raises(UserError, match=held + "set micro_batches=2"), small().explained("compiling the update"):
        raise jax.errors.JaxRuntimeError(message("tpu_temporaries"))
    monkeypatch.setattr(shortage, "_limit", lambda: 3 * GIB // 2)  # most of which is held
    with pytest.raises(UserError, match=held + "set optimizer.mu_dtype=bfloat16"), small().explained("the run"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.")


def test_other_errors_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), small().explained("the run"):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")
    with pytest.raises(UserError, match=r"^mine$"), small().explained("the run"):
        raise UserError("mine")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("method", "what"), [("compile", "compiling the update"), ("__call__", "the run")])
def test_a_run_out_of_memory_names_buffers_and_changes(world, tmp_path, monkeypatch, method, what):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 26.51GiB.")

    monkeypatch.setattr(step.Update, method, fail)
    with pytest.raises(UserError) as error:
        worlds.train(tmp_path / "run", *world.flags)
    said = str(error.value)
    assert said.startswith(f"{what} is out of memory (Out of memory while trying to allocate 26.51GiB); the largest ")
    # 128 × 32 numbers of 4 bytes, thrice: the parameters and two moments, as large as those of two layers' MLPs.
    assert "state/params/embed_tokens float32[128,32] of 0.02 MiB" in said
    # Its head is by row.
    assert said.endswith(
        "set micro_batches=2 in place of 1, or set remat=dots in place of none, or set head=token in place of auto."
    )
