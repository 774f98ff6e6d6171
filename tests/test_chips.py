"""Peaks: per chip as published, per device as JAX shows them, and none that nobody published."""

import types

import jax
import pytest

from daajax import chips


def devices(kind, count, **attributes):
    return [types.SimpleNamespace(device_kind=kind, **attributes) for _ in range(count)]


@pytest.mark.parametrize(
    ("kind", "attributes", "of_one"),
    [
        # As libtpu describes them: v4 by core unless its two are fused, v5p by chip, TPU7x by core.
        ("TPU v4", {"num_cores": 2}, 275e12),
        ("TPU v4", {"num_cores": 1}, 137.5e12),
        ("TPU v5 lite", {"num_cores": 1}, 197e12),
        ("TPU v5", {"num_cores": 2}, 459e12),
        ("TPU v6 lite", {"num_cores": 1}, 918e12),
        ("TPU7x", {"num_cores": 1}, 2307e12 / 2),
        ("NVIDIA H200", {}, 989e12),
        ("NVIDIA A100-SXM4-80GB", {}, 312e12),
        # A GPU may report its multiprocessors, which are no chips.
        ("NVIDIA H100 80GB HBM3", {"num_cores": 132}, 989e12),
    ],
)
def test_a_device_has_its_share_of_what_its_chip_can_do(kind, attributes, of_one):
    peak = chips.peak_of(devices(kind, 4, **attributes), "bfloat16")
    assert peak.flops == 4 * of_one
    assert peak.flops == peak.chips * chips.CHIPS[kind].flops


def test_two_devices_of_a_tpu7x_are_one_chip():
    assert chips.peak_of(devices("TPU7x", 8, num_cores=1), "bfloat16").chips == 4


@pytest.mark.parametrize(
    ("kind", "dtype", "words"),
    [
        ("TPU v5 lite", "float32", "no peak is published for products in float32"),
        ("cpu", "bfloat16", "no peak is known of cpu"),
        ("NVIDIA Wonderful", "bfloat16", "no peak is known of NVIDIA Wonderful"),
    ],
)
def test_a_peak_that_nobody_published_is_not_made_up(kind, dtype, words):
    peak = chips.peak_of(devices(kind, 2, num_cores=1), dtype)
    assert (peak.flops, peak.chips) == (None, 2)
    assert words in peak.words
    assert peak.words.endswith("it is peak_flops")


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", "float32"), ("TPU v6 lite", "bfloat16")])
def test_what_somebody_measured_goes_before_the_table(kind, dtype):
    assert chips.peak_of(devices(kind, 3), dtype, 5e10).flops == 15e10


def test_this_machine_is_asked_by_the_names_of_jax():
    assert chips.peak_of(jax.devices(), "bfloat16").words.startswith(
        f"no peak is known of {jax.devices()[0].device_kind}"
    )
