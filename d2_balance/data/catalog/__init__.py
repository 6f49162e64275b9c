"""Registration of datasets, external sets and class maps."""
