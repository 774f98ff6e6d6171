"""The update against the same loss computed one sequence at a time, in float64, with plain autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from daajax import first_loss, sharding, step
from daajax import gradient as gradients
from daajax.data.batches import Batches
from daajax.data.tokens import TokenizedData
from daajax.losses import links
from daajax.losses.objective import Losses, Objective
from daajax.losses.objectives import dpo
from daajax.losses.scores import gap, log_ratios
from daajax.losses.terms import Term, bind
from daajax.optimizer import make_optimizer, make_schedule
from daajax.scoring import Scorer
from tests.data.test_batches import planned, tokenized_data
from tests.test_scoring import (
    ARCHITECTURE,
    BATCH_SIZE,
    double,
    examples_of,
    expected_token_logps,
    host_params,
    mesh_of,
    one_by_one,
    placed_params,
    scorer_of,
    sequences,
)

BETA = 0.3
DPO_AND_SFT = bind([dict(name="dpo", beta=BETA), dict(name="sft", weight=0.7)])


def centered(responses):
    """Couples the examples of an update: each is compared with the mean of all, and the gradient goes through it."""
    z = gap(log_ratios(responses))
    return Losses(links.logistic(BETA * (z - z.mean())), None, {})


def loss_terms(name):
    return {
        "dpo and sft": DPO_AND_SFT,
        "dpo": DPO_AND_SFT[:1],
        "dpo as coupled": (Term("dpo", Objective(dpo, coupled=True), functools.partial(dpo, beta=BETA)),),
        "centered": (Term("centered", Objective(centered, coupled=True), centered),),
    }[name]


LOSS_TERMS = {name: loss_terms(name) for name in ("dpo and sft", "dpo", "dpo as coupled", "centered")}


# ---------------------------------------------------------------------- what must come out


@functools.cache
def reference_column():
    """Reference log-probs by index into the data's flat tokens: the policy's, some tenths of a nat off."""
    logps = expected_token_logps()
    noise = 0.5 * np.random.default_rng(3).normal(size=len(logps))
    return np.nan_to_num(logps + noise).astype(np.float32)


@functools.cache
def facts():
    """Log-prob sums of the policy, those of the reference, lengths `[examples, 2]`, weights; float64."""
    data = tokenized_data(examples_of())
    sums, reference, lengths = np.zeros((3, BATCH_SIZE, 2))
    for example in range(BATCH_SIZE):
        cursor = data.starts[example] + data.lengths[example, 0]
        for response in range(2):
            span = slice(cursor, cursor + data.lengths[example, 1 + response])
            sums[example, response] = np.nansum(expected_token_logps()[span])
            reference[example, response] = reference_column()[span].astype(np.float64)[data.scored[span]].sum()
            lengths[example, response] = data.scored[span].sum()
            cursor = span.stop
    return sums, reference, lengths, data.weights.astype(np.float64)


def expected_loss(name, sums):
    """The loss of the `[examples, 2]` log-prob sums, written from the papers."""
    _, reference, lengths, weights = facts()
    ratios = sums - reference
    h = ratios[:, 0] - ratios[:, 1]
    if name == "centered":
        h = h - h.mean()
    preference = (weights * -jnp.log(1 / (1 + jnp.exp(-BETA * h)))).sum() / BATCH_SIZE
    likelihood = (weights * -sums[:, 0]).sum() / lengths[:, 0].sum()
    return {"dpo and sft": preference + 0.7 * likelihood}.get(name, preference), preference, likelihood


@jax.jit
def pulled_back(params, tokens, scored, cotangent):
    """The gradient of a function of the log-prob sums, given its own with respect to them."""

    def total(params):
        sums = jnp.where(scored[:, 1:], one_by_one(params, tokens), 0).sum(axis=1)
        return (sums[: 2 * BATCH_SIZE].reshape(BATCH_SIZE, 2) * cotangent).sum()

    return jax.grad(total)(params)


@functools.cache
def expected(name):
    """Loss and gradient."""
    with jax.enable_x64(True):
        sums = jnp.asarray(facts()[0])
        loss, cotangent = jax.value_and_grad(lambda s: expected_loss(name, s)[0])(sums)
        gradient = pulled_back(double(host_params()), *sequences(examples_of()), cotangent)
        return float(loss), jax.device_get(gradient)


def expected_metrics():
    sums, reference, lengths, _ = facts()
    ratios = sums - reference
    rewards = BETA * ratios
    with jax.enable_x64(True):
        loss, preference, likelihood = (float(x) for x in expected_loss("dpo and sft", jnp.asarray(sums)))
    return {
        "loss": loss,
        "loss/dpo": preference,
        "loss/sft": likelihood,
        "gradient_weight": (1 / (1 + np.exp(rewards[:, 0] - rewards[:, 1]))).mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
        "logps/chosen": sums[:, 0].mean(),
        "logps/rejected": sums[:, 1].mean(),
        "displacement/chosen": ratios[:, 0].mean(),
        "displacement/rejected": ratios[:, 1].mean(),
        "displacement/chosen_fell": (ratios[:, 0] < 0).mean(),
        "log_ratios/largest": np.abs(ratios).max(),
        "log_ratios/largest_per_sqrt_token": (np.abs(ratios) / np.sqrt(lengths)).max(),
    }


# ---------------------------------------------------------------------- what does come out


@functools.partial(jax.jit, static_argnames=("scorer", "terms", "keys", "head"))
def loss_and_gradient(scorer, params, batch, terms, frozen=None, *, keys, head="token"):
    options = dict(batch_size=BATCH_SIZE, keys=keys, head=head, frozen=frozen)
    return gradients.loss_and_gradient(scorer, params, batch, terms, {}, **options)[:2]


def batch_of(sizes, reference=None, data: TokenizedData | None = None, **options):
    """One update of all examples on a mesh, in an order of its own, and the capacity in gathered keys."""
    mesh = mesh_of(*sizes)
    data = data or tokenized_data(examples_of())
    cuts = dict(row_multiple=sharding.row_multiple(mesh), parts=sharding.length_parts(mesh))
    plan = planned(data, batch_size=BATCH_SIZE, updates=1, **cuts, **options)
    batch = Batches(data, plan, reference_column() if reference is None else reference)[0]
    return sharding.place(mesh, batch), plan.shape(0).keys


def computed(name, sizes=(8, 1, 1), scorer=None, head="token", frozen=(), **options):
    batch, keys = batch_of(sizes, **options)
    scorer, params = scorer_of(*sizes, **scorer or {}), placed_params(*sizes)
    own, others = ({n: x for n, x in params.items() if (n in frozen) == stays} for stays in (False, True))
    gradient, logged = loss_and_gradient(scorer, own, batch, LOSS_TERMS[name], others, keys=keys, head=head)
    return jax.device_get((gradient, logged.values()))


def assert_gradients_near(found, wanted, tolerance=3e-5):
    """Float32 through two layers, forth and back; relative to the largest entry of each parameter's gradient."""

    def near(path, one, two):
        assert one.dtype == np.float32
        np.testing.assert_allclose(
            one, two, rtol=tolerance, atol=tolerance * np.abs(two).max(), err_msg=jax.tree_util.keystr(path)
        )

    jax.tree.map_with_path(near, found, wanted)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((8, 1, 1), {}),
        ((8, 1, 1), {"prefix_sharing": False, "scorer": {"remat": "full"}}),
        pytest.param((8, 1, 1), {"packing": False, "micro_batches": 2}, marks=pytest.mark.slow),
        pytest.param(
            (8, 1, 1), {"micro_batches": 4, "row_length": 256, "prefix_sharing": False}, marks=pytest.mark.slow
        ),
        pytest.param((1, 8, 1), {}, marks=pytest.mark.slow),
        ((1, 4, 2), {"micro_batches": 2}),
        ((2, 2, 2), {"rows": 8, "scorer": {"attention": "dense", "remat": "dots"}}),
        pytest.param((8, 1, 1), {"head": "row"}, marks=pytest.mark.slow),
        ((2, 2, 2), {"head": "row", "micro_batches": 2}),
        pytest.param((1, 4, 2), {"head": "row", "prefix_sharing": False, "rows": 16}, marks=pytest.mark.slow),
        ((1, 2, 1, 4), {}),
        pytest.param(
            (2, 1, 2, 2),
            {"micro_batches": 2, "prefix_sharing": False, "rows": 4, "scorer": {"remat": "full"}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (1, 2, 1, 4), {"packing": False, "scorer": {"attention": "dense", "remat": "dots"}}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_loss_gradient_and_metrics_do_not_depend_on_the_layout(sizes, options):
    gradient, logged = computed("dpo and sft", sizes, **options)
    assert_gradients_near(gradient, expected("dpo and sft")[1])
    assert logged == pytest.approx(expected_metrics(), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
    ("head", "sizes", "micro_batches"),
    [
        pytest.param("token", (8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param("row", (8, 1, 1), 1, marks=pytest.mark.slow),
        ("frozen", (2, 2, 2), 2),
        pytest.param("frozen", (8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param("token", (2, 2, 2), 2, marks=pytest.mark.slow),
        pytest.param("row", (2, 2, 2), 2, marks=pytest.mark.slow),
        pytest.param("frozen", (1, 2, 1, 4), 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_projection_that_is_not_trained_changes_no_other_gradient(head, sizes, micro_batches):
    gradient, logged = computed("dpo and sft", sizes, head=head, frozen=("lm_head",), micro_batches=micro_batches)
    wanted = {name: value for name, value in expected("dpo and sft")[1].items() if name != "lm_head"}
    assert_gradients_near(gradient, wanted)
    assert logged == pytest.approx(expected_metrics(), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "micro_batches", "sizes"),
    [
        ("dpo as coupled", 4, (8, 1, 1)),
        pytest.param("centered", 1, (8, 1, 1), marks=pytest.mark.slow),
        ("centered", 4, (8, 1, 1)),
        pytest.param("centered", 2, (1, 2, 1, 4), marks=pytest.mark.slow),
    ],
)
def test_objectives_coupled_over_the_update_are_exact_in_parts(name, micro_batches, sizes):
    gradient, logged = computed(name, sizes, micro_batches=micro_batches)
    loss, wanted = expected("dpo" if name == "dpo as coupled" else name)
    assert_gradients_near(gradient, wanted)
    assert logged["loss"] == pytest.approx(loss, rel=2e-5)


def test_centering_changes_the_gradient_through_the_mean():
    # Or the test above would prove nothing: the gradient without the mean's share is another one.
    def stopped(sums):
        ratios = sums - facts()[1]
        h = ratios[:, 0] - ratios[:, 1]
        z = BETA * (h - jax.lax.stop_gradient(h.mean()))
        return (facts()[3] * jnp.log(1 + jnp.exp(-z))).sum() / BATCH_SIZE

    with jax.enable_x64(True):
        sums = jnp.asarray(facts()[0])
        through = jax.grad(lambda s: expected_loss("centered", s)[0])(sums)
        assert float(jnp.abs(jax.grad(stopped)(sums) - through).max()) > 0.1 * float(jnp.abs(through).max())


def test_an_example_of_weight_zero_counts_but_pulls_nothing():
    examples = [e._replace(weight=0.0 if i % 2 else e.weight) for i, e in enumerate(examples_of())]
    batch, keys = batch_of((8, 1, 1), data=tokenized_data(examples))
    _, logged = loss_and_gradient(scorer_of(), placed_params(), batch, LOSS_TERMS["dpo and sft"], keys=keys)
    sums, reference, _, weights = facts()
    z = BETA * (sums - reference)[::2] @ np.array([1, -1])
    assert float(logged.values()["loss/dpo"]) == pytest.approx(
        (weights[::2] * np.log1p(np.exp(-z))).sum() / BATCH_SIZE, rel=2e-5
    )


@pytest.mark.parametrize(
    ("loss", "value"),
    [(dict(name="dpo", beta=0.1), np.log(2)), (dict(name="ipo", beta=0.1), 25.0), (dict(name="simpo"), None)],
    ids=str,
)
def test_the_loss_at_the_reference_is_that_of_its_log_probs(loss, value):
    terms = bind([loss])
    batch, _ = batch_of((8, 1, 1))
    found, slack = jax.jit(
        lambda b: first_loss.loss_at_reference(
            b, terms=terms, batch_size=BATCH_SIZE, tolerance=jnp.full((BATCH_SIZE, b["lengths"].shape[-1]), 1e-3)
        )
    )(batch)
    _, reference, lengths, weights = facts()
    if value is None:
        means = 2.0 * reference / lengths
        wanted = (weights * np.log1p(np.exp(-(means[:, 0] - means[:, 1] - 0.5)))).mean()
    else:
        wanted = value * weights.mean()
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    if loss["name"] == "ipo":  # its slope at 0 is 1 / beta a nat, for either response
        assert float(slack) == pytest.approx(2 * 10 * 1e-3 * weights.mean(), rel=1e-5)


def test_a_kink_where_policy_and_reference_are_one_has_a_slope_on_either_side():
    # DPOP: falling below the reference costs beta · (1 + penalty) · σ(0) a nat, rising above it gains beta · σ(0).
    batch, _ = batch_of((8, 1, 1))
    tolerance = jnp.full((BATCH_SIZE, 2), 1e-6)
    terms = bind([dict(name="dpop", beta=0.1, penalty=50.0)])
    _, slack = jax.jit(
        lambda b: first_loss.loss_at_reference(b, terms=terms, batch_size=BATCH_SIZE, tolerance=tolerance)
    )(batch)
    assert float(slack) == pytest.approx((51 + 1) * 0.1 / 2 * 1e-6 * facts()[3].mean(), rel=1e-3)


def test_what_the_reference_alone_says_has_no_slack():
    # φ of Mallows-DPO is the log of an entropy, here one smaller than the tolerance; the policy does not enter it.
    batch, _ = batch_of((8, 1, 1))
    batch = {**batch, "entropies": jnp.full(batch["reference"].shape, 1e-5)}
    tolerance = jnp.full((BATCH_SIZE, 2), 1e-3)
    terms = bind([dict(name="mallows_dpo", beta=0.1)])
    loss, slack = jax.jit(
        lambda b: first_loss.loss_at_reference(b, terms=terms, batch_size=BATCH_SIZE, tolerance=tolerance)
    )(batch)
    assert float(loss) == pytest.approx(np.log(2) * facts()[3].mean(), rel=1e-5)
    # beta φ / 2 a nat, for either response; to first order.
    assert float(slack) == pytest.approx(2 * 0.1 * -np.log(1e-5) / 2 * 1e-3 * facts()[3].mean(), rel=1e-2)


# ---------------------------------------------------------------------- the compiled update


def updating(name, learning_rate, *, max_grad_norm=None, param_dtype=jnp.float32, sizes=(8, 1, 1)):
    """An update and its first state."""
    mesh = mesh_of(*sizes)
    scorer = Scorer.make(
        ARCHITECTURE, mesh, attention="blockwise", remat="none", dtype=jnp.float32, param_dtype=param_dtype
    )
    # A copy: the state is donated.
    params = jax.tree.map(lambda x: jnp.array(x, param_dtype, copy=True), placed_params(*sizes))
    where = sharding.homes(placed_params(*sizes))
    params = jax.device_put(params, where)
    schedule = make_schedule(learning_rate=learning_rate, schedule="linear", warmup_steps=0, updates=10)
    optimizer = make_optimizer(name, schedule, max_grad_norm=max_grad_norm, hyperparameters={})
    terms = LOSS_TERMS["dpo and sft"]
    abstract = step.abstract_state(sharding.abstract(params, where), optimizer, terms, mesh)
    state = step.init_state(params, optimizer, sharding.homes(abstract), terms)
    update = step.Update(
        scorer,
        terms,
        optimizer,
        schedule,
        batch_size=BATCH_SIZE,
        state=abstract,
    )
    return update, state


def test_an_update_steps_by_the_clipped_gradient_and_logs_its_norm_before_clipping():
    wanted = expected("dpo and sft")[1]
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(wanted)))
    assert norm > 0.2
    update, state = updating("sgd", 0.05, max_grad_norm=0.1)
    batch, keys = batch_of((8, 1, 1))
    old = jax.tree.leaves(state.params)
    new, logged = update(state, batch, keys=keys)
    assert all(x.is_deleted() for x in old)
    assert not any(x.is_deleted() for x in batch.values())
    assert int(new.step) == 1
    logged = jax.device_get(logged)
    assert {value.shape for value in logged.values()} == {()}
    assert logged["grad_norm"] == pytest.approx(norm, rel=3e-5)
    assert logged["learning_rate"] == pytest.approx(0.05)
    assert {name: logged[name] for name in expected_metrics()} == pytest.approx(expected_metrics(), rel=2e-5, abs=2e-5)
    change = jax.tree.map(lambda x, y: np.asarray(x) - y, new.params, host_params())
    assert float(optax.tree.norm(change)) == pytest.approx(0.05 * 0.1, rel=1e-4)
    for found, gradient in zip(jax.tree.leaves(change), jax.tree.leaves(wanted), strict=True):
        # Parameters near 1 are stored to 6e-8.
        np.testing.assert_allclose(found, -0.05 * 0.1 * gradient / norm, atol=1.2e-7, rtol=1e-4)
    # The second one, of another shape, takes the next rate of the schedule, 0.05 · (1 - 1 / 10); the loss falls.
    batch, keys = batch_of((8, 1, 1), row_length=256)
    new, again = update(new, batch, keys=keys)
    assert int(new.step) == 2
    assert float(again["learning_rate"]) == pytest.approx(0.045)
    assert float(again["loss"]) < logged["loss"]


@pytest.mark.slow
def test_parameters_in_bfloat16_go_on_being_updated():
    update, state = updating("adamw", 1e-2, param_dtype=jnp.bfloat16)
    batch, keys = batch_of((8, 1, 1))
    losses = []
    for _ in range(3):
        state, logged = update(state, batch, keys=keys)
        losses.append(float(logged["loss"]))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(jnp.bfloat16)}
    assert losses[2] < losses[0]
