"""Data that are assumed where there are none: as many examples as an update has, all of the same lengths."""

import re

import numpy as np

from daajax.data.tokens import Ids, TokenizedData
from daajax.errors import UserError
from daajax.losses.terms import Needs, Term

# Tokens of prompt, chosen and rejected response: about those of UltraFeedback under a Llama tokenizer.
DEFAULT = (200, 320, 300)


def parse_lengths(text: str, longest: int) -> tuple[int, ...]:
    """Tokens of the prompt and of each response, from `200,320,300`.

    Args:
        text: As `--lengths` gives them.
        longest: Most tokens of a prompt with one response.

    Raises:
        UserError: If they are no such numbers, or an example would be cut.
    """
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})+", text):
        raise UserError(
            f"--lengths={text}: write tokens of the prompt and of each response, such as "
            f"--lengths={','.join(map(str, DEFAULT))}."
        )
    prompt, *responses = lengths = tuple(map(int, text.split(",")))
    if prompt + max(responses) > longest:
        raise UserError(
            f"--lengths={text}: a prompt of {prompt} tokens with a response of {max(responses)} exceeds "
            f"config.max_length={longest}; raise that, or lower these."
        )
    return lengths


def make_data(lengths: tuple[int, ...], examples: int, *, columns: tuple[str, ...] = ()) -> TokenizedData:
    """Examples of these lengths; every token of a response is scored.

    Args:
        lengths: Tokens of the prompt and of each response.
        examples: How many.
        columns: What they have besides: `scores`, `labels`, `prompt_probabilities`.
    """
    size, responses = sum(lengths), len(lengths) - 1
    each = np.tile(np.array([lengths], np.int32), (examples, 1))
    known = {
        "scores": np.tile(np.linspace(1, 0, responses, dtype=np.float32), (examples, 1)),
        "labels": (np.arange(examples) % 2 == 0).astype(np.int8),
        "prompt_probabilities": np.full(examples, 0.5, np.float32),
    }
    # Tokens count up, so that no two prompts are equal; nothing reads what they are.
    return TokenizedData(
        tokens=np.arange(examples * size, dtype=np.int32),
        scored=np.repeat(np.tile([False] + [True] * responses, examples), each.ravel()),
        starts=np.arange(examples + 1, dtype=np.int64) * size,
        lengths=each,
        weights=np.ones(examples, np.float32),
        ids=Ids.of([str(example) for example in range(examples)]),
        counters={},
        notices=[],
        digest="",
        **{name: known[name] for name in columns if name in known},
    )


def for_loss(lengths: tuple[int, ...], examples: int, terms: tuple[Term, ...]) -> TokenizedData:
    """Examples with as many responses as the loss reads, and every column that it reads.

    Args:
        lengths: Tokens of the prompt and of each response; responses beyond those that are read are left out, where
            there are too few the last one counts again.
        examples: How many.
        terms: The loss.
    """
    needs, given = Needs.of(terms), len(lengths) - 1
    if any(term.objective.mismatched for term in terms):
        responses = 2  # the labelled one, and another example's
    elif "labels" in needs.fields:
        responses = 1
    else:
        responses = max(term.objective.responses or given for term in terms)
    whole = (*lengths, *(lengths[-1],) * max(responses - given, 0))[: 1 + responses]
    return make_data(whole, examples, columns=needs.fields)
