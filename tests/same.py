"""Does this tree compute what another revision computed? Every number that both write is compared, bit for bit.

    python tests/same.py 4298b9c              # everything
    python tests/same.py 4298b9c --quick      # the small model and tiny trainings
    python tests/same.py 4298b9c "train low"  # the commands whose names hold these words

Both trees run the same short commands on the CPU, with one thread, in copies outside the checkout. What REV wrote is
kept by commit and machine in ~/.cache/medsyn-same; this tree, with its uncommitted files, is always run anew.
Exit code 0: all equal. 1: something differs or fails. 2: wrong usage.
"""
import argparse
import contextlib
import csv
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import safetensors.torch
import torch
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medsyn-same"
TIMEOUT = 900                                    # s for each line of a command
LEFT_OUT = {"files": ["lock", "previous.pt", "asked.json"],
            "files that only this tree writes": ["sampling.json"],
            "keys of .json": ["arguments", "sampling", "weights", "seconds", "torch", "sha256", "as_is", "ct",
                             "has", "report"],
            "columns of .csv": ["seconds"],
            "parts of .pt but": ["step", "net", "ema", "opt.state"],
            "metadata of .safetensors": []}


# --- the commands ---

class Command(NamedTuple):
    name: str
    lines: list                                  # run one after another, until one fails
    quick: bool = False
    printed: bool = False                        # compare what is printed too


SPELLINGS = {                                    # without beyond/, and with it
    "low": ("train_low.py", "-m beyond.train_low"),
    "sr": ("train_sr.py", "-m beyond.train_sr"),
    "low_plain": ("train_low.py --no-pooled --late 0 --cool 0 --windows 0 --bullae 0 --warm_up 0", "train_low.py"),
    "sr_plain": ("train_sr.py --windows 0 --bullae 0 --given 0 --cool 0", "train_sr.py"),
}

REPORT = "--report examples/report.txt"
ONE = "{in}/nifti64/phantom_000000"              # a chest as NIfTI
MASKS = " ".join(f"--{c} {ONE}/{c}.nii.gz" for c in ("airway", "lobe", "vessel"))
SAMPLE = "sample.py --low-steps 2 --sr-steps 2 --device cpu --no-amp --out {out}/samples"
SAMPLES = {                                      # name: options, and whether the small model's are quick
    "text": (REPORT, False),
    "airway": (f"{REPORT} --airway examples/airway.nii.gz", False),
    "masks": (f"{REPORT} {MASKS}", False),
    "ct": (f"--ct {ONE}/ct.nii.gz", False),
    "dpm": (f"{REPORT} --solver dpm", False),
    "guidance": (f"{REPORT} --stop-at-low --guidance 3 --guidance-interval 0.5 1", False),
    "slab": (f"{REPORT} --slab 8", False),
    "low": (f"{REPORT} --stop-at-low --samples 2 --seed 3", False),
    "low masks": (f"{REPORT} --stop-at-low {MASKS} --solver dpm", True),
    "bare": ("--no-agree --no-tidy", False),
}

# Files hold whole HU, which hide small differences: this keeps what the UNets were shown at each step.
STEPS = """
import runpy, sys
import numpy as np, torch
seen = []
def note(net, given, made):
    if any(c.__name__ == "UNet3D" for c in type(net).__mro__):
        xt = given[0][:1]                        # guidance asks twice, or for a batch of two
        x, sums = xt[..., ::4, ::4, ::4].numpy().copy(), xt.double().sum((2, 3, 4)).numpy()
        if not seen or not np.array_equal(seen[-2], x):
            seen.extend([x, sums])
torch.nn.modules.module.register_module_forward_hook(note)
to = sys.argv[1]
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
assert seen
np.savez(to, *seen)
"""
WATCHED = f"-c {shlex.quote(STEPS)} {{out}}/steps.npz {SAMPLE} --low-steps 3 --sr-steps 3"
STEPWISE = {
    "demo text": (f"{REPORT} --low-steps 2 --sr-steps 2", True),
    "demo masks dpm": (f"{REPORT} {MASKS} --solver dpm --guidance-interval 0.2 0.9", False),
    "demo ct": (f"--ct {ONE}/ct.nii.gz", False),
    "demo-256 low": (f"{REPORT} --stop-at-low --airway examples/airway.nii.gz", False),
}

