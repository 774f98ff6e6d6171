"""Optimizers against their published update rules, written as NumPy loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from daajax.errors import UserError
from daajax.optimizer import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule

RATE = 0.1
SHAPES = {"norm": (3,), "layers": {"q_proj": (2, 3), "pre_attention_norm": (2, 3)}}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def stepped(name, *, max_grad_norm=None, steps=3, scale=1.0, **hyperparameters):
    """Parameters after some updates, and what went in: the first parameters and the gradients."""
    optimizer = make_optimizer(
        name, optax.constant_schedule(RATE), max_grad_norm=max_grad_norm, hyperparameters=hyperparameters
    )
    first = params = jax.tree.map(jnp.asarray, drawn(0))
    gradients = [jax.tree.map(lambda g: jnp.asarray(scale * g), drawn(1 + step)) for step in range(steps)]
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        changes, state = update(gradient, state, params)
        params = optax.apply_updates(params, changes)
    return params, first, gradients


def assert_follows(rule, found, first, gradients, decayed=0.0):
    """Applies a rule (a generator function of gradients that yields steps) to each parameter by itself."""

    def one(path, found, first, *gradients):
        name = jax.tree_util.keystr(path)
        decay = decayed if name.endswith("['q_proj']") else 0.0  # not the scales of norms
        value = np.asarray(first, np.float64)
        for change in rule([np.asarray(g, np.float64) for g in gradients]):
            value = value - RATE * (change + decay * value)
        # In float32 the bias correction 1 - 0.999 is off by 5e-5 of itself, so three steps of 0.1 by up to 1e-5.
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5, err_msg=name)

    jax.tree.map_with_path(one, found, first, *gradients)


@pytest.mark.parametrize(
    "options", [{}, {"b1": 0.8, "b2": 0.95, "eps": 1e-2}, {"weight_decay": 0.3}, {"eps": None, "weight_decay": None}]
)
def test_adamw_is_algorithm_2_of_its_paper(options):
    """Loshchilov & Hutter 2019, arXiv 1711.05101, decay scaled by the learning rate as in torch."""
    given = {key: value for key, value in options.items() if value is not None}
    b1, b2, eps = given.get("b1", 0.9), given.get("b2", 0.999), given.get("eps", 1e-8)

    def rule(gradients):
        mean = square = 0.0
        for t, g in enumerate(gradients, start=1):
            mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
            yield mean / (1 - b1**t) / (np.sqrt(square / (1 - b2**t)) + eps)

    assert_follows(rule, *stepped("adamw", **options), decayed=given.get("weight_decay", 0.0))


@pytest.mark.parametrize("options", [{}, {"b2": 0.9, "eps": 0.1}])
def test_rmsprop_is_torchs(options):
    """Starts from 0, without bias correction, eps outside the root: what the DPO paper's code uses."""
    b2, eps = options.get("b2", 0.99), options.get("eps", 1e-8)

    def rule(gradients):
        square = 0.0
        for g in gradients:
            square = b2 * square + (1 - b2) * g**2
            yield g / (np.sqrt(square) + eps)

    assert_follows(rule, *stepped("rmsprop", **options))


@pytest.mark.parametrize("b1", [None, 0.9])
def test_sgd_is_the_gradient_or_its_momentum(b1):
    def rule(gradients):
        trace = 0.0
        for g in gradients:
            trace = (b1 or 0.0) * trace + g
            yield trace

    assert_follows(rule, *stepped("sgd", b1=b1))


@pytest.mark.parametrize("options", [{}, {"b1": 0.5, "b2": 0.7, "weight_decay": 0.3}])
def test_lion_is_algorithm_2_of_its_paper(options):
    """Chen et al. 2023, arXiv 2302.06675."""
    b1, b2 = options.get("b1", 0.9), options.get("b2", 0.99)

    def rule(gradients):
        mean = 0.0
        for g in gradients:
            yield np.sign(b1 * mean + (1 - b1) * g)
            mean = b2 * mean + (1 - b2) * g

    assert_follows(rule, *stepped("lion", **options), decayed=options.get("weight_decay", 0.0))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "b2": 0.5}])
def test_adafactor_of_small_matrices_divides_by_the_root_of_a_growing_mean(options):
    """Shazeer & Stern 2018, arXiv 1804.04235, section 7.2: decay 1 - t^-b2; matrices below 128 are not factored."""
    b2 = options.get("b2", 0.8)

    def rule(gradients):
        square = 0.0
        for t, g in enumerate(gradients, start=1):
            decay = 1 - t**-b2
            square = decay * square + (1 - decay) * (g**2 + 1e-30)
            yield g / np.sqrt(square)

    assert_follows(rule, *stepped("adafactor", **options), decayed=options.get("weight_decay", 0.0))


