"""What papers publish for their objectives, as settings of a recipe: `configs/dpo_llama.py:NAME` reads it.

What is not set here is the objective's own default (daajax/losses) and the recipe's. To add one: a line in `SETTINGS`
with its source; numbers that a paper leaves open stay open.
"""

from typing import Any

from configs import base
from daajax.losses.objectives import OBJECTIVES

# Hyper-parameters of the loss, and under "config" other options of the run.
SETTINGS: dict[str, dict[str, Any]] = {
    # SimPO's repository (princeton-nlp/SimPO), Llama-3-Instruct: gamma / beta 0.55, batches of 128
    "simpo": {
        "beta": 2.5,
        "gamma": 2.5 * 0.55,
        "config": {"optimizer.learning_rate": 1e-6, "optimizer.schedule": "cosine", "batch_size": 128},
    },
    # HALOs' configuration of cDPO
    "cdpo": {"beta": 0.1, "label_smoothing": 0.2},
    # Chowdhury et al. 2024, as TRL documents it
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    # the ORPO repository's flags: alpha 0.1, rates of 5e-6 to 8e-6
    "orpo": {"odds_ratio_weight": 0.1, "config": {"optimizer.learning_rate": 8e-6}},
    # Cal-DPO's Zephyr runs: targets of ±500 nats
    "cal_dpo": {"beta": 0.001},
    # AlphaPO, Table 3 for Mistral-Instruct, as TRL documents it (the paper's gamma may be a share of beta)
    "alphapo": {"beta": 2.5, "gamma": 0.1, "alpha": 0.25, "config": {"optimizer.learning_rate": 7e-7}},
    # REBEL's repository, UltraFeedback: eta 1 with scores divided by 1,000, that is, 0.001 with the scores themselves
    "rebel": {"eta": 0.001, "config": {"optimizer.learning_rate": 3e-7}},
    # KTO's authors: rates of 5e-7 to 5e-6 with beta 0.1
    "kto": {"beta": 0.1, "config": {"optimizer.learning_rate": 5e-7}},
    # Jung et al. 2024
    "bco": {"beta": 0.01},
    # CPO's repository (fe1ixxu/CPO_SIMPO, ALMA); its rate of 1e-4 is of adapters
    "cpo": {"beta": 0.1, "nll_weight": 1.0},
    # RainbowPO's repository
    "rainbow": {"beta": 10.0, "home_advantage": 0.1, "mixing": 0.25},
    # Pang et al. 2024 (iterative RPO)
    "dpo_nll": {"beta": 0.1, "nll_weight": 1.0, "config": {"optimizer.learning_rate": 7e-7}},
    # EXO's repository (haozheji/exact-optimization)
    "exo": {"beta": 0.5, "score_temperature": 0.5, "config": {"optimizer.learning_rate": 1e-6}},
    # NCA's repository (thu-ml/Noise-Contrastive-Alignment)
    "nca": {"beta": 0.01, "score_temperature": 0.001, "config": {"optimizer.learning_rate": 5e-6}},
    "info_nca": {"beta": 0.01, "score_temperature": 0.001, "config": {"optimizer.learning_rate": 5e-6}},
    # SPPO's repository (uclaml/SPPO): eta 1,000
    "sppo": {"beta": 0.001, "config": {"optimizer.learning_rate": 5e-7}},
    "sppo_hard": {"beta": 0.001, "config": {"optimizer.learning_rate": 5e-7}},
    # D'Oosterlinck et al. 2024 (APO)
    "apo_zero": {"beta": 0.1, "config": {"optimizer.learning_rate": 2e-7}},
    "apo_down": {"beta": 0.1, "config": {"optimizer.learning_rate": 2e-7}},
    # Melnyk et al. 2024, as TRL documents it; the larger the batches, the better
    "aot": {"beta": 0.01},
    "aot_unpaired": {"beta": 0.01},
    # Lu et al. 2024 (DiscoPOP)
    "discopop": {"beta": 0.05, "tau": 0.05},
    # WPO's repository (wzhouad/WPO)
    "wpo": {"beta": 0.01, "config": {"optimizer.learning_rate": 5e-7}},
    # Tülu 3
    "dpo_norm": {"beta": 5.0, "config": {"batch_size": 128}},
    # beta-DPO's README (junkangwu/beta-DPO)
    "beta_dpo": {"beta": 0.1, "alpha": 0.6, "rho": 0.2},
    # TDPO's repository (Vance0124/Token-level-DPO)
    "tdpo1": {"beta": 0.1},
    "tdpo2": {"beta": 0.1, "alpha": 0.5},
    # SPIN's repository (uclaml/SPIN)
    "spin": {"beta": 0.1},
    # Liu et al. 2024 (LD-DPO)
    "ld_dpo": {"beta": 0.1, "alpha": 0.5},
    # SamPO's repository (LuJunru/SamPO)
    "sampo": {"beta": 0.1},
    # D2PO's repository (PrasannS/d2po)
    "d2po": {"beta": 0.05},
    # XPO in TRL 0.x to 1.9
    "xpo": {"alpha": 1e-5},
}

# Losses of several terms, and DPO with a reference that moves: name, then options.
COMBINED: dict[str, dict[str, Any]] = {
    # MPO (Wang et al. 2024, InternVL): preference 0.8, quality 0.2, generation 1
    "mpo": {
        "loss": ("dpo", {"beta": 0.1, "weight": 0.8}),
        "extra_losses": ({"name": "bco_pair", "beta": 0.1, "weight": 0.2}, {"name": "sft", "weight": 1.0}),
    },
    # TR-DPO (Gorbatovski et al. 2024), soft, as TRL sets it
    "tr_dpo": {
        "loss": ("dpo", {"beta": 0.05}),
        "reference.mode": "ema",
        "reference.ema.decay": 0.4,
        "reference.ema.every": 512,
        "optimizer.learning_rate": 1e-6,
    },
    # the same, hard: the policy itself becomes the reference, as often
    "tr_dpo_hard": {
        "loss": ("dpo", {"beta": 0.05}),
        "reference.mode": "ema",
        "reference.ema.decay": 0.0,
        "reference.ema.every": 512,
        "optimizer.learning_rate": 1e-6,
    },
}


def set_objective(config: Any, name: str) -> None:
    """Sets the loss of a config, with what is published for it, and whether there is a reference.

    Args:
        config: The recipe's.
        name: Key of `OBJECTIVES` or of `COMBINED`.

    Raises:
        ValueError: If there is no such objective.
    """
    if name in COMBINED:
        options = dict(COMBINED[name])
        objective, settings = options.pop("loss")
    elif name in OBJECTIVES:
        settings = dict(SETTINGS.get(name, {}))
        objective, options = name, settings.pop("config", {})
        if not OBJECTIVES[name].reference:
            config.reference.mode = "none"
    else:
        raise ValueError(f"there is no variant {name!r}; there are {', '.join(sorted({*OBJECTIVES, *COMBINED}))}")
    config.loss = base.loss(objective, **settings)
    config.update_from_flattened_dict(options)
