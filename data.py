"""Cases: a chest CT with lobe, airway and vessel masks and a report, as a folder of arrays that training can map.
Paper sec. 5.1; the window and the grid are the released code's; `encode` has the codings.

    python data.py prepare --ct ct.nii.gz --lobe l.nii.gz --airway a.nii.gz --vessel v.nii.gz --report r.txt --out data/train/case1
    python data.py check data/train

Arrays are (D,H,W): D inferior -> superior, H posterior -> anterior, W right -> left.
NIfTI goes in through its closest canonical form and comes out RAS+, so that every viewer overlays the two.
"""
import argparse
import contextlib
import ctypes
import gzip
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

CHANNELS = ("ct", "lobe", "airway", "vessel")
MASKS = CHANNELS[1:]
HU = (-1024, 600)                 # window, linear to [-1,1]
FOV = (292.0, 316.0, 316.0)       # field of view in mm (D,H,W), whatever the grid: 256^3 gives 1.141 x 1.234 x 1.234 mm
SCALE = 4                         # the low-resolution grid is every fourth voxel of the full one
LOBES = ("LUL", "LLL", "RUL", "RML", "RLL")   # labels 1..5, lungmask's order
MAX_BYTES = 4 << 30               # of one NIfTI's voxels; beyond it is a broken or hostile header


@contextlib.contextmanager
def exits():
    """What every command line shares: wrong input is one line and exit code 2, a failure in mid-run is one line and 1, Ctrl-C one line and 130."""
    try:
        yield
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError) as e:
        code = 2
        tqdm.write("error: " + " ".join(str(e).split()), file=sys.stderr)        # on a line of its own, progress bar or not
    except KeyboardInterrupt:
        code = 130
        tqdm.write("stopped; what was finished is kept", file=sys.stderr)
    except (RuntimeError, OSError, MemoryError) as e:
        code = 1
        tqdm.write(f"error: {type(e).__name__}: " + " ".join(str(e).split()), file=sys.stderr)
    else:
        return
    raise SystemExit(code)


def choose_device(name):
    """"cuda" or "cpu" as asked, whichever is there if nothing was."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"--device {name}; cuda or cpu; choose one")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and int(name[5:] or 0) >= there:
        raise ValueError(f"--device {name}; this PyTorch sees {there or 'no'} GPU; leave --device out, or install a CUDA build and its driver")
    return name


def fast_bfloat16(device):
    """Whether the device itself multiplies in bfloat16, the default of every --amp. Others emulate it: a CPU with AVX2 alone, as in most laptops,
    took 70 times as long as in float32, one with AVX-512 but not its BF16 twice. ARM counts as one of these; it was not tried."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return has.get("amx_bf16", False) or has.get("avx512_bf16", False)


def keep_memory():
    """Let glibc keep the memory of freed tensors. It would return it to the system, which zeroes every page again at the next allocation:
    a quarter of the time of everything on a CPU. Elsewhere (no mallopt) nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
    mallopt(-4, 0)                                                       # M_MMAP_MAX: large blocks come from the heap too
    mallopt(-1, 2**31 - 1)                                               # M_TRIM_THRESHOLD: which is not given back


def release_memory():
    """Give memory of freed tensors back to the system, which glibc does by itself only with blocks of more than some 32 MB. Elsewhere nothing happens."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)(0)


# --- values: HU and labels <-> [-1,1] ---

def encode(name, a):
    """HU or labels -> [-1,1] float32: CT by the window, airway and vessel {0,1} -> {-1,1}, lobe 0..5 -> -1, -0.6, ... 1."""
    a = np.asarray(a, np.float32)
    if name == "ct":
        return (a.clip(*HU) - HU[0]) * (2 / (HU[1] - HU[0])) - 1
    return a * (0.4 if name == "lobe" else 2) - 1


def decode(name, x):
    """[-1,1] -> int16 HU, or the nearest label as uint8. RuntimeError if a value is not finite: a cast would hide it."""
    x = np.asarray(x, np.float32)
    if not np.isfinite(x).all():
        raise RuntimeError(f"{name}: {np.count_nonzero(~np.isfinite(x))} values are not finite; nothing is written; try another seed or float32")
    x = x.clip(-1, 1)
    if name == "ct":
        return np.rint((x + 1) * ((HU[1] - HU[0]) / 2) + HU[0]).astype(np.int16)
    return np.rint((x + 1) / (0.4 if name == "lobe" else 2)).astype(np.uint8)


