"""The typed model of the YAML file: one file a section, `section.py` for what all are made of, `root.py` for the whole."""
