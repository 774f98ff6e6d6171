"""The log-probs of a data set's responses, through the rows that training reads."""

import jax
import numpy as np

from daajax import sharding
from daajax.data.batches import Batches
from daajax.data.packing import pack
from daajax.data.sizes import Sizes
from daajax.data.windows import sweep_windows
from daajax.scoring import response_sums


def response_logps(scorer, params, data, *, packed=True, shared=True):
    """Log-prob of every response of a data set of pairs, nats: [examples, 2]."""
    sizes = Sizes.of(data, prefix_sharing=shared)
    windows = sweep_windows(sizes, batch_size=32)
    plan = pack(windows, sizes, packing=packed, micro_batches=1, row_multiple=sharding.row_multiple(scorer.mesh))
    shape = plan.shape(0)

    @jax.jit
    def responses(params, batch):
        logps = scorer.token_logps(params, batch, keys=shape.keys)
        return response_sums(logps, batch["owners"], slots=shape.slots, responses=2)

    found = np.full((len(data.weights), 2), np.nan)
    for batch in Batches(data, plan):
        part = {key: value[0] for key, value in batch.items()}
        sums = np.asarray(responses(params, sharding.place(scorer.mesh, part, ("rows",))))
        real = part["ids"] >= 0
        found[part["ids"][real]] = sums[real]
    return found