# --- geometry: model grid <-> world ---

def grid_affine(grid, center=(0, 0, 0)):
    """Model index (d,h,w) -> world mm (x,y,z) RAS+, for a cubic grid over FOV around `center` (world mm).   -> (4,4)"""
    vd, vh, vw = (f / grid for f in FOV)
    A = np.array([[0, 0, -vw, 0], [0, vh, 0, 0], [vd, 0, 0, 0], [0, 0, 0, 1.0]])
    A[:3, 3] = np.asarray(center) - A[:3, :3] @ np.full(3, (grid - 1) / 2)
    return A


def resample(array, affine, out_affine, shape, linear, fill=0):
    """An array (any orientation, oblique too) sampled on another grid.   array: (X,Y,Z), affine: its index -> world
    out_affine: output index -> world, shape of the output   linear: trilinear, averaged over sub-voxels where the output
    is coarser (no aliasing); else nearest   fill: the value outside.   -> float32 array of `shape`
    """
    M = np.linalg.inv(affine) @ out_affine                               # output index -> input index
    source = torch.from_numpy(np.ascontiguousarray(array, np.float32))[None, None] - fill
    size = torch.tensor(array.shape, dtype=torch.float64)
    ratio = np.linalg.norm(M[:3, :3], axis=0)                            # input voxels per output voxel, by axis
    subs = [(np.arange(n) + 0.5) / n - 0.5 for n in (np.rint(ratio).clip(1, 4).astype(int) if linear else (1, 1, 1))]
    offsets = np.stack(np.meshgrid(*subs, indexing="ij"), -1).reshape(-1, 3)
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    out = torch.empty(*shape)
    for d in range(0, shape[0], 16):                                     # in slabs: the coordinates are thrice the volume
        ijk = torch.stack(torch.meshgrid(axes[0][d:d + 16], *axes[1:], indexing="ij"), -1)
        total = 0
        for offset in offsets:
            where = (ijk + torch.from_numpy(offset)) @ torch.from_numpy(M[:3, :3].T.copy()) + torch.from_numpy(M[:3, 3])
            where = ((2 * where + 1) / size - 1).flip(-1).float()[None]  # grid_sample's own units, last axis first
            total = total + F.grid_sample(source, where, "bilinear" if linear else "nearest", align_corners=False)[0, 0]
        out[d:d + 16] = total / len(offsets)
    return (out + fill).numpy()


# --- NIfTI ---

def load_nifti(path):
    """A 3D NIfTI in closest canonical (RAS+) order.   -> array (X,Y,Z) float32, affine (4,4)

    ValueError if the file is not whole (nibabel does not check gzip's sum), not 3D, not real-valued, or has no usable geometry.
    """
    import nibabel
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a NIfTI (.nii or .nii.gz) is needed; check the path")
    with open(path, "rb") as f:
        opener = gzip.open if f.read(2) == b"\x1f\x8b" else open         # whatever its name says
    damage = (OSError, EOFError, ValueError, OverflowError, zlib.error, nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError,
              nibabel.orientations.OrientationError)
    try:
        with opener(path, "rb") as f, nibabel.imageglobals.LoggingOutputSuppressor():
            header = nibabel.Nifti1Header.from_fileobj(f, check=True)    # without the voxels yet
        shape, dtype, affine = header.get_data_shape(), header.get_data_dtype(), header.get_best_affine()
    except damage as e:
        raise ValueError(f"{path}: no readable NIfTI-1 header ({e}); a .nii or .nii.gz volume is needed; convert or copy it again") from None
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:          # nibabel would guess, and take the left for the right
        raise ValueError(f"{path}: neither sform nor qform is set; which side is the left is not known; write an affine into the header")
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"{path}: shape {tuple(shape)}; one 3D volume is needed; extract it first")
    if dtype.kind not in "iuf":
        raise ValueError(f"{path}: voxels of type {dtype}; real numbers are needed; convert it first")
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size > MAX_BYTES:
        raise ValueError(f"{path}: the header claims {shape}, {size / 2**30:.0f} GiB; at most {MAX_BYTES >> 30} GiB; crop it or mend the header")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ValueError(f"{path}: its affine is not finite or flat; voxels need a place in the world; mend the header")
    try:
        need = int(header.get_data_offset()) + size
        with opener(path, "rb") as f:
            raw = f.read(need)
            while opener is gzip.open and f.read(1 << 20):               # to its end, where the check sum is
                pass
        if len(raw) < need:
            raise EOFError(f"cut short, {len(raw)} bytes of {need}")
        with np.errstate(over="ignore"), nibabel.imageglobals.LoggingOutputSuppressor():       # what is too large becomes infinite, and is refused below
            image = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(raw))
            array = np.asarray(image.dataobj, np.float32).reshape(image.shape[:3])
    except damage as e:
        raise ValueError(f"{path}: damaged ({e}); the whole file is needed; copy it again") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {np.count_nonzero(~np.isfinite(array))} voxels are NaN or infinite; all must be numbers; mend it first")
    return array, image.affine


