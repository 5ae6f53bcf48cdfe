"""Throughput, FLOP formulas, and compilation for hardware that is not there."""
