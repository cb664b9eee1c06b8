"""A report and, if wanted, lobe, airway or vessel masks become a chest CT with matching masks; or a CT becomes its masks.
Paper sec. 4.2 to 4.4: G makes the low-resolution volume from text, H makes the full one from that, by DDIM; given
structures are held fixed in both.

    python sample.py --report examples/report.txt --airway examples/airway.nii.gz
    python sample.py --prompt "Large left pleural effusion." --samples 4
    python sample.py --ct scan.nii.gz                               # masks of a given CT
"""
import argparse
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import (CHANNELS, FOV, MASKS, SCALE, choose_device, decode, encode, exits, fast_bfloat16, grid_affine, keep_memory, picture, read_report, read_safetensors, release_memory, save_nifti,
                  to_model, upsample)
from diffusion import ddim_sample, times
from unet3d import UNet3D, from_released

# --- weights on disk: our folders, a runs/ folder, or the authors' *_ckpt folders ---

def read_released(folder):
    """The authors' checkpoint folder -> state dict. The second model of a folder is its running average."""
    for name in ("model_1.safetensors", "pytorch_model_1.bin", "model.safetensors", "pytorch_model.bin"):
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            return read_safetensors(path)[0]
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
                raise TypeError("no names of tensors")
            return state
        except Exception as e:                                           # whatever a hostile or broken pickle raises
            raise ValueError(f"{path}: refused ({type(e).__name__}); only plain tensors are read from a pickle; convert it to safetensors where you trust it") from None
    raise ValueError(f"{folder}: no model_1.safetensors or pytorch_model_1.bin; a released checkpoint folder has one; download it whole")


def load_stages(model):
    """A model folder -> {"low": (net, about), "sr": (net, about)}, those that are there.

    about: kind, grid (edge of what the stage makes), file, and for our own weights step and provenance.
    """
    model, stages = Path(model), {}
    if not model.is_dir():
        raise ValueError(f"--model {model}: no such folder; it holds low.safetensors and sr.safetensors; check the path")
    for kind in ("low", "sr"):
        path = next((p for p in (model / f"{kind}.safetensors", model / kind / f"{kind}.safetensors") if p.is_file()), None)
        if path is None:
            continue
        state, about = read_safetensors(path)
        if about.get("kind") != kind:
            raise ValueError(f"{path}: weights of kind {about.get('kind')}, not {kind}; each stage has its own; put the right file there")
        try:
            net = UNet3D(**about["args"])
            net.load_state_dict({k: v.float() for k, v in state.items()})
        except (TypeError, RuntimeError) as e:
            raise ValueError(f"{path}: the weights do not fit the network that it describes ({str(e)[:200]}); a trainer of this version wrote another form; train or fetch it again") from None
        stages[kind] = net, {**about, "file": str(path)}
    if not stages:
        for folder in sorted(model.glob("*_ckpt")):
            net = from_released(read_released(folder))
            kind = "sr" if net.args["in_channels"] == 8 else "low"
            stages[kind] = net, dict(kind=kind, grid=256 if kind == "sr" else 64, file=str(folder), provenance="released weights, CC-BY-NC")
    if "low" not in stages:
        raise ValueError(f"--model {model}: neither low.safetensors nor released *_ckpt folders in it; stage 1 is always needed; "
                         "train it with train_low.py or name another folder")
    return stages


# --- from arguments to volumes ---

def reports(args):
    """-> list of (name, text or None)"""
    if args.prompt is not None and args.report:
        raise ValueError("--prompt and --report; one text a sample is needed; give one of them")
    if args.prompt is not None:
        if not any(c.isalpha() for c in args.prompt) or any("\ud800" <= c <= "\udfff" for c in args.prompt):
            raise ValueError(f"--prompt {args.prompt!r}; no words in it, or bytes that are no UTF-8; write some, or leave the option out")
        return [("prompt", args.prompt)]
    if "" in (args.report or []):
        raise ValueError("--report '': no name of a file; a report is a text file; check the variable that should hold it")
    files = []
    for path in map(Path, args.report or []):
        files += sorted(path.glob("[!.]*.txt")) if path.is_dir() else [path]
    if args.report and not files:
        raise ValueError(f"--report {' '.join(args.report)}: no *.txt in it; a report is a text file; check the folder")
    return [(f.stem, read_report(f)) for f in files] or [("ct" if args.ct else "sample", None)]


