"""A run from its options: where its models come from, its reference, its update. See also `policy` and `inputs`."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from daajax import chips, compiler_options, flops, inputs, policy, processes, reference, sharding
from daajax.config import Config, hyperparameters
from daajax.console import say
from daajax.data.packing import Plan
from daajax.data.tokens import TokenizedData
from daajax.errors import UserError
from daajax.gradient import Beside
from daajax.heads import Choice
from daajax.losses.terms import Needs, Term
from daajax.metrics import Meters
from daajax.models import directory, lora
from daajax.models.decoder import Params
from daajax.models.families import read_architecture
from daajax.models.lora import Lora
from daajax.optimizer import make_optimizer, make_schedule
from daajax.scoring import Batch, Scorer
from daajax.step import Follow, Update, abstract_state


def fetch_models(
    config: Config, revisions: Mapping[str, str] | None = None, *, with_weights: bool = True
) -> tuple[Config, dict[str, str]]:
    """Brings every model that a config names onto this machine.

    Args:
        config: The run's.
        revisions: What the run began with, by address; an address that is not among them means what it does today.
        with_weights: Whether any are read.

    Returns:
        The config with local directories in place of addresses, and the revision of each address.

    Raises:
        UserError: As `directory.fetch`.
    """
    made = []

    def first() -> dict[str, str]:
        made.append(_fetch(config, revisions, with_weights=with_weights))
        return made[0][1]

    found = processes.from_first(first)  # an address means to all what it means to the first, which also fetches first
    return made[0] if made else _fetch(config, {**(revisions or {}), **found}, with_weights=with_weights)


def _fetch(config: Config, revisions: Mapping[str, str] | None, *, with_weights: bool) -> tuple[Config, dict[str, str]]:
    local: Config = config.copy_and_resolve_references()
    found: dict[str, str] = {}
    needing = {"model": not config.model.random_init, "lora": True, "reference": True, "tokenizer": False}
    for group, needs_weights in needing.items():
        if (address := config[group].path) is not None:
            known = found.get(address) or (revisions or {}).get(address, "")
            fetched = directory.fetch(
                address, f"{group}.path", with_weights=with_weights and needs_weights, revision=known
            )
            local[group].path = fetched.path
            if fetched.revision:
                found[address] = fetched.revision
    return local, found


def make_update(
    config: Config, scorer: Scorer, reference_scorer: Scorer, terms: Sequence[Term], *, updates: int
) -> Update:
    """The update of a run, before any of its arrays exist. Of the scorers' mesh it needs no more than a description.

    Args:
        config: The run's.
        scorer: The policy's.
        reference_scorer: The reference's.
        terms: The loss.
        updates: Length of the run, which the learning rate depends on.

    Raises:
        UserError: If an axis of a parameter does not divide over the mesh, the run ends before its warm-up does, or
            the devices lack what an option asks for.
    """
    options, mesh = config.optimizer, scorer.mesh
    schedule = make_schedule(
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup_steps=options.warmup_steps,
        updates=updates,
    )
    optimizer = make_optimizer(
        options.name, schedule, max_grad_norm=options.max_grad_norm, hyperparameters=hyperparameters(config)
    )
    is_live, follows = bool(why_live(config, terms)), config.reference.mode == "ema"
    own, frozen = lora.split(sharding.abstract(*policy.param_layout(scorer, mesh)), scorer.model.lora)
    compared = {}
    if is_live and not follows:
        other = sharding.abstract(*policy.param_layout(reference_scorer, mesh))
        compared = reference_part(config, other, scorer.model.lora)
    return Update(
        scorer,
        terms,
        optimizer,
        schedule,
        batch_size=config.batch_size,
        state=abstract_state(own, optimizer, terms, mesh, follows=follows, offload=options.offload),
        beside=Beside(frozen, compared),
        reference_scorer=reference_scorer if is_live else None,
        follow=Follow(config.reference.ema.decay, config.reference.ema.every) if follows else None,
        router_loss_coef=config.model.router_aux_loss_coef,
        head=config.head,
        compiler_options=compiler_options.chosen(config.compiler_options, mesh),
    )


def make_meters(config: Config, mesh: Any, counts: flops.Counts) -> Meters:
    """What the speed of a run's updates is measured against.

    Args:
        config: The run's.
        mesh: Whose devices make them.
        counts: Their arithmetic.
    """
    return Meters(counts, chips.peak_of(list(mesh.devices.flat), config.model.dtype, config.peak_flops))


def make_counts(
    config: Config,
    scorer: Scorer,
    reference_scorer: Scorer,
    terms: Sequence[Term],
    data: TokenizedData,
    plan: Plan,
    head: Choice,
) -> flops.Counts:
    """How much arithmetic a run's updates take.

    Args:
        config: The run's.
        scorer: The policy's.
        reference_scorer: The reference's.
        terms: The loss.
        data: The examples.
        plan: Where they lie.
        head: The form of the head.
    """
    is_coupled = Needs.of(terms).coupled or config.model.router_aux_loss_coef > 0
    two_passes = is_coupled and plan.micro_batches > 1
    return flops.of_plan(
        plan,
        data.lengths,
        data.scored_lengths().sum(axis=1, dtype=np.int64),
        scorer.model.architecture,
        remat=scorer.model.remat,
        attention=scorer.attention.name,
        lora=scorer.model.lora,
        live=reference_scorer.model.architecture if why_live(config, terms) else None,
        two_passes=two_passes,
        head=head,
        is_vocabulary_cut=sharding.MeshDevices(scorer.mesh).parts("vocab") > 1,
        parts=sharding.row_multiple(scorer.mesh),
    )


def reference_part(config: Config, params: Params, adapters: Lora | None) -> Params:
    """Of a live reference's parameters, or of anything in their place, those that are not frozen ones of the policy."""
    if config.reference.mode == "path":
        return params
    own, _ = lora.split(params, adapters)
    return lora.without(own) if config.reference.mode == "adapter_off" else policy.at_start(config, own)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a run knows of its reference.

    Attributes:
        columns: Of each data set what is known of each of its tokens: `logps`, nats, and `entropies` as a share of the
            largest there is. Nothing where the reference is live.
        policy: Digest of the weights that training starts from.
        digest: Of the reference's weights.
        is_initial_policy: Whether the reference's weights are those.
        live: Where it is live, those of its parameters that are not frozen ones of the policy; else nothing.
    """

    columns: list[dict[str, Float[np.ndarray, " _"]]]
    policy: str
    digest: str
    is_initial_policy: bool
    live: Params = dataclasses.field(default_factory=dict)


def why_live(config: Config, terms: Sequence[Term]) -> str:
    """The reason why the reference's model stays in memory beside the policy's; empty if it does not."""
    if config.reference.mode == "ema":
        return "it follows the policy"
    if live := Needs.of(terms).live:
        return f"loss {live[0]!r} reads its whole distributions"
    return "reference.live is on" if config.reference.live else ""


def make_reference_scorer(config: Config, scorer: Scorer, terms: Sequence[Term], mesh: Any) -> Scorer:
    """The scoring function of the reference: the policy's own, or that of the model in reference.path.

    Raises:
        UserError: If its vocabulary does not fit the policy's.
    """
    if config.reference.mode != "path":
        return scorer
    architecture = read_architecture(config.reference.path, "reference.path", length=config.max_length)
    own = scorer.model.architecture
    if architecture.vocab_size < own.vocab_size or (Needs.of(terms).live and architecture.vocab_size > own.vocab_size):
        raise UserError(
            f"reference.path={config.reference.path} has a vocabulary of {architecture.vocab_size}, the policy's is "
            f"{own.vocab_size}; the two must share a tokenizer."
        )
    found = policy.make_scorer(config, architecture, mesh)
    if scorer.model.lora is None:
        return found
    # Nothing of it is trained, no more than of the policy's base: it is kept in the same dtype.
    return dataclasses.replace(found, model=found.model.clone(param_dtype=found.model.dtype))


def make_reference_pass(config: Config, reference_scorer: Scorer, names: tuple[str, ...]) -> Any:
    """The reference pass over one micro-batch, under jit: `statistics = score(params, part, keys=…)`.

    Args:
        config: The run's.
        reference_scorer: The reference's; of its mesh it needs no more than a description.
        names: Statistics of the reference, keys of `daajax.ops.statistics.STATISTICS`.
    """
    mesh = reference_scorer.mesh

    @functools.partial(
        jax.jit,
        static_argnames="keys",
        out_shardings=sharding.replicated(mesh),  # every process has all of them
        compiler_options=compiler_options.chosen(config.compiler_options, mesh) or None,
    )
    def score(params: Params, part: Batch, keys: int) -> dict[str, jax.Array]:
        return reference_scorer.statistics(reference_scorer.states(params, part, keys=keys), part, names)

    return score


def lower_reference_pass(
    config: Config, reference_scorer: Scorer, part: Mapping[str, Any], names: tuple[str, ...], *, keys: int
) -> jax.stages.Lowered:
    """The reference pass as a program that is not compiled yet, before any of its arrays exist.

    Args:
        config: The run's; its reference is scored in a pass of its own.
        reference_scorer: The reference's.
        part: What has the keys, shapes and dtypes of a micro-batch.
        names: See `make_reference_pass`.
        keys: The plan's capacity for this shape.
    """
    mesh = reference_scorer.mesh
    params = sharding.abstract(*policy.param_layout(reference_scorer, mesh))
    if config.reference.mode != "path":
        params = policy.at_start(config, params)
    if config.reference.mode == "adapter_off":
        params = lora.without(params)
    shaped = sharding.abstract(part, sharding.batch_shardings(mesh, part, ("rows",)))
    return make_reference_pass(config, reference_scorer, names).lower(params, shaped, keys=keys)


def load_reference(
    config: Config,
    sets: Sequence[tuple[TokenizedData, Plan]],
    scorer: Scorer,
    reference_scorer: Scorer,
    params: Params,
    terms: Sequence[Term],
    mesh: Any,
) -> Reference:
    """Reads the reference log-probs from the cache; a pass over the reference model scores what is missing.

    The reference model of mode `path` is in memory only while this runs, unless it is live.

    Args:
        config: The config; its reference.mode is not `none`.
        sets: Data sets, each with the plan that says which of its examples are read.
        scorer: The policy's.
        reference_scorer: The reference's.
        params: The initial policy's.
        terms: The loss.
        mesh: The mesh.
    """
    adapters, architecture = scorer.model.lora, reference_scorer.model.architecture
    params = policy.at_start(config, params)
    initial = policy.digest(params, scorer)
    what = config.lora.path or config.model.path
    if config.reference.mode == "path":
        what = config.reference.path
        params = policy.load_params(what, reference_scorer, mesh)
    elif config.reference.mode == "adapter_off":
        what, params = config.model.path, lora.without(params)
        if config.lora.path is not None and adapters is not None and adapters.whole:
            # The adapter brought parts of its own.
            params = lora.joined(policy.base_of_whole(config, scorer, mesh), params)
    digest = policy.digest(params, reference_scorer)
    same = digest == initial and architecture == scorer.model.architecture
    if why := why_live(config, terms):
        say(f"reference: {what} ({digest[:12]}) stays in memory beside the policy: {why}")
        return Reference([{} for _ in sets], initial, digest, same, reference_part(config, params, adapters))
    names = Needs.of(terms).of_reference
    header = reference.Header(digest, dataclasses.asdict(architecture), config.model.dtype)
    opened = functools.partial(reference.Cache, config.reference.cache_dir, header, names)
    cache = processes.by_first(opened, functools.partial(opened, is_kept=False))
    for line in cache.notices:
        say(line)

    score = make_reference_pass(config, reference_scorer, names)

    def score_part(part: dict[str, np.ndarray], keys: int) -> dict[str, jax.Array]:
        return score(params, sharding.place(mesh, part, ("rows",)), keys=keys)

    columns = []
    for data, plan in sets:
        examples = reference.examples_of(plan)
        lacking = processes.from_first(lambda data=data, own=examples: reference.missing(data, own, cache).tolist())
        unscored = np.array(lacking, np.int64)
        say(
            f"reference: {what} ({digest[:12]}), {len(examples) - len(unscored)} of {len(examples)} examples in the "
            f"cache {cache.folder}"
        )
        if len(unscored):
            # No more tokens at a time than the plan has, also where it is the long examples that are lacking.
            layout = inputs.plan_sweep(config, data, mesh, examples=unscored, most_tokens=plan.most_tokens)
            reference.score_pass(data, layout, score_part, cache, what=what)
        found = reference.columns_of(data, examples, cache) if processes.is_first() else dict.fromkeys(names)
        columns.append({name: processes.array_from_first(found[name], len(data.tokens)) for name in names})
        if "entropies" in names:
            columns[-1]["entropies"] /= math.log(architecture.vocab_size)
    return Reference(columns, initial, digest, same)
