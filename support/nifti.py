"""NIfTI in and out, and volumes from one grid to another. An affine takes an array's index to world mm, RAS+."""
import contextlib
import gzip
import io
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support.files import write_atomic

NAME = re.compile(r"(.+?)\.nii(\.gz)?$", re.I)          # of a file
MAX_BYTES = 4 << 30               # of one NIfTI's voxels; beyond it is a broken or hostile header
MM = dict(unknown=1, mm=1, meter=1e3, micron=1e-3)
VOXEL = (0.05, 50)                # mm, the edges of voxels that a chest CT may have; in another unit it has others
# nibabel is imported where it is needed: a GPU machine that only trains has none


def damage():
    """What a damaged file raises."""
    import nibabel
    return (OSError, EOFError, ValueError, OverflowError, zlib.error, nibabel.spatialimages.HeaderDataError,
            nibabel.wrapstruct.WrapStructError, nibabel.orientations.OrientationError)


def read_header(path):
    """A NIfTI's header, 1 or 2, judged before any voxel is read: ValueError unless it has a usable geometry, one that
    nibabel and ITK read alike.   -> image class of nibabel, header, function that opens the file, bytes of voxels"""
    import nibabel
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a NIfTI (.nii or .nii.gz) is needed; check the path")
    with open(path, "rb") as f:
        opener = gzip.open if f.read(2) == b"\x1f\x8b" else open         # whatever its name says
    try:
        with opener(path, "rb") as f, nibabel.imageglobals.LoggingOutputSuppressor():
            start = f.read(1 << 24)                      # enough; an extension may claim any length
            second = start[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")     # 540, the size of a NIfTI-2 header
            kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
            header = kind.header_class.from_fileobj(io.BytesIO(start), check=False)
            pixdim = header["pixdim"][1:4].copy()
            header.check_fix()                                           # makes 1 of 0 in pixdim
        shape, dtype, affine = header.get_data_shape(), header.get_data_dtype(), header.get_best_affine()
    except damage() as e:
        raise ValueError(f"{path}: no readable NIfTI header ({e}); "
                         "a .nii or .nii.gz volume is needed; convert or copy it again") from None
    return kind, header, opener, check_header(path, header, pixdim, shape, dtype, affine)


def load_nifti(path):
    """A 3D NIfTI in closest canonical (RAS+) order.   -> array (X,Y,Z) float32, affine (4,4) in mm

    ValueError if the header is none (`read_header`) or the file is not whole (nibabel does not check gzip's sum).
    """
    import nibabel
    kind, header, opener, size = read_header(path)
    try:
        need = int(header.get_data_offset()) + size
        raw, more = bytearray(), b"begin"
        with opener(path, "rb") as f:
            while more and len(raw) < need:                              # step by step: a header may claim anything
                raw += (more := f.read(min(1 << 24, need - len(raw))))
            while more := f.read(1 << 20):                               # to its end, where gzip's check sum is
                if more.strip(b"\0"):
                    raise ValueError("more bytes than its header describes")
        if len(raw) < need:
            raise EOFError(f"cut short, {len(raw)} bytes of {need}")
        with np.errstate(over="ignore"), nibabel.imageglobals.LoggingOutputSuppressor():
            image = nibabel.as_closest_canonical(kind.from_bytes(raw))
            raw = None                                                   # nibabel has a copy
            array = np.asarray(image.dataobj, np.float32).reshape(image.shape[:3])     # too large becomes infinite
    except damage() as e:
        raise ValueError(f"{path}: damaged ({e}); the whole file is needed; copy it again") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {np.count_nonzero(~np.isfinite(array))} voxels are NaN or infinite; "
                         "all must be numbers; mend it first")
    return array, np.diag([*[MM[header.get_xyzt_units()[0]]] * 3, 1]) @ image.affine


