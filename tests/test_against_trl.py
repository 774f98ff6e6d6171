"""The benchmark beside TRL: what it compares is the same, and it says no speed where it is not."""

import json
import math
import re
import subprocess
import sys

import jax
import pytest
import safetensors
from tokenizers import Tokenizer

from benchmarks import against_trl, daajax_worker, workloads
from benchmarks.against_trl import GATES, Measured, check_losses, table
from benchmarks.workers import DiedError, RefusedError, Worker
from daajax import inputs, sharding
from daajax.config import losses
from daajax.errors import UserError
from daajax.losses.terms import bind
from daajax.models.families import read_architecture
from tests import worlds

PYTHON = worlds.ROOT / ".venv-trl/bin/python"
OPTIONS = {"batch_size": 4, "max_length": 96, "learning_rate": 1e-4, "beta": 0.1, "remat": "full", "dtype": "float32"}
OPTIONS["set"] = ["packing.row_length=512"]


def measured(seconds, *, peak=2**30, reference=None, passed=0):
    return Measured([{"wall": s, "cpu": 2 * s} for s in seconds], peak, {}, seconds[0], reference, passed)


class Scripted:
    """A worker that answers what it is told to."""

    def __init__(self, first, losses):
        self.first, self.losses, self.asked = first, losses, []

    def answer(self):
        return self.first

    def ask(self, what):
        self.asked.append(what)
        return {"compiled": {"wall": 1.0, "peak": 1}, "reference": {"wall": 3.0, "compiling": 1.0, "peak": 1}}

    def update(self, count):
        self.asked.append(count)
        return {"times": [{"wall": 1.0, "cpu": 2.0}] * count, "losses": self.losses[:count]}

    def end(self):
        return 2**30

    def kill(self):
        pass


def test_losses_that_agree_pass_and_the_largest_difference_is_known():
    assert check_losses([0.69, 0.5, 0.4, 0.3, 0.2], [0.69, 0.5, 0.4, 0.3005, 0.2], "TRL") == pytest.approx(5e-4)


@pytest.mark.parametrize("other", [0.3011, math.nan, math.inf])
def test_losses_that_differ_are_refused_with_by_how_much(other):
    with pytest.raises(UserError, match=r"differ by (0\.0011|nan|inf), allowed is 0\.001 .*no speed is printed"):
        check_losses([0.69, 0.5, 0.4, 0.3, 0.2], [0.69, 0.5, 0.4, other, 0.2], "TRL")


def test_too_few_losses_are_no_agreement():
    with pytest.raises(UserError, match="5 and 4 losses"):
        check_losses([0.5] * 5, [0.5] * 4, "TRL")


def test_losses_that_stay_where_they_began_show_nothing():
    still = [0.693, 0.694, 0.693, 0.712, 0.692]
    with pytest.raises(UserError, match=r"within 0\.019 of the first; .* more than 0\.02 .* higher --learning_rate"):
        check_losses(still, still, "TRL")
    assert check_losses([*still[:4], 0.672], [*still[:4], 0.672], "TRL") == 0


def test_in_bfloat16_losses_agree_less_closely_and_must_move_further():
    gate, theirs = GATES["bfloat16"], [0.69, 0.6, 0.57, 0.55, 0.524]
    assert check_losses([*theirs[:4], 0.5], theirs, "TRL", gate) == pytest.approx(24e-3)
    with pytest.raises(UserError, match=r"allowed is 0\.025 "):
        check_losses([*theirs[:4], 0.5], [*theirs[:4], 0.526], "TRL", gate)
    with pytest.raises(UserError, match=r"more than 0\.08 away"):
        check_losses([0.69, *[0.62] * 4], [0.69, *[0.62] * 4], "TRL", gate)


@pytest.mark.parametrize(("theirs", "agrees"), [(0.5004, True), (0.502, False)])
def test_a_speed_is_printed_only_where_the_losses_agree(tmp_path, monkeypatch, capsys, theirs, agrees):
    planned = {"versions": {"jax": "1"}, "layout": ["one row"], "attention": "dense", "device": "cpu"}
    planned |= {"order": [["3", "1"]] * 6, "updates": 32, "examples": 60, "peak": 1}
    ready = {"reference": {"wall": 6.0}, "versions": {"trl": "2"}, "peak": 1}
    monkeypatch.setattr(against_trl, "start_daajax", lambda *_: Scripted(planned, [0.6, *[0.5] * 5]))
    monkeypatch.setattr(against_trl, "start_trl", lambda *_: Scripted(ready, [0.6, *[theirs] * 5]))
    given = ["", "--tiny", "--batch_size=2", "--updates=3", "--rounds=2", f"--python={sys.executable}"]
    given.append(f"--output={tmp_path / 'result.md'}")
    if not agrees:
        with pytest.raises(UserError, match="no speed"):
            against_trl.main(given)
        assert capsys.readouterr().out == ""
        assert not (tmp_path / "result.md").exists()
        return
    against_trl.main(given)
    said = capsys.readouterr().out
    assert (tmp_path / "result.md").read_text() == said
    assert "agree to 0.0004" in said
    assert "4 of 64 pairs are longer" in said
    # An epoch has 32 updates of 1 s, and 64 pairs of reference; 12 took daajax 2 s and TRL 6 s.
    assert "| daajax | 1.00 | 2.00 | 2.00 | 43 | 1024 | 1.00 to 1.00 |" in said
    assert "| TRL, defaults | 1.00 (**1.0×**) | 2.00 (**1.0×**) | 2.00 (**1.0×**) | 64 (**1.5×**) |" in said
    assert "\nNot run, 2 pairs do not divide: … 4 pairs at once.\n" in said


