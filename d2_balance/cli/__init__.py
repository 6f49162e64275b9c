"""One file per command of `d2-balance`."""
