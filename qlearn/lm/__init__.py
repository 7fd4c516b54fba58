"""First floor: a causal language model as a policy over tokens."""
