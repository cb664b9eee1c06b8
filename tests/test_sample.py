"""Sampling as a user types it: files in, files out, in the right place; wrong input is one line."""
import json
import shutil
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import beyond.train_sr
import golden
import sample
import support.sampling
import text_encoder
import train_low
import train_sr
from beyond import sampling
from data import CHANNELS, grid_affine
from support import fast
from support.nifti import save_nifti
from support.options import parse
from support.outputs import batches
from support.sampling import how_to_sample, implied
from support.weights import describe, export, load_stages
from unet3d import Block, UNet3D

QUICK = ["--low-steps", "2", "--sr-steps", "2", "--device", "cpu"]
CENTER = (5, 6, 7)


def run(model, out, *args):
    sample.main([*QUICK, "--model", str(model), "--out", str(out), *map(str, args)])


def volume(folder, c="ct"):
    return np.asarray(nibabel.load(folder / f"{c}.nii.gz").dataobj)


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than such a sample; for tests of what is in the volumes."""
    monkeypatch.setattr(sample, "picture", lambda path, *_: path.touch())


def put(folder, **arrays):
    """Writes masks or a CT on the model's grid around CENTER."""
    for c, array in arrays.items():
        save_nifti(folder / f"{c}.nii.gz", array, grid_affine(len(array), CENTER))


# --- what comes out ---

def test_a_prompt_and_a_mask_make_four_volumes_that_overlay_on_the_mask(model, airway, tmp_path, capsys):
    run(model, tmp_path, "--prompt", "Number 3.", "--airway", airway)
    folder = tmp_path / "prompt"
    files = [f"{c}.nii.gz" for c in CHANNELS]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*files, "preview.png", "sample.json"])
    images = {c: nibabel.load(folder / f"{c}.nii.gz") for c in CHANNELS}
    for c, image in images.items():
        assert image.shape == (32, 32, 32) and np.array_equal(image.affine, images["ct"].affine)
        assert image.get_data_dtype() == (np.int16 if c == "ct" else np.uint8)
        assert image.header["sform_code"] == image.header["qform_code"] == 1

    made, given = images["airway"], nibabel.load(airway)
    world = nibabel.affines.apply_affine(made.affine, np.argwhere(np.ones(made.shape)))
    index = np.rint(nibabel.affines.apply_affine(np.linalg.inv(given.affine), world)).astype(int)
    inside = ((index >= 0) & (index < given.shape)).all(1)
    want = np.zeros(len(world), bool)
    want[inside] = np.asarray(given.dataobj)[tuple(index[inside].T)] > 0
    assert np.array_equal(np.asarray(made.dataobj).ravel() > 0, want) and want.sum() > 50

    about = json.loads((folder / "sample.json").read_text())
    assert about["text"] == "Number 3." and about["seed"] == 0 and about["weights"]["low"]["step"] == 1
    assert about["arguments"]["airway"] == str(airway) and about["sampling"]["low_steps"] == 2
    assert "32^3 voxels, 9.875 x 9.875 x 9.125 mm" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.usefixtures("no_pictures")
def test_a_table_names_samples_and_their_seeds(tmp_path, fails):
    from support.outputs import names_of
    from support.reports import texts_asked
    table = tmp_path / "prompts.csv"
    table.write_text('name,seed,text\nfirst,7,"Large effusion, left.\nNo nodules."\n,,Cardiomegaly.\n')
    lines = tmp_path / "more.jsonl"
    lines.write_text('{"name": "x", "findings": "Clear.", "impression": "Normal.", "seed": 3}\n\n{"text": "Bullae."}\n')
    asked = texts_asked(None, [table, lines], "sample")
    assert names_of(asked, 1, 100) == [
        ("first", "Large effusion, left.\nNo nodules.", 7), ("prompts_0002", "Cardiomegaly.", 101),
        ("x", "Findings: Clear.\nImpression: Normal.", 3), ("more_0002", "Bullae.", 103)]
    assert [n[0::2] for n in names_of(asked[:1], 2, 0)] == [("first_00", 7), ("first_01", 8)]

    for text in ("name,seed,text\n", "name,text\n../up,Clear lungs.\n", "seed,text\n1.5,Clear lungs.\n",
                 "text\nClear lungs.\n123\n", "prompt\nClear lungs.\n", "name,text\na,Large effusion, left.\n",
                 "name,text\na,Clear.\na,Clear.\n"):
        table.write_text(text)
        code, said = fails(sample.main, "--report", table, "--out", tmp_path / "out")
        assert code == 2 and said.count("\n") == 1 and ("prompts.csv" in said or "one name: a;" in said), said
    lines.write_text('{"text": "Clear lungs."}\n[1]\n')
    code, said = fails(sample.main, "--report", lines, "--out", tmp_path / "out")
    assert code == 2 and "row 2" in said and not (tmp_path / "out").exists()


