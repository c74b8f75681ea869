"""Training of one member: it sees training and inner-validation bags, and nothing else."""
