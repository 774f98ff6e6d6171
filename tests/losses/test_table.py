"""Every objective of the table: finite in float32, indifferent to what is no example and to the order of the others."""

import dataclasses
import inspect
import re

import hypothesis
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from configs import base
from daajax.errors import UserError
from daajax.losses.objectives import OBJECTIVES
from daajax.losses.terms import bind
from tests.losses.worlds import LOSSES, random_responses, responses_of

EXAMPLES = 6


def total_of(term, responses):
    """What an update makes of a term, with its gradient with respect to all that comes from the policy."""

    def total(policy):
        result = term.loss(responses._replace(**policy))
        parts = result.losses if result.token_losses is None else result.losses + result.token_losses
        return jnp.where(responses.are_real(), parts, 0).sum(), result

    policy = {"logps": responses.logps, "log_ratios": responses.log_ratios, "sums": dict(responses.sums)}
    gradient, result = jax.grad(total, has_aux=True)(policy)
    return result, gradient


def rows(tree, which):
    return jax.tree.map(lambda x: np.asarray(x)[which], tree)


def assert_close(found, wanted):
    # Sums over examples are taken in another order: float32 keeps 7 digits of the largest term.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, wanted)


def size_of(term):
    return term.objective.responses or 3


@st.composite
def extremes(draw, responses):
    """Sums of log-probs from -1e4 to 0 under either model, lengths from 1 to 1e4, some lists without their last."""
    logps = st.sampled_from([-1e4, -3e3, -790.0, -30.0, -1.0, -1e-4, -1e-9, 0.0]) | st.floats(-1e4, 0, width=32)
    policy, reference = (draw(arrays.arrays(np.float32, (EXAMPLES, responses), elements=logps)) for _ in range(2))
    lengths = draw(arrays.arrays(np.int32, (EXAMPLES, responses), elements=st.sampled_from([1, 10, 700, 10_000])))
    if responses > 2:
        lengths[:, -1] *= draw(arrays.arrays(np.bool_, EXAMPLES))
    real = draw(arrays.arrays(np.bool_, EXAMPLES))
    return responses_of(policy, policy - reference, lengths * real[:, None], real=real)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_values_and_gradients_are_finite_in_float32(loss):
    (term,) = bind([loss])

    @hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
    @hypothesis.given(extremes(size_of(term)))
    def check(responses):
        result, gradient = total_of(term, responses)
        for value in jax.tree.leaves((result, gradient)):
            assert np.isfinite(value).all()
        for value in jax.tree.leaves(gradient):
            assert not np.asarray(value)[~np.asarray(responses.real)].any()

    check()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_neither_the_order_of_the_examples_nor_rows_that_are_none_change_anything(loss):
    (term,) = bind([loss])
    given = random_responses(examples=4, responses=size_of(term))
    places = np.array([5, 1, 2, 4])  # of six rows
    empty = responses_of(*(np.zeros((6, size_of(term)), np.float32),) * 3, seed=3)
    among = jax.tree.map(lambda x, y: y if y.ndim == 0 else x.at[places].set(y), empty, given)
    among = among._replace(real=jnp.zeros(6, bool).at[places].set(True))
    (result, gradient), (wanted, gradient_wanted) = total_of(term, among), total_of(term, given)
    assert_close(rows((result._replace(state={}), gradient), places), (wanted._replace(state={}), gradient_wanted))
    assert_close(result.state, wanted.state)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_what_an_objective_says_that_it_needs_is_all_that_it_reads(loss):
    (term,) = bind([loss])
    objective, given = term.objective, random_responses(responses=size_of(term))
    fields = {"logps", "lengths", *objective.reads, *objective.draws}
    if objective.reference and loss["name"] not in ("sampo", "nash_md"):  # whose sums are of log-ratios
        fields.add("log_ratios")
    there = {name: getattr(given, name) if name in fields else None for name in given._fields}
    there |= {"sums": {name: given.sums[name] for name in objective.sums}}
    there |= {"state": {name: given.state[name] for name in objective.state}}
    result = term.loss(given._replace(**there))
    assert set(result.state) == set(objective.state)
    if not objective.may_read:
        np.testing.assert_array_equal(result.losses, term.loss(given).losses)
    for name in fields - {"logps", "lengths"}:
        with pytest.raises((ValueError, KeyError), match="there is no"):
            term.loss(given._replace(**there | {name: None}))
    if objective.sums:
        with pytest.raises(KeyError, match=objective.sums[0]):
            term.loss(given._replace(**there | {"sums": {}}))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_dtype_and_the_shapes_are_those_of_the_log_probs(loss):
    (term,) = bind([loss])
    given = random_responses(responses=size_of(term))
    found = jax.eval_shape(term.loss, given)
    assert found.losses.shape == (6,)
    for value in jax.tree.leaves(found):
        assert value.dtype == np.float32
    for value in found.metrics.values():
        assert value.shape == (6,)
    assert found.rewards is None or found.rewards.shape == given.logps.shape


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_defaults_given_in_full_ask_for_what_the_line_of_the_table_says(name):
    options = base.loss(name).to_dict()
    (short,), (full,) = bind([dict(name=name)]), bind([options])
    # What refuses is bound to the hyper-parameters, and no two such functions are equal.
    assert dataclasses.replace(short.objective, refuses=None) == dataclasses.replace(full.objective, refuses=None)
    parameters = inspect.signature(OBJECTIVES[name].function).parameters
    for function in (OBJECTIVES[name].needs, OBJECTIVES[name].refuses):
        for key, parameter in inspect.signature(function).parameters.items() if function else ():
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert parameter.default == parameters[key].default


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_docstring_starts_with_name_and_formula_and_explains_every_hyper_parameter(name):
    function = OBJECTIVES[name].function
    text = inspect.getdoc(function)
    title, colon, formula = text.splitlines()[0].partition(": ")
    assert title
    assert colon
    assert formula.endswith(".")
    for key in list(inspect.signature(function).parameters)[1:]:
        assert f"\n    {key}: " in text
    for section in ("Args", "Returns", "Raises", "References"):
        assert f"\n{section}:\n" in text


