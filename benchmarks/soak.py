"""What survives? Files of every kind are damaged and read as the programs read them; tiny trainings are killed, starved
and disturbed, and must end, after the same command again, with the weights of an undisturbed run, to the bit.

    python benchmarks/soak.py                            # about 20 minutes on two cores, of Linux
    python benchmarks/soak.py --only nii.gz disk         # some of the faults
    python benchmarks/soak.py --only npy --first 17 --n 1      # one mutation: each follows from (seed, its number)

files    bits flipped, bytes of the header (of text: any) overwritten, the file cut short, its end taken from another
         file of its kind. Refused in one line, or read as it was: good. Read as something else cannot be seen in a
         plain .nii, if its shape stays, and in text; elsewhere check sums tell. Wrong are also another exception, a
         process that ends or takes a minute, and 100 MB more memory than the intact files take
runs     train_low.py on phantoms, by 1, 2 and 3 processes. Where the fault has to be said, it is in one line of error
"""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np

from damage import KINDS, TINY, in_children, make, phantoms, same  # puts the root on the path
from support import runs
from support.cli import Parser, exits
from support.files import write_atomic
from support.weights import read_own
from unet3d import UNet3D

ROOT = Path(__file__).parent.parent
OUTCOMES = ("refused", "unchanged", "unseen", "wrong")
STEPS = 8                         # of each training


# --- files ---

def files(kinds, args, folder):
    """-> {kind: its row}"""
    make(folder)

    def row(kind):
        def command(first):
            options = (kind, first, args.first + args.n, args.seed, folder)
            return [*map(str, (sys.executable, ROOT / "benchmarks/damage.py", *options))]

        found = in_children(command, args.first, args.n)
        how = Counter(f"{x.get('how')}: {x['outcome']}" for x in found)
        return dict(count(f"`{kind}` damaged", found), how=how,
                    again=f"--only {kind} --n {args.n} --first {args.first} --seed {args.seed}")

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(kinds, pool.map(row, kinds)))


def count(fault, found):
    """A row of outcomes."""
    seen = Counter(word for x in found for word in x["outcome"].split())
    return dict(fault=fault, n=len(found), **{name: seen[name] for name in OUTCOMES},
                details=[x for x in found if x["outcome"] == "wrong" or x.get("note")])


# --- runs: begun, disturbed, begun again ---

class Wrong(Exception):
    """What must not be."""


def must(right, why):
    if not right:
        raise Wrong(why)


class Training:
    """A tiny training by `world` processes in a folder of its own."""

    def __init__(self, data, out, world, every=1):
        self.out, self.world, self.log, self.note = out, world, out.with_suffix(".log"), ""
        self.every = every
        self.options = [*TINY, "--data", data, "--out", out, "--steps", STEPS, "--save-every", every]

    def command(self, *more, script="train_low.py", launch=()):
        launch = launch or ("--standalone", f"--nproc_per_node={self.world}")
        launch = ("-m", "torch.distributed.run", *launch) if self.world > 1 else ()
        return [*map(str, (sys.executable, *launch, script, *self.options, *more))]

    def start(self, command=None, log=None, **env):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
        with open(log or self.log, "w") as f:
            return subprocess.Popen(command or self.command(), cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)

    def said(self, word, log=None):
        """Its lines that begin with a word."""
        text = (log or self.log).read_text(errors="replace").replace("\r", "\n")
        return [line for line in text.splitlines() if line.startswith(word)]

    def processes(self):
        """-> {pid: environment} of all that have this folder on their command line; torchrun's workers are in sessions
        of their own, so that its process group is not all"""
        found = {}
        for p in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):           # it ended
                if os.fsencode(self.out) in (p / "cmdline").read_bytes().split(b"\0"):
                    pairs = (p / "environ").read_text(errors="replace").split("\0")
                    found[int(p.name)] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return found

    def kill(self, **env):
        """-9 to all of them, or to those with this in their environment."""
        while pids := [pid for pid, its in self.processes().items() if env.items() <= its.items()]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def wait(self, job, seconds=120):
        """-> exit code"""
        try:
            return job.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Wrong(f"not ended after {seconds} s") from None

    def begun(self, job):
        """Until there is a checkpoint."""
        for _ in range(1200):
            if (self.out / "last.pt").exists() or job.poll() is not None:
                break
            time.sleep(0.1)
        must(job.poll() is None, f"ended before it was disturbed: {self.said('error')}")

    def ends(self, *jobs):
        for job in jobs or [self.start()]:
            must(self.wait(job) == 0, f"the same command again fails: {self.said('error') or self.said('')[-3:]}")

    def state(self):
        return runs.read_checkpoint(self.out / "last.pt")


