"""The folders that sample.py writes: their names, and what may be replaced."""
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support.checks import MASKS
from support.nifti import NAME


def each_ct(asked, texts):
    """The CTs of --ct, files, folders of them or of cases, each with every text.   asked: list of paths
    texts: list of (name, text, seed)   -> the same for each CT, list of the CT of each or None"""
    files = []
    if "" in asked:
        raise ValueError("--ct '': no name of a file; a CT is a NIfTI; check the variable that should hold it")
    for path in map(Path, asked):
        there = sorted(path.glob("[!.]*")) if path.is_dir() else []
        found = [path] if not path.is_dir() else [p for p in there if (m := NAME.match(p.name)) and
                                                  not m[1].endswith(tuple("_" + c for c in MASKS))]
        found = found or [p for p in sorted(path.glob("[!.]*/ct.nii*")) if p.suffix in (".gz", ".nii")]
        if not found:
            raise ValueError(f"--ct {path}: no *.nii.gz, no */ct.nii.gz in it; a CT is needed; check the path")
        files += found
    if not files:
        return texts, [None] * len(texts)
    names = [m[1] if (m := NAME.match(f.name)) else f.name for f in files]
    names = [f.parent.name if name == "ct" and len(files) > 1 else name for name, f in zip(names, files)]
    each = [((ct if not name else name if len(files) == 1 else f"{ct}_{name}", *text), f)
            for ct, f in zip(names, files) for name, *text in texts]
    return [text for text, _ in each], [f for _, f in each]


def names_of(texts, samples, seed):
    """Every sample has a folder and a seed of its own, counted up over texts and samples; a text's own seed is that of
    its first sample.   texts: list of (name, text, seed or None)   -> list of (name, text, seed)"""
    if samples < 1:
        raise ValueError(f"--samples {samples}; at least 1 is needed; change it")
    firsts = [seed + j * samples if own is None else own for j, (*_, own) in enumerate(texts)]
    least, last = min(firsts), max(firsts) + samples - 1
    if not 0 <= least <= last < 2**32:
        raise ValueError(f"--seed {seed}: seeds {least} to {last}; a generator keeps those from 0 to {2**32 - 1}; "
                         "choose another")
    names = [(f"{name}_{i:02d}" if samples > 1 else name, text, first + i)
             for first, (name, text, _) in zip(firsts, texts) for i in range(samples)]
    if len({name for name, _, _ in names}) < len(names):
        twice = sorted({name for name, _, _ in names if [n for n, _, _ in names].count(name) > 1})
        raise ValueError(f"reports, rows or CTs of one name: {', '.join(twice[:5])}; every sample needs its own "
                         "folder; rename them")
    long = [name for name, _, _ in names if len(name.encode()) > 240]
    if long:
        raise ValueError(f"{long[0]}: a name of {len(long[0].encode())} bytes; 240 are possible for a folder; "
                         "rename the report")
    return names


def readable(names):
    """Samples whose report was read; ValueError if there are none.   -> list as of `names_of`, errors of the others"""
    bad = [text for _, text, _ in names if isinstance(text, ValueError)]
    if len(bad) == len(names):
        raise bad[0]
    return [n for n in names if not isinstance(n[1], ValueError)], bad


def check_given(args, paths):
    """ValueError for files that cannot be meant together.   paths: {mask: file}"""
    if args.ct and paths:
        raise ValueError(f"--ct with {', '.join('--' + c for c in paths)}; a given CT is segmented; leave them out")
    if args.grid and not (args.ct or paths):
        raise ValueError(f"--grid {args.grid}: of which file? a mask or CT is needed; give one")


def missing(out, names, ct_of):
    """Those samples that are not there yet. ValueError if one that is there was made from something else.
    ct_of: {name: its CT or None}"""
    left = []
    for name, text, seed in names:
        record = out / name / "sample.json"
        if not os.path.lexists(out / name):
            left.append((name, text, seed))
            continue
        made = json.loads(record.read_text()) if record.is_file() else {}
        if (made.get("text"), made.get("seed"), made.get("ct")) != (text, seed, ct_of[name] and str(ct_of[name])):
            raise ValueError(f"{out / name}: was not made from this text with seed {seed}, or not of this CT; --resume "
                             "adds to samples of the same command; choose another --out")
    return left


def check_free(out, names, written, overwrite):
    """ValueError unless the folders can be written; now, not after minutes of sampling.   written: files of a sample"""
    there = [out / name for name, _, _ in names if os.path.lexists(out / name)]
    if there and not overwrite:
        raise ValueError(f"{', '.join(map(str, there))}: exists; samples are not replaced silently; "
                         "pass --resume for those that are missing, --overwrite, or another --out")
    for folder in there:
        if folder.is_symlink() or not (folder / "sample.json").is_file():
            raise ValueError(f"{folder}: exists and is no sample; --overwrite replaces samples only; "
                             "choose another --out")
        more = sorted({f.name for f in folder.iterdir()} - set(written))
        if more:
            raise ValueError(f"{folder}: holds {', '.join(more[:3])} besides the sample; --overwrite would remove that "
                             "too; move it away or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    probe = Path(out) / ".writable"
    probe.touch()
    probe.unlink(missing_ok=True)


def batches(samples, size, device, make):
    """Samples made several at a time. "auto": one on a CPU, which gains nothing by more; on a GPU eight, or the
    half of it, and so on, that fits.   samples: list   size: "auto" or a number
    make(some of samples) -> (B,C,D,H,W)   -> yields (sample, its (C,D,H,W), seconds that it took)"""
    auto = size == "auto"
    size, done = (1 if device == "cpu" else 8) if auto else int(size), 0
    with tqdm(total=len(samples), desc="samples", disable=len(samples) < 2, leave=False) as bar:
        while done < len(samples):
            batch, began = samples[done:done + size], time.time()
            try:
                made = make(batch)
            except torch.OutOfMemoryError:
                if not auto or len(batch) == 1:
                    raise
                made = None                              # not here: the error holds tensors of the attempt
            if made is None:
                size = 1 << (len(batch) - 1).bit_length() - 1
                torch.cuda.empty_cache()
                continue
            seconds = (time.time() - began) / len(batch)
            for sample, x in zip(batch, made):
                yield sample, x, seconds
                bar.update()
            done += len(batch)
