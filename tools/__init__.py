"""What people run around the method."""
