"""FastInst: the network, its objective, its inference, its published weights."""
