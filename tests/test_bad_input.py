"""What a user gets wrong: one clear line that names file and line or key, exit code 1, nothing half-written."""

import json

import numpy as np
import pytest

from daajax.errors import UserError
from tests import worlds

PICKLE = b"cbuiltins\nexec\n(Vraise SystemExit('a pickle was opened')\ntR."
PAIR = {"prompt": "the dog", "chosen": " saw a cat", "rejected": " was sad"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("world"), count=12)


@pytest.fixture
def refused(world, tmp_path):
    """The one line with which a run is refused; it leaves no folder."""

    def line(*overrides, devices=1):
        with pytest.raises(UserError) as error:
            worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", *overrides, devices=devices)
        assert not (tmp_path / "run").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    return line


def in_shards(model, planted=None):
    """The model with its weights in two files, the second of which the index calls `planted`."""
    values = worlds.load_tensors(model)
    (model / "model.safetensors").unlink()
    worlds.save_tensors(model, values, files=2)
    if planted is not None:
        index = model / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", planted))
        (model / planted).write_bytes(PICKLE)
    return model


# ---------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "the', "not JSON"),
        ("[1, 2]", "needed a JSON object"),
        ({"prompt": "the dog", "chosen": "", "rejected": " b"}, "`chosen` is empty"),
        ({"prompt": "the dog", "chosen": " b", "rejected": " \n"}, "`rejected` is empty"),
        ({"prompt": "the dog", "chosen": " b", "rejected": " b"}, "`chosen` and `rejected` are equal"),
        ({"prompt": "the dog", "chosen": " b"}, "no `rejected`"),
        ({"prompt": 3, "chosen": " b", "rejected": " c"}, "`prompt` is int 3"),
        (PAIR | {"weight": -1}, "`weight` is int -1"),
        ({"question": "the dog"}, "no responses"),
    ],
    ids=["json", "list", "empty chosen", "blank rejected", "equal", "missing", "number", "weight", "columns"],
)
def test_a_bad_row_is_named_by_file_and_line(refused, tmp_path, row, reason):
    data = worlds.write_rows(tmp_path / "pairs.jsonl", [PAIR, row, PAIR])
    line = refused(f"--config.data.path={data}")
    assert line.startswith(f"{data}:2: ")
    assert reason in line
    assert "data.max_bad_rows" in line


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "nowhere.jsonl", "does not exist"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: worlds.write_rows(folder / "empty.jsonl", []), "holds no rows"),
        (lambda folder: worlds.write_rows(folder / "plain.jsonl.gz", [PAIR]), "cannot be read to its end"),
    ],
    ids=["missing", "folder", "empty", "not gzip"],
)
def test_data_that_cannot_be_read_are_named(refused, tmp_path, make, says):
    path = make(tmp_path)
    line = refused(f"--config.data.path={path}")
    assert f"data.path={path}" in line
    assert says in line


def test_single_responses_are_no_pairs(refused, tmp_path):
    data = worlds.write_rows(tmp_path / "single.jsonl", [{"prompt": "the dog", "response": " saw a cat"}] * 9)
    assert refused(f"--config.data.path={data}").startswith("loss 'dpo' compares 2 responses but the data have 1")


def test_three_responses_are_no_pairs(refused, tmp_path):
    rows = [{"prompt": "the dog", "responses": [" saw a cat", " was sad", " sun"]}] * 9
    data = worlds.write_rows(tmp_path / "ranked.jsonl", rows)
    assert "compares 2 responses but the data have 3" in refused(f"--config.data.path={data}")


def test_a_single_response_among_pairs_is_named(refused, tmp_path):
    rows = [*worlds.pairs(8), {"id": "alone", "prompt": "the dog", "responses": [" saw a cat"]}]
    data = worlds.write_rows(tmp_path / "mixed.jsonl", rows)
    assert "1 examples have fewer, such as 'alone'" in refused(f"--config.data.path={data}")


def test_chat_without_a_template_says_which_option_gives_one(refused, tmp_path):
    rows = [PAIR | {"prompt": [{"role": "user", "content": "the dog"}]}] * 9
    data = worlds.write_rows(tmp_path / "chat.jsonl", rows)
    assert "set chat.template" in refused(f"--config.data.path={data}")


def test_more_examples_an_update_than_there_are(refused):
    assert "data has 12 usable examples but batch_size is 100" in refused("--config.batch_size=100")


# ---------------------------------------------------------------------- tokenizer


def test_a_tokenizer_without_eos(refused, tmp_path):
    model = worlds.make_model(tmp_path / "model")
    worlds.save_tokenizer(model, eos_token=None)
    line = refused(f"--config.model.path={model}")
    assert f"tokenizer.path={model} has no EOS token" in line
    assert "tokenizer_config.json" in line


