"""Files of every kind, damaged and read as the programs read them: a part of soak.py, which says what is right.

    python benchmarks/damage.py npy 17 18 0 FOLDER       # mutations from number 17 to before 18 of seed 0; a line each

A process of its own reads them, so that one which a file ends is counted, and its memory is measured.
"""
import contextlib
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch

import phantom
import train_low
from data import CHANNELS, cases, downsample, grid_affine
from support import runs
from support.bert import write_text
from support.checks import TYPES, faults, load_channel
from support.cli import Parser, exits, sentence
from support.files import write_atomic
from support.nifti import save_nifti
from support.reports import load_reports
from support.weights import read_own
from unet3d import UNet3D

TINY = ["--preset", "demo", "--device", "cpu", "--dim", "8", "--levels", "2", "--heads", "1", "--batch", "6",
        "--micro", "1", "--workers", "0", "--holdout", "0", "--log-every", "1", "--ema-start", "3", "--no-amp"]
KINDS = {"nii": [f"{c}.nii" for c in CHANNELS], "nii.gz": [f"{c}.nii.gz" for c in CHANNELS],
         "npy": [f"{name}.npy" for name in TYPES], "safetensors": ["low.safetensors"], "last.pt": ["last.pt"],
         "jsonl": ["reports.jsonl"], "case.json": ["case.json"]}
HEADER = {"nii": 352, "nii.gz": 32, "npy": 128, "safetensors": 2048, "last.pt": 512}     # bytes; text has none
RUN = ("config", "cases", "grid", "args", "encoder")      # what a checkpoint says of its run
MUTATIONS = ("bits", "header", "cut", "end")
MEMORY = 100 << 20                # bytes that a damaged file may take beyond the intact ones,
ADDRESSES = 1 << 30               # and ask the system for, used or not
SECONDS = 60                      # that it may take



def phantoms(folder, n):
    """Small cases, the states of their text made up."""
    phantom.main(["--out", str(folder), "--n", str(n), "--grid", "32", "--workers", "1"])
    for i, case in enumerate(cases(folder)):
        states = np.random.default_rng(i).normal(size=(192, 16)).astype(np.float16)
        write_text(case, states, (case / "report.txt").read_text().strip(), "made up")


def make(folder):
    """Two folders, 0 and 1, with one intact file of each name in KINDS."""
    phantoms(folder / "train", 2)
    for i, case in enumerate(cases(folder / "train")):
        own = shutil.copytree(case, folder / str(i))
        for c in CHANNELS:
            save_nifti(own / f"{c}.nii.gz", np.load(own / f"{c}.npy"), grid_affine(32))
            subprocess.run(["gzip", "-dk", own / f"{c}.nii.gz"], check=True)
        phantom.main(["--reports", str(own / "reports.jsonl"), "--n", "20", "--seed", str(20 * i)])
        out = folder / f"run{i}"
        train_low.main([*TINY, "--data", str(folder / "train"), "--out", str(out), "--steps", "1", "--seed", str(i)])
        for name in ("last.pt", "low.safetensors"):
            shutil.move(out / name, own / name)
        state = runs.read_checkpoint(own / "last.pt")
        write_atomic(own / "run.json", json.dumps({k: v for k, v in state.items() if k in RUN}).encode())


