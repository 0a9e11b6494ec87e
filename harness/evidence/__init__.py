"""What is kept of experiments: their evidence, their history, and pages about them."""
