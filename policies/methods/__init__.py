"""The methods that PruneNet is compared with, all on one signature, and where to cut as an axis of its own.

    evidence = Evidence(model, self_blocks(model, tokenizer), seed=0)
    narrow = pruned_model(evidence, "flap", 0.3)
    narrow = pruned_model(evidence, "wanda_sp", 0.3, allocation="owl")

FFN channels only. Formulas: METHODS.md section 6; each file opens with its source and with what differs from it.
"""

from prunenet.policies.methods.allocation import Budget, global_sort, outlier_share, owl, protected, uniform
from prunenet.policies.methods.cut import Cut, cut, pruned_model
from prunenet.policies.methods.evidence import Evidence
from prunenet.policies.methods.group_tuning import Tuned, group_tuned
from prunenet.policies.methods.influence import block_influence, by_influence
from prunenet.policies.methods.table import METHODS, Allocation, Compensation, Method

__all__ = [
    "METHODS",
    "Allocation",
    "Budget",
    "Compensation",
    "Cut",
    "Evidence",
    "Method",
    "Tuned",
    "block_influence",
    "by_influence",
    "cut",
    "global_sort",
    "group_tuned",
    "outlier_share",
    "owl",
    "protected",
    "pruned_model",
    "uniform",
]
