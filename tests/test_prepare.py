"""From a folder of scans, in every layout, to cases that train."""
import contextlib
import csv
import itertools
import json
import locale
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import nibabel
import numpy as np
import pytest

import data
import prepare
import support.scans
from data import CHANNELS, MASKS, cases
from support import align
from support.nifti import load_nifti
from support.scans import axes, in_hu
from support.sources import by_name, report_of
from support.splits import read_split

ROOT = Path(__file__).parent.parent
GRID = ["--grid", "32"]


@pytest.fixture(scope="module")
def scans(phantoms, tmp_path_factory):
    """The five phantoms as NIfTI, a folder each, with their reports."""
    folder = tmp_path_factory.mktemp("scans") / "real"
    data.main(["export", str(phantoms), "--out", str(folder)])
    for case in cases(phantoms):
        shutil.copy(case / "report.txt", folder / case.name)
    return folder


def rows(out):
    with open(out / "prepare_report.csv", newline="") as f:
        return {r["id"]: r for r in csv.DictReader(f)}


def run(source, root, out, *more):
    prepare.main([*map(str, ("--from", source, "--root", root, "--out", out, *GRID, *more))])
    return {case.name: case for case in cases(out)}


def same(case, other):
    return all((np.load(case / f"{c}.npy") == np.load(other / f"{c}.npy")).all() for c in CHANNELS)


def header_of(path, change):
    """Rewrites a NIfTI with other values.   change: array -> array"""
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj)).astype(np.int16), image.affine), path)


# --- layouts ---

@pytest.mark.slow
def test_a_folder_a_case_flat_files_and_a_table_are_one_thing(scans, tmp_path):
    whole = run("folder", scans, tmp_path / "a")
    assert len(whole) == 5 and all((case / "report.txt").is_file() for case in whole.values())
    flat, table = tmp_path / "flat", [["id", "patient", "ct", *MASKS, "report"]]
    flat.mkdir()
    for case in sorted(scans.iterdir()):
        for c in CHANNELS:
            shutil.copy(case / f"{c}.nii.gz", flat / f"{case.name}{'' if c == 'ct' else '_' + c}.nii.gz")
        shutil.copy(case / "report.txt", flat / f"{case.name}.txt")
        files = [*(f"{c}.nii.gz" for c in CHANNELS), "report.txt"]
        table.append([case.name, "somebody", *(f"{case.name}/{f}" for f in files)])
    with open(tmp_path / "t.csv", "w", newline="") as f:
        csv.writer(f).writerows(table)
    for found in (run("folder", flat, tmp_path / "b"), run("folder", scans, tmp_path / "c", "--metadata",
                                                            tmp_path / "t.csv")):
        assert all(same(whole[name], found[name]) for name in whole)
        assert all((found[n] / "report.txt").read_text() == (whole[n] / "report.txt").read_text() for n in whole)
    assert json.loads((tmp_path / "c" / "phantom_000000/case.json").read_text())["patient"] == "somebody"


@pytest.mark.slow
def test_every_axis_order_gives_the_same_case(scans, tmp_path):
    image = nibabel.load(scans / "phantom_000000/ct.nii.gz")
    array, whole = np.asarray(image.dataobj), None
    for perm in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            turn = nibabel.orientations.inv_ornt_aff(np.stack([perm, flips], 1), array.shape)
            turned = nibabel.apply_orientation(array, np.stack([perm, flips], 1))
            nibabel.save(nibabel.Nifti1Image(turned, image.affine @ turn), tmp_path / "ct.nii")
            args = Namespace(grid=32, as_is=False, segment=(), align="center", reports=None, metadata=None, masks=None)
            scan, = prepare.SOURCES["folder"](tmp_path, args)
            made = prepare.read(scan, args, [])[0]["ct"]
            whole = made if whole is None else whole
            assert (made == whole).all()


