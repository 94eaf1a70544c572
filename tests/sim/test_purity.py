"""Law 7: the simulator knows the engine and no kernels; replaying a trace loads neither NumPy nor Numba.

Nor does it load what a single command needs: a server of pages, or a cluster's workers.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.test_purity import ROOT, files_of, name_of, packages_of


@pytest.mark.parametrize("path", files_of("sim"), ids=name_of)
def test_the_simulator_does_not_know_the_kernels(path: Path) -> None:
    assert packages_of(path) & {"kernels", "numba", "llvmlite"} == set()


def test_a_trace_is_replayed_without_numpy_and_numba() -> None:
    program = (
        "import sys, pagellm.sim.commands\n"
        "from pagellm.engine import EngineConfig\n"
        "from pagellm.sim import CostModel, Simulator, Trace\n"
        "costs = CostModel.roofline('h100-sxm', 'llama-3.1-8b')\n"
        "trace = Trace.load('examples/traces/azure_2023_conversation.csv')\n"
        "print(Simulator(EngineConfig(), costs).replay(trace).summary['num_finished'] > 0)\n"
        "print(*sorted({'numpy', 'numba', 'llvmlite', 'pagellm.kernels', 'http.server', 'ray'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n\n", "")


@pytest.mark.parametrize(
    ("command", "others"), [("trace", ("replay", "sweep", "fit")), ("replay", ("fit", "lab", "calibrate"))]
)
def test_of_the_simulators_commands_the_chosen_one_alone_is_imported(
    command: str, others: tuple[str, ...]
) -> None:
    program = (
        "import sys\nfrom pagellm.__main__ import main\n"
        "try:\n    main([sys.argv[1], '--help'])\nexcept SystemExit:\n    pass\n"
        "print(*sorted(set(sys.argv[2:]) & {name.rpartition('.')[2] for name in sys.modules"
        " if name.startswith('pagellm.sim.commands.')}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, command, *others],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == ""
    assert f"usage: pagellm {command}" in done.stdout
