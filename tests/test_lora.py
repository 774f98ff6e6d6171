"""Adapters: their mathematics, and runs that train nothing else."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from daajax import generate
from daajax.errors import UserError
from daajax.evaluate import evaluate
from daajax.export import export
from daajax.models import decoder, lora
from daajax.models.families import architecture_of
from daajax.models.parameters import is_decayed
from daajax.models.storage import Later
from daajax.ops import attention
from tests import stores, worlds
from tests.models.test_decoder import rows
from tests.oracle import make_values as oracle

WHOLE = "--config.lora.modules_to_save=('norm',)"
FLAGS = ["--config.lora.rank=4", "--config.optimizer.learning_rate=1e-2", "--config.optimizer.schedule=constant"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def flags(world):
    return [*world.flags, *FLAGS]


@pytest.fixture(scope="module")
def plain(world, flags):
    """A run of fresh adapters, with held-out data, and its metrics."""
    folder = world.folder / "plain"
    held_out = [f"--config.eval_data.path={world.data}", "--config.eval_data.limit=10"]
    return folder, worlds.train(folder, *flags, *held_out, "--config.checkpoint.every=2")


def model_of(name, targets=("all-linear",), **options):
    architecture = architecture_of(oracle.MODELS[name])
    adapters = lora.Lora(4, 8.0, lora.targets_of(architecture, targets), **options)
    model = decoder.Decoder(architecture, attend=attention.dense, lora=adapters)
    params = decoder.init_params(model, jax.random.key(0))
    drawn = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params["lora"])
    return model, params, {**params, "lora": drawn}


def hidden(model, params):
    tokens, positions, mask = rows()
    return model.apply(decoder.variables(params), tokens, positions, mask)[0]


@pytest.mark.parametrize("name", ["llama31", "biased_linear", "gpt2"])
def test_fresh_adapters_change_nothing_and_others_are_added_to_the_weights(name):
    model, fresh, moved = model_of(name)
    base = hidden(model, lora.without(fresh))
    np.testing.assert_array_equal(hidden(model, fresh), base)
    assert np.abs(hidden(model, moved) - base).max() > 0.1
    layers = dict(moved["layers"])
    for target in model.lora.targets:
        a, b = (np.asarray(moved["lora"]["layers"][f"{target}_{side}"], np.float64) for side in "ab")
        layers[target] = jnp.asarray(np.asarray(layers[target], np.float64) + 2.0 * a @ b, jnp.float32)
    np.testing.assert_allclose(
        hidden(model, moved), hidden(model, {**lora.without(moved), "layers": layers}), atol=2e-4
    )
    later = lora.merged(jax.tree.map(Later.of, lora.without(moved)), lora.split(moved, model.lora)[0], model.lora)
    melted = jax.tree.map(lambda parameter: parameter.make(), later)
    np.testing.assert_allclose(hidden(model, melted), hidden(model, moved), atol=2e-4)


def test_weight_decay_is_for_adapters_too():
    _, params, _ = model_of("gpt2")
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    assert all(is_decayed(path) for path in paths if path.startswith("lora/"))


def test_rank_stabilized_adapters_weigh_by_the_root_of_the_rank():
    assert lora.Lora(16, 8.0, ("q_proj",)).scale == 0.5
    assert lora.Lora(16, 8.0, ("q_proj",), rslora=True).scale == 2.0


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("llama31", ["c_attn"], "'c_attn'"),
        ("gpt2", ["gate_proj"], "'gate_proj'"),
        ("mixtral", ["up_proj"], "'up_proj'"),
    ],
)
def test_targets_that_are_not_there_are_refused(name, targets, words):
    with pytest.raises(UserError, match=words):
        lora.targets_of(architecture_of(oracle.MODELS[name]), targets)


def moved(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_a_run_trains_its_adapters_alone_and_its_model_is_the_melted_one(world, flags, tmp_path, capsys):
    worlds.train(tmp_path / "run", *flags, "--config.steps=2")
    said = capsys.readouterr().out
    assert "first loss: 0.693147" in said
    assert "lora: 4,096 parameters are trained" in said  # 2 layers, rank 4: inputs and outputs of 7 projections
    before, after = worlds.load_tensors(world.model), worlds.load_tensors(tmp_path / "run" / "model")
    assert moved(before, after) == {name for name in before if "_proj" in name}
    for name in moved(before, after):  # no more than the rank
        assert np.linalg.matrix_rank(after[name] - before[name], tol=1e-4) <= 4


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit_and_its_checkpoints_hold_the_adapters_alone(flags, plain, tmp_path):
    whole, _ = plain
    parts = [*flags, "--config.checkpoint.every=2"]
    worlds.train(tmp_path, *parts, "--config.steps=2")
    worlds.train(tmp_path, *parts)
    one, other = (worlds.load_tensors(folder / "model") for folder in (whole, tmp_path))
    assert not moved(one, other)
    for part, copies in (("params", 1), ("optimizer", 2)):  # two moments
        saved = (whole / "checkpoints" / "4" / part / "_METADATA").read_text()
        assert saved.count("q_proj_a") >= copies
        assert "embed_tokens" not in saved


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["reference.mode=adapter_off", "micro_batches=4", "remat=full"],
        ["reference.mode=adapter_off", "reference.live=True"],
        ["reference.live=True", "micro_batches=2", "mesh.fsdp=2", "mesh.tensor=2"],
    ],
    ids=" ".join,
)
def test_the_same_in_every_layout_and_with_the_base_as_reference(flags, plain, tmp_path, changes):
    devices = 4 if "mesh.tensor=2" in changes else 1
    found = worlds.train(tmp_path, *flags, *(f"--config.{change}" for change in changes), devices=devices)
    for name in ("loss", "grad_norm", "rewards/margins"):
        one, other = (worlds.column(history, name) for history in (found, plain[1]))
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_parts_are_trained_whole_beside_adapters(world, flags, tmp_path):
    whole = "--config.lora.modules_to_save=('embed_tokens','norm','pre_mlp_norm')"
    few = ["--config.lora.targets=('q_proj','v_proj')", whole, "--config.reference.live=True"]
    found = worlds.train(tmp_path, *flags, *few, "--config.steps=2")
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    before, after = worlds.load_tensors(world.model), worlds.load_tensors(tmp_path / "model")
    trained = ("q_proj", "v_proj", "embed_tokens", "model.norm", "post_attention_layernorm")
    assert moved(before, after) == {name for name in before if any(part in name for part in trained)}


@pytest.mark.slow
def test_a_reference_that_follows_has_adapters_of_its_own(flags, tmp_path):
    follows = ["mode=ema", "ema.every=1", "ema.decay=0.0"]
    found = worlds.train(tmp_path, *flags, *(f"--config.reference.{option}" for option in follows))
    for values in found:  # the policy of the update before: at every update it is the policy
        assert values["loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.slow
def test_weights_are_kept_in_the_compute_dtype_and_those_that_stay_come_out_as_they_were(
    world, flags, tmp_path, capsys
):
    found = worlds.train(tmp_path, *flags, "--config.model.dtype=bfloat16", "--config.steps=2")
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-2)
    table = capsys.readouterr().out
    for line in ("layers/q_proj ", "embed_tokens "):
        assert re.search(rf"model: {line} .* bfloat16 ", table)
    assert re.search(r"model: lora/layers/q_proj_a .* float32 ", table)
    before, after = worlds.load_tensors(world.model), worlds.load_tensors(tmp_path / "model")
    assert moved(before, after) == {name for name in before if "_proj" in name}  # the others are float32 in the files


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A world whose projections can be cut into blocks of 64 inputs."""
    folder = tmp_path_factory.mktemp("wide")
    world = worlds.make_world(folder)
    worlds.make_model(folder / "model", hidden_size=64, intermediate_size=128)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8"])
