"""How much arithmetic an update takes: the least that it could, and what the hardware is asked for.

A multiplication and an addition are 2 FLOPs. The least is that of the pairs alone: every token once, prompts once for
all their responses, attention between exactly the tokens that see each other, logits of scored tokens, nothing computed
twice. For prompts of P, chosen of C and rejected responses of R tokens, N weights in the matrices of the layers,
vocabulary V, width D, L layers of H heads of d features, and where every response token is scored, it comes to

    f · [2 N (P + C + R) + 2 V D (C + R)] + 12 L H d A,  A = P² / 2 + P (C + R) + (C² + R²) / 2

with f = 3 passes of each matrix (forward, gradient of its input, gradient of itself), f = 2 where it is frozen.
Attention has no weights: its backward pass takes twice the products of the forward pass whatever is frozen. A is the
area under the diagonal: a query's own key counts half. Under a window of w tokens no query sees more than w. Of a
mixture of experts the router and the experts that a token is sent to count. Embeddings are looked up; norms, biases,
adapters (2 · rank · (inputs + outputs) a token, projection and pass) and the optimizer are left out of all counts.

From the least to what the hardware is asked for there are four steps, each with a factor, least over asked for:

- `head`: products that its form makes beyond the least, such as logits again in the backward pass (`daajax.heads`);
- `remat`: what else is computed again: what `daajax.models.remat` says, the scores of attention where its backward pass
  makes them again (`KERNELS`), and a first pass over all micro-batches where an objective needs one;
- `sharing`: prompts once a response, where prefix sharing is off, or an attention that knows none does so;
- `packing`: row positions and visited scored slots that are empty, and keys that attention visits and masks.

A factor says what its step adds to those before it, so that their product is exactly the least over all. What is asked
for is counted product by product but for the blocks of attention, which are averages, and for the blocks of experts,
which are left out; with rows of several lengths, it is what the head of the longest asks for. A new attention is a line
in `KERNELS`.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from daajax.data.packing import Plan
from daajax.heads import Choice
from daajax.models.architecture import Architecture
from daajax.models.lora import Lora
from daajax.models.parameters import layer_parameters
from daajax.models.remat import PROJECTIONS, REMAT, recomputed
from daajax.ops.blockwise import KEY_BLOCK, QUERY_BLOCK
from daajax.ops.logits import CHUNK
from daajax.ops.slots import chunk_slots

STEPS = ("head", "remat", "sharing", "packing")


class Kernel(NamedTuple):
    """What an attention computes beyond the pairs that see each other.

    Attributes:
        blocks: Queries and keys that are multiplied at once; None: all of a row with all of it.
        again: Products that its backward pass makes beyond four, such as the scores once more; the forward makes two.
        by_jax: Whether JAX differentiates it: what is computed again for its output then serves its backward pass too.
        prompts_each: Whether a prompt attends once for each of its responses.
    """

    blocks: tuple[int, int] | None
    again: int
    by_jax: bool = False
    prompts_each: bool = False


KERNELS = {  # by `daajax.attention.ATTENTION`; blocks of splash as in `daajax.ops.splash`, whose import takes a second
    "splash": Kernel((512, 512), 3),  # a kernel for queries, one for keys: both make scores and weights
    "cudnn": Kernel((128, 128), 1, prompts_each=True),  # tiles of FlashAttention for heads of 128 features
    "blockwise": Kernel((QUERY_BLOCK, KEY_BLOCK), 1),
    "dense": Kernel(None, 1, by_jax=True),
}


class Work(NamedTuple):
    """What arithmetic is proportional to: of examples, or of updates.

    Attributes:
        tokens: Positions that pass through the layers.
        scored: Tokens whose logits are made.
        pairs: Queries and the keys that they see, summed over the layers.
    """

    tokens: Float[np.ndarray, " any"]
    scored: Float[np.ndarray, " any"]
    pairs: Float[np.ndarray, " any"]

    def flops(self, price: "Price") -> Float[np.ndarray, " any"]:
        """FLOPs at a price."""
        return price.token * self.tokens + price.scored * self.scored + price.pair * self.pairs


class Price(NamedTuple):
    """FLOPs of one token in all layers, of one scored token in the head, of one pair in one layer."""

    token: float
    scored: float
    pair: float

    def plus(self, other: "Price") -> "Price":
        """The price of both."""
        return Price(*(one + more for one, more in zip(self, other, strict=True)))


def work_of(
    lengths: Int[np.ndarray, "examples parts"],
    scored: Int[np.ndarray, " examples"],
    architecture: Architecture,
    *,
    prefix_sharing: bool = True,
) -> Work:
    """The work of examples, each by itself.

    Args:
        lengths: Tokens of the shared prompt, then of each response; 0: there is no such response.
        scored: Tokens with a log-prob.
        architecture: Of the model, whose layers may have windows.
        prefix_sharing: Whether the prompt is computed once for all responses; else once for each.
    """
    prompt, responses = lengths[:, :1].astype(np.float64), lengths[:, 1:].astype(np.float64)
    there = responses > 0
    prompts = 1 if prefix_sharing else there.sum(axis=1)
    pairs = np.zeros(len(lengths))
    for window, layers in collections.Counter(_windows(architecture)).items():
        before = _seen(prompt, window)
        own = np.where(there, _seen(prompt + responses, window) - before, 0)
        pairs += layers * (own.sum(axis=1) + prompts * before[:, 0])
    return Work(prompts * prompt[:, 0] + responses.sum(axis=1), scored.astype(np.float64), pairs)


def _windows(architecture: Architecture) -> list[int | None]:
    """The window of every layer."""
    kinds = architecture.kind_of or (0,) * architecture.num_hidden_layers
    return [architecture.kinds[kind].sliding_window for kind in kinds]


def _seen(count: Float[np.ndarray, "*any"], window: int | None) -> Float[np.ndarray, "*any"]:
    """Keys that the first so many tokens of a sequence see, each its own one by half."""
    inside = count if window is None else np.minimum(count, window)
    return inside**2 / 2 + (count - inside) * (0 if window is None else window)


def products(architecture: Architecture) -> dict[str, float]:
    """FLOPs of one token in each matrix of a layer, forward; of experts in those that it is sent to."""
    found = {}
    for name, parameter in layer_parameters(architecture).items():
        size = 2.0 * math.prod(parameter.shape)
        if len(parameter.shape) == 2:
            found[name] = size
        elif len(parameter.shape) == 3 and architecture.experts is not None:
            experts = architecture.experts
            found[f"experts/{name}"] = size * experts.num_experts_per_tok / experts.num_experts
    return found


def forward(architecture: Architecture) -> Price:
    """The price of the forward pass."""
    a = architecture
    layers = a.num_hidden_layers * sum(products(a).values())
    return Price(layers, 2.0 * a.vocab_size * a.hidden_size, 4.0 * a.num_attention_heads * a.head_dim)


def least(architecture: Architecture, lora: Lora | None = None) -> Price:
    """The least price of forward and backward pass.

    Args:
        architecture: Of the policy.
        lora: What of it is trained; None: all of it.
    """
    once = forward(architecture)
    passes = {name: 2 + _is_trained(name, lora) for name in products(architecture)}
    layers = sum(passes[name] * value for name, value in products(architecture).items())
    head = 2 + _head_is_trained(architecture, lora)
    return Price(architecture.num_hidden_layers * layers, head * once.scored, 3 * once.pair)


def _is_trained(name: str, lora: Lora | None) -> bool:
    return lora is None or lora.trains(name)


def _head_is_trained(architecture: Architecture, lora: Lora | None) -> bool:
    return _is_trained(architecture.projection, lora)


def head_again(architecture: Architecture, products: int, lora: Lora | None = None) -> Price:
    """What a form of the head costs beyond the least.

    Args:
        architecture: Of the policy.
        products: That it makes, forward and backward (`daajax.heads.Choice`).
        lora: What of it is trained; None: all of it.

    Raises:
        ValueError: If they are fewer than the least.
    """
    needed = 2 + _head_is_trained(architecture, lora)
    if products < needed:
        raise ValueError(f"a head of {products} products lacks a gradient: it takes {needed}")
    return Price(0.0, (products - needed) * forward(architecture).scored, 0.0)


def computed_again(architecture: Architecture, remat: str, attention: str, *, two_passes: bool = False) -> Price:
    """What else is computed again.

    Args:
        architecture: Of the policy.
        remat: Key of `daajax.models.remat.REMAT`.
        attention: Key of `KERNELS`.
        two_passes: Whether a pass without gradient comes first.

    Raises:
        ValueError: If there is no such policy or attention.
    """
    a, once, of_layer = architecture, forward(architecture), products(architecture)
    _known(REMAT, remat, "policy of rematerialization")
    again = recomputed(remat, architecture)
    names = [name for name in of_layer if PROJECTIONS[name.removeprefix("experts/")] in again]
    pair = once.pair * ("attention" in again)
    kernel = _known(KERNELS, attention, "attention")
    if not (kernel.by_jax and pair):
        pair += once.pair / 2 * kernel.again
    price = Price(a.num_hidden_layers * sum(of_layer[name] for name in names), 0.0, pair)
    return price.plus(once) if two_passes else price


def _known(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"the arithmetic of {what} {name!r} is unknown; there are {', '.join(table)}")
    return table[name]


class Counts(NamedTuple):
    """FLOPs of all updates before each one, and of all of them at the end.

    Attributes:
        least: The least.
        steps: What it is after each of `STEPS`; the last is what the hardware is asked for.
    """

    least: Float[np.ndarray, " updates_and_one"]
    steps: dict[str, Float[np.ndarray, " updates_and_one"]]

    def factors(self, first: int, last: int) -> dict[str, float]:
        """Of the updates from `first` to below `last`: each step's factor, at most 1."""
        found, before = {}, self.least
        for name in STEPS:
            after = self.steps[name]
            found[name] = float((before[last] - before[first]) / (after[last] - after[first]))
            before = after
        return found