def save_nifti(path, array, center=(0, 0, 0)):
    """(D,H,W) int16 HU or uint8 labels -> NIfTI, RAS+, sform and qform code 1, mm. The file appears whole or not at all."""
    import nibabel
    A = grid_affine(len(array), center)
    ras = np.ascontiguousarray(array.transpose(2, 1, 0)[::-1])           # (x,y,z), x towards the right
    flip = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, len(array) - 1], [0, 0, 0, 1.0]])   # (x,y,z) index -> (d,h,w)
    image = nibabel.Nifti1Image(ras, A @ flip)
    image.set_sform(A @ flip, 1)
    image.set_qform(A @ flip, 1)
    image.header.set_xyzt_units("mm")
    write_atomic(path, gzip.compress(image.to_bytes(), 4, mtime=0))


def write_atomic(path, data):
    """Bytes, or what a function writes to a file, to a file that appears whole or not at all: written beside, forced to disk, renamed."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            data(f) if callable(data) else f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_channel(name, path):
    """A CT (HU) or mask NIfTI, checked for its kind.   -> array (X,Y,Z), affine"""
    array, affine = load_nifti(path)
    if name == "ct":
        if array.min() > -500 or array.max() - array.min() < 100:        # air is -1000
            raise ValueError(f"{path}: values {array.min():g} to {array.max():g}; a CT in Hounsfield units is needed; apply the rescale slope first")
        return array, affine
    labels, top = np.unique(array), 5 if name == "lobe" else 1
    if name != "lobe" and len(labels) == 2 and labels[0] == 0:
        array, labels = (array > 0).astype(np.float32), np.array([0, 1])  # {0,255} and the like
    if name == "lobe" and labels[-1] >= 10 and set(labels) <= {0, 10, 11, 12, 13, 14}:
        array, labels = np.where(array > 0, array - 9, 0), np.array([0, 5])  # TotalSegmentator's lobes are lungmask's + 9
    if labels[-1] == labels[0] == 0:
        raise ValueError(f"{path}: the {name} mask is empty; a structure is needed; segment it again (sample.py does without masks)")
    if (labels != np.rint(labels)).any() or labels[0] < 0 or labels[-1] > top:
        raise ValueError(f"{path}: {name} values {labels[0]:g} to {labels[-1]:g}; labels 0..{top} are needed; threshold or relabel it")
    if name == "lobe" and labels[-1] < 3:
        print(f"warning: {path}: labels up to {labels[-1]:g}, so the left lung alone (1 LUL, 2 LLL, 3 RUL, 4 RML, 5 RLL); a mask of both lungs is not one of lobes", file=sys.stderr)
    return array, affine


def box_center(array, affine):
    """World mm of the centre of the bounding box of array > 0, along the array's axes.   -> (3,)"""
    spans = [np.flatnonzero((array > 0).any(tuple({0, 1, 2} - {k})))[[0, -1]] for k in range(3)]
    return affine[:3, :3] @ [s.mean() for s in spans] + affine[:3, 3]


