"""The paper's measurements (sec. 5, tables 1 to 7), for anybody's volumes: folders of NIfTI in; a table, a CSV and a figure out.

    python evaluate.py fid REAL FAKE --weights resnet_50.pth       # FID and MMD (table 1), with the real-vs-real floor beside
    python evaluate.py airway FOLDER [FOLDER]                      # mm^3, and a one-tailed t-test between two folders (table 1)
    python evaluate.py effusion FOLDER ...                         # mL (tables 2, 7)
    python evaluate.py laa FOLDER ...                              # %LAA-950 (table 3)
    python evaluate.py ctr FOLDER ...                              # cardiothoracic ratio (table 4, fig. 5)
    python evaluate.py dice REF SEG [SEG]                          # Dice by structure and lobe (table 5)
    python evaluate.py prompts examples/prompts.txt --n 4          # samples of prompt pairs, measured (tables 2 to 4)
    python evaluate.py phantoms                                    # the measurers against the truth of 100 fresh phantoms
    python evaluate.py augment REAL.csv SYNTHETIC.csv              # 5-fold accuracy and F1 with synthetic samples added (table 6)

A FOLDER holds one folder a case, as sample.py and TotalSegmentator write them: ct, lobe, airway, vessel, heart, thorax, effusion .nii.gz.
Masks that are not there are made by --segment phantom (airway, effusion, heart and thorax by thresholds from CT and lobes, for phantoms only) or
--segment totalseg (airway, effusion and heart by its public command, if installed); others must be there.
"""
import argparse
import csv
import hashlib
import io
import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import FOV, LOBES, MASKS, choose_device, encode, exits, grid_affine, load_channel, load_nifti, pyplot, read_report, resample, write_atomic

# A structure's file names, ours first, then TotalSegmentator's or what may stand in.
FILES = {"ct": ["ct"], "lobe": ["lobe"], "vessel": ["vessel", "lung_vessels"], "airway": ["airway", "lung_trachea_bronchia"], "heart": ["heart"],
         "thorax": ["thorax", "lung", "lobe"], "effusion": ["effusion", "pleural_effusion"], "lung": ["lung", "lobe"]}
COLUMNS = ("folder", "case", "measure", "value", "unit")                                         # of the CSV with every single value
TASKS = {"airway": "lung_vessels", "effusion": "pleural_pericard_effusion", "heart": "total"}    # TotalSegmentator's task for each


# --- files ---

def case_folders(folder):
    """Sub-folders that hold NIfTI files, or the folder itself if it does.   -> sorted list"""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; it holds one folder of NIfTI files a case; check the path")
    found = sorted({p.parent for p in folder.glob("[!.]*/*.nii*")}) or ([folder] if any(folder.glob("*.nii*")) else [])
    if not found:
        raise ValueError(f"{folder}: no */*.nii.gz in it; measurements need volumes; sample some with sample.py")
    return found


def file_of(case, name):
    """The NIfTI of that name, compressed or not, or None."""
    return next((p for end in (".nii.gz", ".nii") if (p := case / (name + end)).is_file()), None)


def read(case, name, segment="none"):
    """One structure of a case.   -> array (X,Y,Z) in RAS+ order, affine"""
    names = FILES[name][:1] if segment == "phantom" else FILES[name]      # thresholds know a phantom's thorax better than its lungs do
    path = next((p for n in names if (p := file_of(case, n))), None)
    if path is None and segment == "totalseg" and name in TASKS:
        totalsegmentator(case, TASKS[name])
        return read(case, name)
    if path is None and segment == "phantom" and name != "ct":
        import phantom
        (ct, affine), (lobe, _) = one_grid(case, ct=read(case, "ct"), lobe=read(case, "lobe"))
        frame = lambda a: np.ascontiguousarray(a[::-1].transpose(2, 1, 0))   # RAS (x,y,z) <-> model (d,h,w): both are this
        masks = phantom.segment(frame(ct), frame(lobe), np.abs(np.diag(affine)[2::-1]))
        return masks[name].transpose(2, 1, 0)[::-1].astype(np.float32), affine
    if path is None:
        raise ValueError(f"{case}: no {FILES[name][0]}.nii.gz; this measurement needs it; segment the CT first" + (", or pass --segment totalseg" if name in TASKS else ""))
    return load_channel(name, path) if name in ("ct", "lobe") else load_nifti(path)


