"""Speed and memory of everything that costs time, beside the same network written the plain way (reference.py) and,
where installed, MONAI's.

    python benchmarks/bench.py                       # GPU: the paper's sizes; CPU: width 32 and 16, half an hour
    python benchmarks/bench.py --quick               # some ten minutes
    python benchmarks/bench.py --json > bench.jsonl  # one line a case

Every figure is the median of --repeats runs in which all forms take turns, so that a busy machine slows all of them
alike; compare the ratios. Memory is the peak above the process's own (weights, gradients and activations):
torch.cuda's count, or on a CPU the resident set, for which each form has a process of its own there. Ours keeps freed
memory as the scripts do (cli.keep_memory), the others as the system does by itself; "reference kept" is the reference
with our way. TFLOP are counted from shapes; the ceiling is a large bf16 matrix product on the same device.
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

sys.path.insert(0, str(Path(__file__).parent.parent))            # the repository's root: its scripts are the modules
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from beyond.nets import Extended
from data import SCALE, Cases
from reference import Reference
from sample import generate
from support.cli import Parser, exits, fast_bfloat16, keep_memory
from support.fast import compile_blocks, recompute
from support.sampling import ready, wanted
from support.slabs import by_slabs
from unet3d import Block, Round, UNet3D

STAGES = {"G": dict(heads=8), "H": dict(in_channels=8, heads=4, rounds=1, context_dim=0)}
WIDTHS = {"cuda": (160, 56), "cpu": (32, 16)}                     # of G and H; the paper's are the first
# Widths, low-resolution grid and levels of a whole sampling: the paper's, and the demo's.
WHOLE = {"cuda": (160, 56, 64, 4), "cpu": (16, 16, 32, 3)}
CASES = {                                                         # name: stage, (B,D,H,W), how it runs, in --quick
    "G_32_forward": ("G", (1, 32, 32, 32), "forward", True),
    "G_32_step": ("G", (1, 32, 32, 32), "step", True),
    "G_64_forward": ("G", (1, 64, 64, 64), "forward", True),
    "G_64_guided": ("G", (2, 64, 64, 64), "forward", False),
    "G_64_step": ("G", (1, 64, 64, 64), "step", True),
    "G_64_step_4": ("G", (4, 64, 64, 64), "step", False),
    "G_64_step_8": ("G", (8, 64, 64, 64), "step", False),
    "H_crop_step": ("H", (1, 256, 72, 72), "step", True),
    "H_crop_step_4": ("H", (4, 256, 72, 72), "step", False),
    "H_64x128x128_forward": ("H", (1, 64, 128, 128), "forward", False),
    "H_128_forward": ("H", (1, 128, 128, 128), "forward", True),
    "H_256_forward": ("H", (1, 256, 256, 256), "forward", False),
    "H_256_forward_slab": ("H", (1, 256, 256, 256), "slab", False),
    "H_256_step": ("H", (1, 256, 256, 256), "step", False)}
OTHERS = ("sampling", "text_encoder", "loader")
# On a CPU: minutes a run, or more memory than there is.
GPU_ONLY = {"G_64_guided", "G_64_step_4", "G_64_step_8", "H_crop_step_4", "H_256_step"}
FORMS = ["ours", "ours float32", "ours compiled", "ours blocks", "ours light", "reference", "reference kept",
         "reference autocast", "MONAI"]
NOT_LEAN = [f for f in FORMS if f not in ("ours", "ours light", "reference autocast")]    # not where memory is short
UNFIT = {"H_256_step": [f for f in FORMS if f not in ("ours", "ours light")],  # references: 269 GiB; ours float32: 99
         "G_64_step_4": NOT_LEAN, "G_64_step_8": NOT_LEAN, "H_crop_step_4": ["ours light", *NOT_LEAN],
         # light's sizes are multiples of 16; with both references 24 GB do not suffice
         "H_crop_step": ["ours light", "reference kept"]}


# --- a case in a form ---

def network(case, form, width, device):
    """-> network, whether it runs under bf16 autocast; ours as train_low.py or sample.py has it"""
    stage, _, mode, _ = CASES[case]
    torch.manual_seed(0)
    if form == "MONAI":
        return monai(stage, width).to(device), device == "cuda"
    net = Extended(width, patch=2, **STAGES[stage]) if form == "ours light" else UNet3D(width, **STAGES[stage])
    if form.startswith("reference"):
        return Reference(net).to(device), "autocast" in form

    amp = form != "ours float32" and fast_bfloat16(device)
    compiled = form == "ours compiled" or device == "cuda" and form in ("ours", "ours light")
    if mode != "step":
        ready(net, dict(device=device, amp=amp, slab=16 if mode == "slab" else 0, compile=compiled), Block)
        return net, amp
    net.to(device)
    how = "blocks" if case == "H_256_step" or form == "ours blocks" else "norms"
    if compiled:
        compile_blocks(net, Block)
    if not (compiled and how == "norms"):
        recompute(net, how, Block, (Round,))
    return net, amp


def monai(stage, width):
    """MONAI's network with as many parameters as ours, nearly."""
    from monai.networks.nets import DiffusionModelUNet
    c, text = max(8, width * 4 // 5 // 8 * 8), stage == "G"
    return DiffusionModelUNet(3, 4 if text else 8, 4, channels=(c, 2 * c, 4 * c, 8 * c), num_res_blocks=2,
                              attention_levels=(False, False, False, text), num_head_channels=32, norm_num_groups=8,
                              with_conditioning=text, cross_attention_dim=768 if text else None)


def job(case, form, width, device):
    """-> a function that runs the case once"""
    stage, shape, mode, _ = CASES[case]
    net, amp = network(case, form, width, device)
    g = torch.Generator().manual_seed(1)
    xt = torch.randn(shape[0], 4 if stage == "G" else 8, *shape[1:], generator=g).to(device)
    t = torch.full(shape[:1], 500.0 if form == "MONAI" else 0.5, device=device)
    context = torch.randn(shape[0], 192, 768, generator=g).to(device) if stage == "G" else None
    opt = torch.optim.AdamW(net.parameters(), fused=True) if mode == "step" else None
    net.train(mode == "step")

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            if mode != "step":
                with torch.no_grad():
                    return net(xt, t, context)
            value = net(xt, t, context).float().square().mean()
        value.backward()
        opt.step()
        opt.zero_grad()
    return run


# --- seconds and memory ---

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
    gc.collect()                                         # compiled Blocks are cycles: those before may still be there
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run = job(case, form, width, "cuda")
    run()                                                # compiles, chooses algorithms, fills caches
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6

    def again():
        run()                                            # takes back the memory that the form before has freed
        return clock(run, "cuda")
    return again, peak


def on_cpu(case, form, width):
    """The same, in a process of its own (`serve`) that runs the case whenever it is sent a line."""
    child = subprocess.Popen([sys.executable, __file__, "--serve", case, form, str(width)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)

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
    with FakeTensorMode():                               # shapes without numbers
        net = UNet3D(width, **STAGES[stage])
        xt, t = torch.randn(shape[0], net.args["in_channels"], *shape[1:]), torch.rand(shape[0])
        context = torch.randn(shape[0], 192, 768) if stage == "G" else None
        with FlopCounterMode(display=False) as counter:
            y = net(xt, t, context)
            if mode == "step":
                y.sum().backward()
    return counter.get_total_flops() / 1e12


def ceiling(device):
    """TFLOP/s of a matrix product, best of 5, in bf16, but in float32 where the device would emulate that."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if fast_bfloat16(device) else torch.float32)
    return 2 * n**3 / best_of_5(lambda: a @ b, device) / 1e12


def best_of_5(run, device):
    run()
    return min(clock(run, device) for _ in range(5))


def measure(case, forms, width, device, repeats):
    """-> {form: (median seconds, peak MB)}"""
    torch._dynamo.reset()                                # its limit on compiled versions counts those before too
    runs = {}
    for form in forms:
        try:
            runs[form] = (on_gpu if device == "cuda" else on_cpu)(case, form, width)
        except torch.OutOfMemoryError:                   # of a GPU; the other forms still count
            print(f"{case}, {form}: does not fit", file=sys.stderr)
    seconds = {form: [] for form in runs}
    for _ in range(repeats):
        for form, (run, _) in list(runs.items()):
            try:
                seconds[form].append(run())
            except torch.OutOfMemoryError:               # fits alone, not beside the others
                others = ", ".join(f for f in runs if f != form)
                print(f"{case}, {form}: does not fit beside {others}; run it with --forms {form!r}", file=sys.stderr)
                del runs[form]
    return {form: (statistics.median(seconds[form]), peak) for form, (_, peak) in runs.items()}  # processes end here


# --- what is not a network call ---

def sampling(device, repeats):
    """A whole volume as sample.py makes it, from random weights.   -> {case: (seconds or None, peak MB or None)}
    of ours with either solver, and in the calls of students (beyond/distill.py); with one stage at a time on the GPU,
    as on cards of less than 16 GB, and in slabs (their peaks only); and, "reference", ten times the plain form with a
    tenth of the paper's 50 + 20 steps"""
    dim, sr_dim, grid, levels = WHOLE[device]
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    nets = [UNet3D(dim, levels=levels, **STAGES["G"]), UNet3D(sr_dim, levels=levels, **STAGES["H"])]
    plain = [Reference(net).eval() for net in nets]      # on the CPU but at its turn
    context = torch.randn(1, 192, 768, device=device)
    usual = dict(device=device, amp=fast_bfloat16(device), compile=device == "cuda", slab=0)
    for net in nets:
        ready(net, usual, Block)
    cases = {"sampling_50_20": (50, 20, "ddim", 2), "sampling_dpm_20_10": (20, 10, "dpm", 2),
             "sampling_student_4_2": (4, 2, "ddim", 1), "reference": (5, 2, "ddim", 2),
             "sampling_one_stage": (50, 20, "ddim", 2), "sampling_slab": (50, 20, "ddim", 2)}
    peak_only, peaks = ("sampling_one_stage", "sampling_slab"), {}

    def run(case, steps=()):
        low_steps, sr_steps, solver, guidance = (*steps, *cases[case][len(steps):])
        s = usual | dict(low_steps=low_steps, sr_steps=sr_steps, solver=solver, guidance=float(guidance),
                         beyond=wanted(dict(solver=solver)), one_stage=case in peak_only)
        mine, s = (plain, s | dict(amp=False)) if case == "reference" else (nets, s)
        generate(*mine, grid, [0], s, context)

    def find_peak(case):
        run(case, (2, 2))                                # compiles; what is held does not grow with the steps
        torch.cuda.reset_peak_memory_stats()
        run(case, (2, 2))
        peaks[case] = torch.cuda.max_memory_allocated() / 1e6

    if device == "cuda":
        for case in ("sampling_50_20", "sampling_dpm_20_10", "sampling_student_4_2", "sampling_one_stage"):
            find_peak(case)
        for net in (*nets, *plain):
            net.to(device)
        run("reference", (1, 1))                         # chooses algorithms
    seconds = {case: [] for case in cases if case not in peak_only}
    for _ in range(repeats):
        for case, found in seconds.items():
            began = clock(lambda case=case: run(case), device)
            found.append(10 * began if case == "reference" else began)
    if device == "cuda":                                 # last: networks stay in slabs
        for net in plain:
            net.to("cpu")
        for net in nets:
            by_slabs(net, 16, Block)
        find_peak("sampling_slab")
    medians = {case: statistics.median(found) for case, found in seconds.items()}
    return {case: (medians.get(case), peaks.get(case)) for case in cases}


def text_tokens(device):
    """Tokens of reports per second through a BERT of the paper's size, random weights."""
    from transformers import BertConfig, BertModel
    bert = BertModel(BertConfig(), add_pooling_layer=False).eval().to(device)
    ids = torch.randint(1000, 30000, (8, 192), device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        return ids.numel() / best_of_5(lambda: bert(input_ids=ids), device)


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
        numbers, dataset = [[2 * i, 2 * i + 1] for i in range(136)], Cases(sorted(Path(folder).iterdir()), 0, crop)
        loader = iter(DataLoader(dataset, batch_sampler=numbers, num_workers=workers))
        for _ in range(8):                               # workers have started, the disk's cache is warm
            next(loader)
        began = time.perf_counter()
        return sum(len(batch[0]) for batch in loader) / (time.perf_counter() - began)


# --- the table ---

def say(args, **row):
    if args.json:
        print(json.dumps(row), flush=True)
        return
    others = row.get("others", {}).items()
    columns = [("seconds", "9.3f", " s"), ("reference_seconds", "9.3f", " s"), ("ratio", "7.2f", "x"),
               ("peak_mb", "9.0f", " MB"), ("reference_peak_mb", "9.0f", " MB"), ("tflops", "8.2f", " TFLOP/s"),
               ("share", "6.0%", "   ")]
    numbers = ("" if row.get(k) is None else format(row[k], form) for k, form, _ in columns)
    print(f"{row['case']:22}" + "".join(n + unit for n, (*_, unit) in zip(numbers, columns))
          + "  ".join(f"{name} {v['seconds']:.3g} s, {v['peak_mb']:.0f} MB" for name, v in others)
          + row.get("note", ""), flush=True)


def compare(args, **row):
    """A line with what `seconds` are beside the reference's."""
    seconds, plain = row["seconds"], row["reference_seconds"]
    say(args, **row, ratio=plain and seconds and plain / seconds)


def bench(args):
    device, widths = args.device, dict(zip("GH", WIDTHS[args.device]))
    torch.backends.cudnn.benchmark = True                # as the trainers have it
    top = ceiling(device)
    absent = {"ours compiled", "reference kept"} if device == "cuda" else set()
    if importlib.util.find_spec("monai") is None:
        absent.add("MONAI")
    forms = [f for f in FORMS if f in args.forms and f not in absent]
    print(f"{name_of(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, ceiling {top:.2f} "
          f"TFLOP/s, widths G {widths['G']}, H {widths['H']}, {args.repeats} repeats, float32 as TF32 in products "
          f"{torch.backends.cuda.matmul.allow_tf32}, in convolutions {torch.backends.cudnn.allow_tf32}",
          file=sys.stderr)
    for case, (stage, _, mode, quick) in CASES.items():
        if args.only and case not in args.only or args.quick and not quick or case in GPU_ONLY and device == "cpu":
            continue
        unfit = {*UNFIT.get(case, []), "ours light" if stage == "G" else "MONAI", *["ours blocks"] * (mode != "step")}
        found = measure(case, [f for f in forms if f not in unfit], widths[stage], device, args.repeats)
        (seconds, peak), (plain, plain_peak) = (found.get(form, (None, None)) for form in ("ours", "reference"))
        work = tflop(case, widths[stage])
        others = {f: dict(seconds=s, peak_mb=p) for f, (s, p) in found.items() if f not in ("ours", "reference")}
        compare(args, case=case, seconds=seconds, reference_seconds=plain, peak_mb=peak, reference_peak_mb=plain_peak,
                tflop=work, tflops=seconds and work / seconds, share=seconds and work / seconds / top, others=others)

    def want(name):
        return name in args.only if args.only else not args.quick

    if want("sampling"):
        found = sampling(device, args.repeats)
        plain, plain_peak = found.pop("reference")
        for case, (seconds, peak) in found.items():
            if seconds or peak:
                compare(args, case=case, seconds=seconds, reference_seconds=plain, peak_mb=peak,
                        reference_peak_mb=plain_peak)
    if want("text_encoder"):
        rate = text_tokens(device)
        say(args, case="text_encoder", tokens_per_s=rate, note=f"   {rate:.0f} tokens/s")
    if want("loader"):
        grid, crop, workers = (256, (256, 72, 72), 4) if device == "cuda" else (128, (64, 48, 48), 1)
        for case, its_crop in (("loader_low", None), ("loader_sr", crop)):
            rate = loader_cases(its_crop, grid, workers)
            say(args, case=case, cases_per_s=rate, note=f"   {rate:.0f} cases/s")


def name_of(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU").strip()


def main(argv=None):
    p, there, names = Parser(description=__doc__), torch.cuda.is_available(), ", ".join([*CASES, *OTHERS])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if there else "cpu")
    p.add_argument("--quick", action="store_true", help="fewer cases and forms")
    p.add_argument("--json", action="store_true", help="one JSON object a case on stdout")
    p.add_argument("--repeats", type=int, default=5, help="runs of each form, interleaved")
    p.add_argument("--only", nargs="+", metavar="CASE", help=f"some of {names}")
    p.add_argument("--forms", nargs="+", choices=FORMS,
                   help="which forms run beside `ours` (default all; --quick: float32 and the reference)")
    p.add_argument("--serve", nargs=3, metavar=("CASE", "FORM", "WIDTH"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    with exits():
        if args.serve:
            return serve(*args.serve[:2], int(args.serve[2]))
        unknown = set(args.only or []) - {*CASES, *OTHERS}
        if unknown:
            raise ValueError(f"--only {' '.join(sorted(unknown))}; cases are {names}; choose of these")
        if args.repeats < 1:
            raise ValueError(f"--repeats {args.repeats}; at least 1 is needed; 5 is usual")
        keep_memory()
        args.forms = ["ours", *(args.forms or (["ours float32", "reference"] if args.quick else FORMS[1:]))]
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))   # for the processes that measure memory
        bench(args)


if __name__ == "__main__":
    main()
