"""Intervals by bootstrap over pictures and over seeds; differences and ratios are paired.

The questions of one picture are not independent, so pictures are drawn; where a method was trained
with several seeds, seeds are drawn as well. One set of draws serves every statistic: that is what
pairs two arms. One picture alone can't be drawn: the interval is then all that a share, or a
difference of two, can be. With few seeds, drawing them understates their spread (by a third of the
variance with three); Student's interval over seeds does not.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
"""97.5 % quantiles of Student's t with 1, 2, 3, ... degrees of freedom; beyond, 2.17 is close."""


def over_seeds(values: Sequence[float]) -> dict[str, float] | None:
    """Mean of one number for each training run, with Student's 95 % interval; None for one run.

    >>> over_seeds([0.8, 0.9])["low"] < 0.3
    True
    """
    count = len(values)
    if count < 2:
        return None
    mean = float(np.mean(values))
    t = STUDENT[count - 2] if count - 2 < len(STUDENT) else 2.17
    half = t * float(np.std(values, ddof=1)) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


class Bootstrap:
    """Percentile intervals of scores.

    Args:
        records: the picture (or what else it is about) of each question, (Q,).
        seed: of the draws.

    Scores are arrays (Q,), or (S, Q) for S seeds of the same method.
    """

    def __init__(self, records: Sequence[str], seed: int) -> None:
        numbers: dict[str, int] = {}  # in the order in which they come
        self._picture = np.array([numbers.setdefault(it, len(numbers)) for it in records])
        count = len(numbers)
        self._seed = seed
        draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
        # float32 holds these counts exactly, at half the memory.
        self._weights = np.stack([np.bincount(d, minlength=count) for d in draws]).astype("float32")

    def mean(self, scores: np.ndarray, chosen: np.ndarray | None = None) -> dict[str, float]:
        """Mean with a 95 % interval; `chosen` is a boolean mask of questions."""
        scores = np.atleast_2d(scores)
        mask = np.ones(scores.shape[1], bool) if chosen is None else chosen
        mean = float(scores[:, mask].mean())
        if self._one_picture(mask):
            return {"mean": mean, "low": 0.0, "high": 1.0, "n": int(mask.sum())}
        return interval(mean, self._draw(scores, mask)) | {"n": int(mask.sum())}

    def difference(
        self,
        own: np.ndarray,
        control: np.ndarray,
        chosen: np.ndarray | None = None,
        *,
        same_seeds: bool = True,
    ) -> dict[str, float]:
        """Mean of own - control, paired over pictures; and over seeds where both have as many: the
        caller puts them in the same order, or says that they are not the `same_seeds`."""
        own, control = np.atleast_2d(own), np.atleast_2d(control)
        mask = np.ones(own.shape[1], bool) if chosen is None else chosen
        mean = float(own[:, mask].mean() - control[:, mask].mean())
        if self._one_picture(mask):
            return {"mean": mean, "low": -1.0, "high": 1.0}
        return interval(mean, self._draw(own, mask) - self._draw(control, mask, same_seeds))

    def ratio(
        self,
        own: np.ndarray,
        control: np.ndarray,
        chosen: np.ndarray | None = None,
        *,
        same_seeds: bool = True,
    ) -> dict[str, float] | None:
        """Mean of own as a share of the control's, paired likewise; None where the control has
        nothing right, or where all is about one picture: a ratio has no bound."""
        own, control = np.atleast_2d(own), np.atleast_2d(control)
        mask = np.ones(own.shape[1], bool) if chosen is None else chosen
        if not control[:, mask].any() or self._one_picture(mask):
            return None
        below = self._draw(control, mask, same_seeds)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = np.where(below > 0, self._draw(own, mask) / below, np.nan)
        return interval(float(own[:, mask].mean() / control[:, mask].mean()), draws)

    def draws(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Means of values (Q,) in all resamples (RESAMPLES,): what any statistic that is made of
        means needs. The same resamples for all values."""
        return self._draw(np.atleast_2d(values), chosen)

    def _one_picture(self, mask: np.ndarray) -> bool:
        return len(np.unique(self._picture[mask])) < 2

    def _draw(self, scores: np.ndarray, mask: np.ndarray, same_seeds: bool = True) -> np.ndarray:
        """The resampled means (RESAMPLES,), NaN where no chosen question was drawn. As many seeds
        are drawn alike, unless they are not the `same_seeds`."""
        used, pictures = np.unique(self._picture[mask], return_inverse=True)
        weights, count = self._weights[:, used].astype("float64"), len(used)
        sizes = weights @ np.bincount(pictures, minlength=count)
        with np.errstate(invalid="ignore"):
            means = np.stack(
                [
                    (weights @ np.bincount(pictures, weights=one[mask], minlength=count))
                    / np.where(sizes > 0, sizes, np.nan)
                    for one in scores
                ]
            )
        seeds = len(scores)
        if seeds == 1:
            return means[0]
        stream = [self._seed, seeds] if same_seeds else [self._seed, seeds, 1]
        chosen = np.random.default_rng(stream).integers(seeds, size=(seeds, RESAMPLES))
        return np.take_along_axis(means, chosen, axis=0).mean(axis=0)


def interval(mean: float, draws: np.ndarray) -> dict[str, float]:
    """95 % by percentiles; draws that are NaN are left out."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {"mean": mean, "low": float(low), "high": float(high)}
