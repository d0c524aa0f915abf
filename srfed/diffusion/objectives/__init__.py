"""What the network learns to predict, one class a file; ``srfed/config/choices.py`` names them."""
