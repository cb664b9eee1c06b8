"""Sampling beside the paper's: wrappers of a denoiser, another solver, lobes without shells. sample.py asks here for
its group of options (`options`), and has each stage's denoiser dressed (`dress`)."""
import argparse
from functools import partial

import torch
import torch.nn.functional as F

from beyond.solvers import dpm_sample
from data import CHANNELS, SCALE, encode
from diffusion import ddim_sample

FAINT = 0.1          # of [-1,1], 81 HU: the most that `agree` moves a voxel. At edges, where the stages differ by more,
                         # stage 2 knows better
AERATED = -300           # HU below which `agree` moves none: a darker lung would lose the thin walls beside airways
CT, LOBE = CHANNELS.index("ct"), CHANNELS.index("lobe")


def options(p):
    """The group of sample.py's --help. What is not given is as sampling.json beside the weights says."""
    group = p.add_argument_group("sampling beside the paper's (beyond/; default: as the weights' sampling.json says)")
    group.add_argument("--solver", choices=("ddim", "dpm"),
                       help="ddim (default), or dpm: DPM-Solver++(2M), for fewer steps")
    group.add_argument("--guidance-interval", dest="interval", type=float, nargs=2, metavar=("FROM", "TO"),
                       help="times t in [0,1] at which guidance is applied, at one call a step elsewhere (default 0 1)")
    group.add_argument("--agree", action=argparse.BooleanOptionalAction,
                       help="move the CT of stage 2 to the HU of stage 1, by at most 81")
    group.add_argument("--tidy", action=argparse.BooleanOptionalAction,
                       help="set voxels on blurred borders between lobes to a lobe that is there")


def dress(stage, s, denoise, unguided, known, fixed, low=None):
    """A stage's denoiser, and its sampler, as `s` wants them.   stage: "low" or "sr"   denoise, unguided: with guidance
    and without   known, fixed: as `diffusion.held` takes them, outside of all this   -> denoise, sampler"""
    if "interval" in s and stage == "low":
        denoise = within(denoise, unguided, *s["interval"])
    if stage in s.get("shown", ()):
        denoise = shown(denoise, known, fixed)
    if s.get("agree") and stage == "sr":
        denoise = agreeing(denoise, low)
    return denoise, partial(sample, stage, s, fixed)


def sample(stage, s, fixed, denoise, noise, times, progress=iter):
    """A stage's sample by the solver that is wanted, tidied. DPM-Solver++ takes stage 2's times denser near data, where
    10 are then nearly as near to the limit of many as 20 of DDIM; what a text decides, it decides near noise."""
    dpm = s.get("solver") == "dpm" and stage not in s.get("students", ())
    if dpm and stage == "sr":
        times = times ** 2
    x = (dpm_sample if dpm else ddim_sample)(denoise, noise, times, progress)
    if s.get("tidy") and LOBE not in fixed:
        how = {} if stage == "sr" else dict(tolerance=0.2, reach=3)
        for one in x if stage == "sr" or CT in fixed and x.shape[-1] >= 64 else ():      # at 32^3, 3 voxels are 3 cm
            if torch.isfinite(one).all():
                one[LOBE] = tidy_lobes(one[LOBE].float(), **how)
    return x


# --- wrappers of a denoiser ---

def within(denoise, unguided, start, end):
    """Guidance for start <= t <= end alone. What a text decides, it decides near t = 1; elsewhere this saves a call."""
    return lambda xt, t: (denoise if start <= t[0].item() <= end else unguided)(xt, t)


def shown(denoise, known, fixed):
    """The network sees the channels `fixed` of `known` without noise, if it was trained so (`losses.choose_given`)."""
    def imposed(xt):
        xt = xt.clone()                                  # the sampler's stays
        xt[:, fixed] = known[:, fixed]
        return xt
    return (lambda xt, t: denoise(imposed(xt), t)) if fixed else denoise


def agreeing(denoise, low):
    """Each estimate of stage 2 is made to `agree` with stage 1's volume.   low: (B,4,D,H,W) on the full grid"""
    return lambda xt, t: agree(denoise(xt, t), low)


def agree(x0_hat, low):
    """Stage 2's estimate with its CT moved towards `low` at the voxels that `low` was taken from, every fourth along
    each axis, by at most FAINT; in between the change is interpolated; voxels below AERATED stay. So fluid and muscle,
    a few HU apart, keep the values of stage 1.

    Without FAINT it is DDNM's x_0 + A^+ (y - A x_0), Wang et al. 2022 (arXiv 2212.00490), where A takes every fourth
    voxel and A^+ interpolates.   x0_hat, low: (B,4,D,H,W)   -> (B,4,D,H,W), CT in [-1,1]
    """
    ct, low = (x[:, :1, ::SCALE, ::SCALE, ::SCALE] for x in (x0_hat, low))
    change = interpolated((low - ct).clamp(-FAINT, FAINT), x0_hat.shape[2:])
    change = change * (x0_hat[:, :1] > float(encode("ct", AERATED)))
    return torch.cat([(x0_hat[:, :1] + change).clamp(-1, 1), x0_hat[:, 1:]], dim=1)


def interpolated(x, size):
    """What is known at every fourth voxel, at all of them; beyond the last, as at that.   x: (B,C,d,h,w)
    size: D, H, W   -> (B,C,D,H,W)"""
    x = F.pad(x, (0, 1) * 3, mode="replicate")
    x = F.interpolate(x, [SCALE * (n - 1) + 1 for n in x.shape[2:]], mode="trilinear", align_corners=True)
    D, H, W = size
    return x[..., :D, :H, :W]


# --- after sampling ---

def tidy_lobes(x, tolerance=0.1, reach=5):
    """The lobe channel with every voxel at the nearest value among "no lobe" and the lobes that are present within
    `reach` voxels of it. A lobe is present where a cube of 3^3 voxels lies within `tolerance` of its value; 0.2 is
    halfway to the next.   x: (G,G,G) in [-1,1]   -> (G,G,G), x itself if no lobe is present

    One channel codes five lobes as numbers, so a blurred border between lobes 3 and 5 passes through 4, and one between
    the right lung and the chest wall through all of them: rounded, it is a shell of lobes that are elsewhere.
    """
    out, lobes = torch.full_like(x, -1), 0                               # -1: no lobe
    for value in encode("lobe", range(1, 6)).tolist():
        away = (x - value).abs()
        there = spread(~spread(away >= tolerance, 1), reach)             # near the middles of filled cubes
        out, lobes = torch.where(there & (away < (x - out).abs()), value, out), lobes + there.sum()
    return out if lobes else x


def spread(a, n):
    """What is true, n voxels further along each axis.   a: (G,G,G) bool   -> (G,G,G)"""
    for axis, edge in enumerate(a.shape):
        wide = a.clone()
        for k in range(1, min(n, edge - 1) + 1):
            wide.narrow(axis, k, edge - k).logical_or_(a.narrow(axis, 0, edge - k))
            wide.narrow(axis, 0, edge - k).logical_or_(a.narrow(axis, k, edge - k))
        a = wide
    return a
