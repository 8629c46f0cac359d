"""Each paper is one self-contained folder here."""
