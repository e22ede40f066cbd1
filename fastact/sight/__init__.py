"""What the activations of a model do to the signal and to the gradient."""
