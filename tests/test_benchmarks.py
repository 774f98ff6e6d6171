"""Every benchmark runs at a tiny size and prints the table it promises; one that compares refuses what differs."""

import argparse
import re

import jax
import numpy as np
import pytest

from benchmarks import attention, factors, head, limit, packing, scaling, workloads
from daajax.errors import UserError

# The ceiling's is in test_meters.py, that beside TRL in test_against_trl.py.


def table(said):
    """The rows of the first table of a text, as cells by column."""
    lines = [line for line in said.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(rows[1])) == {"-"}
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def run(main, monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    main()
    return table(capsys.readouterr().out)


def numbers(rows, *columns):
    return [[float(row[column].replace(",", "")) for column in columns] for row in rows]


# ---------------------------------------------------------------------- their tables


@pytest.mark.slow
def test_the_forms_of_the_head_are_timed(monkeypatch, capsys):
    sizes = ["--rows=1", "--scored=16", "--embed=8", "--vocab=64", "--repeats=1"]
    rows = run(head.main, monkeypatch, capsys, *sizes)
    assert len(rows) == len(head.WAYS)
    assert [next(iter(row.values())) for row in rows] == list(head.WAYS)


@pytest.mark.slow
def test_attention_is_timed_on_every_mix_of_lengths(monkeypatch, capsys):
    monkeypatch.setattr(attention, "MIXES", {"stories": attention.MIXES["stories"]})
    rows = run(
        attention.main, monkeypatch, capsys, *["--heads=2", "--kv_heads=1", "--head_dim=8", "--pairs=1", "--repeats=1"]
    )
    assert [row["attention"] for row in rows] == ["padded", "blockwise", "dense"]
    assert all(ratio > 0 for (ratio,) in numbers(rows, "of blockwise"))


@pytest.mark.slow
def test_rows_are_measured_by_how_full_they_are(monkeypatch, capsys):
    rows = run(packing.main, monkeypatch, capsys, "--examples=64", "--rows=1")
    assert [row["lengths"] for row in rows] == ["stories"] * 3 + ["dialogue"] * 3
    for tokens, best in numbers(rows, "tokens %", "best %"):
        assert 50 < tokens <= best <= 100


@pytest.mark.slow
def test_an_update_is_measured_along_one_axis(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "AXES", {"batch": (1, 2)})
    monkeypatch.setattr(scaling, "Case", lambda **_: TINY)
    rows = run(scaling.main, monkeypatch, capsys, "--repeats=1", "--axes=batch")
    assert [row["batch"] for row in rows] == ["1", "2"]
    assert float(rows[0]["of arithmetic"]) == 1
    assert all(cell > 0 for cells in numbers(rows, "GFLOP", "MiB, relative") for cell in cells)


TINY = scaling.Case(length=128, batch=1, vocabulary=64, layers=1, width=64)


@pytest.mark.slow
def test_planning_is_measured_by_the_example(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "EXAMPLES", (200, 400))
    rows = run(scaling.main, monkeypatch, capsys, "--repeats=1", "--axes=examples")
    assert [row["examples"] for row in rows] == ["200", "400"]


@pytest.mark.slow
def test_techniques_are_switched_off_one_by_one(capsys):
    factors.main(["factors", "--tiny", "--pairs=4", "--max_length=256", "--repeats=1"])
    rows = table(capsys.readouterr().out)
    assert [row["off"] for row in rows] == ["nothing", *list(factors.lines_on("cpu"))[1:]]
    assert numbers(rows[:1], "times as long", "FLOPs") == [[1, 1]]
    asked = dict(zip((row["off"] for row in rows), (flops for (flops,) in numbers(rows, "FLOPs")), strict=True))
    assert asked.pop("nothing") == 1
    assert asked.pop("head by row") == 1  # rows as short as these are never taken one by one
    assert min(asked.values()) > 1
    assert max(asked, key=asked.__getitem__) == "all"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("lora.rank=2",)])
