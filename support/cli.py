"""Command lines: one parser for all programs, how they end, and the device and memory that they work with."""
import argparse
import contextlib
import ctypes
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """Options are written with hyphens, underscores are accepted; none is abbreviated; what is wrong is one line and
    exit code 2."""

    def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=formatter_class, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")           # Python 3.14's own; before, -12. is an option

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for a in args:
            if not is_text(a):
                self.error(f"{a!r}: bytes that are no UTF-8; all is written as text; rename the file, or type it anew")
        return super().parse_known_args([hyphens(a) for a in args], namespace)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


def is_text(name):
    """Whether an argument or a file's name is text: bytes that are none come as halves of characters."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def hyphens(argument):
    """--low_steps=2 -> --low-steps=2; values stay, those that hold options of another program too, but ~/ in
    --out=~/samples, which a shell leaves alone."""
    option = re.fullmatch(r"(--[\w-]+)(?:=(.*))?", argument, re.DOTALL)
    if not option:
        return argument
    name, value = option[1].replace("_", "-"), option[2]
    if value is None:
        return name
    return f"{name}={os.path.expanduser(value) if value.startswith('~/') else value}"


USAGE = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError)
FAILURE = (RuntimeError, OSError, MemoryError)                           # of mid-run; all others are defects of ours


@contextlib.contextmanager
def exits():
    """What every command line shares: wrong input is one line and exit code 2, a failure in mid-run is one line and 1,
    Ctrl-C one line and 130. The traceback of a defect goes to a file that its line names."""
    speak_everywhere()
    try:
        yield
    except KeyboardInterrupt:
        code = 130
        say("stopped; what was finished is kept")
    except Exception as e:
        code = 2 if is_usage(e) else 1
        say("error: " + sentence(e))
    else:
        return
    raise SystemExit(code)


def is_usage(e):
    """Whether input was wrong; text that was never checked to be text is a defect of ours."""
    return isinstance(e, USAGE) and not isinstance(e, UnicodeError)


def sentence(e):
    """An exception in one line."""
    words = re.sub(r"(?s)^Caught \w+ in DataLoader worker process.*\n\w*(Error|Exception): ", "", str(e))
    words = " ".join(words.split())                      # a loader worker's error brings its traceback as text
    if is_usage(e):
        return words
    if isinstance(e, ImportError):
        return f"{type(e).__name__}: {words}; a package is missing or broken; pip install -r requirements.txt"
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"{type(e).__name__}: {words[:300]}; the compiler is half installed or too old; pass --no-compile"
    if isinstance(e, FAILURE):
        return f"{type(e).__name__}: {words}"
    with tempfile.NamedTemporaryFile("w", prefix="medsyn_", suffix=".txt", delete=False, errors="replace") as f:
        traceback.print_exception(e, file=f)
    return (f"{type(e).__name__}: {words[:300]}; this is a defect of the program, not of your input; please report it "
            f"with {f.name}")


def say(line):
    """A line on stderr, on its own, bar or not."""
    tqdm.write(line, file=sys.stderr)


def speak_everywhere():
    """Streams that take what is written: signs that a terminal cannot show are replaced, and a closed stream (2>&-)
    takes all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def choose_device(name):
    """"cuda" or "cpu" as asked, whichever is there if nothing was."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"--device {name}; cuda or cpu; choose one")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda") and int(name[5:] or 0) >= there:
        raise ValueError(f"--device {name}; this PyTorch sees {there or 'no'} GPU; "
                         "leave --device out, or install a CUDA build and its driver")
    return name


def fast_bfloat16(device):
    """Whether the device itself multiplies in bfloat16, the default of every --amp. Others emulate it: a CPU with AVX2
    alone, as in most laptops, took 70 times as long as in float32, one with AVX-512 but not its BF16 twice. ARM counts
    as one of these; it was not tried."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return has.get("amx_bf16", False) or has.get("avx512_bf16", False)


def keep_memory(room=0):
    """Let glibc keep the memory of freed tensors. It would return it to the system, which zeroes every page again at
    the next allocation: a quarter of the time of everything on a CPU. But what is kept is in pieces, and the whole
    larger by up to a half: it is not done where less than `room` bytes are free. Without mallopt nothing happens."""
    if free_memory() < room:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
    mallopt(-4, 0)                                                     # M_MMAP_MAX: large blocks come from the heap too
    mallopt(-1, 2**31 - 1)                                               # M_TRIM_THRESHOLD: which is not given back


def free_memory():
    """Bytes that programs can have without swapping, as Linux tells; elsewhere, where that is not known, infinite."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else float("inf")


def release_memory():
    """Give memory of freed tensors back to the system, which glibc does by itself only with blocks of more than some
    32 MB. Elsewhere nothing happens."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)(0)


def check_center(center):
    """ValueError unless --center was left out or is three finite numbers of mm."""
    if center and not all(abs(c) < 1e6 for c in center):
        raise ValueError(f"--center {' '.join(map(str, center))}; three finite numbers of mm are needed; change it")
