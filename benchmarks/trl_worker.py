"""TRL's DPOTrainer as a worker of `benchmarks.against_trl`; runs in `.venv-trl`, without daajax.

    .venv-trl/bin/python -m benchmarks.trl_worker JSON

JSON: `model` and `pairs`, paths; `threads`; `arguments`, of DPOConfig, beside those that are fixed here.
"""
# pyright: reportMissingImports=false

import json
import pathlib
import sys
import tempfile
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from benchmarks.workers import Parent, Stopwatch, peak


class Trainer(trl.DPOTrainer):
    """Remembers the loss of every micro-batch, and how long the pass over the reference took if there was one."""

    losses: list[torch.Tensor]
    reference: dict[str, float] | None = None

    def _precompute_ref_logps(self, *arguments: Any, **keywords: Any) -> Any:
        watch = Stopwatch()
        found = super()._precompute_ref_logps(*arguments, **keywords)
        self.reference = watch.read()
        return found

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        """As TRL's."""
        loss = super().compute_loss(*arguments, **keywords)
        self.losses.append(loss.detach())
        return loss


class Turns(TrainerCallback):
    """Stops between two updates until the parent asks for more; an update is all from one such place to the next."""

    def __init__(self, parent: Parent, losses: list[torch.Tensor], parts: int):
        self._parent, self._losses, self._parts = parent, losses, parts
        self._left, self._times, self._watch = 0, [], Stopwatch()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Waits for the first command."""
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reads the clock; answers and waits where as much is done as was asked."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._times.append(self._watch.read())
        self._left -= 1
        if self._left == 0:
            values = [float(loss) for loss in self._losses]
            updates = [values[at : at + self._parts] for at in range(0, len(values), self._parts)]
            self._losses.clear()
            self._parent.tell(times=self._times, losses=[sum(part) / len(part) for part in updates])
            self._times = []
            self._wait(control)

    def _wait(self, control: Any) -> None:
        command = self._parent.next()
        if command["do"] == "update":
            self._left = command["count"]
        else:
            control.should_training_stop = True
        self._watch.read()


def most() -> int:
    """The most memory that this process ever had, bytes: of its GPU, or resident."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak()


def main() -> None:
    """Trains as told."""
    parent, given = Parent(), json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    with pathlib.Path(given["pairs"]).open() as lines:
        rows = [json.loads(line) for line in lines]
    data = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            max_steps=1_000_000,  # the parent says when it is enough; the same updates come round again
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **given["arguments"],
        )
        # A path is loaded in float32.
        trainer = Trainer(
            model=given["model"],
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(given["model"]),
        )
        if len(trainer.train_dataset) != len(rows):
            raise RuntimeError(f"TRL keeps {len(trainer.train_dataset)} of {len(rows)} pairs")
        trainer.losses = []
        trainer.add_callback(Turns(parent, trainer.losses, config.gradient_accumulation_steps))
        parent.tell(
            reference=trainer.reference,
            peak=most(),
            versions={module.__name__: module.__version__ for module in (trl, torch, transformers)},
        )
        trainer.train()
        parent.tell(peak=most())


if __name__ == "__main__":
    main()
