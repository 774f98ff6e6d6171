"""DPO on short stories with a model of 260k parameters, in float32: the run that other trainers are compared with.

    python -m daajax.train --config=configs/stories.py
    python -m daajax.train --config=configs/stories.py:learn

The first is TRL 1.16.0's own run, update by update: the first 240 pairs in file order, 8 a time, learning rate 1e-4;
the loss goes from 0.693147 to 0.49516 in 30 updates. The second learns: 2,400 pairs, 150 updates of 16; held-out
accuracy rises from chance to more than 80 %. On two CPU cores the first takes half a minute, the second up to five.
Model and data are found through the environment variable DAAJAX_ASSETS, or named by --config.model.path and
--config.data.path.
"""

import os
from typing import Any

from configs import base


def get_config(variant: str = "trl") -> Any:
    """The recipe.

    Args:
        variant: `trl` repeats TRL's run, `learn` trains longer.
    """
    if variant not in ("trl", "learn"):
        raise ValueError(f"there is no variant {variant!r}; there are trl, learn")
    config = base.get_config()
    assets = os.environ.get("DAAJAX_ASSETS")
    if assets:
        config.model.path = f"{assets}/tiny_model"
        config.data.path = f"{assets}/data/stories_sentiment.train.jsonl.gz"
    config.model.dtype = "float32"
    config.max_length = 512
    config.loss = base.loss("dpo", beta=0.1)
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.max_grad_norm = 1.0
    config.log.every = 1
    if variant == "trl":
        config.data.shuffle = False
        config.data.limit = 240
        config.batch_size = 8
        config.steps = 30
    else:
        config.data.limit = 2400
        config.batch_size = 16
        config.steps = 150
    return config
