"""What a run reads: data sets fitted to what the loss looks at, laid out in rows, filled into batches."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from daajax import data_copies, processes, sharding
from daajax.config import Config, DataSource, data_sources, shares, tokenizer_path
from daajax.console import say
from daajax.data import labelled, packing, windows
from daajax.data.batches import Batches
from daajax.data.needs import lacking
from daajax.data.packing import Plan
from daajax.data.sizes import Sizes
from daajax.data.token_cache import tokenized
from daajax.data.tokens import TokenizedData, concatenate, source_names, summary
from daajax.errors import UserError
from daajax.losses.terms import Needs, Term
from daajax.models.architecture import Architecture


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
        read = functools.partial(
            _read,
            source,
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
        )
        data = processes.after_first(read)
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
    processes.check_same(data.digest, f"the examples of {option}")
    optional = Needs.of(terms).may_read
    _check_columns(data, terms, [name for name in optional if getattr(data, name) is not None])
    if any(term.objective.mismatched for term in terms):
        data = labelled.with_mismatched(data, seed=config.seed, max_length=config.max_length)
        say(f"{option}: {data.notices[-1]}")
    return data


def _read(source: DataSource, tokenizer: str, **options: Any) -> TokenizedData:
    """A source's examples, tokenized; see `tokenized` for the options."""
    path = data_copies.fetch(source.path, f"{source.option}.path")
    return tokenized(source.name, path, tokenizer, option=source.option, **options)


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
        parts=sharding.length_parts(mesh),
        rows=config.packing.rows,
        row_length=packing.parse_row_length(config.packing.row_length),
        shapes=config.packing.shapes,
        names=names,
    )


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
        parts=sharding.length_parts(mesh),
    )


def make_batches(
    config: Config,
    data: TokenizedData,
    plan: Plan,
    columns: Mapping[str, np.ndarray],
    terms: Sequence[Term],
    *,
    sweep: bool = False,
    rows: Int[np.ndarray, " own"] | None = None,
) -> Batches:
    """Batches with all that the loss reads.

    Args:
        config: The config; its seed fixes what is drawn.
        data: The examples.
        plan: Where they lie.
        columns: What is known of the reference: an element of `Reference.columns`.
        terms: The loss.
        sweep: Whether the plan is that of an evaluation.
        rows: See `Batches`.
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
        rows=rows,
    )
