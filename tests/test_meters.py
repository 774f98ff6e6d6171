"""What a run says of its speed: against a known peak or none, the same run by run."""

import math
import re

import pytest

from benchmarks import ceiling
from daajax import flops
from tests import worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


def test_speed_is_measured_against_what_somebody_knows_better(world, tmp_path, capsys):
    history = worlds.train(tmp_path / "run", *world.flags, "--config.steps=2", "--config.peak_flops=5e9")
    assert "mfu: against peak_flops: 5e+09 FLOP/s a device\n" in capsys.readouterr().out
    for values in history:
        factors = [values[f"mfu/{step}"] for step in flops.STEPS]
        assert values["mfu"] == pytest.approx(values["hfu"] * math.prod(factors))
        # hfu · seconds · peak are the FLOPs of an update: 64 parameters · tokens and more, below 10^8 by far.
        assert 1e6 < values["hfu"] * values["update_seconds"] * 5e9 < 1e9
        assert values["pairs_per_second_per_chip"] == values["pairs_per_second"]  # on one device
    assert history[0]["compile_seconds"] > 0
    assert "compile_seconds" not in history[1]


@pytest.mark.slow
def test_without_a_peak_the_reason_is_said_once(world, tmp_path, capsys):
    history = worlds.train(
        tmp_path / "run", *world.flags, "--config.steps=2", "--config.remat=full", "--config.head=token"
    )
    said = capsys.readouterr().out
    assert len(re.findall("mfu: left out, no peak is published for products in float32; .*peak_flops\n", said)) == 1
    assert "mfu" not in history[0]
    # One pass of four is done again; the head makes its logits twice.
    assert 0.7 < history[0]["mfu/remat"] < 0.85
    assert 0.9 < history[0]["mfu/head"] < 1
    assert history[0]["mfu/sharing"] == 1


def test_what_is_measured_here_can_be_pasted(world, monkeypatch, capsys):
    monkeypatch.setattr(ceiling, "SECONDS", 0.0)
    monkeypatch.setattr("sys.argv", ["ceiling", "--sizes=32,64", "--repeats=1"])
    ceiling.main()
    said = capsys.readouterr().out
    assert said.startswith("cpu, ")
    assert len(re.findall(r"^\| (32|64) \| [\d.e-]+ \| [\d.e-]+ \|$", said, re.MULTILINE)) == 2
    for line in said.splitlines()[-2:]:
        config, _ = worlds.parse(*world.flags, *line.split())
        assert config.peak_flops > 0
