"""The diffusion of both stages: the schedule, the noised sample, the loss, and DDIM sampling. One equation, one function.
Paper sec. 3 and 4.2 to 4.4; symbols as there. t is continuous in [0,1]: 0 is data, 1 is noise.
All tensors x are (B,C,D,H,W), channels in the order CT, lobe, airway, vessel, values in [-1,1].
"""
import math

import torch
import torch.nn.functional as F

from data import SCALE, encode

ABAR_MIN = 1e-4          # not in the paper; the released code clamps abar to [1e-4, 1 - 1e-4]
WINDOWS = (-1024, -780), (-160, 240)     # HU; not in the paper: where air differs from lung, and fluid from muscle
FAINT = 0.1              # of [-1,1], 81 HU: the most that `agree` moves a voxel; not in the paper. At edges, where the stages differ by more, stage 2 knows better
AERATED = -300           # HU below which `agree` moves none: a darker lung would lose the thin walls beside airways
EMPTY = -930             # HU below which a lung is no lung any more; not in the paper, whose measure is -950


def alpha_bar(t):
    """Cosine schedule: abar(t) = cos^2((t + 0.008) / 1.008 * pi / 2).   t: (B,) -> (B,1,1,1,1)

    Nothing here asks for times below 0; the last step of the released sampler does, and the clamp leaves them its trace of noise.
    """
    abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.where(t < 0, 1.0, abar).clamp(ABAR_MIN, 1 - ABAR_MIN).reshape(-1, 1, 1, 1, 1)


def q_sample(x0, t, eps):
    """Eq. 1: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.   x0, eps: (B,C,D,H,W)   t: (B,) in [0,1]"""
    abar = alpha_bar(t)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def choose_given(v, share):
    """Which channels a training sample shows without noise, as fixed ones are then while sampling (sec. 4.4): with probability share / 2 the CT alone, so that
    masks are found in it; with probability share / 2 a random set of 0, 1, 2 or 3 masks, each size equally often; else none.
    Not in the paper, whose network always sees known anatomy under noise.

    v: (B,4) uniform in [0,1]   -> (B,4) bool
    """
    ct = v[:, :1] < share / 2
    masks = ~ct & (v[:, :1] < share)
    p = 2 * v[:, :1] - share                                             # uniform in [0, share] where masks are shown: each of them with p / share
    return torch.cat([ct, masks & (share * v[:, 1:] < p)], dim=1)


def loss(net, x0, t, eps, context=None, low=None, drop=None, given=None, windows=0.0, bullae=0.0):
    """Eq. 5, 7, 9, 10: || net(x_t, t) - x_0 ||^2, mean over everything; the network predicts x_0.

    context: (B,N,width) text of stage 1.   drop: (B,) bool, which samples train the null text instead.
    low: (B,4,D,H,W), stage 2's low-resolution volume on the grid of x0.   given: (B,4) bool, which channels are shown without noise; none in the paper
    windows: weight of `window_loss`, 0 in the paper   bullae: see there.   -> scalar
    """
    xt = q_sample(x0, t, eps)
    if given is not None:
        xt = torch.where(given[..., None, None, None], x0, xt)
    x0_hat = net(with_low(xt, low), t, context, drop)
    value = (x0_hat - x0).square().mean()
    return value + windows * window_loss(x0_hat, x0, t, bullae) if windows else value


def window_loss(x0_hat, x0, t, bullae=0.0):
    """Sum over WINDOWS of abar(t) (1 + bullae e) || w(x0_hat) - w(x_0) ||^2, where w clips the CT to a narrow window of HU and stretches that to [-1,1];
    e is 1 in empty lung, outside airways, and 0 elsewhere.

    Not in the paper. Over the full 1,624 HU a bulla in a lung, or fluid beside muscle, counts for almost nothing beside a slightly misplaced edge.
    At high noise x0_hat is an average of different chests, which no window fits, so the term is weighted by abar.   x0_hat, x0: (B,4,D,H,W)   -> scalar
    """
    ct, lobe, airway = x0[:, :1], x0[:, 1:2], x0[:, 2:3]
    empty = (ct < float(encode("ct", EMPTY))) & (lobe > -0.8) & (airway < 0)    # lobes are -0.6 to 1, nothing is -1
    weight = alpha_bar(t) * (1 + bullae * empty)
    total = 0
    for low, high in encode("ct", WINDOWS).tolist():
        show = lambda x: (2 * x.clamp(low, high) - low - high) / (high - low)
        total += (weight * (show(x0_hat[:, :1]) - show(ct)).square()).mean()
    return total


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


def agree(x0_hat, low):
    """Stage 2's estimate with its CT moved towards `low` at the voxels that `low` was taken from, every fourth along each axis, by at most FAINT;
    in between the change is interpolated; voxels below AERATED stay. So fluid and muscle, a few HU apart, keep the values of stage 1.

    Not in the paper. Without FAINT it is DDNM's x_0 + A^+ (y - A x_0), Wang et al. 2022 (arXiv 2212.00490), where A takes every fourth voxel and A^+
    interpolates.   x0_hat, low: (B,4,D,H,W)   -> (B,4,D,H,W), CT in [-1,1]
    """
    ct, low = (x[:, :1, ::SCALE, ::SCALE, ::SCALE] for x in (x0_hat, low))
    change = F.pad((low - ct).clamp(-FAINT, FAINT), (0, 1) * 3, mode="replicate")        # beyond the last voxel of low: as at that
    change = F.interpolate(change, [SCALE * (n - 1) + 1 for n in change.shape[2:]], mode="trilinear", align_corners=True)
    D, H, W = x0_hat.shape[2:]
    change = change[..., :D, :H, :W] * (x0_hat[:, :1] > float(encode("ct", AERATED)))
    return torch.cat([(x0_hat[:, :1] + change).clamp(-1, 1), x0_hat[:, 1:]], dim=1)


