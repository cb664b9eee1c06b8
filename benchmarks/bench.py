"""Speed and memory of everything that costs time, beside the same network written the plain way (reference.py) and, where installed, MONAI's.

    python benchmarks/bench.py                       # GPU: the paper's sizes; CPU: width 32 and 16, about half an hour on two cores
    python benchmarks/bench.py --quick               # some ten minutes
    python benchmarks/bench.py --json > bench.jsonl  # one line a case

Every figure is the median of --repeats runs in which all forms take turns, so that a busy machine slows all of them alike; compare the
ratios. Memory is the peak above the process's own (weights, gradients and activations): torch.cuda's count, or on a CPU the resident set,
for which each form has a process of its own there. Ours keeps freed memory as the scripts do (data.keep_memory), the others as the system
does by itself; "reference kept" is the reference with our way. TFLOP are counted from shapes; the ceiling is a large bf16 matrix product on the same device.
"""
import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))                     # the repository's root: its scripts are the modules
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from data import SCALE, Cases, exits, fast_bfloat16, keep_memory
from reference import Reference
from sample import generate, place
from unet3d import UNet3D

STAGES = {"G": dict(heads=8), "H": dict(in_channels=8, heads=4, rounds=1, context_dim=0)}
WIDTHS = {"cuda": (160, 56), "cpu": (32, 16)}                             # of G and H; the paper's are the first
WHOLE = {"cuda": (160, 56, 64, 4), "cpu": (16, 16, 32, 3)}                # widths, low-resolution grid and levels of a whole sampling: the paper's, and the demo's
CASES = {                                                                 # name: stage, (B,D,H,W), step or forward, in --quick
    "G_32_forward": ("G", (1, 32, 32, 32), "forward", True), "G_32_step": ("G", (1, 32, 32, 32), "step", True),
    "G_64_forward": ("G", (1, 64, 64, 64), "forward", True), "G_64_guided": ("G", (2, 64, 64, 64), "forward", False), "G_64_step": ("G", (1, 64, 64, 64), "step", True),
    "G_64_step_4": ("G", (4, 64, 64, 64), "step", False), "G_64_step_8": ("G", (8, 64, 64, 64), "step", False),
    "H_crop_step": ("H", (1, 256, 72, 72), "step", True), "H_crop_step_4": ("H", (4, 256, 72, 72), "step", False), "H_64x128x128_forward": ("H", (1, 64, 128, 128), "forward", False),
    "H_128_forward": ("H", (1, 128, 128, 128), "forward", True), "H_256_forward": ("H", (1, 256, 256, 256), "forward", False),
    "H_256_forward_slab": ("H", (1, 256, 256, 256), "slab", False), "H_256_step": ("H", (1, 256, 256, 256), "step", False)}
GPU_ONLY = {"G_64_guided", "G_64_step_4", "G_64_step_8", "H_crop_step_4", "H_256_step"}      # minutes a run, or more memory than there is, on a CPU
FORMS = ["ours", "ours float32", "ours compiled", "ours blocks", "ours light", "reference", "reference kept", "reference autocast", "MONAI"]
LEAN = ["ours", "ours light", "reference autocast"]                       # what is compared where forms take turns in little memory
UNFIT = {"H_256_step": [f for f in FORMS if f not in ("ours", "ours light")],          # the references need 269 GiB, ours in float32 99 GB
         "G_64_step_4": [f for f in FORMS if f not in LEAN], "G_64_step_8": [f for f in FORMS if f not in LEAN], "H_crop_step_4": ["ours light", *(f for f in FORMS if f not in LEAN)],
         "H_crop_step": ["ours light", "reference kept"]}                 # light's sizes are multiples of 16; with both references 24 GB do not suffice


