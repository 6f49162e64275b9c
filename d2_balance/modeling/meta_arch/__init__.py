"""Meta architectures that take the losses of d2_balance."""