@pytest.fixture
def ct_rate(scans, tmp_path):
    """Patients 1 (two scans, one of two reconstructions), 2 (raw), 3 (rescaled twice); tables as they are published."""
    names = ["valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_1", "valid_3_a_1"]
    reports = [["VolumeName", "Findings_EN", "Impressions_EN"]]
    metadata = [["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]]
    for name, case in zip(names, sorted(scans.iterdir())):
        folder = tmp_path / "ct-rate" / name.rsplit("_", 2)[0] / name.rsplit("_", 1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(case / "ct.nii.gz", folder / f"{name}.nii.gz")
        voxel = nibabel.load(case / "ct.nii.gz").header.get_zooms()
        metadata.append([f"{name}.nii.gz", 1, -1024, f"[{voxel[0]}, {voxel[1]}]", voxel[2]])
        summary = "Not given." if name == "valid_2_a_1" else f"It is {name}."
        reports.append([f"{name}.nii.gz", f"Seen in {name}.", summary])
        for c in ("airway", "vessel"):
            (tmp_path / "masks" / c).mkdir(parents=True, exist_ok=True)
            shutil.copy(case / f"{c}.nii.gz", tmp_path / "masks" / c / f"{name}.nii.gz")
        lobe = nibabel.load(case / "lobe.nii.gz")
        array = np.asarray(lobe.dataobj)
        total = np.where(array > 0, array + 9, 0).astype(np.uint8)
        total[:2, :2, :2] = 90
        (tmp_path / "masks/ts_total").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(total, lobe.affine), tmp_path / f"masks/ts_total/{name}.nii.gz")
    header_of(tmp_path / "ct-rate/valid_2/valid_2_a/valid_2_a_1.nii.gz", lambda a: a + 1024)
    header_of(tmp_path / "ct-rate/valid_3/valid_3_a/valid_3_a_1.nii.gz", lambda a: a - 1024)
    for name, table in dict(reports=reports, metadata=metadata).items():
        with open(tmp_path / f"{name}.csv", "w", newline="") as f:
            csv.writer(f).writerows(table)
    return [x for name in ("reports.csv", "metadata.csv", "masks")
            for x in (f"--{name.split('.')[0]}", tmp_path / name)]


def test_ct_rate_raw_once_and_twice_rescaled_are_the_same_hu(scans, ct_rate, tmp_path):
    whole = list(run("folder", scans, tmp_path / "a").values())
    found = list(run("ct-rate", tmp_path / "ct-rate", tmp_path / "b", *ct_rate).values())
    assert [f.name for f in found] == ["valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_1", "valid_3_a_1"]
    assert all(same(a, b) for a, b in zip(whole, found))
    said = [json.loads((f / "case.json").read_text()) for f in found]
    assert [s["hu"] for s in said] == ["", "", "", "raw values, rescaled", "rescaled twice, undone once"]
    assert [s["patient"] for s in said] == ["valid_1"] * 3 + ["valid_2", "valid_3"]
    assert (found[0] / "report.txt").read_text() == "Findings: Seen in valid_1_a_1.\nImpression: It is valid_1_a_1.\n"
    assert rows(tmp_path / "b")["valid_2_a_1"]["findings"] == "CT: raw values, rescaled | report: no Impression"
    apart = read_split(tmp_path / "b/split.json")
    assert len(apart) == 1 and apart[0] in ("valid_1", "valid_2", "valid_3")


def test_what_could_be_hu_in_no_way_or_in_two_is_refused():
    hu = np.repeat([-1000, -850, -100, 40, 300], 1000).astype(np.float32)
    about = dict(RescaleSlope="1", RescaleIntercept="-1024")
    for change, said in ((0, ""), (1024, "raw values, rescaled"), (-1024, "rescaled twice, undone once")):
        ct, _, note = in_hu(hu + change, None, about, "x")
        assert note == said and (ct == hu).all()
    with pytest.raises(ValueError, match="no chest CT"):
        in_hu(hu + 5000, None, about, "x")
    with pytest.raises(ValueError, match="in two ways"):
        in_hu(hu, None, dict(RescaleSlope="1", RescaleIntercept="-30"), "x")
    with pytest.raises(ValueError, match="RescaleSlope is 'one'"):
        in_hu(hu, None, dict(about, RescaleSlope="one"), "x")


def torso():
    """A drawn chest that is no mirror of itself: two lungs, narrow above, spine behind, aorta on its left. (X,Y,Z)"""
    x, y, z = np.meshgrid(*[2.0 * (np.arange(n) - n / 2) for n in (170, 130, 150)], indexing="ij")
    ct = np.where((x / 160) ** 2 + (y / 110) ** 2 < 1, 40, -1000).astype(np.int16)
    wide = 45 - 0.15 * z
    for side in (-1, 1):
        lung = ((x - side * 75) / wide) ** 2 + (y / 75) ** 2 + (z / 130) ** 2 < 1
        ct[lung] = -850
    ct[(x ** 2 + (y + 60) ** 2 < 15 ** 2)] = 400
    ct[((x + 28) ** 2 + (y + 45) ** 2 < 14 ** 2)] = 50
    return ct


@pytest.mark.slow
def test_an_npz_lies_as_its_authors_say_unless_the_chest_contradicts(tmp_path, monkeypatch):
    monkeypatch.setattr(support.scans, "RAD", ("IPL", 2.0))              # coarser, for the test's time
    right = torso()[::-1, ::-1, ::-1].transpose(2, 1, 0)                 # below, behind, left
    (tmp_path / "npz").mkdir()
    for name, turned in dict(right=right, up=right[::-1], front=right[:, ::-1], mirror=right[..., ::-1],
                             swapped=right.swapaxes(0, 2)).items():
        np.savez(tmp_path / f"npz/{name}.npz", ct=turned)
    found = run("rad-chestct", tmp_path / "npz", tmp_path / "a")
    assert list(found) == ["right"]
    why = {name: r["findings"] for name, r in rows(tmp_path / "a").items() if r["verdict"] == "refused"}
    assert "narrower below" in why["up"] and "spine lies in front" in why["front"]
    assert "aorta lies on the right" in why["mirror"] and len(why) == 4
    shutil.rmtree(tmp_path / "npz")
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz/right.npz", ct=right[..., ::-1])
    turned = run("rad-chestct", tmp_path / "npz", tmp_path / "b", "--orientation", "IPR")
    assert same_ct(found["right"], turned["right"])


def same_ct(a, b):
    return (np.load(a / "ct.npy") == np.load(b / "ct.npy")).all()


# --- DICOM ---

UIDS = "1.2.826.0.1.3680043.2.1125."


@support.scans.own_locale()
def write_series(folder, ct, spacing=(2.0, 2.0, 2.0), skip=(), tilt=0.0, study="1"):
    """(X,Y,Z) in RAS+ order -> a series, axial, in the usual LPS."""
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    array = ct[::-1, ::-1]
    for z in set(range(ct.shape[2])) - set(skip):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, z].T)[None])
        image.SetSpacing(spacing)
        tags = {"0008|0060": "CT", "0008|0008": r"ORIGINAL\PRIMARY\AXIAL", "0020|000d": UIDS + study,
                "0020|000e": UIDS + study + ".1", "0008|0018": f"{UIDS}{study}.1.{z + 1}", "0010|0020": "MRN 4711",
                "0010|0010": "Doe^Jane", "0020|0032": rf"0\{tilt * z}\{spacing[2] * z}", "0028|1052": "-1024",
                "0020|0037": r"1\0\0\0\1\0", "0028|1053": "1", "0020|0013": str(z + 1)}
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{(7919 * z) % 1000:03d}.dcm"))
        writer.Execute(image)