# Every option that a preset sets, but the tricks': what differs between presets is then the tricks alone.
TRAIN = ("--device cpu --no-amp --batch 4 --micro 2 --lr 1e-3 --ema 0.9 --ema_start 2 --ema_every 1 --holdout 1"
         " --workers 0 --save_every 2 --show_every 3 --log_every 1 --out {out}/run")
TINY = f"{TRAIN} --dim 8 --levels 2 --heads 2"
SHIPPED = f"{TRAIN} --dim 16 --levels 3 --heads 4 --checkpointing none"      # the sizes of checkpoints/demo
D32, D64 = "--data {in}/32", "--data {in}/64"
LOW, SR = "--init checkpoints/demo/low.safetensors", "--init checkpoints/demo/sr.safetensors"
CROP = "--crop 16,16,16 --augment 0.3"
TRICKS = f"{{low}} --preset demo {TINY} {D32} --warm_up 2 --checkpointing none"
TRAININGS = {                                    # name: line, and whether it is quick
    "low plain": (f"{{low_plain}} --preset demo {TINY} {D32} --checkpointing norms", True),
    "low plain init": (f"{{low_plain}} --preset demo {SHIPPED} {D32} --init {{in}}/plain/low.safetensors", False),
    "low tricks": (TRICKS, True),
    "low tricks given": (f"{TRICKS} --given 0.5 --seed 5", False),
    "low tricks init": (f"{{low}} --preset demo {SHIPPED} {D32} {LOW}", False),
    "low demo-256": (f"{{low}} --preset demo-256 {TINY} {D64} --warm_up 2 --checkpointing blocks", False),
    "low demo-256 init": (f"{{low}} --preset demo-256 {SHIPPED} {D64} {LOW}", False),
    "sr plain": (f"{{sr_plain}} --preset demo {TINY} {D32} {CROP} --checkpointing blocks", True),
    "sr tricks": (f"{{sr}} --preset demo {TINY} {D32} {CROP} --checkpointing none", True),
    "sr tricks init": (f"{{sr}} --preset demo {SHIPPED} {D32} {CROP} {SR}", False),
    "sr demo-256 init": (f"{{sr}} --preset demo-256 {SHIPPED} {D64} {CROP} {SR}", False),
    "sr light": (f"{{sr}} --preset light {TINY} {D64} {CROP} --checkpointing norms --bottom depth", False),
}
TWO = "-m torch.distributed.run --standalone --nproc_per_node=2"

MEASURE = "evaluate.py {} --csv {{out}}/values.csv --figure {{out}}/values.png {}".format
PROMPTED = '--n 1 --out {out}/made --options="--stop-at-low --low-steps 2 --device cpu --no-amp"'
MEASURES = {
    "fid": "{in}/nifti32 {in}/other32 --edge 32 --device cpu",
    **{name: "{in}/nifti32 {in}/other32 --segment phantom" for name in ("airway", "effusion", "laa", "ctr")},
    "dice": "{in}/nifti32 {in}/other32",
    "phantoms": "--n 2 --grid 32",
    "augment": "{in}/real.csv {in}/synthetic.csv",
    "prompts": f"{{in}}/prompts.txt --model checkpoints/demo {PROMPTED}",
}
SLOW = ("fid", "airway", "effusion", "laa", "ctr", "augment", "prompts")    # or much like another
PHANTOM = "phantom.py --n 2 --grid 32 --workers 1"
TEXT = "text_encoder.py train --scratch --width 32 --layers 2 --heads 2 --vocab 300 --batch 8 --tokens 64 --device cpu"

