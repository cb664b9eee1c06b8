"""Every measurer against a value known otherwise: closed forms, analytic shapes, phantoms' truth, the thing itself."""
import csv
import gzip
import shutil

import nibabel
import numpy as np
import pytest
import torch

import data
import evaluate
import phantom
from evaluate import ctr, dice, frechet, laa950, mmd2, volume_mm3

TURN = nibabel.eulerangles.euler2mat(0.2, -0.1, 0.3)


def grid_points(shape, affine):
    return nibabel.affines.apply_affine(affine, np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1))


def affines():
    plain = np.diag([1.5, 1.5, 1.5, 1.0])
    thin, turned = np.diag([0.9, 1.7, 2.5, 1.0]), np.diag([1.2, 1.4, 1.9, 1.0])
    turned[:3, :3] = TURN @ turned[:3, :3]
    for A in (plain, thin, turned):
        A[:3, 3] = -A[:3, :3] @ np.array([50, 50, 50])
        yield A


def ellipsoid(affine, half, center=(0, 0, 0), shape=(101, 101, 101)):
    return ((((grid_points(shape, affine) - center) / half) ** 2).sum(-1) <= 1).astype(np.float32)


def test_a_spheres_volume_on_any_grid():
    for A in affines():
        assert volume_mm3(ellipsoid(A, 30), A) == pytest.approx(4 / 3 * np.pi * 30**3, rel=0.01)


def test_two_ellipsoids_ratio_on_any_grid():
    for A in affines():
        heart, thorax = ellipsoid(A, (26, 20, 20), (5, 0, -4)), ellipsoid(A, (44, 30, 44))
        want = 26 / (44 * np.sqrt(1 - (4 / 44) ** 2))                    # both widths on the heart's widest level
        assert ctr(heart, thorax, A) == pytest.approx(want, abs=0.03)


def test_dice_of_shifted_boxes_and_of_a_thing_with_itself():
    a, b = np.zeros((20, 20, 20), bool), np.zeros((20, 20, 20), bool)
    a[2:12, 2:12, 2:12], b[5:15, 2:12, 2:12] = True, True
    assert dice(a, b) == pytest.approx(0.7) and dice(a, a) == 1 and dice(a, ~a) == 0


def test_laa_counts_lung_without_airways():
    ct, lung, airway = np.full((10, 10, 10), -860.0), np.zeros((10,) * 3), np.zeros((10,) * 3)
    lung[:5], airway[0] = 1, 1
    ct[0], ct[1, :2] = -1000, -960
    assert laa950(ct, lung, airway) == pytest.approx(100 * 20 / 400)


def test_samples_of_another_request_are_not_measured_for_this_one(tmp_path, capsys, monkeypatch):
    case, asked = phantom.make(3, 32), []

    def sampled(argv):
        asked.append(argv)
        for i in range(2):
            folder = data.Path(argv[argv.index("--out") + 1]) / f"prompt_{i:02d}"
            folder.mkdir()
            for name in ("ct", "lobe", "airway"):
                data.save_nifti(folder / f"{name}.nii.gz", case[name])
    monkeypatch.setattr("sample.main", sampled)
    (tmp_path / "prompts.txt").write_text("laa | none | Bullae.")
    command = lambda *more: evaluate.main(["prompts", str(tmp_path / "prompts.txt"), "--n", "2", "--segment", "none", "--out", str(tmp_path / "out"), "--csv", str(tmp_path / "a.csv"),
                                           "--figure", str(tmp_path / "a.png"), *more])
    command(), command()
    assert len(asked) == 2                                               # one for each prompt; the second command measures what is there
    (tmp_path / "out/pair0_a/prompt_01/ct.nii.gz").unlink()
    (tmp_path / "out/pair0_a/.prompt_01.part").mkdir()
    (tmp_path / "out/pair0_a/.prompt_01.part/ct.nii.gz").touch()         # a command that was killed
    command()
    assert len(asked) == 3
    with pytest.raises(SystemExit) as e:
        command("--model", "another")
    assert e.value.code == 2 and "not asked for by this command" in capsys.readouterr().err and len(asked) == 3


