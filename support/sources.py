"""Where scans lie, with their masks and reports: folders of NIfTI, CT-RATE, RAD-ChestCT, DICOM. They are listed without
reading a voxel; support/scans.py reads one. docs/data.md shows the trees."""
import csv
import hashlib
import io
import json
import os
import re
import secrets
from collections import defaultdict, namedtuple
from pathlib import Path

from support.checks import MASKS
from support.files import write_atomic
from support.nifti import NAME
from support.scans import header, own_locale, simpleitk, tag
from support.segment import file_of, files_of

# files: of the CT; masks: {channel: {path: our label}}; report: text or None; about: what its reader needs to know
Scan = namedtuple("Scan", "id patient files masks report about")
CT_RATE = re.compile(r"((?:train|valid)_\d+)_([a-z]+)_\d+$")             # a patient, a scan, a reconstruction
EMPTY = ("", "not given.", "not given", "nan", "none")


# --- tables ---

def read_table(path):
    """A CSV (comma, semicolon or tab) or .jsonl.   -> list of {column in lower case: text}"""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            first = text.split("\n", 1)[0]
            rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
        return [{str(k).strip().lower(): "" if v is None else str(v).strip() for k, v in row.items()} for row in rows]
    except (OSError, ValueError, AttributeError, csv.Error) as e:
        raise ValueError(f"{path}: no table ({e}); a CSV with a line of names, or a .jsonl, is needed; "
                         "check the path") from None


def stem(name):
    """A file's or volume's name without what says its format."""
    return re.sub(r"\.(nii|nii\.gz|npz|txt)$", "", Path(str(name)).name, flags=re.I)


def report_of(row):
    """A table's row -> text with its two headings, or None. "Not given." is nothing."""
    def said(*names):
        return next((row[n] for n in names if row.get(n, "").lower() not in EMPTY), "")

    findings, impression = said("findings_en", "findings"), said("impressions_en", "impression_en", "impression")
    if findings or impression:
        return f"Findings: {findings}\nImpression: {impression}"
    return said("text", "report") or None


def by_name(path, keys=("volumename", "id", "subject", "name", "filename")):
    """-> {name: row} of a table, {} without one. ValueError if no column names the scans, or two rows differ for one"""
    if not path:
        return {}
    rows = read_table(path)
    key = next((k for k in keys if rows and k in rows[0]), None)
    if key is None:
        raise ValueError(f"{path}: columns {', '.join(rows[0]) if rows else 'none'}; one of {', '.join(keys)} names "
                         "the scans; rename it")
    found = {}
    for row in filter(lambda row: any(row.values()), rows):
        name = stem(row[key] if key in ("volumename", "filename") else row[key].replace("/", "\\"))
        if found.setdefault(name, row) != row:
            raise ValueError(f"{path}: two rows for {row[key]}; which is right is not known; mend the table")
    return found


def below(root, end):
    """Files of a tree, linked folders too, whose name ends so or has .gz behind it.   -> sorted list"""
    found = [Path(folder, f) for folder, _, files in os.walk(root, followlinks=True) for f in files]
    return sorted(p for p in found if p.name.lower().removesuffix(".gz").endswith(end) and not p.name.startswith("."))


# --- masks in a folder of their own ---

def masks_of(folder, name):
    """A scan's masks below --masks: <folder>/<name>/..., <folder>/<name>_<channel>.nii.gz or
    <folder>/<channel>/<name>.nii.gz.   -> {channel: {path: label}}"""
    found = {}
    for c in MASKS if folder else ():
        folder = Path(folder)
        alone = file_of(folder, f"{name}_{c}") or file_of(folder / c, name)
        files = {alone: 1} if alone else files_of(folder / name, c)[1]
        if files:
            found[c] = files
    return found


# --- the sources: (root, args) -> list of Scan ---

def find_folder(root, args):
    """One folder a case (ct.nii.gz, what lies beside it), flat files <id>.nii.gz, or what --metadata says."""
    texts, known = by_name(args.reports), by_name(args.metadata, ("id",))
    if any(row.get("ct") for row in known.values()):
        return [of_table(root, args, name, row, texts) for name, row in known.items()]
    scans = []
    for ct in sorted({file_of(p.parent, "ct") for p in root.glob("*/ct.nii*")} - {None}):
        masks = {c: files for c in MASKS if (files := files_of(ct.parent, c)[1])} | masks_of(args.masks, ct.parent.name)
        texts_there = sorted(ct.parent.glob("[!.]*.txt"))                # report.txt, or the only one
        text = next((t for t in texts_there if t.name == "report.txt" or len(texts_there) == 1), None)
        scans.append((ct.parent.name, ct, masks, text))
    flat = {m[1]: p for p in sorted(root.glob("[!.]*")) if (m := NAME.match(p.name))}
    for name, ct in flat.items():
        if any(name.endswith("_" + c) and name[:-len(c) - 1] in flat for c in MASKS):
            continue
        masks = {c: {flat[f"{name}_{c}"]: 1} for c in MASKS if f"{name}_{c}" in flat} | masks_of(args.masks, name)
        text = root / f"{name}.txt"
        scans.append((name, ct, masks, text if text.is_file() else None))
    return [Scan(name, known.get(name, {}).get("patient") or name.split("_text")[0], [ct], masks,
                 report_of(texts[name]) if name in texts else text, {}) for name, ct, masks, text in scans]


