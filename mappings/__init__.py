"""What becomes what: one YAML file per source family, and the code that reads it."""
