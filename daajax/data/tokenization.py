"""Examples to token ids: the prompt that an example's responses share, the responses, and which tokens are scored.

Prompt and response are rendered and tokenized as one string, never apart: a token may straddle the boundary between
them, and a tokenizer may put a space before whatever it is given first. What belongs to the response is read off the
offsets.
"""

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int32

from daajax.data.bad_rows import BadRow, BadRows
from daajax.data.chat import ChatTemplate, load_template
from daajax.data.rendering import Rendering, renderings
from daajax.data.rows import Example
from daajax.data.sources import Examples, check_count
from daajax.data.tokens import COUNTERS, UNLABELLED, Ids, TokenizedData, array_digest, digest, response_names
from daajax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

SCORES = ("last", "all")
TRUNCATIONS = ("truncate", "drop")
CHUNK = 512  # examples tokenized at once


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long an example may be.

    Attributes:
        max_length: Tokens of a response together with its prompt, >= 2.
        max_prompt_length: Tokens of the shared prompt beside its BOS, < `max_length`: the prompt first loses its
            beginning, the same for all responses. None: the prompt is never cut, the response is.
        truncation: `truncate`, or `drop` an example that is too long.

    Raises:
        UserError: If they leave no room for a response.
    """

    max_length: int
    max_prompt_length: int | None = None
    truncation: str = "truncate"

    def __post_init__(self) -> None:
        check_count("max_length", self.max_length, least=2)
        check_count("max_prompt_length", self.max_prompt_length, least=1, optional=True)
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise UserError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a response in "
                f"max_length={self.max_length}; lower the one or raise the other"
            )
        if self.truncation not in TRUNCATIONS:
            raise UserError(f"data.truncation={self.truncation!r}; known are {', '.join(TRUNCATIONS)}")


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of an example's tokens: a response with its prompt, the shared prompt, or the rest of a response."""

    tokens: Int32[np.ndarray, " length"]
    scored: Bool[np.ndarray, " length"]

    def __getitem__(self, piece: slice) -> "Part":
        return Part(self.tokens[piece], self.scored[piece])

    def __len__(self) -> int:
        return len(self.tokens)


def encode(
    rendered: Sequence[Rendering], tokenizer: "PreTrainedTokenizerFast", counters: collections.Counter[str]
) -> list[Part]:
    """Tokenizes whole strings and marks what is scored.

    Text begins with what the tokenizer puts there and ends in exactly one EOS, which is scored; chat has what its
    template wrote. Neither begins with two BOS. A first token is never scored: nothing predicts it.

    Args:
        rendered: What to tokenize.
        tokenizer: From `load_tokenizer`.
        counters: Counts `straddling_tokens`, `double_bos_removed`, `eos_in_text`, `responses_without_end`,
            `unscored_first_tokens`.

    Raises:
        UserError: If the tokenizer fails.
    """
    parts: dict[int, Part] = {}
    special = tokenizer.added_tokens_decoder
    greedy = {identity for identity, token in special.items() if token.rstrip}
    ends = tuple(token.content for token in special.values() if token.special)
    chats = [rendering.text for rendering in rendered if rendering.chat and rendering.spans]
    counters["responses_without_end"] += sum(not chat.rstrip().endswith(ends) for chat in chats)
    for chat in (False, True):
        places = [place for place, rendering in enumerate(rendered) if rendering.chat is chat]
        texts = [rendered[place].text for place in places]
        try:
            encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=not chat)
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"the tokenizer cannot encode the data ({error}); set tokenizer.path to another") from error
        for place, encoding in zip(places, encodings, strict=True):
            parts[place] = _mark(rendered[place], encoding, tokenizer, greedy, counters)
    return [parts[place] for place in range(len(rendered))]