def test_a_quantized_base_is_its_own_reference(wide, tmp_path, quantization, capsys):
    flags = [*wide.flags, *FLAGS, WHOLE, f"--config.lora.quantization={quantization}", "--config.steps=2"]
    found = worlds.train(tmp_path, *flags)
    assert re.search(r"model: layers/q_proj/codes .* u?int8 ", capsys.readouterr().out)
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert found[0]["log_ratios/largest"] < 1e-4
    before, after = (worlds.load_tensors(path) for path in (wide.model, tmp_path / "model"))
    assert moved(before, after) == {name for name in before if "_proj" in name or name == "model.norm.weight"}


@pytest.mark.slow
def test_what_is_trained_whole_is_not_quantized(wide, tmp_path):
    parts = ["--config.lora.targets=('q_proj',)", "--config.lora.modules_to_save=('k_proj',)", "--config.steps=1"]
    worlds.train(tmp_path, *wide.flags, *FLAGS, *parts, "--config.lora.quantization=nf4")
    before, after = (worlds.load_tensors(path) for path in (wide.model, tmp_path / "model"))
    name = "model.layers.0.self_attn.{}_proj.weight"
    # AdamW's first step moves every weight by the learning rate; rounding moves by much more.
    np.testing.assert_allclose(np.abs(after[name.format("k")] - before[name.format("k")]).max(), 1e-2, rtol=1e-2)
    assert np.abs(after[name.format("v")] - before[name.format("v")]).max() > 1e-3


