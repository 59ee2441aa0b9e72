"""The loop one opens first: text in, a trained model out."""
