"""The models of a run, from its options: scoring functions, parameters, state, reference. Its data are in `inputs`."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from daajax import inputs, reference, sharding
from daajax.checkpoint import Checkpoints, Record
from daajax.config import Config, has_adapters, hyperparameters
from daajax.console import say
from daajax.data.packing import Plan
from daajax.data.tokens import TokenizedData
from daajax.errors import UserError
from daajax.losses.terms import Needs, Term, initial_state
from daajax.models import decoder, directory, lora, peft, weights
from daajax.models.architecture import Architecture
from daajax.models.decoder import Params
from daajax.models.digest import digest_of
from daajax.models.families import read_architecture
from daajax.models.lora import Lora
from daajax.models.parameters import layer_parameters, outer_parameters
from daajax.models.quantization import FORMATS
from daajax.optimizer import make_optimizer, make_schedule
from daajax.scoring import Batch, Scorer
from daajax.step import Beside, Follow, TrainState, Update, abstract_state


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


def lora_of(config: Config, architecture: Architecture) -> Lora | None:
    """What of the model a config trains, if that is not all of it.

    Raises:
        UserError: If the model has no such projections or parameters, or the adapter to go on with is of another one.
    """
    options = config.lora
    if not has_adapters(config):
        return None
    kept = {"dtype": config.model.dtype, "quantization": options.quantization}
    if options.path is not None:
        return dataclasses.replace(peft.read(options.path, architecture), **kept)
    targets = lora.targets_of(architecture, options.targets)
    names = [*outer_parameters(architecture), *layer_parameters(architecture)]
    there = [name for name in names if name not in targets and not name.endswith("_bias")]
    if unknown := [name for name in options.modules_to_save if name not in there]:
        raise UserError(
            f"lora.modules_to_save has {unknown[0]!r}; what can be trained whole beside adapters of "
            f"{', '.join(targets)}: {', '.join(there)}."
        )
    found = Lora(options.rank, options.alpha, targets, options.rslora, tuple(options.modules_to_save), **kept)
    peft.check(architecture, found)
    return found


def make_scorer(config: Config, architecture: Architecture, mesh: Any, *, adapters: Lora | None = None) -> Scorer:
    """The scoring function of a model on a mesh.

    Args:
        config: The run's.
        architecture: What the model computes.
        mesh: The mesh.
        adapters: What of it is trained; None: all of it, or it is not the policy.

    Raises:
        UserError: If the mesh cuts the heads into unequal parts.
    """
    return Scorer.make(
        architecture,
        mesh,
        attention="blockwise" if config.attention == "auto" else config.attention,
        remat=config.remat,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
        lora=adapters,
    )


def param_layout(scorer: Scorer, mesh: Any) -> tuple[Params, Params]:
    """Shape and dtype of every parameter, and where on the mesh it lives.

    Raises:
        UserError: If an axis of a parameter does not divide over the mesh.
    """
    shapes, axes = decoder.abstract_params(scorer.model)
    return shapes, sharding.param_shardings(mesh, shapes, axes)


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
        UserError: If an axis of a parameter does not divide over the mesh, or the run ends before its warm-up does.
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
    own, frozen = lora.split(sharding.abstract(*param_layout(scorer, mesh)), scorer.model.lora)
    compared = {}
    if is_live and not follows:
        other = sharding.abstract(*param_layout(reference_scorer, mesh))
        compared = reference_part(config, other, scorer.model.lora)
    return Update(
        scorer,
        terms,
        optimizer,
        schedule,
        batch_size=config.batch_size,
        state=abstract_state(own, optimizer, terms, mesh, follows=follows),
        beside=Beside(frozen, compared),
        reference_scorer=reference_scorer if is_live else None,
        follow=Follow(config.reference.ema.decay, config.reference.ema.every) if follows else None,
        router_loss_coef=config.model.router_aux_loss_coef,
    )


def load_params(path: str, scorer: Scorer, mesh: Any, *, random_seed: int | None = None) -> Params:
    """Parameters on the mesh, without adapters.

    Args:
        path: Model directory.
        scorer: Whose parameters.
        mesh: The mesh.
        random_seed: Draws fresh parameters from it instead of reading them.
    """
    plain = dequantized(scorer)
    shapes, shardings = (lora.without(tree) for tree in param_layout(plain, mesh))
    keep = _quantizer(scorer, mesh)
    if random_seed is None:
        return weights.load(path, scorer.model.architecture, shapes, shardings, keep)

    def draw(key: jax.Array) -> Params:
        drawn = decoder.init_params(plain.model.clone(lora=None), key)
        return jax.tree.map(lambda x, shape: x.astype(shape.dtype), drawn, shapes)

    drawn = jax.jit(draw, out_shardings=shardings)(jax.random.key(random_seed))
    flat: Any = traverse.flatten_dict(drawn, sep="/")
    return traverse.unflatten_dict({path: keep(path, leaf) for path, leaf in flat.items()}, sep="/")


def dequantized(scorer: Scorer) -> Scorer:
    """The same model with no weight quantized."""
    adapters = scorer.model.lora and dataclasses.replace(scorer.model.lora, quantization=None)
    return dataclasses.replace(scorer, model=scorer.model.clone(lora=adapters))


def _quantizer(scorer: Scorer, mesh: Any) -> Callable[[str, jax.Array], Any]:
    """From a parameter's path and itself to what is kept of it: the parts it is quantized to, or itself."""
    adapters, homes = scorer.model.lora, param_layout(scorer, mesh)[1]

    def keep(path: str, weight: jax.Array) -> Any:
        if adapters is None or not adapters.quantizes(path):
            return weight
        where = functools.reduce(operator.getitem, path.split("/"), homes)
        return jax.jit(FORMATS[str(adapters.quantization)].quantize, out_shardings=where)(weight)

    return keep


