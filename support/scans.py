"""One scan as it comes, NIfTI, .npz or DICOM, made an array of HU with its place in the world."""
import contextlib
import locale
import re
import zipfile
import zlib

import numpy as np

from support.anatomy import fault_of_hu, fault_of_orientation, shares_of_hu
from support.checks import UNREADABLE
from support.nifti import VOXEL, load_nifti

RAD = "IPL", 0.8                  # RAD-ChestCT: where its axes lead (below, behind, left), mm a voxel
AXES = dict(R=(0, 1), L=(0, -1), A=(1, 1), P=(1, -1), S=(2, 1), I=(2, -1))


def read_scan(scan):
    """-> CT (X,Y,Z) float32 HU in RAS+ order, affine, what was done to it. ValueError if it is no chest CT in HU"""
    first, about = scan.files[0], scan.about
    if "dicom" in about:
        ct, affine = read_dicom(scan.files)
    elif first.suffix.lower() == ".npz":
        ct, affine = read_npz(first, about.get("orientation"))
    else:
        ct, affine = load_nifti(first)
    if "ct_rate" in about:
        affine = spaced(affine, about["ct_rate"])
        return in_hu(ct, affine, about["ct_rate"], first)
    if fault := fault_of_hu(ct):
        where = "the series" if "dicom" in about else first
        raise ValueError(f"{where}: {fault}; a chest CT in Hounsfield units has both; apply the rescale slope and "
                         "intercept, once")
    return ct, affine, ""


def in_hu(ct, affine, about, path):
    """Files of CT-RATE are HU, raw, or rescaled twice: which, the shares of air and of tissue say, not the names.
    -> as of `read_scan`"""
    slope, intercept = (number(about.get(name, default), name, path)
                        for name, default in (("RescaleSlope", 1), ("RescaleIntercept", -1024)))
    ways = {"": (1, 0)}
    if slope and (slope, intercept) != (1, 0):
        ways |= {"raw values, rescaled": (slope, intercept),
                 "rescaled twice, undone once": (1 / slope, -intercept / slope)}
    few = ct.reshape(-1)[::1 + ct.size // 1_000_000]
    score = {name: min(shares_of_hu(few * a + b).values()) for name, (a, b) in ways.items()}
    best, *others = sorted(score, key=score.get, reverse=True)
    a, b = ways[best]
    if fault := fault_of_hu(few * a + b):
        raise ValueError(f"{path}: {fault}; with slope {slope:g} and intercept {intercept:g}, once more or once less, "
                         "it is no chest CT either; look at the file and its row of the metadata")
    if others and score[others[0]] > score[best] / 3:
        raise ValueError(f"{path}: its values could be HU in two ways; one must be clear; look at the file and its row "
                         "of the metadata")
    return ct * np.float32(a) + np.float32(b) if best else ct, affine, best


def number(text, name, path):
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path}: {name} is {text!r} in the metadata; a number is needed; mend it") from None


def spaced(affine, about):
    """An affine with the voxel sizes of the metadata, which the headers of CT-RATE's first version lack."""
    if not {"XYSpacing", "ZSpacing"} <= about.keys():
        return affine
    mm = [float(x) for x in re.findall(r"\d+\.?\d*(?:e-?\d+)?", f"{about['XYSpacing']} {about['ZSpacing']}")]
    if len(mm) not in (2, 3) or not all(VOXEL[0] <= x <= VOXEL[1] for x in mm):
        raise ValueError(f"XYSpacing {about['XYSpacing']}, ZSpacing {about['ZSpacing']} in the metadata; "
                         f"{VOXEL[0]} to {VOXEL[1]} mm are needed; mend it")
    return affine @ np.diag([*np.array([mm[0], mm[-2], mm[-1]]) / np.linalg.norm(affine[:3, :3], axis=0), 1])


def read_npz(path, codes):
    """RAD-ChestCT's, key ct, without an affine: its axes lead where its authors say, unless the chest contradicts.
    codes: where the axes lead instead, such as IPL; then it is not asked"""
    try:
        with np.load(path) as f:
            ct = f["ct"]
    except (OSError, MemoryError):                       # of the disk, the machine: it may be read another time
        raise
    except (*UNREADABLE, KeyError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path}: no array ct in it ({type(e).__name__}); RAD-ChestCT's files have one; "
                         "fetch it again") from None
    if ct.ndim != 3 or ct.dtype.kind not in "iuf" or min(ct.shape) < 16:
        raise ValueError(f"{path}: ct is {ct.dtype} {ct.shape}; one 3D CT is needed; fetch it again")
    if not np.isfinite(ct).all():
        raise ValueError(f"{path}: voxels are NaN or infinite; all must be numbers; mend it first")
    ct, affine = upright(ct.astype(np.float32), RAD[1] * axes(codes or RAD[0]))
    if not codes and not fault_of_hu(ct) and (fault := fault_of_orientation(ct, affine)):
        raise ValueError(f"{path}: {fault}; its axes should lead to {RAD[0]} (below, behind, left); "
                         "look at it, and pass --orientation")
    return ct, affine


