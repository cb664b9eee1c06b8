"""What a chest looks like: whether HU, masks and their places can be one, and where in a scan the lungs are. Volumes of
the model's frame are (D,H,W): D up, H to the front, W to the left."""
import sys

import numpy as np

AIR, TISSUE = (-1100, -650), (-200, 250)          # HU of air and lung; of fat and soft tissue
WIDEST = dict(lobe=0.6, airway=0.05, vessel=0.2)  # share of a volume that a mask can fill
LUNGS = ((1, 2), (3, 4, 5))                       # labels of the left lung's lobes, of the right one's
ORDER = (("LUL", 1, "LLL", 2, 0), ("RUL", 3, "RLL", 5, 0), ("RML", 4, "RLL", 5, 1))   # 0: above, 1: before the other


# --- values ---

def shares_of_hu(ct):
    """Of air and lung, and of fat and soft tissue, among a CT's values; its minimum may be padding.   -> dict"""
    every = 1 + int((ct.size // 10_000_000) ** (1 / ct.ndim))            # millions tell as much
    ct = ct[(slice(None, None, every),) * ct.ndim]
    return {name: np.mean((ct > low) & (ct < high)) for name, (low, high) in dict(air=AIR, tissue=TISSUE).items()}


def fault_of_hu(ct):
    """What is wrong with a CT's values.   -> str, '' if nothing"""
    share = shares_of_hu(ct)
    if share["air"] > 0.005 and share["tissue"] > 0.01:
        return ""
    return (f"values {ct.min():g} to {ct.max():g}, {share['air']:.1%} of them air and lung (-1100 to -650 HU), "
            f"{share['tissue']:.1%} fat and soft tissue (-200 to 250)")


# --- masks ---

def faults_of_masks(lobe=None, airway=None, vessel=None, ct=None):
    """Why masks cannot be what they are said to be: how much of the volume they fill, how lobes lie, and, with a CT,
    what they cover.   all: (D,H,W) on one grid, any subset   -> faults, doubts: lists of str"""
    masks = {name: a for name, a in dict(lobe=lobe, airway=airway, vessel=vessel).items() if a is not None}
    found = [f"the {name} mask fills {np.mean(a > 0):.0%} of the volume: inverted, or another structure"
             for name, a in masks.items() if np.mean(a > 0) > WIDEST[name]]
    if lobe is not None:
        found += faults_of_lobes(lobe)
    doubts, hu = [], {}
    if ct is not None:
        hu = {name: np.median(ct[a > 0]) for name, a in masks.items() if (a > 0).any()}
    if hu.get("lobe", -1000) > -100:
        found.append(f"the CT has {hu['lobe']:g} HU in the lobes (median), where air should be")
    if hu.get("airway", -1000) > -300:
        doubts.append(f"the CT has {hu['airway']:g} HU in the airways (median), where air should be")
    if "vessel" in hu and hu["vessel"] <= min(hu.get("lobe", -1000), -800):
        doubts.append(f"the CT has {hu['vessel']:g} HU in the vessels (median), no more than in the lungs")
    alone = ct is None and lobe is None                                  # of airways or vessels alone little is known
    return ([], found) if alone else (found, doubts)


def faults_of_lobes(lobe):
    """How lobes lie to each other; those of one lung alone tell little."""
    at = {}                                                              # label: centre (d,h,w)
    for label in range(1, 6):
        where = np.argwhere(lobe == label)
        if len(where) > 8:
            at[label] = where.mean(0)
    left, right = ([at[label][2] for label in side if label in at] for side in LUNGS)
    found = []
    if left and right and np.mean(left) < np.mean(right):
        found.append("labels 1 and 2 (LUL, LLL) lie on the right of 3 to 5 (RUL, RML, RLL): mirrored, or numbered in "
                     "another order")
    for name, a, other, b, axis in ORDER:
        if a in at and b in at and at[a][axis] < at[b][axis]:
            found.append(f"label {a} ({name}) lies {('below', 'behind')[axis]} label {b} ({other}): turned, or "
                         "numbered in another order")
    return found


def faults_of_places(volumes):
    """Masks with the CT's voxels in another place, as when they are saved without its affine.
    volumes: {name: (array, affine)}   -> list of str"""
    if "ct" not in volumes:
        return []
    (ct, its), found = volumes["ct"], []
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in ct.shape], [1.0])).reshape(4, -1)       # the corners' indices
    for name, (a, affine) in volumes.items():
        if sorted(a.shape) == sorted(ct.shape) and name != "ct":
            apart = np.abs((affine - its) @ ends).max()
            if apart > 2 * np.linalg.norm(its[:3, :3], axis=0).max():
                found.append(f"the {name} mask has the CT's {' x '.join(map(str, ct.shape))} voxels, and another "
                             f"affine: {apart:.0f} mm apart")
    return found


