"""Truth in numbers: metrics with intervals, paired tests, calibration and curves, over arrays."""