def to_model(paths, grid, center=None):
    """NIfTI files -> arrays of the model's grid.   paths: {"ct": ..., "airway": ...}, any subset, each on any grid

    center: world mm of the field of view's centre; by default the lungs' (the lobe mask's bounding box), else the first volume's.
    -> {name: (D,H,W) int16 or uint8}, center (3 floats)
    """
    volumes = {name: load_channel(name, path) for name, path in paths.items()}
    if center is None:
        array, affine = volumes.get("lobe") or next(iter(volumes.values()))
        center = box_center(array if "lobe" in volumes else np.ones(array.shape, bool), affine)
    A, out = grid_affine(grid, center), {}
    for name, (array, affine) in volumes.items():
        fill = HU[0] if name == "ct" else 0
        a = resample(array, affine, A, (grid,) * 3, linear=name == "ct", fill=fill)
        out[name] = np.rint(a.clip(-1024, 3071)).astype(np.int16) if name == "ct" else np.rint(a).astype(np.uint8)
        if (out[name] == fill).all():
            raise ValueError(f"{paths[name]}: no voxel of it lies in the field of view around {np.round(center)}; it belongs to another place; pass --center")
        if name == "lobe":
            inside = (out[name] > 0).sum() * np.prod(FOV) / grid**3 / ((array > 0).sum() * abs(np.linalg.det(affine[:3, :3])))
            if inside < 0.97:                                            # less is rounding on the coarser grid
                print(f"warning: {paths[name]}: {1 - inside:.0%} of the lungs lie outside the field of view, {' x '.join(f'{f:g}' for f in FOV[::-1])} mm", file=sys.stderr)
    return out, tuple(float(c) for c in center)


def read_safetensors(path):
    """Weights, ours or others'.   -> state dict, what `train_low.export` says about them (kind, args, grid, step, provenance; {} for others')"""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as f:
            state, about = {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {}).get("medsyn", "{}"))
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path}: not readable safetensors ({e}); an LFS pointer or a broken download looks so; check the path or fetch it again") from None
    if about != {} and not (isinstance(about, dict) and isinstance(about.get("args"), dict) and isinstance(about.get("grid"), int) and isinstance(about.get("provenance"), dict)):
        raise ValueError(f"{path}: describes itself as no network of this project; weights that a trainer wrote are needed; name another file")
    return state, about


# --- the case folder ---