def load_base(config: Config, scorer: Scorer, mesh: Any) -> Params:
    """The policy's initial parameters without adapters."""
    seed = config.seed if config.model.random_init else None
    return load_params(config.model.path, scorer, mesh, random_seed=seed)


def load_initial_params(config: Config, scorer: Scorer, mesh: Any) -> Params:
    """The parameters that training starts from: of model.path or drawn from the seed, and so the adapters."""
    params, adapters = load_base(config, scorer, mesh), scorer.model.lora
    if adapters is None:
        return params
    if config.lora.path is not None:
        layout = param_layout(scorer, mesh)
        return lora.joined(peft.load(config.lora.path, scorer.model.architecture, adapters, *layout), params)
    homes = param_layout(scorer, mesh)[1][lora.COLLECTION]
    draw = jax.jit(lambda key: decoder.init_params(scorer.model, key)[lora.COLLECTION], out_shardings=homes)
    return {**params, lora.COLLECTION: draw(jax.random.key(config.seed))}


def at_start(config: Config, params: Params) -> Params:
    """Of the parameters that training starts from, those that tell how it scores: fresh adapters change nothing."""
    return params if config.lora.path is not None else lora.without(params)


def digest_at_start(config: Config, params: Params, scorer: Scorer) -> str:
    """What the parameters that training starts from are, in a few characters."""
    return _digest(at_start(config, params), scorer)


def _digest(params: Params, scorer: Scorer) -> str:
    adapters = scorer.model.lora
    return digest_of(params, adapters.scale if adapters is not None and lora.COLLECTION in params else None)


def reference_part(config: Config, params: Params, adapters: Lora | None) -> Params:
    """Of a live reference's parameters, or of anything in their place, those that are not frozen ones of the policy."""
    if config.reference.mode == "path":
        return params
    own, _ = lora.split(params, adapters)
    return lora.without(own) if config.reference.mode == "adapter_off" else at_start(config, own)


