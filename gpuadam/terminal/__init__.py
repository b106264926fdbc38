"""What the commands, the examples and the benchmarks share: types of options, what is printed and written, and figures."""