COMMANDS = [
    *[Command(f"sample {model} {name}", [f"{SAMPLE} --model checkpoints/{model} {options}"], quick and model == "demo")
      for model in ("demo", "demo-256") for name, (options, quick) in SAMPLES.items()],
    *[Command(f"steps {name}", [f"{WATCHED} --model checkpoints/{name.split()[0]} {options}"], quick)
      for name, (options, quick) in STEPWISE.items()],
    Command("sample released low", [f"{SAMPLE} --model {{in}}/released --stop-at-low --low-steps 1 --seed 2"], True),
    Command("sample released", [f"{SAMPLE} --model {{in}}/released --low-steps 1 --sr-steps 1"]),
    *[Command(f"train {name}", [f"{line} --steps 3", f"{line} --steps 5"], quick)
      for name, (line, quick) in TRAININGS.items()],
    Command("train low resumed", ["-c \"import shutil; shutil.copytree('{in}/run', '{out}/run')\"",
                                  f"{TRICKS} --steps 5"]),
    Command("train low torchrun", [f"{TWO} {{low_plain}} --preset demo {TINY} {D32} --steps 3"]),
    Command("train sr torchrun zero", [f"{TWO} {{sr_plain}} --preset demo {TINY} {D32} {CROP} --steps 3 --zero"]),
    Command("text", [f"{TEXT} --steps 3 --reports {{in}}/reports.jsonl --out {{out}}/text",
                     f"{PHANTOM} --out {{out}}/cases",
                     "text_encoder.py embed {out}/cases --model {out}/text --tokens 64 --device cpu"], True),
    Command("phantom", [f"{PHANTOM} --texts 2 --out {{out}}/cases --picture {{out}}/cases.png",
                        f"{PHANTOM} --seed 7 --wording held-out --out {{out}}/held-out"], True),
    Command("phantom reports", ["phantom.py --reports {out}/reports.jsonl --n 20"], True),
    Command("data prepare", [f"data.py prepare --ct {ONE}/ct.nii.gz {MASKS} --report examples/report.txt --grid 32"
                             " --out {out}/case"], True),
    Command("data check", ["data.py check {in}/32"], True, True),
    Command("data export", ["data.py export {in}/32 --out {out}/nifti"], True),
    *[Command(f"evaluate {name}", [MEASURE(name, options)], name not in SLOW, True)
      for name, options in MEASURES.items()],
]

RELEASED = """ # the authors' folders, from the golden weights
import os, sys
sys.path[:0] = [os.getcwd(), "tests"]
import golden, torch
from safetensors.torch import save_file
for name in ("low", "sr"):
    os.makedirs(sys.argv[1] + name + "_ckpt")
    state = dict(("denoise_fn." + k, v.contiguous().clone()) for k, v in golden.weights(name).items())
    if name == "low":
        torch.save(dict(state, betas=torch.zeros(1000)), sys.argv[1] + "low_ckpt/pytorch_model_1.bin")
    else:
        save_file(state, sys.argv[1] + "sr_ckpt/model_1.safetensors")
"""
INPUTS = Command("inputs", [                     # made once, by REV; each command of both trees gets a copy
    "phantom.py --n 10 --grid 32 --workers 1 --out {in}/32",
    "phantom.py --n 4 --grid 32 --seed 50 --workers 1 --out {in}/other",
    "phantom.py --n 4 --grid 64 --workers 1 --out {in}/64",
    "phantom.py --n 60 --reports {in}/reports.jsonl",
    "data.py export {in}/32 --out {in}/nifti32",
    "data.py export {in}/other --out {in}/other32",
    "data.py export {in}/64 --out {in}/nifti64",
    "text_encoder.py embed {in}/32 --model checkpoints/demo/text --tokens 128 --device cpu",
    "text_encoder.py embed {in}/64 --model checkpoints/demo/text --tokens 128 --device cpu",
    TRICKS.replace("{out}", "{in}") + " --steps 3",
    f"{{low_plain}} --preset demo {SHIPPED} {D32} --steps 1".replace("{out}/run", "{in}/plain"),
    f"-c {shlex.quote(RELEASED)} {{in}}/released/",
])
PAIRS = "effusion | No pleural effusion. | Large left pleural effusion.\nctr | Heart size is normal. | Cardiomegaly.\n"