@pytest.mark.slow
def test_after_precompute_a_run_of_adapters_scores_nothing(wide, tmp_path, capsys):
    first = [*wide.flags, "--config.lora.rank=4", "--config.steps=1", "--config.lora.quantization=int8"]
    worlds.train(tmp_path / "first", *first, "--config.optimizer.learning_rate=0.1")
    further = [*wide.flags, f"--config.lora.path={tmp_path / 'first' / 'adapter'}", "--config.lora.quantization=int8"]
    cache = [f"--config.reference.cache_dir={tmp_path / 'cache'}", "--config.steps=1"]
    worlds.precompute(*further, *cache)
    assert "0 of 8 examples in the cache" in capsys.readouterr().out
    worlds.train(tmp_path / "second", *further, *cache)
    assert "8 of 8 examples in the cache" in capsys.readouterr().out
    worlds.train(tmp_path / "third", *first, *cache)  # another reference: the bare base
    assert "0 of 8 examples in the cache" in capsys.readouterr().out


@pytest.mark.slow
def test_the_adapter_is_there_though_the_model_cannot_be_written(world, flags, tmp_path, monkeypatch):
    def save(*arguments, **options):
        raise UserError("no room")

    monkeypatch.setattr("daajax.models.weights.save", save)
    with pytest.raises(UserError, match="no room"):
        worlds.train(tmp_path, *flags, "--config.steps=1")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    monkeypatch.undo()
    worlds.train(tmp_path, *flags, "--config.steps=1")  # the same line again writes what is lacking
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4"])
def test_a_quantized_base_comes_out_as_it_was_computed_with_in_every_layout(wide, tmp_path, quantization):
    flags = [*wide.flags, *FLAGS, WHOLE, f"--config.lora.quantization={quantization}"]
    found = worlds.train(tmp_path / "run", *flags, "--config.checkpoint.every=2")
    whole = worlds.train(tmp_path / "whole", *wide.flags, *FLAGS)
    assert worlds.deviation(worlds.column(found, "loss"), worlds.column(whole, "loss")) > 1e-4  # it is another model
    live = ["--config.reference.live=True", "--config.remat=full", "--config.micro_batches=2", "--config.mesh.fsdp=2"]
    again = worlds.train(tmp_path / "live", *flags, *live, devices=2)
    np.testing.assert_allclose(worlds.column(again, "loss"), worlds.column(found, "loss"), rtol=2e-4)
    # The model directory scores as the run's own checkpoint does, and step 0 is the quantized base.
    data = f"--config.eval_data.path={wide.data}"
    worlds.at(evaluate, tmp_path / "run", data)
    worlds.at(export, tmp_path / "run", "--step=0", f"--output={tmp_path / 'base'}")
    own = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    other = [data, f"--config.model.path={tmp_path / 'run' / 'model'}", "--config.reference.mode=path"]
    other += [
        f"--config.reference.path={tmp_path / 'base'}",
        "--config.steps=1",
        "--config.optimizer.learning_rate=0.0",
    ]
    melted = worlds.train(tmp_path / "melted", *wide.flags, *other)
    for name in ("eval/loss", "eval/logps/chosen", "eval/rewards/margins"):
        assert melted[0][name] == pytest.approx(own[name], rel=1e-4), name


