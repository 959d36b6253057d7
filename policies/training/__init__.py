"""Training a policy: stable-baselines3 around the scorer. Applying a saved policy imports none of
this.

recipe.py        presets and options of a training
train.py         a training from model to saved policy
run.py           its updates, one stage after the other
state.py         the state file of an unfinished training
actor_critic.py  the stable-baselines3 policy around scorer and distribution
vec_env.py       our vector environment as stable-baselines3's
subset.py        distributions over keep masks: sample, mode, exact log-probability, entropy
swept_widths.py  the distribution over widths, layer by layer under one budget
"""
