"""What does not look like a chest is seen: values, masks, places; and the lungs are found in any scan."""
import json
import re

import nibabel
import numpy as np
import pytest

import data
import phantom
import sample
from support.anatomy import fault_of_hu, faults_of_masks, lungs_of
from support.nifti import save_nifti

CASE = phantom.make(3, 64, "held-out")
MASKS = {name: CASE[name] for name in ("lobe", "airway", "vessel")}


def numbered(*order):
    """The lobes with other labels: order[k] is the label of lobe k + 1."""
    return np.array([0, *order], np.uint8)[MASKS["lobe"]]


@pytest.mark.parametrize("seed", range(5))
def test_a_phantom_looks_like_a_chest(seed):
    case = phantom.make(seed, 64, "train")
    assert fault_of_hu(case["ct"]) == ""
    assert faults_of_masks(case["lobe"], case["airway"], case["vessel"], case["ct"]) == ([], [])


@pytest.mark.parametrize("ct", [CASE["ct"] + 1024, CASE["ct"] - 1024, CASE["ct"] * 2, CASE["ct"] / 1000, 0 * CASE["ct"],
                                np.where(CASE["airway"], -2000, CASE["ct"] + 1024),
                                np.where(CASE["vessel"], 2500, CASE["ct"] - 1024)],
                         ids=["raw", "twice", "times 2", "not scaled", "one value", "raw, padded", "twice, metal"])
def test_values_that_are_no_hu_are_seen_whatever_their_minimum(ct):
    assert "fat and soft tissue (-200 to 250)" in fault_of_hu(ct)


@pytest.mark.parametrize("lobe, words", [
    (MASKS["lobe"][:, :, ::-1], "LUL, LLL) lie on the right"),           # mirrored
    (MASKS["lobe"][::-1], "label 1 (LUL) lies below label 2 (LLL)"),     # upside down
    (numbered(4, 5, 1, 2, 3), "LUL, LLL) lie on the right"),             # RUL RML RLL LUL LLL
    (numbered(1, 2, 3, 5, 4), "label 4 (RML) lies behind label 5 (RLL)"),
    (np.where(MASKS["lobe"], 0, 5), "fills 8\\d% of the volume"),        # inverted
    (np.roll(MASKS["lobe"], (-20, 0), (0, 1)), "HU in the lobes"),       # elsewhere
], ids=["mirrored", "upside down", "right first", "middle last", "inverted", "elsewhere"])
def test_lobes_that_do_not_lie_as_lobes_do_are_seen(lobe, words):
    faults, _ = faults_of_masks(lobe, MASKS["airway"], MASKS["vessel"], CASE["ct"])
    assert re.search(words.replace("(", "\\(").replace(")", "\\)"), "; ".join(faults))


def test_airways_and_vessels_are_doubted_by_what_the_ct_has_there():
    swapped = faults_of_masks(MASKS["lobe"], MASKS["vessel"] * (CASE["ct"] > 0), MASKS["airway"], CASE["ct"])
    assert swapped[0] == [] and len(swapped[1]) == 2
    alone = faults_of_masks(airway=1 - MASKS["airway"])
    assert alone[0] == [] and "airway mask fills" in alone[1][0]         # a lone mask is never refused


def files(folder, **other):
    """A phantom as NIfTI.   -> options"""
    for name in data.CHANNELS:
        save_nifti(folder / f"{name}.nii.gz", other.get(name, CASE[name]), data.grid_affine(64, (5, 6, 7)))
    (folder / "r.txt").write_text("Findings: Clear.\nImpression: Normal.")
    return [x for c in (*data.CHANNELS, "report") for x in
            (f"--{c}", str(folder / ("r.txt" if c == "report" else f"{c}.nii.gz")))]


def test_prepare_refuses_other_lobes_unless_told_to_take_them_as_they_are(tmp_path, fails, capsys):
    asked = ["prepare", *files(tmp_path, lobe=numbered(4, 5, 1, 2, 3)), "--grid", "64", "--out", tmp_path / "in/case"]
    code, said = fails(data.main, *asked)
    assert code == 2 and "lie on the right" in said and "--as-is" in said and not (tmp_path / "in").exists()
    data.main([str(a) for a in asked] + ["--as-is"])
    assert "warning: " in capsys.readouterr().err
    case = tmp_path / "in/case"
    np.save(case / "text.npy", np.zeros((8, 8), np.float16))
    data.main(["check", str(tmp_path / "in")])                           # it remembers
    about = json.loads((case / "case.json").read_text())
    (case / "case.json").write_text(json.dumps(about | dict(as_is=False)))
    code, _ = fails(data.main, "check", tmp_path / "in")
    assert code == 2


