"""What the commands that start from a config have in common: from its options to the parts of a run."""

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from daajax import reference, sharding
from daajax.config import Config
from daajax.console import say
from daajax.data import packing, windows
from daajax.data.packing import Plan
from daajax.data.sizes import Sizes
from daajax.data.token_cache import tokenized
from daajax.data.tokens import TokenizedData, summary
from daajax.errors import UserError
from daajax.losses.terms import Term
from daajax.models import decoder, weights
from daajax.models.decoder import Params
from daajax.models.families import Architecture, read_architecture
from daajax.scoring import Scorer


def load_data(config: Config, architecture: Architecture, terms: Sequence[Term]) -> TokenizedData:
    """Reads and tokenizes the data, and checks that they have the responses which the loss compares.

    Raises:
        UserError: If data or tokenizer are at fault, or do not fit the loss or the model.
    """
    data = tokenized(
        config.data.name,
        config.data.path,
        tokenizer_path(config),
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation=config.data.truncation,
        template=config.chat.template,
        score=config.chat.score,
        limit=config.data.limit,
        max_bad_rows=config.data.max_bad_rows,
        vocab_size=architecture.vocab_size,
        cache_dir=config.data.cache_dir,
    )
    for line in [*data.notices, *summary(data.counters)]:
        say(f"data: {line}")
    if config.max_length > architecture.max_position_embeddings:
        say(
            f"data: max_length={config.max_length} exceeds the {architecture.max_position_embeddings} positions that "
            "the model was made for"
        )
    return _with_responses(data, terms)


def _with_responses(data: TokenizedData, terms: Sequence[Term]) -> TokenizedData:
    """The data with as many responses as the loss reads."""
    needed = max(term.objective.responses or data.lengths.shape[1] - 1 for term in terms)
    found = data.lengths.shape[1] - 1
    name = next(term.name for term in terms if (term.objective.responses or found) == needed)
    if found < needed or (needed > 1 and found > needed):
        raise UserError(
            f"loss {name!r} compares {needed} responses but the data have {found} a prompt; "
            "choose another loss or other data."
        )
    lacking = np.nonzero((data.lengths[:, 1 : 1 + needed] == 0).any(axis=1))[0]
    if len(lacking) and any(term.objective.responses for term in terms):
        raise UserError(
            f"loss {name!r} needs {needed} responses but {len(lacking)} examples have fewer, such as "
            f"{data.ids[int(lacking[0])]!r}; complete or remove them."
        )
    if found > needed:
        say(f"data: loss {name!r} reads the first of {found} responses; the others are left out")
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
    examples = len(data.weights)
    updates = windows.updates_of(
        steps=config.steps, epochs=config.epochs, examples=examples, batch_size=config.batch_size
    )
    order = windows.training_windows(
        sizes,
        batch_size=config.batch_size,
        updates=updates,
        shuffle=config.data.shuffle,
        seed=config.seed,
    )
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


def load_params(path: str, scorer: Scorer, mesh: Any, *, random_seed: int | None = None) -> tuple[Params, Params]:
    """Parameters on the mesh, and where they live.

    Args:
        path: Model directory.
        scorer: Whose parameters.
        mesh: The mesh.
        random_seed: Draws fresh parameters from it instead of reading them.
    """
    shapes, axes = decoder.abstract_params(scorer.model)
    shardings = sharding.param_shardings(mesh, shapes, axes)
    if random_seed is None:
        return weights.load(path, scorer.model.architecture, shapes, shardings), shardings
    init = jax.jit(lambda key: decoder.init_params(scorer.model, key), out_shardings=shardings)
    return init(jax.random.key(random_seed)), shardings


@dataclasses.dataclass(frozen=True)
class Reference:
    """Reference log-probs of everything a run reads.

    Attributes:
        logps: Of each of the data's tokens, nats.
        is_initial_policy: Whether the reference's weights are those that training starts from.
    """

    logps: Float[np.ndarray, " total"]
    is_initial_policy: bool


def load_reference(
    config: Config, data: TokenizedData, plan: Plan, scorer: Scorer, params: Params, mesh: Any
) -> Reference:
    """Reads the reference log-probs from the cache; a pass over the reference model scores what is missing.

    The reference model of mode `path` is in memory only while this runs.

    Args:
        config: The config; its reference.mode is not `none`.
        data: The examples.
        plan: Says which of them the run reads.
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
        params, _ = load_params(what, scorer, mesh)
        digest = weights.digest(params)
    header = reference.Header(digest, dataclasses.asdict(architecture), config.model.dtype)
    cache = reference.Cache(config.reference.cache_dir, header)
    examples = reference.examples_of(plan)
    lacking = reference.missing(data, examples, cache)
    for line in cache.notices:
        say(line)
    say(
        f"reference: {what} ({digest[:12]}), {len(examples) - len(lacking)} of {len(examples)} examples in the cache "
        f"{cache.folder}"
    )
    if len(lacking):
        score = jax.jit(scorer.token_logps, static_argnames="keys")

        def score_part(part: dict[str, np.ndarray], keys: int) -> jax.Array:
            return score(params, sharding.place(mesh, part, ("rows",)), keys=keys)

        sizes = Sizes.of(data, prefix_sharing=config.packing.prefix_sharing)
        # No more tokens at a time than in training, also where it is the long examples that are lacking.
        most = np.where(plan.windows >= 0, sizes.length[plan.windows], 0).sum(axis=1).max()
        batch_size = int(np.clip(most / sizes.length[lacking].mean(), 1, plan.batch_size))
        layout = packing.pack(
            windows.sweep_windows(sizes, batch_size=batch_size, examples=lacking),
            sizes,
            packing=config.packing.enabled,
            micro_batches=plan.micro_batches,
            row_multiple=sharding.row_multiple(mesh),
        )
        reference.score_pass(data, layout, score_part, cache, what=what)
    logps = reference.column(data, examples, cache)
    del params
    gc.collect()
    return Reference(logps, digest == policy and same_architecture)
