"""The data of each optimizer step."""