def _mark(
    rendering: Rendering,
    encoding: "Encoding",
    tokenizer: "PreTrainedTokenizerFast",
    greedy: set[int],
    counters: collections.Counter[str],
) -> Part:
    """One string's tokens, and which of them are scored; `greedy` ones take the spaces behind them."""
    added = encoding.special_tokens_mask  # 1: not from the text
    first = added.index(0) if 0 in added else len(added)
    last = len(added) - added[::-1].index(0) if 0 in added else len(added)
    ids = encoding.ids  # made anew whenever it is asked for
    tokens = np.array(ids[:last], np.int32)
    scored = np.zeros(last, bool)

    def characters(token: int) -> tuple[int, int]:
        start, stop = encoding.token_to_chars(token) or (0, 0)
        if ids[token] in greedy:  # the spaces are not its own: those of a response do not make it one's
            stop = start + len(rendering.text[start:stop].rstrip())
        return start, stop

    for start, stop in rendering.spans:
        # Beginnings and ends of tokens ascend. The first scored one is the first that ends after `start`.
        begin = bisect.bisect_right(range(last), start, lo=first, key=lambda token: characters(token)[1])
        end = bisect.bisect_right(range(last), stop, lo=begin, key=lambda token: characters(token)[1])
        inside = bisect.bisect_left(range(end), start, lo=begin, key=lambda token: characters(token)[0])
        scored[begin:end] = True
        counters["straddling_tokens"] += inside - begin

    leading = next((place for place, token in enumerate(tokens) if token != tokenizer.bos_token_id), last)
    if leading > 1:
        tokens, scored = np.delete(tokens, np.s_[1:leading]), np.delete(scored, np.s_[1:leading])
        counters["double_bos_removed"] += 1
    if not rendering.chat:
        end = len(tokens)
        while end and scored[end - 1] and tokens[end - 1] == tokenizer.eos_token_id:
            end -= 1
        counters["eos_in_text"] += end < len(tokens)
        # Text without any token is not mended by an EOS, and stays without a scored one.
        tokens = np.append(tokens[:end], np.array([tokenizer.eos_token_id], np.int32))
        scored = np.append(scored[:end], bool(scored.any()))
    if scored[:1].any():
        scored[0] = False
        counters["unscored_first_tokens"] += 1
    return Part(tokens, scored)


def shared_length(branches: Sequence[Part]) -> int:
    """How many first tokens all branches have in common, none of them scored in any."""
    length = min(int(branch.scored.argmax()) for branch in branches)
    for branch in branches[1:]:
        differs = np.flatnonzero(branch.tokens[:length] != branches[0].tokens[:length])
        length = int(differs[0]) if differs.size else length
    return length


def cut(
    branches: Sequence[Part],
    limits: Limits,
    tokenizer: "PreTrainedTokenizerFast",
    counters: collections.Counter[str],
) -> list[Part]:
    """Divides an example into shared prompt and responses that keep to the limits.

    Args:
        branches: Each response with its prompt.
        limits: What to keep.
        tokenizer: Names the BOS that a cut prompt keeps at its head if it has one.
        counters: Counts what is dropped, cut, left whole (`eos_kept`) and left alike.

    Returns:
        The prompt and every response; nothing if the example is dropped.
    """
    shared = shared_length(branches)
    prompt, whole = branches[0][:shared], [branch[shared:] for branch in branches]
    excess = 0
    if limits.max_prompt_length is not None:
        head = int(shared > 0 and prompt.tokens[0] == tokenizer.bos_token_id)
        excess = max(shared - head - limits.max_prompt_length, 0)
        prompt = _join([prompt[:head], prompt[head + excess :]])
    room = max(limits.max_length - len(prompt), 0)
    responses = [response[:room] for response in whole]
    shortened = [len(response) > room for response in whole]
    if limits.truncation == "drop" and (excess or any(shortened)):
        counters["dropped_too_long"] += 1
        return []
    if not all(response.scored.any() for response in responses):
        counters["dropped_prompt_too_long"] += 1
        return []
    counters["truncated_prompts"] += excess > 0
    for name, short in zip(response_names(len(whole)), shortened, strict=True):
        counters[f"truncated_{name}"] += short
    counters["eos_kept"] += shortened.count(False)
    pairs = itertools.combinations(responses, 2)
    counters["identical_after_truncation"] += any(np.array_equal(one.tokens, two.tokens) for one, two in pairs)
    return [prompt, *responses]


def tokenize(
    examples: Examples,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    truncation: str = "truncate",
    template: str | None = None,
    score: str = "last",
) -> TokenizedData:
    """Tokenizes examples and cuts them to length.

    Args:
        examples: From `sources.read`.
        tokenizer: From `load_tokenizer`.
        max_length: See `Limits`.
        max_prompt_length: See `Limits`.
        truncation: See `Limits`.
        template: `chat.template`; see `load_template`.
        score: `chat.score`: `last`, or `all` assistant turns of conversations with one response.

    Raises:
        UserError: If an option cannot act, more rows are bad than are tolerated, or no example is left.
    """
    limits = Limits(max_length, max_prompt_length, truncation)
    rows = examples.examples
    chat = any(not isinstance(example.prompt, str) for example in rows)
    _check_score(score, rows, chat=chat)
    loaded, notices = load_template(tokenizer, template) if chat else (None, [])
    if template is not None and not chat:
        notices.append("chat.template is not used: the data hold no chat messages")
    counters = collections.Counter(dict.fromkeys(COUNTERS, 0) | examples.counters)
    bad_rows = dataclasses.replace(examples.bad_rows, reasons=list(examples.bad_rows.reasons))

    kept: list[Example] = []
    parts: list[list[Part]] = []
    for example, branches in _branches(rows, tokenizer, loaded, score, bad_rows, counters):
        if pieces := cut(branches, limits, tokenizer, counters):
            kept.append(example)
            parts.append(pieces)
    if not kept:
        raise UserError(
            f"none of {len(rows)} examples is left: {counters['dropped_prompt_too_long']} have prompts that fill "
            f"max_length={max_length}, {counters['dropped_too_long']} are longer than the limits, the others are bad "
            "rows; raise max_length, or set max_prompt_length to shorten prompts"
        )

    counters["bad_rows"], counters["examples"] = bad_rows.count, len(rows)
    notices += [f"bad row skipped: {reason}" for reason in bad_rows.reasons[len(examples.bad_rows.reasons) :]]
    return _flatten(kept, parts, counters, examples.notices + notices)


