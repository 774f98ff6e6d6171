"""The scoring function against a decoder written a second time: one sequence at a time, float64, full softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import sharding
from daajax.data import parts
from daajax.data.batches import Batches
from daajax.models import decoder
from daajax.models.architecture import Architecture, Norm
from daajax.scoring import Scorer, response_sums
from tests.data.test_batches import planned, random_examples, tokenized_data

ARCHITECTURE = Architecture(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    initializer_range=0.02,
    norm=Norm(1e-5),
)
BATCH_SIZE = 16


@functools.cache
def mesh_of(data=8, fsdp=1, tensor=1, context=1):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor, "context": context})


@functools.cache
def scorer_of(data=8, fsdp=1, tensor=1, context=1, *, attention="blockwise", remat="none", dtype="float32"):
    return Scorer.make(
        ARCHITECTURE,
        mesh_of(data, fsdp, tensor, context),
        attention=attention,
        remat=remat,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.float32,
    )


@functools.cache
def host_params():
    """Random parameters; norms' scales are drawn as well, or a gradient that forgets them would pass."""
    shapes, _ = decoder.abstract_params(scorer_of().model)
    rng = np.random.default_rng(0)

    def drawn(path, x):
        norm = "norm" in jax.tree_util.keystr(path)
        return (rng.uniform(0.5, 1.5, x.shape) if norm else 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree.map_with_path(drawn, shapes)


@functools.cache
def placed_params(*sizes):
    mesh = mesh_of(*sizes)
    shapes, axes = decoder.abstract_params(scorer_of(*sizes).model)
    return jax.device_put(host_params(), sharding.param_shardings(mesh, shapes, axes))


@functools.cache
def examples_of(responses=2):
    return random_examples(BATCH_SIZE, responses=responses, seed=7, ragged=responses > 2)


def sequences(examples):
    """Every response behind its prompt, padded at the end, and which tokens are scored; [48, 21] for every K."""
    rows = [
        (example.prompt + response, [False] * len(example.prompt) + scored)
        for example in examples
        for response, scored in zip(example.responses, example.scored, strict=True)
    ]
    tokens, scored = np.zeros((3 * BATCH_SIZE, 21), np.int32), np.zeros((3 * BATCH_SIZE, 21), bool)
    for index, (mine, mask) in enumerate(rows):
        tokens[index, : len(mine)], scored[index, : len(mine)] = mine, mask
    return tokens, scored


def distributions(params, tokens):
    """Probabilities of the token behind every one but the last, naively. The architecture restated, no line shared."""
    a = ARCHITECTURE

    def norm(x, scale):
        return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + a.norm.eps) * scale[None]

    def turn(x):
        # Complex numbers: features i and i + head_dim / 2 are real and imaginary part, turned by position · θ^(-2i/d).
        half = a.head_dim // 2
        speed = a.kinds[0].rope.rope_theta ** (-2 * np.arange(half) / a.head_dim)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(len(x))[:, None] * speed)[:, None]
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    def sequence(tokens):
        length = len(tokens)
        later = np.triu(np.ones((length, length), bool), 1)
        x = params["embed_tokens"][tokens]
        for layer in range(a.num_hidden_layers):
            p = {name: value[layer] for name, value in params["layers"].items()}
            h = norm(x, p["pre_attention_norm"])
            q, k, v = (jnp.reshape(h @ p[f"{n}_proj"], (length, -1, a.head_dim)) for n in "qkv")
            q, k = turn(q), turn(k)
            heads = []
            for head in range(a.num_attention_heads):
                group = head // (a.num_attention_heads // a.num_key_value_heads)
                scores = q[:, head] @ k[:, group].T / np.sqrt(a.head_dim)
                heads.append(jax.nn.softmax(jnp.where(later, -jnp.inf, scores), axis=-1) @ v[:, group])
            x = x + jnp.concatenate(heads, axis=-1) @ p["o_proj"]
            h = norm(x, p["pre_mlp_norm"])
            gate = h @ p["gate_proj"]
            x = x + (gate / (1 + jnp.exp(-gate)) * (h @ p["up_proj"])) @ p["down_proj"]
        logits = norm(x, params["norm"]) @ params["lm_head"].T
        return jax.nn.softmax(logits[:-1], axis=-1)

    return jax.vmap(sequence)(tokens)


def one_by_one(params, tokens):
    """Log-prob of every token but the first, naively: log of a softmax."""
    of_tokens = jnp.take_along_axis(distributions(params, tokens), tokens[:, 1:, None], axis=2)
    return jnp.log(of_tokens[:, :, 0])


