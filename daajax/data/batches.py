"""One update's arrays: the one batch layout, filled from a plan.

A batch is a dict of NumPy arrays `[micro_batches, rows, …]`; its keys are those of `LAYOUT`. A row holds whole
examples. With prefix sharing an example lies as prompt, response 1, …, response K; without it each response carries
its own copy of the prompt.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from daajax.data.packing import Plan
from daajax.data.tokens import TokenizedData

Batch = dict[str, np.ndarray]

LAYOUT = {  # key: (dtype, axes, value where there is nothing)
    "tokens": (np.int32, ("rows", "length"), 0),
    "positions": (np.int32, ("rows", "length"), 0),
    "segments": (np.int32, ("rows", "length"), 0),
    "branches": (np.int32, ("rows", "length"), 0),
    "sources": (np.int32, ("rows", "scored"), 0),
    "targets": (np.int32, ("rows", "scored"), 0),
    "owners": (np.int32, ("rows", "scored"), -1),
    "offsets": (np.int32, ("rows", "scored"), 0),
    "reference": (np.float32, ("rows", "scored"), 0),
    "lengths": (np.int32, ("rows", "slots", "responses"), 0),
    "weights": (np.float32, ("rows", "slots"), 0),
    "places": (np.int32, ("rows", "slots"), -1),
    "ids": (np.int32, ("rows", "slots"), -1),
}


class Batches:
    """Fills batches from tokenized data and a plan; batch t is a pure function of both and t.

    Args:
        data: The examples.
        plan: Where every example lies.
        reference: Reference log-prob of each of the data's tokens, nats; None leaves zeros.
    """

    def __init__(self, data: TokenizedData, plan: Plan, reference: Float[np.ndarray, " total"] | None = None):
        self.plan = plan
        self.responses = data.lengths.shape[1] - 1
        self._data, self._reference = data, reference

    def __getitem__(self, update: int) -> Batch:
        """The batch of one update, every row."""
        plan, shape = self.plan, self.plan.shape(update)
        total_rows = plan.micro_batches * plan.rows
        axes = dict(
            rows=total_rows, length=shape.length, slots=shape.slots, scored=shape.scored, responses=self.responses
        )
        batch = {
            key: np.full([axes[axis] for axis in names], empty, dtype) for key, (dtype, names, empty) in LAYOUT.items()
        }
        filled = np.zeros((total_rows, 3), np.int64)  # slots, positions, scored slots taken so far
        for place, (example, row) in enumerate(
            zip(plan.windows[update].tolist(), plan.row_of[update].tolist(), strict=True)
        ):
            if example >= 0:
                self._put(batch, row, filled[row], place, example)
        return {key: value.reshape(plan.micro_batches, plan.rows, *value.shape[1:]) for key, value in batch.items()}

    def __len__(self) -> int:
        return self.plan.updates

    def __iter__(self) -> Iterator[Batch]:
        return (self[update] for update in range(len(self)))

    def token_indices(self, update: int) -> Int[np.ndarray, "micro_batches rows scored"]:
        """Index into the data's flat tokens of each scored slot; -1 where the slot is empty.

        It is the way back: what was computed for a slot belongs to that token of the data.
        """
        plan, shape = self.plan, self.plan.shape(update)
        indices = np.full((plan.micro_batches * plan.rows, shape.scored), -1, np.int64)
        filled = np.zeros(len(indices), np.int64)
        for example, row in zip(plan.windows[update].tolist(), plan.row_of[update].tolist(), strict=True):
            if example >= 0:
                lengths = self._data.lengths[example]
                begin = self._data.starts[example] + lengths[0]
                mine = begin + np.nonzero(self._data.scored[begin : begin + lengths[1:].sum()])[0]
                indices[row, filled[row] : filled[row] + len(mine)] = mine
                filled[row] += len(mine)
        return indices.reshape(plan.micro_batches, plan.rows, -1)

    def _put(self, batch: Batch, row: int, filled: Int[np.ndarray, "3"], place: int, example: int) -> None:
        """Writes one example into the next free slot of a row."""
        slot, position, first = filled
        lengths = self._data.lengths[example]
        prompt = lengths[0]
        begin = self._data.starts[example]
        responses = [k for k in range(1, self.responses + 1) if lengths[k]]
        pieces = (
            [(0, begin, prompt, 0)] if self.plan.prefix_sharing else []
        )  # branch, where in the data, tokens, position
        source_of_first = position + prompt - 1
        cursor = begin + prompt
        starts = {}
        for k in responses:
            if not self.plan.prefix_sharing:
                pieces.append((k, begin, prompt, 0))
            starts[k] = position + sum(piece[2] for piece in pieces)
            pieces.append((k, cursor, lengths[k], prompt))
            cursor += lengths[k]
        for branch, where, count, rotary in pieces:
            span = slice(position, position + count)
            batch["tokens"][row, span] = self._data.tokens[where : where + count]
            batch["positions"][row, span] = np.arange(rotary, rotary + count)
            batch["segments"][row, span] = slot + 1
            batch["branches"][row, span] = branch
            position += count
        cursor = begin + prompt
        for k in responses:
            mine = np.nonzero(self._data.scored[cursor : cursor + lengths[k]])[0]
            span = slice(first, first + len(mine))
            before_first = source_of_first if self.plan.prefix_sharing else starts[k] - 1
            batch["sources"][row, span] = np.where(mine == 0, before_first, starts[k] + mine - 1)
            batch["targets"][row, span] = self._data.tokens[cursor + mine]
            batch["owners"][row, span] = slot * self.responses + k - 1
            batch["offsets"][row, span] = np.arange(len(mine))
            if self._reference is not None:
                batch["reference"][row, span] = self._reference[cursor + mine]
            batch["lengths"][row, slot, k - 1] = len(mine)
            first += len(mine)
            cursor += lengths[k]
        batch["weights"][row, slot] = self._data.weights[example]
        batch["places"][row, slot] = place
        batch["ids"][row, slot] = example
        filled[:] = slot + 1, position, first
