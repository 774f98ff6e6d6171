"""A checkpoint as a model directory: `python -m daajax.export --workdir=DIR [--step=N] [--output=DIR]`.

What training writes to `model/` at its end is the same of the last update.
"""

import pathlib

from daajax import checkpoint, command, folder, run, sharding
from daajax.config import Config, tokenizer_path
from daajax.console import say
from daajax.errors import UserError
from daajax.models import weights
from daajax.models.families import read_architecture


def export(config: Config, workdir: str, step: int | None = None, output: str | None = None) -> None:
    """Writes a run's checkpoint as a Hugging Face directory; tokenizer, template and generation config come along.

    Args:
        config: The run's.
        workdir: Its folder.
        step: Update of the checkpoint; 0 is the initial policy, None the latest.
        output: The directory to make; None: `model-<step>` in the run's folder.

    Raises:
        UserError: If there is no such checkpoint, or the directory exists or cannot be written.
    """
    saved = checkpoint.Checkpoints(pathlib.Path(workdir))
    step = saved.choose(step)
    target = pathlib.Path(output or pathlib.Path(workdir) / f"model-{step}")
    if target.exists():
        raise UserError(f"--output={target} exists; name another directory, or remove it.")
    config, _ = run.fetch_models(config, folder.read_revisions(pathlib.Path(workdir)))
    architecture = read_architecture(config.model.path, length=config.max_length)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    scorer = run.make_scorer(config, architecture, mesh, adapters=run.lora_of(config, architecture))
    state, _ = run.state_at(config, saved, step, scorer, (), mesh)
    params = run.merged(config, state.params, scorer, mesh)
    weights.save(str(target), params, architecture, model_path=config.model.path, tokenizer_path=tokenizer_path(config))
    say(f"the model of update {step} is in {target}")


if __name__ == "__main__":
    command.run_at(export, "export", step=int, output=str)
