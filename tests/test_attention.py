"""Which attention is chosen where, and that every one scores what the mask does, through the scoring function."""

import dataclasses
import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from daajax import attention, sharding
from daajax.errors import UserError
from daajax.models.architecture import LayerKind
from daajax.scoring import Scorer
from tests.test_scoring import ARCHITECTURE, expected_token_logps, mesh_of, scored_by

# What tells one device from another; none of them is here.
CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu", client=types.SimpleNamespace(platform_version="cpu"))
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite", client=CPU.client)
CUDA = types.SimpleNamespace(platform_version="CUDA 13000")
H200 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", client=CUDA, compute_capability="9.0")
A100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", client=CUDA, compute_capability="8.0")
MI300 = types.SimpleNamespace(
    platform="gpu", device_kind="AMD", client=types.SimpleNamespace(platform_version="rocm 70000")
)
MODEL = dataclasses.replace(ARCHITECTURE, head_dim=128)
CAPPED = dataclasses.replace(MODEL, attn_logit_softcapping=50.0)
WIDE = dataclasses.replace(MODEL, head_dim=256)


def choose(monkeypatch, name, device, architecture=MODEL, dtype="bfloat16", sizes=()):
    monkeypatch.setattr(sharding, "device_of", lambda mesh: device)
    return attention.choose(name, architecture, mesh_of(*sizes), jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("device", "architecture", "dtype", "name", "why"),
    [
        (TPU, MODEL, "bfloat16", "splash", "the one for tpu"),
        (TPU, CAPPED, "float32", "splash", "the one for tpu"),
        (H200, MODEL, "bfloat16", "cudnn", "the one for gpu"),
        (H200, WIDE, "bfloat16", "cudnn", "the one for gpu"),
        (CPU, MODEL, "float32", "blockwise", "the one for cpu"),
        (H200, MODEL, "float32", "blockwise", "cudnn does not compute in float32"),
        (H200, CAPPED, "bfloat16", "blockwise", "cudnn cannot cap scores, and this model caps them at 50"),
        (A100, WIDE, "bfloat16", "blockwise", "cudnn needs a head_dim that is a multiple of 8 and at most 128"),
        (MI300, MODEL, "bfloat16", "blockwise", "cudnn runs on NVIDIA GPUs only"),
    ],
)
def test_the_platform_the_model_and_the_dtype_choose_and_it_is_said_why(
    monkeypatch, device, architecture, dtype, name, why
):
    chosen = choose(monkeypatch, "auto", device, architecture, dtype)
    assert chosen.name == name
    assert chosen.why.startswith(why)


@pytest.mark.parametrize(
    ("name", "device", "architecture", "dtype", "says"),
    [
        (
            "splash",
            H200,
            MODEL,
            "bfloat16",
            "splash runs on TPUs only and this is a gpu; there is cudnn, blockwise.",
        ),
        ("cudnn", TPU, MODEL, "bfloat16", "NVIDIA GPUs only and this is a tpu; there is splash, blockwise."),
        (
            "cudnn",
            H200,
            MODEL,
            "float32",
            "does not compute in float32: set model.dtype=bfloat16 for it; there is blockwise",
        ),
        ("cudnn", H200, CAPPED, "bfloat16", "cannot cap scores"),
        (
            "dense",
            TPU,
            MODEL,
            "bfloat16",
            "builds the whole mask, on CPUs only, and this is a tpu; there is splash, block",
        ),
    ],
)
def test_an_attention_that_does_not_serve_is_refused_with_those_that_do(
    monkeypatch, name, device, architecture, dtype, says
):
    with pytest.raises(UserError) as error:
        choose(monkeypatch, name, device, architecture, dtype)
    assert says in str(error.value)


def test_rows_that_are_cut_over_more_devices_than_there_are_key_value_heads_are_not_for_cudnn(monkeypatch):
    assert choose(monkeypatch, "auto", H200, sizes=(1, 4, 1, 2)).name == "cudnn"  # of two heads one each
    chosen = choose(monkeypatch, "auto", H200, sizes=(1, 2, 1, 4))
    assert chosen.name == "blockwise"
    assert "2 key-value heads do not divide over mesh.tensor=1 × mesh.context=4" in chosen.why


@pytest.mark.parametrize(("name", "devices"), [("dense", (CPU,)), ("blockwise", (CPU, TPU, H200))])
def test_what_is_asked_for_is_taken_wherever_it_serves(monkeypatch, name, devices):
    for device in devices:
        assert choose(monkeypatch, name, device) == (name, "as asked for")


@pytest.fixture
def anywhere(monkeypatch):
    """Kernels as their twins on CPU: cuDNN's computed by XLA, the TPU's interpreted."""

    def twin(way, **options):
        def make(architecture, longest):
            see, attend = way.make(architecture, longest)
            return see, functools.partial(attend, **options)

        return dataclasses.replace(way, make=make, lacks=lambda *_: None)

    there = attention.ATTENTION
    twins = dict(cudnn=twin(there["cudnn"], implementation="xla"), splash=twin(there["splash"], interpret=True))
    monkeypatch.setattr(attention, "ATTENTION", there | twins)


def scorer(name, sizes=(8, 1, 1), architecture=ARCHITECTURE):
    types_ = dict(dtype=jnp.dtype("float32"), param_dtype=jnp.float32)
    return Scorer.make(architecture, mesh_of(*sizes), attention=name, remat="none", longest=21, **types_)


KERNELS = ["cudnn", pytest.param("splash", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (2, 2, 1, 2)])
def test_rows_score_what_sequences_score_one_by_one(anywhere, name, sizes):
    # Float32 through two layers; log-probs down to -10 nats. No example here has more than 21 tokens and a response.
    np.testing.assert_allclose(scored_by(scorer(name, sizes), sizes), expected_token_logps(), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 1, 2)])
@pytest.mark.parametrize("name", ["blockwise", *KERNELS])
def test_layers_with_and_without_a_window_score_what_the_mask_does(anywhere, name, sizes):
    near = LayerKind(sliding_window=4)
    mixed = dataclasses.replace(ARCHITECTURE, kinds=(near, LayerKind()), kind_of=(0, 1))
    expected = scored_by(scorer("dense", architecture=mixed))
    real = ~np.isnan(expected)
    assert np.abs(expected - expected_token_logps())[real].max() > 0.1  # the window hides something
    found = scored_by(scorer(name, sizes, architecture=mixed), sizes)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
