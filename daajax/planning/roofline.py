"""How long an update takes at least: what its arithmetic, its memory and its links would each take by themselves.

An estimate and no measurement: peaks are the published ones, nothing waits, everything overlaps. It ranks layouts and
says what limits them; it does not promise a time.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

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
    scored = layout.batch["owners"].shape[2] * layout.rows
    head = layout.head.products * (scored * a.vocab_size * 4 + a.vocab_size * a.hidden_size * width) / layout.tensor
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

    Over `fsdp` each layer is gathered in the compute dtype for the forward and for the backward pass of each
    micro-batch, and its gradient scattered; the projection likewise, its gradient in float32; embeddings are exchanged
    for the residual stream, and back. Over `data` gradients are summed. Over `tensor` the residual stream is summed,
    twice a layer and pass.
    """
    a, topology = layout.subject.architecture, layout.subject.topology
    shape, width = dict(layout.mesh.shape), np.dtype(layout.scorer.model.dtype).itemsize
    data, fsdp, tensor = (shape[axis] for axis in ("data", "fsdp", "tensor"))
    parts, layers = layout.plan.micro_batches, a.num_hidden_layers
    of_layer, of_head = layer_size(a) / tensor, a.vocab_size * a.hidden_size / tensor
    trained = _is_trained(layout.scorer.model.lora)

    def one(kind: str, size: float, times: int, group: int, spread: int) -> Sent:
        on_host = max(1, min(group, topology.of_host // spread))
        received = size * (group - 1) / max(group, 1)
        return Sent(kind, "", (), times, times > 1, True, group, received, on_host)

    found = []
    if fsdp > 1:
        found.append(one("all-gather", of_layer * width, 2 * layers * parts, fsdp, tensor))
        found.append(one("all-gather", of_head * width, 2 * parts, fsdp, tensor))
        found.append(one("all-to-all", layout.tokens * a.hidden_size * width, (1 + trained) * parts, fsdp, tensor))
        if trained:
            found.append(one("reduce-scatter", of_layer * width, layers * parts, fsdp, tensor))
            found.append(one("reduce-scatter", of_head * 4, parts, fsdp, tensor))
    if data > 1:
        found.append(one("all-reduce", 2 * layout.held.gradients, 1, data, fsdp * tensor))
    if tensor > 1:
        again = {"o", "down"} & set(recomputed(layout.config.remat, a)) & set(PRODUCTS)
        sums = (4 + len(again)) * layers * parts
        found.append(one("all-reduce", 2 * layout.tokens * a.hidden_size * width, sums, tensor, 1))
    return found
