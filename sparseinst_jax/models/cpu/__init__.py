"""What only a CPU needs: forms of convolutions that XLA:CPU is fast at."""
