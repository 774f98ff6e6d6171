"""Sampling against the scoring function, and what a response may depend on."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daajax import policy, sharding
from daajax.data.batches import Batches
from daajax.data.tokenizer import load_tokenizer
from daajax.errors import UserError
from daajax.generator import Generator
from daajax.models.architecture import for_length
from daajax.models.families import read_architecture
from daajax.scoring import Scorer
from tests import worlds
from tests.data.test_batches import Raw, planned, tokenized_data
from tests.oracle import make_values as oracle

ONE = (1, 1, 1)  # devices on data, fsdp, tensor
MESHES = [(2, 2, 2), (1, 8, 1), (4, 1, 2)]
MAX_TOKENS = 24
# Unequal lengths, on both sides of the widths that prompts are padded to.
PROMPTS = [[1, *range(3, 3 + length)] for length in (0, 5, 1, 40, 31, 12, 2, 64, 7, 3, 20)]
STOPS = [20, 30, 40, 50, 60, 70]  # some responses find one
# The story that its author's program tells at temperature 0: karpathy/llama2.c, stories260K, first 175 tokens or so.
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" "
    "Lily was sad and didn't know what to do. She said, \"I want to play with your ball, but I can't find it.\"\nLily "
    "was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\nLily didn't want to "
    "help her mom, so she"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(worlds.make_model(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A Mistral whose window is shorter than prompts and responses."""
    changes = dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=10)
    return str(worlds.make_model(tmp_path_factory.mktemp("windowed"), **changes))


@pytest.fixture(scope="module", params=["gemma2", "gemma3", "mixtral", "phi3_long", "smollm3", "gpt2", "gpt_neox"])
def family(request, tmp_path_factory):
    """A family with something that a step of the loop may get wrong: kinds of layers, caps, experts, positions."""
    return oracle.write_model(tmp_path_factory.mktemp(request.param), oracle.MODELS[request.param])


@functools.cache
def loaded(path, sizes=ONE, dtype="float32"):
    """A directory's generator, its scorer, and its parameters on a mesh."""
    with worlds.visible(int(np.prod(sizes))):
        mesh = sharding.make_mesh(dict(zip(sharding.WHOLE_ROWS, sizes, strict=True)))
    scorer = Scorer.make(
        for_length(read_architecture(path), 100),
        mesh,
        attention="blockwise",
        remat="none",
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.float32,
    )
    return Generator(scorer, mesh), scorer, policy.load_params(path, scorer, mesh), mesh


def generate(path, prompts=PROMPTS, *, sizes=ONE, dtype="float32", seed=0, max_tokens=MAX_TOKENS, **options):
    generator, _, params, _ = loaded(path, sizes, dtype)
    return generator.generate(params, prompts, key=jax.random.key(seed), max_tokens=max_tokens, **options)


def scored(path, prompts, samples, sizes=ONE, dtype="float32"):
    """Log-probs of sampled responses by the scoring function, from rows that share prompts, in the shape of `logps`."""
    _, scorer, params, mesh = loaded(path, sizes, dtype)
    responses = [
        [tokens[:length].tolist() for tokens, length in zip(*group, strict=True)]
        for group in zip(samples.tokens, samples.lengths, strict=True)
    ]
    masks = [[[True] * len(response) for response in group] for group in responses]
    data = tokenized_data([Raw(*raw, 1.0) for raw in zip(prompts, responses, masks, strict=True)])
    plan = planned(data, batch_size=len(prompts), sweep=True, row_multiple=sharding.row_multiple(mesh))
    batches = Batches(data, plan)
    batch = {name: value[0] for name, value in batches[0].items()}
    score = jax.jit(scorer.token_logps, static_argnames="keys")
    values = np.asarray(score(params, sharding.place(mesh, batch, ("rows",)), keys=plan.shape(0).keys))
    indices = batches.token_indices(0)[0]
    flat = np.full(len(data.tokens), np.nan)
    flat[indices[indices >= 0]] = values[indices >= 0]
    found, cursor = np.zeros_like(samples.logps), 0
    for index, group in enumerate(responses):
        cursor += len(prompts[index])
        for sample, response in enumerate(group):
            found[index, sample, : len(response)] = flat[cursor : cursor + len(response)]
            cursor += len(response)
    return found


# ---------------------------------------------------------------------- log-probs are those of the scoring function


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(samples=2), marks=pytest.mark.slow),
        dict(samples=2, temperature=0.7, top_k=20, top_p=0.9, stop_ids=STOPS),
        pytest.param(dict(temperature=0.0), marks=pytest.mark.slow),
    ],
    ids=["plain", "filtered", "greedy"],
)
def test_log_probs_are_those_of_the_scoring_function(path, options):
    samples = generate(path, **options)
    np.testing.assert_allclose(samples.logps, scored(path, PROMPTS, samples), rtol=0, atol=1e-4)
    assert samples.logps.max() <= 0
    assert samples.logps.min() < -1


