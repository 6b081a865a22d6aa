"""What every benchmark shares: interleaved timing, and one form for the result.

A benchmark is a module `bench/NAME.py` with `run(quick: bool) -> list[Result]`. Timing alternates ours and the peer, so that
a busy machine slows both alike; the ratio is the median of the per-round ratios."""
from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Callable


@dataclass
class Result:
    "One comparison: `ours` and `peer` in `unit` (higher is better), `ratio` their median per-round quotient"
    name: str
    ours: float
    peer: float
    ratio: float
    unit: str
    spread: list[float]                 # [lowest, highest] ratio over the rounds
    sizes: dict = field(default_factory=dict)


def json_line(results: list[Result]) -> str:
    "One line of JSON: the first of `results`, with the others as a list under 'more'"
    first, *more = map(asdict, results)
    return json.dumps(first | {'more': more})


def compare(name: str, ours: Callable[[], object], peer: Callable[[], object], count: float, unit: str, *,
            rounds: int = 10, warmup: int = 1, sizes: dict | None = None, peer_count: float | None = None) -> Result:
    "Time `ours` and `peer` in turn, `rounds` times; a call does `count` units of work, the peer's `peer_count` if that is given"
    def seconds(f):
        start = time.perf_counter(); f()
        return time.perf_counter() - start
    for _ in range(warmup): ours(); peer()
    times = [(seconds(ours), seconds(peer)) for _ in range(rounds)]
    scale = count/(peer_count or count)
    times = [(o, p*scale) for o, p in times]
    ratios = [p/o for o, p in times]
    mine, theirs = (statistics.median(t[i] for t in times) for i in (0, 1))
    return Result(name, count/mine, count/theirs, statistics.median(ratios), unit, [min(ratios), max(ratios)],
                  {**(sizes or {}), 'rounds': rounds})


def table(results: list[Result]) -> str:
    "A plain table of results"
    head = f'{"benchmark":<46}{"ours":>12}{"peer":>12}{"ratio":>8}  {"spread":<15}unit'
    rows = [f'{r.name:<46}{r.ours:>12,.1f}{r.peer:>12,.1f}{r.ratio:>8.2f}  {r.spread[0]:>5.2f} – {r.spread[1]:<7.2f}{r.unit}' for r in results]
    return '\n'.join([head, '-'*len(head), *rows])
