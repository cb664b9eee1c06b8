"""Cases: values, geometry in all 48 axis orders and oblique, files that are broken, and the endless sequence."""
import gzip
import itertools
import json
import multiprocessing
import os
import shutil

import nibabel
import numpy as np
import pytest
import torch

import data
from data import Cases, decode, encode, grid_affine, split_cases, to_model
from support.anatomy import box_center
from support.checks import load_channel
from support.nifti import load_nifti, resample, save_nifti
from support.splits import held_out_patients

L = np.zeros((40, 30, 36), np.uint8)             # an L: no rotation or reflection maps it onto itself
L[8:30, 8:13, 9:14] = 1
L[8:13, 8:25, 9:14] = 1
L[8:13, 8:13, 9:31] = 1
AFFINE = np.array([[2.0, 0, 0, -38], [0, 2.6, 0, -20], [0, 0, 2.2, -30], [0, 0, 0, 1]])
ORDERS = [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]


# --- geometry ---

def centroid(array, affine):
    return nibabel.affines.apply_affine(affine, np.argwhere(array > 0)).mean(0)


def reordered(array, affine, axes, flips):
    """The same object in the same place, stored in another axis order."""
    image = nibabel.Nifti1Image(array, affine)
    return image.as_reoriented(np.array([[a, f] for a, f in zip(axes, flips)]))


@pytest.mark.parametrize("axes, flips", ORDERS)
def test_an_object_keeps_its_place_in_every_axis_order(axes, flips, tmp_path):
    nibabel.save(reordered(L, AFFINE, axes, flips), tmp_path / "l.nii.gz")
    arrays, center = to_model({"airway": tmp_path / "l.nii.gz"}, 64)
    save_nifti(tmp_path / "back.nii.gz", arrays["airway"], grid_affine(64, center))
    back = nibabel.load(tmp_path / "back.nii.gz")
    assert nibabel.aff2axcodes(back.affine) == ("R", "A", "S")
    assert back.header["sform_code"] == back.header["qform_code"] == 1 and back.header.get_xyzt_units()[0] == "mm"

    voxel = np.array(back.header.get_zooms())
    there = nibabel.affines.apply_affine(AFFINE, np.argwhere(L))
    here = nibabel.affines.apply_affine(back.affine, np.argwhere(np.asarray(back.dataobj) > 0))
    assert (abs(centroid(L, AFFINE) - here.mean(0)) < voxel / 2).all()
    for end in (np.min, np.max):             # voxel centres of the two grids: each end within half a voxel of either
        assert (abs(end(there, 0) - end(here, 0)) <= (voxel + np.diag(AFFINE)[:3]) / 2).all()
    given = nibabel.affines.apply_affine(np.linalg.inv(AFFINE), here)    # every saved voxel lies in one of the object
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