def of_plan(
    plan: Plan,
    lengths: Int[np.ndarray, "examples parts"],
    scored: Int[np.ndarray, " examples"],
    architecture: Architecture,
    *,
    remat: str,
    attention: str,
    head: Choice,
    is_vocabulary_cut: bool = False,
    lora: Lora | None = None,
    live: Architecture | None = None,
    two_passes: bool = False,
    parts: int = 1,
) -> Counts:
    """Counts of every update of a plan, on all devices together.

    Args:
        plan: Of the run.
        lengths: See `work_of`.
        scored: Likewise.
        architecture: Of the policy.
        remat: See `computed_again`.
        attention: Likewise.
        head: The form of the head.
        is_vocabulary_cut: Whether devices meet in every chunk of the head, and so visit as many each.
        lora: What of the policy is trained; None: all of it.
        live: Of a reference that is scored in the update; None: none is.
        two_passes: See `computed_again`.
        parts: Devices that rows are sharded over; each visits its own scored slots in whole chunks.
    """
    a, kernel = architecture, _known(KERNELS, attention, "attention")
    policy = [least(a, lora)]
    policy.append(policy[-1].plus(head_again(a, head.products - two_passes, lora)))
    policy.append(policy[-1].plus(computed_again(a, remat, attention, two_passes=two_passes)))
    models = [(a, policy)]
    if live is not None:
        models.append((live, _of_reference(live, head, twice=two_passes)))
    visited = _visited(plan, scored, parts, by_row=head.form == "row", is_vocabulary_cut=is_vocabulary_cut)
    totals = np.zeros((1 + len(STEPS), plan.updates))
    for model, prices in models:
        shared, each = (
            _by_update(plan, work_of(lengths, scored, model, prefix_sharing=sharing)) for sharing in (True, False)
        )
        laid_out = shared if plan.prefix_sharing else each
        attended = each if kernel.prompts_each else laid_out
        laid_out = laid_out._replace(pairs=attended.pairs)
        padded = _padded(plan, attended, visited, len(_windows(model)), kernel)
        for step, price in enumerate(prices):
            totals[step] += shared.flops(price)
        totals[3] += laid_out.flops(prices[-1])
        totals[4] += padded.flops(prices[-1])
    sums = np.concatenate([np.zeros((len(totals), 1)), np.cumsum(totals, axis=1)], axis=1)
    return Counts(sums[0], dict(zip(STEPS, sums[1:], strict=True)))


