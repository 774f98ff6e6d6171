"""Counts of arithmetic: against loops over tokens, against the products in the program, against published limits."""

import dataclasses
import math

import numpy as np
import pytest
from jax.extend import core

from benchmarks.memory import LLAMA, make_data
from configs import base
from daajax import flops, policy, run, sharding
from daajax.attention import ATTENTION
from daajax.config import losses, resolve
from daajax.data.batches import Batches
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.heads import Choice
from daajax.losses.terms import bind
from daajax.models.architecture import LayerKind
from daajax.models.families import architecture_of
from daajax.models.lora import Lora
from daajax.models.remat import REMAT
from daajax.ops import splash
from tests import worlds

SMALL = LLAMA | dict(
    vocab_size=96, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
ONE_B = LLAMA | dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True
)  # Llama 3.2 1B
MIXTURE = SMALL | dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, rope_scaling=None)
ROW = Choice("row", 3, "")
DENSE = dict(remat="none", attention="dense", head=Choice("token", 4, ""))
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plan_of(lengths, *, updates, sharing=True, micro_batches=1, rows=None, scored=None):
    """A plan of as many examples an update, and what is counted of it."""
    lengths = np.array(lengths)
    responses = lengths[:, 1:]
    scored = responses.sum(axis=1) if scored is None else np.array(scored)
    tokens = lengths.sum(axis=1)
    keys = responses.sum(axis=1) + lengths[:, 0] * (responses > 0).sum(axis=1)
    sizes = Sizes(tokens, tokens if sharing else keys, scored, keys, sharing, lengths.shape[1] - 1)
    windows = np.arange(len(lengths)).reshape(updates, -1)
    return pack(windows, sizes, packing=True, micro_batches=micro_batches, row_multiple=1, rows=rows), lengths, scored


# ---------------------------------------------------------------------- the least


@pytest.mark.parametrize(
    ("config", "mix", "limit"),
    [
        # Pairs a second at 790 TFLOP/s, by hand with 6.98e9 and 0.973e9 parameters in the layers.
        (LLAMA, (200, 320, 300), 21.5),
        (LLAMA, (140, 60, 60), 69.8),
        (LLAMA, (2000, 300, 300), 6.8),
        (ONE_B, (200, 320, 300), 2 * 67),
        (ONE_B, (140, 60, 60), 2 * 230),
        (ONE_B, (2000, 300, 300), 2 * 23),
    ],
)
def test_the_least_is_the_limit_that_was_worked_out_by_hand(config, mix, limit):
    architecture = architecture_of(config)
    lengths = np.array([mix])
    work = flops.work_of(lengths, lengths[:, 1:].sum(axis=1), architecture)
    assert 790e12 / work.flops(flops.least(architecture))[0] == pytest.approx(limit, rel=0.02)


def test_the_least_is_the_formula():
    P, C, R = 17, 9, 5
    V, D, L, hd, mlp = 96, 16, 3, 4, 40
    kv, H = 8, 4
    N = L * (2 * D * D + 2 * D * kv + 3 * D * mlp)
    A = P**2 / 2 + P * (C + R) + (C**2 + R**2) / 2
    architecture = architecture_of(SMALL)
    work = flops.work_of(np.array([[P, C, R]]), np.array([C + R]), architecture)
    formula = {f: f * (2 * N * (P + C + R) + 2 * V * D * (C + R)) + 12 * L * H * hd * A for f in (2, 3)}
    assert work.flops(flops.least(architecture))[0] == formula[3]
    assert work.flops(flops.least(architecture, Lora(4, 16.0, ALL)))[0] == formula[2]
    # What is trained whole beside adapters has a gradient of its own.
    with_head = flops.least(architecture, Lora(4, 16.0, ALL, whole=("lm_head",)))
    assert work.flops(with_head)[0] == formula[2] + 2 * V * D * (C + R)


