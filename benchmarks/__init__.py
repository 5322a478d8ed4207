"""What this project costs, measured: run from a clone (`python -m benchmarks`); no wheel holds this package."""
