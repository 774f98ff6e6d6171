"""Model directories: what goes in comes out bit for bit, and what is wrong with one is said in one line."""

import json
import pathlib
import shutil
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from daajax import sharding
from daajax.errors import UserError
from daajax.models import decoder, tensor_files, weights
from daajax.models.digest import digest_of
from daajax.models.families import read_architecture
from tests.oracle import make_values as oracle

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
UNTIED, TIED = oracle.MODELS["llama2"], oracle.MODELS["llama31"]
SHARD = "model-00001-of-00003.safetensors"


def mesh_of(**sizes):
    return sharding.make_mesh(dict(data=1, fsdp=1, tensor=1) | sizes)


def load(path, mesh=None, dtype=jnp.float32):
    mesh = mesh or mesh_of(fsdp=8)
    model = decoder.Decoder(read_architecture(path), attend=lambda q, k, v, seen: q, param_dtype=dtype)
    shapes, axes = decoder.abstract_params(model)
    return weights.load(path, model.architecture, shapes, sharding.param_shardings(mesh, shapes, axes))


def save(path, params, model_path):
    weights.save(
        str(path), params, read_architecture(model_path), model_path=model_path, tokenizer_path=str(model_path)
    )
    return str(path)


def tensors_of(path):
    """Every tensor in a directory's safetensors, as bytes with dtype and shape."""
    found = {}
    for file in sorted(pathlib.Path(path).glob("*.safetensors")):
        with safetensors.safe_open(str(file), framework="numpy") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in found.items()}


def write_shards(folder, config, shards):
    """Writes a directory of several files, each a dict of tensors, with an index."""
    oracle.write_model(folder, config, {})
    (folder / SINGLE).unlink()
    weight_map = {}
    for place, shard in enumerate(shards):
        file = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return str(folder)


def sharded(folder, config=UNTIED):
    """The oracle's model in three files."""
    everything = list(oracle.tensors(config).items())
    return write_shards(folder, config, [dict(everything[part::3]) for part in range(3)])


def edit_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refused(path, *words):
    """Loading fails with one line that holds all the words."""
    with pytest.raises(UserError) as error:
        load(str(path))
    assert "\n" not in str(error.value)
    for word in (str(path), *words):
        assert word in str(error.value), str(error.value)


