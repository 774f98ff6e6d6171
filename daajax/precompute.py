"""The reference pass as a command: scores what a run will read, so that the run itself finds it in the cache.

`python -m daajax.precompute --config=configs/dpo_llama.py [--config.key=value …]` takes the flags of `daajax.train`.
"""

from daajax import command, inputs, policy, run, sharding
from daajax.config import Config, losses
from daajax.console import say
from daajax.errors import UserError
from daajax.losses.terms import bind
from daajax.models.families import read_architecture


def precompute(config: Config, workdir: str = "") -> None:
    """Fills the reference cache for the run that a config describes.

    Args:
        config: From `daajax.config.resolve`.
        workdir: Not used: the cache belongs to no run.

    Raises:
        UserError: If the run reads no reference, or anything the user can mend stands in the way.
    """
    del workdir
    if config.reference.mode == "none":
        raise UserError("config.reference.mode='none': this run reads no reference, there is nothing to precompute.")
    terms = bind(losses(config))
    config, _ = run.fetch_models(config)
    architecture = read_architecture(config.model.path, length=config.max_length)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    if why := run.why_live(config, terms):
        raise UserError(f"the reference stays in memory beside the policy ({why}): there is nothing to precompute.")
    sets = inputs.load_sets(config, architecture, terms, mesh)
    scorer = policy.make_scorer(config, architecture, mesh, adapters=policy.lora_of(config, architecture))
    reference_scorer = run.make_reference_scorer(config, scorer, terms, mesh)
    params = policy.load_initial_params(config, scorer, mesh)
    run.load_reference(config, sets, scorer, reference_scorer, params, terms, mesh)
    say("the reference cache has everything this run reads")


if __name__ == "__main__":
    command.run(precompute, "precompute")
