"""What the state machines came across, counted, so that a soak can say what it has tried."""

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import hypothesis.stateful

covered: Counter[str] = Counter()


def rule(**strategies: Any) -> Callable[[Any], Any]:
    """Hypothesis' `rule` for an operation that is counted by its name."""

    def decorate(operation: Any) -> Any:
        @wraps(operation)
        def counted(machine: Any, **arguments: Any) -> None:
            covered[f"operation {operation.__name__}"] += 1
            operation(machine, **arguments)

        return hypothesis.stateful.rule(**strategies)(counted)

    return decorate
