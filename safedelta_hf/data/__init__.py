"""From rows to sequences and batches, and what refusals are measured by."""
