"""Forms of operations that pay only where XLA compiles for a CPU."""
