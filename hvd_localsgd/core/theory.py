"""The papers' rules: how often to communicate, what speed-up to expect.

Stich (2018), "Local SGD Converges Fast and Communicates Little"; Yu, Yang & Zhu (2018), "Parallel Restarted SGD
with Faster Convergence and Less Communication". Rates hide constants: with the problem's constants the functions give
the bound that the proofs give, without them a rule of thumb with constant 1.
"""

from __future__ import annotations

import math


def convex_interval(
    steps: int,
    ranks: int,
    batch: int = 1,
    *,
    mu: float | None = None,
    smoothness: float | None = None,
    variance: float | None = None,
    gradient: float | None = None,
    a: float = 0.0,
) -> int:
    """The largest H that keeps the linear speed-up of a strongly convex problem: O(sqrt(T / (K b))).

    Stich (2018), Corollary 2.3. Given all of the problem's constants, the H at which the term that H adds to the bound of
    Theorem 2.2, 256 T G^2 H^2 L / (mu^2 S_T), equals the term of the noise, 4 T (T + 2a) sigma^2 / (mu K b S_T).

    Args:
        steps: T, local steps per rank, >= 1.
        ranks: K >= 1.
        batch: b, samples per local step, >= 1.
        mu, smoothness, variance, gradient: mu, L, sigma^2 (of one sample's gradient) and G^2 (its second moment).
        a: of the step sizes.

    Returns:
        H >= 1, at most T.

    Raises:
        ValueError: an argument is out of range, or some but not all constants are given.
    """
    _check_counts(steps=steps, ranks=ranks, batch=batch)
    constants = (mu, smoothness, variance, gradient)
    bound = math.sqrt((steps + 2 * a) / (ranks * batch))
    given = [c for c in constants if c is not None]
    if given:
        if len(given) < len(constants) or not all(0 < constant < math.inf for constant in given):
            raise ValueError(f"Give all of mu, smoothness, variance and gradient, each > 0. Received: {constants}")
        bound *= math.sqrt(given[0] * given[2] / (64 * given[1] * given[3]))
    return min(steps, max(1, int(bound)))


def nonconvex_interval(steps: int, ranks: int, *, variance: float | None = None, gradient: float | None = None) -> int:
    """The largest I that keeps the rate O(1/sqrt(N T)) of a non-convex problem: T^(1/4) / N^(3/4).

    Yu, Yang & Zhu (2018), Corollary 1. With sigma^2 and G^2 given, times sigma / (2 G): where the term of the drift,
    4 gamma^2 I^2 G^2 L^2, equals that of the noise, L gamma sigma^2 / N, for gamma = sqrt(N) / (L sqrt(T)).

    Args:
        steps: T, local steps per rank, >= 1.
        ranks: N >= 1.
        variance, gradient: sigma^2 and G^2 of a stochastic gradient.

    Returns:
        I >= 1, at most T.

    Raises:
        ValueError: an argument is out of range, or one constant is given and the other is not.
    """
    _check_counts(steps=steps, ranks=ranks)
    bound = steps**0.25 / ranks**0.75
    if variance is not None or gradient is not None:
        if variance is None or gradient is None or not (0 < variance < math.inf and 0 < gradient < math.inf):
            raise ValueError(f"Give variance and gradient, each > 0. Received: {variance!r}, {gradient!r}")
        bound *= math.sqrt(variance / (4 * gradient))
    return min(steps, max(1, int(bound)))


def speed_up(ranks: int, interval: int, epsilon: float = 0.0, rho: float = 0.0) -> float:
    """S(K), the theoretical speed-up of K ranks over one in time to accuracy epsilon, Stich (2018), section 4.

    S(K) = K / [ (1/2 + 1/2 sqrt(1 + epsilon (1 + H + H^2 K))) (1 + 2 rho (K - 1) / H) ]

    Args:
        ranks: K >= 1.
        interval: H >= 1.
        epsilon: accuracy.
        rho: cost of sending one vector over cost of one gradient; K ranks send 2 (K - 1) vectors each round.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_counts(ranks=ranks, interval=interval)
    if epsilon < 0 or rho < 0:
        raise ValueError(f"epsilon and rho must be >= 0. Received: {epsilon!r}, {rho!r}")
    drift = 0.5 + 0.5 * math.sqrt(1 + epsilon * (1 + interval + interval**2 * ranks))
    return ranks / (drift * (1 + 2 * rho * (ranks - 1) / interval))


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1. Received: {value!r}")
