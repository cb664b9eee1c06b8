"""A training run: its processes; the run folder's lock, checkpoints and log."""
import contextlib
import fcntl
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.distributed as dist

from support.files import write_atomic
from support.weights import tricks, without_idle

# What may change when a run goes on; all else is what it began with.
FREE = set("data out init device amp steps micro checkpointing compile zero lr augment ema ema_every ema_start workers "
           "log_every save_every show_every cool late windows bullae".split())

Machine = namedtuple("Machine", "device rank world")                     # world: how many processes train together


# --- processes ---

def setup(cfg):
    """Processes and device.   -> Machine"""
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if cfg.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if cfg.batch % (cfg.micro * world):
        raise ValueError(f"--batch {cfg.batch} with {world} processes of --micro {cfg.micro}; "
                         "batch must be a multiple of their product; change one")
    return Machine(device, rank, world)


@contextlib.contextmanager
def alone(out, rank):
    """The run folder, for this run only, and a list that gathers the signals which ask to stop once the step is
    done."""
    out.mkdir(parents=True, exist_ok=True)
    asked = []
    with open(out / "lock", "w") as lock:
        try:
            if rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another training writes here; one run a folder; "
                             "wait for it or choose another --out") from None
        except OSError as e:                                             # Lustre, NFS and FUSE without locks
            print(f"warning: {out}: its disk knows no locks ({e}); begin no second training in this folder",
                  file=sys.stderr)
        before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield asked
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def begin_worker(_):
    """For loader workers: when to stop is the training process's to decide, and a batch that cannot be handed over, as
    with a small /dev/shm, ends the worker; its parent would wait for that batch for ever."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(end_worker)


def end_worker(e, _):
    print(f"error: a loader worker cannot hand over a batch: {e}; batches go through /dev/shm, which may be small; "
          "enlarge it (docker run --shm-size) or pass --workers 0", file=sys.stderr, flush=True)
    os._exit(1)


def end_workers():
    """Loader workers ignore what asks them to end; left alone, they would keep a failed process waiting for ever."""
    for process in multiprocessing.active_children():
        process.kill()


def add_up(x):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# --- checkpoints ---

def is_new(out):
    """Whether a run has no checkpoint yet."""
    return not any((Path(out) / name).exists() for name in ("last.pt", "previous.pt"))


def load_checkpoint(cfg, trained_on):
    """The newest readable checkpoint of a run, or None; the same one in all processes. ValueError if it belongs to
    another configuration, or was `trained_on` other cases, another grid or another network."""
    state = newest_checkpoint(cfg, trained_on)
    if dist.is_initialized():
        seen = [None] * dist.get_world_size()
        dist.all_gather_object(seen, (state["step"], state.pop("sums")) if state else (0, None))
        if any(found != seen[0] for found in seen):
            raise ValueError(f"{cfg.out}: the processes read different checkpoints, of steps "
                             f"{', '.join(str(step) for step, _ in seen)}; all go on from the same one; "
                             "put the run folder on a disk that all share")
    return state


def newest_checkpoint(cfg, trained_on):
    out = Path(cfg.out)
    for path in (out / "last.pt", out / "previous.pt"):
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path)
        except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, RuntimeError, OSError, EOFError) as e:
            print(f"warning: {path} is not readable ({type(e).__name__}: {e}); trying the one before it",
                  file=sys.stderr)
            continue
        check_configuration(path, state, cfg)
        check_cases(state, cfg, trained_on)
        return state
    if not is_new(out):
        raise ValueError(f"{out}: no checkpoint is readable; a run is never restarted silently; "
                         "remove the folder to begin anew")
    return None


def read_checkpoint(path):
    with zipfile.ZipFile(path) as z:                                     # torch.load itself notices no bit rot
        bad, sums = z.testzip(), [part.CRC for part in z.infolist()]
    if bad:
        raise ValueError(f"{bad} fails its check sum")
    state = torch.load(path, map_location="cpu", weights_only=True)
    kinds = dict(kind=str, step=int, config=dict, net=dict, ema=dict, opt=dict)
    whole = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kinds.items())
    if not whole or not state["opt"].get("param_groups"):
        raise ValueError("no checkpoint of these trainers")
    return state | dict(sums=sums)


def check_configuration(path, state, cfg):
    """ValueError if a checkpoint is of another configuration than the run that would go on from it."""
    now, then = asdict(cfg), state["config"]
    lacking = [f"--{k.replace('_', '-')} {v}" for k, v in tricks(then).items() if k not in now]
    if lacking:
        raise ValueError(f"{path}: a run with {', '.join(lacking)}, which this trainer does not have and does not go "
                         f"on without; run python -m beyond.train_{state['kind']} with the same options")
    differing = [f"{k} {v!r} -> {now[k]!r}" for k, v in then.items() if k in now and k not in FREE and now[k] != v]
    differing += [f"{k} absent -> {v!r}" for k, v in tricks(now).items() if k not in then and k not in FREE]
    if state["kind"] != cfg.kind or differing:
        raise ValueError(f"{path}: a run of kind {state['kind']} that differs in {', '.join(differing) or 'kind'}; "
                         "a run keeps its configuration; repeat its options or choose another --out")


def check_cases(state, cfg, trained_on):
    """ValueError if a checkpoint was trained on other cases, another grid, text encoder or network."""
    then, now = ({**which, "args": without_idle(which["args"])} for which in ({**trained_on, **state}, trained_on))
    differing = [k for k in trained_on if then[k] != now[k] and None not in (then[k], now[k])]    # None: not known
    if differing:
        raise ValueError(
            f"{cfg.data}: {len(trained_on['cases'])} cases to train on, which differ in {', '.join(differing)} from "
            f"those that {cfg.out} began with; the order of its samples, and what is held out, would change; "
            "put the same cases there, or begin anew in another --out with --init")


def save_checkpoint(out, state):
    """last.pt becomes previous.pt, the new one appears whole."""
    if (out / "last.pt").exists():
        os.replace(out / "last.pt", out / "previous.pt")
    write_atomic(out / "last.pt", lambda f: torch.save(state, f))


# --- an optimizer whose state is shared out among the processes (--zero) ---

def gather_shares(opt, rank, world):
    """Adam's shares of a ZeroRedundancyOptimizer, on the CPU of rank 0, where `opt.state_dict()` then has them all.
    `consolidate_state_dict` does the same, but turns bytes into a tensor one by one: minutes for the paper's G."""
    mine = opt.optim.state_dict()
    mine["state"] = {i: {k: v.cpu() for k, v in state.items()} for i, state in mine["state"].items()}
    shares = [None] * world if rank == 0 else None
    dist.gather_object(mine, shares)
    opt._all_state_dicts = shares or []


