"""A procedural thorax with its radiology report: the built-in data set, so that every command runs without patients.
The anatomy is our own schematic, not from the paper: shapes are formulas in mm, so a seed means the same chest on every
grid.
    python phantom.py --out data/train --n 512
"""
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import CHANNELS, FOV, SCALE, encode, write_case
from support.cli import Parser, exits
from support.files import whole_folder, write_atomic
from support.pictures import picture
from support.sentences import SENTENCES, SIZES, TERMS

# Frame: z inferior -> superior, y posterior -> anterior, x right -> left, in mm from the centre of the field of view;
# points are (z, y, x).
LOBES = {"LUL": 1, "LLL": 2, "RUL": 3, "RML": 4, "RLL": 5}
LOBE_WORDS = {"LUL": "left upper lobe", "LLL": "left lower lobe", "RUL": "right upper lobe", "RML": "right middle lobe",
              "RLL": "right lower lobe"}
# mL, total over both sides, before the cap per side
FLUID_ML = {"small": (70, 160), "moderate": (350, 550), "large": (950, 1450)}
FLUID_SHARE = 0.7                 # no effusion fills more of one pleural cavity than this: some lung is left to see
CTR = {False: (0.40, 0.49), True: (0.56, 0.70)}   # widest heart over widest thorax: normal heart, cardiomegaly
HU = dict(air=-1000, fat=-100, skin=20, muscle=55, marrow=320, cortex=520, disc=90, cartilage=110, liver=100, blood=190,
          fluid=5, lung=-860, wall=-20, lumen=-995, bulla=-992, nodule=40, fissure=-640)
NOISE_HU = 9.0                    # so low that a normal lung stays above -950 HU


# --- what is drawn: findings, anatomy, trees ---

def draw_conditions(rng, **given):
    """The findings of a case, a dict: those given, the rest drawn with a clinic's (rough) prevalences."""
    rules = {"effusion": ("none", "left", "right", "both"), "effusion_size": (None, *FLUID_ML),
             "cardiomegaly": (False, True), "bullae": (False, True), "consolidation": (None, *LOBES),
             "nodules": (0, 1, 2, 3, 4)}
    for key, value in given.items():
        if key not in rules:
            raise ValueError(f"unknown condition {key!r}; conditions are {', '.join(rules)}; use one of them")
        if value not in rules[key]:
            raise ValueError(f"{key}={value!r}; {key} is one of {rules[key]}; choose one of them")

    # Everything is drawn, also what is then overruled: giving one condition leaves the rest of the chest as the seed
    # has it.
    side = str(rng.choice(["left", "right", "both"]))
    drawn = {
        "effusion": side if rng.random() < 0.45 or given.get("effusion_size") else "none",
        "effusion_size": str(rng.choice(list(FLUID_ML))),
        "cardiomegaly": bool(rng.random() < 0.35),
        "bullae": bool(rng.random() < 0.2),
        "consolidation": str(rng.choice(list(LOBES))) if rng.random() < 0.3 else None,
        "nodules": int(rng.choice(5, p=[0.6, 0.2, 0.1, 0.06, 0.04])),
    }
    drawn.update({k: v for k, v in given.items() if not (k == "effusion_size" and v is None)})

    if drawn["effusion"] == "none":
        drawn["effusion_size"] = None
    if drawn["effusion_size"] == "large" and "consolidation" not in given and drawn["consolidation"] in ("LLL", "RLL"):
        # so much fluid leaves too little of a lower lobe to show it
        drawn["consolidation"] = drawn["consolidation"][0] + "UL"
    return drawn


def draw_anatomy(rng, cardiomegaly):
    """One person's measures, mm: a dict that the shape functions below read."""
    u = rng.uniform
    a = dict(width=u(118, 128), depth=u(80, 88), apex=u(110, 118), body=u(19, 25), fat=u(8, 15),
             dome=(u(-52, -42), u(-62, -52)), oblique=(u(-20, -8), u(-24, -10)), slope=u(1.0, 1.25),
             horizontal=u(2, 12), wobble=u(0, 6.28, 4), ribs=u(0, 24), disc=u(0, 24), rib_slant=u(0.4, 0.55),
             carina=np.array([u(27, 35), -20.0, u(-3, 1)]), trachea=u(7.4, 9.0), blood=HU["blood"] + u(-10, 15))

    # The heart: an ellipsoid whose long axis points left, forward and down, scaled so that its widest axial width gives
    # the wanted ratio.
    ratio = u(*CTR[cardiomegaly])
    directions = np.array([[-0.45, 0.42, 0.8], [0.9, 0.1, 0.4], [0.0, 1.0, -0.5]]).T
    axes, _ = np.linalg.qr(directions + u(-0.05, 0.05, (3, 3)))
    lengths = np.array([1.0, *(u(0.74, 0.82, 2) - 0.12 * cardiomegaly)])
    q = axes @ np.diag(1 / lengths ** 2) @ axes.T
    half = ratio * a["width"]
    q *= (np.sqrt(np.linalg.inv(q[1:, 1:])[1, 1]) / half) ** 2             # a central section is an ellipsoid's widest
    height = np.sqrt(np.linalg.inv(q)[0, 0])
    a["heart"] = q
    a["heart_at"] = np.array([-84 + 0.76 * height, u(18, 24), 0.28 * half + u(-2, 3)])
    return a