def mutate(raw, other, header, rng, how):
    """A file's bytes, damaged.   other: of another file of its kind"""
    new = bytearray(raw)
    if how == "bits":
        span = min(header, len(raw)) if rng.random() < 0.5 else len(raw)         # most headers are small
        for bit in rng.integers(8 * span, size=rng.integers(1, 9)).tolist():
            new[bit // 8] ^= 1 << bit % 8
    elif how == "header":
        for at in rng.integers(min(header, len(raw)), size=rng.integers(1, 17)).tolist():
            new[at] = rng.integers(256)
    else:
        end = int(rng.integers(1, len(raw)))
        new[-end:] = other[-end:] if how == "end" else b""
    return bytes(new)


def read(kind, path):
    """A file as the programs read it.   -> dict. ValueError if they refuse it"""
    folder = path.parent
    if kind in ("nii", "nii.gz"):
        array, affine = load_channel(path.name.split(".")[0], path)
        return dict(array=array, affine=affine)
    if kind == "jsonl":
        return dict(reports=load_reports([path]))
    if kind == "safetensors":
        net, about = read_own(path, "low", UNet3D)
        return net.state_dict() | about
    if kind == "last.pt":
        run = json.loads((folder / "run.json").read_text())
        return runs.newest_checkpoint(train_low.Config(**run.pop("config") | dict(out=str(folder))), run)
    if found := faults(folder, downsample):
        raise ValueError("; ".join(found))
    meta = None
    with contextlib.suppress(ValueError):
        meta = json.loads((folder / "case.json").read_bytes())
    return {name: np.load(folder / f"{name}.npy") for name in TYPES} | dict(meta=meta)


def same(a, b):
    """Whether two of what `read` gives are equal, to the bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def cannot_be_seen(kind, before, after):
    """Whether there is no check sum that could tell."""
    if kind == "nii":
        return after["array"].shape == before["array"].shape
    return kind == "jsonl" or kind == "case.json" and isinstance(after["meta"], dict)


def outcome(kind, path, before):
    """-> what came of reading a damaged file, and why"""
    hidden = io.StringIO()                               # warnings
    try:
        with contextlib.redirect_stderr(hidden), contextlib.redirect_stdout(hidden):
            after = read(kind, path)
    except ValueError as e:
        line = sentence(e)
        refused = line and "\n" not in line and not isinstance(e, UnicodeError)
        return "refused" if refused else "wrong", line
    except Exception as e:
        return "wrong", f"{type(e).__name__}: {' '.join(str(e).split())}"
    differing = sorted(k for k in before.keys() | after.keys() if not same(before.get(k), after.get(k)))
    if not differing:
        return "unchanged", ""
    seen = "unseen" if cannot_be_seen(kind, before, after) else "wrong"
    return seen, f"read with another {', '.join(differing)}"


def damaged(kind, numbers, seed, folder):
    """Mutations of one kind, by their numbers, read one after the other.   folder: `make`'s, copied, as each file is
    damaged in its place   -> an iterator of dict(k, file, how, outcome, why)"""
    intact = {}
    for k in numbers:
        rng = np.random.default_rng((seed, k))
        name, i, how = str(rng.choice(KINDS[kind])), int(rng.integers(2)), MUTATIONS[k % 4]
        path, other = folder / str(i) / name, folder / str(1 - i) / name
        raw = path.read_bytes()
        if path not in intact:
            intact[path] = read(kind, path)
        path.write_bytes(mutate(raw, other.read_bytes(), HEADER.get(kind, len(raw)), rng, how))
        came, why = outcome(kind, path, intact[path])
        path.write_bytes(raw)
        yield dict(k=k, file=f"{i}/{name}", how=how, outcome=came, why=why)


# --- a process that does so ---

def highest():
    """Of this process's memory, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def child(kind, numbers, seed, folder):
    """Says each outcome in a line. Ends early when a file took much memory: the highest mark does not go down again."""
    with tempfile.TemporaryDirectory(prefix="soak_") as own:
        for i in "01":
            shutil.copytree(folder / i, Path(own, i))
            for name in KINDS[kind]:
                read(kind, Path(own, i, name))
        used, before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize(), highest()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES,) * 2)
        signal.alarm(SECONDS)                            # which ends the process
        for found in damaged(kind, numbers, seed, Path(own)):
            signal.alarm(SECONDS)
            more = highest() - before
            if more > MEMORY:
                found |= dict(outcome="wrong", why=f"took {more >> 20} MB more than the intact files")
            print(json.dumps(found), flush=True)
            if more > MEMORY:
                break


def in_children(command, first, n):
    """Outcomes of n mutations from number `first` on. A child that a signal ends is the outcome of the mutation that it
    was at, and another goes on after it.   command: number of the first -> that of a child"""
    found = []
    while len(found) < n:
        done = subprocess.run(command(first + len(found)), capture_output=True, text=True)
        found += [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode < 0 and len(found) < n:
            found.append(dict(k=first + len(found), outcome="wrong", why=f"ended by signal {-done.returncode}"))
        elif done.returncode > 0:
            raise RuntimeError(f"a child of damage.py: {done.stderr.strip().splitlines()[-1:]}")
    return found


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("kind", choices=KINDS)
    for name in ("first", "until", "seed"):
        p.add_argument(name, type=int)
    p.add_argument("folder", type=Path, help="as `make` made it")
    args = p.parse_args(argv)
    with exits():
        child(args.kind, range(args.first, args.until), args.seed, args.folder)


if __name__ == "__main__":
    main()
