"""The table of objectives, by name. Each is a function of `Responses` with keyword-only hyper-parameters."""

from daajax.losses.absolute import apo_down, apo_zero, cal_dpo, sppo_hard
from daajax.losses.composed import pairwise, pairwise_needs
from daajax.losses.coupled import aot, aot_unpaired, beta_dpo
from daajax.losses.listwise import exo, info_nca, nca, plackett_luce
from daajax.losses.objective import Objective
from daajax.losses.online import d2po, nash_md, online_dpo, xpo
from daajax.losses.pairwise import (
    cdpo,
    discopop,
    dpo,
    dpo_norm,
    dpo_unweighted,
    f_dpo,
    hinge,
    ipo,
    ipo_mean,
    robust,
    spin,
)
from daajax.losses.penalties import dpo_nll, dpop, r_dpo
from daajax.losses.rainbow import rainbow, rainbow_needs
from daajax.losses.reference_free import alphapo, asft, cpo, cpo_simpo, orpo, sft, simpo, slic_hf, unlikelihood
from daajax.losses.tokenwise import KEPT, ld_dpo, mallows_dpo, mallows_ipo, sampo, tdpo1, tdpo2, wpo
from daajax.losses.unpaired import apo_zero_unpaired, bco, bco_pair, kto, kto_pair
from daajax.losses.with_scores import dno, odpo, rebel, refuse_margins, refuse_win_rates, rpo_reward, sppo

_MEANS = {"count": 0.0, "mean": 0.0}

OBJECTIVES: dict[str, Objective] = {
    # pairs against a reference
    "dpo": Objective(dpo),
    "cdpo": Objective(cdpo),
    "robust": Objective(robust),
    "dpo_unweighted": Objective(dpo_unweighted),
    "ipo": Objective(ipo),
    "ipo_mean": Objective(ipo_mean),
    "hinge": Objective(hinge),
    "spin": Objective(spin),
    "dpo_norm": Objective(dpo_norm),
    "discopop": Objective(discopop),
    "f_dpo": Objective(f_dpo),
    "dpo_nll": Objective(dpo_nll),
    "dpop": Objective(dpop),
    "r_dpo": Objective(r_dpo),
    "cal_dpo": Objective(cal_dpo),
    "sppo_hard": Objective(sppo_hard),
    "apo_zero": Objective(apo_zero),
    "apo_down": Objective(apo_down),
    # with the data's scores
    "odpo": Objective(odpo, reads=("scores",), refuses=refuse_margins),
    "rebel": Objective(rebel, reads=("scores",)),
    "dno": Objective(dno, reads=("scores",)),
    "rpo_reward": Objective(rpo_reward, reads=("scores",)),
    "sppo": Objective(sppo, reads=("scores",), refuses=refuse_win_rates),
    # coupled over the update
    "aot": Objective(aot, coupled=True),
    "aot_unpaired": Objective(aot_unpaired, coupled=True),
    "beta_dpo": Objective(beta_dpo, coupled=True, draws=("gumbel",), state={"mean": 0.0, "std": 0.0}),
    # without a reference
    "simpo": Objective(simpo, reference=False),
    "alphapo": Objective(alphapo, reference=False),
    "cpo": Objective(cpo, reference=False),
    "cpo_simpo": Objective(cpo_simpo, reference=False),
    "orpo": Objective(orpo, reference=False),
    "asft": Objective(asft, reference=False),
    "slic_hf": Objective(
        slic_hf,
        reference=False,
        needs=lambda *, sft_target="chosen", **_: {"responses": 3, "roles": True} if sft_target == "separate" else {},
    ),
    "unlikelihood": Objective(unlikelihood, reference=False),
    "sft": Objective(sft, responses=1, reference=False),
    # lists
    "plackett_luce": Objective(plackett_luce, responses=None),
    "exo": Objective(
        exo,
        responses=None,
        reads=("scores",),
        needs=lambda *, target="scores", **_: {"responses": 2, "reads": ()} if target == "pair" else {},
    ),
    "info_nca": Objective(
        info_nca,
        responses=None,
        reads=("scores",),
        needs=lambda *, target="scores", **_: {"reads": ()} if target == "first" else {},
    ),
    "nca": Objective(
        nca,
        responses=None,
        reads=("scores",),
        needs=lambda *, target="scores", **_: {"reads": ()} if target == "first" else {},
    ),
    # wanted or not
    "kto": Objective(kto, coupled=True, reads=("labels",), mismatched=True),
    "apo_zero_unpaired": Objective(apo_zero_unpaired, responses=1, reads=("labels",)),
    "kto_pair": Objective(kto_pair, coupled=True),
    "bco": Objective(
        bco,
        responses=1,
        coupled=True,
        reads=("labels",),
        may_read=("prompt_probabilities",),
        state=_MEANS,
        needs=lambda *, delta="running", **_: {"state": {}} if delta == "paper" else {},
    ),
    "bco_pair": Objective(
        bco_pair,
        coupled=True,
        state=_MEANS,
        needs=lambda *, delta="running", **_: {"state": {}, "coupled": False} if delta == "zero" else {},
    ),
    # of tokens
    "ld_dpo": Objective(ld_dpo, sums=("tail_log_ratios",)),
    "sampo": Objective(
        sampo, sums=("kept_log_ratios",), needs=lambda *, subset="shared", **_: {"sums": (KEPT.get(subset, ""),)}
    ),
    "wpo": Objective(wpo, sums=("sum_squares",)),
    "tdpo1": Objective(tdpo1, sums=("kl",)),
    "tdpo2": Objective(tdpo2, sums=("kl",)),
    "mallows_dpo": Objective(mallows_dpo, sums=("reference_entropies",)),
    "mallows_ipo": Objective(mallows_ipo, sums=("reference_entropies",)),
    "rainbow": Objective(rainbow, sums=("reference_entropies",), needs=rainbow_needs),
    # of the policy's own samples
    "online_dpo": Objective(
        online_dpo,
        reads=("scores",),
        needs=lambda *, missing_eos_penalty=None, **_: (
            {} if missing_eos_penalty is None else {"reads": ("scores", "finished")}
        ),
    ),
    "d2po": Objective(d2po),
    "xpo": Objective(xpo, reads=("scores",), roles=True),
    "nash_md": Objective(
        nash_md, responses=1, reads=("scores",), sums=("kl_surrogate",), roles=True, refuses=refuse_win_rates
    ),
    # put together by name
    "pairwise": Objective(pairwise, needs=pairwise_needs),
}
