"""Statistics of a few numbers each: spread, the t-test, the interval of a share, agreement of readers."""
import numpy as np


def spread(values):
    """Standard deviation of a sample; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def t_test(a, b, expect, name_a, name_b):
    """Two-sample t-test (Welch). One-tailed only in a direction that was asked for: one taken from the data would halve
    p.   expect: "greater" or "less", of b beside a, or None   -> a line of text"""
    from scipy.stats import ttest_ind
    t = ttest_ind(b, a, equal_var=False, alternative=expect or "two-sided")
    how = f"one-tailed, {name_b} {expect} than {name_a}" if expect else f"two-tailed, {name_b} beside {name_a}"
    return f"two-sample t-test (Welch), {how}: t = {t.statistic:.2f}, p = {t.pvalue:.2g}"


def wilson(hits, n, z=1.959964):
    """95 % interval of a share (Wilson 1927): what it could be, the normal error of which would reach hits / n."""
    p, spread = hits / n, z * np.sqrt(hits / n * (1 - hits / n) / n + z * z / (4 * n * n))
    return tuple(float(v) for v in ((p + z * z / (2 * n) + s * spread) / (1 + z * z / n) for s in (-1, 1)))


def fleiss(counts):
    """Fleiss' kappa (1971): agreement of readers beyond chance, 1 full, 0 that of chance; nan where all answers are the
    same.   counts: (cases, answers), how many readers gave which"""
    counts = np.asarray(counts, float)
    r = counts.sum(1)[0]
    seen = ((counts**2).sum(1) - r).mean() / (r * (r - 1))
    chance = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((seen - chance) / (1 - chance)) if chance < 1 else float("nan")