@pytest.mark.slow
def test_a_dicom_series_is_the_nifti_and_names_no_patient(tmp_path):
    ct = torso()[:, :, ::3]
    write_series(tmp_path / "pacs/a/series", ct, (2.0, 2.0, 6.0))
    write_series(tmp_path / "pacs/b", ct[:, :, :30], (2.0, 2.0, 6.0), study="2")
    (tmp_path / "pacs/more").mkdir()                                     # a series over two folders, a slice twice
    for k, f in enumerate(sorted((tmp_path / "pacs/a/series").iterdir())[:20]):
        (shutil.copy if k == 0 else shutil.move)(f, tmp_path / "pacs/more" / f.name)
    before = locale.setlocale(locale.LC_ALL)
    made = run("dicom", tmp_path / "pacs", tmp_path / "a")
    nibabel.save(nibabel.Nifti1Image(ct, np.diag([2, 2, 6, 1])), tmp_path / "x.nii")
    (tmp_path / "nii").mkdir()
    shutil.move(tmp_path / "x.nii", tmp_path / "nii/x.nii")
    alone = run("folder", tmp_path / "nii", tmp_path / "b")["x"]
    assert locale.setlocale(locale.LC_ALL) == before                     # of the process, which SimpleITK changes
    assert len(made) == 2 and any(same_ct(case, alone) for case in made.values())
    patients = {json.loads((case / "case.json").read_text())["patient"] for case in made.values()}
    assert len(patients) == 1
    said = "".join(p.read_text() for p in (tmp_path / "a").rglob("[!.]*") if p.suffix in (".json", ".csv"))
    assert "4711" not in said and "Doe" not in said and "pacs" not in said
    assert "pacs" in (tmp_path / "a/.origins.csv").read_text()


