"""Measurements: ``python -m benchmarks cpu|compile-time|memory|gpu``. See docs/performance.md."""
