"""Implements the methods that PruneNet is compared with, under one signature.

A method scores channels; an allocation chooses the width of each layer. Both can be combined:

    evidence = Evidence(model, self_blocks(model, tokenizer), seed=0)
    narrow = pruned_model(evidence, "flap", 0.3)
    narrow = pruned_model(evidence, "wanda_sp", 0.3, allocation="owl")

    budget = Budget.of(model, 0.3)
    judge = WidthDivergence(model, evidence.ids, scores)
    widths = evolution_search(budget, judge).widths
    narrow = pruned_model(evidence, "wanda_sp", 0.3, allocation=widths)

Some methods cut attention heads as well as FFN channels:

    narrow = pruned_model(evidence, "llm_pruner_element1", 0.3, heads=True)

SliceGPT slices the residual stream instead:

    sliced(evidence, slicing=0.25).save_pretrained("sliced")
    sliced(evidence, 0.3)  # has the parameters of a cut at ratio 0.3

Formulas: docs/methods.md, section 6. Each file of `papers` opens with its source and with what
differs from it.

cut.py               the front door: one method, one allocation, one ratio
table.py             one row a method
searched_widths.py   searched allocations by name
papers/              one paper a file
evidence/            what methods measure
widths/              budgets, allocations, searches
"""

from prunenet.policies.methods.cut import WITH_HEADS, BaselineCut, cut, pruned_model
from prunenet.policies.methods.evidence.measurements import Evidence
from prunenet.policies.methods.papers.saap_tuning import GroupTuned, GroupTuning, group_tuned
from prunenet.policies.methods.papers.slicegpt import sliced
from prunenet.policies.methods.searched_widths import searched_widths
from prunenet.policies.methods.table import METHODS, Allocation, Method, MethodRefit
from prunenet.policies.methods.widths.allocation import (
    Budget,
    global_sort,
    outlier_share,
    owl,
    protected,
    uniform,
)
from prunenet.policies.methods.widths.evaluations import Evaluator, Searched, best_of_random
from prunenet.policies.methods.widths.evolution import Evolution, Screen, evolution_search
from prunenet.policies.methods.widths.influence import block_influence, by_influence
from prunenet.policies.methods.widths.predictor import (
    Prediction,
    PredictorSearch,
    predictor_search,
)
from prunenet.policies.methods.widths.space import Space
from prunenet.policies.methods.widths.width_divergence import WidthDivergence

__all__ = [
    "METHODS",
    "WITH_HEADS",
    "Allocation",
    "BaselineCut",
    "Budget",
    "Evaluator",
    "Evidence",
    "Evolution",
    "GroupTuned",
    "GroupTuning",
    "Method",
    "MethodRefit",
    "Prediction",
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
