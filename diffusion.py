"""The diffusion of both stages: the schedule, the noised sample, the loss, and DDIM sampling. One equation, one function.
Paper sec. 3 and 4.2 to 4.4; symbols as there. t is continuous in [0,1]: 0 is data, 1 is noise.
All tensors x are (B,C,D,H,W), channels in the order CT, lobe, airway, vessel, values in [-1,1].
"""
import math

import torch

ABAR_MIN = 1e-4          # not in the paper; the released code clamps abar to [1e-4, 1 - 1e-4]


def alpha_bar(t):
    """Cosine schedule: abar(t) = cos^2((t + 0.008) / 1.008 * pi / 2).   t: (B,) -> (B,1,1,1,1)

    Times below 0 mean "cleaner than data can be"; the clamp leaves them a trace of noise, as the released code has it.
    """
    abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.where(t < 0, 1.0, abar).clamp(ABAR_MIN, 1 - ABAR_MIN).reshape(-1, 1, 1, 1, 1)


def q_sample(x0, t, eps):
    """Eq. 1: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.   x0, eps: (B,C,D,H,W)   t: (B,) in [0,1]"""
    abar = alpha_bar(t)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def loss(net, x0, t, eps, context=None, low=None, drop=None):
    """Eq. 5, 7, 9, 10: || net(x_t, t) - x_0 ||^2, mean over everything; the network predicts x_0.

    context: (B,N,width) text of stage 1.   drop: (B,) bool, which samples train the null text instead.
    low: (B,4,D,H,W), stage 2's low-resolution volume on the grid of x0.   -> scalar
    """
    x0_hat = net(with_low(q_sample(x0, t, eps), low), t, context, drop)
    return (x0_hat - x0).square().mean()


def with_low(xt, low):
    """Stage 2 sees the low-resolution volume beside x_t (eq. 10).   (B,4,...) -> (B,8,...): [low, xt]"""
    return xt if low is None else torch.cat([low, xt], dim=1)


def augment_low(low, a, eps):
    """(1 - a) low + a eps.   low, eps: (B,4,D,H,W)   a: (B,) in [0, 0.4]

    Not in the paper; the released code trains stage 2 on such inputs, so that it forgives the faults of stage 1.
    """
    a = a.reshape(-1, 1, 1, 1, 1)
    return (1 - a) * low + a * eps


def guide(x0_cond, x0_null, guidance):
    """Classifier-free guidance: null + s (cond - null). Linear in x_0, so it equals guiding the implied eps. Not in the paper."""
    return x0_null + guidance * (x0_cond - x0_null)


def ddim_step(xt, x0_hat, t, s):
    """DDIM with eta = 0, from t to the earlier time s: the eps that x_t and x0_hat imply, put back at the noise of s.

    eps = (x_t - sqrt(abar_t) x0_hat) / sqrt(1 - abar_t);   x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s) eps
    xt, x0_hat: (B,C,D,H,W)   t, s: (B,)   -> (B,C,D,H,W)
    """
    abar = alpha_bar(t)
    eps = (xt - abar.sqrt() * x0_hat) / (1 - abar).sqrt()
    return q_sample(x0_hat, s, eps)


def times(n):
    """n descending times from 1, one network evaluation each: 1, 1 - 1/n, ..., 1/n.   -> (n,)"""
    return 1 - torch.arange(n) / n


@torch.no_grad()
def ddim_sample(net, noise, times, context=None, guidance=1.0, known=None, fixed=(), low=None, progress=iter):
    """A sample from noise, by DDIM through `times` (sec. 4.2), with anatomy held fixed if wanted (sec. 4.4).

    noise: (B,4,D,H,W)   times: (n,) descending, any sequence; the last step goes to clean data
    context: (B,N,width) text or None   guidance: 1 none, 2 released previews, 3 anatomy experiments
    known, fixed: clean channels (B,4,D,H,W), and the list of channel indices in which they replace the estimate at every step
    low: (B,4,D,H,W) for stage 2   progress: wraps the steps, e.g. tqdm.   -> (B,4,D,H,W) in [-1,1]
    """
    fixed, xt = list(fixed), noise
    steps = list(zip(times.tolist(), times[1:].tolist() + [None]))
    for t, s in progress(steps):
        t = torch.full((len(xt),), t, device=xt.device)
        seen = with_low(xt, low)
        x0_hat = net(seen, t, context)
        if guidance != 1 and context is not None:
            x0_hat = guide(x0_hat, net(seen, t, None), guidance)
        x0_hat = x0_hat.clamp(-1, 1)
        if fixed:
            x0_hat[:, fixed] = known[:, fixed]
        xt = x0_hat if s is None else ddim_step(xt, x0_hat, t, torch.full_like(t, s))
    return xt
