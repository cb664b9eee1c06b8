"""The blinded reading (paper sec. 5.6): a package of cases that does not tell which are real, answer sheets, and the
score of filled ones."""
import csv
import io
import os
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.files import whole_folder, write_atomic
from support.nifti import write_nifti
from support.segment import case_folders, structure
from support.statistics import fleiss, spread, wilson

ORIGINS = ("real", "synthetic")
FINDINGS = ("none", "effusion", "bullae", "cardiomegaly", "opacity", "other")
STRUCTURES = ("fissures", "airways", "vessels")
KEY = ("case", "origin", "finding", "source")
SHEET = ("case", "finding", *STRUCTURES, "origin")

HOW = f"""Reading of chest CTs, some real, some synthetic.

Open the cases in the order of your own sheet, case_01.html and so on, in a browser; no network is needed. Answer every
question of a case before you open the next one, do not go back, and do not talk about the cases before all are done.
Fill in the sheet in a spreadsheet or an editor and save it as CSV.

finding    the main finding: {", ".join(FINDINGS)}
fissures, airways, vessels
           is what you see anatomically feasible?
           1 impossible, 2 unlikely, 3 unsure, 4 likely, 5 as in any patient
origin     your guess: real or synthetic
"""


# --- the package ---

def package(folders, out, key, n, readers, seed, channels, window, write):
    """Of a real and a synthetic folder, n cases each, shuffled, as a folder `out` of pages and sheets; which is which
    goes to the file `key`.   channels: shown   window: HU of the CT's values   write: `view.write`   -> number of cases

    What could tell: names, paths, headers, HU beyond the window, grids, masks, the size of a page (a sample compresses
    better) and the time it was written. So each volume is written anew, under its number, on one and the same grid;
    pages are filled up to one size and have one time.
    """
    rng, chosen = np.random.default_rng(seed), []
    for origin, folder in zip(ORIGINS, folders):
        cases = case_folders(folder)
        if len(cases) < n:
            raise ValueError(f"{folder}: {len(cases)} cases; --n {n} of each folder are asked for; lower it")
        chosen += [(cases[i], origin) for i in rng.permutation(len(cases))[:n]]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    names = [f"case {i:0{len(str(2 * n))}d}" for i in range(1, 2 * n + 1)]

    with whole_folder(out) as part:
        grids, pages = {}, []
        for name, (case, _) in zip(tqdm(names, leave=False), chosen):
            with tempfile.TemporaryDirectory() as room:
                grids[anonymous(case, Path(room) / name, channels, window)] = case
                if len(grids) > 1:
                    raise ValueError(f"{' and '.join(map(str, grids.values()))}: grids of {' and '.join(grids)}, which "
                                     "would tell them apart; one grid is needed; bring both folders to it (data.py)")
                pages.append(part / f"{name.replace(' ', '_')}.html")
                write(pages[-1], [Path(room) / name], titles=[name], channels=channels)
        (part / "README.txt").write_text(HOW)
        for i in range(1, readers + 1):
            rows = [dict.fromkeys(SHEET, "") | dict(case=names[k]) for k in rng.permutation(len(names))]
            (part / f"reader_{i}.csv").write_text(table(SHEET, rows))
        alike(pages)
        key.parent.mkdir(parents=True, exist_ok=True)
        rows = [dict(case=name, origin=origin, finding="", source=case) for name, (case, origin) in zip(names, chosen)]
        write_atomic(key, table(KEY, rows).encode())
    return len(names)


def anonymous(case, folder, channels, window):
    """A case's volumes written anew, around the world's origin.   -> its grid in words"""
    volumes = {name: structure(case, name) for name in channels}
    missing = [name for name, found in volumes.items() if found is None]
    if missing:
        raise ValueError(f"{case}: no {missing[0]}.nii.gz; every case shows the same channels; add it, or leave "
                         "--masks out")
    ct, affine = volumes["ct"]
    size = np.round(np.linalg.norm(affine[:3, :3], axis=0), 3)
    plain = np.diag([*size, 1.0])
    plain[:3, 3] = -size * (np.array(ct.shape) - 1) / 2
    folder.mkdir()
    for name, (a, its) in volumes.items():
        if a.shape != ct.shape or not np.allclose(its, affine, atol=1e-3):
            raise ValueError(f"{case}: {name} {a.shape} and CT {ct.shape}, of different shapes or places; one grid is "
                             "needed; segment this very CT")
        a = np.rint(a.clip(*window)).astype(np.int16) if name == "ct" else a.astype(np.uint8)
        write_nifti(folder / f"{name}.nii.gz", a, plain)
    return f"{'x'.join(map(str, ct.shape))} voxels of {'x'.join(f'{s:g}' for s in size)} mm"


def alike(pages):
    """Files of one size, by spaces at the end, which HTML ignores, and of one time."""
    most, last = max(p.stat().st_size for p in pages), max(p.stat().st_mtime for p in pages)
    for p in pages:
        with open(p, "ab") as f:
            f.write(b" " * (most - p.stat().st_size))
        os.utime(p, (last, last))


