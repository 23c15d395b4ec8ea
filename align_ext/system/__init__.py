"""General helpers: files, terminal, signals, memory, checks of options."""
