"""What a loss is: a model and a loss or one function, meta-parameters, buffers, and every guard of a forward pass."""