def table(columns, rows):
    """Rows as the text of a CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- filled sheets ---

def read_table(path, columns):
    """A CSV with these columns, of commas or, as some spreadsheets write, semicolons.   -> list of (line, row)"""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = text.splitlines()
        reader = csv.DictReader(lines, delimiter=";" if ";" in text.partition("\n")[0] else ",", strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: no CSV in UTF-8 ({e}); a line is needed for each case; save it again") from None
    missing = [c for c in columns if c not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]}; {','.join(columns)} are needed; name them in the first line")
    return [(i, {c: " ".join((row[c] or "").split()) for c in columns}) for i, row in rows]


def judged(path, columns, allowed):
    """A sheet or a key, each field of which is one of those allowed.   allowed: {column: (values, in words)}
    -> {case: row}"""
    found = {}
    for line, row in read_table(path, columns):
        for column, (values, words) in allowed.items():
            row[column] = row[column].lower()
            if row[column] not in values:
                raise ValueError(f"{path}, line {line} ({row['case'] or 'no case'}), column {column}: "
                                 f"{row[column] or 'empty'}; {words} is needed; fill it in")
        if row["case"] in found:
            raise ValueError(f"{path}, line {line}, column case: {row['case']} a second time; one line a case is "
                             "needed; remove one")
        found[row["case"]] = row
    return found


def read_key(path):
    """-> {case: row}; an empty finding is not known"""
    key = judged(path, KEY, dict(origin=one_of(ORIGINS), finding=(("", *FINDINGS), one_of(FINDINGS)[1])))
    if {row["origin"] for row in key.values()} != set(ORIGINS):
        raise ValueError(f"{path}: {len(key)} cases, not of both kinds; real and synthetic ones are compared; name the "
                         "key that was written with the package")
    return key


def read_sheet(path, key):
    """A reader's answers.   -> {case: row}, in the key's order"""
    points = (tuple("12345"), "a whole number from 1 to 5")
    allowed = dict(case=(key, "a case of the key"), finding=one_of(FINDINGS), **dict.fromkeys(STRUCTURES, points),
                   origin=one_of(ORIGINS))
    sheet = judged(path, SHEET, allowed)
    missing = [case for case in key if case not in sheet]
    if missing:
        raise ValueError(f"{path}: no line for {missing[0]}; every case of the key needs its answers; add it")
    return {case: sheet[case] for case in key}


def one_of(values):
    return values, ", ".join(values[:-1]) + " or " + values[-1]


# --- the score ---

def agreement(sheets, column, answers):
    """Fleiss' kappa of the sheets' answers to a question; nan of one reader."""
    if len(sheets) < 2:
        return float("nan")
    rows = zip(*(sheet.values() for sheet in sheets.values()))
    return fleiss([[sum(row[column] == a for row in of) for a in answers] for of in rows])


def score(key, paths):
    """Filled sheets against the key, printed.   -> rows for the CSV

    Accuracy has Wilson's interval. That of all readers together counts as many cases as there are, not answers: readers
    of one case are not independent of each other. Feasibility: Wilcoxon's rank sum test, two-sided, since the real and
    the synthetic cases are different ones, with no pairs for the signed rank; of each case the readers' mean, once.
    """
    from scipy.stats import mannwhitneyu
    key = read_key(key)
    names = [Path(p).stem for p in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(map(str, paths))}: a sheet twice, or two of one name; each reader's counts once; "
                         "rename or leave out")
    sheets, rows = {name: read_sheet(path, key) for name, path in zip(names, paths)}, []

    def note(folder, case, measure, value, unit="1"):
        if np.isfinite(value):
            rows.append(dict(folder=folder, case=case, measure=measure, value=value, unit=unit))

    real = [case for case, row in key.items() if row["origin"] == "real"]
    synthetic = [case for case in key if case not in real]
    print(f"{len(key)} cases, {len(real)} real and {len(synthetic)} synthetic, {len(sheets)} reader(s)")
    for column, answers in (("origin", ORIGINS), ("finding", FINDINGS)):
        known = [case for case, row in key.items() if row[column]]
        if not known:
            print("finding: the key knows none; fill in its column")
            continue
        print(f"{column}, of {len(known)} cases; accuracy, 95 % interval")
        right = {name: sum(sheet[c][column] == key[c][column] for c in known) for name, sheet in sheets.items()}
        for name, hits in {**right, "all": sum(right.values()) / len(right)}.items():
            low, high = wilson(hits, len(known))
            fooled = np.mean([sheet[c]["origin"] == "real" for who, sheet in sheets.items() for c in synthetic
                              if name in (who, "all")])
            words = f"   synthetic taken for real {fooled:.2f}" if column == "origin" else ""
            print(f"  {name:24} {hits / len(known):.3f} [{low:.3f}, {high:.3f}]{words}")
            note(name, "all", f"accuracy {column}", hits / len(known))
        kappa = agreement(sheets, column, answers)
        words = f"{kappa:.3f}" if np.isfinite(kappa) else "none, of one reader or one answer alone"
        print(f"  agreement, Fleiss' kappa {words}")
        note("all", "all", f"kappa {column}", kappa)

    print(f"{'feasibility, 1 to 5':24}{'real':>14}{'synthetic':>14}   Wilcoxon rank sum, two-sided")
    for s in STRUCTURES:
        mean = {c: float(np.mean([int(sheet[c][s]) for sheet in sheets.values()])) for c in key}
        groups = [[mean[c] for c in cases] for cases in (real, synthetic)]
        test = mannwhitneyu(groups[1], groups[0])
        print(f"  {s:22}" + "".join(f"{np.mean(g):8.2f} ± {spread(g):.2f} " for g in groups)
              + f"  U = {test.statistic:g}, p = {test.pvalue:.2g}")
        for origin, cases in zip(ORIGINS, (real, synthetic)):
            for c in cases:
                note(origin, c, s, mean[c], "1 to 5")
        note("synthetic", "all", f"p {s}", test.pvalue)
    return rows
