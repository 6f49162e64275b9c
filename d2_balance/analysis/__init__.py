"""What `d2-balance analyze` counts, and what it shows of it."""