def of_table(root, args, name, row, texts):
    """A row of id,patient,ct,lobe,airway,vessel,report, paths below the root; of files that are not there it is said
    when the scan is read."""
    text = report_of(texts[name]) if name in texts else root / row["report"] if row.get("report") else None
    masks = masks_of(args.masks, name) | {c: {root / row[c]: 1} for c in MASKS if row.get(c)}
    return Scan(name, row.get("patient") or name, [root / row["ct"]], masks, text, {})


def find_ct_rate(root, args):
    """valid_1/valid_1_a/valid_1_a_1.nii.gz anywhere below; reports and metadata by VolumeName."""
    texts, known, scans = by_name(args.reports), by_name(args.metadata), []
    places = [p.resolve() for p in (root / "ts_seg", root.parent / "ts_seg", Path(args.masks or root / "ts_seg"))]
    ready = {stem(p.name): p for place in places for p in below(place, ".nii")
             if any(part.startswith("ts_") for part in (place.name, *p.relative_to(place).parts[:-1]))}
    for path in below(root, ".nii"):
        name = stem(path.name)
        match = CT_RATE.match(name)
        if not match or set(places) & set(path.resolve().parents):
            continue
        masks = masks_of(args.masks, name)
        if "lobe" not in masks and name in ready:
            masks["lobe"] = {ready[name]: 1}
        row = known.get(name, {})
        about = {k: row[k.lower()] for k in ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
                 if row.get(k.lower())}
        text = report_of(texts[name]) if name in texts else None
        scans.append(Scan(name, match[1], [path], masks, text, dict(ct_rate=about)))
    return scans


def find_rad_chestct(root, args):
    """<id>.npz anywhere below."""
    texts, known = by_name(args.reports), by_name(args.metadata)
    return [Scan(name, known.get(name, {}).get("patient") or name, [path], masks_of(args.masks, name),
                 report_of(texts[name]) if name in texts else None, dict(orientation=args.orientation))
            for path in below(root, ".npz") for name in [stem(path.name)]]


def secret(args):
    """What is mixed into the names of patients, kept in --out alone: without it they cannot be found again."""
    path = Path(args.out) / ".salt"
    if not path.is_file() and not args.dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, secrets.token_hex(16).encode())
    return path.read_text() if path.is_file() else ""


@own_locale()
def find_dicom(root, args):
    """Of every study the CT series with most slices, from however many folders. A patient is a salted hash, and so is
    the case's name; OUT/.origins.csv alone says which folder it came from."""
    if args.metadata:
        raise ValueError("--from dicom with --metadata; the files say whose they are; leave it out")
    sitk, salt = simpleitk(), secret(args)
    texts, studies, origins = by_name(args.reports), defaultdict(dict), []
    for folder in sorted({Path(d) for d, _, files in os.walk(root, followlinks=True) if files}):
        for series in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
            files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series)
            head = header(sitk, files[0])
            if tag(head, "0008|0060") == "CT" and "LOCALIZER" not in tag(head, "0008|0008"):
                study = tag(head, "0020|000d") or str(folder)
                key = tag(head, "0020|000e") or series   # GDCM's own name of a series has more in it
                studies[study].setdefault(key, (tag(head, "0010|0020") or study, []))[1].extend(map(Path, files))
    scans = []
    for study, found in sorted(studies.items()):
        series, (who, files) = max(found.items(), key=lambda item: (len(item[1][1]), item[0]))
        name, patient = (hashlib.sha256((salt + x).encode()).hexdigest()[:12] for x in (series, who))
        scans.append(Scan(name, patient, files, masks_of(args.masks, study),
                          report_of(texts[study]) if study in texts else None, dict(dicom=True)))
        origins.append(f"{name},{files[0].parent}\n")
    if not args.dry_run:
        write_atomic(Path(args.out) / ".origins.csv", "".join(origins).encode())
    return scans


SOURCES = {"folder": find_folder, "ct-rate": find_ct_rate, "rad-chestct": find_rad_chestct, "dicom": find_dicom}
