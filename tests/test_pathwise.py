"""The scorer trained by the gradient of the divergence itself."""

from dataclasses import replace

import pytest
import torch
from families import tiny_model, token_ids
from stable_baselines3.common.callbacks import BaseCallback

from prunenet.cli.train import Training
from prunenet.envs.divergence import DivergenceReward
from prunenet.models.masks import top_channels
from prunenet.policies.apply import prune
from prunenet.policies.artifact import Policy
from prunenet.policies.training.pathwise import relaxed_masks
from prunenet.policies.training.recipe import PRESETS, Recipe, as_json, recipe_for
from prunenet.policies.training.reports import Reports
from prunenet.policies.training.train import train
from prunenet.text.calibration import CalibrationSet

TEXT = CalibrationSet(token_ids(8, 16), "self", {"text": "self-generated"})
SHORT = recipe_for("pathwise", {"updates": 6, "blocks": 2, "hidden": (8,), "evaluate_every": 3})
WHERE = replace(
    PRESETS["widths"],
    gradient="pathwise",
    updates=4,
    masks=2,
    learning_rate=0.1,
    round_to=4,
    evaluate_at=(0.5,),
)


def weights(policy: Policy) -> list[torch.Tensor]:
    return list(policy.scorer.state_dict().values())


def same(one, other) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("mu", [0.5, 0.05])
def test_relaxed_masks_follow_the_logits_and_meet_every_share(mu) -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.2, 0.7, 0.95])
    masks = relaxed_masks(3 * logits + 1, shares, mu)
    torch.testing.assert_close(masks.mean(1), shares, atol=1e-3, rtol=0)
    assert bool(((masks >= -1e-6) & (masks <= 1 + 1e-6)).all())
    for row, mask, share in zip(logits, masks, shares, strict=True):
        keep = top_channels(row, round(200 * float(share)))
        assert float(mask[keep].min()) >= float(mask[~keep].max()) - 1e-6
    if mu == 0.05:
        assert float((masks * (1 - masks)).mean()) < 0.02


def test_gradients_of_relaxed_masks_reach_logits_and_shares() -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).double()
    shares = torch.tensor([0.4, 0.6]).double().requires_grad_()
    value = torch.linspace(0, 1, 300).double()
    logits.requires_grad_()
    masks = relaxed_masks(logits, shares, 0.5)
    (moved,) = torch.autograd.grad(masks.mean(1).sum(), [shares], retain_graph=True)
    torch.testing.assert_close(moved, torch.ones(2).double(), atol=0.05, rtol=0)
    (better,) = torch.autograd.grad((masks * value).sum(), [logits])
    with torch.no_grad():
        raised = relaxed_masks(logits + 0.1 * better / better.abs().max(), shares, 0.5)
    assert float((raised * value).sum()) > float((masks.detach() * value).sum())
    torch.testing.assert_close(raised.mean(1), shares.detach(), atol=1e-3, rtol=0)


def test_a_policy_learns_scores_and_widths_and_prunes_as_any_other(tmp_path) -> None:
    model = tiny_model("llama")
    trained = train(model, replace(SHORT, allocation=WHERE), blocks=TEXT, out=tmp_path / "p")
    for history in (trained.history, trained.widths_history):
        assert max(reward for _, reward in history) >= history[0][1]
    assert [update for update, _ in trained.history] == [0, 3, 6]
    policy = Policy.from_pretrained(tmp_path / "p")
    assert (
        policy.config.recipe["gradient"] == policy.config.recipe["where"]["gradient"] == "pathwise"
    )
    assert policy.config.regime == "self"
    assert same(weights(policy), weights(trained.policy))
    untrained = Policy.untrained(policy.config, seed=SHORT.seed)
    assert not same(weights(policy), weights(untrained))
    assert prune(model, policy, ratio=0.5, widths="per-layer", refit="off", blocks=None).model


@pytest.mark.long
def test_a_seed_repeats_a_policy_and_a_killed_run_ends_with_the_same_one(tmp_path) -> None:
    recipe = replace(SHORT, allocation=WHERE)
    whole = train(tiny_model("llama"), recipe, blocks=TEXT).policy
    for stage, last in (("channels", 2), ("widths", 3)):

        def killed(done, of, best, last=last, stage=stage) -> None:
            if done == last and of == (6 if stage == "channels" else 4):
                raise KeyboardInterrupt

        out = tmp_path / stage
        with pytest.raises(KeyboardInterrupt):
            train(
                tiny_model("llama"), recipe, blocks=TEXT, out=out, reports=Reports(progress=killed)
            )
        resumed = train(tiny_model("llama"), recipe, blocks=TEXT, out=out, resume=True)
        assert same(weights(whole), weights(resumed.policy))
    other = train(tiny_model("llama"), replace(SHORT, seed=1), blocks=TEXT).policy
    assert not same(weights(whole), weights(other))


def test_records_of_reinforce_are_those_from_before_there_was_a_choice() -> None:
    assert "gradient" not in as_json(Recipe())
    assert as_json(SHORT)["gradient"] == "pathwise"


def test_what_the_pathwise_gradient_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="take reward 'divergence'"):
        Recipe(gradient="pathwise")
    model, own = tiny_model("llama"), [BaseCallback]
    with pytest.raises(ValueError, match="leave it out, or take gradient 'reinforce'"):
        train(model, SHORT, blocks=TEXT, reward=DivergenceReward(model, TEXT.ids))
    with pytest.raises(ValueError, match="leave `callbacks` out"):
        train(model, SHORT, blocks=TEXT, reports=Reports(callbacks=own))
    with pytest.raises(ValueError, match="give token blocks"):
        train(model, SHORT)
    with pytest.raises(ValueError, match="--algorithm ppo belongs to --gradient reinforce"):
        Training(gradient="pathwise", algorithm="ppo").recipes()
    with pytest.raises(ValueError, match="belongs to the spectral reward"):
        Training(gradient="pathwise", distance="ks").recipes()


def test_the_command_takes_the_preset_of_its_gradient() -> None:
    first, second = Training(gradient="pathwise", updates=3).recipes()
    assert first == replace(PRESETS["pathwise"], updates=3)
    assert second == PRESETS["widths"]


@pytest.mark.slow
def test_at_equal_passes_the_pathwise_gradient_learns_at_least_as_much_as_reinforce() -> None:
    """A backward pass counts as two forward passes."""
    model, text = tiny_model("llama"), CalibrationSet(token_ids(24, 24), "self", {})
    played = Recipe(
        reward="divergence", updates=30, masks=8, gamma=1.0, evaluate_at=(0.3,), ratio=(0.3, 0.3)
    )
    passes = played.updates * played.masks
    direct = replace(played, gradient="pathwise", updates=passes // 3, masks=1)
    found = [max(r for _, r in train(model, r, blocks=text).history) for r in (played, direct)]
    assert found[1] >= found[0]