def ddim_step(xt, x0_hat, t, s):
    """DDIM with eta = 0, from t to the earlier time s: the eps that x_t and x0_hat imply, put back at the noise of s.

    eps = (x_t - sqrt(abar_t) x0_hat) / sqrt(1 - abar_t);   x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s) eps
    xt, x0_hat: (B,C,D,H,W)   t, s: (B,)   -> (B,C,D,H,W)
    """
    abar = alpha_bar(t)
    eps = (xt - abar.sqrt() * x0_hat) / (1 - abar).sqrt()
    return q_sample(x0_hat, s, eps)


def second_order(x0_hat, x0_before, u, t, s):
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2: a DDIM step from t to s is second order if it is made towards

    D = x0_hat + h / (2 h') (x0_hat - x0_before),   h = lambda_s - lambda_t,   h' = lambda_t - lambda_u,   lambda = log(sqrt(abar / (1 - abar)))
    x0_hat, x0_before: the estimates at t and at the time u before it.   u, t, s: (B,) descending   -> D (B,C,D,H,W).   Not in the paper.
    """
    before, here, after = (0.5 * torch.logit(alpha_bar(v).double()) for v in (u, t, s))
    ratio = torch.where(here > before, (after - here) / (2 * (here - before)), 0.0)      # the clamp of abar can make two times one
    return x0_hat + ratio.to(x0_hat.dtype) * (x0_hat - x0_before)


def times(n, power=1):
    """n descending times from 1, one network evaluation each: (1, 1 - 1/n, ..., 1/n)^power.   -> (n,)

    power 1: the paper's, and stage 1's with either solver: what a text decides, it decides near noise.
    power 2: denser near data; with it DPM-Solver++ in 10 steps of stage 2 is nearly as near to the limit of many as DDIM in 20.
    """
    return (1 - torch.arange(n) / n) ** power


def guided(net, seen, t, context, guidance):
    """The network's x0_hat with the text and without, combined. Both at once where a GPU would idle otherwise: a CPU gains nothing by it."""
    if seen.is_cuda:
        null = torch.arange(2 * len(seen), device=seen.device) >= len(seen)
        return guide(*net(torch.cat([seen, seen]), torch.cat([t, t]), torch.cat([context, context]), null).chunk(2), guidance)
    return guide(net(seen, t, context), net(seen, t, None), guidance)


@torch.no_grad()
def ddim_sample(net, noise, times, context=None, guidance=1.0, known=None, fixed=(), low=None, agreeing=False, clean=False, interval=(0.0, 1.0), order=1,
                progress=iter):
    """A sample from noise, by DDIM through `times` (sec. 4.2), with anatomy held fixed if wanted (sec. 4.4).

    noise: (B,4,D,H,W)   times: (n,) descending, any sequence; the last step goes to clean data
    context: (B,N,width) text or None   guidance: 1 none, 2 released previews, 3 anatomy experiments
    interval: (lowest, highest) t at which guidance is applied; it is a second network evaluation there. What a text decides, it decides near t = 1
    known, fixed: clean channels (B,4,D,H,W), and the list of channel indices in which they replace the estimate at every step
    clean: whether the network sees them without noise, for one that was trained so (`loss`, given)
    low: (B,4,D,H,W) for stage 2   agreeing: whether its estimates are made to `agree` with that   order: 1 DDIM, 2 DPM-Solver++(2M)
    progress: wraps the steps, e.g. tqdm.   -> (B,4,D,H,W) in [-1,1]
    """
    fixed, xt, u, x0_before = list(fixed), noise, None, None
    steps = list(zip(times.tolist(), times[1:].tolist() + [None]))
    for t, s in progress(steps):
        inside = interval[0] <= t <= interval[1]
        t = torch.full((len(xt),), t, device=xt.device)
        if clean and fixed:
            xt = xt.clone()                                              # the noise is the caller's
            xt[:, fixed] = known[:, fixed]
        seen = with_low(xt, low)
        if torch.is_autocast_enabled(xt.device.type):                    # as the network would; but what is held here is then half as large: 0.5 GB at 256^3
            seen = seen.to(torch.get_autocast_dtype(xt.device.type), memory_format=torch.channels_last_3d)
        if guidance == 1 or context is None or not inside:
            x0_hat = net(seen, t, context)
        else:
            x0_hat = guided(net, seen, t, context, guidance)
        x0_hat = x0_hat.clamp(-1, 1)
        if agreeing:
            x0_hat = agree(x0_hat, low)
        if fixed:
            x0_hat[:, fixed] = known[:, fixed]
        if s is None:
            return x0_hat
        s = torch.full_like(t, s)
        towards = x0_hat if order == 1 or x0_before is None else second_order(x0_hat, x0_before, u, t, s)
        xt, u, x0_before = ddim_step(xt, towards, t, s), t, x0_hat if order == 2 else None
        del seen, x0_hat, towards                                        # 0.3 GB each at 256^3, while the network works