def test_a_seed_is_a_sample_and_reports_count(model, tmp_path):
    (tmp_path / "r").mkdir()
    for i in (1, 2):
        (tmp_path / f"r/{i}.txt").write_text(f"Findings: There is {i}.\nImpression: {i}.")
    run(model, tmp_path / "a", "--report", tmp_path / "r", "--samples", 2)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["1_00", "1_01", "2_00", "2_01"]
    run(model, tmp_path / "b", "--report", tmp_path / "r/2.txt", "--seed", 3)
    assert np.array_equal(volume(tmp_path / "a/2_01"), volume(tmp_path / "b/2"))
    assert not np.array_equal(volume(tmp_path / "a/2_00"), volume(tmp_path / "b/2"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_what_cannot_be_made_is_passed_over_and_made_by_resume(model, tmp_path, monkeypatch, fails, capsys):
    reports, out = tmp_path / "r", tmp_path / "out"
    reports.mkdir()
    for i in range(4):
        (reports / f"{i}.txt").write_text(f"Findings: There is {i}.\nImpression: {i}.")
    (reports / "1.txt").write_text("")
    noise = sample.ddim_sample
    monkeypatch.setattr(sample, "ddim_sample", lambda f, x, *_: noise(f, x, *_) / (0 if len(made()) == 1 else 1))

    def made():
        return sorted(p.name for p in out.glob("*"))

    asked = [*QUICK, "--stop-at-low", "--model", model, "--report", reports, "--out", out]
    code, err = fails(sample.main, *asked)
    assert code == 1 and made() == ["0"] and err.count("error:") == 1
    assert "3 sample(s) not made" in err and "1.txt: no words" in err and "seed 2: the sample is not finite" in err
    monkeypatch.undo()
    (reports / "1.txt").write_text("Findings: There is 1.\nImpression: 1.")
    before = (out / "0/sample.json").stat().st_mtime_ns
    run(model, out, "--stop-at-low", "--report", reports, "--resume")
    assert made() == ["0", "1", "2", "3"] and (out / "0/sample.json").stat().st_mtime_ns == before
    run(model, tmp_path / "alone", "--stop-at-low", "--report", reports / "2.txt", "--seed", 2)
    assert np.array_equal(volume(out / "2"), volume(tmp_path / "alone/2"))
    run(model, out, "--stop-at-low", "--report", reports, "--resume")
    assert "nothing is missing" in capsys.readouterr().out
    code, err = fails(sample.main, *asked, "--resume", "--seed", 9)
    assert code == 2 and "was not made from this text with seed 9" in err


@pytest.mark.usefixtures("no_pictures")
def test_samples_in_batches_are_those_made_one_by_one(model, airway, tmp_path, fails, monkeypatch):
    """Each by its own seed and text, the anatomy held in all; one that fails does not take the others along."""
    table = tmp_path / "t.csv"
    table.write_text("name,seed,text\n" + "".join(f"{i},{7 * i + 1},There is {i}.\n" for i in range(3)))
    asked, sizes, made = ["--report", table, "--airway", airway], [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args: sizes.append(len(args[3])) or made(*args))
    for n in (1, 2):
        run(model, tmp_path / str(n), *asked, "--batch", n)
    assert sizes == [1, 1, 1, 2, 1]
    for i in range(3):
        for c in CHANNELS:
            one, two = (volume(tmp_path / str(n) / str(i), c).astype(float) for n in (1, 2))
            assert np.abs(one - two).max() <= 1 if c == "ct" else np.array_equal(one, two)

    broken = torch.tensor([0., 1]).reshape(2, 1, 1, 1, 1)
    monkeypatch.setattr(sample, "generate", lambda *args: made(*args) / broken)
    code, err = fails(sample.main, *QUICK, "--model", model, "--prompt", "There is 1.", "--samples", 2, "--batch", 2,
                      "--out", tmp_path / "out")
    assert code == 1 and "seed 0: the sample is not finite" in err and (tmp_path / "out/prompt_01").is_dir()
    for wrong in ("0", "two", "-1", "1.5", ""):
        code, err = fails(sample.main, *QUICK, "--model", model, f"--batch={wrong}", "--out", tmp_path / "out")
        assert code == 2 and err.startswith(f"error: --batch {wrong}; auto or a number"), err


def test_a_batch_that_does_not_fit_is_halved():
    tried = []

    def make(batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no")
        return torch.tensor(batch).reshape(-1, 1, 1, 1, 1)

    def made(size, device="cuda"):
        tried.clear()
        return [(sample, x.item()) for sample, x, _ in batches(list(range(11)), size, device, make)]

    assert made("auto") == [(i, i) for i in range(11)] and tried == [8, 4, 2, 2, 2, 2, 2, 1]
    assert made("auto", "cpu") == [(i, i) for i in range(11)] and tried == [1] * 11
    with pytest.raises(torch.OutOfMemoryError):          # as asked, or not at all
        made("3")


@pytest.mark.usefixtures("no_pictures")
def test_every_mask_may_be_fixed_and_a_ct_is_segmented(model, tmp_path):
    rng, shape = np.random.default_rng(0), (32, 32, 32)
    masks = {c: rng.integers(0, top, shape).astype(np.uint8) for c, top in (("lobe", 6), ("airway", 2), ("vessel", 2))}
    put(tmp_path, ct=rng.integers(-1000, 500, shape).astype(np.int16), **masks)
    given = [x for c in CHANNELS[1:] for x in (f"--{c}", tmp_path / f"{c}.nii.gz")]
    run(model, tmp_path / "a", *given, "--as-is", "--center", *CENTER)
    for c in CHANNELS[1:]:
        assert np.array_equal(volume(tmp_path / "a/sample", c), volume(tmp_path, c)), c
    assert not np.array_equal(volume(tmp_path / "a/sample"), volume(tmp_path))

    run(model, tmp_path / "b", "--ct", tmp_path / "ct.nii.gz")
    assert np.abs(volume(tmp_path / "b/ct").astype(int) - volume(tmp_path)).max() <= 1
    affines = [nibabel.load(tmp_path / f).affine for f in ("b/ct/lobe.nii.gz", "ct.nii.gz")]
    assert np.allclose(*affines)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_several_cts_are_segmented_under_their_names_on_their_own_grids(model, tmp_path, fails):
    rng = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    turn = np.array([[0, -7.0, 0, 150], [6.0, 0, 0, -160], [0, 0, 8.0, -140], [0, 0, 0, 1]])       # axes P R S
    for name in ("one", "two"):
        image = nibabel.Nifti1Image(rng.integers(-1000, 500, (50, 44, 36)).astype(np.int16), turn)
        nibabel.save(image, tmp_path / f"scans/{name}.nii.gz")
    (tmp_path / "scans/broken.nii.gz").write_bytes(b"no volume")
    code, err = fails(sample.main, "--model", model, "--out", tmp_path / "m", "--ct", tmp_path / "scans", *QUICK)
    assert code == 1 and "1 sample(s) not made" in err and "broken.nii.gz" in err
    code, err = fails(sample.main, "--model", model, "--out", tmp_path / "n", "--grid", "native", *QUICK, "--ct",
                      tmp_path / "scans")
    for name in ("one", "two"):
        scan, lobe, whole = (nibabel.load(tmp_path / f) for f in (f"scans/{name}.nii.gz", f"n/{name}/lobe.nii.gz",
                                                                  f"m/{name}/lobe.nii.gz"))
        assert lobe.shape == scan.shape and np.allclose(lobe.affine, scan.affine)
        at = nibabel.affines.apply_affine(np.linalg.inv(whole.affine) @ lobe.affine,
                                          np.argwhere(np.ones(lobe.shape)))
        inside = ((at >= 0) & (at <= np.array(whole.shape) - 1)).all(1)
        nearest = np.asarray(whole.dataobj)[tuple(np.rint(at[inside]).astype(int).T)]
        same = np.asarray(lobe.dataobj).ravel()[inside] == nearest
        assert inside.mean() > 0.5 and same.mean() > 0.99                # but where two voxels are as near
    code, err = fails(sample.main, "--model", model, "--out", tmp_path / "o", "--grid", "like", *QUICK)
    assert code == 2 and "of which file?" in err


def test_stop_at_low_writes_the_low_resolution_volume_in_its_place(model, tmp_path):
    put(tmp_path, lobe=np.random.default_rng(0).integers(0, 6, (32,) * 3).astype(np.uint8))
    run(model, tmp_path, "--stop-at-low", "--lobe", tmp_path / "lobe.nii.gz", "--as-is", "--center", *CENTER)
    low, full = (nibabel.load(tmp_path / name) for name in ("sample/lobe.nii.gz", "lobe.nii.gz"))
    assert low.shape == (8, 8, 8)
    where = np.argwhere(np.ones(low.shape))          # each voxel lies on that voxel of the full grid whose label it has
    there = nibabel.affines.apply_affine(np.linalg.inv(full.affine) @ low.affine, where)
    assert np.abs(there - np.rint(there)).max() < 1e-3
    labels = np.asarray(full.dataobj)[tuple(np.rint(there).astype(int).T)]
    assert np.array_equal(labels, np.asarray(low.dataobj).ravel())


def test_names_that_typesetting_or_the_disk_would_not_take(model, tmp_path, fails):
    report, out = tmp_path / "cost$^$.txt", tmp_path / "out"
    report.write_text("Findings: There is 1.\nImpression: 1.")
    run(model, out, "--stop-at-low", "--report", report)
    assert (out / "cost$^$/preview.png").exists()
    run(model, out, "--stop-at-low", "--report", report, "--overwrite", "--seed", 5)
    assert json.loads((out / "cost$^$/sample.json").read_text())["seed"] == 5
    assert [p.name for p in out.iterdir()] == ["cost$^$"]

    long = tmp_path / f"{'a' * 245}.txt"
    long.write_text("Findings: There is 1.")
    odd = tmp_path / "odd/\udcff.txt"
    odd.parent.mkdir()
    odd.write_text("Findings: There is 1.")
    for args, words in ((["--report", long], "rename the report"), (["--prompt", "\udce9panchement"], "no UTF-8"),
                        (["--report", odd], "no UTF-8"), (["--report", odd.parent], "rename the report")):
        code, err = fails(sample.main, *QUICK, "--model", model, "--out", out, *args)
        assert code == 2 and words in err and err.count("\n") == 1


PROCESSORS = [({"avx2": True, "avx512_f": False}, False), ({"avx512_f": True, "avx512_bf16": False}, False),
              ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True),
              ({"architecture": "arm64", "neon": True}, False)]


@pytest.mark.parametrize("processor, expected", PROCESSORS)
def test_bfloat16_is_the_default_where_the_processor_multiplies_in_it(model, monkeypatch, processor, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setattr("support.sampling.quicker_in_bfloat16", lambda block: True)
    assert how(monkeypatch, model)["amp"] is expected
    assert all(parse(kind.Config, "", ["--device", "cpu"]).amp is expected for kind in (train_low, train_sr))


def test_where_it_can_be_either_the_quicker_format_is_taken_and_asked_once(model, monkeypatch):
    """A Block that waits in one of the formats: a processor of each kind."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    asked = []
    for slow in (True, False):
        def waiting(block, x, temb, slow=slow):
            asked.append(torch.is_autocast_enabled("cpu"))
            time.sleep(0.05 * (asked[-1] is slow))
        monkeypatch.setattr(fast, "TIMED", {})
        monkeypatch.setattr(Block, "forward", waiting)
        assert how(monkeypatch, model)["amp"] is not slow
        before = len(asked)
        assert how(monkeypatch, model)["amp"] is not slow and len(asked) == before
        assert how(monkeypatch, model, "--amp")["amp"] and not how(monkeypatch, model, "--no-amp")["amp"]


# --- how it is sampled ---

def how(monkeypatch, model, *args):
    """What `settings` makes of a command line, without sampling."""
    asked = []
    with monkeypatch.context() as m:
        m.setattr(sample, "sample", asked.append)
        sample.main(["--device", "cpu", "--model", str(model), *map(str, args)])
    return sample.settings(asked[0], sample.load(asked[0]))


WAY = dict(low_steps=12, sr_steps=4, guidance=4.0, interval=[0.8, 1.0], solver="dpm", agree=True, tidy=True,
           shown=["sr"])
PAPER = dict(low_steps=50, sr_steps=20, guidance=1.0)


@pytest.fixture
def told(model, tmp_path):
    """The model with all that sampling.json can say, in one folder."""
    folder = tmp_path / "told"
    folder.mkdir()
    for kind in ("low", "sr"):
        shutil.copy(model / kind / f"{kind}.safetensors", folder)
    shutil.copytree(model / "text", folder / "text")
    (folder / "sampling.json").write_text(json.dumps(WAY))
    return folder


def test_weights_are_sampled_as_the_file_beside_them_says(told, monkeypatch):
    s = how(monkeypatch, told)
    assert {k: s[k] for k in WAY} == WAY
    assert set(s["beyond"]) == {"agree", "tidy", "shown", "solver", "interval"}


def test_what_a_file_leaves_out_is_50_and_20_steps_of_ddim_at_guidance_2(told, monkeypatch):
    (told / "sampling.json").write_text("{}")
    s = how(monkeypatch, told)
    assert {k: s[k] for k in PAPER} == {**PAPER, "guidance": 2.0}
    assert not s["beyond"] and not WAY.keys() & s.keys() - PAPER.keys()


def test_each_stage_has_a_file_of_its_own_in_a_folder_of_runs(model, monkeypatch):
    s = how(monkeypatch, model)
    assert {k: s[k] for k in PAPER} == {**PAPER, "guidance": 2.0} and not s["beyond"]


@pytest.mark.parametrize("option, name, value", [
    (["--low-steps", 3], "low_steps", 3), (["--low_steps", 3], "low_steps", 3), (["--sr-steps=5"], "sr_steps", 5),
    (["--guidance", 1], "guidance", 1.0), (["--guidance-interval", 0, 0.5], "interval", [0.0, 0.5]),
    (["--guidance_interval", 0, 0.5], "interval", [0.0, 0.5]), (["--solver", "ddim"], "solver", "ddim"),
    (["--no-agree"], "agree", False), (["--no-tidy"], "tidy", False)])
def test_the_command_line_overrules_the_file(option, name, value, told, monkeypatch):
    s = how(monkeypatch, told, *option)
    assert {k: s[k] for k in WAY} == {**WAY, name: value}


def test_plain_is_the_papers_whatever_the_file_says(told, monkeypatch):
    for words in (json.dumps(WAY), "[broken"):
        (told / "sampling.json").write_text(words)
        s = how(monkeypatch, told, "--plain")
        assert {k: s[k] for k in PAPER} == PAPER and not s["beyond"] and not {"agree", "tidy", "shown"} & s.keys()
    s = how(monkeypatch, told, "--plain", "--guidance", 3, "--sr-steps", 7)
    assert (s["low_steps"], s["sr_steps"], s["guidance"]) == (50, 7, 3.0)


def test_stage_1_alone_is_told_nothing_of_stage_2(told, monkeypatch):
    s = how(monkeypatch, told, "--stop-at-low")
    assert s["low_steps"] == 12 and s["solver"] == "dpm" and "agree" not in s and "tidy" not in s


@pytest.mark.parametrize("words", [
    "[broken", "[]", '"dpm"', '{"steps": 5}', '{"low_steps": "many"}', '{"low_steps": 0}', '{"sr_steps": 2.5}',
    '{"guidance": NaN}', '{"guidance": -1}', '{"interval": [0.8]}', '{"interval": [0.8, 0.2]}', '{"solver": "euler"}',
    '{"interval": ["a", "b"]}', '{"agree": "yes"}', '{"shown": "sr"}', '{"shown": [["sr"]]}', "\0"])
def test_a_broken_file_is_one_line_and_nothing_is_written(words, told, tmp_path, fails):
    (told / "sampling.json").write_text(words)
    code, err = fails(sample.main, "--device", "cpu", "--model", told, "--out", tmp_path / "out")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert not list((tmp_path / "out").iterdir())


def test_weights_without_the_file_are_sampled_as_their_metadata_imply_which_is_said(told, monkeypatch, capsys):
    sr = load_stages(told, UNet3D)["sr"][0]
    export(told / "sr.safetensors", beyond.train_sr.Config(preset="demo"), sr, 32, 1, describe([]))
    (told / "sampling.json").unlink()
    s = how(monkeypatch, told)
    assert s["beyond"] == ["agree", "tidy"] and {k: s[k] for k in PAPER} == {**PAPER, "guidance": 2.0}
    out = capsys.readouterr().out
    assert "sampling.json is not there; sr.safetensors is sampled as its metadata say: " in out and "agree True" in out
    how(monkeypatch, told, "--plain")
    assert "sampling.json" not in capsys.readouterr().out


def test_metadata_imply_what_was_the_default_when_they_were_written():
    def old(kind, preset, given=0.0):
        config = dict(preset=preset, given=given, windows=0.0, cool=0.0, patch=1)
        return implied(kind, dict(step=1, provenance=dict(config=config)))
    for preset in ("demo", "demo-256"):
        assert old("sr", preset) == dict(agree=True, tidy=True) and old("low", preset) == {}
    for preset in ("paper", "light", ""):
        assert old("sr", preset) == dict(tidy=True) and old("low", preset) == {}
    assert old("low", "paper", given=0.4) == dict(shown=["low"])
    assert old("sr", "paper", given=0.4) == dict(shown=["sr"], tidy=True)

    released = dict(kind="sr", grid=256, provenance="released weights, CC-BY-NC")
    method = dict(step=1, provenance=dict(config=dict(preset="demo", lr=1e-4)))
    assert implied("sr", released) == implied("sr", method) == implied("sr", dict(step=1, provenance={})) == {}


@pytest.mark.parametrize("folder, low, full", [("demo", 32, 128), ("demo-256", 64, 256)])
def test_the_shipped_weights_are_whole_and_know_their_text_and_how_to_be_sampled(folder, low, full):
    folder = Path(sample.__file__).parent / "checkpoints" / folder
    stages = load_stages(folder, UNet3D)
    assert {kind: about["grid"] for kind, (_, about) in stages.items()} == {"low": low, "sr": full}
    net = stages["low"][0]
    encoder = text_encoder.load(folder / "text", tokens=net.args["tokens"])
    states = encoder.encode(["Findings: A small nodule.\nImpression: Nodule."])[0]
    with torch.no_grad():
        assert torch.isfinite(net(torch.randn(1, 4, 16, 16, 16), torch.tensor([0.5]), states)).all()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert max(sizes) < 16 << 20 and sum(sizes) < 12 << 20

    said, was = how_to_sample(stages), [implied(kind, about) for kind, (_, about) in stages.items()]
    assert set(said.pop("shown")) == {kind for i in was for kind in i.pop("shown", [])}
    assert was[0] | was[1] == dict(agree=True, tidy=True)
    steps = dict(low_steps=12, sr_steps=4) if low == 32 else dict(low_steps=5, sr_steps=3)
    assert said == steps | dict(agree=True, tidy=True, solver="dpm", guidance=4, interval=[0.8, 1])


@pytest.mark.usefixtures("no_pictures")
def test_a_file_and_the_same_options_make_the_same_sample(told, tmp_path):
    way = {**WAY, "low_steps": 2, "sr_steps": 2}
    del way["shown"]                                                     # no option
    (told / "sampling.json").write_text(json.dumps(way))
    words = ["--prompt", "Number 3.", "--device", "cpu"]
    sample.main([*words, "--model", str(told), "--out", str(tmp_path / "file")])
    (told / "sampling.json").write_text("{}")
    way = ["--guidance", 4, "--guidance-interval", 0.8, 1, "--solver", "dpm", "--agree", "--tidy"]
    run(told, tmp_path / "options", *words, *way)
    run(told, tmp_path / "neither", *words)
    for c in CHANNELS:
        assert np.array_equal(*(volume(tmp_path / out / "prompt", c) for out in ("file", "options")))
    assert not np.array_equal(*(volume(tmp_path / out / "prompt") for out in ("file", "neither")))


def test_where_beyond_is_deleted_what_asks_for_it_is_refused_and_names_plain(told, monkeypatch):
    monkeypatch.setattr(support.sampling, "beyond", lambda name: None)
    with pytest.raises(ValueError, match="pass --plain, or restore that folder"):
        how(monkeypatch, told)
    assert how(monkeypatch, told, "--plain")["beyond"] == []
    (told / "sampling.json").write_text(json.dumps(PAPER))
    assert how(monkeypatch, told)["beyond"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_stage_2_agrees_with_stage_1_if_asked_to(model, tmp_path):
    def apart(ct):                                                       # in tissue, HU
        ct = ct[::-1][::4, ::4, ::4]                                     # x runs the other way in files
        return np.abs(ct - low[::-1])[ct > -200].mean()

    more = dict(low=["--stop-at-low"], plain=[], no=["--no-agree"], agreeing=["--agree"])
    for out, options in more.items():
        run(model, tmp_path / out, *options)
    low, plain, no, agreeing = (volume(tmp_path / out / "sample").astype(int) for out in more)
    assert np.array_equal(plain, no) and apart(agreeing) < apart(no) - 40


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_lobes_are_tidied_if_asked_to_unless_they_are_given(model, airway, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "tidy_lobes", lambda x, tolerance=0, reach=0: torch.full_like(x, -0.2))
    for out, tidied, more in (("tidy", True, ["--tidy"]), ("no", False, ["--no-tidy"]), ("plain", False, ["--plain"]),
                              ("low", False, ["--stop-at-low", "--tidy"]),
                              ("airway", True, ["--tidy", "--airway", airway])):
        run(model, tmp_path / out, *more)
        assert (volume(tmp_path / out / "sample", "lobe") == 2).all() == tidied
    given = tmp_path / "no/sample/lobe.nii.gz"
    run(model, tmp_path / "given", "--lobe", given, "--as-is", "--tidy")
    assert np.array_equal(volume(tmp_path / "given/sample", "lobe"), volume(tmp_path / "no/sample", "lobe"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_what_is_fixed_is_shown_clean_to_networks_trained_so(told, airway, tmp_path):
    ways = dict(noisy={}, clean=dict(shown=["low", "sr"]), second=dict(shown=["sr"]))
    for name, way in ways.items():
        (told / "sampling.json").write_text(json.dumps(way))
        run(told, tmp_path / name, "--airway", airway, "--no-amp")
        about = json.loads((tmp_path / name / "sample/sample.json").read_text())
        assert about["sampling"].get("shown", []) == way.get("shown", [])
    fixed = [volume(tmp_path / name / "sample") for name in ways]
    assert not any(np.array_equal(fixed[i], fixed[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    for name in ("noisy", "clean"):                                      # where nothing is fixed, nothing is shown
        (told / "sampling.json").write_text(json.dumps(ways[name]))
        run(told, tmp_path / name / "free", "--no-amp")
    assert np.array_equal(*(volume(tmp_path / name / "free/sample") for name in ("noisy", "clean")))


@pytest.mark.usefixtures("no_pictures")
def test_a_solver_and_an_interval_change_the_sample(model, tmp_path):
    more = dict(whole=[], dpm=["--solver", "dpm"], middle=["--guidance-interval", 0.6, 0.9])
    for out, options in more.items():
        run(model, tmp_path / out, "--low-steps", 4, "--no-amp", "--stop-at-low", "--prompt", "Number 3.", *options)
    whole, dpm, middle = (volume(tmp_path / out / "prompt").astype(int) for out in more)
    assert np.abs(whole - dpm).max() > 1 and np.abs(whole - middle).max() > 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_slabs_change_memory_and_not_the_sample(model, tmp_path):
    """--slab drops stage 1's weights before stage 2 works; a second sample needs them again."""
    more = dict(whole=[], slabs=["--slab", 5], dpm=["--solver", "dpm"])
    for out, options in more.items():
        run(model, tmp_path / out, "--low-steps", 4, "--no-amp", "--samples", 2, "--prompt", "Number 3.", *options)
    for name in ("prompt_00", "prompt_01"):
        whole, slabs, dpm = (volume(tmp_path / out / name).astype(int) for out in more)
        assert np.abs(whole - slabs).max() <= 1 < np.abs(whole - dpm).max()


# --- weights of others ---

def test_released_checkpoint_folders_are_taken(tmp_path):
    for name in ("low", "sr"):
        folder = tmp_path / f"{name}_ckpt"
        folder.mkdir()
        state = {f"denoise_fn.{k}": v.contiguous().clone() for k, v in golden.weights(name).items()}
        if name == "sr":
            save_file(state, folder / "model_1.safetensors")
        else:
            torch.save({**state, "betas": torch.zeros(1000)}, folder / "pytorch_model_1.bin")
    stages, z = load_stages(tmp_path, UNet3D), golden.load("low")
    with torch.no_grad():
        made = stages["low"][0].eval()(z["x"], z["t"] / 1000, z["cond"])
    assert (made[golden.EVERY] - z["out_eval"]).abs().max() < 1e-4
    assert stages["sr"][1]["grid"] == 256 and stages["low"][1]["grid"] == 64
    assert how_to_sample(stages) == {}


# --- wrong input ---

class Evil:
    def __reduce__(self):
        return (open, ("evil_ran", "w"))


@pytest.fixture
def bad(model, tmp_path, monkeypatch):
    """A folder, the working one too, of reports, samples and weights with which something is wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "locked").write_text("a file, not a folder")
    for name in ("there", "more"):
        (tmp_path / name / "sample").mkdir(parents=True)
    (tmp_path / "more/sample/sample.json").touch()
    (tmp_path / "more/sample/heart.nii.gz").touch()                      # somebody's segmentation of a sample

    low, sr = (model / kind / f"{kind}.safetensors" for kind in ("low", "sr"))
    for name, content in (("pointer", b"version https://git-lfs.github.com/spec/v1\noid"), ("swapped", sr.read_bytes()),
                          ("unlike", low.read_bytes()), ("single", low.read_bytes())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "low.safetensors").write_bytes(content)
    net = UNet3D(8, in_channels=8, heads=1, rounds=1, levels=2, context_dim=0)
    export(tmp_path / "unlike/sr.safetensors", train_sr.Config(), net, 64, 1, describe([]))    # stage 1 makes 8^3
    about = dict(kind="low", args={**net.args, "dim": 16}, grid=8, provenance={})
    (tmp_path / "torn").mkdir()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "torn/low.safetensors",
              metadata={"medsyn": json.dumps(about)})
    for name, state in (("numbered", {0: torch.zeros(1)}), ("listed", [torch.zeros(1)]),
                        ("evil", {"denoise_fn.x": Evil()})):
        (tmp_path / name / "x_ckpt").mkdir(parents=True)
        torch.save(state, tmp_path / name / "x_ckpt/pytorch_model_1.bin")
    return tmp_path


def test_wrong_input_is_one_line_and_nothing_is_written(model, airway, bad, fails):
    wrong = [
        (["--guidance", "nan"], "--guidance nan"), (["--low-steps", "0"], "--low-steps 0"),
        (["--sr-steps", "1001"], "--sr-steps 1001; 1 to 1000"),
        (["--seed", "-1"], "--seed"), (["--seed", 2**32 - 1, "--samples", 2], "4294967296"),
        (["--guidance-interval", "0.8", "0.2"], "FROM <= TO"),
        (["--slab", "-2"], "--slab"), (["--samples", "0"], "--samples"), (["--center", "nan", 0, 0], "three finite"),
        (["--device", "cpu:x"], "--device cpu:x"), (["--solver", "euler"], "euler"),
        (["--low-step", "3"], "--low-step 3"), (["--prom", "a"], "--prom"), (["--low-steps", "two"], "two"),
        (["--report", bad / "empty.txt"], "no words"), (["--report", bad / "binary.txt"], "UTF-8"),
        (["--report", bad / "none.txt"], "none.txt"), (["--report", ""], "no name of a file"),
        (["--prompt", "a", "--report", bad / "empty.txt"], "one text"),
        (["--prompt", "x", "--text", bad / "none"], "text model"),
        (["--airway", bad / "none.nii"], "no such file"),
        (["--airway", airway, "--center", 900, 0, 0], "field of view"),
        (["--ct", airway, "--airway", airway], "leave them out"), (["--ct", airway], "Hounsfield"),
        (["--out", bad / "there"], "--overwrite"), (["--out", bad / "there", "--overwrite"], "is no sample"),
        (["--out", bad / "more", "--overwrite"], "heart.nii.gz besides"), (["--out", bad / "locked"], "locked"),
        (["--model", bad / "none"], "no such folder"), (["--model", bad / "pointer"], "not readable safetensors"),
        (["--model", bad / "swapped"], "kind sr"), (["--model", bad / "unlike"], "stage 1 makes 8^3, stage 2 64^3"),
        (["--model", bad / "single"], "no stage-2 weights"), (["--model", bad / "torn"], "do not fit"),
        (["--model", bad / "listed"], "refused"), (["--model", bad / "numbered"], "refused"),
        (["--model", bad / "evil"], "refused")]
    before = sorted(bad.rglob("*"))
    for args, words in wrong:
        code, err = fails(sample.main, *QUICK, "--model", model, "--out", bad / "out", *args)
        assert code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1, (args, err)
    assert [p for p in sorted(bad.rglob("*")) if p not in before and p.name != "out"] == []    # Evil did not run


def test_a_sample_that_is_not_finite_is_not_written(model, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(sample, "ddim_sample", lambda denoise, noise, *_: noise * float("nan"))
    code, err = fails(sample.main, *QUICK, "--model", model, "--out", tmp_path)
    assert code == 1 and "not finite" in err and list(tmp_path.iterdir()) == []