def test_masks_without_the_affine_of_the_ct_are_refused(tmp_path, fails):
    asked = files(tmp_path)
    for name in MASKS:
        a = np.asarray(nibabel.load(tmp_path / f"{name}.nii.gz").dataobj)
        nibabel.save(nibabel.Nifti1Image(a, np.eye(4)), tmp_path / f"{name}.nii.gz")
    code, said = fails(data.main, "prepare", *asked, "--grid", "64", "--out", tmp_path / "case")
    assert code == 2 and "the lobe mask has the CT's 64 x 64 x 64 voxels, and another affine" in said


def test_sample_refuses_them_too(model, tmp_path, fails):
    files(tmp_path, lobe=numbered(4, 5, 1, 2, 3), ct=CASE["ct"] + 1024)
    for option, words in (("--lobe", "--as-is"), ("--ct", "apply the rescale slope")):
        code, said = fails(sample.main, "--model", model, "--device", "cpu", "--stop-at-low", "--low-steps", "1",
                           option, tmp_path / f"{option[2:]}.nii.gz", "--out", tmp_path / "out")
        assert code == 2 and words in said and not [*(tmp_path / "out").glob("*")]


def body(tall):
    """The phantom's thorax at the top of a body so many mm tall, with gas in the bowels.   -> ct (X,Y,Z), affine"""
    ct = CASE["ct"][:, :, ::-1].transpose(2, 1, 0)
    voxel = np.array(data.FOV[::-1]) / 64
    ct = np.concatenate([np.repeat(ct[..., :1], int(tall / voxel[2]) - 64, 2), ct], 2)
    ct[28:34, 28:34, 10:16] = -900
    return ct, np.diag([*voxel, 1])


@pytest.mark.parametrize("tall", [300, 700])
def test_lungs_are_found_in_a_scan_of_any_height(tall):
    ct, affine = body(tall)
    found, its = lungs_of(ct, affine)
    z = np.flatnonzero(found.any((0, 1))) * its[2, 2]
    wanted = np.flatnonzero((MASKS["lobe"] > 0).any((1, 2))) * data.FOV[0] / 64 + affine[2, 2] * (ct.shape[2] - 64)
    assert abs(z.min() - wanted.min()) < 20 and abs(z.max() - wanted.max()) < 20


@pytest.mark.parametrize("tall, told", [(300, False), (700, False)])
def test_the_field_of_view_of_a_ct_lies_around_its_lungs(tall, told, tmp_path, capsys):
    ct, affine = body(tall)
    nibabel.save(nibabel.Nifti1Image(ct, affine), tmp_path / "ct.nii.gz")
    arrays, center = data.to_model({"ct": tmp_path / "ct.nii.gz"}, 64)
    lungs = (arrays["ct"] < -700)[:, 16:48, 16:48].any((1, 2))
    assert lungs[20:50].all() and bool(capsys.readouterr().err) == told
    data.to_model({"ct": tmp_path / "ct.nii.gz"}, 64, center=(158, 158, tall - 350))
    assert "% of the lungs lie outside the field of view" in capsys.readouterr().err


def test_a_mask_of_a_tall_scan_is_centred_on_and_what_is_cut_is_told(tmp_path, capsys):
    airway = np.zeros((40, 40, 200), np.uint8)
    airway[18:22, 18:22, 150:195] = 1
    nibabel.save(nibabel.Nifti1Image(airway, np.diag([4.0, 4, 4, 1])), tmp_path / "a.nii.gz")
    _, center = data.to_model({"airway": tmp_path / "a.nii.gz"}, 64)
    assert abs(center[2] - 4 * 172) < 5 and capsys.readouterr().err == ""
    data.to_model({"airway": tmp_path / "a.nii.gz"}, 64, center=(78, 78, 560))
    assert "4% of the airway lie outside" in capsys.readouterr().err.replace("40%", "4%")