def test_a_variant_that_runs_out_of_memory_is_said_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    planned = {"versions": {"jax": "1"}, "layout": ["one row"], "attention": "cudnn", "device": "a GPU"}
    planned |= {"order": [["3", "1"]] * 6, "updates": 32, "examples": 64, "peak": 1}
    ready = {"reference": None, "versions": {"trl": "2"}, "peak": 1}

    def start_trl(*given):
        if given[-1] == against_trl.LIGER["Liger's kernels"]:
            raise DiedError("a worker ended with code 1; its output:\ntorch.OutOfMemoryError: CUDA out of memory")
        return Scripted(ready, [0.6, *[0.5] * 5])

    monkeypatch.setattr(against_trl, "start_daajax", lambda *_: Scripted(planned, [0.6, *[0.5] * 5]))
    monkeypatch.setattr(against_trl, "start_trl", start_trl)
    line = ["", "--tiny", "--batch_size=2", "--updates=3", "--rounds=2", f"--python={sys.executable}", "--device=cuda"]
    against_trl.main([*line, "--variants", "defaults", "Liger's kernels"])
    said = capsys.readouterr().out
    assert "| TRL, defaults | 1.00 (**1.0×**)" in said
    assert "\nTRL ran out of the GPU's memory beside daajax: Liger's kernels.\n" in said
    assert "; a GPU, " in said
    assert "\nbfloat16, 2 pairs an update" in said


def test_ratios_are_of_medians_and_an_epoch_has_its_reference_pass():
    ours = measured([1.0, 2.0, 9.0], peak=3 * 2**20, reference=10.0, passed=100)
    theirs, precomputed = measured([8.0, 20.0, 30.0], peak=9 * 2**20), measured([12.0], reference=50.0, passed=100)
    rows = table(ours, {"online": theirs, "precomputed": precomputed}, epoch=800, batch_size=16)
    # 50 updates of 2 s and 800 · 10/100 s; 50 of 20 s; 50 of 12 s and 800 · 50/100 s.
    assert rows[2:] == [
        "| daajax | 2.00 | 4.00 | 8.00 | 180 | 3 | 1.00 to 9.00 |",
        "| TRL, online | 20.00 (**10.0×**) | 40.00 (**10.0×**) | 0.80 (**10.0×**) | 1000 (**5.6×**) | 9 (**3.0×**) "
        "| 8.00 to 30.00 |",
        "| TRL, precomputed | 12.00 (**6.0×**) | 24.00 (**6.0×**) | 1.33 (**6.0×**) | 1000 (**5.6×**) "
        "| 1024 (**341.3×**) | 12.00 to 12.00 |",
    ]


def test_what_is_written_for_trl_is_the_plans_order(tmp_path):
    work = workloads.make("made", None, tmp_path, tiny=True)
    told = {"model": str(work.model), "pairs": str(work.pairs), "folder": str(tmp_path), "options": OPTIONS}
    config = daajax_worker.make_config(told)
    assert (config.remat, config.model.dtype, config.packing.row_length) == ("full", "float32", "512")
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    architecture = read_architecture(config.model.path, length=config.max_length)
    data, whole = inputs.load_sets(config, architecture, bind(losses(config)), mesh)[0]
    plan = daajax_worker.beginning(whole, 5)
    assert plan.updates == 5
    assert plan.shapes == whole.shapes
    order = [[data.ids[example] for example in window] for window in plan.windows.tolist()]
    rows = workloads.in_order(work.rows, order)
    tokenizer = Tokenizer.from_file(str(work.model / "tokenizer.json"))
    for row, example in zip(rows, plan.windows.ravel().tolist(), strict=True):
        begin, (prompt, chosen, _) = data.starts[example], data.lengths[example].tolist()
        expected = tokenizer.encode(row["prompt"] + row["chosen"] + workloads.EOS).ids
        assert data.tokens[begin : begin + prompt + chosen].tolist() == expected
    assert data.lengths[:, 0].max() + data.lengths[:, 1:].max() > 0
    assert len(data.weights) < len(work.rows)  # some are longer than 96 tokens, and are in no update


def test_made_pairs_are_the_same_each_time():
    rows = workloads.made_rows(3, *workloads.MADE["made"])
    assert rows == workloads.made_rows(3, *workloads.MADE["made"])
    assert all(row["chosen"].startswith(" ") and row["chosen"] != row["rejected"] for row in rows)


