"""Measurements: ``python -m benchmarks COMMAND``. See docs/performance.md."""