def judge(paths, faults, doubts, as_is):
    """ValueError for faults, unless the user insists; doubts are warned of."""
    said = ", ".join(map(str, paths))
    if faults and not as_is:
        raise ValueError(f"{said}: {'; '.join(faults)}; CT and masks are one patient's, in one place; mend affine or "
                         "labels, or insist with --as-is (situs inversus, a lung removed)")
    if faults + doubts:
        print(f"warning: {said}: {'; '.join(faults + doubts)}", file=sys.stderr)


# --- places ---

def strides(affine):
    """Every how many voxels of a grid, by axis, lie about 4 mm apart: enough to find lungs.   -> (3,) int"""
    return np.maximum(1, np.rint(4 / np.linalg.norm(affine[:3, :3], axis=0))).astype(int)


def lungs_of(ct, affine):
    """The lungs of a CT, any part of a body: the two largest volumes of air inside it, without what is thin.
    ct: (X,Y,Z) HU   -> mask of every n-th voxel, about 4 mm apart, its affine; an empty mask where there are none"""
    from scipy import ndimage
    every = strides(affine)
    air = ct[tuple(slice(None, None, n) for n in every)] < -400
    coarse = affine @ np.diag([*every, 1.0])
    parts, _ = ndimage.label(air)
    outside = np.unique([*parts[[0, -1]].ravel(), *parts[:, [0, -1]].ravel()])     # a scan may end in lungs
    inside = ndimage.binary_opening(air & ~np.isin(parts, outside), iterations=2)  # no trachea
    parts, _ = ndimage.label(inside)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    litre = 1e6 / abs(np.linalg.det(coarse[:3, :3]))
    large = np.isin(parts, [k for k in np.argsort(-sizes)[:2] if sizes[k] > max(0.1 * litre, 0.2 * sizes.max())])
    return ndimage.binary_dilation(large, iterations=6, mask=air), coarse            # thin edges again


def fault_of_orientation(ct, affine):
    """Whether a chest lies as its axes say, for files that do not tell: the lungs beside each other and narrower above,
    the spine behind, the aorta on its left.   ct: (X,Y,Z) HU in RAS+ order   -> str, '' if nothing speaks against it"""
    lungs, coarse = lungs_of(ct, affine)
    edges = np.linalg.norm(coarse[:3, :3], axis=0)                       # mm of these voxels
    every = strides(affine)
    spans = [np.flatnonzero(lungs.any(tuple({0, 1, 2} - {k})))[[0, -1]] for k in range(3)] if lungs.any() else []
    if not spans or min(b - a for a, b in spans) < 8:
        return "no two lungs in it"
    box = tuple(slice(a, b + 1) for a, b in spans)
    lungs, hu = lungs[box], ct[tuple(slice(None, None, n) for n in every)][box]
    X, Y, Z = lungs.shape

    def wide(shares):
        at = [np.flatnonzero(lungs[:, :, int(f * Z)].any(1)) for f in shares]
        return np.mean([x[-1] - x[0] for x in at if len(x)] or [0])

    middle = slice(int(0.35 * X), int(0.65 * X))
    bone = (hu[middle] > 150).mean(2)                                    # (x,y): share of slices
    x, y = np.argwhere(bone == bone.max()).mean(0) + (middle.start, 0)
    mm, y = (np.arange(X) - x) * edges[0], int(y)                        # from the spine to the right
    beside = ~lungs[:, y:y + int(35 / edges[1]), int(0.1 * Z):int(0.7 * Z)]          # soft, before the spine
    left, right = (beside[(10 < side * mm) & (side * mm < 45)].mean() for side in (-1, 1))
    sides, between = lungs[[int(0.25 * X), int(0.75 * X)]].mean(), lungs[int(0.45 * X):int(0.55 * X)].mean()
    seen = {"the lungs do not lie beside each other": between > 0.5 * sides,
            "no spine along it": bone.max() < 0.6,
            "the spine lies in front": y > 0.45 * Y,
            "the lungs are narrower below": wide((0.86, 0.9, 0.94)) > wide((0.06, 0.1, 0.14)),
            "the aorta lies on the right of the spine": right > left}
    return ", ".join(fault for fault, is_seen in seen.items() if is_seen)


