"""What the commands that start from a config have in common: from its options to the parts of a run."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from daajax import reference, sharding
from daajax.checkpoint import Checkpoints, Record
from daajax.config import Config, data_sources, shares
from daajax.console import say
from daajax.data import labelled, packing, windows
from daajax.data.batches import Batches
from daajax.data.needs import lacking
from daajax.data.packing import Plan
from daajax.data.sizes import Sizes
from daajax.data.token_cache import tokenized
from daajax.data.tokens import TokenizedData, concatenate, source_names, summary
from daajax.errors import UserError
from daajax.losses.terms import Needs, Term, initial_state
from daajax.models import decoder, weights
from daajax.models.decoder import Params
from daajax.models.families import Architecture, read_architecture
from daajax.scoring import Batch, Scorer
from daajax.step import TrainState


def load_data(
    config: Config, options: Config, architecture: Architecture, terms: Sequence[Term], option: str = "data"
) -> TokenizedData:
    """Reads and tokenizes data, and checks that they have the responses which the loss compares.

    Args:
        config: The config.
        options: Its part that says which data: `config.data` or `config.eval_data`.
        architecture: The model's.
        terms: The loss.
        option: What the options are called.

    Raises:
        UserError: If data or tokenizer are at fault, or do not fit the loss or the model.
    """
    sources = data_sources(options, option)
    names = source_names([(source.path, source.split) for source in sources])
    parts = {}
    for name, source in zip(names, sources, strict=True):
        data = tokenized(
            source.name,
            source.path,
            tokenizer_path(config),
            split=source.split,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            truncation=options.truncation,
            template=config.chat.template,
            score=config.chat.score,
            limit=source.limit,
            max_bad_rows=source.max_bad_rows,
            vocab_size=architecture.vocab_size,
            cache_dir=options.cache_dir,
            option=source.option,
        )
        what = option if len(sources) == 1 else f"{option} ({name})"
        for line in [*data.notices, *summary(data.counters), *_unread(data, terms)]:
            say(f"{what}: {line}")
        parts[name] = _as_the_loss_reads(data, terms, what)
    if option == "data" and config.max_length > architecture.max_position_embeddings:
        say(
            f"data: max_length={config.max_length} exceeds the {architecture.max_position_embeddings} positions "
            "that the model was made for"
        )
    data = concatenate(parts)
    optional = Needs.of(terms).may_read
    _check_columns(data, terms, [name for name in optional if getattr(data, name) is not None])
    if any(term.objective.mismatched for term in terms):
        data = labelled.with_mismatched(data, seed=config.seed, max_length=config.max_length)
        say(f"{option}: {data.notices[-1]}")
    return data


def load_sets(
    config: Config, architecture: Architecture, terms: Sequence[Term], mesh: Any
) -> list[tuple[TokenizedData, Plan]]:
    """The training data with the plan of the run, said on the way, and the held-out data with theirs if there are any.

    Raises:
        UserError: As `load_data` and `make_plan`.
    """
    data = load_data(config, config.data, architecture, terms)
    plan = make_plan(config, data, mesh)
    mixed = config.data.weight is not None
    for line in [windows.describe(plan.updates, plan.batch_size, len(data.weights), mixed=mixed), *plan.report()]:
        say(f"plan: {line}")
    sets = [(data, plan)]
    if config.eval_data.path is not None:
        sets.append(load_held_out(config, architecture, terms, mesh, most_tokens=plan.most_tokens))
    return sets


def load_held_out(
    config: Config, architecture: Architecture, terms: Sequence[Term], mesh: Any, *, most_tokens: int | None = None
) -> tuple[TokenizedData, Plan]:
    """The held-out data, and a plan that visits each of them once.

    Args:
        config: Of the run; its eval_data.path is set.
        architecture: Of the model.
        terms: The loss.
        mesh: The mesh.
        most_tokens: See `plan_sweep`.
    """
    data = load_data(config, config.eval_data, architecture, terms, "eval_data")
    return data, plan_sweep(config, data, mesh, most_tokens=most_tokens)


def _unread(data: TokenizedData, terms: Sequence[Term]) -> list[str]:
    """What the data bring that the loss does not look at."""
    names, needs = " + ".join(repr(term.name) for term in terms), Needs.of(terms)
    unread = {
        "labels": f"`label` is not read by loss {names}: all responses count alike, wanted or not",
        "scores": f"scores are not read by loss {names}: only the order of the responses counts",
        "prompt_probabilities": f"`prompt_probability` is not read by loss {names}",
    }
    return [
        line
        for column, line in unread.items()
        if getattr(data, column) is not None and column not in (*needs.fields, *needs.may_read)
    ]


def _as_the_loss_reads(data: TokenizedData, terms: Sequence[Term], what: str) -> TokenizedData:
    """The data with what the loss reads of them: as many responses, in pairs or one by one, and every column."""
    needs = Needs.of(terms)
    if "labels" in needs.fields:
        if data.labels is None and data.lengths.shape[1] == 3:
            data = labelled.unpaired(data)
            say(f"{what}: {data.notices[-1]}")
    else:
        data = _with_responses(data, terms, what)
    _check_columns(data, terms, needs.fields)
    for term in terms:
        if term.objective.roles and data.counters.get("examples_sorted_by_score"):
            raise UserError(
                f"loss {term.name!r} gives each place of a list a meaning of its own, but lists that are scored are "
                "put in order of their scores; for a pair use `chosen`, `rejected`, `score_chosen`, `score_rejected`."
            )
        if term.objective.refuses is not None and (wrong := term.objective.refuses(data.scores)):
            raise UserError(f"loss {term.name!r}: {wrong}")
    return data


def _check_columns(data: TokenizedData, terms: Sequence[Term], columns: Sequence[str]) -> None:
    """Refuses data some of whose examples lack a column that the loss reads."""
    if missing := lacking(data, columns):
        raise UserError(f"loss {' + '.join(term.name for term in terms)!r} {missing}")


def _with_responses(data: TokenizedData, terms: Sequence[Term], what: str) -> TokenizedData:
    """The data with as many responses as the loss reads."""
    found = data.lengths.shape[1] - 1
    reads = {term.name: term.objective.responses or found for term in terms}
    needed = max(reads.values())
    if other := next((name for name, count in reads.items() if 1 < count < needed), None):
        most = next(name for name, count in reads.items() if count == needed)
        raise UserError(
            f"loss {other!r} compares {reads[other]} responses, {most!r} {needed}: the two cannot be added; "
            "choose losses of equally many."
        )
    loss = next(term.name for term in terms if (term.objective.responses or found) == needed)
    if found < needed or (needed > 1 and found > needed):
        raise UserError(
            f"loss {loss!r} compares {needed} responses but the {what} have {found} a prompt; "
            "choose another loss or other data."
        )
    every = max(term.objective.responses or 1 for term in terms)  # lists may be ragged
    ragged = np.nonzero((data.lengths[:, 1 : 1 + every] == 0).any(axis=1))[0]
    if len(ragged):
        loss = next(term.name for term in terms if (term.objective.responses or 1) == every)
        raise UserError(
            f"loss {loss!r} needs {every} responses but {len(ragged)} examples have fewer, such as "
            f"{data.ids[int(ragged[0])]!r}; complete or remove them."
        )
    if found > needed:
        say(f"{what}: loss {loss!r} reads the first of {found} responses; the others are left out")
        data = data.first_responses(needed)
    return data


def tokenizer_path(config: Config) -> str:
    """Directory of the tokenizer: the model's unless another is named."""
    return config.tokenizer.path or config.model.path


