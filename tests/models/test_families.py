"""Families against transformers' own numbers, and what a config.json may and may not say."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import sharding
from daajax.data.batches import Batches
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.data.tokens import Ids, TokenizedData
from daajax.errors import UserError
from daajax.loss import router_loss
from daajax.models import decoder, rope, weights
from daajax.models.architecture import LayerKind, Rope, describe_rope, for_length
from daajax.models.families import FAMILIES, architecture_of, read_architecture
from daajax.models.parameters import parameter_count
from daajax.scoring import Scorer
from tests import worlds
from tests.oracle import make_values as oracle

DATA = dict(data=8, fsdp=1, tensor=1)
FSDP = dict(data=1, fsdp=8, tensor=1)
TENSOR = dict(data=2, fsdp=2, tensor=2)


def tokenized(config):
    """The oracle's examples as a tokenized data set."""
    tokens, scored, lengths = [], [], []
    for prompt, responses, unscored in oracle.examples(config):
        tokens += [prompt, *responses]
        scored += [np.zeros(len(prompt), bool), *(np.arange(len(response)) >= unscored for response in responses)]
        lengths.append([len(prompt), *map(len, responses)])
    lengths = np.array(lengths, np.int32)
    return TokenizedData(
        tokens=np.concatenate(tokens),
        scored=np.concatenate(scored),
        starts=np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))]),
        lengths=lengths,
        weights=np.ones(len(lengths), np.float32),
        ids=Ids.of([str(example) for example in range(len(lengths))]),
        counters={},
        notices=[],
        digest="",
    )