def test_a_tokenizer_without_offsets(refused, tmp_path):
    # A slow tokenizer has no tokenizer.json, only its vocabulary.
    model = worlds.make_model(tmp_path / "model")
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    line = refused(f"--config.model.path={model}")
    assert f"tokenizer.path={model} has no tokenizer.json" in line
    assert "fast tokenizer" in line


def test_a_vocabulary_larger_than_the_embedding(refused, tmp_path):
    model = worlds.make_model(tmp_path / "model", vocab_size=64)
    line = refused(f"--config.model.path={model}")
    assert "vocabulary larger than the embedding: the tokenizer's largest id is 127" in line
    assert "vocab_size is 64" in line


def test_a_tokenizer_of_its_own_is_checked_too(refused, tmp_path):
    worlds.save_tokenizer(tmp_path / "tokenizer", vocab_size=200)
    assert "larger than the embedding" in refused(f"--config.tokenizer.path={tmp_path / 'tokenizer'}")


# ---------------------------------------------------------------------- model directory


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks tensors for its config.json: model.norm.weight"),
        (lambda t: t.update({"model.extra": np.zeros(3, np.float32)}), "has unexpected tensors for its config.json"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}),
            "tensor model.norm.weight has shape (3,), config.json asks for (32,)",
        ),
        (lambda t: t.update({"model.norm.weight": np.ones(32, np.int32)}), "tensor model.norm.weight is I32"),
    ],
    ids=["missing", "extra", "shape", "integers"],
)
def test_tensors_that_do_not_fit_the_config(refused, tmp_path, edit, says):
    model = worlds.make_model(tmp_path / "model")
    values = worlds.load_tensors(model)
    edit(values)
    worlds.save_tensors(model, values)
    line = refused(f"--config.model.path={model}")
    assert str(model) in line
    assert says in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; supported are gemma"),
        ({"sliding_window": 64}, "['sliding_window'] are not known"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "rope_type 'mrope' is not supported"),
        ({"num_attention_heads": 3}, "hidden_size=32 is not a multiple of num_attention_heads=3"),
        ({"head_dim": 7}, "rotates 7 features of a head; an even number"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; a positive integer is needed"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
            "lower max_length to 64",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config says that the weights are quantized"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_architecture_is_named_by_its_key(refused, tmp_path, changes, says):
    model = worlds.make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    line = refused(f"--config.model.path={model}")
    assert line.startswith(f"{model / 'config.json'}: ")
    assert says in line


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda m: (m / "config.json").write_text("{"), "not a model's config.json"),
        (lambda m: (m / "config.json").unlink(), "has no config.json"),
        (lambda m: (m / "config.json").rename(m / "adapter_config.json"), "is an adapter; name it with lora.path"),
        (lambda m: (m / "model.safetensors").unlink(), "needs model.safetensors"),
        (lambda m: (m / "model.safetensors").write_bytes(b"x" * 100), "is not a readable safetensors file"),
        (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "found pytorch_model.bin"),
        (lambda m: (m / "model.safetensors").write_bytes(PICKLE), "is not a readable safetensors file"),
        (lambda m: in_shards(m, planted="pytorch_model.bin"), "only .safetensors files beside it are opened"),
        (lambda m: (in_shards(m) / "model-00002-of-00002.safetensors").unlink(), "-00002.safetensors is missing"),
        (lambda m: (m / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    ],
    ids=[
        "config",
        "no config",
        "adapter",
        "no weights",
        "weights",
        "pickle",
        "disguised",
        "indexed",
        "shard",
        "tokenizer",
    ],
)
def test_a_damaged_model_directory_is_named(refused, tmp_path, damage, says):
    model = worlds.make_model(tmp_path / "model")
    damage(model)
    line = refused(f"--config.model.path={model}")
    assert str(model) in line
    assert says in line


