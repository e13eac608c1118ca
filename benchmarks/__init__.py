"""Speed and memory of comfyd, as ratios against a raw client of the same engine. ``python -m benchmarks --help``."""
