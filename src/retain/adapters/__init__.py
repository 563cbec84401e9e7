"""Adapter kinds, the bank that holds them, and the PEFT format on disk."""
