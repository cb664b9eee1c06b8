"""The house: imports point one way, the method's files stay short, and without beyond/ what is left is the paper."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import golden

ROOT = Path(__file__).parent.parent
BUDGETS = {"text_encoder": 340, "diffusion": 120, "unet3d": 260, "train_low": 300, "train_sr": 95, "sample": 260,
           "data": 260}
# What each file of the method may import of the project, besides support/.
METHOD = {"diffusion": set(), "unet3d": set(), "data": set(), "text_encoder": {"data"},
          "train_low": {"data", "diffusion", "unet3d"}, "train_sr": {"train_low", "data", "diffusion", "unet3d"},
          "sample": {"data", "diffusion", "unet3d", "text_encoder", "view"}}
OURS = {*METHOD, "support", "beyond", "phantom", "prepare", "evaluate", "lesson", "view", "page"}


def imports(path):
    """Names of the project's files and folders that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & OURS


@pytest.mark.parametrize("name", METHOD)
def test_a_file_of_the_method_imports_what_lies_below_it(name):
    assert imports(ROOT / f"{name}.py") - {"support"} <= METHOD[name]


@pytest.mark.parametrize("path", sorted((ROOT / "support").glob("*.py")), ids=lambda p: p.name)
def test_support_imports_nothing_of_the_method(path):
    assert imports(path) <= {"support"}


@pytest.mark.slow
def test_the_one_door_into_beyond_is_lazy():
    """support.weights.beyond, through which sample.py goes too."""
    files = [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")]
    assert [p.name for p in files if "import_module" in p.read_text()] == ["weights.py"]
    code = ("import sys, sample, train_low, train_sr, support.weights; "
            "print([m for m in sys.modules if m.split('.')[0] == 'beyond'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name, lines", BUDGETS.items())
def test_a_file_of_the_method_stays_within_its_budget(name, lines):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= lines


def test_no_line_is_longer_than_120_characters():
    files = [p for end in ("*.py", "*.sh") for p in ROOT.rglob(end) if not {".venv", ".git"} & set(p.parts)]
    long = [f"{p}:{i}" for p in files for i, line in enumerate(p.read_text().splitlines(), 1) if len(line) > 120]
    assert len(files) > 30 and not long


def test_the_method_says_no_word_of_what_is_beyond():
    """But for sample.py's door."""
    for name in METHOD.keys() - {"sample"}:
        text = (ROOT / f"{name}.py").read_text()
        assert not re.search(r"beyond|pooled|patch|window_loss|bullae|misplace", text), name


def run(cwd, *args):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_without_beyond_both_stages_train_and_sample_and_released_weights_load(phantoms, tmp_path):
    house = tmp_path / "house"
    shutil.copytree(ROOT, house, ignore=shutil.ignore_patterns(".git", "beyond", "benchmarks", "data", "runs", "out"))
    tiny = ["--preset", "demo", "--device", "cpu", "--dim", 8, "--levels", 2, "--heads", 1, "--batch", 2, "--micro", 2,
            "--workers", 0, "--holdout", 1, "--steps", 2, "--data", phantoms, "--no-amp"]
    steps = ["--device", "cpu", "--low-steps", 1, "--sr-steps", 1]
    mains = dict(train_low=[*tiny, "--out", "runs/low"], train_sr=[*tiny, "--out", "runs/sr", "--crop", "16,16,16"],
                 sample=["--model", "runs", "--plain", *steps])
    code = "; ".join(f"import {name}; {name}.main({[*map(str, args)]})" for name, args in mains.items())
    done = run(house, "-c", code)
    assert done.returncode == 0 and done.stdout.count("done at step 2") == 2, done.stderr
    assert "32^3 voxels" in done.stdout
    done = run(house, "sample.py", "--model", "checkpoints/demo", "--stop-at-low", *steps, "--out", "out/demo")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "beyond" in done.stderr

    for name in ("low", "sr"):                           # released weights have nothing of it
        folder = house / "released" / f"{name}_ckpt"
        folder.mkdir(parents=True)
        torch.save({f"denoise_fn.{k}": v.clone() for k, v in golden.weights(name).items()},
                   folder / "pytorch_model_1.bin")
    done = run(house, "sample.py", "--model", "released", "--plain", "--stop-at-low", *steps, "--out", "out/released")
    assert done.returncode == 0 and "64^3 voxels" in done.stdout, done.stderr
    code = ("import sys; sys.path.insert(0, 'tests'); import golden, torch; z = golden.load('sr'); "
            "y = golden.network('sr')(z['x'], z['t'] / 1000).detach()[golden.EVERY]; "
            "print((y - z['out_eval']).abs().max().item())")
    done = run(house, "-c", code)
    assert done.returncode == 0 and np.float64(done.stdout) < 1e-4, done.stderr