def grow(rng, start, points, radius, shrink, depth):
    """A tree that fills a cloud: walk half-way to its centroid, cut the cloud in two, grow a branch into each half.
    points: (n,3) mm   shrink: the radius from one generation to the next
    -> segments (p, q, radius at p, radius at q)"""
    end = start + rng.uniform(0.42, 0.58) * (points.mean(0) - start)
    segments = [(start, end, radius, radius * (1 + shrink) / 2)]
    if depth == 0 or len(points) < 4:
        return segments

    along = (end - start) / np.linalg.norm(end - start)
    across = points - points.mean(0)
    across = across - np.outer(across @ along, along)                      # cut where the cloud is widest across it
    side = across @ (np.linalg.svd(across, full_matrices=False)[2][0] + rng.normal(0, 0.2, 3))
    cut = np.quantile(side, rng.uniform(0.38, 0.62))
    for half in (points[side <= cut], points[side > cut]):
        segments += grow(rng, end, half, radius * shrink * rng.uniform(0.93, 1.07), shrink, depth - 1)
    return segments


def chain(points, radius):
    """A bent tube of one radius through the points, as segments."""
    points = [np.asarray(p, float) for p in points]
    return [(p, q, radius, radius) for p, q in zip(points, points[1:])]


def draw_trees(rng, a, cloud, labels):
    """Airways, pulmonary vessels (inside the lungs), aorta and pulmonary trunk as segment lists.
    cloud: (n,3) points in the lungs   labels: (n,) their lobes"""
    c = a["carina"]
    right = c + (-10, -1, -27)                                             # ends of main bronchi
    inter = c + (-29, 1, -34)                                              # and of the bronchus intermedius
    left = c + (-16, -3, 42)
    airways = [(np.array([150.0, -8, 0]), c, a["trachea"], a["trachea"])]
    airways += chain([c, right], 6.0) + chain([c, left], 5.5) + chain([right, inter], 5.0)
    vessels = []
    for label, root in {1: left, 2: left, 3: right, 4: inter, 5: inter}.items():
        points = cloud[labels == label]
        airways += grow(rng, root, points[::2], 4.0, 0.74, 3)
        # Arteries run in front of and above their bronchus, veins come in below: three trees that keep out of each
        # other's way.
        vessels += grow(rng, root + (5, 9, 0), points[1::2], 5.6, 0.8, 6)
        vessels += grow(rng, root + (-9, 6, 0), points[::-2], 5.0, 0.8, 6)

    top = c[0] + 24
    valve = a["heart_at"][0] + 15                                          # height of both great arteries' beginnings
    aorta = chain([(valve, 22, -4), (c[0] - 2, 26, -14), (top - 8, 20, -10), (top, 4, 2), (top - 4, -16, 14),
                   (top - 14, -32, 21), (c[0], -40, 22), (-150, -38, 16)], rng.uniform(11.5, 13.5))
    fork = (c[0] - 8, 24, 16)
    trunk = (chain([(valve, 38, 18), fork], 13) + chain([fork, left + (6, 9, 0)], 9)
             + chain([fork, (c[0] - 12, 6, -6), right + (5, 9, 0)], 9))

    def aside(tree):
        return [(clear_of_heart(a, p), clear_of_heart(a, q), r, s) for p, q, r, s in tree]
    return aside(airways), aside(vessels), aorta, trunk


def draw_fluid(rng, where, size):
    """mL of effusion.   where: "none" | "left" | "right" | "both"   -> {"left": mL, "right": mL}, sides with any"""
    total, part = rng.uniform(0, 1), rng.uniform(0.38, 0.62)
    sides = {"none": [], "both": ["left", "right"]}.get(where, [where])
    if not sides:
        return {}
    low, high = FLUID_ML[size]
    parts = (part, 1 - part) if len(sides) == 2 else (1,)
    return {side: (low + (high - low) * total) * p for side, p in zip(sides, parts)}


def draw_bullae(rng, a, cloud, labels, lung_mm3, free):
    """Air pockets as balls (p, p, r, r) under the pleura of the upper lobes, until they hold 3 to 11 % of the lungs."""
    # About a quarter of such a ball hangs out of its lung, hence the factor.
    target = rng.uniform(0.03, 0.11) * lung_mm3 * 1.4
    balls = []
    depth = -wall_distance(a, *cloud.T)
    places = cloud[np.isin(labels, (1, 3)) & (depth > 6) & (depth < 26)]
    for p, r in zip(places, rng.uniform(12, 30, len(places))):
        if target > 0 and free(p) and all(np.linalg.norm(p - q) > 0.75 * (r + s) for q, _, s, _ in balls):
            balls.append((p, p, r, r))
            target -= 4.19 * r ** 3
    return balls


def draw_nodules(rng, a, cloud, count, bullae, free):
    """Nodules as balls (p, p, r, r), largest first, in aerated lung away from wall, heart, bullae and each other."""
    def fits(p, r):
        return (wall_distance(a, *p) < -r and free(p) and heart_form(a, *p) > 1.6
                and all(np.linalg.norm(p - q) > r + s + 4 for q, _, s, _ in bullae + balls))

    balls = []
    for r in np.sort(rng.uniform(4, 12, count))[::-1]:
        p = next((p for p in cloud[::-1] if fits(p, r)), None)
        if p is None:                                      # a full chest: truth and report say how many there are
            break
        balls.append((p, p, r, r))
    return balls


