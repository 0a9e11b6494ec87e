"""At a live server: reached, sampled, probed, and offered its load."""