def prepared(folder, name, mesh, *, packed=True, shared=True, attention="blockwise", remat="none"):
    """A model of the oracle on a mesh, and its examples in one update's rows."""
    config = oracle.MODELS[name]
    path = oracle.write_model(folder, config)
    mesh = sharding.make_mesh(mesh)
    scorer = Scorer.make(
        for_length(read_architecture(path), 210),
        mesh,
        attention=attention,
        remat=remat,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    shapes, axes = decoder.abstract_params(scorer.model)
    params = weights.load(path, scorer.model.architecture, shapes, sharding.param_shardings(mesh, shapes, axes))
    data = tokenized(config)
    plan = pack(
        np.arange(len(data.weights))[None],
        Sizes.of(data, prefix_sharing=shared),
        packing=packed,
        micro_batches=1,
        row_multiple=sharding.row_multiple(mesh),
    )
    return scorer, params, data, Batches(data, plan), plan.shape(0).keys


def assert_gradients(gradients, expected, scorer):
    """Compares with what the oracle says of every tensor of a directory."""
    found = {key: oracle.summarize(key, value) for key, value in weights.tensors(gradients, scorer.model.architecture)}
    assert found.keys() == expected.keys()
    largest = max(gradient["norm"] for gradient in expected.values())
    for key, gradient in expected.items():
        # A projection moves by the norm of what is wrong; a gradient that is 0 in exact arithmetic is rounding.
        tolerance = max(1e-3 * gradient["norm"], 1e-6 * largest)
        assert abs(found[key]["norm"] - gradient["norm"]) <= tolerance, key
        np.testing.assert_allclose(
            found[key]["projections"], gradient["projections"], rtol=0, atol=tolerance, err_msg=key
        )
        for place, value in gradient["entries"].items():
            assert abs(found[key]["entries"][place] - value) <= tolerance, (key, place)


@pytest.mark.parametrize(
    ("name", "mesh", "packed", "shared", "attention", "remat"),
    [
        ("llama31", DATA, True, False, "blockwise", "dots"),
        ("mixtral", TENSOR, True, True, "blockwise", "none"),
        ("gemma2", FSDP, True, True, "blockwise", "full"),
        ("gpt2", TENSOR, True, True, "blockwise", "none"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)  # 8 s each, together minutes
            for case in [
                ("phi3_long", TENSOR, True, True, "blockwise", "none"),
                ("qwen3", TENSOR, True, True, "blockwise", "none"),
                ("head_dim", TENSOR, True, True, "dense", "none"),
                ("llama2", DATA, True, True, "blockwise", "none"),
                ("llama31", FSDP, True, True, "blockwise", "full"),
                ("llama31", FSDP, False, True, "dense", "dots"),
                ("head_dim", FSDP, False, False, "blockwise", "full"),
                ("mistral", DATA, True, True, "blockwise", "none"),
                ("mistral", TENSOR, False, False, "dense", "dots"),
                ("biased_linear", TENSOR, True, True, "blockwise", "none"),
                ("dynamic", DATA, True, True, "blockwise", "none"),
                ("yarn", DATA, True, True, "blockwise", "none"),
                ("ministral", FSDP, True, True, "blockwise", "dots"),
                ("qwen2", DATA, True, True, "dense", "none"),
                ("qwen3_moe", FSDP, True, True, "blockwise", "full"),
                ("gemma", DATA, True, True, "blockwise", "none"),
                ("gemma2", TENSOR, True, False, "dense", "none"),
                ("gemma3", TENSOR, True, True, "blockwise", "none"),
                ("phi3_short", FSDP, True, True, "blockwise", "none"),
                ("olmo2", TENSOR, True, True, "blockwise", "none"),
                ("smollm3", DATA, True, True, "blockwise", "none"),
                ("nemotron", TENSOR, True, True, "blockwise", "none"),
                ("gpt_neox", TENSOR, True, True, "blockwise", "none"),
                ("gpt_neox_sequential", DATA, True, True, "blockwise", "none"),
            ]
        ),
    ],
)
def test_log_probs_and_gradients_are_those_of_transformers(tmp_path, name, mesh, packed, shared, attention, remat):
    expected = oracle.read(name)
    scorer, params, data, batches, keys = prepared(
        tmp_path, name, mesh, packed=packed, shared=shared, attention=attention, remat=remat
    )
    (indices,) = batches.token_indices(0)
    factors = np.zeros(len(data.tokens), np.float32)
    factors[data.scored] = np.concatenate(oracle.coefficients())

    def weighted(params, batch):
        logps = scorer.token_logps(params, batch, keys=keys)
        return (logps * batch["factors"]).sum(), logps

    batch = {key: value[0] for key, value in batches[0].items()}
    batch["factors"] = np.where(indices >= 0, factors[indices], 0)
    placed = sharding.place(scorer.mesh, batch, ("rows",))
    (_, logps), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params, placed)

    found = np.full(len(data.tokens), np.nan)
    found[indices[indices >= 0]] = np.asarray(logps)[indices >= 0]
    # Float32 against float64, at log-probs of about -6 nats.
    np.testing.assert_allclose(found[data.scored], np.concatenate(expected["logps"]), rtol=0, atol=1e-4)
    assert (np.asarray(logps)[indices < 0] == 0).all()
    assert_gradients(gradients, expected["gradients"], scorer)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("name", "mesh"), [("mixtral", DATA), ("qwen3_moe", TENSOR)])
def test_the_loss_that_balances_experts_is_that_of_transformers(tmp_path, name, mesh, shared):
    expected = oracle.read(name)
    scorer, params, _, batches, keys = prepared(tmp_path, name, mesh, shared=shared)
    batch = sharding.place(scorer.mesh, {key: value[0] for key, value in batches[0].items()}, ("rows",))

    def balance(params):
        return router_loss(scorer.states(params, batch, keys=keys, routed=True).routing)

    loss, gradients = jax.jit(jax.value_and_grad(balance))(params)
    np.testing.assert_allclose(loss, expected["router_loss"], rtol=1e-5)
    assert_gradients(gradients, expected["router_gradients"], scorer)


# ---------------------------------------------------------------------- what a config.json says

