"""Who is held out: split.json in a folder of cases, one for the text encoder and both stages."""
import contextlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import torch

from support.files import write_atomic
from support.reports import patient


def read_split(path):
    """-> names of the patients held out"""
    try:
        names = json.loads(Path(path).read_text())["held_out"]
        if isinstance(names, list) and all(isinstance(n, str) for n in names):
            return names
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f'{path}: no split; {{"held_out": [names of patients]}} is needed; mend it, or remove it, and '
                     "one is written")


def write_split(folder, names, seed=None):
    """By one process of a run, whole or not at all; a folder that others may only read has none. Both trainers may
    begin at once, so each writes a file of its own first."""
    mine = Path(folder) / f"split.{os.getpid()}.json"
    if int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(PermissionError):
            write_atomic(mine, json.dumps(dict(held_out=sorted(names), seed=seed)).encode())
            mine.replace(mine.with_name("split.json"))


def held_out_patients(folder, folders, holdout, out):
    """Who is held out of the cases `folders` of a data folder: as its split.json says, which is written if there is
    none; a run in `out` that was begun otherwise keeps its own; with --holdout 0 nobody.   -> set of names"""
    if not holdout:
        return set()
    last = {patient(f) for f in folders[-holdout:]}
    record = Path(folder) / "split.json"
    if not record.is_file():
        if len(last) < len({patient(f) for f in folders}):               # else there is nothing to train on
            write_split(folder, last)
        return last
    named = set(read_split(record))
    own = cases_of_run(out)
    if own == [f.name for f in folders if patient(f) not in last]:
        return last
    return named


def cases_of_run(out):
    """The cases that a run was begun with, or None."""
    try:
        return torch.load(Path(out) / "last.pt", map_location="cpu", weights_only=True, mmap=True).get("cases")
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile):
        return None