def network(case, form, width, device):
    """-> network, whether it runs under bf16 autocast; ours as train_low.py or sample.py has it"""
    stage, _, mode, _ = CASES[case]
    text = STAGES[stage]
    torch.manual_seed(0)
    if form == "MONAI":
        from monai.networks.nets import DiffusionModelUNet
        c = max(8, width * 4 // 5 // 8 * 8)                               # as many parameters as ours, nearly
        net = DiffusionModelUNet(3, text.get("in_channels", 4), 4, channels=(c, 2 * c, 4 * c, 8 * c), attention_levels=(False, False, False, stage == "G"),
                                 num_res_blocks=2, num_head_channels=32, norm_num_groups=8, with_conditioning=stage == "G",
                                 cross_attention_dim=768 if stage == "G" else None)
        return net.to(device), device == "cuda"
    net = UNet3D(width, **text, patch=2 if form == "ours light" else 1, checkpointing="blocks" if case == "H_256_step" or form == "ours blocks" else "norms" if form.startswith("ours") else "none")
    if form.startswith("reference"):
        return Reference(net).to(device), "autocast" in form
    amp, compiled = form != "ours float32" and fast_bfloat16(device), form == "ours compiled" or device == "cuda" and form in ("ours", "ours light")
    if mode != "step":
        place(net, device, SimpleNamespace(slab=16 if mode == "slab" else 0, amp=amp, compile=compiled))
    elif compiled:
        net.to(device).compile_blocks()
    return net.to(device), amp


def job(case, form, width, device):
    """-> a function that runs the case once"""
    stage, shape, mode, _ = CASES[case]
    net, amp = network(case, form, width, device)
    g = torch.Generator().manual_seed(1)
    xt = torch.randn(shape[0], 4 if stage == "G" else 8, *shape[1:], generator=g).to(device)
    t, context = torch.full(shape[:1], 0.5, device=device), torch.randn(shape[0], 192, 768, generator=g).to(device) if stage == "G" else None
    call = lambda: net(xt, 1000 * t, context) if form == "MONAI" else net(xt, t, context)
    opt = torch.optim.AdamW(net.parameters(), fused=True) if mode == "step" else None
    net.train(mode == "step")

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            if mode != "step":
                with torch.no_grad():
                    return call()
            value = call().float().square().mean()
        value.backward()
        opt.step()
        opt.zero_grad()
    return run


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def clock(run, device):
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def resident():
    """This process's resident set now and at its highest, MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return [int(fields[k].split()[0]) / 1000 for k in ("VmRSS", "VmHWM")]


def on_gpu(case, form, width):
    """-> a function that runs the case once and gives its seconds, its peak MB"""
    gc.collect()                                                          # compiled Blocks are cycles: the case before may still be there
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run = job(case, form, width, "cuda")
    run()                                                                 # compiles, chooses algorithms, fills caches
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6

    def again():
        run()                                                             # takes back the memory that the form before has freed
        return clock(run, "cuda")
    return again, peak


def on_cpu(case, form, width):
    """The same, in a process of its own (`serve`) that runs the case whenever it is sent a line."""
    child = subprocess.Popen([sys.executable, __file__, "--serve", case, form, str(width)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer():
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"{case}, {form}: its process ended; the reason stands above")
        return float(line)

    def run():
        child.stdin.write("again\n")
        child.stdin.flush()
        return answer()
    return run, answer()


def serve(case, form, width):
    if form.startswith("ours") and CASES[case][2] != "slab" or "kept" in form:
        keep_memory()
    before = resident()[0]
    run = job(case, form, width, "cpu")
    run()
    print(resident()[1] - before, flush=True)
    for _ in sys.stdin:
        print(clock(run, "cpu"), flush=True)


def tflop(case, width):
    stage, shape, mode, _ = CASES[case]
    with FakeTensorMode():                                                # shapes without numbers
        net = UNet3D(width, **STAGES[stage])
        xt, t, context = torch.randn(shape[0], net.args["in_channels"], *shape[1:]), torch.rand(shape[0]), torch.randn(shape[0], 192, 768) if stage == "G" else None
        with FlopCounterMode(display=False) as counter:
            y = net(xt, t, context)
            if mode == "step":
                y.sum().backward()
    return counter.get_total_flops() / 1e12


def ceiling(device):
    """TFLOP/s of a bf16 matrix product, best of 5."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    run = lambda: a @ b
    run()
    return 2 * n**3 / min(clock(run, device) for _ in range(5)) / 1e12


def measure(case, forms, width, device, repeats):
    """-> {form: (median seconds, peak MB)}"""
    torch._dynamo.reset()                                                 # its limit on compiled versions counts those of the cases before too
    ready = {}
    for form in forms:
        try:
            ready[form] = (on_gpu if device == "cuda" else on_cpu)(case, form, width)
        except torch.OutOfMemoryError:                                    # of a GPU; the other forms still count
            print(f"{case}, {form}: does not fit", file=sys.stderr)
    seconds = {form: [] for form in ready}
    for _ in range(repeats):
        for form, (run, _) in list(ready.items()):
            try:
                seconds[form].append(run())
            except torch.OutOfMemoryError:                                # fits alone, not beside the others
                print(f"{case}, {form}: does not fit beside {', '.join(f for f in ready if f != form)}; run it with --forms {form!r}", file=sys.stderr)
                del ready[form]
    return {form: (statistics.median(seconds[form]), peak) for form, (_, peak) in ready.items()}     # and the processes end with their pipes


# --- what is not a network call ---

def sampling(device, repeats):
    """A whole volume as sample.py makes it, from random weights.   -> {case: (seconds or None, peak MB or None)}
    of ours with either solver; with one stage at a time on the GPU, as on cards of less than 16 GB, and in slabs (their peaks only); and, "reference", ten times
    the plain form with a tenth of the paper's 50 + 20 steps"""
    dim, sr_dim, grid, levels = WHOLE[device]
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    nets = [UNet3D(dim, levels=levels, **STAGES["G"]), UNet3D(sr_dim, levels=levels, **STAGES["H"])]
    plain = [Reference(net).eval() for net in nets]                       # stays on the CPU until its turn
    context = torch.randn(1, 192, 768, device=device)
    usual = dict(device=device, amp=fast_bfloat16(device), compile=device == "cuda", slab=0, one_stage=False, guidance=2.0, guidance_interval=(0.0, 1.0), agree=False, tidy=False,
                 clean=dict(low=False, sr=False))
    for net in nets:
        place(net, device, SimpleNamespace(**usual))
    cases = {"sampling_50_20": (50, 20, "ddim"), "sampling_dpm_20_10": (20, 10, "dpm"), "sampling_one_stage": (50, 20, "ddim"), "sampling_slab": (50, 20, "ddim"), "reference": (5, 2, "ddim")}
    seconds, peaks = {case: [] for case in cases}, {}

    def run(case, steps=()):
        low_steps, sr_steps, solver = (*steps, *cases[case][len(steps):])
        mine, amp = (plain, False) if case == "reference" else (nets, usual["amp"])
        for net in nets:
            net.slab = 16 if case == "sampling_slab" else 0
        how = usual | dict(amp=amp, one_stage=case in ("sampling_one_stage", "sampling_slab"), low_steps=low_steps, sr_steps=sr_steps, solver=solver)
        generate(*mine, 0, grid, SimpleNamespace(**how), context, None, [])

    if device == "cuda":
        for case in list(cases)[:-1]:
            run(case, (2, 2))                                             # compiles; what is held does not grow with the steps
            torch.cuda.reset_peak_memory_stats()
            run(case, (2, 2))
            peaks[case] = torch.cuda.max_memory_allocated() / 1e6
        for net in (*nets, *plain):
            net.to(device)
        run("reference", (1, 1))                                          # chooses algorithms
    for _ in range(repeats):
        for case in cases:
            if case not in ("sampling_one_stage", "sampling_slab"):
                seconds[case].append(clock(lambda: run(case), device))
    seconds["reference"] = [10 * s for s in seconds["reference"]]
    return {case: (statistics.median(seconds[case]) if seconds[case] else None, peaks.get(case)) for case in cases}


def text_tokens(device):
    """Tokens of reports per second through a BERT of the paper's size, random weights."""
    from transformers import BertConfig, BertModel
    bert = BertModel(BertConfig(), add_pooling_layer=False).eval().to(device)
    ids = torch.randint(1000, 30000, (8, 192), device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        run = lambda: bert(input_ids=ids)
        run()
        return ids.numel() / min(clock(run, device) for _ in range(5))


def loader_cases(crop, grid, workers):
    """Cases per second from the trainers' loader, as it feeds them; 16 cases of noise on disk."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(16):
            case = Path(folder) / f"case{i}"
            case.mkdir()
            for name, dtype in dict(ct=np.int16, lobe=np.uint8, airway=np.uint8, vessel=np.uint8).items():
                np.save(case / f"{name}.npy", np.random.default_rng(i).integers(0, 2, (grid,) * 3, dtype=dtype))
            np.save(case / "low.npy", np.zeros((4,) + (grid // SCALE,) * 3, np.float16))
            np.save(case / "text.npy", np.zeros((192, 768), np.float16))
        numbers = [[2 * i, 2 * i + 1] for i in range(136)]
        loader = iter(DataLoader(Cases(sorted(Path(folder).iterdir()), 0, crop), batch_sampler=numbers, num_workers=workers))
        for _ in range(8):                                                # workers have started, the disk's cache is warm
            next(loader)
        began = time.perf_counter()
        return sum(len(batch[0]) for batch in loader) / (time.perf_counter() - began)


# --- the table ---

def say(args, **row):
    if args.json:
        print(json.dumps(row), flush=True)
        return
    number = lambda v, form: "" if v is None else format(v, form)
    others = "  ".join(f"{name} {v['seconds']:.3g} s, {v['peak_mb']:.0f} MB" for name, v in row.get("others", {}).items())
    print(f"{row['case']:22}{number(row.get('seconds'), '9.3f')} s{number(row.get('reference_seconds'), '9.3f')} s{number(row.get('ratio'), '7.2f')}x"
          f"{number(row.get('peak_mb'), '9.0f')} MB{number(row.get('reference_peak_mb'), '9.0f')} MB{number(row.get('tflops'), '8.2f')} TFLOP/s"
          f"{number(row.get('share'), '6.0%')}   {others}{row.get('note', '')}", flush=True)


def bench(args):
    device = args.device
    torch.backends.cudnn.benchmark = True                                 # as the trainers have it
    top = ceiling(device)
    name = torch.cuda.get_device_name() if device == "cuda" else next((line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU").strip()
    forms = [f for f in FORMS if f in args.forms and not (f in ("ours compiled", "reference kept") and device == "cuda")]
    if importlib.util.find_spec("monai") is None:
        forms = [f for f in forms if f != "MONAI"]
    widths = dict(zip("GH", WIDTHS[device]))
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, ceiling {top:.2f} TFLOP/s, widths G {widths['G']}, H {widths['H']}, "
          f"{args.repeats} repeats, float32 as TF32 in products {torch.backends.cuda.matmul.allow_tf32}, in convolutions {torch.backends.cudnn.allow_tf32}", file=sys.stderr)
    for case, (stage, _, mode, quick) in CASES.items():
        if args.only and case not in args.only or args.quick and not quick or case in GPU_ONLY and device == "cpu":
            continue
        fit = [f for f in forms if f not in UNFIT.get(case, []) and not (f in ("ours light", "MONAI") and (stage == "G") != (f == "MONAI"))
               and not (f == "ours blocks" and mode != "step")]
        found = measure(case, fit, widths[stage], device, args.repeats)
        seconds, peak = found.get("ours", (None, None))
        ref_seconds, ref_peak = found.get("reference", (None, None))
        work = tflop(case, widths[stage])
        say(args, case=case, seconds=seconds, reference_seconds=ref_seconds, ratio=ref_seconds and seconds and ref_seconds / seconds, peak_mb=peak, reference_peak_mb=ref_peak,
            tflop=work, tflops=seconds and work / seconds, share=seconds and work / seconds / top,
            others={f: dict(seconds=s, peak_mb=p) for f, (s, p) in found.items() if f not in ("ours", "reference")})
    wanted = lambda case: case in args.only if args.only else not args.quick
    if wanted("sampling"):
        found = sampling(device, args.repeats)
        ref, ref_peak = found.pop("reference")
        for case, (seconds, peak) in found.items():
            if seconds or peak:
                say(args, case=case, seconds=seconds, reference_seconds=ref, ratio=seconds and ref / seconds, peak_mb=peak, reference_peak_mb=ref_peak)
    if wanted("text_encoder"):
        rate = text_tokens(device)
        say(args, case="text_encoder", tokens_per_s=rate, note=f"   {rate:.0f} tokens/s")
    if wanted("loader"):
        grid = 256 if device == "cuda" else 128
        for case, crop in (("loader_low", None), ("loader_sr", (256, 72, 72) if grid == 256 else (64, 48, 48))):
            rate = loader_cases(crop, grid, 4 if device == "cuda" else 1)
            say(args, case=case, cases_per_s=rate, note=f"   {rate:.0f} cases/s")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--quick", action="store_true", help="fewer cases and forms")
    p.add_argument("--json", action="store_true", help="one JSON object a case on stdout")
    p.add_argument("--repeats", type=int, default=5, help="runs of each form, interleaved")
    p.add_argument("--only", nargs="+", metavar="CASE", help=f"some of {', '.join(CASES)}, sampling, text_encoder, loader")
    p.add_argument("--forms", nargs="+", choices=FORMS, help="which forms run beside `ours` (default all; --quick: float32 and the reference)")
    p.add_argument("--serve", nargs=3, metavar=("CASE", "FORM", "WIDTH"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    with exits():
        if args.serve:
            return serve(*args.serve[:2], int(args.serve[2]))
        unknown = set(args.only or []) - {*CASES, "sampling", "text_encoder", "loader"}
        if unknown:
            raise ValueError(f"--only {' '.join(sorted(unknown))}; cases are {', '.join(CASES)}, sampling, text_encoder, loader; choose of these")
        if args.repeats < 1:
            raise ValueError(f"--repeats {args.repeats}; at least 1 is needed; 5 is usual")
        keep_memory()
        args.forms = ["ours", *(args.forms or (["ours float32", "reference"] if args.quick else FORMS[1:]))]
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))   # the processes that measure memory do as this one
        bench(args)


if __name__ == "__main__":
    main()
