"""Training: one readable script a stage."""