def place(net, device, args):
    """A network ready to sample: weights in bfloat16 once rather than at every step (what autocast would do), Blocks compiled."""
    net.to(device).eval()
    net.slab = args.slab
    torch.backends.cudnn.benchmark = True                                # one shape, many steps: the search for the fastest convolution pays
    if args.amp:
        for p in net.parameters():
            if p.dim() > 1:
                p.data = p.data.bfloat16()
    if args.compile and not args.slab:
        net.compile_blocks()


def agrees(args, about):
    """Whether stage 2 is made to agree with stage 1: as the command line says, else if it is a demo preset's, small and little trained.   about: stage 2's"""
    if args.agree is not None:
        return args.agree
    return "step" in about and about["provenance"]["config"]["preset"].startswith("demo")


def trained_given(about):
    """Whether a stage was trained on anatomy shown without noise (train_low.py --given), so that it is best shown what is fixed like that.   about: the stage's"""
    return "step" in about and about["provenance"]["config"].get("given", 0) > 0


def tidy_lobes(x, tolerance=0.1, reach=5):
    """The lobe channel with every voxel at the nearest value among "no lobe" and the lobes that are present within `reach` voxels of it. A lobe is present
    where a cube of 3^3 voxels lies within `tolerance` of its value; 0.2 is halfway to the next.   x: (G,G,G) in [-1,1]   -> (G,G,G), x itself if no lobe is present

    Not in the paper. One channel codes five lobes as numbers, so a blurred border between lobes 3 and 5 passes through 4, and one between the right
    lung and the chest wall through all of them: rounded, it is a shell of lobes that are elsewhere.
    """
    def spread(a, n):                                                    # what is true, n voxels further along each axis
        for axis, edge in enumerate(a.shape):
            wide = a.clone()
            for k in range(1, min(n, edge - 1) + 1):
                wide.narrow(axis, k, edge - k).logical_or_(a.narrow(axis, 0, edge - k))
                wide.narrow(axis, 0, edge - k).logical_or_(a.narrow(axis, k, edge - k))
            a = wide
        return a

    out, lobes = torch.full_like(x, -1), 0                               # -1: no lobe
    for value in encode("lobe", range(1, 6)).tolist():
        away = (x - value).abs()
        there = spread(~spread(away >= tolerance, 1), reach)             # near the middles of filled cubes
        out, lobes = torch.where(there & (away < (x - out).abs()), value, out), lobes + there.sum()
    return out if lobes else x


