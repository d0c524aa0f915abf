"""Ways through the reverse process, one class a file; ``srfed/config/choices.py`` names them."""
