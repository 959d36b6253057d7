"""Chooses how many channels each layer keeps: budgets, allocations and searches.

allocation.py        budgets; uniform, protected, OWL and global allocations
influence.py         block influence (ShortGPT) as an allocation
space.py             architectures under one budget, as levels of width
evaluations.py       losses of architectures, kept in a file
evolution.py         evolutionary search
predictor.py         search by an accuracy predictor
joint.py             searches over channels and heads on an interaction matrix
width_divergence.py  judges an architecture by KL(dense || pruned)
"""
