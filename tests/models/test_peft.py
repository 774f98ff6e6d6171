"""Adapters as PEFT stores them: what is written, what is read, and what is refused in one line."""

import functools
import json
import math
import re
import types

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from daajax import sharding
from daajax.errors import UserError
from daajax.models import decoder, lora, peft, weights
from daajax.models.families import FAMILIES, architecture_of
from daajax.models.lora import Lora
from tests.oracle import make_values as oracle

NAMES = sorted(oracle.MODELS)
PREFIX = "base_model.model."
ONE, MANY = dict(data=8, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=2)


def lora_of(name, targets=("all-linear",), *, rank=4, alpha=6.0, **options):
    return Lora(rank, alpha, lora.targets_of(architecture_of(oracle.MODELS[name]), targets), **options)


@functools.cache
def abstract(name, adapters, dtype):
    """Shapes and axes of all parameters."""
    architecture = architecture_of(oracle.MODELS[name])
    model = decoder.Decoder(architecture, attend=lambda q, *_: q, param_dtype=dtype, dtype=dtype, lora=adapters)
    return decoder.abstract_params(model)


def layout(name, adapters, mesh=MANY, dtype=jnp.float32):
    """Shapes of all parameters, and where they live."""
    shapes, axes = abstract(name, adapters, dtype)
    return shapes, sharding.param_shardings(sharding.make_mesh(mesh), shapes, axes)


def drawn(name, adapters, dtype=jnp.float32):
    """What was trained, from a seed."""
    trained = traverse.flatten_dict(lora.split(layout(name, adapters)[0], adapters)[0], sep="/")
    values = {
        path: jnp.asarray(oracle.uniform(math.prod(leaf.shape), 5, place).reshape(leaf.shape) - 0.5, dtype)
        for place, (path, leaf) in enumerate(sorted(trained.items()))
    }
    return traverse.unflatten_dict(values, sep="/")


def save(folder, name, adapters, params, *, base="somewhere"):
    architecture = architecture_of(oracle.MODELS[name])
    peft.save(str(folder), params, architecture, adapters, base=base, tokenizer_path=str(folder.parent))
    return folder


def saved(tmp_path, name, adapters):
    return save(tmp_path / "adapter", name, adapters, drawn(name, adapters))


def read(folder, name):
    return peft.read(str(folder), architecture_of(oracle.MODELS[name]))


def load(folder, name, mesh=MANY, dtype=jnp.float32):
    found = read(folder, name)
    shapes, shardings = layout(name, found, mesh, dtype)
    params = peft.load(str(folder), architecture_of(oracle.MODELS[name]), found, shapes, shardings)
    jax.tree.map(lambda shape, leaf: None, lora.split(shapes, found)[0], params)  # the same leaves
    return found, params


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, change, metadata=None):
    """Changes the tensors; the note that ours have goes."""
    file = folder / "adapter_model.safetensors"
    values = safetensors.numpy.load_file(file)
    change(values)
    safetensors.numpy.save_file(values, file, metadata=metadata)


def melted(folder, name):
    """The tensors of the base with an adapter added, in float64: as PEFT does it, module by module."""
    config = config_of(folder)
    base = {key: value.astype(np.float64) for key, value in oracle.tensors(oracle.MODELS[name]).items()}
    stored = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    for key, b in stored.items():
        module = key.removeprefix(PREFIX).removesuffix(".lora_B.weight")
        if key.endswith("lora_B.weight"):
            a = stored[key.replace("lora_B", "lora_A")].astype(np.float64)
            ranks, alphas = (
                [value for end, value in config.get(table, {}).items() if re.fullmatch(rf"(.*\.)?({end})", module)]
                for table in ("rank_pattern", "alpha_pattern")
            )
            rank, alpha = (ranks or [config["r"]])[0], (alphas or [config["lora_alpha"]])[0]
            assert a.shape[0] == b.shape[1] == rank
            delta = alpha / (rank**0.5 if config["use_rslora"] else rank) * b.astype(np.float64) @ a
            base[f"{module}.weight"] += delta.T if config["fan_in_fan_out"] else delta
        elif "lora_A" not in key:
            base[in_files(name, module)] = b
    copies = FAMILIES[oracle.MODELS[name]["model_type"]].copies(architecture_of(oracle.MODELS[name]))
    for copy, original in copies.items():
        if copy in base:
            np.testing.assert_array_equal(base.pop(copy), base[original])
    return base