def write_case(folder, ct, lobe, airway, vessel, report, meta):
    """One case, whole or not at all.   ct: int16 HU (G,G,G), masks: uint8, report: str, meta: what case.json says"""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder}: exists already; a case is written once; remove it first")
    arrays = dict(ct=ct.astype(np.int16), lobe=lobe.astype(np.uint8), airway=airway.astype(np.uint8), vessel=vessel.astype(np.uint8))
    low = np.stack([encode(c, arrays[c][::SCALE, ::SCALE, ::SCALE]) for c in CHANNELS]).astype(np.float16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        for name, a in {**arrays, "low": low}.items():
            np.save(part / f"{name}.npy", np.ascontiguousarray(a))
        (part / "report.txt").write_text(report.strip() + "\n", encoding="utf-8")
        (part / "case.json").write_text(json.dumps(meta, indent=1) + "\n")
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def cases(folder):
    """The case folders below `folder`, by name."""
    return sorted(p.parent for p in Path(folder).glob("*/ct.npy") if not p.parent.name.startswith("."))


def read_report(path):
    """A report as text. ValueError unless it is a readable text file with words in it, under 1 MB."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > 1 << 20:
        raise ValueError(f"{path}: not a file of at most 1 MB; a report is plain text; check the path")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()              # without the mark that some editors put first
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; a report is plain text; save it as such") from None
    if not any(c.isalpha() for c in re.sub(r"\b(finding|impression|conclusion)s?\s*:", "", text, flags=re.I)) or "\0" in text:
        raise ValueError(f"{path}: no words in it; a report is plain text; write one, or leave the option out")
    return text


def array_of(case, name):
    """One array of a case folder, mapped. ValueError unless it is one."""
    path = case / f"{name}.npy"
    try:
        a = np.load(path, mmap_mode="r")
        if not isinstance(a, np.ndarray) or not a.size:
            raise ValueError("no array, or an empty one")
        return a
    except (ValueError, OSError, EOFError) as e:
        raise ValueError(f"{path}: not readable ({e}); a case is whole; run python data.py check {case.parent}") from None


def faults(case):
    """What is wrong with one case folder, each with its mending.   -> list of str, empty when it is sound"""
    found, shapes = [], {}
    for name, dtype in dict(ct=np.int16, lobe=np.uint8, airway=np.uint8, vessel=np.uint8, low=np.float16, text=np.float16).items():
        if not (case / f"{name}.npy").exists():
            found.append("text.npy missing: run text_encoder.py embed" if name == "text" else f"{name}.npy missing: prepare the case again")
            continue
        try:
            a = array_of(case, name)
        except ValueError:
            found.append(f"{name}.npy unreadable: prepare the case again")
            continue
        shapes[name] = a.shape
        if a.dtype != dtype:
            found.append(f"{name}.npy is {a.dtype}, not {np.dtype(dtype)}: prepare the case again")
        elif name in MASKS:
            top = int(a.max())
            if top > (5 if name == "lobe" else 1) or top == 0:
                found.append(f"{name}.npy has values up to {top}: {'the mask is empty' if top == 0 else 'labels are wrong'}, prepare the case again")
        elif name == "ct" and (a.min() > -500 or a.max() < 0):
            found.append(f"ct.npy spans {a.min()}..{a.max()} HU, not a chest: check the rescale slope")
        elif not np.isfinite(a).all():
            found.append(f"{name}.npy has values that are not finite: make it again")
    grid = shapes.get("ct", (0,))
    if len({shapes[n] for n in CHANNELS if n in shapes}) > 1 or len(grid) != 3 or len(set(grid)) != 1:
        found.append(f"shapes {shapes}: all must be one cube, prepare the case again")
    elif "low" in shapes and shapes["low"] != (4,) + tuple(n // SCALE for n in grid):
        found.append(f"low.npy is {shapes['low']} for a grid of {grid}: prepare the case again")
    elif not found:
        lung = np.median(np.load(case / "ct.npy")[np.load(case / "lobe.npy") > 0])
        if lung > -100:
            found.append(f"ct.npy has {lung:g} HU in the lungs (median), where air should be: check the rescale intercept, or the lobe mask")
        low = np.stack([encode(c, np.load(case / f"{c}.npy", mmap_mode="r")[::SCALE, ::SCALE, ::SCALE]) for c in CHANNELS])
        if not np.allclose(low, np.load(case / "low.npy"), atol=2e-3):
            found.append("low.npy is not every fourth voxel of the full arrays: prepare the case again")
    try:
        read_report(case / "report.txt")
    except ValueError as e:
        found.append(str(e))
    return found


def one_size(folders, names):
    """ValueError unless the arrays of each of these names have one shape in all cases."""
    for name in names:
        shapes = {array_of(case, name).shape: case for case in folders}
        if len(shapes) > 1:
            raise ValueError(f"{' and '.join(f'{case}/{name}.npy is {shape}' for shape, case in list(shapes.items())[:2])}; "
                             "cases of one run are of one size; make them alike or move them to a folder of their own")


class Cases(Dataset):
    """An endless, shuffled sequence of cases: item k is decided by (seed, k) alone, so a run resumes anywhere exactly.

    crop None: k, low.npy (4,g,g,g) in [-1,1], text.npy (N,width)               for stage 1, about 2 MB a case
    crop (d,h,w): k, x0 (4,d,h,w), low (4,d,h,w) by nearest from the low grid   for stage 2, reads the crop only
    """

    def __init__(self, folders, seed, crop=None):
        self.folders, self.seed, self.crop = folders, seed, crop
        need = CHANNELS + ("low",) if crop else ("low", "text")
        for case in folders:
            lacking = [n for n in need if not (case / f"{n}.npy").exists()]
            if lacking:
                way = f"python text_encoder.py embed {case.parent} --model runs/text" if "text" in lacking else f"python data.py check {case.parent}"
                raise ValueError(f"{case}: no {', '.join(n + '.npy' for n in lacking)}; stage {2 if crop else 1} needs them; run {way}")
        one_size(folders, [n for n in ("low", "text") if n in need])
        low = array_of(folders[0], "low").shape[-1]
        self.grid = low * SCALE if crop else low                         # edge of the whole volume that the stage makes
        if crop and max(crop) > self.grid:
            raise ValueError(f"crop {crop} is larger than the grid {self.grid}; a crop lies inside; choose --crop again")

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, k):
        epoch, i = divmod(k, len(self.folders))
        case = self.folders[np.random.default_rng((self.seed, epoch)).permutation(len(self.folders))[i]]
        try:
            low = torch.from_numpy(np.load(case / "low.npy").astype(np.float32))
            if not self.crop:
                return k, low, torch.from_numpy(np.load(case / "text.npy").astype(np.float32))
            full = [np.load(case / f"{c}.npy", mmap_mode="r") for c in CHANNELS]
            rng = np.random.default_rng((self.seed, 1, k))
            start = [int(rng.integers(n - size + 1)) for n, size in zip(full[0].shape, self.crop)]
            d, h, w = (np.arange(a, a + size) for a, size in zip(start, self.crop))
            box = tuple(slice(a, a + size) for a, size in zip(start, self.crop))
            x0 = torch.from_numpy(np.stack([encode(c, a[box]) for c, a in zip(CHANNELS, full)]))
        except (ValueError, OSError, EOFError) as e:
            raise RuntimeError(f"{case}: {e}; a case must be whole; run python data.py check {case.parent}") from None
        return k, x0, low[:, d // SCALE][:, :, h // SCALE][..., w // SCALE]


def upsample(low):
    """Nearest, x4: the low-resolution volume on the full grid (sec. 4.2.2).   (B,C,D,H,W) -> (B,C,4D,4H,4W)"""
    return F.interpolate(low, scale_factor=SCALE, mode="nearest")


# --- pictures ---

def pyplot():
    """matplotlib's, for files and without a screen; imported only where a picture is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def picture(path, volumes, titles, caption=""):
    """Rows of axial, coronal and sagittal planes through the middle of the airway (without one, of the volume), HU [-1024,600], masks outlined: lobes
    yellow, airway cyan, vessels red.

    volumes: list of (4,D,H,W) in [-1,1]   titles: one a row.   Radiological view: the patient's right is on the left.
    """
    plt = pyplot()
    fig, axes = plt.subplots(len(volumes), 3, figsize=(9, 3 * len(volumes) + 0.3 * bool(caption)), squeeze=False, facecolor="black")
    for row, x, title in zip(axes, volumes, titles):
        x = np.asarray(x, np.float32)
        _, D, H, W = x.shape
        air = np.argwhere(x[2] > 0)
        d, h, w = (int(np.median(air[:, 0])), int(np.median(air[:, 1])), W // 2) if len(air) else (D // 2, H // 2, W // 2)
        aspects = [(FOV[1] / H) / (FOV[2] / W), (FOV[0] / D) / (FOV[2] / W), (FOV[0] / D) / (FOV[1] / H)]
        planes = [x[:, d, ::-1], x[:, ::-1, h], x[:, ::-1, :, w][..., ::-1]]   # anterior up; superior up; anterior left
        for ax, plane, aspect, name in zip(row, planes, aspects, ("axial", "coronal", "sagittal")):
            ax.imshow(plane[0], cmap="gray", vmin=-1, vmax=1, aspect=aspect)
            for m, color in ((1, "gold"), (3, "red"), (2, "cyan")):
                levels = [-0.8, -0.4, 0, 0.4, 0.8] if m == 1 else [0]
                if plane[m].max() > levels[0] > plane[m].min():
                    ax.contour(plane[m], levels, colors=color, linewidths=0.6)
            ax.set_axis_off()
            ax.set_title(f"{title}, {name}" if ax is row[0] else name, color="white", fontsize=8, parse_math=False)      # a file's name may hold a $
    fig.text(0.01, 0.005, caption, color="white", fontsize=7, parse_math=False)
    fig.tight_layout()
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=100, facecolor="black"))
    plt.close(fig)