# ---------------------------------------------------------------------- in and out again


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("several", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_keeps_every_bit_and_dtype(tmp_path, monkeypatch, dtype, several, config):
    drawn = {name: value.astype(DTYPES[dtype]) for name, value in oracle.tensors(config).items()}
    path = oracle.write_model(tmp_path / "model", config, drawn)
    if several:
        monkeypatch.setattr(weights, "_SHARD_BYTES", 10_000)
    saved = save(tmp_path / "saved", load(path), path)
    assert tensors_of(saved) == tensors_of(path)
    assert (pathlib.Path(saved) / SINGLE).exists() is not several
    assert (pathlib.Path(saved) / INDEX).exists() is several
    again = save(tmp_path / "again", load(saved), saved)  # sharded is read as well as written
    assert tensors_of(again) == tensors_of(path)


@pytest.mark.parametrize("name", sorted(oracle.MODELS))
def test_a_round_trip_keeps_every_bit_of_every_family(tmp_path, name):
    path = oracle.write_model(tmp_path / "model", oracle.MODELS[name])
    assert tensors_of(save(tmp_path / "saved", load(path), path)) == tensors_of(path)


def test_a_prefix_that_all_names_leave_out_is_put_in_front(tmp_path):
    config = oracle.MODELS["gpt2"]
    drawn = oracle.tensors(config)
    short = {name.removeprefix("transformer."): value for name, value in drawn.items()}
    short |= {f"h.{layer}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for layer in range(2)}  # as on the Hub
    path = oracle.write_model(tmp_path / "model", config, short | {"lm_head.weight": short["wte.weight"]})
    whole = oracle.write_model(tmp_path / "whole", config, drawn)
    assert tensors_of(save(tmp_path / "saved", load(path), path)) == tensors_of(whole)
    wrong = oracle.write_model(tmp_path / "wrong", config, short | {"lm_head.weight": short["wte.weight"] + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        load(wrong)


def test_a_config_that_names_code_is_written_without_it(tmp_path, capsys):
    path = oracle.write_model(tmp_path / "model", UNTIED | {"auto_map": {"AutoConfig": "configuration.Config"}})
    saved = save(tmp_path / "saved", load(path), path)
    found = json.loads((pathlib.Path(saved) / "config.json").read_text())
    assert found == {
        key: value
        for key, value in json.loads((tmp_path / "model" / "config.json").read_text()).items()
        if key != "auto_map"
    }
    assert "auto_map is left out" in capsys.readouterr().out


def test_a_directory_of_mixed_dtypes_keeps_each(tmp_path):
    drawn = oracle.tensors(UNTIED)
    drawn = {name: value.astype(ml_dtypes.bfloat16 if value.ndim > 1 else np.float32) for name, value in drawn.items()}
    path = oracle.write_model(tmp_path / "model", UNTIED, drawn)
    assert tensors_of(save(tmp_path / "saved", load(path), path)) == tensors_of(path)


def test_bfloat16_parameters_of_a_bfloat16_directory_keep_every_bit(tmp_path):
    drawn = {name: value.astype(ml_dtypes.bfloat16) for name, value in oracle.tensors(TIED).items()}
    path = oracle.write_model(tmp_path / "model", TIED, drawn)
    params = load(path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert tensors_of(save(tmp_path / "saved", params, path)) == tensors_of(path)


def test_without_weights_at_the_source_the_export_has_the_dtype_of_the_parameters(tmp_path):
    path = oracle.write_model(tmp_path / "model", UNTIED)
    params = load(path)
    (tmp_path / "model" / SINGLE).unlink()
    saved = save(tmp_path / "saved", params, path)
    assert {dtype for dtype, _, _ in tensors_of(saved).values()} == {np.dtype(np.float32)}


def test_the_index_of_an_export_counts_bytes_and_names_every_file(tmp_path, monkeypatch):
    path = oracle.write_model(tmp_path / "model", UNTIED)
    monkeypatch.setattr(weights, "_SHARD_BYTES", 40_000)
    saved = pathlib.Path(save(tmp_path / "saved", load(path), path))
    index = json.loads((saved / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in oracle.tensors(UNTIED).values())
    files = sorted(file.name for file in saved.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(file.stat().st_size for file in saved.glob("*.safetensors")) < 42_000  # with the header


def test_companions_and_tokenizer_are_copied_byte_for_byte_and_nothing_else(tmp_path):
    path = oracle.write_model(tmp_path / "model", TIED)
    model = {"generation_config.json": b'{"a":\r\n1}', "LICENSE.txt": b"\xe9", "NOTICE": b"x", "README.md": b"no"}
    model |= {"tokenizer.json": b"the model's", "pytorch_model.bin": b"no", "modeling.py": b"no"}
    files_of_tokenizer = [pattern.replace("*", "tools") for pattern in weights.TOKENIZER_FILES]
    tokenizer = dict.fromkeys(files_of_tokenizer, b"\x00\xff another's\r\n") | {"config.json": b"not this"}
    for folder, files in (("model", model), ("tokenizer", tokenizer)):
        for name, content in files.items():
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(content)
    config = json.dumps(TIED).encode()
    (tmp_path / "model" / "config.json").write_bytes(config)
    weights.save(
        str(tmp_path / "saved"),
        load(path),
        read_architecture(path),
        model_path=path,
        tokenizer_path=str(tmp_path / "tokenizer"),
    )
    saved = tmp_path / "saved"
    files = [file for file in saved.rglob("*") if file.is_file() and file.name != SINGLE]
    found = {str(file.relative_to(saved)): file.read_bytes() for file in files}
    wanted = {name: model[name] for name in ("generation_config.json", "LICENSE.txt", "NOTICE")}
    assert found == wanted | dict.fromkeys(files_of_tokenizer, b"\x00\xff another's\r\n") | {"config.json": config}


def test_an_export_that_fails_leaves_no_directory_and_the_next_one_cleans_up(tmp_path, monkeypatch):
    path = oracle.write_model(tmp_path / "model", TIED)
    params = load(path)

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(UserError, match="disk full"):
            save(tmp_path / "saved", params, path)
    assert not (tmp_path / "saved").exists()
    (tmp_path / "saved.partial" / "left.over").touch()
    save(tmp_path / "saved", params, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "saved"]
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["config.json", SINGLE]


def test_an_export_that_fails_keeps_the_directory_it_would_replace(tmp_path, monkeypatch):
    path = oracle.write_model(tmp_path / "model", TIED)
    params = load(path)
    before = tensors_of(save(tmp_path / "saved", params, path))

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(UserError, match="disk full"):
        save(tmp_path / "saved", jax.tree.map(jnp.zeros_like, params), path)
    assert tensors_of(tmp_path / "saved") == before


def test_an_export_replaces_what_was_there(tmp_path, monkeypatch):
    path = oracle.write_model(tmp_path / "model", TIED)
    params = load(path)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_SHARD_BYTES", 10_000)
        save(tmp_path / "saved", params, path)
    save(tmp_path / "saved", params, path)
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["config.json", SINGLE]


def test_a_model_may_be_exported_over_the_directory_it_came_from(tmp_path):
    path = oracle.write_model(tmp_path / "model", TIED)
    before = tensors_of(path)
    save(path, load(path), path)
    assert tensors_of(path) == before
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == TIED


# ---------------------------------------------------------------------- onto a mesh


@pytest.mark.parametrize("sizes", [dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["single", "sharded"])
def test_each_device_reads_only_its_part_and_together_they_are_the_whole(tmp_path, monkeypatch, several, sizes):
    config = oracle.MODELS["llama31"]
    path = sharded(tmp_path, config) if several else oracle.write_model(tmp_path, config)
    reads: dict[str, list[int]] = {}
    original = tensor_files.Directory.slice

    class Spy:
        def __init__(self, name, tensor):
            self.name, self.tensor = name, tensor
            self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype

        def __getitem__(self, index):
            part = self.tensor[index]
            reads.setdefault(self.name, []).append(part.size)
            return part

    monkeypatch.setattr(tensor_files.Directory, "slice", lambda self, name: Spy(name, original(self, name)))
    mesh = mesh_of(**sizes)
    params = load(path, mesh)
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for name, values in oracle.tensors(config).items():
        cut = parts if values.ndim == 2 else 1  # matrices are cut, scales of norms are on every device
        assert max(reads[name]) == values.size // cut, name
        assert sum(reads[name]) == values.size, f"{name} was read {sum(reads[name]) / values.size} times"
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(leaf)[shard.index])
    monkeypatch.undo()
    assert tensors_of(save(tmp_path / "saved", params, path)) == tensors_of(path)


# ---------------------------------------------------------------------- digest


def test_the_digest_is_the_same_on_every_mesh_and_from_any_files(tmp_path):
    single, several = oracle.write_model(tmp_path / "single", UNTIED), sharded(tmp_path / "several")
    digests = {
        digest_of(load(path, mesh_of(**sizes)))
        for path in (single, several)
        for sizes in (dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_digest_changes_with_every_bit_and_place_and_name(dtype):
    bits = np.uint32 if dtype == jnp.float32 else np.uint16
    values = np.asarray(oracle.uniform(24, 5).reshape(2, 3, 4) - 0.5).astype(dtype)
    tree = {"layers": {"a": values}, "b": values[0]}
    digests = {digest_of(jax.tree.map(jnp.asarray, tree))}
    expected = 1

    def differs(other, what):
        nonlocal expected
        digests.add(digest_of(jax.tree.map(jnp.asarray, other)))
        expected += 1
        assert len(digests) == expected, what

    for place in range(0, 24, 5):
        for bit in range(8 * np.dtype(bits).itemsize):
            flipped = values.copy()
            flipped.reshape(-1).view(bits)[place] ^= bits(1 << bit)
            differs({"layers": {"a": flipped}, "b": values[0]}, (place, bit))
    for one, other in ((0, 1), (0, 23), (3, 4), (11, 12)):
        swapped = values.copy()
        swapped.reshape(-1)[[one, other]] = swapped.reshape(-1)[[other, one]]
        differs({"layers": {"a": swapped}, "b": values[0]}, (one, other))
    differs({"layers": {"b": values}, "a": values[0]}, "names swapped")
    differs({"layers": {"a": values}, "c": values[0]}, "renamed")
    differs({"a": values, "b": values[0]}, "moved up")
    differs({"layers": {"a": values.reshape(4, 3, 2)}, "b": values[0]}, "reshaped")
    differs({"layers": {"a": values.transpose(0, 2, 1)}, "b": values[0]}, "transposed")
    differs({"layers": {"a": values[::-1]}, "b": values[0]}, "layers swapped")
    differs({"layers": {"a": values}}, "missing")
    if dtype == jnp.float32:
        differs({"layers": {"a": values.astype(jnp.bfloat16)}, "b": values[0]}, "rounded")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_digest_is_of_values_in_whatever_dtype_they_are(dtype):
    values = jnp.asarray(oracle.uniform(24, 5).reshape(4, 6) - 0.5, dtype)
    assert digest_of({"a": values}) == digest_of({"a": values.astype(jnp.float32)})


def test_the_digest_tells_codes_of_one_byte_apart():
    assert len({digest_of({"a": jnp.asarray(codes, jnp.uint8)}) for codes in ([0, 255], [255, 0], [0, 127])}) == 3


def test_the_digest_tells_zero_from_minus_zero_and_zeros_by_their_number():
    digests = [digest_of({"a": jnp.array(values, jnp.float32)}) for values in ([0, 0], [-0.0, 0], [0, -0.0], [0, 0, 0])]
    assert len(set(digests)) == 4


# ---------------------------------------------------------------------- what directories may hold besides


def test_a_head_stored_beside_its_tied_embedding_is_left_out(tmp_path):
    drawn = oracle.tensors(TIED)
    path = oracle.write_model(tmp_path / "a", TIED, drawn)
    twice = oracle.write_model(tmp_path / "b", TIED, drawn | {"lm_head.weight": drawn["model.embed_tokens.weight"]})
    assert digest_of(load(twice)) == digest_of(load(path))
    assert tensors_of(save(tmp_path / "saved", load(twice), twice)) == tensors_of(path)


@pytest.mark.parametrize("rows", [slice(95, 96), slice(None)])
def test_a_head_that_differs_from_its_tied_embedding_is_refused(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(tensor_files, "_ROWS", 10)
    drawn = oracle.tensors(TIED)
    head = drawn["model.embed_tokens.weight"].copy()
    head[rows] += 1
    oracle.write_model(tmp_path, TIED, drawn | {"lm_head.weight": head})
    refused(tmp_path, "lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings")


def test_a_head_of_another_shape_than_its_tied_embedding_is_refused(tmp_path):
    drawn = oracle.tensors(TIED)
    oracle.write_model(tmp_path, TIED, drawn | {"lm_head.weight": drawn["model.embed_tokens.weight"][1:]})
    refused(tmp_path, "lm_head.weight differs from model.embed_tokens.weight")


def test_rotary_frequencies_of_old_exports_are_left_out(tmp_path):
    drawn = oracle.tensors(UNTIED)
    path = oracle.write_model(tmp_path / "a", UNTIED, drawn)
    old = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for n in range(2)}
    old = oracle.write_model(tmp_path / "b", UNTIED, drawn | old)
    assert digest_of(load(old)) == digest_of(load(path))
    assert tensors_of(save(tmp_path / "saved", load(old), old)) == tensors_of(path)


# ---------------------------------------------------------------------- what is refused

Q = "model.layers.1.self_attn.q_proj.weight"


def test_missing_tensors_are_named(tmp_path):
    drawn = oracle.tensors(UNTIED)
    oracle.write_model(tmp_path, UNTIED, {name: value for name, value in drawn.items() if name != Q})
    refused(tmp_path, f"lacks tensors for its config.json: {Q};")


def test_of_many_missing_tensors_three_are_named_and_the_others_counted(tmp_path):
    oracle.write_model(tmp_path, UNTIED, {"lm_head.weight": oracle.tensors(UNTIED)["lm_head.weight"]})
    refused(tmp_path, "lacks tensors", "model.embed_tokens.weight", "and 17 more")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "x"])
def test_extra_tensors_are_named(tmp_path, name):
    oracle.write_model(tmp_path, UNTIED, oracle.tensors(UNTIED) | {name: np.zeros(32, np.float32)})
    refused(tmp_path, f"has unexpected tensors for its config.json: {name};")


@pytest.mark.parametrize(
    ("name", "shape"),
    [(Q, (32, 31)), (Q, (1024,)), ("model.norm.weight", (33,)), ("model.embed_tokens.weight", (95, 32))],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path, name, shape):
    drawn = oracle.tensors(UNTIED)
    oracle.write_model(tmp_path, UNTIED, drawn | {name: np.zeros(shape, np.float32)})
    refused(tmp_path, name, f"has shape {shape}", f"asks for {drawn[name].shape}")


@pytest.mark.parametrize(("dtype", "word"), [(np.int32, "I32"), (np.uint8, "U8"), (np.bool_, "BOOL")])
def test_a_tensor_that_is_not_of_floats_is_refused(tmp_path, dtype, word):
    drawn = oracle.tensors(UNTIED)
    oracle.write_model(tmp_path, UNTIED, drawn | {Q: drawn[Q].astype(dtype)})
    refused(tmp_path, f"tensor {Q} is {word}", "F32")


def test_float8_is_refused(tmp_path):
    oracle.write_model(tmp_path, UNTIED)
    rewrite_header(tmp_path / SINGLE, lambda header: header[Q].update(dtype="F8_E4M3", shape=[128, 32]))
    refused(tmp_path, Q)


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / SHARD).unlink()
    refused(tmp_path, SHARD, "is missing", "fetch it again")


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/b.safetensors",
        "x.bin",
        "pytorch_model.bin",
        "",
        "..",
        ".safetensors/..",
    ],
)
def test_an_index_that_names_anything_but_a_safetensors_file_beside_it_is_refused(tmp_path, file):
    sharded(tmp_path / "model")
    shutil.copy(tmp_path / "model" / SHARD, tmp_path / "x.safetensors")
    edit_index(tmp_path / "model", lambda names: names.update({Q: file}))
    refused(tmp_path / "model", INDEX, repr(file), "only .safetensors files beside it")


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    sharded(tmp_path)
    other = "model-00002-of-00003.safetensors"
    held = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    name = next(name for name, file in held.items() if file == SHARD)
    edit_index(tmp_path, lambda names: names.update({name: other}))
    refused(tmp_path, SHARD, INDEX, name, "disagree")
    edit_index(tmp_path, lambda names: names.update({name: SHARD, "new": other}))
    refused(tmp_path, other, INDEX, "'new'")


def test_a_tensor_that_the_index_leaves_out_is_not_overlooked(tmp_path):
    drawn = list(oracle.tensors(UNTIED).items())
    bias = ("model.layers.1.self_attn.q_proj.bias", np.ones(32, np.float32))
    write_shards(tmp_path, UNTIED, [dict(drawn[:9]), dict([*drawn[9:], bias])])
    edit_index(tmp_path, lambda names: names.pop(bias[0]))
    refused(tmp_path, bias[0], "disagree")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"weight_map": null}',
        '{"weight_map": []}',
        '{"weight_map": "model.safetensors"}',
        '{"weight_map": {"a": "model-00001-of-00003.safetensors", "a": "model-00002-of-00003.safetensors"}}',
        '{"weight_map": {}, "weight_map": {}}',
        "\ufeff{}",
    ],
)
def test_a_broken_index_is_refused(tmp_path, text):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text, encoding="utf-8")
    refused(tmp_path, INDEX, "is not an index of safetensors")


