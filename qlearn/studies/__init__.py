"""Third floor: what `make results` measures, in worlds whose truth is known; one module a study."""