def check_header(path, header, pixdim, shape, dtype, affine):
    """ValueError unless a header describes one 3D volume of real numbers with a place in the world.   -> bytes of
    voxels"""
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:          # nibabel would guess, and take left for right
        raise ValueError(f"{path}: neither sform nor qform is set; which side is the left is not known; "
                         "write an affine into the header")
    if set(shape[3:]) == {1}:
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"{path}: shape {tuple(shape)}; one 3D volume is needed; extract it first")
    if dtype.kind not in "iuf":
        raise ValueError(f"{path}: voxels of type {dtype}; real numbers are needed; convert it first")
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size > MAX_BYTES:
        raise ValueError(f"{path}: the header claims {shape}, {size / 2**30:.0f} GiB; "
                         f"at most {MAX_BYTES >> 30} GiB; crop it or mend the header")
    if not header["vox_offset"] >= header.single_vox_offset:             # where they begin then, libraries do not agree
        raise ValueError(f"{path}: vox_offset {header['vox_offset']:g} lies inside the header; voxels begin at "
                         f"{header.single_vox_offset} or later; write the file again with nibabel or ITK")
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * edges.prod():
        raise ValueError(f"{path}: its affine is not finite or flat; voxels need a place in the world; mend the header")
    try:
        unit = header.get_xyzt_units()[0]
        MM[unit]
    except KeyError:
        raise ValueError(f"{path}: unit code {header['xyzt_units']}; metres, millimetres or micrometres are known; "
                         "mend xyzt_units in the header") from None
    if (edges * MM[unit] < VOXEL[0]).any() or (edges * MM[unit] > VOXEL[1]).any():
        raise ValueError(f"{path}: voxels of {named(edges)}, unit {unit}; edges of {VOXEL[0]} to {VOXEL[1]} mm are "
                         "needed; mend the affine or the unit (xyzt_units) in the header")
    if not (np.abs(np.abs(pixdim) / edges - 1) < 0.1).all():             # ITK takes pixdim; a tilted gantry's is near
        raise ValueError(f"{path}: pixdim says voxels of {named(pixdim)}, the affine {named(edges)}; libraries read it "
                         "in two ways; mend the header")
    return size


def named(edges):
    """Three numbers as text."""
    return " x ".join(f"{edge:.4g}" for edge in edges)


def write_nifti(path, array, affine, level=4):
    """An array (X,Y,Z) and its affine, in mm -> a .nii.gz, which appears whole. The same voxels are the same bytes.
    level: of compression"""
    import nibabel
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    write_atomic(path, gzip.compress(image.to_bytes(), level, mtime=0))


def save_nifti(path, array, affine):
    """An array of the model's frame -> NIfTI, RAS+, sform and qform code 1, mm. The file appears whole or not at all.

    array: (D,H,W) int16 HU or uint8 labels   affine: its index (d,h,w) -> world, as `data.grid_affine` has it
    """
    ras = np.ascontiguousarray(array[..., ::-1]).transpose(2, 1, 0)      # (x,y,z), x to the right, in the file's order
    flip = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, len(array) - 1], [0, 0, 0, 1.0]])    # (x,y,z) -> (d,h,w)
    write_nifti(path, ras, affine @ flip)


@contextlib.contextmanager
def saving(folder, volumes, affine, like=None):
    """Volumes become FOLDER/<name>.nii.gz on two threads, while the block works; at its end all are there.
    volumes: {name: function that makes its array}   like: a NIfTI on whose grid they are written, one after another,
    since that takes memory"""
    def save(name):
        path, array = folder / f"{name}.nii.gz", volumes[name]()
        save_like(path, array, affine, like) if like else save_nifti(path, array, affine)

    with ThreadPoolExecutor(1 if like else 2) as threads:
        jobs = [threads.submit(save, name) for name in volumes]
        yield
    for job in jobs:
        job.result()                                     # raises what a thread could not do


def save_like(path, array, affine, like):
    """The same, on the grid of another NIfTI, as that lies in its file.   array: (D,H,W), int16 HU or labels"""
    header = read_header(like)[1]
    shape = [*header.get_data_shape(), 1][:3]
    target = np.diag([*[MM[header.get_xyzt_units()[0]]] * 3, 1]) @ header.get_best_affine()
    ct = array.dtype == np.int16
    out = np.rint(resample(array, affine, target, shape, linear=ct, fill=array.min() if ct else 0))
    write_nifti(path, out.astype(array.dtype), target)


