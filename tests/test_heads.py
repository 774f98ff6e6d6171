"""Which form of the head an update takes, and that all of them are the same update."""

import numpy as np
import pytest

from daajax import heads
from daajax.errors import UserError
from daajax.losses.terms import bind
from tests import worlds
from tests.test_scoring import ARCHITECTURE, scorer_of

DPO, KTO, WPO, TDPO = ([dict(name=name)] for name in ("dpo", "kto", "wpo", "tdpo2"))
SLOW = pytest.mark.slow


def chosen(losses=DPO, asked="auto", **given):
    options = dict(is_trained=True, balances=False, micro_batches=1, scored=1000) | given
    return heads.choose(asked, bind(losses), scorer_of(*options.pop("sizes", (8, 1, 1))), **options)


@pytest.mark.parametrize(
    ("losses", "given", "form", "products", "why"),
    [
        (DPO, {}, "row", 3, "the loss takes each row by itself, and a row's logits, 0.00012 GiB on a device, are held"),
        (DPO, dict(micro_batches=4), "row", 3, "the loss takes each row by itself"),
        (DPO, dict(is_trained=False), "frozen", 2, "the vocabulary projection is not trained"),
        (KTO, {}, "token", 4, "loss 'kto' couples the examples of an update"),
        (KTO, dict(micro_batches=4), "token", 5, "loss 'kto' couples the examples of an update"),
        (KTO, dict(is_trained=False), "frozen", 2, "the vocabulary projection is not trained"),
        (DPO, dict(balances=True), "row", 3, "the loss takes each row by itself"),
        (DPO, dict(balances=True, micro_batches=2), "token", 5, "experts are balanced over several micro_batches"),
        # 8,388,608 tokens of 32 logits of 4 bytes are 1 GiB, and one slot more is more.
        (DPO, dict(scored=8388608), "row", 3, "1 GiB on a device"),
        (DPO, dict(scored=8388609), "token", 4, "a row's logits, 1 GiB on a device, are more than 1"),
        (DPO, dict(scored=2 * 8388608, sizes=(2, 2, 2)), "row", 3, "1 GiB on a device"),
        # On an accelerator, short rows would wait for the projection to be read.
        (DPO, dict(scored=255), "token", 4, "rows of 255 scored tokens are too short to be taken one by one"),
        (DPO, dict(scored=256), "row", 3, "the loss takes each row by itself"),
        # Two statistics are two directions beside the logits, or one gradient of both.
        (WPO, dict(is_trained=False), "row", 2, "the loss takes each row by itself"),
        (WPO, dict(is_trained=False, scored=8388609), "frozen", 3, "is not trained"),
    ],
    ids=str,
)
def test_the_form_with_the_fewest_products_that_fits_is_taken(losses, given, form, products, why):
    choice = chosen(losses, **given)
    assert choice[:2] == (form, products)
    assert choice.of_reference == 0
    assert why in choice.why


@pytest.mark.parametrize(
    ("losses", "given", "form", "of_reference"),
    [
        (DPO, dict(is_live=True), "row", 1),  # for its log-probs
        (KTO, dict(is_live=True, micro_batches=4), "token", 1),  # once for both passes
        (TDPO, dict(is_live=True), "row", 3),  # and for the divergence, forward and backward
        (TDPO, dict(is_live=True, is_trained=False, scored=8388609), "frozen", 2),
    ],
    ids=str,
)
def test_products_with_the_projection_of_a_live_reference_are_counted_apart(losses, given, form, of_reference):
    choice = chosen(losses, **given)
    assert (choice.form, choice.of_reference) == (form, of_reference)
    assert f"and {of_reference} of its reference" in choice.report()


@pytest.mark.parametrize(
    ("losses", "asked", "given", "message"),
    [
        (DPO, "frozen", {}, "head='frozen' does not do: the vocabulary projection is trained; set --config.head=auto."),
        (KTO, "row", {}, "head='row' does not do: loss 'kto' couples the examples of an update; set"),
        (DPO, "row", dict(balances=True, micro_batches=2), "experts are balanced over several micro_batches"),
    ],
    ids=str,
)
def test_a_form_that_does_not_do_is_refused(losses, asked, given, message):
    with pytest.raises(UserError) as error:
        chosen(losses, asked, **given)
    assert message in str(error.value)


def test_a_form_that_is_asked_for_is_taken_though_another_makes_fewer_products():
    assert chosen(DPO, "token") == ("token", 4, "it is asked for", 0)
    assert chosen(DPO, "row", scored=8388609) == ("row", 3, "it is asked for", 0)
    assert ARCHITECTURE.vocab_size == 32  # what the sizes above are counted with


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return worlds.make_world(tmp_path_factory.mktemp("heads"))


TIED = {"token": "4 products", "row": "3 products"}
ADAPTERS = {"token": "3 products", "row": "2 products", "frozen": "2 products"}


@pytest.mark.parametrize(
    ("arguments", "forms", "devices"),
    [
        ((), TIED, 1),
        pytest.param(
            ("--config.mesh.tensor=2", "--config.mesh.data=2", "--config.micro_batches=2"), TIED, 8, marks=SLOW
        ),
        pytest.param(("--config.lora.rank=2",), ADAPTERS, 1, marks=SLOW),
        pytest.param(("--config.lora.rank=2", "--config.lora.modules_to_save=('embed_tokens',)"), TIED, 1, marks=SLOW),
        pytest.param(("--config.loss={'name': 'tdpo2'}", "--config.mesh.tensor=2"), TIED, 2, marks=SLOW),
    ],
    ids=str,
)
def test_a_run_says_its_form_and_every_form_gives_the_same_run(world, tmp_path, capsys, arguments, forms, devices):
    histories = []
    for form, products in forms.items():
        given = [*world.flags, "--config.steps=3", "--config.model.dtype=float32", f"--config.head={form}"]
        histories.append(worlds.train(tmp_path / form, *given, *arguments, devices=devices))
        assert f"head: {form}, {products} of the vocabulary's size an update" in capsys.readouterr().out
    for history in histories[1:]:
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            one, other = (worlds.column(h, name) for h in (histories[0], history))
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
