"""The G-effect of training steps, from the gradients that they make anyway."""
