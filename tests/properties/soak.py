"""Runs the state machines with fresh random seeds for as long as asked, and prints what they came across.

After a failure, which hypothesis prints as the shortest program that it finds, `--machine M --seed N` runs
the same examples again.
"""

import argparse
import sys
import time
from random import SystemRandom

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.properties.covered import covered
from tests.properties.test_block_manager import BlockManagerMachine
from tests.properties.test_scheduler import SchedulerMachine

MACHINES: dict[str, type[RuleBasedStateMachine]] = {
    "block_manager": BlockManagerMachine,
    "scheduler": SchedulerMachine,
}
ROUND = settings(
    max_examples=200,
    stateful_step_count=50,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)


def run(machine: str, number: int) -> bool:
    """One round of examples; says how to run it again if one fails."""
    try:
        run_state_machine_as_test(seed(number)(MACHINES[machine]), settings=ROUND)
    except BaseException:
        print(
            f"\nagain: python -m tests.properties.soak --machine {machine} --seed {number}", file=sys.stderr
        )
        raise
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long")
    parser.add_argument("--machine", choices=MACHINES, action="append", help="one of them alone")
    parser.add_argument("--seed", type=int, help="one round with this seed")
    arguments = parser.parse_args()
    machines = arguments.machine or list(MACHINES)
    random, end = SystemRandom(), time.monotonic() + arguments.seconds
    try:
        if arguments.seed is not None:
            for machine in machines:
                run(machine, arguments.seed)
        while arguments.seed is None and time.monotonic() < end:
            for machine in machines:
                run(machine, random.getrandbits(32))
    finally:
        width = max(map(len, covered), default=0)
        for what in sorted(covered):
            print(f"{what:{width}} {covered[what]:10,}")


if __name__ == "__main__":
    main()
