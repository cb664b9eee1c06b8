"""What the paper does not have. Delete this folder, and what is left is the paper. README.md says what each thing
does."""
