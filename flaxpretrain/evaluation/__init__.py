"""Measures on fixed noise, and ways to look at what a model learned."""
