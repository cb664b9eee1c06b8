"""Checks of what comes in: masks and HU of a NIfTI, the arrays of case folders. Each error says what mends it."""
import contextlib
import hashlib
import json
import os
import sys
import tokenize
from collections import Counter
from pathlib import Path

import numpy as np

from support.anatomy import fault_of_hu, faults_of_masks
from support.files import read_json, sha256, write_atomic
from support.nifti import load_nifti
from support.reports import read_report

TYPES = dict(ct=np.int16, lobe=np.uint8, airway=np.uint8, vessel=np.uint8, low=np.float16, text=np.float16)
# what np.load raises of a damaged file
UNREADABLE = (ValueError, OSError, EOFError, SyntaxError, tokenize.TokenError, MemoryError, OverflowError)
FULL = ("ct", "lobe", "airway", "vessel")                                # arrays of the full grid
MASKS = FULL[1:]
TOP = dict(lobe=5, airway=1, vessel=1)                                   # highest label of a mask


# --- NIfTI ---

def load_channel(name, path):
    """A CT (HU) or mask NIfTI, checked for its kind.   -> array (X,Y,Z) float32, affine"""
    array, affine = load_nifti(path)
    if name == "ct":
        if fault := fault_of_hu(array):
            raise ValueError(f"{path}: {fault}; a chest CT in Hounsfield units has both; apply the rescale slope and "
                             "intercept, once")
        return array, affine
    labels, top = labels_of(array), TOP[name]
    if name != "lobe" and len(labels) == 2 and labels[0] == 0:
        array, labels = (array > 0).astype(np.float32), np.array([0, 1])  # {0,255} and the like
    if name == "lobe" and labels[-1] >= 10 and set(labels) <= {0, 10, 11, 12, 13, 14}:
        array, labels = np.where(array > 0, array - 9, 0), np.array([0, 5])   # TotalSegmentator's are lungmask's + 9
    if labels[-1] == labels[0] == 0:
        raise ValueError(f"{path}: the {name} mask is empty; a structure is needed; "
                         "segment it again (sample.py does without masks)")
    if (labels != np.rint(labels)).any() or labels[0] < 0 or labels[-1] > top:
        raise ValueError(f"{path}: {name} values {labels[0]:g} to {labels[-1]:g}; labels 0..{top} are needed; "
                         "threshold or relabel it")
    if name == "lobe" and labels[-1] < 3:
        print(f"warning: {path}: labels up to {labels[-1]:g}, so the left lung alone (1 LUL, 2 LLL, 3 RUL, 4 RML, "
              "5 RLL); a mask of both lungs is not one of lobes", file=sys.stderr)
    return array, affine


def labels_of(array):
    """The values of an array, sorted; slice by slice, since sorting all takes its memory twice more, and counted where
    they are small integers, since sorting takes long."""
    found = []
    for part in np.moveaxis(array, np.argmax(np.abs(array.strides)), 0):             # as it lies in memory
        small = part.astype(np.uint8)
        if (small == part).all():
            found.append(np.flatnonzero(np.bincount(small.ravel("K"), minlength=256)).astype(array.dtype))
        else:
            found.append(np.unique(part))
    return np.unique(np.concatenate(found))


# --- case folders ---

def has(case):
    """What a case has of the four channels and text, as case.json says; all where it says nothing.   -> list"""
    about = read_json(case / "case.json")
    return [*about.get("has", FULL), *["text"] * about.get("report", True)]


def array_of(case, name):
    """One array of a case folder, mapped. ValueError unless it is one."""
    path = case / f"{name}.npy"
    try:
        a = np.load(path, mmap_mode="r")
        if not isinstance(a, np.ndarray) or not a.size:
            raise ValueError("no array, or an empty one")
        return a
    except UNREADABLE as e:
        raise ValueError(f"{path}: not readable ({e}); a case is whole; "
                         f"run python data.py check {case.parent}") from None


def one_size(folders, names):
    """ValueError unless the arrays of each of these names have one shape in all cases that have it."""
    for name in names:
        shapes = {array_of(case, name).shape: case for case in folders if name == "low" or name in has(case)}
        if len(shapes) > 1:
            seen = " and ".join(f"{case}/{name}.npy is {shape}" for shape, case in list(shapes.items())[:2])
            raise ValueError(f"{seen}; cases of one run are of one size; "
                             "make them alike or move them to a folder of their own")


