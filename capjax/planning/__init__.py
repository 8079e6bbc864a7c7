"""What a training run needs of the machines, found without them."""
