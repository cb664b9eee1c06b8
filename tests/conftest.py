"""Tests run offline, on the CPU, from the repository root, and import the code under test."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "2"                # before torch, as in the processes that tests start: torch.set_num_threads gives other bits
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A folder of 5 phantom cases at 32^3 with made-up text embeddings (192,16)."""
    import phantom
    folder = tmp_path_factory.mktemp("phantoms") / "train"
    phantom.main(["--out", str(folder), "--n", "5", "--grid", "32", "--workers", "1"])
    for i, case in enumerate(sorted(folder.iterdir())):
        np.save(case / "text.npy", np.random.default_rng(i).normal(size=(192, 16)).astype(np.float16))
    return folder
