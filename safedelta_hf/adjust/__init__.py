"""The only loop over parameters: plan, factor, search, adjust."""
