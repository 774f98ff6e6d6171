"""The table from a golden file's name to what reads its cases."""

from collections.abc import Callable

from tests.golden import groups, pairwise, tokenwise
from tests.golden.cases import Case
from tests.golden.evaluation import Problem
from tests.golden.pairwise import plain

FILES: dict[str, Callable[[Case], Problem]] = {
    "alphapo": plain("alphapo", "beta gamma alpha"),
    "aot": groups.aot,
    "apo_down": plain("apo_down", "beta constant"),
    "apo_zero": plain("apo_zero", "beta constant"),
    "asft": pairwise.asft,
    "bco": groups.bco,
    "beta_dpo": groups.beta_dpo,
    "cal_dpo": pairwise.cal_dpo,
    "cdpo": plain("dpo", "beta label_smoothing"),
    "cpo": pairwise.cpo,
    "d2po": tokenwise.d2po,
    "discopop": pairwise.discopop,
    "dno": pairwise.dno,
    "dpo": pairwise.dpo,
    "dpo_nll": plain("dpo_nll", "beta nll_weight nll_reduction"),
    "dpo_norm": plain("dpo_norm", "beta"),
    "dpo_plackett_luce": groups.plackett_luce,
    "dpo_unweighted": pairwise.dpo_unweighted,
    "dpop": plain("dpop", "beta", **{"lambda": "penalty"}),
    "exo": groups.exo,
    "f_dpo": pairwise.f_dpo,
    "halos_dpo_cdpo": plain("dpo", "beta", epsilon="label_smoothing"),
    "info_nca": groups.nca("info_nca"),
    "ipo": pairwise.ipo,
    "kto": groups.kto,
    "ld_dpo": tokenwise.ld_dpo,
    "mallows_po": tokenwise.mallows_po,
    "nash_md": tokenwise.nash_md,
    "nca": groups.nca("nca"),
    "odpo": pairwise.odpo,
    "online_dpo": tokenwise.online_dpo,
    "orpo": pairwise.orpo,
    "r_dpo": plain("r_dpo", "beta alpha"),
    "rainbow_po": tokenwise.rainbow_po,
    "rebel": pairwise.rebel,
    "robust_dpo": plain("robust", "beta label_smoothing"),
    "sampo": tokenwise.sampo,
    "simpo": pairwise.simpo,
    "slic_hf": pairwise.slic_hf,
    "spin": pairwise.spin,
    "sppo": pairwise.sppo,
    "tdpo": tokenwise.tdpo,
    "tr_dpo": tokenwise.tr_dpo,
    "wpo": tokenwise.wpo,
    "xpo": tokenwise.xpo,
}