# --- commands ---

def prepare(args):
    """NIfTI files and a report -> one case folder."""
    report = read_report(args.report)
    arrays, center = to_model({c: getattr(args, c) for c in CHANNELS}, args.grid, args.center)
    voxel = [round(f / args.grid, 4) for f in FOV]
    meta = dict(source={c: Path(getattr(args, c)).name for c in CHANNELS}, grid=args.grid, center_ras_mm=center,
                affine=grid_affine(args.grid, center).tolist(), voxels={c: int((arrays[c] > 0).sum()) for c in MASKS})
    write_case(args.out, **arrays, report=report, meta=meta)
    picture(Path(args.out) / "preview.png", [np.stack([encode(c, arrays[c]) for c in CHANNELS])], [Path(args.out).name])
    print(f"wrote {args.out}: {args.grid}^3, voxel {voxel} mm (D,H,W), centre {np.round(center, 1).tolist()} mm, voxels {meta['voxels']}")


def check(args):
    """Every case of a folder: what is wrong and how to mend it. Exit 2 if any is not sound."""
    folders = cases(args.folder)
    broken = sorted({p for p in Path(args.folder).glob("*") if p.is_dir()} - set(folders)) if Path(args.folder).is_dir() else []
    wrong = 0
    for case in folders + broken:
        found = faults(case)
        wrong += bool(found)
        print(f"{case.name}: " + ("; ".join(found) if found else "sound"))
    if not folders + broken:
        raise ValueError(f"{args.folder}: no cases in it; a folder of case folders is needed; make some with data.py prepare or phantom.py, or check the path")
    if wrong:
        raise ValueError(f"{args.folder}: {wrong} of {len(folders) + len(broken)} cases are not sound; all must be; mend or remove them")
    one_size(folders, ("low", "text"))
    print(f"{args.folder}: {len(folders)} cases, all sound")


