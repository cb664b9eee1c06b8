"""Tests run offline, on the CPU, from the repository root, and import the code under test."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# before torch, as in the processes that tests start: torch.set_num_threads gives other bits
os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

import nibabel
import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A folder of 5 phantom cases at 32^3 with made-up text embeddings (192,16)."""
    import phantom
    folder = tmp_path_factory.mktemp("phantoms") / "train"
    phantom.main(["--out", str(folder), "--n", "5", "--grid", "32", "--workers", "1"])
    for i, case in enumerate(sorted(folder.iterdir())):
        np.save(case / "text.npy", np.random.default_rng(i).normal(size=(192, 16)).astype(np.float16))
    return folder


@pytest.fixture(autouse=True)
def without_split(request):
    """Who is held out by one test is not by the next."""
    yield
    if "phantoms" in request.fixturenames:
        (request.getfixturevalue("phantoms") / "split.json").unlink(missing_ok=True)


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with an error.   -> its exit code, what it wrote to stderr"""
    def run(main, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            main([str(a) for a in args])
        return e.value.code, capsys.readouterr().err
    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A runs/ folder with random weights: low/ 8^3, sr/ 32^3, a tiny text encoder beside."""
    import text_encoder
    import train_low
    import train_sr
    from support.weights import describe, export
    from unet3d import UNet3D
    folder = tmp_path_factory.mktemp("model")
    reports = folder / "reports"
    reports.mkdir()
    for i in range(12):
        (reports / f"{i}.txt").write_text(f"Findings: There is {i} and nothing else.\nImpression: Number {i}.")
    text_encoder.main(["train", "--scratch", "--width", "16", "--layers", "1", "--heads", "2", "--steps", "2",
                       "--batch", "4", "--held-out", "0.2", "--tokens", "32", "--reports", str(reports),
                       "--out", str(folder / "text"), "--device", "cpu"])

    torch.manual_seed(0)
    low = UNet3D(8, heads=1, levels=2, context_dim=16, tokens=32)
    sr = UNet3D(8, in_channels=8, heads=1, rounds=1, levels=2, context_dim=0)
    for cfg, net, grid in ((train_low.Config(), low, 8), (train_sr.Config(), sr, 32)):
        (folder / cfg.kind).mkdir()
        export(folder / cfg.kind / f"{cfg.kind}.safetensors", cfg, net, grid, 1,
               describe([]) | dict(source=["phantom"]))
    return folder


@pytest.fixture(scope="session")
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
