"""Cases: a chest CT with lobe, airway and vessel masks and a report, as a folder of arrays that training can map.
Paper sec. 5.1; the window and the grid are the released code's, whose repository is github.com/batmanlab/MedSyn.

    python data.py prepare --ct ct.nii.gz --lobe l.nii.gz --airway a.nii.gz --vessel v.nii.gz --report r.txt \\
        --out data/train/case1
    python data.py check data/train

Arrays are (D,H,W): D inferior -> superior, H posterior -> anterior, W right -> left.
NIfTI goes in through its closest canonical form and comes out RAS+, so that every viewer overlays what comes out on
what went in.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from support.anatomy import faults_of_masks, faults_of_places, field_of_view, judge
from support.checks import UNREADABLE, array_of, check_folder, check_grid, complete, has, load_channel, one_size
from support.cli import Parser, check_center, exits
from support.files import hashes, whole_folder
from support.nifti import resample, save_nifti
from support.pictures import picture
from support.reports import patient, read_report
from support.splits import held_out_patients

CHANNELS = ("ct", "lobe", "airway", "vessel")
MASKS = CHANNELS[1:]
HU = (-1024, 600)                 # window, linear to [-1,1]
FOV = (292.0, 316.0, 316.0)       # mm (D,H,W) whatever the grid: 256^3 gives 1.141 x 1.234 x 1.234 mm; released code
SCALE = 4                         # the low-resolution grid is every fourth voxel of the full one
LOBES = ("LUL", "LLL", "RUL", "RML", "RLL")   # labels 1..5, lungmask's order


# --- values: HU and labels <-> [-1,1] (sec. 5.1) ---

def encode(name, a):
    """HU or labels -> [-1,1] float32: CT by the window, airway, vessel {0,1} -> {-1,1}, lobe 0..5 -> -1, -0.6 ... 1."""
    a = np.asarray(a, np.float32)
    if name == "ct":
        return (a.clip(*HU) - HU[0]) * (2 / (HU[1] - HU[0])) - 1
    return a * (0.4 if name == "lobe" else 2) - 1


def decode(name, x):
    """[-1,1] -> int16 HU, or the nearest label as uint8. RuntimeError if a value is not finite: a cast would hide
    it."""
    x = np.asarray(x, np.float32)
    if not np.isfinite(x).all():
        raise RuntimeError(f"{name}: {np.count_nonzero(~np.isfinite(x))} values are not finite; nothing is written; "
                           "try another seed or float32")
    x = x.clip(-1, 1)
    if name == "ct":
        return np.rint((x + 1) * ((HU[1] - HU[0]) / 2) + HU[0]).astype(np.int16)
    return np.rint((x + 1) / (0.4 if name == "lobe" else 2)).astype(np.uint8)


# --- geometry: the model's grid in the world ---

def grid_affine(grid, center=(0, 0, 0)):
    """Model index (d,h,w) -> world mm (x,y,z) RAS+, for a cubic grid over FOV around `center` (world mm).   -> (4,4)"""
    vd, vh, vw = (f / grid for f in FOV)
    A = np.array([[0, 0, -vw, 0], [0, vh, 0, 0], [vd, 0, 0, 0], [0, 0, 0, 1.0]])
    A[:3, 3] = np.asarray(center) - A[:3, :3] @ np.full(3, (grid - 1) / 2)
    return A


def to_model(paths, grid, center=None, as_is=False):
    """NIfTI files -> arrays of the model's grid.   paths: {"ct": ..., "airway": ...}, any subset, each on any grid

    center: world mm of the field of view's centre; by default the lungs' (of the lobe mask, else of the CT), else the
    first volume's   as_is: masks that do not fit are warned of, not refused   -> {name: (D,H,W) int16 or uint8}, center
    """
    return on_grid({name: load_channel(name, path) for name, path in paths.items()}, paths, grid, center, as_is)


def on_grid(volumes, paths, grid, center=None, as_is=False):
    """The same of volumes that are read.   volumes: {name: (array (X,Y,Z), RAS+ order, affine)}, emptied on the way
    paths: their names"""
    judge(paths.values(), faults_of_places(volumes), [], as_is)
    center = field_of_view(volumes, paths, FOV, center)
    A, out = grid_affine(grid, center), {}
    for name in list(volumes):
        array, affine = volumes.pop(name)                # a scan is large
        fill = HU[0] if name == "ct" else 0
        a = resample(array, affine, A, (grid,) * 3, linear=name == "ct", fill=fill)
        out[name] = np.rint(a.clip(-1024, 3071)).astype(np.int16) if name == "ct" else np.rint(a).astype(np.uint8)
        if (out[name] == fill).all():
            raise ValueError(f"{paths[name]}: no voxel of it lies in the field of view around {np.round(center)}; "
                             "it belongs to another place; pass --center")
    judge(paths.values(), *faults_of_masks(**out), as_is)
    return out, tuple(float(c) for c in center)


def downsample(arrays):
    """Every fourth voxel, in [-1,1] (sec. 5.1: nearest), 0 where a channel is missing.   arrays: {name: (D,H,W)}
    -> (4,D/4,H/4,W/4) float32"""
    low = {c: encode(c, arrays[c][::SCALE, ::SCALE, ::SCALE]) for c in CHANNELS if c in arrays}
    return np.stack([low.get(c, np.zeros_like(low["ct"])) for c in CHANNELS])


def upsample(low):
    """Nearest, x4: the low-resolution volume on the full grid (sec. 4.2.2).   (B,C,D,H,W) -> (B,C,4D,4H,4W)"""
    return F.interpolate(low, scale_factor=SCALE, mode="nearest")


# --- the case folder ---

def write_case(folder, ct, lobe=None, airway=None, vessel=None, report=None, meta=None):
    """One case, whole or not at all; masks and report may be missing, which case.json says.   ct: int16 HU (D,H,W)
    masks: uint8   report: str   meta: what else case.json says"""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder}: exists already; a case is written once; remove it first")
    masks = {c: a.astype(np.uint8) for c, a in zip(MASKS, (lobe, airway, vessel)) if a is not None}
    arrays = dict(ct=ct.astype(np.int16), **masks)
    meta = dict(meta or {}, has=list(arrays), report=report is not None)
    with whole_folder(folder) as part:
        for name, a in {**arrays, "low": downsample(arrays).astype(np.float16)}.items():
            np.save(part / f"{name}.npy", np.ascontiguousarray(a))
        if report is not None:
            (part / "report.txt").write_text(report.strip() + "\n", encoding="utf-8")
        (part / "case.json").write_text(json.dumps(meta | dict(sha256=hashes(part)), indent=1) + "\n")


def cases(folder):
    """The case folders below `folder`, by name."""
    return sorted(p.parent for p in Path(folder).glob("*/ct.npy") if not p.parent.name.startswith("."))


def split_cases(folder, holdout, out=""):
    """-> case folders to train on, up to `holdout` of those that split.json holds out. A patient is on one side."""
    folders = cases(folder)
    apart = held_out_patients(folder, folders, holdout, out)
    held_out = [f for f in folders if patient(f) in apart][-holdout:] if holdout else []
    training = [f for f in folders if patient(f) not in apart]
    if not training:
        raise ValueError(f"{folder}: {len(folders)} cases, and --holdout {holdout} leaves none to train on; "
                         f"a trainer needs cases; make some with `python phantom.py --out {folder} --n 512` or "
                         "`python data.py prepare ...`, or lower --holdout")
    return training, held_out


class Cases(Dataset):
    """A shuffled sequence of cases without end (its len is one epoch): item k is decided by (seed, k) alone, so a run
    resumes anywhere exactly. The 4 below are fewer with fewer `channels`.
    crop None: k, x0 = low.npy (4,g,g,g) in [-1,1], text.npy (N,width)          for stage 1, about 2 MB a case
    crop (d,h,w): k, x0 (4,d,h,w), low (4,d,h,w) by nearest from the low grid   for stage 2, at multiples of `step`
    If any case lacks a mask or a report, also `has`, (5,) bool: channels, text. What a case lacks is 0.
    """

    def __init__(self, folders, seed, crop=None, channels=CHANNELS, step=1):
        self.folders, self.seed, self.crop, self.channels, self.step = folders, seed, crop, channels, step
        complete(folders, (*channels, "low") if crop else ("low", "text"), stage=2 if crop else 1)
        one_size(folders, ("low",) if crop else ("low", "text"))
        self.has = {case: [c in it for c in (*channels, "text")] for case, it in zip(folders, map(has, folders))}
        self.whole = all(all(there) for there in self.has.values())
        self.text_shape = None if crop else next(array_of(f, "text").shape for f in folders if self.has[f][-1])
        low = array_of(folders[0], "low").shape[-1]
        self.grid = low * SCALE if crop else low                         # edge of the whole volume that the stage makes
        if crop and max(crop) > self.grid:
            raise ValueError(f"crop {crop} is larger than the grid {self.grid}; it must lie inside; --preset demo's do")

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, k):
        epoch, i = divmod(k, len(self.folders))
        case = self.folders[np.random.default_rng((self.seed, epoch)).permutation(len(self.folders))[i]]
        try:
            return self.item(k, case)
        except UNREADABLE as e:
            raise RuntimeError(f"{case}: {e}; a case must be whole; run python data.py check {case.parent}") from None

    def item(self, k, case):
        there, rows = self.has[case], [CHANNELS.index(c) for c in self.channels]
        more = () if self.whole else (torch.tensor(there),)
        low = torch.from_numpy(np.load(case / "low.npy")[rows].astype(np.float32))
        if not self.crop:
            text = np.load(case / "text.npy") if there[-1] else np.zeros(self.text_shape)
            return k, low, torch.from_numpy(text.astype(np.float32)), *more
        rng = np.random.default_rng((self.seed, 1, k))
        start = [self.step * int(rng.integers((self.grid - size) // self.step + 1)) for size in self.crop]
        box = tuple(slice(a, a + size) for a, size in zip(start, self.crop))
        d, h, w = (np.arange(a, a + size) // SCALE for a, size in zip(start, self.crop))
        x0 = torch.zeros(len(rows), *self.crop)
        for i, c in enumerate(self.channels):
            if there[i]:
                x0[i] = torch.from_numpy(encode(c, np.load(case / f"{c}.npy", mmap_mode="r")[box]))
        return k, x0, low[:, d][:, :, h][..., w], *more


# --- commands ---

def prepare(args):
    """NIfTI files and a report -> one case folder."""
    check_grid(args.grid)
    check_center(args.center)
    paths = {c: getattr(args, c) for c in CHANNELS if getattr(args, c)}
    report = read_report(args.report) if args.report else None
    arrays, center = to_model(paths, args.grid, args.center, args.as_is)
    voxels = {c: int((a > 0).sum()) for c, a in arrays.items() if c in MASKS}
    meta = dict(source={c: Path(path).name for c, path in paths.items()}, grid=args.grid, center_ras_mm=center,
                affine=grid_affine(args.grid, center).tolist(), voxels=voxels, as_is=args.as_is)
    write_case(args.out, **arrays, report=report, meta=meta)
    volume = np.stack([encode(c, arrays.get(c, np.zeros_like(arrays["ct"]))) for c in CHANNELS])
    picture(Path(args.out) / "preview.png", [volume], [Path(args.out).name], fov=FOV)
    print(f"wrote {args.out}: {args.grid}^3, voxel {[round(f / args.grid, 4) for f in FOV]} mm (D,H,W), "
          f"centre {np.round(center, 1).tolist()} mm, voxels {voxels}")


def export(args):
    """Case folders -> folders of NIfTI on the model's grid, as evaluate.py reads: real volumes to set samples
    beside."""
    folders, out = cases(args.folder), Path(args.out)
    if not folders:
        raise ValueError(f"{args.folder}: no cases in it; a folder of case folders is needed; check the path")
    if out.exists():
        raise ValueError(f"--out {out}: exists already; nothing is replaced silently; choose another")
    for case in tqdm(folders, leave=False):
        center = json.loads((case / "case.json").read_text()).get("center_ras_mm", (0, 0, 0))    # phantoms are nowhere
        (out / case.name).mkdir(parents=True)
        for path in (p for c in CHANNELS if (p := case / f"{c}.npy").is_file()):
            a, c = np.load(path), path.stem
            save_nifti(out / case.name / f"{c}.nii.gz", a, grid_affine(len(a), center))
    print(f"wrote {len(folders)} cases to {out}")


def main(argv=None):
    p = Parser(description=__doc__)
    sub = p.add_subparsers(dest="command", required=True)
    q = sub.add_parser("prepare", help="NIfTI files and a report -> one case folder")
    for name in CHANNELS + ("report",):
        q.add_argument("--" + name, required=name == "ct", metavar="FILE")
    q.add_argument("--out", required=True, metavar="FOLDER", help="the case folder to write")
    q.add_argument("--grid", type=int, default=256, help="256 (the paper's, the default) or 128 (--preset demo)")
    q.add_argument("--center", type=float, nargs=3, metavar=("X", "Y", "Z"),
                   help="centre of the field of view, world mm; default the lungs'")
    q.add_argument("--as-is", action="store_true", help="take masks that do not look like a chest's, with a warning")
    q.set_defaults(run=prepare)

    q = sub.add_parser("check", help="validate a folder of cases")
    q.add_argument("folder")
    q.set_defaults(run=lambda a: check_folder(a.folder, cases(a.folder), downsample))

    q = sub.add_parser("export", help="case folders -> NIfTI on the model's grid")
    q.add_argument("folder")
    q.add_argument("--out", required=True, metavar="FOLDER",
                   help="gets one folder a case, with ct, lobe, airway and vessel .nii.gz")
    q.set_defaults(run=export)
    args = p.parse_args(argv)
    with exits():
        args.run(args)


if __name__ == "__main__":
    main()