def share_inside(mask, affine, center, fov):
    """How much of a mask lies in the field of view around `center` (world mm).   fov: mm (D,H,W)   -> 0 to 1"""
    every = 1 + int((mask.size // 10_000_000) ** (1 / 3))                # thousands tell as much
    where = np.argwhere(mask[::every, ::every, ::every]) * every
    apart = np.abs(where @ affine[:3, :3].T + affine[:3, 3] - center)
    return float((apart <= np.array(fov[::-1]) / 2).all(1).mean())


def box_center(mask, affine):
    """World mm of the centre of the bounding box of mask > 0, along the array's axes.   -> (3,)"""
    spans = [np.flatnonzero((mask > 0).any(tuple({0, 1, 2} - {k})))[[0, -1]] for k in range(3)]
    return affine[:3, :3] @ [s.mean() for s in spans] + affine[:3, 3]


def without_stray(lungs):
    """A mask of lungs without specks, parts below a thousandth of the largest, which would widen their box."""
    from scipy import ndimage
    every = 1 + int((lungs.size // 10_000_000) ** (1 / 3))               # parts of millions of voxels tell as much
    parts, n = ndimage.label(lungs[::every, ::every, ::every], np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    if n < 2 or sizes[sizes > 0].min() >= sizes.max() / 1000:
        return lungs
    stay = ndimage.binary_dilation((sizes >= sizes.max() / 1000)[parts], iterations=2)
    for axis, size in enumerate(lungs.shape):
        stay = stay.repeat(every, axis).take(range(size), axis)
    return lungs & stay


def field_of_view(volumes, paths, fov, center=None):
    """Where the field of view lies, and a warning for what it cuts. Its centre is that of the lungs, by the lobe mask
    or else the CT; without them that of the first volume, or, if the field would cut it there, of the mask.
    volumes: {name: (array, affine)}   -> world mm (3,)"""
    seen = {name: (a > 0, affine) for name, (a, affine) in volumes.items() if name != "ct"}
    if "ct" in volumes and "lobe" not in seen:
        seen["ct"] = lungs_of(*volumes["ct"])
    seen = {name: it for name, it in seen.items() if it[0].any()}
    if center is None and ("lobe" in seen or "ct" in seen):
        lungs, affine = seen["lobe" if "lobe" in seen else "ct"]
        center = box_center(without_stray(lungs), affine)
    elif center is None:
        name, (array, affine) = next(iter(volumes.items()))
        center = box_center(np.ones(array.shape, bool), affine)
        if name in seen and share_inside(*seen[name], center, fov) < 0.99:
            center = box_center(*seen[name])
    size = " x ".join(f"{f:g}" for f in fov[::-1])
    for name, it in seen.items():
        share = share_inside(*it, center, fov)
        if 0 < share < 0.99:                                             # 0 is an error of its own
            what = "lungs" if name in ("ct", "lobe") else name
            print(f"warning: {paths[name]}: {1 - share:.0%} of the {what} lie outside the field of view, {size} mm",
                  file=sys.stderr)
    return center
