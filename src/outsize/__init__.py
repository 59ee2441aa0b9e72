"""Train, fine-tune and run transformer models that are larger than the memory of the machine."""
