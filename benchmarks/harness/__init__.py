"""How the benchmarks measure: inputs, gate, timing, memory, counts, and the rivals that are compared."""