@pytest.mark.parametrize("windows", [(None,), (3,), (5, None), (1,), (100,)])
@pytest.mark.parametrize("responses", [1, 2, 4])
def test_pairs_are_those_of_a_loop_over_queries(windows, responses):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 12, (20, 1 + responses))
    lengths[3:6, -1] = 0 if responses > 2 else lengths[3:6, -1]
    kinds = tuple(LayerKind(sliding_window=window) for window in windows)
    kind_of = tuple(layer % len(kinds) for layer in range(3))
    architecture = dataclasses.replace(architecture_of(SMALL), kinds=kinds, kind_of=kind_of)

    def seen(position, window):  # earlier keys whole, its own by half; beyond the window none
        keys = position + 0.5
        return keys if window is None else min(keys, window)

    for sharing in (True, False):
        work = flops.work_of(lengths, lengths[:, 1:].sum(axis=1), architecture, prefix_sharing=sharing)
        for example, (prompt, *others) in enumerate(lengths.tolist()):
            pairs = tokens = 0.0
            for layer in range(3):
                window = windows[kind_of[layer]]
                copies = 1 if sharing else sum(length > 0 for length in others)
                pairs += copies * sum(seen(position, window) for position in range(prompt))
                for length in others:
                    pairs += sum(seen(prompt + position, window) for position in range(length))
                tokens = copies * prompt + sum(others)
            assert (work.pairs[example], work.tokens[example]) == (pairs, tokens)


def test_of_a_mixture_the_experts_that_a_token_is_sent_to_count():
    mixture, dense = (architecture_of(config) for config in (MIXTURE, SMALL))
    router, each = 2 * 16 * 8, 2 * 3 * 16 * 40
    one = sum(flops.products(mixture).values()) - sum(flops.products(dense).values())
    assert one == router + (2 - 1) * each


# ---------------------------------------------------------------------- what the hardware is asked for


