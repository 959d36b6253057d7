"""Budgets, allocations and searches: how many channels each layer keeps.

allocation.py        budgets; uniform, protected, OWL and global allocations
influence.py         block influence (ShortGPT) as an allocation
space.py             architectures under one budget, as levels
evaluations.py       evaluated architectures, kept in a file
evolution.py         evolutionary search
predictor.py         the accuracy predictor
width_divergence.py  judges an architecture by KL(dense || pruned)
"""
