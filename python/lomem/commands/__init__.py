"""The commands of ``lomem``, and code used only by them."""
