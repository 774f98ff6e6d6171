"""One update's arrays: the one batch layout, filled from a plan.

A batch is a dict of NumPy arrays `[micro_batches, rows, …]`; its keys are those of `LAYOUT`, and of `OPTIONAL` those
that are asked for. A row holds whole examples. With prefix sharing an example lies as prompt, response 1, …, response
K; without it each response carries its own copy of the prompt. Where the length of rows is cut over several devices,
tokens and scored slots lie part by part (`daajax.data.parts`), and `sources` are places in that order.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from daajax.data.draws import generator, keep
from daajax.data.packing import Plan
from daajax.data.parts import moved, order, places, scored_places
from daajax.data.tokens import UNLABELLED, TokenizedData

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
OPTIONAL = {  # likewise, what there is only where it is asked for
    "scores": (np.float32, ("rows", "slots", "responses"), 0),
    "labels": (np.int32, ("rows", "slots"), UNLABELLED),
    "prompt_probabilities": (np.float32, ("rows", "slots"), 0),
    "gumbel": (np.float32, ("rows", "slots"), 0),
    "kept": (np.bool_, ("rows", "scored"), False),
    "reference_kept": (np.bool_, ("rows", "scored"), False),
    "entropies": (np.float32, ("rows", "scored"), 0),
}
_INDICES = {"indices": (np.int64, ("rows", "scored"), -1)}  # filled with the others, but stays on the host


def axes_behind_rows(name: str) -> tuple[str, ...]:
    """Logical axes of one of a batch's arrays behind its rows; none of what is no part of the layout."""
    return (LAYOUT | OPTIONAL)[name][1][1:] if name in LAYOUT or name in OPTIONAL else ()


