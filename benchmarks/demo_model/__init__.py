"""The trained demo checkpoint: the generated corpus, the training recipe and the measure."""
