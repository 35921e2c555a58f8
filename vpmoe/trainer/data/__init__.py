"""What each optimizer step trains on."""
