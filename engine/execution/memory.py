"""How much memory this process may still take: by the system's account, and by every limit that is set.

Pages that only hold what files hold count as available: the system gives them away before it runs out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from os import sysconf
from pathlib import Path, PurePosixPath

try:
    import resource
except ImportError:  # a system without resource limits
    resource = None  # type: ignore[assignment]

# What is assumed of a system that says nothing.
_UNKNOWN_BYTES = 4 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes that this process may still take, out of as many in all, and whose account that is."""

    available: int
    total: int
    source: str


@dataclass(frozen=True)
class _Files:
    """Where control groups are, and what their files are called. `reclaimable`: fields of memory.stat."""

    mounts: tuple[str, ...]
    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]


_V1 = _Files(
    mounts=("sys/fs/cgroup/memory",),
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    reclaimable=("total_inactive_file", "total_active_file"),
)
_V2 = _Files(
    mounts=("sys/fs/cgroup", "sys/fs/cgroup/unified"),
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    reclaimable=("inactive_file", "active_file", "slab_reclaimable"),
)


def read_memory(root: Path = Path("/")) -> Memory:
    """The tightest of the system's memory, the control groups' limits (version 1 and 2), and ulimit's.

    root: where /proc and /sys are. Sources: proc(5), and the kernel's documentation of cgroups.
    """
    bounds = [_of_system(root), *_of_groups(root), *_of_process(root)]
    tightest = min(bounds, key=lambda bound: bound.available)
    return Memory(max(0, tightest.available), min(bound.total for bound in bounds), tightest.source)


def _of_system(root: Path) -> Memory:
    fields = _fields(root / "proc/meminfo")
    if "MemTotal" not in fields:
        try:
            total = sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            total = _UNKNOWN_BYTES
        return Memory(total // 2, total, "assumed: half of all memory")
    available = fields.get("MemAvailable")
    if available is None:  # before Linux 3.14
        available = sum(fields.get(name, 0) for name in ("MemFree", "Buffers", "Cached"))
        available -= fields.get("Shmem", 0)
    return Memory(1024 * available, 1024 * fields["MemTotal"], "in the system")


def _of_groups(root: Path) -> Iterator[Memory]:
    """What each control group that this process is in, and those around it, allow."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        files = _V2 if number == "0" else _V1
        if files is _V1 and "memory" not in controllers.split(","):
            continue
        # In a container the path may be the host's, of which the container sees a part, or one with "..".
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for mount in files.mounts:
            for depth in range(len(parts), -1, -1):
                yield from _of_group(root, PurePosixPath(mount, *parts[:depth]), files)


def _of_group(root: Path, group: PurePosixPath, files: _Files) -> Iterator[Memory]:
    directory = root / group
    used = _number(directory / files.usage)
    if used is None:
        return
    fields = _fields(directory / "memory.stat")
    used -= sum(fields.get(name, 0) for name in files.reclaimable)
    for name in files.limits:
        if (limit := _number(directory / name)) is not None:
            yield Memory(limit - max(0, used), limit, f"within the {limit} bytes of /{group / name}")
    # It may be that of a group which is out of sight.
    if (limit := fields.get("hierarchical_memory_limit")) is not None:
        yield Memory(limit - max(0, used), limit, f"within the {limit} bytes of a group around /{group}")


def _of_process(root: Path) -> Iterator[Memory]:
    if resource is None:
        return
    fields = _fields(root / "proc/self/status")
    for kind, size in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit, _ = resource.getrlimit(getattr(resource, kind))
        if limit != resource.RLIM_INFINITY:
            used = 1024 * fields.get(size, 0)
            yield Memory(limit - used, limit, f"within the {limit} bytes of {kind}")


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number a line."""
    fields = {}
    for line in _text(path).splitlines():
        name, *values = line.replace(":", " ").split()[:2] or [""]
        if values and values[0].isdecimal():
            fields[name] = int(values[0])
    return fields


def _number(path: Path) -> int | None:
    """The number that a file holds; None if the file is not there or holds something else, such as "max"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", errors="replace")
    except OSError:
        return ""
