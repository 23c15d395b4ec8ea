"""An adapter's folder: written, read strictly, in stock PEFT's form."""
