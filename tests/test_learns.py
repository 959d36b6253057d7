"""The policy learns."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from families import tiny_model
from torch import Tensor

from prunenet.envs import SpectralReward
from prunenet.envs.sweep import View
from prunenet.models.layers import iter_ffns
from prunenet.models.masks import top_channels
from prunenet.policies.training.recipe import PRESETS, Recipe
from prunenet.policies.training.train import train

PLANTED = 16


class PlantedReward:
    """The share of the planted channels that a mask keeps."""

    def __init__(self, planted: Tensor) -> None:
        self.planted = planted

    def layer(self, index: int, keep: Tensor) -> dict[str, Tensor]:
        return {"planted": keep[:, self.planted].float().mean(1)}

    def sweep(self, keep: Sequence[Tensor]) -> dict[str, Tensor]:
        return {}


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["a2c", "ppo"])
def test_a_trained_policy_recovers_the_planted_channels_of_a_toy_layer(
    algorithm, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_model("llama")
    planted = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:PLANTED]
    for ffn in iter_ffns(model):
        # importance that a norm would get wrong: the planted channels write less
        ffn.down[:, planted] *= 0.5
    recipe = Recipe(
        updates=60,
        masks=16,
        ratio=(0.5, 0.8),
        evaluate_at=(2 / 3,),
        hidden=(16,),
        algorithm=algorithm,
    )
    trained = train(model, recipe, reward=PlantedReward(planted), regime="weights")
    expected = torch.zeros(48, dtype=torch.bool)
    expected[planted] = True
    untrained = trained.history[0][1]
    assert untrained < 0.9
    for scores in trained.policy.scores(model):
        kept = top_channels(scores, PLANTED)
        assert (kept & expected).sum() >= PLANTED - 1
    assert not list(tmp_path.iterdir()), "training leaves nothing in the temporary folder"


@pytest.mark.slow
def test_on_the_real_model_the_trained_policy_beats_random_masks_by_three_standard_deviations(
    smollm2,
):
    from prunenet.checkpoints.load import load_model

    model = load_model(smollm2)
    view, reward = View.of(model), SpectralReward(model)
    width = round(0.7 * view.d_ff)
    random = []
    for seed in range(5):
        noise = torch.rand(view.layers, view.d_ff, generator=torch.Generator().manual_seed(seed))
        random.append(per_layer(reward, [top_channels(row, width) for row in noise]))
    spread = torch.tensor(random).std()
    recipe = replace(PRESETS["spectral"], updates=4, evaluate_every=4)
    policy = train(model, recipe, reward=reward, regime="weights").policy
    assert per_layer(reward, policy.masks(model, 0.3, round_to=1)) > max(random) + 3 * float(spread)


def per_layer(reward: SpectralReward, keep: list[Tensor]) -> float:
    paid = [sum(reward.layer(layer, mask[None]).values()) for layer, mask in enumerate(keep)]
    return float(torch.stack(paid).mean())