@pytest.fixture(scope="module")
def trained(world, flags):
    """A run that also trains a part whole; its adapter is what another run goes on with."""
    folder = world.folder / "trained"
    few = ["--config.lora.targets=('q_proj','down_proj')", "--config.lora.rslora=True"]
    return folder, worlds.train(folder, *flags, WHOLE, *few, "--config.checkpoint.every=2")


@pytest.mark.slow
def test_the_adapter_comes_out_as_peft_stores_it_at_any_update(world, trained, tmp_path):
    folder, _ = trained
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 16, True)
    assert (config["target_modules"], config["modules_to_save"]) == (["down_proj", "q_proj"], ["model.norm"])
    assert config["base_model_name_or_path"] == str(world.model)
    worlds.at(export, folder, "--form=adapter", f"--output={tmp_path / '5'}")
    with pytest.raises(UserError, match=r"config\.lora\.alpha=64\.0: the run in .* was made with 16.0"):
        worlds.at(export, folder, "--form=adapter", "--config.lora.alpha=64.0", f"--output={tmp_path / '5'}")
    again, adapter = (
        safetensors.numpy.load_file(where / "adapter_model.safetensors")
        for where in (tmp_path / "5", folder / "adapter")
    )
    assert not moved(again, adapter)
    worlds.at(export, folder, "--form=adapter", "--step=0", f"--output={tmp_path / '0'}")
    stored = safetensors.numpy.load_file(tmp_path / "0" / "adapter_model.safetensors")
    assert all(not value.any() for name, value in stored.items() if "lora_B" in name)
    melted, base = worlds.load_tensors(folder / "model"), worlds.load_tensors(world.model)
    for name, weight in base.items():
        a, b = (adapter.get(f"base_model.model.{name[:-7]}.lora_{side}.weight") for side in "AB")
        added = weight if a is None else weight + 16 / 4**0.5 * b @ a
        np.testing.assert_allclose(melted[name], adapter.get(f"base_model.model.{name}", added), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["reference.live=True", "mesh.fsdp=2", "micro_batches=2"],
        ["lora.quantization=int8"],
        ["reference.mode=ema", "reference.ema.every=1", "reference.ema.decay=0.0"],
    ],
    ids=" ".join,
)
def test_a_run_goes_on_with_an_adapter_which_is_its_reference(world, trained, tmp_path, changes):
    start = [f"--config.lora.path={trained[0] / 'adapter'}", "--config.optimizer.learning_rate=1e-2"]
    devices = 2 if "mesh.fsdp=2" in changes else 1
    found = worlds.train(tmp_path, *world.flags, *start, *(f"--config.{change}" for change in changes), devices=devices)
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert found[0]["log_ratios/largest"] < 1e-3
    before, base, after = (worlds.load_tensors(folder / "model") for folder in (trained[0], world.folder, tmp_path))
    targets = {name for name in before if "q_proj" in name or "down_proj" in name or name == "model.norm.weight"}
    assert moved(before, after) >= targets
    if "lora.quantization=int8" not in changes:
        assert moved(before, after) == moved(base, after) == targets