class Batches:
    """Fills batches from tokenized data and a plan; batch t is a pure function of both, t and the seed.

    Args:
        data: The examples.
        plan: Where every example lies.
        reference: Reference log-prob of each of the data's tokens, nats; None leaves zeros.
        fields: Columns of the data to bring along: `scores`, `labels`, `prompt_probabilities`.
        draws: Random numbers to bring along: `gumbel`, a draw of the standard Gumbel distribution; `kept` and
            `reference_kept`, two draws of as many tokens of each response as the shortest one has.
        seed: Of the draws, which are a function of (seed, update, place), or in a sweep of (seed, example).
        sweep: Whether the updates are parts of one over the whole of the data, as evaluation takes it.
        entropies: Of the reference's distribution at each of the data's tokens; None: no such key.
        rows: Those of each micro-batch that are filled, ascending: of a batch that several processes make, each its
            own. None: all.

    Raises:
        ValueError: If the data lack a column that is asked for.
    """

    def __init__(
        self,
        data: TokenizedData,
        plan: Plan,
        reference: Float[np.ndarray, " total"] | None = None,
        *,
        fields: Sequence[str] = (),
        draws: Sequence[str] = (),
        seed: int = 0,
        sweep: bool = False,
        entropies: Float[np.ndarray, " total"] | None = None,
        rows: Int[np.ndarray, " own"] | None = None,
    ):
        self.plan = plan
        self._rows = np.arange(plan.rows) if rows is None else rows
        self.responses = data.lengths.shape[1] - 1
        self._data, self._seed, self._sweep = data, seed, sweep
        self._masks = [name for name in draws if "scored" in OPTIONAL[name][1]]
        self._numbers = [name for name in draws if name not in self._masks]
        self._of_examples = {"weights": data.weights} | {name: getattr(data, name) for name in fields}
        if lacking := [name for name, column in self._of_examples.items() if column is None]:
            raise ValueError(f"the data have no {' and no '.join(lacking)}")
        of_tokens = {"reference": reference, "entropies": entropies}
        self._of_tokens = {name: column for name, column in of_tokens.items() if column is not None}
        asked = (*fields, *draws, *(name for name in self._of_tokens if name in OPTIONAL))
        self._layout = LAYOUT | {name: OPTIONAL[name] for name in asked} | _INDICES

    def fill(self, update: int) -> tuple[Batch, Int[np.ndarray, "micro_batches rows scored"]]:
        """The batch of one update, the rows that are filled, and which token of the data each scored slot holds.

        Args:
            update: Which one.

        Returns:
            The batch, and the index into the data's flat tokens of each scored slot; -1 where the slot is empty. The
            indices are the way back: what was computed for a slot belongs to that token of the data.
        """
        plan, own = self.plan, len(self._rows)
        sizes = self._sizes(update, plan.micro_batches * own)
        arrays = {
            key: np.full([sizes[axis] for axis in names], empty, dtype)
            for key, (dtype, names, empty) in self._layout.items()
        }
        numbers = (np.arange(plan.micro_batches)[:, None] * plan.rows + self._rows[None]).ravel().tolist()
        rows = {
            number: _Row({key: value[here] for key, value in arrays.items()}) for here, number in enumerate(numbers)
        }
        for place, (example, row) in enumerate(
            zip(plan.windows[update].tolist(), plan.row_of[update].tolist(), strict=True)
        ):
            if example >= 0 and row in rows:
                self._put(rows[row], update, place, example)
        arrays = self._in_parts(arrays)
        batch = {key: value.reshape(plan.micro_batches, own, *value.shape[1:]) for key, value in arrays.items()}
        indices = batch.pop("indices")
        return batch, indices

    def __getitem__(self, update: int) -> Batch:
        """The batch of one update, the rows that are filled."""
        return self.fill(update)[0]

    def shaped(self, update: int) -> Batch:
        """What has the keys, shapes and dtypes of the whole batch of one update, and takes no memory."""
        plan, sizes = self.plan, self._sizes(update, self.plan.rows)
        return {
            key: np.broadcast_to(dtype(empty), [plan.micro_batches, *(sizes[axis] for axis in names)])
            for key, (dtype, names, empty) in self._layout.items()
            if key not in _INDICES
        }

    def _sizes(self, update: int, rows: int) -> dict[str, int]:
        """Of the axes of the layout, with so many rows."""
        shape = self.plan.shape(update)
        return dict(rows=rows, length=shape.length, slots=shape.slots, scored=shape.scored, responses=self.responses)

    def _in_parts(self, arrays: Batch) -> Batch:
        """Rows that were filled from the front, with their tokens and scored slots part by part."""
        parts, length = self.plan.parts, arrays["tokens"].shape[1]
        if parts == 1:
            return arrays
        arrays["sources"] = places(length, parts)[arrays["sources"]]
        lies, slots = order(length, parts), scored_places(arrays["sources"], arrays["owners"], length, parts)
        found = {}
        for key, value in arrays.items():
            _, axes, empty = self._layout[key]
            if "length" in axes:
                value = value[:, lies]
            found[key] = moved(value, slots, empty) if "scored" in axes else value
        return found

    def __len__(self) -> int:
        return self.plan.updates

    def __iter__(self) -> Iterator[Batch]:
        return (self[update] for update in range(len(self)))

    def token_indices(self, update: int) -> Int[np.ndarray, "micro_batches rows scored"]:
        """Index into the data's flat tokens of each scored slot; see `fill`, which has the batch as well."""
        return self.fill(update)[1]

    def _put(self, row: "_Row", update: int, place: int, example: int) -> None:
        """Writes one example into the next free slot of a row."""
        data, sharing = self._data, self.plan.prefix_sharing
        lengths = data.lengths[example].tolist()
        bounds = itertools.accumulate(lengths, initial=int(data.starts[example]))
        prompt, *responses = itertools.starmap(slice, itertools.pairwise(bounds))
        scored = [response.start + np.nonzero(data.scored[response])[0] for response in responses]
        key = dict(update=0, place=example) if self._sweep else dict(update=update, place=place)
        draw = functools.partial(generator, seed=self._seed, **key)
        columns = {name: column[example] for name, column in self._of_examples.items()}
        columns |= {name: draw(name).gumbel() for name in self._numbers}
        masks = {name: keep(draw(name), [len(indices) for indices in scored]) for name in self._masks}
        row.open_slot({"places": place, "ids": example, **columns})
        shared = row.write(data.tokens[prompt], branch=0, position=0) if sharing else 0
        for k, (response, indices) in enumerate(zip(responses, scored, strict=True)):
            if response.start == response.stop:
                continue
            before = shared if sharing else row.write(data.tokens[prompt], branch=k + 1, position=0)
            start = row.length
            row.write(data.tokens[response], branch=k + 1, position=lengths[0])
            mine = indices - response.start
            values = {
                "indices": indices,
                "sources": np.where(mine == 0, before - 1, start + mine - 1),
                "targets": data.tokens[indices],
            }
            values |= {name: column[indices] for name, column in self._of_tokens.items()}
            row.score(k, values | {name: mask[k] for name, mask in masks.items()})


class _Row:
    """One row of a batch, filled from the front.

    Attributes:
        length: Positions taken so far.
    """

    def __init__(self, arrays: Batch):
        self._arrays = arrays
        self._slot, self.length, self._scored = -1, 0, 0

    def open_slot(self, values: Mapping[str, Any]) -> None:
        """Begins the next example; `values` are those of its slot."""
        self._slot += 1
        for name, value in values.items():
            self._arrays[name][self._slot] = value

    def write(self, tokens: Int[np.ndarray, " count"], *, branch: int, position: int) -> int:
        """Appends tokens whose rotary positions begin at `position`; returns the place in the row behind them."""
        span = slice(self.length, self.length + len(tokens))
        self._arrays["tokens"][span] = tokens
        self._arrays["positions"][span] = np.arange(position, position + len(tokens))
        self._arrays["segments"][span] = self._slot + 1
        self._arrays["branches"][span] = branch
        self.length = span.stop
        return span.stop

    def score(self, response: int, values: Mapping[str, Shaped[np.ndarray, " count"]]) -> None:
        """Appends the scored tokens of a response, counted from 0; `values` are those of its tokens."""
        count = len(values["targets"])
        span = slice(self._scored, self._scored + count)
        for name, value in values.items():
            self._arrays[name][span] = value
        self._arrays["owners"][span] = self._slot * self._arrays["lengths"].shape[-1] + response
        self._arrays["offsets"][span] = np.arange(count)
        self._arrays["lengths"][self._slot, response] = count
        self._scored = span.stop