def test_a_model_is_made_in_a_published_shape(tmp_path, monkeypatch):
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, vocab_size=600)
    monkeypatch.setitem(workloads.SHAPES, "small", workloads.SHAPES["llama-3.1-8b"] | small)
    work = workloads.make("feedback", None, tmp_path, tiny=True, shape="small")
    architecture = read_architecture(str(work.model), length=64)
    assert (architecture.vocab_size, architecture.tie_word_embeddings) == (600, False)
    assert architecture.kinds[0].rope is not None
    with safetensors.safe_open(work.model / "model.safetensors", "numpy") as file:
        assert file.get_tensor("lm_head.weight").std() == pytest.approx(0.02, rel=0.05)


def test_data_that_are_not_there_or_no_pairs_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("DAAJAX_ASSETS", raising=False)
    with pytest.raises(UserError, match="DAAJAX_ASSETS, which is not set"):
        workloads.read_rows("hh")
    with pytest.raises(UserError, match="there is no file"):
        workloads.read_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": ["b"], "rejected": "c"}) + "\n")
    with pytest.raises(UserError, match=r"line 1 of .* needs text in prompt, chosen, rejected"):
        workloads.read_rows(str(tmp_path / "pairs.jsonl"))


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--rounds=2", "--updates=2"], "must be at least 5"),
        (["--python=/nowhere/python"], "make setup-trl"),
        (["--batch_size=0"], r"^--batch_size=0 must be at least 1\.$"),
        (["--max_length=1"], r"^--max_length=1 must be at least 2\.$"),
        (["--updates=-1"], r"^--updates=-1 must be at least 1\.$"),
        (["--threads=0"], r"^--threads=0 must be from 1 to \d+, the cores that there are\.$"),
        (["--threads=100000"], r"^--threads=100000 must be from 1 to \d+, the cores that there are\.$"),
        (
            ["--batch_size=6", "--variants", "… 4 pairs at once"],
            r"4 pairs together, which do not divide --batch_size=6;",
        ),
        (
            ["--shape=llama-3.2-1b", "--model=there"],
            r"^--shape=llama-3\.2-1b is of a model that is made.*; drop one\.$",
        ),
        (["--variants", "Liger's kernels"], r"^--variants \"Liger's kernels\" needs --device=cuda\.$"),
    ],
)
def test_options_that_cannot_do_are_refused(flags, needed):
    with pytest.raises(UserError, match=needed):
        against_trl.parse([f"--python={sys.executable}", *flags])


def test_a_tiny_model_is_trained_faster_unless_a_rate_is_given():
    def rate(*flags):
        return against_trl.parse([f"--python={sys.executable}", *flags]).learning_rate

    assert [rate(), rate("--tiny"), rate("--tiny", "--learning_rate=0.5")] == [1e-4, 1e-2, 0.5]


def test_a_worker_that_falls_over_shows_what_it_printed(tmp_path):
    code = "import sys; sys.stderr.write('out of luck'); sys.exit(3)"
    worker = Worker([sys.executable, "-c", code], tmp_path / "log", cwd=tmp_path, environment={})
    with pytest.raises(DiedError, match=r"code 3; its output:\nout of luck"):
        worker.ask("update", count=1)
    worker.kill()


def test_what_a_worker_refuses_reaches_its_parent(tmp_path):
    code = "from benchmarks.workers import Parent; Parent().refuse('too short')"
    worker = Worker([sys.executable, "-c", code], tmp_path / "log", cwd=worlds.ROOT, environment={})
    with pytest.raises(RefusedError, match=r"^too short$"):
        worker.ask("prepare")
    worker.kill()


@pytest.mark.slow
def test_what_a_worker_refuses_is_one_line_of_the_benchmark(tmp_path):
    """A model that is not there, which the worker finds out, in the benchmark as a user starts it."""
    line = ["--tiny", "--batch_size=4", f"--model={tmp_path / 'none'}", f"--python={sys.executable}"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.against_trl", *line],
        cwd=worlds.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert said.startswith("error: ")
    assert "none" in said


def test_trls_worker_imports_nothing_of_daajax():
    imports = re.compile(r"^\s*(?:from|import) +(daajax|jax|configs)\b", re.MULTILINE)
    assert [name for name in ("workers", "trl_worker") if imports.search(source(name))] == []
    assert imports.search(source("daajax_worker"))


def source(name):
    return (worlds.ROOT / f"benchmarks/{name}.py").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="TRL is not installed: make setup-trl")
def test_the_benchmark_runs_at_a_tiny_size(tmp_path):
    line = ["--tiny", "--batch_size=4", "--updates=3", "--rounds=2", "--max_length=256"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.against_trl", *line, f"--output={tmp_path / 'result.md'}"],
        cwd=worlds.ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "| pairs a second |" in result.stdout
    assert (tmp_path / "result.md").read_text() in result.stdout