def in_files(name, key):
    """What a tensor is called in a model directory; transformers 5 calls a few otherwise once they are loaded."""
    if name.startswith("gpt_neox"):
        return key.replace("lm_head.", "embed_out.")
    return key.replace(".mlp.gate.", ".block_sparse_moe.gate.") if name == "mixtral" else key


def ours(tmp_path, name, adapters, params):
    """The same by our own merging."""
    path = oracle.write_model(tmp_path / "base", oracle.MODELS[name])
    shapes, shardings = layout(name, None, ONE)
    base = weights.later(path, architecture_of(oracle.MODELS[name]), shapes, shardings)
    whole = lora.merged(base, params, adapters)
    return dict(weights.tensors(whole, architecture_of(oracle.MODELS[name])))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=3e-6, err_msg=key)


def parts_of(name):
    """All but projections and biases: what can be trained whole in any family."""
    shapes = traverse.flatten_dict(layout(name, None)[0], sep="/")
    names = (path.rsplit("/", 1)[-1] for path in shapes)
    return tuple(dict.fromkeys(one for one in names if one not in lora.PROJECTIONS and not one.endswith("_bias")))


# ---------------------------------------------------------------------- in and out again


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_keeps_every_bit_of_every_family_on_any_mesh(tmp_path, name):
    adapters = lora_of(name)
    params = drawn(name, adapters)
    folder = save(tmp_path / "adapter", name, adapters, params)
    found, loaded = load(folder, name)
    assert found == adapters
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    shardings = layout(name, adapters)[1]
    same = jax.tree.map(lambda leaf, home: leaf.sharding == home, loaded, lora.split(shardings, found)[0])
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_are_trained_whole_go_along(tmp_path, name):
    adapters = lora_of(name, whole=parts_of(name))
    params = drawn(name, adapters)
    folder = save(tmp_path / "adapter", name, adapters, params)
    found, loaded = load(folder, name)
    assert set(found.whole) == set(adapters.whole)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert_same(ours(tmp_path, name, adapters, params), melted(folder, name))