def merged(config: Config, params: Params, scorer: Scorer, mesh: Any) -> Params:
    """The whole model that trained parameters make, adapters melted in.

    What was not trained is as it is in the files that it came from, to the last bit, but for what was quantized:
    that is what it was computed with.

    Args:
        config: The run's.
        params: The policy's that are trained; others among them are not read.
        scorer: The policy's.
        mesh: The mesh.

    Raises:
        UserError: If the base cannot be read again.
    """
    model, adapters = scorer.model, scorer.model.lora
    if adapters is None:
        return params
    if not config.model.random_init:
        model = model.clone(param_dtype=weights.common_dtype(config.model.path, model.architecture))
    base = load_base(config, dataclasses.replace(scorer, model=model.clone(lora=None)), mesh)
    if adapters.quantization is not None:
        base = lora.rounded(base, adapters)
    return lora.merged(base, lora.split(params, adapters)[0], adapters)


def params_at(config: Config, saved: Checkpoints, step: int, scorer: Scorer, mesh: Any) -> Params:
    """The policy's parameters after an update; step 0 is before the first.

    Raises:
        UserError: If there is no sound checkpoint of that update, or the initial weights are not those of the run.
    """
    state, frozen = state_at(config, saved, step, scorer, (), mesh)
    return lora.joined(state.params, frozen)


def state_at(
    config: Config,
    saved: Checkpoints,
    step: int,
    scorer: Scorer,
    terms: Sequence[Term],
    mesh: Any,
    *,
    initial: Params | None = None,
) -> tuple[TrainState, Params]:
    """What an evaluation reads of a run's state after an update: all but the optimizer's part; what of it is frozen.

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
    adapters, trained, frozen = scorer.model.lora, {}, {}
    if initial is None and (step == 0 or adapters is not None):
        initial = load_initial_params(config, scorer, mesh)
        origin = Record(data="", model=digest_at_start(config, initial, scorer))
        saved.check_origin(step, origin, forced=config.resume == "force")
    if initial is not None:
        trained, frozen = lora.split(initial, adapters)
    if step == 0:
        return TrainState(None, trained, (), jax.tree.map(jnp.float32, initial_state(terms))), frozen
    del trained, initial  # before the others come
    abstract = sharding.abstract(*(lora.split(tree, adapters)[0] for tree in param_layout(scorer, mesh)))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    kept = jax.tree.map(lambda _: scalar, initial_state(terms))
    follows = terms and config.reference.mode == "ema"
    return saved.restore_parts(step, TrainState(None, abstract, (), kept, abstract if follows else ())), frozen


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
    adapters, architecture = scorer.model.lora, reference_scorer.model.architecture
    params = at_start(config, params)
    policy = _digest(params, scorer)
    what = config.lora.path or config.model.path
    if config.reference.mode == "path":
        what = config.reference.path
        params = load_params(what, reference_scorer, mesh)
    elif config.reference.mode == "adapter_off":
        what, params = config.model.path, lora.without(params)
        if config.lora.path is not None and adapters is not None and adapters.whole:
            params = load_base(config, scorer, mesh)  # the adapter brought parts of its own
    digest = _digest(params, reference_scorer)
    same = digest == policy and architecture == scorer.model.architecture
    if why := why_live(config, terms):
        say(f"reference: {what} ({digest[:12]}) stays in memory beside the policy: {why}")
        return Reference([{} for _ in sets], policy, digest, same, reference_part(config, params, adapters))
    names = Needs.of(terms).of_reference
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
            layout = inputs.plan_sweep(config, data, mesh, examples=unscored, most_tokens=plan.most_tokens)
            reference.score_pass(data, layout, score_part, cache, what=what)
        columns.append(reference.columns_of(data, examples, cache))
        if "entropies" in names:
            columns[-1]["entropies"] /= math.log(architecture.vocab_size)
    return Reference(columns, policy, digest, same)
