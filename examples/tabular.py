"""A table of probabilities in place of a language model, and data that hold every outcome with its probability.

Each of a few prompts has the same number of responses, with a reward and a probability under the reference; the policy
has a logit for each.
"""

from itertools import permutations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from numpy import ndarray

from daajax.loss import Counts, Sums, loss_of
from daajax.losses.terms import bind

Table = Float[ndarray, "prompts responses"]
Preference = Float[ndarray, "prompts responses responses"]  # how probably the first is preferred to the second

STEPS = 4000
ADAM = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))


class Data(NamedTuple):
    """Examples: which prompt, which of its responses (best first), how probable, and wanted (1) or not (0)."""

    prompts: Int[ndarray, " examples"]
    responses: Int[ndarray, "examples K"]
    weights: Float[ndarray, " examples"]
    labels: Int[ndarray, " examples"] | None = None


def bradley_terry(reward: Table) -> Preference:
    """σ(reward of the first - reward of the second)."""
    return 1 / (1 + np.exp(reward[:, None, :] - reward[:, :, None]))


def pairs(reference: Table, preference: Preference) -> Data:
    """All pairs of responses drawn from the reference."""
    x, chosen, rejected = np.nonzero(~np.eye(reference.shape[1], dtype=bool) & (preference > 0))
    weights = reference[x, chosen] * reference[x, rejected] * preference[x, chosen, rejected]
    return Data(x, np.stack([chosen, rejected], axis=1), weights)


def rankings(reward: Table) -> Data:
    """All rankings of all responses: the best of those left is drawn with probability ∝ exp(reward), until none is."""
    orders = np.array(list(permutations(range(reward.shape[1]))))
    strengths = np.exp(reward)[:, orders]
    left = np.flip(np.cumsum(np.flip(strengths, -1), -1), -1)
    x = np.repeat(np.arange(len(reward)), len(orders))
    return Data(x, np.tile(orders, (len(reward), 1)), (strengths / left).prod(axis=-1).ravel())


def labelled(reference: Table, wanted: Table) -> Data:
    """Responses drawn from the reference, wanted with these probabilities; beside each another, the mismatched one."""
    x, y, label = (index.ravel() for index in np.indices((*reference.shape, 2)))
    weights = reference[x, y] * np.where(label == 1, wanted[x, y], 1 - wanted[x, y])
    return Data(x, np.stack([y, (y + 1) % reference.shape[1]], axis=1), weights, label)


def train(
    reference: Table,
    data: Data,
    loss: dict[str, Any],
    *,
    optimizer: optax.GradientTransformation = ADAM,
    steps: int = STEPS,
) -> Table:
    """The policy that begins as the reference and is trained on all examples at once, in float64.

    Args:
        reference: Probabilities.
        data: What it is trained on; weights multiply the examples' losses.
        loss: An objective's name and hyper-parameters, as in `config.loss`.
        optimizer: The default ends where the gradient vanishes.
        steps: Updates.
    """
    with jax.enable_x64(True):
        terms, where, log_reference = bind([loss]), (data.prompts[:, None], data.responses), jnp.log(reference)
        examples = {"weights": data.weights, "places": np.arange(len(data.weights)), "lengths": 0 * data.responses + 1}
        examples = jax.tree.map(jnp.asarray, examples if data.labels is None else examples | {"labels": data.labels})

        def loss_at(logits: jax.Array) -> jax.Array:
            logps = jax.nn.log_softmax(logits)
            sums = Sums(logps[where], (logps - log_reference)[where])
            return loss_of(sums, examples, terms, Counts.of(examples), {})[0]

        def update(state: Any, _: None) -> tuple[Any, None]:
            logits, moments = state
            updates, moments = optimizer.update(jax.grad(loss_at)(logits), moments)
            return (optax.apply_updates(logits, updates), moments), None

        run = jax.jit(lambda state: jax.lax.scan(update, state, length=steps)[0])
        return np.asarray(jax.nn.softmax(run((log_reference, optimizer.init(log_reference)))[0]))