def test_an_update_is_held_against_the_least_arithmetic(monkeypatch, capsys, options):
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    monkeypatch.setitem(limit.SHAPES, "small", limit.SHAPES["llama-3.1-8b"] | small | {"num_key_value_heads": 2})
    monkeypatch.setattr(limit, "SIZES", (64,))
    monkeypatch.setitem(limit.GOALS, "tiny", ((20, 0.4), (10, 0.4), 64))
    flags = ["--model=small", "--lengths=tiny", "--pairs=8", "--updates=4", "--option=model.dtype=float32"]
    limit.main(["limit", *flags, *(f"--option={option}" for option in options)])
    (row,) = table(capsys.readouterr().out)
    ((reached, pairs, most),) = numbers([row | {"of the limit": row["of the limit"].strip("*% ")}], *SHARES)
    assert reached == pytest.approx(100 * pairs / most, abs=1)
    ((*shares, kernels),) = numbers([row], "head %", "remat %", "sharing %", "packing %", "kernels %")
    assert all(0 < share <= 100 for share in shares)
    assert kernels > 0
    assert row["pairs in rows"].startswith("8 in 1 × 8 × ")


SHARES = ("of the limit", "pairs/s a chip", "limit")


def test_off_a_cpu_nothing_builds_a_mask():
    cpu, gpu = ({name: dict(options) for name, options in factors.lines_on(on).items()} for on in ("cpu", "gpu"))
    assert [options["attention"] for options in cpu.values() if "attention" in options] == ["dense"] * 2
    assert [options["attention"] for options in gpu.values() if "attention" in options] == ["blockwise"] * 2
    assert gpu["all"] == {key: value for options in gpu.values() for key, value in options.items()}


# ---------------------------------------------------------------------- what differs is refused


@pytest.mark.parametrize(
    ("key", "value"), [("grad_norm", 2.003), ("grad_norm", np.nan), ("logps/chosen", -50.1), ("logps/chosen", -49.9)]
)
def test_a_line_whose_first_update_differs_is_refused(key, value):
    same = {"grad_norm": 2.0, "logps/chosen": -50.0}
    factors.check({"": same, "remat": {"grad_norm": 2.001, "logps/chosen": -50.04}}, tolerance=1e-3)
    with pytest.raises(UserError, match=rf"^remat off: {key} of the first update is .*no time is printed\.$"):
        factors.check({"": same, "remat": same | {key: value}}, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "key"), [({"loss.beta": 0.2}, "grad_norm"), ({"max_length": 24}, "grad_norm")])
def test_a_line_of_another_loss_or_of_shorter_examples_is_refused(tmp_path, options, key):
    work = workloads.make("made", None, tmp_path, tiny=True)
    given = argparse.Namespace(dtype="float32", max_length=256, pairs=4)
    lines = {name: factors.prepare(work, given, str(tmp_path), changes) for name, changes in (("", {}), ("x", options))}
    with pytest.raises(UserError, match=rf"^x off: {key} of the first update is"):
        factors.measure(lines, repeats=1, tolerance=factors.TOLERANCE["float32"])


def test_an_attention_with_another_value_or_another_gradient_is_refused():
    gradients = tuple(jax.random.normal(jax.random.key(seed), (1, 4, 2, 8)) for seed in range(3))
    right = (jax.numpy.float32(3.0), gradients)
    attention.check({"dense": right, "other": right}, "dense", 1e-4)
    with pytest.raises(AssertionError, match="other"):
        attention.check({"dense": right, "other": (right[0] + 0.01, gradients)}, "dense", 1e-4)
    for place in range(3):
        wrong = [x.at[0, 1, 1, 3].add(0.01) if n == place else x for n, x in enumerate(gradients)]
        with pytest.raises(AssertionError, match="other"):
            attention.check({"dense": right, "other": (right[0], tuple(wrong))}, "dense", 1e-4)


@pytest.mark.slow
def test_every_way_to_attend_agrees_in_bfloat16_too():
    rows = attention.measure("dialogue", 2, attention.layer(2, 1, 16), ["blockwise", "dense"], 1, "bfloat16")
    assert [re.split(r" *\| *", row)[3] for row in rows] == ["padded", "blockwise", "dense"]
