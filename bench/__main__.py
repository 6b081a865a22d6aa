"""`python -m bench NAME… | --all [--quick] [--json] [--threads N] [what is NAME's own]`"""
import argparse
import importlib
import os
import pkgutil
import sys

import bench


def names() -> list[str]:
    "Every benchmark: the modules of this package that are not its machinery"
    return sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in ('common', '__main__'))


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m bench', description=f'Benchmarks: {", ".join(names())}')
    parser.add_argument('name', nargs='*', help='which to run')
    parser.add_argument('--all', action='store_true', help='run every benchmark')
    parser.add_argument('--quick', action='store_true', help='small sizes, few rounds: shows that it works, not how fast')
    parser.add_argument('--json', action='store_true', help="end each benchmark with one line of JSON: its first row, and the rest under 'more'")
    parser.add_argument('--threads', type=int, default=1, help='CPU threads for torch and BLAS (default 1: captions per CPU-second)')
    args, rest = parser.parse_known_args()
    chosen = names() if args.all else args.name
    unknown = [n for n in chosen if n not in names()]
    if unknown or not chosen: parser.error(f'{"unknown: " + ", ".join(unknown) if unknown else "name a benchmark"}; there are {", ".join(names())}')
    for var in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[var] = str(args.threads)
    import torch   # after the thread variables, which are read at import
    from bench.common import json_line, table
    torch.set_num_threads(args.threads)
    for name in chosen:
        module = importlib.import_module(f'bench.{name}')
        if rest and not hasattr(module, 'options'): parser.error(f'{name} does not know {" ".join(rest)}')
        results = module.run(quick=args.quick, **(module.options(rest) if rest else {}))
        print(table(results), flush=True)
        if args.json: print(json_line(results), flush=True)
    return 0


if __name__ == '__main__': sys.exit(main())