@pytest.mark.slow
def test_series_with_holes_or_a_tilt_are_refused_by_name(tmp_path):
    ct = torso()[:, :, ::3]
    write_series(tmp_path / "pacs/hole", ct, (2.0, 2.0, 6.0), skip=(20,))
    write_series(tmp_path / "pacs/tilt", ct, (2.0, 2.0, 6.0), tilt=0.8, study="2")
    with pytest.raises(SystemExit):
        run("dicom", tmp_path / "pacs", tmp_path / "a")
    why = " ".join(r["findings"] for r in rows(tmp_path / "a").values())
    assert "6.00 to 12.00 mm apart" in why and "a tilted gantry" in why


# --- verdicts ---

@pytest.mark.slow
def test_what_is_wrong_is_named_and_passed_over(scans, tmp_path, capsys):
    shutil.copytree(scans, tmp_path / "r")
    first, second, third, fourth, fifth = sorted((tmp_path / "r").iterdir())
    header_of(first / "ct.nii.gz", lambda a: a * 0 + 40)                                  # one value
    header_of(second / "airway.nii.gz", lambda a: a * 0)                                  # empty
    header_of(third / "lobe.nii.gz", lambda a: a[::-1])                                   # mirrored
    (fourth / "report.txt").write_text("Impression: nothing.\n")
    shutil.copy(fourth / "ct.nii.gz", fifth)                                              # the same scan again
    made = run("folder", tmp_path / "r", tmp_path / "out")
    assert list(made) == [second.name, fourth.name]
    found = rows(tmp_path / "out")
    assert "air and lung" in found[first.name]["findings"]
    assert found[second.name]["findings"].startswith("airway mask left out: it fills 0%")
    assert found[second.name]["has"] == "ct lobe vessel report" and not (made[second.name] / "airway.npy").exists()
    assert "mirrored" in found[third.name]["findings"] and "no Findings" in found[fourth.name]["findings"]
    assert found[fifth.name]["findings"] == f"the same file as {fourth.name}"
    said = capsys.readouterr()
    assert "2 cases of 32^3 (2 with a warning, 1 without airway), 3 refused, 0 failed" in said.out
    assert (tmp_path / "out/sheets/cases_001.png").is_file() and (tmp_path / "out/sheets/cohort.png").is_file()


