"""What runs here, and whether it is right."""
