"""The diffusion of both stages: schedule, noised sample, loss, and DDIM sampling. One equation, one function.
Paper sec. 3 and 4.2 to 4.4; symbols as there. t is continuous in [0,1]: 0 is data, 1 is noise.
All tensors x are (B,C,D,H,W), channels in the order CT, lobe, airway, vessel, values in [-1,1].

A denoiser is a function, denoise(xt, t) -> x0_hat. What it knows, it is told before sampling: `guided` tells it the
text, `beside` the low-resolution volume, `held` the given anatomy. Loss and sampler know none of that.
"""
import math

import torch

from support.fast import with_and_without

ABAR_MIN = 1e-4          # not in the paper; the released code clamps abar to [1e-4, 1 - 1e-4]


def alpha_bar(t):
    """Sec. 3, the cosine schedule: abar(t) = cos^2((t + 0.008) / 1.008 * pi / 2).   t: (B,) -> (B,1,1,1,1)
    Times below 0, for which the last step of the released sampler asks, count as clean.
    """
    abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.where(t < 0, 1.0, abar).clamp(ABAR_MIN, 1 - ABAR_MIN).reshape(-1, 1, 1, 1, 1)


def q_sample(x0, t, eps):
    """Eq. 1: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.   x0, eps: (B,C,D,H,W)   t: (B,) in [0,1]"""
    abar = alpha_bar(t)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def loss(denoise, x0, t, eps, present=None):
    """Eq. 5: || denoise(x_t, t) - x_0 ||^2, mean over everything; the network predicts x_0.   -> scalar
    What the denoiser is told makes it eq. 7 and 9 (the text: stage 1) or 8 and 10 (the low-resolution volume: stage 2);
    9 and 10 are 7 and 8 for all four channels jointly, which is what x0 holds here.
    present: (B,C) bool, the channels that a case has; the mean is over these. Not in the paper, whose cases have all
    """
    error = (denoise(q_sample(x0, t, eps), t) - x0).square()
    return error.mean() if present is None else error.mean((2, 3, 4))[present].mean()


# --- what a denoiser is told ---

def guided(net, context, scale):
    """Classifier-free guidance: null + scale (text - null). Linear in x_0, so it equals guiding the implied eps.
    Not in the paper; released code: 1 in inference, 2 in previews, 3 in anatomy experiments. Scale 1 is no guidance.

    context: (B,N,width) text, or None for the learned null text   -> denoise(xt, t), clamped to [-1,1]
    """
    def denoise(xt, t):
        if context is None or scale == 1:
            return net(xt, t, context).clamp(-1, 1)
        text, null = with_and_without(net, xt, t, context)       # net(xt, t, context), net(xt, t, None)
        return (null + scale * (text - null)).clamp(-1, 1)
    return denoise


def beside(net, low):
    """Eq. 8, 10: stage 2 sees the low-resolution volume beside x_t, as [low, xt].   low: (B,4,D,H,W) on the grid of xt
    -> denoise(xt, t), clamped to [-1,1]"""
    def denoise(xt, t):
        return net(torch.cat([low, xt], dim=1), t).clamp(-1, 1)          # sees (B,8,D,H,W)
    return denoise


def held(denoise, known, fixed):
    """Sec. 4.4: the channels `fixed` of the estimate are those of `known`, at every step.   known: (B,C,D,H,W), clean
    fixed: list of channel indices, may be empty   -> denoise(xt, t)"""
    def with_anatomy(xt, t):
        x0_hat = denoise(xt, t).clone()                  # not into a tensor that the denoiser may keep
        x0_hat[:, fixed] = known[:, fixed]
        return x0_hat
    return with_anatomy if fixed else denoise


# --- sampling ---

def times(n):
    """n descending times from 1, one evaluation of the denoiser each: 1, 1 - 1/n, ..., 1/n.   -> (n,)"""
    return 1 - torch.arange(n) / n


def ddim_step(xt, x0_hat, t, s):
    """DDIM with eta = 0, from t to the earlier time s, in place of the random step of eq. 2 and 3: the eps that x_t and
    x0_hat imply, put back at the noise of s.

    eps = (x_t - sqrt(abar_t) x0_hat) / sqrt(1 - abar_t);   x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s) eps
    xt, x0_hat: (B,C,D,H,W)   t, s: (B,)   -> (B,C,D,H,W)
    """
    abar = alpha_bar(t)
    eps = (xt - abar.sqrt() * x0_hat) / (1 - abar).sqrt()
    return q_sample(x0_hat, s, eps)


@torch.no_grad()
def ddim_sample(denoise, noise, times, progress=iter):
    """Sec. 4.2: a sample from noise, by DDIM through `times`, the last step to clean data. Each estimate is clamped.

    noise: (B,C,D,H,W)   times: descending, any sequence   progress: wraps the steps, e.g. tqdm
    -> (B,C,D,H,W) in [-1,1]
    """
    xt, times = noise, [float(t) for t in times]
    for t, s in progress(list(zip(times, times[1:] + [None]))):
        t = torch.full((len(xt),), t, device=xt.device)
        x0_hat = denoise(xt, t).clamp(-1, 1)
        if s is None:
            return x0_hat
        xt = ddim_step(xt, x0_hat, t, torch.full_like(t, s))
        del x0_hat                                       # 0.3 GB at 256^3, while the network works
