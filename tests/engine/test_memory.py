"""What memory is available: the system's word and every limit around it, each in a made-up /proc and /sys."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pagellm.engine import LLM, ConfigError, EngineConfig, loading
from pagellm.engine.execution import memory as memory_module
from pagellm.engine.execution.memory import Memory, read_memory
from pagellm.engine.loading import size_cache
from tests.conftest import model_path

MB = 1 << 20
GB = 1 << 30
NO_LIMIT = "9223372036854771712\n"  # what version 1 says


@pytest.fixture(autouse=True)
def _no_limits_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(memory_module.resource, "getrlimit", lambda _kind: unlimited)


class System:
    """Files of a system with 16 GB, of which a full page cache leaves 1 GB free and 12 GB available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write(
            "proc/meminfo",
            f"MemTotal:       {16 * GB // 1024} kB\n"
            f"MemFree:        {GB // 1024} kB\n"
            f"MemAvailable:   {12 * GB // 1024} kB\n"
            f"Buffers:        {GB // 1024} kB\n"
            f"Cached:         {11 * GB // 1024} kB\n"
            f"Shmem:          {2 * GB // 1024} kB\n"
            "HugePages_Total:       0\n",
        )

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def v2(self, group: str, limit: str, used: int, inactive: int = 0, high: str = "max") -> None:
        self.write(f"sys/fs/cgroup{group}/memory.max", f"{limit}\n")
        self.write(f"sys/fs/cgroup{group}/memory.high", f"{high}\n")
        self.write(f"sys/fs/cgroup{group}/memory.current", f"{used}\n")
        stat = f"anon 1\nfile {inactive}\ninactive_file {inactive}\nactive_file {10 * MB}\n"
        self.write(f"sys/fs/cgroup{group}/memory.stat", f"{stat}slab_reclaimable {5 * MB}\n")

    def v1(self, group: str, limit: str, used: int, inactive: int = 0, around: str = NO_LIMIT) -> None:
        self.write(f"sys/fs/cgroup/memory{group}/memory.limit_in_bytes", limit)
        self.write(f"sys/fs/cgroup/memory{group}/memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 0\nhierarchical_memory_limit {around}\ntotal_inactive_file {inactive}\n"
        self.write(f"sys/fs/cgroup/memory{group}/memory.stat", stat + f"total_active_file {10 * MB}\n")

    def read(self) -> Memory:
        return read_memory(self.root)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def test_pages_of_files_are_available(system: System) -> None:
    assert system.read() == Memory(12 * GB, 16 * GB, "in the system")


def test_an_old_kernel_that_does_not_say_what_is_available(system: System) -> None:
    meminfo = system.root / "proc/meminfo"
    meminfo.write_text("".join(x for x in meminfo.open() if "MemAvailable" not in x))
    assert system.read().available == (1 + 1 + 11 - 2) * GB


def test_a_system_that_says_nothing_gives_half_of_what_it_has(tmp_path: Path) -> None:
    memory = read_memory(tmp_path)
    assert memory.available == memory.total // 2 > 0


@pytest.mark.parametrize("path", ["/", "/docker/abc", "/../../host/scope"])
def test_a_container_of_version_2(system: System, path: str) -> None:
    """Its own group is at the mount, whatever path it has on the host."""
    system.write("proc/self/cgroup", f"0::{path}\n")
    system.v2("", str(512 * MB), used=400 * MB, inactive=300 * MB)
    memory = system.read()
    assert (memory.available, memory.total) == ((512 - 400 + 300 + 10 + 5) * MB, 512 * MB)
    assert memory.source == f"within the {512 * MB} bytes of /sys/fs/cgroup/memory.max"


def test_the_group_that_throttles_counts_as_a_limit(system: System) -> None:
    system.write("proc/self/cgroup", "0::/\n")
    system.v2("", "max", used=100 * MB, high=str(256 * MB))
    memory = system.read()
    assert (memory.available, memory.total) == ((256 - 100 + 15) * MB, 256 * MB)
    assert memory.source.endswith("/sys/fs/cgroup/memory.high")


def test_of_nested_groups_the_tightest_counts(system: System) -> None:
    """The outer group is larger, but others in it have taken more."""
    system.write("proc/self/cgroup", "0::/outer/inner\n")
    system.v2("/outer/inner", str(2 * GB), used=GB)
    system.v2("/outer", str(3 * GB), used=3 * GB - 200 * MB)
    memory = system.read()
    assert (memory.available, memory.total) == (215 * MB, 2 * GB)
    assert memory.source.endswith("/sys/fs/cgroup/outer/memory.max")


@pytest.mark.parametrize("path", ["/", "/docker/abc"])
def test_a_container_of_version_1(system: System, path: str) -> None:
    system.write("proc/self/cgroup", f"9:name=systemd:/x\n4:memory:{path}\n1:cpu,cpuacct:/\n0::/\n")
    system.v1("", f"{512 * MB}\n", used=400 * MB, inactive=300 * MB)
    memory = system.read()
    assert (memory.available, memory.total) == ((512 - 400 + 300 + 10) * MB, 512 * MB)
    assert memory.source.endswith("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def test_a_limit_of_version_1_around_what_a_container_sees(system: System) -> None:
    system.write("proc/self/cgroup", "4:memory:/inner\n")
    system.v1("/inner", NO_LIMIT, used=100 * MB, around=str(300 * MB))
    system.v1("", NO_LIMIT, used=GB)
    memory = system.read()
    assert (memory.available, memory.total) == (210 * MB, 300 * MB)


@pytest.mark.parametrize("limit", [NO_LIMIT, "max\n", "-1\n", "", "nonsense\n"])
def test_what_is_no_limit(system: System, limit: str) -> None:
    system.write("proc/self/cgroup", "4:memory:/a\n0::/a\n")
    system.v1("/a", limit, used=100 * MB)
    system.v2("/unified/a", limit.strip(), used=100 * MB)
    assert system.read() == Memory(12 * GB, 16 * GB, "in the system")


def test_a_group_that_has_taken_more_than_its_limit_leaves_nothing(system: System) -> None:
    system.write("proc/self/cgroup", "0::/\n")
    system.v2("", str(100 * MB), used=300 * MB)
    assert system.read().available == 0


def test_a_limit_of_the_address_space(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {memory_module.resource.RLIMIT_AS: 3 * GB}
    no_limit = memory_module.resource.RLIM_INFINITY
    monkeypatch.setattr(
        memory_module.resource, "getrlimit", lambda kind: (limits.get(kind, no_limit), no_limit)
    )
    system.write("proc/self/status", f"Name:\tpython\nVmSize:\t {GB // 1024} kB\nVmData:\t 5 kB\n")
    assert system.read() == Memory(2 * GB, 3 * GB, f"within the {3 * GB} bytes of RLIMIT_AS")


def test_the_cache_takes_a_quarter_of_what_is_available() -> None:
    memory = Memory(available=8000, total=100_000, source="of a test")
    config = EngineConfig(block_size=4)
    assert size_cache(config, context=1000, token_bytes=10, memory=memory).num_blocks == 8000 // 4 // 40
    weights = {"weight_bytes": 7000}  # which leave an eighth
    assert size_cache(config, 1000, 10, memory, **weights).num_blocks == 8000 // 8 // 40  # type: ignore[arg-type]
    memory = Memory(available=0, total=100_000, source="of a test")
    assert size_cache(config, context=1000, token_bytes=10, memory=memory).num_blocks == 1


def test_the_cache_is_no_larger_than_all_sequences_can_use() -> None:
    memory = Memory(available=10**9, total=10**9, source="of a test")
    config = EngineConfig(block_size=4, max_num_seqs=3)
    assert size_cache(config, context=10, token_bytes=10, memory=memory).num_blocks == 9


def test_a_cache_beyond_all_memory_is_refused() -> None:
    memory = Memory(available=10, total=1000, source="of a test")
    with pytest.raises(ConfigError, match=r"num_blocks: found 26 .* no more than the 1000 bytes of memory"):
        size_cache(EngineConfig(block_size=4, num_blocks=26), 1000, 10, memory)
    with pytest.raises(ConfigError, match="num_swap_blocks: found 13 beside 13 blocks"):
        size_cache(EngineConfig(block_size=4, num_blocks=13, preemption="swap"), 1000, 10, memory)


def test_weights_beyond_what_the_cache_leaves_are_refused_with_the_sum() -> None:
    memory = Memory(available=8000, total=100_000, source="of a test")
    config = EngineConfig(block_size=4, num_blocks=50)
    assert size_cache(config, 1000, 10, memory, weight_bytes=6000).num_blocks == 50
    found = (
        r"weights: found 6001 bytes, expected at most 6000: 8000 bytes are available of a test, less 2000 "
    )
    with pytest.raises(ConfigError, match=f"{found}of 50 KV blocks"):
        size_cache(config, 1000, 10, memory, weight_bytes=6001)
    with pytest.raises(ConfigError, match="weights: found 9000 bytes, expected at most 7960"):
        size_cache(EngineConfig(block_size=4), 1000, 10, memory, weight_bytes=9000)


def test_weights_are_refused_before_any_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "read_memory", lambda: Memory(100_000, 10**9, "of a test"))
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(loading, "compile_kernels", lambda *_: pytest.fail("kernels were compiled"))
    with pytest.raises(ConfigError, match="weights: found"):
        LLM(str(model_path("qwen3_moe")))


def test_what_was_found_and_chosen_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    llm = LLM(str(model_path("llama_tiny")))
    [line] = _about_the_cache(capfd)
    assert line.startswith(f"pagellm: KV cache: {llm.engine.config.num_blocks} blocks of 16 tokens, ")
    assert re.search(r"GB, \d+\.\d% of the \d+\.\d\d GB available ", line)
    llm.close()
    LLM(str(model_path("llama_tiny")), num_blocks=5).close()  # chosen by the user
    assert _about_the_cache(capfd) == []


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_what_an_engine_says_that_it_takes_is_what_it_takes(name: str) -> None:
    llm = LLM(str(model_path(name)), num_blocks=5, max_num_batched_tokens=40, show_progress=False)
    needed, runner = llm.engine.memory_needed, llm.engine.runner
    llm.close()
    weights = runner.weights
    assert needed["weights"] == weights.values.nbytes
    cache = runner.cache.keys.nbytes + runner.cache.values.nbytes
    assert 0 <= cache - needed["kv_cache"] < 1024  # what vectors read on behind the last block
    assert needed["rope_tables"] == weights.cos.nbytes + weights.sin.nbytes + weights.query_scale.nbytes
    buffers = [buffer for buffer in runner.workspace if isinstance(buffer, np.ndarray)]
    assert needed["working"] >= sum(buffer.nbytes for buffer in buffers) > 0


def _about_the_cache(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if "KV cache" in line]


def test_a_real_limit_of_the_address_space_shows() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, resource.RLIM_INFINITY))\n"
        "from pagellm.engine.execution.memory import read_memory; print(read_memory().total)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 6 << 30