def test_adafactor_of_a_large_matrix_has_a_second_moment_of_rank_one():
    gradient = np.random.default_rng(0).normal(size=(128, 130)).astype(np.float32)
    optimizer = make_optimizer("adafactor", optax.constant_schedule(RATE), max_grad_norm=None, hyperparameters={})
    params = {"q_proj": jnp.zeros_like(gradient)}
    changes, _ = optimizer.update({"q_proj": jnp.asarray(gradient)}, optimizer.init(params), params)
    square = gradient.astype(np.float64) ** 2
    factored = np.outer(square.mean(axis=1), square.mean(axis=0)) / square.mean()
    np.testing.assert_allclose(changes["q_proj"], -RATE * gradient / np.sqrt(factored), rtol=1e-4)


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lion", 1), ("sgd", 1)])
def test_a_first_moment_in_bfloat16_needs_half_the_memory_and_steps_alike(name, moments):
    given = {"b1": 0.9} | ({"eps": 1e-2} if name == "adamw" else {})
    params = jax.tree.map(jnp.asarray, drawn(0))

    def floats(**more):
        optimizer = make_optimizer(
            name, optax.constant_schedule(RATE), max_grad_norm=None, hyperparameters=given | more
        )
        state = jax.tree.leaves(optimizer.init(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)))
        return [leaf for leaf in state if jnp.issubdtype(leaf.dtype, jnp.floating)]

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(leaf.nbytes for leaf in floats()) == 4 * size * moments
    assert sum(leaf.nbytes for leaf in floats(mu_dtype="bfloat16")) == 4 * size * moments - 2 * size
    exact, first, _ = stepped(name, **given)
    rounded, _, _ = stepped(name, **given, mu_dtype="bfloat16")
    moved = [
        np.abs(one - start).max() for one, start in zip(jax.tree.leaves(exact), jax.tree.leaves(first), strict=True)
    ]
    for one, other, most in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), moved, strict=True):
        # bfloat16 has 8 bits: a moment is off by 2^-9 of itself a step. The signs that Lion takes are the same here.
        np.testing.assert_allclose(one, other, rtol=0, atol=3 * 2**-8 * most)
        assert name == "lion" or not np.array_equal(one, other)


def test_a_momentum_that_there_is_not_has_no_dtype():
    with pytest.raises(UserError, match=r"mu_dtype='bfloat16' but optimizer 'sgd' has no first moment"):
        make_optimizer(
            "sgd",
            optax.constant_schedule(RATE),
            max_grad_norm=None,
            hyperparameters={"mu_dtype": "bfloat16"},
        )


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-3])
def test_gradients_are_clipped_to_their_global_norm(scale):
    def rule(gradients):
        yield from gradients

    found, first, gradients = stepped("sgd", max_grad_norm=0.5, scale=scale)
    clipped = []
    for gradient in gradients:
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(gradient)))
        assert (norm > 0.5) == (scale >= 1)
        clipped.append(jax.tree.map(lambda g, n=norm: np.asarray(g, np.float64) * min(1, 0.5 / n), gradient))
    assert_follows(rule, found, first, clipped)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        (
            "sgd",
            {"b2": 0.9, "eps": None},
            r"^optimizer 'sgd' takes \['b1', 'mu_dtype'\], not \['b2'\]; unset config\.optimizer\.b2\.$",
        ),
        ("rmsprop", {"weight_decay": 0.1}, r"'rmsprop' takes \['b2', 'eps'\], not \['weight_decay'\]"),
        ("lion", {"eps": 1e-8}, r"'lion' takes .*, not \['eps'\]"),
        ("rmsprop", {"mu_dtype": "bfloat16"}, r"not \['mu_dtype'\]; unset config\.optimizer\.mu_dtype\.$"),
        ("adafactor", {"b1": 0.0}, r"'adafactor' takes .*, not \['b1'\]"),
    ],
)
def test_a_hyperparameter_that_an_optimizer_does_not_have_is_refused(name, hyperparameters, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(name, optax.constant_schedule(RATE), max_grad_norm=None, hyperparameters=hyperparameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_left_unset_takes_the_default(name):
    unset = dict.fromkeys(("b1", "b2", "eps", "weight_decay"))
    for one, two in zip(*(jax.tree.leaves(stepped(name, steps=2, **given)[0]) for given in (unset, {})), strict=True):
        np.testing.assert_array_equal(one, two)


def rates(schedule, warmup_steps, updates=10):
    values = make_schedule(learning_rate=2.0, schedule=schedule, warmup_steps=warmup_steps, updates=updates)
    return [float(values(t)) for t in range(updates)]


def test_a_constant_rate_is_constant():
    assert rates("constant", 0) == [2.0] * 10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_steps_from_above_zero_to_the_peak(schedule):
    # 2 · (t + 1) / 4 during the warm-up; then the schedule begins at its peak.
    assert rates(schedule, 4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_of_warm_up_is_at_the_peak_already(schedule):
    assert rates(schedule, 1)[:2] == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("warmup_steps", [0, 2, 5])
def test_a_linear_rate_falls_in_equal_steps_and_would_be_zero_after_the_last_update(warmup_steps):
    after = 10 - warmup_steps
    wanted = [2.0 * (1 - t / after) for t in range(after)]
    assert rates("linear", warmup_steps)[warmup_steps:] == pytest.approx(wanted)


@pytest.mark.parametrize("warmup_steps", [0, 2, 5])
def test_a_cosine_rate_falls_along_half_a_cosine(warmup_steps):
    after = 10 - warmup_steps
    wanted = [1 + np.cos(np.pi * t / after) for t in range(after)]
    assert rates("cosine", warmup_steps)[warmup_steps:] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 3, 9])
def test_no_update_of_a_run_has_a_rate_of_zero(schedule, warmup_steps):
    values = rates(schedule, warmup_steps)
    assert min(values) > 0
    assert max(values) <= 2.0 + 1e-6


def test_a_warm_up_that_outlasts_the_run_is_refused():
    with pytest.raises(UserError, match=r"warmup_steps=10 but the run has 10 updates"):
        make_schedule(learning_rate=1.0, schedule="linear", warmup_steps=10, updates=10)