def make_plan(config: Config, data: TokenizedData, mesh: Any) -> Plan:
    """Lays the whole run out.

    Raises:
        UserError: If the layout options, the mesh and the data do not fit together.
    """
    sizes = Sizes.of(data, prefix_sharing=config.packing.prefix_sharing)
    examples, members = len(data.weights), data.by_source()
    drawn_shares = shares(data_sources(config.data, "data"))
    updates = windows.updates_of(
        steps=config.steps, epochs=config.epochs, examples=examples, batch_size=config.batch_size
    )
    order = windows.training_windows(
        sizes,
        batch_size=config.batch_size,
        updates=updates,
        shuffle=config.data.shuffle,
        seed=config.seed,
        sources=list(members.values()),
        shares=drawn_shares,
    )
    if drawn_shares is not None:
        for name, epochs in zip(members, windows.epochs_of(order, list(members.values())), strict=True):
            say(f"plan: source {name}: {epochs:.2f} epochs of {len(members[name])} examples")
    return pack(config, order, sizes, mesh, data.ids)


def pack(config: Config, order: np.ndarray, sizes: Sizes, mesh: Any, names: Sequence[str]) -> Plan:
    """Lays the windows of `order` out in rows as the config asks for."""
    return packing.pack(
        order,
        sizes,
        packing=config.packing.enabled,
        micro_batches=config.micro_batches,
        row_multiple=sharding.row_multiple(mesh),
        rows=config.packing.rows,
        row_length=packing.parse_row_length(config.packing.row_length),
        shapes=config.packing.shapes,
        names=names,
    )


