"""Plans: the command's answers, a whole plan of a small model on this CPU's devices, the arithmetic of estimates."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import stat

import jax
import numpy as np
import pytest

from benchmarks import plans
from daajax import chips
from daajax.config import losses
from daajax.errors import UserError
from daajax.losses.objectives import OBJECTIVES
from daajax.losses.terms import Needs, bind
from daajax.models.families import architecture_of
from daajax.models.remat import REMAT
from daajax.planning import assumed, layouts, planner, report, roofline, topologies
from daajax.planning.compiling import Cache, Result, Sent, compile_for, digest_of, from_json, to_json
from daajax.planning.search import meshes
from daajax.planning.shapes import SHAPES
from tests import worlds

RECIPE = str(worlds.ROOT / "configs" / "dpo_llama.py")
SMALL = worlds.ARCHITECTURE | {"num_key_value_heads": 4, "max_position_embeddings": 2048}
CHIP = chips.Chip(flops=1e12, bandwidth=1e11, link=1e10)


def machines(memory=2**30, **changes):
    """This CPU's devices in place of chips."""
    found = topologies.Topology("cpu:8", jax.devices(), memory, CHIP, 1.0, 8, {}, "cpu 1")
    return dataclasses.replace(found, **changes)


def subject(topology=None, *, batch_size=16, lengths=(24, 40, 24), loss=None):
    """A small model on them, and its config."""
    flags = [f"--config.batch_size={batch_size}", "--config.model.dtype=float32", "--config.max_length=64"]
    flags += [] if loss is None else [f"--config.loss={loss}"]
    config, _ = worlds.parse("--config.model.path=model", "--config.data.path=assumed", *flags)
    terms = bind(losses(config))
    data = assumed.for_loss(lengths, batch_size, terms)
    architecture = architecture_of(SMALL)
    return layouts.Subject(architecture, terms, data, topology or machines(), "small"), config