@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("llama2", ["q_proj"], {}),
        ("phi3_short", ["q_proj", "v_proj", "down_proj"], {"rslora": True}),
        ("phi3_short", ["up_proj"], {"alpha": 3.7}),
        ("gpt_neox", ["k_proj", "o_proj"], {"rslora": True, "alpha": 3.7}),
        ("gpt2", ["o_proj", "v_proj"], {"whole": ("position_embeddings", "norm")}),
        ("gpt2", ["down_proj"], {"whole": ("o_proj",)}),
        ("qwen2", ["k_proj"], {"whole": ("o_proj", "up_proj")}),
        ("biased_linear", ["gate_proj"], {"whole": ("q_proj", "lm_head")}),
        ("mixtral", ["o_proj"], {"whole": ("embed_tokens",)}),
    ],
)
def test_some_projections_melt_into_what_their_adapters_say(tmp_path, name, targets, options):
    adapters = lora_of(name, targets, **options)
    params = drawn(name, adapters)
    folder = save(tmp_path / "adapter", name, adapters, params)
    found, loaded = load(folder, name)
    assert (found.rank, found.alpha, found.targets) == (adapters.rank, adapters.alpha, adapters.targets)
    assert set(found.whole) == set(adapters.whole)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert_same(ours(tmp_path, name, adapters, params), melted(folder, name))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_float_dtype_is_read_into_the_one_wanted(tmp_path, stored, dtype):
    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(stored, stored)
    folder = saved(tmp_path, "phi3_short", lora_of("phi3_short", whole=("lm_head",)))
    expected = drawn("phi3_short", read(folder, "phi3_short"))
    rewrite(
        folder,
        lambda values: values.update({key: value.astype(numpy_dtype) for key, value in values.items()}),
        metadata={"daajax.projections": " ".join(lora_of("phi3_short").targets)},
    )
    _, params = load(folder, "phi3_short", dtype=jnp.dtype(dtype))
    expected = jax.tree.map(lambda x: np.asarray(x).astype(numpy_dtype).astype(jnp.dtype(dtype)), expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


# ---------------------------------------------------------------------- what PEFT itself would write


def theirs(folder, name, targets, *, rank=4, ranks=types.MappingProxyType({}), **config):
    """An adapter of whole modules, as PEFT makes it; `targets` end their names, `ranks` are those of some."""
    folder.mkdir()
    values, model = {}, oracle.MODELS[name]
    for place, (key, tensor) in enumerate(oracle.tensors(model).items()):
        module = key.removesuffix(".weight")
        if re.fullmatch(rf".*\.({'|'.join(targets)})", module):
            outputs, inputs = tensor.shape if FAMILIES[model["model_type"]].transposed else tensor.shape[::-1]
            own = next((value for end, value in ranks.items() if module.endswith(end)), rank)
            for side, shape in (("A", (own, inputs)), ("B", (outputs, own))):
                drawn = oracle.uniform(math.prod(shape), 8, place, ord(side)).reshape(shape) - 0.5
                values[f"{PREFIX}{module}.lora_{side}.weight"] = drawn.astype(np.float32)
    safetensors.numpy.save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": targets, "use_rslora": False}
    known |= {"fan_in_fan_out": not FAMILIES[model["model_type"]].transposed, "rank_pattern": dict(ranks)}
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    return folder


@pytest.mark.parametrize(
    ("name", "targets", "config", "expected"),
    [
        ("phi3_short", ["qkv_proj"], {}, ["q_proj", "k_proj", "v_proj"]),
        ("phi3_short", ["gate_up_proj", "o_proj"], {"use_rslora": True}, ["o_proj", "gate_proj", "up_proj"]),
        ("gpt_neox", ["query_key_value", "dense"], {}, ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("gpt2", ["c_attn"], {}, ["q_proj", "k_proj", "v_proj"]),
        ("gpt2", ["c_proj"], {}, ["o_proj", "down_proj"]),
        ("gpt2", [r"attn\.c_proj"], {"target_modules": r".*\.attn\.c_proj"}, ["o_proj"]),
        ("llama2", ["q_proj"], {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, ["q_proj"]),
        ("llama31", ["v_proj"], {"target_modules": ["self_attn.v_proj"], "init_lora_weights": "eva"}, ["v_proj"]),
        ("llama2", ["k_proj"], {"alpha_pattern": {".*_proj": 3.5}}, ["k_proj"]),
        ("llama2", ["k_proj", "q_proj"], {"alpha_pattern": {".*": 3.5}, "use_rslora": True}, ["q_proj", "k_proj"]),
        (  # ranks differ, the scale is one: the smaller is filled up
            "phi3_short",
            ["qkv_proj", "down_proj"],
            {"ranks": {"qkv_proj": 12}, "alpha_pattern": {"qkv_proj": 24}},
            ["q_proj", "k_proj", "v_proj", "down_proj"],
        ),
    ],
)
def test_an_adapter_of_a_module_becomes_that_of_its_projections(tmp_path, name, targets, config, expected):
    folder = theirs(tmp_path / "adapter", name, targets, **config)
    adapters, params = load(folder, name)
    assert sorted(adapters.targets) == sorted(expected)
    assert_same(ours(tmp_path, name, adapters, params), melted(folder, name))
    again = save(tmp_path / "again", name, adapters, params)  # and out once more
    assert_same(ours(tmp_path, name, adapters, params), melted(again, name))


def test_the_config_of_an_old_peft_is_read(tmp_path):
    folder = theirs(tmp_path / "adapter", "llama2", ["q_proj", "v_proj"])
    old = {
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(old))
    assert read(folder, "llama2") == Lora(4, 16.0, ("q_proj", "v_proj"))


def test_dropout_that_an_adapter_was_trained_with_is_said(tmp_path, capsys):
    folder = saved(tmp_path, "llama2", lora_of("llama2"))
    read(folder, "llama2")
    assert "dropout" not in capsys.readouterr().out
    edit(folder, lora_dropout=0.05)
    read(folder, "llama2")
    assert "it was trained with lora_dropout=0.05; it goes on without" in capsys.readouterr().out


# ---------------------------------------------------------------------- what PEFT makes of our config


def peft_modules(name):
    """Names in transformers of the modules that have tensors of their own; experts have none there."""
    keys = {key.rsplit(".", 1)[0] for key in oracle.shapes(oracle.MODELS[name])} - {"embed_out"}
    return {key.replace("block_sparse_moe", "mlp") for key in keys if ".experts." not in key} | {"lm_head"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", [["o_proj"], ["up_proj"], ["down_proj", "k_proj"], ["all-linear"]])
def test_names_in_the_config_hit_the_modules_that_are_meant_and_no_other(tmp_path, name, targets):
    if architecture_of(oracle.MODELS[name]).experts is not None:
        targets = [target for target in targets if target in (*lora.ATTENTION, "all-linear")] or ["q_proj"]
    whole = tuple(one for one in parts_of(name) if one in ("norm", "embed_tokens", "pre_mlp_norm", "post_mlp_norm"))
    folder = saved(tmp_path, name, lora_of(name, targets, whole=whole))
    stored = {key.removeprefix(PREFIX) for key in safetensors.numpy.load_file(folder / "adapter_model.safetensors")}
    config, modules = config_of(folder), peft_modules(name)
    adapted = {module for module in modules if any(module.endswith(f".{end}") for end in config["target_modules"])}
    assert adapted == {key.removesuffix(".lora_A.weight") for key in stored if key.endswith("lora_A.weight")}
    # PEFT compares ends of modules_to_save without a dot in front.
    kept = {module for module in modules if module.endswith(tuple(config["modules_to_save"]))}
    assert kept == {key.rsplit(".", 1)[0] for key in stored if "lora_" not in key}
    for end in config["rank_pattern"]:
        assert {module for module in modules if re.match(rf"(.*\.)?({end})$", module)} <= adapted


def test_a_tied_embedding_that_was_trained_is_written_twice_and_read_once(tmp_path):
    adapters = lora_of("llama31", whole=("embed_tokens",))
    folder = saved(tmp_path, "llama31", adapters)
    stored = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    head, embedding = (stored[f"{PREFIX}{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    np.testing.assert_array_equal(head, embedding)
    assert config_of(folder)["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert config_of(folder)["ensure_weight_tying"]
    edit(folder, modules_to_save=["model.embed_tokens"])  # as PEFT writes it where it tied the two itself
    assert read(folder, "llama31") == adapters
    edit(folder, ensure_weight_tying=False)
    refused(folder, "llama31", "is trained whole", "lm_head", "the base ties them")
    edit(folder, ensure_weight_tying=False, modules_to_save=["embed_tokens", "lm_head"])
    assert read(folder, "llama31") == adapters
    rewrite(folder, lambda values: values.update({f"{PREFIX}lm_head.weight": head + 1}))
    with pytest.raises(UserError, match=r"lm_head.* and model.embed_tokens.* were trained apart"):
        load(folder, "llama31")


@pytest.mark.parametrize(
    ("base", "name", "revision"),
    [
        ("/models/llama", "/models/llama", None),
        ("hf://org/name", "org/name", None),
        ("hf://org/name@v1", "org/name", "v1"),
        ("gs://bucket/name@v1", "gs://bucket/name@v1", None),
    ],
)
def test_the_base_is_named_as_peft_finds_it(tmp_path, base, name, revision):
    adapters = lora_of("llama2", ["q_proj"])
    config = config_of(save(tmp_path / "adapter", "llama2", adapters, drawn("llama2", adapters), base=base))
    assert (config["base_model_name_or_path"], config["revision"]) == (name, revision)


def test_a_directory_is_replaced_whole_and_has_the_tokenizer(tmp_path):
    adapters = lora_of("llama2", ["q_proj"])
    (tmp_path / "tokenizer.json").write_text("{}")
    folder = tmp_path / "new" / "adapter"
    folder.mkdir(parents=True)
    (folder / "stale").touch()
    architecture = architecture_of(oracle.MODELS["llama2"])
    params = drawn("llama2", adapters)
    peft.save(str(folder), params, architecture, adapters, base="x", tokenizer_path=str(tmp_path))
    files = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in folder.iterdir()) == files
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        peft.save(str(tmp_path / "file" / "x"), params, architecture, adapters, base="x", tokenizer_path=str(tmp_path))


# ---------------------------------------------------------------------- what is refused


def refused(folder, name, *words):
    with pytest.raises(UserError) as error:
        read(folder, name)
    assert "\n" not in str(error.value)
    for word in (str(folder), *words):
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "ADALORA"}, ["peft_type", "ADALORA"]),
        ({"task_type": "SEQ_CLS"}, ["task_type='SEQ_CLS'"]),
        ({"use_dora": True}, ["use_dora=True"]),
        ({"bias": "lora_only"}, ["bias='lora_only'"]),
        ({"lora_bias": True}, ["lora_bias=True"]),
        ({"layers_to_transform": [0]}, ["layers_to_transform=[0]"]),
        ({"layers_to_transform": 0}, ["layers_to_transform=0"]),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ["target_parameters"]),
        ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"arrow_config": {"top_k": 3}}, ["arrow_config"]),
        ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["init_lora_weights='pissa_niter_16'"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights='olora'"]),
        ({"init_lora_weights": "loftq"}, ["init_lora_weights='loftq'"]),
        ({"init_lora_weights": "corda"}, ["init_lora_weights='corda'"]),
        ({"use_novelty": True}, ["['use_novelty']", "are not known for an adapter"]),
        ({"top_k": 3}, ["['top_k']"]),  # which would not matter in a config.json
        ({"r": 0}, ["r is 0"]),
        ({"lora_alpha": "16"}, ["lora_alpha is '16'"]),
        ({"use_rslora": 1}, ["use_rslora is 1"]),
        ({"r": 8}, ["has shape (4, 32)", "(8, 32)"]),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 12}}, ["q_proj.lora_A.weight has shape (4, 32)"]),
        ({"alpha_pattern": {"q_proj": 12}}, ["1.5 to 3", "one scale"]),
        ({"rank_pattern": {"q_(proj": 4}}, ["'q_(proj' is no regular expression"]),
        ({"rank_pattern": {"q_proj": "4"}}, ["rank_pattern.q_proj is '4'"]),
        ({"target_modules": ["q_proj"]}, ["has unexpected tensors", "mlp.down_proj.lora_A.weight", "more"]),
        ({"target_modules": ["c_attn"]}, ["['c_attn'] names no projection of a llama"]),
        ({"target_modules": r"model\.layers\.0\..*_proj"}, ["1 of 2 layers"]),
        ({"target_modules": 3}, ["target_modules is 3"]),
        ({"modules_to_save": ["classifier"]}, ["'classifier'", "the base model has not"]),
        ({"modules_to_save": ["norm"]}, ["lacks tensors"]),  # PEFT would train every norm
        ({"modules_to_save": ["lm_head"]}, ["lacks tensors", "base_model.model.lm_head.weight"]),
        ({"modules_to_save": ["q_proj"]}, ["lacks", "unexpected"][:1]),
        ({"modules_to_save": "lm_head"}, ["modules_to_save is 'lm_head'"]),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused_by_name(tmp_path, changes, words):
    folder = saved(tmp_path, "llama2", lora_of("llama2"))
    edit(folder, **changes)
    refused(folder, "llama2", *words)