def one_grid(case, **volumes):
    """Volumes (array, affine) of a case by name, which must lie on one grid.   -> the volumes"""
    (first, its), *others = volumes.values()
    if any(a.shape != first.shape or not np.allclose(affine, its, atol=1e-3) for a, affine in others):
        raise ValueError(f"{case}: {', '.join(f'{name} {a.shape}' for name, (a, _) in volumes.items())}, of different shapes or places; one grid is needed; segment this very CT")
    return volumes.values()


def totalsegmentator(case, task):
    """Masks of a case's CT by the public command, into the case's folder."""
    command = shutil.which("TotalSegmentator")
    if command is None:
        raise ValueError("TotalSegmentator is not installed; --segment totalseg calls it; pip install TotalSegmentator, or put the masks beside the CT")
    done = subprocess.run([command, "-i", str(file_of(case, "ct")), "-o", str(case), "-ta", task])
    if done.returncode:
        raise RuntimeError(f"{case}: TotalSegmentator, task {task}, ended with code {done.returncode}; its own words stand above")


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
    """The mask on a grid along the world's axes, so that an axial level is one; as it is if it lies so already.   -> array, voxel (3,) mm"""
    size = np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(affine[:3, :3] - np.diag(np.diag(affine)[:3])).max() < 1e-3 * size.min():
        return mask > 0, size
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in mask.shape]), -1).reshape(-1, 3) @ affine[:3, :3].T + affine[:3, 3]
    A = np.diag([size.min()] * 3 + [1.0])
    A[:3, 3] = corners.min(0)
    shape = np.ceil(np.ptp(corners, axis=0) / size.min()).astype(int) + 1
    return resample(mask, affine, A, tuple(shape), linear=False) > 0.5, np.full(3, size.min())


def ctr(heart, thorax, affine):
    """Table 4: widest heart over widest thorax on the same axial level, that of the widest heart. Widths in mm, right to left."""
    (heart, voxel), (thorax, _) = upright(heart, affine), upright(thorax, affine)

    def widths(mask):                                                    # (X,Y,Z) -> mm at each level
        columns = mask.any(1)
        return np.array([np.ptp(np.flatnonzero(c)) + 1 if c.any() else 0 for c in columns.T]) * voxel[0]
    heart, thorax = widths(heart), widths(thorax)
    level = int(heart.argmax())
    if heart[level] == 0 or thorax[level] == 0:
        raise ValueError("no heart, or no thorax at its level; the ratio needs both; segment them again")
    return float(heart[level] / thorax[level])


