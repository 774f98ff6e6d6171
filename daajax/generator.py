"""Sampling with a key-value cache, on the parameters and the mesh that training holds.

Prompts are read in one pass, each in a row of its own from slot 0 on; then a loop feeds back one token at a time. The
t-th token of a response lies in slot `width + t` of every row's cache, whatever the length of the row's prompt: the
mask leaves out the slots between, and rotary positions go on from the prompt's last. So a step writes one slot of the
cache, in place.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from daajax import sampling, sharding
from daajax.attention import see_kinds
from daajax.errors import UserError
from daajax.models import decoder
from daajax.models.architecture import Architecture
from daajax.models.decoder import Memory, Params
from daajax.ops import attention, logits
from daajax.scoring import Scorer

LEAST_WIDTH = 32  # tokens; prompts are padded to this or to a doubling of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Samples:
    """Sampled responses.

    Attributes:
        tokens: Token ids, with the stop id where there is one; 0 behind the end.
        logps: Log-prob of each token under the policy as it is, before temperature, top-k and top-p: what the scoring
            function gives, nats; 0 behind the end.
        lengths: Tokens of each response.
        finished: Whether it ended in a stop id, and not for want of room.
    """

    tokens: Int32[np.ndarray, "prompts samples max_tokens"]
    logps: Float32[np.ndarray, "prompts samples max_tokens"]
    lengths: Int32[np.ndarray, "prompts samples"]
    finished: Bool[np.ndarray, "prompts samples"]


class _Written(NamedTuple):
    """What the rows have written so far."""

    tokens: Int[Array, "rows max_tokens"]
    logps: Float[Array, "rows max_tokens"]
    lengths: Int[Array, " rows"]
    alive: Bool[Array, " rows"]  # goes on


class Generator:
    """Samples from the model that a scorer scores.

    Args:
        scorer: Made for the mesh; its attention reads the prompts.
        mesh: Where the parameters live.

    Raises:
        UserError: If the mesh cuts the length of rows.
    """

    def __init__(self, scorer: Scorer, mesh: Any):
        if (parts := sharding.length_parts(mesh)) > 1:
            raise UserError(
                f"the mesh axis context cuts rows over {parts} devices, and sampling adds one token at a time to them; "
                "use the axes data, fsdp and tensor."
            )
        self.architecture: Architecture = scorer.model.architecture
        self._mesh = mesh
        self._reader, self._see = scorer.model, scorer.see
        queries, keys = ("rows", "length", "heads", "head_dim"), ("rows", "length", "kv_heads", "head_dim")
        a = self.architecture
        cached = functools.partial(_attend_cached, scale=a.attention_scale, softcap=a.attn_logit_softcapping)
        attend = sharding.local(cached, mesh, (queries, keys, keys, ("rows",), keys, keys), queries)
        self._writer = scorer.model.clone(attend=lambda q, k, v, seen: attend(q, k, v, seen[0], *seen[1]))
        self._place_cache = sharding.constrain(mesh, ("layers", *keys))
        self._place_log_probs = sharding.constrain(mesh, ("rows", None))
        self._generate = jax.jit(
            self._rows, static_argnames=("max_tokens", "top_k"), out_shardings=sharding.replicated(mesh)
        )

    def generate(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        key: Key[Array, ""],
        max_tokens: int,
        samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
        batch_size: int = 64,
    ) -> Samples:
        """Samples responses to prompts.

        A response is a function of the key, its prompt and prompt's index, the sample's index and the options above
        `stop_ids`; but for float rounding it does not depend on what else is sampled, on `batch_size` or on the mesh.

        Args:
            params: Whose responses.
            prompts: Token ids of each, BOS included.
            key: From `jax.random.key`.
            max_tokens: Most tokens of a response.
            samples: Responses to each prompt.
            temperature: Divides the log-probs; 0 takes the most probable token.
            top_k: Draws from the k most probable tokens; None: from all.
            top_p: Of those, from the most probable ones that together reach this probability.
            stop_ids: Token ids that end a response; they belong to it.
            batch_size: Most rows at once; beyond it, they are sampled in turns.

        Raises:
            UserError: If an option is out of range, a prompt does not fit the model, or the model's log-probs are not
            finite.
        """
        sampling.check(temperature=temperature, top_k=top_k, top_p=top_p, samples=samples)
        check_prompts(prompts, self.architecture, max_tokens)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: an integer >= 1 is needed.")
        count = len(prompts) * samples
        found = Samples(
            np.zeros((len(prompts), samples, max_tokens), np.int32),
            np.zeros((len(prompts), samples, max_tokens), np.float32),
            np.zeros((len(prompts), samples), np.int32),
            np.zeros((len(prompts), samples), bool),
        )
        # Prompts of like length together; as many rows in every turn, so that turns share a program.
        order = np.repeat(np.argsort([len(prompt) for prompt in prompts], kind="stable"), samples)
        numbers = np.tile(np.arange(samples), len(prompts))
        multiple = sharding.row_multiple(self._mesh)
        turns = -(-count // batch_size)
        rows = -(-count // (turns * multiple)) * multiple
        for start in range(0, count, rows):
            which, nth = order[start : start + rows], numbers[start : start + rows]
            batch = _lay_out([prompts[index] for index in which], rows)
            batch["prompts"][: len(which)], batch["samples"][: len(which)] = which, nth
            written = self._generate(
                params,
                sharding.place(self._mesh, batch, ("rows",)),
                key,
                jnp.float32(temperature) if temperature else None,
                jnp.float32(top_p) if top_p < 1 else None,
                jnp.asarray(stop_ids, jnp.int32),
                max_tokens=max_tokens,
                top_k=top_k,
            )
            tokens, logps, lengths, alive = (value[: len(which)] for value in jax.device_get(written))
            if not np.isfinite(logps).all():
                raise UserError("the model's log-probs are not finite; check its weights, or choose another dtype.")
            found.tokens[which, nth], found.logps[which, nth] = tokens, logps
            found.lengths[which, nth], found.finished[which, nth] = lengths, ~alive
        return found

    def _rows(
        self,
        params: Params,
        batch: dict[str, Array],
        key: Key[Array, ""],
        temperature: Float[Array, ""] | None,
        top_p: Float[Array, ""] | None,
        stop_ids: Int[Array, " stops"],
        *,
        max_tokens: int,
        top_k: int | None,
    ) -> _Written:
        """Samples one batch of rows; without a temperature, greedily."""
        lengths = batch["lengths"]
        rows, width = batch["tokens"].shape
        slots = jnp.arange(width + max_tokens, dtype=jnp.int32)[None]
        slot_positions = jnp.where(slots < width, slots, lengths[:, None] + slots - width)
        keys = sampling.row_keys(key, batch["prompts"], batch["samples"])
        pick = functools.partial(sampling.draw, temperature=temperature, top_k=top_k, top_p=top_p)
        weights, softcap = decoder.projection(params, self.architecture), self.architecture.final_logit_softcapping

        def append(written: _Written, hidden: Float[Array, "rows embed"], t: Array) -> _Written:
            """Chooses the t-th token of every row that is alive."""
            log_probs = self._place_log_probs(logits.log_probs(hidden, weights.astype(hidden.dtype), softcap))
            chosen = pick(log_probs, jax.vmap(jax.random.fold_in, (0, None))(keys, t)).astype(jnp.int32)
            logps = jnp.take_along_axis(log_probs, chosen[:, None], axis=1)[:, 0]
            stops = (chosen[:, None] == stop_ids[None]).any(axis=1)
            return _Written(
                _put(written.tokens, jnp.where(written.alive, chosen, 0), t),
                _put(written.logps, jnp.where(written.alive, logps, 0), t),
                written.lengths + written.alive,
                written.alive & ~stops,
            )

        def step(carry: tuple[Array, _Written, Memory]) -> tuple[Array, _Written, Memory]:
            """Feeds the token before the t-th, which goes into the cache, and appends the t-th."""
            t, written, cache = carry
            fed = jax.lax.dynamic_slice_in_dim(written.tokens, t - 1, 1, axis=1)
            at, slot = (lengths + t - 1)[:, None], width + t - 1
            seen = (slots < lengths[:, None]) | ((slots >= width) & (slots < slot))
            near = at - slot_positions
            sight = see_kinds(self.architecture, lambda window: seen if window is None else seen & (near < window))
            hidden, made = decoder.decode(self._writer, params, fed, at, sight, cache)
            cache = jax.tree.map(lambda old, new: _put_slot(old, new, slot), cache, made)
            return t + 1, append(written, hidden[:, 0], t), cache

        positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (rows, width))
        inside = (positions < lengths[:, None]).astype(jnp.int32)
        layout = {"segments": inside, "branches": inside, "positions": positions, "lengths": lengths[:, None, None]}
        hidden, cache = decoder.decode(self._reader, params, batch["tokens"], positions, self._see(layout, width))
        room = [(0, 0)] * 2 + [(0, max_tokens)] + [(0, 0)] * 2
        cache = jax.tree.map(lambda x: self._place_cache(jnp.pad(x, room)), cache)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        nothing = _Written(
            jnp.zeros((rows, max_tokens), jnp.int32),
            jnp.zeros((rows, max_tokens), jnp.float32),
            jnp.zeros(rows, jnp.int32),
            batch["real"],
        )
        start = jnp.int32(1), append(nothing, last, jnp.int32(0)), cache
        _, written, _ = jax.lax.while_loop(lambda carry: (carry[0] < max_tokens) & carry[1].alive.any(), step, start)
        return written


def check_prompts(prompts: Sequence[Sequence[int]], architecture: Architecture, max_tokens: int) -> None:
    """Refuses prompts that the model cannot answer in so many tokens.

    Raises:
        UserError: If there are none, or one is empty, too long, or has ids that the model does not know.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: an integer >= 1 is needed.")
    if not prompts:
        raise UserError("there is no prompt; at least one is needed.")
    for index, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise UserError(f"prompt {index} has no tokens; the model needs one to begin from, such as BOS.")
        if not 0 <= min(prompt) <= max(prompt) < architecture.vocab_size:
            raise UserError(
                f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}, the model knows 0 to "
                f"{architecture.vocab_size - 1}; use the model's own tokenizer."
            )
        needed, most = len(prompt) + max_tokens, architecture.max_position_embeddings
        if needed > most:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, with max_tokens={max_tokens} it needs {needed} positions; "
                f"the model was made for {most}: shorten the prompt or lower max_tokens."
            )


