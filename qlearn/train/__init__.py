"""Second floor: one readable loop a method over one small engine."""