def complete(folders, names, stage):
    """ValueError unless every case has these arrays, but those that its case.json says it lacks."""
    if "text" in names and folders and not any("text" in has(case) for case in folders):
        raise ValueError(f"{folders[0].parent}: no case has a report; stage {stage} learns from text; prepare some "
                         "with reports")
    for case in folders:
        meant = {"low", *has(case)}
        lacking = [n for n in names if n in meant and not (case / f"{n}.npy").exists()]
        if lacking:
            way = f"python data.py check {case.parent}"
            if "text" in lacking:
                way = f"python text_encoder.py embed {case.parent} --model runs/text"
            files = ", ".join(f"{name}.npy" for name in lacking)
            raise ValueError(f"{case}: no {files}; stage {stage} needs them; run {way}")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:                        # one process of a machine reads for all
        check_once(folders, names)


def enough(edge):
    """ValueError if the first convolution spans more than a volume of this edge; bfloat16 gradients of torch 2.13 then
    write beyond their memory (4 voxels)."""
    if edge < 7:
        raise ValueError(f"volumes with an edge of {edge} voxels; the first convolution spans 7; "
                         "use larger cases, crops, or a lower --patch")


def check_levels(cfg, grid, scale):
    """ValueError unless the levels of a network can halve volumes of this edge, and its first convolution fits."""
    of_depth, of_plane = cfg.multiples()
    if grid % of_plane:
        raise ValueError(f"{cfg.data}: low-resolution volumes of {grid}^3; {cfg.levels} levels halve multiples of "
                         f"{of_plane}; use a grid that is a multiple of {scale * of_plane}, or lower --levels")
    enough(grid // of_depth)


def crop_of(text, cube, step):
    """Text D,H,W -> (D,H,W). ValueError unless D is a multiple of `cube`, H and W are of `step`, and all are large
    enough."""
    crop = tuple(int(n) if n.strip().isdecimal() else 0 for n in text.split(","))
    if len(crop) != 3 or min(crop) < 1 or crop[0] % cube or crop[1] % step or crop[2] % step:
        raise ValueError(f"--crop {text}; D,H,W with H and W multiples of {step} and D of {cube} are needed; "
                         "write --crop 256,80,80")
    enough(min(crop) // cube)
    return crop


def channels_of(text, folders):
    """Text such as "ct,airway" -> those of the four channels, in their order. ValueError where a case has none."""
    names = {name.strip() for name in text.split(",")}
    if not names <= set(FULL):
        raise ValueError(f"--channels {text}; some of {','.join(FULL)} are needed; write --channels ct")
    if "ct" not in names and (without := [case for case in folders if not names & set(has(case))]):
        raise ValueError(f"--channels {text}: {without[0]} has none of these, and so {len(without)} cases; training "
                         "needs one of each; move them away")
    return tuple(c for c in FULL if c in names)


def check_grid(grid):
    """ValueError unless every fourth voxel of a cube of this edge is a cube too."""
    if grid % 4 or grid < 4:
        raise ValueError(f"--grid {grid}; a positive multiple of 4 is needed; use 256 or 128")


def insists(case):
    """Whether a case was prepared with --as-is."""
    with contextlib.suppress(ValueError):                                # told elsewhere
        return bool(read_json(case / "case.json").get("as_is"))


def changed(case, names=TYPES):
    """Arrays of a case, of these names, that are not as written, by the hashes in case.json and text.json.
    -> list of file names"""
    written = read_json(case / "case.json").get("sha256", {}) | read_json(case / "text.json").get("sha256", {})
    files = [f"{name}.npy" for name in names if f"{name}.npy" in written and (case / f"{name}.npy").is_file()]
    return [file for file in files if sha256(case / file) != written[file]]


def check_once(folders, names):
    """ValueError if an array of these names is not what was written. What was checked before, and has the same size
    and time since, is not read again: `.checked.json` beside the cases."""
    record = folders[0].parent / ".checked.json" if folders else Path()
    known, now = {}, {}
    with contextlib.suppress(ValueError):                                # then all is read again
        known = read_json(record)
    for case in folders:
        files = [p for name in names if (p := case / f"{name}.npy").is_file()]
        its = {f"{case.name}/{p.name}": [p.stat().st_size, p.stat().st_mtime_ns] for p in files}
        if all(known.get(name) == of for name, of in its.items()):
            continue
        now |= its
        if wrong := changed(case, names):
            raise ValueError(f"{case}: {', '.join(wrong)} not as written (the hash differs); a disk or a copy damaged "
                             f"it; prepare or embed the case again; see python data.py check {case.parent}")
    if now:
        with contextlib.suppress(OSError):                               # a folder that others may only read
            write_atomic(record, json.dumps(known | now).encode())


def faults(case, low_of):
    """What is wrong with one case folder, each with its mending.   low_of: full arrays by name -> what low.npy must be
    -> list of str, empty when it is sound"""
    arrays, found = {}, []
    try:
        meant = {"low", *has(case)}
    except ValueError as e:
        return [str(e)]
    for name, dtype in TYPES.items():
        if name not in meant:
            continue
        if not (case / f"{name}.npy").exists():
            way = "run text_encoder.py embed" if name == "text" else "prepare the case again"
            found.append(f"{name}.npy missing: {way}")
            continue
        try:
            arrays[name] = a = array_of(case, name)
        except ValueError:
            found.append(f"{name}.npy unreadable: prepare the case again")
            continue
        found += faults_of_values(name, a, dtype)

    grid = arrays["ct"].shape if "ct" in arrays else (0,)
    shapes = {name: a.shape for name, a in arrays.items()}
    if len({shapes[n] for n in FULL if n in shapes}) > 1 or len(grid) != 3 or len(set(grid)) != 1:
        found.append(f"shapes {shapes}: all must be one cube, prepare the case again")
    elif "low" in shapes and shapes["low"] != (len(FULL), *(n // 4 for n in grid)):
        found.append(f"low.npy is {shapes['low']} for a grid of {grid}: prepare the case again")
    elif not found:
        if not insists(case):
            found += [f"{fault}: prepare the case again, insist there with --as-is"
                      for fault in faults_of_masks(**{name: arrays[name] for name in FULL if name in arrays})[0]]
        if not np.allclose(low_of(arrays), arrays["low"], atol=2e-3):
            found.append("low.npy is not every fourth voxel of the full arrays: prepare the case again")
    try:
        found += [f"{name} is not as written (its hash differs): prepare or embed the case again"
                  for name in changed(case)]
        embedded = read_json(case / "text.json").get("report")
        if "text" in meant and embedded not in (None, text_hash(read_report(case / "report.txt"))):
            found.append("report.txt changed since it was embedded: run text_encoder.py embed")
    except ValueError as e:
        found.append(str(e))
    return found


def check_folder(folder, folders, low_of):
    """Every case of a folder: what is wrong and how to mend it, and how many lack what.   folders: its cases
    low_of: as of `faults`   ValueError if any is not sound"""
    there = Path(folder)
    broken = sorted({p.parent for end in ("*.npy", "case.json") for p in there.glob(f"[!.@]*/{end}")} - set(folders))
    wrong, lacking = 0, Counter()
    for case in folders + broken:
        found = faults(case, low_of)
        wrong += bool(found)
        lacks = [] if found else [{"text": "report"}.get(n, n) for n in (*FULL, "text") if n not in has(case)]
        lacking.update(lacks)
        print(f"{case.name}: " + ("; ".join(found) if found else "sound" + "".join(f", no {n}" for n in lacks)))
    if not folders + broken:
        raise ValueError(f"{folder}: no cases in it; a folder of case folders is needed; "
                         "make some with prepare.py or phantom.py, or check the path")
    if wrong:
        raise ValueError(f"{folder}: {wrong} of {len(folders) + len(broken)} cases are not sound; all must be; "
                         "mend or remove them")
    one_size(folders, ("low", "text"))
    print(f"{folder}: {len(folders)} cases, all sound" + "".join(f", {n} without {c}" for c, n in lacking.items()))


def text_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()


def faults_of_values(name, a, dtype):
    """What is wrong with the values of one array of a case."""
    if a.dtype != dtype:
        return [f"{name}.npy is {a.dtype}, not {np.dtype(dtype)}: prepare the case again"]
    if name in TOP:
        top = int(a.max())
        if top == 0:
            return [f"{name}.npy has values up to 0: the mask is empty, prepare the case again"]
        if top > TOP[name]:
            return [f"{name}.npy has values up to {top}: labels are wrong, prepare the case again"]
    elif name == "ct":
        if fault := fault_of_hu(a):
            return [f"ct.npy has {fault}, not a chest: check the rescale slope and intercept"]
    elif not np.isfinite(a).all():
        return [f"{name}.npy has values that are not finite: make it again"]
    return []
