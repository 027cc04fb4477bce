"""How far VCR can lift features, before anything is trained: the sampling floor of the covariance penalty.

docs/math.md derives what is computed here.
"""

import math

import torch

from vjvcr_fast.losses.backends import check_number


def attainable_std(alpha: float, beta: float, n: int, d: int, threshold: float = 1.0) -> float:
    """The standard deviation at which VCR is least, for d independent normal features in batches of n samples.

    A covariance that is estimated from n samples is not zero, so the penalty pushes even independent features down. VCR
    cannot lift them further than about s, the minimum of

        alpha * E max(0, threshold - s * chi_{n-1} / sqrt(n - 1)) + beta * (d - 1) / (n - 1) * s^4.

    attainable_std(0.5, 0.1, n=32, d=256) is 0.53. Other terms of a model may hold features lower. eps of the hinge is
    left out. It takes a millisecond.

    Args:
        alpha, beta, threshold: as in `vcr_loss`; alpha, beta >= 0.
        n: samples in a batch, of all processes together, at least 2.
        d: features, at least 1.

    Returns s. It is 0 if alpha or the threshold lifts nothing, else inf if beta = 0 or d = 1: then the hinge pulls ever
    more weakly but without end.

    Raises ValueError if a number is out of range or not finite, TypeError if it is no number.
    """
    alpha, beta, threshold = _checked(alpha, beta, threshold)
    for name, value, least in (("n", n, 2), ("d", d, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: a whole number is needed")
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if alpha == 0 or threshold <= 0:
        return 0.0
    floor = 4 * beta * (d - 1) / (n - 1)
    if floor == 0:
        return math.inf
    # The slope of the sum is floor * s^3 - alpha * _pull(s), which grows with s. _pull is 1 at most, so below `high`
    # the slope becomes positive.
    low, high = 0.0, (alpha / floor) ** (1 / 3)
    while low < (s := (low + high) / 2) < high:  # to the last digit
        low, high = (s, high) if floor * s**3 < alpha * _pull(s, n, threshold) else (low, s)
    return high


def batch_for(std: float, alpha: float, beta: float, d: int, threshold: float = 1.0) -> int:
    """The smallest n with which `attainable_std` is at least std. Other arguments and errors: see there.

    Raises ValueError if alpha or std is not above 0, or std not below the threshold: there need not be such an n.
    """
    alpha, beta, threshold = _checked(alpha, beta, threshold)
    if alpha == 0 or not 0 < std < threshold:
        raise ValueError(f"alpha={alpha}, std={std}: alpha must be above 0, std between 0 and threshold={threshold}")

    def enough(n: int) -> bool:
        return 4 * beta * (d - 1) / (n - 1) * std**3 <= alpha * _pull(std, n, threshold)

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        n = (low + high) // 2
        low, high = (low, n) if enough(n) else (n, high)
    return high


def _pull(s: float, n: int, threshold: float) -> float:
    """-d/ds E max(0, threshold - s r) = E[r; s r < threshold], where r = chi_k / sqrt(k) and k = n - 1."""
    k = n - 1
    mean = 1 - 1 / (4 * k)  # of r; the next term is 1 / (32 k^2)
    if k < 10**6:
        mean = math.sqrt(2 / k) * math.exp(math.lgamma((k + 1) / 2) - math.lgamma(k / 2))
    # r times the density of chi_k is the mean of r times the density of chi_{k+1}.
    a, x = torch.tensor([(k + 1) / 2, k / 2 * (threshold / s) * (threshold / s)], dtype=torch.float64)
    return mean * torch.special.gammainc(a, x).item()


def _checked(alpha: float, beta: float, threshold: float) -> tuple[float, float, float]:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if check_number(name, value) < 0:
            raise ValueError(f"{name}={value}: must be at least 0")
    return float(alpha), float(beta), float(check_number("threshold", threshold))
