"""What a row of a batch adds to the gradient of a parameter, without that gradient."""
