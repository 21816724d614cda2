"""Dense prediction: apply an encoder in windows over the lungs of a scan."""