def write_inputs(folder):
    """What no program of the tree makes: prompts, and tables of CTs with a label."""
    (folder / "prompts.txt").write_text(PAIRS)
    for table, volumes in (("real", "nifti32"), ("synthetic", "other32")):
        names = sorted(p.name for p in (folder / volumes).iterdir())
        rows = [f"{volumes}/{name}/ct.nii.gz,{'ab'[i % 2]}" for i, name in enumerate(names)]
        (folder / f"{table}.csv").write_text("\n".join(["file,label", *rows]) + "\n")


# --- running them ---

@contextlib.contextmanager
def alone(path):
    """Other processes that do the same wait: what they want is there then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Failed(Exception):
    """A command that should not have failed."""


def git(*args, **options):
    return subprocess.run(["git", "-C", str(ROOT), *args], stdin=subprocess.DEVNULL, capture_output=True, **options)


def spelled(command, tree):
    """The command's lines as that tree understands them."""
    new = (tree / "beyond").is_dir()
    folder = f"same-out/{command.name.replace(' ', '-')}"                # relative: both trees print and draw the same
    words = {name: pair[new] for name, pair in SPELLINGS.items()}
    return [line.format(**words, **{"in": f"{folder}/in", "out": f"{folder}/out"}) for line in command.lines]


def run(command, tree, inputs=None):
    """-> the folder with in/, out/ and printed.txt"""
    folder = tree / "same-out" / command.name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    if inputs:
        shutil.copytree(inputs, folder / "in")                           # a copy: what is left there harms no other
    else:
        (folder / "in").mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    printed = ""
    for line in spelled(command, tree):
        args = [sys.executable, *shlex.split(line)]
        try:
            done = subprocess.run(args, cwd=tree, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Failed(f"python {line}\n  not done after {TIMEOUT} s") from None
        if done.returncode:
            tail = "\n    ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            raise Failed(f"python {line}\n  exit code {done.returncode}:\n    {tail}")
        printed += done.stdout
    (folder / "printed.txt").write_text(printed)
    return folder


def checked_out(commit):
    """The tree of a commit, in the cache."""
    tree = CACHE / commit / "tree"
    with alone(CACHE / commit / "tree.lock"):
        if not tree.is_dir():
            part = Path(tempfile.mkdtemp(dir=tree.parent))
            archive = git("archive", commit, check=True).stdout
            subprocess.run(["tar", "x", "-C", str(part)], input=archive, check=True)
            part.rename(tree)
    return tree


def copied_here(folder):
    """This tree, with changes and new files that are not committed, in `folder`."""
    for name in git("ls-files", "-coz", "--exclude-standard", check=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def machine(commit):
    """Where results of this commit on this machine are kept. Other processors and libraries round otherwise."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), cpu)
    libraries = [f"{m.__name__} {m.__version__}" for m in (torch, np, nibabel)]
    key = json.dumps(dict(cpu=cpu, threads=1, python=platform.python_version(), libraries=libraries), indent=1)
    folder = CACHE / commit / hashlib.sha256(key.encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key.json").write_text(key)
    return folder


def kept(command, tree, store, inputs=None):
    """REV's results, computed unless they are there.   -> folder"""
    asked = [*INPUTS.lines, PAIRS, *spelled(command, tree)]              # a changed command has other results
    name = f"{command.name.replace(' ', '-')}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}"
    with alone(store / f"{command.name.replace(' ', '-')}.lock"):
        if not (store / name).is_dir():
            folder = run(command, tree, inputs)
            if inputs:
                shutil.rmtree(folder / "in")
            else:
                write_inputs(folder / "in")
            folder.rename(store / name)
    return store / name


# --- what they wrote ---

def flat(x, path=""):
    """Nested dicts and lists -> {path: leaf}"""
    if not isinstance(x, (dict, list, tuple)) or not x:
        return {path[1:]: x}
    items = x.items() if isinstance(x, dict) else enumerate(x)
    return {k: v for name, part in items for k, v in flat(part, f"{path}.{name}").items()}


def numbers(x):
    """A tensor as an array; bfloat16, which numpy lacks, as float32, which holds it exactly."""
    x = torch.as_tensor(x)
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def arrays(path):
    """What a file holds and is compared.   -> {name: array of numbers or of texts}"""
    if path.name.endswith((".nii", ".nii.gz")):
        image = nibabel.load(path)
        codes = [int(image.header[name]) for name in ("sform_code", "qform_code", "xyzt_units")]
        return {"voxels": np.asarray(image.dataobj), "affine": image.affine, "codes": np.array(codes)}
    if path.suffix in (".npy", ".npz"):
        found = np.load(path)
        return {"": found} if path.suffix == ".npy" else dict(found)
    if path.suffix == ".safetensors":
        return {k: numbers(v) for k, v in safetensors.torch.load_file(path).items()}
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True, map_location="cpu")
        state = dict(step=state["step"], net=state["net"], ema=state["ema"], opt=dict(state=state["opt"]["state"]))
        return {k: numbers(v) for k, v in flat(state).items()}
    if path.suffix == ".png":
        return {"pixels": imread(path)}
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        head, *rows = csv.reader(text.splitlines())
        columns = dict(zip(head, zip(*rows, strict=True), strict=True)) if rows else {}
        return {k: np.array(v) for k, v in columns.items() if k not in LEFT_OUT["columns of .csv"]}
    if path.suffix == ".json":
        content = json.loads(text)
        for key in LEFT_OUT["keys of .json"] if isinstance(content, dict) else []:
            content.pop(key, None)
        return {"": np.array([f"{k} = {json.dumps(v)}" for k, v in flat(content).items()])}
    return {"": np.array(text.splitlines() or [""])}


def written(folder, printed):
    """-> {file: its arrays} of a command's folder"""
    files = [p for p in sorted((folder / "out").rglob("*")) if p.is_file() and p.name not in LEFT_OUT["files"]]
    found = {str(p.relative_to(folder / "out")): arrays(p) for p in files}
    return found | ({"printed": arrays(folder / "printed.txt")} if printed else {})


def difference(a, b):
    """How two arrays differ, or None. Equal is equal to the bit, and NaN equals nothing."""
    if a.dtype.kind in "US" and b.dtype.kind in "US":
        if a.shape == b.shape and (a == b).all():
            return None
        i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        x, y = (str(z[i])[:100] if i < len(z) else "the end" for z in (a, b))
        return f"{len(a)} texts, {len(b)} here; number {i + 1}: {x!r}, here {y!r}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {a.shape}, here {b.dtype} {b.shape}"
    bad = int(np.isnan(a).sum()) if a.dtype.kind == "f" else 0
    if bad:
        return f"{bad} NaN of {a.size}"
    if a.tobytes() == b.tobytes():
        return None
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    if not apart.any():
        return "0 and -0"
    return f"{int((a != b).sum())} of {a.size} values, by up to {np.nanmax(apart):.3g}"


def compare(old, new):
    """-> number of comparisons, what differs as lines, files that only the new one has"""
    count, wrong = 0, []
    for file, before in old.items():
        after = new.get(file)
        if after is None:
            count, wrong = count + 1, [*wrong, f"{file}: not written here"]
            continue
        for name in {**before, **after}:
            count += 1
            what = f"{file} {name}".strip()
            if name not in before or name not in after:
                wrong.append(f"{what}: {'not here' if name in before else 'only here'}")
            elif said := difference(before[name], after[name]):
                wrong.append(f"{what}: {said}")
    return count, wrong if count else ["nothing was written"], sorted(set(new) - set(old))


def check(command, store, inputs, rev_tree, tree):
    """One command in both trees.   -> number of comparisons, what is wrong, files only written here, seconds here"""
    try:
        old = kept(command, rev_tree, store, inputs)
    except Failed as e:
        return 0, [f"in REV: {e}"], [], 0.0
    began = time.time()
    try:
        new = run(command, tree, inputs)
        result = compare(written(old, command.printed), written(new, command.printed))
        shutil.rmtree(new if not result[1] else new / "in")              # what differs stays, to be looked at
    except (Failed, OSError, ValueError, KeyError, RuntimeError) as e:   # failed, or wrote what cannot be read
        result = 0, [f"here: {type(e).__name__}: {e}"], []
    return *result, time.time() - began


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(print(f"error: {message}", file=sys.stderr) or 2)
    p.add_argument("rev", metavar="REV", help="the revision to compare with")
    p.add_argument("pattern", metavar="PATTERN", nargs="?", default="", help="commands whose names hold this")
    p.add_argument("--quick", action="store_true", help="the small model and tiny trainings only")
    p.add_argument("--jobs", type=int, default=min(2, os.cpu_count()), help="commands at a time, of one thread each")
    args = p.parse_args(argv)
    commands = [c for c in COMMANDS if args.pattern in c.name and (c.quick or not args.quick)]
    found = git("rev-parse", "--verify", "--quiet", f"{args.rev}^{{commit}}", text=True)
    if found.returncode:
        p.error(f"{args.rev}: no revision of {ROOT}; name a commit, such as HEAD")
    if not commands or args.jobs < 1:
        p.error(f"{args.pattern!r}, --jobs {args.jobs}: {len(commands)} of {len(COMMANDS)} commands; their names are "
                f"such as {COMMANDS[0].name!r}; at least one job is needed")
    commit = found.stdout.strip()
    store = machine(commit)
    left_out = [f"{what} {', '.join(names)}".strip() for what, names in LEFT_OUT.items()]
    print(f"{commit[:12]} in {store}; not compared: {'; '.join(left_out)}", flush=True)

    total, wrong = 0, []
    rev_tree = checked_out(commit)
    try:
        inputs = kept(INPUTS, rev_tree, store) / "in"
    except Failed as e:
        print(f"error: REV did not make the inputs: {e}", file=sys.stderr)
        return 1
    here = copied_here(Path(tempfile.mkdtemp(prefix="here-", dir=CACHE)))
    work = partial(check, store=store, inputs=inputs, rev_tree=rev_tree, tree=here)
    with ThreadPoolExecutor(args.jobs) as pool:
        for command, (count, differing, more, seconds) in zip(commands, pool.map(work, commands), strict=True):
            total += count
            wrong += [command.name] if differing else []
            said = f"DIFFERS: {differing[0]}" if differing else "equal"
            besides = f"   besides: {', '.join(more)}" if more else ""
            print(f"{command.name:26}{count:5} arrays {seconds:6.1f} s   {said}{besides}", flush=True)
            for line in differing[1:4]:
                print(f"    {line}")
            if len(differing) > 4:
                print(f"    and {len(differing) - 4} more")
    if wrong:
        print(f"{total} comparisons of {len(commands)} commands; {len(wrong)} commands differ: {', '.join(wrong)}\n"
              f"{here}/same-out and {store} hold what was written")
        return 1
    shutil.rmtree(here)
    print(f"{total} comparisons of {len(commands)} commands, all equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
