"""Adapters in PEFT itself: what we write scores there as here, and what it writes scores here as there."""

import warnings

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import sharding
from daajax.data.token_cache import tokenized as tokenize
from daajax.errors import UserError
from daajax.models import decoder, lora, peft, weights
from daajax.models.architecture import for_length
from daajax.models.families import read_architecture
from daajax.models.lora import Lora
from daajax.models.storage import Later
from daajax.scoring import Scorer
from tests import worlds
from tests.models.test_families import tokenized
from tests.oracle import make_values as oracle
from tests.responses import response_logps

torch = pytest.importorskip("torch", reason="torch is not installed: make setup-oracle")
theirs = pytest.importorskip("peft", reason="peft is not installed: make setup-oracle")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # peft leaves its config open
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft asks transformers for it
]

LENGTH = 210  # tokens of the oracle's longest example


def scorer_of(path, adapters, length=LENGTH):
    with worlds.visible(1):
        mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1))
    return Scorer.make(
        for_length(read_architecture(path), length),
        mesh,
        attention="blockwise",
        remat="none",
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        lora=adapters,
    )


def layout(scorer):
    shapes, axes = decoder.abstract_params(scorer.model)
    return shapes, sharding.param_shardings(scorer.mesh, shapes, axes)


def load_base(path, scorer):
    return weights.load(path, scorer.model.architecture, *map(lora.without, layout(scorer)))


def drawn(scorer):
    """What adapters leave to train, moved far enough to show."""
    shapes = traverse.flatten_dict(lora.split(layout(scorer)[0], scorer.model.lora)[0], sep="/")
    values = {}
    for place, (path, leaf) in enumerate(sorted(shapes.items())):
        size = 0.2 if path.startswith(lora.COLLECTION) else 0.1
        noise = size * (2 * oracle.uniform(leaf.size, 6, place).reshape(leaf.shape) - 1)
        values[path] = jnp.asarray(noise, jnp.float32)
    return traverse.unflatten_dict(values, sep="/")


def moved(base, trained):
    """The parts that are trained whole, by so much away from the base."""
    flat = traverse.flatten_dict(base, sep="/")
    values = traverse.flatten_dict(trained, sep="/")
    return traverse.unflatten_dict(
        {path: value + flat[path] if path in flat else value for path, value in values.items()}, sep="/"
    )


def read_and_load(path, folder):
    scorer = scorer_of(path, peft.read(folder, read_architecture(path)))
    return scorer, peft.load(folder, scorer.model.architecture, scorer.model.lora, *layout(scorer))


def torch_scores(model, data):
    """The same by torch, every response alone behind its prompt."""
    found = np.zeros((len(data.weights), 2))
    for example, (start, lengths) in enumerate(zip(data.starts, data.lengths, strict=False)):
        prompt, ends = data.tokens[start : start + lengths[0]], start + np.cumsum(lengths)
        for response in range(2):
            cut = slice(ends[response], ends[response + 1])
            ids = torch.tensor(np.concatenate([prompt, data.tokens[cut]])[None].astype(np.int64))
            with torch.no_grad():
                logps = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
            taken = logps.gather(1, ids[0, 1:, None])[:, 0].numpy()[-lengths[response + 1] :]
            found[example, response] = taken[data.scored[cut][-len(taken) :]].sum()
    return found


def in_peft(path, folder):
    """A PEFT directory over its base; refuses tensors that are missing or that nobody expects."""
    fresh = theirs.get_peft_model(oracle.torch_model(path), theirs.PeftConfig.from_pretrained(folder))
    report = theirs.set_peft_model_state_dict(fresh, theirs.load_peft_weights(folder))
    assert report.unexpected_keys == []
    assert [key for key in report.missing_keys if "default" in key] == []
    return theirs.PeftModel.from_pretrained(oracle.torch_model(path), folder).eval()


def assert_close(found, expected, tolerance=1e-4):
    worst = np.abs(found - expected).max()
    assert worst < tolerance, f"the worst of {found.size} log-probs is off by {worst:.2e} nats"


def assert_same_in_peft(found, path, folder, data, tolerance=1e-4):
    model = in_peft(path, folder)
    assert_close(found, torch_scores(model, data), tolerance)
    with model.disable_adapter():  # it is not for nothing
        assert np.median(np.abs(found - torch_scores(model, data))) > 100 * tolerance


def assert_written_scores(found, tmp_path, path, scorer, base, trained, data, tolerance=1e-4):
    """What we write of trained parameters scores as found: as an adapter in PEFT, and merged in transformers."""
    folder, merged, architecture = str(tmp_path / "adapter"), str(tmp_path / "merged"), scorer.model.architecture
    peft.save(folder, trained, architecture, scorer.model.lora, base=path, tokenizer_path=path)
    assert_same_in_peft(found, path, folder, data, tolerance)
    whole = lora.merged(jax.tree.map(Later.of, base), trained, scorer.model.lora)
    weights.save(merged, whole, architecture, model_path=path, tokenizer_path=path)
    assert_close(found, torch_scores(oracle.torch_model(merged), data), tolerance)


