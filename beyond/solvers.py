"""A solver that needs fewer steps than DDIM. Not in the paper."""
import torch

from diffusion import alpha_bar, ddim_step


def second_order(x0_hat, x0_before, u, t, s):
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2: a DDIM step from t to s is second order if it
    is made towards   D = x0_hat + h / (2 h') (x0_hat - x0_before),
    h = lambda_s - lambda_t,   h' = lambda_t - lambda_u,   lambda = log(sqrt(abar / (1 - abar)))

    x0_hat, x0_before: the estimates at t and at the time u before it.   u, t, s: (B,) descending   -> D (B,C,D,H,W)
    """
    before, here, after = (0.5 * torch.logit(alpha_bar(v).double()) for v in (u, t, s))
    ratio = torch.where(here > before, (after - here) / (2 * (here - before)), 0.0)   # the clamp can make two times one
    return x0_hat + ratio.to(x0_hat.dtype) * (x0_hat - x0_before)


@torch.no_grad()
def dpm_sample(denoise, noise, times, progress=iter):
    """`diffusion.ddim_sample`, of second order from the second step on.   -> (B,C,D,H,W) in [-1,1]"""
    xt, u, x0_before, times = noise, None, None, [float(t) for t in times]
    for t, s in progress(list(zip(times, times[1:] + [None]))):
        t = torch.full((len(xt),), t, device=xt.device)
        x0_hat = denoise(xt, t).clamp(-1, 1)
        if s is None:
            return x0_hat
        s = torch.full_like(t, s)
        towards = x0_hat if x0_before is None else second_order(x0_hat, x0_before, u, t, s)
        xt, u, x0_before = ddim_step(xt, towards, t, s), t, x0_hat
        del x0_hat, towards                              # 0.3 GB each at 256^3, while the network works