def generate(low_net, sr_net, seed, grid, args, text=None, known=None, fixed=()):
    """One sample through both stages (sec. 4.2, 4.4).   grid: edge of the low-resolution volume   text: (1,N,width) or None
    known: (1,4,G,G,G) clean channels on the full grid, of which `fixed` are imposed   -> (4,G,G,G) float32 on the CPU
    args: device, amp, solver, low_steps, sr_steps, guidance, guidance_interval, agree, tidy as on the command line, clean: {stage: `trained_given`}, and
        one_stage: whether stage 1 leaves the device before stage 2; on a CPU its weights are lost then

    All noise comes from one CPU generator of the seed, so it does not depend on the device.
    """
    device, order, lobe = torch.device(args.device), 2 if args.solver == "dpm" else 1, CHANNELS.index("lobe")
    options = dict(order=order, fixed=fixed)
    generator = torch.Generator().manual_seed(seed)

    def noise(n):
        return torch.randn(1, len(CHANNELS), n, n, n, generator=generator)

    def bar(name):
        return partial(tqdm, desc=name, unit="step", leave=False)

    known_low = None if known is None else known[..., ::SCALE, ::SCALE, ::SCALE]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp), ThreadPoolExecutor(1) as thread:
        low_noise = noise(grid)
        sr_noise = thread.submit(noise, SCALE * grid) if sr_net is not None else None    # a third of a second at 256^3, while a GPU makes stage 1
        x = ddim_sample(low_net.to(device), low_noise.to(device), times(args.low_steps), text, args.guidance, known_low, clean=args.clean["low"],
                        interval=args.guidance_interval, progress=bar("low resolution"), **options)
        if args.tidy and CHANNELS.index("ct") in fixed and lobe not in fixed and grid >= 64:      # 3 voxels of 32^3 are 3 cm: lobes are narrower
            x[0, lobe] = tidy_lobes(x[0, lobe].float(), tolerance=0.2, reach=3)
        if sr_net is not None:
            if args.one_stage:
                low_net.to("meta" if device.type == "cpu" else "cpu")    # its weights take memory that stage 2 needs; meta is nowhere
                release_memory()
            x = ddim_sample(sr_net, sr_noise.result().to(device), times(args.sr_steps, order), known=known, clean=args.clean["sr"], low=upsample(x), agreeing=args.agree,
                            progress=bar("super-resolution"), **options)
    if not torch.isfinite(x).all():
        raise RuntimeError(f"seed {seed}: the sample is not finite; nothing is written; try another seed or --no-amp")
    x = x[0].float()
    if args.tidy and sr_net is not None and lobe not in fixed:
        x[lobe] = tidy_lobes(x[lobe])
    return x.cpu()


WRITTEN = {*(f"{c}.nii.gz" for c in CHANNELS), "preview.png", "sample.json"}


