"""Second floor: what the paper found, as functions of (policy, reference, data), yours too."""
