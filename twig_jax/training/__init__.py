"""Training of the vision tower's warm-up, the base, and the twig."""
