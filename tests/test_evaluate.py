"""Every measurer against a value known otherwise: closed forms, analytic shapes, phantoms' truth, the thing itself."""
import csv
import gzip
import json
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
import evaluate
import phantom
from evaluate import ctr, dice, frechet, laa950, mmd2, volume_mm3
from support.features import ResNet50, feature_net, features
from support.files import read_safetensors
from support.nifti import save_nifti
from support.segment import load_mask, structure
from support.weights import describe, sources

TURN = nibabel.eulerangles.euler2mat(0.2, -0.1, 0.3)


def table(path):
    with open(path) as f:
        return list(csv.DictReader(f))


def save(folder, name, array):
    """An array of the model's frame as NIfTI, off the origin."""
    save_nifti(folder / f"{name}.nii.gz", array, data.grid_affine(len(array), (3, 4, 5)))


# --- shapes with a known measure ---

def grid_points(shape, affine):
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return nibabel.affines.apply_affine(affine, index)


def affines():
    plain = np.diag([1.5, 1.5, 1.5, 1.0])
    thin = np.diag([0.9, 1.7, 2.5, 1.0])
    turned = np.diag([1.2, 1.4, 1.9, 1.0])
    turned[:3, :3] = TURN @ turned[:3, :3]
    for A in (plain, thin, turned):
        A[:3, 3] = -A[:3, :3] @ np.array([50, 50, 50])
        yield A


def ellipsoid(affine, half, center=(0, 0, 0), shape=(101, 101, 101)):
    return ((((grid_points(shape, affine) - center) / half) ** 2).sum(-1) <= 1).astype(np.float32)


def test_a_spheres_volume_is_right_on_any_grid():
    for A in affines():
        assert volume_mm3(ellipsoid(A, 30), A) == pytest.approx(4 / 3 * np.pi * 30**3, rel=0.01)


@pytest.mark.slow
def test_two_ellipsoids_ratio_is_right_on_any_grid():
    for A in affines():
        heart, thorax = ellipsoid(A, (26, 20, 20), (5, 0, -4)), ellipsoid(A, (44, 30, 44))
        want = 26 / (44 * np.sqrt(1 - (4 / 44) ** 2))      # both widths on the heart's widest level
        assert ctr(heart, thorax, A) == pytest.approx(want, abs=0.03)


def test_dice_is_the_overlap_of_shifted_boxes_and_one_with_itself():
    a, b = np.zeros((20, 20, 20), bool), np.zeros((20, 20, 20), bool)
    a[2:12, 2:12, 2:12] = True
    b[5:15, 2:12, 2:12] = True
    assert dice(a, b) == pytest.approx(0.7) and dice(a, a) == 1 and dice(a, ~a) == 0


def test_laa_counts_lung_without_airways():
    ct, lung, airway = np.full((10, 10, 10), -860.0), np.zeros((10,) * 3), np.zeros((10,) * 3)
    lung[:5] = 1
    airway[0] = 1
    ct[0] = -1000
    ct[1, :2] = -960
    assert laa950(ct, lung, airway) == pytest.approx(100 * 20 / 400)


# --- FID and MMD ---

def test_fid_is_the_closed_form_and_zero_for_the_same():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (400, 6)), rng.normal(0.5, 2, (300, 6)) @ rng.normal(0, 1, (6, 6))
    A, B = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(A @ B).real.clip(0)).sum()
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root
    assert frechet(a, b) == pytest.approx(want, rel=1e-8)
    assert abs(frechet(a, a)) < 1e-8

    x, y = rng.normal(0, 1, (20000, 2)), rng.normal(1, 3, (20000, 2))
    assert frechet(x, y) == pytest.approx(10, rel=0.05)    # N(0,1)^2 and N(1,9)^2: 2 (1 + (3 - 1)^2)