CASES = [
    ("llama2", ["all-linear"], {"rslora": True, "whole": ("lm_head", "norm")}),
    ("llama31", ["q_proj", "v_proj"], {"whole": ("embed_tokens",)}),
    ("biased_linear", ["o_proj", "gate_proj"], {"whole": ("pre_mlp_norm", "up_proj")}),
    ("mixtral", ["all-linear"], {"whole": ("router",)}),
    ("qwen2", ["all-linear"], {}),
    ("qwen3", ["all-linear"], {"whole": ("q_norm", "embed_tokens", "lm_head")}),
    ("qwen3_moe", ["all-linear"], {"whole": ("norm", "router")}),
    ("gemma2", ["all-linear"], {"whole": ("post_attention_norm",)}),
    ("gemma3", ["all-linear"], {"rslora": True, "whole": ("embed_tokens",)}),
    ("phi3_long", ["all-linear"], {"rslora": True}),
    ("phi3_short", ["q_proj", "up_proj", "o_proj"], {"whole": ("lm_head",)}),
    ("olmo2", ["all-linear"], {}),
    ("smollm3", ["all-linear"], {}),
    ("nemotron", ["all-linear"], {"whole": ("norm", "lm_head")}),
    ("gpt_neox", ["all-linear"], {"whole": ("lm_head", "norm")}),
    ("gpt_neox_sequential", ["k_proj", "o_proj"], {"rslora": True}),
    ("gpt2", ["all-linear"], {"whole": ("position_embeddings", "norm", "embed_tokens")}),
    ("gpt2", ["o_proj"], {"rslora": True}),
    ("gpt2", ["down_proj", "k_proj"], {}),
]


@pytest.mark.parametrize(("name", "targets", "options"), CASES)
def test_what_we_write_scores_in_peft_and_merged_in_transformers_as_here(tmp_path, name, targets, options):
    path, data = oracle.write_model(tmp_path / "model", oracle.MODELS[name]), tokenized(oracle.MODELS[name])
    architecture = read_architecture(path)
    scorer = scorer_of(path, Lora(4, 6.0, lora.targets_of(architecture, targets), **options))
    base = load_base(path, scorer)
    trained = moved(base, drawn(scorer))
    found = response_logps(scorer, lora.joined(trained, base), data)
    assert_written_scores(found, tmp_path, path, scorer, base, trained, data)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama2", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "modules_to_save": ["lm_head"]}),
        ("llama31", {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
        ("gemma3", {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
        ("phi3_short", {"target_modules": "all-linear"}),
        ("phi3_long", {"target_modules": ["qkv_proj"], "use_rslora": True, "modules_to_save": ["embed_tokens"]}),
        (
            "phi3_long",
            {
                "target_modules": ["qkv_proj", "o_proj"],
                "rank_pattern": {"qkv_proj": 12},
                "alpha_pattern": {"qkv_proj": 24},
            },
        ),
        ("gpt_neox", {"target_modules": "all-linear", "lora_dropout": 0.1}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_proj", "c_fc"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]}),
        ("gpt2", {"target_modules": r".*\.mlp\.c_proj", "fan_in_fan_out": True, "init_lora_weights": "orthogonal"}),
    ],
)
def test_what_peft_writes_scores_here_as_there(tmp_path, name, options):
    path, data = oracle.write_model(tmp_path / "model", oracle.MODELS[name]), tokenized(oracle.MODELS[name])
    config = theirs.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options)
    torch.manual_seed(0)  # PEFT draws an adapter's first matrix
    model = theirs.get_peft_model(oracle.torch_model(path, "float32"), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)

    scorer, trained = read_and_load(path, folder)
    base = load_base(path, scorer)
    assert_same_in_peft(response_logps(scorer, lora.joined(trained, base), data), path, folder, data)


def test_an_embedding_that_peft_trained_apart_from_its_head_is_refused(tmp_path):
    path = oracle.write_model(tmp_path / "model", oracle.MODELS["llama31"])
    for modules, words in ((["embed_tokens"], "though the base ties them"), (["embed_tokens", "lm_head"], "apart")):
        config = theirs.LoraConfig(target_modules=["q_proj"], modules_to_save=modules)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this can lead to complications
            model = theirs.get_peft_model(oracle.torch_model(path, "float32"), config)
            with torch.no_grad():
                model.get_input_embeddings().weight.add_(1.0)
            model.save_pretrained(tmp_path / "adapter")
        folder = str(tmp_path / "adapter")
        with pytest.raises(UserError, match=words):
            read_and_load(path, folder)


def test_pairs_of_a_real_model_score_in_peft_and_merged_in_transformers_as_here(assets, tmp_path):
    path = str(assets / "tiny_model")
    data = tokenize("jsonl", assets / "data" / "stories_sentiment.test.jsonl.gz", path, max_length=512, limit=64)
    architecture = read_architecture(path)
    scorer = scorer_of(path, Lora(8, 16.0, lora.targets_of(architecture, ["all-linear"])), length=512)
    base = load_base(path, scorer)
    trained = jax.tree.map(lambda x: 0.3 * x, drawn(scorer))
    found = response_logps(scorer, lora.joined(trained, base), data)
    assert found.shape == (64, 2)
    # Float32 against float64 at up to −700 nats a response, as in tests/test_golden_logps.py.
    assert_written_scores(found, tmp_path, path, scorer, base, trained, data, 1e-3)
