"""sampling.json, how weights want to be sampled: beside them, written by the trainers, read by sample.py."""
import json
import re
from pathlib import Path

import torch

from support.checks import FULL
from support.cli import fast_bfloat16
from support.fast import compile_blocks, place, quicker_in_bfloat16
from support.slabs import by_slabs
from support.weights import BEYOND, beyond

SAMPLING = dict(low_steps=int, sr_steps=int, guidance=(int, float), interval=list, solver=str, agree=bool, tidy=bool,
                shown=list)
OF_STAGE_2 = ("sr_steps", "agree", "tidy")


def settings(args, stages):
    """How to sample: the command line, else sampling.json beside the weights, else 50 and 20 steps of DDIM at guidance
    2; --plain: the paper's, whatever that file says.   -> dict"""
    s = dict(low_steps=50, sr_steps=20, guidance=1.0 if args.plain else 2.0)
    s |= {} if args.plain else how_to_sample(stages)
    s |= {k: getattr(args, k) for k in SAMPLING if getattr(args, k, None) is not None}
    check_sampling(s)
    s["students"] = check_students(args, stages, s)
    s["beyond"] = wanted(s)
    if s["beyond"] and not beyond("sampling"):
        raise ValueError(f"--model {args.model}: asks for {', '.join(s['beyond'])}; beyond/ has these and is not "
                         "there; pass --plain, or restore that folder")
    check_channels(args, s, stages["low"][1]["channels"])
    cuda = args.device.startswith("cuda")
    small = cuda and torch.cuda.get_device_properties(args.device).total_memory < 16e9
    return s | dict(device=args.device, slab=args.slab, one_stage=args.slab > 0 or small,
                    amp=number_format(args, list(stages.values())[-1][0]) if args.amp is None else args.amp,
                    compile=cuda if args.compile is None else args.compile)


def number_format(args, net):
    """Whether to sample in bfloat16: where the device multiplies in it, and on a CPU where that is also the quicker."""
    return fast_bfloat16(args.device) and (args.device != "cpu" or quicker_in_bfloat16(net.downs[0].volume))


def ready(net, s, blocks):
    """A network ready to sample: on its device, its weights as autocast would have them, compiled or slab by slab.
    s: `settings`   blocks: the class of its Blocks"""
    place(net, s["device"], s["amp"])
    if s["slab"]:
        by_slabs(net, s["slab"], blocks)
    elif s["compile"]:
        compile_blocks(net, blocks)


def how_to_sample(stages):
    """What sampling.json beside the weights of each stage says, merged. Where there is none, what the weights' metadata
    imply, which is said.   stages: as `load_stages` gives them   -> dict, some of SAMPLING"""
    merged = {}
    for kind, (_, about) in stages.items():
        path = Path(about["file"]).with_name("sampling.json")
        found = read_sampling(path) if path.is_file() else implied(kind, about)
        if found and not path.is_file():
            words = ", ".join(f"{k} {v}" for k, v in found.items())
            print(f"{path} is not there; {Path(about['file']).name} is sampled as its metadata say: {words}")
        shown = sorted({*merged.get("shown", []), *found.get("shown", [])})
        merged |= found | ({"shown": shown} if shown else {})
    return {k: v for k, v in merged.items() if "sr" in stages or k not in OF_STAGE_2}


def read_sampling(path):
    """What a sampling.json says, or ValueError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        right = isinstance(found, dict) and all(k in SAMPLING and isinstance(v, SAMPLING[k]) for k, v in found.items())
        right = right and all(isinstance(t, (int, float)) for t in found.get("interval", []))
        right = right and not any(isinstance(found.get(k), bool) for k in ("low_steps", "sr_steps", "guidance"))
        right = right and all(stage in ("low", "sr") for stage in found.get("shown", []))
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"{path}: says not how to sample; a JSON object with some of {', '.join(SAMPLING)} is needed; "
                         "mend it, remove it, or pass --plain")
    return found


def implied(kind, about):
    """How weights of trainers from before sampling.json are sampled: their configurations still name the tricks, idle
    or not. Released weights, and the method's own: as the paper has it, with guidance."""
    config, found = about["provenance"].get("config", {}) if "step" in about else {}, {}
    if not config.keys() & BEYOND.keys():
        return {}
    if config.get("given"):
        found["shown"] = [kind]
    if kind == "sr":
        found["tidy"] = True
        if str(config.get("preset", "")).startswith("demo"):
            found["agree"] = True
    return found


