"""From the arrays of a golden case to what the loss of an update is computed from.

A layout has the numbers of a case, float64, and a function that makes `Sums` and examples of them. Float32 sees them as
an update does: log-ratios are subtracted before they are rounded. Inputs that gradients are taken of are variables;
each is a change of its input, and zero.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from daajax.loss import Sums, sums_of
from daajax.losses.terms import Needs
from daajax.ops.devices import ONE_DEVICE
from daajax.ops.head import token_statistics
from daajax.ops.logits import Head
from daajax.ops.statistics import STATISTICS, Distributions, Normalizer

SIDES = ("chosen", "rejected")
Arrays = Mapping[str, Array]


class Layout(NamedTuple):
    """What the loss of a case is computed from.

    Attributes:
        numbers: What float32 rounds.
        examples: What does not change with the dtype: `lengths` `[n, K]`, and fields of `Responses`.
        variables: Shapes of the inputs that gradients are taken of.
        sums: From numbers, changes of the variables, lengths and what the terms need, to sums.
    """

    numbers: dict[str, np.ndarray]
    examples: dict[str, np.ndarray]
    variables: dict[str, tuple[int, ...]]
    sums: Callable[[Arrays, Arrays, Needs], Sums]

    def with_numbers(self, **numbers: np.ndarray) -> "Layout":
        """With further numbers; those named like a field of `Responses` go there."""
        return self._replace(numbers=self.numbers | numbers)

    def with_examples(self, **examples: np.ndarray) -> "Layout":
        """With further numbers that are not rounding's business, such as who won."""
        return self._replace(examples=self.examples | examples)

    def with_further(self, **sums: np.ndarray) -> "Layout":
        """With further sums `[n, K]`, by key of `daajax.losses.sums.SUMS`."""

        def made(numbers: Arrays, changes: Arrays, needs: Needs) -> Sums:
            return self.sums(numbers, changes, needs)._replace(further={name: numbers[name] for name in sums})

        return self._replace(numbers=self.numbers | sums, sums=made)

    def with_variables(self, of_logps: Sequence[str], **of_further: Sequence[str]) -> "Layout":
        """With one more variable `[n]` for each response's log-prob, and for further sums."""
        n = len(self.examples["lengths"])

        def made(numbers: Arrays, changes: Arrays, needs: Needs) -> Sums:
            def change(names: Sequence[str]) -> Array:
                return jnp.stack([changes[name] for name in names], axis=1)

            sums, further = self.sums(numbers, changes, needs), change(of_logps)
            return Sums(
                sums.logps + further,
                sums.log_ratios + further,
                {name: x + change(of_further[name]) if name in of_further else x for name, x in sums.further.items()},
            )

        names = [*of_logps, *itertools.chain.from_iterable(of_further.values())]
        return self._replace(variables=self.variables | dict.fromkeys(names, (n,)), sums=made)


def columns(
    inputs: Mapping[str, np.ndarray],
    policy: Sequence[str],
    reference: Sequence[str] | None,
    lengths: Sequence[str] = (),
) -> Layout:
    """One array `[n]` of log-probs for each response.

    Args:
        inputs: The case's.
        policy: Names of the policy's arrays.
        reference: Names of the reference's; None, or names of which there are none: no reference, zero log-probs.
        lengths: Names of lengths; where there are none every response has one token.
    """
    logps = np.stack([inputs[name] for name in policy], axis=1)
    of_reference = np.zeros_like(logps)
    if reference is not None and set(reference) <= set(inputs):
        of_reference = np.stack([inputs[name] for name in reference], axis=1)

    def sums(numbers: Arrays, changes: Arrays, needs: Needs) -> Sums:
        del needs
        change = jnp.stack([changes[name] for name in policy], axis=1)
        return Sums(numbers["logps"] + change, numbers["log_ratios"] + change)

    given = (
        np.stack([inputs[name] for name in lengths], axis=1)
        if lengths and set(lengths) <= set(inputs)
        else np.ones(logps.shape)
    )
    return Layout(
        {"logps": logps, "log_ratios": logps - of_reference},
        {"lengths": given.astype(np.int32)},
        {name: (len(logps),) for name in policy},
        sums,
    )