def restore(opt, state, device):
    """A checkpoint's state into an optimizer, shared out or not."""
    opt.load_state_dict(state)
    if hasattr(opt, "optim"):                            # ZeroRedundancyOptimizer, whose import takes 1.5 s
        opt.state.clear()                                # its second, unused copy of its share
        for s in opt.optim.state.values():             # and it puts this on the CPU, where a fused AdamW on a GPU fails
            s["step"] = s["step"].to(device)


# --- log ---

class Log:
    """loss.csv: rows are gathered, and written with the checkpoint that they belong to."""

    def __init__(self, path, rank=0):
        self.path, self.rank, self.began, self.rows, self.row = path, rank, time.time(), [], None

    def add(self, step, loss, norm):
        self.row = [step, f"{loss:.6f}", "", f"{norm:.4f}", f"{time.time() - self.began:.1f}"]
        self.rows.append(self.row)

    def validated(self, loss):
        """The validation loss of the row that was added last, written or not."""
        self.row[2] = f"{loss:.6f}"
        if self.row not in self.rows:
            self.rows.append(self.row)
        self.write()

    def write(self):
        """Lines from the first new step on, of a run that died after writing them, are dropped."""
        if self.rank > 0:
            return
        new = [",".join(map(str, row)) for row in self.rows]
        first = self.rows[0][0] if new else float("inf")
        old = [line for line in self.written() if int(line.split(",")[0]) < first]
        lines = ["step,loss,validation,gradient_norm,seconds", *old, *new]
        write_atomic(self.path, ("\n".join(lines) + "\n").encode())
        self.rows = []

    def written(self):
        """Lines of before. A file that holds others than this program's, a spreadsheet's say, is set aside: a training
        does not end for the sake of its log."""
        if not self.path.exists():
            return []
        lines = [line for line in self.path.read_bytes().decode(errors="replace").splitlines()[1:] if line.strip()]
        if all(re.fullmatch(r"\d+(,[-+.\w]*){4}", line) for line in lines):
            return lines
        names = (self.path.with_name(f"{self.path.stem}.unread{n}.csv") for n in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        self.path.rename(aside)
        print(f"{self.path}: holds lines that this program did not write; it is now {aside.name}, and a new one begins",
              file=sys.stderr)
        return []
