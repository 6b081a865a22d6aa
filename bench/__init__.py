"""Side-by-side benchmarks: `python -m bench NAME`, `--all`, `--quick`, `--json`."""