def test_a_choice_of_none_is_kept_by_a_config_that_a_number_may_override():
    options = base.loss("wpo", clip_max=None)
    assert options.to_dict()["clip_max"] is None
    options.clip_max = 2.0
    assert options.clip_max == 2.0
    with pytest.raises(TypeError):
        base.loss("exo").log_eps = "much"


REFUSED = [
    (dict(name="cdpo", label_smoothing=0.5), r"label_smoothing=0\.5 must be in \[0, 0\.5\)"),
    (dict(name="robust", label_smoothing=0.5), r"label_smoothing=0\.5 must be in \[0, 0\.5\)"),
    (dict(name="robust", label_smoothing=-0.1), r"label_smoothing=-0\.1 must be in \[0, 0\.5\)"),
    (dict(name="hinge", delta=0.0), r"delta=0\.0 must be > 0"),
    (dict(name="spin", link="cauchy"), r"link='cauchy' must be one of 'logistic', 'hinge'"),
    (dict(name="dpo_norm", label_smoothing=0.6), r"label_smoothing=0\.6 must be in"),
    (dict(name="discopop", tau=0.0), r"tau=0\.0 must be > 0"),
    (dict(name="discopop", link="sine"), r"link='sine' must be one of 'lrml', 'cell'"),
    (dict(name="f_dpo", divergence="tv"), r"divergence='tv' must be one of 'reverse_kl', 'forward_kl', 'js', 'alpha'"),
    (dict(name="f_dpo", alpha=0.0), r"alpha=0\.0 must be in \(0, 1\]"),
    (dict(name="dpo_nll", nll_weight=-1.0), r"nll_weight=-1\.0 must be >= 0"),
    (dict(name="dpo_nll", nll_reduction="mean"), r"nll_reduction='mean' must be one of 'seq', 'sum', 'batch'"),
    (dict(name="dpop", penalty=-1.0), r"penalty=-1\.0 must be >= 0"),
    (dict(name="r_dpo", alpha=-1.0), r"alpha=-1\.0 must be >= 0"),
    (dict(name="odpo", transform="root"), r"transform='root' must be one of 'log', 'identity'"),
    (dict(name="odpo", of="sum"), r"of='sum' must be one of 'difference', 'ratio'"),
    (dict(name="rebel", eta=0.0), r"eta=0\.0 must be > 0"),
    (dict(name="rebel", scale="mine"), r"scale='mine' must be one of"),
    (dict(name="rpo_reward", eta=-1.0), r"eta=-1\.0 must be > 0"),
    (dict(name="cal_dpo", calibration_weight=-1.0), r"calibration_weight=-1\.0 must be >= 0"),
    (dict(name="beta_dpo", rho=1.0), r"rho=1\.0 must be in \[0, 1\)"),
    (dict(name="beta_dpo", decay=1.0), r"decay=1\.0 must be in \[0, 1\)"),
    (dict(name="beta_dpo", alpha=-1.0), r"alpha=-1\.0 must be >= 0"),
    (dict(name="simpo", link="ipo"), r"link='ipo' must be one of 'logistic', 'hinge'"),
    (dict(name="simpo", link="hinge", label_smoothing=0.1), r"label_smoothing=0\.1 must be 0 with link='hinge'"),
    (dict(name="alphapo", gamma=-1.0), r"gamma=-1\.0 must be >= 0"),
    (dict(name="cpo", link="hinge"), r"link='hinge' must be one of 'logistic', 'ipo'"),
    (dict(name="orpo", odds_ratio_weight=-1.0), r"odds_ratio_weight=-1\.0 must be >= 0"),
    (dict(name="orpo", floor=1.0), r"floor=1\.0 must be in \[0, 1\)"),
    (dict(name="asft", odds_weight=-1.0), r"odds_weight=-1\.0 must be >= 0"),
    (dict(name="slic_hf", sft_target="both"), r"sft_target='both' must be one of 'chosen', 'separate'"),
    (dict(name="unlikelihood", alpha=2.0), r"alpha=2\.0 must be in \[0, 1\]"),
    (dict(name="sft", reduction="mean"), r"reduction='mean' must be one of 'batch', 'seq', 'sum'"),
    (dict(name="exo", target="first"), r"target='first' must be one of 'scores', 'pair'"),
    (dict(name="exo", eps=0.5), r"eps=0\.5 must be in \(0, 0\.5\)"),
    (dict(name="exo", log_eps=0.0), r"log_eps=0\.0 must be < 0, or None"),
    (dict(name="nca", score_temperature=0.0), r"score_temperature=0\.0 must be > 0"),
    (dict(name="info_nca", target="pair"), r"target='pair' must be one of 'scores', 'first'"),
    (dict(name="kto", desirable_weight=-1.0), r"desirable_weight=-1\.0 must be >= 0"),
    (dict(name="kto_pair", anchor="chosen"), r"anchor='chosen' must be one of 'other', 'rejected'"),
    (dict(name="bco", delta="zero"), r"delta='zero' must be one of 'running', 'paper'"),
    (dict(name="bco", max_density_ratio=0.1), r"max_density_ratio=0\.1 must be >= min_density_ratio"),
    (dict(name="bco_pair", delta="paper"), r"delta='paper' must be one of 'running', 'zero'"),
    (dict(name="ld_dpo", alpha=1.5), r"alpha=1\.5 must be in \[0, 1\]"),
    (dict(name="sampo", subset="none"), r"subset='none' must be one of 'shared', 'independent'"),
    (dict(name="wpo", clip_max=0.0), r"clip_max=0\.0 must be > 0, or None"),
    (dict(name="tdpo2", alpha=-1.0), r"alpha=-1\.0 must be >= 0"),
    (dict(name="mallows_dpo", c=0.0), r"c=0\.0 must be > 0"),
    (dict(name="mallows_ipo", form="book"), r"form='book' must be one of 'paper', 'rainbow'"),
    (dict(name="rainbow", mixing=2.0), r"mixing=2\.0 must be in \[0, 1\], or None"),
    (dict(name="rainbow", dispersion_mean=0.0), r"dispersion_mean=0\.0 must be > 0, or None"),
    (dict(name="rainbow", link="js"), r"link='js' must be one of 'logistic', 'ipo', 'cauchy'"),
    (dict(name="rainbow", length_normalization=1.0), r"length_normalization=1\.0 must be of type bool"),
    (dict(name="online_dpo", missing_eos_penalty=-1.0), r"missing_eos_penalty=-1\.0 must be >= 0"),
    (dict(name="d2po", link="hinge"), r"link='hinge' must be one of 'logistic', 'ipo'"),
    (dict(name="xpo", alpha=-1.0), r"alpha=-1\.0 must be >= 0"),
    (
        dict(name="pairwise", score="odds"),
        r"score='odds' must be one of 'logp', 'mean_logp', 'logratio', 'mean_logratio'",
    ),
    (dict(name="pairwise", link="exo"), r"link='exo' must be one of 'logistic', 'hinge', 'square'"),
    (dict(name="pairwise", margin_weight=-1.0), r"margin_weight=-1\.0 must be >= 0"),
    (
        dict(name="pairwise", score="logp", tail_weight=0.5),
        r"tail_weight=0\.5 must be 1 with a score of log-probs alone",
    ),
]