# Each disturbs a training.   whole: seconds of an undisturbed one   -> whether it said in one line what it had to

def kill(run, rng, whole):
    job = run.start()
    time.sleep(rng.uniform(0, whole))
    run.kill()
    job.wait()


def stop(run, rng, whole):
    job = run.start()
    run.begun(job)
    time.sleep(rng.uniform(0, whole / 20))
    job.terminate()
    run.wait(job)
    must(not run.processes(), "processes outlive torchrun")


def stop_rank(run, rng, whole):
    job, rank = run.start(), str(rng.integers(run.world))
    run.begun(job)
    time.sleep(rng.uniform(0, whole / 20))
    pid, = (pid for pid, env in run.processes().items() if env.get("LOCAL_RANK") == rank)
    os.kill(pid, signal.SIGTERM)
    must(run.wait(job) == 0, "stopped by a signal, and its exit code is not 0")
    must(run.state()["step"] < STEPS, "not stopped")


FULL = """size=$1 out=$2 kept=$3; shift 3
mount -t tmpfs -o size=${size}k soak "$out"
"$@"; echo "code $?"
mount -o remount,size=64m "$out"
"$@" && cp -a "$out/." "$kept"
"""


def fill(run, rng, whole):
    """A disk that is full at the first or second checkpoint of 2.8 MB, and larger for the same command again."""
    run.out.mkdir()
    kept = run.out.with_suffix(".kept")
    kept.mkdir()
    command = ["unshare", "-m", "sh", "-c", FULL, "sh", str(rng.integers(100, 5500)), str(run.out), str(kept)]
    run.ends(run.start([*command, *run.command()]))
    run.out.rmdir()
    kept.rename(run.out)
    must(run.said("code") == ["code 1"], f"a full disk: {run.said('code')}")
    return len(run.said("error: ")) == 1


NAN = """import os, train_low
plain = train_low.low_loss
def spoiled(cfg, net, batch):
    wrong = os.environ["RANK"] == "1" and batch[0][0] // cfg.batch == 5
    return plain(cfg, net, batch) * (float("nan") if wrong else 1)
train_low.low_loss = spoiled
train_low.main()
"""


def spoil(run, rng, whole):
    script = run.out.with_suffix(".py")
    script.write_text(NAN)
    must(run.wait(run.start(run.command(script=script))) == 1, "a loss of NaN, and the exit code is not 1")
    must(not run.processes(), "processes outlive torchrun")
    must(run.state()["step"] in (4, 5), "the checkpoint is not the one before the NaN")
    return any("not finite" in line for line in run.said("error: RuntimeError"))


def twice(run, rng, whole):
    job, log = run.start(), run.out.with_suffix(".second.log")
    run.begun(job)
    first = list(run.processes())
    for pid in first:                                    # the second begins while the first is there, however slowly
        os.kill(pid, signal.SIGSTOP)
    code = run.wait(run.start(log=log))
    for pid in first:
        os.kill(pid, signal.SIGCONT)
    must(code == (2 if run.world == 1 else 1), f"a second run in one folder: exit code {code}")        # 1 is torchrun's
    must(run.wait(job) == 0, "the first run is disturbed")
    return sum("another training" in line for line in run.said("error: ", log)) == 1


def agents(run, rng, whole):
    """As on two machines, one of which is lost."""
    def both():
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        launch = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
                  "--max-restarts=0")
        command = run.command(launch=launch)
        return [run.start(command, log, SOAK=str(i)) for i, log in enumerate((run.log, run.out.with_suffix(".1.log")))]

    jobs, lost = both(), run.every - 1                   # 0: where they meet
    run.begun(jobs[1 - lost])
    run.kill(SOAK=str(lost))
    began = time.time()
    with contextlib.suppress(Wrong):                     # what counts is how it goes on
        run.wait(jobs[1 - lost])
    run.note = f"agent {lost} lost; after {time.time() - began:.0f} s the other had exit code {jobs[1 - lost].poll()}"
    run.kill()
    run.ends(*both())


