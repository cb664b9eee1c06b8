"""Losses and draws of training that the paper does not have; README.md says what each was measured to do."""
import torch
import torch.nn.functional as F

from data import CHANNELS, SCALE, encode
from diffusion import alpha_bar, q_sample
from support.seeds import mixed

# HU: air and lung; fluid and muscle; the same and bone, which else fades into them
WINDOWS = (-1024, -780), (-160, 240), (-160, 600)
EMPTY = -930                             # HU below which a lung is no lung any more; the paper's measure is -950
PLACES = 3                               # along each axis, at which `misplace` is told how far


def loss(denoise, x0, t, eps, given=None, windows=0.0, bullae=0.0):
    """`diffusion.loss`, and: given (B,4) bool, channels that are shown without noise; windows, weight of
    `window_loss`."""
    xt = q_sample(x0, t, eps)
    if given is not None:
        xt = torch.where(given[..., None, None, None], x0, xt)
    x0_hat = denoise(xt, t)
    value = (x0_hat - x0).square().mean()
    return value + windows * window_loss(x0_hat, x0, t, bullae) if windows else value


def window_loss(x0_hat, x0, t, bullae=0.0):
    """Sum over WINDOWS of abar(t) (1 + bullae e) || w(x0_hat) - w(x_0) ||^2, where w clips the CT to a narrow window of
    HU and stretches that to [-1,1]; e is 1 in empty lung, outside airways, and 0 elsewhere.

    Over the full 1,624 HU a bulla in a lung, or fluid beside muscle, counts for almost nothing beside a slightly
    misplaced edge. At high noise x0_hat is an average of different chests, which no window fits, so the term is
    weighted by abar. x0_hat, x0: (B,4,D,H,W)   -> scalar
    """
    ct, lobe, airway = x0[:, :1], x0[:, 1:2], x0[:, 2:3]
    empty = (ct < float(encode("ct", EMPTY))) & (lobe > -0.8) & (airway < 0)    # lobes are -0.6 to 1, nothing is -1
    weight = alpha_bar(t) * (1 + bullae * empty)
    total = 0
    for low, high in encode("ct", WINDOWS).tolist():
        seen, true = ((2 * x.clamp(low, high) - low - high) / (high - low) for x in (x0_hat[:, :1], ct))
        total += (weight * (seen - true).square()).mean()
    return total


def draw_given(keys, shape, device, seed):
    """Per sample, from where its generator stands after `train_low.draw`: uniform numbers for `choose_given`, (B,4),
    and for `misplace`, (B,3,n,n,n)."""
    v = []
    for k in keys.tolist():
        g = torch.Generator(device).manual_seed(mixed(seed, k))
        torch.rand(2, generator=g, device=device)                        # what `draw` took
        torch.randn(shape, generator=g, device=device)
        v.append(torch.rand(len(CHANNELS) + 3 * PLACES**3, generator=g, device=device))
    v = torch.stack(v)
    return v[:, :len(CHANNELS)], v[:, len(CHANNELS):].reshape(-1, 3, *[PLACES] * 3)


def choose_given(v, share):
    """Which channels a training sample shows without noise, as fixed ones are then while sampling (`sampling.shown`):
    with probability share / 2 the CT alone, so that masks are found in it; with probability share / 2 a random set of
    0, 1, 2 or 3 masks, each size equally often; else none. In the paper the network always sees known anatomy under
    noise.

    v: (B,4) uniform in [0,1]   -> (B,4) bool
    """
    ct = v[:, :1] < share / 2
    masks = ~ct & (v[:, :1] < share)
    p = 2 * v[:, :1] - share                  # uniform in [0, share] where masks are shown: each of them with p / share
    return torch.cat([ct, masks & (share * v[:, 1:] < p)], dim=1)


def misplace(masks, by):
    """Masks of a low-resolution volume moved about as if stage 1 had put them elsewhere; lobes inside the lung only, so
    that its outline stays. So stage 2 learns to find structures in a given CT, which shows them better, instead of
    copying masks.

    masks: (B,3,D,H,W) lobe, airway, vessel, on the full grid   by: (B,3,n,n,n) voxels of the low grid along D, H, W,
    interpolated between the n^3 places   -> (B,3,D,H,W)
    """
    by = F.interpolate(by, masks.shape[2:], mode="trilinear", align_corners=True)        # (B,3,D,H,W)
    shift = SCALE * by.round().long()
    axes = [torch.arange(n, device=masks.device) for n in masks.shape[2:]]
    here = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    last = torch.tensor(masks.shape[2:], device=masks.device).reshape(3, 1, 1, 1) - 1
    there = (here + shift).clamp(min=torch.zeros_like(last), max=last)
    moved = torch.stack([x[:, d, h, w] for x, (d, h, w) in zip(masks, there)])
    inside = (masks[:, :1] > -0.8) & (moved[:, :1] > -0.8)
    return torch.cat([torch.where(inside, moved[:, :1], masks[:, :1]), moved[:, 1:]], dim=1)
