"""What this project costs, measured: run from a clone (`python -m benchmarks.scaling`); no wheel holds this package."""
