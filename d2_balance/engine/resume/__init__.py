"""What a resumed run continues from."""
