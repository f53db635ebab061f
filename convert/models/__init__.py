"""Model families: names, configuration and conversion."""