def along_axes(array, step, start, shape, linear, fill):
    """`resample` axis by axis, where those of both grids are parallel: far faster.   step, start: (3,),
    output index i lies at start + step i of the array's   shape: of the output, in the array's order of axes"""
    at = [start[k] + step[k] * np.arange(shape[k]) for k in range(3)]
    if not linear:
        at = [np.floor(np.round(a, 3) + 0.5).astype(int) for a in at]    # halves are halves: a file's affine is float32
        inside = [(a >= 0) & (a < n) for a, n in zip(at, array.shape)]
        out = array[np.ix_(*(a.clip(0, n - 1) for a, n in zip(at, array.shape)))].astype(np.float32)
        out[~(inside[0][:, None, None] & inside[1][:, None] & inside[2])] = fill
        return out
    out = np.empty(array.shape, np.float32)
    for y in range(out.shape[1]):                                        # from Fortran's order: faster than all at once
        out[:, y] = array[:, y]
    out = torch.from_numpy(out).sub_(fill)
    for k in (2, 1, 0):                                                  # of hats, one voxel wide to each side
        n = int(np.rint(abs(step[k])).clip(1, 4))
        places = at[k][:, None] + step[k] * ((np.arange(n) + 0.5) / n - 0.5)
        hats = np.maximum(0, 1 - np.abs(places[..., None] - np.arange(array.shape[k]))).mean(1)
        hats = torch.from_numpy(hats.astype(np.float32))
        out = out @ hats.T if k == 2 else hats @ out if k == 1 else (hats @ out.flatten(1)).unflatten(1, out.shape[1:])
    return (out + fill).numpy()


def resample(array, affine, out_affine, shape, linear, fill=0):
    """An array (any orientation, oblique too) sampled on another grid.   array: (X,Y,Z), affine: its index -> world
    out_affine: output index -> world, shape of the output   linear: trilinear, averaged over sub-voxels where the
    output is coarser (no aliasing); else nearest   fill: the value outside.   -> float32 array of `shape`
    """
    M = np.linalg.inv(affine) @ out_affine                               # output index -> input index
    of = np.abs(M[:3, :3]).argmax(1)                                     # input axis -> output axis that follows it
    beside = np.abs(M[:3, :3]) * shape * (np.arange(3) != of[:, None])
    if sorted(of) == [0, 1, 2] and beside.max() < 1e-3:                  # voxels
        return along_axes(array, M[range(3), of], M[:3, 3], np.asarray(shape)[of], linear, fill).transpose(of.argsort())
    source = torch.from_numpy(np.array(array, np.float32, order="C"))[None, None]
    source -= fill
    size = torch.tensor(array.shape, dtype=torch.float64)
    ratio = np.linalg.norm(M[:3, :3], axis=0)                            # input voxels per output voxel, by axis
    counts = np.rint(ratio).clip(1, 4).astype(int) if linear else (1, 1, 1)
    subs = [(np.arange(n) + 0.5) / n - 0.5 for n in counts]
    offsets = np.stack(np.meshgrid(*subs, indexing="ij"), -1).reshape(-1, 3)
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    turn, shift = torch.from_numpy(M[:3, :3].T.copy()), torch.from_numpy(M[:3, 3])
    mode = "bilinear" if linear else "nearest"
    out = torch.empty(*shape)
    for d in range(0, shape[0], 16):                                   # in slabs: the coordinates are thrice the volume
        ijk = torch.stack(torch.meshgrid(axes[0][d:d + 16], *axes[1:], indexing="ij"), -1)
        total = 0
        for offset in offsets:
            where = (ijk + torch.from_numpy(offset)) @ turn + shift
            where = ((2 * where + 1) / size - 1).flip(-1).float()[None]  # grid_sample's own units, last axis first
            total = total + F.grid_sample(source, where, mode, align_corners=False)[0, 0]
        out[d:d + 16] = total / len(offsets)
    return (out + fill).numpy()