def dice(a, b):
    """2 |a & b| / (|a| + |b|); 1 if both are empty."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum())) if a.any() or b.any() else 1.0


def measure(command, case, segment):
    """One number of one case."""
    if command == "airway":
        return volume_mm3(*read(case, "airway", segment))
    if command == "effusion":
        return volume_mm3(*read(case, "effusion", segment)) / 1000
    if command == "laa":
        (ct, _), (lung, _), (airway, _) = one_grid(case, ct=read(case, "ct"), lung=read(case, "lung"), airway=read(case, "airway", segment))
        return laa950(ct, lung, airway)
    (heart, affine), (thorax, _) = one_grid(case, heart=read(case, "heart", segment), thorax=read(case, "thorax", segment))
    return ctr(heart, thorax, affine)


UNITS = {"airway": "mm3", "effusion": "mL", "laa": "percent", "ctr": "ratio"}


def spread(values):
    """Standard deviation of a sample; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def measures(args):
    """A measurement of every case of one or more folders.   -> rows for the CSV"""
    groups = [[(c.name, measure(args.command, c, args.segment)) for c in tqdm(case_folders(f), desc=str(f), leave=False)] for f in args.folders]
    rows = [dict(folder=f, case=name, measure=args.command, value=value, unit=UNITS[args.command]) for f, g in zip(args.folders, groups) for name, value in g]
    print(f"{'folder':32} {'n':>4} {'mean':>10} {'sd':>10} {'median':>10}   {args.command}, {UNITS[args.command]}")
    for folder, group in zip(args.folders, groups):
        v = np.array([value for _, value in group])
        print(f"{folder:32} {len(v):4d} {v.mean():10.4g} {spread(v):10.4g} {np.median(v):10.4g}")
    if len(groups) == 2 and min(map(len, groups)) > 1:
        from scipy.stats import ttest_ind
        (high, a), (low, b) = sorted(zip(args.folders, ([value for _, value in g] for g in groups)), key=lambda g: -np.mean(g[1]))
        t = ttest_ind(a, b, equal_var=False, alternative="greater")
        print(f"one-tailed two-sample t-test (Welch), {high} above {low}: t = {t.statistic:.2f}, p = {t.pvalue:.2g}; the direction is the data's, two-tailed p = {2 * t.pvalue:.2g}")
    histogram(args.figure, {f: [v for _, v in g] for f, g in zip(args.folders, groups)}, f"{args.command}, {UNITS[args.command]}")
    return rows


def compare(args):
    """Table 5: Dice of every structure and lobe, reference against one or two segmentations, paired by folder name."""
    rows, folders = [], [{c.name: c for c in case_folders(f)} for f in args.folders]
    shared = [name for name in folders[0] if all(name in there for there in folders)]          # so that two segmentations are judged on the same cases
    if not shared:
        raise ValueError(f"{', '.join(args.folders)}: no case of the same name in all; pairs go by folder name; rename them")
    left_out = sorted({name for there in folders for name in there} - set(shared))
    if left_out:
        print(f"warning: {len(left_out)} case(s) left out, which are not in every folder: {', '.join(left_out[:3])}", file=sys.stderr)
    every = [there[name] for there in folders for name in shared]
    structures = [name for name in MASKS if all(any(file_of(case, n) for n in FILES[name]) for case in every)]
    if not structures:
        raise ValueError(f"{', '.join(args.folders)}: no airway, lobe or vessel mask that every case has; a structure is compared where all have it; add the missing masks")
    if len(structures) < len(MASKS):
        print(f"warning: only {', '.join(structures)} compared; not every case has the other masks", file=sys.stderr)
    for seg, theirs in zip(args.folders[1:], folders[1:]):
        for case in (folders[0][name] for name in shared):
            for name in structures:
                ref, affine = read(case, name)
                got, its = read(theirs[case.name], name)
                if got.shape != ref.shape or not np.allclose(its, affine, atol=1e-3):
                    got = resample(got, its, affine, ref.shape, linear=False)
                labels = {name: None, **({n: i + 1 for i, n in enumerate(LOBES)} if name == "lobe" else {})}
                for label, i in labels.items():
                    d = dice(*((a > 0 if i is None else a == i) for a in (ref, np.rint(got))))
                    rows.append(dict(folder=seg, case=case.name, measure=f"dice {label}", value=d, unit="1"))
    names = list(dict.fromkeys(r["measure"] for r in rows))
    print(f"{'':14}" + "".join(f"{seg[-24:]:>26}" for seg in args.folders[1:]))
    values = {(seg, n): [r["value"] for r in rows if r["folder"] == seg and r["measure"] == n] for seg in args.folders[1:] for n in names}
    for n in names:
        print(f"{n:14}" + "".join(f"{np.mean(values[seg, n]):18.3f} ± {spread(values[seg, n]):.3f}" for seg in args.folders[1:]))
    return rows


