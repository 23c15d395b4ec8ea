"""One training step, from task ids to the gradient in every latent."""