def pairs(inputs: Mapping[str, np.ndarray], *, reference: bool = True, sides: Sequence[str] = SIDES) -> Layout:
    """Chosen and rejected, each an array `[n]`."""
    return columns(
        inputs,
        [f"policy_{side}_logps" for side in sides],
        [f"ref_{side}_logps" for side in sides] if reference else None,
        [f"{side}_lengths" for side in sides],
    )


def lists(inputs: Mapping[str, np.ndarray]) -> Layout:
    """Arrays `[n, K]`; behind `n_valid` responses there are none."""
    logps = inputs["policy_logps"]
    valid = inputs.get("n_valid", np.full(len(logps), logps.shape[1]))
    there = np.arange(logps.shape[1]) < valid[:, None]
    lengths = np.where(there, inputs.get("lengths", np.ones(logps.shape)), 0)

    def sums(numbers: Arrays, changes: Arrays, needs: Needs) -> Sums:
        del needs
        change = jnp.where(there, changes["policy_logps"], 0)
        return Sums(numbers["logps"] + change, numbers["log_ratios"] + change)

    layout = Layout(
        {"logps": np.where(there, logps, 0), "log_ratios": np.where(there, logps - inputs["ref_logps"], 0)},
        {"lengths": lengths.astype(np.int32)},
        {"policy_logps": logps.shape},
        sums,
    )
    return layout.with_numbers(scores=inputs["scores"]) if "scores" in inputs else layout


def slices(layout: Layout, first: int, last: int) -> Layout:
    """Some consecutive examples of a layout whose arrays all begin with the examples' axis."""
    return layout._replace(
        numbers={name: x[first:last] for name, x in layout.numbers.items()},
        examples={name: x[first:last] for name, x in layout.examples.items()},
        variables={name: (last - first, *shape[1:]) for name, shape in layout.variables.items()},
    )


def tokens(
    policy: np.ndarray,
    reference: np.ndarray,
    lengths: np.ndarray | None,
    variables: Mapping[str, tuple[int, ...]],
    change: Callable[[Arrays], Array],
    *,
    statistics: Mapping[str, np.ndarray] | None = None,
    draws: Mapping[str, np.ndarray] | None = None,
) -> Layout:
    """Log-probs of tokens, summed over each response as an update sums them.

    Args:
        policy: `[n, K, T]`.
        reference: `[n, K, T]`.
        lengths: `[n, K]`; None: every token counts.
        variables: Shapes of the inputs that gradients are taken of.
        change: From their changes to one of `policy`.
        statistics: Of the policy's distributions, `[n, K, T]` each.
        draws: Which tokens are kept, `[n, K, T]` each.
    """
    given = np.full(policy.shape[:2], policy.shape[2]) if lengths is None else lengths
    statistics, draws = statistics or {}, draws or {}

    def of(numbers: Arrays, changes: Arrays) -> dict[str, Array]:
        return {"logps": numbers["tokens"] + change(changes), **{name: numbers[name] for name in statistics}}

    return Layout(
        {"tokens": policy, "reference": reference, **statistics},
        {"lengths": given.astype(np.int32)},
        dict(variables),
        _of_tokens(given, of, draws),
    )


def token_pairs(inputs: Mapping[str, np.ndarray], **further: Mapping[str, np.ndarray]) -> Layout:
    """Chosen and rejected, each an array `[n, T]` of tokens' log-probs; their sums are variables too."""
    names = [f"policy_{side}_token_logps" for side in SIDES]
    policy = np.stack([inputs[name] for name in names], axis=1)
    layout = tokens(
        policy,
        np.stack([inputs[f"ref_{side}_token_logps"] for side in SIDES], axis=1),
        np.stack([inputs[f"{side}_lengths"] for side in SIDES], axis=1),
        dict.fromkeys(names, policy[:, 0].shape),
        lambda changes: jnp.stack([changes[name] for name in names], axis=1),
        **further,
    )
    return layout.with_variables([f"policy_{side}_logps" for side in SIDES])