def dots(jaxpr):
    """FLOPs of all products in a program; of a loop whose end is not known, of one turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        else:
            turns = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += turns * sum(dots(inner) for inner in core.jaxprs_in_params(equation.params))
    return total


def traced(remat, rank, *options, config=SMALL):
    """FLOPs of the products of an update, by its program and by the counts; of one micro-batch and few tokens."""
    options_of_run = base.get_config()
    options_of_run.model.path, options_of_run.data.path, options_of_run.steps = "model", "pairs", 1
    options_of_run.remat, options_of_run.attention, options_of_run.lora.rank = remat, "dense", rank
    options_of_run.batch_size = 4
    for name, value in options:
        if name == "loss":
            options_of_run.loss = base.loss(value)
        else:
            options_of_run.update_from_flattened_dict({name: value})
    found, architecture = resolve(options_of_run), architecture_of(config)
    with worlds.visible(1):
        mesh = sharding.make_mesh(found.mesh.to_dict())
    terms = bind(losses(found))
    scorer = policy.make_scorer(found, architecture, mesh, adapters=policy.lora_of(found, architecture))
    update = run.make_update(found, scorer, scorer, terms, updates=1)
    data = make_data(4, 32)
    sizes = Sizes.of(data, prefix_sharing=True)
    plan = pack(np.arange(4)[None], sizes, packing=True, micro_batches=found.micro_batches, row_multiple=1)
    batch = Batches(data, plan, np.zeros(len(data.tokens), np.float32))[0]
    shaped = sharding.abstract(batch, sharding.batch_shardings(mesh, batch))
    program = update._jitted.trace(update.state, shaped, update.beside, plan.shape(0).keys).jaxpr
    counts = flops.of_plan(
        plan,
        data.lengths,
        sizes.scored,
        architecture,
        remat=remat,
        attention="dense",
        head=update.head_for(batch),
        lora=scorer.model.lora,
        live=architecture if run.why_live(found, terms) else None,
    )
    return dots(program.jaxpr), counts.steps["packing"][-1], plan.rows * plan.shape(0).length


@pytest.mark.parametrize("remat", REMAT)
def test_the_counts_are_the_products_in_the_program(remat):
    program, counted, _ = traced(remat, 0)
    assert counted == program


@pytest.mark.parametrize("remat", ["full"])
def test_with_adapters_the_counts_are_the_products_but_their_own(remat):
    program, counted, tokens = traced(remat, 2)
    sides = {name: (16, 8 if name[0] in "kv" else 16) for name in ALL[:4]}
    sides |= dict(gate_proj=(16, 40), up_proj=(16, 40), down_proj=(40, 16))
    own = 3 * sum(map(sum, sides.values()))
    if remat == "full":
        own += sum(map(sum, sides.values())) - sides["down_proj"][1]  # what B of the last makes, no gradient needs
    assert program - counted == 3 * tokens * 2 * 2 * own  # layers, tokens, rank


@pytest.mark.parametrize("head", ["row", "token"])
@pytest.mark.parametrize(("option", "value"), [("reference.live", True), ("loss", "tdpo2")])
def test_a_live_reference_is_scored_and_compared_with(option, value, head):
    program, counted, _ = traced("none", 0, (option, value), ("head", head))
    assert counted == program


def test_every_attention_is_counted():
    assert flops.KERNELS["splash"].blocks == (splash.BLOCK, splash.BLOCK)
    assert set(flops.KERNELS) == set(ATTENTION)


def test_what_is_not_known_is_not_counted():
    architecture = architecture_of(SMALL)
    with pytest.raises(ValueError, match="policy of rematerialization 'some' is unknown; there are none, dots, save"):
        flops.computed_again(architecture, "some", "dense")
    with pytest.raises(ValueError, match="attention 'flashy' is unknown"):
        flops.computed_again(architecture, "none", "flashy")
    with pytest.raises(ValueError, match="a head of 2 products lacks a gradient: it takes 3"):
        flops.head_again(architecture, 2)


# ---------------------------------------------------------------------- the steps between


@pytest.mark.parametrize(
    ("lora", "products", "needed"),
    [
        (None, 4, 3),
        (None, 3, 3),
        (Lora(4, 16.0, ALL), 3, 2),
        (Lora(4, 16.0, ALL), 2, 2),
        (Lora(4, 16.0, ALL, whole=("lm_head",)), 4, 3),
    ],
)
def test_the_head_takes_as_many_products_as_its_form(lora, products, needed):
    architecture = architecture_of(SMALL)
    least = flops.least(architecture, lora)
    asked = least.plus(flops.head_again(architecture, products, lora))
    once = flops.forward(architecture).scored
    assert (asked.scored / once, least.scored / once) == (products, needed)
    assert (asked.token, asked.pair) == (least.token, least.pair)


def counts_of(planned, **options):
    plan, lengths, scored = planned
    return flops.of_plan(
        plan,
        lengths,
        scored,
        architecture_of(SMALL),
        **DENSE | options,
    )


PAIRS = [[20, 30, 14]] * 4  # 64 tokens each: two fill a row of 128 positions


def test_full_rows_without_anything_twice_are_the_least_but_for_masked_keys():
    counts = counts_of(plan_of(PAIRS, updates=2), head=ROW)
    factors = counts.factors(0, 2)
    assert [factors[name] for name in ("head", "sharing")] == [1, 1]
    A = 20**2 / 2 + 20 * 44 + (30**2 + 14**2) / 2
    again = 2 * 3 * 16 * 2 * A  # layers, heads · features: the mask's scores, for the backward pass
    assert counts.steps["remat"][-1] - counts.least[-1] == 2 * again
    masked = 14 * 3 * 16 * (128**2 - 2 * A)
    assert counts.steps["packing"][-1] - counts.steps["sharing"][-1] == 2 * masked


def test_half_empty_rows_cost_twice_as_much():
    planned = plan_of(PAIRS, updates=4)  # one pair in a row of 128
    counts = counts_of(planned, head=ROW, attention="blockwise")
    architecture = architecture_of(SMALL)
    layers = 3 * sum(flops.products(architecture).values())
    slots = 3 * 2 * 96 * 16 * (48 - 44)  # whole eights of scored slots
    edges = 3 * 64 * (64 + 64) / 2  # layers, tokens, half a block either way
    asked = counts.steps["packing"] - counts.steps["sharing"]
    assert asked[1] == pytest.approx(3 * layers * 64 + slots + (3 + 0.5) * 4 * 16 * edges)
    assert counts.factors(0, 4) == counts.factors(0, 1)


def test_without_sharing_the_prompt_costs_once_a_response():
    counts = counts_of(plan_of(PAIRS, updates=2, sharing=False), head=ROW)
    layers = 3 * sum(flops.products(architecture_of(SMALL)).values())
    more = counts.steps["sharing"] - counts.steps["remat"]
    assert more[-1] == pytest.approx(4 * (3 * layers * 20 + 14 * 3 * 16 * 20**2 / 2))
    assert counts.factors(0, 2)["sharing"] < 1


def test_a_first_pass_without_gradient_is_one_forward_pass():
    planned = plan_of(PAIRS, updates=2)
    one, two = counts_of(planned), counts_of(planned, two_passes=True, head=Choice("token", 5, ""))
    architecture = architecture_of(SMALL)
    work = flops.work_of(planned[1], planned[2], architecture)
    more = two.steps["remat"][-1] - one.steps["remat"][-1]
    assert more == pytest.approx(work.flops(flops.forward(architecture)).sum())
    assert two.least[-1] == one.least[-1]


def test_scored_slots_are_visited_up_to_the_last_of_the_fullest_row():
    lengths = [[10, 30, 30], [10, 20, 10], [10, 30, 30], [10, 2, 2]]
    plan, _, scored = plan_of(lengths, updates=2, rows=2)
    visited = flops._visited(plan, scored, 1, by_row=False)
    np.testing.assert_array_equal(visited, [2 * plan.shape(0).scored, 2 * plan.shape(1).scored])  # one chunk
    # Each of two devices has a row to itself, and no more slots than it.
    np.testing.assert_array_equal(flops._visited(plan, scored, 2, by_row=False), visited)


def test_rows_that_exceed_a_chunk_are_visited_in_whole_chunks(monkeypatch):
    monkeypatch.setattr(flops, "CHUNK", 16)
    plan, _, scored = plan_of([[10, 30, 30], [10, 20, 15]], updates=1, rows=2)
    assert plan.shape(0).scored == 64
    # The fuller row has 60 scored tokens, the other 35. Together: 8 slots of each at a time, 8 chunks of 16.
    np.testing.assert_array_equal(flops._visited(plan, scored, 1, by_row=False), [128])
    # One by one, or on devices of their own: 16 at a time, 4 chunks and 3.
    np.testing.assert_array_equal(flops._visited(plan, scored, 1, by_row=True), [112])
    np.testing.assert_array_equal(flops._visited(plan, scored, 2, by_row=False), [112])
    # Where devices have parts of the vocabulary, both make as many steps as the fuller row takes.
    np.testing.assert_array_equal(flops._visited(plan, scored, 2, by_row=False, is_vocabulary_cut=True), [128])
    np.testing.assert_array_equal(flops._visited(plan, scored, 2, by_row=True, is_vocabulary_cut=True), [128])


def test_the_factors_make_up_all_that_is_asked_for():
    random = np.random.default_rng(1)
    lengths = random.integers(1, 60, (24, 3))
    planned = plan_of(lengths, updates=4, sharing=False, micro_batches=2)
    for options in (dict(remat="full"), dict(remat="dots", attention="blockwise", two_passes=True)):
        counts = counts_of(planned, **options, live=architecture_of(SMALL), head=Choice("token", 4, "", 3))
        factors = counts.factors(1, 3)
        asked = counts.steps["packing"][3] - counts.steps["packing"][1]
        assert math.prod(factors.values()) == pytest.approx((counts.least[3] - counts.least[1]) / asked)
        assert all(0 < value <= 1 for value in factors.values())


def test_examples_that_are_not_there_cost_nothing():
    plan, lengths, scored = plan_of(PAIRS, updates=2)
    there = np.arange(4).reshape(2, 2) % 2 == 0
    gone = dataclasses.replace(plan, windows=np.where(there, plan.windows, -1), row_of=np.where(there, plan.row_of, -1))
    half, whole = (counts_of((p, lengths, scored)).least[-1] for p in (gone, plan))
    assert half == whole / 2
