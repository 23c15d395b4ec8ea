"""As in Unsloth."""
