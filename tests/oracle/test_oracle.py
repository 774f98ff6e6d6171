"""The committed numbers against transformers as installed, and our exports opened by it."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import sharding
from daajax.models import decoder, weights
from daajax.models.families import read_architecture
from tests.oracle import make_values as oracle

torch = pytest.importorskip("torch", reason="torch is not installed: make setup-oracle")
pytestmark = pytest.mark.oracle

NAMES = sorted(oracle.MODELS)


def load(path, dtype=jnp.float32):
    mesh = sharding.make_mesh(dict(data=1, fsdp=8, tensor=1))
    model = decoder.Decoder(read_architecture(path), attend=lambda q, k, v, seen: q, param_dtype=dtype)
    shapes, axes = decoder.abstract_params(model)
    return weights.load(path, model.architecture, shapes, sharding.param_shardings(mesh, shapes, axes))


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_numbers_are_those_of_transformers(tmp_path, name):
    found, expected = oracle.compute(name, tmp_path), oracle.read(name)
    assert found["made_with"].keys() == expected["made_with"].keys()
    np.testing.assert_allclose(found["rope_frequencies"], expected["rope_frequencies"], rtol=1e-6)
    # What is float32 inside transformers differs by its rounding from machine to machine.
    for one, other in zip(found["logps"], expected["logps"], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for key, gradient in expected["gradients"].items():
        tolerance = 1e-4 * gradient["norm"]
        np.testing.assert_allclose(found["gradients"][key]["norm"], gradient["norm"], atol=tolerance)
        np.testing.assert_allclose(found["gradients"][key]["projections"], gradient["projections"], atol=tolerance)


@pytest.mark.parametrize(("name", "several"), [(name, number % 2 == 1) for number, name in enumerate(NAMES)])
def test_transformers_opens_an_export_whole_and_scores_it_the_same(tmp_path, monkeypatch, name, several):
    config = oracle.MODELS[name]
    path = oracle.write_model(tmp_path / "model", config)
    if several:
        monkeypatch.setattr(weights, "_SHARD_BYTES", 20_000)
    saved = str(tmp_path / "saved")
    weights.save(saved, load(path), read_architecture(path), model_path=path, tokenizer_path=path)
    shutil.rmtree(path)
    with torch.no_grad():
        found = oracle.torch_logps(oracle.torch_model(saved), config)  # refuses missing and unexpected tensors
    for one, other in zip(found, oracle.read(name)["logps"], strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_transformers_writes_in_shards_is_read_bit_for_bit(tmp_path, dtype, tied):
    name = "llama31" if tied else "llama2"
    model = oracle.torch_model(oracle.write_model(tmp_path / "drawn", oracle.MODELS[name]), dtype)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    path = str(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    saved = str(tmp_path / "saved")
    weights.save(saved, load(path), read_architecture(path), model_path=path, tokenizer_path=path)
    again = oracle.torch_model(saved, dtype)
    for (key, value), (other, found) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert key == other
        assert torch.equal(value, found), key
    stored = (tmp_path / "saved" / "model.safetensors").read_bytes()[:4000]
    assert {"float32": b'"F32"', "float16": b'"F16"', "bfloat16": b'"BF16"'}[dtype] in stored


def test_transformers_reads_a_tied_head_that_differs_as_we_refuse_it(tmp_path):
    """It unties the two, so loading the embedding alone would be another model."""
    drawn = oracle.tensors(oracle.MODELS["llama31"])
    drawn["lm_head.weight"] = drawn["model.embed_tokens.weight"] + np.float32(1)
    path = oracle.write_model(tmp_path, oracle.MODELS["llama31"], drawn)
    model = oracle.torch_model(path, "float32")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", NAMES)
def test_fresh_parameters_load_in_transformers(tmp_path, name):
    path = oracle.write_model(tmp_path / "model", oracle.MODELS[name])
    (tmp_path / "model" / "model.safetensors").unlink()
    architecture = read_architecture(path)
    model = decoder.Decoder(architecture, attend=lambda q, k, v, seen: q)
    params = decoder.init_params(model, jax.random.key(0))
    weights.save(str(tmp_path / "saved"), params, architecture, model_path=path, tokenizer_path=path)
    loaded = oracle.torch_model(str(tmp_path / "saved"), "float32")
    embedding = loaded.get_input_embeddings().weight
    np.testing.assert_array_equal(embedding.detach().numpy(), params["embed_tokens"])
    assert (loaded.get_output_embeddings().weight is embedding) == architecture.tie_word_embeddings
