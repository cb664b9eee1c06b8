"""Volumes of a case as NIfTI: the folder they lie in, the names of their files, and others' segmenters that make masks
of a CT."""
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from support.checks import labels_of, load_channel
from support.files import whole_folder
from support.nifti import load_nifti

# TotalSegmentator's names of each structure's parts and our labels, by generation; and the task that writes them.
LOBES = ("lung_upper_lobe_left", "lung_lower_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right",
         "lung_lower_lobe_right")
PARTS = {
    "lobe": [dict(zip(LOBES, range(1, 6)))],
    "vessel": [{"lung_vessels": 1}, {"lung_arteries": 1, "lung_veins": 1}],          # the second since version 2.13
    "airway": [{"lung_trachea_bronchia": 1}, {"lung_airways": 1}],
    "heart": [{"heart": 1}],
    "effusion": [{"pleural_effusion": 1}],
}
TASKS = {"airway": "lung_vessels", "vessel": "lung_vessels", "effusion": "pleural_pericard_effusion", "heart": "total",
         "lobe": "total"}
OPTIONS = {"TotalSegmentator": "totalseg"}                                           # their names on our command lines
INSTEAD = {"thorax": ("thorax", "lung", "lobe"), "lung": ("lung", "lobe")}           # what may stand in for a structure


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


def file_of(case, name):
    """The NIfTI of this name, compressed or not, or None."""
    return next((p for end in (".nii.gz", ".nii") if (p := case / (name + end)).is_file()), None)


def files_of(case, structure):
    """The files that hold a structure: ours, one that may stand in, or the parts that TotalSegmentator writes.
    -> the structure's name, {file: our label}; None, {} if there are none"""
    for name in INSTEAD.get(structure, (structure,)):
        ways = [{name: 1}, *PARTS.get(name, [])]
        for way in ways:
            found = {file_of(case, part): label for part, label in way.items()}
            if None not in found:
                return name, found
    return None, {}


def structure(case, name):
    """One structure of a case from the files that lie in its folder.   -> array (X,Y,Z) in RAS+ order, affine; or
    None"""
    kind, files = files_of(case, name)
    if not files:
        return None
    return load_channel("ct", next(iter(files))) if kind == "ct" else combined(kind, files)


def combined(kind, files):
    """A mask from the files that hold it.   files: {path: our label}   -> array (X,Y,Z), affine"""
    if len(files) == 1:
        return load_mask(kind, next(iter(files)))
    total = 0
    for path, label in files.items():
        part, affine = load_mask("part", path)
        if np.shape(total) not in ((), part.shape):
            raise ValueError(f"{path}: {part.shape} voxels, other parts {total.shape}; one grid is needed; "
                             "segment this very CT again")
        total = np.maximum(total, label * part)
    return total, affine


def load_mask(kind, path):
    """A mask that is to be measured, which may be empty.   kind: "lobe", labels 0 to 5; all others are one structure
    -> array (X,Y,Z), affine

    Of several labels the one counts that the file's own table of names says. Probabilities are cut at 0.5.
    """
    array, affine = load_nifti(path)
    labels = labels_of(array)
    names = label_names(path) if len(labels) > 2 else {}
    for way in PARTS.get(kind, []):
        numbers = {label: [k for k, name in names.items() if name == part] for part, label in way.items()}
        if all(numbers.values()):
            chosen = np.zeros(array.shape, np.float32)
            for label, keys in numbers.items():
                chosen[np.isin(array, keys)] = label
            return chosen, affine
    if kind == "lobe" and labels[-1] > 14 and {10, 11, 12, 13, 14} <= set(labels):       # TotalSegmentator's, unnamed
        return np.where((array >= 10) & (array <= 14), array - 9, 0).astype(np.float32), affine
    if kind == "lobe":
        return load_channel("lobe", path)
    if 0 <= labels[0] and labels[-1] <= 1 and len(labels) > 2:
        print(f"warning: {path}: values from 0 to 1, probabilities; cut at 0.5", file=sys.stderr)
        return (array > 0.5).astype(np.float32), affine
    if labels[0] < 0 or len(labels) > 2 or (len(labels) == 2 and labels[0] != 0):
        more = " ..." if len(labels) > 6 else ""
        raise ValueError(f"{path}: values {', '.join(f'{v:g}' for v in labels[:6])}{more}; one structure is measured, "
                         f"0 and one other number; write {kind} alone")
    return np.greater(array, 0, out=array), affine                       # in place: a scan is large


def label_names(path):
    """The table of labels that TotalSegmentator writes into the header of a file of many.   -> {number: name}"""
    import nibabel
    try:
        extensions = nibabel.load(path).header.extensions
        text = " ".join(str(e.get_content()) for e in extensions)
    except (OSError, ValueError, nibabel.filebasedimages.ImageFileError) as e:
        raise ValueError(f"{path}: header not readable ({e}); write it again") from None
    return {int(k): name for k, name in re.findall(r'<Label Key="(\d+)"[^>]*><!\[CDATA\[([^\]]+)\]\]>', text)}


def totalsegmentator(case, task):
    """Masks of a case's CT by the public command.   -> the folder"""
    return by_command(case, "TotalSegmentator", task, "pip install TotalSegmentator",
                      lambda command, ct, part: [command, "-i", ct, "-o", part, "-ta", task])


def by_command(case, tool, task, install, line):
    """What a tool makes of a case's CT, in a folder of its own; made again when the CT is another one.
    line: command, CT, folder -> its command line   -> the folder"""
    command, ct, name = shutil.which(tool), file_of(case, "ct"), OPTIONS.get(tool, tool)
    if ct is None:
        raise ValueError(f"{case}: no ct.nii.gz; --segment {name} makes masks of the CT; add it")
    folder = case / "segmented" / name / task
    record, made_from = folder / "made_from.json", dict(ct=hashlib.sha256(ct.read_bytes()).hexdigest(), task=task)
    if record.is_file() and json.loads(record.read_text()) == made_from:
        return folder
    if command is None:
        raise ValueError(f"{tool} is not installed; --segment {name} calls it; {install}, or give the masks and leave "
                         "--segment out")
    with whole_folder(folder, overwrite=True) as part:
        done = subprocess.run([*map(str, line(command, ct, part))])
        if done.returncode:
            raise RuntimeError(f"{case}: {tool}, task {task}, ended with code {done.returncode}; "
                               "its own words stand above")
        (part / "made_from.json").write_text(json.dumps(made_from))
    return folder
