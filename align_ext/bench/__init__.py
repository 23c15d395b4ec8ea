"""What `align-lora bench` measures: adapters and losses of this package beside plain PyTorch and PEFT."""
