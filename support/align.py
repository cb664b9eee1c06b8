"""A scan's lungs laid on an atlas's by an affine map, as the paper does before training (sec. 5.1); by antspyx, which
is imported where it is asked for."""
import contextlib
import os
import tempfile

import numpy as np

from support.anatomy import box_center, lungs_of, strides, without_stray
from support.checks import load_channel
from support.nifti import load_nifti

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])     # nibabel's world and ITK's


@contextlib.contextmanager
def antspy():
    """The library, with one thread and one seed, which it reads from the environment: else it ends elsewhere each time,
    by a millimetre. ValueError where it is not installed."""
    before = dict(os.environ)
    os.environ |= dict(ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS="1", ANTS_RANDOM_SEED="1")
    try:
        import ants
        yield ants
    except ImportError as e:
        raise ValueError(f"--align affine: antspyx is not installed ({e}); it lays lungs on an atlas's; pip install "
                         "antspyx, or take --align center") from None
    finally:
        os.environ.clear()
        os.environ |= before


def lungs_in(volumes):
    """The lungs of a scan, by its lobes or else its CT.   volumes: {name: (array (X,Y,Z), affine)}
    -> mask some 4 mm coarse, affine"""
    if "lobe" not in volumes:
        return lungs_of(*volumes["ct"])
    array, affine = volumes["lobe"]
    every = strides(affine)
    return array[tuple(slice(None, None, n) for n in every)] > 0, affine @ np.diag([*every, 1.0])


def read_atlas(path):
    """A mask of lungs or lobes, or a CT.   -> mask, affine, world mm of the middle of its lungs (3,)"""
    array, affine = load_nifti(path)
    name = "ct" if array.min() < -200 else "lobe"
    mask, affine = lungs_in({name: load_channel("ct", path) if name == "ct" else (array, affine)})
    if mask.sum() < 1000:
        raise ValueError(f"--atlas {path}: no lungs in it; a mask of them, or a chest CT, is needed; name another")
    return mask, affine, box_center(without_stray(mask), affine)


def onto(atlas, volumes):
    """-> (4,4), the atlas's world -> the scan's, mm, RAS+, which lays its lungs on the scan's. ValueError where nothing
    does"""
    lungs = lungs_in(volumes)
    if not lungs[0].any():
        raise ValueError("no two lungs in it, which --align affine lays on the atlas; take --align center")
    with antspy() as ants, tempfile.TemporaryDirectory() as folder:
        found = ants.registration(itk_image(ants, *atlas[:2]), itk_image(ants, *lungs), "Affine",
                                  aff_metric="meansquares", outprefix=folder + "/")
        transform = ants.read_transform(found["fwdtransforms"][0])
        to_scan = from_itk(transform.parameters, transform.fixed_parameters)
    stretch = np.linalg.svd(to_scan[:3, :3])[1]
    if np.linalg.det(to_scan[:3, :3]) <= 0 or stretch.min() < 0.5 or stretch.max() > 2:
        raise ValueError(f"its lungs lie on the atlas's only if stretched {stretch.min():.2f} to {stretch.max():.2f} "
                         "times; 0.5 to 2 are a chest's; take --align center")
    return to_scan


def itk_image(ants, mask, affine):
    """A mask with its place, as antspyx holds it."""
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return ants.from_numpy(mask.astype(np.float32), origin=lps[:3, 3].tolist(), spacing=spacing.tolist(),
                           direction=lps[:3, :3] / spacing)


def from_itk(parameters, center):
    """ITK's affine transform, y = M (x - c) + c + t, of LPS worlds.   parameters: M by rows, t   -> (4,4) of RAS+"""
    matrix, center, to = np.reshape(parameters[:9], (3, 3)), np.asarray(center), np.eye(4)
    to[:3, :3], to[:3, 3] = matrix, center + parameters[9:12] - matrix @ center
    return LPS @ to @ LPS