def histogram(path, groups, label):
    """Distributions side by side (fig. 5)."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6, 3.5))
    edges = np.histogram_bin_edges(np.concatenate([np.ravel(v) for v in groups.values()]), 20)
    for name, values in groups.items():
        ax.hist(values, edges, alpha=0.5, density=True, label=f"{name} (n={len(values)})".replace("$", r"\$"))
    ax.set_xlabel(label), ax.set_ylabel("density"), ax.legend()
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=100, bbox_inches="tight"))
    plt.close(fig)


def dots(path, rows):
    """Every value of a table as a dot: a panel for each unit, in it a column for each measure and folder."""
    plt = pyplot()
    panels = {}
    for r in rows:
        panels.setdefault(r["unit"], {}).setdefault((r["measure"], r["folder"]), []).append(r["value"])
    widths = [max(3, 0.8 * len(groups)) for groups in panels.values()]
    fig, axes = plt.subplots(1, len(panels), figsize=(sum(widths), 4), width_ratios=widths, squeeze=False, layout="constrained")
    for ax, (unit, groups) in zip(axes[0], panels.items()):
        for i, values in enumerate(groups.values()):
            ax.plot([i] * len(values), values, "o", alpha=0.5)
            ax.plot([i - 0.2, i + 0.2], [np.mean(values)] * 2, "k-")
        ax.set_ylabel(unit)
        ax.set_xticks(range(len(groups)), [f"{measure}\n{folder[-36:]}" for measure, folder in groups], rotation=60, ha="right", fontsize=7, parse_math=False)
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=100))
    plt.close(fig)


# --- FID and MMD (table 1) ---

class Bottleneck(nn.Module):
    """1x1x1 -> 3x3x3 -> 1x1x1 with batch norms, plus the input through a 1x1x1 (shortcut B) where shapes change."""

    def __init__(self, cin, width, stride, dilation):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(cin, width, 1, bias=False), nn.BatchNorm3d(width)
        self.conv2, self.bn2 = nn.Conv3d(width, width, 3, stride, dilation, dilation, bias=False), nn.BatchNorm3d(width)
        self.conv3, self.bn3 = nn.Conv3d(width, 4 * width, 1, bias=False), nn.BatchNorm3d(4 * width)
        change = stride != 1 or cin != 4 * width
        self.downsample = nn.Sequential(nn.Conv3d(cin, 4 * width, 1, stride, bias=False), nn.BatchNorm3d(4 * width)) if change else nn.Identity()

    def forward(self, x):
        h = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))


class ResNet50(nn.Module):
    """MedicalNet's 3D ResNet-50 (Med3D): layers 3 and 4 keep the resolution, with dilations 2 and 4.   (B,1,D,H,W) -> (B,2048)"""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(1, 64, 7, 2, 3, bias=False), nn.BatchNorm3d(64)
        cin = 64
        for i, (width, blocks, stride, dilation) in enumerate([(64, 3, 1, 1), (128, 4, 2, 1), (256, 6, 1, 2), (512, 3, 1, 4)], 1):
            setattr(self, f"layer{i}", nn.Sequential(*[Bottleneck(cin if j == 0 else 4 * width, width, stride if j == 0 else 1, dilation) for j in range(blocks)]))
            cin = 4 * width

    def forward(self, x):
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3, 4))