def write(folder, x, center, about, overwrite):
    """Channels -> NIfTI, preview and sample.json in one folder that appears whole.   x: (4,G,G,G) in [-1,1]"""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, channel in zip(CHANNELS, x.numpy()):
            save_nifti(part / f"{name}.nii.gz", decode(name, channel), center)
        picture(part / "preview.png", [x.numpy()], [folder.name], about["caption"])
        (part / "sample.json").write_text(json.dumps(about, indent=1) + "\n")
        if overwrite and folder.exists():
            old = folder.with_name(f".{folder.name}.old")                # until the new one is there
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sample(args):
    args.device = device = choose_device(args.device)
    texts, paths = reports(args), {c: getattr(args, c) for c in CHANNELS if getattr(args, c)}
    if args.ct and len(paths) > 1:
        raise ValueError(f"--ct with {', '.join('--' + c for c in paths if c != 'ct')}; a given CT is segmented; leave the masks out")
    out = Path(args.out)
    names = [(f"{name}_{i:02d}" if args.samples > 1 else name, text, args.seed + j * args.samples + i)
             for j, (name, text) in enumerate(texts) for i in range(args.samples)]
    if len({name for name, _, _ in names}) < len(names):
        raise ValueError(f"reports of one name: {sorted(n for n, _ in texts)}; every sample needs its own folder; rename the files")
    long = [name for name, _, _ in names if len(name.encode()) > 240]
    if long:
        raise ValueError(f"{long[0]}: a name of {len(long[0].encode())} bytes; 240 are possible for a folder; rename the report")
    there = [str(out / name) for name, _, _ in names if os.path.lexists(out / name)]
    if there and not args.overwrite:
        raise ValueError(f"{', '.join(there)}: exists; samples are not replaced silently; pass --overwrite or another --out")
    for folder in map(Path, there):
        if folder.is_symlink() or not (folder / "sample.json").is_file():
            raise ValueError(f"{folder}: exists and is no sample; --overwrite replaces samples only; choose another --out")
        if more := sorted({f.name for f in folder.iterdir()} - WRITTEN):
            raise ValueError(f"{folder}: holds {', '.join(more[:3])} besides the sample; --overwrite would remove that too; move it away or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / ".writable").touch(), (out / ".writable").unlink(missing_ok=True)     # now, not after minutes of sampling

    if not args.slab:
        keep_memory()                                                    # speed for memory; the opposite is wanted there
    stages = load_stages(args.model)
    low_net, low_about = stages["low"]
    sr_net, sr_about = (None, None) if args.stop_at_low else stages.get("sr", (None, None))
    if sr_net is None and not args.stop_at_low:
        raise ValueError(f"--model {args.model}: no stage-2 weights; the full grid needs them; train them with train_sr.py or pass --stop-at-low")
    if sr_net is not None and sr_about["grid"] != SCALE * low_about["grid"]:
        raise ValueError(f"--model {args.model}: stage 1 makes {low_about['grid']}^3, stage 2 {sr_about['grid']}^3 where {SCALE * low_about['grid']}^3 is next; the two belong together; "
                         "put weights of one size there or pass --stop-at-low")
    args.amp = fast_bfloat16(device) if args.amp is None else args.amp
    args.compile = device.startswith("cuda") if args.compile is None else args.compile
    args.one_stage = args.slab > 0 or device.startswith("cuda") and torch.cuda.get_device_properties(device).total_memory < 16e9
    args.agree = sr_net is not None and agrees(args, sr_about)
    args.tidy = sr_net is not None and "step" in sr_about if args.tidy is None else args.tidy     # how the released weights number lobes is not known
    args.clean = {kind: trained_given(about) for kind, (_, about) in stages.items()}
    for net in filter(None, (low_net, sr_net)):
        place(net, device, args)
    grid = low_about["grid"]
    print(f"model {args.model} on {device}: {grid}^3" + (f" -> {sr_about['grid']}^3" if sr_net else ""))

    known, fixed, center = None, [], args.center or (0.0, 0.0, 0.0)
    if paths:
        arrays, center = to_model(paths, SCALE * grid, args.center)
        known = torch.zeros(1, len(CHANNELS), *[SCALE * grid] * 3)
        for name, array in arrays.items():
            c = CHANNELS.index(name)
            known[0, c], fixed = torch.from_numpy(encode(name, array)), fixed + [c]
            if name in MASKS:
                print(f"{paths[name]}: {int((array > 0).sum())} voxels on the {SCALE * grid}^3 grid, {int((array[::SCALE, ::SCALE, ::SCALE] > 0).sum())} on {grid}^3")
        known = known.to(device)
    contexts = {None: None}
    if any(text for _, text in texts):
        import text_encoder
        own = Path(args.model) / "text"
        source = args.text or (own if own.is_dir() else text_encoder.CXR_BERT)
        encoder = text_encoder.load(source, tokens=low_net.args["tokens"])
        if encoder.width != low_net.args["context_dim"]:
            raise ValueError(f"text model {source}: {encoder.width} wide, the weights were trained with {low_net.args['context_dim']}; "
                             "text and weights belong together; pass --text FOLDER")
        for _, text in texts:
            contexts[text] = encoder.encode([text])[0].to(device)

    middle = center
    if sr_net is None:                                                   # voxel i of the low-resolution grid is voxel 4 i of the full one, not the middle of four
        last = SCALE * (grid - 1)
        middle = (grid_affine(SCALE * grid, center) @ [last / 2, last / 2, last / 2, 1])[:3]
    for name, text, seed in names:
        began = time.time()
        if low_net.out.weight.is_meta:                                   # `generate` dropped its weights
            low_net = load_stages(args.model)["low"][0]
            place(low_net, device, args)
        x = generate(low_net, sr_net, seed, grid, args, contexts[text], known, fixed)
        about = dict(caption=f"{Path(args.model).name} weights, seed {seed}, " + (f"fixed: {', '.join(CHANNELS[c] for c in fixed)}" if fixed else "nothing fixed"),
                     text=text, seed=seed, center_ras_mm=list(center), seconds=round(time.time() - began, 1), arguments=vars(args),
                     weights={k: about for k, (_, about) in stages.items()}, torch=torch.__version__)
        write(out / name, x, middle, about, args.overwrite)
    voxel = " x ".join(f"{f / x.shape[-1]:.3f}" for f in FOV[::-1])
    print(f"wrote {len(names)} sample(s) of {x.shape[-1]}^3 voxels, {voxel} mm (x,y,z), to {', '.join(str(out / n) for n, _, _ in names[:3])}{' ...' if len(names) > 3 else ''}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--report", action="append", metavar="FILE", help="a report, or a folder of them; repeatable")
    p.add_argument("--prompt", help="a text on the command line instead")
    for c in MASKS:
        p.add_argument(f"--{c}", metavar="NIFTI", help=f"{c} mask to keep, any size and orientation")
    p.add_argument("--ct", metavar="NIFTI", help="a CT to segment: its masks come out")
    p.add_argument("--model", default=os.path.relpath(Path(__file__).parent / "checkpoints/demo-256"), help="folder of weights (default checkpoints/demo-256; checkpoints/demo makes 128^3, several times faster)")
    p.add_argument("--text", help="text encoder: folder or hub name (default MODEL/text, else CXR-BERT)")
    p.add_argument("--out", default="out", help="samples appear in OUT/<name>/ (default out)")
    p.add_argument("--samples", type=int, default=1, help="how many of each report; seeds count up")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--guidance", type=float, default=2.0, help="1 none (the paper), 2 (default), 3 (released anatomy experiments)")
    p.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"), help="times t in [0,1] at which it is applied; else one evaluation a step instead of two")
    p.add_argument("--solver", choices=("ddim", "dpm"), default="ddim", help="ddim (the paper), or dpm: DPM-Solver++(2M), in stage 2 nearly as good in 10 steps as ddim in 20")
    p.add_argument("--low-steps", type=int, default=50, help="steps of stage 1 (default 50), two network evaluations each with guidance")
    p.add_argument("--sr-steps", type=int, default=20, help="steps of stage 2 (default 20), one network evaluation each")
    p.add_argument("--agree", action=argparse.BooleanOptionalAction, help="move the CT of stage 2 to the HU of stage 1, by at most 81; default for weights trained with a demo preset, and for no others")
    p.add_argument("--tidy", action=argparse.BooleanOptionalAction, help="set voxels on blurred borders between stage 2's lobes to a lobe that is there; default for weights of these trainers, not for released ones")
    p.add_argument("--stop-at-low", action="store_true", help="write the low-resolution volume")
    p.add_argument("--center", type=float, nargs=3, metavar=("X", "Y", "Z"), help="centre of the field of view, world mm")
    p.add_argument("--device", help="cuda or cpu; default whichever is there")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast; default where the device multiplies in bfloat16: GPUs since Ampere, CPUs with AMX or AVX512-BF16")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the networks' Blocks; default on a GPU")
    p.add_argument("--slab", type=int, nargs="?", const=16, default=0, metavar="SLICES", help="work through volumes this many slices at a time (16): less memory, same result")
    p.add_argument("--overwrite", action="store_true", help="replace samples of the same name")
    args = p.parse_args(argv)
    with exits():
        for name in ("samples", "low_steps", "sr_steps"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}; at least 1 is needed; change it")
        if not math.isfinite(args.guidance) or args.guidance < 0:
            raise ValueError(f"--guidance {args.guidance}; a finite number, not negative, is needed; 2 is usual")
        if not 0 <= args.guidance_interval[0] <= args.guidance_interval[1] <= 1:
            raise ValueError(f"--guidance-interval {' '.join(map(str, args.guidance_interval))}; two times, 0 <= FROM <= TO <= 1, are needed; change them")
        if args.center and not all(abs(c) < 1e6 for c in args.center):
            raise ValueError(f"--center {' '.join(map(str, args.center))}; three finite numbers of mm are needed; change it")
        if args.slab < 0:
            raise ValueError(f"--slab {args.slab}; a number of slices is needed; 16 is usual")
        if not 0 <= args.seed < 2**62:
            raise ValueError(f"--seed {args.seed}; 0 to 2^62 is needed; choose another")
        sample(args)


if __name__ == "__main__":
    main()
