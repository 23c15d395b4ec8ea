"""The benchmark `align-lora bench`: compares this package's adapters and losses with plain PyTorch and PEFT."""
