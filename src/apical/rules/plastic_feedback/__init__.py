"""Feedback that learns: the rules of Kolen and Pollack and of product feedback alignment, and their closed form."""