# --- shapes: z, y, x are mm and broadcast, single points and whole grids alike ---

def wall_distance(a, z, y, x):
    """mm outside (+) or inside (-) the inner chest wall, measured in the axial plane."""
    t = np.clip((z + 40) / (a["apex"] + 40), 0, 1)
    s = np.sqrt(np.maximum(1 - t ** 2.6, 4e-4))                            # the section shrinks to nothing at the apex
    y = y + 18 * t ** 2                                                    # and moves backwards
    rho = (np.abs(x / (a["width"] * s)) ** 2.5 + np.abs(y / (a["depth"] * s)) ** 2.5 + 1e-6) ** 0.4
    return np.sqrt(x * x + y * y) * (1 - 1 / rho)


def diaphragm(a, y, x):
    """Height z of the diaphragm, mm: two domes, the right one higher, with deep sulci at the wall."""
    fall = ((y - 8) / 85) ** 2
    return np.maximum(*(top - 42 * (((x - c) / 72) ** 2 + fall) for top, c in zip(a["dome"], (-62, 62))))


def heart_form(a, z, y, x):
    """Quadratic form of the heart: < 1 inside."""
    q = a["heart"]
    z, y, x = (v - c for v, c in zip((z, y, x), a["heart_at"]))
    return (q[0, 0] * z * z + q[1, 1] * y * y + q[2, 2] * x * x
            + 2 * (q[0, 1] * z * y + q[0, 2] * z * x + q[1, 2] * y * x))


def clear_of_heart(a, p):
    """The point (3,) itself or, where the heart is in its way, pushed straight out of it."""
    form = heart_form(a, *p)
    return p if form > 1.4 else a["heart_at"] + (p - a["heart_at"]) * np.sqrt(1.4 / form)


def fissures(a, z, y, x):
    """mm above the left oblique, right oblique and right horizontal fissure: curved sheets z = f(y, x)."""
    w = a["wobble"]

    def bend(i):
        return 9 * np.sin(y / 36 + w[i]) + 6 * np.sin(np.abs(x) / 30 + w[i + 1])
    left, right = (z - (h - a["slope"] * y + bend(2 * i)) for i, h in enumerate(a["oblique"]))
    return left, right, z - (a["horizontal"] - 0.12 * y + 3 * np.sin(x / 25 + w[0]))


def lobe_labels(a, z, y, x, wall=None):
    """Lobe 0..5 (uint8) at every point.   wall: its `wall_distance`, where that is known"""
    wall = wall_distance(a, z, y, x) if wall is None else wall
    hilum = 10 * np.exp(-((z - 14) / 26) ** 2 - ((y + 10) / 26) ** 2)      # the mediastinum bulges at the lung roots
    middle = 20 + hilum - 13 / (1 + np.exp((35 - y) / 6))  # and narrows behind the sternum, where lungs almost meet
    lung = (wall < 0) & (z > diaphragm(a, y, x)) & (np.abs(x) > middle) & (heart_form(a, z, y, x) > 1.12)
    left, right, horizontal = fissures(a, z, y, x)
    of_right = np.where(right < 0, 5, np.where(horizontal > 0, 3, 4))
    return np.where(x > 0, np.where(left > 0, 1, 2), of_right).astype(np.uint8) * lung


