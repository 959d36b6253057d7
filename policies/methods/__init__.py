"""The methods that PruneNet is compared with, all on one signature, and where to cut as an axis of
its own.

    evidence = Evidence(model, self_blocks(model, tokenizer), seed=0)
    narrow = pruned_model(evidence, "flap", 0.3)
    narrow = pruned_model(evidence, "wanda_sp", 0.3, allocation="owl")
    budget, judge = Budget.of(model, 0.3), WidthDivergence(model, evidence.ids, scores)
    widths = evolution_search(budget, judge).widths
    narrow = pruned_model(evidence, "wanda_sp", 0.3, allocation=widths)

    narrow = pruned_model(evidence, "llm_pruner_element1", 0.3, heads=True)

FFN channels; attention heads too where a method that cuts them is asked to. SliceGPT slices the
residual stream instead:

    sliced(evidence, slicing=0.25).save_pretrained("sliced")  # or sliced(evidence, 0.3): as large
    as a cut at that ratio

Formulas: METHODS.md section 6; each file opens with its source and with what differs from it.
"""

from prunenet.policies.methods.cut import WITH_HEADS, BaselineCut, cut, pruned_model
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.papers.saap_tuning import GroupTuned, group_tuned
from prunenet.policies.methods.papers.slicegpt import sliced
from prunenet.policies.methods.searched_widths import searched_widths
from prunenet.policies.methods.table import METHODS, Allocation, Compensation, Method
from prunenet.policies.methods.widths.allocation import (
    Budget,
    global_sort,
    outlier_share,
    owl,
    protected,
    uniform,
)
from prunenet.policies.methods.widths.evaluations import Evaluator, Searched, best_of_random
from prunenet.policies.methods.widths.evolution import Screen, evolution_search
from prunenet.policies.methods.widths.influence import block_influence, by_influence
from prunenet.policies.methods.widths.predictor import PredictorSearch, predictor_search
from prunenet.policies.methods.widths.space import Space
from prunenet.policies.methods.widths.width_divergence import WidthDivergence

__all__ = [
    "METHODS",
    "WITH_HEADS",
    "Allocation",
    "BaselineCut",
    "Budget",
    "Compensation",
    "Evaluator",
    "Evidence",
    "GroupTuned",
    "Method",
    "PredictorSearch",
    "Screen",
    "Searched",
    "Space",
    "WidthDivergence",
    "best_of_random",
    "block_influence",
    "by_influence",
    "cut",
    "evolution_search",
    "global_sort",
    "group_tuned",
    "outlier_share",
    "owl",
    "predictor_search",
    "protected",
    "pruned_model",
    "searched_widths",
    "sliced",
    "uniform",
]
