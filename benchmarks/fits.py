"""How cost grows with size: power laws, fitted by least squares on logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95% quantiles of Student's t distribution at 1, 2, … 20 degrees of freedom.
T_95: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_95 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)

SAME = 0.005  # exponents that differ by less are printed as the same


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · x^exponent, fitted to `points` points; low and high bound the exponent's 95% confidence interval.

    The interval is that of least squares. Where y is exact (counted FLOPs), it says how well one power law fits.
    """

    exponent: float
    low: float
    high: float
    factor: float
    points: int

    def __call__(self, x: float) -> float:
        return self.factor * x**self.exponent

    def __str__(self) -> str:
        return f"{self.exponent:.2f} {self.interval}"

    @property
    def interval(self) -> str:
        return f"[{self.low:.2f}, {self.high:.2f}]"


def largest_sizes(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """The power law of the largest x alone, where the cost y grows and small sizes' fixed costs are small.

    Of fits to the three or more largest x, the one with the narrowest interval; the growth between the two largest must
    lie in it, which it does not where the curve bends, fixed costs rule and many small sizes would make it narrow. x:
    ascending. None with fewer than three; which were fitted, the law's `points` says.
    """
    if len(x) < 3:
        return None
    last = math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2])
    fits = [power_law(x[-points:], y[-points:]) for points in range(3, len(x) + 1)]
    straight = [law for law in fits if law.low - SAME < last < law.high + SAME]
    return min(straight or fits[:1], key=lambda law: law.high - law.low)


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fits log y = log factor + exponent · log x.

    x, y: equally many positive numbers, at least three (an interval needs a degree of freedom), not all x the same.
    Raises ValueError otherwise.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"a power law with an interval needs three points or more, got {len(x)} x and {len(y)} y")
    if min(*x, *y) <= 0:
        raise ValueError(f"a power law needs positive x and y, got x {list(x)} and y {list(y)}")
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_x, mean_y = sum(log_x) / len(x), sum(log_y) / len(y)
    spread = sum((value - mean_x) ** 2 for value in log_x)
    if spread == 0:
        raise ValueError(f"a power law needs two different x, got {x[0]} only")
    exponent = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True)) / spread
    offset = mean_y - exponent * mean_x
    freedom = len(x) - 2
    residual = sum((b - offset - exponent * a) ** 2 for a, b in zip(log_x, log_y, strict=True)) / freedom
    width = T_95[min(freedom, len(T_95)) - 1] * math.sqrt(residual / spread)
    return PowerLaw(exponent, exponent - width, exponent + width, math.exp(offset), len(x))
