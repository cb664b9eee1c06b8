"""A report and, if wanted, lobe, airway or vessel masks become a chest CT with matching masks; a CT becomes its masks.
Paper sec. 4.2 to 4.4: G makes the low-resolution volume from text, H the full one from that, given structures fixed.

    python sample.py --report examples/report.txt --airway examples/airway.nii.gz
    python sample.py --prompt "Large left pleural effusion." --samples 4
    python sample.py --ct scan.nii.gz                               # masks of a given CT
"""
import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from data import CHANNELS, FOV, MASKS, SCALE, decode, encode, grid_affine, to_model, upsample
from diffusion import beside, ddim_sample, guided, held, times
from support.cli import Parser, check_center, choose_device, exits, keep_memory, release_memory, say
from support.files import whole_folder
from support.nifti import saving
from support.outputs import batches, check_free, check_given, each_ct, missing, names_of, readable
from support.pictures import picture, pyplot
from support.reports import texts_asked
from support.sampling import check_sampling, ready, settings
from support.weights import beyond, check_pair, load_stages
from unet3d import Block, UNet3D

DEMO = os.path.relpath(Path(__file__).parent / "checkpoints/demo-256")
WRITTEN = (*(f"{c}.nii.gz" for c in CHANNELS), "preview.png", "sample.json", "view.html")


# --- one sample ---