@pytest.mark.parametrize("of", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_parallel_axes_are_gone_through_one_by_one_to_the_same_values(of):
    """Beside the way for any turn, which a thousandth of a degree asks for."""
    rng = np.random.default_rng(0)
    a, A = rng.normal(size=(20, 24, 17)), np.eye(4)
    A[:3, :3] = np.diag([2.7, -0.6, 1.4])[list(of)]                      # of output voxels in the array's
    A[:3, 3] = np.where(A[:3, :3].sum(1) < 0, np.array(a.shape) - 2.3, -3.3)
    tilt = A.copy()
    tilt[:3, :3] += 7e-5
    for linear in (True, False):
        x, y = (resample(np.asfortranarray(a), np.eye(4), to, (18, 15, 16), linear=linear, fill=5) for to in (A, tilt))
        assert np.isclose(x, 5).any() and not np.isclose(x, 5).all() and x.shape == y.shape
        apart = np.abs(x - y)
        assert apart.max() < 0.1 and apart.mean() < 5e-3 if linear else np.mean(apart > 1e-3) < 0.02  # of two as near


def test_a_linear_ramp_survives_resampling_to_coarser_and_finer_grids():
    x, y, z = np.meshgrid(*[np.arange(n) for n in (40, 44, 48)], indexing="ij")
    for voxel in (0.4, 2.9):
        A = np.diag([voxel, voxel, voxel, 1.0])
        A[:3, 3] = 12
        out = resample(2.0 * x + y - z, np.eye(4), A, (6, 6, 6), linear=True)
        i, j, k = np.meshgrid(*[12 + voxel * np.arange(6)] * 3, indexing="ij")
        assert np.abs(out - (2 * i + j - k)).max() < 1e-3


# --- values ---

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


def test_the_low_resolution_volume_is_every_fourth_voxel_and_upsampling_puts_it_back_there():
    rng = np.random.default_rng(0)
    arrays = {c: rng.integers(0, 2, (8, 12, 16)).astype(np.int16) for c in data.CHANNELS}
    low = data.downsample(arrays)
    assert low.shape == (4, 2, 3, 4) and low.dtype == np.float32
    assert all((decode(c, x) == arrays[c][::4, ::4, ::4]).all() for c, x in zip(data.CHANNELS, low))
    up = data.upsample(torch.from_numpy(low)[None])
    assert up.shape == (1, 4, 8, 12, 16) and torch.equal(up[0, ..., ::4, ::4, ::4], torch.from_numpy(low))


# --- files that are broken ---

def nifti(path, array, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def broken(folder):
    """Writes files that are no masks.   -> name: what is said of it"""
    good = nifti(folder / "good.nii.gz", np.random.default_rng(0).integers(0, 2, L.shape).astype(np.uint8))
    raw = good.read_bytes()
    (folder / "cut.nii.gz").write_bytes(raw[:len(raw) // 2])
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 4
    (folder / "bit.nii.gz").write_bytes(flipped)
    (folder / "text.nii.gz").write_text("no image")

    plain = gzip.decompress(raw)
    header = bytearray(plain[:352])
    header[40:48] = np.array([3, 1500, 1500, 1500], "<i2").tobytes()
    (folder / "claims.nii.gz").write_bytes(gzip.compress(bytes(header)))
    header[42:48] = np.array([30000] * 3, "<i2").tobytes()
    (folder / "huge.nii.gz").write_bytes(gzip.compress(bytes(header)))
    for name, at, number in (("intercept", 116, np.nan), ("offset", 108, np.inf)):
        odd = plain[:at] + np.array(number, "<f4").tobytes() + plain[at + 4:]
        (folder / f"{name}.nii.gz").write_bytes(gzip.compress(odd))
    squeezed = bytearray(raw)                                            # no zlib stream any more
    squeezed[40] ^= 255
    (folder / "squeezed.nii.gz").write_bytes(squeezed)

    nan = L.astype(np.float32)
    nan[3, 3, 3] = np.nan
    flat = AFFINE.copy()
    flat[0] = 0
    for name, array in (("nan", nan), ("4d", np.stack([L, L], -1)), ("2d", L[:, :, 0]), ("empty", 0 * L),
                        ("complex", L.astype(np.complex64)), ("three", 3 * L + (L == 0))):
        nifti(folder / f"{name}.nii.gz", array)
    image = nibabel.Nifti1Image(L, None)
    image.header.set_sform(flat, 1)
    nibabel.save(nibabel.Nifti1Image(L, None, image.header), folder / "flat.nii.gz")
    return dict(cut="damaged|short|header", bit="damaged|values|CRC", text="header", claims="cut short|damaged",
                huge="claims", missing="no such file", intercept="damaged|header|NaN", offset="damaged|header",
                squeezed="damaged|header", nan="NaN", **{"4d": "3D", "2d": "3D"}, complex="real numbers",
                empty="empty", three="labels 0..1", flat="not finite or flat|neither sform")


def test_broken_files_are_refused_in_one_line(tmp_path):
    for name, words in broken(tmp_path).items():
        with pytest.raises(ValueError, match=words) as e:
            load_channel("airway", tmp_path / f"{name}.nii.gz")
        assert f"{name}.nii.gz: " in str(e.value)
    with pytest.raises(ValueError, match="no such file"):
        load_nifti(tmp_path)


HEADERS = {                       # name: offset in the header, its type and new values, 1 or the error
    "plain": (0, "<i4", [348], 1),
    "microns": (123, "u1", [3], "voxels of 2 x 3 x 4, unit micron; edges of 0.05 to 50 mm"),
    "metres": (123, "u1", [1], "unit meter"),
    "no unit": (123, "u1", [0], 1),
    "five axes": (40, "<i2", [5, *L.shape, 1, 1], 1),
    "two volumes": (40, "<i2", [4, *L.shape[:2], 4, 2], "3D volume"),
    "offset 0": (108, "<f4", [0], "vox_offset 0 lies inside the header"),
    "pixdim 0": (80, "<f4", [0, 0, 0], "pixdim says voxels of 0 x 0 x 0, the affine 2 x 3 x 4"),
    "pixdim 1": (80, "<f4", [1, 1, 1], "pixdim says"),
    "qform elsewhere": (268, "<f4", [77, 77, 77], 1),    # nibabel and ITK take the sform
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_read_as_libraries_agree_or_refused(name, tmp_path):
    affine = np.diag([-2.0, 3, 4, 1])
    image = nibabel.Nifti1Image(L, affine)
    image.set_qform(affine, 1)
    raw = bytearray(image.to_bytes())
    at, kind, values, wanted = HEADERS[name]
    new = np.array(values, kind).tobytes()
    raw[at:at + len(new)] = new
    (tmp_path / "a.nii").write_bytes(raw)
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            load_nifti(tmp_path / "a.nii")
    else:
        array, found = load_nifti(tmp_path / "a.nii")
        assert (array == L[::-1]).all() and np.allclose(np.abs(found[:3, :3]), np.diag([2, 3, 4]))


@pytest.mark.parametrize("unit, edge", [("mm", 1.5), ("meter", 0.0015), ("micron", 1500)])
def test_every_unit_becomes_mm_and_nifti_2_is_read(unit, edge, tmp_path):
    image = nibabel.Nifti2Image(L, np.diag([edge, edge, edge, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii.gz")
    array, affine = load_nifti(tmp_path / "a.nii.gz")
    assert (array == L).all() and np.allclose(affine, np.diag([1.5, 1.5, 1.5, 1]))


def test_a_volume_without_a_place_is_refused(tmp_path):
    image = nibabel.Nifti1Image(L, AFFINE)
    image.set_sform(AFFINE, 0)                                           # nibabel would flip left and right
    image.set_qform(AFFINE, 0)
    nibabel.save(image, tmp_path / "nowhere.nii.gz")
    with pytest.raises(ValueError, match="neither sform nor qform"):
        load_nifti(tmp_path / "nowhere.nii.gz")


def test_a_name_that_does_not_say_gzip_is_read_all_the_same(tmp_path):
    plain = nifti(tmp_path / "good.nii.gz", L)
    shutil.copy(plain, tmp_path / "packed.nii")
    assert np.array_equal(load_nifti(tmp_path / "packed.nii")[0], load_nifti(plain)[0])


@pytest.mark.parametrize("name, array, words", [
    ("ct", np.where(L, 124, 1064).astype(np.uint16), "Hounsfield"), ("ct", np.full(L.shape, 1e300), "NaN or infinite"),
    ("airway", -L.astype(np.int8), "values -1 to 0")])
def test_values_of_an_outlandish_scale_are_refused(name, array, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_channel(name, nifti(tmp_path / "odd.nii.gz", array))


@pytest.mark.parametrize("name, array", [("ct", np.where(L, -900, 40).astype(np.int16)), ("airway", L)])
def test_what_lies_elsewhere_than_the_field_of_view_is_refused(name, array, tmp_path):
    with pytest.raises(ValueError, match="no voxel of it lies in the field of view"):
        to_model({name: nifti(tmp_path / "far.nii.gz", array)}, 32, center=(900, 0, 0))


def test_lobes_of_totalsegmentator_are_read_when_one_is_gone(tmp_path):
    for gone in (14, 12):
        there = np.array([n for n in (0, 10, 11, 12, 13, 14) if n != gone], np.uint8)
        labels = np.repeat(there, 20).reshape(5, 4, 5)
        array, _ = load_channel("lobe", nifti(tmp_path / "lobe.nii.gz", labels))
        assert np.array_equal(array, np.where(labels > 0, labels.astype(int) - 9, 0))


def test_lungs_beyond_the_field_of_view_are_told(tmp_path, capsys):
    tall = np.zeros((20, 20, 100), np.uint8)
    tall[5:15, 5:15, 2:98] = 5
    words = "% of the lungs lie outside the field of view, 316 x 316 x 292 mm"
    for voxel, told in ((2.5, ""), (4.0, words)):                        # 240 and 384 mm tall
        to_model({"lobe": nifti(tmp_path / "tall.nii.gz", tall, np.diag([voxel, voxel, voxel, 1]))}, 64)
        err = capsys.readouterr().err
        assert told in err and bool(told) == bool(err)


# --- case folders ---

def prepared(folder, **other):
    """Writes a small chest as NIfTI and runs the command.   -> the case folder"""
    ct = np.where(L, -900, 40).astype(np.int16)
    files = dict(ct=nifti(folder / "ct.nii.gz", ct), lobe=nifti(folder / "lobe.nii.gz", 5 * L),
                 airway=nifti(folder / "airway.nii.gz", L), vessel=nifti(folder / "vessel.nii.gz", 255 * L),
                 report=folder / "r.txt", out=folder / "cases/a", grid="32", **other)
    files["report"].write_text("Findings: An L.\nImpression: Odd.")
    data.main(["prepare"] + [str(x) for k, v in files.items() for x in (f"--{k}", v)])
    return folder / "cases/a"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A case that is whole, text included."""
    case = prepared(tmp_path_factory.mktemp("sound"))
    np.save(case / "text.npy", np.zeros((192, 8), np.float16))
    return case


def test_prepare_writes_a_case_that_check_finds_sound(sound, capsys):
    case = sound
    data.main(["check", str(case.parent)])
    assert "1 cases, all sound" in capsys.readouterr().out
    low, lobe = np.load(case / "low.npy"), np.load(case / "lobe.npy")
    assert (decode("lobe", low[1]) == lobe[::4, ::4, ::4]).all() and lobe.max() == 5
    center = json.loads((case / "case.json").read_text())["center_ras_mm"]
    assert np.abs(np.array(center) - box_center(L, AFFINE)).max() < 1e-4                       # the lobes' middle


def test_prepare_refuses_grids_and_centres_that_mean_nothing(tmp_path, fails):
    case = prepared(tmp_path)
    files = [x for c in (*data.CHANNELS, "report") for x in (f"--{c}", tmp_path / f"{c}.nii.gz")]
    files[-1] = tmp_path / "r.txt"
    for more, words in ((["--grid", 30], "multiple of 4"), (["--grid", 0], "multiple of 4"),
                        (["--center", "nan", 0, 0], "three finite numbers"), (["--grid", 32], "exists already")):
        out = case if words == "exists already" else tmp_path / "cases/b"
        code, err = fails(data.main, "prepare", *files, "--out", out, *more)
        assert code == 2 and words in err and err.count("\n") == 1, err
    assert [p.name for p in case.parent.iterdir()] == ["a"]


def test_export_gives_the_case_back_where_it_came_from(tmp_path, fails):
    case = prepared(tmp_path)
    data.main(["export", str(case.parent), "--out", str(tmp_path / "real")])
    for c in data.CHANNELS:                              # on the model's grid, so the same grid gives the same voxels
        arrays, _ = to_model({c: tmp_path / f"real/a/{c}.nii.gz"}, 32)
        assert np.array_equal(arrays[c], np.load(case / f"{c}.npy")), c
    there = nibabel.load(tmp_path / "real/a/lobe.nii.gz")
    apart = centroid(np.asarray(there.dataobj), there.affine) - centroid(L, AFFINE)
    assert np.abs(apart).max() < 5                                       # half a voxel
    code, err = fails(data.main, "export", case.parent, "--out", tmp_path / "real")
    assert code == 2 and "exists already" in err


HARM = {
    "low.npy missing": lambda c: (c / "low.npy").unlink(),
    "ct.npy unreadable": lambda c: (c / "ct.npy").write_bytes(b"x"),
    "labels are wrong": lambda c: np.save(c / "airway.npy", np.full((32,) * 3, 7, np.uint8)),
    "the mask is empty": lambda c: np.save(c / "airway.npy", np.zeros((32,) * 3, np.uint8)),
    "every fourth voxel": lambda c: np.save(c / "low.npy", np.zeros((4, 8, 8, 8), np.float16)),
    "airway.npy unreadable": lambda c: (c / "airway.npy").write_bytes(b""),
    "low.npy unreadable": lambda c: np.savez(open(c / "low.npy", "wb"), a=1),
    "HU in the lobes": lambda c: np.save(c / "ct.npy", (np.load(c / "ct.npy") + 1024 - 900 * (np.load(c / "lobe.npy")
                                                        == 0)).astype(np.int16)),
    "not a chest": lambda c: np.save(c / "ct.npy", np.load(c / "ct.npy") + np.int16(1024)),
    "is float32, not float16": lambda c: np.save(c / "text.npy", np.zeros((192, 8), np.float32)),
    "not finite": lambda c: np.save(c / "text.npy", np.full((192, 8), np.inf, np.float16)),
    "all must be one cube": lambda c: np.save(c / "vessel.npy", np.ones((16, 32, 32), np.uint8)),
    "for a grid of": lambda c: np.save(c / "low.npy", np.zeros((4, 4, 4, 4), np.float16)),
    "run text_encoder.py embed": lambda c: (c / "text.npy").unlink(),
    "no words": lambda c: (c / "report.txt").write_text("Findings:\nImpression:\n"),
    "no words in it": lambda c: (c / "report.txt").write_text(""),
}


@pytest.mark.parametrize("words", HARM)
def test_check_names_what_is_wrong(words, sound, tmp_path, capsys):
    case = shutil.copytree(sound, tmp_path / "a")
    HARM[words](case)
    with pytest.raises(SystemExit) as e:
        data.main(["check", str(tmp_path)])
    assert e.value.code == 2 and words in capsys.readouterr().out


def test_cases_of_two_sizes_are_told_before_training(phantoms, tmp_path, fails):
    for case in data.cases(phantoms)[:2]:
        shutil.copytree(case, tmp_path / case.name)
    np.save(tmp_path / case.name / "text.npy", np.zeros((100, 16), np.float16))
    code, err = fails(data.main, "check", tmp_path)
    assert code == 2 and "text.npy is (192, 16) and" in err
    with pytest.raises(ValueError, match="of one size"):
        Cases(data.cases(tmp_path), 0)
    Cases(data.cases(tmp_path), 0, crop=(16, 16, 16))                    # stage 2 reads no text


def test_a_case_that_lacks_what_a_stage_reads_is_named_with_the_way_to_get_it(phantoms, tmp_path):
    case = tmp_path / "case"
    shutil.copytree(data.cases(phantoms)[0], case)
    (case / "text.npy").unlink()
    with pytest.raises(ValueError, match="no text.npy; stage 1 needs them; run python text_encoder.py embed"):
        Cases([case], 0)
    (case / "vessel.npy").unlink()
    with pytest.raises(ValueError, match="no vessel.npy; stage 2 needs them; run python data.py check"):
        Cases([case], 0, crop=(16, 16, 16))


def test_a_failed_write_leaves_no_case(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError):
        data.write_case(tmp_path / "c", L, L, L, L, "x", {})
    assert list(tmp_path.iterdir()) == []


def test_a_chest_is_trained_on_or_held_out(phantoms, tmp_path):
    for name in ("a", "a_text1", "a_text2", "b", "b_text1", "b_text2"):
        os.symlink(data.cases(phantoms)[0], tmp_path / name)
    train, held_out = split_cases(tmp_path, 2)
    assert [f.name for f in train] == ["a", "a_text1", "a_text2"]
    assert [f.name for f in held_out] == ["b_text1", "b_text2"]
    (tmp_path / "split.json").unlink()
    for holdout in (4, 9):
        with pytest.raises(ValueError, match="a trainer needs cases"):
            split_cases(tmp_path, holdout)
        assert not (tmp_path / "split.json").exists()


def test_two_trainers_that_begin_at_once_write_one_split(tmp_path):
    processes = multiprocessing.get_context("fork")
    both, found = processes.Barrier(2, timeout=20), processes.Queue()

    def begin():
        for i in range(100):
            both.wait()
            found.put(held_out_patients(tmp_path / str(i), [tmp_path / "a", tmp_path / "b"], 1, ""))

    for i in range(100):
        (tmp_path / str(i)).mkdir()
    trainers = [processes.Process(target=begin, daemon=True) for _ in range(2)]
    for trainer in trainers:
        trainer.start()
    assert [found.get(timeout=30) for _ in range(200)] == [{"b"}] * 200
    for trainer in trainers:
        trainer.join()
    assert all([f.name for f in (tmp_path / str(i)).iterdir()] == ["split.json"] for i in range(100))


def test_one_split_holds_for_all_who_read_the_folder(phantoms, tmp_path):
    def add(*names):
        for name in names:
            shutil.copytree(data.cases(phantoms)[0], tmp_path / name)

    def names(split):
        return [[f.name for f in part] for part in split]

    add("a", "b", "c", "c_text1")
    assert names(split_cases(tmp_path, 1)) == [["a", "b"], ["c_text1"]]
    assert json.loads((tmp_path / "split.json").read_text()) == {"held_out": ["c"], "seed": None}
    add("d")                                                             # who comes later is for training
    assert names(split_cases(tmp_path, 3)) == [["a", "b", "d"], ["c", "c_text1"]]
    assert names(split_cases(tmp_path, 0)) == [["a", "b", "c", "c_text1", "d"], []]
    meta = json.loads((tmp_path / "a/case.json").read_text())
    (tmp_path / "a/case.json").write_text(json.dumps(meta | dict(patient="c")))
    assert names(split_cases(tmp_path, 9)) == [["b", "d"], ["a", "c", "c_text1"]]

    (tmp_path / "run").mkdir()                                           # a run that was begun before there was one
    torch.save(dict(cases=["a", "b", "c", "c_text1"]), tmp_path / "run/last.pt")
    assert names(split_cases(tmp_path, 1, tmp_path / "run")) == [["a", "b", "c", "c_text1"], ["d"]]
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(ValueError, match="split.json: no split"):
        split_cases(tmp_path, 1)


def test_a_flipped_bit_of_a_case_is_seen_by_check_and_once_by_a_trainer(phantoms, tmp_path, capsys):
    case = tmp_path / "case"
    shutil.copytree(data.cases(phantoms)[0], case)
    Cases([case], 0)
    raw = bytearray((case / "low.npy").read_bytes())
    raw[-7] ^= 1
    (case / "low.npy").write_bytes(raw)
    for names in ((), (16, 16, 16)):                                     # both stages read it
        with pytest.raises(ValueError, match="case: low.npy not as written"):
            Cases([case], 0, names or None)
    with pytest.raises(SystemExit):
        data.main(["check", str(tmp_path)])
    assert "low.npy is not as written (its hash differs)" in capsys.readouterr().out


# --- the endless sequence ---

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


def test_a_crop_lies_inside(phantoms):
    with pytest.raises(ValueError, match="larger than the grid 32"):
        Cases(data.cases(phantoms), 0, crop=(16, 16, 40))