def logits(inputs: Mapping[str, np.ndarray], names: Sequence[str]) -> Layout:
    """Logits of policy and reference, `[n, T, V]` for each side, whose statistics are the head's.

    Float32 goes through the head itself, with logits as hidden states and the identity as projection. The head has no
    float64: there the values and derivatives of its table are taken.

    Args:
        inputs: Logits of either model, labels and masks of either side.
        names: Of the variables, the policy's logits of either side.
    """

    def of(*parts: str) -> np.ndarray:
        (name,) = [name for name in inputs if all(part in name for part in parts)]
        return inputs[name]

    policy, reference = (np.stack([of(model, side, "logits") for side in SIDES], 1) for model in ("policy", "ref"))
    mask, labels = (np.stack([of(side, name) for side in SIDES], axis=1) for name in ("mask", "labels"))
    lengths = mask.sum(axis=2)
    flat, targets = (-1, policy.shape[-1]), np.where(mask > 0, labels, 0).reshape(-1)

    def statistics(numbers: Arrays, changes: Arrays) -> dict[str, Array]:
        policy = numbers["logits"] + jnp.stack([changes[name] for name in names], axis=1)
        found = _of_logits(policy.reshape(flat), numbers["reference_logits"].reshape(flat), jnp.asarray(targets))
        return {name: values.reshape(mask.shape) for name, values in found.items()}

    of_tokens = _of_tokens(lengths, statistics, {})

    def sums(numbers: Arrays, changes: Arrays, needs: Needs) -> Sums:
        logps = jax.nn.log_softmax(numbers["reference_logits"])
        reference = jnp.take_along_axis(logps, targets.reshape(*mask.shape, 1), axis=3)[..., 0]
        return of_tokens({**numbers, "reference": reference}, changes, needs)

    return Layout(
        {"logits": policy, "reference_logits": reference},
        {"lengths": lengths.astype(np.int32)},
        dict.fromkeys(names, policy[:, 0].shape),
        sums,
    )


def _of_tokens(
    lengths: np.ndarray, statistics: Callable[[Arrays, Arrays], Arrays], draws: Mapping[str, np.ndarray]
) -> Callable[[Arrays, Arrays, Needs], Sums]:
    """Sums over tokens, each example a row whose responses lie one behind another."""

    def sums(numbers: Arrays, changes: Arrays, needs: Needs) -> Sums:
        found = statistics(numbers, changes)
        n, K, T = found["logps"].shape
        offsets = np.broadcast_to(np.arange(T, dtype=np.int32), (n, K, T))
        owners = np.where(offsets < lengths[:, :, None], np.arange(K, dtype=np.int32)[:, None], -1)
        of_rows = {"owners": owners, "offsets": offsets, **{name: x > 0 for name, x in draws.items()}}
        batch = {name: jnp.asarray(x.reshape(n, K * T)) for name, x in of_rows.items()}
        batch |= {
            "lengths": jnp.asarray(lengths[:, None], jnp.int32),
            "reference": numbers["reference"].reshape(n, K * T),
        }
        made = sums_of({name: x.reshape(n, K * T) for name, x in found.items()}, batch, needs)
        return jax.tree.map(lambda x: x[:, 0], made)

    return sums


def _of_logits(policy: Array, reference: Array, targets: Array) -> dict[str, Array]:
    names = ("logps", "kl")
    if policy.dtype == jnp.float32:
        identity = jnp.eye(policy.shape[1], dtype=policy.dtype)
        found = token_statistics(
            Head(names),
            policy[None],
            identity,
            targets[None],
            jnp.ones((1, len(targets)), bool),
            reference[None],
            identity,
        )
        return {name: values[0] for name, values in found.items()}
    return {name: _statistic(name, policy, reference, targets) for name in names}


def _statistic(name: str, policy: Array, reference: Array, targets: Array) -> Array:
    """A statistic of the head's table with the table's derivative."""
    value_of, derivative_of = STATISTICS[name]

    def of(policy: Array) -> Distributions:
        return Distributions(policy, Normalizer.of(policy, ONE_DEVICE), targets, jax.nn.log_softmax(reference))

    @jax.custom_vjp
    def statistic(policy: Array) -> Array:
        return value_of(of(policy))

    def forward(policy: Array) -> tuple[Array, tuple[Array, Array]]:
        value = value_of(of(policy))
        return value, (policy, value)

    def backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
        policy, value = kept
        return (cotangent[:, None] * derivative_of(of(policy), value),)

    statistic.defvjp(forward, backward)
    return statistic(policy)
