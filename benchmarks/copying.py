"""Can networks copy what they see, and is what they make sharp? `obey.py --parts copy` prints these tables.

Where there is little noise, x_t is almost the truth: a network that cannot return it then cannot sharpen a sample
either. Errors are mean squares over all channels in [-1,1]; bones are voxels above 250 HU.
"""
import numpy as np
import torch
from tqdm import tqdm

from data import CHANNELS, SCALE, decode, encode, upsample
from diffusion import alpha_bar, q_sample
from evaluate import dice

TIMES = (0.02, 0.05, 0.2, 0.5, 0.95)
BONE, DENSE = 250, 400           # HU
OTHERS = 16                      # phantoms, for where there is any bone


def hu(x):
    """(4,...) in [-1,1] -> HU of the CT"""
    return decode("ct", np.asarray(x[CHANNELS.index("ct")]))


def stack(case):
    """A phantom as clean channels.   -> (1,4,G,G,G)"""
    return torch.from_numpy(np.stack([encode(c, case[c]) for c in CHANNELS]))[None]


def thinned(x):
    """Every fourth voxel."""
    return x[..., ::SCALE, ::SCALE, ::SCALE]


@torch.no_grad()
def errors(denoise, x0, seed):
    """Of one clean volume at each time: of the network's estimate and of doing nothing, x_t / sqrt(abar).
    -> {who: {measure: number}}"""
    found, eps = {}, torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    for t in TIMES:
        when = torch.tensor([t])
        xt = q_sample(x0, when, eps)
        idle = (xt / alpha_bar(when).sqrt()).clamp(-1, 1)
        for who, x0_hat in (("network", denoise(xt, when).float().clamp(-1, 1)), ("doing nothing", idle)):
            row = found.setdefault(who, {})
            row[f"error, t = {t}"] = (x0_hat - x0).square().mean().item()
            row[f"bones' Dice, t = {t}"] = dice(hu(x0_hat[0]) > BONE, hu(x0[0]) > BONE)
    return found


def sharpness(volumes, bones):
    """Of CTs in HU: voxels above BONE and DENSE, mean length of the gradient, share of bone outside `bones`.
    -> {measure: number}"""
    above = [ct > BONE for ct in volumes]
    lengths = [np.sqrt(sum(g**2 for g in np.gradient(ct.astype(np.float32)))).mean() for ct in volumes]
    return {f"per mille > {BONE} HU": 1000 * np.mean([a.mean() for a in above]),
            f"per mille > {DENSE} HU": 1000 * np.mean([(ct > DENSE).mean() for ct in volumes]),
            "gradient, HU a voxel": float(np.mean(lengths)),
            "of bone outside": float(np.mean([(a & ~bones).sum() / max(1, a.sum()) for a in above]))}


def copy(model, n, n_full):
    """-> {"stage 1": table, "stage 2": table, "samples of stage 1": table}, tables {who: {measure: number}}"""
    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=model.s["amp"])

    tables, rows = {}, {"stage 1": [], "stage 2": []}
    for i in tqdm(range(n_full), desc="copy", leave=False):
        x0 = stack(model.phantom(6000 + i))
        with autocast():
            rows["stage 1"].append(errors(lambda xt, t: model.low(xt, t), thinned(x0), i))
            if model.sr is not None:
                low = upsample(thinned(x0))
                rows["stage 2"].append(errors(lambda xt, t, low=low: model.sr(torch.cat([low, xt], 1), t), x0, i))
    for stage, found in rows.items():
        if found:
            tables[stage] = {who: {k: float(np.mean([f[who][k] for f in found])) for k in row}
                             for who, row in found[0].items()}

    # samples beside phantoms: bone may be where any of OTHERS phantoms has some
    others = [thinned(model.phantom(7000 + i)["ct"]) for i in tqdm(range(OTHERS), desc="phantoms", leave=False)]
    bones = np.any([ct > BONE for ct in others], axis=0)
    cases = [model.phantom(i) for i in range(n)]
    made = [model.sample(model.seed + i, case["report"])["ct"] for i, case in enumerate(cases)]
    tables["samples of stage 1"] = {"phantoms": sharpness([thinned(case["ct"]) for case in cases], bones),
                                    "samples": sharpness(made, bones)}
    return tables
