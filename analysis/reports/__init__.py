"""Tables, figures and sentences for a reader. Nothing is computed here."""
