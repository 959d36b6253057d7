"""Measures how far a keep mask moves the singular values of a weight matrix.

choices.py      the choices of the spectral reward
scale.py        weights too large or too small for float32
exact.py        all of them, by eigenvalues of the smaller Gram matrix
estimated.py    their density, by stochastic Lanczos quadrature, with an error bound
tridiagonal.py  Sturm counts: how many eigenvalues lie below a value
distances.py    Kolmogorov-Smirnov and Wasserstein distances between two spectra
"""