@pytest.mark.slow
def test_log_probs_through_a_window_are_those_of_the_scoring_function(path, windowed):
    samples = generate(windowed, samples=2)
    np.testing.assert_allclose(samples.logps, scored(windowed, PROMPTS, samples), rtol=0, atol=1e-4)
    assert np.abs(samples.logps - scored(path, PROMPTS, samples)).max() > 0.1  # the same weights without a window


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2)], ids=str)
def test_log_probs_of_every_family_are_those_of_the_scoring_function(family, sizes):
    samples = generate(family, sizes=sizes)
    np.testing.assert_allclose(samples.logps, scored(family, PROMPTS, samples, sizes), rtol=0, atol=2e-4)
    assert samples.logps.min() < -1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [ONE, (2, 2, 2)], ids=str)
def test_log_probs_of_a_real_model_are_those_of_the_scoring_function(assets, sizes):
    path = str(assets / "tiny_model")
    prompts = [[1], *(load_tokenizer(path)(text)["input_ids"] for text in ("Once upon a time", "One day, a big dog"))]
    samples = generate(path, prompts, sizes=sizes, max_tokens=200, samples=3, stop_ids=[1])
    assert samples.lengths.max() == 200
    np.testing.assert_allclose(samples.logps, scored(path, prompts, samples, sizes), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_log_probs_in_bfloat16_are_near_those_of_the_scoring_function(path):
    samples = generate(path, dtype="bfloat16")
    errors = samples.logps - scored(path, PROMPTS, samples, dtype="bfloat16")
    # Both round to 8 bits, in sums of another order; the same bounds as of bfloat16 against float32 in scoring.
    assert np.abs(errors).mean() < 0.04
    assert np.abs(errors).max() < 0.3


# ---------------------------------------------------------------------- what a response depends on


def same(one, other):
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_allclose(one.logps, other.logps, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def samples(path):
    return generate(path, samples=2, top_p=0.95, stop_ids=STOPS)


@pytest.mark.slow
def test_responses_do_not_depend_on_the_batch_size(path, samples):
    same(generate(path, samples=2, top_p=0.95, stop_ids=STOPS, batch_size=9), samples)  # turns of 8, the last of 6


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_responses_do_not_depend_on_the_mesh_and_log_probs_are_those_of_scoring_on_it(path, samples, sizes):
    found = generate(path, samples=2, top_p=0.95, stop_ids=STOPS, sizes=sizes)
    same(found, samples)
    np.testing.assert_allclose(found.logps, scored(path, PROMPTS, found, sizes), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_responses_do_not_depend_on_what_else_is_sampled(path, samples):
    few = generate(path, PROMPTS[:3], top_p=0.95, stop_ids=STOPS)
    np.testing.assert_array_equal(few.tokens, samples.tokens[:3, :1])
    more = generate(path, [*PROMPTS, [1] * 100], samples=3, top_p=0.95, stop_ids=STOPS)
    np.testing.assert_array_equal(more.tokens[:-1, :2], samples.tokens)


def test_turns_of_one_width_share_a_program(path):
    generator, _, params, _ = loaded(path)
    before = generator._generate._cache_size()
    prompts = [[1] * length for length in (3, 9, 2, 31, 5, 7)]
    generator.generate(params, prompts, key=jax.random.key(0), max_tokens=3, samples=2, batch_size=5)
    assert generator._generate._cache_size() == before + 1


@pytest.mark.slow
def test_a_shorter_limit_cuts_responses_and_stop_ids_end_them(path, samples):
    whole = generate(path, samples=2, top_p=0.95)
    assert (whole.lengths == MAX_TOKENS).all()
    assert not whole.finished.any()
    for index in np.ndindex(whole.lengths.shape):
        stops = np.flatnonzero(np.isin(whole.tokens[index], STOPS))
        end = stops[0] + 1 if len(stops) else MAX_TOKENS
        assert samples.lengths[index] == end
        assert samples.finished[index] == bool(len(stops))
        np.testing.assert_array_equal(samples.tokens[index][:end], whole.tokens[index][:end])
        assert not samples.tokens[index][end:].any()
        assert not samples.logps[index][end:].any()
    assert 0 < samples.finished.sum() < samples.finished.size
    short = generate(path, samples=2, top_p=0.95, max_tokens=7)
    np.testing.assert_array_equal(short.tokens, whole.tokens[..., :7])


def test_key_prompt_and_sample_each_make_another_response(path):
    prompts = [PROMPTS[1]] * 3
    found = [generate(path, prompts, samples=3, seed=seed).tokens.reshape(9, -1) for seed in (0, 1)]
    assert len({tuple(row) for row in np.concatenate(found).tolist()}) == 18
    first = np.concatenate(found)[:, 0]
    assert len(set(first.tolist())) > 3


def test_first_tokens_have_the_policys_distribution(path):
    count = 4096
    samples = generate(path, [PROMPTS[1]], samples=count, max_tokens=1, batch_size=count)
    tokens, logps = samples.tokens[0, :, 0], samples.logps[0, :, 0]
    for token in np.unique(tokens):
        probability = np.exp(logps[tokens == token][0].astype(np.float64))
        deviation = np.sqrt(probability * (1 - probability) / count)
        # 5 deviations: for 128 tokens by chance less than once in 10,000 changes of the seed; rare ones are skewed.
        assert abs((tokens == token).mean() - probability) < 5 * deviation + 2 / count


def test_sampling_ends_when_every_row_has(path):
    samples = generate(path, stop_ids=range(128))
    assert (samples.lengths == 1).all()
    assert samples.finished.all()


def test_the_cache_is_written_in_place(path):
    generator, _, params, _ = loaded(path)
    names = ("lengths", "prompts", "samples")
    batch = {name: jnp.ones(8, jnp.int32) for name in names} | {"tokens": jnp.ones((8, 32), jnp.int32)}
    batch["real"] = jnp.ones(8, bool)
    arguments = (params, batch, jax.random.key(0), None, None, jnp.zeros(0, jnp.int32))
    text = generator._generate.lower(*arguments, max_tokens=13, top_k=None).compile().as_text()
    cache = re.escape("f32[2,8,45,2,8]")  # layers, rows, slots, key-value heads, head_dim
    assert len(re.findall(rf"= {cache}\S* dynamic-update-slice", text)) == 2  # keys and values, one slot of all layers
    assert not re.findall(rf"= {cache}\S* (?:copy|concatenate|transpose|select)\(", text)


# ---------------------------------------------------------------------- against others


def test_the_greedy_story_is_the_one_that_the_models_author_documents(assets):
    path = str(assets / "tiny_model")
    samples = generate(path, [[1]], max_tokens=256, temperature=0.0, stop_ids=[1])
    assert samples.lengths[0, 0] == 256
    assert load_tokenizer(path).decode(samples.tokens[0, 0]).startswith(STORY)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["real", "path", "windowed"])
def test_greedy_responses_are_those_of_transformers(request, kind):
    torch = pytest.importorskip("torch", reason="torch is not installed: make setup-oracle")
    import transformers

    if kind != "real":
        path, prompts = request.getfixturevalue(kind), PROMPTS
    else:
        path = str(request.getfixturevalue("assets") / "tiny_model")
        texts = ("", "Once upon a time", "One day, a big dog", "Lily and Tom went to the sea. The water")
        prompts = [load_tokenizer(path)(text)["input_ids"] for text in texts]
    stop = 1
    samples = generate(path, prompts, max_tokens=150, temperature=0.0, stop_ids=[stop])
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=150,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=0,
        )
        assert samples.tokens[index, 0, : samples.lengths[index, 0]].tolist() == whole[0, len(prompt) :].tolist()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 2 has no tokens"),
        ([[1, 128]], {}, "prompt 1 has token ids from 1 to 128, the model knows 0 to 127"),
        ([[1, -1]], {}, "token ids from -1 to 1"),
        ([[1], [1] * 233], {}, "prompt 2 has 233 tokens, with max_tokens=24 it needs 257 positions"),
        ([[1]], dict(max_tokens=0), "max_tokens=0"),
        ([[1]], dict(max_tokens=256), "needs 257 positions; the model was made for 256"),
        ([[1]], dict(batch_size=0), "batch_size=0"),
        ([[1]], dict(samples=0), "samples=0"),
        ([[1]], dict(temperature=-0.1), "temperature=-0.1"),
        ([[1]], dict(temperature=float("nan")), "temperature=nan"),
        ([[1]], dict(top_k=0), "top_k=0"),
        ([[1]], dict(top_p=0.0), "top_p=0.0"),
        ([[1]], dict(top_p=1.01), "top_p=1.01"),
        ([[1]], dict(temperature=0.0, top_k=5), "temperature=0 takes the most probable token"),
        ([[1]], dict(temperature=0.0, samples=2), "temperature=0 takes the most probable token"),
    ],
    ids=str,
)
def test_what_cannot_be_sampled_is_refused_in_one_line(path, prompts, options, says):
    with pytest.raises(UserError) as error:
        generate(path, prompts, **options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_may_fill_the_positions_to_the_last(path):
    assert generate(path, [[1] * 232]).lengths.tolist() == [[MAX_TOKENS]]


def test_broken_weights_are_said(tmp_path):
    path = worlds.make_model(tmp_path)
    values = worlds.load_tensors(path)
    values["model.norm.weight"][3] = np.nan
    worlds.save_tensors(path, values)
    with pytest.raises(UserError, match="log-probs are not finite"):
        generate(str(path))
