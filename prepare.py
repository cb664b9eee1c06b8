"""From a folder of scans to cases that train: every scan is found, read, checked and placed on the model's grid; one
that cannot be used is named and passed over. Paper sec. 5.1.

    python prepare.py --from folder --root scans --out data/train               # ct.nii.gz and what lies beside it
    python prepare.py --from ct-rate --root CT-RATE/train --reports reports.csv --metadata metadata.csv --jobs 8
    python prepare.py --from rad-chestct --root npz --masks masks
    python prepare.py --from dicom --root pacs --reports reports.csv --segment totalseg
    python prepare.py ... --dry-run                                             # what it will take, nothing written

The same command again goes on, and does what is new. OUT/prepare_report.csv has a line for every scan, OUT/sheets/
pictures of all cases. docs/data.md shows the trees.
"""
import argparse
import contextlib
import csv
import ctypes
import hashlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import CHANNELS, FOV, MASKS, SCALE, cases, grid_affine, on_grid, write_case
from support.align import antspy, onto, read_atlas
from support.anatomy import WIDEST
from support.checks import check_grid, has
from support.cli import Parser, exits, say
from support.files import read_json, sha256, write_atomic
from support.makers import check_tools, segmented, tools_of
from support.nifti import read_header
from support.pictures import cohort, sheet
from support.reports import checked, patient, read_report, split_sections
from support.scans import RAD, axes, read_scan
from support.segment import combined
from support.sources import SOURCES, by_name
from support.splits import read_split, write_split

COLUMNS = ("id", "patient", "verdict", "has", "findings", "ct", "seconds", "key")
KEPT = ("kept", "kept, with a warning")
COPY = "the same file as"
PAGE = 20                         # cases of a page of pictures


# --- one scan ---

def make(scan, a):
    """One scan -> its case, or why there is none.   -> row of the report"""
    began, found, there = time.time(), [], ()
    try:
        case, meta = read(scan, a, found)
        own = dict(id=scan.id, patient=scan.patient, key=key(scan, a), findings=found)
        write_case(Path(a.out) / scan.id, **case, meta=dict(meta, patient=scan.patient, prepared=own))
        there = [c for c in (*CHANNELS, "report") if case.get(c) is not None]
        verdict = KEPT[bool(found)]
        shutil.rmtree(Path(a.out) / ".segmented" / scan.id, ignore_errors=True)
    except ValueError as e:
        verdict, found = "refused", [*found, str(e)]
    except (OSError, RuntimeError, MemoryError) as e:
        verdict, found = "failed", [*found, f"{type(e).__name__}: {e}"]
    return dict(id=scan.id, patient=scan.patient, verdict=verdict, has=" ".join(there), findings=" | ".join(found),
                ct=named(scan), seconds=round(time.time() - began, 1), key=key(scan, a))


def named(scan):
    """What the report calls a scan; of DICOM no path, which may hold a name."""
    return f"{len(scan.files)} slices" if "dicom" in scan.about else str(scan.files[0])


def read(scan, a, found):
    """-> what `write_case` takes, and case.json's words. ValueError for a scan that is refused; `found` gets what is
    said of one that is kept"""
    with told(found):
        ct, affine, note = read_scan(scan)
        shape = ct.shape
        found += [f"CT: {note}"] if note else []
        volumes, names = {"ct": (ct, affine)}, {"ct": named(scan)}
        for c, files in (segmented(scan, (ct, affine), a) | scan.masks).items():
            with said(found, f"{c} mask left out: "):
                mask = combined(c, files)
                share = np.mean(mask[0] > 0)
                if not 0 < share <= WIDEST[c]:
                    raise ValueError(f"it fills {share:.0%} of the volume")
                volumes[c], names[c] = (mask[0].astype(np.uint8), mask[1]), next(iter(files))
        to_scan, center = np.eye(4), None
        if a.align == "affine":                          # the scan's world becomes the atlas's
            to_scan, center = onto(a.atlas_lungs, volumes), a.atlas_lungs[2]
            volumes = {c: (array, np.linalg.inv(to_scan) @ its) for c, (array, its) in volumes.items()}
        ct = mask = None                                 # on_grid drops each when it is through
        arrays, center = on_grid(volumes, names, a.grid, center, a.as_is)
    report = report_of(scan, found)
    voxels = {c: int((arrays[c] > 0).sum()) for c in MASKS if c in arrays}
    meta = dict(source={c: Path(p).name for c, p in names.items()}, grid=a.grid, center_ras_mm=center, as_is=a.as_is,
                affine=(to_scan @ grid_affine(a.grid, center)).tolist(), voxels=voxels, align=a.align,
                scan_affine=affine.tolist(), scan_shape=shape, hu=note)
    return dict(arrays, report=report), meta


