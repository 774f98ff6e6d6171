"""The policy of a run, from its options: its scoring function, what of it is trained, its parameters at any update."""

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp

from daajax import sharding
from daajax.checkpoint import Checkpoints
from daajax.config import Config, has_adapters
from daajax.errors import UserError
from daajax.losses.terms import Term, initial_state
from daajax.models import decoder, lora, peft, weights
from daajax.models.architecture import Architecture
from daajax.models.decoder import Params
from daajax.models.digest import digest_of
from daajax.models.lora import Lora
from daajax.models.parameters import layer_parameters, outer_parameters
from daajax.models.quantization import FORMATS
from daajax.models.storage import Later
from daajax.record import Record
from daajax.scoring import Scorer
from daajax.step import TrainState


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
        if not pathlib.Path(options.path).is_dir():
            raise UserError(f"lora.path={options.path} is not a directory; name that of an adapter that PEFT saved.")
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
        UserError: If the mesh cuts the heads into unequal parts, or the attention does not serve there.
    """
    return Scorer.make(
        architecture,
        mesh,
        attention=config.attention,
        remat=config.remat,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
        lora=adapters,
        longest=config.max_length,
    )


def param_layout(scorer: Scorer, mesh: Any) -> tuple[Params, Params]:
    """Shape and dtype of every parameter, and where on the mesh it lives.

    Raises:
        UserError: If an axis of a parameter does not divide over the mesh.
    """
    shapes, axes = decoder.abstract_params(scorer.model)
    return shapes, sharding.param_shardings(mesh, shapes, axes)


def load_params(path: str, scorer: Scorer, mesh: Any, *, random_seed: int | None = None) -> Params:
    """Parameters on the mesh, without adapters.

    Args:
        path: Model directory.
        scorer: Whose parameters.
        mesh: The mesh.
        random_seed: Draws fresh parameters from it instead of reading them.
    """
    shapes, shardings = base_layout(scorer, mesh)
    keep = _quantizer(scorer, mesh)
    if random_seed is None:
        return weights.load(path, scorer.model.architecture, shapes, shardings, keep)

    def draw(key: jax.Array) -> Params:
        drawn = decoder.init_params(scorer.model.clone(lora=None), key)
        return jax.tree.map(lambda x, shape: x.astype(shape.dtype), drawn, shapes)

    drawn = jax.jit(draw, out_shardings=shardings)(jax.random.key(random_seed))
    flat: Any = traverse.flatten_dict(drawn, sep="/")
    return traverse.unflatten_dict({path: keep(path, leaf) for path, leaf in flat.items()}, sep="/")


def base_layout(scorer: Scorer, mesh: Any) -> tuple[Params, Params]:
    """As `param_layout`, of a model directory: without adapters, and with no weight quantized."""
    adapters = scorer.model.lora and dataclasses.replace(scorer.model.lora, quantization=None)
    whole = dataclasses.replace(scorer, model=scorer.model.clone(lora=adapters))
    shapes, shardings = param_layout(whole, mesh)
    return lora.without(shapes), lora.without(shardings)


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
    return digest(at_start(config, params), scorer)


def digest(params: Params, scorer: Scorer) -> str:
    """What parameters are, in a few characters."""
    adapters = scorer.model.lora
    return digest_of(params, adapters.scale if adapters is not None and lora.COLLECTION in params else None)


def merged(config: Config, params: Params, scorer: Scorer, mesh: Any) -> Params:
    """The whole model that trained parameters make, adapters melted in, one parameter at a time: see `lora.merged`.

    What was neither trained nor quantized is as it is in the files that it came from, to the last bit.

    Args:
        config: The run's.
        params: The policy's that are trained; others among them are not read.
        scorer: The policy's.
        mesh: The mesh.

    Raises:
        UserError: If the base cannot be read again.
    """
    adapters, plain = scorer.model.lora, dataclasses.replace(scorer, model=scorer.model.clone(lora=None))
    if adapters is None:
        return params
    if config.model.random_init:
        base = jax.tree.map(Later.of, load_base(config, plain, mesh))
    else:
        base = weights.later(config.model.path, scorer.model.architecture, *param_layout(plain, mesh))
    return lora.merged(base, lora.split(params, adapters)[0], adapters)


def base_of_whole(config: Config, scorer: Scorer, mesh: Any) -> Params:
    """The base's own of those parameters that are trained whole beside adapters."""
    adapters, (shapes, shardings) = scorer.model.lora, base_layout(scorer, mesh)
    if config.model.random_init:
        return lora.split(load_base(config, scorer, mesh), adapters)[0]
    base = weights.later(config.model.path, scorer.model.architecture, shapes, shardings)
    own = (lora.split(tree, adapters)[0] for tree in (base, shapes))
    return jax.tree.map(lambda later, shape: later.make().astype(shape.dtype), *own)


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
