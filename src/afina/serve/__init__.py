"""Talk to a model. Knows conversations and speakers, nothing of run folders or of how a model was made."""