LLAMA31 = oracle.MODELS["llama31"]
SCALING = {key: value for key, value in LLAMA31["rope_parameters"].items() if key != "rope_theta"}
# meta-llama/Llama-3.1-8B, as published.
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def described(folder, *changes):
    """The architecture of a directory whose config.json is the first dict with the others laid over it."""
    config = {key: value for change in changes for key, value in change.items()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_architecture(str(folder))


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def test_the_published_llama_31_config_is_read_as_it_says(tmp_path):
    architecture = described(tmp_path, PUBLISHED)
    assert (architecture.num_attention_heads, architecture.num_key_value_heads, architecture.head_dim) == (32, 8, 128)
    assert architecture.kinds == (LayerKind(None, Rope(500000.0, "llama3", 1.0, 8.0, 1.0, 4.0, 8192)),)
    assert parameter_count(architecture) == 8_030_261_248  # as on its model card


# mistralai/Mistral-7B-v0.1, as published.
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def test_the_published_mistral_configs_are_read_as_they_say(tmp_path):
    architecture = described(tmp_path, MISTRAL)
    assert (architecture.num_key_value_heads, architecture.head_dim, architecture.kinds[0].sliding_window) == (
        8,
        128,
        4096,
    )
    assert parameter_count(architecture) == 7_241_732_096  # as on its model card
    v03 = dict(sliding_window=None, rope_theta=1000000.0, vocab_size=32768)
    architecture = described(tmp_path, MISTRAL, v03, {"attention_dropout": 0.0})
    assert architecture.kinds == (LayerKind(None, Rope(1e6)),)
    assert parameter_count(architecture) == 7_248_023_552
    assert described(tmp_path, MISTRAL, {"head_dim": 64}).head_dim == 64


def test_what_a_mistral_config_leaves_out_has_the_defaults_of_transformers(tmp_path):
    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    bare = {key: MISTRAL[key] for key in sizes}
    architecture = described(tmp_path, bare)
    assert (architecture.num_key_value_heads, architecture.max_position_embeddings) == (8, 131072)
    assert (architecture.kinds[0].sliding_window, architecture.norm.eps) == (4096, 1e-6)
    assert described(tmp_path, bare, {"num_key_value_heads": None}).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        # Published sizes: Llama 2 7B, Llama 3.2 1B (tied), Llama 3.1 70B.
        (dict(vocab_size=32000, intermediate_size=11008, num_key_value_heads=32), 6_738_415_616),
        (
            dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True),
            1_235_814_400,
        ),
        (dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64), 70_553_706_496),
    ],
)
def test_parameter_counts_are_the_published_ones(tmp_path, changes, count):
    assert parameter_count(described(tmp_path, PUBLISHED, changes)) == count


