"""Terms of a loss: what `bind` makes of a config, and what it refuses."""

import math

import numpy as np
import pytest

from daajax.errors import UserError
from daajax.losses.objectives import dpo
from daajax.losses.terms import bind
from tests.losses.worlds import random_responses


def test_terms_carry_name_weight_and_hyperparameters():
    first, second = bind([dict(name="dpo", beta=0.5), dict(name="sft", weight=2)])
    assert (first.name, first.weight, second.name, second.weight) == ("dpo", 1.0, "sft", 2.0)
    responses = random_responses()
    np.testing.assert_array_equal(first.loss(responses).losses, dpo(responses, beta=0.5).losses)


def test_a_whole_number_is_a_number_too():
    (term,) = bind([dict(name="dpo", beta=1)])
    responses = random_responses()
    np.testing.assert_array_equal(term.loss(responses).losses, dpo(responses, beta=1.0).losses)


@pytest.mark.parametrize("name", ["dpo", "ipo", "ipo_mean"])
def test_an_objective_that_compares_with_a_reference_says_that_there_is_none(name):
    (term,) = bind([dict(name=name)])
    with pytest.raises(ValueError, match="there is no reference"):
        term.loss(random_responses()._replace(log_ratios=None))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (dict(name="dpoo"), r"loss\.name='dpoo' is unknown; there are .*dpo, .*simpo"),
        (dict(beta=0.1), r"loss\.name=None is unknown"),
        (dict(name="dpo", gamma=1.0), r"loss 'dpo' takes \['beta', 'label_smoothing'\], not \['gamma'\]"),
        (dict(name="sft", beta=0.1), r"loss 'sft' takes \['reduction'\], not \['beta'\]"),
        (dict(name="dpo", responses=0.1), r"loss 'dpo' takes .*not \['responses'\]"),
        (dict(name="dpo", beta=0.0), r"loss 'dpo': beta=0\.0 must be > 0"),
        (dict(name="dpo", beta=-1.0), r"loss 'dpo': beta=-1\.0 must be > 0"),
        (dict(name="dpo", beta=math.nan), r"loss 'dpo': beta=nan must be"),
        (dict(name="dpo", label_smoothing=0.5), r"label_smoothing=0\.5 must be in \[0, 0\.5\)"),
        (dict(name="dpo", label_smoothing=-0.1), r"label_smoothing=-0\.1 must be in \[0, 0\.5\)"),
        (dict(name="ipo", beta=0.0), r"loss 'ipo': beta=0\.0 must be > 0"),
        (dict(name="ipo_mean", beta=0.0), r"loss 'ipo_mean': beta=0\.0 must be > 0"),
        (dict(name="simpo", beta=0.0), r"loss 'simpo': beta=0\.0 must be > 0"),
        (dict(name="simpo", gamma=-0.1), r"loss 'simpo': gamma=-0\.1 must be >= 0"),
        (dict(name="simpo", label_smoothing=0.7), r"label_smoothing=0\.7 must be in \[0, 0\.5\)"),
        (dict(name="dpo", beta="0.1"), r"loss 'dpo': beta='0\.1' must be a finite number"),
        (dict(name="dpo", beta=True), r"loss 'dpo': beta=True must be a finite number"),
        (dict(name="dpo", beta=None), r"loss 'dpo': beta=None must be a finite number"),
        (dict(name="dpo", weight="heavy"), r"loss 'dpo': weight='heavy' must be a finite number"),
        (dict(name="spin", link=1.0), r"loss 'spin': link=1\.0 must be of type str"),
        (dict(name="wpo", clip_max="1"), r"loss 'wpo': clip_max='1' must be a finite number"),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_is_refused_before_anything_is_compiled(loss, message):
    with pytest.raises(UserError, match=message) as error:
        bind([loss])
    assert "\n" not in str(error.value)
