"""Options hold numbers that a record can hold, and nothing that their annotations forbid."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from families import tiny_model

import prunenet
from prunenet.compare.options import CalibrationTexts, CompareOptions, Scored
from prunenet.envs.sweep import check_ratios
from prunenet.evaluation.options import EvaluationOptions, SpeedOptions
from prunenet.policies.methods.papers.adapruner import AdaPrunerOptions
from prunenet.policies.methods.papers.saap_tuning import GroupTuning
from prunenet.policies.methods.papers.soft_masks import SoftMaskOptions
from prunenet.policies.methods.widths.evolution import Evolution
from prunenet.policies.methods.widths.predictor import Prediction
from prunenet.policies.options import PruneOptions
from prunenet.policies.refine import Refining
from prunenet.policies.training.recipe import Recipe
from prunenet.policies.training.slots import AllocatorRecipe
from prunenet.recover.options import RecoverText, Tuning
from prunenet.refit.blocks import BlockTraining
from prunenet.text.calibration import CalibrationOptions
from prunenet.text.generate import SamplingOptions


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (PruneOptions, {"ratio": 0.5, "round_to": 8}),
        (Tuning, {"steps": 3, "batch": 2, "seed": 1, "learning_rate": 0.5}),
        (RecoverText, {"tokens": 512, "window": 64}),
        (CalibrationOptions, {"tokens": 512, "seed": 3}),
        (EvaluationOptions, {"window": 64, "max_windows": 2}),
        (SpeedOptions, {"prompt": 8, "repeats": 3}),
        (Recipe, {"seed": 3}),
        (SamplingOptions, {"tokens": 64, "keep": 0.5}),
        (BlockTraining, {"seed": 3}),
        (Tuning, {"betas": (0.5, 0.75)}),
        (CompareOptions, {"ratios": (0.25, 0.5), "seeds": (0, 1), "round_to": 8}),
        (Scored, {"limit": 5}),
        (CalibrationTexts, {"tokens": 512, "window": 64}),
    ],
)
def test_numbers_of_numpy_are_recorded_as_those_of_python(kind, given):
    def foreign(value):
        if isinstance(value, tuple):
            return tuple(map(foreign, value))
        return np.int64(value) if isinstance(value, int) else np.float32(value)

    numpy = {name: foreign(value) for name, value in given.items()}
    assert json.dumps(asdict(kind(**numpy))) == json.dumps(asdict(kind(**given)))


@pytest.mark.parametrize("numbers", [np.array, torch.tensor, list])
def test_arrays_of_numbers_are_recorded_as_their_numbers(numbers):
    given = CompareOptions(ratios=numbers([0.25, 0.5]), seeds=numbers([0, 1]), policy="none")
    assert given == CompareOptions(ratios=(0.25, 0.5), seeds=(0, 1), policy="none")
    assert CompareOptions(seeds=range(2)).seeds == (0, 1)
    assert check_ratios(numbers([0.25, 0.5])) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("kind", "name", "value", "wanted"),
    [
        (PruneOptions, "ratio", "0.3", "a number or None"),
        (PruneOptions, "ratio", True, "a number or None"),
        (PruneOptions, "round_to", 2.5, "a whole number or auto"),
        (PruneOptions, "structures", ["heads"], "a text"),
        (Tuning, "steps", 1e3, "a whole number or None"),
        (Tuning, "embeddings", "yes", "True or False"),
        (Tuning, "betas", (0.9,), "2 values, each a number"),
        (RecoverText, "moments", "web", "one of self, data"),
        (Recipe, "hidden", 8, "a sequence, each a whole number"),
        (Recipe, "prior", {"rank": "high"}, "a mapping, each value a number"),
        (Recipe, "allocation", "default", "Recipe or None"),
        (CompareOptions, "ratios", 0.3, "a sequence, each a number"),
        (CompareOptions, "seeds", (0.5,), "a sequence, each a whole number"),
        (CompareOptions, "share_of", "bytes", "one of channels, parameters, active"),
        (Scored, "texts", "builtin", "a sequence, each a text or Path"),
        (CalibrationTexts, "named", {"ptb": 1}, "a mapping, each value a text or Path"),
        (SpeedOptions, "compiled", 1, "True or False"),
        (AllocatorRecipe, "worst", None, "True or False"),
        (SoftMaskOptions, "steps", 2.0, "a whole number"),
        (GroupTuning, "bits", "4", "a whole number or None"),
        (Evolution, "screens", (3,), "a sequence, each Screen"),
        (Prediction, "tied", "1", "a whole number"),
        (Refining, "of_all", 1, "True or False"),
        (AdaPrunerOptions, "widths", "as_llm_pruner", "Callable"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_value_of_another_type_is_refused_by_name(kind, name, value, wanted):
    shown = tuple(value) if isinstance(value, list) else value
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be {wanted}, got {shown!r}")):
        kind(**{name: value})


@pytest.mark.parametrize(
    "changes",
    [{"evaluate_at": ()}, {"hidden": (0,)}, {"entropy": float("nan")}, {"entropy": -1.0}],
)
def test_a_recipe_that_trains_nothing_is_refused_before_the_training(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Recipe(subset="bernoulli", **changes)


@pytest.mark.parametrize(
    "changes", [{"evaluate_at": ()}, {"spread": float("nan")}, {"spread": 0.0}]
)
def test_an_allocation_that_trains_nothing_is_refused_before_the_training(changes):
    with pytest.raises(ValueError, match="1 ratio or more to evaluate at and a spread above 0"):
        AllocatorRecipe(**changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call",
    [
        lambda model, out: prunenet.compare(model, ["magnitude"], out),
        lambda model, out: prunenet.recover(model, out, teacher="dense"),
        lambda model, out: prunenet.recover("narrow", out, teacher=model),
        lambda model, out: prunenet.evaluate(model),
    ],
)
def test_a_loaded_model_in_place_of_its_folder_is_refused(call, tmp_path):
    with pytest.raises(TypeError, match="by its folder or hub id, got LlamaForCausalLM; save it"):
        call(tiny_model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_model_in_place_of_it_is_refused():
    with pytest.raises(TypeError, match=r"give prunenet\.load_model\('dense'\)"):
        prunenet.train("dense", Recipe(reward="spectral"))
