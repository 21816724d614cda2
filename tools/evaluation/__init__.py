"""What commands that judge features share."""