@pytest.mark.slow
def test_a_pickle_beside_the_weights_is_neither_opened_nor_copied(world, tmp_path):
    model = worlds.make_model(tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(PICKLE)
    worlds.train(tmp_path / "run", *world.flags, "--config.steps=1", f"--config.model.path={model}")
    assert not {path.suffix for path in (tmp_path / "run" / "model").iterdir()} & {".bin", ".pt"}


def test_an_address_that_gives_no_model_is_named(refused):
    line = refused("--config.model.path=hf://org/nowhere")  # tests are offline
    assert line.startswith("model.path=hf://org/nowhere has no whole copy in ")
    line = refused("--config.reference.mode=path", "--config.reference.path=s3://bucket/model")
    assert line.startswith("reference.path=s3://bucket/model: s3:// is not read")
    assert "tokenizer.path=hf://model is no model of the Hub" in refused("--config.tokenizer.path=hf://model")


@pytest.mark.slow
def test_weights_that_are_not_numbers_are_noticed_before_training(refused, tmp_path):
    model = worlds.make_model(tmp_path / "model")
    values = worlds.load_tensors(model)
    values["model.norm.weight"][7] = np.nan
    worlds.save_tensors(model, values)
    assert "are not finite; check the model's weights and model.dtype" in refused(f"--config.model.path={model}")


def test_the_real_recipe_without_its_model_says_what_is_missing_and_how_to_get_it(tmp_path):
    with pytest.raises(UserError) as error:
        worlds.train(tmp_path / "run", recipe=str(worlds.ROOT / "configs" / "dpo_llama.py"))
    assert "model.path='models/Llama-3.1-8B-Instruct' is not a directory" in str(error.value)
    assert "hf download" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_reference_model_is_named(refused, tmp_path):
    line = refused("--config.reference.mode=path", f"--config.reference.path={tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in line


def test_a_reference_model_is_called_by_its_key(refused, tmp_path):
    line = refused("--config.reference.mode=path", f"--config.reference.path={tmp_path / 'nowhere'}")
    assert line.startswith("reference.path=")
    assert "reference.path must be" in refused("--config.reference.mode=path", f"--config.reference.path={tmp_path}")


def test_a_reference_with_a_smaller_vocabulary(refused, tmp_path, world):
    model = worlds.make_model(tmp_path / "model", vocab_size=160)
    line = refused(
        f"--config.model.path={model}", "--config.reference.mode=path", f"--config.reference.path={world.model}"
    )
    assert f"reference.path={world.model} has a vocabulary of 128, the policy's is 160" in line


# ---------------------------------------------------------------------- rows and mesh


def test_an_example_longer_than_a_row_is_named(refused, tmp_path):
    long = {"id": "long", "prompt": "the dog", "chosen": " sun" * 90, "rejected": " cat" * 90}
    data = worlds.write_rows(tmp_path / "pairs.jsonl", [*worlds.pairs(8), long])
    line = refused(
        f"--config.data.path={data}", "--config.packing.row_length=128", "--config.batch_size=9",
    )  # fmt: skip
    assert line.startswith("example long takes ")
    assert "packing.row_length=128" in line


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("--config.mesh.fsdp=3",), "needs 3 devices but 8 are visible"),
        (("--config.mesh.fsdp=2",), "needs 2 devices but 8 are visible"),
        (("--config.mesh.tensor=3",), "needs a multiple of 3 devices but 8 are visible"),
        (("--config.mesh.data=-1",), "at most one of them -1"),
        (("--config.mesh.data=0",), "sizes must be positive"),
        (("--config.attention=splash",), "splash runs on TPUs only and this is a cpu; there is blockwise, dense."),
        (("--config.packing.rows=3",), "packing.rows=3 must be a positive multiple of 8"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mesh_or_an_attention_that_does_not_fit(refused, overrides, says):
    assert says in refused(*overrides, devices=8)


def test_a_mesh_that_does_not_divide_a_parameter(refused, tmp_path):
    model = worlds.make_model(tmp_path / "model", vocab_size=131)
    line = refused(f"--config.model.path={model}", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", devices=8)
    assert all(part in line for part in ("embed_tokens", "'vocab'", "131", "divide over 2 devices", "'tensor'"))


def test_a_mesh_that_does_not_divide_the_heads(refused):
    line = refused("--config.mesh.fsdp=2", "--config.mesh.tensor=4", devices=8)
    assert "key-value heads: 2 do not divide over 4 devices of mesh axis 'tensor'" in line


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("--config.max_prompt_length=128",), "max_prompt_length=128 leaves no room"),
        (("--config.max_length=1",), "max_length=1 must be at least 2"),
        (("--config.max_length=2",), "none of 12 examples is left"),
        (("--config.packing.row_length=200",), "multiple of 128, or auto"),
        (("--config.packing.row_length=64",), "multiple of 128, or auto"),
        (("--config.packing.enabled=False", "--config.packing.rows=2"), "packing.rows=2"),
        (("--config.packing.row_length=128", "--config.packing.rows=1"), "packing.row_length=128"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_lengths_that_leave_no_room(refused, overrides, says):
    assert says in refused(*overrides)


# ---------------------------------------------------------------------- objectives and reference


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("--config.loss.name=nope",), "loss.name='nope' is unknown; there are alphapo, aot, "),
        (("--config.loss={'beta':0.1}",), "loss.name=None is unknown"),
        (("--config.loss.beta=0.0",), "loss 'dpo': beta=0.0 must be > 0"),
        (("--config.loss.beta=-1.0",), "must be > 0"),
        (("--config.loss.beta=nan",), "beta=nan must be a finite number"),
        (("--config.loss.label_smoothing=0.5",), "label_smoothing=0.5 must be in [0, 0.5)"),
        (("--config.loss={'name':'dpo','gamma':1.0}",), "loss 'dpo' takes ['beta', 'label_smoothing'], not ['gamma']"),
        (("--config.loss={'name':'dpo','beta':'x'}",), "beta='x' must be a finite number"),
        (("--config.extra_losses=('sft',)",), "config.extra_losses holds 'sft'; it needs dicts"),
        (("--config.extra_losses=({'name':'nope'},)",), "loss.name='nope' is unknown"),
        (("--config.reference.mode=none",), "loss 'dpo' needs a reference"),
        (("--config.reference.mode=path",), "config.reference.path=None with reference.mode='path'"),
        (("--config.reference.path=/somewhere",), "the path belongs to reference.mode='path'"),
        (("--config.loss={'name':'simpo'}",), "loss 'simpo' reads no reference"),
        (("--config.reference.mode=emma",), "config.reference.mode='emma' is unknown; there are snapshot"),
        (
            ("--config.reference.ema.decay=0.5",),
            "config.reference.ema.decay is set but config.reference.mode='snapshot'",
        ),
        (("--config.reference.mode=ema", "--config.reference.ema.decay=1.0"), "must be at least 0 and below 1"),
        (("--config.optimizer.name=sgd",), "optimizer 'sgd' takes ['b1', 'mu_dtype'], not ['b2']"),
        (("--config.epochs=1.0",), "set exactly one of config.steps (got 1) and config.epochs (got 1.0)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_objective_that_makes_no_sense(refused, overrides, says):
    assert says in refused(*overrides)


@pytest.mark.parametrize("loss", ["{'name':'dpo','beta':1e999}", "{'name':'simpo','gamma':1e999}"])
def test_an_infinite_hyperparameter_is_refused(world, loss):
    mode = "none" if "simpo" in loss else "snapshot"
    with pytest.raises(UserError):
        worlds.parse(*world.flags, f"--config.loss={loss}", f"--config.reference.mode={mode}")


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        *(
            (f"{name}={value}", "at least 0 and below 1")
            for name in ("b1", "b2")
            for value in ("2.0", "1.0", "-0.5", "nan")
        ),
        *((f"{name}={value}", "above 0") for name in ("eps", "max_grad_norm") for value in ("-1.0", "0.0")),
        *((f"{name}={value}", "above 0 and finite") for name in ("eps", "max_grad_norm") for value in ("inf", "nan")),
    ],
)
def test_an_optimizer_out_of_range_is_refused(world, override, needed):
    with pytest.raises(UserError) as error:
        worlds.parse(*world.flags, f"--config.optimizer.{override}")
    assert str(error.value) == f"config.optimizer.{override} must be {needed}."


@pytest.mark.parametrize("override", ["b1=0.0", "b2=0.0", "eps=1e-12", "max_grad_norm=1e-3", "weight_decay=0.0"])
def test_an_optimizer_at_the_end_of_a_range_is_accepted(world, override):
    name, _, value = override.partition("=")
    config, _ = worlds.parse(*world.flags, f"--config.optimizer.{override}")
    assert config.optimizer[name] == float(value)


def test_the_reference_cache_cannot_be_unset_without_a_word(world):
    with pytest.raises(UserError, match=r"reference.cache_dir"):
        worlds.parse(*world.flags, "--config.reference.cache_dir=None")


# ---------------------------------------------------------------------- as a process


@pytest.mark.parametrize("case", ["row", "model", "mesh"])
def test_a_process_ends_with_1_one_line_and_nothing_written(world, tmp_path, case):
    data = worlds.write_rows(tmp_path / "pairs.jsonl", [PAIR, "{"])
    overrides, says = {
        "row": (f"--config.data.path={data}", f"{data}:2: not JSON"),
        "model": (f"--config.model.path={tmp_path}", f"{tmp_path} has no config.json"),
        "mesh": ("--config.mesh.fsdp=3", "needs 3 devices but 8 are visible"),
    }[case]
    line = (f"--config={worlds.STORIES}", f"--workdir={tmp_path / 'run'}", *world.flags, overrides)
    result = worlds.command("train", *line)
    assert result.returncode == 1
    # Where there is no torch, transformers announces that on a line of its own.
    (error,) = (line for line in result.stderr.splitlines() if not line.startswith("[transformers] "))
    assert error.startswith("error: ")
    assert says in error
    assert not (tmp_path / "run").exists()