# ---------------------------------------------------------------------- a whole plan


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan on two axes, and the folder it is kept in."""
    folder = tmp_path_factory.mktemp("plans") / "kept"
    whole, config = subject()
    config = layouts.with_options(config, {"mesh.fsdp": 4, "mesh.tensor": 2, "remat": "full"})
    return planner.compiled(layouts.make_layout(whole, config), Cache(str(folder))), folder


def test_what_is_held_is_what_the_compiler_is_given(planned):
    plan, _ = planned
    held, result = plan.layout.held, plan.update
    count = sum(leaf.size for leaf in jax.tree.leaves(plan.layout.update.state.params))
    assert 4 * count / 8 < held.parameters < 4 * count / 7  # cut over all, norms apart
    assert held.optimizer == pytest.approx(2 * held.parameters, abs=64)
    assert held.gradients == held.parameters
    assert 0 < result.arguments - (held.state - held.batch) < held.batch  # of which not all is read
    kinds = report.by_kind(plan)
    assert sum(kinds.values()) == result.peak
    assert plan.fits
    assert plan.reference_pass.peak < result.peak


def test_the_report_says_memory_arithmetic_time_what_is_sent_and_that_it_fits(planned):
    text = "\n".join(report.lines(planned[0]))
    for words in ("  parameters", "  gradients", "  activations", "  temporaries", "  together", "reference pass"):
        assert words in text
    assert re.search(r"arithmetic of an update: [\d.e+]+ FLOPs, [\d.e+]+ at least", text)
    assert "an estimate and not measured" in text
    assert re.search(r"all-gather .* in loops, over", text)
    assert text.splitlines()[-1].startswith("fits: ")
    values = report.as_values(planned[0])
    json.dumps(values)
    assert values["fits"]
    assert values["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}


def test_a_layers_weights_are_gathered_in_the_loops_over_layers(planned):
    sent = planned[0].update.sent
    loops = [
        one for one in sent if one.in_loop and one.kind == "all-gather" and one.times == SMALL["num_hidden_layers"]
    ]
    gathered = sum(math.prod(one.shape) * one.times for one in loops if one.group_size == 4)
    # Over fsdp, once for each pass at least, what tensor leaves of the layers.
    assert gathered >= SMALL["num_hidden_layers"] * layouts.layer_size(architecture_of(SMALL)) / 2


def test_a_program_is_compiled_once(planned, monkeypatch):
    plan, folder = planned
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    lowered = plan.layout.lower_update()
    monkeypatch.setattr(type(lowered), "compile", lambda *_, **__: pytest.fail("compiled again"))
    told = {"told": plan.layout.config.compiler_options}
    assert compile_for(lowered, machines(), Cache(str(folder)), told) == plan.update


def test_a_kept_result_is_found_by_all_that_determines_it():
    here = machines()
    known = digest_of("program", here)
    changes = [dict(name="cpu:4"), dict(compiler="cpu 2"), dict(compiler_options={"a": "1"})]
    others = {digest_of("program", dataclasses.replace(here, **change)) for change in changes}
    assert len(others | {known, digest_of("other", here)}) == 5
    assert digest_of("program", machines()) == known


def test_a_damaged_result_is_none(tmp_path):
    sent = (Sent("all-gather", "bf16", (2, 3), 4, True, True, 8, 5.0, 8),)
    result = Result(arguments=1, temporaries=2, sent=sent, program="abc")
    assert from_json(to_json(result)) == result
    cache = Cache(str(tmp_path))
    cache.put(result)
    assert cache.get("abc") == result
    for text in ("", "{}", to_json(result)[:-20], to_json(result).replace('"format": 1', '"format": 0')):
        (tmp_path / "abc.json").write_text(text)
        assert cache.get("abc") is None


# ---------------------------------------------------------------------- out of memory is an answer


@pytest.mark.parametrize("name", ["tpu.txt", "gpu.txt"])
def test_a_program_that_the_compiler_refuses_is_a_result(name, tmp_path):
    message = (pathlib.Path(__file__).parent / "out_of_memory" / name).read_text()
    whole, config = subject()
    layout = layouts.make_layout(whole, config)

    class Refused:
        def as_text(self):
            return "program"

        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(message)

    result = compile_for(Refused(), machines(), Cache(str(tmp_path)))
    assert result.refused
    assert result.buffers
    plan = report.Planned(layout, result)
    assert not plan.fits
    text = "\n".join(report.lines(plan))
    assert "does not fit: the update" in text
    assert "the largest buffers on a device are" in text
    assert "temporaries" not in report.by_kind(plan)
    assert compile_for(Refused(), machines(), Cache(str(tmp_path))) == result  # kept like any other
    assert report.as_values(plan)["peak"] is None


def test_any_other_failure_of_a_compiler_is_one_line():
    class Broken:
        def as_text(self):
            return "program"

        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("INTERNAL: a\nb")

    with pytest.raises(UserError, match="failed, and not for lack of memory"):
        compile_for(Broken(), machines(), Cache(None))


# ---------------------------------------------------------------------- what is counted


def test_the_roofline_is_the_longest_of_three():
    whole, config = subject()
    layout = layouts.make_layout(whole, config)
    sent = [Sent("all-gather", "bf16", (), 3, True, True, 8, 2e9, 8)]
    time = roofline.estimate(layout, sent)
    assert time.arithmetic == layout.flops[1] / 8e12
    assert time.links == 3 * 2e9 / 1e10
    assert (time.seconds, time.limit) == (time.links, "links")


@pytest.mark.parametrize(
    ("group_size", "on_host", "expected"),
    [
        (8, 8, 450e9),
        (64, 8, 400e9),  # the eight adapters of a host
        (8, 1, 50e9),  # one GPU of each host: its own
    ],
)
def test_groups_of_gpus_share_the_adapters_of_a_host(group_size, on_host, expected):
    topology = machines(chip=chips.CHIPS["NVIDIA H200"])
    assert roofline.bandwidth(topology, group_size, on_host) == expected


@pytest.mark.parametrize("remat", REMAT)
def test_activations_of_a_llama_are_those_that_remat_names(remat):
    # Of 8B: per token and layer the input, and by name 4,096 + 2 · 1,024, 4,096, 4,096, 2 · 14,336 features of 2 bytes.
    features = {
        "none": 4096 + 6144 + 4096 + 4096 + 28672,
        "dots": 4096 + 6144 + 4096 + 28672,
        "save_except_mlp": 4096 + 6144 + 4096 + 4096,
        "save_attention": 4096 + 4096,
        "full": 4096,
    }[remat]
    found = layouts.kept_bytes(architecture_of(SHAPES["llama-3.1-8b"]), remat, 1000, 1, np.float16)
    assert found == 32 * 1000 * features * 2


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.2-1b", 1.24), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("llama-3.1-405b", 405.85)],
)
def test_published_shapes_have_as_many_parameters_as_their_authors_say(name, billions):
    architecture = architecture_of(SHAPES[name])
    outer = architecture.vocab_size * architecture.hidden_size * (1 if architecture.tie_word_embeddings else 2)
    count = architecture.num_hidden_layers * layouts.layer_size(architecture) + outer
    assert count / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_assumed_data_have_what_every_loss_reads(name):
    terms = bind([{"name": name}])
    data = assumed.for_loss((8, 6, 4), 4, terms)
    needs = Needs.of(terms)
    assert all(getattr(data, field) is not None for field in needs.fields if field != "finished")
    responses = data.lengths.shape[1] - 1
    for term in terms:
        assert term.objective.mismatched or term.objective.responses in (None, responses) or responses == 1
    assert data.scored_lengths().sum() == data.lengths[:, 1:].sum()


def test_meshes_cut_heads_evenly_and_stay_within_a_host_of_gpus():
    architecture = architecture_of(SHAPES["llama-3.1-8b"])
    found = list(meshes(machines(of_host=4), architecture))
    assert (1, 8, 1, 1) in found
    assert (2, 1, 4, 1) in found
    assert (1, 2, 1, 4) in found
    assert all(data * fsdp * tensor * context == 8 and tensor <= 4 for data, fsdp, tensor, context in found)
    assert len(found) == len(set(found)) == (4 + 3 + 2) + (3 + 2 + 1)  # replicas, and rows that are cut


def test_the_readme_has_the_table_that_was_recorded():
    recorded = json.loads(plans.RESULTS.read_text())
    assert list(recorded) == [" ".join(line) for line in plans.LINES]
    assert plans.table(recorded) in (worlds.ROOT / "README.md").read_text()


# ---------------------------------------------------------------------- mistakes


@pytest.fixture
def without_compilers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no machines: name them with --topology=v5e:4x4"),
        (["--topology=v9:4x4"], "there is no kind 'v9'; there are v4, v5e, v5p, v6e, tpu7x, a100, h100, h200"),
        (["--topology=h200"], "'' is no topology"),
        (["--topology=v5e:4xx4"], "'4xx4' is no topology"),
        (["--topology=v5p:4x4"], "form a torus of 3 dimensions, such as v5p:4x4x4"),
        (["--topology=h200:1x2x8"], "hosts × GPUs of each"),
        (["--topology=h200:64"], "at most 16 of those"),
        (["--topology=v5e:4x4", "--slices=0"], "--slices=0: at least one is needed."),
        (["--topology=h200:8", "--slices=2"], "--slices=2 are of TPUs; hosts of GPUs are written as h200:2x8."),
        (["--topology=v5e:4x4"], "libtpu, which runs on any CPU: pip install 'daajax[tpu]'"),
        (["--topology=h200:8"], "pip install 'daajax[cuda13]'"),
        (["--topology=h200:8", "--model=llama-9"], "not among the published shapes, llama-3.2-1b"),
        (["--topology=h200:8", "--config.optimizer.name=adan"], "config.optimizer.name='adan' is unknown"),
        (["--topology=h200:8", "here"], "'here' is not understood"),
    ],
)
def test_a_mistake_is_one_line(flags, words, without_compilers, tmp_path):
    with pytest.raises(UserError) as raised:
        planner.plan(["plan", f"--config={RECIPE}", f"--cache={tmp_path}", *flags])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("200", "write tokens"), ("0,1", "write tokens"), ("a,b", "write tokens"), ("9,1,1", "max_length=8")],
)
def test_lengths_that_are_none_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        assumed.parse_lengths(text, 8)


def test_a_mesh_that_does_not_fit_the_machines_is_refused():
    whole, config = subject()
    with pytest.raises(UserError, match=r"mesh .* needs a multiple of 3 devices"):
        layouts.make_layout(whole, layouts.with_options(config, {"mesh.data": 3}))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache=.* cannot be made"):
        Cache(str(tmp_path / "file" / "folder"))


@pytest.mark.slow  # with its imports, where others share the cores
def test_the_command_ends_a_mistake_in_one_line():
    result = worlds.command("plan", f"--config={RECIPE}", "--topology=nowhere:8", "--model=llama-3.1-8b")
    assert result.returncode == 1
    assert result.stderr.strip().startswith("error: --topology=nowhere:8: there is no kind 'nowhere'")
    assert len(result.stderr.strip().splitlines()) == 1
