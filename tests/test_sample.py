"""Sampling as a user types it: files in, files out, in the right place; wrong input is one line."""
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

import golden
import sample
import text_encoder
import train_sr
from data import CHANNELS, save_nifti
from safetensors.torch import save_file
from train_low import Config, export, parse
from unet3d import UNet3D

QUICK = ["--low-steps", "2", "--sr-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with random weights: 8^3 -> 32^3, a tiny text encoder beside."""
    folder = tmp_path_factory.mktemp("model")
    reports = folder / "reports"
    reports.mkdir()
    for i in range(12):
        (reports / f"{i}.txt").write_text(f"Findings: There is {i} and nothing else.\nImpression: Number {i}.")
    text_encoder.main(["train", "--scratch", "--width", "16", "--layers", "1", "--heads", "2", "--steps", "2", "--batch", "4", "--held-out", "0.2", "--tokens", "32",
                       "--reports", str(reports), "--out", str(folder / "text"), "--device", "cpu"])
    torch.manual_seed(0)
    low = UNet3D(8, heads=1, levels=2, context_dim=16, tokens=32)
    sr = UNet3D(8, in_channels=8, heads=1, rounds=1, levels=2, context_dim=0)
    for kind, net, grid in (("low", low, 8), ("sr", sr, 32)):
        cfg = Config()
        cfg.kind = kind
        export(folder / f"{kind}.safetensors", cfg, net, grid, 1, 1)
    return folder


@pytest.fixture(scope="module")
def airway(tmp_path_factory):
    """A mask of its own size, orientation (L P S, as clinical CTs come) and voxels, off the origin."""
    mask = np.zeros((50, 50, 60), np.uint8)
    mask[20:30, 18:28, 10:60] = 1
    mask[5:25, 20:26, 8:14] = 1
    affine = np.diag([-5.0, -5.0, 4.0, 1.0])
    affine[:3, 3] = [100, 140, -300]
    path = tmp_path_factory.mktemp("masks") / "airway.nii.gz"
    nibabel.save(nibabel.Nifti1Image(mask, affine), path)
    return path


def run(model, out, *args):
    sample.main([*QUICK, "--model", str(model), "--out", str(out), *map(str, args)])


def test_a_prompt_and_a_mask_make_four_volumes_that_overlay_on_the_mask(model, airway, tmp_path, capsys):
    run(model, tmp_path, "--prompt", "Number 3.", "--airway", airway)
    folder = tmp_path / "prompt"
    assert sorted(p.name for p in folder.iterdir()) == sorted([f"{c}.nii.gz" for c in CHANNELS] + ["preview.png", "sample.json"])
    images = {c: nibabel.load(folder / f"{c}.nii.gz") for c in CHANNELS}
    for c, image in images.items():
        assert image.shape == (32, 32, 32) and np.array_equal(image.affine, images["ct"].affine)
        assert image.get_data_dtype() == (np.int16 if c == "ct" else np.uint8) and image.header["sform_code"] == image.header["qform_code"] == 1
    made, given = images["airway"], nibabel.load(airway)
    world = nibabel.affines.apply_affine(made.affine, np.argwhere(np.ones(made.shape)))
    index = np.rint(nibabel.affines.apply_affine(np.linalg.inv(given.affine), world)).astype(int)
    inside = ((index >= 0) & (index < given.shape)).all(1)
    want = np.zeros(len(world), bool)
    want[inside] = np.asarray(given.dataobj)[tuple(index[inside].T)] > 0
    assert np.array_equal(np.asarray(made.dataobj).ravel() > 0, want) and want.sum() > 50
    about = json.loads((folder / "sample.json").read_text())
    assert about["text"] == "Number 3." and about["seed"] == 0 and about["weights"]["low"]["step"] == 1 and about["arguments"]["airway"] == str(airway)
    assert "32^3 voxels, 9.875 x 9.875 x 9.125 mm" in capsys.readouterr().out.splitlines()[-1]


def volume(folder, c="ct"):
    return np.asarray(nibabel.load(folder / f"{c}.nii.gz").dataobj)



@pytest.mark.parametrize("processor, expected", [({"avx2": True, "avx512_f": False}, False), ({"avx512_f": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True),
                                                 ({"amx_bf16": True}, True), ({"architecture": "arm64", "neon": True}, False)])
def test_bfloat16_is_the_default_where_the_processor_multiplies_in_it(model, tmp_path, monkeypatch, processor, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    run(model, tmp_path, "--stop-at-low", "--prompt", "Number 3.")
    assert json.loads((tmp_path / "prompt/sample.json").read_text())["arguments"]["amp"] is expected
    assert all(parse(config, "", ["--device", "cpu"]).amp is expected for config in (Config, train_sr.Config))


def test_a_seed_is_a_sample_and_reports_count(model, tmp_path):
    (tmp_path / "r").mkdir()
    for i in (1, 2):
        (tmp_path / f"r/{i}.txt").write_text(f"Findings: There is {i}.\nImpression: {i}.")
    run(model, tmp_path / "a", "--report", tmp_path / "r", "--samples", 2)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["1_00", "1_01", "2_00", "2_01"]
    run(model, tmp_path / "b", "--report", tmp_path / "r/2.txt", "--seed", 3)
    assert np.array_equal(volume(tmp_path / "a/2_01"), volume(tmp_path / "b/2")) and not np.array_equal(volume(tmp_path / "a/2_00"), volume(tmp_path / "b/2"))


def test_every_mask_may_be_fixed_and_a_ct_is_segmented(model, tmp_path):
    rng = np.random.default_rng(0)
    given = dict(ct=rng.integers(-1000, 500, (32,) * 3).astype(np.int16), lobe=rng.integers(0, 6, (32,) * 3).astype(np.uint8),
                 airway=rng.integers(0, 2, (32,) * 3).astype(np.uint8), vessel=rng.integers(0, 2, (32,) * 3).astype(np.uint8))
    for c, a in given.items():
        save_nifti(tmp_path / f"{c}.nii.gz", a, (5, 6, 7))
    run(model, tmp_path / "a", *[x for c in CHANNELS[1:] for x in (f"--{c}", tmp_path / f"{c}.nii.gz")], "--center", 5, 6, 7)
    for c in CHANNELS[1:]:
        assert np.array_equal(volume(tmp_path / "a/sample", c), volume(tmp_path, c)), c
    assert not np.array_equal(volume(tmp_path / "a/sample"), volume(tmp_path))
    run(model, tmp_path / "b", "--ct", tmp_path / "ct.nii.gz")
    assert np.abs(volume(tmp_path / "b/ct").astype(int) - volume(tmp_path)).max() <= 1
    assert np.allclose(nibabel.load(tmp_path / "b/ct/lobe.nii.gz").affine, nibabel.load(tmp_path / "ct.nii.gz").affine)


def test_stop_at_low_writes_the_low_resolution_volume_in_its_place(model, tmp_path):
    lobe = np.random.default_rng(0).integers(0, 6, (32,) * 3).astype(np.uint8)
    save_nifti(tmp_path / "lobe.nii.gz", lobe, (5, 6, 7))
    run(model, tmp_path, "--stop-at-low", "--lobe", tmp_path / "lobe.nii.gz", "--center", 5, 6, 7)
    low, full = (nibabel.load(tmp_path / name) for name in ("sample/lobe.nii.gz", "lobe.nii.gz"))
    assert low.shape == (8, 8, 8)
    where = np.argwhere(np.ones(low.shape))                              # each voxel lies on that voxel of the full grid whose label it has
    there = nibabel.affines.apply_affine(np.linalg.inv(full.affine) @ low.affine, where)
    assert np.abs(there - np.rint(there)).max() < 1e-3
    assert np.array_equal(np.asarray(full.dataobj)[tuple(np.rint(there).astype(int).T)], np.asarray(low.dataobj).ravel())


def test_names_that_typesetting_or_the_disk_would_not_take(model, tmp_path, capsys):
    (tmp_path / "cost$^$.txt").write_text("Findings: There is 1.\nImpression: 1.")
    run(model, tmp_path / "out", "--stop-at-low", "--report", tmp_path / "cost$^$.txt")
    assert (tmp_path / "out/cost$^$/preview.png").exists()
    run(model, tmp_path / "out", "--stop-at-low", "--report", tmp_path / "cost$^$.txt", "--overwrite", "--seed", 5)
    assert json.loads((tmp_path / "out/cost$^$/sample.json").read_text())["seed"] == 5 and sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cost$^$"]
    (tmp_path / f"{'a' * 245}.txt").write_text("Findings: There is 1.")
    for args, words in ((["--report", tmp_path / f"{'a' * 245}.txt"], "rename the report"), (["--prompt", "\udce9panchement"], "no UTF-8")):
        with pytest.raises(SystemExit) as e:
            run(model, tmp_path / "out", *args)
        assert e.value.code == 2 and words in capsys.readouterr().err


def test_stage_2_agrees_with_stage_1_if_asked_to(model, tmp_path):
    for out, more in (("low", ["--stop-at-low"]), ("plain", []), ("no", ["--no-agree"]), ("agreeing", ["--agree"])):
        run(model, tmp_path / out, *more)
    low, plain, no, agreeing = (volume(tmp_path / out / "sample").astype(int) for out in ("low", "plain", "no", "agreeing"))
    def apart(ct):                                                       # in tissue, HU
        ct = ct[::-1][::4, ::4, ::4]                                     # x runs the other way in files
        return np.abs(ct - low[::-1])[ct > -200].mean()
    assert np.array_equal(plain, no) and apart(agreeing) < apart(no) - 40


def test_blurred_borders_between_lobes_are_not_other_lobes():
    label = torch.zeros(40, 40, 40)
    label[5:35, 5:35, 5:20], label[5:35, 5:35, 20:35] = 3, 5             # RUL beside RLL: 4, RML, between them in number
    sharp = torch.from_numpy(sample.encode("lobe", label))
    kernel = torch.ones(1, 1, 5, 5, 5) / 125
    blurred = torch.nn.functional.conv3d(torch.nn.functional.pad(sharp[None, None], (2,) * 6, mode="replicate"), kernel)[0, 0]
    elsewhere = lambda x: (np.isin(sample.decode("lobe", x), (1, 2, 4))).mean()
    tidied = sample.tidy_lobes(blurred)
    assert elsewhere(blurred) > 0.15 and elsewhere(tidied) == 0
    within = (slice(7, 33), slice(7, 33), slice(None))                   # away from the edges: both lobes and their border, and lobe 5 to where it ends
    assert torch.equal(tidied[within][..., 8:], sharp[within][..., 8:])
    sharp[5:35, 5:35, 20:22] = -1                                        # what is sharp stays, a thin gap between two lobes too
    sharp[10:13, 10:13, 5:20] = -1                                       # and a tube, and a lobe three voxels thick
    sharp[5:8, 5:35, 5:20] = 0.6
    assert torch.equal(sample.tidy_lobes(sharp), sharp)
    assert torch.equal(sample.tidy_lobes(sharp + 0.15, tolerance=0.2), sharp) and torch.equal(sample.tidy_lobes(sharp + 0.15), sharp + 0.15)
    noise = torch.rand(30, 30, 30) * 2 - 1                               # no lobe fills a cube anywhere
    assert torch.equal(sample.tidy_lobes(noise), noise)


def test_lobes_are_tidied_unless_they_are_given_or_it_is_declined(model, airway, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "tidy_lobes", lambda x, tolerance=0, reach=0: torch.full_like(x, -0.2))
    for out, tidied, more in (("plain", True, []), ("no", False, ["--no-tidy"]), ("low", False, ["--stop-at-low"]), ("airway", True, ["--airway", airway])):
        run(model, tmp_path / out, *more)
        assert (volume(tmp_path / out / "sample", "lobe") == 2).all() == tidied
    given = tmp_path / "no/sample/lobe.nii.gz"
    run(model, tmp_path / "given", "--lobe", given)
    assert np.array_equal(volume(tmp_path / "given/sample", "lobe"), volume(tmp_path / "no/sample", "lobe"))


def test_a_ct_s_lobes_are_tidied_at_low_resolution_where_lobes_are_wide_enough(monkeypatch):
    monkeypatch.setattr(sample, "tidy_lobes", lambda x, tolerance, reach: torch.full_like(x, -0.2))
    monkeypatch.setattr(sample, "ddim_sample", lambda net, noise, *a, **k: torch.zeros_like(noise))
    for grid, fixed, tidy, tidied in ((64, [0], True, True), (64, [0], False, False), (64, [], True, False), (64, [2], True, False), (64, [0, 1], True, False), (32, [0], True, False)):
        args = SimpleNamespace(device="cpu", amp=False, one_stage=False, solver="ddim", low_steps=1, guidance=1.0, guidance_interval=(0, 1), tidy=tidy, clean={"low": False})
        x = sample.generate(torch.nn.Identity(), None, 0, grid, args, fixed=fixed)
        assert (x[1] == -0.2).all() == tidied and (x[[0, 2, 3]] == 0).all()


def test_demo_weights_agree_unasked_and_no_others():
    own = lambda preset: dict(step=1, provenance=dict(config=dict(preset=preset)))
    said = lambda agree, about: sample.agrees(SimpleNamespace(agree=agree), about)
    assert said(None, own("demo")) and said(None, own("demo-256")) and said(True, own("paper")) and not said(False, own("demo"))
    assert not said(None, own("paper")) and not said(None, own("")) and not said(None, dict(kind="sr", grid=256, provenance="released weights, CC-BY-NC"))


def test_what_is_fixed_is_shown_clean_to_networks_trained_so(model, airway, tmp_path):
    own = lambda config: dict(step=1, provenance=dict(config=config))
    assert sample.trained_given(own(dict(given=0.4))) and not sample.trained_given(own(dict(given=0.0))) and not sample.trained_given(own({}))
    assert not sample.trained_given(dict(kind="sr", grid=256, provenance="released weights, CC-BY-NC"))

    twin = tmp_path / "twin"                                             # the same weights, said to be trained so
    twin.mkdir()
    for kind, grid in (("low", 8), ("sr", 32)):
        cfg = Config(given=0.4)
        cfg.kind = kind
        export(twin / f"{kind}.safetensors", cfg, sample.load_stages(model)[kind][0], grid, 1, 1)
    for name, folder in (("noisy", model), ("clean", twin)):
        run(folder, tmp_path / name, "--airway", airway, "--no-amp")
        run(folder, tmp_path / name / "free", "--no-amp")
    noisy, clean = (json.loads((tmp_path / name / "sample/sample.json").read_text())["arguments"]["clean"] for name in ("noisy", "clean"))
    assert noisy == dict(low=False, sr=False) and clean == dict(low=True, sr=True)
    assert not np.array_equal(volume(tmp_path / "noisy/sample"), volume(tmp_path / "clean/sample"))
    assert np.array_equal(volume(tmp_path / "noisy/free/sample"), volume(tmp_path / "clean/free/sample"))


def test_slabs_change_memory_and_not_the_sample(model, tmp_path):
    """--slab drops stage 1's weights before stage 2 works; a second sample needs them again."""
    for out, more in (("whole", []), ("slabs", ["--slab", 5]), ("dpm", ["--solver", "dpm"]), ("middle", ["--guidance-interval", 0.6, 0.9])):
        sample.main([*QUICK, "--low-steps", "4", "--no-amp", "--samples", "2", "--prompt", "Number 3.", "--model", str(model), "--out", str(tmp_path / out), *map(str, more)])
    for name in ("prompt_00", "prompt_01"):
        whole, slabs, dpm, middle = (volume(tmp_path / out / name).astype(int) for out in ("whole", "slabs", "dpm", "middle"))
        assert np.abs(whole - slabs).max() <= 1 and np.abs(whole - dpm).max() > 1 and np.abs(whole - middle).max() > 1


def test_released_checkpoint_folders_are_taken(tmp_path):
    for name in ("low", "sr"):
        folder = tmp_path / f"{name}_ckpt"
        folder.mkdir()
        state = {f"denoise_fn.{k}": v.contiguous().clone() for k, v in golden.weights(name).items()}
        if name == "sr":
            save_file(state, folder / "model_1.safetensors")
        else:
            torch.save({**state, "betas": torch.zeros(1000)}, folder / "pytorch_model_1.bin")
    stages = sample.load_stages(tmp_path)
    z = golden.load("low")
    with torch.no_grad():
        assert (stages["low"][0].eval()(z["x"], z["t"] / 1000, z["cond"])[golden.EVERY] - z["out_eval"]).abs().max() < 1e-4
    assert stages["sr"][1]["grid"] == 256 and stages["low"][1]["grid"] == 64


class Evil:
    def __reduce__(self):
        return (open, ("evil_ran", "w"))


def test_wrong_input_is_one_line_and_nothing_is_written(model, airway, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "there/sample").mkdir(parents=True)
    (tmp_path / "more/sample").mkdir(parents=True)
    (tmp_path / "more/sample/sample.json").touch(), (tmp_path / "more/sample/heart.nii.gz").touch()      # somebody's segmentation of a sample
    for name, content in (("pointer", b"version https://git-lfs.github.com/spec/v1\noid"), ("evil", None), ("swapped", (model / "sr.safetensors").read_bytes()),
                          ("unlike", (model / "low.safetensors").read_bytes()), ("torn", None)):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "low.safetensors").write_bytes(content)
    net = UNet3D(8, in_channels=8, heads=1, rounds=1, levels=2, context_dim=0)
    cfg = Config()
    cfg.kind = "sr"
    export(tmp_path / "unlike/sr.safetensors", cfg, net, 64, 1, 1)       # stage 1 makes 8^3
    about = dict(kind="low", args={**net.args, "dim": 16}, grid=8, provenance={})
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "torn/low.safetensors", metadata={"medsyn": json.dumps(about)})
    for name, state in (("numbered", {0: torch.zeros(1)}), ("listed", [torch.zeros(1)])):
        (tmp_path / name / "x_ckpt").mkdir(parents=True)
        torch.save(state, tmp_path / name / "x_ckpt/pytorch_model_1.bin")
    (tmp_path / "evil/x_ckpt").mkdir()
    torch.save({"denoise_fn.x": Evil()}, tmp_path / "evil/x_ckpt/pytorch_model_1.bin")
    (tmp_path / "locked").write_text("a file, not a folder")
    cases = [(["--guidance", "nan"], "--guidance nan"), (["--low-steps", "0"], "--low-steps 0"), (["--seed", "-1"], "--seed"), (["--guidance-interval", "0.8", "0.2"], "FROM <= TO"), (["--slab", "-2"], "--slab"), (["--samples", "0"], "--samples"),
             (["--report", tmp_path / "empty.txt"], "no words"), (["--report", tmp_path / "binary.txt"], "UTF-8"), (["--report", tmp_path / "none.txt"], "none.txt"),
             (["--prompt", "a", "--report", tmp_path / "empty.txt"], "one text"), (["--airway", tmp_path / "none.nii"], "no such file"), (["--out", tmp_path / "there"], "--overwrite"), (["--out", tmp_path / "there", "--overwrite"], "is no sample"),
             (["--out", tmp_path / "more", "--overwrite"], "heart.nii.gz besides"),
             (["--center", "nan", 0, 0], "three finite numbers"), (["--report", ""], "no name of a file"), (["--device", "cpu:x"], "--device cpu:x"),
             (["--model", tmp_path / "unlike"], "stage 1 makes 8^3, stage 2 64^3"), (["--model", tmp_path / "torn"], "do not fit"), (["--model", tmp_path / "listed"], "refused"), (["--model", tmp_path / "numbered"], "refused"),
             (["--ct", airway, "--airway", airway], "leave the masks out"), (["--ct", airway], "Hounsfield"), (["--model", tmp_path / "none"], "no such folder"),
             (["--model", tmp_path / "pointer"], "not readable safetensors"), (["--model", tmp_path / "swapped"], "kind sr"), (["--model", tmp_path / "evil"], "refused"),
             (["--prompt", "x", "--text", tmp_path / "none"], "text model"), (["--out", tmp_path / "locked"], "locked"), (["--airway", airway, "--center", 900, 0, 0], "field of view")]
    before = sorted(tmp_path.rglob("*"))
    for args, words in cases:
        with pytest.raises(SystemExit) as e:
            run(model, tmp_path / "out", *args)
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 1, (args, err)
    assert not (tmp_path / "evil_ran").exists()
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.name not in ("out",)] == []


def test_a_sample_that_is_not_finite_is_not_written(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "ddim_sample", lambda net, noise, *a, **k: noise * float("nan"))
    with pytest.raises(SystemExit) as e:
        run(model, tmp_path / "out")
    assert e.value.code == 1 and "not finite" in capsys.readouterr().err and list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("folder, low, full", [("demo", 32, 128), ("demo-256", 64, 256)])
def test_the_shipped_weights_are_whole_and_know_their_text(folder, low, full):
    folder = Path(sample.__file__).parent / "checkpoints" / folder
    stages = sample.load_stages(folder)
    assert {kind: about["grid"] for kind, (_, about) in stages.items()} == {"low": low, "sr": full}
    net = stages["low"][0]
    states = text_encoder.load(folder / "text", tokens=net.args["tokens"]).encode(["Findings: A small nodule.\nImpression: Nodule."])[0]
    with torch.no_grad():
        assert torch.isfinite(net(torch.randn(1, 4, 16, 16, 16), torch.tensor([0.5]), states)).all()
    assert all(path.stat().st_size < 16 << 20 for path in folder.rglob("*")) and sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12 << 20
