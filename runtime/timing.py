"""Times several contenders side by side, in turns, so that other work on the machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

WARM_UP = 3


def wall_ms(call: Callable[[], object]) -> float:
    """Milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = WARM_UP,
    elapsed_ms: Callable[[Callable[[], object]], float] = wall_ms,
) -> dict[str, list[float]]:
    """Time every contender `repeats` times.

    After `warm_up` rounds that are not timed, each contender runs once a round, in an order that rotates from round to round.

    Args:
        contenders: name -> the function to call.
        elapsed_ms: calls its argument and returns the milliseconds that it took.

    Returns:
        Name -> the milliseconds of each of its calls, `repeats` of them.
    """
    names = list(contenders)
    for _ in range(warm_up):
        for name in names:
            contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            times[name].append(elapsed_ms(contenders[name]))
        names = names[1:] + names[:1]
    return times
