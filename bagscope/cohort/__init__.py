"""Cohorts: the table, and runs that one bad slide does not stop. Knows no stage."""
