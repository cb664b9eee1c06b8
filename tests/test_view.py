"""Looking: volumes in one HTML file, and what a browser makes of it."""
import base64
import gzip
import json
import re

import nibabel
import numpy as np
import pytest

import data
import sample
import view
from browser import opened
from support.nifti import save_nifti

CHANNELS = ("ct", "lobe", "airway", "vessel")


@pytest.fixture(scope="module")
def folders(phantoms, tmp_path_factory):
    """Two phantoms as NIfTI of 32^3."""
    out = tmp_path_factory.mktemp("secret") / "exported"
    data.main(["export", str(phantoms), "--out", str(out)])
    return sorted(out.iterdir())[:2]


def shown(path):
    """-> title and volumes {channel: NIfTI image} of each folder in a file that view.py wrote"""
    text = re.search(r'<script type="application/json" id="folders">(.*?)</script>', path.read_text(), re.DOTALL)[1]
    return [(folder["title"], {name: nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(packed)))
                               for name, packed in folder["volumes"].items()}) for folder in json.loads(text)]


# --- the file ---

def test_a_file_holds_the_volumes_and_no_name_but_the_title(folders, tmp_path, capsys):
    view.main([str(folders[0]), "--out", str(tmp_path / "a.html")])
    assert f"wrote {tmp_path / 'a.html'}" in capsys.readouterr().out
    (title, volumes), = shown(tmp_path / "a.html")
    assert title == folders[0].name and tuple(volumes) == CHANNELS
    for name, image in volumes.items():
        was = np.asarray(nibabel.load(folders[0] / f"{name}.nii.gz").dataobj)
        assert np.abs(np.asarray(image.dataobj, float) - was.clip(-1024, 600)).max() <= (name == "ct")
        assert nibabel.aff2axcodes(image.affine) == tuple("RAS")

    view.write(tmp_path / "b.html", folders[:1], ["case 1"], channels=("ct",))
    (title, volumes), = shown(tmp_path / "b.html")
    text = (tmp_path / "b.html").read_text()
    assert title == "case 1" and tuple(volumes) == ("ct",)
    assert not any(part in text for part in (folders[0].name, "secret", "exported"))
    assert "Copyright (c) 2021, Niivue" in text and not re.search(r'(src|href)="?http', text)


def test_the_file_lies_beside_the_volumes_and_is_replaced(folders):
    for _ in range(2):
        view.main([str(folders[0])])
    assert [p.name for p in folders[0].glob("view*")] == ["view.html"]
    (folders[0] / "view.html").unlink()


def test_a_title_ends_no_script(folders, tmp_path):
    title = "</script><b>{niivue} & \\1"
    view.write(tmp_path / "a.html", folders[:1], [title])
    assert shown(tmp_path / "a.html")[0][0] == title
    assert "<title>&lt;/script&gt;&lt;b&gt;{niivue} &amp; \\1</title>" in (tmp_path / "a.html").read_text()


def test_masks_alone_lie_on_nothing(folders, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/lobe.nii.gz").write_bytes((folders[0] / "lobe.nii.gz").read_bytes())
    view.write(tmp_path / "a.html", [tmp_path / "masks"])
    (_, volumes), = shown(tmp_path / "a.html")
    assert tuple(volumes) == ("nothing", "lobe") and (np.asarray(volumes["nothing"].dataobj) == -1024).all()
    assert np.array_equal(volumes["nothing"].affine, volumes["lobe"].affine)


def put(folder, shape, center):
    folder.mkdir()
    for name in ("ct", "airway"):
        save_nifti(folder / f"{name}.nii.gz", np.ones(shape, np.int16 if name == "ct" else np.uint8),
                   data.grid_affine(shape[0], center))
    return folder


def test_grids_of_one_size_lie_on_each_other_and_tell_no_place_others_keep_theirs(tmp_path):
    here, there = put(tmp_path / "a", (16, 16, 16), (0, 0, 0)), put(tmp_path / "b", (16, 16, 16), (10, 20, -300))
    coarse = put(tmp_path / "c", (8, 8, 8), (10, 20, -300))
    view.write(tmp_path / "same.html", [here, there])
    affines = [image.affine for _, volumes in shown(tmp_path / "same.html") for image in volumes.values()]
    middle = affines[0] @ [7.5, 7.5, 7.5, 1]
    assert all(np.allclose(a, affines[0]) for a in affines) and np.allclose(middle[:3], 0, atol=1e-4)

    view.write(tmp_path / "others.html", [there, coarse])
    for folder, (_, volumes) in zip((there, coarse), shown(tmp_path / "others.html")):
        for name, image in volumes.items():
            assert np.allclose(image.affine, nibabel.load(folder / f"{name}.nii.gz").affine, atol=1e-3)


def test_long_axes_are_thinned_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "EDGE", 8)
    folder = put(tmp_path / "a", (16, 16, 16), (0, 0, 0))
    given, (array, affine) = nibabel.load(folder / "ct.nii.gz"), view.read(folder)["ct"]
    assert array.shape == (8, 8, 8) and np.allclose(affine @ [1, 2, 3, 1], given.affine @ [2, 4, 6, 1])