def _lay_out(prompts: Sequence[Sequence[int]], rows: int) -> dict[str, np.ndarray]:
    """Prompts from slot 0 of their rows on; rows beyond them are empty, of one padding token."""
    width = LEAST_WIDTH
    while width < max(map(len, prompts)):
        width *= 2
    batch = {"tokens": np.zeros((rows, width), np.int32), "real": np.arange(rows) < len(prompts)}
    batch |= {name: np.zeros(rows, np.int32) for name in ("prompts", "samples")} | {"lengths": np.ones(rows, np.int32)}
    for row, prompt in enumerate(prompts):
        batch["tokens"][row, : len(prompt)], batch["lengths"][row] = prompt, len(prompt)
    return batch


def _attend_cached(
    queries: Float[Array, "rows 1 heads head_dim"],
    keys: Float[Array, "rows 1 kv_heads head_dim"],
    values: Float[Array, "rows 1 kv_heads head_dim"],
    seen: Bool[Array, "rows slots"],
    cached_keys: Float[Array, "rows slots kv_heads head_dim"],
    cached_values: Float[Array, "rows slots kv_heads head_dim"],
    *,
    scale: float | None,
    softcap: float | None,
) -> Float[Array, "rows 1 heads head_dim"]:
    """A token sees slots of its row's cache, and itself."""
    mask = jnp.pad(seen, ((0, 0), (0, 1)), constant_values=True)[:, None]
    all_keys, all_values = jnp.concatenate([cached_keys, keys], 1), jnp.concatenate([cached_values, values], 1)
    return attention.dense(queries, all_keys, all_values, mask, scale=scale, softcap=softcap)


def _put(buffer: Array, column: Array, t: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], t, axis=1)


def _put_slot(
    cache: Float[Array, "layers rows slots kv_heads head_dim"],
    made: Float[Array, "layers rows 1 kv_heads head_dim"],
    slot: Array,
) -> Float[Array, "layers rows slots kv_heads head_dim"]:
    return jax.lax.dynamic_update_slice_in_dim(cache, made, slot, axis=2)
