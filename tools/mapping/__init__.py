"""Dense prediction: apply an encoder to windows over the lungs of a scan."""