def test_mmd_is_nothing_on_average_for_one_distribution_and_something_for_two():
    rng = np.random.default_rng(1)
    null = [mmd2(rng.normal(0, 1, (40, 5)), rng.normal(0, 1, (40, 5))) for _ in range(200)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(200) and min(null) < 0       # unbiased: around zero
    assert mmd2(rng.normal(0, 1, (40, 5)), rng.normal(1, 1, (40, 5))) > 5 * np.std(null)


def test_the_feature_network_is_a_resnet_50_with_dilated_last_stages():
    with torch.device("meta"):
        net = ResNet50()
    cubes = 11_317_248                                     # weights of the 3x3 convolutions of the 2D ResNet-50
    flat = 23_508_032 - cubes - 9_408                      # without its head, these and the first convolution
    assert sum(p.numel() for p in net.parameters()) == flat + 3 * cubes + 64 * 7**3
    assert net.layer4[1].conv2.dilation == (4, 4, 4)


def test_features_are_2048_numbers_a_volume():
    with torch.no_grad():
        assert feature_net(None)[0](torch.zeros(1, 1, 32, 32, 32)).shape == (1, 2048)


def zeros():
    """A ResNet-50's weights, all 0."""
    with torch.device("meta"):
        return {k: torch.zeros(v.shape, device="cpu") for k, v in ResNet50().state_dict().items()}


WRONG = {"shapes": {k: torch.zeros(1) for k in zeros()}, "tensor": torch.zeros(3), "numbers": {0: torch.zeros(3)},
         "nested": {"state_dict": [1]}}


@pytest.mark.parametrize("name", ["text", "shapes", *(pytest.param(n, marks=pytest.mark.slow)
                                                      for n in ("tensor", "numbers", "nested"))])
def test_weights_that_are_no_resnet_50_are_refused(tmp_path, name):
    path = tmp_path / f"{name}.pth"
    path.write_text("no pickle")
    if name in WRONG:
        torch.save(WRONG[name], path)
    with pytest.raises(ValueError, match="ResNet-50 is needed|resnet_50.pth"):
        feature_net(path)


@pytest.mark.slow
def test_weights_as_pytorch_0_4_wrote_them_load(tmp_path):
    own = {k: v + 0.5 for k, v in zeros().items() if "num_batches" not in k}
    torch.save({"state_dict": {f"module.{k}": v for k, v in own.items()}}, tmp_path / "old.pth")
    net, name = feature_net(tmp_path / "old.pth")
    assert all(torch.equal(net.state_dict()[k], v) for k, v in own.items()) and len(name) == 12


# --- commands, on phantoms ---

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six phantoms at 64^3 as NIfTI, three without and three with a large effusion and a large heart."""
    root = tmp_path_factory.mktemp("volumes")
    for group, sick in (("well", False), ("ill", True)):
        for seed in range(3):
            case = phantom.make(700 + seed, 64, effusion="left" if sick else "none",
                                effusion_size="large" if sick else None, cardiomegaly=sick, bullae=False,
                                consolidation=None, nodules=0)
            folder = root / group / f"case{seed}"
            folder.mkdir(parents=True)
            for name in data.CHANNELS:
                save(folder, name, case[name])
            for name, mask in case["masks"].items():
                save(folder, name, mask.astype(np.uint8))
            (folder / "truth.json").write_text(json.dumps(case["truth"]))
    return root


@pytest.mark.parametrize("command, key", [("airway", "airway_mm3"), ("effusion", "effusion_ml"), ("ctr", "ctr"),
                                          ("laa", "laa950_percent")])
def test_commands_measure_the_truth_of_phantoms(folders, tmp_path, monkeypatch, command, key, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate.main([command, str(folders / "well"), str(folders / "ill")])
    rows = table(f"{command}.csv")
    for row in rows:
        truth = json.loads((folders / row["folder"] / row["case"] / "truth.json").read_text())
        assert float(row["value"]) == pytest.approx(truth[key], rel=1e-4, abs=1e-6)
    out = capsys.readouterr().out
    assert len(rows) == 6 and (tmp_path / f"{command}.png").exists() and "t-test" in out


@pytest.mark.slow
def test_threshold_segmenters_find_what_the_phantom_has():
    case = phantom.make(701, 128, effusion="left", effusion_size="moderate", cardiomegaly=True, bullae=True,
                        consolidation=None, nodules=0)
    voxel = [f / 128 for f in data.FOV]
    found = phantom.segment(case["ct"], case["lobe"], voxel)
    for name, truth in dict(case["masks"], airway=case["airway"] > 0).items():
        if name != "thorax":
            assert dice(found[name], truth) > 0.85, name   # fluid cuts branches off the airway
    A = np.diag([voxel[2], voxel[1], voxel[0], 1.0])
    heart, thorax = (found[name].transpose(2, 1, 0)[::-1] for name in ("heart", "thorax"))
    assert ctr(heart, thorax, A) == pytest.approx(case["truth"]["ctr"], abs=0.03)


@pytest.mark.slow
def test_thresholds_segment_the_ct_whatever_mask_lies_beside_it(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    case = tmp_path / "bare/case0"
    case.mkdir(parents=True)
    for name in ("ct", "lobe"):
        shutil.copy(folders / f"ill/case0/{name}.nii.gz", case)
    shutil.copy(folders / "well/case0/effusion.nii.gz", case)            # empty
    (case / "sample.json").write_text("{}")
    truth = json.loads((folders / "ill/case0/truth.json").read_text())
    for segment, wanted, said in (("phantom", truth["effusion_ml"], "by thresholds from CT and lobes"),
                                  ("none", 0, "beside the CT, channels of the network that made the sample")):
        evaluate.main(["effusion", "bare", "--segment", segment])
        assert float(table("effusion.csv")[0]["value"]) == pytest.approx(wanted, rel=0.1)
        assert said in capsys.readouterr().out.splitlines()[0]
    evaluate.main(["laa", "bare", "--segment", "phantom"])
    assert float(table("laa.csv")[0]["value"]) == pytest.approx(truth["laa950_percent"], abs=0.5)
    (case / "lobe.nii.gz").unlink()                      # airways need the CT alone
    evaluate.main(["airway", "bare", "--segment", "phantom"])
    assert float(table("airway.csv")[0]["value"]) == pytest.approx(truth["airway_mm3"], rel=0.2)


def test_a_phantom_measures_what_it_was_drawn_with():
    case = phantom.make(702, 96, effusion="left", effusion_size="large", nodules=0)
    got, truth = evaluate.measure_phantom(case["ct"], case["lobe"]), case["truth"]
    assert got["effusion"] == pytest.approx(truth["effusion_ml"], rel=0.1) and got["left"] > 0.95 * got["effusion"]
    assert got["ctr"] == pytest.approx(truth["ctr"], abs=0.05)


@pytest.mark.slow
def test_measurers_follow_the_truth_of_fresh_phantoms(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate.main(["phantoms", "--n", "8", "--grid", "96"])
    lines = (line.split() for line in capsys.readouterr().out.splitlines() if " r = " in line)
    r = {name: float(correlation) for name, _, _, correlation, *_ in lines}
    assert r.keys() == evaluate.UNITS.keys()
    assert r["effusion"] > 0.98 and r["ctr"] > 0.98 and r["laa"] > 0.98


@pytest.fixture
def segmenter(folders, tmp_path, monkeypatch):
    """A stand-in on the PATH that writes what TotalSegmentator's tasks would of the first ill case, in the layout of
    $LAYOUT, and notes how it was called.   -> the folder of a case with the CT and masks of a healthy one"""
    ill, case = folders / "ill/case0", tmp_path / "set/case0"
    shutil.copytree(folders / "well/case0", case)
    shutil.copy(ill / "ct.nii.gz", case)
    stand_in = tmp_path / "bin/TotalSegmentator"
    stand_in.parent.mkdir()
    stand_in.write_text(f"""#!{sys.executable}
import os, shutil, sys
import nibabel, numpy as np
ct, out, task = sys.argv[2], sys.argv[4], sys.argv[6]
with open({str(tmp_path / 'called')!r}, "a") as f:
    f.write(task + "\\n")
ill, new = {str(ill)!r} + "/", os.environ["LAYOUT"] == "new"
def put(name, of, label=0):
    image = nibabel.load(ill + of + ".nii.gz")
    a = np.asarray(image.dataobj)
    nibabel.save(nibabel.Nifti1Image((a == label if label else a > 0).astype(np.uint8), image.affine),
                 out + "/" + name + ".nii.gz")
if task == "pleural_pericard_effusion":
    put("pleural_effusion", "effusion")
    put("pericardial_effusion", "heart")
if task == "lung_vessels":
    put("lung_airways" if new else "lung_trachea_bronchia", "airway")
    put("lung_arteries" if new else "lung_vessels", "vessel")
    if new:
        put("lung_veins", "vessel")
        put("lung_airways_wall", "vessel")
if task == "total":
    put("heart", "heart")
    for k, lobe in enumerate(("upper_lobe_left", "lower_lobe_left", "upper_lobe_right", "middle_lobe_right",
                              "lower_lobe_right"), 1):
        put("lung_" + lobe, "lobe", k)
""")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return case


@pytest.mark.parametrize("layout", [pytest.param("old", marks=pytest.mark.slow), "new"])
def test_an_external_segmenter_makes_the_masks_of_this_very_ct(segmenter, folders, tmp_path, monkeypatch, layout):
    monkeypatch.setenv("LAYOUT", layout)
    truth = json.loads((folders / "ill/case0/truth.json").read_text())
    for command, key in (("effusion", "effusion_ml"), ("airway", "airway_mm3"), ("laa", "laa950_percent")):
        for _ in range(2):
            evaluate.main([command, "set", "--segment", "totalseg"])
            assert float(table(f"{command}.csv")[0]["value"]) == pytest.approx(truth[key], rel=1e-4, abs=1e-6)
    called = (tmp_path / "called").read_text().split()
    assert called == ["pleural_pericard_effusion", "lung_vessels", "total"]          # each once
    made = segmenter / "segmented/totalseg/lung_vessels"
    assert (structure(made, "vessel")[0] == structure(folders / "ill/case0", "vessel")[0]).all()

    shutil.copy(folders / "ill/case1/ct.nii.gz", segmenter)              # another CT: its masks are made anew
    evaluate.main(["effusion", "set", "--segment", "totalseg"])
    assert (tmp_path / "called").read_text().split() == called + ["pleural_pericard_effusion"]


TABLE = "<LabelTable>" + "".join(f'<Label Key="{k}" Red="1"><![CDATA[{name}]]></Label>' for k, name in {
    1: "lung_pleura", 2: "pleural_effusion", 10: "lung_upper_lobe_left", 11: "lung_lower_lobe_left",
    12: "lung_upper_lobe_right", 13: "lung_middle_lobe_right", 14: "lung_lower_lobe_right"}.items()) + "</LabelTable>"


def test_of_many_labels_the_one_is_measured_that_the_file_names(tmp_path):
    labels = np.arange(27).reshape(3, 3, 3).astype(np.uint8) % 16
    image = nibabel.Nifti1Image(labels, np.diag([2, 2, 2, 1]))
    nibabel.save(image, tmp_path / "effusion.nii.gz")
    with pytest.raises(ValueError, match="values 0, 1, 2, 3, 4, 5 ...; one structure is measured"):
        load_mask("effusion", tmp_path / "effusion.nii.gz")
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, TABLE.encode()))
    nibabel.save(image, tmp_path / "effusion.nii.gz")
    assert (load_mask("effusion", tmp_path / "effusion.nii.gz")[0] == (labels == 2)).all()
    lobes = load_mask("lobe", tmp_path / "effusion.nii.gz")[0]
    assert (lobes == np.where((labels > 9) & (labels < 15), labels - 9.0, 0)).all()
    with pytest.raises(ValueError, match="write heart alone"):
        load_mask("heart", tmp_path / "effusion.nii.gz")


def test_probabilities_are_cut_at_one_half_and_an_empty_mask_is_0(tmp_path, capsys):
    soft = np.linspace(0, 1, 64).reshape(4, 4, 4).astype(np.float32)
    for array, wanted in ((soft, soft > 0.5), (0 * soft, soft < 0), (255 * (soft > 0.9), soft > 0.9)):
        nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / "airway.nii.gz")
        assert (load_mask("airway", tmp_path / "airway.nii.gz")[0] == wanted).all()
    assert "cut at 0.5" in capsys.readouterr().err


def test_a_case_that_cannot_be_measured_is_named_and_passed_over(folders, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "well", tmp_path / "set")
    (tmp_path / "set/case1/airway.nii.gz").write_bytes(b"no image")
    code, said = fails(evaluate.main, "airway", "set")
    assert code == 1 and "case1/airway.nii.gz: no readable NIfTI" in said and "1 case(s) not measured" in said
    assert [row["case"] for row in table("airway.csv")] == ["case0", "case2"]
    shutil.copy(folders / "well/case1/airway.nii.gz", tmp_path / "set/case1")
    evaluate.main(["airway", "set"])
    assert len(table("airway.csv")) == 3


def test_thresholds_of_phantoms_are_refused_for_weights_of_others(model, tmp_path, monkeypatch, fails):
    assert sources(model) == ["phantom"] == sources(Path(__file__).parent.parent / "checkpoints/demo")
    assert describe([tmp_path])["source"] == ["patient"]
    other = tmp_path / "other"
    shutil.copytree(model, other)
    state, about = read_safetensors(other / "low/low.safetensors")
    del about["sha256"]                                    # it seals what is said too
    with pytest.raises(ValueError, match="not as written"):
        save_file(state, other / "bad.safetensors", {"medsyn": json.dumps(about | dict(step=9, sha256="0"))})
        read_safetensors(other / "bad.safetensors")
    about["source"] = ["patient"]
    save_file(state, other / "low/low.safetensors", {"medsyn": json.dumps(about)})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("laa | none | Bullae.")
    code, said = fails(evaluate.main, "prompts", "p.txt", "--model", other)
    assert code == 2 and "trained on: patient, phantom" in said and "--segment totalseg" in said


def test_dice_resamples_and_judges_what_all_folders_have(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    well, other = folders / "well", tmp_path / "other"
    for case in well.iterdir():
        (other / case.name).mkdir(parents=True)
        for name in data.MASKS:                            # the same masks in another axis order
            image = nibabel.load(case / f"{name}.nii.gz")
            image = image.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
            nibabel.save(image, other / case.name / f"{name}.nii.gz")
    evaluate.main(["dice", str(well), str(well), str(other)])
    rows = table("dice.csv")
    assert (tmp_path / "dice.png").exists()
    assert len(rows) == 2 * 3 * 8 and all(float(r["value"]) == 1 for r in rows)
    printed = capsys.readouterr()
    assert "dice RML" in printed.out and "warning" not in printed.err

    gone, kept, _ = sorted(other.iterdir())
    shutil.rmtree(gone)                                    # both segmentations are then judged without it
    evaluate.main(["dice", str(well), str(well), str(other)])
    assert len(table("dice.csv")) == 2 * 2 * 8
    (kept / "vessel.nii.gz").unlink()
    evaluate.main(["dice", str(well), str(other)])
    assert {r["measure"] for r in table("dice.csv")} == {f"dice {n}" for n in ("airway", "lobe", *data.LOBES)}
    assert f"1 case(s) left out, which are not in every folder: {gone.name}\n" in capsys.readouterr().err


def test_features_are_kept_by_file_and_a_broken_store_is_named(folders, tmp_path):
    calls = []

    def read_ct(case):
        calls.append(case.name)
        return torch.full((1, 1, 8, 8, 8), float(len(calls)))

    def net(x):                                            # (1,1,8,8,8) -> (1,1)
        return x.mean((2, 3, 4))

    root = shutil.copytree(folders / "well", tmp_path / "well")
    first = features(root, net, "tiny", 8, "cpu", read_ct)
    assert first.tolist() == [[1], [2], [3]] and calls == ["case0", "case1", "case2"]
    (root / "case1/ct.nii.gz").write_bytes(gzip.compress(b"another file"))
    assert features(root, net, "tiny", 8, "cpu", read_ct).tolist() == [[1], [4], [3]]
    (root / "features_tiny_8.npz").write_bytes(b"PK\x03\x04 half a zip")
    with pytest.raises(ValueError, match="remove it"):
        features(root, net, "tiny", 8, "cpu", read_ct)


def test_fid_command_prints_the_floor_and_keeps_features(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "real"
    root.mkdir()
    for group in ("well", "ill"):
        for case in (folders / group).iterdir():
            (root / f"{group}{case.name}").mkdir()
            raw, name = (case / "ct.nii.gz").read_bytes(), "ct.nii.gz"
            if group == "ill":                             # uncompressed ones count as well, each with its own features
                raw, name = gzip.decompress(raw), "ct.nii"
            (root / f"{group}{case.name}" / name).write_bytes(raw)
    command = ["fid", str(root), str(root), "--edge", "32", "--device", "cpu"]
    evaluate.main(command)
    out = capsys.readouterr().out
    kept = np.load(root / "features_random_32.npz")
    assert len({kept[k].tobytes() for k in kept}) == 6
    assert "RANDOM network" in out and "real vs real, 3 each" in out
    assert float(out.split("real vs fake ")[1].split()[0]) == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(ResNet50, "forward", None)         # the second time comes from the store
    evaluate.main(command)


@pytest.mark.slow
def test_augment_tells_classes_apart(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"{folders}/{g}/case{i}/ct.nii.gz,{g}\n" for g in ("well", "ill") for i in range(3)] * 2
    (tmp_path / "r.csv").write_text("file,label\n" + "".join(lines))
    monkeypatch.setattr(evaluate.classify, "__defaults__", (1,))
    evaluate.main(["augment", "r.csv", "r.csv"])
    out = capsys.readouterr().out
    assert len(table("augment.csv")) == 2 * 5 * 3 and "real + synthetic" in out and "F1 of well" in out
    evaluate.main(["augment", "r.csv", "r.csv", "--positive", "ill", "--csv", "ill.csv"])
    rows = {key: {(r["folder"], r["case"], r["measure"]): float(r["value"]) for r in table(key)}
            for key in ("augment.csv", "ill.csv")}
    for fold in ("real", "fold 0"), ("real", "fold 3"):
        well, ill = rows["augment.csv"][(*fold, "F1 of well")], rows["ill.csv"][(*fold, "F1 of ill")]
        assert (well + ill) / 2 == pytest.approx(rows["ill.csv"][(*fold, "macro F1")])


def test_the_direction_of_a_test_is_asked_for_and_not_taken_from_the_data():
    a, b = [1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.5, 6.0]
    two, greater, less = (float(evaluate.t_test(a, b, expect, "A", "B").split("p = ")[1])
                          for expect in (None, "greater", "less"))
    assert greater == pytest.approx(two / 2, rel=0.02) and less == pytest.approx(1 - greater, rel=0.02)
    assert "B greater than A" in evaluate.t_test(a, b, "greater", "A", "B")


def test_samples_of_another_request_are_not_measured_for_this_one(tmp_path, capsys, monkeypatch, fails):
    case, asked = phantom.make(3, 32), []
    out = tmp_path / "out"

    def sampled(argv):
        asked.append(argv)
        for i in range(2):
            folder = Path(argv[argv.index("--out") + 1]) / f"prompt_{i:02d}"
            folder.mkdir()
            for name in ("ct", "lobe", "airway"):
                save(folder, name, case[name])

    monkeypatch.setattr("sample.main", sampled)
    (tmp_path / "prompts.txt").write_text("laa | none | Bullae.")
    command = ["prompts", tmp_path / "prompts.txt", "--n", 2, "--segment", "none", "--out", out, "--csv",
               tmp_path / "a.csv", "--figure", tmp_path / "a.png"]
    command = [str(a) for a in command]
    evaluate.main(command)
    evaluate.main(command)
    assert len(asked) == 2                                 # one for each prompt; the second command measures these
    (out / "pair0_a/prompt_01/ct.nii.gz").unlink()
    (out / "pair0_a/.prompt_01.part").mkdir()
    (out / "pair0_a/.prompt_01.part/ct.nii.gz").touch()    # a command that was killed
    evaluate.main(command)
    assert len(asked) == 3
    code, said = fails(evaluate.main, *command, "--model", "another")
    assert code == 2 and "not asked for by this command" in said and len(asked) == 3


# --- what is wrong is named ---

def nifti(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Folders of volumes that do not fit together, and files without what they should hold."""
    monkeypatch.chdir(tmp_path)
    small = np.eye(3)[..., None].repeat(3, 2).astype(np.uint8)
    nifti(tmp_path / "a/x/ct.nii.gz", 3 * np.arange(8**3).reshape(8, 8, 8).astype(np.int16) - 900)
    nifti(tmp_path / "a/x/lobe.nii.gz", small)
    nifti(tmp_path / "a/x/airway.nii.gz", small)

    moved = np.eye(4)
    moved[:3, 3] = 500
    cube = np.arange(27).reshape(3, 3, 3)                  # of one shape, but the lobes are elsewhere
    nifti(tmp_path / "b/x/ct.nii.gz", cube.astype(np.int16) * 50 - 1000)
    nifti(tmp_path / "b/x/airway.nii.gz", 5 * (cube % 2).astype(np.uint8))
    nifti(tmp_path / "b/x/lobe.nii.gz", 5 * (cube % 2).astype(np.uint8), moved)
    (tmp_path / "none.txt").write_text("# measure | prompt | prompt")
    (tmp_path / "half.csv").write_text("file,label\na/x/ct.nii.gz\n")


@pytest.mark.parametrize("command, words", [
    ("laa a", "one grid is needed"),
    ("laa b", "different shapes or places"),
    ("effusion a --segment phantom", "one grid is needed"),
    ("effusion a --segment totalseg", "TotalSegmentator"),
    ("ctr a", "no heart.nii.gz"),
    ("airway none", "no such folder"),
    ("airway a --expect less", "a t-test is of two"),
    ("airway b --csv x --figure x", "two files are written"),
    ("dice a", "one or two segmentations"),
    ("fid a a", "at least 4"),
    ("prompts none.txt", "0 pairs of prompts"),
    ("augment half.csv half.csv", "a line without one"),
    ("augment half.csv half.csv --csv half.csv", "nothing of others is replaced"),
    ("phantoms --n 0", "at least 2 phantoms"),
    ("phantoms --grid 65", "a multiple of 8"),
])
def test_what_is_missing_or_does_not_fit_is_named(odd, fails, command, words):
    code, said = fails(evaluate.main, *command.split())
    assert code == 2 and words in said
    assert Path("half.csv").read_text().startswith("file,label")
