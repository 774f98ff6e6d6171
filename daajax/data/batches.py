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
_INDICES = {"indices": (np.int64, ("rows", "scored"), -1)}  # filled with the others, but stays on the host


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

    def fill(self, update: int) -> tuple[Batch, Int[np.ndarray, "micro_batches rows scored"]]:
        """The batch of one update, every row, and which token of the data each of its scored slots holds.

        Args:
            update: Which one.

        Returns:
            The batch, and the index into the data's flat tokens of each scored slot; -1 where the slot is empty. The
            indices are the way back: what was computed for a slot belongs to that token of the data.
        """
        plan, shape = self.plan, self.plan.shape(update)
        total_rows = plan.micro_batches * plan.rows
        axes = dict(
            rows=total_rows, length=shape.length, slots=shape.slots, scored=shape.scored, responses=self.responses
        )
        arrays = {
            key: np.full([axes[axis] for axis in names], empty, dtype)
            for key, (dtype, names, empty) in (LAYOUT | _INDICES).items()
        }
        rows = [_Row({key: value[row] for key, value in arrays.items()}) for row in range(total_rows)]
        for place, (example, row) in enumerate(
            zip(plan.windows[update].tolist(), plan.row_of[update].tolist(), strict=True)
        ):
            if example >= 0:
                self._put(rows[row], place, example)
        batch = {key: value.reshape(plan.micro_batches, plan.rows, *value.shape[1:]) for key, value in arrays.items()}
        indices = batch.pop("indices")
        return batch, indices

    def __getitem__(self, update: int) -> Batch:
        """The batch of one update, every row."""
        return self.fill(update)[0]

    def __len__(self) -> int:
        return self.plan.updates

    def __iter__(self) -> Iterator[Batch]:
        return (self[update] for update in range(len(self)))

    def token_indices(self, update: int) -> Int[np.ndarray, "micro_batches rows scored"]:
        """Index into the data's flat tokens of each scored slot; see `fill`, which has the batch as well."""
        return self.fill(update)[1]

    def _put(self, row: "_Row", place: int, example: int) -> None:
        """Writes one example into the next free slot of a row."""
        data, sharing = self._data, self.plan.prefix_sharing
        lengths = data.lengths[example].tolist()
        prompt = slice(int(data.starts[example]), int(data.starts[example]) + lengths[0])
        row.open_slot(place, example, float(data.weights[example]))
        shared = row.write(data.tokens[prompt], branch=0, position=0) if sharing else 0
        end = prompt.stop
        for k in range(1, self.responses + 1):
            response = slice(end, end + lengths[k])
            end = response.stop
            if not lengths[k]:
                continue
            before = shared if sharing else row.write(data.tokens[prompt], branch=k, position=0)
            start = row.length
            row.write(data.tokens[response], branch=k, position=lengths[0])
            mine = np.nonzero(data.scored[response])[0]
            indices = response.start + mine
            row.score(
                k,
                indices=indices,
                sources=np.where(mine == 0, before - 1, start + mine - 1),
                targets=data.tokens[indices],
                reference=None if self._reference is None else self._reference[indices],
                slot_width=self.responses,
            )


class _Row:
    """One row of a batch, filled from the front.

    Attributes:
        length: Positions taken so far.
    """

    def __init__(self, arrays: Batch):
        self._arrays = arrays
        self._slot, self.length, self._scored = -1, 0, 0

    def open_slot(self, place: int, example: int, weight: float) -> None:
        """Begins the next example."""
        self._slot += 1
        self._arrays["weights"][self._slot] = weight
        self._arrays["places"][self._slot] = place
        self._arrays["ids"][self._slot] = example

    def write(self, tokens: Int[np.ndarray, " count"], *, branch: int, position: int) -> int:
        """Appends tokens whose rotary positions begin at `position`; returns the place in the row behind them."""
        span = slice(self.length, self.length + len(tokens))
        self._arrays["tokens"][span] = tokens
        self._arrays["positions"][span] = np.arange(position, position + len(tokens))
        self._arrays["segments"][span] = self._slot + 1
        self._arrays["branches"][span] = branch
        self.length = span.stop
        return span.stop

    def score(
        self,
        response: int,
        *,
        indices: Int[np.ndarray, " count"],
        sources: Int[np.ndarray, " count"],
        targets: Int[np.ndarray, " count"],
        reference: Float[np.ndarray, " count"] | None,
        slot_width: int,
    ) -> None:
        """Appends the scored tokens of a response, counted from 1; `slot_width` is K."""
        span = slice(self._scored, self._scored + len(targets))
        self._arrays["indices"][span] = indices
        self._arrays["sources"][span] = sources
        self._arrays["targets"][span] = targets
        self._arrays["owners"][span] = self._slot * slot_width + response - 1
        self._arrays["offsets"][span] = np.arange(len(targets))
        if reference is not None:
            self._arrays["reference"][span] = reference
        self._arrays["lengths"][self._slot, response - 1] = len(targets)
        self._scored = span.stop
