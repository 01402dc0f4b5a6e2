"""A model and what is attached to it: transformers and PEFT as they are. Knows ids only, no text and no rows."""