def _flatten(
    kept: Sequence[Example], parts: Sequence[list[Part]], counters: collections.Counter[str], notices: list[str]
) -> TokenizedData:
    """Lays the examples one behind the other and adds their totals to the counters.

    Args:
        kept: The examples.
        parts: Of each example, from `cut`.
        counters: What happened to them.
        notices: What to say of them.
    """
    flat = _join(list(itertools.chain.from_iterable(parts)))
    lengths = np.zeros((len(parts), max(map(len, parts))), np.int32)
    for place, pieces in enumerate(parts):
        lengths[place, : len(pieces)] = [len(piece) for piece in pieces]
    totals = {
        "examples_kept": len(kept),
        "prompt_tokens": int(lengths[:, 0].sum()),
        "response_tokens": int(lengths[:, 1:].sum()),
        "scored_tokens": int(flat.scored.sum()),
    }
    arrays = {
        "tokens": flat.tokens,
        "scored": flat.scored,
        "lengths": lengths,
        "weights": np.array([example.weight for example in kept], np.float32),
    }
    if any(example.scores is not None for example in kept):
        arrays["scores"] = np.full((len(kept), lengths.shape[1] - 1), np.nan, np.float32)
        for place, example in enumerate(kept):
            arrays["scores"][place, : len(example.scores or ())] = example.scores or ()
    if any(example.label is not None for example in kept):
        labels = [UNLABELLED if example.label is None else int(example.label) for example in kept]
        arrays["labels"] = np.array(labels, np.int8)
    if any(example.prompt_probability is not None for example in kept):
        given = [np.nan if example.prompt_probability is None else example.prompt_probability for example in kept]
        arrays["prompt_probabilities"] = np.array(given, np.float32)
    return TokenizedData(
        **arrays,
        starts=np.concatenate([[0], np.cumsum(lengths.sum(1, dtype=np.int64))]),
        ids=Ids.of([example.id for example in kept]),
        counters=dict(counters) | totals,
        notices=notices,
        digest=digest({name: array_digest(array) for name, array in arrays.items()}),
    )


def _check_score(score: str, rows: Sequence[Example], *, chat: bool) -> None:
    """Refuses a way of scoring that cannot act on these examples."""
    if score not in SCORES:
        raise UserError(f"chat.score={score!r}; known are {', '.join(SCORES)}")
    if score == "all" and not chat:
        raise UserError(
            "chat.score='all' scores the turns of chat messages, but the data hold text only; set it to 'last'"
        )
    if score == "all" and any(len(example.responses) > 1 for example in rows):
        raise UserError("chat.score='all' needs examples with one response, but these have more; set it to 'last'")


def _branches(
    rows: Sequence[Example],
    tokenizer: "PreTrainedTokenizerFast",
    template: ChatTemplate | None,
    score: str,
    bad_rows: BadRows,
    counters: collections.Counter[str],
) -> Iterator[tuple[Example, list[Part]]]:
    """Every good example with its responses tokenized, a chunk at a time."""
    for start in range(0, len(rows), CHUNK):
        rendered = []
        for example in rows[start : start + CHUNK]:
            try:
                rendered.append((example, renderings(example, template, counters, score=score)))
            except BadRow as reason:
                bad_rows.add(example.location or example.id, reason)
        encoded = iter(encode([rendering for _, group in rendered for rendering in group], tokenizer, counters))
        for example, group in rendered:
            branches = list(itertools.islice(encoded, len(group)))
            if all(branch.scored.any() for branch in branches):
                yield example, branches
            else:
                bad_rows.add(example.location or example.id, BadRow("a response holds nothing the tokenizer knows"))


def _join(parts: Sequence[Part]) -> Part:
    """Parts one after the other."""
    return Part(np.concatenate([part.tokens for part in parts]), np.concatenate([part.scored for part in parts]))
