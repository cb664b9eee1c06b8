"""Masks that a scan lacks, made of its CT by others' segmenters (`prepare.py --segment`)."""
import argparse
import shutil
from pathlib import Path

import numpy as np

from support.checks import MASKS
from support.nifti import damage, read_header, write_nifti
from support.segment import TASKS, by_command, file_of, files_of, totalsegmentator

NAVIAIRWAY = ("segmentation_add_broken_parts", "segmentation")          # its names, the better first


def tools_of(text):
    """Text of --segment, such as "lungmask,naviairway" -> tools"""
    names = tuple(name.strip() for name in text.split(","))
    if not set(names) <= TOOLS.keys():
        raise argparse.ArgumentTypeError(f"{text}: tools are {', '.join(TOOLS)}")
    return names


def check_tools(names):
    """ValueError unless the tools of --segment are installed; before the first scan is read."""
    for name in names:
        command, way, _, _ = TOOLS[name]
        if not shutil.which(command):
            raise ValueError(f"--segment {name}: {command} is not installed; {way}, or give the masks by --masks")


def segmented(scan, ct, a):
    """Masks that a scan lacks, by the first tool of --segment that makes them, from its CT as it was read.
    ct: (array (X,Y,Z) in HU, affine)   -> {channel: {path: our label}}"""
    makers = {c: make for name in reversed(a.segment) for _, _, made, make in [TOOLS[name]] for c in made}
    makers = {c: make for c, make in makers.items() if c not in scan.masks}
    if not makers:
        return {}
    folder = Path(a.out) / ".segmented" / scan.id
    folder.mkdir(parents=True, exist_ok=True)
    write_nifti(folder / "ct.nii.gz", np.rint(ct[0]).clip(-32768, 32767).astype(np.int16), ct[1], level=1)
    return {c: files for c, make in makers.items() if (files := files_of(make(folder, TASKS[c]), c)[1])}


def lungmask(case, task):
    """Lobes by the command of lungmask.   -> the folder"""
    return by_command(case, "lungmask", "lobe", "pip install lungmask",
                      lambda command, ct, part: [command, ct, part / "lobe.nii.gz", "--modelname", "LTRCLobes_R231"])


def naviairway(case, task):
    """Airways by NaviAirway, through a script around its notebook (docs/data.md). The notebook's files say nothing of
    a place, though they hold the CT's voxels: they get the CT's.   -> the folder"""
    import nibabel
    folder = by_command(case, "naviairway", "airway", "docs/data.md shows how",
                        lambda command, *paths: [command, *(p.resolve() for p in paths)])
    made = next((p for name in NAVIAIRWAY if (p := file_of(folder, name))), None)
    if file_of(folder, "airway"):
        return folder
    try:
        read_header(made or folder / f"{NAVIAIRWAY[0]}.nii.gz")          # refuses what is no volume
        ct, mask = nibabel.load(case / "ct.nii.gz"), nibabel.load(made)
        if mask.shape != ct.shape:
            raise ValueError(f"{mask.shape} voxels, the CT {ct.shape}")
        voxels = np.asarray(mask.dataobj) > 0
    except (*damage(), nibabel.filebasedimages.ImageFileError) as e:
        shutil.rmtree(folder)                            # to be made again
        raise RuntimeError(f"{folder}: not what naviairway writes ({e})") from None
    write_nifti(folder / "airway.nii.gz", voxels.astype(np.uint8), ct.affine, level=1)
    return folder


# name on our command line: command, how to get it, what it makes, how
TOOLS = {"totalseg": ("TotalSegmentator", "pip install TotalSegmentator", MASKS, totalsegmentator),
         "lungmask": ("lungmask", "pip install lungmask", ("lobe",), lungmask),
         "naviairway": ("naviairway", "docs/data.md shows how", ("airway",), naviairway)}
