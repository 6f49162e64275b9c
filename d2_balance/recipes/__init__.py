"""A recipe of stages, from pre-training to the re-scored ensemble, as one run that resumes."""
