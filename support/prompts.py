"""Pairs of prompts, and samples of a prompt that a command finds again."""
import json
import shlex
import shutil

from support.files import write_atomic
from support.reports import read_report


def read_pairs(path, measures):
    """Lines `measure | prompt | prompt`; # begins a comment.   measures: names
    -> list of (measure, prompt, prompt)"""
    pairs = []
    for line in read_report(path).splitlines():
        if line.startswith("#") or not line.strip():
            continue
        pair = [part.strip() for part in line.split("|")]
        if len(pair) != 3 or pair[0] not in measures:
            raise ValueError(f"{path}: {line!r}; a line is `measure | prompt | prompt`, measure one of "
                             f"{', '.join(measures)}; mend it")
        pairs.append(pair)
    return pairs


def sampled(text, out, args, make):
    """Samples of a prompt in the folder `out`, unless this very command left them there. Others' are not touched.
    make: `sample.main`"""
    asked = [f"--prompt={text}", "--samples", str(args.n), "--out", str(out)]
    asked += ["--model", args.model] if args.model else []
    asked += shlex.split(args.options)
    record = out / "asked.json"
    made = list(out.glob("[!.]*/ct.nii.gz"))
    ours = record.is_file() and (not made or json.loads(record.read_text()) == asked)
    if out.exists() and not ours:
        raise ValueError(f"{out}: exists, and was not asked for by this command, which may still run; samples are not "
                         f"replaced silently; choose another --out or remove {out}")
    if len(made) != args.n:                                # none yet, or this command was interrupted
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        write_atomic(record, json.dumps(asked).encode())
        make(asked)
