"""A finished student in a form to ship, and back."""
