"""Checks of the installation, of gradients, and of what heads and tasks have learned."""
