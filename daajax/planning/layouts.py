"""One way to run a config on machines: its mesh, rows and programs, and what can be counted before compiling."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from daajax import flops, inputs, policy, run, sharding
from daajax.config import Config
from daajax.data.batches import Batches
from daajax.data.packing import Plan
from daajax.data.tokens import TokenizedData
from daajax.errors import UserError
from daajax.heads import Choice
from daajax.losses.terms import Needs, Term
from daajax.models.architecture import Architecture
from daajax.models.parameters import layer_parameters
from daajax.models.remat import PRODUCTS, recomputed
from daajax.planning.topologies import Topology
from daajax.scoring import Scorer
from daajax.step import Update


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is planned for, however it is laid out.

    Attributes:
        architecture: Of the policy.
        terms: The loss.
        data: What is learned from, or assumed to be.
        topology: The machines.
        name: Of the model, for the report.
    """

    architecture: Architecture
    terms: tuple[Term, ...]
    data: TokenizedData
    topology: Topology
    name: str


class Held(NamedTuple):
    """Bytes of a device, from shapes and shardings.

    Attributes:
        parameters: The policy's that are trained.
        optimizer: Its state, as far as it lies on the device.
        frozen: The policy's that are not trained.
        reference: Of a reference whose model stays.
        batch: An update's.
        gradients: Of what is trained, in its dtype; they are made in the update.
        on_host: Of the host's memory, for this device.
    """

    parameters: int
    optimizer: int
    frozen: int
    reference: int
    batch: int
    gradients: int
    on_host: int = 0

    @property
    def state(self) -> int:
        """What is there before the update begins, its arguments."""
        return self.parameters + self.optimizer + self.frozen + self.reference + self.batch


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """One way to run a config; nothing of it exists yet.

    Attributes:
        subject: What is run.
        config: How.
        plan: Of the data.
        scorer: The policy's.
        reference_scorer: The reference's.
        update: Its update.
        batch: Of the largest update, on this machine.
        keys: The plan's capacity for it.
        head: The form of the head.
    """

    subject: Subject
    config: Config
    plan: Plan
    scorer: Scorer
    reference_scorer: Scorer
    update: Update
    batch: Mapping[str, np.ndarray]
    keys: int
    head: Choice

    @property
    def mesh(self) -> Any:
        """The mesh."""
        return self.scorer.mesh

    @property
    def tensor(self) -> int:
        """Devices that heads and MLP are cut over."""
        return sharding.MeshDevices(self.mesh).parts("heads")

    @property
    def context(self) -> int:
        """Devices that the length of a row is cut over."""
        return sharding.length_parts(self.mesh)

    @functools.cached_property
    def held(self) -> Held:
        """What a device holds."""
        state, beside = self.update.state, self.update.beside
        parameters, (optimizer, on_host) = bytes_of(state.params)[0], bytes_of(state.optimizer)
        batch = sharding.abstract(self.batch, sharding.batch_shardings(self.mesh, self.batch))
        return Held(
            parameters=parameters,
            optimizer=optimizer,
            frozen=bytes_of(beside.frozen)[0],
            reference=bytes_of((beside.reference, state.reference))[0],
            batch=bytes_of(batch)[0],
            gradients=parameters,
            on_host=on_host,
        )

    @property
    def rows(self) -> int:
        """Rows of a device, of one micro-batch."""
        return self.plan.rows // sharding.row_multiple(self.mesh)

    @property
    def tokens(self) -> int:
        """Row positions of a device, of one micro-batch."""
        return self.rows * self.batch["tokens"].shape[2] // self.context

    @property
    def scored(self) -> int:
        """Scored slots of a device, of one micro-batch."""
        return self.rows * self.batch["owners"].shape[2] // self.context

    @functools.cached_property
    def kept(self) -> int:
        """Bytes that a device keeps of the layers from the forward to the backward pass, by what remat says."""
        return kept_bytes(
            self.subject.architecture, self.config.remat, self.tokens, self.tensor, self.scorer.model.dtype
        )

    @property
    def least_memory(self) -> int:
        """Bytes that a device needs whatever its compiler does."""
        return self.held.state + self.held.gradients + self.kept

    @functools.cached_property
    def flops(self) -> tuple[float, float]:
        """Of the largest update on all devices: the least, and what the hardware is asked for."""
        counts = run.make_counts(
            self.config, self.scorer, self.reference_scorer, self.subject.terms, self.subject.data, self.plan, self.head
        )
        here = self.plan.largest_update()
        least, asked = counts.least, counts.steps[flops.STEPS[-1]]
        return float(least[here + 1] - least[here]), float(asked[here + 1] - asked[here])

    def considered(self, remat: str, head: str) -> "Layout":
        """The same with another remat and head, to be counted and not to be compiled."""
        config = with_options(self.config, {"remat": remat, "head": head})
        scorer = dataclasses.replace(self.scorer, model=self.scorer.model.clone(remat=remat))
        micro_batches, scored = self.batch["owners"].shape[0], self.batch["owners"].shape[2]
        chosen = self.update.head_of(micro_batches, scored, head)
        return dataclasses.replace(self, config=config, scorer=scorer, head=chosen)

    def lower_update(self) -> jax.stages.Lowered:
        """The update's program."""
        return self.update.lower(self.batch, keys=self.keys)

    def lower_reference_pass(self) -> jax.stages.Lowered | None:
        """The program of the reference pass; None if there is none."""
        config, data = self.config, self.subject.data
        if config.reference.mode == "none" or run.why_live(config, self.subject.terms):
            return None
        sweep = inputs.plan_sweep(config, data, self.mesh, most_tokens=self.plan.most_tokens)
        largest = sweep.largest_update()
        part = {name: value[0] for name, value in Batches(data, sweep).shaped(largest).items()}
        names = Needs.of(self.subject.terms).of_reference
        return run.lower_reference_pass(config, self.reference_scorer, part, names, keys=sweep.shape(largest).keys)


