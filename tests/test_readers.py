"""The blinded reading: nothing in the package tells which case is real, and filled sheets score as by hand."""
import base64
import csv
import gzip
import json
import re
import sys
import types
from pathlib import Path

import nibabel
import numpy as np
import pytest

import data
import evaluate
from support.nifti import load_nifti, write_nifti
from support.readers import FINDINGS, HOW, KEY, SHEET, agreement, read_sheet, table
from support.statistics import fleiss, wilson

# --- the package ---

def write(path, folders, titles=None, channels=()):
    """A page as view.py's: titles, folders' names where there are none, and files as they are."""
    files = {f"{p.parent.name}/{p.name}": base64.b64encode(p.read_bytes()).decode()
             for folder in folders for p in sorted(folder.iterdir())}
    Path(path).write_text(f"<html>{titles or folders}{list(channels)}{json.dumps(files)}</html>")


@pytest.fixture
def sets(phantoms, tmp_path, monkeypatch):
    """Phantoms at 32^3 in two folders, of one grid, but told apart by place, HU, dtype, names and headers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "view", types.SimpleNamespace(write=write))
    data.main(["export", str(phantoms), "--out", "Krankenhaus"])
    for case in sorted(Path("Krankenhaus").iterdir()):
        for path in case.iterdir():
            array, affine = load_nifti(path)
            if path.name == "ct.nii.gz":
                array[:3] = 2000                               # metal; no sample has it
            affine[:3, 3] += 50
            (Path("Netzwerk") / f"traum_{case.name}").mkdir(parents=True, exist_ok=True)
            image = nibabel.Nifti1Image(array.astype(np.float32), affine)
            image.header["descrip"] = b"by a network"
            nibabel.save(image, Path("Netzwerk") / f"traum_{case.name}" / path.name)


def rows_of(path):
    with open(path) as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("masks", [False, True])
def test_nothing_in_the_package_tells_which_is_which(sets, masks, capsys):
    evaluate.main(["readers", "Krankenhaus", "Netzwerk", "--n", "4", "--readers", "2", *["--masks"] * masks])
    files = sorted(Path("reading").iterdir())
    pages = [p for p in files if p.suffix == ".html"]
    assert [p.name for p in files] == ["README.txt", *(f"case_{i}.html" for i in range(1, 9)), "reader_1.csv",
                                       "reader_2.csv"]
    assert len({p.stat().st_size for p in pages}) == len({p.stat().st_mtime_ns for p in pages}) == 1
    headers = set()
    for p in pages:
        text = p.read_text()
        parts = json.loads(re.search(r"\]({.*})</html> *$", text)[1])
        assert [Path(name).name for name in parts] == sorted(f"{c}.nii.gz" for c in data.CHANNELS[:4 if masks else 1])
        raw = {name: gzip.decompress(base64.b64decode(b)) for name, b in parts.items()}
        for word in (b"Kranken", b"Netz", b"traum", b"network", b"synth", b"/tmp"):
            assert word not in text.encode() and not any(word in b for b in raw.values())
        headers.add(tuple(b[:352] for b in raw.values()))
        ct = nibabel.Nifti1Image.from_bytes(next(b for name, b in raw.items() if name.endswith("ct.nii.gz")))
        values = np.asarray(ct.dataobj)
        assert values.min() >= -1024 and values.max() <= 600 and values.dtype == np.int16
    assert len(headers) == 1                               # place, type and words are the same
    for name in ("README.txt", "reader_1.csv"):
        assert not re.search("kranken|netz|traum", Path("reading", name).read_text(), re.I)


def test_the_key_is_apart_and_names_the_case_that_is_shown(sets, capsys):
    evaluate.main(["readers", "Krankenhaus", "Netzwerk", "--n", "4", "--readers", "2", "--seed", "5"])
    assert not list(Path("reading").rglob("key*")) and not Path("readers.csv").exists()
    key, sheets = rows_of("reading-key/key.csv"), [rows_of(f"reading/reader_{i}.csv") for i in (1, 2)]
    assert [r["origin"] for r in key].count("real") == 4 and len({r["source"] for r in key}) == 8
    first = [r["origin"] for r in key][:4]
    assert first != ["real"] * 4 and first != ["synthetic"] * 4 and "reading-key" in capsys.readouterr().out
    for row in key:
        assert row["source"].startswith("Krankenhaus" if row["origin"] == "real" else "Netzwerk")
        parts = json.loads(re.search(r"\]({.*})</html>", Path("reading", row["case"].replace(" ", "_")
                                                               + ".html").read_text())[1])
        shown = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(*parts.values())))
        assert (np.asarray(shown.dataobj) == load_nifti(Path(row["source"]) / "ct.nii.gz")[0].clip(-1024, 600)).all()
    orders = [[r["case"] for r in sheet] for sheet in sheets]
    assert sorted(orders[0]) == sorted(orders[1]) == [r["case"] for r in key] and orders[0] != orders[1]
    assert all(value == "" for sheet in sheets for r in sheet for k, value in r.items() if k != "case")


def test_the_real_viewer_shows_no_more(sets, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "view")
    pytest.importorskip("view")
    evaluate.main(["readers", "Krankenhaus", "Netzwerk", "--n", "1", "--readers", "1"])
    for name in ("case_1", "case_2"):
        text = Path("reading", f"{name}.html").read_text()
        assert name.replace("_", " ") in text and not re.search("Krankenhaus|Netzwerk|traum_|/tmp/", text)


def test_cases_that_cannot_be_blinded_are_refused_and_nothing_is_written(sets, fails):
    for path in Path("Netzwerk").glob("*/ct.nii.gz"):
        array, affine = load_nifti(path)
        write_nifti(path, array[1:].astype(np.int16), affine)
    tries = {"": "would tell them apart", "--masks": "of different shapes or places", "--n 6": "5 cases; --n 6",
             "--n 0": "1 or more of each", "--key reading/key.csv": "outside of the package"}
    for options, words in tries.items():
        code, said = fails(evaluate.main, "readers", "Krankenhaus", "Netzwerk", "--n", 4, *options.split())
        assert code == 2 and words in said and said.count("\n") == 1
        assert not Path("reading").exists() and not Path("reading-key").exists()
    Path("reading").mkdir()
    assert "nothing is replaced" in fails(evaluate.main, "readers", "Krankenhaus", "Netzwerk")[1]


# --- the score ---

def test_fleiss_kappa_is_that_of_the_worked_example():
    """Ten subjects, fourteen raters, five answers."""
    counts = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0],
              [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    assert fleiss(counts) == pytest.approx(0.210, abs=0.0005)
    assert fleiss([[3, 0], [0, 3]]) == 1 and np.isnan(fleiss([[3, 0], [3, 0]]))
    assert fleiss([[1, 1], [1, 1]]) == pytest.approx(-1)


def test_wilsons_interval_holds_what_it_should():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4) and wilson(10, 10)[1] == pytest.approx(1)


ORIGINS = ["real"] * 3 + ["synthetic"] * 3


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """A key of six cases and two filled sheets. a takes one synthetic case for real, b two real ones for synthetic;
    fissures are told apart by all points, airways by none."""
    monkeypatch.chdir(tmp_path)
    names = [f"case {i}" for i in range(1, 7)]
    key = [dict(case=n, origin=o, finding=f, source=f"x/{n}") for n, o, f in
           zip(names, ORIGINS, ["effusion", "none", "bullae", "none", "", ""])]
    (tmp_path / "key.csv").write_text(table(KEY, key))
    answers = {"a": (["real"] * 4 + ["synthetic"] * 2, [5, 5, 4, 3, 1, 2], ["effusion", "none", "bullae", "none"]),
               "b": (["synthetic"] * 2 + ["real"] + ["synthetic"] * 3, [5, 4, 3, 2, 1, 1], ["effusion"] * 4)}
    for name, (origins, points, findings) in answers.items():
        sheet = [dict(case=n, finding=f, fissures=p, airways=3, vessels=3, origin=o)
                 for n, o, p, f in zip(names, origins, points, [*findings, "other", "other"])]
        (tmp_path / f"{name}.csv").write_text(table(SHEET, reversed(sheet)))
    return tmp_path


def test_filled_sheets_score_as_by_hand(filled, capsys):
    evaluate.main(["readers", "--score", "key.csv", "a.csv", "b.csv"])
    out = capsys.readouterr().out
    value = {(r["folder"], r["measure"]): float(r["value"]) for r in rows_of("readers.csv") if r["case"] == "all"}
    assert [value[who, "accuracy origin"] for who in ("a", "b", "all")] == pytest.approx([5 / 6, 4 / 6, 4.5 / 6])
    assert value["a", "accuracy finding"] == 1 and value["b", "accuracy finding"] == pytest.approx(1 / 4)
    # alike in 3 of 6; 5 times real, 7 times synthetic: chance (25 + 49) / 144
    assert value["all", "kappa origin"] == pytest.approx((1 / 2 - 74 / 144) / (1 - 74 / 144))
    # means 5, 4.5, 3.5 against 2.5, 1, 1.5: the lowest rank sum of 20
    assert value["synthetic", "p fissures"] == pytest.approx(2 / 20)
    assert value["synthetic", "p airways"] == pytest.approx(1)
    low, high = wilson(5, 6)
    assert f"0.833 [{low:.3f}, {high:.3f}]   synthetic taken for real 0.33" in out and "U = 0, p = 0.1" in out
    assert "finding, of 4 cases" in out and Path("readers.png").exists()


def test_a_spreadsheets_own_csv_counts_alike_and_one_reader_agrees_with_nobody(filled, capsys):
    evaluate.main(["readers", "--score", "key.csv", "a.csv"])
    plain = capsys.readouterr().out
    text = Path("a.csv").read_text().replace(",", ";").replace("real", " Real ")
    Path("a.csv").write_text(text, encoding="utf-8-sig")
    evaluate.main(["readers", "--score", "key.csv", "a.csv"])
    assert capsys.readouterr().out == plain and "kappa none" in plain
    assert "kappa" not in Path("readers.csv").read_text()
    assert np.isnan(agreement({"a": read_sheet("a.csv", {f"case {i}": 0 for i in range(1, 7)})}, "finding", FINDINGS))


@pytest.mark.parametrize("old, new, words", [
    ("case 3,bullae,4", "case 3,bullae,", "line 5 (case 3), column fissures: empty; a whole number from 1 to 5"),
    ("case 3,bullae,4", "case 3,bullae,6", "line 5 (case 3), column fissures: 6;"),
    ("case 3,bullae", "case 3,tumour", "line 5 (case 3), column finding: tumour; none, effusion,"),
    ("case 3", "case 33", "line 5 (case 33), column case: case 33; a case of the key"),
    ("case 3", "case 4", "line 5, column case: case 4 a second time"),
    ("case 3,bullae,4,3,3,real\n", "", "no line for case 3"),
    ("case 3,bullae,4,3,3,real", "case 3,bullae,4,3,3", "line 5 (case 3), column origin: empty; real or synthetic"),
    ("vessels", "vessel", "no column vessels"),
])
def test_a_wrong_or_half_filled_sheet_is_refused_by_row_and_column(filled, fails, old, new, words):
    text = Path("a.csv").read_text()
    assert old in text
    Path("a.csv").write_text(text.replace(old, new, 1))
    code, said = fails(evaluate.main, "readers", "--score", "key.csv", "b.csv", "a.csv")
    assert code == 2 and f"a.csv{', ' if words.startswith('line') else ': '}{words}" in said and said.count("\n") == 1
    assert not Path("readers.csv").exists()


def test_a_score_needs_a_key_of_both_kinds_and_each_reader_once(filled, fails):
    assert "a sheet twice" in fails(evaluate.main, "readers", "--score", "key.csv", "a.csv", "a.csv")[1]
    assert "at least one sheet" in fails(evaluate.main, "readers", "--score", "key.csv")[1]
    assert "no column source" in fails(evaluate.main, "readers", "--score", "a.csv", "b.csv")[1]
    Path("key.csv").write_text(Path("key.csv").read_text().replace("synthetic", "real"))
    assert "not of both kinds" in fails(evaluate.main, "readers", "--score", "key.csv", "a.csv")[1]


def test_the_readers_are_told_every_answer_that_is_allowed():
    assert all(word in HOW for word in (*FINDINGS, *SHEET, "real", "synthetic"))
