"""The RPN that takes the losses of d2_balance."""
