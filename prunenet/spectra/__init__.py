"""Singular values of a weight matrix under a keep mask.

exact.py        all of them, by eigenvalues of the smaller Gram matrix
estimated.py    their density, by stochastic Lanczos quadrature, with an error bound
tridiagonal.py  Sturm counts: how many eigenvalues lie below a value
distances.py    Kolmogorov-Smirnov and Wasserstein distances between two spectra
"""