@pytest.mark.parametrize(("loss", "message"), REFUSED, ids=str)
def test_a_hyper_parameter_out_of_range_is_refused(loss, message):
    with pytest.raises(UserError, match=message):
        bind([loss])


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_temperature_must_be_positive(name):
    for key in {"beta", "eta"} & set(inspect.signature(OBJECTIVES[name].function).parameters):
        with pytest.raises(UserError, match=rf"loss '{name}': {key}=0\.0 must be > 0"):
            bind([{"name": name, key: 0.0}])


@pytest.mark.parametrize(
    ("loss", "scores", "said"),
    [
        (dict(name="odpo"), [[2.0, 1.0], [1.0, 1.0], [0.0, 3.0]], "2 of 3 examples have no margin whose log there is"),
        (dict(name="odpo"), [[2.0, 1.0]], None),
        (dict(name="odpo", transform="identity"), [[0.0, 3.0]], None),
        (dict(name="odpo", of="ratio"), [[2.0, 1.0], [-1.0, 1.0]], "1 of 2 examples have scores <= 0"),
        (dict(name="odpo", of="ratio", transform="identity"), [[1.0, 2.0]], None),
        (dict(name="sppo"), [[0.0, 1.0], [0.5, 1.5]], r"1 of 2 examples have scores outside \[0, 1\]"),
        (dict(name="sppo"), [[0.0, 1.0]], None),
        (dict(name="nash_md"), [[-0.1]], r"1 of 1 examples have scores outside \[0, 1\]"),
    ],
    ids=str,
)
def test_scores_of_which_an_objective_can_make_nothing_are_named(loss, scores, said):
    arguments = dict(loss)
    found = OBJECTIVES[arguments.pop("name")].refuses(np.array(scores), **arguments)
    assert found is None if said is None else re.match(said, found)