@pytest.mark.slow
def test_the_base_is_the_reference_of_an_adapter_if_asked_for(world, trained, tmp_path, capsys):
    start = [f"--config.lora.path={trained[0] / 'adapter'}", "--config.steps=1", "--config.reference.mode=adapter_off"]
    cached = worlds.train(tmp_path / "cached", *world.flags, *start)
    assert f"the reference, {world.model}, is not the initial policy" in capsys.readouterr().out
    live = worlds.train(tmp_path / "live", *world.flags, *start, "--config.reference.live=True")
    # The same two models as directories: the policy's is the melted one.
    two = [f"--config.model.path={trained[0] / 'model'}", f"--config.reference.path={world.model}"]
    whole = worlds.train(tmp_path / "whole", *world.flags, *two, "--config.reference.mode=path", "--config.steps=1")
    assert abs(whole[0]["rewards/margins"]) > 1e-3
    for found in (cached, live):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert found[0][name] == pytest.approx(whole[0][name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_a_run_that_went_on_with_an_adapter_is_resumed_and_evaluated(world, trained, tmp_path):
    adapter = shutil.copytree(trained[0] / "adapter", tmp_path / "adapter")
    start = [f"--config.lora.path={adapter}", "--config.optimizer.schedule=constant", "--config.checkpoint.every=2"]
    whole = worlds.train(tmp_path / "whole", *world.flags, *start, "--config.steps=4")
    worlds.train(tmp_path / "parts", *world.flags, *start, "--config.steps=2")
    parts = worlds.train(tmp_path / "parts", *world.flags, *start, "--config.steps=4")
    assert parts[-1]["loss"] == whole[-1]["loss"]
    assert stores.files_of(tmp_path / "parts" / "model") == stores.files_of(tmp_path / "whole" / "model")
    worlds.at(evaluate, tmp_path / "parts", f"--config.eval_data.path={world.data}", "--step=0")
    (line,) = (tmp_path / "parts" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["eval/loss"] == pytest.approx(np.log(2), abs=1e-5)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))  # another scale, another model
    with pytest.raises(UserError, match="the weights of the model changed since the checkpoint"):
        worlds.at(evaluate, tmp_path / "parts", f"--config.eval_data.path={world.data}")


@pytest.mark.slow
def test_checkpoints_are_exported_melted(world, plain, tmp_path):
    folder, _ = plain
    for step in (0, 5):
        worlds.at(export, folder, f"--step={step}", f"--output={tmp_path / str(step)}")
    assert not moved(worlds.load_tensors(tmp_path / "5"), worlds.load_tensors(folder / "model"))
    assert not moved(worlds.load_tensors(tmp_path / "0"), worlds.load_tensors(world.model))


@pytest.mark.parametrize("step", [0, 5])
def test_an_evaluation_of_a_checkpoint_sees_its_adapters(plain, step):
    folder, history = plain
    worlds.at(evaluate, folder, f"--step={step}")
    found = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    wanted = history[-1]["eval/loss"] if step else np.log(2)
    assert found["eval/loss"] == pytest.approx(wanted, rel=1e-6)
    assert bool(step) == (abs(wanted - np.log(2)) > 1e-3)


def test_what_is_sampled_of_a_checkpoint_is_what_its_melted_model_writes(plain, tmp_path):
    folder, _ = plain
    rows = {}
    for name, source in (("run", f"--workdir={folder}"), ("melted", f"--model={folder / 'model'}")):
        line = ["--prompt=the dog", "--temperature=0", "--max_tokens=12", f"--output={tmp_path / name}", source]
        with worlds.visible(1):
            generate.generate(generate.parse(["generate", *line]))
        rows[name] = json.loads((tmp_path / name).read_text())
    assert rows["run"]["tokens"] == rows["melted"]["tokens"]
    assert rows["run"]["logp"] == pytest.approx(rows["melted"]["logp"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["lora.alpha=32.0"], "config.lora.alpha is set but config.lora.rank is 0: give adapters a rank"),
        (["lora.rank=4", "lora.targets=('c_attn',)"], "lora.targets has 'c_attn'"),
        (["lora.rank=4", "lora.targets=(1,)"], "config.lora.targets holds 1; it needs names"),
        (["lora.rank=4", "lora.targets=()"], "config.lora.targets is empty"),
        (["lora.rank=4", "lora.modules_to_save=('lm_head',)"], "lora.modules_to_save has 'lm_head'; what can be"),
        (["lora.rank=4", "lora.modules_to_save=('q_proj',)"], "lora.modules_to_save has 'q_proj'; what can be"),
        (["lora.quantization=int8"], "config.lora.quantization is set but config.lora.rank is 0"),
        (["lora.rank=4", "lora.quantization=int4"], "config.lora.quantization='int4' is unknown; there are None, int8"),
        (["lora.rank=4", "lora.quantization=nf4"], "nf4 cuts a weight's inputs into blocks of 64"),
        (["lora.path=/nowhere"], "/nowhere"),
        (["lora.rank=4", "lora.path=/nowhere"], "config.lora.rank is set but config.lora.path=/nowhere is an adapter"),
        (["lora.rank=-1"], "config.lora.rank=-1 must be at least 0"),
        (["reference.mode=adapter_off"], "config.reference.mode='adapter_off' but config.lora.rank is 0"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(world, tmp_path, options, says):
    with pytest.raises(UserError, match=re.escape(says)):
        worlds.train(tmp_path / "run", *world.flags, *(f"--config.{option}" for option in options))
    assert not (tmp_path / "run").exists()