def feature_net(weights):
    """-> network, its name. Without weights, a seeded random network: good for tests and demos, no figure to compare with the paper's."""
    torch.manual_seed(0)
    net = ResNet50().eval()
    if weights is None:
        return net, "random"
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as e:                                               # whatever a broken or hostile pickle raises
        raise ValueError(f"{weights}: not readable as plain tensors ({type(e).__name__}); MedicalNet's resnet_50.pth is needed; download it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {str(k).removeprefix("module."): v for k, v in state.items()} if isinstance(state, dict) else {}
    unused = lambda k: k.startswith("conv_seg") or k.endswith("num_batches_tracked")      # of another task; of training
    state, own = ({k: v for k, v in weights.items() if not unused(k)} for weights in (state, net.state_dict()))
    wrong = [k for k in own.keys() | state.keys() if k not in own or not torch.is_tensor(state.get(k)) or state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{weights}: {len(wrong)} weights missing, unknown or of another shape, such as {min(wrong)}; MedicalNet's ResNet-50 is needed; name that file")
    net.load_state_dict(state, strict=False)
    return net, hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]


@torch.no_grad()
def features(folder, net, name, edge, device):
    """The CTs of a folder -> (n,2048), kept in features_<name>_<edge>.npz beside them, by path, size and time of change.

    Protocol of HA-GAN's evaluation: [-1,1] of the HU window, edge^3 (256), no z-normalisation.
    """
    store = Path(folder) / f"features_{name}_{edge}.npz"
    try:
        known = dict(np.load(store)) if store.exists() else {}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{store}: not readable ({e}); it only saves time; remove it") from None
    out, new = [], 0
    for case in tqdm(case_folders(folder), desc=f"features of {folder}", leave=False):
        path = file_of(case, "ct")
        key = f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" if path else None
        if key not in known:                                             # without a CT, read says so
            ct = torch.from_numpy(encode("ct", read(case, "ct")[0])).permute(2, 1, 0)[None, None]      # (1,1,D,H,W)
            if ct.shape[2:] != (edge,) * 3:
                ct = F.interpolate(ct, (edge,) * 3, mode="trilinear")
            known[key], new = net(ct.to(device))[0].cpu().numpy(), new + 1
        out.append(known[key])
    if new:
        try:
            write_atomic(store, lambda f: np.savez(f, **known))
        except OSError as e:
            print(f"warning: {store}: cannot be written ({e.strerror}); next time the features are computed anew", file=sys.stderr)
    return np.stack(out)


def frechet(a, b):
    """FID = |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2), A and B covariances.   a: (n,F), b: (m,F)

    With centred, scaled features A = X'X and B = Y'Y, and tr (A B)^(1/2) is the nuclear norm of X Y': no matrix root of 2048 x 2048.
    X and Y may be replaced by the R of their QR, which has at most F rows.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    x, y = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (a, b))
    x, y = (np.linalg.qr(v, mode="r") for v in (x, y))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc"))


def mmd2(a, b):
    """Unbiased squared MMD with an RBF kernel exp(-d^2 / (2 s^2)), s the median distance of the pooled set.   a: (n,F), b: (m,F)"""
    z, n, m = np.concatenate([a, b]).astype(np.float64), len(a), len(b)
    sq = (z**2).sum(1)
    d2 = np.maximum(sq[:, None] + sq - 2 * z @ z.T, 0)
    k = np.exp(-d2 / (2 * np.median(d2[np.triu_indices(n + m, 1)])))
    np.fill_diagonal(k, 0)
    return float(k[:n, :n].sum() / (n * (n - 1)) + k[n:, n:].sum() / (m * (m - 1)) - 2 * k[:n, n:].mean())


def fid(args):
    """Table 1: FID and MMD of two folders, and of the real one's halves, which is as near as a perfect generator gets with so few."""
    counts = [len(case_folders(f)) for f in args.folders]
    if min(counts[0] // 2, counts[1]) < 2:
        raise ValueError(f"{counts[0]} real and {counts[1]} fake volumes; at least 4 and 2 are needed; the paper takes 1,024")
    if args.edge < 8:
        raise ValueError(f"--edge {args.edge}; at least 8 voxels are needed; 256 is the paper's")
    device = torch.device(choose_device(args.device))
    net, name = feature_net(args.weights)
    net.to(device)
    real, fake = (features(f, net, name, args.edge, device) for f in args.folders)
    half = np.random.default_rng(0).permutation(len(real))
    n = min(len(real) // 2, len(fake))
    pairs = {"real vs fake": (real, fake), f"real vs fake, {n} each": (real[half[:n]], fake[:n]), f"real vs real, {n} each": (real[half[:n]], real[half[n:2 * n]])}
    print(f"features: {'MedicalNet ResNet-50 ' + name if args.weights else 'RANDOM network, not comparable with the paper'}, {args.edge}^3")
    print(f"{'':26}{'FID':>12}{'MMD^2':>12}")
    rows = []
    for pair, (a, b) in pairs.items():
        values = dict(FID=frechet(a, b), MMD2=mmd2(a, b))
        print(f"{pair:26}{values['FID']:12.5f}{values['MMD2']:12.5f}")
        rows += [dict(folder=" ".join(args.folders), case=pair, measure=f"{k} ({name})", value=v, unit="1") for k, v in values.items()]
    return rows


# --- the measurers themselves, on phantoms whose truth is known ---

def measure_phantom(ct, lobe):
    """All measurements of a phantom, or of a sample of a network trained on phantoms.   ct: HU, lobe: labels, (G,G,G) of the model's frame   -> {name: number}"""
    import phantom
    A = grid_affine(len(ct))[:, [2, 1, 0, 3]]                            # index (w,h,d) -> world
    ct, lobe, found = ct.transpose(2, 1, 0), lobe.transpose(2, 1, 0), phantom.segment(ct, lobe, [f / len(ct) for f in FOV])
    found = {k: v.transpose(2, 1, 0) for k, v in found.items()}
    right, left = np.split(found["effusion"], 2)                         # W grows towards the patient's left
    return dict(airway=volume_mm3(found["airway"], A), effusion=volume_mm3(found["effusion"], A) / 1000, laa=laa950(ct, lobe, found["airway"]),
                ctr=ctr(found["heart"], found["thorax"], A) if found["heart"].any() else 0.0,
                left=volume_mm3(left, A) / 1000, right=volume_mm3(right, A) / 1000)


def phantoms(args):
    """Fresh phantoms, segmented by thresholds and measured, against the numbers they were drawn with: Pearson's r and mean error."""
    import phantom
    if args.n < 2 or args.grid < 32 or args.grid % 8 or args.seed < 0:
        raise ValueError(f"--n {args.n}, --grid {args.grid}, --seed {args.seed}; at least 2 phantoms, a multiple of 8 from 32 on, and a seed not negative are needed; 100, 128 and 90000 are usual")
    rows, truth = [], {name: [] for name in UNITS}
    for seed in tqdm(range(args.seed, args.seed + args.n), leave=False):
        case = phantom.make(seed, args.grid, "held-out")
        got = measure_phantom(case["ct"], case["lobe"])
        for name, key in (("airway", "airway_mm3"), ("effusion", "effusion_ml"), ("laa", "laa950_percent"), ("ctr", "ctr")):
            truth[name].append((case["truth"][key], got[name]))
            rows.append(dict(folder="phantoms", case=seed, measure=name, value=got[name], unit=UNITS[name]))
    for name, pairs in truth.items():
        a, b = np.array(pairs).T
        print(f"{name:10} r = {np.corrcoef(a, b)[0, 1]:.4f}   mean |error| {np.abs(a - b).mean():.4g}, largest {np.abs(a - b).max():.4g} {UNITS[name]}")
    return rows


# --- obedience to prompts (tables 2 to 4) ---

def prompts(args):
    """Samples of pairs of prompts, each measured; a line of the file is `measure | prompt without | prompt with`."""
    import sample
    rows = []
    lines = [line.split("|") for line in read_report(args.file).splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        if len(line) != 3 or line[0].strip() not in UNITS:
            raise ValueError(f"{args.file}: {'|'.join(line)!r}; a line is `measure | prompt | prompt`, measure one of {', '.join(UNITS)}; mend it")
    if not lines or args.n < 1:
        raise ValueError(f"{args.file}, --n {args.n}: {len(lines)} pairs of prompts, {args.n} samples each; at least one of either is needed; change them")
    print(f"{'measure':20}{'prompt':64}{'n':>4}{'mean':>10} ± sd")
    for i, (command, *texts) in enumerate(lines):
        for j, text in enumerate(texts):
            out = Path(args.out) / f"pair{i}_{'ab'[j]}"
            asked = [f"--prompt={text.strip()}", "--samples", str(args.n), "--out", str(out), *(["--model", args.model] if args.model else []), *shlex.split(args.options)]
            record = out / "asked.json"
            made = list(out.glob("[!.]*/ct.nii.gz"))
            if out.exists() and not (record.is_file() and (not made or json.loads(record.read_text()) == asked)):
                raise ValueError(f"{out}: exists, and was not asked for by this command, which may still run; samples are not replaced silently; choose another --out or remove {out}")
            if len(made) != args.n:                                      # none yet, or this command was interrupted
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir(parents=True)
                write_atomic(record, json.dumps(asked).encode())
                sample.main(asked)
            values = [measure(command.strip(), case, args.segment) for case in case_folders(out)]
            print(f"{command.strip() + ', ' + UNITS[command.strip()]:20}{text.strip()[:62]:64}{len(values):4d}{np.mean(values):10.3g} ± {spread(values):.3g}")
            rows += [dict(folder=str(out), case=text.strip(), measure=command.strip(), value=v, unit=UNITS[command.strip()]) for v in values]
    return rows


# --- do synthetic samples help a classifier? (table 6) ---

class SmallCNN(nn.Sequential):
    """Four strided convolutions and a mean.   (B,1,32,32,32) -> (B,classes)"""

    def __init__(self, classes):
        layers, widths = [], (1, 16, 32, 64, 64)
        for cin, cout in zip(widths, widths[1:]):
            layers += [nn.Conv3d(cin, cout, 3, 2, 1), nn.GroupNorm(8, cout), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, classes))


def labelled(path):
    """CSV of `file,label` (files relative to it) -> (n,1,32,32,32) in [-1,1], (n,) labels as strings"""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:          # spreadsheets put a mark first
            rows = list(csv.DictReader(f))
    except (csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: no CSV in UTF-8 ({e}); a line names a CT and its class; save it again") from None
    if not rows or not all(r.get("file") and r.get("label") for r in rows):
        raise ValueError(f"{path}: no columns file,label, or a line without one; a line names a CT and its class; mend it")
    small = lambda ct: F.interpolate(torch.from_numpy(encode("ct", ct))[None, None], (32, 32, 32), mode="trilinear")
    volumes = [small(load_channel("ct", Path(path).parent / r["file"])[0]) for r in tqdm(rows, desc=str(path), leave=False)]
    return torch.cat(volumes), [r["label"] for r in rows]


def classify(x, y, x_test, y_test, classes, seed, epochs=30):
    """Trains a SmallCNN.   -> accuracy, F1 (mean over classes) on the test part"""
    torch.manual_seed(seed)
    net = SmallCNN(classes)
    steps = epochs * -(-len(x) // 16)
    opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for step in range(steps):
        pick = torch.randint(len(x), (16,))
        batch = x[pick] + 0.05 * torch.randn(16, 1, 1, 1, 1)
        F.cross_entropy(net(torch.roll(batch, tuple(torch.randint(-2, 3, (3,)).tolist()), (2, 3, 4))), y[pick]).backward()
        opt.step(), opt.zero_grad(), schedule.step()
    with torch.no_grad():
        guess = net.eval()(x_test).argmax(1)
    f1 = [2 * ((guess == c) & (y_test == c)).sum() / ((guess == c).sum() + (y_test == c).sum()).clamp(min=1) for c in range(classes)]
    return (guess == y_test).float().mean().item(), torch.stack(f1).mean().item()


def augment(args):
    """Table 6: 5-fold classification of real volumes, trained on the real ones alone and with synthetic ones added."""
    (x, labels), (xs, labels_s) = labelled(args.real), labelled(args.synthetic)
    names = sorted(set(labels))
    if len(names) < 2 or set(labels_s) - set(names) or min(labels.count(n) for n in names) < 5:
        raise ValueError(f"classes {names} and {sorted(set(labels_s))}; at least 2, the same in both, 5 real volumes in each; mend the CSVs")
    y, ys = (torch.tensor([names.index(n) for n in ls]) for ls in (labels, labels_s))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(args.seed))
    fold = torch.empty(len(y), dtype=torch.long)
    for c in range(len(names)):                                          # every fold has its share of every class
        members = order[y[order] == c]
        fold[members] = torch.arange(len(members)) % 5
    rows = []
    for title, extra, extra_y in (("real", x[:0], y[:0]), ("real + synthetic", xs, ys)):
        scores = [classify(torch.cat([x[fold != k], extra]), torch.cat([y[fold != k], extra_y]), x[fold == k], y[fold == k], len(names), args.seed + k) for k in range(5)]
        mean, sd = np.mean(scores, 0), np.std(scores, 0, ddof=1)
        print(f"{title:18} accuracy {mean[0]:.1%} ± {sd[0]:.1%}   F1 {mean[1]:.3f} ± {sd[1]:.3f}")
        rows += [dict(folder=title, case=f"fold {k}", measure=m, value=v, unit="1") for k, s in enumerate(scores) for m, v in zip(("accuracy", "F1"), s)]
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sub = p.add_subparsers(dest="command", required=True)

    def command(name, run, folders=None, help=""):
        q = sub.add_parser(name, help=help, allow_abbrev=False)
        if folders:
            q.add_argument("folders", nargs=folders, metavar="FOLDER")
        q.add_argument("--csv", default=f"{name}.csv", help="every single value, one a line")
        q.add_argument("--figure", default=f"{name}.png", help="the values as a picture")
        q.set_defaults(run=run)
        return q
    q = command("fid", fid, 2, "FID and MMD of two folders")
    q.add_argument("--weights", help="MedicalNet's resnet_50.pth; without it a seeded random network, for tests and demos")
    q.add_argument("--edge", type=int, default=256, help="volumes are brought to edge^3 (256 as in the paper)")
    q.add_argument("--device", help="cuda or cpu; default whichever is there")
    for name in UNITS:
        q = command(name, measures, "+", f"{name}, {UNITS[name]}")
        q.add_argument("--segment", default="none", choices=("none", "phantom", "totalseg"), help="how to make masks that are not there")
    command("dice", compare, "+", "Dice of masks, reference first")
    q = command("prompts", prompts, help="samples of prompt pairs, measured")
    q.add_argument("file", help="lines `measure | prompt | prompt`")
    q.add_argument("--n", type=int, default=32, help="samples a prompt (the paper: 32)")
    q.add_argument("--out", default="out/prompts"), q.add_argument("--model")
    q.add_argument("--options", default="", help='further options of sample.py, such as --options="--stop-at-low --solver dpm --low-steps 20": stage 1 alone, quickly')
    q.add_argument("--segment", default="phantom", choices=("none", "phantom", "totalseg"),
                   help="how to make masks that are not sampled: phantom, the default, by thresholds that mean something for networks trained on phantoms alone; totalseg for those trained on patients")
    q = command("phantoms", phantoms, help="the measurers against the truth of fresh phantoms")
    q.add_argument("--n", type=int, default=100), q.add_argument("--grid", type=int, default=128), q.add_argument("--seed", type=int, default=90000)
    q = command("augment", augment, help="5-fold classification with and without synthetic samples")
    q.add_argument("real", metavar="REAL.csv"), q.add_argument("synthetic", metavar="SYNTHETIC.csv"), q.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    with exits():
        if Path(args.csv) == Path(args.figure) or Path(args.csv).is_dir() or Path(args.figure).is_dir():
            raise ValueError(f"--csv {args.csv}, --figure {args.figure}; two files are written; name them")
        if Path(args.csv).exists() and not Path(args.csv).read_bytes().startswith(",".join(COLUMNS).encode()):
            raise ValueError(f"--csv {args.csv}: exists and was not written by this program; nothing of others is replaced; choose another name")
        for path in (args.csv, args.figure):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        if args.command == "dice" and not 2 <= len(args.folders) <= 3:
            raise ValueError(f"{len(args.folders)} folders; dice takes a reference and one or two segmentations; name them")
        rows = args.run(args)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader(), writer.writerows(rows)
        write_atomic(args.csv, text.getvalue().encode())
        if args.command not in UNITS:                                    # those draw distributions
            dots(args.figure, rows)
        print(f"wrote {len(rows)} values to {args.csv}, {args.figure}")


if __name__ == "__main__":
    main()