def sizes(model_type, vocab, hidden, mlp, layers, heads, kv_heads=None, **others):
    """The part of a config.json that says how many parameters there are."""
    found = dict(model_type=model_type, vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp)
    found |= dict(num_hidden_layers=layers, num_attention_heads=heads)
    return found | ({} if kv_heads is None else {"num_key_value_heads": kv_heads}) | others


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # As published on the models' cards, by their safetensors.
        (sizes("mixtral", 32000, 4096, 14336, 32, 32, 8), 46_702_792_704),  # 8x7B
        (sizes("qwen2", 152064, 3584, 18944, 28, 28, 4), 7_615_616_512),  # Qwen2.5 7B
        (sizes("qwen3", 151936, 4096, 12288, 36, 32, 8), 8_190_735_360),  # 8B
        (sizes("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, head_dim=128), 30_532_122_624),  # 30B-A3B
        (sizes("gemma", 256000, 3072, 24576, 28, 16, 16), 8_537_680_896),  # 7B
        (sizes("gemma2", 256000, 2304, 9216, 26, 8, 4), 2_614_341_888),  # 2B
        (sizes("gemma3_text", 262144, 1152, 6912, 26, 4, 1), 999_885_952),  # 1B
        (sizes("phi3", 32064, 3072, 8192, 32, 32, 32), 3_821_079_552),  # mini
        (sizes("phi3", 100352, 5120, 17920, 40, 40, 10), 14_659_507_200),  # Phi-4
        (sizes("olmo2", 100352, 4096, 11008, 32, 32), 7_298_617_344),  # 7B
        (sizes("smollm3", 128256, 2048, 11008, 36, 16, 4), 3_075_098_624),  # 3B
        (sizes("gpt_neox", 50304, 2560, 10240, 32, 32), 2_775_208_960),  # Pythia 2.8B
        (dict(model_type="gpt2"), 124_439_808),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_parameter_counts_of_every_family_are_the_published_ones(tmp_path, config, count):
    assert parameter_count(described(tmp_path, config)) == count


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_theta=500000.0, rope_scaling=SCALING),
        dict(rope_theta=500000.0, rope_scaling=without(SCALING, "rope_type") | {"type": "llama3"}),
        dict(rope_theta=500000.0, rope_scaling=SCALING | {"type": "llama3"}),
        dict(rope_theta=500000, rope_scaling=SCALING | {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}),
        dict(rope_theta=500000.0, rope_parameters=SCALING),
        dict(rope_parameters=LLAMA31["rope_parameters"], rope_scaling=None, rope_theta=None),
    ],
)
def test_rope_in_the_old_style_is_read_as_rope_parameters(tmp_path, rope):
    expected = described(tmp_path, LLAMA31)
    assert described(tmp_path, without(LLAMA31, "rope_parameters"), rope) == expected


@pytest.mark.parametrize(
    "rope",
    [
        {},
        dict(rope_theta=10000.0),
        dict(rope_theta=10000, rope_scaling=None),
        dict(rope_scaling={"rope_type": "default"}),
        dict(rope_parameters={"type": "default", "rope_theta": 10000}),
    ],
)
def test_rope_without_scaling_is_the_default(tmp_path, rope):
    assert described(tmp_path, without(LLAMA31, "rope_parameters"), rope).kinds == (LayerKind(None, Rope(10000.0)),)