def wanted(s):
    """What a way of sampling asks for that the paper does not have, and beyond/sampling.py does.   -> list of names"""
    names = [name for name in ("agree", "tidy", "shown") if s.get(name)]
    names += ["solver"] if s.get("solver", "ddim") != "ddim" else []
    return names + (["interval"] if list(s.get("interval", (0, 1))) != [0, 1] else [])


def check_students(args, stages, s):
    """ValueError unless weights of few steps are sampled in these, by DDIM, without guidance.   s: some of SAMPLING
    -> their stages"""
    students = {kind: about for kind, (_, about) in stages.items() if "distilled" in about}
    for kind, about in students.items():
        n, teacher = len(about["distilled"]["times"]), about["distilled"]["teacher"]
        asked = ["--plain"] if args.plain else []
        asked += [f"--{kind}-steps {s[f'{kind}_steps']}"] if s[f"{kind}_steps"] != n else []
        asked += [f"--guidance {s['guidance']:g}"] if kind == "low" and s["guidance"] != 1 else []
        asked += ["--solver dpm"] if len(students) == len(stages) and getattr(args, "solver", None) == "dpm" else []
        if asked:
            raise ValueError(f"{about['file']}: a student that makes {n} steps of DDIM, guidance in them; "
                             f"{', '.join(asked)} asks for others; leave that out, or sample its teacher, {teacher}")
    return list(students)


def check_channels(args, s, made):
    """ValueError unless the channels that weights make are enough for what is given and asked for.   s: some of
    SAMPLING"""
    given = [c for c in FULL if getattr(args, c, None)]
    if set(given) >= set(made):
        raise ValueError(f"--{' --'.join(given)} with --model {args.model}: makes {', '.join(made)} alone; something "
                         "must be left to make; leave one out, or name other weights")
    asked = [f"--{c}" for c in given if c not in made]
    asked += [f"--{name}" for name in ("agree", "tidy") if s.get(name) and len(made) < len(FULL)]
    if asked:
        raise ValueError(f"--model {args.model}: makes {', '.join(made)} alone; {', '.join(asked)} asks for another; "
                         "leave that out, or name other weights")


def check_sampling(s):
    """ValueError for a way of sampling that means nothing.   s: some of SAMPLING; None is not given"""
    for name in ("low_steps", "sr_steps"):
        if s.get(name) is not None and not 1 <= s[name] <= 1000:
            raise ValueError(f"--{name.replace('_', '-')} {s[name]}; 1 to 1000 (T of the paper) are needed; change it")
    scale, interval = s.get("guidance"), s.get("interval")
    if scale is not None and not 0 <= scale < float("inf"):
        raise ValueError(f"--guidance {scale}; a finite number, not negative, is needed; 2 is usual")
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise ValueError(f"--guidance-interval {' '.join(map(str, interval))}; two times, 0 <= FROM <= TO <= 1, are "
                         "needed; change them")
    if s.get("batch", "auto") != "auto" and not re.fullmatch(r"[1-9]\d{0,3}", s["batch"]):
        raise ValueError(f"--batch {s['batch']}; auto or a number of samples, 1 to 9999, is needed; change it")
    if s.get("slab", 0) < 0:
        raise ValueError(f"--slab {s['slab']}; a number of slices is needed; 16 is usual")
    if s.get("solver") not in (None, "ddim", "dpm"):
        raise ValueError(f"solver {s['solver']}; ddim or dpm; mend sampling.json or pass --solver")