def double(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


one_by_one_jitted = jax.jit(one_by_one)


@functools.cache
def expected_token_logps(responses=2):
    """By index into the data's flat tokens; NaN where a token is not scored."""
    examples = examples_of(responses)
    data = tokenized_data(examples)
    tokens, scored = sequences(examples)
    with jax.enable_x64(True):
        logps = np.asarray(one_by_one_jitted(double(host_params()), tokens))
    flat = np.full(len(data.tokens), np.nan)
    for index, example in enumerate(examples):
        cursor = data.starts[index] + len(example.prompt)
        for k, response in enumerate(example.responses):
            row, first = index * len(example.responses) + k, len(example.prompt)
            for token in range(len(response)):
                if scored[row, first + token]:
                    flat[cursor + token] = logps[row, first + token - 1]
            cursor += len(response)
    return flat


@functools.partial(jax.jit, static_argnames=("scorer", "keys"))
def token_logps(scorer, params, batch, *, keys):
    return scorer.token_logps(params, batch, keys=keys)


def scored_by(scorer, mesh_sizes=(8, 1, 1), responses=2, **options):
    """Token log-probs of all examples by index into the data's flat tokens, NaN where nothing was scored."""
    data = tokenized_data(examples_of(responses))
    mesh = mesh_of(*mesh_sizes)
    cuts = dict(row_multiple=sharding.row_multiple(mesh), parts=sharding.length_parts(mesh))
    plan = planned(data, batch_size=BATCH_SIZE, updates=1, **cuts, **options)
    batches = Batches(data, plan)
    flat = np.full(len(data.tokens), np.nan)
    for part in range(plan.micro_batches):
        batch = {name: value[part] for name, value in batches[0].items()}
        values = token_logps(
            scorer, placed_params(*mesh_sizes), sharding.place(mesh, batch, ("rows",)), keys=plan.shape(0).keys
        )
        values, indices = np.asarray(values), batches.token_indices(0)[part]
        assert values.dtype == np.float32
        assert not values[indices < 0].any()
        flat[indices[indices >= 0]] = values[indices >= 0]
    return flat


@pytest.mark.parametrize(
    ("sizes", "scorer", "options"),
    [
        ((8, 1, 1), {}, {}),
        ((8, 1, 1), {}, {"prefix_sharing": False}),
        ((8, 1, 1), {}, {"packing": False, "row_length": 256}),
        ((8, 1, 1), {"attention": "dense"}, {"micro_batches": 2}),
        ((2, 2, 2), {}, {}),
        ((1, 2, 1, 4), {}, {}),
        ((2, 1, 2, 2), {}, {"prefix_sharing": False, "rows": 4}),
        ((1, 2, 1, 4), {"attention": "dense"}, {"packing": False, "micro_batches": 2}),
    ],
    ids=str,
)
def test_rows_score_what_sequences_score_one_by_one(sizes, scorer, options):
    found = scored_by(scorer_of(*sizes, **scorer), sizes, **options)
    # Float32 through two layers; log-probs down to -10 nats.
    np.testing.assert_allclose(found, expected_token_logps(), rtol=2e-5, atol=2e-5)


def test_rows_that_are_dealt_in_many_chunks_score_alike(monkeypatch):
    monkeypatch.setattr(parts, "LEAST_CHUNK", 8)
    assert parts._chunks(128) == 16
    sizes = (2, 1, 1, 4)  # of no other test here, whose program would serve
    np.testing.assert_allclose(scored_by(scorer_of(*sizes), sizes), expected_token_logps(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("responses", [1, 3])
def test_rows_of_single_responses_and_of_lists_score_alike(responses):
    found = scored_by(scorer_of(), responses=responses)
    np.testing.assert_allclose(found, expected_token_logps(responses), rtol=2e-5, atol=2e-5)


def test_bfloat16_scores_within_its_rounding():
    found, wanted = scored_by(scorer_of(dtype="bfloat16")), expected_token_logps()
    real = ~np.isnan(wanted)
    # 8 bits on logits of up to 10 nats.
    assert np.abs(found - wanted)[real].max() < 0.3
    assert np.abs(found - wanted)[real].mean() < 0.04


def test_two_scorings_are_the_same_to_the_bit():
    np.testing.assert_array_equal(scored_by(scorer_of()), scored_by(scorer_of()))


@pytest.mark.parametrize("contiguous", [True, False])
def test_response_sums_add_up_the_tokens_of_each_response(contiguous):
    rng = np.random.default_rng(0)
    rows, scored, slots, responses = 3, 20, 2, 3
    owners = rng.integers(-1, slots * responses, (rows, scored)).astype(np.int32)
    owners = np.sort(owners, axis=1) if contiguous else owners
    values = rng.normal(size=(rows, scored)).astype(np.float32)
    expected = np.zeros((rows, slots, responses))
    for row, slot in np.ndindex(owners.shape):
        if owners[row, slot] >= 0:
            expected[row, owners[row, slot] // responses, owners[row, slot] % responses] += values[row, slot]
    found = response_sums(jnp.asarray(values), jnp.asarray(owners), slots=slots, responses=responses)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_response_sums_ignore_what_empty_slots_hold():
    owners = jnp.array([[0, 1, -1, -1]], jnp.int32)
    values = jnp.array([[1.0, 2.0, jnp.nan, jnp.inf]])
    np.testing.assert_array_equal(response_sums(values, owners, slots=1, responses=2), [[[1, 2]]])
    gradient = jax.grad(lambda v: response_sums(v, owners, slots=1, responses=2).sum())(values)
    np.testing.assert_array_equal(gradient, [[1, 1, 0, 0]])


def test_the_projection_sees_only_states_that_predict_a_scored_token(monkeypatch):
    from daajax import scoring

    data = tokenized_data(examples_of())
    plan = planned(data, batch_size=BATCH_SIZE, updates=1, row_multiple=8)
    part = {name: value[0] for name, value in Batches(data, plan)[0].items()}
    seen, original = [], scoring.token_statistics
    monkeypatch.setattr(scoring, "token_statistics", lambda *given: (seen.append(given), original(*given))[1])
    score = jax.jit(lambda params, part: scorer_of().token_logps(params, part, keys=plan.shape(0).keys))
    score(placed_params(), sharding.place(mesh_of(), part, ("rows",)))
    ((_, hidden, *_),) = seen
    rows, length = part["tokens"].shape
    assert hidden.shape == (rows, plan.shape(0).scored, ARCHITECTURE.hidden_size)
    assert plan.shape(0).scored < length