def tube_depth(axes, segments, reach):
    """mm inside (+) or outside (-) the nearest tube or, where both ends coincide, ball; -reach far away. (D,H,W)
    float32. No tube is thinner than 0.7 voxels (at most 1.75 mm), so that trees stay connected from 128^3 upwards.
    axes: mm of the voxels along D, H, W"""
    steps = [v[1] - v[0] for v in axes]
    thin = min(0.7 * max(steps), 1.75)
    out = np.full([len(v) for v in axes], -reach, np.float32)
    for p, q, r0, r1 in segments:
        r0, r1 = max(r0, thin), max(r1, thin)

        # the box of voxels that the segment reaches, in mm from p
        lo = np.minimum(p, q) - max(r0, r1) - reach
        hi = np.maximum(p, q) + max(r0, r1) + reach
        box = tuple(slice(max(0, int((a - v[0]) / s)), max(0, int((b - v[0]) / s) + 2))
                    for v, s, a, b in zip(axes, steps, lo, hi))
        z, y, x = (on_axis(i, v[b].astype(np.float32)) - np.float32(o) for i, (v, b, o) in enumerate(zip(axes, box, p)))

        # the nearest point of the segment, as a share of its length
        d = (q - p).astype(np.float32)
        t = np.clip((z * d[0] + y * d[1] + x * d[2]) / max(float(d @ d), 1e-6), 0, 1).astype(np.float32)
        depth = r0 + (r1 - r0) * t - np.sqrt((z - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (x - t * d[2]) ** 2)
        np.maximum(out[box], depth, out=out[box])
    return out


def on_axis(i, values):
    """Values of axis i, so shaped that they broadcast over (D,H,W)."""
    return values.reshape(np.roll((-1, 1, 1), i))


def waves(rng, z, y, x, scale, n=6):
    """A smooth random field of about unit variance; scale: mm. Separable waves, so that every grid samples the same
    field."""
    total = 0
    for _ in range(n):
        k, phase = rng.normal(0, 1 / scale, 3), rng.uniform(0, 6.28, 3)
        total = total + np.sin(k[0] * z + phase[0]) * np.sin(k[1] * y + phase[1]) * np.sin(k[2] * x + phase[2])
    return (total * np.sqrt(8 / n)).astype(np.float32)


def effusion(side_ml, lobe, wall, z, y, x, voxel_ml):
    """Free fluid of a patient lying on the back. side_ml: {"left": mL, "right": mL}.   -> bool (D,H,W)
    Fills each side to the exact volume: voxels sorted by height, with a meniscus that climbs the chest wall and lung
    held up at its root."""
    root = 80 * np.exp(-((np.abs(x) - 38) ** 2 + (y + 38) ** 2 + (z + 8) ** 2) / 1800)
    height = y + 0.25 * z - 14 * np.exp(np.minimum(wall, 0) / 9) + root
    out = np.zeros(lobe.shape, bool)
    for side, ml in side_ml.items():
        cavity = (lobe > 0) & (x > 0 if side == "left" else x < 0)
        values = height[cavity]
        count = int(round(min(ml / voxel_ml, FLUID_SHARE * len(values))))
        if count:
            out |= cavity & (height <= np.partition(values, count - 1)[count - 1])
    return out


# --- paint: shapes become HU ---

def paint_body(a, z, y, x, wall):
    """CT of all but the lungs' contents and the vessels, (D,H,W) float32 HU."""
    neck = 1 / (1 + np.exp((z - 138) / 14))                                # shoulders narrow towards the neck
    width = (a["width"] + a["body"]) * (0.5 + 0.5 * neck)
    depth = (a["depth"] + a["body"]) * (0.62 + 0.38 * neck)
    rho = (np.abs(x / width) ** 2.6 + np.abs((y + 4) / depth) ** 2.6 + 1e-6) ** (1 / 2.6)
    skin = np.sqrt(x * x + (y + 4) ** 2) * (1 / rho - 1)                   # mm under the skin
    ct = np.full(wall.shape, HU["air"], np.float32)
    ct[skin > 0] = HU["skin"]
    ct[skin > 2] = HU["fat"]
    ct[skin > a["fat"]] = HU["muscle"]

    # ribs and their cartilage, sternum, shoulder blades
    level = z + a["rib_slant"] * (y + 90)                                  # constant along a rib, which falls forward
    rib = (((level + a["ribs"]) % 24 - 12) / 5.5) ** 2 + ((wall - 5) / 4) ** 2
    ribs = (rib < 1) & (level < a["apex"] + 30) & (skin > 4)
    ct[ribs] = HU["cortex"] - 120
    ct[ribs & (np.abs(x) < 45) & (y > 0)] = HU["cartilage"]
    ct[(wall > 2) & (wall < 11) & (np.abs(x) < 15) & (y > 0) & (np.abs(z - 10) < 68)] = HU["marrow"] + 30
    blade = (wall > 11) & (wall < 16) & (skin > 6) & (y < -35)
    ct[blade & (np.abs(np.abs(x) - 82) < 30 - 0.2 * (105 - z)) & (np.abs(z - 60) < 45)] = HU["cortex"] - 80

    # below the diaphragm: liver, spleen, stomach; above it mediastinal fat, until the lungs are painted
    dome = diaphragm(a, y, x)
    belly = (wall < 0) & (z < dome)
    ct[(wall < 0) & ~belly] = -70
    ct[belly] = HU["fat"]
    ct[belly & (x < 25 - 0.4 * (y - 30) + 0.9 * (z + 100))] = HU["liver"]
    spleen = ((x - 84) / 32) ** 2 + ((y + 32) / 38) ** 2 + ((z + 108) / 34) ** 2
    ct[belly & (spleen < 1)] = 120
    stomach = ((x - 60) / 36) ** 2 + ((y - 28) / 36) ** 2 + ((z + 104) / 30) ** 2
    ct[belly & (stomach < 1)] = HU["muscle"]
    ct[belly & (stomach < 0.8)] = 20
    ct[belly & (stomach < 0.8) & (y > 32)] = -950          # the bubble rises to the front in a patient on the back
    ct[belly & (z > dome - 4)] = HU["muscle"]

    # spine: bodies and discs, spinal canal, spinous and transverse processes
    back = -64 + 8 * (z / 146) ** 2                                        # centre of the vertebral bodies, on a curve
    level = (z + a["disc"]) % 24
    body = np.sqrt(((y - back) / 13) ** 2 + (x / 17) ** 2)
    canal = np.sqrt((y - back + 21) ** 2 + x * x)
    ct[body < 1.25] = HU["muscle"]
    ct[body < 1] = HU["cortex"]
    ct[body < 0.84] = HU["marrow"]
    ct[(body < 1) & (level < 5)] = HU["disc"]
    ct[(canal < 12) & (body > 1)] = HU["cortex"] - 60
    ct[canal < 8] = 20
    slanted = (z - 0.7 * (y - back) + a["disc"]) % 24
    ct[(np.abs(x) < 3.5) & (y < back - 31) & (y > back - 46) & (slanted > 9) & (skin > 4)] = HU["cortex"] - 60
    beside = (np.abs(y - back + 20) < 4) & (np.abs(x) < 30) & (np.abs(x) > 10)
    ct[beside & (np.abs(level - 14) < 5)] = HU["cortex"] - 60
    return ct


def paint_lung(rng, a, z, y, x, h):
    """Aerated tissue, denser towards the back where it hangs on itself, with fissures, (D,H,W) HU.   h: mm a voxel"""
    lung = HU["lung"] - 0.32 * y + 9 * waves(rng, z, y, x, 14)
    left, right, horizontal = fissures(a, z, y, x)
    tilt = np.hypot(1, a["slope"])                         # from height above a sloping sheet to distance from it
    gap_right = np.minimum(np.abs(right) / tilt, np.where(right > 0, np.abs(horizontal), 99))
    gap = np.where(x > 0, np.abs(left) / tilt, gap_right)
    # a sheet 1.5 mm thick, thinned by the voxel
    lung += (HU["fissure"] - HU["lung"]) * np.exp(-(gap / (0.5 * h)) ** 2) * min(1.0, 1.5 / h)
    return lung


def consolidate(rng, lung, inside, z, y, x):
    """Patches that fill most of a lobe, into the lung.   inside: bool (D,H,W), the aerated part of the lobe"""
    field = waves(rng, z, y, x, 20)
    if inside.any():
        dense = np.clip((field - np.quantile(field[inside], 0.28)) / 0.35 + 0.5, 0, 1) * inside
        lung += dense * (8 + 16 * waves(rng, z, y, x, 9) - lung)


# --- a case ---

def make(seed, grid=128, wording="train", **conditions):
    """One schematic chest (not from the paper) with its report; the same seed and conditions give the same bytes.

    conditions: effusion "none" | "left" | "right" | "both"; effusion_size "small" | "moderate" | "large" (about 0.1,
    0.45, 1.2 L over both sides); cardiomegaly, bullae: bool; consolidation None | "LUL" | "LLL" | "RUL" | "RML" |
    "RLL"; nodules 0..4. Those not given are drawn by the seed.
    Returns ct int16 HU, lobe uint8 0..5, airway and vessel uint8 0/1, all (grid,grid,grid) over FOV mm; report str;
    truth, a dict of measurements on these arrays (plain types); masks {heart, thorax, effusion} bool, for validation
    only."""
    if wording not in SENTENCES:
        raise ValueError(f"wording {wording!r}; wordings are {', '.join(SENTENCES)}; choose one of them")
    if grid < 16:
        raise ValueError(f"grid {grid}; a chest needs at least 16 voxels a side; 64, 128 and 256 are usual")

    # Own streams for own matters: a change of one finding or of the grid leaves everything else in its place.
    found = draw_conditions(np.random.default_rng(seed), **conditions)
    streams = (np.random.default_rng([seed, i]) for i in range(6))
    body_rng, tree_rng, finding_rng, patch_rng, text_rng, noise_rng = streams
    a = draw_anatomy(body_rng, found["cardiomegaly"])
    cloud = body_rng.uniform(-0.5, 0.5, (20000, 3)) * FOV
    labels = lobe_labels(a, *cloud.T)
    lung_mm3 = float(np.mean(labels > 0) * np.prod(FOV))
    cloud, labels = cloud[labels > 0], labels[labels > 0]
    airways, vessels, aorta, trunk = draw_trees(tree_rng, a, cloud, labels)

    # the grid
    axes = [(np.arange(grid) + 0.5) * f / grid - f / 2 for f in FOV]
    h = max(FOV) / grid
    voxel_ml = float(np.prod(FOV)) / grid ** 3 / 1000
    z, y, x = (on_axis(i, v.astype(np.float32)) for i, v in enumerate(axes))

    def share(depth):                                      # part of a voxel that lies inside, from its centre's depth
        return np.clip(depth / h + 0.5, 0, 1)

    # chest wall, heart, great vessels, clavicles
    wall = wall_distance(a, z, y, x).astype(np.float32)
    ct = paint_body(a, z, y, x, wall)
    chest = (wall < 0) & (z > diaphragm(a, y, x))
    heart = (heart_form(a, z, y, x) < 1) & (wall < -4) & (z > diaphragm(a, y, x) - 14)
    great = np.maximum(tube_depth(axes, aorta, 4), tube_depth(axes, trunk, 4))
    clavicles = [(np.array([82.0, 50, 14 * s]), np.array([104.0, 10, 112 * s]), 6, 6) for s in (-1, 1)]
    ct[(tube_depth(axes, clavicles, 1) > 0) & (ct > HU["fat"]) & (wall > 0)] = HU["cortex"] - 80
    lobe = lobe_labels(a, z, y, x, wall) * (great < -2)                    # fat keeps the lung 2 mm off them
    ct[(great > 0) & ~(ct > 200)] = a["blood"]
    ct[heart] = a["blood"]

    # effusion, and the lung in what it leaves
    fluid = effusion(draw_fluid(finding_rng, found["effusion"], found["effusion_size"]), lobe, wall, z, y, x, voxel_ml)
    pleura = (lobe > 0) & ~fluid
    lung = paint_lung(body_rng, a, z, y, x, h)
    solid = LOBES.get(found["consolidation"])
    if solid:
        consolidate(patch_rng, lung, pleura & (lobe == solid), z, y, x)

    # bullae, vessels between them, nodules
    def free(p):
        return pleura[tuple(int((c + f / 2) / f * grid) for c, f in zip(p, FOV))]

    order = finding_rng.permutation(len(cloud))
    cloud, labels = cloud[order], labels[order]
    bullae = draw_bullae(finding_rng, a, cloud, labels, lung_mm3, free) if found["bullae"] else []
    bulla = tube_depth(axes, bullae, 2 + h)
    lung += share(bulla + 1.2) * (-720 - lung)                             # a thin wall, then the air
    lung += (bulla > 0) * (HU["bulla"] - lung)
    blood = tube_depth(axes, vessels, 2 + h)
    vessel = (blood > 0) & pleura & (bulla < 0)
    lung += share(2 * blood + h / 2) * (bulla < 0) * (np.clip(70 + 45 * blood, 50, a["blood"]) - lung)
    aerated = cloud[labels != solid]                                       # a nodule would not show where it is solid
    nodules = draw_nodules(finding_rng, a, aerated, found["nodules"], bullae, free)
    lung += share(tube_depth(axes, nodules, 2 + h)) * (HU["nodule"] - lung)
    ct[pleura] = lung[pleura]
    ct[fluid] = HU["fluid"]

    # airways: with a wall in the lung, with soft tissue around them outside
    breath = tube_depth(axes, airways, 2 + h)
    room = (chest | (z > 60)) & ~fluid & (bulla < 0)
    outside = np.where(room & (breath > -2), HU["muscle"] - 25, ct)
    ct = np.where(room & (lobe > 0), ct + share(breath + 1.6) * np.maximum(HU["wall"] - ct, 0), outside)
    airway = (breath > 0) & room
    ct[airway] = HU["lumen"]
    vessel &= ~airway
    heart &= ~airway
    lobe[fluid] = 0

    # noise, numbers, report
    ct += noise_rng.normal(0, 1, ct.shape).astype(np.float32) * NOISE_HU
    ct = np.clip(np.round(ct), -1024, 1500).astype(np.int16)
    masks = {"heart": heart, "thorax": chest | heart, "effusion": fluid}
    largest = list(LOBES)[int(lobe_labels(a, *nodules[0][0])) - 1] if nodules else None
    truth = {"seed": int(seed), "grid": int(grid), "wording": wording, **found, "nodules": len(nodules),
             **measure(ct, lobe, airway, masks, voxel_ml), "nodule_mm": [float(2 * r) for _, _, r, _ in nodules],
             "nodule_lobe": largest}
    return {"ct": ct, "lobe": lobe, "airway": airway.astype(np.uint8), "vessel": vessel.astype(np.uint8),
            "report": write_report(text_rng, truth, wording), "truth": truth, "masks": masks}


def measure(ct, lobe, airway, masks, voxel_ml):
    """The numbers of a case, taken from its arrays: volumes, cardiothoracic ratio (both widths on the level where the
    heart is widest), %LAA-950."""
    def width(mask):                                                       # (H,W) -> voxels
        return np.ptp(np.flatnonzero(mask.any(0))) + 1 if mask.any() else 0

    level = int(np.argmax([width(plane) for plane in masks["heart"]]))
    right, left = np.split(masks["effusion"], [ct.shape[2] // 2], axis=2)  # W grows towards the patient's left
    left, right = float(left.sum() * voxel_ml), float(right.sum() * voxel_ml)
    return {
        "effusion_ml": left + right,
        "effusion_left_ml": left,
        "effusion_right_ml": right,
        "ctr": float(width(masks["heart"][level]) / width(masks["thorax"][level])),
        "laa950_percent": float(100 * np.mean(ct[(lobe > 0) & ~airway] < -950)),
        "airway_mm3": float(airway.sum() * voxel_ml * 1000),
        "lung_ml": float((lobe > 0).sum() * voxel_ml),
        "lobe_ml": [float((lobe == i).sum() * voxel_ml) for i in range(1, 6)],
    }


# --- a case is measured: segmenters of phantoms ---

def segment(ct, lobe, voxel):
    """Threshold segmenters, for phantoms and for samples of networks trained on them; on patients they mean nothing.
    ct: HU (D,H,W)   lobe: labels (D,H,W)   voxel: mm (3,)   -> bool masks {airway, effusion, heart, thorax}
    The thresholds go with voxels of 1 to 3 mm; coarser ones are cut into such first. Airways of that size then count
    for little."""
    from scipy import ndimage
    k = max(1, round(max(voxel) / 2.5))
    if k > 1:
        finer = (a.repeat(k, 0).repeat(k, 1).repeat(k, 2) for a in (ct, lobe))
        fine = segment(*finer, np.asarray(voxel) / k)
        return {name: mask[k // 2::k, k // 2::k, k // 2::k] for name, mask in fine.items()}

    def ball(mm):
        reach = [np.arange(-int(mm / v), int(mm / v) + 1) for v in voxel]
        return sum((on_axis(i, r) * v) ** 2 for i, (r, v) in enumerate(zip(reach, voxel))) <= mm ** 2

    def tree(dark):                        # the part of the dark voxels that enters at the top, where the trachea does
        labels, _ = ndimage.label(dark, np.ones((3, 3, 3)))
        top = labels[-3:][labels[-3:] > 0]
        return labels == np.bincount(top).argmax() if len(top) else dark

    def bodies(low, high, mm):             # of a range of HU: bodies thicker than 2 mm, to their own outline
        core = ndimage.binary_opening((smooth > low) & (smooth < high) & ~lung & ~airway, ball(mm))
        near = ndimage.binary_dilation(core, iterations=2) & ~lung & ~airway
        return ndimage.label(core | near & (ct > low - 10) & (ct < high + 20))[0]

    smooth = ndimage.uniform_filter(ct.astype(np.float32), 3)
    lung = lobe > 0
    dark = ct < -945
    dark &= ~ndimage.binary_propagation(edge_of(ct.shape), mask=dark)      # without the air around the body
    airway = tree(dark)
    wide = ndimage.binary_opening(airway, ball(7.5)) & lung                # a bulla that touches a bronchus is wider
    airway = tree(airway & ~(ndimage.binary_dilation(wide, iterations=2) & lung))     # than any airway in the lung

    water = bodies(-35, 32, 6)                                             # effusion touches the lung; spinal canal
    touching = ndimage.binary_dilation(lung)                               # and stomach do not
    effusion = np.isin(water, np.setdiff1d(water[touching], 0))
    blood = bodies(140, 260, 8)
    heart = blood == max(1, np.bincount(blood.ravel())[1:].argmax() + 1) if blood.any() else blood > 0
    return {"airway": airway, "effusion": effusion, "heart": heart, "thorax": lung | effusion | heart}


def edge_of(shape):
    """The outermost voxels right, left, behind and in front, bool (D,H,W)."""
    edge = np.zeros(shape, bool)
    edge[:, [0, -1]] = edge[:, :, [0, -1]] = True
    return edge


# --- reports ---

def choose(rng, template):
    """One of the sentences that a template's [this|that] and @names stand for."""
    def pick(options):
        return str(rng.choice(options.split("|")))

    text = re.sub(r"\[(.*?)\]", lambda m: pick(m[1]), template)
    text = re.sub(r"@(\w+)", lambda m: pick(TERMS[m[1]]), text)
    return text[:1].upper() + text[1:]                                     # a sentence may begin with a term


def write_report(rng, truth, wording, prompt=False):
    """"Findings: ...\nImpression: ..." for the truth of a case, under 150 words; sentences and their order vary with
    rng. As in a clinic, what is there is always said and what is not there only mostly (85 % each). prompt: as somebody
    would type it, a few sentences without headings, which leave out most of what is not there."""
    said = SENTENCES[wording]
    count = len(truth["nodule_mm"])
    topics = [
        {"none": "no effusion", "both": "effusion both"}.get(truth["effusion"], "effusion"),
        "cardiomegaly" if truth["cardiomegaly"] else "no cardiomegaly",
        "bullae" if truth["bullae"] else "no bullae",
        "consolidation" if truth["consolidation"] else "no consolidation",
        ("no nodules", "nodule", "nodules")[min(count, 2)],
    ]
    number = ("no", "one", "two", "three", "four")[count]
    blanks = dict(side=truth["effusion"], ctr=truth["ctr"], count=number, Count=number.capitalize(),
                  mm=round(max(truth["nodule_mm"], default=0)))

    def say(topic):
        lobe = LOBE_WORDS.get(truth["consolidation" if "consolidation" in topic else "nodule_lobe"], "")
        size = str(rng.choice(SIZES[wording].get(truth["effusion_size"], [""])))
        line = choose(rng, str(rng.choice(said[topic])))
        line = line.format(size=size, Size=size.capitalize(), lobe=lobe, Lobe=lobe.capitalize(), **blanks)
        return " ".join(line.split())                                      # an empty choice leaves two spaces

    if prompt:
        lines = [say("!" * int(rng.integers(2) and not t.startswith("no ")) + t) for t in topics
                 if not t.startswith("no ") or rng.random() < 0.2]
        return " ".join(rng.permutation(lines or [say("!normal")]))

    findings = [say(t) for t in topics if not t.startswith("no ") or rng.random() < 0.85] or [say(topics[0])]
    others = rng.permutation(said["normal"])[:rng.integers(0, 4)]
    findings += [" ".join(choose(rng, str(s)).split()) for s in others]
    impression = [say("!" + t) for t in topics if not t.startswith("no ")] or [say("!normal")]
    if len(impression) > 1:
        impression = [f"{i}. {line}" for i, line in enumerate(impression, 1)]
    return f"Findings: {' '.join(rng.permutation(findings))}\nImpression: {' '.join(impression)}"


def report_alone(seed, wording="train"):
    """A report without its chest, for the text encoder to learn from: findings by the same rules, sizes invented.
    -> str"""
    rng = np.random.default_rng([seed, 7])                                 # not the stream of the chest with this seed
    found = draw_conditions(rng)
    truth = {**found, "ctr": rng.uniform(*CTR[found["cardiomegaly"]]),
             "nodule_mm": rng.uniform(8, 24, found["nodules"]).tolist(), "nodule_lobe": str(rng.choice(list(LOBES)))}
    return write_report(rng, truth, wording)


# --- the command ---

def write_one(job):
    """Make and write the case (folders, seed, grid, wording). The first folder gets the chest; the others get further
    reports of it beside links to its arrays: a network learns what words mean from many ways to say one thing."""
    folders, seed, grid, wording = job
    if folders[0].exists():
        meta = read_meta(folders[0])
    else:
        case = make(seed, grid, wording)
        meta = {"source": "phantom", **case["truth"]}
        write_case(folders[0], case["ct"], case["lobe"], case["airway"], case["vessel"], case["report"], meta)
        meta = read_meta(folders[0])
    for i, folder in enumerate(folders[1:]):
        if folder.exists():
            continue
        report = write_report(np.random.default_rng([seed, 8, i]), meta, wording, prompt=i % 2 == 1)
        with whole_folder(folder) as part:
            for name in (*CHANNELS, "low"):
                os.link(folders[0] / f"{name}.npy", part / f"{name}.npy")
            (part / "report.txt").write_text(report + "\n", encoding="utf-8")
            (part / "case.json").write_text(json.dumps(meta, indent=1) + "\n")


def read_meta(folder):
    """case.json of a phantom. ValueError if it is another's."""
    try:
        meta = json.loads((folder / "case.json").read_text())
        ours = meta["source"] == "phantom"
    except (ValueError, OSError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{folder}: its case.json is no phantom's; further reports are written from it; "
                         "remove the folder or choose another --out")
    return meta


def write_reports(args):
    """--reports: reports without chests, a line each."""
    path, seeds = args.reports, range(args.seed, args.seed + args.n)
    if path.exists() and not path.read_bytes().startswith(b'{"subject": "alone_'):
        raise ValueError(f"--reports {path}: exists and was not written by this command; nothing of others is "
                         "replaced; choose another name")
    lines = [json.dumps({"subject": f"alone_{seed}", "text": report_alone(seed, args.wording)}) for seed in seeds]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    print(f"wrote {args.n} reports without chests to {path}")


def write_cases(args):
    """Chests that are not there yet, in several processes."""
    jobs = []
    for i in range(args.n):
        names = [f"phantom_{i:06d}{f'_text{j}' if j else ''}" for j in range(args.texts)]
        jobs.append(([args.out / name for name in names], args.seed + i, args.grid, args.wording))
    todo = [job for job in jobs if not all(folder.exists() for folder in job[0])]
    check_there([folders[0] for folders, *_ in jobs], args.grid)
    for path in [args.out] + ([args.picture.parent] if args.picture else []):
        path.mkdir(parents=True, exist_ok=True)

    with ProcessPoolExecutor(args.workers) as pool:      # unlike multiprocessing.Pool it ends when a worker is killed
        try:
            running = [pool.submit(write_one, job) for job in todo]
            for made in tqdm(as_completed(running), total=len(todo), unit="case", desc="phantoms"):
                made.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    if args.picture:
        shown = [make(seed, grid, wording) for _, seed, grid, wording in jobs[:4]]
        volumes = [[encode(c, case[c]) for c in CHANNELS] for case in shown]
        picture(args.picture, volumes, [case["report"].split("Impression: ")[1] for case in shown], fov=FOV)
    size = " x ".join(f"{f / args.grid:.3f}" for f in FOV)
    print(f"wrote {len(todo)} chests ({len(jobs) - len(todo)} were there), {args.texts} report(s) each, of "
          f"{args.grid}^3 voxels, {size} mm (D,H,W), to {args.out}")


def check_there(folders, grid):
    """ValueError if a case that is there already is not readable or of another size."""
    for folder in folders:
        if not (folder / "ct.npy").exists():
            continue
        try:
            edge = len(np.load(folder / "ct.npy", mmap_mode="r"))
        except (ValueError, OSError, EOFError):
            raise ValueError(f"{folder}: its ct.npy is not readable; a case is whole; remove the folder, and this "
                             "command makes it again") from None
        if edge != grid:
            raise ValueError(f"{folder}: is there already, of {edge}^3 voxels, not {grid}^3; cases of one folder are "
                             f"of one size; choose another --out or --grid {edge}")


def main(argv=None):
    grid = 256 if torch.cuda.is_available() else 128
    p = Parser(description=__doc__)
    add = p.add_argument_group("what to make").add_argument
    add("--n", type=int, default=512,
        help="number of chests, or with --reports of reports; chests already there are kept (default 512)")
    add("--seed", type=int, default=0, help="chest i is made from seed + i (default 0)")
    add("--grid", type=int, default=grid,
        help="voxels a side (default 256, the paper's, where there is a GPU; else 128)")
    add("--texts", type=int, default=1,
        help="reports of each chest, every one a case whose arrays are shared on disk; every second of the further "
             "ones is short, as a prompt (default 1)")
    add("--wording", default="train",
        help="report sentences: train, or held-out to test generalisation (default train)")
    add = p.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("data/train"), help="folder for the cases (default data/train)")
    add("--reports", type=Path, metavar="FILE",
        help="write N reports without chests to this .jsonl instead, for text_encoder.py")
    add("--picture", type=Path, metavar="PNG", help="also save a picture of the first cases here")
    add = p.add_argument_group("machine").add_argument
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    args = p.parse_args(argv)
    with exits():
        for name, least in (("n", 1), ("texts", 1), ("seed", 0), ("grid", 16), ("workers", 1)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} {getattr(args, name)}; it must be at least {least}; give a larger number")
        if args.grid % SCALE:
            raise ValueError(f"--grid {args.grid}; a multiple of {SCALE} is needed, for the low-resolution grid; "
                             "use 128 or 256")
        if args.wording not in SENTENCES:
            raise ValueError(f"--wording {args.wording}; wordings are {', '.join(SENTENCES)}; choose one of them")
        if args.reports:
            write_reports(args)
        else:
            write_cases(args)


if __name__ == "__main__":
    main()
