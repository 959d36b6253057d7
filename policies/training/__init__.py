"""Trains a policy: stable-baselines3 around the scorer. Applying a saved policy imports none of
this.

choices.py       the choices of a recipe
recipe.py        recipes and presets
train.py         a training from model to saved policy
reports.py       who is told of a training: progress, callbacks, trackers
run.py           one stage: its updates, its evaluations, the best policy seen
state.py         the state file of an unfinished stage
actor_critic.py  the stable-baselines3 policy around scorer and distribution
slots.py         one allocation over channels and heads, trained on many interaction matrices
vec_env.py       Gymnasium's batched environments as stable-baselines3's
subset.py        distributions over keep masks: sample, mode, exact log-probability, entropy
swept_widths.py  the distribution over widths, layer by layer under one budget
"""
