"""What sits where an nn.Linear sat."""
