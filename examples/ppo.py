"""Trains a stock PPO to spend one budget on a model's channels and heads, and beats random."""

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

import prunenet  # registers the environments

ENV = "prunenet/BudgetPruning-v0"  # with model="path/or/hub-id" it plays on a real model


def mean_damage(act, episodes: int = 20) -> float:
    """Mean predicted KL to the dense model of the allocations that a way to act ends with."""
    env, total = gymnasium.make(ENV, ratio=0.4), 0.0
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        done = False
        while not done:
            observation, reward, done, _, _ = env.step(act(env, observation))
            total -= reward
    return total / episodes


torch.set_num_threads(1)
agent = PPO("MultiInputPolicy", make_vec_env(ENV, 8, env_kwargs={"ratio": 0.4}), n_steps=64, seed=0)
gymnasium.make(ENV).action_space.seed(0)
print(f"prunenet {prunenet.__version__}: KL to the dense model at 0.4, in nats per token")
print(f"random actions: {mean_damage(lambda env, _: env.action_space.sample()):.4f}")
agent.learn(4_000)
print(f"PPO: {mean_damage(lambda _, seen: agent.predict(seen, deterministic=True)[0]):.4f}")