def test_what_cannot_be_shown_is_one_line_and_nothing_is_written(folders, tmp_path, fails):
    (tmp_path / "empty").mkdir()
    for args, words in (([tmp_path / "empty"], "no ct.nii.gz, lobe.nii.gz"), ([tmp_path / "none"], "no folder"),
                        ([folders[0], "--out", tmp_path / "ct.nii.gz"], "ends in .html")):
        code, err = fails(view.main, *args)
        assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err
    assert [*tmp_path.iterdir()] == [tmp_path / "empty"] and not [*(tmp_path / "empty").iterdir()]


def test_a_sample_with_its_view_is_replaced_by_overwrite(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "picture", lambda path, *_: path.touch())
    args = ["--low-steps", "1", "--sr-steps", "1", "--device", "cpu", "--model", str(model), "--out", str(tmp_path)]
    for more in ([], ["--seed", "1", "--overwrite"]):
        sample.main([*args, "--view", *more])
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"python view.py {tmp_path / 'sample'}")
        (title, volumes), = shown(tmp_path / "sample/view.html")
        made = np.asarray(nibabel.load(tmp_path / "sample/ct.nii.gz").dataobj)
        assert title == "sample" and np.abs(np.asarray(volumes["ct"].dataobj) - made).max() <= 1
    sample.main([*args, "--overwrite"])
    assert not (tmp_path / "sample/view.html").exists()


# --- in a browser ---

@pytest.mark.slow
def test_a_browser_shows_three_planes_scrolls_and_switches_masks_and_windows(folders, tmp_path):
    view.write(tmp_path / "a.html", folders[:1])
    url = f"file://{tmp_path / 'a.html'}"
    with opened(url) as (page, asked, wrong):
        page.wait_for_selector("body[data-state=ready]")
        canvas, readout = page.locator("canvas"), page.locator("output")
        assert readout.inner_text().startswith("voxel 16, 16, 16 | ")
        seen = {"all": canvas.screenshot()}
        box, tiles = canvas.bounding_box(), page.evaluate(
            "views[0].nv.screenSlices.map(s => [s.axCorSag, ...s.leftTopWidthHeight].map(x => x / devicePixelRatio))")
        assert sorted(tile[0] for tile in tiles) == [0, 1, 2]            # axial, coronal, sagittal
        left, top, width, height = next(tile[1:] for tile in tiles if tile[0] == 0)

        # a click on the left is the patient's right, above is in front
        page.mouse.click(box["x"] + left + 0.3 * width, box["y"] + top + 0.4 * height)
        x, y, z = map(int, re.findall(r"\d+", readout.inner_text())[:3])
        assert x == pytest.approx(32 * 0.7, abs=1.5) and y == pytest.approx(32 * 0.6, abs=1.5) and z == 16
        ct = np.asarray(nibabel.load(folders[0] / "ct.nii.gz").dataobj).clip(-1024, 600)
        hu = int(re.search(r"(-?\d+) HU", readout.inner_text())[1])
        assert abs(hu - ct[x, y, z]) <= 1
        lobe = np.asarray(nibabel.load(folders[0] / "lobe.nii.gz").dataobj)[x, y, z]
        assert lobe == 0 or "right" in readout.inner_text()

        before = readout.inner_text()
        page.mouse.wheel(0, 200)                                         # through the plane under the pointer
        page.wait_for_function("was => document.querySelector('output').textContent !== was", arg=before)
        assert re.findall(r"\d+", readout.inner_text())[2] != "16"

        for name in ("lung", "soft tissue", "lobe", "vessel", "airway"):
            page.click(f"button[name='{name}']")
            seen[name] = canvas.screenshot()
        assert len({*seen.values()}) == len(seen)                        # each changes the picture
        pressed = page.evaluate("[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.name)")
        assert pressed == ["soft tissue"]
        page.click("button[name=airway]")
        assert canvas.screenshot() == seen["vessel"]                     # and is back where it was
        assert not wrong and asked == [url]


@pytest.mark.slow
def test_two_folders_have_linked_cursors(folders, tmp_path):
    view.write(tmp_path / "two.html", folders, ["left", "right"])
    with opened(f"file://{tmp_path / 'two.html'}") as (page, _, wrong):
        page.wait_for_selector("body[data-state=ready]")
        assert page.locator("h2").all_inner_texts() == ["left", "right"]
        for i in (0, 1):
            box = page.locator("canvas").nth(i).bounding_box()
            page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + (0.2 + 0.1 * i) * box["height"])
            before = page.locator("output").all_inner_texts()
            page.mouse.wheel(0, 200)
            page.wait_for_function("was => document.querySelector('output').textContent !== was", arg=before[0])
            texts = page.locator("output").all_inner_texts()
            places = [re.match(r"voxel [\d, ]+", text)[0] for text in texts]
            assert places[0] == places[1] and texts[1] != before[1]
        assert not wrong
