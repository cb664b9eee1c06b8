"""Is stage 2 sharp? Given the true low-resolution volumes of held-out phantoms, how near is what it makes to the truth.
`obey.py --parts detail` prints the table, steps.py one of many numbers of steps.

Dice of airways, vessels and bones; the CT's mean error everywhere, in the body and at edges; the length of its gradient
beside the truth's, everywhere and at edges; FID, in features of a random network, from as many other phantoms. Beside
them those of plain up-sampling, trilinear between the voxels that the low-resolution volume was taken from; the FID of
the phantoms themselves is the floor that so few volumes have.
"""
import json

import numpy as np
import torch
from scipy.ndimage import binary_dilation
from tqdm import tqdm

from beyond.sampling import interpolated
from copying import BONE, stack
from data import CHANNELS, SCALE, decode, upsample
from diffusion import beside
from evaluate import dice, feature_net, frechet
from sample import stage
from support.files import write_atomic

EDGE = 200                       # HU a voxel: the true CT's gradient at a strong edge; a voxel around it counts too
AIR = -900                       # HU: what is denser, and every mask, is body


def gradient(ct):
    """Length of the gradient, HU a voxel.   (G,G,G) -> (G,G,G) float32"""
    return np.sqrt(sum(np.square(g) for g in np.gradient(ct.astype(np.float32))))


def compared(got, case):
    """One volume beside the truth.   got, case: {channel: (G,G,G) HU or labels}   -> {measure: number}"""
    true, steep = case["ct"].clip(-1024, 600), gradient(case["ct"].clip(-1024, 600))
    body = (true > AIR) | np.any([case[c] > 0 for c in CHANNELS[1:]], axis=0)
    edges, length = binary_dilation(steep > EDGE), gradient(got["ct"])
    away = np.abs(got["ct"] - true.astype(np.float32))
    found = {f"dice {c}": dice(got[c] > 0, case[c] > 0) for c in ("airway", "vessel")}
    found["dice bones"] = dice(got["ct"] > BONE, true > BONE)
    found |= {"CT error, HU": away.mean(), "in the body": away[body].mean(), "at edges": away[edges].mean()}
    found["sharpness of the CT / true"] = length.mean() / steep.mean()
    found["sharpness at edges"] = length[edges].mean() / steep[edges].mean()
    return {name: float(v) for name, v in found.items()}


@torch.no_grad()
def chest(model, i, ways, net):
    """-> {who: {measure: number}}, {who: features of the CT}"""
    case = model.phantom(3000 + i)
    x0 = stack(case)
    small = x0[..., ::SCALE, ::SCALE, ::SCALE]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(i)).to(model.device)
    made = {"up-sampled": interpolated(small, x0.shape[2:])}
    low = upsample(small).to(model.device)
    with torch.autocast(torch.device(model.device).type, torch.bfloat16, enabled=model.s["amp"]):
        for way, s in ways.items():
            made[way] = stage("sr", s | dict(tidy=False), beside(model.sr, low), noise, None, [], low=low).float().cpu()
    rows = {who: compared({c: decode(c, v) for c, v in zip(CHANNELS, x[0].numpy())}, case) for who, x in made.items()}
    made |= {"phantoms": x0, "others": stack(model.phantom(6000 + i))}
    return rows, {who: net(x[:, :1])[0].tolist() for who, x in made.items()}


def detail(model, n, ways=None, part=None):
    """ways: {name: settings}, how stage 2 is sampled; default the model's own   part: file of the chests that are
    measured, from which a stopped measurement goes on   -> {who: {measure: number}}"""
    ways, net = ways or {"stage 2": model.s}, feature_net(None)[0]
    names = [model.sha256["sr"], model.seed, *ways]
    kept = json.loads(part.read_text()) if part and part.is_file() else {}
    kept = kept if kept.get("names") == names else dict(names=names, chests=[])
    for i in tqdm(range(len(kept["chests"]), n), desc="detail", leave=False):
        kept["chests"].append(chest(model, i, ways, net))
        if part:
            write_atomic(part, json.dumps(kept).encode())
    rows, seen = zip(*kept["chests"][:n])
    table = {who: {k: float(np.mean([r[who][k] for r in rows])) for k in row} for who, row in rows[0].items()}
    table["phantoms"] = {}
    others = np.array([s["others"] for s in seen])
    for who, row in table.items():
        row["FID, random features"] = frechet(np.array([s[who] for s in seen]), others)
    return table
