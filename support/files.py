"""Files and folders that appear whole or not at all, and whose hashes are written beside them; safetensors with what
they say about themselves."""
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch


def write_atomic(path, data):
    """Bytes, or what a function writes to a file, to a file that appears whole or not at all: written beside, forced to
    disk, renamed."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            if callable(data):
                data(f)
            else:
                f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder, overwrite=False):
    """A folder beside `folder` to write into; at the end of the block it becomes `folder`, after an error it is gone.
    overwrite: a folder that is there is kept until then; else it is an error by the system's own rename."""
    folder = Path(folder)
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)                              # left by a killed run
    part.mkdir(parents=True)
    try:
        yield part
        if overwrite and folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
        if overwrite:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_json(path):
    """A file's dict; {} if there is no file. ValueError if it holds something else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("sha256", {}), dict):
            return found
    except (OSError, ValueError, RecursionError):
        pass
    raise ValueError(f"{path}: not the JSON that was written; what it says of the case is needed; "
                     "prepare or embed the case again")


def sha256(path):
    """Of a file's bytes.   -> hex"""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hashes(folder):
    """-> {name: sha256} of a folder's arrays"""
    return {p.name: sha256(p) for p in sorted(folder.glob("*.npy"))}


def digest(state, names=True):
    """Of tensors, by name, or whatever their names.   -> hex"""
    parts = {name: hashlib.sha256(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
             for name, x in state.items()}
    return hashlib.sha256(str(sorted(parts.items() if names else parts.values())).encode()).hexdigest()


def seal(state, about):
    """The hash in a file of weights, of its tensors and of what it says of itself.   -> hex"""
    said = {k: v for k, v in about.items() if k != "sha256"}
    return hashlib.sha256((digest(state) + json.dumps(said, sort_keys=True)).encode()).hexdigest()


def read_safetensors(path):
    """Weights, ours or others'.   -> state dict, what `weights.export` says about them (kind, args, grid, step,
    provenance, sha256; {} for others'). ValueError if they are not what was written."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as f:
            state = {k: f.get_tensor(k) for k in f.keys()}
            about = json.loads((f.metadata() or {}).get("medsyn", "{}"))
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path}: not readable safetensors ({e}); an LFS pointer or a broken download looks so; "
                         "check the path or fetch it again") from None
    kinds = dict(args=dict, grid=int, provenance=dict)
    whole = isinstance(about, dict) and all(isinstance(about.get(name), kind) for name, kind in kinds.items())
    if about != {} and not whole:
        raise ValueError(f"{path}: describes itself as no network of this project; "
                         "weights that a trainer wrote are needed; name another file")
    if "sha256" in about and seal(state, about) != about["sha256"]:
        raise ValueError(f"{path}: not as written (the hash differs); a disk or a download damaged it; "
                         "fetch it again")
    return state, about