def make_layout(subject: Subject, config: Config) -> Layout:
    """Lays a config out on the subject's machines.

    Raises:
        UserError: If mesh, model, data and options do not fit together.
    """
    architecture, terms = subject.architecture, subject.terms
    mesh = make_mesh(config, subject.topology)
    plan = inputs.make_plan(config, subject.data, mesh)
    scorer = policy.make_scorer(config, architecture, mesh, adapters=policy.lora_of(config, architecture))
    reference_scorer = run.make_reference_scorer(config, scorer, terms, mesh)
    updates = max(plan.updates, config.optimizer.warmup_steps + 1)
    update = run.make_update(config, scorer, reference_scorer, terms, updates=updates)
    unknown = {}
    if not run.why_live(config, terms):
        unknown = {name: np.zeros(len(subject.data.tokens), np.float32) for name in Needs.of(terms).of_reference}
    largest = plan.largest_update()
    batch = inputs.make_batches(config, subject.data, plan, unknown, terms).shaped(largest)
    return Layout(
        subject,
        config,
        plan,
        scorer,
        reference_scorer,
        update,
        batch,
        plan.shape(largest).keys,
        update.head_for(batch),
    )


def make_mesh(config: Config, topology: Topology) -> Any:
    """The mesh that a config asks for, of machines that need not be there.

    Raises:
        UserError: If it does not fit them.
    """
    try:
        return sharding.make_mesh(config.mesh.to_dict(), topology.devices)
    except (NotImplementedError, ValueError) as error:  # how a torus can be cut up is jax's to say
        raise UserError(f"mesh {config.mesh.to_dict()} cannot be laid over {topology.name}: {error}") from None


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """A config with other values of some options."""
    changed = config_dict.ConfigDict(config)
    changed.update_from_flattened_dict(dict(options))
    return changed


def bytes_of(tree: Any) -> tuple[int, int]:
    """Of abstract arrays that have shardings, what lies on one device, and in its host's memory for it."""
    device = host = 0
    for leaf in jax.tree.leaves(tree):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if sharding.is_in_host_memory(leaf.sharding):
            host += size
        else:
            device += size
    return device, host


def kept_bytes(architecture: Architecture, remat: str, tokens: int, tensor: int, dtype: Any) -> int:
    """Bytes of the layers that a device keeps for the backward pass: their input, and the products that remat names.

    Args:
        architecture: The model's.
        remat: Key of `daajax.models.remat.REMAT`.
        tokens: Of the device, in one micro-batch.
        tensor: Devices that heads and MLP are cut over.
        dtype: Compute dtype.
    """
    again = recomputed(remat, architecture)
    widths = product_widths(architecture, tensor)
    reads_down = "down" in recomputed("full", architecture)
    kept = [name for name in PRODUCTS if name not in again and (name != "down" or reads_down)]
    features = architecture.hidden_size + sum(widths[name] for name in kept)
    return int(architecture.num_hidden_layers * tokens * features * np.dtype(dtype).itemsize)


def product_widths(architecture: Architecture, tensor: int) -> dict[str, float]:
    """Features of one token in each of a layer's products, on one device."""
    a = architecture
    heads, kv = a.num_attention_heads * a.head_dim / tensor, a.num_key_value_heads * a.head_dim / tensor
    inner = a.intermediate_size * (2 if a.gated else 1)
    mlp = inner * a.experts.num_experts_per_tok + a.experts.num_experts if a.experts else inner / tensor
    return dict(qkv=heads + 2 * kv, attention=heads, o=a.hidden_size, mlp=mlp, down=a.hidden_size)


def layer_size(architecture: Architecture) -> int:
    """Parameters of the matrices of one layer."""
    return sum(math.prod(one.shape) for one in layer_parameters(architecture).values() if len(one.shape) > 1)
