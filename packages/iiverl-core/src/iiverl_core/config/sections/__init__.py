"""The typed model of the YAML file: one file per section; `section.py` has their base class, `root.py` the whole."""
