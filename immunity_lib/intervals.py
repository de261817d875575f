"""Intervals of differences that are paired over images and seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean difference and its 95 % interval."""

    effect: float
    low: float
    high: float


def paired_interval(differences: np.ndarray) -> Interval:
    """Mean of differences (S, B) between two models on the same B images, for S pairs of seeds.

    By statsmodels: the differences on a constant, with a covariance clustered by image and, with
    more than one seed, by seed too (Cameron, Gelbach & Miller 2011), and Student's t with as many
    degrees of freedom as the smaller of the two numbers allows. With one seed the interval tells
    what other images would do, and not what another training would. Where all differences are
    equal, so that none of the images says how far others may differ, the interval is widened by
    what is compatible with no deviation in so many images (Wilson's).
    """
    import statsmodels.api as statsmodels  # costs seconds
    from scipy.stats import binomtest

    seeds, images = differences.shape
    values = differences.ravel()
    effect = float(values.mean())
    if np.ptp(values) < 1e-12:
        rest = float(binomtest(0, images).proportion_ci(method="wilson").high)
        return Interval(effect, effect - rest, effect + rest)
    by_image, by_seed = np.tile(np.arange(images), seeds), np.repeat(np.arange(seeds), images)
    ways = [by_image] if seeds == 1 else [np.column_stack((by_image, by_seed)), by_seed]
    for groups in ways:  # with few seeds the variance of two ways can come out negative
        fit = statsmodels.OLS(values, np.ones(len(values))).fit(
            cov_type="cluster", cov_kwds={"groups": groups}, use_t=True
        )
        with np.errstate(invalid="ignore"):
            low, high = fit.conf_int()[0]
        if np.isfinite([low, high]).all():
            break
    return Interval(effect, float(low), float(high))
