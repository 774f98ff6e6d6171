"""Preference pairs of realistic lengths, made up: the same on every machine."""

import numpy as np

from daajax.data.tokens import Ids, TokenizedData

MIXES = {  # median and spread (of the logarithm) of prompt and response lengths, tokens; longest sequence
    "stories": ((57, 0.25), (262, 0.25), 512),
    "dialogue": ((200, 0.8), (110, 0.9), 512),
}
GOALS = {  # likewise: about the means of UltraFeedback, of hh, and of long prompts under a Llama tokenizer
    "feedback": ((185, 0.4), (285, 0.4), 2048),
    "short": ((130, 0.4), (55, 0.4), 512),
    "long": ((1850, 0.4), (275, 0.4), 4096),
}


def make_data(mix: str, *, examples: int, seed: int) -> TokenizedData:
    """Random token ids with log-normal lengths.

    Args:
        mix: Key of `MIXES` or `GOALS`.
        examples: Pairs.
        seed: Of the lengths and ids.
    """
    prompt, response, longest = (MIXES | GOALS)[mix]
    random = np.random.default_rng(seed)

    def draw(median: float, spread: float, most: np.ndarray | int) -> np.ndarray:
        return np.clip(random.lognormal(np.log(median), spread, examples), 2, most).astype(np.int32)

    prompts = draw(*prompt, longest - 16)
    responses = [draw(*response, longest - prompts) for _ in range(2)]
    lengths = np.stack([prompts, *responses], axis=1)
    flat = lengths.ravel()
    scored = np.repeat(np.tile([False, True, True], examples), flat)
    return TokenizedData(
        tokens=random.integers(1, 500, flat.sum(), dtype=np.int32),
        scored=scored,
        starts=np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))]),
        lengths=lengths,
        weights=np.ones(examples, np.float32),
        ids=Ids.of([str(example) for example in range(examples)]),
        counters={},
        notices=[],
        digest="",
    )