def axes(codes):
    """Where three axes lead, as letters of RLAPSI -> (3,3), index -> RAS+ world"""
    if len(codes) != 3 or {AXES.get(c, (3,))[0] for c in codes} != {0, 1, 2}:
        raise ValueError(f"--orientation {codes}; where the three axes lead, one of R L, of A P, of S I; such as IPL")
    M = np.zeros((3, 3))
    for i, c in enumerate(codes):
        M[AXES[c][0], i] = AXES[c][1]
    return M


def upright(array, M):
    """An array and its affine's (3,3) -> the array in the closest RAS+ order, affine (4,4) around the middle"""
    import nibabel
    affine = np.eye(4)
    affine[:3, :3] = M
    affine[:3, 3] = -M @ (np.array(array.shape) - 1) / 2
    order = nibabel.io_orientation(affine)
    turned = affine @ nibabel.orientations.inv_ornt_aff(order, array.shape)
    return np.ascontiguousarray(nibabel.apply_orientation(array, order)), turned


# --- DICOM ---

@contextlib.contextmanager
def own_locale():
    """SimpleITK leaves a process in the C locale, in which text is ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def simpleitk():
    try:
        import SimpleITK
    except ImportError:
        raise ValueError("--from dicom: SimpleITK is not installed; it reads DICOM; pip install SimpleITK") from None
    SimpleITK.ProcessObject_SetGlobalWarningDisplay(False)
    return SimpleITK


def header(sitk, path):
    """A DICOM file's header, without its voxels."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def tag(head, name):
    return head.GetMetaData(name).strip() if head.HasMetaDataKey(name) else ""


@own_locale()
def read_dicom(files):
    """A series, rescaled to HU as its slices say. ValueError by name for a tilted gantry, missing slices, slices of
    several kinds."""
    sitk, where = simpleitk(), "the series"              # no path: it may hold a name
    try:
        heads = {tag(head, "0008|0018") or f: (head, f) for f in files for head in [header(sitk, f)]}      # each once
        along = np.array(next(iter(heads.values()))[0].GetDirection())[2::3]
        heads, files = zip(*sorted(heads.values(), key=lambda it: np.dot(it[0].GetOrigin(), along)))
        turns = np.array([h.GetDirection() for h in heads]).reshape(-1, 3, 3)
        kinds = {(h.GetSize()[:2], tuple(np.round(h.GetSpacing()[:2], 4))) for h in heads}
        at = np.array([h.GetOrigin() for h in heads])
    except RuntimeError as e:
        raise ValueError(f"{where}: a slice is not readable ({' '.join(str(e).split())[-120:]}); "
                         "fetch it again") from None
    if len(files) < 16 or len(kinds) > 1 or np.abs(turns - turns[0]).max() > 1e-3:
        raise ValueError(f"{where}: {len(files)} slices of {len(kinds)} sizes; one volume of 16 or more alike slices "
                         "is needed; export the series again")
    steps = np.diff(at, axis=0)
    along = steps @ turns[0][:, 2]
    if np.linalg.norm(steps - along[:, None] * turns[0][:, 2], axis=1).max() > 0.02 * np.abs(along).max():
        raise ValueError(f"{where}: a tilted gantry, slices are shifted against each other; resample the series first")
    middle = np.median(np.abs(along))
    if np.abs(np.abs(along) - middle).max() > max(0.05 * middle, 0.02):
        raise ValueError(f"{where}: slices {np.abs(along).min():.2f} to {np.abs(along).max():.2f} mm apart: missing, "
                         "twice, or of mixed spacing; export the series again")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(f) for f in files])
    image = reader.Execute()
    ct = sitk.GetArrayFromImage(image).astype(np.float32).transpose(2, 1, 0)
    flip = np.diag([-1, -1, 1])                          # LPS -> RAS
    M = flip @ np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    middle = flip @ image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in ct.shape])
    ct, affine = upright(ct, M)
    affine[:3, 3] += middle
    return ct, affine
