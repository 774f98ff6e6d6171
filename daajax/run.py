"""What the commands that start from a config have in common: from its options to the parts of a run."""

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from daajax import reference, sharding
from daajax.checkpoint import Checkpoints, Record
from daajax.config import Config, data_sources, shares
from daajax.console import say
from daajax.data import packing, windows
from daajax.data.packing import Plan
from daajax.data.sizes import Sizes
from daajax.data.token_cache import tokenized
from daajax.data.tokens import TokenizedData, concatenate, source_names, summary
from daajax.errors import UserError
from daajax.losses.terms import Term
from daajax.models import decoder, weights
from daajax.models.decoder import Params
from daajax.models.families import Architecture, read_architecture
from daajax.scoring import Scorer


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
        parts[name] = _with_responses(data, terms, what)
    if option == "data" and config.max_length > architecture.max_position_embeddings:
        say(
            f"data: max_length={config.max_length} exceeds the {architecture.max_position_embeddings} positions "
            "that the model was made for"
        )
    return concatenate(parts)


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
    names = " + ".join(repr(term.name) for term in terms)
    lines = []
    if data.labels is not None:
        lines.append(f"`label` is not read by loss {names}: all responses count alike, wanted or not")
    if data.scores is not None:
        lines.append(f"scores are not read by loss {names}: only the order of the responses counts")
    return lines


def _with_responses(data: TokenizedData, terms: Sequence[Term], what: str) -> TokenizedData:
    """The data with as many responses as the loss reads."""
    needed = max(term.objective.responses or data.lengths.shape[1] - 1 for term in terms)
    found = data.lengths.shape[1] - 1
    loss = next(term.name for term in terms if (term.objective.responses or found) == needed)
    if found < needed or (needed > 1 and found > needed):
        raise UserError(
            f"loss {loss!r} compares {needed} responses but the {what} have {found} a prompt; "
            "choose another loss or other data."
        )
    lacking = np.nonzero((data.lengths[:, 1 : 1 + needed] == 0).any(axis=1))[0]
    if len(lacking) and any(term.objective.responses for term in terms):
        raise UserError(
            f"loss {loss!r} needs {needed} responses but {len(lacking)} examples have fewer, such as "
            f"{data.ids[int(lacking[0])]!r}; complete or remove them."
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
    if step == 0:
        params = load_initial_params(config, scorer, mesh)
        origin = Record(data="", model=weights.digest(params))
        saved.check_origin(step, origin, forced=config.resume == "force")
        return params
    return saved.restore_params(step, sharding.abstract(*param_layout(scorer, mesh)))


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
    """Reference log-probs of everything a run reads.

    Attributes:
        columns: Of each data set, the log-prob of each of its tokens, nats.
        policy: Digest of the weights that training starts from.
        digest: Of the reference's weights.
        is_initial_policy: Whether the reference's weights are those.
    """

    columns: list[Float[np.ndarray, " _"]]
    policy: str
    digest: str
    is_initial_policy: bool


def load_reference(
    config: Config, sets: Sequence[tuple[TokenizedData, Plan]], scorer: Scorer, params: Params, mesh: Any
) -> Reference:
    """Reads the reference log-probs from the cache; a pass over the reference model scores what is missing.

    The reference model of mode `path` is in memory only while this runs.

    Args:
        config: The config; its reference.mode is not `none`.
        sets: Data sets, each with the plan that says which of its examples are read.
        scorer: The policy's.
        params: The initial policy's.
        mesh: The mesh.
    """
    policy = digest = weights.digest(params)
    architecture = scorer.model.architecture
    same_architecture = True
    what = config.model.path
    if config.reference.mode == "path":
        what = config.reference.path
        architecture = read_architecture(what, "reference.path")
        same_architecture = architecture == scorer.model.architecture
        if architecture.vocab_size < scorer.model.architecture.vocab_size:
            raise UserError(
                f"reference.path={what} has a vocabulary of {architecture.vocab_size}, the policy's is "
                f"{scorer.model.architecture.vocab_size}; the two must share a tokenizer."
            )
        scorer = make_scorer(config, architecture, mesh)
        params = load_params(what, scorer, mesh)
        digest = weights.digest(params)
    cache = reference.Cache(
        config.reference.cache_dir, reference.Header(digest, dataclasses.asdict(architecture), config.model.dtype)
    )
    for line in cache.notices:
        say(line)
    score = jax.jit(scorer.token_logps, static_argnames="keys")

    def score_part(part: dict[str, np.ndarray], keys: int) -> jax.Array:
        return score(params, sharding.place(mesh, part, ("rows",)), keys=keys)

    columns = []
    for data, plan in sets:
        examples = reference.examples_of(plan)
        lacking = reference.missing(data, examples, cache)
        say(
            f"reference: {what} ({digest[:12]}), {len(examples) - len(lacking)} of {len(examples)} examples in the "
            f"cache {cache.folder}"
        )
        if len(lacking):
            # No more tokens at a time than the plan has, also where it is the long examples that are lacking.
            layout = plan_sweep(config, data, mesh, examples=lacking, most_tokens=plan.most_tokens)
            reference.score_pass(data, layout, score_part, cache, what=what)
        columns.append(reference.column(data, examples, cache))
    del params
    gc.collect()
    return Reference(columns, policy, digest, digest == policy and same_architecture)
