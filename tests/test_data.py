"""Cases: values, geometry in all 48 axis orders and oblique, files that are broken, and the endless sequence."""
import gzip
import itertools
import json
import shutil

import nibabel
import numpy as np
import pytest
import torch

import data
from data import Cases, decode, encode, grid_affine, load_nifti, resample, save_nifti, to_model

L = np.zeros((40, 30, 36), np.uint8)             # an L: no rotation or reflection maps it onto itself
L[8:30, 8:13, 9:14] = 1
L[8:13, 8:25, 9:14] = 1
L[8:13, 8:13, 9:31] = 1
AFFINE = np.array([[2.0, 0, 0, -38], [0, 2.6, 0, -20], [0, 0, 2.2, -30], [0, 0, 0, 1]])
ORDERS = [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]


def centroid(array, affine):
    return nibabel.affines.apply_affine(affine, np.argwhere(array > 0)).mean(0)


def reordered(array, affine, axes, flips):
    """The same object in the same place, stored in another axis order."""
    image = nibabel.Nifti1Image(array, affine)
    return image.as_reoriented(np.array([[a, f] for a, f in zip(axes, flips)]))


@pytest.mark.parametrize("axes, flips", ORDERS)
def test_an_object_keeps_its_place_in_every_axis_order(axes, flips, tmp_path):
    nibabel.save(reordered(L, AFFINE, axes, flips), tmp_path / "l.nii.gz")
    arrays, center = to_model({"airway": tmp_path / "l.nii.gz"}, 128)
    save_nifti(tmp_path / "back.nii.gz", arrays["airway"], center)
    back = nibabel.load(tmp_path / "back.nii.gz")
    assert nibabel.aff2axcodes(back.affine) == ("R", "A", "S")
    assert back.header["sform_code"] == back.header["qform_code"] == 1 and back.header.get_xyzt_units()[0] == "mm"
    voxel = np.array(back.header.get_zooms())
    there, here = nibabel.affines.apply_affine(AFFINE, np.argwhere(L)), nibabel.affines.apply_affine(back.affine, np.argwhere(back.get_fdata() > 0))
    assert (abs(centroid(L, AFFINE) - here.mean(0)) < voxel / 2).all()
    for end in (np.min, np.max):                                         # voxel centres of the two grids: each end within half a voxel of either
        assert (abs(end(there, 0) - end(here, 0)) <= (voxel + np.diag(AFFINE)[:3]) / 2).all()
    given = nibabel.affines.apply_affine(np.linalg.inv(AFFINE), here)     # every saved voxel lies in a voxel of the object
    assert L[tuple(np.rint(given).astype(int).T)].all()


def test_an_oblique_object_keeps_its_place(tmp_path):
    turn = nibabel.eulerangles.euler2mat(0.3, 0.2, -0.4)
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    nibabel.save(nibabel.Nifti1Image(L, affine), tmp_path / "l.nii")
    arrays, center = to_model({"airway": tmp_path / "l.nii"}, 128)
    assert np.linalg.norm(centroid(arrays["airway"], grid_affine(128, center)) - centroid(L, affine)) < 1


def test_the_frame_is_left_anterior_superior_over_the_field_of_view():
    A = grid_affine(256)
    assert nibabel.aff2axcodes(A[:, [2, 1, 0, 3]]) == ("L", "A", "S")
    assert np.linalg.norm(A[:3, :3], axis=0) == pytest.approx([292 / 256, 316 / 256, 316 / 256])
    assert A @ [127.5, 127.5, 127.5, 1] == pytest.approx([0, 0, 0, 1])


def test_a_linear_ramp_survives_resampling_to_coarser_and_finer_grids():
    x, y, z = np.meshgrid(*[np.arange(n) for n in (40, 44, 48)], indexing="ij")
    for voxel in (0.4, 2.9):
        A = np.diag([voxel, voxel, voxel, 1.0])
        A[:3, 3] = 12
        out = resample(2.0 * x + y - z, np.eye(4), A, (6, 6, 6), linear=True)
        i, j, k = np.meshgrid(*[12 + voxel * np.arange(6)] * 3, indexing="ij")
        assert np.abs(out - (2 * i + j - k)).max() < 1e-3