def export(args):
    """Case folders -> folders of NIfTI, on the model's grid, such as evaluate.py reads: real volumes to set samples beside."""
    folders, out = cases(args.folder), Path(args.out)
    if not folders:
        raise ValueError(f"{args.folder}: no cases in it; a folder of case folders is needed; check the path")
    if out.exists():
        raise ValueError(f"--out {out}: exists already; nothing is replaced silently; choose another")
    for case in tqdm(folders, leave=False):
        center = json.loads((case / "case.json").read_text()).get("center_ras_mm", (0, 0, 0))    # phantoms have none: they are nowhere
        (out / case.name).mkdir(parents=True)
        for c in CHANNELS:
            save_nifti(out / case.name / f"{c}.nii.gz", np.load(case / f"{c}.npy"), center)
    print(f"wrote {len(folders)} cases to {out}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    sub = p.add_subparsers(dest="command", required=True)
    q = sub.add_parser("prepare", help="NIfTI files and a report -> one case folder", allow_abbrev=False)
    for name in CHANNELS + ("report",):
        q.add_argument("--" + name, required=True, metavar="FILE")
    q.add_argument("--out", required=True, metavar="FOLDER", help="the case folder to write")
    q.add_argument("--grid", type=int, default=256, help="256 (the paper's, and --preset demo-256) or 128 (--preset demo)")
    q.add_argument("--center", type=float, nargs=3, metavar=("X", "Y", "Z"), help="centre of the field of view, world mm; default the lungs'")
    q.set_defaults(run=prepare)
    q = sub.add_parser("check", help="validate a folder of cases", allow_abbrev=False)
    q.add_argument("folder")
    q.set_defaults(run=check)
    q = sub.add_parser("export", help="case folders -> NIfTI on the model's grid", allow_abbrev=False)
    q.add_argument("folder")
    q.add_argument("--out", required=True, metavar="FOLDER", help="gets one folder a case, with ct, lobe, airway and vessel .nii.gz")
    q.set_defaults(run=export)
    args = p.parse_args(argv)
    with exits():
        if not (np.abs(getattr(args, "center", None) or 0) < 1e6).all():
            raise ValueError(f"--center {' '.join(map(str, args.center))}; three finite numbers of mm are needed; change it")
        if getattr(args, "grid", SCALE) % SCALE or getattr(args, "grid", SCALE) < SCALE:
            raise ValueError(f"--grid {args.grid}; a positive multiple of {SCALE} is needed; use 256 or 128")
        args.run(args)


if __name__ == "__main__":
    main()