def make_scorer(config: Config, architecture: Architecture, mesh: Any) -> Scorer:
    """The scoring function of a model on a mesh."""
    return Scorer.make(
        architecture,
        mesh,
        attention="blockwise" if config.attention == "auto" else config.attention,
        remat=config.remat,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
    )


def param_layout(scorer: Scorer, mesh: Any) -> tuple[Params, Params]:
    """Shape and dtype of every parameter, and where on the mesh it lives.

    Raises:
        UserError: If an axis of a parameter does not divide over the mesh.
    """
    shapes, axes = decoder.abstract_params(scorer.model)
    return shapes, sharding.param_shardings(mesh, shapes, axes)


def load_params(path: str, scorer: Scorer, mesh: Any, *, random_seed: int | None = None) -> Params:
    """Parameters on the mesh.

    Args:
        path: Model directory.
        scorer: Whose parameters.
        mesh: The mesh.
        random_seed: Draws fresh parameters from it instead of reading them.
    """
    shapes, shardings = param_layout(scorer, mesh)
    if random_seed is None:
        return weights.load(path, scorer.model.architecture, shapes, shardings)
    init = jax.jit(lambda key: decoder.init_params(scorer.model, key), out_shardings=shardings)
    return init(jax.random.key(random_seed))


def load_initial_params(config: Config, scorer: Scorer, mesh: Any) -> Params:
    """The parameters that training starts from: those of model.path, or fresh ones drawn from the seed."""
    return load_params(config.model.path, scorer, mesh, random_seed=config.seed if config.model.random_init else None)


def params_at(config: Config, saved: Checkpoints, step: int, scorer: Scorer, mesh: Any) -> Params:
    """The parameters of a run after an update; step 0 is before the first.

    Raises:
        UserError: If there is no sound checkpoint of that update, or the initial weights are not those of the run.
    """
    return state_at(config, saved, step, scorer, (), mesh).params