def test_values_go_to_the_model_and_back():
    assert encode("ct", [-2000, -1024, -212, 600, 3000]) == pytest.approx([-1, -1, 0, 1, 1])
    assert encode("lobe", range(6)) == pytest.approx([-1, -0.6, -0.2, 0.2, 0.6, 1])
    assert encode("airway", [0, 1]) == pytest.approx([-1, 1])
    for name, values in (("ct", np.arange(-1024, 601)), ("lobe", np.arange(6)), ("vessel", np.arange(2))):
        assert (decode(name, encode(name, values)) == values).all()
    assert decode("lobe", np.array([-0.75, -0.85])).tolist() == [1, 0]   # to the nearest label
    assert decode("ct", np.array([7.0])).tolist() == [600]
    with pytest.raises(RuntimeError, match="not finite"):
        decode("ct", np.array([0, np.nan]))


def nifti(path, array, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def broken(tmp_path):
    good = nifti(tmp_path / "good.nii.gz", np.random.default_rng(0).integers(0, 2, L.shape).astype(np.uint8))
    raw = good.read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(raw[:len(raw) // 2])
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 4
    (tmp_path / "bit.nii.gz").write_bytes(flipped)
    (tmp_path / "text.nii.gz").write_text("no image")
    header = bytearray(gzip.decompress(raw)[:352])
    header[40:48] = np.array([3, 1500, 1500, 1500], "<i2").tobytes()
    (tmp_path / "claims.nii.gz").write_bytes(gzip.compress(bytes(header)))
    header[42:48] = np.array([30000] * 3, "<i2").tobytes()
    (tmp_path / "huge.nii.gz").write_bytes(gzip.compress(bytes(header)))
    plain = gzip.decompress(raw)
    for name, at, number in (("intercept", 116, np.nan), ("offset", 108, np.inf)):
        (tmp_path / f"{name}.nii.gz").write_bytes(gzip.compress(plain[:at] + np.array(number, "<f4").tobytes() + plain[at + 4:]))
    squeezed = bytearray(raw)                                            # no zlib stream any more
    squeezed[40] ^= 255
    (tmp_path / "squeezed.nii.gz").write_bytes(squeezed)
    nan = L.astype(np.float32)
    nan[3, 3, 3] = np.nan
    flat = AFFINE.copy()
    flat[0] = 0
    return {"cut": "damaged|short|header", "bit": "damaged|values", "text": "header", "claims": "cut short|damaged", "huge": "claims", "missing": "no such file", "intercept": "damaged|header|NaN", "offset": "damaged|header", "squeezed": "damaged|header",
            nifti(tmp_path / "nan.nii.gz", nan).name: "NaN", nifti(tmp_path / "4d.nii.gz", np.stack([L, L], -1)).name: "3D",
            nifti(tmp_path / "2d.nii.gz", L[:, :, 0]).name: "3D", nifti(tmp_path / "complex.nii.gz", L.astype(np.complex64)).name: "real numbers",
            nifti(tmp_path / "empty.nii.gz", 0 * L).name: "empty", nifti(tmp_path / "three.nii.gz", 3 * L + (L == 0)).name: "labels 0..1"}


def test_broken_files_are_refused_in_one_line(tmp_path):
    for name, words in broken(tmp_path).items():
        with pytest.raises(ValueError, match=words):
            data.load_channel("airway", tmp_path / (name if "." in name else f"{name}.nii.gz"))
    with pytest.raises(ValueError, match="no such file"):
        load_nifti(tmp_path)


def test_a_volume_without_a_place_or_an_outlandish_name_or_scale(tmp_path):
    image = nibabel.Nifti1Image(L, AFFINE)
    image.set_sform(AFFINE, 0), image.set_qform(AFFINE, 0)               # nibabel would flip left and right
    nibabel.save(image, tmp_path / "nowhere.nii.gz")
    with pytest.raises(ValueError, match="neither sform nor qform"):
        load_nifti(tmp_path / "nowhere.nii.gz")
    plain = nifti(tmp_path / "good.nii.gz", L)
    shutil.copy(plain, tmp_path / "packed.nii")                          # gzip by content, not by name
    assert np.array_equal(load_nifti(tmp_path / "packed.nii")[0], load_nifti(plain)[0])
    for name, array, words in (("ct", np.where(L, 124, 1064).astype(np.uint16), "Hounsfield"), ("ct", np.full(L.shape, 1e300), "NaN or infinite"),
                               ("airway", -L.astype(np.int8), "values -1 to 0")):
        with pytest.raises(ValueError, match=words):
            data.load_channel(name, nifti(tmp_path / "odd.nii.gz", array))
    for name, array in (("ct", np.where(L, -900, 40).astype(np.int16)), ("airway", L)):
        with pytest.raises(ValueError, match="no voxel of it lies in the field of view"):
            to_model({name: nifti(tmp_path / "far.nii.gz", array)}, 32, center=(900, 0, 0))


def prepared(tmp_path, **other):
    """Writes a small chest as NIfTI and runs the command.   -> the case folder"""
    ct = np.where(L, -900, 40).astype(np.int16)
    files = dict(ct=nifti(tmp_path / "ct.nii.gz", ct), lobe=nifti(tmp_path / "lobe.nii.gz", 5 * L), airway=nifti(tmp_path / "airway.nii.gz", L),
                 vessel=nifti(tmp_path / "vessel.nii.gz", 255 * L), report=tmp_path / "r.txt", out=tmp_path / "cases/a", grid="32", **other)
    files["report"].write_text("Findings: An L.\nImpression: Odd.")
    data.main(["prepare"] + [str(x) for k, v in files.items() for x in (f"--{k}", v)])
    return tmp_path / "cases/a"


def test_prepare_writes_a_case_that_check_finds_sound(tmp_path, capsys):
    case = prepared(tmp_path)
    np.save(case / "text.npy", np.zeros((192, 8), np.float16))
    data.main(["check", str(case.parent)])
    assert "1 cases, all sound" in capsys.readouterr().out
    low, lobe = np.load(case / "low.npy"), np.load(case / "lobe.npy")
    assert (decode("lobe", low[1]) == lobe[::4, ::4, ::4]).all() and lobe.max() == 5
    center = json.loads((case / "case.json").read_text())["center_ras_mm"]
    assert np.abs(np.array(center) - data.box_center(L, AFFINE)).max() < 1e-4   # the lobes' middle


def test_export_gives_the_case_back_where_it_came_from(tmp_path, capsys):
    case = prepared(tmp_path)
    data.main(["export", str(case.parent), "--out", str(tmp_path / "real")])
    for c in data.CHANNELS:                                              # on the model's grid, so the same grid gives the same voxels
        arrays, _ = to_model({c: tmp_path / f"real/a/{c}.nii.gz"}, 32)
        assert np.array_equal(arrays[c], np.load(case / f"{c}.npy")), c
    there = nibabel.load(tmp_path / "real/a/lobe.nii.gz")
    assert np.abs(centroid(np.asarray(there.dataobj), there.affine) - centroid(L, AFFINE)).max() < 5      # half a voxel
    with pytest.raises(SystemExit) as e:
        data.main(["export", str(case.parent), "--out", str(tmp_path / "real")])
    assert e.value.code == 2 and "exists already" in capsys.readouterr().err


def test_lobes_of_totalsegmentator_are_read_when_one_is_gone(tmp_path):
    for gone in (14, 12):
        labels = np.repeat(np.array([n for n in (0, 10, 11, 12, 13, 14) if n != gone], np.uint8), 20).reshape(5, 4, 5)
        array, _ = data.load_channel("lobe", nifti(tmp_path / "lobe.nii.gz", labels))
        assert np.array_equal(array, np.where(labels > 0, labels.astype(int) - 9, 0))


def test_lungs_beyond_the_field_of_view_are_told(tmp_path, capsys):
    tall = np.zeros((20, 20, 100), np.uint8)
    tall[5:15, 5:15, 2:98] = 5
    for voxel, told in ((2.5, ""), (4.0, "% of the lungs lie outside the field of view, 316 x 316 x 292 mm")):      # 240 and 384 mm tall
        to_model({"lobe": nifti(tmp_path / "tall.nii.gz", tall, np.diag([voxel, voxel, voxel, 1]))}, 64)
        err = capsys.readouterr().err
        assert told in err and bool(told) == bool(err)


@pytest.mark.parametrize("harm, words", [(lambda c: (c / "low.npy").unlink(), "low.npy missing"), (lambda c: (c / "ct.npy").write_bytes(b"x"), "unreadable"),
                                         (lambda c: np.save(c / "airway.npy", np.full((32,) * 3, 7, np.uint8)), "labels are wrong"),
                                         (lambda c: np.save(c / "low.npy", np.zeros((4, 8, 8, 8), np.float16)), "every fourth voxel"),
                                         (lambda c: (c / "airway.npy").write_bytes(b""), "unreadable"), (lambda c: np.savez(open(c / "low.npy", "wb"), a=1), "low.npy unreadable"),
                                         (lambda c: np.save(c / "ct.npy", (np.load(c / "ct.npy") + 1024).astype(np.int16) - 900 * (np.load(c / "lobe.npy") == 0).astype(np.int16)), "HU in the lungs"),
                                         (lambda c: (c / "report.txt").write_text("Findings:\nImpression:\n"), "no words"), (lambda c: (c / "report.txt").write_text(""), "no words")])
def test_check_names_what_is_wrong(tmp_path, capsys, harm, words):
    case = prepared(tmp_path)
    np.save(case / "text.npy", np.zeros((192, 8), np.float16))
    harm(case)
    with pytest.raises(SystemExit) as e:
        data.main(["check", str(case.parent)])
    assert e.value.code == 2 and words in capsys.readouterr().out


def test_cases_of_two_sizes_are_told_before_training(phantoms, tmp_path, capsys):
    for case in data.cases(phantoms)[:2]:
        shutil.copytree(case, tmp_path / case.name)
    np.save(tmp_path / case.name / "text.npy", np.zeros((100, 16), np.float16))
    with pytest.raises(SystemExit) as e:
        data.main(["check", str(tmp_path)])
    assert e.value.code == 2 and "text.npy is (192, 16) and" in capsys.readouterr().err
    with pytest.raises(ValueError, match="of one size"):
        Cases(data.cases(tmp_path), 0)
    Cases(data.cases(tmp_path), 0, crop=(16, 16, 16))                    # stage 2 reads no text


def test_a_failed_write_leaves_no_case(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError):
        data.write_case(tmp_path / "c", L, L, L, L, "x", {})
    assert list(tmp_path.iterdir()) == []


def test_item_k_is_decided_by_seed_and_k_and_an_epoch_sees_every_case_once(phantoms):
    folders = data.cases(phantoms)
    a, b, other = Cases(folders, 1), Cases(folders, 1), Cases(folders, 2)
    assert torch.equal(a[17][1], b[17][1]) and not all(torch.equal(a[k][1], other[k][1]) for k in range(5))
    assert len({a[k][1].numpy().tobytes() for k in range(5, 10)}) == 5


def test_a_crop_is_a_piece_of_the_volume_and_of_its_low_resolution(phantoms):
    folders = data.cases(phantoms)[:1]
    k, x0, low = Cases(folders, 3, crop=(24, 16, 12))[5]
    full = np.stack([encode(c, np.load(folders[0] / f"{c}.npy")) for c in data.CHANNELS])
    up = data.upsample(torch.from_numpy(np.load(folders[0] / "low.npy").astype(np.float32))[None])[0]
    places = [p for p in itertools.product(*(range(32 - n + 1) for n in (24, 16, 12)))
              if np.array_equal(full[:, p[0]:p[0] + 24, p[1]:p[1] + 16, p[2]:p[2] + 12], x0)]
    assert any(torch.equal(up[:, d:d + 24, h:h + 16, w:w + 12], low) for d, h, w in places)
