"""Preference optimization of Llama 3.x on your own pairs.

    hf download meta-llama/Llama-3.1-8B-Instruct --local-dir models/Llama-3.1-8B-Instruct
    python -m daajax.train --config=configs/dpo_llama.py --config.data.path=pairs.jsonl.gz
    python -m daajax.train --config=configs/dpo_llama.py:simpo --config.data.path=pairs.jsonl.gz

DPO with beta 0.1, batches of 64, a learning rate of 5e-7 and one epoch, as the DPO paper's repository
(eric-mitchell/direct-preference-optimization) sets them. Unlike there: AdamW in place of RMSprop; the rate falls
linearly from the first update, where theirs rises for 150 and stays: an epoch of few pairs is not that long (with many,
set optimizer.warmup_steps); gradients are clipped to 1 in place of 10, sequences to 2,048 tokens in place of 512.
Every objective is a variant, `:NAME`, with what its authors publish for it (configs/published.py, with the sources);
SimPO's is for Llama-3-Instruct: beta 2.5, gamma / beta 0.55, learning rate 1e-6, cosine, batches of 128. A pair is a
line such as

    {"prompt": [{"role": "user", "content": "…"}], "chosen": "…", "rejected": "…"}

KTO and BCO read {"prompt": …, "response": …, "label": true}, or take a pair for two such lines; objectives that weigh
by scores (`rebel`, `odpo`, `nca`, …) need `score_chosen` and `score_rejected`, or a list of `responses` with `scores`.

The first loss is 0.6931 (DPO) or 25 (IPO). The one override people want: --config.optimizer.learning_rate.
"""

from typing import Any

from configs import base, published


def get_config(objective: str = "dpo") -> Any:
    """The recipe.

    Args:
        objective: Any of `daajax.losses.objectives.OBJECTIVES`, or of `configs.published.COMBINED`.
    """
    config = base.get_config()
    config.model.path = "models/Llama-3.1-8B-Instruct"
    config.data.path = "data/pairs.jsonl.gz"
    config.max_length = 2048
    config.batch_size = 64
    config.epochs = 1.0
    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 0
    config.optimizer.max_grad_norm = 1.0
    config.remat = "full"
    published.set_objective(config, objective)
    return config
