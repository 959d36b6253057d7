"""Options hold numbers that a record can hold."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from prunenet.evaluation.options import EvaluationOptions, SpeedOptions
from prunenet.policies.options import PruneOptions
from prunenet.policies.training.recipe import Recipe
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
    ],
)
def test_numbers_of_numpy_are_recorded_as_those_of_python(kind, given):
    def foreign(value):
        if isinstance(value, tuple):
            return tuple(map(foreign, value))
        return np.int64(value) if isinstance(value, int) else np.float32(value)

    numpy = {name: foreign(value) for name, value in given.items()}
    assert json.dumps(asdict(kind(**numpy))) == json.dumps(asdict(kind(**given)))