def test_what_a_config_leaves_out_has_the_defaults_of_transformers(tmp_path):
    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    architecture = described(tmp_path, {key: LLAMA31[key] for key in sizes})
    assert (architecture.num_key_value_heads, architecture.head_dim) == (4, 8)
    assert (architecture.norm.eps, architecture.max_position_embeddings) == (1e-6, 2048)
    assert (architecture.tie_word_embeddings, architecture.initializer_range) == (False, 0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="bert"), ["model_type 'bert' is not supported", "gpt2, gpt_neox, llama"]),
        (dict(model_type=["llama"]), ["model_type ['llama'] is not supported"]),
        (dict(sliding_window=128), ["sliding_window", "not known"]),
        (dict(quantization_config={"bits": 4}), ["quantization_config", "are quantized"]),
        (dict(attention_bias="yes"), ["attention_bias is 'yes'; true or false is needed"]),
        (dict(hidden_act="quick_gelu"), ["hidden_act 'quick_gelu' is not supported", "relu2, silu"]),
        (dict(num_key_value_heads=3), ["num_attention_heads=4", "num_key_value_heads=3"]),
        (dict(hidden_size="32"), ["hidden_size is '32'; a positive integer is needed"]),
        (dict(num_hidden_layers=0), ["num_hidden_layers is 0"]),
        (dict(vocab_size=None), ["vocab_size is None"]),
        (dict(vocab_size=True), ["vocab_size is True"]),
        (dict(head_dim=7), ["head_dim=7", "even"]),
        (dict(model_type="mistral", sliding_window=0), ["sliding_window is 0; a positive integer is needed"]),
        (dict(model_type="mistral", layer_types=["full_attention"]), ["layer_types", "not known"]),
        (dict(rms_norm_eps="small"), ["rms_norm_eps is 'small'; a positive number is needed"]),
        (dict(rms_norm_eps=[1e-6]), ["rms_norm_eps is [1e-06]"]),
        (dict(tie_word_embeddings="false"), ["tie_word_embeddings is 'false'; true or false is needed"]),
        (dict(rope_parameters={"rope_type": "mrope", "rope_theta": 1e4}), ["rope_type 'mrope' is not supported"]),
        (dict(rope_parameters={"rope_type": ["llama3"]}), ["rope_type ['llama3'] is not supported"]),
        (dict(rope_parameters=without(LLAMA31["rope_parameters"], "factor")), ["missing or extra", "'factor'"]),
        (dict(rope_parameters=LLAMA31["rope_parameters"] | {"partial_rotary_factor": 0.5}), ["partial_rotary_factor"]),
        (dict(rope_parameters="llama3"), ["rope_parameters is 'llama3'"]),
        (dict(rope_parameters=LLAMA31["rope_parameters"] | {"factor": "8"}), ["factor is '8'", "number"]),
        (dict(rope_parameters=LLAMA31["rope_parameters"] | {"rope_theta": None}), ["missing or extra", "rope_theta"]),
        (
            dict(rope_parameters=LLAMA31["rope_parameters"] | {"original_max_position_embeddings": 0.5}),
            ["original_max_position_embeddings is 0.5", "integer"],
        ),
        (
            dict(rope_parameters=LLAMA31["rope_parameters"] | {"high_freq_factor": 1.0}),
            ["high_freq_factor", "low_freq_factor"],
        ),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        described(tmp_path, LLAMA31, changes)
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "has no config.json"),
        (b"", "not a model's config.json"),
        (b'{"model_type": "llama",', "not a model's config.json"),
        (b"[]", "not a model's config.json"),
        (b"{}", "model_type"),
        (b"\xff\xfe{}", "not a model's config.json"),
        (b'{"model_type": "llama"}', "num_attention_heads is None"),
    ],
)
def test_a_broken_or_missing_config_is_refused_in_one_line(tmp_path, text, word):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError) as error:
        read_architecture(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "file", "meta-llama/Llama-3.1-8B"])
def test_a_path_that_is_no_directory_is_refused_with_the_way_to_get_one(tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is not a directory; .* hf download") as error:
        read_architecture(name)
    assert repr(name) in str(error.value)


def test_the_readme_has_every_family():
    text = (worlds.ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Models")[1].split("## Files")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(FAMILIES)


def test_longrope_has_long_factors_where_the_longest_sequence_exceeds_the_original_context():
    architecture = architecture_of(oracle.MODELS["phi3_short"])
    short, long = (for_length(architecture, length) for length in (256, 257))
    assert [describe_rope(one)[0].split("factors")[0][-6:-1] for one in (short, long)] == ["short", " long"]
    for one, factors in ((short, [1.0, 1.1, 1.2, 3.0]), (long, [1.5, 2.0, 3.0, 9.0])):
        found = rope.frequencies(one.kinds[0].rope, architecture.head_dim)
        np.testing.assert_allclose(found, 10000.0 ** -(np.arange(4) / 4) / factors, rtol=1e-6)
    assert describe_rope(architecture_of(LLAMA31)) == []


@pytest.mark.parametrize(("name", "words"), [("gpt2", "256 learned positions"), ("dynamic", "rope_type 'dynamic'")])
def test_a_length_that_a_model_has_no_positions_for_is_refused_in_one_line(tmp_path, name, words):
    path = oracle.write_model(tmp_path, oracle.MODELS[name])
    read_architecture(path, length=256)
    with pytest.raises(UserError, match=words) as error:
        read_architecture(path, length=257)
    assert str(error.value).startswith(str(tmp_path))
    assert "257" in str(error.value)
    assert "lower max_length to 256" in str(error.value)