@pytest.mark.slow
def test_the_same_command_again_does_nothing_and_new_scans_are_added(scans, tmp_path, fails):
    shutil.copytree(scans, tmp_path / "r")
    extra = tmp_path / "phantom_000004"
    shutil.move(tmp_path / "r/phantom_000004", extra)
    run("folder", tmp_path / "r", tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    run("folder", tmp_path / "r", tmp_path / "out")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    apart = read_split(tmp_path / "out/split.json")
    shutil.move(extra, tmp_path / "r")
    assert len(run("folder", tmp_path / "r", tmp_path / "out")) == 5
    assert read_split(tmp_path / "out/split.json") == apart                               # newcomers are for training
    other = tmp_path / "other/another"                                                    # a second folder of scans
    shutil.copytree(tmp_path / "r/phantom_000000", other)
    header_of(other / "ct.nii.gz", lambda a: a + 1)
    assert len(run("folder", tmp_path / "other", tmp_path / "out")) == 6
    assert list(rows(tmp_path / "out")) == ["another", *(f"phantom_00000{k}" for k in range(5))]
    os.utime(tmp_path / "r/phantom_000001/ct.nii.gz")
    args = ["--from", "folder", "--root", tmp_path / "r", "--out", tmp_path / "out", *GRID]
    code, err = fails(prepare.main, *args)
    assert code == 2 and "phantom_000001: made from other files" in err


@pytest.mark.slow
def test_a_killed_run_goes_on_and_nothing_is_lost_or_doubled(scans, tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    for k in range(2):
        for case in sorted(scans.iterdir()):
            copy = root / f"{case.name}_{k}"
            shutil.copytree(case, copy)
            header_of(copy / "ct.nii.gz", lambda a, k=k: a + k)                           # not the same file
    command = [sys.executable, "prepare.py", "--from", "folder", "--root", root, "--out", tmp_path / "out", *GRID,
               "--jobs", "2"]
    job = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(cases(tmp_path / "out")) < 2 and job.poll() is None:
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    for _ in range(100):                                                                  # workers end with it
        if not any(str(root).encode() in (p / "cmdline").read_bytes() for p in Path("/proc").glob("[0-9]*")
                   if (p / "cmdline").exists()):
            break
        time.sleep(0.1)
    assert len(cases(tmp_path / "out")) < 10
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "10 cases" in done.stdout, done.stderr
    alone = run("folder", root, tmp_path / "alone")
    assert all(same(case, tmp_path / "out" / name) for name, case in alone.items())
    with open(tmp_path / "out/prepare_report.csv", newline="") as f:
        assert [r["id"] for r in csv.DictReader(f)] == sorted(alone)
    assert not list((tmp_path / "out").glob(".*.part"))


def test_a_dry_run_tells_and_writes_nothing(scans, tmp_path, capsys):
    shutil.copytree(scans, tmp_path / "r")
    raw = (tmp_path / "r/phantom_000000/ct.nii.gz").read_bytes()
    (tmp_path / "r/phantom_000000/ct.nii.gz").write_bytes(raw[:100])
    run("folder", tmp_path / "r", tmp_path / "out", "--dry-run")
    said = capsys.readouterr().out
    assert "5 scans of 5 patients, 0 of them done, 1 refused by their headers" in said and "5 with airway" in said
    assert "GB of memory; 4 in 1 processes:" in said and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_masks_are_made_by_a_tool_that_is_asked_for(scans, tmp_path, monkeypatch):
    """A command that writes what lungmask writes: one file of lobes."""
    root, tool = tmp_path / "r", tmp_path / "bin/lungmask"
    shutil.copytree(scans, root)
    for case in root.iterdir():
        (case / "lobe.nii.gz").rename(tmp_path / f"{case.name}.nii.gz")
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n[ $3 = --modelname ] && cp {tmp_path}/$(basename $(dirname $1)).nii.gz $2\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    made = run("folder", root, tmp_path / "a", "--segment", "lungmask")
    whole = run("folder", scans, tmp_path / "b")
    assert all(same(made[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_airways_of_naviairway_get_the_place_that_its_files_lack(scans, tmp_path, monkeypatch, fails):
    """A command that writes what NaviAirway's notebook writes: the CT's voxels, as ITK keeps an array of no place."""
    root, tool = tmp_path / "r", tmp_path / "bin/naviairway"
    shutil.copytree(scans, root)
    for case in root.iterdir():
        mask = nibabel.load(case / "airway.nii.gz")
        ras = np.asarray(nibabel.as_closest_canonical(mask).dataobj)     # the CT that the tool is given lies so
        nibabel.save(nibabel.Nifti1Image(ras, np.diag([-1.0, -1, 1, 1])), tmp_path / f"{case.name}.nii.gz")
        (case / "airway.nii.gz").unlink()
    tool.parent.mkdir()
    name = "segmentation_add_broken_parts.nii.gz"
    tool.write_text(f"#!/bin/sh\ncp {tmp_path}/$(basename $(dirname $1)).nii.gz $2/{name}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    args = ["--from", "folder", "--root", root, "--out", tmp_path / "n", "--segment"]
    code, err = fails(prepare.main, *args, "naviairway")
    assert code == 2 and "naviairway is not installed" in err
    code, err = fails(prepare.main, *args, "navi")
    assert code == 2 and "tools are totalseg, lungmask, naviairway" in err
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    made, whole = run("folder", root, tmp_path / "a", "--segment", "naviairway"), run("folder", scans, tmp_path / "b")
    assert all(same(made[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_scan_that_is_turned_and_stretched_is_laid_on_the_atlas(scans, tmp_path, monkeypatch, fails):
    """With the registration's answer given: the case of the scan as it was, up to rounding at edges."""
    to_scan = np.array([[1.1, -0.1, 0, 20], [0.1, 0.95, 0, -15], [0, 0, 1.05, 40], [0, 0, 0, 1]])
    root = tmp_path / "r"
    for case in sorted(scans.iterdir())[:2]:
        (root / case.name).mkdir(parents=True)
        for path in case.glob("*.nii.gz"):
            image = nibabel.load(path)
            nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32), to_scan @ image.affine),
                         root / case.name / path.name)
    monkeypatch.setattr(prepare, "antspy", contextlib.nullcontext)
    monkeypatch.setattr(prepare, "onto", lambda atlas, volumes: to_scan)
    atlas = next(scans.iterdir()) / "lobe.nii.gz"
    made = run("folder", root, tmp_path / "a", "--align", "affine", "--atlas", atlas)
    for name, case in made.items():
        about, lobe = json.loads((case / "case.json").read_text()), np.load(case / "lobe.npy") > 0
        A = np.array(about["affine"])
        assert about["align"] == "affine" and np.allclose(A, to_scan @ data.grid_affine(32, about["center_ras_mm"]))
        as_it_was, _ = data.to_model({"lobe": scans / name / "lobe.nii.gz"}, 32, about["center_ras_mm"])
        assert 2 * np.sum(lobe & (as_it_was["lobe"] > 0)) > 0.99 * (lobe.sum() + (as_it_was["lobe"] > 0).sum())
    code, err = fails(prepare.main, "--from", "folder", "--root", root, "--out", tmp_path / "n", "--align", "affine")
    assert code == 2 and "goes with --atlas" in err
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9), np.uint8), np.eye(4)), tmp_path / "empty.nii")
    code, err = fails(prepare.main, "--from", "folder", "--root", root, "--out", tmp_path / "n", "--align", "affine",
                      "--atlas", tmp_path / "empty.nii")
    assert code == 2 and "no lungs in it" in err


@pytest.mark.slow
def test_the_registration_finds_a_map_that_is_known(scans):
    pytest.importorskip("ants")
    lobe, affine = load_nifti(next(scans.iterdir()) / "lobe.nii.gz")
    to_scan = np.array([[1.1, -0.1, 0, 20], [0.1, 0.95, 0, -15], [0, 0, 1.05, 40], [0, 0, 0, 1]])
    atlas = (lobe > 0, affine)
    found = align.onto(atlas, {"lobe": (lobe, to_scan @ affine)})
    corners = np.array([[x, y, z, 1] for x in (-100, 100) for y in (-80, 80) for z in (-100, 100)]).T
    assert np.abs((found - to_scan) @ corners).max() < 3                 # mm; voxels of this scan are 9 mm
    assert (align.onto(atlas, {"lobe": (lobe, to_scan @ affine)}) == found).all()


def test_itks_transforms_are_read_in_our_world():
    """y = M (x - c) + c + t in a world where x and y point the other way."""
    M, t, c = np.array([[1.0, 0.2, 0], [0, 1.1, 0], [0.3, 0, 0.9]]), np.array([5.0, 6, 7]), np.array([1.0, 2, 3])
    x = np.array([10.0, -20, 30])
    y = M @ (x - c) + c + t
    to = align.from_itk([*M.ravel(), *t], c)
    assert np.allclose(to @ [-10, 20, 30, 1], [-y[0], -y[1], y[2], 1])


@pytest.mark.slow
def test_who_a_patient_is_and_who_is_held_out_does_not_change_silently(scans, tmp_path, fails, capsys):
    shutil.copytree(scans, tmp_path / "r")
    out, args = tmp_path / "out", ["--from", "folder", "--root", tmp_path / "r", *GRID]
    (tmp_path / "p.csv").write_text("id,patient\nphantom_000000,P\nphantom_000001,P\nphantom_9,P\n")
    run("folder", tmp_path / "r", out, "--limit", 1)
    assert not (out / "split.json").exists()                             # of a part, none
    code, err = fails(prepare.main, *args, "--out", out, "--metadata", tmp_path / "p.csv")
    assert code == 2 and "phantom_000000: made from other files, of another patient" in err
    (tmp_path / "s.json").write_text('{"held_out": ["nobody"]}')
    code, err = fails(prepare.main, *args, "--out", tmp_path / "b", "--split", tmp_path / "s.json")
    assert code == 2 and "none of its 1 names is a patient here" in err and not (tmp_path / "b").exists()
    (tmp_path / "s.json").write_text('{"held_out": ["P", "nobody"]}')
    run("folder", tmp_path / "r", tmp_path / "b", "--metadata", tmp_path / "p.csv", "--split", tmp_path / "s.json")
    assert "1 of its rows name no scan, 3 of 5 scans are not in it" in capsys.readouterr().err
    training, apart = data.split_cases(tmp_path / "b", 5)
    assert [c.name for c in apart] == ["phantom_000000", "phantom_000001"] and len(training) == 3


@pytest.mark.slow
def test_a_copy_is_refused_only_of_what_is_kept(scans, tmp_path):
    root = tmp_path / "r"
    for name, of in dict(b="phantom_000000", a="phantom_000000", z="phantom_000001").items():
        shutil.copytree(scans / of, root / name)
    header_of(root / "a/lobe.nii.gz", lambda a: a[::-1])                 # a is refused, its copy b is not
    assert sorted(run("folder", root, tmp_path / "out")) == ["b", "z"]
    shutil.copytree(root / "z", root / "y")                              # sorts before what is kept already
    os.symlink("nowhere", root / "flat.nii.gz")
    assert sorted(run("folder", root, tmp_path / "out")) == ["b", "z"]
    assert rows(tmp_path / "out")["y"]["findings"] == "the same file as z"
    assert "no such file" in rows(tmp_path / "out")["flat"]["findings"]
    shutil.rmtree(root / "z")
    shutil.rmtree(tmp_path / "out/z")
    assert sorted(run("folder", root, tmp_path / "out")) == ["b", "y"]


@pytest.mark.slow
def test_what_is_prepared_is_sound_and_a_report_that_a_spreadsheet_saved_is_made_anew(scans, tmp_path, capsys, fails):
    out = tmp_path / "out"
    for case in run("folder", scans, out).values():
        np.save(case / "text.npy", np.zeros((4, 8), np.float16))
    data.main(["check", str(out)])
    assert "5 cases, all sound" in capsys.readouterr().out
    before = (out / "prepare_report.csv").read_text()
    for text in ("id;patient\n", ""):
        (out / "prepare_report.csv").write_text(text)
        shutil.rmtree(out / "sheets")
        run("folder", scans, out)
        seen, was = (list(csv.DictReader(t.splitlines())) for t in ((out / "prepare_report.csv").read_text(), before))
        assert [{**r, "seconds": ""} for r in was] == seen and (out / "sheets/cohort.png").is_file()
    args = ["--from", "folder", "--root", scans, "--out", tmp_path / "c"]
    code, err = fails(prepare.main, *args, "--segment", "totalseg")
    assert code == 2 and "TotalSegmentator is not installed" in err and not (tmp_path / "c").exists()


def test_tables_as_people_keep_them(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffVolumeName;Findings_EN;Impressions_EN\r\n'
                                     'a.b.nii.gz;"two\r\nlines, and a \u2028 sign";\r\n'.encode())
    row = by_name(tmp_path / "a.csv")["a.b"]
    assert report_of(row) == "Findings: two\nlines, and a \u2028 sign\nImpression: "
    (tmp_path / "b.csv").write_text("id,text\na,one\na,two\n")
    with pytest.raises(ValueError, match="two rows for a"):
        by_name(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("id,text\na,one\na,one\n")
    assert report_of(by_name(tmp_path / "c.csv")["a"]) == "one"
    (tmp_path / "d.csv").write_text("scan,text\na,one\n")
    with pytest.raises(ValueError, match="columns scan, text"):
        by_name(tmp_path / "d.csv")


@pytest.mark.parametrize("args, said", [
    (["--from", "folder", "--root", "nowhere"], "no such folder"),
    (["--from", "folder", "--root", "."], "no scans of folder"),
    (["--from", "folder", "--root", ".", "--jobs", "0"], "--jobs 0"),
    (["--from", "folder", "--root", ".", "--grid", "30"], "--grid 30"),
    (["--from", "rad-chestct", "--root", ".", "--orientation", "IPX"], "--orientation IPX"),
    (["--from", "folder", "--root", ".", "--reports", "none.csv"], "none.csv: no table")])
def test_wrong_input_is_one_line(args, said, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err = fails(prepare.main, *args)
    assert code == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "data").exists()


def test_axes_say_where_they_lead():
    assert (axes("RAS") == np.eye(3)).all() and (axes("IPL") == [[0, 0, -1], [0, -1, 0], [-1, 0, 0]]).all()