def test_fid_is_the_closed_form_and_zero_for_the_same():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (400, 6)), rng.normal(0.5, 2, (300, 6)) @ rng.normal(0, 1, (6, 6))
    A, B = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(A @ B).real.clip(0)).sum()
    assert frechet(a, b) == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root, rel=1e-8)
    assert abs(frechet(a, a)) < 1e-8
    x, y = rng.normal(0, 1, (20000, 2)), rng.normal(1, 3, (20000, 2))    # N(0,1)^2 and N(1,9)^2: 2 (1 + (3 - 1)^2)
    assert frechet(x, y) == pytest.approx(10, rel=0.05)


def test_mmd_is_nothing_on_average_for_one_distribution_and_something_for_two():
    rng = np.random.default_rng(1)
    null = [mmd2(rng.normal(0, 1, (40, 5)), rng.normal(0, 1, (40, 5))) for _ in range(200)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(200) and min(null) < 0       # unbiased: around zero, on both sides
    assert mmd2(rng.normal(0, 1, (40, 5)), rng.normal(1, 1, (40, 5))) > 5 * np.std(null)


def test_the_feature_network_is_a_resnet_50_with_dilated_last_stages():
    with torch.device("meta"):
        net = evaluate.ResNet50()
    flat = 23_508_032 - 11_317_248 - 9_408                               # the well-known 2D ResNet-50 without its head, 3x3 and first convolution
    assert sum(p.numel() for p in net.parameters()) == flat + 3 * 11_317_248 + 64 * 7**3
    with torch.no_grad():
        assert evaluate.feature_net(None)[0](torch.zeros(1, 1, 32, 32, 32)).shape == (1, 2048)
    assert evaluate.ResNet50().layer4[1].conv2.dilation == (4, 4, 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six phantoms at 64^3 as NIfTI, three without and three with a large effusion and a large heart."""
    root = tmp_path_factory.mktemp("volumes")
    for group, sick in (("well", False), ("ill", True)):
        for seed in range(3):
            case = phantom.make(700 + seed, 64, effusion="left" if sick else "none", effusion_size="large" if sick else None, cardiomegaly=sick,
                                bullae=False, consolidation=None, nodules=0)
            folder = root / group / f"case{seed}"
            folder.mkdir(parents=True)
            for name in data.CHANNELS:
                data.save_nifti(folder / f"{name}.nii.gz", case[name], (3, 4, 5))
            for name, mask in case["masks"].items():
                data.save_nifti(folder / f"{name}.nii.gz", mask.astype(np.uint8), (3, 4, 5))
            (folder / "truth.txt").write_text(repr({k: case["truth"][k] for k in ("effusion_ml", "ctr", "laa950_percent", "airway_mm3")}))
    return root


@pytest.mark.parametrize("command, key", [("airway", "airway_mm3"), ("effusion", "effusion_ml"), ("ctr", "ctr"), ("laa", "laa950_percent")])
def test_commands_measure_the_truth_of_phantoms(folders, tmp_path, monkeypatch, command, key, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate.main([command, str(folders / "well"), str(folders / "ill")])
    rows = list(csv.DictReader(open(f"{command}.csv")))
    for row in rows:
        truth = eval((folders / row["folder"] / row["case"] / "truth.txt").read_text())
        assert float(row["value"]) == pytest.approx(truth[key], rel=1e-4, abs=1e-6)
    out = capsys.readouterr().out
    assert len(rows) == 6 and (tmp_path / f"{command}.png").exists() and "t-test" in out


def test_threshold_segmenters_find_what_the_phantom_has():
    case = phantom.make(701, 128, effusion="left", effusion_size="moderate", cardiomegaly=True, bullae=True, consolidation=None, nodules=0)
    voxel = [f / 128 for f in data.FOV]
    found = phantom.segment(case["ct"], case["lobe"], voxel)
    for name, truth in {**case["masks"], "airway": case["airway"] > 0}.items():
        if name != "thorax":
            assert dice(found[name], truth) > 0.85, name            # fluid cuts branches off the airway
    A = np.diag([voxel[2], voxel[1], voxel[0], 1.0])
    ras = lambda a: a.transpose(2, 1, 0)[::-1]
    assert ctr(ras(found["heart"]), ras(found["thorax"]), A) == pytest.approx(case["truth"]["ctr"], abs=0.03)


def test_measurers_follow_the_truth_of_fresh_phantoms(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate.main(["phantoms", "--n", "8", "--grid", "96"])
    r = {line.split()[0]: float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if " r = " in line}
    assert r.keys() == evaluate.UNITS.keys() and r["effusion"] > 0.98 and r["ctr"] > 0.98 and r["laa"] > 0.98


def test_an_external_segmenter_is_called_by_its_public_command(folders, tmp_path, monkeypatch):
    """A stand-in on the PATH that writes what TotalSegmentator's task would, and notes how it was called."""
    case = tmp_path / "set/case0"
    case.mkdir(parents=True)
    (case / "ct.nii.gz").write_bytes((folders / "ill/case0/ct.nii.gz").read_bytes())
    stand_in = tmp_path / "TotalSegmentator"
    stand_in.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\ncp {folders}/ill/case0/effusion.nii.gz "$4/pleural_effusion.nii.gz"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    evaluate.main(["effusion", "set", "--segment", "totalseg"])
    assert (tmp_path / "called").read_text().split() == ["-i", "set/case0/ct.nii.gz", "-o", "set/case0", "-ta", "pleural_pericard_effusion"]
    truth = eval((folders / "ill/case0/truth.txt").read_text())["effusion_ml"]
    assert float(list(csv.DictReader(open("effusion.csv")))[0]["value"]) == pytest.approx(truth, rel=1e-4)


def test_dice_command_resamples_and_is_one_with_itself(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for case in (folders / "well").iterdir():
        (tmp_path / "other" / case.name).mkdir(parents=True)
        for name in data.MASKS:                                          # the same masks in another axis order
            image = nibabel.load(case / f"{name}.nii.gz")
            nibabel.save(image.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]])), tmp_path / "other" / case.name / f"{name}.nii.gz")
    evaluate.main(["dice", str(folders / "well"), str(folders / "well"), str(tmp_path / "other")])
    rows = list(csv.DictReader(open("dice.csv")))
    assert (tmp_path / "dice.png").exists() and len(rows) == 2 * 3 * 8 and all(float(r["value"]) == 1 for r in rows)
    printed = capsys.readouterr()
    assert "dice RML" in printed.out and "warning" not in printed.err
    gone = sorted((tmp_path / "other").iterdir())[0]
    shutil.rmtree(gone)                                                  # both segmentations are then judged without it
    evaluate.main(["dice", str(folders / "well"), str(folders / "well"), str(tmp_path / "other")])
    assert len(list(csv.DictReader(open("dice.csv")))) == 2 * 2 * 8
    kept = sorted((tmp_path / "other").iterdir())[0]
    (kept / "vessel.nii.gz").unlink()
    evaluate.main(["dice", str(folders / "well"), str(tmp_path / "other")])
    assert {r["measure"] for r in csv.DictReader(open("dice.csv"))} == {"dice airway", "dice lobe", *(f"dice {n}" for n in data.LOBES)}
    assert f"1 case(s) left out, which are not in every folder: {gone.name}\n" in capsys.readouterr().err


