"""How far apart two sets of volumes are, by their features: FID, MMD, KID; and how alike two volumes are: MS-SSIM."""
import numpy as np
import torch
import torch.nn.functional as F

# --- two sets of features ---

def frechet(a, b):
    """FID = |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2), A and B covariances.   a: (n,F), b: (m,F)

    With centred, scaled features A = X'X and B = Y'Y, and tr (A B)^(1/2) is the nuclear norm of X Y': no matrix root of
    2048 x 2048. X and Y may be replaced by the R of their QR, which has at most F rows.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    x, y = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (a, b))
    x, y = (np.linalg.qr(v, mode="r") for v in (x, y))
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(means + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc"))


def unbiased(k, n):
    """Squared MMD of the first n and the other items, from their kernel without its diagonal.   k: (n+m,n+m)"""
    m = len(k) - n
    return float(k[:n, :n].sum() / (n * (n - 1)) + k[n:, n:].sum() / (m * (m - 1)) - 2 * k[:n, n:].mean())


def mmd2(a, b):
    """Unbiased squared MMD with an RBF kernel exp(-d^2 / (2 s^2)), s the median distance of the pooled set.
    a: (n,F), b: (m,F)"""
    n, m = len(a), len(b)
    z = np.concatenate([a, b]).astype(np.float64)
    sq = (z**2).sum(1)
    d2 = np.maximum(sq[:, None] + sq - 2 * z @ z.T, 0)
    k = np.exp(-d2 / (2 * np.median(d2[np.triu_indices(n + m, 1)])))
    np.fill_diagonal(k, 0)
    return unbiased(k, n)


def kid(a, b, subsets=100):
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (x y / F + 1)^3.   a: (n,F), b: (m,F)
    -> value, standard error; nan with fewer than 4 items on a side, whose halves have no pair

    The error is that of the jackknife that leaves out half: root mean square deviation of random halves of both sets
    from the whole. Too large by up to 3^(1/2) where both sets are of one distribution, since halves then scatter more.
    """
    n, m = len(a), len(b)
    z = np.concatenate([a, b]).astype(np.float64)
    k = (z @ z.T / z.shape[1] + 1) ** 3
    np.fill_diagonal(k, 0)
    whole = unbiased(k, n)
    if min(n, m) < 4:
        return whole, float("nan")
    rng, off = np.random.default_rng(0), []
    for _ in range(subsets):
        half = np.concatenate([rng.permutation(n)[:n // 2], n + rng.permutation(m)[:m // 2]])
        off.append(unbiased(k[np.ix_(half, half)], n // 2) - whole)
    return whole, float(np.sqrt(np.mean(np.square(off))))


# --- two volumes ---

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)         # of the scales, fine to coarse (Wang et al. 2003)
TAPS = 11                                                  # of the window, a Gaussian of 1.5 voxels


def scales_of(edge):
    """On how many of the five scales, each half as fine, a cube still holds a window: 5 from 176 on, 4 from 88, 3 from
    44.   -> 0 if not even on the first"""
    return sum(edge // 2**i >= TAPS for i in range(len(WEIGHTS)))


def blur(x):
    """The window's mean around every voxel, where the window lies inside.   (N,1,D,H,W) -> (N,1,D-10,H-10,W-10)"""
    g = torch.exp(-((torch.arange(TAPS) - TAPS // 2) ** 2) / (2 * 1.5**2)).to(x)
    for shape in ((TAPS, 1, 1), (1, TAPS, 1), (1, 1, TAPS)):
        x = F.conv3d(x, (g / g.sum()).view(1, 1, *shape))
    return x


def ssim(x, y):
    """Structural similarity (Wang et al. 2004), as means over the volume.   x, y: (1,1,D,H,W) in [0,1]: the luminance
    of values below 0 would be negative   -> luminance x contrast-structure, contrast-structure"""
    c1, c2 = 0.01**2, 0.03**2                              # of the range 1
    mx, my, xx, yy, xy = blur(torch.cat([x, y, x * x, y * y, x * y])).split(1)
    contrast = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    return (luminance * contrast).mean().item(), contrast.mean().item()


def ms_ssim(x, y):
    """Multi-scale SSIM (Wang et al. 2003) in 3D: 1 for the same volume. The product over scales of contrast-structure,
    with luminance on the coarsest alone, to the scales' weights; of a small cube these are as many as fit, weighted to
    a sum of 1; a mean below 0 counts as 0.   x, y: (1,1,D,H,W) in [-1,1]"""
    x, y = (x + 1) / 2, (y + 1) / 2
    n, value = scales_of(min(x.shape[2:])), 1.0
    for i in range(n):
        both, contrast = ssim(x, y)
        value *= max(both if i == n - 1 else contrast, 0) ** (WEIGHTS[i] / sum(WEIGHTS[:n]))
        x, y = F.avg_pool3d(x, 2), F.avg_pool3d(y, 2)
    return value
