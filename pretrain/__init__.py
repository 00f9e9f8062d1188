"""A decoder-only transformer: trained, sampled, scored."""