def test_an_index_that_is_not_utf8_is_refused(tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(b'{"weight_map": {"\xff": "a.safetensors"}}')
    refused(tmp_path, INDEX, "is not an index of safetensors")


def test_an_empty_index_lacks_everything(tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    refused(tmp_path, "lacks tensors", "and 18 more")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "flax_model.msgpack"])
def test_weights_of_other_formats_are_named_and_never_opened(tmp_path, name):
    oracle.write_model(tmp_path, UNTIED)
    (tmp_path / SINGLE).rename(tmp_path / name)
    (tmp_path / name).chmod(0)
    refused(tmp_path, f"found {name}", "not opened", "save_pretrained")


def test_a_directory_without_weights_says_so(tmp_path):
    oracle.write_model(tmp_path, UNTIED)
    (tmp_path / SINGLE).unlink()
    refused(tmp_path, "found none", "model.random_init=True")


@pytest.mark.parametrize("several", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("keep", [0, 4, 8, 200, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path, several, keep):
    file = tmp_path / (SHARD if several else SINGLE)
    if several:
        sharded(tmp_path)
    else:
        oracle.write_model(tmp_path, UNTIED)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(tmp_path, file.name, "is not a readable safetensors file", "fetch it again")


def rewrite_header(file, edit):
    """Changes the JSON header of a safetensors file and leaves the data alone."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    new = edit(header)
    text = new if isinstance(new, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def offsets(begin, end):
    return lambda header: header[Q].update(data_offsets=[begin, end])


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: b"",
        lambda header: b"{}",
        lambda header: b"[]",
        lambda header: b"not JSON",
        lambda header: b"\xff\xfe" * 40,
        lambda header: b"{" * 5000,
        lambda header: json.dumps(header).encode().replace(b"\\n", b"") + b"\n{}",
        lambda header: b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' + json.dumps(header).encode()[1:],
        offsets(0, 2**63),
        offsets(2**64 - 8, 8),
        offsets(-4, 0),
        offsets(8, 4),
        offsets(0, 4096),
        lambda header: header[Q].update(shape=[2**32, 2**32]),
        lambda header: header[Q].update(shape=[-32, -32]),
        lambda header: header[Q].update(shape=[32, 32, 0]),
        lambda header: header[Q].update(shape=["32", 32]),
        lambda header: header[Q].update(dtype="O"),
        lambda header: header[Q].pop("dtype"),
        lambda header: header.pop(Q),
    ],
    ids=range(20),
)
def test_a_hostile_header_is_refused(tmp_path, edit):
    oracle.write_model(tmp_path, UNTIED)
    rewrite_header(tmp_path / SINGLE, edit)
    refused(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**62, 2**64 - 1])
def test_a_header_that_lies_about_its_size_is_refused(tmp_path, size):
    oracle.write_model(tmp_path, UNTIED)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", size) + content[8:])
    refused(tmp_path, "is not a readable safetensors file")


def test_a_directory_in_place_of_a_file_is_refused(tmp_path):
    oracle.write_model(tmp_path, UNTIED)
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).mkdir()
    refused(tmp_path, "found none")


def test_a_tensor_that_its_dtype_cannot_hold_keeps_its_own_and_says_so(tmp_path, capsys):
    halves = {name: tensor.astype(np.float16) for name, tensor in oracle.tensors(TIED).items()}
    path = oracle.write_model(tmp_path / "model", TIED, halves)
    params = load(path)
    params["norm"] = params["norm"] + 1e6
    save(tmp_path / "saved", params, path)
    assert "tensor model.norm.weight is stored in float32: it has values beyond float16" in capsys.readouterr().out
    stored = safetensors.numpy.load_file(tmp_path / "saved" / SINGLE)
    assert stored["model.norm.weight"].dtype == np.float32
    assert np.isfinite(stored["model.norm.weight"]).all()
    assert stored["model.embed_tokens.weight"].dtype == np.float16


def test_an_older_model_is_replaced_whole(tmp_path):
    path = oracle.write_model(tmp_path / "model", TIED)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "stale").touch()
    save(tmp_path / "saved", load(path), path)
    assert not (tmp_path / "saved" / "stale").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "saved"]
    assert (tmp_path / "saved" / SINGLE).stat().st_mode & 0o777 == 0o644