Q = f"{PREFIX}model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.pop(f"{Q}.lora_B.weight"), ["lacks tensors", f"{Q}.lora_B.weight"]),
        (lambda values: values.update({"more": np.ones(1)}), ["has unexpected tensors", "more"]),
        (
            lambda values: values.update({f"{PREFIX}lm_head.lora_A.weight": np.ones((4, 32), np.float32)}),
            ["has unexpected tensors", "lm_head.lora_A.weight"],
        ),
        (
            lambda values: values.update({f"{Q}.lora_B.weight": np.ones((48, 4), np.float32)}),
            [f"{Q}.lora_B.weight has shape (48, 4)", "(32, 4)", "another base"],
        ),
        (lambda values: values.update({f"{Q}.lora_B.weight": np.ones((32, 4), np.int8)}), ["is I8", "are read"]),
    ],
    ids=["missing", "extra", "head", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, words):
    folder = saved(tmp_path, "llama2", lora_of("llama2"))
    rewrite(folder, change)
    refused(folder, "llama2", *words)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    folder = saved(tmp_path, "llama2", lora_of("llama2", ["q_proj"]))
    refused(folder, "gpt2", "names no projection of a gpt2")
    for other in ("gpt2", "gpt_neox", "mixtral", "nemotron"):
        whole = saved(tmp_path / other, "llama2", lora_of("llama2"))
        refused(whole, other, "it has an adapter of", "it is of another base")
    refused(folder, "head_dim", "has shape (32, 4)", "(96, 4)")


