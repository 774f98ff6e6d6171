"""How long an update takes at least: what its arithmetic, its memory and its links would each take by themselves.

An estimate and no measurement: peaks are the published ones, nothing waits, everything overlaps. It ranks layouts and
says what limits them; it does not promise a time.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from daajax.attention import ATTENTION
from daajax.models.architecture import Architecture
from daajax.models.lora import Lora
from daajax.models.remat import PRODUCTS, recomputed
from daajax.planning.compiling import Sent
from daajax.planning.layouts import Layout, layer_size, product_widths
from daajax.planning.topologies import Topology


class Roofline(NamedTuple):
    """Seconds of one update.

    Attributes:
        arithmetic: Of the hardware's FLOPs at the chips' peak.
        memory: Of the bytes that each device reads and writes, at its memory's bandwidth.
        links: Of the bytes that each device gets from others.
    """

    arithmetic: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """Of the update: the longest of the three."""
        return max(self)

    @property
    def limit(self) -> str:
        """Which of them that is."""
        return self._fields[int(np.argmax(self))]


def estimate(layout: Layout, sent: Iterable[Sent] | None = None) -> Roofline:
    """The roofline of a layout.

    Args:
        layout: Which.
        sent: What its program sends; None: what `expected_sent` expects of it.
    """
    topology = layout.subject.topology
    chips, chip = topology.chips, topology.chip
    if sent is None:
        sent = expected_sent(layout)
    return Roofline(
        arithmetic=layout.flops[1] / (chips * chip.flops),
        memory=traffic(layout) / (chip.bandwidth * topology.share),
        links=link_seconds(topology, sent),
    )


def link_seconds(topology: Topology, sent: Iterable[Sent]) -> float:
    """Seconds that devices take to send each other so much, one after the other."""
    return sum((one.times * one.received / bandwidth(topology, one.group_size, one.on_host) for one in sent), 0.0)


def bandwidth(topology: Topology, group_size: int, on_host: int) -> float:
    """Bytes/s at which a device gets what others of its group send it, over all links at once.

    Of GPUs on several hosts, those that share a host share its adapters for what comes from outside.

    Args:
        topology: The machines.
        group_size: Devices that take part together.
        on_host: Those of them that one host has.
    """
    link = topology.chip.link * topology.share
    if not topology.chip.network or group_size <= on_host:
        return link
    return min(link, on_host * topology.chip.network)


def traffic(layout: Layout) -> float:
    """Bytes that a device reads and writes in its memory, about.

    State and gradients once each way and update, gradients once more a micro-batch; the weights of every layer in each
    pass; what each product reads and writes of tokens, in each pass; logits in float32, and the projection, a product
    each.
    """
    a, held = layout.subject.architecture, layout.held
    width = np.dtype(layout.scorer.model.dtype).itemsize
    parts, passes = layout.plan.micro_batches, _passes(layout)
    weights = a.num_hidden_layers * layer_size(a) / layout.tensor * width
    products = product_widths(a, layout.tensor)
    of_token = a.num_hidden_layers * (sum(products.values()) + 4 * a.hidden_size) * width
    head = (
        layout.head.products * (layout.scored * a.vocab_size * 4 + a.vocab_size * a.hidden_size * width) / layout.tensor
    )
    state = 2 * (held.parameters + held.optimizer) + held.frozen + 2 * held.gradients * parts
    return state + parts * (passes * (weights + layout.tokens * of_token) + head)


def _passes(layout: Layout) -> float:
    """How often the layers' weights are gone through: forward, for gradients, and what is computed again."""
    a, remat = layout.subject.architecture, layout.config.remat
    again = len(recomputed(remat, a)) / len(recomputed("full", a))
    return 2 + _is_trained(layout.scorer.model.lora) + again


def _is_trained(lora: Lora | None) -> int:
    return int(lora is None)


def expected_sent(layout: Layout) -> list[Sent]:
    """What a program for this layout sends, before it is compiled: enough to put layouts in order.

    Over `fsdp` and `context` together each layer is gathered in the compute dtype for the forward and for the backward
    pass of each micro-batch, and its gradient scattered; the projection likewise, its gradient in float32; embeddings
    are exchanged for the residual stream, and back. Over `data` gradients are summed. See also `waited_for`.
    """
    a, (data, fsdp, tensor, context) = layout.subject.architecture, _sizes(layout)
    width, cut = np.dtype(layout.scorer.model.dtype).itemsize, fsdp * context
    parts, layers = layout.plan.micro_batches, a.num_hidden_layers
    of_layer, of_head = layer_size(a) / tensor, a.vocab_size * a.hidden_size / tensor
    trained, one = _is_trained(layout.scorer.model.lora), functools.partial(_sent, layout.subject.topology)
    found = waited_for(layout)
    if cut > 1:
        found.append(one("all-gather", of_layer * width, 2 * layers * parts, cut, tensor))
        found.append(one("all-gather", of_head * width, 2 * parts, cut, tensor))
        found.append(one("all-to-all", layout.tokens * a.hidden_size * width, (1 + trained) * parts, cut, tensor))
        if trained:
            found.append(one("reduce-scatter", of_layer * width, layers * parts, cut, tensor))
            found.append(one("reduce-scatter", of_head * 4, parts, cut, tensor))
    if data > 1:
        found.append(one("all-reduce", 2 * layout.held.gradients, 1, data, cut * tensor))
    return found


def waited_for(layout: Layout) -> list[Sent]:
    """Of that what the next product of a layer waits for.

    Over `tensor` the residual stream is summed, twice a layer and pass. Over `context` keys and values are gathered for
    the forward and for the backward pass, and their gradient scattered; or queries, keys, values and what attention
    puts out are exchanged in both passes, and the gradients of all of them.
    """
    a, (_, _, tensor, context) = layout.subject.architecture, _sizes(layout)
    width, passes = np.dtype(layout.scorer.model.dtype).itemsize, layout.plan.micro_batches * a.num_hidden_layers
    one, found = functools.partial(_sent, layout.subject.topology), []
    if tensor > 1:
        again = {"o", "down"} & set(recomputed(layout.config.remat, a)) & set(PRODUCTS)
        size = 2 * layout.tokens * a.hidden_size * width
        found.append(one("all-reduce", size, (4 + len(again)) * passes, tensor, 1))
    if context > 1:
        queries, keys = (layout.tokens * heads * a.head_dim / tensor * width for heads in _heads(a))
        if ATTENTION[layout.scorer.attention.name].by_heads:
            found.append(one("all-to-all", 6 * (queries + keys), passes, context, tensor))
        else:
            found.append(one("all-gather", 2 * keys * context, 2 * passes, context, tensor))
            found.append(one("reduce-scatter", 2 * keys * context, passes, context, tensor))
    return found


def _heads(architecture: Architecture) -> tuple[int, int]:
    return architecture.num_attention_heads, architecture.num_key_value_heads


def _sizes(layout: Layout) -> tuple[int, int, int, int]:
    """Devices on each axis."""
    shape = dict(layout.mesh.shape)
    return shape["data"], shape["fsdp"], shape["tensor"], shape["context"]


def _sent(topology: Topology, kind: str, size: float | int, times: int, group: int, spread: int) -> Sent:
    """So many bytes of a device in a group, whose devices lie so many apart."""
    on_host = max(1, min(group, topology.of_host // spread))
    received = size * (group - 1) / max(group, 1)
    return Sent(kind, "", (), times, times > 1, True, group, received, on_host)
