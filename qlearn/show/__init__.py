"""Pictures: trees, credit heat maps, the token inspector. All in one colour-blind safe style."""