def generate(low_net, sr_net, grid, seeds, s, context=None, known=None, fixed=()):
    """Samples through both stages, one of each seed (sec. 4.2, 4.4).   grid: edge of the low-resolution volume
    s: `settings`   context: (B,N,width) texts, or None for the learned null text   known: (1,4,D,H,W) clean channels on
    the full grid, of which `fixed` are imposed   -> (B,4,D,H,W) float32 on the CPU

    All noise of a sample comes from one CPU generator of its seed, so it depends neither on device nor on batch.
    """
    device, generators = torch.device(s["device"]), [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(n):
        return torch.stack([torch.randn(low_net.args["out_channels"], n, n, n, generator=g) for g in generators])

    with torch.autocast(device.type, torch.bfloat16, enabled=s["amp"]), ThreadPoolExecutor(1) as thread:
        # stage 1: from the text, anatomy held on every fourth voxel
        low_noise = noise(grid)
        sr_noise = thread.submit(noise, SCALE * grid) if sr_net else None    # 0.3 s at 256^3, while a GPU makes stage 1
        known_low = None if known is None else known[..., ::SCALE, ::SCALE, ::SCALE]
        low_net = low_net.to(device)
        denoise, unguided = (guided(low_net, context, scale) for scale in (s["guidance"], 1))
        x = stage("low", s, denoise, low_noise.to(device), known_low, fixed, unguided=unguided)

        # stage 2: from stage 1's volume, anatomy held on every voxel
        if sr_net:
            if s["one_stage"]:
                low_net.to("meta" if device.type == "cpu" else "cpu")    # for stage 2's memory; meta: weights dropped
                release_memory()
            low = upsample(x)
            x = stage("sr", s, beside(sr_net, low), sr_noise.result().to(device), known, fixed, low=low)
    return x.float().cpu()


def stage(name, s, denoise, noise, known, fixed, unguided=None, low=None):
    """One stage's samples: its denoiser with anatomy held (sec. 4.4), by DDIM (sec. 4.2).   -> (B,4,D,H,W)
    Where `s` asks for what the paper does not have, beyond/ replaces denoiser and sampler."""
    sampler = ddim_sample
    if s["beyond"]:
        denoise, sampler = beyond("sampling").dress(name, s, denoise, unguided, known, fixed, low)
    bar = partial(tqdm, desc={"low": "low resolution", "sr": "super-resolution"}[name], unit="step", leave=False)
    return sampler(held(denoise, known, list(fixed)), noise, times(s[f"{name}_steps"]), bar)


# --- from arguments to volumes ---

def load(args):
    """-> {"low": (net, about), "sr": (net, about)}, the second one left out with --stop-at-low"""
    stages = load_stages(args.model, UNet3D)
    if args.stop_at_low:
        return {"low": stages["low"]}
    check_pair(stages, args.model, SCALE)
    return stages


def anatomy(paths, channels, grid, center, as_is):
    """Given NIfTI files on the model's grid.   -> known (1,C,D,H,W) or None, which are fixed, centre in world mm"""
    if not paths:
        return None, [], center or (0.0, 0.0, 0.0)
    arrays, center = to_model(paths, grid, center, as_is)
    known = torch.zeros(1, len(channels), grid, grid, grid)
    for name, array in arrays.items():
        known[0, channels.index(name)] = torch.from_numpy(encode(name, array))
        if name in MASKS:
            print(f"{paths[name]}: {int((array > 0).sum())} voxels on the {grid}^3 grid, "
                  f"{int((array[::SCALE, ::SCALE, ::SCALE] > 0).sum())} on {grid // SCALE}^3")
    return known, [channels.index(name) for name in arrays], center


def read_texts(args, texts, low_net, about):
    """-> {text: context (1,N,width) or None}"""
    if not any(texts):
        return {None: None}
    import text_encoder
    own = Path(args.model) / "text"
    source = args.text or (own if own.is_dir() else text_encoder.CXR_BERT)
    encoder = text_encoder.load(source, tokens=low_net.args["tokens"], known=about.get("encoder"))
    if encoder.width != low_net.args["context_dim"]:
        raise ValueError(f"text model {source}: {encoder.width} wide, the weights were trained with "
                         f"{low_net.args['context_dim']}; text and weights belong together; pass --text FOLDER")
    return {None: None} | {text: encoder.encode([text])[0].to(args.device) for text in texts if text}


def sample(args):
    # everything that can be wrong is found before the first step
    args.device, out = choose_device(args.device), Path(args.out)
    paths = {c: getattr(args, c) for c in MASKS if getattr(args, c)}
    check_given(args, paths)
    texts, cts = each_ct(args.ct or [], texts_asked(args.prompt, args.report or [], "" if args.ct else "sample"))
    names = names_of(texts, args.samples, args.seed)
    ct_of = {name: cts[i // args.samples] for i, (name, _, _) in enumerate(names)}
    names, failed = readable(names)
    names = missing(out, names, ct_of) if args.resume else names
    if not names:
        return print(f"{out}: nothing is missing")
    check_free(out, names, WRITTEN, args.overwrite)

    if not args.slab:                                    # faster; with --slab memory matters more
        keep_memory(room=8e9)
    stages = load(args)
    s, grid, channels = settings(args, stages), *(stages["low"][1][k] for k in ("grid", "channels"))
    full = SCALE * grid
    low_net, sr_net = (stages[kind][0] if kind in stages else None for kind in ("low", "sr"))
    for net, _ in stages.values():
        ready(net, s, Block)
    print(f"model {args.model} on {args.device} in {'bfloat16' if s['amp'] else 'float32'}: {grid}^3"
          + (f" -> {full}^3" if sr_net else ""))
    thread = ThreadPoolExecutor(1)                       # reads texts beside masks, saves a sample beside the next
    contexts = thread.submit(read_texts, args, [text for _, text, _ in names], *stages["low"])
    saved = thread.submit(pyplot)                        # an import, which is not then waited for

    def make(batch):
        nonlocal low_net
        if low_net.out.weight.is_meta:                   # `generate` dropped its weights
            low_net = load(args)["low"][0]
            ready(low_net, s, Block)
        told = [contexts.result()[text] for _, text, _ in batch]         # all have a text, or none
        return generate(low_net, sr_net, grid, [seed for *_, seed in batch], s,
                        None if told[0] is None else torch.cat(told), known, fixed)

    for ct, group in groupby(names, lambda n: ct_of[n[0]]):
        try:
            paths = {"ct": ct} if ct else paths
            known, fixed, center = anatomy(paths, channels, full, args.center, args.as_is)
        except ValueError as e:
            if len(set(cts)) == 1:
                raise
            failed.append(e)                             # the other CTs are segmented all the same
            continue
        known = None if known is None else known.to(args.device)
        affine = grid_affine(full, center)
        if not sr_net:                                   # voxel i of 64^3 is voxel 4 i of 256^3, not the middle of four
            affine = affine * ([SCALE] * 3 + [1])
        fixes = f"fixed: {', '.join(channels[c] for c in fixed)}" if fixed else "nothing fixed"
        for (name, text, seed), x, seconds in batches(list(group), args.batch, args.device, make):
            if not torch.isfinite(x).all():              # the others are made all the same
                failed.append(f"seed {seed}: the sample is not finite; try --no-amp")
                continue
            about = dict(caption=f"{Path(args.model).name} weights, seed {seed}, {fixes}", text=text, seed=seed,
                         ct=ct and str(ct), sampling=s, center_ras_mm=list(center), arguments=vars(args),
                         seconds=round(seconds, 1), torch=torch.__version__,
                         weights={kind: about for kind, (_, about) in stages.items()})
            saved.result()                               # of the sample before: one at a time
            saved = thread.submit(write, out / name, x, channels, affine, about, args.overwrite,
                                  args.grid and next(iter(paths.values())))
    saved.result()
    if args.ct and stages["low"][1].get("source") == ["phantom"]:
        say(f"warning: {args.model} saw phantoms alone: its masks of a patient's CT are not to be relied on")
    edge, written = full if sr_net else grid, [out / name for name, _, _ in names if (out / name).exists()]
    voxel = " x ".join(f"{f / edge:.3f}" for f in FOV[::-1])
    print(f"wrote {len(written)} sample(s) of {edge}^3 voxels, {voxel} mm (x,y,z), to "
          f"{', '.join(map(str, written[:3])) or 'nowhere'}{' ...' if len(written) > 3 else ''}"
          f"{f'; look: python view.py {written[0]}' if written else ''}")
    if failed:
        raise RuntimeError(f"{len(failed)} sample(s) not made: {'; '.join(map(str, dict.fromkeys(failed)))}; --resume "
                           "makes these alone")


def write(folder, x, channels, affine, about, overwrite, like=None):
    """x, (C,D,H,W) in [-1,1] -> a folder that appears whole: NIfTI (on the grid of `like`), preview, sample.json."""
    with whole_folder(folder, overwrite) as part:
        volumes = {name: partial(decode, name, v) for name, v in zip(channels, x.numpy())}
        with saving(part, volumes, affine, like):        # gzip leaves Python to the picture
            picture(part / "preview.png", [x.numpy()], [folder.name], about["caption"], FOV, channels)
        (part / "sample.json").write_text(json.dumps(about, indent=1) + "\n")
        if about["arguments"]["view"]:
            import view
            view.write(part / "view.html", [part], [folder.name])


def main(argv=None):
    p = Parser(description=__doc__)
    add = p.add_argument_group("what to make").add_argument
    add("--report", action="append", metavar="FILE", help="a report, a folder, a table (.csv, .jsonl); repeatable")
    add("--prompt", help="a text on the command line instead")
    add("--samples", type=int, default=1, help="how many of each report; seeds count up (default 1)")
    add("--seed", type=int, default=0, help="decides all noise (default 0)")
    add("--stop-at-low", action="store_true", help="write stage 1's low-resolution volume (sec. 4.2.1)")
    add = p.add_argument_group("anatomy to keep (sec. 4.4), any size and orientation").add_argument
    for c in MASKS:
        add(f"--{c}", metavar="NIFTI", help=f"{c} mask to keep")
    add("--ct", nargs="+", metavar="NIFTI", help="CTs to segment, or folders of them: masks come out (table 5)")
    add("--center", type=float, nargs=3, metavar=("X", "Y", "Z"),
        help="centre of the field of view, world mm; default the lungs' (lobe mask or CT), else the first volume's")
    add("--as-is", action="store_true", help="take masks that do not look like a chest's, with a warning")
    add = p.add_argument_group("sampling (default: as the weights' sampling.json says, else as here)").add_argument
    add("--guidance", type=float, help="1 none (the paper), 2 (default; released previews), 3 (released, anatomy)")
    add("--low-steps", type=int, help="DDIM steps of stage 1 (default 50, sec. 4.2), two calls each with guidance")
    add("--sr-steps", type=int, help="DDIM steps of stage 2 (default 20, sec. 4.2), one call each")
    add("--plain", action="store_true", help="the paper's: 50 and 20 steps of DDIM, no guidance, nothing of beyond/")
    if beyond("sampling"):
        beyond("sampling").options(p)
    add = p.add_argument_group("weights").add_argument
    add("--model", default=DEMO, help="folder of weights (default checkpoints/demo-256; checkpoints/demo makes 128^3)")
    add("--text", help="text encoder: folder or hub name (default MODEL/text, else CXR-BERT)")
    add = p.add_argument_group("output").add_argument
    add("--out", default="out", help="samples appear in OUT/<name>/ (default out)")
    add("--view", action="store_true", help="write view.html too, to look at in a browser")
    add("--overwrite", action="store_true", help="replace samples of the same name")
    add("--resume", action="store_true", help="make those that are missing")
    add("--grid", choices=("like", "native"), help="write on the grid of the given mask or CT, not on the model's")
    add = p.add_argument_group("machine").add_argument
    add("--device", help="cuda or cpu; default whichever is there")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16; default on new GPUs, and on CPUs quicker in it")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the networks' Blocks; default on a GPU")
    add("--batch", default="auto", help="samples at a time; default auto: one on a CPU, what fits on a GPU")
    add("--slab", type=int, nargs="?", const=16, default=0, metavar="SLICES",
        help="work so many slices at a time (16): less memory, same result (default 0: whole volumes)")
    args = p.parse_args(argv)
    with exits():
        check_center(args.center)
        check_sampling(vars(args))
        sample(args)


if __name__ == "__main__":
    main()
