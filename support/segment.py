"""Volumes of a case as NIfTI: the folder they lie in, the names of their files, and others' segmenters that make the
masks which are not there."""
import shutil
import subprocess
from pathlib import Path

# A structure's file names, ours first, then TotalSegmentator's or what may stand in.
FILES = {
    "ct": ["ct"],
    "lobe": ["lobe"],
    "vessel": ["vessel", "lung_vessels"],
    "airway": ["airway", "lung_trachea_bronchia"],
    "heart": ["heart"],
    "thorax": ["thorax", "lung", "lobe"],
    "effusion": ["effusion", "pleural_effusion"],
    "lung": ["lung", "lobe"],
}
# TotalSegmentator's task for each
TASKS = {"airway": "lung_vessels", "effusion": "pleural_pericard_effusion", "heart": "total"}


def case_folders(folder):
    """Sub-folders that hold NIfTI files, or the folder itself if it does.   -> sorted list"""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; it holds one folder of NIfTI files a case; check the path")
    found = sorted({p.parent for p in folder.glob("[!.]*/*.nii*")})
    if not found and any(folder.glob("*.nii*")):
        found = [folder]
    if not found:
        raise ValueError(f"{folder}: no */*.nii.gz in it; measurements need volumes; sample some with sample.py")
    return found


def file_of(case, *names):
    """The first NIfTI of these names, compressed or not, or None."""
    return next((p for n in names for end in (".nii.gz", ".nii") if (p := case / (n + end)).is_file()), None)


def totalsegmentator(case, task):
    """Masks of a case's CT by the public command, into the case's folder."""
    command = shutil.which("TotalSegmentator")
    if command is None:
        raise ValueError("TotalSegmentator is not installed; --segment totalseg calls it; "
                         "pip install TotalSegmentator, or put the masks beside the CT")
    done = subprocess.run([command, "-i", str(file_of(case, "ct")), "-o", str(case), "-ta", task])
    if done.returncode:
        raise RuntimeError(f"{case}: TotalSegmentator, task {task}, ended with code {done.returncode}; "
                           "its own words stand above")
