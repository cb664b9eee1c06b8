"""The folders that sample.py writes: their names, and what may be replaced."""
import os
from pathlib import Path


def names_of(texts, samples, seed):
    """Every sample has a folder and a seed of its own, counted up over texts and samples.   texts: list of (name, text)
    -> list of (name, text, seed)"""
    last = seed + len(texts) * samples - 1
    if not 0 <= seed <= last < 2**32:
        raise ValueError(f"--seed {seed}: seeds {seed} to {last}; a generator keeps those from 0 to {2**32 - 1}; "
                         "choose another")
    names = [(f"{name}_{i:02d}" if samples > 1 else name, text, seed + j * samples + i)
             for j, (name, text) in enumerate(texts) for i in range(samples)]
    if len({name for name, _, _ in names}) < len(names):
        raise ValueError(f"reports of one name: {sorted(n for n, _ in texts)}; every sample needs its own folder; "
                         "rename the files")
    long = [name for name, _, _ in names if len(name.encode()) > 240]
    if long:
        raise ValueError(f"{long[0]}: a name of {len(long[0].encode())} bytes; 240 are possible for a folder; "
                         "rename the report")
    return names


def check_free(out, names, written, overwrite):
    """ValueError unless the folders can be written; now, not after minutes of sampling.   written: files of a sample"""
    there = [out / name for name, _, _ in names if os.path.lexists(out / name)]
    if there and not overwrite:
        raise ValueError(f"{', '.join(map(str, there))}: exists; samples are not replaced silently; "
                         "pass --overwrite or another --out")
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
