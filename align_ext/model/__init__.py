"""A model and its adapters: put in, loaded, merged, taken out, counted."""