def _of_reference(live: Architecture, head: Choice, *, twice: bool) -> list[Price]:
    """The price of scoring a reference in the update: the least, with its head's further products, with all passes.

    It is scored once, and in each of two passes where its whole distributions are read.
    """
    once = forward(live)
    compares = head.of_reference > 1
    heads = once._replace(scored=head.of_reference * once.scored)
    again = Price(once.token, 0.0, once.pair)
    return [once, heads, heads.plus(again) if twice and compares else heads]


def _by_update(plan: Plan, work: Work) -> Work:
    return Work(*(np.where(plan.windows >= 0, values[plan.windows], 0).sum(axis=1) for values in work))


def _visited(
    plan: Plan, scored: Int[np.ndarray, " examples"], parts: int, *, by_row: bool, is_vocabulary_cut: bool = False
) -> Float[np.ndarray, " updates"]:
    """Scored slots that the head visits, in whole chunks: of each row, or of a device's up to the fullest's last.

    Where rows are cut, each part is taken to have as many.
    """
    real = plan.windows >= 0
    rows = np.zeros((plan.updates, plan.micro_batches * plan.rows), np.int64)
    np.add.at(rows, (np.nonzero(real)[0], plan.row_of[real]), scored[plan.windows[real]])
    room = np.array([plan.shape(update).scored for update in range(plan.updates)])
    together = 1 if by_row else plan.rows // parts
    size = np.array([chunk_slots(slots // plan.parts, together, CHUNK) for slots in room.tolist()])
    size = size[:, None, None, None]
    # By update, micro-batch, device, and rows that are taken one after another.
    last = rows.reshape(plan.updates, plan.micro_batches, parts, -1, together).max(axis=4) / plan.parts
    if is_vocabulary_cut:
        last = np.broadcast_to(last.max(axis=2, keepdims=True), last.shape)
    return (np.ceil(last / size) * size * together * plan.parts).sum(axis=(1, 2, 3))


def _padded(plan: Plan, work: Work, visited: np.ndarray, layers: int, kernel: Kernel) -> Work:
    """The work of whole rows.

    A query of a block sees half a block more than the rule lets it, on average, for the queries beside it, and half a
    block of keys, because blocks are whole.
    """
    rows = plan.micro_batches * plan.rows
    length = np.array([plan.shape(update).length for update in range(plan.updates)], np.float64)
    if kernel.blocks is None:
        pairs = layers * rows * length**2
    else:
        pairs = work.pairs + layers * work.tokens * sum(kernel.blocks) / 2
    return Work(rows * length, visited, pairs)