def flip(run, rng, whole):
    run.ends(run.start(run.command("--steps", STEPS // 2)))
    raw = bytearray((run.out / "last.pt").read_bytes())
    raw[rng.integers(len(raw) // 10, len(raw) * 9 // 10)] ^= 1 << rng.integers(8)
    (run.out / "last.pt").write_bytes(raw)
    run.ends()
    return len(set(run.said("warning: "))) == 1          # by each process


FAULTS = {                                               # name: what the table says, function, processes of each try
    "kill": ("kill -9 of all processes at any moment", kill, (1, 2, 3)),
    "stop": ("SIGTERM to torchrun", stop, (2, 3)),
    "rank": ("SIGTERM to one rank", stop_rank, (2, 3)),
    "disk": ("disk full", fill, (1, 1, 1)),
    "nan": ("a loss of NaN on one rank", spoil, (2, 3)),
    "twice": ("a second run in the folder", twice, (1, 2)),
    "agents": ("kill -9 of one of two agents", agents, (2, 2)),
    "flip": ("a bit of `last.pt` flipped between runs", flip, (1, 2)),
}
MUST_SAY = ("disk", "nan", "twice", "flip")


def goes_on(run, whole):
    """The same command again.   whole: the last state of an undisturbed run"""
    run.ends()
    ended = run.state()
    must(ended["step"] == STEPS and all(same(whole[k], ended[k]) for k in ("net", "ema")), "other weights")
    read_own(run.out / "low.safetensors", "low", UNet3D)


def tried(name, run, rng, undisturbed):
    """One try.   -> dict(outcome, and why it is wrong or a note)"""
    state, seconds = undisturbed
    try:
        said = FAULTS[name][1](run, rng, seconds)
        must(said or name not in MUST_SAY, f"not said in one line: {run.said('error') + run.said('warning')}")
        goes_on(run, state)
    except (Wrong, ValueError) as e:
        return dict(outcome="wrong", why=f"{run.world} process(es): {' '.join(str(e).split())}")
    finally:
        run.kill()
    return dict(outcome="refused unchanged" if said else "unchanged", note=run.note)


def trainings(names, args, folder):
    """-> {fault: its row}"""
    data, undisturbed, rows = folder / "data", {}, {}
    phantoms(data, 5)
    for name in names:
        fault, _, worlds = FAULTS[name]
        if name == "kill":
            worlds = (worlds * args.kills)[:args.kills]
        if name == "disk" and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            fault, worlds = f"{fault}: not tried: needs root", ()
        found = []
        for k, world in enumerate(worlds):
            if world not in undisturbed:
                run, began = Training(data, folder / f"whole{world}", world), time.time()
                run.ends()
                undisturbed[world] = run.state(), time.time() - began
            run = Training(data, folder / f"{name}{k}", world, every=1 + k % 2)
            found.append(tried(name, run, np.random.default_rng((args.seed, k)), undisturbed[world]))
        again = f"--only {name} --seed {args.seed}" + f" --kills {args.kills}" * (name == "kill")
        rows[name] = dict(count(fault, found), again=again)
    return rows


# --- the command ---

def table(rows):
    print("| faults injected | n | refused in one line | unchanged result | cannot be seen | wrong | to repeat |")
    print("|---|---|---|---|---|---|---|")
    for row in rows.values():
        cells = [row[name] for name in ("fault", "n", *OUTCOMES)]
        print(f"| {' | '.join(map(str, cells))} | `python benchmarks/soak.py {row['again']}` |")


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--parts", nargs="+", choices=("files", "runs"), default=("files", "runs"))
    p.add_argument("--only", nargs="+", choices=(*KINDS, *FAULTS), default=(*KINDS, *FAULTS),
                   help="of these parts")
    p.add_argument("--n", type=int, default=286, help="mutations of each of 7 kinds of file (default 286)")
    p.add_argument("--first", type=int, default=0, help="number of the first mutation (default 0)")
    p.add_argument("--kills", type=int, default=25, help="runs that are killed (default 25)")
    p.add_argument("--seed", type=int, default=0, help="decides the mutations (default 0)")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where soak.json appears")
    args = p.parse_args(argv)
    with exits():
        if min(args.n, args.kills) < 1 or min(args.first, args.seed) < 0:
            raise ValueError(f"--n {args.n}, --kills {args.kills}, --first {args.first}, --seed {args.seed}; at least "
                             "1, 1, 0, 0; raise them")
        rows = {}
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="soak_") as folder:
            if "files" in args.parts and (names := [k for k in KINDS if k in args.only]):
                rows |= files(names, args, Path(folder, "files"))
            if "runs" in args.parts and (names := [k for k in FAULTS if k in args.only]):
                rows |= trainings(names, args, Path(folder, "runs"))
        table(rows)
        write_atomic(args.out / "soak.json", (json.dumps(rows, indent=1) + "\n").encode())
        for name, row in rows.items():
            for found in [x for x in row["details"] if x["outcome"] == "wrong"][:3]:
                print(f"wrong: {name}: {found}", file=sys.stderr)
        if wrong := sum(row["wrong"] for row in rows.values()):
            raise RuntimeError(f"{wrong} wrong; see {args.out / 'soak.json'}")


if __name__ == "__main__":
    main()
