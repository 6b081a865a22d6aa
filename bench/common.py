"""What every benchmark shares: interleaved timing, and one form for the result.

A benchmark is a module `bench/NAME.py` with `run(quick: bool) -> list[Result]`. Timing alternates ours and the peer, so that
a busy machine slows both alike; the ratio is the median of the per-round ratios."""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
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


def added_memory(module: str, call: str) -> float:
    "MB that `call`, an expression in `bench.<module>`, needs at its peak beyond what importing took; in a process of its own"
    code = (f'import bench.{module} as b\nfrom pathlib import Path\nfrom caption_nb.meters import memory_use\n'
            'before = memory_use()["resident_MB"]\n'
            'try: Path("/proc/self/clear_refs").write_text("5")   # the peak starts anew, where that is allowed\n'
            f'except OSError: pass\nb.{call}\nprint(memory_use()["peak_MB"] - before)')
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if done.returncode: raise RuntimeError(f'{call}: {done.stderr[-2000:]}')
    return float(done.stdout.splitlines()[-1])


def memory_at_ten_times(name: str, module: str, call: Callable[[int], str], rounds: int = 3, sizes: dict | None = None) -> Result:
    "Memory of `call(10)`, 'ours', and of `call(1)`, 'peer', in MB: a ratio near 1 is flat"
    pairs = [(added_memory(module, call(10)), added_memory(module, call(1))) for _ in range(rounds)]
    ratios = [a/max(b, 1.) for a, b in pairs]
    ten, one = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    return Result(name, ten, one, statistics.median(ratios), 'MB, 10× and 1×', [min(ratios), max(ratios)], sizes or {})


def table(results: list[Result]) -> str:
    "A plain table of results"
    head = f'{"benchmark":<46}{"ours":>12}{"peer":>12}{"ratio":>8}  {"spread":<15}unit'
    rows = [f'{r.name:<46}{r.ours:>12,.1f}{r.peer:>12,.1f}{r.ratio:>8.2f}  {r.spread[0]:>5.2f} – {r.spread[1]:<7.2f}{r.unit}' for r in results]
    return '\n'.join([head, '-'*len(head), *rows])
