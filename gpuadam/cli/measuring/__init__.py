"""Timing, and the rows and plots of the benchmarks."""
