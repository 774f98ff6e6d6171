"""A checkpoint as a model directory: `python -m daajax.export --workdir=DIR [--step=N] [--output=DIR]`.

Adapters are melted into it; `--form=adapter` writes them alone, as PEFT does. What training writes to `model/` and
`adapter/` at its end is the same of the last update.
"""

from daajax import bucket, checkpoint, command, folder, policy, processes, run, sharding
from daajax.config import Config, has_adapters, tokenizer_path
from daajax.console import say
from daajax.errors import UserError
from daajax.models import directory, peft, weights
from daajax.models.families import read_architecture

FORMS = ("merged", "adapter")


def export(
    config: Config, workdir: str, step: int | None = None, output: str | None = None, form: str | None = None
) -> None:
    """Writes a run's checkpoint as a Hugging Face directory; tokenizer, template and generation config come along.

    Args:
        config: The run's.
        workdir: Its folder.
        step: Update of the checkpoint; 0 is the initial policy, None the latest.
        output: The directory to make; None: `model-<step>` or `adapter-<step>` in the run's folder.
        form: `merged`, a whole model, or `adapter`, what was trained as PEFT stores it; None: merged.

    Raises:
        UserError: If there is no such checkpoint or adapter, or the directory exists or cannot be written.
    """
    if form not in (None, *FORMS):
        raise UserError(f"--form={form} is unknown; there are {', '.join(FORMS)}.")
    alone = form == "adapter"
    if alone and not has_adapters(config):
        raise UserError(f"--form=adapter: the run in {workdir} trained the whole model; leave --form out.")
    where = bucket.path_of(workdir, "--workdir")
    saved = checkpoint.Checkpoints(where)
    step = saved.choose(step)
    name = f"{'adapter' if alone else 'model'}-{step}"
    target = where / name if output is None else bucket.path_of(output, "--output")
    if processes.from_first(target.exists):
        raise UserError(f"--output={target} exists; name another directory, or remove it.")
    asked = config.model.path
    config, revisions = run.fetch_models(config, folder.read_revisions(where))
    architecture = read_architecture(config.model.path, length=config.max_length)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    adapters = policy.lora_of(config, architecture)
    scorer = policy.make_scorer(config, architecture, mesh, adapters=adapters)
    state = policy.state_at(config, saved, step, scorer, (), mesh)[0]
    words = tokenizer_path(config)
    if alone and adapters is not None:
        peft.save(
            str(target),
            state.params,
            architecture,
            adapters,
            base=directory.pinned(asked, revisions),
            tokenizer_path=words,
        )
    else:
        params = policy.merged(config, state.params, scorer, mesh)
        weights.save(str(target), params, architecture, model_path=config.model.path, tokenizer_path=words)
    say(f"the {'adapter' if alone else 'model'} of update {step} is in {target}")


if __name__ == "__main__":
    command.run_at(export, "export", step=int, output=str, form=str)
