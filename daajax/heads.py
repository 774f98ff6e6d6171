"""Which form of the head an update takes (`daajax.ops.head`): by what is trained, what the loss couples, what fits."""

from collections.abc import Sequence
from typing import NamedTuple

from daajax.errors import UserError
from daajax.losses.terms import Needs, Term
from daajax.ops.row_head import row_bytes
from daajax.scoring import Scorer
from daajax.sharding import MeshDevices

FORMS = ("frozen", "row", "token")
ROW_BYTES = 2**30  # logits of a row that are worth holding, each device's part of them
# Each row reads the projection twice, in 2 bytes, and its gradient once and back, in 4: with fewer scored slots an H200
# of 4.8 TB/s and 790 TFLOP/s waits longer for them than a fourth product over several rows takes. By arithmetic.
ROW_SLOTS = 256


class Choice(NamedTuple):
    """The form of a head, and the reason.

    Attributes:
        form: One of `FORMS`.
        products: Matrix products of scored tokens × vocabulary × hidden features that an update makes.
        why: In words.
        of_reference: Further ones, with the projection of a reference whose model is there.
    """

    form: str
    products: int
    why: str
    of_reference: int = 0

    def report(self) -> str:
        """A readable line."""
        further = f" and {self.of_reference} of its reference" if self.of_reference else ""
        return f"{self.form}, {self.products} products of the vocabulary's size an update{further}: {self.why}"


def choose(
    asked: str,
    terms: Sequence[Term],
    scorer: Scorer,
    *,
    is_trained: bool,
    is_live: bool = False,
    balances: bool,
    micro_batches: int,
    scored: int,
) -> Choice:
    """The form that makes the fewest products, or the one that is asked for.

    Args:
        asked: One of `FORMS`, or auto.
        terms: The loss.
        scorer: The policy's.
        is_trained: Whether the vocabulary projection is.
        is_live: Whether the reference is scored in the update.
        balances: Whether a loss that balances experts is added.
        micro_batches: Parts an update is computed in.
        scored: Scored slots of a row.

    Raises:
        UserError: If the form that is asked for does not do.
    """
    needs, vocab = Needs.of(terms), scorer.model.architecture.vocab_size
    statistics = len(needs.statistics)
    logits = row_bytes(scored, vocab, MeshDevices(scorer.mesh).parts("vocab"))
    size = f"a row's logits, {logits / 2**30:.2g} GiB on a device,"
    parts = MeshDevices(scorer.mesh).parts("length")
    coupled = [f"loss {term.name!r} couples the examples of an update" for term in terms if term.objective.coupled]
    if balances and micro_batches > 1:
        coupled.append("experts are balanced over several micro_batches")
    # A first pass makes logits as well where examples of several parts are coupled. A reference makes them for its
    # log-probs, once, and where whole distributions are compared again in each pass of the head.
    twice, compares = int(bool(coupled) and micro_batches > 1), int(bool(needs.live))
    once, both = (int(is_live) + compares * (passes + twice) + twice * compares for passes in (1, 2))
    choices = {
        "frozen": Choice("frozen", 1 + statistics + twice, "the vocabulary projection is not trained", once),
        "row": Choice("row", 2 + is_trained, f"the loss takes each row by itself, and {size} are held", both),
        "token": Choice("token", 3 + is_trained + twice, "it serves every loss and every size", both),
    }
    refused = {"frozen": "the vocabulary projection is trained" if is_trained else "", "row": "; ".join(coupled)}
    if parts > 1:
        refused["row"] = refused["row"] or f"no device has a whole row, mesh.context={parts} cuts each"
    if asked != "auto":
        if why := refused.get(asked):
            raise UserError(f"head={asked!r} does not do: {why}; set --config.head=auto.")
        return choices[asked]._replace(why="it is asked for")
    if logits > ROW_BYTES:
        refused["row"] = refused["row"] or f"{size} are more than {ROW_BYTES / 2**30:g}"
    if scored < ROW_SLOTS:
        refused["row"] = refused["row"] or f"rows of {scored} scored tokens are too short to be taken one by one"
    possible = [choice for form, choice in choices.items() if not refused.get(form)]
    best = min(possible, key=lambda choice: choice.products + choice.of_reference)  # of as many products, the first
    return best._replace(why=refused["row"]) if best.form == "token" and refused["row"] else best