def report_of(scan, found):
    """A scan's text, or None."""
    if scan.report is None:
        return None
    with said(found, "report left out: "):
        text = read_report(scan.report) if isinstance(scan.report, Path) else checked(scan.report, "its row")
        for name, part in zip(("Findings", "Impression"), split_sections(text)):
            found += [] if part else [f"report: no {name}"]
        return text if any(split_sections(text)) else None


@contextlib.contextmanager
def told(found):
    """What the checks warn of on stderr becomes findings."""
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        try:
            yield
        finally:
            lines = stream.getvalue().splitlines()
            found += [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


@contextlib.contextmanager
def said(found, words):
    """A part that is wrong is left out, and said."""
    try:
        yield
    except ValueError as e:
        found.append(words + str(e))


# --- what is there, what was done ---

def key(scan, a):
    """What a case is made of: files as they are now, and options.   -> text"""
    files = [*scan.files, *(p for its in scan.masks.values() for p in its)]
    files += [scan.report] if isinstance(scan.report, Path) else []
    seen = [(os.path.relpath(p, a.root), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()]
    text = None if isinstance(scan.report, Path) else scan.report
    asked = (a.grid, a.as_is, ",".join(a.segment) or None, scan.about, text)
    asked += () if a.align == "center" else (a.align, a.atlas_hash)
    return hashlib.sha256(repr((seen, asked)).encode()).hexdigest()[:16]


def find(a):
    """-> list of Scan, by name. ValueError if there are none, or two of a name"""
    root = Path(a.root)
    if not root.is_dir():
        raise ValueError(f"--root {root}: no such folder; it holds the scans; check the path")
    scans = sorted(SOURCES[a.source](root, a))[:a.limit]
    if not scans:
        raise ValueError(f"--root {root}: no scans of {a.source} in it; docs/data.md shows the trees; "
                         "check --from and the path")
    twice = [name for name, n in Counter(s.id for s in scans).items() if n > 1]
    odd = [s.id for s in scans if s.id.startswith(".") or "/" in s.id or len(s.id.encode()) > 200]
    if twice or odd:
        raise ValueError(f"--root {root}: scans {'of one name' if twice else 'with names of no folder'}: "
                         f"{', '.join((twice or odd)[:3])}; each becomes a folder; rename them")
    for name, table in dict(reports=a.reports, metadata=a.metadata).items():
        rows, ids = by_name(table), {s.id for s in scans}
        if a.source != "dicom" and not a.limit and table and rows.keys() ^ ids:
            say(f"warning: --{name} {table}: {len(rows.keys() - ids)} of its rows name no scan, "
                f"{len(ids - rows.keys())} of {len(ids)} scans are not in it")
    return scans


def copies(scans, rows):
    """Scans whose first file has the bytes of another's, those in `rows` first.   -> {name: name of that one}"""
    there = sorted((s for s in scans if s.files[0].is_file()), key=lambda s: (s.id not in rows, s.id))
    size = {s.id: s.files[0].stat().st_size for s in there}
    shared, found, first = Counter(size.values()), {}, {}
    for s in (s for s in there if shared[size[s.id]] > 1):               # others cannot be copies
        digest = sha256(s.files[0])
        if digest in first:
            found[s.id] = first[digest]
        first.setdefault(digest, s.id)
    return found


def read_rows(path):
    """-> {name: row} of a report, but one that a kill cut short; {} if there is none"""
    with contextlib.suppress(FileNotFoundError), open(path, newline="", encoding="utf-8") as f:
        rows = csv.DictReader(f)
        if tuple(rows.fieldnames or ()) == COLUMNS:      # a spreadsheet may have saved something else
            return {r["id"]: r for r in rows if None not in r.values() and None not in r}
    return {}


def done(out, scans, a):
    """Rows of what was prepared before, by the report and the cases themselves.   -> {name: row}. ValueError if a case
    was made from something else"""
    rows, keep, other = read_rows(out / "prepare_report.csv"), {}, []
    for s in scans:
        row, its = rows.get(s.id), key(s, a)
        if (out / s.id).exists():
            own = read_json(out / s.id / "case.json").get("prepared", {})
            if (own.get("key"), own.get("patient")) != (its, s.patient):
                other.append(s.id)
            elif not row or row["key"] != its:           # killed between the case and its row
                row = dict(dict.fromkeys(COLUMNS, ""), **own, verdict=KEPT[bool(own["findings"])], ct=named(s),
                           has=" ".join(has(out / s.id)).replace("text", "report"))
                row["findings"] = " | ".join(own["findings"])
            keep[s.id] = row
        elif row and row["key"] == its and row["verdict"] == "refused" and not row["findings"].startswith(COPY):
            keep[s.id] = row
    if other:
        raise ValueError(f"{out}: {', '.join(other[:3])}{' ...' if len(other) > 3 else ''}: made from other files, of "
                         "another patient or with other options; a case is written once; remove them, or choose "
                         "another --out")
    return keep


def write_rows(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


# --- all of them ---

def begin():
    """A worker: one thread, ends with its parent, leaves signals of the terminal to it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    getattr(ctypes.CDLL(None), "prctl", lambda *args: None)(1, signal.SIGKILL)           # PR_SET_PDEATHSIG, of Linux


def results(todo, a):
    """Rows, as they are done."""
    if a.jobs == 1:
        yield from (make(s, a) for s in todo)
        return
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context("spawn"), begin) as pool:
        try:
            for job in as_completed([pool.submit(make, s, a) for s in todo]):
                yield job.result()
        except BrokenProcessPool:
            raise RuntimeError(f"{a.out}: a worker was killed, as when memory ends; what is done stays; the same "
                               "command goes on; lower --jobs") from None
        finally:
            pool.shutdown(cancel_futures=True)


def prepare(a):
    if a.align == "affine":
        with antspy():                                   # or it is not installed
            a.atlas_lungs, a.atlas_hash = read_atlas(a.atlas), sha256(a.atlas)
    scans, out = find(a), Path(a.out)
    if a.dry_run:
        return foresee(scans, a)
    check_tools(a.segment)
    apart = named_apart(out, scans, a)
    rows = done(out, scans, a)
    todo = [s for s in scans if s.id not in rows]
    same, report = copies(scans, rows) if todo else {}, out / "prepare_report.csv"
    out.mkdir(parents=True, exist_ok=True)
    before = read_rows(report)                           # other folders may have been prepared into this one
    if todo or before | rows != before:
        write_rows(report, (before | rows).values())
    bar = tqdm(total=len(scans), initial=len(rows), desc="prepare", unit="scan", mininterval=1)
    with open(report, "a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS)

        def work(some):
            for row in results(some, a):
                rows[row["id"]] = row
                writer.writerow(row)
                f.flush()
                bar.update()

        work([s for s in todo if s.id not in same])
        others = [s for s in todo if s.id in same]
        work([s for s in others if rows[same[s.id]]["verdict"] not in KEPT])             # the first may lack its masks
    for s in [s for s in others if s.id not in rows]:
        rows[s.id] = dict(dict.fromkeys(COLUMNS, ""), id=s.id, patient=s.patient, verdict="refused", ct=named(s),
                          findings=f"{COPY} {same[s.id]}", key=key(s, a))
        bar.update()
    bar.close()
    if todo:
        write_rows(report, [row for _, row in sorted((before | rows).items())])
    if todo or not (out / "sheets").is_dir():
        pictures(out)
    split(out, apart, a)
    tell(rows, a)


def tell(rows, a):
    """The last lines."""
    n, had = Counter(r["verdict"] for r in rows.values()), Counter(c for r in rows.values() for c in r["has"].split())
    kept = sum(n[v] for v in KEPT)
    lacking = [f"{kept - had[c]} without {c}" for c in (*MASKS, "report") if had[c] < kept]
    for r in [r for r in rows.values() if r["verdict"] not in KEPT][:5]:
        print(f"{r['verdict']}: {r['id']}: {r['findings']}", file=sys.stderr)
    print(f"{a.out}: {kept} cases of {a.grid}^3 ({n[KEPT[1]]} with a warning{''.join(', ' + x for x in lacking)}), "
          f"{n['refused']} refused, {n['failed']} failed; see {a.out}/prepare_report.csv, {a.out}/sheets/")
    if n["failed"]:
        raise RuntimeError(f"{n['failed']} scans failed; what is done stays; the same command tries them again")
    if not kept:
        raise ValueError(f"{a.out}: no case, {n['refused']} scans refused; some must be usable; "
                         f"see {a.out}/prepare_report.csv")


def named_apart(out, scans, a):
    """Who is to be held out by --split, or None. ValueError if it names nobody here, or another split is written."""
    if not a.split:
        return None
    named, record = read_split(a.split), out / "split.json"
    if not set(named) & {s.patient for s in scans}:
        raise ValueError(f"--split {a.split}: none of its {len(named)} names is a patient here, such as "
                         f"{scans[0].patient}; names are needed; mend it")
    if record.is_file() and set(read_split(record)) != set(named):
        raise ValueError(f"{record}: holds out others than --split {a.split}; who was held out stays so; leave --split "
                         "out, or remove that file if nothing was trained on these cases")
    return named


def split(out, named, a):
    """split.json: who is held out, by patient; once, and not for a part of the scans."""
    record, patients = out / "split.json", sorted({patient(c) for c in cases(out)})
    if record.is_file() or not patients or a.limit:
        return
    if named is None:
        order = np.random.default_rng(a.seed).permutation(len(patients))
        few = min(a.held_out > 0, len(patients) - 1)       # one at least
        named = [patients[i] for i in order[:max(few, round(a.held_out * len(patients)))]]
    if not set(patients) - set(named):
        raise ValueError(f"{a.out}: all {len(patients)} patients would be held out; some are trained on; change "
                         "--split or --held-out")
    write_split(out, named, a.seed)


def pictures(out):
    """Pages of cases, and distributions over them, from the low-resolution volumes."""
    folders, there = cases(out), out / "sheets"
    if not folders:
        return
    there.mkdir(exist_ok=True)
    for i in range(0, len(folders), PAGE):
        part = folders[i:i + PAGE]
        sheet(there / f"cases_{i // PAGE + 1:03d}.png", [np.load(c / "low.npy") for c in part], [c.name for c in part],
              FOV)
    cohort(there / "cohort.png", [(np.load(c / "low.npy", mmap_mode="r")[0], read_json(c / "case.json"))
                                  for c in folders])


def foresee(scans, a):
    """What it would take: verdicts on headers, then one scan, made for the measure and thrown away."""
    wrong, known = {}, done(Path(a.out), scans, a)
    for s in scans:
        try:
            if s.files[0].suffix.lower() in (".gz", ".nii"):
                read_header(s.files[0])
        except ValueError as e:
            wrong[s.id] = str(e)
    good = [s for s in scans if s.id not in wrong and s.id not in known]
    for name, why in list(wrong.items())[:10]:
        print(f"refused: {name}: {why}")
    masks, texts = Counter(c for s in scans for c in s.masks), sum(s.report is not None for s in scans)
    print(f"{len(scans)} scans of {len({s.patient for s in scans})} patients, {len(known)} of them done, {len(wrong)} "
          f"refused by their headers; {', '.join(f'{masks[c]} with {c}' for c in MASKS)}, {texts} with a report")
    if good:
        with tempfile.TemporaryDirectory(prefix="prepare_") as folder:
            row = make(good[len(good) // 2], argparse.Namespace(**{**vars(a), "out": folder}))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        each = a.grid**3 * 5 + 8 * (a.grid // SCALE)**3
        hours = len(good) * row["seconds"] / a.jobs / 3600
        print(f"one of them, {row['id']}: {row['verdict']}, {row['seconds']} s, at most {peak:.1f} GB of memory; "
              f"{len(good)} in {a.jobs} processes: {hours:.1f} h, {len(good) * each / 2**30:.1f} GB of disk, "
              f"{a.jobs * peak:.1f} GB of memory")


def main(argv=None):
    p = Parser(description=__doc__)
    add = p.add_argument_group("what goes in").add_argument
    add("--from", dest="source", choices=SOURCES, required=True, help="how the folder is laid out")
    add("--root", required=True, metavar="DIR", help="where the scans are")
    add("--reports", metavar="FILE", help="CSV or .jsonl: VolumeName or id; Findings_EN, Impressions_EN, or text")
    add("--metadata", metavar="CSV", help="ct-rate: its metadata; else a table id,patient,ct,lobe,airway,vessel,report")
    add("--masks", metavar="DIR", help="masks: <id>/airway.nii.gz, <id>_airway.nii.gz or airway/<id>.nii.gz ...")
    add("--segment", metavar="TOOLS", type=tools_of, default=(),
        help="make the masks that are missing with totalseg, lungmask (lobes), naviairway (airways), or some: a,b")
    add("--orientation", metavar="CODES", help="rad-chestct: where the three axes lead instead of IPL")
    add("--limit", type=int, metavar="N", help="the first N scans alone")
    add = p.add_argument_group("what comes out").add_argument
    add("--out", default="data/train", metavar="DIR", help="folder of cases (default data/train)")
    add("--grid", type=int, default=256, help="256 (the paper's, the default) or 128 (--preset demo)")
    add("--align", choices=("center", "affine"), default="center",
        help="center: the lungs' middle is the grid's (default); affine: lungs are laid on the --atlas's, by antspyx")
    add("--atlas", metavar="FILE", help="with --align affine: a mask of lungs or lobes, or a chest CT")
    add("--as-is", action="store_true", help="take masks that do not look like a chest's, with a warning")
    add("--held-out", type=float, default=0.1, help="share of the patients in split.json (default 0.1)")
    add("--split", metavar="FILE", help="a split.json to take instead")
    add("--seed", type=int, default=0, help="decides who is held out (default 0)")
    add = p.add_argument_group("work").add_argument
    add("--jobs", type=int, default=1, metavar="N", help="scans at a time (default 1)")
    add("--dry-run", action="store_true", help="say what it will take; write nothing")
    a = p.parse_args(argv)
    with exits():
        check_grid(a.grid)
        if a.jobs < 1 or (a.limit or 1) < 1 or not 0 <= a.held_out < 1 or a.seed < 0:
            raise ValueError(f"--jobs {a.jobs}, --limit {a.limit}, --held-out {a.held_out}, --seed {a.seed}; at least "
                             "1, 1, 0 and below 1, 0; change it")
        if (a.align == "affine") != bool(a.atlas):
            raise ValueError(f"--align {a.align}{f', --atlas {a.atlas}' if a.atlas else ''}; --align affine goes with "
                             "--atlas FILE; pass both or none")
        axes(a.orientation or RAD[0])
        prepare(a)


if __name__ == "__main__":
    main()