def test_files_that_are_missing_broken_or_pickles_are_refused(tmp_path):
    folder = saved(tmp_path, "llama2", lora_of("llama2"))
    weights_file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[: len(whole) // 2])
    refused(folder, "llama2", "adapter_model.safetensors is not a readable safetensors file")
    weights_file.unlink()
    refused(folder, "llama2", "needs adapter_model.safetensors; there is none")
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    refused(folder, "llama2", "found adapter_model.bin, which is not opened")
    config_file.write_text("{")
    refused(folder, "llama2", "adapter_config.json: not an adapter's config")
    config_file.unlink()
    refused(folder, "llama2", "has no adapter_config.json")


@pytest.mark.parametrize(("name", "whole"), [("phi3_short", "k_proj"), ("mixtral", "up_proj"), ("gpt2", "v_proj")])
def test_parts_that_are_no_module_are_not_written(tmp_path, name, whole):
    adapters = lora_of(name, ["o_proj"], whole=(whole,))
    with pytest.raises(UserError, match=f"{whole} is trained whole, but is no module of its own"):
        peft.check(architecture_of(oracle.MODELS[name]), adapters)
    with pytest.raises(UserError, match="no module of its own"):
        saved(tmp_path, name, adapters)
    assert not (tmp_path / "adapter").exists()


def test_blocks_that_were_filled_since_are_refused(tmp_path):
    folder = saved(tmp_path, "gpt_neox", lora_of("gpt_neox", ["q_proj", "v_proj"]))
    name = f"{PREFIX}gpt_neox.layers.1.attention.query_key_value.lora_B.weight"
    for row, rank in ((0, 4), (8, 0)):  # a query of the values' block, a key
        note = {"daajax.projections": "q_proj v_proj"}
        rewrite(folder, lambda values, at=(row, rank): values[name].__setitem__(at, 1), metadata=note)
        with pytest.raises(UserError, match=r"query_key_value.* has values outside of the blocks"):
            load(folder, "gpt_neox")
        rewrite(folder, lambda values, at=(row, rank): values[name].__setitem__(at, 0), metadata=note)
        load(folder, "gpt_neox")


def test_blocks_that_do_not_divide_are_refused(tmp_path):
    folder = saved(tmp_path, "phi3_short", lora_of("phi3_short", ["q_proj", "k_proj", "v_proj"]))
    edit(folder, rank_pattern={"qkv_proj": 11}, alpha_pattern={"qkv_proj": 16.5})
    refused(folder, "phi3_short", "rank 11", "3 projections")