def test_fid_command_prints_the_floor_and_keeps_features(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "real"
    root.mkdir()
    for group in ("well", "ill"):
        for case in (folders / group).iterdir():
            (root / f"{group}{case.name}").mkdir()
            raw, name = (case / "ct.nii.gz").read_bytes(), "ct.nii.gz"
            if group == "ill":                                           # uncompressed ones count as well, each with its own features
                raw, name = gzip.decompress(raw), "ct.nii"
            (root / f"{group}{case.name}" / name).write_bytes(raw)
    evaluate.main(["fid", str(root), str(root), "--edge", "32", "--device", "cpu"])
    out = capsys.readouterr().out
    kept = np.load(root / "features_random_32.npz")
    assert len({kept[k].tobytes() for k in kept}) == 6 and "RANDOM network" in out and "real vs real, 3 each" in out
    assert float(out.split("real vs fake ")[1].split()[0]) == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(evaluate.ResNet50, "forward", None)              # the second time comes from the store
    evaluate.main(["fid", str(root), str(root), "--edge", "32", "--device", "cpu"])


def test_augment_tells_classes_apart(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [(folders / g / f"case{i}" / "ct.nii.gz", g) for g in ("well", "ill") for i in range(3)] * 2
    (tmp_path / "r.csv").write_text("file,label\n" + "".join(f"{p},{g}\n" for p, g in rows))
    monkeypatch.setattr(evaluate.classify, "__defaults__", (1,))
    evaluate.main(["augment", "r.csv", "r.csv"])
    scores = list(csv.DictReader(open("augment.csv")))
    assert len(scores) == 2 * 5 * 2 and "real + synthetic" in capsys.readouterr().out


def test_what_is_missing_is_named(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/x").mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(np.arange(8 ** 3).reshape(8, 8, 8).astype(np.int16) - 900, np.eye(4)), tmp_path / "a/x/ct.nii.gz")
    for name in ("lobe", "airway"):
        nibabel.save(nibabel.Nifti1Image(np.eye(3)[..., None].repeat(3, 2).astype(np.uint8), np.eye(4)), tmp_path / f"a/x/{name}.nii.gz")
    (tmp_path / "none.txt").write_text("# measure | prompt | prompt")
    (tmp_path / "half.csv").write_text("file,label\na/x/ct.nii.gz\n")
    for args, words in ((["laa", "a"], "one grid is needed"), (["effusion", "a", "--segment", "phantom"], "one grid is needed"), (["prompts", "none.txt"], "0 pairs of prompts"),
                        (["augment", "half.csv", "half.csv"], "a line without one"), (["phantoms", "--n", "0"], "at least 2 phantoms"), (["phantoms", "--grid", "65"], "a multiple of 8"), (["ctr", "a"], "no heart.nii.gz"), (["airway", "none"], "no such folder"), (["effusion", "a", "--segment", "totalseg"], "TotalSegmentator"),
                        (["dice", "a"], "one or two segmentations"), (["fid", "a", "a"], "at least 4")):
        with pytest.raises(SystemExit) as e:
            evaluate.main(args)
        assert e.value.code == 2 and words in capsys.readouterr().err, args
    moved = np.eye(4)
    moved[:3, 3] = 500
    (tmp_path / "b/x").mkdir(parents=True)
    for name in ("lobe", "ct", "airway"):                                # of one shape, but elsewhere
        array = np.arange(27).reshape(3, 3, 3).astype(np.int16) * 50 - 1000 if name == "ct" else 5 * (np.arange(27).reshape(3, 3, 3) % 2).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(array, moved if name == "lobe" else np.eye(4)), tmp_path / f"b/x/{name}.nii.gz")
    for args, words in ((["laa", "b"], "different shapes or places"), (["augment", "half.csv", "half.csv", "--csv", "half.csv"], "nothing of others is replaced"),
                        (["airway", "b", "--csv", "x", "--figure", "x"], "two files are written")):
        with pytest.raises(SystemExit) as e:
            evaluate.main(args)
        assert e.value.code == 2 and words in capsys.readouterr().err, args
    assert (tmp_path / "half.csv").read_text().startswith("file,label")
    for name, weights in (("tensor", torch.zeros(3)), ("numbers", {0: torch.zeros(3)}), ("nested", {"state_dict": [1]}), ("shapes", {k: torch.zeros(1) for k in evaluate.ResNet50().state_dict()})):
        torch.save(weights, f"{name}.pth")
    for name in ("a/x/ct.nii.gz", "tensor.pth", "numbers.pth", "nested.pth", "shapes.pth"):
        with pytest.raises(ValueError, match="ResNet-50 is needed|resnet_50.pth"):
            evaluate.feature_net(name)
    old = {k: v for k, v in evaluate.ResNet50().state_dict().items() if "num_batches" not in k}      # as PyTorch 0.4 wrote them
    torch.save({"state_dict": {"module." + k: v for k, v in old.items()}}, "old.pth")
    assert torch.equal(evaluate.feature_net("old.pth")[0].state_dict()["conv1.weight"], old["conv1.weight"])
    (tmp_path / "a/features_random_8.npz").write_bytes(b"PK\x03\x04 half a zip")
    with pytest.raises(ValueError, match="remove it"):
        evaluate.features("a", None, "random", 8, "cpu")
