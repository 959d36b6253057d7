"""The state of an unfinished training: what was saved comes back, and nothing else is believed."""

import json
import math

import pytest
import torch
from torch import nn

from prunenet.policies.artifact import PolicyError
from prunenet.policies.training.state import Progress, load_state, save_state
from prunenet.runtime.own_files import packed, unpacked

RUN = {"recipe": {"seed": 0, "ratio": [0.1, 0.6]}, "text": None}
UPDATES = 4


class Toy(nn.Module):
    """A policy: a scorer, and something besides."""

    def __init__(self) -> None:
        super().__init__()
        self.scorer, self.critic = nn.Linear(3, 2), nn.Linear(3, 1)


def toy(seed: int = 0) -> tuple[Toy, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    policy = Toy()
    return policy, torch.optim.AdamW(policy.parameters(), lr=0.1)


def trained() -> tuple[Toy, torch.optim.Optimizer, Progress]:
    policy, optimizer = toy()
    for _ in range(2):
        policy.scorer(torch.ones(3)).sum().backward()  # no gradient for the critic
        optimizer.step()
    best = {name: tensor + 1 for name, tensor in policy.scorer.state_dict().items()}
    return policy, optimizer, Progress(2, 0.5, best, [(0, 0.25), (2, 0.5)])


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, trained()[2], *trained()[:2], RUN)
    return path


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_was_saved_comes_back(saved):
    policy, optimizer = toy(seed=1)
    expected, stepped, progress = trained()
    found = load_state(saved, policy, optimizer, RUN, UPDATES)
    assert (found.updates, found.best_reward, found.history) == (2, 0.5, progress.history)
    assert same(found.best, progress.best)
    assert same(policy.state_dict(), expected.state_dict())
    states, wanted = (o.state_dict()["state"] for o in (optimizer, stepped))
    assert states.keys() == wanted.keys() == {0, 1}
    assert all(same(states[number], wanted[number]) for number in wanted)


def put(name: str, tensor: torch.Tensor):
    return lambda tensors, _: tensors.__setitem__(name, tensor)


def say(**facts):
    return lambda _, known: known.update(facts)


ALTERED = {
    "more updates than the stage has": say(updates=10_000),
    "fewer updates than were evaluated": say(updates=1),
    "updates below 0": say(updates=-1),
    "updates as text": say(updates="2"),
    "updates as a truth": say(updates=True),
    "no updates": lambda _, facts: facts.pop("updates"),
    "another best reward": say(best_reward=0.75),
    "no number as best reward": say(best_reward=math.nan),
    "text as best reward": say(best_reward="0.5"),
    "an empty history": say(history=[]),
    "a history that does not begin": say(history=[[1, 0.5]]),
    "a history that falls": say(history=[[0, 0.25], [2, 0.5], [1, 0.1]]),
    "a history of pairs of three": say(history=[[0, 0.25, 1]]),
    "a history of half updates": say(history=[[0.0, 0.25], [2, 0.5]]),
    "an endless reward": say(history=[[0, math.inf]], best_reward=math.inf),
    "a reward beyond floats": say(history=[[0, 10**400]]),
    "a run that is a list": say(run=[]),
    "a weight too few": lambda tensors, _: tensors.pop("policy.critic.bias"),
    "a weight too many": put("policy.other", torch.zeros(1)),
    "a weight of another shape": put("policy.critic.bias", torch.zeros(2)),
    "a weight of another dtype": put("policy.critic.bias", torch.zeros(1).double()),
    "a weight that is no number": put("policy.critic.bias", torch.full((1,), torch.nan)),
    "no best weights": lambda tensors, _: tensors.pop("best.bias"),
    "best weights of another shape": put("best.bias", torch.zeros(3)),
    "an optimizer entry of no parameter": put("optimizer.9.step", torch.zeros(())),
    "an optimizer entry below 0": put("optimizer.-1.step", torch.zeros(())),
    "an optimizer entry without a number": put("optimizer.x.step", torch.zeros(())),
    "an optimizer entry that is not whole": lambda tensors, _: tensors.pop("optimizer.0.exp_avg"),
    "an unknown field of the optimizer": put("optimizer.0.other", torch.zeros(())),
    "a moment of another shape": put("optimizer.0.exp_avg", torch.zeros(1)),
    "a negative second moment": put("optimizer.1.exp_avg_sq", torch.tensor([-1.0, 0.0])),
    "a negative step": put("optimizer.0.step", torch.tensor(-1.0)),
    "a step of many": put("optimizer.0.step", torch.zeros(2)),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_a_state_that_cannot_be_right_is_refused_even_with_a_right_hash(saved, alter):
    tensors, facts = unpacked(saved)
    alter(tensors, facts)
    saved.write_bytes(packed(tensors, facts))
    policy, optimizer = toy(seed=1)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(
        PolicyError, match=r"is damaged .*; start a new run in another folder"
    ) as said:
        load_state(saved, policy, optimizer, RUN, UPDATES)
    assert len(str(said.value)) < 500
    assert same(policy.state_dict(), before)
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("where", [0.02, 0.3, 0.5, 0.8, 0.999])
def test_a_changed_byte_is_refused(saved, where):
    content = bytearray(saved.read_bytes())
    content[int(where * len(content))] ^= 1
    saved.write_bytes(content)
    with pytest.raises(PolicyError, match="is damaged"):
        load_state(saved, *toy(), RUN, UPDATES)


def test_a_state_without_a_hash_is_refused(saved):
    from safetensors.torch import save

    tensors, facts = unpacked(saved)
    saved.write_bytes(save(tensors, {"prunenet": json.dumps(facts)}))
    with pytest.raises(PolicyError, match="no sha256"):
        load_state(saved, *toy(), RUN, UPDATES)


def test_the_state_of_another_run_is_refused_by_name(saved):
    with pytest.raises(PolicyError, match="was started with text None, not 'other'"):
        load_state(saved, *toy(), RUN | {"text": "other"}, UPDATES)
    with pytest.raises(PolicyError, match="nothing to resume"):
        load_state(saved.with_name("none"), *toy(), RUN, UPDATES)
