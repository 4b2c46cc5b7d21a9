"""Runs launches of kernels, and says what they did wrong and what memory they touched."""

import ctypes
import random
import re
import weakref
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from . import lint
from .locate import Locator
from .source import Source
from .toolchain import CompileError, compile_kernel, flatten, runtime

KINDS = (
    "out of bounds",
    "race",
    "uninitialised threadgroup memory",
    "misaligned",
    "divergent barrier",
    "divergent simdgroup function",
    "threadgroup memory",
    "too many threads",
    "undefined behaviour",
    "write to constant",
    "undefined function constant",
    "no end",
)
SLOTS = 64
SECONDS = 20  # of CPU time that one launch may take
Launch = dict


class _Region(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("cell_count", ctypes.c_uint64),
        ("cells", ctypes.c_void_p),
        ("shift", ctypes.c_uint32),
        ("read_only", ctypes.c_bool),
        ("distinct", ctypes.c_uint64 * 2),
        ("total", ctypes.c_uint64 * 2),
        ("most_writes", ctypes.c_uint32),
    )


class _Finding(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_uint32) for n in ("kind", "memory", "region", "thread", "other_thread", "line")),
        ("group", ctypes.c_uint32 * 3),
        *((n, ctypes.c_uint32) for n in ("is_write", "bytes")),
        ("offset", ctypes.c_int64),
        *((n, ctypes.c_uint64) for n in ("pc", "other_pc")),
        *((n, ctypes.c_char_p) for n in ("file", "text", "other_file")),
        ("other_line", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Finding:
    """One thing wrong. `where` is the innermost line of the kernel's own file, `file:line`."""

    kind: str
    where: str
    detail: str
    kernel: str = ""

    def __str__(self):
        return f"{self.where}: {self.kind}: {self.detail}" + (f" [{self.kernel}]" if self.kernel else "")


class CheckerError(Exception):
    """Carries `findings`."""

    def __init__(self, findings):
        super().__init__("\n".join(map(str, findings)))
        self.findings = findings


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer, over all launches of a run."""

    distinct_read: int
    distinct_written: int
    total_read: int
    total_written: int
    most_writes: int  # of any one byte

    @property
    def read_multiplicity(self):
        return self.total_read / self.distinct_read if self.distinct_read else 0.0


@dataclass
class Result:
    launches: int = 0
    threadgroup_bytes: int = 0  # that the last launch's kernel declares
    findings: list = field(default_factory=list)
    traffic: dict = field(default_factory=dict)


@cache
def _runtime():
    lib = ctypes.CDLL(str(runtime()), mode=ctypes.RTLD_GLOBAL)
    u32, u64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
    lib.msl_init.restype = ctypes.c_bool
    lib.msl_slot.argtypes, lib.msl_slot.restype = [u32], pointer
    lib.msl_bind.argtypes, lib.msl_bind.restype = [u32, u64, u32, ctypes.c_bool], None
    lib.msl_region.argtypes, lib.msl_region.restype = [u32], ctypes.POINTER(_Region)
    lib.msl_findings.argtypes = [ctypes.POINTER(ctypes.POINTER(_Finding))]
    lib.msl_launch.argtypes = [pointer] * 6 + [u64, u32]
    lib.msl_launch.restype = ctypes.c_bool
    if not lib.msl_init():
        raise MemoryError("the simulator cannot reserve its address space")
    return lib


_sparse_slots = {}  # address -> slot


def sparse(shape, dtype):
    """An array of zeros of any size up to 32 GB, of which only touched pages take memory.

    It lives where the simulator's buffers live, so a launch uses it in place.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size > 1 << 35:
        raise ValueError("a sparse array holds at most 32 GB")
    slot = next(s for s in reversed(range(SLOTS)) if s not in _sparse_slots.values())
    address = _runtime().msl_slot(slot)
    memory = (ctypes.c_uint8 * size).from_address(address)
    array = np.frombuffer(memory, dtype).reshape(shape)
    _sparse_slots[address] = slot
    weakref.finalize(memory, _release, address, size)
    return array


def _release(address, size):
    libc = ctypes.CDLL(None)
    page = 4096
    libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(-(-size // page) * page), 4)  # MADV_DONTNEED
    del _sparse_slots[address]


class _Compiled:
    """A compiled kernel, loaded."""

    def __init__(self, path):
        _runtime()  # which the kernel links to
        self.path = path
        self.lib = ctypes.CDLL(str(path))
        self.entry = ctypes.cast(self.lib.msl_entry, ctypes.c_void_p)
        self.image = (ctypes.c_void_p * 2).in_dll(self.lib, "msl_image")
        self.lib.msl_set_constant.argtypes = [ctypes.c_uint32, ctypes.c_double]


class Library:
    """The kernels of one .metal file, each compiled when it is first run.

    Args:
        path: the .metal file.
        lints: check it, and what it includes from its own folder, for what only Apple's compiler sees.
    """

    def __init__(self, path, lints=True):
        self.path = Path(path).resolve()
        try:
            flattened = flatten(self.path)
        except CompileError as error:
            raise self._compile_error(error) from None
        if lints and (found := lint.check(flattened)):
            raise CheckerError([Finding("lint", where, detail) for where, detail in found])
        self.source = Source(flattened)
        self._compiled = {}

    @property
    def kernels(self):
        """The names of the kernels."""
        return sorted(self.source.kernels)

    def compile(self, kernel):
        """Compiles one kernel now; a compiler's error is a CheckerError."""
        if kernel not in self._compiled:
            if kernel not in self.source.kernels:
                raise KeyError(f"{self.path.name} has no kernel {kernel}; it has {', '.join(self.kernels)}")
            try:
                self._compiled[kernel] = _Compiled(compile_kernel(self.source.cpp(kernel)))
            except CompileError as error:
                raise self._compile_error(error, kernel) from None
        return self._compiled[kernel]

    def _compile_error(self, error, kernel=""):
        lines = re.findall(r"^(\S+?:\d+):\d+: (?:fatal )?error: (.*)$", str(error), re.M)
        found = [(Path(w).name if w.startswith("own/") else w, d) for w, d in lines]
        found = found or [(self.path.name, str(error)[-2000:])]
        return CheckerError([Finding("compile", where, detail, kernel) for where, detail in found])

    def run(self, launches, buffers, check=True, seed=0, seconds=SECONDS):
        """Runs launches one after the other.

        Args:
            launches: dicts as the package's docstring describes.
            buffers: name -> contiguous NumPy array; written in place.
            check: raise a CheckerError when there are findings.
            seed: other than zero, permutes threadgroups and the order in which threads run.
            seconds: of CPU time, after which a launch is taken to have no end.
        """
        rt = _runtime()
        rt.msl_begin()
        slots = {}
        for name, array in buffers.items():
            if not array.flags.c_contiguous:
                raise ValueError(f"buffer {name} is not contiguous")
            sparse_slot = _sparse_slots.get(array.ctypes.data)
            slot = len(slots) if sparse_slot is None else sparse_slot
            slots[name] = slot
            rt.msl_bind(slot, array.nbytes, int(array.dtype.itemsize > 1), not array.flags.writeable)
            if sparse_slot is None:
                ctypes.memmove(rt.msl_slot(slot), array.ctypes.data, array.nbytes)
        result = Result()
        for launch in launches:
            result.launches += 1
            if not self._launch(rt, launch, slots, result, seed, seconds):
                break
        result.threadgroup_bytes = rt.msl_threadgroup_bytes()
        for name, array in buffers.items():
            slot = slots[name]
            if array.ctypes.data not in _sparse_slots and array.flags.writeable:
                ctypes.memmove(array.ctypes.data, rt.msl_slot(slot), array.nbytes)
            r = rt.msl_region(slot).contents
            result.traffic[name] = Traffic(*r.distinct, *r.total, r.most_writes)
        if check and result.findings:
            raise CheckerError(result.findings)
        return result

    def _launch(self, rt, launch, slots, result, seed, seconds):
        kernel = self.compile(launch["kernel"])
        kernel.lib.msl_forget_constants()
        for index, value in launch.get("constants", {}).items():
            kernel.lib.msl_set_constant(index, float(value))
        bound = (ctypes.c_void_p * 32)()
        names = {slot: name for name, slot in slots.items()}
        for index, name, offset in launch.get("buffers", ()):
            bound[index] = rt.msl_slot(slots[name]) + offset
        free = (s for s in range(len(slots), SLOTS) if s not in names and s not in _sparse_slots.values())
        for index, data in launch.get("bytes", ()):
            slot = next(free)
            rt.msl_bind(slot, len(data), 0, True)
            ctypes.memmove(rt.msl_slot(slot), data, len(data))
            bound[index] = rt.msl_slot(slot)
            names[slot] = f"bytes {index}"
        grid, threads = ((ctypes.c_uint32 * 3)(*launch[k]) for k in ("grid", "threadgroup"))
        count = threads[0] * threads[1] * threads[2]
        if not 0 < count <= 1024:
            raise ValueError(f"a threadgroup has 1 to 1024 threads, not {count}")
        order = None
        if seed:
            numbers = list(range(grid[0] * grid[1] * grid[2]))
            random.Random(seed).shuffle(numbers)
            order = (ctypes.c_uint32 * len(numbers))(*numbers)
        before = self._count(rt)
        done = rt.msl_launch(kernel.entry, kernel.image, bound, grid, threads, order, seed, seconds)
        found = ctypes.POINTER(_Finding)()
        total = rt.msl_findings(ctypes.byref(found))
        locator = Locator(kernel.path, kernel.image[0])
        for f in found[before:total]:
            finding = _describe(f, locator, names, launch["kernel"])
            # Unrolled, one line has many addresses.
            if all((finding.kind, finding.where) != (r.kind, r.where) for r in result.findings):
                result.findings.append(finding)
        return done

    def _count(self, rt):
        return rt.msl_findings(ctypes.byref(ctypes.POINTER(_Finding)()))


def _place(pc, file, line, locator):
    """The line in the kernel's own folder where there is one, and the innermost line."""
    own, inner = locator.where(pc)
    if file:
        inner = f"{Path(file.decode()).name}:{line}"
        own = inner if file.startswith(b"own/") else own
    return own or inner, inner


def _describe(f, locator, names, kernel):
    kind = KINDS[f.kind]
    where, inner = _place(f.pc, f.file, f.line, locator)
    other, _ = _place(f.other_pc, f.other_file, f.other_line, locator)
    text = f.text.decode() if f.text else ""
    memory = "threadgroup memory" if f.memory else names.get(f.region, "no buffer")
    access = f"{'write' if f.is_write else 'read'} of {f.bytes} bytes at byte {f.offset} of {memory}"
    details = {
        "out of bounds": text or access,
        "race": f"{access}, {text} by thread {f.other_thread} at {other} without a barrier between",
        "uninitialised threadgroup memory": access,
        "misaligned": f"{text or 'address'} not a multiple of the type's alignment",
        "threadgroup memory": f"{f.bytes} bytes, where there are 32768",
        "too many threads": f"max_total_threads_per_threadgroup is {f.bytes}",
        "undefined behaviour": text,
        "write to constant": access,
        "undefined function constant": f"function constant {f.bytes} is used and not set",
        "no end": "the time is up; the line is that of the thread's last barrier",
    }
    elsewhere = f"{f.other_thread} threads have returned" if text == "returned" else f"others wait at {other}"
    detail = details.get(kind, elsewhere)  # of the two divergences
    thread = f"thread {f.thread} of threadgroup {tuple(f.group)}"
    via = f", in {inner}" if inner != where else ""
    return Finding(kind, where, f"{detail} ({thread}{via})", kernel)