def state_at(
    config: Config,
    saved: Checkpoints,
    step: int,
    scorer: Scorer,
    terms: Sequence[Term],
    mesh: Any,
    *,
    initial: Params | None = None,
) -> TrainState:
    """What an evaluation reads of a run's state after an update: all but the optimizer's part.

    Args:
        config: The run's.
        saved: Its checkpoints.
        step: Updates done; 0 is before the first.
        scorer: The policy's.
        terms: The loss; those parts of the state that it does not have are left out.
        mesh: The mesh.
        initial: The initial parameters, where they are there already and known to be the run's.

    Raises:
        UserError: If there is no sound checkpoint of that update, or the initial weights are not those of the run.
    """
    if step == 0:
        if initial is None:
            initial = load_initial_params(config, scorer, mesh)
            origin = Record(data="", model=weights.digest(initial))
            saved.check_origin(step, origin, forced=config.resume == "force")
        return TrainState(None, initial, (), jax.tree.map(jnp.float32, initial_state(terms)))
    abstract = sharding.abstract(*param_layout(scorer, mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    kept = jax.tree.map(lambda _: scalar, initial_state(terms))
    follows = terms and config.reference.mode == "ema"
    return saved.restore_parts(step, TrainState(None, abstract, (), kept, abstract if follows else ()))


def plan_sweep(
    config: Config,
    data: TokenizedData,
    mesh: Any,
    *,
    examples: Int[np.ndarray, " some"] | None = None,
    most_tokens: int | None = None,
) -> Plan:
    """Lays out one visit to every example, without a gradient.

    Args:
        config: Of the run; its layout options count, its rows and row lengths are training's.
        data: The examples.
        mesh: The mesh.
        examples: Those to visit; None: all.
        most_tokens: Of a window, about; None: whatever `batch_size` examples have.
    """
    sizes = Sizes.of(data, prefix_sharing=config.packing.prefix_sharing)
    examples = np.arange(len(data.weights)) if examples is None else examples
    batch_size = min(config.batch_size, len(examples))
    if most_tokens is not None:
        batch_size = int(np.clip(most_tokens / sizes.length[examples].mean(), 1, batch_size))
    return packing.pack(
        windows.sweep_windows(sizes, batch_size=batch_size, examples=examples),
        sizes,
        packing=config.packing.enabled,
        micro_batches=config.micro_batches,
        row_multiple=sharding.row_multiple(mesh),
    )


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a run knows of its reference.

    Attributes:
        columns: Of each data set what is known of each of its tokens: `logps`, nats, and `entropies` as a share of the
            largest there is. Nothing where the reference is live.
        policy: Digest of the weights that training starts from.
        digest: Of the reference's weights.
        is_initial_policy: Whether the reference's weights are those.
        live: Its parameters where it is live, else nothing.
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


def columns_read(terms: Sequence[Term]) -> tuple[str, ...]:
    """What the terms read of the reference's distributions, by key of `daajax.ops.head.STATISTICS`."""
    return ("logps", "entropies") if Needs.of(terms).entropies else ("logps",)


def make_reference_scorer(config: Config, scorer: Scorer, terms: Sequence[Term], mesh: Any) -> Scorer:
    """The scoring function of the reference: the policy's own, or that of the model in reference.path.

    Raises:
        UserError: If its vocabulary does not fit the policy's.
    """
    if config.reference.mode != "path":
        return scorer
    architecture, own = read_architecture(config.reference.path, "reference.path"), scorer.model.architecture
    if architecture.vocab_size < own.vocab_size or (Needs.of(terms).live and architecture.vocab_size > own.vocab_size):
        raise UserError(
            f"reference.path={config.reference.path} has a vocabulary of {architecture.vocab_size}, the policy's is "
            f"{own.vocab_size}; the two must share a tokenizer."
        )
    return make_scorer(config, architecture, mesh)


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
    policy = digest = weights.digest(params)
    what, architecture = config.model.path, reference_scorer.model.architecture
    if config.reference.mode == "path":
        what = config.reference.path
        params = load_params(what, reference_scorer, mesh)
        digest = weights.digest(params)
    same = digest == policy and architecture == scorer.model.architecture
    if why := why_live(config, terms):
        say(f"reference: {what} ({digest[:12]}) stays in memory beside the policy: {why}")
        return Reference([{} for _ in sets], policy, digest, same, params)
    names = columns_read(terms)
    cache = reference.Cache(
        config.reference.cache_dir,
        reference.Header(digest, dataclasses.asdict(architecture), config.model.dtype),
        names,
    )
    for line in cache.notices:
        say(line)

    @functools.partial(jax.jit, static_argnames="keys")
    def score(params: Params, part: Batch, keys: int) -> dict[str, jax.Array]:
        return reference_scorer.statistics(reference_scorer.states(params, part, keys=keys), part, names)

    def score_part(part: dict[str, np.ndarray], keys: int) -> dict[str, jax.Array]:
        return score(params, sharding.place(mesh, part, ("rows",)), keys=keys)

    columns = []
    for data, plan in sets:
        examples = reference.examples_of(plan)
        unscored = reference.missing(data, examples, cache)
        say(
            f"reference: {what} ({digest[:12]}), {len(examples) - len(unscored)} of {len(examples)} examples in the "
            f"cache {cache.folder}"
        )
        if len(unscored):
            # No more tokens at a time than the plan has, also where it is the long examples that are lacking.
            layout = plan_sweep(config, data, mesh, examples=unscored, most_tokens=plan.most_tokens)
            reference.score_pass(data, layout, score_part, cache, what=what)
        columns.append(reference.columns_of(data, examples, cache))
        if "entropies" in names:
            columns[-1]["entropies"] /= math.log(architecture.vocab_size)
    return Reference(columns, policy, digest, same)


def make_batches(
    config: Config,
    data: TokenizedData,
    plan: Plan,
    columns: Mapping[str, np.ndarray],
    terms: Sequence[Term],
    *,
    sweep: bool = False,
) -> Batches:
    """Batches with all that the loss reads.

    Args:
        config: The config; its seed fixes what is drawn.
        data: The examples.
        plan: Where they lie.
        columns: What is known of the reference: an element of `Reference.columns`.
        terms: The loss.
        sweep: Whether the plan is that of an evaluation.
    """
    needs = Needs.of(terms)
    fields = [*needs.fields, *(name for name in needs.may_read if getattr(data, name) is not None)]
    return Batches(
        data,
        plan,
        columns.get("logps"),
        entropies=columns.get("entropies"),
        fields=fields,
        draws=needs.draws,
        seed=config.seed,
        sweep=sweep,
    )
