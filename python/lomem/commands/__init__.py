"""The commands of ``lomem``, and what they alone need."""
