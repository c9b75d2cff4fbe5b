"""Certificates: that each estimator has the expectation it claims, by means that the estimators have no part in.

Exact, by Gauss-Hermite quadrature (one latent dimension, K = 2 and 3 particles) and by enumeration of a categorical
latent: no sampling. Through the whole path of `routing`, by z-scores over replicates of a linear-Gaussian model.
Every check has a twin, biased by 5 %, that it must refuse.
"""
