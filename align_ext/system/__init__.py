"""Files, terminal, signals, memory: what any program needs."""
